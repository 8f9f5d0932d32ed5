"""Small networks and data that exercise what guards must survive."""

from collections import namedtuple
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

FEATURES, CLASSES, ROWS = 6, 3, 64
BATCH_NORM = True  # of networks that do not say; a fixture turns it off for guards that refuse it
Triple = namedtuple("Triple", ["x", "y", "group"])


def rows(n: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs in [0, 1], three classes and two groups that correlate with them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, FEATURES, generator=generator)
    y = (x[:, 0] * CLASSES).long().clamp_max(CLASSES - 1)
    group = (x[:, 1] + 0.3 * y > 0.8).long()
    return x, y, group


class Rows(Dataset):
    """The rows in a given form: what the default collate makes of it is what users' loaders yield."""

    def __init__(self, form: str = "triple", n: int = ROWS):
        self.form, self.data = form, rows(n)

    def __len__(self) -> int:
        return len(self.data[0])

    def __getitem__(self, i: int) -> Any:
        x, y, group = (part[i] for part in self.data)
        return {
            "pair": (x, y),
            "triple": (x, y, group),
            "named": Triple(x, y, group),
            "dict": {"x": x, "y": y, "group": group},
            "tensor": x,
        }[self.form]


def loader(form: str = "triple", batch_size: int = 16, shuffle: bool = True, n: int = ROWS) -> DataLoader:
    return DataLoader(Rows(form, n), batch_size, shuffle=shuffle)


class Net(pl.LightningModule):
    """As a user would write it: BatchNorm, Dropout, a torchmetrics object, a scheduler; knows no guard and no group."""

    def __init__(self, lr: float = 0.05, optimizer: str = "sgd", outputs: str = "tensor", norm: bool | None = None):
        super().__init__()
        self.save_hyperparameters()
        middle = [nn.BatchNorm1d(16)] if (BATCH_NORM if norm is None else norm) else []
        self.net = nn.Sequential(nn.Linear(FEATURES, 16), *middle, nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, CLASSES))
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if isinstance(batch, dict):
            x, y = batch["x"], batch["y"]
        elif isinstance(batch, Tensor):
            x, y = batch, (batch[:, 0] * CLASSES).long().clamp_max(CLASSES - 1)
        elif hasattr(batch, "_fields"):
            x, y = batch.x, batch.y
        else:
            x, y = batch  # fails on a third part
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("train_accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log("train_loss", loss)
        if self.hparams["outputs"] == "dict":
            return {"loss": loss, "logits": logits}
        if self.hparams["outputs"] == "none" and batch_idx == 1:
            return None
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        make = {
            "sgd": lambda p: torch.optim.SGD(p, self.hparams["lr"], momentum=0.9, weight_decay=1e-3),
            "adam": lambda p: torch.optim.Adam(p, self.hparams["lr"]),
            "adamw": lambda p: torch.optim.AdamW(p, self.hparams["lr"], weight_decay=0.1),
            "rmsprop": lambda p: torch.optim.RMSprop(p, self.hparams["lr"] / 10, momentum=0.9),
        }[self.hparams["optimizer"]]
        optimizer = make(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}


class PlainNet(Net):
    """The same, but it takes the third part of a batch without tripping, so that it trains unguarded too."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch[:2] if isinstance(batch, tuple | list) else batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch[:2], batch_idx)

    test_step = validation_step


class ManualNet(Net):
    """Optimises by hand."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss)
        optimizer.step()


class Data(pl.LightningDataModule):
    def __init__(self, form: str = "triple"):
        super().__init__()
        self.form = form

    def train_dataloader(self) -> DataLoader:
        return loader(self.form)

    def val_dataloader(self) -> DataLoader:
        return loader(self.form, shuffle=False)

    test_dataloader = val_dataloader


def trainer(callbacks: list[Any] | None = None, cls: Any = None, **kwargs: Any) -> pl.Trainer:
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    quiet = {**dict.fromkeys(off, False), "accelerator": "cpu"}
    return (cls or pl.Trainer)(**{**quiet, "max_epochs": 2, "devices": 1, "callbacks": callbacks or [], **kwargs})


def fit(
    callbacks: list[Any] | None = None,
    module: Any = None,
    data: Any = None,
    ckpt_path: Any = None,
    seed: int = 0,
    **kwargs: Any,
) -> Any:
    """A seeded fit of a fresh network; returns the network, with its trainer attached as ``fitted``."""
    pl.seed_everything(seed, verbose=False)
    module = PlainNet() if module is None else module if isinstance(module, nn.Module) else module()
    run = trainer(callbacks, **kwargs)
    if isinstance(data, pl.LightningDataModule):
        run.fit(module, datamodule=data, ckpt_path=ckpt_path)
    else:
        run.fit(module, loader() if data is None else data, ckpt_path=ckpt_path)
    object.__setattr__(module, "fitted", run)
    return module


def same(first: nn.Module, second: nn.Module) -> bool:
    """Whether two networks hold the same bits, buffers included."""
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
