"""Safeguards for the training of PyTorch Lightning models: composed soundly, or refused with the reason.

>>> import pytorch_lightning as pl
>>> from lightning_guard.callbacks import MagnitudePruning
>>> trainer = pl.Trainer(callbacks=[MagnitudePruning(sparsity=0.9)], logger=False)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lightning_guard.batch import Batch
    from lightning_guard.guard import Guard, GuardConflict, Phase, Trait
    from lightning_guard.mixins import GuardMixin
    from lightning_guard.report.compare import compare

__all__ = ["Batch", "Guard", "GuardConflict", "GuardMixin", "Phase", "Trait", "__version__", "compare"]

# Imported when first asked for (PEP 562): the command line lists and shows recipes without waiting for torch.
_HOMES = {
    "Batch": "lightning_guard.batch",
    "Guard": "lightning_guard.guard",
    "GuardConflict": "lightning_guard.guard",
    "GuardMixin": "lightning_guard.mixins",
    "Phase": "lightning_guard.guard",
    "Trait": "lightning_guard.guard",
    "compare": "lightning_guard.report.compare",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
