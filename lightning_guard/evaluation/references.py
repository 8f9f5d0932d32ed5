"""What others reach on the same data: fairlearn's post-processing and its reductions, to be drawn beside a sweep."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_guard.evaluation.base import Interval, wilson
from lightning_guard.evaluation.subject import Subject, column
from lightning_guard.evaluation.table import TableNotion, bootstrap, gaps, percentiles, sums

_TABLES = 2000  # drawn for an interval
_POST: dict[str, str] = {  # of ThresholdOptimizer, which has no constraint of accuracy or of losses
    "demographic_parity": "demographic_parity",
    "equal_opportunity": "true_positive_rate_parity",
    "predictive_equality": "false_positive_rate_parity",
    "equalized_odds": "equalized_odds",
}
_MOMENTS: dict[str, str] = {
    "demographic_parity": "DemographicParity",
    "equal_opportunity": "TruePositiveRateParity",
    "predictive_equality": "FalsePositiveRateParity",
    "equalized_odds": "EqualizedOdds",
    "accuracy_parity": "ErrorRateParity",
}


class Reference(NamedTuple):
    """What a method of others reaches on the test examples.

    Args:
        bound: the tolerance it was given, in units of the gap; None if it takes none.
        values: expected accuracy and gap, by the keys of the figures that they stand beside.
        intervals: 95% intervals for the choice of test examples, by the same keys.
    """

    bound: float | None
    values: dict[str, float]
    intervals: dict[str, Interval]


class Unsuitable(ValueError):
    """Why a method cannot be had on these data, as a sentence for the report."""


def threshold_optimizer(train: Subject, test: Subject, notion: str, bounds: Sequence[float]) -> list[Reference]:
    """fairlearn's ``ThresholdOptimizer`` on the training outputs of a finished model, one for each tolerance.

    Thresholds of each group are fitted to the training examples, and tried on the test examples. They need the
    group at prediction time, which a model trained under a constraint does not. Predictions between two thresholds
    are randomised: accuracy and rates are those expected over the draws.

    Args:
        train: the model on its training examples.
        test: the model on the test examples.
        notion: demographic_parity, equal_opportunity, predictive_equality or equalized_odds.
        bounds: largest differences between groups on the training examples. Equalized odds takes none; the gap is
            then closed as far as the method can.

    Returns:
        A reference for each bound; for equalized odds a single one.

    Raises:
        Unsuitable: if labels are not binary, there is not one attribute of two groups at least, or the notion is
            not one of the method's.

    Reference:
        Hardt, Price and Srebro, NeurIPS 2016, arXiv:1610.02413.
    """
    constraint = _supported(notion, _POST, "ThresholdOptimizer")
    seen, unseen = _examples(train, test)
    return [
        _judged(_thresholds(constraint, bound, seen, unseen), unseen, notion, bound)
        for bound in ([None] if notion == "equalized_odds" else bounds)
    ]


def exponentiated_gradient(train: Subject, test: Subject, notion: str, bounds: Sequence[float]) -> list[Reference]:
    """fairlearn's ``ExponentiatedGradient`` over logistic regressions, one mixture for each bound.

    It reads the training inputs, flattened, and not the model's outputs. ``difference_bound`` is between a group
    and all examples, so the gap between two groups may be up to twice as large. A prediction is drawn from a mixture
    of some dozen models: accuracy and rates are those expected over the draws.

    Args:
        train: any model on the training examples; only its examples are used.
        test: the same on the test examples.
        notion: demographic_parity, equal_opportunity, predictive_equality, equalized_odds or accuracy_parity.
        bounds: ``difference_bound``, each in units of the gap.

    Returns:
        A reference for each bound.

    Raises:
        Unsuitable: as for :func:`threshold_optimizer`, and if the inputs are not one tensor.

    Reference:
        Agarwal et al., A Reductions Approach to Fair Classification, ICML 2018, arXiv:1803.02453.
    """
    moment = _supported(notion, _MOMENTS, "ExponentiatedGradient")
    seen, unseen = _examples(train, test)
    features = _inputs(train)[seen.known], _inputs(test)[unseen.known]
    return [_judged(_mixture(moment, bound, features, seen), unseen, notion, bound) for bound in bounds]


Method = Callable[[Subject, Subject, str, Sequence[float]], list[Reference]]

REFERENCES: dict[str, Method] = {
    "threshold_optimizer": threshold_optimizer,
    "exponentiated_gradient": exponentiated_gradient,
}
"""The methods by the names that ``compare --reference`` takes."""

LABELS: dict[str, tuple[str, str]] = {
    "threshold_optimizer": (
        "ThresholdOptimizer",
        "fairlearn's thresholds for each group, fitted to the training outputs of the baseline. It needs the group of "
        "everybody it decides about, and randomises near a threshold; expected values.",
    ),
    "exponentiated_gradient": (
        "ExponentiatedGradient",
        "fairlearn's reduction over logistic regressions on the same inputs. Its bound is between a group and all, so "
        "groups may be twice as far apart; it randomises over its models; expected values.",
    ),
}
"""How a report calls each method, and what it must say about it."""


class _Examples(NamedTuple):
    """Examples of known group: P[class 1], target and group ``(n,)``, and which of all examples they are."""

    score: Tensor
    target: Tensor
    group: Tensor
    known: Tensor


def expected_table(group: Tensor, target: Tensor, chance: Tensor, groups: int) -> Tensor:
    """Expected counts ``(G, 2, 2)`` by group, label and prediction of a randomised binary predictor, in float64.

    Args:
        group: ``(N,)`` in [0, ``groups``).
        target: ``(N,)`` of 0 and 1.
        chance: probability of predicting 1 ``(N,)``.
        groups: number of groups.

    Example:
        >>> expected_table(torch.tensor([0, 0]), torch.tensor([1, 1]), torch.tensor([0.25, 0.5]), 1).tolist()
        [[[0.0, 0.0], [1.25, 0.75]]]
    """
    place = group * 2 + target.long()
    table = torch.zeros(groups * 2, 2, dtype=torch.float64)
    table.index_add_(0, place, torch.stack([1 - chance.double(), chance.double()], 1))
    return table.reshape(groups, 2, 2)


def _supported(notion: str, known: dict[str, str], method: str) -> str:
    if notion not in known:
        raise Unsuitable(f"{method} is not shown: it knows {', '.join(known)} and not {notion}.")
    return known[notion]


def _examples(train: Subject, test: Subject) -> tuple[_Examples, _Examples]:
    both = []
    for subject in (train, test):
        logits, target, group, lacking = subject.outputs
        binary = subject.kind == "binary" or (subject.kind == "multiclass" and logits.shape[1] == 2)
        if not binary or target is None:
            raise Unsuitable("fairlearn's methods are not shown: they take binary labels, and these are others.")
        if group is None:
            raise Unsuitable(f"fairlearn's methods are not shown: {lacking['group']}.")
        if group.dim() > 1:
            raise Unsuitable(
                f"fairlearn's methods are not shown: they are fitted to one attribute, and there are {group.shape[1]}."
            )
        group = group.nan_to_num(nan=-1.0).long() if group.is_floating_point() else group
        known = group >= 0
        score = logits.double().sigmoid() if logits.dim() == 1 else logits.double().softmax(1)[:, 1]
        both.append(_Examples(score[known], target[known].long(), group[known], known))
    seen, unseen = both
    groups = seen.group.unique()
    if len(groups) < 2 or not bool(torch.isin(unseen.group, groups).all()):
        raise Unsuitable(
            "fairlearn's methods are not shown: they need two groups at least, each among the training examples."
        )
    place = {part: torch.searchsorted(groups, part_of.group) for part, part_of in enumerate(both)}
    return seen._replace(group=place[0]), unseen._replace(group=place[1])


def _inputs(subject: Subject) -> np.ndarray:
    """All inputs of the loader, flattened, in the order of ``subject.outputs``."""
    parts, target = [], []
    with subject.still():
        for step in subject.batches():
            if not isinstance(step.inputs, Tensor):
                raise Unsuitable(
                    "ExponentiatedGradient is not shown: it takes inputs of one tensor, and these are a "
                    f"{type(step.inputs).__name__}."
                )
            parts.append(step.inputs.reshape(len(step.inputs), -1).double().cpu())
            target.append(column(step.target).cpu())
    expected = subject.outputs.target
    if expected is None or not torch.equal(torch.cat(target), expected):
        raise Unsuitable("ExponentiatedGradient is not shown: the loader gives other examples each time it is read.")
    return torch.cat(parts).numpy()


def _thresholds(constraint: str, bound: float | None, seen: _Examples, unseen: _Examples) -> Tensor:
    from fairlearn.postprocessing import ThresholdOptimizer

    # float64: with pandas 3 scores of a narrower type fail inside fairlearn 0.15.
    optimizer = ThresholdOptimizer(
        estimator=_scores(), constraints=constraint, prefit=True, predict_method="predict_proba", tol=bound
    )
    # Thresholds are sought among the scores, so the scores stand for the inputs.
    score = seen.score.numpy()[:, None]
    with _quiet():
        optimizer.fit(score, seen.target.numpy(), sensitive_features=seen.group.numpy())
        pairs = optimizer._pmf_predict(unseen.score.numpy()[:, None], sensitive_features=unseen.group.numpy())
    return torch.from_numpy(np.asarray(pairs, dtype=np.float64)[:, 1])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what pandas 3 has to say about the code of fairlearn 0.15."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="fairlearn")
        yield


def _scores() -> Any:
    """A fitted classifier whose inputs are its probabilities."""
    from sklearn.base import BaseEstimator, ClassifierMixin  # type: ignore[import-untyped]

    class Scores(ClassifierMixin, BaseEstimator):
        classes_ = np.array([0, 1])

        def fit(self, x: np.ndarray, y: np.ndarray) -> "Scores":
            return self

        def __sklearn_is_fitted__(self) -> bool:
            return True

        def predict_proba(self, x: np.ndarray) -> np.ndarray:
            return np.hstack([1 - x, x])

    return Scores()


def _mixture(moment: str, bound: float, features: tuple[np.ndarray, np.ndarray], seen: _Examples) -> Tensor:
    from fairlearn import reductions
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    reduction = reductions.ExponentiatedGradient(
        LogisticRegression(max_iter=1000), constraints=getattr(reductions, moment)(difference_bound=bound)
    )
    with _quiet():
        reduction.fit(features[0], seen.target.numpy(), sensitive_features=seen.group.numpy())
    return torch.from_numpy(np.asarray(reduction._pmf_predict(features[1]), dtype=np.float64)[:, 1])


def _judged(chance: Tensor, unseen: _Examples, notion: Any, bound: float | None) -> Reference:
    table = expected_table(unseen.group, unseen.target, chance, int(unseen.group.max()) + 1)
    return _reference(table, notion, bound)


def _reference(table: Tensor, notion: TableNotion, bound: float | None) -> Reference:
    right, everyone = float(table.diagonal(dim1=1, dim2=2).sum()), float(table.sum())
    key = f"fairness/{notion}"
    gap = float(gaps(sums(table), notion))
    if gap != gap:
        raise Unsuitable("fairlearn's methods are not shown: a group has no test example of a class.")
    interval = percentiles(bootstrap(table, _TABLES, np.random.default_rng(0))[notion])
    values = {"task/accuracy": right / everyone, key: gap}
    intervals: dict[str, Interval] = {"task/accuracy": wilson(round(right), round(everyone))}
    if interval is not None:
        intervals[key] = interval
    return Reference(bound, values, intervals)
