"""How differently a model treats groups."""

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_guard.evaluation.base import Bars, Evidence, Figure, Interval, spread
from lightning_guard.evaluation.subject import Subject, predicted
from lightning_guard.evaluation.table import bootstrap, chance_gap, gaps, rates, tabulate
from lightning_guard.functional import NOTIONS, Notion

_MOST_GROUPS = 50  # more are identifiers rather than groups

_LABELS: dict[Notion, tuple[str, str]] = {
    "demographic_parity": ("Demographic parity gap", "selection rates"),
    "equal_opportunity": ("Equal opportunity gap", "true positive rates"),
    "equalized_odds": ("Equalized odds gap", "true positive or false positive rates, whichever is larger"),
}


class Fairness:
    """Measures the rates of each group, the gaps between groups, and the accuracy of the worst group.

    All figures are functions of one table of counts by group, label and prediction. A gap is the largest
    minus the smallest rate. It equals fairlearn's ``demographic_parity_difference``,
    ``equal_opportunity_difference`` and ``equalized_odds_difference``, except where a rate has no example:
    fairlearn takes such a rate for 0, and here the gap is None. With more than two classes each is compared
    with the rest, and the worst counts.

    Gaps are biased upwards, the more so the smaller the groups: a note says what groups of these sizes with
    equal rates would show by chance.

    Args:
        min_support: groups with fewer examples of a class are named in a note.
        replicates: tables drawn for the 95% interval of each gap (multinomial bootstrap, percentiles).
        seed: of these draws.

    | case                                        | result                                           |
    |---------------------------------------------|--------------------------------------------------|
    | no group in the batches, a regression       | no figures, and a note                           |
    | group unknown (negative)                    | counts nowhere; a note says how many             |
    | fewer than two groups with examples         | gaps are None, and a note                        |
    | a group without examples of a class         | the gaps that need them are None, and a note     |
    | a gap that most drawn tables cannot give    | no interval                                      |
    | more than 50 groups                         | no figures, and a note                           |

    Raises:
        ValueError: if ``min_support`` or ``replicates`` is less than 1.

    Reference:
        Notions: Hardt, Price and Srebro, NeurIPS 2016, arXiv:1610.02413.

    Example:
        >>> import torch
        >>> x, group = torch.tensor([1.0, -1.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1])
        >>> subject = Subject(torch.nn.Identity(), [(x, torch.ones(4), group)])
        >>> Fairness().evaluate(subject).figures["fairness/demographic_parity"].value
        0.5
    """

    name: ClassVar[str] = "fairness"

    def __init__(self, min_support: int = 30, replicates: int = 2000, seed: int = 0):
        for option, value in (("min_support", min_support), ("replicates", replicates)):
            if value < 1:
                raise ValueError(f"{option}={value} is no number of examples or tables; give at least 1")
        self.min_support, self.replicates, self.seed = min_support, replicates, seed

    def evaluate(self, subject: Subject) -> Evidence:
        """Figures over all examples of known group, and bars over the groups."""
        logits, target, group, lacking = subject.outputs
        if group is None:
            return Evidence(notes=[f"No group rates: {lacking['group']}."])
        if subject.kind not in ("binary", "multiclass") or target is None:
            return Evidence(notes=[f"Group rates need classes. {subject.problem}".strip()])
        decision, known = predicted(logits), group >= 0
        if bool((decision < 0).any()):
            return Evidence(notes=["No group rates: some outputs are not numbers."])
        present, place = group[known].unique(return_inverse=True)
        if not 0 < len(present) <= _MOST_GROUPS:
            why = "no example has one" if not len(present) else f"{len(present)} of them look like identifiers"
            return Evidence(notes=[f"No group rates: of the groups, {why}; say where they are with Batch(group=...)."])
        classes = 2 if logits.dim() == 1 else logits.shape[1]
        table = tabulate(place, target[known], decision[known], len(present), classes)
        names = [subject.group_name(int(number)) for number in present]

        evidence = self._gaps(table)
        accuracy = table.diagonal(dim1=1, dim2=2).sum(1) / table.sum((1, 2))
        about = "The lowest accuracy of any group on the test examples."
        worst = Figure(float(accuracy.min()), "Accuracy of the worst group", "fraction", "higher", about)
        evidence.figures["fairness/worst_group_accuracy"] = worst
        evidence.bars = _bars(table, names)
        if unknown := int((~known).sum()):
            evidence.notes.append(f"{unknown} of {len(group)} examples are of unknown group and count in no rate.")
        if len(present) < 2:
            evidence.notes.append(f"There is nothing to compare: all examples are of {names[0]}.")
        elif few := list(_few(table, names, subject, self.min_support)):
            others = f", and {len(few) - 10} more" if len(few) > 10 else ""
            evidence.notes.append(
                f"Fewer than {self.min_support} examples of a class: {', '.join(few[:10])}{others}. These "
                "rates are uncertain; without any example, gaps that need the rate cannot be estimated."
            )
        return evidence

    def _gaps(self, table: Tensor) -> Evidence:
        n, draws = int(table.sum()), np.random.default_rng(self.seed)
        drawn = bootstrap(table, self.replicates, draws)
        within, chance, evidence = [], [], Evidence()
        for notion in NOTIONS:
            label, of = _LABELS[notion]
            value = float(gaps(table, notion)) if len(table) > 1 else float("nan")
            if value == value:  # a number
                by_chance = chance_gap(table, notion, self.replicates, draws)
                chance.append(f"{label.lower()} {by_chance:.1%}")
                interval = _percentiles(drawn[notion])
                if interval is not None:
                    evidence.intervals[f"fairness/{notion}"] = interval
                    within.append(f"{label.lower()} {spread(interval)}")
            classes = "" if table.shape[1] == 2 else ", each class against the rest, worst class"
            about = f"Largest minus smallest of the groups' {of}{classes}, on {n} test examples."
            figure = Figure(value if value == value else None, label, "fraction", "lower", about)
            evidence.figures[f"fairness/{notion}"] = figure
        if within:
            evidence.notes.append(f"95% intervals from {n} examples: {', '.join(within)}.")
        if chance:
            evidence.notes.append(f"Groups of these sizes with equal rates would show by chance: {', '.join(chance)}.")
        return evidence


