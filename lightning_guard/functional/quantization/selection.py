"""Which layers of a network are quantised, and with which ranges."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lightning_guard.functional.quantization.layers import QuantizedLayer, Range, quantizable


def chosen_layers(
    network: nn.Module,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    without: Iterable[nn.Module] = (),
) -> list[QuantizedLayer]:
    """The layers of a network to quantise.

    Args:
        network: any module.
        targets: names or patterns (``*``) of layers; None for all that can be.
        ignore: names or patterns of layers to leave alone.
        without: modules of the network whose layers are none of it, e.g. metrics.

    | case                                    | result                                              |
    |-----------------------------------------|-----------------------------------------------------|
    | a weight shared by two chosen layers    | both, unless its channels lie in different dimensions |
    | a weight that another module holds too  | its layers are left out                             |

    Raises:
        ValueError: for a pattern that matches nothing, a layer whose weight no grid can hold, and if nothing is left.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> [layer.name for layer in chosen_layers(net, ignore=["2"])]
        ['0']
    """
    inside = {module for one in without for module in one.modules()}
    layers = {name: layer for name, layer in quantizable(network).items() if layer.module not in inside}
    there = ", ".join(layers) or "no Linear, no convolution and no embedding"
    for option, patterns in (("targets", targets or ()), ("ignore", ignore)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in layers):
                raise ValueError(f"{option}={pattern!r} matches nothing that can be quantised; there are {there}")
    wanted = {
        name: layer
        for name, layer in layers.items()
        if (targets is None or any(fnmatchcase(name, pattern) for pattern in targets))
        and not any(fnmatchcase(name, pattern) for pattern in ignore)
    }
    for layer in wanted.values():
        _check(layer)
    while True:  # a layer that falls out may share another weight
        places = {(slot.owner, slot.key) for layer in wanted.values() for slot in layer.slots}
        held = {p for m in network.modules() for key, p in m._parameters.items() if (m, key) not in places}
        kept = {n: one for n, one in wanted.items() if not any(slot.weight in held for slot in one.slots)}
        if len(kept) == len(wanted):
            break
        wanted = kept
    if not wanted:
        raise ValueError(f"no layer is left to quantise; there are {there}")
    axes: dict[nn.Parameter, tuple[str, int]] = {}
    for name, layer in wanted.items():
        for slot in layer.slots:
            other, axis = axes.setdefault(slot.weight, (name, slot.axis))
            if axis != slot.axis:
                raise ValueError(
                    f"{other} and {name} share a weight whose output channels lie in different dimensions, so no grid "
                    f"fits both; give ignore=[{name!r}]"
                )
    return list(wanted.values())


def _check(layer: QuantizedLayer) -> None:
    module, problem = layer.module, ""
    if is_parametrized(module) or any(slot.key not in slot.owner._parameters for slot in layer.slots):
        problem = "its weight is computed from other parameters (weight_norm, pruning); remove that"
    elif any(is_lazy(slot.weight) for slot in layer.slots):
        problem = "its weight has no shape yet; pass an example through the lazy modules before training"
    elif any(slot.weight.dtype not in (torch.float32, torch.float64) for slot in layer.slots):
        problem = f"{layer.slots[0].weight.dtype} weights cannot hold a grid exactly; keep weights in float32"
    elif getattr(module, "max_norm", None) is not None or getattr(module, "sparse", False):
        problem = "max_norm and sparse gradients change or need the weight itself; set neither"
    if problem:
        raise ValueError(f"{layer.name}: {problem}, or give ignore=[{layer.name!r}]")


def ranges_by_layer(layers: Iterable[QuantizedLayer], ranges: Range | Mapping[str, Range]) -> dict[str, Range]:
    """The range of each layer whose inputs are rounded: one pair for all, or by name, or by the first pattern.

    Raises:
        ValueError: for a layer without a range, and for a name or pattern that no layer has.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
        >>> ranges_by_layer(chosen_layers(net), {"1": (0.0, 6.0), "*": (-1.0, 1.0)})
        {'0': (-1.0, 1.0), '1': (0.0, 6.0)}
    """
    names = [layer.name for layer in layers if layer.inputs]
    if not isinstance(ranges, Mapping):
        return dict.fromkeys(names, ranges)
    for pattern in ranges:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"ranges={pattern!r} names no layer whose inputs are rounded; there are {', '.join(names)}"
            )
    found = {name: [pair for pattern, pair in ranges.items() if fnmatchcase(name, pattern)] for name in names}
    missing = [name for name, pairs in found.items() if not pairs]
    if missing:
        raise ValueError(f"ranges has no pair for the inputs of {', '.join(missing)}; give one, '*' for the rest")
    return {name: ranges.get(name, pairs[0]) for name, pairs in found.items()}
