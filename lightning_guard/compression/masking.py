"""The masks of a set of weights, kept outside their module."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_guard.functional import bit_mask, clear_, pack_mask, smallest, unpack_mask


class Masks:
    """Which of some weights are dropped, and the means to drop more and to keep them at zero.

    Args:
        weights: the weights by name, changed in place.
        packed: what :meth:`packed` of earlier masks gave; without it nothing is dropped.
    """

    def __init__(self, weights: Mapping[str, Tensor], packed: Mapping[str, Tensor] | None = None):
        self.weights = dict(weights)
        self.sizes = {name: weight.numel() for name, weight in self.weights.items()}
        self._bits: dict[str, Tensor] = {}  # what `clear_` takes: no bits where a weight is dropped
        self.gone = dict.fromkeys(self.weights, 0)  # how many are dropped
        self.keep(
            {
                name: torch.ones_like(weight, dtype=torch.bool)
                if packed is None
                else ~unpack_mask(packed[name], weight.shape).to(weight.device)
                for name, weight in self.weights.items()
            }
        )

    @property
    def sparsity(self) -> float:
        """The fraction of the weights that is dropped."""
        return sum(self.gone.values()) / max(sum(self.sizes.values()), 1)

    @property
    def kept(self) -> dict[str, Tensor]:
        """Boolean masks, True where a weight is kept."""
        return {name: bits != 0 for name, bits in self._bits.items()}

    @torch.no_grad()
    def keep(self, masks: Mapping[str, Tensor]) -> None:
        """Keep what these masks keep; what earlier masks have dropped begins at zero."""
        self.clear(self._bits)
        self._bits = {name: bit_mask(masks[name], weight.dtype) for name, weight in self.weights.items()}
        self.gone = {name: mask.numel() - int(torch.count_nonzero(mask)) for name, mask in masks.items()}
        self.clear(self._bits)

    def clear(self, names: Iterable[str]) -> None:
        """Set the dropped ones of these weights to zero, in place."""
        for name in names:
            self.clear_values(name, self.weights[name])

    def clear_values(self, name: str, values: Tensor) -> None:
        """Set other values of a weight, a moment for example, to zero in place where it is dropped."""
        bits = self._bits[name]
        if not self.gone[name]:
            return
        if values.device == bits.device and values.element_size() == bits.element_size():
            clear_(values, bits)
        else:
            values.masked_fill_(bits.to(values.device) == 0, 0)

    def cleared(self, name: str, values: Tensor) -> Tensor:
        """Other values of a weight with zeros where it is dropped."""
        return values.masked_fill(self._bits[name].to(values.device) == 0, 0) if self.gone[name] else values

    @torch.no_grad()
    def drop_smallest(self, sparsity: float, scope: str, least: Mapping[str, int]) -> bool:
        """Drop the smallest up to a sparsity as :func:`score_masks` would, in a fraction of its time.

        Returns:
            False, with nothing done, where it would not be the same or is not on the CPU.
        """
        weights = list(self.weights.values())
        if any(w.device.type != "cpu" or not w.is_contiguous() or w.dtype != weights[0].dtype for w in weights):
            return False
        if scope == "layer":
            found = [
                smallest([w], max(round(sparsity * w.numel()) - self.gone[name], 0)) for name, w in self.weights.items()
            ]
            places, zeros = [one[0] for one, _ in found], sum(zeros for _, zeros in found)
        else:
            total = round(sparsity * sum(self.sizes.values())) - sum(self.gone.values())
            places, zeros = smallest(weights, max(total, 0))
        if zeros != sum(self.gone.values()):
            return False  # a weight that is zero by chance goes first
        gone = {name: n + len(place) for (name, n), place in zip(self.gone.items(), places, strict=True)}
        if any(self.sizes[name] - gone[name] < least[name] for name in gone):
            return False
        self.gone = gone
        for (name, weight), place in zip(self.weights.items(), places, strict=True):
            bits, where = self._bits[name], place.numpy()
            for values in (bits, weight.view(bits.dtype)):
                values.view(-1).numpy()[where] = 0  # a tenth of the time that indexing in torch takes
        return True

    def packed(self) -> dict[str, Tensor]:
        """What is dropped, eight weights a byte, for a checkpoint."""
        return {name: pack_mask((bits == 0).cpu()) for name, bits in self._bits.items()}
