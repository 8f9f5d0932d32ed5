"""Which weights to keep, and when."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
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
) -> dict[str, Tensor]:
    """Masks that drop exactly ``round(sparsity * n)`` of ``n`` weights, smallest magnitude first.

    Args:
        weights: tensors of any shape by name.
        sparsity: fraction of weights to drop, in [0, 1).
        scope: ``"global"`` compares all weights with one another, so layers end up with different sparsities;
            ``"layer"`` drops the same fraction of each tensor.
        masks: earlier masks; what they drop stays dropped, so sparsity never falls.

    Returns:
        Boolean masks of the weights' shapes, True where a weight is kept.

    Raises:
        ValueError: if ``sparsity`` is outside [0, 1) or ``scope`` is unknown.

    | case                                 | result                                              |
    |--------------------------------------|-----------------------------------------------------|
    | ``sparsity=0``                       | everything that ``masks`` keep                      |
    | equal magnitudes at the threshold    | still the exact count; the earlier position goes first |
    | ``masks`` drop more than ``sparsity`` | ``masks``                                           |
    | NaN                                  | counts as the largest magnitude, so it stays visible |

    Example:
        >>> magnitude_masks({"a": torch.tensor([1.0, -3.0]), "b": torch.tensor([0.5, 2.0])}, sparsity=0.5)
        {'a': tensor([False,  True]), 'b': tensor([False,  True])}
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity} is no fraction of weights to drop; give a number in [0, 1)")
    if scope == "layer":
        return {name: _drop_smallest({name: weight}, sparsity, masks)[name] for name, weight in weights.items()}
    if scope != "global":
        raise ValueError(f"scope={scope!r} is not known; give 'global' or 'layer'")
    return _drop_smallest(weights, sparsity, masks)


def _drop_smallest(
    weights: Mapping[str, Tensor], sparsity: float, masks: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    scores = []
    for name, weight in weights.items():
        wide = torch.promote_types(weight.dtype, torch.float32)
        score = weight.detach().abs().to(wide).flatten().nan_to_num(nan=float("inf"))
        if masks is not None:
            score = torch.where(masks[name].flatten(), score, -1.0)  # below every magnitude: dropped first
        scores.append(score)
    if not scores:
        return {}
    merged = torch.cat(scores)
    kept = torch.ones_like(merged, dtype=torch.bool)
    dropped = max(round(sparsity * len(merged)), int(torch.count_nonzero(merged < 0)))
    if dropped:
        # Selection, not sorting: linear in the number of weights, and this runs every few steps.
        threshold = _kth_smallest(merged, dropped)
        kept = merged > threshold
        surplus = len(merged) - int(torch.count_nonzero(kept)) - dropped
        if surplus:  # equal magnitudes at the threshold: the last of them are kept
            ties = (merged == threshold).nonzero().flatten()
            kept[ties[-surplus:]] = True
    parts = kept.split([score.numel() for score in scores])
    return {name: part.reshape(weight.shape) for (name, weight), part in zip(weights.items(), parts, strict=True)}


def _kth_smallest(values: Tensor, k: int) -> Tensor:
    if values.device.type == "cpu":  # numpy selects six times as fast
        return torch.from_numpy(np.partition(values.numpy(), k - 1))[k - 1]
    return values.kthvalue(k).values


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
