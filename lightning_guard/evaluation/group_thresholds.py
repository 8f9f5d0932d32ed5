"""A threshold for each group, after training, for those who may use the group at prediction time."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_guard.evaluation.base import Evidence, Figure
from lightning_guard.evaluation.subject import Subject
from lightning_guard.evaluation.table import TABLE_NOTIONS, Panel, percentiles
from lightning_guard.functional import stream

_CONSTRAINTS = {
    "demographic_parity": "demographic_parity",
    "equal_opportunity": "true_positive_rate_parity",
    "predictive_equality": "false_positive_rate_parity",
    "equalized_odds": "equalized_odds",
}


@dataclass(frozen=True)
class Rule:
    """How one group is decided: positive above ``first`` with the chance ``weight``, else above ``second``.

    Args:
        first: threshold of the probability of class 1; -1 is always positive, 2 never.
        second: the other threshold.
        weight: chance of the first, in [0, 1].
        constant: chance of a positive decision that looks at nothing.
        ignore: chance of such a decision, in [0, 1].
    """

    first: float
    second: float
    weight: float
    constant: float = 0.0
    ignore: float = 0.0

    def chances(self, probability: Tensor) -> Tensor:
        """The chance of a positive decision ``(N,)``."""
        looked = self.weight * (probability > self.first).double()
        looked += (1 - self.weight) * (probability > self.second).double()
        return self.ignore * self.constant + (1 - self.ignore) * looked


class GroupThresholds:
    """Decides by thresholds of each group's own, so that a notion holds between groups; it needs the group.

    A separate step after training that nothing else takes: fitted on validation data by fairlearn's
    ``ThresholdOptimizer`` for the highest accuracy (Hardt, Price and Srebro, 2016). Decisions between two thresholds
    are drawn at random. Deciding by a protected attribute is disparate treatment, and unlawful in many places and
    uses, such as credit and employment in the United States: ask before you deploy this.

    Args:
        notion: what is equal between groups: ``demographic_parity``, ``equal_opportunity``, ``predictive_equality``
            or ``equalized_odds``.
        max_gap: the largest gap on the data it was fitted on.
        rules: by group.

    | case                                     | result                                             |
    |------------------------------------------|----------------------------------------------------|
    | a group that the fit has not seen        | refused: there is no threshold for it              |
    | group unknown, in ``fit``, ``evaluate``  | left out; ``evaluate`` says how many in a note     |
    | ``max_gap`` above 0 with equalized odds  | refused: fairlearn does not relax it               |

    Reference:
        Hardt, Price and Srebro, Equality of Opportunity in Supervised Learning, NeurIPS 2016, arXiv:1610.02413.

    Example:
        >>> rules = {0: Rule(0.3, 0.3, 1.0), 1: Rule(0.7, 0.7, 1.0)}
        >>> thresholds = GroupThresholds("demographic_parity", 0.0, rules)
        >>> thresholds.predict(torch.zeros(2), torch.tensor([0, 1])).tolist()
        [1, 0]
        >>> GroupThresholds.from_dict(thresholds.to_dict()) == thresholds
        True
    """

    def __init__(self, notion: str, max_gap: float, rules: Mapping[int, Rule]):
        if notion not in _CONSTRAINTS:
            raise ValueError(f"notion={notion!r} has no group thresholds; give one of {', '.join(_CONSTRAINTS)}")
        if not 0 <= max_gap <= 1:
            raise ValueError(f"max_gap={max_gap} is no difference of rates; give a number in [0, 1]")
        if max_gap and notion == "equalized_odds":
            raise ValueError(f"max_gap={max_gap} cannot be had with equalized odds, which is exact; set max_gap=0.0")
        self.notion, self.max_gap, self.rules = notion, float(max_gap), dict(rules)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GroupThresholds) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # it may change

    @classmethod
    def fit(cls, subject: Subject, notion: str = "demographic_parity", max_gap: float = 0.0) -> "GroupThresholds":
        """Find the thresholds on validation data, which neither trained the model nor will test it.

        Args:
            subject: the model and its validation data: binary, with one attribute.
            notion: what is to be equal.
            max_gap: the largest gap there.

        Raises:
            ValueError: if the data is not binary, has no group, several attributes, fewer than two groups, or a group
                without one of the classes.
        """
        empty = cls(notion, max_gap, {})
        probability, target, group, known = _binary(subject)
        probability, target, group = (part[known] for part in (probability, target, group))
        groups = group.unique().tolist()
        if len(groups) < 2:
            raise ValueError(f"the validation data has {len(groups)} known groups; thresholds are for at least two")
        for one in groups:
            if len(target[group == one].unique()) < 2:
                raise ValueError(f"{subject.group_name(one)} lacks a class in the validation data; give more of it")
        empty.rules = {one: _rule(found) for one, found in _optimised(empty, probability, target, group).items()}
        return empty

    def chances(self, logits: Tensor, group: Tensor) -> Tensor:
        """The chance of deciding for class 1 ``(N,)``, which is 0 or 1 outside the randomised zone.

        Args:
            logits: ``(N,)`` or ``(N, 2)``.
            group: whole numbers ``(N,)``.

        Raises:
            ValueError: if a group was not there when the thresholds were found.
        """
        strange = sorted(set(group.unique().tolist()) - self.rules.keys())
        if strange:
            raise ValueError(
                f"there is no threshold for group {', '.join(map(str, strange))}; fit on data that has it, or leave "
                "these examples out"
            )
        chance, probability = torch.zeros(len(group), dtype=torch.float64), _probability(logits)
        for one, rule in self.rules.items():
            chance[group == one] = rule.chances(probability[group == one])
        return chance

    def predict(self, logits: Tensor, group: Tensor, seed: int = 0) -> Tensor:
        """Decisions 0 or 1 ``(N,)``; ``seed`` draws those between two thresholds."""
        chance = self.chances(logits, group)
        drawn = torch.rand(len(chance), generator=stream(seed, 0), dtype=torch.float64)
        return (drawn < chance).long()

    def evaluate(self, subject: Subject, min_support: int = 30, replicates: int = 10_000, seed: int = 0) -> Evidence:
        """Accuracy and gaps of the decisions on other data, with intervals, under ``group_thresholds/``."""
        _, target, group, known = _binary(subject)
        decision = torch.zeros_like(target)
        decision[known] = self.predict(subject.outputs.logits[known], group[known], seed)
        kin = subject.families()
        panel = Panel(kin, target, decision, min_support, 2)
        values, drawn = panel.values(), panel.bootstrap(replicates, np.random.default_rng(seed))
        hits = (decision == target)[known]
        evidence = Evidence(
            {
                "group_thresholds/accuracy": Figure(
                    float(hits.double().mean()), "Accuracy with group thresholds", "fraction", "higher",
                    "Thresholds of each group's own, which need the group at prediction time.",
                )
            }
        )  # fmt: skip
        for notion in TABLE_NOTIONS:
            value, interval = values[notion], percentiles(drawn[notion])
            label = f"{notion.replace('_', ' ').capitalize()} gap with group thresholds"
            about = "Largest minus smallest rate of the groups, of decisions by thresholds of each group's own."
            number = value if value == value else None
            evidence.figures[f"group_thresholds/{notion}"] = Figure(number, label, "fraction", "lower", about)
            if number is not None and interval is not None:
                evidence.intervals[f"group_thresholds/{notion}"] = interval
        evidence.notes.append(
            f"The group is used at prediction time, for {self.notion.replace('_', ' ')} within {self.max_gap:g} on "
            "validation data."
        )
        if not bool(known.all()):
            evidence.notes.append(f"{int((~known).sum())} of {len(known)} examples are of unknown group: left out.")
        return evidence

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON or YAML."""
        rules = [{"group": group, **asdict(rule)} for group, rule in sorted(self.rules.items())]
        return {"notion": self.notion, "max_gap": self.max_gap, "rules": rules}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "GroupThresholds":
        """What :meth:`to_dict` gave."""
        rules = {int(rule["group"]): Rule(**{k: v for k, v in rule.items() if k != "group"}) for rule in state["rules"]}
        return cls(state["notion"], state["max_gap"], rules)


