"""Processor time until a network is robust: the same PGD-7 training by the guard, torchattacks and ART, one process.

    pip install --no-deps torchattacks==3.5.1 adversarial-robustness-toolbox==1.20.1 && pip install six scikit-learn
    python benchmarks/adversarial_peers.py [--target 0.6] [--eps 0.05] [--seeds 3] [--epochs 12]

Packaged Fashion-MNIST, ``SmallCNN``, AdamW, batches of 64. After every epoch, off the clock, all three are judged by
the same attack (PGD-20 from a random point, 1,000 test images); the clock stops at the first epoch that reaches the
target. Each seed runs the three in turn. A peer that is not installed is left out.
"""

import argparse
import importlib.util
import statistics
import time
import warnings

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from lightning_guard.callbacks import AdversarialTraining
from lightning_guard.data import FashionMNISTData
from lightning_guard.functional import ThreatModel, example_losses, pgd, stream
from lightning_guard.models import SmallCNN

STEPS, BATCH = 7, 64


def tensors(loader):
    parts = [batch[:2] for batch in loader]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]).long()


def model(seed):
    pl.seed_everything(seed, verbose=False)
    return SmallCNN()


def robust(network, x, y, threat):
    network.eval()
    moved = pgd(lambda z: example_losses(network(z), y), x, threat, 20, generator=stream(0, 0))
    with torch.no_grad():
        found = (network(moved).argmax(1) == y).float().mean().item()
    network.train()
    return found


class Watch:
    """A clock that stands still while robustness is measured."""

    def __init__(self, args, test):
        self.args, self.test, self.spent, self.history = args, test, 0.0, []
        self.since = time.process_time()

    def epoch(self, network):
        """Whether the target is reached."""
        self.spent += time.process_time() - self.since
        threat = ThreatModel(self.args.eps, bounds=(0.0, 1.0))
        self.history.append((self.spent, robust(network, *self.test, threat)))
        self.since = time.process_time()
        return self.history[-1][1] >= self.args.target


def by_guard(args, seed, train, test):
    network, watch = model(seed), Watch(args, test)

    class EachEpoch(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.should_stop = watch.epoch(module)

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*train), BATCH, shuffle=True)
    guard = AdversarialTraining(eps=args.eps, steps=STEPS, bounds=(0.0, 1.0))
    pl.Trainer(
        max_epochs=args.epochs, callbacks=[guard, EachEpoch()], logger=False, enable_checkpointing=False,
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
    ).fit(network, loader)  # fmt: skip
    return watch.history


def by_torchattacks(args, seed, train, test):
    import torchattacks

    network = model(seed)
    optimizer = network.configure_optimizers()
    attack = torchattacks.PGD(network, eps=args.eps, alpha=2.5 * args.eps / STEPS, steps=STEPS, random_start=True)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*train), BATCH, shuffle=True)
    watch = Watch(args, test)
    for _ in range(args.epochs):
        for x, y in loader:
            moved = attack(x, y)
            network.train()
            optimizer.zero_grad()
            F.cross_entropy(network(moved), y).backward()
            optimizer.step()
        if watch.epoch(network):
            break
    return watch.history


def by_art(args, seed, train, test):
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.defences.trainer import AdversarialTrainer
    from art.estimators.classification import PyTorchClassifier

    network = model(seed)
    classifier = PyTorchClassifier(
        network, torch.nn.CrossEntropyLoss(), (1, 28, 28), 10, network.configure_optimizers(), clip_values=(0.0, 1.0)
    )
    attack = ProjectedGradientDescentPyTorch(
        classifier, eps=args.eps, eps_step=2.5 * args.eps / STEPS, max_iter=STEPS, num_random_init=1,
        batch_size=BATCH, verbose=False,
    )  # fmt: skip
    trainer = AdversarialTrainer(classifier, attack, ratio=1.0)
    x, y = train[0].numpy(), np.eye(10, dtype=np.float32)[train[1].numpy()]
    watch = Watch(args, test)
    for _ in range(args.epochs):
        trainer.fit(x, y, batch_size=BATCH, nb_epochs=1)
        if watch.epoch(network):
            break
    return watch.history


WAYS = {
    "guard": ("lightning_guard", by_guard),
    "torchattacks": ("torchattacks", by_torchattacks),
    "ART": ("art", by_art),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=0.6, help="accuracy under PGD-20 at eps")
    parser.add_argument("--eps", type=float, default=0.05, help="L-infinity radius in pixel values of [0, 1]")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12, help="at most")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    data = FashionMNISTData(batch_size=BATCH)
    data.setup("fit")
    data.setup("test")
    train, test = tensors(data.train_dataloader()), tensors(data.test_dataloader())
    ways = {name: way for name, (package, way) in WAYS.items() if importlib.util.find_spec(package)}
    spent = {name: [] for name in ways}
    for seed in range(args.seeds):
        for name, way in ways.items():
            history = way(args, seed, train, test)
            reached = history[-1][1] >= args.target
            spent[name].append((history[-1][0] if reached else float("inf"), history[-1][0] / len(history)))
            print(
                f"seed {seed} {name:13s} {history[-1][0]:7.1f} s, {len(history)} epochs, "
                f"accuracy under PGD-20 {history[-1][1]:.3f}{'' if reached else ' (target not reached)'}", flush=True
            )  # fmt: skip
    print("\nmedian over seeds        to target   an epoch   ratio to target [min, max]")
    for name, each in spent.items():
        ratios = [t / own for (t, _), (own, _) in zip(each, spent["guard"], strict=True)]
        target, epoch = (statistics.median(column) for column in zip(*each, strict=True))
        print(
            f"{name:22s} {target:9.1f} s {epoch:8.1f} s   {statistics.median(ratios):.2f} "
            f"[{min(ratios):.2f}, {max(ratios):.2f}]"
        )


if __name__ == "__main__":
    main()
