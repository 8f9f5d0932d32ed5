"""Where a bound on the difference between groups is hard to keep, or unusual: small cells, images, classes, numbers.

    python benchmarks/fairness_cases.py [--seeds 3] [--epochs 10] [CASE ...]

Cases: ``small``, ``half``, ``rare``, ``sorted`` (Adult by sex, demographic parity within 0.05: batches of 32; half of
the attributes missing; women are 1 % of the rows; training batches of one group each), ``images`` (Fashion-MNIST 7k,
pullovers and coats, a patch that gives away the class in 95 % of the training images), ``classes`` (Adult, three levels
of education from the other columns, by sex) and ``numbers`` (Adult, hours a week, by sex). All data are in the package.
Figures are of the test part; there the patch says nothing: half of each class has it.
"""

import argparse
import statistics
import warnings

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_guard.callbacks import FairnessRegularization
from lightning_guard.data import AdultData, FashionMNISTData
from lightning_guard.evaluation.subject import predicted
from lightning_guard.mixins import GuardMixin
from lightning_guard.models import SmallCNN


class Net(GuardMixin, pl.LightningModule):
    """An MLP 64-64 for classes, or for one number."""

    def __init__(self, features, outputs):
        super().__init__()
        self.outputs = outputs
        self.net = nn.Sequential(
            nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs)
        )

    def forward(self, x):
        return self.net(x).squeeze(1) if self.outputs == 1 else self.net(x)

    def guard_losses(self, logits, target):
        return (logits - target).square() if self.outputs == 1 else None

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.mse_loss(self(x), y) if self.outputs == 1 else F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


def adult(part, group="sex"):
    data = AdultData(group=group)
    return getattr(data, f"{part}_set").columns, data


def trained(seed, module, parts, guard, epochs, batch_size=256, shuffle=True):
    pl.seed_everything(seed, verbose=False)
    net = module()
    loader = DataLoader(TensorDataset(*(parts if guard else parts[:2])), batch_size, shuffle=shuffle)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=[guard] if guard else [], enable_model_summary=False, accelerator="cpu", **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(net, loader)
    return net.eval()


@torch.no_grad()
def outputs(net, x):
    return torch.cat([net(part) for part in x.split(2048)])


def gap(hits, group):
    return float((hits[group == 0].float().mean(0) - hits[group == 1].float().mean(0)).abs().max())


