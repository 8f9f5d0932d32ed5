"""Accuracy under a bound on the gap between groups: our guard beside fairret and fairlearn, on Adult and COMPAS.

    pip install --no-deps fairret==0.1.3
    python benchmarks/fairness_peers.py --out DIR [--seeds 5] [--methods guard fairret ...]
    python benchmarks/fairness_peers.py --out DIR --data compas --compas compas-scores-two-years.csv.gz

Networks are MLPs 64-64 without the attribute among the features, with the same rows, order, initial weights, optimizer
and epochs; gaps are fairlearn's, of hard predictions on test rows. Nothing is chosen on test rows: who takes a bound
gets the bound, who takes a weight has all weights reported. Finished runs are kept in DIR; a second call adds to them.

Data: ``adult`` (groups by sex; sex and race hidden), ``adult4`` (sex crossed with white or not), ``compas``.
Methods, and what their setting is:

    unguarded      nothing
    guard          FairnessRegularization: max_gap
    fairret        NormLoss on soft rates of each batch (Buyl et al., 2024): its weight
    eg_lr          ExponentiatedGradient, logistic regression (Agarwal et al., 2018): difference_bound, which is from a
                   group to all; two groups may lie twice as far apart. So each bound is tried whole and half
    eg_mlp         the same with scikit-learn's MLPClassifier 64-64
    adversarial    AdversarialFairnessClassifier (Zhang et al., 2018), with its own Adam: alpha
    thresholds     ThresholdOptimizer on the unguarded network (Hardt et al., 2016): tol. Needs the attribute when it
                   predicts, which the others do not. Fitted on training and validation rows
"""

import argparse
import importlib.util
import json
import logging
import statistics
import time
import warnings
from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from fairlearn.adversarial import AdversarialFairnessClassifier
from fairlearn.metrics import demographic_parity_difference, equalized_odds_difference
from fairlearn.postprocessing import ThresholdOptimizer
from fairlearn.reductions import DemographicParity, EqualizedOdds, ExponentiatedGradient
from fairness_data import AdultBySex, CompasData
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neural_network import MLPClassifier

from lightning_guard.callbacks import FairnessRegularization
from lightning_guard.models import MLP

DP, EO = "demographic_parity", "equalized_odds"
WIDTHS = (64, 64)
KNOWN = ("unguarded", "guard", "fairret", "eg_lr", "eg_mlp", "adversarial", "thresholds")


class Penalised(MLP):
    """An MLP with a fairret in its loss."""

    def training_step(self, batch, batch_idx):
        x, y, group = batch
        logits = self(x)
        loss = self.loss(logits, y)
        if self.by_label and not 0 < y.sum() < len(y):
            return loss  # fairret raises where a batch lacks a label
        who = torch.nn.functional.one_hot(group, self.groups).float()
        return loss + self.weight * self.fairret(logits[:, None], who, *([y[:, None].float()] if self.by_label else []))


class Scores(ClassifierMixin, BaseEstimator):
    """A network as fairlearn wants it: probabilities in float64, whose in-place writes fail on float32."""

    def __init__(self, network=None):
        self.network, self.classes_ = network, np.array([0, 1])

    def fit(self, x, y):
        """Nothing, it is trained; scikit-learn takes nothing without this for an estimator."""
        return self

    def predict_proba(self, x):
        p = 1 / (1 + np.exp(-logits(self.network, np.asarray(x, np.float32)).astype(np.float64)))
        return np.stack([1 - p, p], axis=1)


def logits(network, x):
    with torch.no_grad():
        return network.eval()(torch.from_numpy(x)).numpy()


class Diverged(Exception):
    """A peer's training ended in NaN."""


