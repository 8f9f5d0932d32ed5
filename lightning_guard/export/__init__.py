"""What ships: files of a finished model, checked against it before they are there.

Example:
    >>> import tempfile, torch
    >>> model, batches = torch.nn.Linear(3, 2), [(torch.rand(8, 3), torch.zeros(8).long())]
    >>> done = export(model, f"{tempfile.mkdtemp()}/model.lgw", batches, "sparse")
    >>> done.agreement.flips
    0.0
"""

from lightning_guard.export.compressed import load_compressed, save_compressed
from lightning_guard.export.files import FORMATS, Agreement, Exported, agreement, export
from lightning_guard.export.runtime import judged, load
from lightning_guard.export.tracing import ExportError

__all__ = [
    "FORMATS",
    "Agreement",
    "ExportError",
    "Exported",
    "agreement",
    "export",
    "judged",
    "load",
    "load_compressed",
    "save_compressed",
]
