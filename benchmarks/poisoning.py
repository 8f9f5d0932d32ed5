"""What the guards against poisoned training data are worth: wrong labels and a BadNets patch on Fashion-MNIST.

Wrong labels: 20 % of the training labels become another class. Trained long enough that the unguarded network learns
them by heart, as it would in practice; accuracy on the clean test images after the last epoch.

A patch: some images of other classes get a white 3 x 3 corner and the label 0 (Gu et al., 2017, arXiv:1708.06733).
Success of the attack is the share of patched test images of other classes that are taken for class 0.

Example:
    python benchmarks/poisoning.py --seeds 3
"""

import argparse
import logging
import statistics
import time
import warnings
from collections import defaultdict

import pytorch_lightning as pl
import torch

from lightning_guard.callbacks import SampleLedger, TrimmedLoss
from lightning_guard.data import FashionMNISTData
from lightning_guard.evaluation import Subject
from lightning_guard.evaluation.poison import PoisonAudit
from lightning_guard.models import SmallCNN

TARGET = 0  # the class that the patch stands for


class Poisoned(FashionMNISTData):
    """Fashion-MNIST whose training images and labels can be exchanged."""

    def __init__(self, data_dir):
        super().__init__(data_dir=data_dir)
        self.exchanged = None

    @property
    def train_set(self):
        return super().train_set if self.exchanged is None else self.exchanged

    def with_rows(self, images, labels):
        """The same data with other training rows."""
        other = Poisoned(self.data_dir)
        other.exchanged = type(self.train_set)(images, labels, decode=self.train_set.decode)
        return other


class Watched(pl.Callback):
    """How well the areas so far tell wrong labels, after each pass."""

    def __init__(self, ledger, wrong):
        self.ledger, self.wrong, self.auc = ledger, wrong, []

    def on_train_epoch_end(self, trainer, module):
        if self.ledger.passes > len(self.auc):
            self.auc.append(auc(-self.ledger.aum, self.wrong))


def auc(score, positive):
    """Area under the ROC curve, ties at half."""
    _, group, size = score.unique(return_inverse=True, return_counts=True)
    rank = (size.cumsum(0) - (size - 1) / 2)[group]
    n = int(positive.sum())
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * (len(score) - n)))


def train(data, callbacks, epochs, seed):
    pl.seed_everything(seed, verbose=False)
    model = SmallCNN(width=16)
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=callbacks, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    began = time.process_time()
    trainer.fit(model, data.train_dataloader())
    model.seconds = time.process_time() - began
    return model.eval()


@torch.no_grad()
def accuracy(model, images, labels):
    return float((model(images).argmax(1) == labels).float().mean())


def patched(images):
    """A white square in the corner."""
    images = images.clone()
    images[..., -4:-1, -4:-1] = 255
    return images


def wrong_labels(data, seed, epochs, until, rate, shares):
    images, labels = data.train_set.columns
    draw = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(labels), generator=draw) < rate
    noisy = torch.where(wrong, (labels + torch.randint(1, 10, labels.shape, generator=draw)) % 10, labels)
    test = data.test_set[:][0], data.test_set.columns[1]
    bad = data.with_rows(images, noisy)
    yield "clean labels", {"accuracy": accuracy(train(data, [], epochs, seed), *test)}
    ledger = SampleLedger(until=until)
    watched = Watched(ledger, wrong)
    model = train(bad, [ledger, watched], epochs, seed)
    yield "unguarded", {"accuracy": accuracy(model, *test)}
    for share in shares:
        model = train(bad, [TrimmedLoss(share=share)], epochs, seed)
        yield f"TrimmedLoss(share={share})", {"accuracy": accuracy(model, *test)}
    named = torch.zeros(len(labels), dtype=torch.bool)
    named[ledger.suspicious] = True
    yield (
        "SampleLedger",
        {
            **{f"AUC after {n} epochs": watched.auc[n - 1] for n in (2, 5, 10, 20) if n <= len(watched.auc)},
            "named": float(named.float().mean()),
            "precision": float(wrong[named].float().mean()),
            "recall": float(named[wrong].float().mean()),
        },
    )
    model = train(data.with_rows(images[~named], noisy[~named]), [], epochs, seed)
    yield "without those named", {"accuracy": accuracy(model, *test)}
    calm = SampleLedger(until=until)
    train(data, [calm], until, seed)  # no training after the last pass
    yield "SampleLedger on clean labels", {"named": len(calm.suspicious) / len(labels)}


