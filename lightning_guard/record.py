"""What a run writes down so that it can be repeated, and what it must find to be resumed."""

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.cloud_io import get_filesystem
from pytorch_lightning.cli import SaveConfigCallback

from lightning_guard.guard import Guard, GuardConflict, callbacks_of, guards_of
from lightning_guard.pipeline import SECTION, missing_guards


class SavedConfig(SaveConfigCallback):
    """Writes the configuration that repeats the run into the folder of its logs, never over another one."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        folder = trainer.log_dir or trainer.default_root_dir  # on every rank, since it is broadcast
        if self.already_saved or not trainer.is_global_zero:
            return
        self.already_saved = True
        order = ", ".join(guard.name for guard in guards_of(trainer)) or "none"
        header = self.parser.dump_header or []
        self.parser.dump_header = [*header, f"guards, in the order in which they act: {order}"]
        text = self.parser.dump(self.config, skip_unset=False)
        self.parser.dump_header = header
        files = get_filesystem(folder)
        files.makedirs(folder, exist_ok=True)
        number, name = 1, f"{folder}/config.yaml"
        while files.exists(name):  # without a logger every run has the same folder
            with files.open(name, "r") as file:
                if file.read() == text:
                    return
            number, name = number + 1, f"{folder}/config-{number + 1}.yaml"
        with files.open(name, "w") as file:
            file.write(text)


class Resume(pl.Callback):
    """Refuses to resume a guarded training without its guards, even where no guard is left to notice."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Before weights are loaded: without a guard that rewrites the model, loading fails in words that do not help.
        if trainer.ckpt_path is not None:
            refuse_to_resume(read_checkpoint(str(trainer.ckpt_path)), callbacks_of(trainer))

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        refuse_to_resume(checkpoint, callbacks_of(trainer))  # from wherever it came


def refuse_to_resume(checkpoint: dict[str, Any] | None, callbacks: Iterable[Any]) -> None:
    """Raise if guards of the checkpoint are not among the callbacks."""
    section = (checkpoint or {}).get(SECTION)
    problems = list(missing_guards(section, [c.name for c in callbacks if isinstance(c, Guard)])) if section else []
    if problems:
        raise GuardConflict(problems)


def read_checkpoint(path: str) -> dict[str, Any] | None:
    """A checkpoint in a local file, without reading its tensors; None if it cannot be read like that."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True) if Path(path).is_file() else None
    except (RuntimeError, ValueError, OSError, pickle.UnpicklingError):
        return None  # Lightning will read it in its own way, or say why not
