"""What guards cost a step: against loops written by hand and against plain Lightning, in one process, interleaved.

    python benchmarks/step_cost.py [--model cnn|mlp|transformer] [--repeats 9] [--steps 30] [--batch-size 128]

Prints processor time of one thread a step and ratios as median [min, max] over the repeats; each repeat runs all
variants in turn, and a ratio is taken within its repeat, so a machine whose speed drifts does not decide it.
"""

import argparse
import logging
import random
import statistics
import time
import warnings

import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from lightning_guard.callbacks import AdversarialTraining, FairnessRegularization, MagnitudePruning
from lightning_guard.data import FashionMNISTData
from lightning_guard.models import MLP, SmallCNN, SmallTransformer

EPS, STEPS = 0.1, 7


class FlatMLP(MLP):
    """784-1024-1024-10 on flattened images."""

    def __init__(self):
        super().__init__(784, [1024, 1024], num_classes=10)

    def forward(self, x):
        return super().forward(x.flatten(1))


MODELS = {"cnn": SmallCNN, "mlp": FlatMLP, "transformer": SmallTransformer}


class Clock(pl.Callback):
    """Processor time of the training loop after a warm-up of five steps."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 5:
            self.began = time.process_time()

    def on_train_end(self, trainer, module):
        self.per_step = (time.process_time() - self.began) / (trainer.global_step - 5)


def batches(n, batch_size):
    data = FashionMNISTData(batch_size=batch_size)
    data.setup("fit")
    found = []
    while len(found) < n:
        found += [tuple(part[:2]) for part in data.train_dataloader()]
    return found[:n]


class Listed(torch.utils.data.Dataset):
    """Batches made before the clock runs."""

    def __init__(self, made):
        self.made = made

    def __len__(self):
        return len(self.made)

    def __getitem__(self, i):
        return self.made[i]


def by_lightning(model, made, callbacks):
    clock = Clock()
    trainer = pl.Trainer(
        max_epochs=1, callbacks=[*callbacks, clock], logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    pl.seed_everything(0, verbose=False)
    trainer.fit(model(), torch.utils.data.DataLoader(Listed(made), batch_size=None))
    return clock.per_step


def by_hand(model, made, attack=None):
    torch.manual_seed(0)
    model = model()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    steps = 1 if attack == "fgsm" else STEPS
    alpha = min(2.5 / steps, 1.25) * EPS
    for i, (x, y) in enumerate(made):
        if i == 5:
            began = time.process_time()
        if attack:
            model.eval()
            low, high = (x - EPS).clamp_min(0), (x + EPS).clamp_max(1)
            moved = (x + EPS * (2 * torch.rand_like(x) - 1)).clamp(low, high)
            if attack == "trades":
                with torch.no_grad():
                    clean = F.softmax(model(x), 1)
            for _ in range(steps):
                moved = moved.detach().requires_grad_()
                logits = model(moved)
                if attack == "trades":
                    loss = F.kl_div(F.log_softmax(logits, 1), clean, reduction="sum")
                else:
                    loss = F.cross_entropy(logits, y, reduction="sum")
                (g,) = torch.autograd.grad(loss, moved)
                with torch.no_grad():
                    moved = (moved + alpha * g.sign()).clamp_(low, high)
            moved = moved.detach()
            model.train()
            if attack != "trades":
                x = moved
        optimizer.zero_grad()
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        if attack == "trades":
            other = F.log_softmax(model(moved), 1)
            loss = loss + 6 * F.kl_div(other, F.softmax(logits, 1), reduction="batchmean")
        loss.backward()
        optimizer.step()
    return (time.process_time() - began) / (len(made) - 5)


ATTACKS = {
    "AdversarialTraining PGD-7": {},
    # A look for collapses is made once an epoch, which lasts 30 steps here and hundreds elsewhere.
    "AdversarialTraining FGSM-RS": {"method": "fgsm", "collapse": "ignore"},
    "AdversarialTraining N-FGSM": {"method": "n_fgsm", "collapse": "ignore"},
    "AdversarialTraining TRADES-7": {"objective": "trades"},
    "AdversarialTraining MART-7": {"objective": "mart"},
    "AdversarialTraining PGD-7, AWP": {"awp": 0.01},
    "AdversarialTraining free, a replay": {"method": "free", "steps": 1, "collapse": "ignore"},
}


def idle():
    return [AdversarialTraining(eps=0.0), MagnitudePruning(sparsity=0.0)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="rounds over all variants")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of a variant in a round")
    parser.add_argument("--batch-size", type=int, default=128, help="images a step")
    parser.add_argument("--only", nargs="*", help="these variants, and the standard step of Lightning")
    parser.add_argument("--model", choices=MODELS, default="cnn", help="which network")
    options = parser.parse_args()
    model = MODELS[options.model]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    made = batches(options.steps + 5, options.batch_size)
    grouped = [(x, y, y % 2) for x, y in made]

    def guarded(**options):
        return lambda: by_lightning(model, made, [AdversarialTraining(EPS, bounds=(0.0, 1.0), **options)])

    variants = {
        "hand-written standard step": lambda: by_hand(model, made),
        "hand-written PGD-7": lambda: by_hand(model, made, "pgd"),
        "hand-written FGSM-RS": lambda: by_hand(model, made, "fgsm"),
        "hand-written TRADES-7": lambda: by_hand(model, made, "trades"),
        "Lightning standard step": lambda: by_lightning(model, made, []),
        "Lightning standard step again": lambda: by_lightning(model, made, []),
        "idle guards": lambda: by_lightning(model, made, idle()),
        **{name: guarded(**options) for name, options in ATTACKS.items()},
        "FairnessRegularization": lambda: by_lightning(model, grouped, [FairnessRegularization()]),
        "MagnitudePruning": lambda: by_lightning(
            model, made, [MagnitudePruning(0.8, start=0, end=options.steps, every=10)]
        ),
    }
    if options.only:
        variants = {name: run for name, run in variants.items() if name in ("Lightning standard step", *options.only)}
    seconds = {name: [] for name in variants}
    for _ in range(options.repeats):
        for name in random.sample(list(variants), len(variants)):  # or a place in the row would count as a cost
            seconds[name].append(variants[name]())
    print(f"{'':34}{'ms a step':>10}    ratio, median [min, max]")
    reference = ("hand-written standard step", "Lightning standard step")
    compared = {
        **{
            f"AdversarialTraining {name}": [f"hand-written {name}", "Lightning standard step"]
            for name in ("PGD-7", "FGSM-RS", "TRADES-7")
        },
        **{f"hand-written {name}": ["hand-written standard step"] for name in ("PGD-7", "FGSM-RS", "TRADES-7")},
    }
    for name in variants:
        against = compared.get(name, [] if name in reference else ["Lightning standard step"])
        against = [other for other in against if other in variants]
        ratios = []
        for other in against:
            values = [a / b for a, b in zip(seconds[name], seconds[other], strict=True)]
            ratios.append(f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}] of {other}")
        print(f"{name:34}{1000 * statistics.median(seconds[name]):10.2f}    {'; '.join(ratios)}")


if __name__ == "__main__":
    main()
