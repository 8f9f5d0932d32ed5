"""What pruning costs a step, in one process, interleaved with plain Lightning.

    python benchmarks/pruning_cost.py [--repeats 5] [--steps 200] [--batch-size 64] [--optimizer adam sgd ...]

A network of 784-1024-1024-10, 1.86 million weights, on Fashion-MNIST. Processor time of one thread a step; a ratio is
taken within its round, median [lowest, highest]. The second ratio is of the same run: all of its time to the time that
was not spent within the guard, which a busy machine disturbs less. Masks are renewed every 10 steps over all of the
steps that are timed, but for the line that says otherwise.
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
from step_cost import Clock, Listed, batches
from torch import nn

from lightning_guard.callbacks import MagnitudePruning, WeightClustering

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, 1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3),
    "sgd with momentum": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "rmsprop with momentum": lambda p: torch.optim.RMSprop(p, 1e-4, momentum=0.9),
}


class Net(pl.LightningModule):
    def __init__(self, make):
        super().__init__()
        self.make = make
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
        )

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.make(self.parameters())


class Own:
    """Processor time within a guard's own hooks, after the warm-up of the clock."""

    def __init__(self, guard):
        self.spent = self.calls = 0
        for hook in ("on_before_optimizer_step", "on_weights", "on_train_batch_end"):
            setattr(guard, hook, self.timed(getattr(guard, hook)))

    def timed(self, hook):
        def call(*args, **kwargs):
            began = time.process_time()
            hook(*args, **kwargs)
            self.spent += time.process_time() - began if self.calls >= 5 else 0
            self.calls += hook.__name__ == "on_train_batch_end"

        return call


def cost(make, made, callbacks):
    """Seconds a step, and their ratio to those outside the guard."""
    clock, own = Clock(), [Own(guard) for guard in callbacks]
    trainer = pl.Trainer(
        max_epochs=1, callbacks=[*callbacks, clock], logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    pl.seed_everything(0, verbose=False)
    trainer.fit(Net(make), torch.utils.data.DataLoader(Listed(made), batch_size=None))
    outside = clock.per_step - sum(one.spent for one in own) / (len(made) - 5)
    return clock.per_step, clock.per_step / outside


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds over all variants")
    parser.add_argument("--steps", type=int, default=200, help="timed steps of a variant in a round")
    parser.add_argument("--batch-size", type=int, default=64, help="images a step")
    parser.add_argument("--optimizer", nargs="*", default=list(OPTIMIZERS), choices=OPTIMIZERS)
    parser.add_argument("--only", nargs="*", help="these variants, and plain Lightning")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    made = batches(options.steps + 5, options.batch_size)
    end = len(made)

    def pruning(**more):
        return lambda: [MagnitudePruning(**{"sparsity": 0.9, "start": 0, "end": end, "every": 10, **more})]

    variants = {
        "plain": list,
        "plain again": list,
        "0.9, global": pruning(),
        "0.9, global, masks final at step 5": pruning(end=5, every=1),
        "0.9, each layer": pruning(scope="layer"),
        "2:4": pruning(sparsity=None, pattern="2:4"),
        "0.9, random": pruning(score="random"),
        "0.9, movement": pruning(score="movement"),
        "0.9, gradient": pruning(score="gradient"),
        "0.9, regrow 0.3": pruning(regrow=0.3),
        "16 clusters": lambda: [WeightClustering(16, start=0, end=end, every=10)],
        "16 clusters, labels final at step 5": lambda: [WeightClustering(16, start=0, end=5, every=1)],
    }
    if options.only:
        variants = {name: make for name, make in variants.items() if name in ("plain", *options.only)}
    for which in options.optimizer:
        seconds = {name: [] for name in variants}
        for _ in range(options.repeats):
            for name in random.sample(list(variants), len(variants)):
                seconds[name].append(cost(OPTIMIZERS[which], made, variants[name]()))
        print(f"\n{which:40}{'ms a step':>10}    of plain Lightning     of the same without the guard")
        for name, values in seconds.items():
            ratios = [a / b for (a, _), (b, _) in zip(values, seconds["plain"], strict=True)]
            spread = f"{statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"
            within = [ratio for _, ratio in values]
            spread += f"   {statistics.median(within):.3f} [{min(within):.3f}, {max(within):.3f}]"
            print(f"{name:40}{1000 * statistics.median(a for a, _ in values):10.2f}    {spread}", flush=True)


if __name__ == "__main__":
    main()
