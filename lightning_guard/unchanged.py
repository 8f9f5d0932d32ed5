"""What only an optimizer may write, and who wrote it all the same."""

from typing import Any

from torch import Tensor, nn

from lightning_guard.still import buffer_versions


class Unchanged:
    """Finds what a training writes into its module other than by its optimizers.

    Versions of tensors tell of every write but those through ``.data``; sums of the values tell of those too, and cost
    a pass over the weights.

    Args:
        module: what is trained.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> watch = Unchanged(layer)
        >>> watch.begin_step()
        >>> _ = layer.bias.requires_grad_(False).add_(1.0)
        >>> watch.written()
        ['the weight bias']
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self._versions: dict[str, Any] = {}
        self._values: dict[str, tuple[float, float]] = {}
        self._kept: dict[str, tuple[float, float]] | None = None

    # Within a step ------------------------------------------------------------------------------------------------

    def begin_step(self, values: bool = False) -> None:
        """Remember weights and buffers as they are; with ``values``, so that writes through ``.data`` show too."""
        self._versions = self._now()
        self._values = self._sums() if values else {}

    def written(self) -> list[str]:
        """The weights and buffers that have been written, replaced or added since the step began."""
        now, sums = self._now(), self._sums() if self._values else {}
        changed = [name for name in now if self._versions.get(name) != now[name]]
        return changed + [name for name in sums if self._values.get(name) != sums[name]]

    def _now(self) -> dict[str, Any]:
        weights = {f"the weight {name}": (id(p), p._version) for name, p in self.module.named_parameters()}
        return weights | {f"the buffer {name}": version for name, version in buffer_versions(self.module).items()}

    def _sums(self) -> dict[str, tuple[float, float]]:
        return {f"the weight {name}": _checksum(p) for name, p in self.module.named_parameters()}

    # Over the whole training --------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Remember what a checkpoint holds beside the weights that are trained."""
        self._kept = self._beside()

    def kept(self) -> list[str]:
        """What of it has changed or come since :meth:`begin`; nothing before."""
        if self._kept is None:
            return []
        now, weights = self._beside(), {name for name, _ in self.module.named_parameters()}
        changed = [name for name, value in now.items() if self._kept.get(name, value) != value]
        return changed + [name for name in now if name not in self._kept and name not in weights]

    def _beside(self) -> dict[str, tuple[float, float]]:
        trained = {name for name, p in self.module.named_parameters(remove_duplicate=False) if p.requires_grad}
        return {
            name: _checksum(value)
            for name, value in self.module.state_dict().items()
            if name not in trained and isinstance(value, Tensor)
        }


def _checksum(x: Tensor) -> tuple[float, float]:
    wide = x.detach().double()
    return float(wide.sum()), float(wide.square().sum())