class Task:
    """The data of one seed, and the networks trained on it."""

    def __init__(self, args, seed):
        self.args, self.seed = args, seed
        if args.data == "compas":
            self.data = CompasData(args.compas, seed, args.batch_size)
        else:
            self.data = AdultBySex(args.batch_size, crossed=args.data == "adult4")
        self.groups = len(self.data.group_names)
        self.train, self.val, self.test = (
            [column.numpy() for column in part.columns]
            for part in (self.data.train_set, self.data.val_set, self.data.test_set)
        )
        self.split = seed if args.data == "compas" else None

    def fit(self, callbacks=(), kind=MLP, **extra):
        """A trained network and the processor seconds that it took."""
        pl.seed_everything(self.seed, verbose=False)
        model = kind(in_features=self.data.in_features, hidden=WIDTHS, lr=self.args.lr, schedule="cosine")
        for name, value in extra.items():
            setattr(model, name, value)
        trainer = pl.Trainer(
            max_epochs=self.args.epochs, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
            accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        train, val = self.data.train_dataloader(), self.data.val_dataloader()
        began = time.process_time()
        trainer.fit(model, train, val)
        return model, time.process_time() - began

    @cache  # noqa: B019  a task lives as long as its seed
    def unguarded(self):
        return self.fit()

    def judged(self, network, seconds):
        score = logits(network, self.test[0])
        return score > 0, score, seconds


def unguarded(task, notion, value):
    return task.judged(*task.unguarded())


def guard(task, notion, value):
    return task.judged(*task.fit([FairnessRegularization(notion=notion, max_gap=value)]))


def fairret(task, notion, value):
    from fairret.loss import NormLoss
    from fairret.statistic import FalsePositiveRate, PositiveRate, StackedLinearFractionalStatistic, TruePositiveRate

    odds = StackedLinearFractionalStatistic(TruePositiveRate(), FalsePositiveRate())
    loss = NormLoss(PositiveRate() if notion == DP else odds)
    return task.judged(*task.fit(kind=Penalised, fairret=loss, weight=value, by_label=notion == EO, groups=task.groups))


_mixtures = {}


def reduction(task, notion, value, estimator, key):
    """The mixture of one fit serves all seeds where neither rows nor estimator depend on the seed."""
    if (key, notion, value) not in _mixtures:
        x, y, group = task.train
        constraint = (DemographicParity if notion == DP else EqualizedOdds)(difference_bound=value)
        mixture = ExponentiatedGradient(estimator, constraint)
        began = time.process_time()
        mixture.fit(x, y, sensitive_features=group)
        _mixtures[key, notion, value] = mixture, time.process_time() - began
    mixture, seconds = _mixtures[key, notion, value]
    return mixture.predict(task.test[0], random_state=task.seed), None, seconds


def eg_lr(task, notion, value):
    return reduction(task, notion, value, LogisticRegression(max_iter=1000), ("lr", task.split))


def eg_mlp(task, notion, value):
    network = MLPClassifier(WIDTHS, batch_size=task.args.batch_size, max_iter=task.args.epochs, random_state=task.seed)
    return reduction(task, notion, value, network, ("mlp", task.split, task.seed))


def adversarial(task, notion, value):
    pl.seed_everything(task.seed, verbose=False)  # fairlearn 0.15 seeds torch with 0 whatever random_state is
    network = MLP(in_features=task.data.in_features, hidden=WIDTHS).layers
    sees, says = (1 if notion == DP else 2), (1 if task.groups == 2 else task.groups)
    adversary = [torch.nn.Linear(sees, 32), torch.nn.ReLU(), torch.nn.Linear(32, says)]
    model = AdversarialFairnessClassifier(
        backend="torch", predictor_model=torch.nn.Sequential(network, torch.nn.Sigmoid()),
        adversary_model=torch.nn.Sequential(*adversary, *([torch.nn.Sigmoid()] if says == 1 else [])),
        constraints=notion, alpha=value, epochs=task.args.epochs, batch_size=task.args.batch_size, shuffle=True,
    )  # fmt: skip
    x, y, group = task.train
    began = time.process_time()
    try:
        model.fit(x, y, sensitive_features=group)
    except RuntimeError as error:  # of its loss, which refuses NaN
        if any(weight.isnan().any() for weight in network.parameters()):
            raise Diverged from error
        raise
    seconds = time.process_time() - began
    score = logits(network, task.test[0]).squeeze(1)
    return model.predict(task.test[0]), score, seconds


def thresholds(task, notion, value):
    network, seconds = task.unguarded()
    chosen = ThresholdOptimizer(
        estimator=Scores(network), constraints=notion, prefit=True, predict_method="predict_proba", tol=value
    )
    x, y, group = (np.concatenate(columns) for columns in zip(task.train, task.val, strict=True))
    began = time.process_time()
    chosen.fit(x, y, sensitive_features=group)
    seconds += time.process_time() - began
    return chosen.predict(task.test[0], sensitive_features=task.test[2], random_state=task.seed), None, seconds


def methods(args):
    """Name to: function, package, name of the setting, settings of each notion, bounds the gap or not."""
    bounds = {DP: args.dp, EO: args.eo}
    weights = {DP: [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0], EO: [0.01, 0.02, 0.03, 0.05, 0.1, 0.3, 0.5]}
    alphas = [0.03, 0.1, 0.3, 1.0]
    halves = {notion: sorted({part * b for b in each for part in (0.5, 1)}) for notion, each in bounds.items()}
    half = {notion: [0.5 * b for b in each] for notion, each in bounds.items()}
    return {
        "unguarded": (unguarded, "lightning_guard", "", {DP: [None], EO: [None]}, False),
        "guard": (guard, "lightning_guard", "max_gap", bounds, True),
        "fairret": (fairret, "fairret", "weight", weights, False),
        "eg_lr": (eg_lr, "fairlearn", "difference_bound", halves, False),
        "eg_mlp": (eg_mlp, "fairlearn", "difference_bound", half, False),
        "adversarial": (adversarial, "fairlearn", "alpha", {DP: alphas, EO: alphas}, False),
        "thresholds": (thresholds, "fairlearn", "tol", {DP: args.dp, EO: [None]}, True),
    }


def figures(task, hard, score, seconds):
    _, y, group = task.test
    hard = np.asarray(hard).astype(int)
    return {
        "accuracy": float((hard == y).mean()),
        "auc": None if score is None else float(roc_auc_score(y, score)),
        DP: float(demographic_parity_difference(y, hard, sensitive_features=group)),
        EO: float(equalized_odds_difference(y, hard, sensitive_features=group)),
        "selected": float(hard.mean()),
        "seconds": seconds,
        "cost": seconds / task.unguarded()[1],
    }


class Store:
    """Finished runs in a file, written after each; the file is the truth, so that two calls may add to it."""

    def __init__(self, args):
        self.path = Path(args.out) / f"{args.data}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        config = {"data": args.data, "epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr}
        if not self.path.exists():
            self.write({"config": config, "runs": {}})
        content = self.read()
        if content["config"] != config:
            raise SystemExit(f"{self.path} holds runs with {content['config']}, not {config}; give another --out")
        if args.redo:
            runs = {key: run for key, run in content["runs"].items() if run["method"] not in args.redo}
            self.write({**content, "runs": runs})

    @property
    def runs(self):
        return self.read()["runs"]

    def read(self):
        return json.loads(self.path.read_text())

    def write(self, content):
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps(content, indent=1))
        beside.replace(self.path)

    def add(self, key, run):
        content = self.read()
        self.write({**content, "runs": {**content["runs"], key: run}})


