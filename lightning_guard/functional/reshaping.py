"""Layers of other sizes: taking channels out in place, and taking on the shapes of stored weights."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
MIXING = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)  # layers that sum over their input channels
RESIZABLE = (*MIXING, *BATCH_NORMS, nn.GroupNorm, nn.PReLU)

Plan = Mapping[str, Mapping[str, Sequence[int]]]  # layer -> {"out": channels that stay, "in": channels that stay}


def depthwise(layer: nn.Module) -> bool:
    """Whether a convolution gives each channel one filter of its own."""
    return isinstance(layer, CONVOLUTIONS) and 1 < layer.groups == layer.in_channels == layer.out_channels


def apply_plan(module: nn.Module, plan: Plan, optimizers: Iterable[Optimizer] = ()) -> None:
    """Take channels out of a network in place: parameters stay the same objects, with fewer entries.

    Args:
        module: the network that the plan was made for.
        plan: for each layer by name the output (``"out"``) and input channels (``"in"``) that stay, in their order.
        optimizers: whose state of these parameters (momentum and the like) is cut in the same way.

    | case                                       | result                                                    |
    |--------------------------------------------|-----------------------------------------------------------|
    | depthwise convolution                      | its groups follow its channels                            |
    | GroupNorm                                  | the size of a group stays, so whole groups go             |
    | a gradient of the old shape                | forgotten                                                 |
    | optimizer state of another shape           | refused before anything is changed, if it is no scalar    |

    Raises:
        ValueError: if a layer is not there, cannot lose channels, or has not the channels that are to stay.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> apply_plan(net, {"0": {"out": [1, 3]}, "2": {"in": [1, 3]}})
        >>> net(torch.zeros(5, 2)).shape, net[0].out_features, net[2].in_features
        (torch.Size([5, 1]), 2, 2)
    """
    layers, optimizers = dict(module.named_modules()), list(optimizers)
    cuts = [cut for name, kept in plan.items() for cut in _cuts(name, layers.get(name), kept)]
    for _, _, _, tensor, dim, index in cuts:
        for optimizer in optimizers:
            for key, value in optimizer.state.get(tensor, {}).items():
                if isinstance(value, Tensor) and value.numel() > 1 and value.shape != tensor.shape:
                    raise ValueError(
                        f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for a parameter of "
                        f"shape {tuple(tensor.shape)}, which cannot be cut; use SGD, Adam or AdamW"
                    )
        if len(index) and int(index.max()) >= tensor.shape[dim]:
            raise ValueError(
                f"channel {int(index.max())} is to stay of {tensor.shape[dim]}; the plan is of another network"
            )
    for _, _, _, tensor, dim, index in cuts:
        index = index.to(tensor.device)
        for optimizer in optimizers:
            for key, value in optimizer.state.get(tensor, {}).items():
                if isinstance(value, Tensor) and value.shape == tensor.shape and value.dim():
                    optimizer.state[tensor][key] = value.index_select(dim, index).contiguous()
        _set(tensor, tensor.detach().index_select(dim, index).contiguous())
    for name, kept in plan.items():
        _resized(layers[name], *(len(kept[side]) if side in kept else None for side in ("out", "in")))


def reshape_like(module: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Give a network's layers the shapes of stored weights, so that ``load_state_dict`` takes them.

    For weights of a network that lost channels (:func:`apply_plan`) or whose layers were factorised
    (:func:`~lightning_guard.functional.lowrank.factorized`), and back. Values are not loaded: what has another shape
    is zero afterwards. Layers that fit stay as they are, so this may be called any number of times.

    Returns:
        The names of the layers that changed.

    Raises:
        ValueError: if a layer cannot have the shape of its weights.

    Example:
        >>> small = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
        >>> reshape_like(net, small.state_dict())
        ['0', '1']
        >>> net.load_state_dict(small.state_dict())
        <All keys matched successfully>
    """
    changed = []
    for name, layer in list(module.named_modules()):
        prefix = f"{name}." if name else ""
        if f"{prefix}weight" not in weights and f"{prefix}1.weight" in weights and isinstance(layer, MIXING):
            replace(module, name, blank_pair(layer, weights[f"{prefix}0.weight"], f"{prefix}1.bias" in weights))
            changed.append(name)
        elif f"{prefix}weight" in weights and is_pair(layer):
            replace(module, name, blank_merged(layer))
            changed.append(name)
    for name, layer in module.named_modules():
        if not isinstance(layer, RESIZABLE):
            continue
        prefix = f"{name}." if name else ""
        own = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
        shapes = {key: weights[prefix + key].shape for key, _ in own if prefix + key in weights}
        if all(tensor.shape == shapes.get(key, tensor.shape) for key, tensor in own):
            continue
        out, inn = _sizes(name, layer, shapes)
        for key, tensor in own:
            if tensor.shape != shapes.get(key, tensor.shape):
                _set(tensor, tensor.new_zeros(shapes[key]))
        _resized(layer, out, inn)
        if name not in changed:
            changed.append(name)
    return changed


