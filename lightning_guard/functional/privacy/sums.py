"""The noisy sum of one step, as it grows chunk by chunk."""

from collections.abc import Container, Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_guard.functional.privacy.book import Bookkeeper
from lightning_guard.functional.privacy.noise import Noise


class NoisySum:
    """Clipped gradients of a draw on top of their noise, divided by a fixed number.

    The noise is there first, so a sum without noise never exists; what is added later only moves its mean. All
    gradients of a kind lie in one tensor: one call draws their noise, and one exchange adds up the ranks.

    Args:
        parameters: what the gradients are of.
        noise: where noise comes from.
        masks: of parameters that are partly held at zero; what is handed over is zero there as well.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2, 3))
        >>> total = NoisySum([weight], Noise(seed=0))
        >>> total.begin(std=1.0)
        >>> total.end()
        >>> weight.grad.shape
        torch.Size([2, 3])
    """

    def __init__(self, parameters: Iterable[nn.Parameter], noise: Noise, masks: Mapping[Tensor, Tensor] | None = None):
        self.parameters, self.noise, self.masks = list(parameters), noise, {} if masks is None else masks
        self.flat: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self.parts: dict[int, Tensor] = {}
        self.begun = False
        self.handed: dict[int, Tensor] = {}  # the gradients that came from here, by the parameter's id

    @torch.no_grad()
    def begin(self, std: float) -> None:
        """Fill everything with noise of this standard deviation."""
        # Gradients of the last step may still be in use, as when the user accumulates them by hand.
        if not self.flat or any(p.grad is not None for p in self.parameters):
            self._allocate()
        for flat in self.flat.values():
            self.noise.fill_(flat, std)
        self.begun = True

    def add(self, book: Bookkeeper, factors: Tensor, groups: dict[int, int]) -> None:
        """Add the sum of ``factors[g, i] * gradient[i]`` of what is booked; ``factors`` are ``(G, n)``."""
        book.add_sums(factors, self.parts, groups)

    @torch.no_grad()
    def end(self, reached: Container[int] | None = None) -> None:
        """Hand the sums to the parameters as gradients; to those with these ids if they are given."""
        for parameter in self.parameters:
            if reached is not None and id(parameter) not in reached:
                continue
            part = self.parts[id(parameter)]
            if parameter in self.masks:  # after the noise, so whatever the mask was before, nothing is without noise
                part.mul_(self.masks[parameter])
            parameter.grad = part if parameter.grad is None else parameter.grad + part
            self.handed[id(parameter)] = parameter.grad
        self.begun = False

    def _allocate(self) -> None:
        self.flat, self.parts = {}, {}
        kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for parameter in self.parameters:
            kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        for (dtype, device), group in kinds.items():
            flat = torch.empty(sum(p.numel() for p in group), dtype=dtype, device=device)
            self.flat[dtype, device] = flat
            for parameter, part in zip(group, flat.split([p.numel() for p in group]), strict=True):
                self.parts[id(parameter)] = part.view(parameter.shape)
