"""What pruning and quantisation cost beside DP-SGD within one budget, and what their private forms gain.

python benchmarks/private_forms.py [adult | fashion] [--seeds 5] [--epsilon 3] [--arms zeros]

Draws and noise are seeded so that the table can be printed again; a training for use leaves ``test_seed`` out.
"""

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable

import pytorch_lightning as pl

from lightning_guard.callbacks import DPSGD, MagnitudePruning, QuantizationAwareTraining
from lightning_guard.data import AdultData, FashionMNISTData
from lightning_guard.functional.quantization import fake_quantized
from lightning_guard.guard import Guard
from lightning_guard.models import MLP, SmallCNN
from lightning_guard.private import PrivateSums

TASKS: dict[str, tuple[Callable[[], pl.LightningDataModule], Callable[[], pl.LightningModule], int]] = {
    "adult": (
        lambda: AdultData(group="sex", batch_size=512),
        lambda: MLP(in_features=104, hidden=[128, 64], lr=5e-3, schedule="cosine"),
        10,
    ),
    "fashion": (lambda: FashionMNISTData(batch_size=256), lambda: SmallCNN(lr=3e-3, schedule="cosine"), 12),
}
ARMS: dict[str, Callable[[], list[Guard]]] = {
    "DP-SGD alone": list,
    "90 % zeros, masks after clipping": lambda: [MagnitudePruning(sparsity=0.9, end=0.3)],
    "90 % zeros, masks before clipping": lambda: [MagnitudePruning(sparsity=0.9, end=0.3)],
    "8 bits, ranges fixed at (-8, 8)": lambda: [QuantizationAwareTraining(ranges=(-8.0, 8.0))],
    "8 bits, noisy ranges": lambda: [QuantizationAwareTraining()],
    "4 bits, ranges fixed at (-8, 8)": lambda: [
        QuantizationAwareTraining(bits=4, activation_bits=4, ranges=(-8.0, 8.0))
    ],
    "4 bits, noisy ranges": lambda: [QuantizationAwareTraining(bits=4, activation_bits=4)],
}


def run(task: str, arm: str, seed: int, epsilon: float) -> tuple[float, float, float]:
    """Test accuracy of the model that ships, epsilon for queries, and seconds of processor time."""
    data, net, epochs = TASKS[task][0](), None, TASKS[task][2]
    pl.seed_everything(seed, verbose=False)
    net = TASKS[task][1]()
    dp, others = DPSGD(target_epsilon=epsilon, delta=1e-5, test_seed=seed), ARMS[arm]()
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=[dp, *others], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, accelerator="cpu",
    )  # fmt: skip
    masking, start = PrivateSums.mask, time.process_time()
    if "after clipping" in arm:
        PrivateSums.mask = lambda self, weight, kept: None  # type: ignore[method-assign]
    try:
        trainer.fit(net, data)
    finally:
        PrivateSums.mask = masking  # type: ignore[method-assign]
    took = time.process_time() - start
    quantised = [guard for guard in others if isinstance(guard, QuantizationAwareTraining)]
    ranges = quantised[0].activation_ranges if quantised else {}
    width = quantised[0].activation_bits if quantised else None
    with fake_quantized(net, ranges, bits=None, activation_bits=width or 8):
        found = trainer.test(net, data, verbose=False)[0]
    assert dp.plan is not None
    return found["test_accuracy"], dp.plan.query_cost, took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS, nargs="?", default="adult")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epsilon", type=float, default=3.0)
    parser.add_argument("--arms", default="", help="only those with this in their name, beside DP-SGD alone")
    options = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    wanted = [arm for arm in ARMS if arm == "DP-SGD alone" or options.arms in arm]
    found = {arm: list[tuple[float, float, float]]() for arm in wanted}
    for seed in range(options.seeds):  # arms take turns, so that a busy machine slows all alike
        for arm in wanted:
            found[arm].append(run(options.task, arm, seed, options.epsilon))
            print(seed, arm, *(f"{value:.4f}" for value in found[arm][-1]), flush=True)
    base = found["DP-SGD alone"]
    print("| arm | accuracy | seeds | less DP-SGD alone, paired (standard error) | of epsilon for queries | time |")
    print("|---|---|---|---|---|---|")
    for arm, runs in found.items():
        differences = [100 * (one[0] - other[0]) for one, other in zip(runs, base, strict=True)]
        error = statistics.stdev(differences) / len(runs) ** 0.5 if len(runs) > 1 else float("nan")
        ratio = statistics.median(one[2] / other[2] for one, other in zip(runs, base, strict=True))
        print(
            f"| {arm} | {100 * statistics.mean(one[0] for one in runs):.2f} | "
            f"{', '.join(f'{100 * one[0]:.1f}' for one in runs)} | {statistics.mean(differences):+.2f} ({error:.2f}) | "
            f"{runs[0][1]:.3f} | {ratio:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