def on_adult(case, seed, epochs, guarded):
    (x, y, s), _ = adult("train")
    (tx, ty, ts), _ = adult("test")
    group, shuffle = s.clone(), True
    generator = torch.Generator().manual_seed(seed)
    if case == "half":
        group[torch.rand(len(group), generator=generator) < 0.5] = -1
    if case == "rare":  # 1 % of the rows are women, the others are men or gone
        women = (s == 0).nonzero()[:, 0]
        keep = torch.ones(len(s), dtype=torch.bool)
        keep[women[torch.randperm(len(women), generator=generator)[int((s == 1).sum()) // 99 :]]] = False
        x, y, group = x[keep], y[keep], group[keep]
    if case == "sorted":  # batches of one group each, in an order drawn once
        order = torch.randperm(len(x), generator=generator)
        order = torch.cat([order[group[order] == g] for g in (0, 1)])
        blocks = list(order.split(256))
        order = torch.cat([blocks[i] for i in torch.randperm(len(blocks) - 1, generator=generator).tolist()])
        x, y, group, shuffle = x[order], y[order], group[order], False
    guard = FairnessRegularization(max_gap=0.05) if guarded else None
    net = trained(
        seed, lambda: Net(x.shape[1], 2), (x, y, group), guard, epochs, 32 if case == "small" else 256, shuffle
    )
    decided = outputs(net, tx).argmax(1)
    return {"accuracy": float((decided == ty).float().mean()), "gap": gap(decided, ts)}, guard


class Patched(SmallCNN):
    """The packaged network with two classes."""

    def __init__(self):
        super().__init__(num_classes=2, lr=2e-3)


def images(seed, epochs, how):
    data = FashionMNISTData(val_fraction=0.0)

    def part(table, share):
        x, y = zip(*[(x, y) for x, y in table], strict=True)
        x, y = torch.stack(x), torch.as_tensor(y)
        own = (y == 2) | (y == 4)  # pullover, coat
        x, y = x[own].clone(), (y[own] == 4).long()
        generator = torch.Generator().manual_seed(0)
        agrees = torch.rand(len(y), generator=generator) < share
        patch = torch.where(agrees, y, 1 - y)
        x[patch == 1, :, :5, :5] = 1.0
        return x, y, patch

    x, y, patch = part(data.train_set, 0.95)
    tx, ty, tpatch = part(data.test_set, 0.5)
    group, guard = 2 * y + patch, None
    if how == "group_dro":
        guard = FairnessRegularization(mode="group_dro", step_size=0.05)
    elif how == "constraint":  # the patch may not decide: same rates of both classes with and without it
        group, guard = patch, FairnessRegularization("equalized_odds", max_gap=0.1, min_support=10)
    net = trained(seed, Patched, (x, y, group), guard, epochs, 64)
    right = predicted(outputs(net, tx)) == ty
    shares = [float(right[(ty == c) & (tpatch == p)].float().mean()) for c in (0, 1) for p in (0, 1)]
    return {"accuracy": float(right.float().mean()), "worst group": min(shares)}, guard


def classes(seed, epochs, guarded):
    def part(name):
        (x, _, s), data = adult(name)
        at = [i for i, feature in enumerate(data.feature_names) if feature.startswith("education=")]
        level = x[:, at].argmax(1)
        y = (level >= 9).long() + (level >= 12).long()  # up to high school, some college, a degree
        return x[:, [i for i in range(x.shape[1]) if i not in at]], y, s

    (x, y, s), (tx, ty, ts) = part("train"), part("test")
    guard = FairnessRegularization(max_gap=0.05) if guarded else None
    net = trained(seed, lambda: Net(x.shape[1], 3), (x, y, s), guard, epochs)
    decided = outputs(net, tx).argmax(1)
    return {"accuracy": float((decided == ty).float().mean()), "gap": gap(F.one_hot(decided, 3), ts)}, guard


def numbers(seed, epochs, notion):
    def part(name):
        (x, _, s), data = adult(name)
        at = list(data.feature_names).index("hours-per-week")
        keep = [i for i in range(x.shape[1]) if i != at]
        return x[:, keep], (x[:, at] * 98 + 1) / 10, s  # in tens of hours

    (x, y, s), (tx, ty, ts) = part("train"), part("test")
    guard = None
    if notion == "mean_parity":
        guard = FairnessRegularization("mean_parity", max_gap=0.1)  # an hour
    elif notion == "quantile_parity":
        guard = FairnessRegularization("quantile_parity", max_gap=0.1)
    f = outputs(trained(seed, lambda: Net(x.shape[1], 1), (x, y, s), guard, epochs), tx)
    below = torch.stack([f <= t for t in y.quantile(torch.arange(0.1, 1.0, 0.1))], 1)
    means = abs(float(f[ts == 0].mean() - f[ts == 1].mean())) * 10
    rmse = float((f - ty).square().mean().sqrt()) * 10
    return {"RMSE, hours": rmse, "means apart, hours": means, "shares apart": gap(below, ts)}, guard


CASES = {
    **{
        case: {"unguarded": lambda s, e, c=case: on_adult(c, s, e, False),
               "max_gap=0.05": lambda s, e, c=case: on_adult(c, s, e, True)}
        for case in ("small", "half", "rare", "sorted")
    },
    "images": {how: lambda s, e, h=how: images(s, e, h) for how in ("unguarded", "group_dro", "constraint")},
    "classes": {"unguarded": lambda s, e: classes(s, e, False), "max_gap=0.05": lambda s, e: classes(s, e, True)},
    "numbers": {
        "unguarded": lambda s, e: numbers(s, e, None),
        "mean_parity, an hour": lambda s, e: numbers(s, e, "mean_parity"),
        "quantile_parity, 0.1": lambda s, e: numbers(s, e, "quantile_parity"),
    },
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all if left out")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"unknown case {', '.join(sorted(unknown))}; give some of {', '.join(CASES)}")
    torch.set_num_threads(1)
    print("| case | training | figures: mean over seeds (worst of a seed) | said |\n|---|---|---|---|")
    for case in args.cases or CASES:
        for how, carry_out in CASES[case].items():
            found, said = [], 0
            for seed in range(args.seeds):
                figures, guard = carry_out(seed, args.epochs)
                found.append(figures)
                said += bool(guard is not None and guard.notes())
            cells = []
            for name in found[0]:
                values = [figures[name] for figures in found]
                worst = min(values) if name in ("accuracy", "worst group") else max(values)
                cells.append(f"{name} {statistics.mean(values):.3f} ({worst:.3f})")
            told = f"not kept, in {said} of {args.seeds}" if said else ""
            print(f"| {case} | {how} | {', '.join(cells)} | {told} |", flush=True)


if __name__ == "__main__":
    main()
