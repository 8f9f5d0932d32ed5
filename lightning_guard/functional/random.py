"""Random numbers that depend on where they are drawn, not on what was drawn before."""

from hashlib import blake2b

import torch


def stream(seed: int, *place: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one place in a run, e.g. ``stream(seed, step, rank)``.

    The numbers depend on ``seed`` and ``place`` alone. A resumed run therefore draws what the uninterrupted run
    would have drawn without any generator in its checkpoint, ranks differ, and the global generators, which shuffle
    the data and drop out units, are never advanced. Not for privacy noise, which must not be reproducible.

    Args:
        seed: the seed of the run.
        place: whole numbers that name the place, usually the step and the rank.
        device: the device of the tensors to draw.

    Example:
        >>> torch.rand(2, generator=stream(0, 7)).equal(torch.rand(2, generator=stream(0, 7)))
        True
        >>> torch.rand(2, generator=stream(0, 7)).equal(torch.rand(2, generator=stream(0, 8)))
        False
    """
    # A hash, because neighbouring seeds of a Mersenne twister start out correlated.
    digest = blake2b(repr((int(seed), *map(int, place))).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)
