"""Group rates and their uncertainty, from counts by group, label and prediction."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from lightning_guard.evaluation.base import Interval
from lightning_guard.evaluation.families import Family, families

TableNotion = Literal[
    "demographic_parity", "equal_opportunity", "predictive_equality", "equalized_odds", "accuracy_parity"
]
TABLE_NOTIONS: tuple[TableNotion, ...] = get_args(TableNotion)
"""The notions that compare rates of hard predictions."""

_AT_ONCE = 4_000_000  # numbers that are in memory at the same time
_WORK = 500_000_000  # cells that are counted in a few seconds
_Key = TypeVar("_Key")


class Sums(NamedTuple):
    """What group rates are made of: counts ``(..., G, C)`` by group and class, each class against the rest.

    Args:
        hits: examples of the class that are predicted to be.
        selected: examples predicted to be of the class.
        actual: examples of the class.
    """

    hits: Tensor
    selected: Tensor
    actual: Tensor


def tabulate(group: Tensor, target: Tensor, decision: Tensor, groups: int, classes: int) -> Tensor:
    """Counts of examples ``(G, C, C)`` by group, label and prediction, in float64.

    Args:
        group: ``(N,)`` in [0, ``groups``).
        target: ``(N,)`` in [0, ``classes``).
        decision: ``(N,)`` in [0, ``classes``).
        groups: number of groups.
        classes: number of classes.

    Example:
        >>> tabulate(torch.tensor([0, 0]), torch.tensor([1, 0]), torch.tensor([1, 1]), 1, 2).tolist()
        [[[0.0, 1.0], [0.0, 1.0]]]
    """
    cell = (group * classes + target.long()) * classes + decision.long()
    return torch.bincount(cell, minlength=groups * classes**2).double().reshape(groups, classes, classes)


def sums(table: Tensor) -> Sums:
    """The sums of tables ``(..., G, C, C)``."""
    return Sums(table.diagonal(dim1=-2, dim2=-1), table.sum(-2), table.sum(-1))


def rates(found: Sums | Tensor, notion: TableNotion) -> tuple[Tensor, Tensor]:
    """Numerators and denominators of the rates that a notion compares, from sums, or from tables ``(..., G, C, C)``.

    | notion                | rate                                                    | ``R``         |
    |-----------------------|---------------------------------------------------------|---------------|
    | ``demographic_parity``  | predicted to be of the class (selection rate)           | ``C``         |
    | ``equal_opportunity``   | that, of the examples of the class (true positive rate) | ``C``         |
    | ``predictive_equality`` | that, of the others (false positive rate)               | ``C``         |
    | ``equalized_odds``      | true positive rates, then false positive rates          | ``2 C``       |
    | ``accuracy_parity``     | predicted right, of all                                 | 1             |

    For two classes, where class 1 says it all, ``C`` counts as 1.

    Returns:
        Two tensors ``(..., G, R)``.
    """
    found = sums(found) if isinstance(found, Tensor) else found
    first = 1 if found.actual.shape[-1] == 2 else 0
    hits, selected, actual = (part[..., first:] for part in found)
    if notion == "accuracy_parity":
        return found.hits.sum(-1, keepdim=True), found.actual.sum(-1, keepdim=True)
    everyone = found.actual.sum(-1, keepdim=True).expand_as(actual)
    if notion == "demographic_parity":
        return selected, everyone
    if notion == "equal_opportunity":
        return hits, actual
    if notion == "predictive_equality":
        return selected - hits, everyone - actual
    if notion == "equalized_odds":
        return torch.cat([hits, selected - hits], -1), torch.cat([actual, everyone - actual], -1)
    raise ValueError(f"notion={notion!r} compares no rates of a table; give one of {', '.join(TABLE_NOTIONS)}")


def judged(found: Sums | Tensor, notion: TableNotion, min_support: int) -> Tensor:
    """Which rates ``(..., G, R)`` have at least ``min_support`` examples, and at least one."""
    return rates(found, notion)[1] >= max(1, min_support)


def gaps(found: Sums | Tensor, notion: TableNotion, counted: Tensor | None = None) -> Tensor:
    """The largest minus the smallest rate between groups, of the worst rate of a notion.

    Args:
        found: sums ``(..., G, C)``, or tables ``(..., G, C, C)``.
        notion: see :func:`rates`.
        counted: which rates ``(G, R)`` take part, from :func:`judged`; None is all.

    Returns:
        Gaps ``(...)``; NaN where a rate that takes part has no example, or fewer than two groups take part.
    """
    numerator, denominator = rates(found, notion)
    rate = numerator / denominator
    if counted is None:
        counted = torch.ones(rate.shape[-2:], dtype=torch.bool)
    # Each of these passes NaN on, so a notion of which half cannot be estimated looks fair by no half.
    gap = rate.masked_fill(~counted, -torch.inf).amax(-2) - rate.masked_fill(~counted, torch.inf).amin(-2)
    return gap.masked_fill(counted.sum(-2) < 2, torch.nan).amax(-1)


def bootstrap(
    table: Tensor, replicates: int, draws: np.random.Generator, min_support: int = 1
) -> dict[TableNotion, Tensor]:
    """Gaps ``(replicates,)`` in tables of as many examples, drawn with the frequencies of this one.

    Group rates depend on the examples through their table alone, so this is the bootstrap over examples, in
    milliseconds. The rates that take part are those of the table given.
    """
    filled = table.flatten().nonzero()[:, 0]  # a cell without examples stays without
    counted = {notion: judged(table, notion, min_support) for notion in TABLE_NOTIONS}

    def found(drawn: Tensor) -> dict[TableNotion, Tensor]:
        tables = torch.zeros(len(drawn), table.numel(), dtype=torch.float64)
        tables[:, filled] = drawn
        marginal = sums(tables.reshape(-1, *table.shape))
        return {notion: gaps(marginal, notion, counted[notion]) for notion in TABLE_NOTIONS}

    return resampled(table.flatten()[filled], found, replicates, draws, table.numel())


def resampled(
    counts: Tensor,
    statistic: Callable[[Tensor], Mapping[_Key, Tensor]],
    replicates: int,
    draws: np.random.Generator,
    width: int = 1,
) -> dict[_Key, Tensor]:
    """The multinomial bootstrap: statistics of as many examples, drawn again with the frequencies of their cells.

    Args:
        counts: examples in each cell ``(K,)``, float64.
        statistic: from counts ``(B, K)`` to tensors ``(B,)`` by name.
        replicates: how many samples.
        draws: where chance comes from.
        width: numbers that ``statistic`` holds for each sample, to bound memory.
    """
    frequency, total = (counts / counts.sum()).numpy(), round(float(counts.sum()))
    # Where there is nearly a cell for each example, as with many labels, drawing examples is ten times faster.
    single = 4 * len(counts) > total and torch.equal(counts, counts.round())
    owner = np.repeat(np.arange(len(counts)), counts.long().numpy()) if single else np.empty(0)
    at_once, parts = max(1, _AT_ONCE // max(len(counts), width, len(owner))), []
    for start in range(0, replicates, at_once):
        size = min(at_once, replicates - start)
        if single:
            chosen = owner[draws.integers(total, size=(size, total))] + len(counts) * np.arange(size)[:, None]
            drawn = np.bincount(chosen.ravel(), minlength=size * len(counts)).reshape(size, -1)
        else:
            drawn = draws.multinomial(total, frequency, size=size)
        parts.append(statistic(torch.from_numpy(drawn).double()))
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def percentiles(drawn: Tensor) -> Interval | None:
    """The middle 95% of replicates ``(B,)``; None if more than 5% of them could not be estimated."""
    found = drawn[~drawn.isnan()]
    if not len(found) or len(found) < 0.95 * len(drawn):  # the rest would be a choice of lucky draws
        return None
    low, high = np.quantile(found.numpy(), [0.025, 0.975]).tolist()
    return low, high


def cells(*columns: Tensor) -> tuple[Tensor, Tensor]:
    """One example of each distinct row of whole numbers ``(N,)`` or ``(N, ...)``, and how many are like it ``(K,)``.

    Example:
        >>> cells(torch.tensor([0, 1, 0]), torch.tensor([2, 2, 2]))
        (tensor([2, 1]), tensor([2., 1.], dtype=torch.float64))
    """
    place = torch.zeros(len(columns[0]), dtype=torch.long)
    for column in (part for given in columns for part in given.reshape(len(given), -1).long().unbind(1)):
        low, high = column.aminmax()
        place = (place * (high - low + 1) + column - low).unique(return_inverse=True)[1]  # dense, so never too large
    counts = torch.bincount(place).double()
    return torch.zeros(len(counts), dtype=torch.long).index_copy_(0, place, torch.arange(len(place))), counts


class Sheet:
    """The rates of one family of groups and one label, as functions of how many examples each cell holds.

    Args:
        family: its number.
        label: its number.
        group: of each cell ``(K,)``, -1 where unknown.
        target: class of each cell.
        decision: predicted class of each cell.
        groups: number of groups.
        classes: number of classes.
    """

    def __init__(
        self, family: int, label: int, group: Tensor, target: Tensor, decision: Tensor, groups: int, classes: int
    ):
        self.family, self.label, self.groups, self.classes = family, label, groups, classes
        self.columns = groups * classes
        known, first = group >= 0, group * classes
        # Where each cell counts: as a hit, as selected, as actual; the last column is nowhere.
        self._places = [
            torch.where(counts, first + which, self.columns)
            for counts, which in ((known & (target == decision), target), (known, decision), (known, target))
        ]
        self._marks: Tensor | None = None
        if self.columns <= 64 and len(group) * self.columns <= 1_000_000:  # a product is faster, if there is room
            marks = [torch.nn.functional.one_hot(place, self.columns + 1)[:, :-1] for place in self._places]
            self._marks = torch.cat(marks, 1).double()

    def sums(self, counts: Tensor) -> Sums:
        """The sums ``(B, G, C)`` of counts ``(B, K)``."""
        if self._marks is not None:
            return Sums(*(counts @ self._marks).reshape(len(counts), 3, self.groups, self.classes).unbind(1))
        empty = torch.zeros(len(counts), self.columns + 1, dtype=torch.float64)
        added = [empty.clone().index_add_(1, place, counts)[:, :-1] for place in self._places]
        return Sums(*(part.reshape(len(counts), self.groups, self.classes) for part in added))


class Panel:
    """Gaps of the worst family and label, and the accuracy of the worst group, from how many examples a cell has.

    A family or label of which a notion cannot be estimated takes no part in that notion; ``estimable`` says so.

    Args:
        kin: families of groups.
        target: classes ``(N,)``, or ``(N, L)`` of 0 and 1 for several labels.
        decision: predicted classes, of the same shape.
        min_support: rates of fewer examples take no part.
        classes: number of classes.
        chosen: one example of each cell and the counts, from :func:`cells`; None finds them.
    """

    def __init__(
        self,
        kin: Sequence[Family],
        target: Tensor,
        decision: Tensor,
        min_support: int,
        classes: int,
        chosen: tuple[Tensor, Tensor] | None = None,
    ):
        if chosen is None:
            chosen = cells(*(family.group for family in kin), target, decision)
        place, self.counts = chosen
        labels = [part.reshape(len(part), -1)[place].long().unbind(1) for part in (target, decision)]
        self.sheets = [
            Sheet(number, label, family.group[place], actual, said, len(family.names), classes)
            for number, family in enumerate(kin)
            for label, (actual, said) in enumerate(zip(*labels, strict=True))
        ]
        self.classes, self.labels = classes, len(labels[0])
        self.sums = [_first(sheet.sums(self.counts[None])) for sheet in self.sheets]
        self.counted = [{notion: judged(found, notion, min_support) for notion in TABLE_NOTIONS} for found in self.sums]
        self.estimable = [
            {notion: not bool(gaps(found, notion, counted[notion]).isnan()) for notion in TABLE_NOTIONS}
            for found, counted in zip(self.sums, self.counted, strict=True)
        ]

    def __call__(self, counts: Tensor) -> dict[str, Tensor]:
        """The gap ``(B,)`` of each notion, and ``worst_group_accuracy``, of counts ``(B, K)``; NaN as in `gaps`."""
        nothing = torch.full((len(counts),), torch.nan, dtype=torch.float64)
        found: dict[str, Tensor] = dict.fromkeys(TABLE_NOTIONS, nothing) | {"worst_group_accuracy": nothing}
        for sheet, counted, estimable in zip(self.sheets, self.counted, self.estimable, strict=True):
            marginal = sheet.sums(counts)
            for notion in (notion for notion in TABLE_NOTIONS if estimable[notion]):
                gap = gaps(marginal, notion, counted[notion])
                found[notion] = gap if found[notion] is nothing else torch.maximum(found[notion], gap)
            if counted["accuracy_parity"].any():
                right, everyone = rates(marginal, "accuracy_parity")
                low = (right / everyone).masked_fill(~counted["accuracy_parity"], torch.inf).amin((1, 2))
                before = found["worst_group_accuracy"]
                found["worst_group_accuracy"] = low if before is nothing else torch.minimum(before, low)
        return found

    def values(self) -> dict[str, float]:
        """The observed figures; NaN where they cannot be estimated."""
        return {name: float(value) for name, value in self(self.counts[None]).items()}

    def bootstrap(self, replicates: int, draws: np.random.Generator) -> dict[str, Tensor]:
        """The figures of samples with replacement of all examples, ``replicates`` or as many as are affordable."""
        width = max((3 * sheet.columns for sheet in self.sheets), default=1)
        return resampled(self.counts, self, self.affordable(replicates), draws, width)

    def affordable(self, replicates: int) -> int:
        """These, or as many as take a few seconds, but at least 500: with many labels cells are many."""
        return min(replicates, max(500, _WORK // max(1, len(self.counts) * len(self.sheets))))

    def worst(self, notion: TableNotion, family: int | None = None) -> tuple[int, float] | None:
        """Which sheet, of all or of one family, has the largest gap of a notion, and the gap; None if none has."""
        gap = [
            (float(gaps(self.sums[number], notion, self.counted[number][notion])), number)
            for number, sheet in enumerate(self.sheets)
            if self.estimable[number][notion] and family in (None, sheet.family)
        ]
        return max(gap)[::-1] if gap else None


class Change(NamedTuple):
    """What differs between two models on the same examples; None where it cannot be estimated.

    Args:
        first: the gap of the first model.
        second: the gap of the second.
        difference: second minus first; negative if the second is fairer.
        interval: 95% interval of the difference.
        p: two-sided, of no difference.
    """

    first: float | None
    second: float | None
    difference: float | None
    interval: Interval | None
    p: float | None


def paired_change(
    group: Tensor,
    target: Tensor,
    first: Tensor,
    second: Tensor,
    notion: str = "demographic_parity",
    min_support: int = 30,
    intersections: bool = False,
    replicates: int = 10_000,
    seed: int = 0,
) -> Change:
    """How a gap differs between two models on the same examples, with its interval and significance.

    Both are drawn together: the multinomial bootstrap over cells of (group, label, first, second), which is the
    bootstrap over examples. The interval holds the middle 95% of the differences; p is twice the share of them on the
    other side of zero.

    Args:
        group: whole numbers ``(N,)``, or ``(N, A)`` of several attributes; negative is unknown.
        target: classes ``(N,)``, or ``(N, L)`` of 0 and 1 for several labels.
        first: predicted classes of the first model, of the same shape.
        second: predicted classes of the second.
        notion: one of :data:`TABLE_NOTIONS`, or ``worst_group_accuracy``.
        min_support: rates of fewer examples take no part.
        intersections: judge the crossed groups of several attributes too.
        replicates: how many samples are drawn.
        seed: of these draws.

    Raises:
        ValueError: if lengths differ, the notion is not known, or a prediction is negative.

    Example:
        >>> group, target = torch.arange(400) % 2, torch.ones(400)
        >>> change = paired_change(group, target, group, torch.ones(400), "demographic_parity")
        >>> change.difference, change.interval, change.p < 0.001
        (-1.0, (-1.0, -1.0), True)
    """
    for name, part in (("target", target), ("first", first), ("second", second)):
        if len(part) != len(group):
            raise ValueError(f"{name} has {len(part)} examples and group {len(group)}; give the same examples")
        if name != "target" and part.numel() and part.min() < 0:
            raise ValueError(f"{name} has negative predictions, from outputs that are not numbers; leave them out")
    if notion not in (*TABLE_NOTIONS, "worst_group_accuracy"):
        raise ValueError(f"notion={notion!r} is not known; give one of {', '.join(TABLE_NOTIONS)}")
    if not len(group):
        return Change(None, None, None, None, None)
    kin = families(group, intersections=intersections)
    chosen = cells(*(family.group for family in kin), target, first, second)
    classes = 1 + max(1, int(target.max()), int(first.max()), int(second.max()))
    both = [Panel(kin, target, decision, min_support, classes, chosen) for decision in (first, second)]
    values = [panel.values()[notion] for panel in both]
    if values[0] != values[0] or values[1] != values[1]:
        return Change(None, None, None, None, None)

    def difference(counts: Tensor) -> dict[str, Tensor]:
        return {"difference": both[1](counts)[notion] - both[0](counts)[notion]}

    width = max(3 * sheet.columns for sheet in both[0].sheets)
    replicates = both[0].affordable(replicates)
    drawn = resampled(chosen[1], difference, replicates, np.random.default_rng(seed), width)["difference"]
    interval = percentiles(drawn)
    beyond = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p = min(1.0, 2 * (beyond + 1) / (replicates + 1)) if interval else None
    return Change(values[0], values[1], values[1] - values[0], interval, p)


def _first(found: Sums) -> Sums:
    return Sums(*(part[0] for part in found))
