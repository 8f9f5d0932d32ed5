"""Which weights to keep, and when."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Scope = Literal["global", "layer"]


def cubic_sparsity(progress: float, final: float, initial: float = 0.0) -> float:
    r"""Sparsity of a gradual schedule, :math:`s_f + (s_i - s_f)(1 - t)^3` (Zhu and Gupta, 2017).

    It prunes fast while many weights are redundant and slowly at the end.

    Args:
        progress: :math:`t`, the fraction of the schedule that has passed; values outside [0, 1] are clamped.
        final: sparsity at the end, as a fraction of the weights.
        initial: sparsity at the beginning.

    Reference:
        Zhu and Gupta, To Prune, or Not to Prune, 2017, arXiv:1710.01878.

    Example:
        >>> [round(cubic_sparsity(t, final=0.8), 3) for t in (0.0, 0.5, 1.0)]
        [0.0, 0.7, 0.8]
    """
    t = min(max(progress, 0.0), 1.0)
    return final + (initial - final) * (1 - t) ** 3


def magnitude_masks(
    weights: Mapping[str, Tensor],
    sparsity: float,
    scope: Scope = "global",
    masks: Mapping[str, Tensor] | None = None,
    min_keep: float = 0.0,
) -> dict[str, Tensor]:
    """Masks that drop exactly ``round(sparsity * n)`` of ``n`` weights, smallest magnitude first.

    :func:`score_masks` of ``abs(weight)``; NaN counts as the largest magnitude, so it stays visible.

    Example:
        >>> magnitude_masks({"a": torch.tensor([1.0, -3.0]), "b": torch.tensor([0.5, 2.0])}, sparsity=0.5)
        {'a': tensor([False,  True]), 'b': tensor([False,  True])}
    """
    return score_masks({name: weight.abs() for name, weight in weights.items()}, sparsity, scope, masks, min_keep)


def score_masks(
    scores: Mapping[str, Tensor],
    sparsity: float,
    scope: Scope = "global",
    masks: Mapping[str, Tensor] | None = None,
    min_keep: float = 0.0,
) -> dict[str, Tensor]:
    """Masks that drop exactly ``round(sparsity * n)`` of ``n`` weights, lowest score first.

    Args:
        scores: a number a weight, tensors of any shape by name.
        sparsity: fraction of weights to drop, in [0, 1).
        scope: ``"global"`` compares all weights with one another, so layers end up with different sparsities;
            ``"layer"`` drops the same fraction of each tensor.
        masks: earlier masks; what they drop stays dropped, so sparsity never falls.
        min_keep: fraction of each tensor that is kept at least, rounded up, so that no layer vanishes; the exact
            count is then made up in the other tensors.

    Returns:
        Boolean masks of the scores' shapes, True where a weight is kept.

    Raises:
        ValueError: if ``sparsity`` is outside [0, 1), ``scope`` is unknown, or ``sparsity`` leaves fewer weights than
            ``min_keep`` asks for.

    | case                                  | result                                                  |
    |---------------------------------------|---------------------------------------------------------|
    | ``sparsity=0``                        | everything that ``masks`` keep                          |
    | equal scores at the threshold         | still the exact count; the earlier position goes first  |
    | ``masks`` drop more than ``sparsity`` | ``masks``                                               |
    | NaN                                   | counts as the highest score                             |

    Example:
        >>> score_masks({"a": torch.tensor([-1.0, 3.0, 2.0, 4.0])}, sparsity=0.5)
        {'a': tensor([False,  True, False,  True])}
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity} is no fraction of weights to drop; give a number in [0, 1)")
    if scope == "layer":
        return {name: _without_lowest({name: one}, sparsity, masks)[name] for name, one in scores.items()}
    if scope != "global":
        raise ValueError(f"scope={scope!r} is not known; give 'global' or 'layer'")
    return _without_lowest(scores, sparsity, masks, min_keep)


