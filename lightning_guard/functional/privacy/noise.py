"""Gaussian noise for privacy: unpredictable, and never from a seed that anybody could learn."""

import math
import ssl
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lightning_guard.functional.random import stream

Bits = Callable[[int], bytes]
_CHUNK = 32768  # numbers a pass: small enough for the cache, large enough that Python does not count


class Noise:
    r"""Fills tensors with Gaussian noise.

    On the CPU the bits come from OpenSSL's generator (AES-256 in counter mode, seeded and reseeded by the operating
    system) and become normal by the Box-Muller transform; that is faster than torch's Mersenne twister, and no one can
    compute the noise from a seed or from other noise. On other devices torch's generator is seeded by the operating
    system, anew for each object. There is no state to save, and none is saved.

    Numbers are float32 or float64 like the tensor. Finite precision has a price in theory: an adversary who sees single
    bits of the noisy sums may learn more than the analysis of real numbers says (Mironov, 2012).

    Args:
        seed: for tests only: the noise is then reproducible and protects nobody.

    Reference:
        Box and Muller, Annals of Mathematical Statistics 1958. Mironov, On significance of the least significant bits
        for differential privacy, CCS 2012.

    Example:
        >>> z = Noise(seed=0).fill_(torch.empty(4, 5), std=2.0)
        >>> z.shape
        torch.Size([4, 5])
    """

    def __init__(self, seed: int | None = None):
        self._seed = seed
        self._bits: Bits = ssl.RAND_bytes if seed is None else np.random.Generator(np.random.PCG64(seed)).bytes
        self._generators: dict[torch.device, torch.Generator] = {}

    def at(self, step: int) -> None:
        """In tests: from here on the noise of this step, so that a resumed run repeats it."""
        if self._seed is not None:
            self._bits = np.random.Generator(np.random.PCG64((self._seed, step))).bytes
            self._generators.clear()

    def fill_(self, out: Tensor, std: float) -> Tensor:
        """Independent normal numbers with mean 0 and this standard deviation, in place.

        Args:
            out: any contiguous float32 or float64 tensor.
            std: standard deviation, 0 or more.
        """
        if std == 0:
            return out.zero_()
        if out.device.type != "cpu":
            return out.normal_(0.0, std, generator=self._generator(out.device))
        flat = out.view(-1).numpy()
        for start in range(0, flat.size, 2 * _CHUNK):
            part = flat[start : start + 2 * _CHUNK]
            if part.size % 2:  # the last of an odd number
                part[-1] = self._box_muller(np.empty(2, flat.dtype), std)[0]
                part = part[:-1]
            self._box_muller(part, std)
        return out

    def number(self, std: float) -> float:
        """One normal number with mean 0 and this standard deviation."""
        return float(self.fill_(torch.empty(1, dtype=torch.float64), std))

    def _box_muller(self, out: np.ndarray, std: float) -> np.ndarray:
        half, kind = out.size // 2, out.dtype.type
        whole, top = (np.int64, 63) if kind is np.float64 else (np.int32, 31)
        bits = np.frombuffer(self._bits(out.size * out.itemsize), whole)
        # u = |k + 1/2| / 2^top is uniform and never zero; -2 ln u = 2 top ln 2 - ln (k + 1/2)^2 needs no sign. The
        # constant is rounded up, so that no root is of a negative number.
        radius = bits[:half].astype(kind)
        radius += kind(0.5)
        np.multiply(radius, radius, out=radius)
        np.log(radius, out=radius)
        np.subtract(np.nextafter(kind(2 * top * math.log(2)), kind(np.inf)), radius, out=radius)
        np.sqrt(radius, out=radius)
        radius *= kind(std)
        angle = bits[half:].astype(kind)
        angle *= kind(math.pi * 2.0**-top)
        np.multiply(np.cos(angle, out=out[:half]), radius, out=out[:half])
        np.multiply(np.sin(angle, out=out[half:]), radius, out=out[half:])
        return out

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            secret = int.from_bytes(ssl.RAND_bytes(32), "big") if self._seed is None else self._seed
            self._generators[device] = stream(secret, device=device)
        return self._generators[device]
