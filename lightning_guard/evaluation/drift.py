"""Whether the test data are of the kind that the training data are of."""

import warnings
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_guard.evaluation.base import Bars, Evidence, Figure
from lightning_guard.evaluation.families import some
from lightning_guard.evaluation.rows import row_marks
from lightning_guard.evaluation.subject import Subject, column, part_of
from lightning_guard.functional.membership import area
from lightning_guard.functional.random import stream
from lightning_guard.functional.statistics import clopper_pearson, holm

Matrix = NDArray[np.float64]

_VALUES = 20  # a column of at most so many values is told apart by their shares
_SHOWN = 15
_COMPONENTS = 50  # of more inputs than 128
_FAR = 0.01  # of the training examples are farther from the next than what counts as far


class Drift:
    """Tests whether training and test examples come from one distribution; the model has no part in it.

    Three questions. Does any single column differ: Kolmogorov and Smirnov's test of numbers, the chi-square test of
    columns of few values, of labels and of groups, all corrected by Holm's method, so that ``level`` is the chance of
    any false alarm. Can a classifier tell the two apart (Lopez-Paz and Oquab, 2017), which sees what no column shows by
    itself. And how many test examples lie far from all training examples: farther than 99% of these from each other.

    Off unless asked for, ``--evaluate.drift Drift``; a comparison looks once, before anything is trained.

    Args:
        level: chance that a column is named though none differs, in (0, 1).
        examples: at most so many of each kind are looked at by the tests of columns, drawn at random.
        most: at most so many of each kind train the classifier and measure distances.

    | case                                           | result                                               |
    |------------------------------------------------|------------------------------------------------------|
    | the training examples are not known            | a note                                               |
    | inputs that are no single tensor               | labels and groups alone, and a note                  |
    | a column that is constant and equal in both    | not tested                                           |
    | test examples that are in the training data    | counted, ``drift/copies``; no test looks for them    |
    | fewer than 50 examples of either kind          | no classifier, no distances, and a note              |

    Raises:
        ValueError: if an option is out of range.

    Reference:
        Lopez-Paz and Oquab, Revisiting Classifier Two-Sample Tests, 2017, arXiv:1610.06545.
        Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979.

    Example:
        >>> x, y = torch.arange(200.0)[:, None] % 100, torch.arange(200) % 2
        >>> subject = Subject(torch.nn.Identity(), [(x[:100] + 30, y[:100])], train=[(x[100:], y[100:])])
        >>> Drift().evaluate(subject).figures["drift/columns"].value
        1.0
    """

    name: ClassVar[str] = "drift"
    optional: ClassVar[bool] = True
    once: ClassVar[bool] = True
    """It says the same of every arm, so a comparison asks once."""

    def __init__(self, level: float = 0.05, examples: int = 20_000, most: int = 2_000):
        if not 0 < level < 1:
            raise ValueError(f"level={level} is no chance of a false alarm; give e.g. 0.05")
        for option, value in (("examples", examples), ("most", most)):
            if value < 50:
                raise ValueError(f"{option}={value} examples show hardly anything; give at least 50")
        self.level, self.examples, self.most = level, examples, most

    def evaluate(self, subject: Subject) -> Evidence:
        """Figures, the columns that differ most, and notes."""
        there = _read(subject, self.examples)
        if isinstance(subject.train, str) or subject.trained is None:
            return Evidence(notes=[f"Nothing is said of drift: {str(subject.train).rstrip('.')}."])
        here = _read(subject.trained, self.examples)
        evidence = Evidence()
        tested = [*_inputs(here, there, subject), *_others(here, there)]
        if "inputs" not in here or "inputs" not in there:
            evidence.notes.append("Inputs are no single tensor: only labels and groups are compared.")
        elif here["inputs"].shape[1] != there["inputs"].shape[1]:
            evidence.notes.append("Training and test inputs have other shapes: only labels and groups are compared.")
        else:
            evidence |= self._together(here["inputs"], there["inputs"])
        evidence |= self._columns(tested, len(here["rows"]), len(there["rows"]))
        return evidence | _copies(subject.trained, subject)

    def _columns(self, tested: list[tuple[str, float, float]], trained: int, held_out: int) -> Evidence:
        names, sizes, chances = zip(*tested, strict=True) if tested else ((), (), ())
        corrected = holm(chances)
        found = [name for name, p in zip(names, corrected, strict=True) if p < self.level]
        about = (
            f"Of {len(names)} columns of {trained} training and {held_out} test examples, by the tests of Kolmogorov "
            f"and Smirnov and of chi-square, corrected by Holm: {self.level:.0%} is the chance of any false alarm."
        )
        evidence = Evidence()
        if not names:
            evidence.notes.append("No column could be tested for drift.")
            return evidence
        label = "Columns that have drifted"
        evidence.figures["drift/columns"] = Figure(float(len(found)), label, "count", "lower", about)
        largest = sorted(range(len(names)), key=lambda i: -sizes[i])[:_SHOWN]
        said = (
            "Largest difference of the cumulative shares; of columns of few values, the share that would have to move."
        )
        shown = [names[i] for i in largest], [float(sizes[i]) for i in largest]
        evidence.bars["drift/columns"] = Bars(*shown, "Columns that differ most", "Distance", said, y_unit="fraction")
        if found:
            order = sorted(found, key=lambda name: -sizes[names.index(name)])
            evidence.notes.append(f"Training and test data differ in {some(order)}.")
        return evidence

    def _together(self, here: Matrix, there: Matrix) -> Evidence:
        few = min(len(here), len(there))
        if few < 50:
            return Evidence(notes=[f"{few} examples are too few to tell training and test data apart by a classifier."])
        size = min(few, self.most)
        here, there = (part[np.random.default_rng(0).permutation(len(part))[:size]] for part in (here, there))
        x = np.concatenate([here, there])
        spread = x.std(0)
        x = (x - x.mean(0)) / np.where(spread > 0, spread, 1.0)
        x = np.nan_to_num(x)
        if x.shape[1] > 128:
            from sklearn.decomposition import PCA  # type: ignore[import-untyped]

            x = PCA(min(_COMPONENTS, size), random_state=0).fit_transform(x)
        value, interval = _told_apart(x, size)
        evidence = Evidence()
        about = (
            f"How well boosted trees that learnt from half of {size} test and {size} training examples tell the other "
            "halves apart; 0.5 is a blind guess."
        )
        label = "Training and test data told apart, AUC"
        evidence.figures["drift/auc"] = Figure(value, label, "ratio", "lower", about)
        evidence.intervals["drift/auc"] = interval
        if interval[0] > 0.5:
            evidence.notes.append(
                f"A classifier tells test from training data (AUC {value:.2f}, 95% interval from {interval[0]:.2f}): "
                "what holds for one may not hold for the other."
            )
        far = _far(x[:size], x[size:])
        about = (
            f"Test examples farther from the next of {size} training examples than {1 - _FAR:.0%} of these are from "
            f"each other; {_FAR:.0%} are to be expected."
        )
        figure = Figure(far / size, "Test examples far from all training data", "fraction", "lower", about)
        evidence.figures["drift/far"] = figure
        evidence.intervals["drift/far"] = clopper_pearson(far, size)
        return evidence


