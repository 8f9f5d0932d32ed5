"""What a finished model tells about whom it was trained on, and what its training claims of that."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lightning_guard.evaluation.base import Bars, Curve, Evidence, Figure
from lightning_guard.evaluation.families import some
from lightning_guard.evaluation.rows import row_marks
from lightning_guard.evaluation.subject import Subject
from lightning_guard.functional.membership import (
    Vector,
    area,
    by_class,
    confidence_scores,
    rate_at,
    roc,
)
from lightning_guard.functional.privacy import largest_rate
from lightning_guard.functional.statistics import clopper_pearson

LIMITS = {"at_1": (0.01, "1%"), "at_01": (0.001, "0.1%")}
"""False-positive rates at which the attacker's success is told."""

Kept = tuple[NDArray[np.bool_], NDArray[np.bool_]]

GRID = np.logspace(-3, 0, 31)
"""Rates of false alarms at which curves are drawn."""


class Privacy:
    """Attacks the model as one who asks who was in its training data, and sets what is found beside what is claimed.

    Two attacks that need nothing but the model (Yeom et al., 2018): a threshold on the loss, and the same for each
    class by itself. Their non-members are the examples of ``loader``, their members those of ``Subject(train=...)``.
    The stronger offline LiRA needs further models that were not trained on the same rows:
    ``lightning-guard compare --lira 8`` trains them.

    An attack that fails proves nothing. One that succeeds beyond what a claim of (epsilon, delta) allows refutes it,
    or shows that the two sets of examples differ in more than membership.

    Args:
        min_support: groups and classes of fewer members or non-members have no figure.

    | case                                        | result                                                   |
    |---------------------------------------------|----------------------------------------------------------|
    | the training examples are not known         | what is claimed and audited alone, and a note            |
    | examples that occur more than once          | left out of both, and a note: a copy may be in and out   |
    | fewer than 1000 non-members                 | nothing at 0.1%, and a note                              |
    | a regression                                | the loss is the squared error; no attack by class        |
    | no claim of privacy                         | ``privacy/epsilon`` is None, and no curve of what is allowed |

    Raises:
        ValueError: if ``min_support`` is less than 2.

    Reference:
        Yeom et al., Privacy Risk in Machine Learning, 2018, arXiv:1709.01604.
        Carlini et al., Membership Inference Attacks From First Principles, 2022, arXiv:2112.03570.

    Example:
        >>> import torch
        >>> x = torch.tensor([[3.0], [-4.0], [1.0], [-1.0]])
        >>> member, other = ([(x[i : i + 2], torch.tensor([1, 0]))] for i in (0, 2))
        >>> Privacy().evaluate(Subject(torch.nn.Identity(), other, train=member)).figures["privacy/loss_auc"].value
        1.0
    """

    name: ClassVar[str] = "privacy"

    def __init__(self, min_support: int = 30):
        if min_support < 2:
            raise ValueError(f"min_support={min_support} is no number to estimate from; give at least 2")
        self.min_support = min_support

    def evaluate(self, subject: Subject) -> Evidence:
        """Figures of the attacks, then of the claim and the audit."""
        found = self._attacks(subject)
        return found | _claimed(subject.privacy)

    def _attacks(self, subject: Subject) -> Evidence:
        _ = subject.outputs  # an empty loader is a mistake, known training examples or not
        trained = subject.trained
        if isinstance(subject.train, str) or trained is None:
            return Evidence(notes=[_sentence(f"no membership attack was made: {subject.train}")])
        for one in (trained, subject):
            if one.outputs.target is None or one.kind == "unknown":
                return Evidence(notes=[_sentence(f"no membership attack was made: {one.problem}")])
        alone, evidence = _once(trained, subject)
        scores = [scores_of(one)[kept] for one, kept in zip((trained, subject), alone, strict=True)]
        members, others = scores
        broken = sum(int((~np.isfinite(part)).sum()) for part in scores)
        if broken or min(len(members), len(others)) < 2:
            reason = f"{broken} outputs are not numbers" if broken else "fewer than two examples of a kind are left"
            evidence.notes.append(_sentence(f"no membership attack was made: {reason}"))
            return evidence
        attacks = {"loss": (members, others)}
        classes = [one.outputs.target for one in (trained, subject)]
        if subject.kind in ("binary", "multiclass") and all(c is not None and c.dim() == 1 for c in classes):
            known = [np.asarray(c, dtype=np.int64)[kept] for c, kept in zip(classes, alone, strict=True)]
            both = by_class(members, known[0], others, known[1])
            attacks = {"class": (both[0], both[1]), **attacks}
        for key, (mine, theirs) in attacks.items():
            evidence |= attack_evidence(key, mine, theirs)
        lead = next(iter(attacks))
        grid = [float(x) for x in GRID if x * len(others) >= 1]
        about = f"Of {len(members)} trained and {len(others)} held-out examples, by the attack {NAMES[lead]}."
        rates = roc(*attacks[lead], np.array(grid))
        evidence.curves["privacy/roc"] = Curve(
            grid, [float(y) for y in rates], "Members found at each rate of false alarms", "False alarms",
            "Members found", about, x_unit="fraction", y_unit="fraction",
        )  # fmt: skip
        if claims := subject.privacy.get("claims"):
            allowed = [largest_rate(claims, x) for x in grid]
            evidence.curves["privacy/allowed"] = Curve(
                grid, allowed, "The most that the claim allows any attacker", "False alarms", "Members found",
                "From epsilon at several deltas, for an attacker who knows all other examples.",
                x_unit="fraction", y_unit="fraction",
            )  # fmt: skip
            evidence.notes += beyond(attacks, [claims])
        evidence |= self._parts(trained, subject, attacks[lead], alone, lead)
        return evidence

    def _parts(
        self, trained: Subject, subject: Subject, scores: tuple[Vector, Vector], alone: Kept, lead: str
    ) -> Evidence:
        """The same attack on each group and class: a mean hides who is told apart most easily."""
        parts: list[tuple[str, str, list[tuple[str, Any, Any]]]] = []
        kin = list(zip(trained.families(), subject.families(), strict=False))
        for number, (inside, outside) in enumerate(kin):
            suffix = f"_{number}" if len(kin) > 1 else ""
            label = f"Attack on {outside.name}" if len(kin) > 1 else "Attack by group"
            shared = [
                (i, name, inside.names.index(name)) for i, name in enumerate(outside.names) if name in inside.names
            ]
            rows = [(name, inside.group == j, outside.group == i) for i, name, j in shared]
            parts.append((f"auc_by_group{suffix}", label, rows))
        if subject.kind in ("binary", "multiclass"):
            own, other = trained.outputs.target, subject.outputs.target
            assert own is not None
            assert other is not None
            if own.dim() == 1:
                labels = sorted({*own.unique().tolist(), *other.unique().tolist()})[:50]
                rows = [(subject.class_name(int(c)), own == c, other == c) for c in labels]
                parts.append(("auc_by_class", "Attack by class", rows))
        evidence = Evidence()
        for key, label, rows in parts:
            names, values, small = [], [], []
            for name, here, there in rows:
                mine, theirs = scores[0][np.asarray(here)[alone[0]]], scores[1][np.asarray(there)[alone[1]]]
                enough = min(len(mine), len(theirs)) >= self.min_support
                names.append(name)
                values.append(area(mine, theirs)[0] if enough else None)
                small += [] if enough else [name]
            if names:
                about = f"How often a trained example of it outscores a held-out one, by the attack {NAMES[lead]}."
                evidence.bars[f"privacy/{key}"] = Bars(names, values, label, "AUC", about, y_unit="ratio")
            if small:
                evidence.notes.append(
                    f"{label}: {some(small)} have fewer than {self.min_support} members or non-members and no figure."
                )
        return evidence


