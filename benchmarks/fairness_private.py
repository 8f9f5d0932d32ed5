"""Fairness beside DP-SGD on Adult: what a bound costs within one budget, on the official test part.

python benchmarks/fairness_private.py [--seeds 5] [--epsilon 3]

Draws and noise are seeded so that the table can be printed again; a training for use leaves ``test_seed`` out.
"""

import argparse
import logging
import warnings

import pytorch_lightning as pl
import torch
from fairlearn.metrics import demographic_parity_difference, equalized_odds_difference

from lightning_guard.callbacks import DPSGD, FairnessRegularization
from lightning_guard.data import AdultData
from lightning_guard.models import MLP

ARMS = {
    "private": None,
    "demographic parity 0.1": {"notion": "demographic_parity", "max_gap": 0.1},
    "demographic parity 0.05": {"notion": "demographic_parity", "max_gap": 0.05},
    "equalized odds 0.05": {"notion": "equalized_odds", "max_gap": 0.05},
}


def run(seed: int, epsilon: float, options: dict | None) -> dict[str, float]:
    pl.seed_everything(seed, verbose=False)
    data = AdultData(group="sex", batch_size=512)
    data.setup("fit")
    data.setup("test")
    dp = DPSGD(target_epsilon=epsilon, delta=1e-5, test_seed=seed)
    off = FairnessRegularization(max_gap=float("inf"))
    guards = [dp, off if options is None else FairnessRegularization(groups=[2], **options)]
    trainer = pl.Trainer(
        max_epochs=15, callbacks=guards, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    net = MLP(in_features=104, lr=5e-3)
    trainer.fit(net, data)
    x, y, group = (torch.cat(part) for part in zip(*data.test_dataloader(), strict=True))
    with torch.no_grad():
        yes = (net.eval()(x) > 0).long()
    return {
        "accuracy": float((yes == y).float().mean()),
        "dp": demographic_parity_difference(y, yes, sensitive_features=group),
        "eo": equalized_odds_difference(y, yes, sensitive_features=group),
        "epsilon": dp.plan.epsilon(),
        "queries": dp.plan.query_cost,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epsilon", type=float, default=3.0)
    options = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    print("| bound | accuracy | demographic parity (worst) | equalized odds (worst) | epsilon | of it for queries |")
    print("|---|---|---|---|---|---|")
    for name, arm in ARMS.items():
        found = [run(seed, options.epsilon, arm) for seed in range(options.seeds)]
        mean = {key: sum(one[key] for one in found) / len(found) for key in found[0]}
        worst = {key: max(one[key] for one in found) for key in ("dp", "eo")}
        print(
            f"| {name} | {mean['accuracy']:.4f} | {mean['dp']:.3f} ({worst['dp']:.3f}) | "
            f"{mean['eo']:.3f} ({worst['eo']:.3f}) | {mean['epsilon']:.3f} | {mean['queries']:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
