"""Selection by magnitude, fast enough for every few steps of training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SAMPLE, _PIECE = 1 << 14, 1 << 16  # values
_AS_INTEGERS: dict[int, tuple[torch.dtype, Any]] = {
    2: (torch.int16, np.uint16),
    4: (torch.int32, np.uint32),
    8: (torch.int64, np.uint64),
}


def smallest(values: Sequence[Tensor], count: int) -> tuple[list[Tensor], int]:
    """Flat places of the ``count`` nonzero values of smallest magnitude among all, and how many are zero.

    What :func:`~lightning_guard.functional.magnitude_masks` would drop next, in a tenth of its time: one pass through
    the values, in pieces that stay in the processor's cache, and a selection among the few that a sample says may be
    small enough. Values on the CPU and of one floating type.

    Returns:
        A tensor of places for each of ``values``, and the number of zeros in all of them.

    | case                     | result                                |
    |--------------------------|---------------------------------------|
    | equal magnitudes         | the earlier position first            |
    | zeros                    | never, they are dropped already       |
    | fewer than ``count``     | all that are not zero                 |
    | NaN                      | larger than infinity                  |

    Example:
        >>> smallest([torch.tensor([0.0, -2.0, 3.0]), torch.tensor([1.0, 5.0])], count=2)
        ([tensor([1]), tensor([0])], 1)
    """
    dtype, unsigned = _AS_INTEGERS[values[0].element_size()]
    flat = [value.detach().reshape(-1).view(dtype).numpy().view(unsigned) for value in values]
    last, room = np.iinfo(unsigned).max, np.empty(_PIECE, unsigned)

    def order(part: Any, out: Any = None) -> Any:
        # Without their signs floats are in the order of their bits; one less, and zero is behind them all.
        out = np.left_shift(part, unsigned(1), out=out)
        return np.subtract(out, unsigned(1), out=out)

    total = sum(map(len, flat))
    stride = total // _SAMPLE | 1  # odd, or it would see the same columns of every row
    sample = np.sort(np.concatenate([order(part[::stride]) for part in flat]))
    likely = count / stride
    at = int(likely + 5 * likely**0.5 + 10)
    highest = sample[at] if at < len(sample) else last
    while True:
        found, keys, zeros = [], [], 0
        for part in flat:
            for begin in range(0, max(len(part), 1), _PIECE):
                piece = part[begin : begin + _PIECE]
                ordered = order(piece, room[: len(piece)])
                where = np.flatnonzero(ordered < highest)
                zeros += int(np.count_nonzero(ordered == last))
                keys.append(ordered[where])
                where += begin
                found.append(where)
        ranked = np.concatenate(keys)
        if len(ranked) >= count or highest == last:
            break
        highest = last
    count = min(count, len(ranked))
    chosen = np.zeros(len(ranked), dtype=bool)
    if count:
        threshold = np.partition(ranked, count - 1)[count - 1]
        chosen = ranked < threshold
        chosen[np.flatnonzero(ranked == threshold)[: count - np.count_nonzero(chosen)]] = True
    parts = iter(np.split(chosen, np.cumsum([len(key) for key in keys])[:-1]))
    places = iter(found)
    picked = [
        torch.from_numpy(np.concatenate([next(places)[next(parts)] for _ in range(0, max(len(part), 1), _PIECE)]))
        for part in flat
    ]
    return picked, zeros
