"""Which predictions a change of the model turned over."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_guard.evaluation.base import Bars, Evidence, Figure, wilson
from lightning_guard.evaluation.families import Family
from lightning_guard.evaluation.subject import predicted


@dataclass(frozen=True)
class Flips:
    """Shares of examples that two models predict differently; None where there is no example.

    Args:
        share: of all examples.
        harmed: of all examples, right before and wrong after; None without targets.
        mended: of all examples, wrong before and right after; None without targets.
        by_class: of the examples of each class.
        by_group: of the examples of each group.
        examples: how many there are.
    """

    share: float | None
    harmed: float | None
    mended: float | None
    by_class: dict[int, float]
    by_group: dict[int, float]
    examples: int


def flips(reference: Tensor, logits: Tensor, target: Tensor | None = None, group: Tensor | None = None) -> Flips:
    """How often another model predicts another class, overall and where it hurts.

    Accuracy can stay as it is while predictions change, and they change most for classes and groups with few examples.

    Args:
        reference: logits of the model before, ``(N,)`` or ``(N, C)``.
        logits: logits of the model after, of the same shape.
        target: classes ``(N,)``.
        group: whole numbers ``(N,)``; negative is unknown and counts in no group.

    Raises:
        ValueError: if the two are not of the same examples and classes.

    | case                              | result                                         |
    |-----------------------------------|------------------------------------------------|
    | no examples                       | every share is None                            |
    | a logit that is no number         | a prediction of its own, equal only to another |
    | no target                         | ``harmed`` and ``mended`` None, no classes     |

    Reference:
        Hooker et al., Characterising Bias in Compressed Models, 2020, arXiv:2010.03058.

    Example:
        >>> import torch
        >>> before, after = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([[2.0, 0.0], [3.0, 2.0]])
        >>> found = flips(before, after, torch.tensor([0, 1]), torch.tensor([7, 8]))
        >>> found.share, found.harmed, found.by_group
        (0.5, 0.5, {7: 0.0, 8: 1.0})
    """
    if reference.shape != logits.shape:
        raise ValueError(
            f"logits of shapes {tuple(reference.shape)} and {tuple(logits.shape)} are not of the same examples and "
            "classes; judge both models on one loader that does not shuffle"
        )
    return turned(predicted(reference), predicted(logits), target, group)


def turned(before: Tensor, after: Tensor, target: Tensor | None = None, group: Tensor | None = None) -> Flips:
    """The same from predicted classes, each ``(N,)``."""
    turned = before != after
    harmed = mended = None
    if target is not None and len(turned):
        harmed = float((turned & (before == target)).double().mean())
        mended = float((turned & (after == target)).double().mean())
    share = float(turned.double().mean()) if len(turned) else None
    return Flips(share, harmed, mended, _by(turned, target), _by(turned, group), len(turned))


def _by(turned: Tensor, label: Tensor | None) -> dict[int, float]:
    if label is None:
        return {}
    return {int(one): float(turned[label == one].double().mean()) for one in label.unique() if one >= 0}


def flip_evidence(
    reference: Tensor,
    logits: Tensor,
    target: Tensor | None = None,
    kin: Sequence[Family] = (),
    class_names: Sequence[str] = (),
) -> Evidence:
    """The evidence of :func:`flips`: figures with intervals, and bars by class and by group."""
    return turned_evidence(predicted(reference), predicted(logits), target, kin, class_names)


def turned_evidence(
    before: Tensor,
    after: Tensor,
    target: Tensor | None = None,
    kin: Sequence[Family] = (),
    class_names: Sequence[str] = (),
    than: str = "the reference",
) -> Evidence:
    """The same from predicted classes, each ``(N,)``; ``than`` is what the model is told apart from."""
    found = turned(before, after, target)
    said = f"On {found.examples} test examples, against {than}."
    figures = {
        "flips": ("Predictions that flipped", found.share, f"Another class than {than} predicts. {said}"),
        "harmed": ("Right before, wrong now", found.harmed, said),
        "mended": ("Wrong before, right now", found.mended, said),
    }
    evidence = Evidence()
    for key, (label, value, about) in figures.items():
        better = "higher" if key == "mended" else "lower"
        evidence.figures[f"efficiency/{key}"] = Figure(value, label, "fraction", better, about)  # type: ignore[arg-type]
        if value is not None:
            count = round(value * found.examples)
            evidence.intervals[f"efficiency/{key}"] = wilson(count, found.examples)
    if found.by_class:
        names = [class_names[one] if one < len(class_names) else f"class {one}" for one in found.by_class]
        evidence.bars["efficiency/flips_by_class"] = Bars(
            names, list(found.by_class.values()), "Flips by class", "Flipped", said, y_unit="fraction"
        )
    for number, family in enumerate(kin):
        shares = turned(before, after, None, family.group).by_group
        key = "efficiency/flips_by_group" + (f"_{number}" if len(kin) > 1 else "")
        label = f"Flips by {family.name}" if len(kin) > 1 else "Flips by group"
        evidence.bars[key] = Bars(
            [family.names[one] for one in shares], list(shares.values()), label, "Flipped", said, y_unit="fraction"
        )
    return evidence
