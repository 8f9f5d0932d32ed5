"""What a comparison watches in every arm alike: the start, the order of the data, and the cost."""

import hashlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_guard.evaluation import Evidence
from lightning_guard.evaluation.cost import Meter
from lightning_guard.guard import Guard, Phase, Trait


class Witness(pl.Callback):
    """Records whether arms really shared initial weights and data order, and what training cost. Changes nothing.

    Attributes:
        initial_weights: sha256 of the weights before the first step.
        data_order: sha256 over the batches in the order in which the loader gave them.
        seconds: time of the training loop, validation included; of the processor on a CPU, else of the clock.
        passes: forward passes per training batch.
        steps: optimizer steps.
        machine: memory and energy, where the machine tells.
    """

    def __init__(self) -> None:
        self.initial_weights = ""
        self.machine = Evidence()
        self.seconds = 0.0
        self.steps = self.batches = self._forwards = 0
        self._order = hashlib.sha256()
        self._began = 0.0
        self._hook: Any = None

    @property
    def data_order(self) -> str:
        return self._order.hexdigest()

    @property
    def passes(self) -> float:
        return self._forwards / max(self.batches, 1)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        digest = hashlib.sha256()
        for name, weight in sorted(pl_module.state_dict().items()):
            digest.update(name.encode() + _bytes(weight))
        self.initial_weights = digest.hexdigest()
        layer = next((m for m in pl_module.modules() if next(m.parameters(recurse=False), None) is not None), None)
        if isinstance(layer, nn.Module):

            def count(*_: Any) -> None:
                self._forwards += trainer.training

            self._hook = layer.register_forward_pre_hook(count)
        self._clock = time.process_time if pl_module.device.type == "cpu" else time.perf_counter
        self._meter = Meter(pl_module.device)
        self._began = self._clock()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batches += 1
        for part in _tensors(batch):
            # A sample of large batches: enough to tell one order from another, cheap enough not to count as cost.
            self._order.update(_bytes(part.flatten()[:: max(1, part.numel() // 1024)]))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._meter.look()  # before a counter runs over twice

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = self._clock() - self._began
        self.machine = self._meter.evidence()
        self.steps = trainer.global_step
        self._remove()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._remove()

    def _remove(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


class Withholding(Guard):
    """Keeps the group from the steps of an arm without guards, as the guarded arms have it kept; does nothing else."""

    name: ClassVar[str] = "withholding"
    phase: ClassVar[Phase] = Phase.BATCH
    traits: frozenset[Trait] | None = frozenset()
    needs_group: ClassVar[bool] = True


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for key in batch:
            yield from _tensors(batch[key])
    elif isinstance(batch, tuple | list):
        for part in batch:
            yield from _tensors(part)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
