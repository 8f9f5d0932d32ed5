"""A trainer that somebody already has, with the conveniences people use, takes each guard by one added line."""

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import torchmetrics
from pytorch_lightning.callbacks import EarlyStopping, EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint, Timer
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_guard.callbacks import AdversarialTraining, FairnessRegularization, MagnitudePruning


class LitClassifier(pl.LightningModule):
    """Written long before any guard: a helper step, a metric collection, warm-up and cosine, gradient logging."""

    def __init__(self, width=32, lr=3e-3, classes=2):
        super().__init__()
        self.save_hyperparameters()
        self.backbone = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.GELU(), nn.Dropout(0.1))
        self.head = nn.Linear(width, classes)
        metrics = torchmetrics.MetricCollection(
            {"acc": torchmetrics.Accuracy("multiclass", num_classes=classes), "auroc": torchmetrics.AUROC("binary")}
        )
        self.train_metrics, self.val_metrics = metrics.clone("train_"), metrics.clone("val_")
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        return self.head(self.backbone(x))

    def _shared_step(self, batch, stage):
        x, y = batch[:2]
        logits = self(x)
        loss = F.cross_entropy(logits, y, label_smoothing=0.05)
        metrics = self.train_metrics if stage == "train" else self.val_metrics
        metrics["acc"].update(logits, y)
        metrics["auroc"].update(logits.softmax(1)[:, 1], y)
        self.log(f"{stage}_loss", loss, prog_bar=True)
        return {"loss": loss, "preds": logits.argmax(1)}

    def training_step(self, batch, batch_idx):
        self.seen += len(batch[0])
        return self._shared_step(batch, "train")

    def validation_step(self, batch, batch_idx):
        return self._shared_step(batch, "val")

    def on_train_epoch_end(self):
        self.log_dict({key: metric.compute() for key, metric in self.train_metrics.items()})
        self.train_metrics.reset()

    def on_validation_epoch_end(self):
        self.log_dict({key: metric.compute() for key, metric in self.val_metrics.items()})
        self.val_metrics.reset()

    def on_before_optimizer_step(self, optimizer):
        self.log("grad_norm", nn.utils.get_total_norm([p.grad for p in self.parameters()]))

    def configure_optimizers(self):
        decay = [p for p in self.parameters() if p.dim() > 1]
        rest = [p for p in self.parameters() if p.dim() <= 1]
        groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams["lr"])
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.hparams["lr"], total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loaders():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(320, 8, generator=generator)
    y, group = (x[:, 0] + 0.3 * x[:, 1] > 0.65).long(), (x[:, 1] > 0.5).long()
    train, val = random_split(TensorDataset(x, y, group), [256, 64], generator)
    return DataLoader(train, 32, shuffle=True, drop_last=True), DataLoader(val, 64)


GUARDS = {
    "none": [],
    "adversarial_training": [AdversarialTraining(eps=0.05, steps=3, bounds=(0.0, 1.0))],
    "fairness": [FairnessRegularization(mode="penalty", weight=2.0)],
    "magnitude_pruning": [MagnitudePruning(sparsity=0.75, every=2)],
}


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("guard", GUARDS)
def test_one_added_line(guard, ema, tmp_path):
    pl.seed_everything(0, verbose=False)
    train, val = loaders()
    kept = ModelCheckpoint(tmp_path / "kept", monitor="val_loss", save_last=True, save_top_k=2)
    trainer = pl.Trainer(
        max_epochs=4,
        accelerator="cpu",
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        check_val_every_n_epoch=1,
        logger=[CSVLogger(tmp_path), TensorBoardLogger(tmp_path)],
        enable_progress_bar=False,
        log_every_n_steps=1,
        callbacks=[
            kept,
            EarlyStopping("val_loss", patience=10),
            LearningRateMonitor(),
            Timer(),
            *([EMAWeightAveraging(decay=0.9)] if ema else []),
            *GUARDS[guard],  # the added line
        ],
    )
    model = LitClassifier()
    trainer.fit(model, train, val)
    trainer.validate(model, val, verbose=False)
    assert ema or int(model.seen) == 4 * 256  # a buffer that training_step counts in (averages average it too)
    assert model.state_dict().keys() == LitClassifier().state_dict().keys()
    loaded = LitClassifier.load_from_checkpoint(tmp_path / "kept" / "last.ckpt", weights_only=True)
    logged = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert {"train_acc", "val_auroc", "grad_norm", "val_loss"} <= set(logged.split(","))
    if guard != "none":
        assert f"guard/{guard}/" in logged
    if guard == "magnitude_pruning":
        for weights in (model.state_dict(), loaded.state_dict()):
            pruned = [weights["backbone.0.weight"], weights["head.weight"]]
            assert sum(int((w == 0).sum()) for w in pruned) == round(0.75 * sum(w.numel() for w in pruned))