def _percentiles(drawn: Tensor) -> Interval | None:
    found = drawn[~drawn.isnan()]
    if len(found) < 0.95 * len(drawn):  # the rest would be a choice of lucky draws
        return None
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=found.dtype)).tolist()
    return low, high


def _bars(table: Tensor, names: Sequence[str]) -> dict[str, Bars]:
    def bars(numerator: Tensor, denominator: Tensor, label: str, about: str) -> Bars:
        values = [float(a / b) if b else None for a, b in zip(numerator, denominator, strict=True)]
        return Bars(names, values, f"{label} by group", label, about, y_unit="fraction")

    right, everyone = table.diagonal(dim1=1, dim2=2).sum(1), table.sum((1, 2))
    found = {"fairness/accuracy": bars(right, everyone, "Accuracy", "Fraction that is right.")}
    if table.shape[1] == 2:
        (selected, _), (odds, of) = rates(table, "demographic_parity"), rates(table, "equalized_odds")
        found |= {
            "fairness/selection_rate": bars(
                selected[:, 0], everyone, "Selection rate", "Fraction predicted to be of class 1."
            ),
            "fairness/true_positive_rate": bars(
                odds[:, 0], of[:, 0], "True positive rate", "Fraction of class 1 that is predicted to be."
            ),
            "fairness/false_positive_rate": bars(
                odds[:, 1], of[:, 1], "False positive rate", "Fraction of class 0 predicted to be of class 1."
            ),
        }
    return found


def _few(table: Tensor, names: Sequence[str], subject: Subject, least: int) -> Iterator[str]:
    for name, counts in zip(names, table.sum(2), strict=True):
        for label, support in enumerate(counts.long().tolist()):
            if support < least:
                yield f"{name} has {support} of {subject.class_name(label)}"