def measure(args, store):
    known = methods(args)
    for name in args.methods:
        if importlib.util.find_spec(known[name][1]) is None:
            print(f"{name} is left out: {known[name][1]} is not installed")
    task = None
    for seed in range(args.first, args.first + args.seeds):
        for name in args.methods:
            function, package, option, settings, bounded = known[name]
            if importlib.util.find_spec(package) is None or (name == "eg_mlp" and seed >= args.slow_seeds):
                continue
            for notion in args.notions:
                for value in settings[notion]:
                    setting = "" if not option else "exact" if value is None else f"{option}={value:.4g}"
                    key = f"{name} {notion if option else 'any'} {setting} seed={seed}"
                    if key in store.runs:
                        continue
                    if task is None or task.seed != seed:
                        task = Task(args, seed)
                        task.unguarded()
                    about = {"method": name, "notion": notion if option else None, "setting": setting, "seed": seed}
                    about["bound"] = value if bounded else None
                    try:
                        run = figures(task, *function(task, notion, value))
                    except Diverged:
                        store.add(key, {**about, "diverged": True})
                        print(f"{key}: diverged", flush=True)
                        continue
                    store.add(key, {**about, **run})
                    auc = "" if run["auc"] is None else f", AUC {run['auc']:.4f}"
                    print(
                        f"{key}: accuracy {run['accuracy']:.4f}{auc}, DP {run[DP]:.4f}, EO {run[EO]:.4f}, "
                        f"{run['seconds']:.1f} s", flush=True,
                    )  # fmt: skip


def rows(store, notion):
    """The finished runs of each (method, setting) that bear on a notion, and the number of those that diverged."""
    found = defaultdict(list)
    for run in store.runs.values():
        if run["notion"] in (None, notion):
            found[run["method"], run["setting"]].append(run)
    for which, runs in sorted(found.items(), key=lambda row: (KNOWN.index(row[0][0]), _number(row[0][1]))):
        finished = [run for run in runs if not run.get("diverged")]
        yield *which, finished, len(runs) - len(finished)


def _number(setting):
    return float(setting.rpartition("=")[2]) if "=" in setting else 0.0


def column(runs, name):
    return [run[name] for run in runs if run[name] is not None]


