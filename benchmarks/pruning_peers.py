"""Pruning beside Lightning's ModelPruning and torch.nn.utils.prune, on the same network, data, seeds and steps.

    python benchmarks/pruning_peers.py promises
    python benchmarks/pruning_peers.py accuracy [--sparsity 0.95] [--epochs 15] [--seeds 3] [--data-dir DIR]
    python benchmarks/pruning_peers.py cost [--repeats 5] [--steps 100]

A network of 784-300-100-10 (LeNet-300-100) on Fashion-MNIST, the packaged 7,000 images or the published 70,000.
"""

import argparse
import copy
import logging
import random
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint, ModelPruning
from torch import nn

from lightning_guard.callbacks import MagnitudePruning, WeightClustering
from lightning_guard.data import FashionMNISTData
from lightning_guard.functional import cubic_sparsity

LAYERS = ("net.1", "net.4", "net.7")


class Net(pl.LightningModule):
    def __init__(self, epochs=15, constant=False):
        super().__init__()
        self.epochs, self.constant = epochs, constant
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 300), nn.BatchNorm1d(300), nn.ReLU(),
            nn.Linear(300, 100), nn.BatchNorm1d(100), nn.ReLU(), nn.Linear(100, 10),
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 1e-3)
        if self.constant:
            return optimizer
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trainer(callbacks, **more):
    return pl.Trainer(**{
        "callbacks": callbacks, "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", **more,
    })  # fmt: skip


def weights(module):
    layers = map(module.get_submodule, LAYERS)
    # The peer's `weight` is computed in the next forward pass; until then it is the one of the last.
    return [(x.weight_orig * x.weight_mask if hasattr(x, "weight_mask") else x.weight).detach() for x in layers]


def sparsity(module):
    return sum(int((w == 0).sum()) for w in weights(module)) / sum(w.numel() for w in weights(module))


def at(module):
    """ModelPruning asks for the parameters themselves; its own default takes biases and BatchNorm too."""
    return [(module.get_submodule(name), "weight") for name in LAYERS]


def peer(module, amount, **more):
    options = {"use_lottery_ticket_hypothesis": False, "use_global_unstructured": True, **more}
    return ModelPruning("l1_unstructured", at(module), amount=amount, **options)


