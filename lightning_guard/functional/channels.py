"""Which channels of a network hang together, which matter least, and a plan for what stays."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_guard.functional.random import stream
from lightning_guard.functional.reshaping import (
    BATCH_NORMS,
    MIXING,
    RESIZABLE,
    TRANSPOSED,
    Plan,
    apply_plan,
    depthwise,
)

Importance = Literal["magnitude", "bn_scale", "random"]
Forward = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Part:
    """Channels of one layer that come and go with those of a group.

    Attributes:
        layer: its name.
        side: ``"out"`` of those that make or pass channels on, ``"in"`` of those that sum over them.
        index: positions in the layer, the same number for each channel of the group.
        root: the channel of the group that each position belongs to.
    """

    layer: str
    side: str
    index: tuple[int, ...]
    root: tuple[int, ...]


@dataclass(frozen=True)
class Coupled:
    """Channels that can only go together, since layers add them or pass them on.

    Attributes:
        channels: how many there are.
        unit: how many neighbours must go at once, the size of a group of GroupNorm.
        parts: where they are.
        makers: the layers that make them, by name.
        obstacle: why none can go; empty if they can.
    """

    channels: int
    unit: int
    parts: tuple[Part, ...]
    makers: tuple[str, ...]
    obstacle: str = ""


def coupled_channels(module: nn.Module, example: Any, forward: Forward) -> list[Coupled]:
    """The groups of channels of a network, by the dependency graph of torch-pruning (Fang et al., 2023).

    Args:
        module: a network; a copy of it is traced.
        example: inputs of two examples.
        forward: ``(module, example) -> outputs``.

    Raises:
        ImportError: without torch-pruning.
        ValueError: if the network cannot be traced.

    Reference:
        Fang et al., DepGraph: towards any structural pruning, CVPR 2023, arXiv:2301.12900.
    """
    try:
        from torch_pruning import DependencyGraph
    except ImportError as error:
        raise ImportError(
            "channels are found by torch-pruning, which is not installed; pip install 'lightning-guard[prune]'"
        ) from error
    traced = copy.deepcopy(module).eval().requires_grad_(True)
    owners: dict[nn.Parameter, list[str]] = {}
    for name, parameter in traced.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name.rpartition(".")[0])
    shared = {name: others for others in owners.values() if len(others) > 1 for name in others}
    names = {layer: name for name, layer in traced.named_modules()}
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            graph = DependencyGraph().build_dependency(traced, example, forward_fn=forward, verbose=False)
            groups = list(graph.get_all_groups())
    except Exception as error:
        raise ValueError(
            f"torch-pruning cannot follow the channels through {type(module).__name__}: "
            f"{type(error).__name__}: {error}; prune weights instead, with MagnitudePruning"
        ) from error
    return [_coupled(graph, group, names, shared) for group in groups]


def _coupled(graph: Any, group: Any, names: Mapping[nn.Module, str], shared: Mapping[str, Sequence[str]]) -> Coupled:
    parts, makers, obstacles, unit = [], [], [], 1
    channels = len(group[0].idxs)
    for item in group:
        layer, index, root = item.dep.target.module, item.idxs, item.root_idxs
        if layer not in names:
            if type(layer).__name__ == "_OutputOp":
                obstacles.append("they are the outputs")
            elif isinstance(layer, nn.Parameter):
                obstacles.append("a bare parameter has them too")
            continue
        if isinstance(layer, nn.PReLU) and layer.num_parameters == 1:
            continue
        out = graph.is_out_channel_pruning_fn(item.dep.handler) or not isinstance(layer, MIXING)
        obstacles += _obstacles(names[layer], layer, index, root, channels)
        if names[layer] in shared:
            obstacles.append(f"{' and '.join(shared[names[layer]])} share a parameter")
        parts.append(Part(names[layer], "out" if out else "in", tuple(index), tuple(root)))
        if isinstance(layer, nn.GroupNorm):
            unit = math.lcm(unit, layer.num_channels // layer.num_groups)
        if out and isinstance(layer, MIXING) and not depthwise(layer):
            makers.append(names[layer])
    if not any(part.side == "in" for part in parts):
        obstacles.append("they are the outputs")
    return Coupled(channels, unit, tuple(parts), tuple(makers), next(iter(obstacles), ""))


def _obstacles(name: str, layer: nn.Module, index: Sequence[int], root: Sequence[int], channels: int) -> Iterator[str]:
    kind = type(layer).__name__
    if not isinstance(layer, RESIZABLE):
        yield f"{name} is a {kind}, which computes with all of them at once"
        return
    if isinstance(layer, MIXING) and not isinstance(layer, nn.Linear) and layer.groups > 1 and not depthwise(layer):
        yield f"{name} is a convolution in {layer.groups} groups"
    if is_parametrized(layer) or (isinstance(layer, MIXING) and "weight" not in layer._parameters):
        yield f"the weight of {name} is computed from other parameters"
    if isinstance(layer, (*BATCH_NORMS, nn.GroupNorm)) and not layer.state_dict():
        yield f"{name} has nothing in a checkpoint that tells its size"
    if isinstance(layer, nn.GroupNorm):
        straight = tuple(i - index[0] for i in index) == tuple(range(len(index))) == tuple(root)
        if layer.num_groups == 1 or not straight or index[0] % (layer.num_channels // layer.num_groups):
            yield f"{name} normalises over all of them" if layer.num_groups == 1 else f"{name} mixes them with others"
    if any(r is None for r in root) or len(index) % channels:
        yield f"{name} holds them in an order that is not known"


def channel_scores(
    module: nn.Module, group: Coupled, importance: Importance, generator: torch.Generator | None = None
) -> Tensor:
    r"""How much each channel of a group matters; the mean over a group is about 1.

    | ``importance`` | score                                                                                      |
    |----------------|--------------------------------------------------------------------------------------------|
    | ``magnitude``  | squared norms of the weights that make, scale and read a channel, each layer's over its mean |
    | ``bn_scale``   | the absolute scale in the norm layers (Liu et al., 2017)                                   |
    | ``random``     | uniform numbers of ``generator``                                                           |

    Returns:
        Scores of shape ``(channels,)``.

    Raises:
        ValueError: with ``bn_scale`` if no norm layer scales these channels.

    Reference:
        Liu et al., Learning efficient convolutional networks through network slimming, ICCV 2017, arXiv:1708.06519.
    """
    if importance == "random":
        return torch.rand(group.channels, generator=generator)
    scores = torch.zeros(group.channels, dtype=torch.float64)
    counted = 0
    for part in group.parts:
        layer = module.get_submodule(part.layer)
        weight = getattr(layer, "weight", None)
        scales = isinstance(layer, (*BATCH_NORMS, nn.GroupNorm))
        if weight is None or (importance == "bn_scale" and not scales):
            continue
        values = weight.detach().double().cpu()
        transposed = isinstance(layer, TRANSPOSED)
        if values.dim() > 1 and (part.side == "in") is not transposed and not depthwise(layer):
            values = values.transpose(0, 1)
        values = values.reshape(len(values), -1)[list(part.index)]
        norms = values.abs().sum(1) if importance == "bn_scale" else values.square().sum(1)
        each = torch.zeros_like(scores).index_add_(0, torch.tensor(part.root), norms)
        scores += each / each.mean().clamp_min(1e-300)
        counted += 1
    if not counted:
        raise ValueError(
            f"importance={importance!r} needs a norm layer behind {', '.join(group.makers)}, and there is none; "
            "give importance='magnitude', or leave it out with ignore"
        )
    return scores / counted


def channels_to_keep(
    scores: Sequence[Tensor],
    ratio: float,
    scope: Literal["global", "layer"] = "global",
    round_to: int = 1,
    units: Sequence[int] | None = None,
) -> list[list[int]]:
    """The channels of each group that stay when the least important ``ratio`` of them goes.

    Args:
        scores: of the channels of each group, ``(C,)``.
        ratio: fraction of the channels to take out, in [0, 1).
        scope: ``"layer"`` takes the same fraction out of each group, ``"global"`` compares all of them.
        round_to: what stays is rounded up to a multiple of it, since processors compute in such blocks.
        units: how many neighbours of each group go at once; 1 if not given. They count by their mean.

    | case                                           | result                                    |
    |------------------------------------------------|-------------------------------------------|
    | ``ratio=0``                                    | everything stays                          |
    | a group smaller than the multiple it must have | it stays whole                            |
    | a group that would lose all with ``global``    | the smallest multiple of it stays         |
    | equal scores                                   | the earlier ones stay                     |

    Returns:
        Positions in ascending order, a list a group.

    Raises:
        ValueError: if ``ratio`` is outside [0, 1), ``round_to`` is below 1 or ``scope`` is unknown.

    Example:
        >>> channels_to_keep([torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([9.0, 8.0])], ratio=0.5)
        [[0], [0, 1]]
        >>> channels_to_keep([torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([9.0, 8.0])], 0.5, scope="layer")
        [[0, 2], [0]]
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio={ratio} is no fraction of channels to take out; give a number in [0, 1)")
    if round_to < 1:
        raise ValueError(f"round_to={round_to} is no number of channels; give at least 1")
    if scope not in ("global", "layer"):
        raise ValueError(f"scope={scope!r} is not known; give 'global' or 'layer'")
    units = [1] * len(scores) if units is None else units
    blocks = [score.double().reshape(-1, unit).mean(1) for score, unit in zip(scores, units, strict=True)]
    goals = [len(score) * (1 - ratio) for score in scores]
    if scope == "global" and scores:
        every = torch.cat(blocks)
        sizes = torch.cat([torch.full((len(b),), float(unit)) for b, unit in zip(blocks, units, strict=True)])
        order = every.sort(descending=True, stable=True).indices
        stay = torch.zeros(len(every), dtype=torch.bool)
        stay[order[: int((sizes[order].cumsum(0) < sum(goals) - 1e-9).sum()) + 1]] = True
        goals = [
            float(part.sum()) * unit for part, unit in zip(stay.split([len(b) for b in blocks]), units, strict=True)
        ]
    kept = []
    for score, block, unit, goal in zip(scores, blocks, units, goals, strict=True):
        multiple = math.lcm(unit, round_to)
        count = max(math.ceil(goal / multiple - 1e-9), 1) * multiple
        if count >= len(score):
            kept.append(list(range(len(score))))
            continue
        best = block.sort(descending=True, stable=True).indices[: count // unit].sort().values
        kept.append([i for b in best.tolist() for i in range(b * unit, (b + 1) * unit)])
    return kept


def channel_plan(
    module: nn.Module, groups: Sequence[Coupled], kept: Sequence[Sequence[int]]
) -> dict[str, dict[str, list[int]]]:
    """What stays of each layer when these channels of each group stay, for :func:`~.reshaping.apply_plan`."""
    gone: dict[tuple[str, str], set[int]] = {}
    for group, stay in zip(groups, kept, strict=True):
        dropped = set(range(group.channels)) - set(stay)
        for part in group.parts if dropped else ():
            lost = {i for i, root in zip(part.index, part.root, strict=True) if root in dropped}
            gone[part.layer, part.side] = gone.get((part.layer, part.side), set()) | lost
    plan: dict[str, dict[str, list[int]]] = {}
    for (name, side), lost in gone.items():
        width = _width(module.get_submodule(name), side)
        plan.setdefault(name, {})[side] = sorted(set(range(width)) - lost)
    return plan


def removes_exactly(module: nn.Module, example: Any, forward: Forward, plan: Plan) -> bool:
    """Whether a network without these channels computes what it does when nobody reads them.

    Asked of copies with random weights, so that no weight that happens to be zero hides a mistake: in one the weights
    that read the channels are set to zero, from the other they are taken out.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> def forward(net, x): return net(x)
        >>> removes_exactly(net, torch.ones(2, 2), forward, {"0": {"out": [1, 3]}, "2": {"in": [1, 3]}})
        True
        >>> removes_exactly(net, torch.ones(2, 2), forward, {"0": {"out": [1, 3]}, "2": {"in": [1, 2]}})
        False
    """
    masked = copy.deepcopy(module).eval()
    generator = stream(0)
    with torch.no_grad():
        for tensor in (*masked.parameters(), *masked.buffers()):
            if tensor.is_floating_point():  # positive, for variances are among them
                fan_in = tensor.numel() // max(len(tensor), 1) if tensor.dim() else 1
                values = torch.rand(tensor.shape, generator=generator) / max(fan_in, 1) ** 0.5
                if tensor.dim() > 1:
                    values = 2 * values - values.amax()
                tensor.copy_(values)
        pruned = copy.deepcopy(masked)
        for name, kept in plan.items():
            layer: Any = masked.get_submodule(name)
            if "in" in kept and not depthwise(layer):
                unread = torch.ones(_width(layer, "in"), dtype=torch.bool)
                unread[list(kept["in"])] = False
                layer.weight[(unread,) if isinstance(layer, TRANSPOSED) else (slice(None), unread)] = 0
        try:
            apply_plan(pruned, plan)
            expected, found = forward(masked, example), forward(pruned, example)
        except (RuntimeError, ValueError, IndexError):  # shapes that do not meet
            return False
    close = expected.shape == found.shape and bool(expected.isfinite().all())
    return close and bool((expected - found).abs().max() <= 1e-4 * expected.abs().max().clamp_min(1e-6))


def choose(
    module: nn.Module,
    example: Any,
    forward: Forward,
    ratio: float,
    importance: Importance = "magnitude",
    scope: Literal["global", "layer"] = "global",
    round_to: int = 1,
    spared: Callable[[Coupled], str] = lambda group: "",
    seed: int = 0,
) -> tuple[dict[str, dict[str, list[int]]], dict[str, str]]:
    """A plan that takes the least important channels out, each group of them proven by :func:`removes_exactly`.

    Args:
        module: the network.
        example: inputs of two examples.
        forward: ``(module, example) -> outputs``.
        ratio: fraction of the channels that can go that goes.
        importance: see :func:`channel_scores`.
        scope: see :func:`channels_to_keep`.
        round_to: see :func:`channels_to_keep`.
        spared: why a group is to stay whole; empty if it need not.
        seed: of ``random``.

    Returns:
        The plan for :func:`~.reshaping.apply_plan`, and why the layers that stay whole do, by name.
    """
    left: dict[str, str] = {}
    groups = []
    for group in coupled_channels(module, example, forward):
        why = group.obstacle or spared(group)
        left.update({name: why for name in group.makers if why})
        if not why:
            groups.append(group)
    while True:
        scores = [channel_scores(module, group, importance, stream(seed, i)) for i, group in enumerate(groups)]
        kept = channels_to_keep(scores, ratio, scope, round_to, [group.unit for group in groups])
        wrong = [
            group
            for group, stay in zip(groups, kept, strict=True)
            if len(stay) < group.channels
            and not removes_exactly(module, example, forward, channel_plan(module, [group], [stay]))
        ]
        if not wrong:
            break
        left.update({name: "channels there are mixed with others" for group in wrong for name in group.makers})
        groups = [group for group in groups if group not in wrong]
    for group, stay in zip(groups, kept, strict=True):
        if len(stay) == group.channels and ratio:
            multiple = math.lcm(group.unit, round_to)
            left.update(dict.fromkeys(group.makers, f"of {group.channels} channels, multiples of {multiple} stay"))
    plan = channel_plan(module, groups, kept)
    if plan and not removes_exactly(module, example, forward, plan):
        raise ValueError(f"the channels of {', '.join(plan)} cannot go together; name fewer layers with targets")
    return plan, left


def multiplications(module: nn.Module, example: Any, forward: Forward) -> float:
    """Multiply-accumulates of Linear and convolution layers for the two examples, halved.

    Example:
        >>> multiplications(nn.Linear(3, 2), torch.ones(2, 3), lambda net, x: net(x))
        6.0
    """
    found = []

    def count(layer: Any, args: Any, output: Tensor) -> None:
        places = args[0] if isinstance(layer, TRANSPOSED) else output
        found.append(places.numel() * layer.weight[0].numel())

    hooks = [layer.register_forward_hook(count) for layer in module.modules() if isinstance(layer, MIXING)]
    try:
        with torch.no_grad():
            forward(module, example)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(found) / 2


def _width(layer: Any, side: str) -> int:
    if isinstance(layer, MIXING):
        kind = "features" if isinstance(layer, nn.Linear) else "channels"
        return int(getattr(layer, f"{side}_{kind}"))
    if isinstance(layer, nn.PReLU):
        return int(layer.num_parameters)
    return int(layer.num_channels if isinstance(layer, nn.GroupNorm) else layer.num_features)
