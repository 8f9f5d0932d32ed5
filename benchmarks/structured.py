"""Channel pruning, low rank and distillation on the packaged Fashion-MNIST: size, work and accuracy over seeds.

    python benchmarks/structured.py [--seeds 3] [--epochs 12] [--arms PART] [--networks SmallCNN MLP]

Every arm trains for the same epochs from the same seeds and data order; arms "from dense" begin with the weights of
the dense arm of their seed, so they have trained twice as long in all. Accuracy is on the test rows. Prints a table.
"""

import argparse
import logging
import statistics
import warnings
from tempfile import TemporaryDirectory

import pytorch_lightning as pl
import torch

from lightning_guard.callbacks import ChannelPruning, KnowledgeDistillation, LowRankFactorization
from lightning_guard.data import FashionMNISTData
from lightning_guard.functional.channels import multiplications
from lightning_guard.models import MLP, SmallCNN

CNN = {"width": 32, "schedule": "cosine"}
FLAT = {"in_features": 784, "hidden": [512, 512], "num_classes": 10, "schedule": "cosine", "lr": 1e-3}


def arms(name: str, dense: str) -> dict:
    def taught() -> KnowledgeDistillation:
        return KnowledgeDistillation(start=0.4)

    def by_dense() -> KnowledgeDistillation:
        return KnowledgeDistillation(dense)

    if name == "SmallCNN":
        return {
            "dense": list,
            "75 % of channels, before training": lambda: [ChannelPruning(0.75)],
            "75 % of channels, at 0.4": lambda: [ChannelPruning(0.75, start=0.4)],
            "75 % of channels, at 0.4, taught": lambda: [ChannelPruning(0.75, start=0.4), taught()],
            "75 % of channels, from dense": lambda: [ChannelPruning(0.75, checkpoint=dense)],
            "75 % of channels, from dense, taught": lambda: [ChannelPruning(0.75, checkpoint=dense), by_dense()],
            "50 % of channels, from dense, taught": lambda: [ChannelPruning(0.5, checkpoint=dense), by_dense()],
        }
    return {
        "dense": list,
        "rank 32, before training": lambda: [LowRankFactorization(32)],
        "rank 32, at 0.4": lambda: [LowRankFactorization(32, start=0.4)],
        "rank 8, at 0.4": lambda: [LowRankFactorization(8, start=0.4)],
        "rank 8, at 0.4, taught": lambda: [LowRankFactorization(8, start=0.4), taught()],
        "rank 8, from dense, taught": lambda: [LowRankFactorization(8, checkpoint=dense), by_dense()],
    }


def run(name: str, guards: list, seed: int, epochs: int, keep: str = "") -> tuple[float, float, float]:
    pl.seed_everything(seed, verbose=False)
    module = SmallCNN(**CNN) if name == "SmallCNN" else MLP(**FLAT)
    data = FashionMNISTData(batch_size=128)
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=guards, limit_val_batches=0, accelerator="cpu", **dict.fromkeys(off, False)
    )
    trainer.fit(module, datamodule=data)
    if keep:
        torch.save(module.state_dict(), keep)
    accuracy = trainer.test(module, datamodule=data, verbose=False)[0]["test_accuracy"]
    example = torch.zeros(2, 1, 28, 28)
    macs = multiplications(module.eval(), example, lambda net, x: net(x))
    return 100 * accuracy, sum(p.numel() for p in module.parameters()), macs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--arms", default="", help="only the arms whose name has this in it, and the dense one")
    parser.add_argument("--networks", nargs="+", default=["SmallCNN", "MLP"])
    options = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in options.networks:
        print(f"\n| {name} | parameters | multiplications | accuracy % (mean, range) | beside dense |")
        print("|---|---|---|---|---|")
        with TemporaryDirectory() as folder:
            table(name, folder, options)


def table(name: str, folder: str, options: argparse.Namespace) -> None:
    dense: list[float] = []
    for arm in arms(name, ""):
        if arm != "dense" and options.arms not in arm:
            continue
        found = []
        for seed in range(options.seeds):
            path = f"{folder}/{seed}.pt"
            make = arms(name, path)[arm]
            found.append(run(name, make(), seed, options.epochs, path if arm == "dense" else ""))
        accuracy = [one[0] for one in found]
        dense = dense or accuracy
        beside = statistics.mean(a - d for a, d in zip(accuracy, dense, strict=True))
        print(
            f"| {arm} | {found[0][1]:,.0f} | {found[0][2]:,.0f} | {statistics.mean(accuracy):.2f} "
            f"({min(accuracy):.2f} to {max(accuracy):.2f}) | {beside:+.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