def table(store, notion, args):
    """Means over seeds; the worst gap of the notion, in how many seeds it kept the bound + 0.01, time of unguarded."""
    print(f"\n### {args.data}, {notion.replace('_', ' ')}\n")
    print("| method | setting | accuracy | AUC | DP gap | EO gap | worst gap | kept | time | seeds |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for method, setting, runs, diverged in rows(store, notion):
        constant = sum(not 0.005 < run["selected"] < 0.995 for run in runs)
        for count, what in ((constant, "constant"), (diverged, "diverged")):
            setting += f" ({what} in {count})" if count else ""
        if not runs:
            print(f"| {method} | {setting} | | | | | | | | 0 |")
            continue
        accuracy, auc, dp, eo = (column(runs, name) for name in ("accuracy", "auc", DP, EO))
        spread = f" ± {statistics.stdev(accuracy):.4f}" if len(runs) > 1 else ""
        kept = "" if runs[0]["bound"] is None else sum(run[notion] <= run["bound"] + 0.01 for run in runs)
        print(
            f"| {method} | {setting} | {statistics.mean(accuracy):.4f}{spread} "
            f"| {format(statistics.mean(auc), '.3f') if auc else ''} "
            f"| {statistics.mean(dp):.3f} | {statistics.mean(eo):.3f} | {max(column(runs, notion)):.3f} | {kept} "
            f"| {statistics.median(column(runs, 'cost')):.1f} | {len(runs)} |"
        )


def front(store, notion, args):
    """Settings that another one of the same method beats in both are crosses, and may lie outside."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    lines = defaultdict(list)
    for method, _, runs, _ in rows(store, notion):
        if not runs:
            continue
        gap, accuracy = column(runs, notion), column(runs, "accuracy")
        lines[method].append((
            statistics.mean(gap), statistics.mean(accuracy),
            statistics.stdev(gap) if len(gap) > 1 else 0, statistics.stdev(accuracy) if len(gap) > 1 else 0,
        ))  # fmt: skip
    edge = []
    for method, points in lines.items():
        best = [p for p in points if not any(q[0] <= p[0] and q[1] >= p[1] and q != p for q in points)]
        edge += best
        color, label = f"C{KNOWN.index(method)}", method
        if method == "thresholds":
            label += " (attribute at prediction)"
        gap, accuracy, across, along = zip(*sorted(best), strict=True)
        axes.errorbar(
            gap, accuracy, along, across, label=label, color=color, marker="o", markersize=4, capsize=2, linewidth=1,
            linestyle="--" if method == "thresholds" else "-",
        )  # fmt: skip
        rest = [p for p in points if p not in best]
        axes.plot([p[0] for p in rest], [p[1] for p in rest], "x", color=color, alpha=0.4)
    low, high = min(p[1] for p in edge), max(p[1] for p in edge)
    axes.set_xlim(0, 1.1 * max(p[0] for p in edge))
    axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    for bound in {DP: args.dp, EO: args.eo}[notion]:
        axes.axvline(bound, color="0.8", linewidth=0.8, zorder=0)
    axes.set_xlabel(f"{notion.replace('_', ' ')} difference on test rows (mean and deviation over seeds)")
    axes.set_ylabel("accuracy on test rows")
    axes.legend(fontsize="small", frameon=False)
    axes.set_title(args.data)
    path = store.path.with_name(f"{args.data}_{notion}.png")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"\n{path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of results and figures; what is finished there is kept")
    parser.add_argument("--data", choices=["adult", "adult4", "compas"], default="adult")
    parser.add_argument("--compas", help="compas-scores-two-years.csv, plain or .gz")
    parser.add_argument("--methods", nargs="*", choices=KNOWN, default=KNOWN)
    parser.add_argument("--redo", nargs="*", choices=KNOWN, help="forget what is finished of these methods")
    parser.add_argument("--notions", nargs="*", choices=[DP, EO], default=[DP, EO])
    parser.add_argument("--dp", type=float, nargs="*", default=[0.02, 0.05, 0.1], help="bounds of demographic parity")
    parser.add_argument("--eo", type=float, nargs="*", default=[0.03, 0.05], help="bounds of equalized odds")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--slow-seeds", type=int, default=2, help="seeds of eg_mlp, which is slow")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=5e-3, help="peak of the cosine, AdamW")
    args = parser.parse_args()
    if args.data == "compas" and not args.compas:
        parser.error("--data compas needs --compas PATH of compas-scores-two-years.csv")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    store = Store(args)
    measure(args, store)
    for notion in args.notions:
        table(store, notion, args)
        front(store, notion, args)


if __name__ == "__main__":
    main()