def distance(first: Matrix, second: Matrix) -> tuple[float, float] | None:
    """How far two samples of a column are apart, in [0, 1], and the p-value of no difference; None for a constant.

    | case                          | distance                                       | test                      |
    |-------------------------------|------------------------------------------------|---------------------------|
    | more than 20 different values | largest difference of cumulative shares        | Kolmogorov and Smirnov    |
    | fewer                         | total variation: share that would have to move | chi-square                |
    | values expected fewer than five times | put together                           | chi-square                |
    | not a number                  | a value of its own                             |                           |

    Example:
        >>> size, p = distance(np.arange(100.0), np.arange(100.0) + 50)
        >>> round(size, 2), p < 1e-9
        (0.5, True)
    """
    from scipy.stats import chi2_contingency, ks_2samp

    values, places = np.unique(np.concatenate([first, second]), return_inverse=True, equal_nan=True)
    if len(values) < 2:
        return None
    if len(values) > _VALUES:
        first, second = first[~np.isnan(first)], second[~np.isnan(second)]
        if not len(first) or not len(second):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of the exact p-value that gives way to the asymptotic one
            found = ks_2samp(first, second)
        return float(found.statistic), float(found.pvalue)
    table = np.stack([np.bincount(part, minlength=len(values)) for part in np.split(places, [len(first)])])
    apart = float(np.abs(table[0] / len(first) - table[1] / len(second)).sum() / 2)
    expected = table.sum(0) * table.sum(1).min() / table.sum()
    rare = expected < 5
    table = np.concatenate([table[:, ~rare], table[:, rare].sum(1, keepdims=True)], 1) if rare.any() else table
    table = table[:, table.sum(0) > 0]
    if table.shape[1] < 2:
        return apart, 1.0
    return apart, float(chi2_contingency(table, correction=False).pvalue)


