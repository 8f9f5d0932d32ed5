"""What a private step costs: against plain Lightning, beside Opacus, in time and in memory.

    python benchmarks/dp_sgd_cost.py [--model cnn mlp transformer] [--repeats 7] [--steps 20]
    python benchmarks/dp_sgd_cost.py --memory [--model ...]
    python benchmarks/dp_sgd_cost.py --grow batch|width|length

Time is processor time of one thread a step, noise included, and ratios are median [min, max] over rounds in which all
variants take turns in random order. Ours runs inside Lightning with Poisson draws; Opacus runs in the shortest loop
that it allows, with fixed batches and no Lightning around it. Memory is the peak of a process of its own above what it
held before the first step.
"""

import argparse
import json
import logging
import os
import random
import resource
import statistics
import subprocess
import sys
import time
import warnings

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

from lightning_guard.callbacks import DPSGD
from lightning_guard.models.transformer import Block

WARM = 17  # steps before the clock runs; DPSGD probes after 0, 1, 4, 16, 64 ... steps


def cnn(width=16):
    """The network of Opacus' MNIST example, 26,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, width, 8, 2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Conv2d(width, 2 * width, 4, 2), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Flatten(), nn.Linear(2 * width * 16, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def mlp(width=1024):
    return nn.Sequential(
        nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )  # fmt: skip


class Tokens(nn.Module):
    """Two blocks of pre-norm attention over 64 tokens."""

    def __init__(self, width=128, length=64):
        super().__init__()
        self.words, self.places = nn.Embedding(1000, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(Block(width, 4, 0.0), Block(width, 4, 0.0))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        # One index an example: Opacus cannot tell examples apart otherwise (ours can).
        places = torch.arange(x.shape[1]).repeat(len(x), 1)
        return self.head(self.blocks(self.words(x) + self.places(places)).mean(1))


def images(n, length):
    return torch.rand(n, 1, 28, 28)


def vectors(n, length):
    return torch.rand(n, 784)


def tokens(n, length):
    return torch.randint(0, 1000, (n, length))


MODELS = {  # network, inputs, batch size, what --grow width gives
    "cnn": (cnn, images, 256, (16, 32, 64)),
    "mlp": (mlp, vectors, 1024, (512, 1024, 2048)),
    "transformer": (Tokens, tokens, 64, (64, 128, 256)),
}


class Rows(torch.utils.data.Dataset):
    """Rows that are fetched as a batch, so that the loader costs nobody anything; a few stand for many."""

    def __init__(self, x, y, length):
        self.x, self.y, self.length = x, y, length

    def __len__(self):
        return self.length

    def __getitems__(self, rows):
        rows = torch.tensor(rows) % len(self.y)
        return self.x[rows], self.y[rows]


def whole(batch):
    return batch


class Net(pl.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Clock(pl.Callback):
    def __init__(self):
        self.ticks = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.ticks.append(time.process_time())

    @property
    def per_step(self):
        return (self.ticks[-1] - self.ticks[WARM]) / (len(self.ticks) - 1 - WARM)


def by_lightning(net, data, size, steps, private):
    clock, trained = Clock(), [DPSGD(delta=1e-6, noise_multiplier=1.0)] if private else []
    trainer = pl.Trainer(
        max_steps=steps + WARM + 1, callbacks=[*trained, clock], logger=False, enable_checkpointing=False,
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Net(net), torch.utils.data.DataLoader(data, size, shuffle=True, collate_fn=whole))
    return clock.per_step


def by_opacus(net, data, size, steps, mode):
    from opacus import PrivacyEngine

    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    loader = torch.utils.data.DataLoader(data, size, shuffle=True, collate_fn=whole)
    criterion = nn.CrossEntropyLoss()
    made = PrivacyEngine().make_private(
        module=net, optimizer=optimizer, data_loader=loader, criterion=criterion, noise_multiplier=1.0,
        max_grad_norm=1.0, poisson_sampling=False, grad_sample_mode=mode,
    )  # fmt: skip
    net, optimizer = made[0], made[1]
    criterion = made[2] if mode == "ghost" else criterion
    ticks = []
    for x, y in loader:
        ticks.append(time.process_time())
        optimizer.zero_grad()
        criterion(net(x), y).backward()
        optimizer.step()
    return (ticks[-1] - ticks[WARM]) / steps


VARIANTS = {
    "plain Lightning": lambda *given: by_lightning(*given, private=False),
    "plain Lightning again": lambda *given: by_lightning(*given, private=False),
    "DPSGD": lambda *given: by_lightning(*given, private=True),
    "Opacus hooks": lambda *given: by_opacus(*given, "hooks"),
    "Opacus functorch": lambda *given: by_opacus(*given, "functorch"),
    "Opacus ghost": lambda *given: by_opacus(*given, "ghost"),
}


def once(variant, model, steps, size=None, width=None, length=64):
    """Seconds a step of one variant."""
    make, inputs, usual, _ = MODELS[model]
    size = size or usual
    torch.manual_seed(0)
    data = Rows(inputs(2 * size, length), torch.randint(0, 10, (2 * size,)), length=size * (steps + WARM + 1))
    extra = {"length": length} if model == "transformer" else {}
    net = make(**extra) if width is None else make(width, **extra)
    return VARIANTS[variant](net, data, size, steps)


def quiet():
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning_fabric", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)


def skipped(model, variant):
    return model == "mlp" and variant in ("Opacus hooks", "Opacus functorch")  # 10 GB of per-example gradients


def timed(models, repeats, steps, **sizes):
    for model in models:
        names = [name for name in VARIANTS if not skipped(model, name)]
        seconds = {name: [] for name in names}
        for _ in range(repeats):
            for name in random.sample(names, len(names)):  # or a place in the row would count as a cost
                seconds[name].append(once(name, model, steps, **sizes))
        what = " ".join(f"{key} {value}" for key, value in sizes.items())
        print(f"{model} {what}: ms a step, and the ratio to plain Lightning in the same round, median [min, max]")
        for name in names:
            ratios = [a / b for a, b in zip(seconds[name], seconds["plain Lightning"], strict=True)]
            print(
                f"  {name:24}{1000 * statistics.median(seconds[name]):8.1f}   "
                f"{statistics.median(ratios):5.2f} [{min(ratios):.2f}, {max(ratios):.2f}]",
                flush=True,
            )


def remembered(models, steps):
    """Each variant in a process of its own."""
    for model in models:
        print(f"{model}: MB above the start, and the ratio to plain Lightning")
        plain = None
        for name in VARIANTS:
            if skipped(model, name) or name.endswith("again"):
                continue
            asked = [sys.executable, __file__, "--one", json.dumps([name, model, steps])]
            # Large tensors straight from the system, or the peak would tell of fragments and not of tensors.
            env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
            done = subprocess.run(asked, capture_output=True, text=True, check=True, env=env)
            used = float(done.stdout.split()[-1])
            plain = plain or used
            print(f"  {name:24}{used:8.1f}   {used / plain:5.2f}", flush=True)


def one(variant, model, steps):
    from opacus import PrivacyEngine  # noqa: F401  # so that everybody starts from the same imports

    once(variant, model, 1, size=2)  # what the first step loads is nobody's
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    once(variant, model, steps)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", choices=MODELS, default=list(MODELS), help="which networks")
    parser.add_argument("--repeats", type=int, default=7, help="rounds over all variants")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a variant in a round")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--grow", choices=["batch", "width", "length"], help="time for several sizes")
    parser.add_argument("--only", nargs="*", help="these variants, and plain Lightning")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet()
    if options.only:
        for name in set(VARIANTS) - {"plain Lightning", *options.only}:
            del VARIANTS[name]
    if options.one:
        one(*json.loads(options.one))
    elif options.memory:
        remembered(options.model, options.steps)
    elif options.grow is None:
        timed(options.model, options.repeats, options.steps)
    for model in options.model if options.grow else ():
        _, _, size, widths = MODELS[model]
        if options.grow == "batch":
            for factor in (0.25, 1, 4):
                timed([model], options.repeats, options.steps, size=int(size * factor))
        elif options.grow == "width":
            for width in widths:
                timed([model], options.repeats, options.steps, width=width)
        elif model == "transformer":
            for length in (16, 64, 256):
                timed([model], options.repeats, options.steps, length=length)


if __name__ == "__main__":
    main()