def backdoor(data, seed, epochs, rate, shares):
    images, labels = data.train_set.columns
    draw = torch.Generator().manual_seed(seed)
    others = (labels != TARGET).nonzero().squeeze(1)
    chosen = others[torch.randperm(len(others), generator=draw)[: round(rate * len(labels))]]
    poison = torch.zeros(len(labels), dtype=torch.bool)
    poison[chosen] = True
    shown, said = images.clone(), labels.clone()
    shown[poison], said[poison] = patched(images[poison]), TARGET
    bad = data.with_rows(shown, said)
    test = data.test_set[:][0], data.test_set.columns[1]
    victims = test[1] != TARGET
    attacked = patched(data.test_set.columns[0][victims]).float() / 255

    def figures(model):
        taken = accuracy(model, attacked, torch.full((len(attacked),), TARGET))
        return {"accuracy": accuracy(model, *test), "attack success": taken}

    yield "no poison", figures(train(data, [], epochs, seed))
    model = train(bad, [], epochs, seed)
    yield "unguarded", figures(model)
    rows = torch.utils.data.DataLoader(bad.train_set, 500, collate_fn=data.val_dataloader().collate_fn)
    subject, share = Subject(model, rows), float(poison.sum() / (said == TARGET).sum())  # as if one knew it
    audit = PoisonAudit(share=share, clean=data.val_dataloader())
    found, evidence = audit.inspect(subject), audit.evaluate(subject).figures
    for way in ("clustering", "spectral"):
        named = torch.zeros(len(labels), dtype=torch.bool)
        named[getattr(found, way)] = True
        yield (
            f"audit, {way}",
            {
                "recall": float(named[poison].float().mean()),
                "precision": float(poison[named].float().mean()) if named.any() else float("nan"),
                "named of the clean": float(named[~poison].float().mean()),
                "false alarms": evidence[f"poison/{way}_false_alarms"].value,
            },
        )
    for share in shares:
        yield f"TrimmedLoss(share={share})", figures(train(bad, [TrimmedLoss(share=share)], epochs, seed))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--parts", nargs="*", default=["labels", "patch"], choices=["labels", "patch"])
    parser.add_argument("--epochs", type=int, default=25, help="of training with wrong labels")
    parser.add_argument("--until", type=int, default=10, help="passes of the ledger")
    parser.add_argument("--noise", type=float, default=0.2, help="share of wrong labels")
    parser.add_argument("--patches", type=float, nargs="*", default=[0.02, 0.05], help="share of patched images")
    parser.add_argument("--patch-epochs", type=int, default=10, help="of training with patched images")
    parser.add_argument("--data-dir", help="folder of the full data set; the packaged 7,000 images without")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.ERROR)
    data, table = Poisoned(options.data_dir), defaultdict(list)
    for seed in range(options.first, options.first + options.seeds):
        parts = []
        if "labels" in options.parts:
            arms = wrong_labels(data, seed, options.epochs, options.until, options.noise, (0.2, 0.3))
            parts.append((f"{options.noise:.0%} wrong labels", arms))
        for rate in options.patches if "patch" in options.parts else ():
            parts.append((f"{rate:.0%} patched", backdoor(data, seed, options.patch_epochs, rate, (0.15,))))
        for part, arms in parts:
            for arm, figures in arms:
                said = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
                print(f"seed {seed}, {part}, {arm}: {said}", flush=True)
                for name, value in figures.items():
                    table[part, arm, name].append(value)
    print("\n| data | | figure | mean | lowest | highest |\n|---|---|---|---|---|---|")
    for (part, arm, name), values in table.items():
        print(f"| {part} | {arm} | {name} | {statistics.mean(values):.3f} | {min(values):.3f} | {max(values):.3f} |")


if __name__ == "__main__":
    main()