class Kept(pl.Callback):
    """Weights at the ends of epochs."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_end(self, trainer, module):
        self.seen.append([w.clone() for w in weights(module)])


def promises():
    """Each row: what is promised, what the peer gives, what this guard gives."""
    data = FashionMNISTData(batch_size=256)
    rows = []

    def fit(make, epochs, module=None, ckpt_path=None, **more):
        pl.seed_everything(0, verbose=False)
        module = Net(constant=True) if module is None else module
        run = trainer(make(module), max_epochs=epochs, **more)
        run.fit(module, data, ckpt_path=ckpt_path)
        return module

    with tempfile.TemporaryDirectory() as folder:
        for name, make in (
            ("peer", lambda m: [peer(m, lambda epoch: 0.8 if epoch == 0 else 0.0)]),
            ("ours", lambda m: [MagnitudePruning(0.8, start=0, end=5, every=1)]),
        ):
            fit(lambda m, make=make, name=name: [*make(m), ModelCheckpoint(folder, name)], 1)
            stored = torch.load(f"{folder}/{name}.ckpt", weights_only=False)["state_dict"]
            plain = Net(constant=True)
            plain.load_state_dict(stored)
            resumed = fit(make, 3, ckpt_path=f"{folder}/{name}.ckpt")
            if name == "peer":
                make(resumed)[0].make_pruning_permanent(resumed)
            said = f"{sparsity(plain):.3f}, {sparsity(resumed):.3f}"
            rows.append(("sparsity in a checkpoint, then after two more epochs, 0.8 asked", name, said))
    after = fit(lambda m: [peer(m, 0.5)], 3)
    rows.append(("sparsity after three epochs, 0.5 asked", "peer", f"{sparsity(after):.3f}"))
    after = fit(lambda m: [MagnitudePruning(0.5, start=0, end=10)], 3)
    rows.append(("sparsity after three epochs, 0.5 asked", "ours", f"{sparsity(after):.3f}"))

    steps = 22  # of an epoch
    for name, make in (
        ("peer", lambda m: [peer(m, 0.5, use_lottery_ticket_hypothesis=True)]),
        ("ours", lambda m: [MagnitudePruning(0.875, start=0, end=3 * steps, rewind=0, rounds=3)]),
    ):
        kept = Kept()
        pl.seed_everything(0, verbose=False)
        module = Net(constant=True)
        first = [w.clone() for w in weights(module)]
        fit(lambda m, make=make, kept=kept: [*make(m), kept], 3, module)
        far = [max(float((a - b)[a != 0].abs().max()) for a, b in zip(now, first, strict=True)) for now in kept.seen]
        said = ", ".join(f"{d:.4f}" for d in far)
        rows.append(("largest distance of a kept weight from its first value, after rounds 1, 2, 3", name, said))
    module = Net(constant=True)
    run = trainer([ModelPruning("l1_unstructured", amount=0.5, use_lottery_ticket_hypothesis=False)], max_epochs=1)
    run.fit(module, data)
    ours = fit(lambda m: [MagnitudePruning(0.5, start=0, end=10)], 1)
    for name, net in (("peer, its defaults", module), ("ours", ours)):
        bias = net.get_parameter("net.2.bias") if name == "ours" else net.net[2].bias
        rows.append(("zeros among BatchNorm's biases", name, f"{float((bias == 0).float().mean()):.2f}"))

    class Copying(pl.Callback):
        result = "works"

        def on_train_batch_end(self, trainer, module, *args):
            if trainer.current_epoch == 1 and args[-1] == 0:
                self.keys = set(module.state_dict()) == set(Net().state_dict())
                try:
                    copy.deepcopy(module)
                except RuntimeError:
                    self.result = "fails"

    for name, make in (
        ("peer", lambda m: [peer(m, 0.5)]),
        ("ours", lambda m: [MagnitudePruning(0.5, start=0, end=10)]),
    ):
        copying = Copying()
        fit(lambda m, make=make, copying=copying: [*make(m), copying], 2)
        rows.append(("deepcopy of the module while it is pruned", name, copying.result))
        rows.append(("state_dict keys while it is pruned", name, "the user's" if copying.keys else "others"))
    for promise, who, value in rows:
        print(f"{promise:76} {who:20} {value}")


def by_epoch(module, target, epochs):
    """ModelPruning along the cubic schedule: its amounts compound, so each is of what is left."""
    half = epochs // 2
    goals = [cubic_sparsity((epoch + 1) / half, target) for epoch in range(half)]

    def amount(epoch):
        if epoch >= half:
            return 0.0
        before = goals[epoch - 1] if epoch else 0.0
        return (goals[epoch] - before) / (1 - before)

    return peer(module, amount)


def accuracy(options):
    s, epochs = options.sparsity, options.epochs
    variants = {
        "dense": lambda m: [],
        "ModelPruning, at once in the middle": lambda m: [
            peer(m, lambda epoch: s if epoch == epochs // 2 - 1 else 0.0)
        ],
        "ModelPruning, cubic by hand": lambda m: [by_epoch(m, s, epochs)],
        "magnitude, global": lambda m: [MagnitudePruning(s)],
        "magnitude, each layer": lambda m: [MagnitudePruning(s, scope="layer")],
        "gradient": lambda m: [MagnitudePruning(s, score="gradient")],
        "movement": lambda m: [MagnitudePruning(s, score="movement")],
        "regrow 0.3": lambda m: [MagnitudePruning(s, regrow=0.3)],
        "random": lambda m: [MagnitudePruning(s, score="random")],
        "rewind to 5 %, 3 rounds": lambda m: [MagnitudePruning(s, rewind=0.05, rounds=3, end=0.6)],
        "2:4": lambda m: [MagnitudePruning(pattern="2:4")],
        "16 clusters": lambda m: [WeightClustering(16)],
        "4 clusters": lambda m: [WeightClustering(4)],
    }
    if options.only:
        variants = {name: make for name, make in variants.items() if name in options.only}
    data = FashionMNISTData(batch_size=options.batch_size, data_dir=options.data_dir)
    found = {name: [] for name in variants}
    zeros, took = {}, {}
    for seed in range(options.seeds):
        for name, make in variants.items():
            pl.seed_everything(seed, verbose=False)
            module = Net(epochs)
            run = trainer(make(module), max_epochs=epochs, limit_val_batches=0)
            began = time.process_time()
            run.fit(module, data)
            took.setdefault(name, []).append(time.process_time() - began)
            # In a Trainer of its own, since ModelPruning would prune again.
            found[name].append(trainer([]).test(module, data, verbose=False)[0]["accuracy"])
            zeros[name] = sparsity(module)
    print(f"{'':40}{'accuracy, mean and seeds':36}{'zeros':>8}{'seconds':>9}")
    for name, values in found.items():
        mean = f"{100 * statistics.mean(values):.1f}   " + " ".join(f"{100 * v:.1f}" for v in values)
        print(f"{name:40}{mean:36}{zeros[name]:8.3f}{statistics.median(took[name]):9.1f}")


def cost(options):
    """A step with masks that no longer change: the peer's are multiplied in every forward pass."""
    data = FashionMNISTData(batch_size=64)
    data.setup("fit")
    made = [part for _ in range(4) for part in data.train_dataloader()][: options.steps + 5]

    class Wide(Net):
        def __init__(self):
            super().__init__(constant=True)
            self.net = nn.Sequential(
                nn.Flatten(), nn.Linear(784, 1024), nn.BatchNorm1d(1024), nn.ReLU(),
                nn.Linear(1024, 1024), nn.BatchNorm1d(1024), nn.ReLU(), nn.Linear(1024, 10),
            )  # fmt: skip

    class Clock(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 5:
                self.began = time.process_time()

        def on_train_batch_end(self, trainer, module, *args):
            self.took = time.process_time()

    def peer_from_the_start(module):
        for layer, name in at(module):
            nn.utils.prune.l1_unstructured(layer, name, 0.9)
        return []

    def timed(make):
        pl.seed_everything(0, verbose=False)
        module, clock = Wide(), Clock()
        loader = torch.utils.data.DataLoader(made, batch_size=None)
        trainer([*make(module), clock], max_epochs=1).fit(module, loader)
        return (clock.took - clock.began) / (len(made) - 5)

    variants = {
        "plain": lambda m: [],
        "plain again": lambda m: [],
        "torch.nn.utils.prune": peer_from_the_start,
        "ours": lambda m: [MagnitudePruning(0.9, start=0, end=5, every=1)],
    }
    seconds = {name: [] for name in variants}
    for _ in range(options.repeats):
        for name in random.sample(list(variants), len(variants)):
            seconds[name].append(timed(variants[name]))
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds["plain"], strict=True)]
        spread = f"{statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"
        print(f"{name:24}{1000 * statistics.median(values):8.2f} ms a step, {spread} of plain")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["promises", "accuracy", "cost"])
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--data-dir", type=Path, help="the published files; without it the packaged 7,000 images")
    parser.add_argument("--only", nargs="*", help="these variants of accuracy")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if options.what == "promises":
        promises()
    else:
        {"accuracy": accuracy, "cost": cost}[options.what](options)


if __name__ == "__main__":
    main()
