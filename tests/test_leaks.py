"""What leaves a run beside the weights is named; what a guard answers for itself is not."""

from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn

from lightning_guard.guard import Run
from lightning_guard.leaks import Leaks


class Logging(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.loss, self.heard = nn.CrossEntropyLoss(weight=torch.ones(3)), []

    def log(self, name, *args, **kwargs):
        self.heard.append(name)


def watched(callbacks=(), monitors=(), **options):
    configs = [SimpleNamespace(reduce_on_plateau=kind == "plateau", monitor=monitor) for kind, monitor in monitors]
    trainer = SimpleNamespace(training=True, callbacks=list(callbacks), lr_scheduler_configs=configs)
    run = Run(trainer, Logging(), [])
    return run, Leaks(run, "guard/mine/", **options)


@pytest.mark.parametrize("withhold", [False, True])
def test_metrics_of_training_are_noted_and_can_be_withheld(withhold):
    run, leaks = watched(withhold=withhold)
    for name in ("loss", "guard/mine/epsilon", "guard/other/gap", "loss"):
        run.module.log(name, 0.0)
    run.trainer.training = False
    run.module.log("val_loss", 0.0)
    assert list(leaks.logged) == ["loss", "guard/other/gap"]
    assert leaks.metrics == ([] if withhold else ["loss", "guard/other/gap"])
    passed = ["guard/mine/epsilon", "val_loss"]
    assert run.module.heard == (passed if withhold else ["loss", passed[0], "guard/other/gap", "loss", passed[1]])
    run.undo.close()
    assert "log" not in vars(run.module)


def test_a_learning_rate_set_by_training_metrics_is_found_under_each_spelling():
    monitors = [("plateau", "loss_epoch"), ("plateau", "val_loss"), ("steps", "loss"), ("plateau", "loss")]
    run, leaks = watched(monitors=monitors)
    assert leaks.steering == []
    run.module.log("loss", 0.0)
    assert leaks.steering == ["loss_epoch", "loss"]


def test_callbacks_and_class_weights_are_named():
    callbacks = [EarlyStopping("loss"), ModelCheckpoint(monitor="guard/mine/epsilon"), ModelCheckpoint()]
    _, leaks = watched(callbacks)
    first, second, third = leaks.beside_metrics()
    assert first == "EarlyStopping acts on loss, which is computed from data without noise"
    assert second.startswith("loss.weight, class weights")
    assert third.startswith("validation and test data")
