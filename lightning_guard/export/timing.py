"""How long files take, side by side in one runtime."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

_TURN = 5


@dataclass(frozen=True)
class Times:
    """Seconds of one pass, over all passes that were timed.

    Args:
        median: of all passes.
        minimum: what other work on the machine disturbs least.
        p95: the 95th percentile.
        passes: how many were timed.
    """

    median: float
    minimum: float
    p95: float
    passes: int


def interleaved(
    passes: Mapping[str, Callable[[], Any]], seconds: float = 0.5, clock: Callable[[], float] = time.thread_time
) -> dict[str, Times]:
    """Times passes in turns, so that whatever else the machine does meets all of them.

    Three passes of each warm up and are not counted. A turn is five passes, as one model is run again and again where
    it is in use and finds its weights in the cache.

    Args:
        passes: what to time, by name.
        seconds: for all of them together; each is timed ten times at least.
        clock: processor time of this thread unless stated, so that other processes do not count; a pass that uses
            further threads needs ``time.perf_counter``.

    Example:
        >>> found = interleaved({"short": lambda: sum(range(10)), "long": lambda: sum(range(10_000))}, 0.01)
        >>> found["short"].minimum < found["long"].minimum
        True
    """
    taken: dict[str, list[float]] = {name: [] for name in passes}
    for once in passes.values():
        for _ in range(3):
            once()
    end = time.perf_counter() + seconds
    while min(map(len, taken.values())) < 10 or time.perf_counter() < end:
        for name, once in passes.items():
            for _ in range(_TURN):
                begun = clock()
                once()
                taken[name].append(clock() - begun)
    found = {}
    for name, times in taken.items():
        ordered = torch.tensor(times, dtype=torch.float64)
        middle, high = (float(ordered.quantile(q)) for q in (0.5, 0.95))
        found[name] = Times(middle, float(ordered.min()), high, len(times))
    return found