def _read(subject: Subject, most: int) -> dict[str, Any]:
    """Inputs ``(N, D)``, label and group ``(N, A)`` of the examples, at most so many; those that there are."""
    parts: dict[str, list[Tensor]] = {"inputs": [], "label": [], "group": []}
    lacking: set[str] = set()
    count = 0
    with subject.still():
        for step in subject.batches():
            inputs = step.inputs
            found: dict[str, Any] = {
                "inputs": inputs,
                "label": part_of(step, "target"),
                "group": part_of(step, "group"),
            }
            for name, part in found.items():
                if isinstance(part, Tensor) and part.dim():
                    parts[name].append(column(part).detach().cpu().reshape(len(part), -1).double())
                else:
                    lacking.add(name)
            count += max((len(part[-1]) for part in parts.values() if part), default=0)
    if not count:
        raise ValueError("loader holds no example, so there is nothing to compare; give the data")
    rows = torch.randperm(count, generator=stream(0, count))[:most].sort().values
    whole = {name: torch.cat(part)[rows].numpy() for name, part in parts.items() if name not in lacking and part}
    return {**whole, "rows": rows}


def _inputs(here: dict[str, Any], there: dict[str, Any], subject: Subject) -> list[tuple[str, float, float]]:
    if not all("inputs" in part for part in (here, there)) or here["inputs"].shape[1:] != there["inputs"].shape[1:]:
        return []
    width = here["inputs"].shape[1]
    given = subject.feature_names
    names = list(given) if given is not None and len(given) == width else [f"input {i}" for i in range(width)]
    found = [(name, distance(here["inputs"][:, i], there["inputs"][:, i])) for i, name in enumerate(names)]
    return [(name, *one) for name, one in found if one is not None]


def _others(here: dict[str, Any], there: dict[str, Any]) -> list[tuple[str, float, float]]:
    tested = []
    for name in ("label", "group"):
        if name not in here or name not in there or here[name].shape[1:] != there[name].shape[1:]:
            continue
        for i in range(here[name].shape[1]):
            called = name if here[name].shape[1] == 1 else f"{name} {i}"
            if (one := distance(here[name][:, i], there[name][:, i])) is not None:
                tested.append((called, *one))
    return tested


def _told_apart(x: Matrix, size: int) -> tuple[float, tuple[float, float]]:
    """Learnt from one half and judged by the other: folds that share examples would make the interval too short."""
    from sklearn.ensemble import HistGradientBoostingClassifier  # type: ignore[import-untyped]

    kind, half = np.repeat([0, 1], size), np.tile(np.arange(size) % 2 == 0, 2)
    trees = HistGradientBoostingClassifier(max_iter=50, max_leaf_nodes=8, early_stopping=False, random_state=0)
    score = trees.fit(x[half], kind[half]).predict_proba(x[~half])[:, 1]
    return area(score[kind[~half] == 1], score[kind[~half] == 0])


def _far(here: Matrix, there: Matrix) -> int:
    from sklearn.neighbors import NearestNeighbors  # type: ignore[import-untyped]

    near = NearestNeighbors(n_neighbors=2).fit(here)
    usual = np.quantile(near.kneighbors(here)[0][:, 1], 1 - _FAR)  # the nearest of a point is itself
    return int((near.kneighbors(there, n_neighbors=1)[0][:, 0] > usual).sum())


def _copies(trained: Subject, subject: Subject) -> Evidence:
    marks = row_marks(trained), row_marks(subject)
    if marks[0] is None or marks[1] is None:
        return Evidence()
    same = int(np.isin(marks[1], marks[0]).sum())
    about = f"Of {len(marks[1])} test examples those that are in the training data too, label and all."
    share = Figure(same / len(marks[1]), "Test examples that were trained on", "fraction", "lower", about)
    return Evidence({"drift/copies": share})