def floors(sizes: Mapping[str, int], sparsity: float, min_keep: float) -> dict[str, int]:
    """How many weights each tensor keeps at least, ``ceil(min_keep * n)``.

    Raises:
        ValueError: if ``sparsity`` leaves fewer.
    """
    least = {name: math.ceil(min_keep * n) for name, n in sizes.items()}
    total = sum(sizes.values())
    left = total - round(sparsity * total)
    if sum(least.values()) > left:
        raise ValueError(
            f"sparsity={sparsity} leaves {left} of {total} weights, and min_keep={min_keep} keeps "
            f"{sum(least.values())} in {len(sizes)} layers; give a lower sparsity or a lower min_keep"
        )
    return least


def _without_lowest(
    scores: Mapping[str, Tensor], sparsity: float, masks: Mapping[str, Tensor] | None, min_keep: float = 0.0
) -> dict[str, Tensor]:
    flat = _comparable(scores)
    if not flat:
        return {}
    sizes = {name: score.numel() for name, score in flat.items()}
    if masks is not None:
        flat = {name: torch.where(masks[name].flatten(), score, -math.inf) for name, score in flat.items()}
    total = sum(sizes.values())
    gone = total if masks is None else sum(int(torch.count_nonzero(masks[name])) for name in flat)
    drop = max(round(sparsity * total), total - gone)
    least = floors(sizes, sparsity, min_keep)
    kept = _drop(flat, drop)
    short = any(torch.count_nonzero(kept[name]) < least[name] for name in kept)
    if short:
        for name, score in flat.items():
            saved = _drop({name: score}, sizes[name] - least[name])[name] & (score > -math.inf)
            flat[name] = torch.where(saved, math.inf, score)
        kept = _drop(flat, drop)
    return {name: kept[name].reshape(score.shape) for name, score in scores.items()}


