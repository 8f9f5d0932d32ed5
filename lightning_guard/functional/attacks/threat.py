"""What an attacker may do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["linf", "l2"]


@dataclass(frozen=True)
class ThreatModel:
    r"""What an attacker may do to an input: move it by at most ``eps`` in ``norm`` and stay within ``bounds``.

    All lengths are in the user's units, before normalisation: with ``mean`` and ``std`` the network sees
    :math:`x = (r - \mu) / \sigma` and the attacker moves :math:`r`, so 8/255 stays 8/255.

    Args:
        eps: radius, in input units before normalisation.
        norm: ``"linf"`` (each feature by at most ``eps``) or ``"l2"`` (Euclidean over all features of an example).
        bounds: lowest and highest valid value, in input units before normalisation; None leaves the range open.
        mean: subtracted before the network, one number or one a channel (dimension 1).
        std: divided by before the network, one number or one a channel (dimension 1).
        mutable: indices along dimension 1 that the attacker may change; None is all of them.

    Raises:
        ValueError: for values that describe no threat, naming the option.

    | case                            | result                                        |
    |---------------------------------|-----------------------------------------------|
    | ``eps=0``                       | only the input itself                         |
    | an input outside ``bounds``     | ``check`` raises and says by how much         |
    | ``mutable=()``                  | only the input itself                         |

    Example:
        >>> threat = ThreatModel(eps=0.5, bounds=(0.0, 1.0))
        >>> threat.project(torch.tensor([[2.0, 0.2]]), torch.tensor([[0.7, 0.9]]))
        tensor([[1.0000, 0.4000]])
    """

    eps: float
    norm: Norm = "linf"
    bounds: tuple[float, float] | None = None
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None
    mutable: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.eps < float("inf"):
            raise ValueError(f"eps={self.eps} is no radius; give a finite number of at least 0, in input units")
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm={self.norm!r} is not known; give 'linf' or 'l2'")
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"bounds={self.bounds} hold nothing; give (lowest, highest), e.g. (0.0, 1.0)")
        for std in [] if self.std is None else [self.std] if isinstance(self.std, float | int) else self.std:
            if not std > 0:
                raise ValueError(f"std={self.std} must be positive; give what the inputs were divided by")

    def scale(self, x: Tensor) -> Tensor:
        """How far the network's input moves for one unit of the user's: ``1 / std``, 0 where immutable."""
        scale = 1 / _per_channel(self.std, x, 1.0)
        if self.mutable is None:
            return scale
        if x.dim() < 2 or any(not -x.shape[1] <= index < x.shape[1] for index in self.mutable):
            raise ValueError(
                f"mutable={list(self.mutable)} for inputs of shape {tuple(x.shape)}; give indices along dimension 1"
            )
        allowed = torch.zeros(x.shape[1], dtype=x.dtype, device=x.device)
        allowed[list(self.mutable)] = 1
        return scale * allowed.reshape(1, -1, *[1] * (x.dim() - 2))

    def limits(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The bounds as the network sees them."""
        if self.bounds is None:
            return None, None
        mean, std = _per_channel(self.mean, x, 0.0), _per_channel(self.std, x, 1.0)
        return (self.bounds[0] - mean) / std, (self.bounds[1] - mean) / std

    def check(self, x: Tensor, tolerance: float = 1e-4) -> None:
        """Raise if ``x`` itself lies outside the bounds: then ``bounds``, ``mean`` or ``std`` are wrong."""
        low, high = self.limits(x)
        if low is None or high is None:
            return
        excess = torch.maximum((low - x).max(), (x - high).max()).item()
        if not excess <= tolerance:
            raise ValueError(
                f"inputs range over [{x.min().item():.4g}, {x.max().item():.4g}], outside bounds={self.bounds}"
                f"{'' if self.mean is None and self.std is None else ' after normalisation'}; "
                "give the bounds of the inputs, and mean and std if they are normalised"
            )

    def project(self, moved: Tensor, x: Tensor) -> Tensor:
        """``moved`` brought back into the threat model around ``x``; both ``(N, ...)`` as the network sees them.

        It is the nearest point for ``linf``. For ``l2`` it is the nearest point of the ball, then of the bounds, which
        leaves it in both.
        """
        if self.norm == "linf":
            return moved.clamp(*self._box(x))
        scale = self.scale(x)
        delta = torch.where(scale > 0, (moved - x) / scale.clamp_min(1e-30), 0)
        length = delta.flatten(1).norm(dim=1).clamp_min(1e-30)
        factor = (self.eps / length).clamp_max(1).reshape(-1, *[1] * (x.dim() - 1))
        return self._within_bounds(x + delta * factor * scale, x)

    def contains(self, moved: Tensor, x: Tensor, tolerance: float = 1e-5) -> Tensor:
        """Which of the ``(N,)`` moved examples lie inside the threat model around ``x``, up to ``tolerance``."""
        scale = self.scale(x)
        delta = torch.where(scale > 0, (moved - x) / scale.clamp_min(1e-30), 0).flatten(1)
        length = delta.abs().amax(1) if self.norm == "linf" else delta.norm(dim=1)
        still = torch.where(scale > 0, torch.zeros_like(x), moved - x).flatten(1).abs().amax(1) == 0
        inside = (length <= self.eps + tolerance) & still
        low, high = self.limits(x)
        if low is not None and high is not None:
            low, high = torch.minimum(low, x), torch.maximum(high, x)
            inside &= ((moved >= low - tolerance) & (moved <= high + tolerance)).flatten(1).all(1)
        return inside

    def _box(self, x: Tensor) -> tuple[Tensor, Tensor]:
        radius = self.eps * self.scale(x)
        return self._within_bounds(x - radius, x), self._within_bounds(x + radius, x)

    def _within_bounds(self, moved: Tensor, x: Tensor) -> Tensor:
        low, high = self.limits(x)
        if low is None or high is None:
            return moved
        # An input beyond a bound by rounding stays where it is: pulled back, an immutable feature would have moved.
        return moved.clamp(torch.minimum(low, x), torch.maximum(high, x))

    def draw(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A point drawn uniformly from the ball around ``x``, then brought within the bounds."""
        if self.norm == "linf":
            noise = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator).mul_(2).sub_(1)
            return self.project(x + noise * (self.eps * self.scale(x)), x)
        scale = self.scale(x)
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator) * (scale > 0)
        free = int((scale > 0).expand_as(x[:1]).sum())
        radius = torch.rand(len(x), dtype=x.dtype, device=x.device, generator=generator) ** (1 / max(free, 1))
        length = noise.flatten(1).norm(dim=1).clamp_min(1e-30)
        factor = (self.eps * radius / length).reshape(-1, *[1] * (x.dim() - 1))
        return self.project(x + noise * factor * scale, x)


def _per_channel(value: float | Sequence[float] | None, x: Tensor, default: float) -> Tensor:
    values = torch.as_tensor(default if value is None else value, dtype=x.dtype, device=x.device)
    if values.dim() == 0:
        return values
    if x.dim() < 2 or len(values) != x.shape[1]:
        shape = tuple(x.shape)
        raise ValueError(f"{len(values)} values of mean or std for inputs of shape {shape}; give one a channel")
    return values.reshape(1, -1, *[1] * (x.dim() - 2))