def replace(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of the one with this name."""
    parent, _, key = name.rpartition(".")
    setattr(module.get_submodule(parent), key, layer)


# Pairs of thin layers in the place of one ------------------------------------------------------------------------


def is_pair(layer: nn.Module) -> bool:
    """Whether a layer is two without anything between, as :func:`blank_pair` makes them."""
    if type(layer) is not nn.Sequential or len(layer) != 2 or type(layer[0]) is not type(layer[1]):
        return False
    first, second = (layer[i] for i in (0, 1))
    if not isinstance(first, MIXING) or not isinstance(second, MIXING) or first.bias is not None:
        return False
    return len(first.weight) == second.weight.shape[1]


def blank_pair(layer: nn.Module, first: Tensor | int, bias: bool) -> nn.Sequential:
    """Two layers that do in two steps what a Linear or convolution does: to a few channels, and from these to all.

    Args:
        layer: the Linear or convolution.
        first: how many channels there are between, or the first layer's weights.
        bias: whether the second has one.
    """
    rank = first if isinstance(first, int) else len(first)
    options: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        return nn.Sequential(
            nn.utils.skip_init(nn.Linear, layer.in_features, rank, bias=False, **options),
            nn.utils.skip_init(nn.Linear, rank, layer.out_features, bias=bias, **options),
        )
    if not isinstance(layer, CONVOLUTIONS) or layer.groups > 1:
        raise ValueError(f"a {type(layer).__name__} with groups or transposed cannot be two thin layers")
    cls: Any = next(kind for kind in CONVOLUTIONS if isinstance(layer, kind))
    places = {key: getattr(layer, key) for key in ("stride", "padding", "dilation", "padding_mode")}
    return nn.Sequential(
        nn.utils.skip_init(cls, layer.in_channels, rank, layer.kernel_size, bias=False, **places, **options),
        nn.utils.skip_init(cls, rank, layer.out_channels, 1, bias=bias, **options),
    )


def blank_merged(pair: nn.Module) -> nn.Module:
    """The one layer that :func:`blank_pair` was made for."""
    first, second = pair.children()
    options: dict[str, Any] = {"bias": second.bias is not None, "device": first.weight.device}
    options["dtype"] = first.weight.dtype
    if isinstance(first, nn.Linear) and isinstance(second, nn.Linear):
        return nn.utils.skip_init(nn.Linear, first.in_features, second.out_features, **options)
    assert isinstance(first, CONVOLUTIONS)
    assert isinstance(second, CONVOLUTIONS)
    places = {key: getattr(first, key) for key in ("stride", "padding", "dilation", "padding_mode")}
    cls: Any = type(first)
    return nn.utils.skip_init(cls, first.in_channels, second.out_channels, first.kernel_size, **places, **options)


# Sizes of layers -------------------------------------------------------------------------------------------------


def _cuts(
    name: str, layer: nn.Module | None, kept: Mapping[str, Sequence[int]]
) -> Iterator[tuple[str, nn.Module, str, Tensor, int, Tensor]]:
    if not isinstance(layer, RESIZABLE):
        what = "is not there" if layer is None else f"is a {type(layer).__name__}"
        raise ValueError(f"layer {name!r} of the plan {what}, so it cannot lose channels")
    if isinstance(layer, nn.GroupNorm) and layer.num_channels // layer.num_groups:
        size = layer.num_channels // layer.num_groups
        blocks = [kept["out"][i : i + size] for i in range(0, len(kept["out"]), size)]
        if any(list(block) != list(range(block[0], block[0] + size)) or block[0] % size for block in blocks):
            raise ValueError(
                f"layer {name!r} normalises groups of {size} channels, and parts of a group are to go; take whole ones"
            )
    for side in ("out", "in"):
        if side not in kept or (side == "in" and depthwise(layer)):
            continue
        index = torch.tensor(list(kept[side]), dtype=torch.long)
        for key, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            dim = _dim(layer, tensor, side)
            if dim is not None:
                yield name, layer, key, tensor, dim, index


def _dim(layer: nn.Module, tensor: Tensor, side: str) -> int | None:
    """Which dimension of a layer's tensor counts its output or input channels; None if none does."""
    if isinstance(layer, MIXING):
        first = "in" if isinstance(layer, TRANSPOSED) else "out"
        return (0 if side == first else 1) if tensor.dim() > 1 else 0 if side == "out" else None
    return 0 if side == "out" and tensor.dim() and tensor.numel() > 1 else None  # not of a shared slope of PReLU


def _sizes(name: str, layer: nn.Module, shapes: Mapping[str, torch.Size]) -> tuple[int | None, int | None]:
    """Output and input channels of a layer whose tensors have these shapes."""
    if not isinstance(layer, MIXING):
        return next(shape[0] for shape in shapes.values() if len(shape)), None
    weight, shape = layer.weight, shapes["weight"]
    if weight.shape[2:] != shape[2:] or len(weight.shape) != len(shape):
        raise ValueError(
            f"weights of {name!r} have shape {tuple(shape)}, and the layer's have {tuple(weight.shape)}: that is "
            "another kind of layer, not one with fewer channels"
        )
    if depthwise(layer):
        return shape[0], shape[0]
    if not isinstance(layer, nn.Linear) and layer.groups > 1:
        raise ValueError(f"weights of {name!r} have shape {tuple(shape)}, and a grouped convolution keeps its channels")
    return (shape[1], shape[0]) if isinstance(layer, TRANSPOSED) else (shape[0], shape[1])


def _resized(layer: Any, out: int | None, inn: int | None) -> None:
    """Let a layer's attributes say what its tensors hold."""
    sizes: dict[str, int | None] = {}
    if isinstance(layer, nn.GroupNorm):
        assert out is not None
        size = layer.num_channels // layer.num_groups
        if out % size:
            raise ValueError(f"{out} channels do not fall into groups of {size}, as GroupNorm has them")
        layer.num_channels, layer.num_groups = out, out // size
    elif isinstance(layer, BATCH_NORMS):
        sizes = {"num_features": out}
    elif isinstance(layer, nn.PReLU):
        sizes = {"num_parameters": out if layer.num_parameters > 1 else 1}
    elif isinstance(layer, nn.Linear):
        sizes = {"out_features": out, "in_features": inn}
    else:
        alone = depthwise(layer)
        sizes = {"out_channels": out, "in_channels": out if alone else inn, "groups": out if alone else None}
    for key, width in sizes.items():
        if width is not None:
            setattr(layer, key, width)


def _set(tensor: Tensor, value: Tensor) -> None:
    """Other contents of another shape for the same parameter or buffer."""
    tensor.grad = None
    # A graph that somebody still holds keeps the node that accumulates gradients, which expects the old shape and is
    # only made anew with another type.
    other = torch.float64 if tensor.dtype != torch.float64 else torch.float32
    tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = value