def _comparable(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Flat and finite, in one type at least as wide as float32; infinity is left for what must go or stay."""
    found = {}
    for name, score in scores.items():
        wide = score.detach().flatten().to(torch.promote_types(score.dtype, torch.float32))
        most = torch.finfo(wide.dtype).max
        found[name] = wide.nan_to_num(nan=most, posinf=most * (1 - 1e-6), neginf=-most)
    return found


def _drop(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Flat masks that drop ``count`` of all, lowest first, equals by position."""
    merged = torch.cat(list(scores.values()))
    kept = torch.ones_like(merged, dtype=torch.bool)
    if count:
        threshold = merged.kthvalue(count).values  # selection, not sorting: linear in the number of weights
        kept = merged > threshold
        surplus = len(merged) - int(torch.count_nonzero(kept)) - count
        if surplus:  # equal scores at the threshold: the last of them are kept
            ties = (merged == threshold).nonzero().flatten()
            kept[ties[-surplus:]] = True
    parts = kept.split([score.numel() for score in scores.values()])
    return dict(zip(scores, parts, strict=True))


def pattern_masks(score: Tensor, drop: int, size: int, dim: int = 1, mask: Tensor | None = None) -> Tensor:
    """A mask that drops exactly ``drop`` of every ``size`` consecutive weights along ``dim``, lowest score first.

    With ``drop = size - n`` that is N:M sparsity, n of every m weights kept, 2:4 for example (Zhou et al., 2021).

    Args:
        score: a number a weight, of any shape.
        drop: how many of each group to drop.
        size: weights in a group.
        dim: the dimension of the inputs, 1 for Linear and convolution.
        mask: an earlier mask; what it drops goes first, so that no dropped weight returns.

    Raises:
        ValueError: if the dimension is no multiple of ``size``.

    Reference:
        Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, ICLR 2021,
        arXiv:2102.04010.

    Example:
        >>> pattern_masks(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), drop=2, size=4)
        tensor([[ True, False,  True, False]])
    """
    if dim >= score.dim() or score.shape[dim] % size:
        raise ValueError(f"shape {tuple(score.shape)} holds no whole groups of {size} along dimension {dim}")
    found = _comparable({"": score})[""].reshape(score.shape)
    if mask is not None:
        found = torch.where(mask, found, -math.inf)
    groups = found.movedim(dim, -1).unflatten(-1, (-1, size))
    places = [place.contiguous() for place in groups.unbind(-1)]
    ranks = [torch.zeros(place.shape, dtype=torch.int16, device=place.device) for place in places]
    for j, second in enumerate(places):  # a sort of so many small groups takes ten times as long
        for i, first in enumerate(places[:j]):
            before = first <= second
            ranks[j] += before
            ranks[i] += ~before
    kept = torch.stack([rank >= drop for rank in ranks], dim=-1)
    return kept.flatten(-2).movedim(-1, dim).contiguous()


def regrown_masks(
    scores: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    sparsity: float,
    share: float,
    scope: Scope = "global",
    masks: Mapping[str, Tensor] | None = None,
    min_keep: float = 0.0,
) -> dict[str, Tensor]:
    """Masks at an exact sparsity, part of which is grown anew where gradients are largest (RigL).

    Of the ``k`` weights to keep, ``k - round(share * k)`` are those of highest score; the others are those with the
    largest absolute gradient among all that are not kept yet, what has just been dropped included.

    Args:
        scores: a number a weight, usually its magnitude.
        gradients: the dense gradient, of dropped weights too.
        sparsity: fraction of weights to drop, in [0, 1).
        share: fraction of the kept weights to grow anew, in [0, 1).
        scope: as in :func:`score_masks`, for what is dropped and for what grows.
        masks: earlier masks; what they drop returns by its gradient alone.
        min_keep: fraction of each tensor that is kept at least before growing.

    Reference:
        Evci et al., Rigging the Lottery, ICML 2020, arXiv:1911.11134. At a rising sparsity: Liu et al. (GraNet),
        NeurIPS 2021, arXiv:2106.10404.

    Example:
        >>> weight, gradient = torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, 9.0])
        >>> regrown_masks({"w": weight}, {"w": gradient}, sparsity=0.5, share=0.5)
        {'w': tensor([ True, False, False,  True])}
    """
    if scope == "layer":
        return {
            name: regrown_masks(
                {name: scores[name]}, {name: gradients[name]}, sparsity, share, "global", masks and {name: masks[name]}
            )[name]
            for name in scores
        }
    flat, slope = _comparable(scores), _comparable({name: g.abs() for name, g in gradients.items()})
    total = sum(score.numel() for score in flat.values())
    keep = total - round(sparsity * total)
    if masks is not None:
        flat = {name: torch.where(masks[name].flatten(), score, -math.inf) for name, score in flat.items()}
    for name, score in flat.items():
        saved = _drop({name: score}, score.numel() - math.ceil(min_keep * score.numel()))[name] & (score > -math.inf)
        flat[name] = torch.where(saved, math.inf, score)
    old = _drop(flat, total - keep + round(share * keep))
    old = {name: mask & (flat[name] > -math.inf) for name, mask in old.items()}  # what was dropped only grows back
    kept = _drop({name: torch.where(old[name], math.inf, slope[name]) for name in flat}, total - keep)
    return {name: kept[name].reshape(score.shape) for name, score in scores.items()}


def bit_mask(kept: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask for :func:`clear_`: every bit where a value is kept, none elsewhere, as wide as ``dtype``.

    Example:
        >>> bit_mask(torch.tensor([True, False]), torch.float32)
        tensor([-1,  0], dtype=torch.int32)
    """
    return -kept.to({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])


def clear_(values: Tensor, bits: Tensor) -> None:
    """Set values to zero in place where :func:`bit_mask` has no bits, NaN and infinity included.

    As fast as a multiplication, which would leave NaN where it is; ``masked_fill_`` takes fifteen times as long.

    Example:
        >>> values = torch.tensor([1.5, float("nan")])
        >>> clear_(values, bit_mask(torch.tensor([True, False]), values.dtype))
        >>> values
        tensor([1.5000, 0.0000])
    """
    values.detach().view(bits.dtype).bitwise_and_(bits)


def pack_mask(mask: Tensor) -> Tensor:
    """A boolean tensor as bytes of eight bits each, to be stored at an eighth of its size.

    Example:
        >>> pack_mask(torch.tensor([True, False, True]))
        tensor([5], dtype=torch.uint8)
    """
    missing = -mask.numel() % 8
    bits = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, missing))
    bits = bits.reshape((mask.numel() + missing) // 8, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The inverse of :func:`pack_mask`.

    Example:
        >>> unpack_mask(pack_mask(torch.tensor([True, False, True])), (3,))
        tensor([ True, False,  True])
    """
    bits = (packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten()[: torch.Size(shape).numel()].reshape(shape).bool()