NAMES = {"loss": "by loss alone", "class": "by loss within the class", "lira": "by offline LiRA"}
_SHORT = {"loss": ", by loss alone", "class": "", "lira": ", by LiRA"}


def attack_evidence(key: str, members: Vector, others: Vector, models: int = 1) -> Evidence:
    """AUC and success at few false alarms of one attack, with intervals.

    Args:
        key: of the attack, in :data:`NAMES`.
        members: its scores of trained examples.
        others: of held-out ones.
        models: whose scores these are together; intervals are then as of one of them, since rows come again.
    """
    evidence = Evidence()
    name, figure = NAMES[key], f"privacy/{key}_auc"
    value, interval = area(members, others)
    if models > 1:
        low, high = ((end - value) * models**0.5 + value for end in interval)
        interval = max(0.0, low), min(1.0, high)
    about = (
        f"How often the attack {name} scores one of {len(members)} trained examples above one of {len(others)} "
        "held-out ones; a blind guess has 0.5."
    )
    evidence.figures[figure] = Figure(value, f"Membership attack{_SHORT[key]}, AUC", "ratio", "lower", about)
    evidence.intervals[figure] = interval
    for end, (limit, said) in LIMITS.items():
        figure, label = f"privacy/{key}_{end}", f"Members found at {said} false alarms{_SHORT[key]}"
        if len(others) * limit < 1:
            about = f"Not told from {len(others)} held-out examples, of which {said} is less than one."
            evidence.figures[figure] = Figure(None, label, "fraction", "lower", about)
            continue
        found = rate_at(members, others, limit)
        most = int(limit * len(others) / models)
        low, high = clopper_pearson(most, found.others // models)  # the same for every arm, as this sentence must be
        about = (
            f"By the attack {name}, of {found.members} trained examples, where {said} of {found.others} held-out ones "
            f"are taken for trained; that rate itself is known to {low:.2%} to {high:.2%}. A blind guess finds {said}."
        )
        evidence.figures[figure] = Figure(found.hits / found.members, label, "fraction", "lower", about)
        evidence.intervals[figure] = clopper_pearson(round(found.hits / models), found.members // models)
    return evidence


def _once(trained: Subject, subject: Subject) -> tuple[Kept, Evidence]:
    """Which examples of both occur once in all, and a note of the others.

    Of both, for what occurs often is learnt more easily: to leave out held-out copies alone would make members of all
    that is usual.
    """
    here, there = row_marks(trained), row_marks(subject)
    if here is None or there is None:
        everybody = (np.ones(len(one.outputs.logits), bool) for one in (trained, subject))
        return (next(everybody), next(everybody)), Evidence()
    _, places, counts = np.unique(np.concatenate([here, there]), return_inverse=True, return_counts=True)
    inside, outside = np.split(counts[places] == 1, [len(here)])
    if inside.all() and outside.all():
        return (inside, outside), Evidence()
    return (inside, outside), Evidence(
        notes=[
            f"{int((~inside).sum())} of {len(inside)} trained and {int((~outside).sum())} of {len(outside)} held-out "
            "examples occur more than once and are left out of the attack: a copy may be in and out."
        ]
    )


def scores_of(subject: Subject) -> Vector:
    """How well the model knows each example, ``(N,)``, higher for less loss."""
    logits, target = subject.outputs.logits, subject.outputs.target
    assert target is not None
    if subject.kind == "regression":
        wrong = (logits.double() - target.double()).square().reshape(len(logits), -1).mean(1)
        return np.asarray(-wrong, dtype=np.float64)
    return np.asarray(confidence_scores(logits, target), dtype=np.float64)


def _claimed(told: dict[str, Any]) -> Evidence:
    evidence = Evidence()
    claims = told.get("claims")
    if claims:
        epsilon, delta = claims[0]
        about = (
            f"Claimed by the training at the delta below, adding or removing one {told.get('unit', 'example')}. It "
            "holds for the weights of this run alone: further seeds, arms and choices among them spend more."
        )
        value = epsilon if np.isfinite(epsilon) else None
        evidence.figures["privacy/epsilon"] = Figure(value, "Epsilon", "", "lower", about)
        if value is None:
            evidence.notes.append("Epsilon is infinite: the training claims nothing.")
        told_of = Figure(delta, "Delta", "", "lower", "The probability that epsilon does not hold.")
        evidence.figures["privacy/delta"] = told_of
        about = (
            "What epsilon at several deltas leaves any attacker who knows all other examples; a blind guess finds 1%."
        )
        label = "Members that the claim lets be found at 1% false alarms"
        evidence.figures["privacy/allowed_at_1"] = Figure(largest_rate(claims, 0.01), label, "fraction", "lower", about)
    if "lower_bound" in told:
        about = (
            f"Shown by canaries at delta = {told['audit_delta']:g} with {told['confidence']:.0%} confidence; had every "
            f"guess been right it would be {told['ceiling']:.2f}. A low bound proves no privacy."
        )
        label = "Epsilon is at least, by audit"
        evidence.figures["privacy/epsilon_lower_bound"] = Figure(told["lower_bound"], label, "", "lower", about)
        about = "The most that this number of canaries can show."
        evidence.figures["privacy/audit_ceiling"] = Figure(told["ceiling"], "Ceiling of the audit", "", None, about)
    return evidence


def beyond(attacks: dict[str, tuple[Vector, Vector]], claims: Sequence[Any], models: int = 1) -> list[str]:
    """A sentence where an attack surely finds more than is allowed: both rates at once, corrected for all looks.

    Args:
        attacks: scores of trained and of held-out examples, by the key of the attack.
        claims: pairs of epsilon and delta of each model.
        models: whose scores these are together; what is sure is then as of one of them.
    """
    miss = 0.05 / (2 * len(GRID) * len(attacks))
    for key, (members, others) in attacks.items():
        for limit in GRID[:-1]:
            found = rate_at(members, others, float(limit))
            sure = clopper_pearson(found.hits // models, found.members // models, 1 - 2 * miss)[0]
            alarms = clopper_pearson(-(-found.alarms // models), found.others // models, 1 - 2 * miss)[1]
            most = max(largest_rate(pairs, alarms) for pairs in claims)
            if sure > most:
                why = (
                    "The claim is wrong: members and non-members were drawn alike."
                    if models > 1
                    else "Either the claim is wrong, or training and test examples differ otherwise: see whether they "
                    "have drifted apart."
                )
                return [
                    f"The attack {NAMES[key]} finds more members than the claim of epsilon = {claims[0][0][0]:.3g} "
                    f"allows: {found.hits} of {found.members} at {found.alarms} false alarms among {found.others}, "
                    f"where {most:.1%} is the most. {why}"
                ]
    return []


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:].rstrip('.')}."
