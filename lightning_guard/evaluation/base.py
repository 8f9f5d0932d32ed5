"""What evidence is made of."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from lightning_guard.evaluation.subject import Subject

Interval = tuple[float, float]


@dataclass(frozen=True)
class Figure:
    """One number.

    Args:
        value: the number; None where it cannot be estimated.
        label: its name as people read it.
        unit: ``fraction``, ``nats``, ``count``, ``bytes``, ``s``, ``ratio``, or a word to print.
        better: whether ``"higher"`` or ``"lower"`` values are better, None if neither.
        about: how it is measured, in a sentence or two.
    """

    value: float | None
    label: str
    unit: str
    better: Literal["higher", "lower"] | None
    about: str


@dataclass(frozen=True)
class Curve:
    """Numbers over numbers, equally many; a y of None cannot be estimated. Units as of a :class:`Figure`."""

    x: Sequence[float]
    y: Sequence[float | None]
    label: str
    x_label: str
    y_label: str
    about: str
    x_unit: str = ""
    y_unit: str = ""


@dataclass(frozen=True)
class Bars:
    """A number a category; None where it cannot be estimated. The unit as of a :class:`Figure`."""

    categories: Sequence[str]
    values: Sequence[float | None]
    label: str
    y_label: str
    about: str
    y_unit: str = ""


@dataclass(frozen=True)
class Picture:
    """A drawing that needs nothing but itself: a PNG in base64, and what it shows."""

    png: str
    label: str
    about: str


@dataclass
class Evidence:
    """What an evaluator found, by keys like ``task/accuracy``, in the order of display.

    The first figure of an axis leads.

    Args:
        figures: single numbers.
        curves: numbers over numbers.
        bars: a number a category.
        notes: sentences about this model that its numbers do not say: what could not be measured and why,
            what is uncertain, and what should not be believed.
        intervals: 95% intervals of some of the figures. They stand for the choice of test examples, and know
            nothing of the seeds of training.
        doubts: by figure, sentences that say why its value may flatter the model.
        pictures: drawings.
        tensors: what other models may be judged by, e.g. attacked inputs; no part of a report.

    Example:
        >>> one = Evidence({"task/accuracy": Figure(0.9, "Accuracy", "fraction", "higher", "On test data.")})
        >>> both = one | Evidence(notes=["There are no groups."])
        >>> list(both.figures), both.notes
        (['task/accuracy'], ['There are no groups.'])
    """

    figures: dict[str, Figure] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    bars: dict[str, Bars] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    intervals: dict[str, Interval] = field(default_factory=dict)
    doubts: dict[str, list[str]] = field(default_factory=dict)
    pictures: dict[str, Picture] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __or__(self, other: "Evidence") -> "Evidence":
        """The evidence of both."""
        return Evidence(
            self.figures | other.figures,
            self.curves | other.curves,
            self.bars | other.bars,
            self.notes + other.notes,
            self.intervals | other.intervals,
            self.doubts | other.doubts,
            self.pictures | other.pictures,
            self.tensors | other.tensors,
        )


class Evaluator(Protocol):
    """Judges a finished model on one axis, whichever guards it was trained with.

    It leaves no trace: modes, hooks, gradients, buffers and the global generators are as they were, after an
    exception too. Data that lacks what it would need is no error but a note. Options are kept under their names.
    """

    name: ClassVar[str]
    """The axis, and the first part of its keys."""

    def evaluate(self, subject: Subject) -> Evidence:
        """What there is to say about this model."""
        ...


def wilson(successes: int, trials: int) -> Interval:
    """95% interval of a proportion (Wilson, 1927), never outside [0, 1]; all of it if there were no trials.

    Example:
        >>> low, high = wilson(0, 10)
        >>> round(low, 3), round(high, 3)
        (0.0, 0.278)
    """
    if not trials:
        return 0.0, 1.0
    z, p = 1.959963984540054, successes / trials
    middle = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    reach = z / (1 + z * z / trials) * sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return max(0.0, min(p, middle - reach)), min(1.0, max(p, middle + reach))  # p, against rounding


def spread(interval: Interval) -> str:
    """An interval of fractions as people read it.

    Example:
        >>> spread((0.6012, 0.6587))
        '60.1% to 65.9%'
    """
    return f"{interval[0]:.1%} to {interval[1]:.1%}"
