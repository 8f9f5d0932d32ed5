"""What the small classifiers share: loss, metrics and optimizer."""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

Schedule = Literal["constant", "cosine"]
Optimizer = Literal["adamw", "sgd"]

MOMENTUM = 0.9  # of SGD


class Classifier(pl.LightningModule):
    """Trains ``forward(x) -> logits`` with cross-entropy, by AdamW or SGD.

    Two classes have one logit of shape ``(N,)`` and the binary cross-entropy; more have logits of shape
    ``(N, num_classes)``. A batch is any sequence that starts with inputs and int64 labels of shape ``(N,)``;
    what follows (a group, say) is not looked at. Logs ``train_loss`` by the step, and ``val_loss``,
    ``val_accuracy``, ``test_loss`` and ``test_accuracy`` by the epoch.

    Args:
        num_classes: Number of classes, at least 2.
        lr: Learning rate, its peak with ``schedule="cosine"``.
        weight_decay: Weight decay: decoupled from the gradient with AdamW, added to the gradient with SGD.
        schedule: ``"constant"``, or ``"cosine"`` from ``lr`` to zero over the steps of the fit.
        optimizer: ``"adamw"``, or ``"sgd"`` with momentum 0.9.

    Raises:
        ValueError: ``num_classes`` is below 2, ``schedule`` or ``optimizer`` is unknown, or (at the start of the
            fit) a cosine schedule has no end.
    """

    def __init__(
        self, num_classes: int, lr: float, weight_decay: float, schedule: Schedule, optimizer: Optimizer = "adamw"
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes} must be at least 2; two classes share one logit")
        if schedule not in get_args(Schedule):
            raise ValueError(f"schedule={schedule!r} must be one of {get_args(Schedule)}")
        if optimizer not in get_args(Optimizer):
            raise ValueError(f"optimizer={optimizer!r} must be one of {get_args(Optimizer)}")
        self.save_hyperparameters()  # of the subclass, whose arguments they are
        self.num_classes = num_classes
        self.num_logits = 1 if num_classes == 2 else num_classes
        self.lr = lr
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.optimizer = optimizer
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy of a batch, in nats, a scalar."""
        if self.num_classes == 2:
            return F.binary_cross_entropy_with_logits(logits, y.to(logits.dtype))
        return F.cross_entropy(logits, y)

    def predicted(self, logits: Tensor) -> Tensor:
        """The likeliest class of each example, int64 of shape ``(N,)``."""
        return (logits > 0).long() if self.num_classes == 2 else logits.argmax(dim=-1)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        x, y = batch[:2]
        loss = self.loss(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_accuracy)

    def predict_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def _evaluate(self, batch: Sequence[Tensor], stage: str, accuracy: MulticlassAccuracy) -> None:
        x, y = batch[:2]
        logits = self(x)
        # Not the logits: torchmetrics takes a batch whose logits all lie in [0, 1] for probabilities.
        accuracy(self.predicted(logits), y)
        self.log(f"{stage}_loss", self.loss(logits, y), prog_bar=True, sync_dist=True)
        self.log(f"{stage}_accuracy", accuracy, prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer: torch.optim.Optimizer
        if self.optimizer == "adamw":
            optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        else:
            optimizer = torch.optim.SGD(
                self.parameters(), lr=self.lr, momentum=MOMENTUM, weight_decay=self.weight_decay
            )
        if self.schedule == "constant":
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError("schedule='cosine' needs the end of the training; set max_epochs or max_steps")
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