def _binary(subject: Subject) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P[class 1], target and group of a binary subject ``(N,)``, and where the group is known."""
    logits, target, group, lacking = subject.outputs
    if target is None or not (subject.kind == "binary" or (subject.kind == "multiclass" and logits.shape[1] == 2)):
        raise ValueError(f"group thresholds decide between two classes. {subject.problem}".strip())
    if group is None:
        raise ValueError(f"group thresholds need the group: {lacking['group']}")
    if group.dim() > 1:
        raise ValueError(
            f"the group has {group.shape[1]} attributes, and thresholds are for one; give the one that counts, or "
            "number the combinations"
        )
    return _probability(logits), target.long(), group.long(), group >= 0


def _probability(logits: Tensor) -> Tensor:
    logits = logits.double()  # fairlearn 0.15 with pandas 3 fails on narrower types
    return (logits if logits.dim() == 1 else logits[:, 1] - logits[:, 0]).sigmoid()


def _optimised(wanted: GroupThresholds, probability: Tensor, target: Tensor, group: Tensor) -> dict[int, Any]:
    from fairlearn.postprocessing import ThresholdOptimizer  # takes seconds, and few need it
    from sklearn.base import BaseEstimator  # type: ignore[import-untyped, unused-ignore]  # has no types

    class Given(BaseEstimator):
        """Says what it is given: the scores stand for the inputs."""

        def fit(self, x: np.ndarray, y: np.ndarray) -> "Given":
            return self

        def __sklearn_is_fitted__(self) -> bool:
            return True

        def predict_proba(self, scores: np.ndarray) -> np.ndarray:
            return np.concatenate([1 - scores, scores], 1)

    optimizer = ThresholdOptimizer(
        estimator=Given(),
        constraints=_CONSTRAINTS[wanted.notion],
        objective="accuracy_score",
        prefit=True,
        predict_method="predict_proba",
        tol=wanted.max_gap or None,
    )
    optimizer.fit(probability.numpy()[:, None], target.numpy(), sensitive_features=group.numpy())
    found = optimizer.interpolated_thresholder_.interpolation_dict
    return {int(one): bunch for one, bunch in found.items()}


def _rule(found: Any) -> Rule:
    for operation in (found.operation0, found.operation1):
        if operation.operator != ">":
            raise ValueError(f"fairlearn gave a rule with {operation.operator!r}, which only its flip option should")
    # Infinite thresholds are not JSON, and probabilities lie in [0, 1].
    first, second = (float(np.clip(one.threshold, -1, 2)) for one in (found.operation0, found.operation1))
    return Rule(
        first, second, float(found.p0), float(found.get("prediction_constant", 0.0)), float(found.get("p_ignore", 0.0))
    )
