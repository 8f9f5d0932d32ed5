"""A finished run brought back: the arm built anew, its model as training left it."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from lightning_guard.functional.reshaping import reshape_like
from lightning_guard.guard import guards_of
from lightning_guard.report.runs import ArmRun, Parts


def rebuilt(run: ArmRun) -> Parts | None:
    """Trainer, model and data of a finished run, the model with its weights; None if they do not fit any more.

    What guards change in the structure of a model, such as a step that squeezes its inputs, is no weight, so it is
    made again. Whatever else training changed is not: whoever judges the model checks that it answers as it did.
    """
    trainer, module, data = run.arm.build([])
    loaded = with_weights(trainer, module, run.folder / "weights.pt")
    return None if loaded is None else (trainer, loaded, data)


def with_weights(trainer: pl.Trainer, module: pl.LightningModule, path: Path) -> pl.LightningModule | None:
    """A built module, rewritten as its guards do, with the weights of a file; None if they do not fit."""
    try:
        put_weights(trainer, module, torch.load(path, weights_only=True))
    except (RuntimeError, ValueError, OSError, pickle.UnpicklingError):  # keys or shapes that training changed
        return None
    return module


def put_weights(trainer: pl.Trainer, module: pl.LightningModule, weights: Mapping[str, Any]) -> None:
    """Rewrites a built module as its guards do and loads weights into it.

    Raises:
        RuntimeError: or ValueError, if they do not fit.
    """
    module.configure_model()
    for guard in guards_of(trainer, module):
        if guard.overrides("rewrite"):
            guard.rewrite(module)
    reshape_like(module, weights)  # a guard may have taken channels out
    module.load_state_dict(weights)


def kept_tensors(run: ArmRun) -> dict[str, Any]:
    """The tensors that a finished run kept of its evidence; none if there are none."""
    path = run.folder / "tensors.pt"
    return torch.load(path, weights_only=True) if run.result() is not None and path.exists() else {}
