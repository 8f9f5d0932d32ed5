"""How differently a model treats groups."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_guard.evaluation.base import Bars, Evidence, Figure
from lightning_guard.evaluation.chance import chance_gaps, corrected_gap
from lightning_guard.evaluation.families import Family, some
from lightning_guard.evaluation.group_regression import regression_evidence
from lightning_guard.evaluation.group_scores import score_evidence
from lightning_guard.evaluation.subject import Subject, predicted
from lightning_guard.evaluation.table import TABLE_NOTIONS, Panel, TableNotion, percentiles, rates

_MOST_GROUPS = 50  # more are identifiers rather than groups
_MOST_ATTRIBUTES = 10
_MOST_LABELS = 50

_LABELS: dict[TableNotion, tuple[str, str]] = {
    "demographic_parity": ("Demographic parity gap", "selection rates"),
    "equal_opportunity": ("Equal opportunity gap", "true positive rates"),
    "predictive_equality": ("Predictive equality gap", "false positive rates"),
    "equalized_odds": ("Equalized odds gap", "true positive or false positive rates, whichever is larger"),
    "accuracy_parity": ("Accuracy parity gap", "accuracies, or of their error rates"),
}


class Fairness:
    """Measures the rates of each group, the gaps between groups, and how well the worst group is served.

    A gap is the largest minus the smallest rate. With ``min_support=1`` it equals fairlearn's
    ``MetricFrame.difference()`` and its ``demographic_parity_difference``, ``equal_opportunity_difference`` and
    ``equalized_odds_difference`` wherever every rate has an example; where one has none, fairlearn takes it for 0. With
    more than two classes each is compared with the rest, and the worst counts; accuracy is of all classes. With
    several labels or attributes the worst counts. Groups of an attribute are compared with each other only.

    Intervals are of the choice of test examples. Rates depend on the examples through a table of counts alone, so
    tables are drawn (multinomial bootstrap, percentiles). Losses, means and AUC are drawn from the normal distribution
    that their influence functions give.

    Gaps are biased upwards, the more so the smaller the groups: a note says what equal groups of these sizes would
    show by chance, and the gap without most of that bias. Percentile intervals, like fairlearn's, inherit it: with many
    small groups they lie too high, and never reach 0.

    Args:
        min_support: a rate of fewer examples is not judged: the group takes no part in what needs this rate, and a
            note and a doubt name it. 1 judges every rate that has an example.
        replicates: samples drawn for the 95% intervals.
        seed: of these draws.
        intersections: with several attributes, judge their crossed groups as one more family.
        bins: equally wide bins of the calibration error.

    | case                                          | result                                                    |
    |-----------------------------------------------|-----------------------------------------------------------|
    | two classes, one or two logits                | all figures, bars; curves for up to 4 groups              |
    | more classes                                  | each against the rest; bars of accuracy and calibration   |
    | several labels ``(N, L)`` of 0 and 1          | each label by itself, the worst counts                    |
    | a regression                                  | gaps of means and of quantiles, error of the worst group  |
    | group ``(N, A)``                              | a family an attribute, the worst counts, bars for each    |
    | no group in the batches, no classes           | no figures, and a note                                    |
    | group unknown (negative)                      | counts nowhere; a note says how many                      |
    | fewer than two judged groups for some rate    | the gaps that need it are None, and a note                |
    | a gap that most drawn tables cannot give      | no interval                                               |
    | more than 50 groups or 10 attributes          | no figures of these, and a note                           |

    Raises:
        ValueError: if ``min_support``, ``replicates`` or ``bins`` is less than 1.

    Reference:
        Notions: Hardt, Price and Srebro, NeurIPS 2016, arXiv:1610.02413. Quantile parity: Agarwal, Dudik and Wu, Fair
        Regression, ICML 2019, arXiv:1905.12843.

    Example:
        >>> import torch
        >>> x, group = torch.tensor([1.0, -1.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1])
        >>> subject = Subject(torch.nn.Identity(), [(x, torch.ones(4), group)])
        >>> Fairness(min_support=1).evaluate(subject).figures["fairness/demographic_parity"].value
        0.5
    """

    name: ClassVar[str] = "fairness"

    def __init__(
        self,
        min_support: int = 30,
        replicates: int = 10_000,
        seed: int = 0,
        intersections: bool = False,
        bins: int = 15,
    ):
        for option, value in (("min_support", min_support), ("replicates", replicates), ("bins", bins)):
            if value < 1:
                raise ValueError(f"{option}={value} is no number of examples, samples or bins; give at least 1")
        self.min_support, self.replicates, self.seed = min_support, replicates, seed
        self.intersections, self.bins = intersections, bins

    def evaluate(self, subject: Subject) -> Evidence:
        """Figures over all examples of known group, and bars over the groups."""
        logits, target, group, lacking = subject.outputs
        if group is None:
            return Evidence(notes=[f"No group rates: {lacking['group']}."])
        several = subject.kind == "unknown" and subject.multilabel
        if target is None or (subject.kind == "unknown" and not several):
            return Evidence(notes=[f"Group rates need classes or numbers. {subject.problem}"])
        if bool(logits.isnan().any()):
            return Evidence(notes=["No group rates: some outputs are not numbers."])
        attributes = 1 if group.dim() == 1 else group.shape[1]
        if attributes > _MOST_ATTRIBUTES:
            return Evidence(notes=[f"No group rates: {attributes} columns of the group are more than attributes."])
        evidence, kin = self._kin(subject)
        if not kin:
            return evidence
        names = [family.names if len(kin) == 1 else [f"{family.name}: {n}" for n in family.names] for family in kin]
        draws = np.random.default_rng(self.seed)
        if subject.kind == "regression":
            found = regression_evidence(kin, names, logits, target, self.min_support, self.replicates, draws)
            return found | evidence | Evidence(notes=_small(kin, names, self.min_support))
        if several and logits.shape[1] > _MOST_LABELS:
            return Evidence(notes=[f"No group rates: {logits.shape[1]} labels are more than {_MOST_LABELS}."])
        decision = (logits > 0).long() if several else predicted(logits)
        classes = 2 if several or logits.dim() == 1 else logits.shape[1]
        panel = Panel(kin, target, decision, self.min_support, classes)
        rated = self._gaps(panel, kin, int((_rows(kin) >= 0).any(1).sum()))
        rated.bars = _bars(panel, kin, names, several)
        scored = score_evidence(
            kin, names, logits, target, several, self.min_support, self.bins, self.replicates, draws
        )
        found = rated | scored | evidence | self._support(panel, names, subject, several)
        own = {family.name for family in subject.families()}  # who compares arms crosses them again
        found.tensors = _tensors([one for one in kin if one.name in own], target, decision, classes)
        return found

    def _kin(self, subject: Subject) -> tuple[Evidence, list[Family]]:
        """The families that can be judged, and what is to be said of the others."""
        evidence, kin = Evidence(), []
        every = subject.families(self.intersections)
        for family in every:
            unknown, size = int((family.group < 0).sum()), len(family.names)
            of = "" if len(every) == 1 else f" of {family.name}"
            if not 0 < size <= _MOST_GROUPS:
                why = "no example has one" if not size else f"{size} of them look like identifiers"
                what = f"of the groups{of}, {why}; say where they are with Batch(group=...)."
                evidence.notes.append(f"No group rates: {what}")
                continue
            kin.append(family)
            if unknown:
                count = f"{unknown} of {len(family.group)} examples are of unknown "
                evidence.notes.append(f"{count}{family.name if of else 'group'} and count in no rate.")
            if size == 1:
                evidence.notes.append(f"There is nothing to compare: all examples are of {family.names[0]}.")
        return evidence, kin

    def _gaps(self, panel: Panel, kin: Sequence[Family], n: int) -> Evidence:
        values, drawn = panel.values(), panel.bootstrap(self.replicates, np.random.default_rng(self.seed))
        evidence, chance, corrected = Evidence(), [], []

        def add(key: str, label: str, better: Literal["higher", "lower"], about: str) -> bool:
            known = values[key] == values[key]
            evidence.figures[f"fairness/{key}"] = Figure(
                values[key] if known else None, label, "fraction", better, about
            )
            interval = percentiles(drawn[key]) if known else None
            if interval is not None:
                evidence.intervals[f"fairness/{key}"] = interval
            return known

        for notion in TABLE_NOTIONS:
            label, of = _LABELS[notion]
            rest = "" if panel.classes == 2 or notion == "accuracy_parity" else ", each class against the rest"
            rest += ", the worst class" if rest else ""
            rest += ", the worst label" if panel.labels > 1 else ""
            rest += ", the worst attribute" if len(kin) > 1 else ""
            known = add(notion, label, "lower", f"Largest minus smallest of the groups' {of}{rest}, on {n} examples.")
            worst = panel.worst(notion)
            if known and worst is not None:
                found, counted = panel.sums[worst[0]], panel.counted[worst[0]][notion]
                shown = chance_gaps(found, notion, np.random.default_rng(self.seed), counted)
                chance.append(f"{label.lower()} {shown.mean():.1%} (19 times in 20 up to {shown.quantile(0.95):.1%})")
                corrected.append(f"{label.lower()} {corrected_gap(found, notion, self.seed, counted):.1%}")
        add("worst_group_accuracy", "Accuracy of the worst group", "higher", "The lowest accuracy of any group.")
        if chance:
            evidence.notes.append(
                f"Groups of these sizes with equal rates would show by chance: {', '.join(chance)}. Corrected for what "
                f"chance adds to gaps: {', '.join(corrected)}."
            )
        if panel.affordable(self.replicates) < self.replicates:
            evidence.notes.append(f"Intervals are of {panel.affordable(self.replicates)} samples, for the time's sake.")
        return evidence

    def _support(self, panel: Panel, names: Sequence[Sequence[str]], subject: Subject, several: bool) -> Evidence:
        """What is too small to be judged: a note, and a doubt on every figure that leaves it out."""
        evidence, few = Evidence(), []
        out: dict[str, list[str]] = {}
        for number, sheet in enumerate(panel.sheets):
            own, found = names[sheet.family], panel.sums[number]
            label = f" of {subject.class_name(sheet.label)}" if several else ""
            for notion in TABLE_NOTIONS:
                missing = [own[g] for g in (~panel.counted[number][notion]).any(1).nonzero()[:, 0].tolist()]
                if missing:
                    out.setdefault(f"fairness/{notion}", []).extend(f"{name}{label}" for name in missing)
            for group, counts in enumerate(found.actual.long().tolist()):
                if sum(counts) < self.min_support:
                    few += [f"{own[group]} has {sum(counts)}"] * (sheet.label == 0)
                    continue
                for actual, count in enumerate(counts):
                    if count < self.min_support:
                        kind = f"{subject.class_name(actual)}" if not several else f"value {actual}{label}"
                        few.append(f"{own[group]} has {count} of {kind}")
        if few:
            evidence.notes.append(
                f"Fewer than {self.min_support} examples: {some(few)}. Rates of so few are not judged and take no "
                "part in gaps; a gap that leaves fewer than two groups for a rate cannot be estimated."
            )
        values = panel.values()
        for key, missing in out.items():
            if values[key.split("/")[1]] == values[key.split("/")[1]]:
                evidence.doubts[key] = [f"Too few examples to be judged, so not in it: {some(missing)}."]
        small = out.get("fairness/accuracy_parity")
        if small and values["worst_group_accuracy"] == values["worst_group_accuracy"]:
            for key in ("worst_group_accuracy", "worst_group_loss", "calibration"):
                evidence.doubts[f"fairness/{key}"] = [f"Too few examples to be judged, so not in it: {some(small)}."]
        return evidence


def _rows(kin: Sequence[Family]) -> Tensor:
    return torch.stack([family.group for family in kin], 1)


def _small(kin: Sequence[Family], names: Sequence[Sequence[str]], least: int) -> list[str]:
    few = [
        f"{name} has {count}"
        for family, own in zip(kin, names, strict=True)
        for name, count in zip(own, torch.bincount(family.group[family.group >= 0]).tolist(), strict=True)
        if count < least
    ]
    return [f"Fewer than {least} examples, so not judged: {some(few)}."] if few else []


def _bars(panel: Panel, kin: Sequence[Family], names: Sequence[Sequence[str]], several: bool) -> dict[str, Bars]:
    everyone = [name for own in names for name in own]

    def bars(notion: TableNotion, label: str, about: str) -> Bars:
        parts = [[side[:, 0] for side in rates(found, notion)] for found in panel.sums]
        values = [float(a / b) if b else None for part in parts for a, b in zip(*part, strict=True)]
        return Bars(everyone, values, f"{label} by group", label, about, y_unit="fraction")

    found = {}
    if not several:
        found["fairness/accuracy"] = bars("accuracy_parity", "Accuracy", "Fraction that is right.")
        if panel.classes == 2:
            about = "Fraction predicted to be of class 1."
            found["fairness/selection_rate"] = bars("demographic_parity", "Selection rate", about)
            about = "Fraction of class 1 that is predicted to be."
            found["fairness/true_positive_rate"] = bars("equal_opportunity", "True positive rate", about)
            about = "Fraction of class 0 predicted to be of class 1."
            found["fairness/false_positive_rate"] = bars("predictive_equality", "False positive rate", about)
    if len(kin) > 1:
        across: tuple[TableNotion, ...] = ("demographic_parity", "equalized_odds")
        for notion in across:
            label, worst = _LABELS[notion][0], [panel.worst(notion, number) for number in range(len(kin))]
            heights = [one[1] if one else None for one in worst]
            about = "The gap between the groups of each attribute."
            found[f"fairness/{notion}_by_attribute"] = Bars(
                [family.name for family in kin], heights, f"{label} by attribute", label, about, "fraction"
            )
    return found


def _tensors(kin: Sequence[Family], target: Tensor, decision: Tensor, classes: int) -> dict[str, Tensor]:
    """What another arm is compared by, see :func:`paired_change`; unknown groups are -1."""
    small = torch.int8 if classes <= 128 else torch.int16 if classes <= 2**15 else torch.int32
    group = _rows(kin).to(torch.int16)
    return {
        "fairness/group": group[:, 0] if group.shape[1] == 1 else group,
        "fairness/target": target.to(small),
        "fairness/decision": decision.to(small),
    }
