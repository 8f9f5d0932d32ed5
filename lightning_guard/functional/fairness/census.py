"""The groups of a data set: who is in them, how many, and what is known of them."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from lightning_guard.functional.fairness.moments import Notion


class Census:
    """Counts a data set once, batch by batch, and then says of any batch who belongs to which group.

    Each attribute is a family of groups; ``intersections`` adds the groups of all attributes at once as one more.
    An example of unknown attribute (negative or NaN) belongs to no group of that family.

    Args:
        intersections: cross several attributes.

    Attributes:
        families: the family of each group, ``(G,)``.
        counts: examples of each group, ``(G,)``.
        cells: examples of each group and class, ``(G, C)``; of several labels those that have each, ``(G, L)``;
            ``(G, 1)`` where targets are neither.
        total: examples, those of unknown group too.

    Example:
        >>> census = Census()
        >>> census.add(torch.tensor([0, 1, 1, -1]), torch.tensor([0, 1, 1, 1]))
        >>> census.close()
        >>> census.counts.tolist(), census.cells.tolist(), census.total
        ([1.0, 2.0], [[1.0, 0.0], [0.0, 2.0]], 4.0)
        >>> census.members(torch.tensor([1, -1])).tolist()
        [[0.0, 1.0], [0.0, 0.0]]
    """

    def __init__(self, intersections: bool = False):
        self.intersections = intersections
        self.total = 0.0
        self.values: list[list[int]] = []  # of each attribute, in order
        self.several = False  # labels an example
        self.labelled = False  # targets are classes or labels
        self._tuples: dict[tuple[int, ...], dict[int, float]] = {}  # by attributes, then by class or label; -1: anyone
        self.codes: list[tuple[int, ...]] = []  # of each group: a value an attribute, -1 for any
        self.families = torch.zeros(0, dtype=torch.long)
        self._of_groups = torch.zeros(0, 0, dtype=torch.long)
        self.counts = torch.zeros(0, dtype=torch.float64)
        self.cells = torch.zeros(0, 1, dtype=torch.float64)

    @property
    def groups(self) -> int:
        """How many groups there are, of all families."""
        return len(self.codes)

    def add(self, group: Tensor, target: Tensor | None) -> None:
        """Count a batch.

        Args:
            group: whole numbers ``(N,)`` or ``(N, A)``, -1 where unknown.
            target: classes ``(N,)``, or 0 and 1 for each label ``(N, L)``; anything else is counted as neither.
        """
        rows = _columns(group).cpu().clamp_min(-1)
        self._count(rows, -1)
        self.total += len(rows)
        if target is None or len(target) != len(rows):
            return
        labels = target.reshape(len(rows), -1).cpu()
        if labels.is_floating_point() and not bool(((labels == 0) | (labels == 1)).all()):
            return
        if labels.shape[1] > 1:
            self.several = True
            for label in range(labels.shape[1]):
                self._count(rows[labels[:, label] == 1], label)
        else:
            for cls in labels.unique().long().tolist():
                if cls >= 0:  # an ignored target is no class
                    self._count(rows[labels[:, 0] == cls], cls)

    def _count(self, rows: Tensor, label: int) -> None:
        found, counts = rows.unique(dim=0, return_counts=True)
        for codes, n in zip(found.tolist(), counts.tolist(), strict=True):
            by_label = self._tuples.setdefault(tuple(codes), {})
            by_label[label] = by_label.get(label, 0.0) + n

    def merge(self, others: Iterable["Census"]) -> None:
        """Add the counts of other processes."""
        for other in others:
            self.total += other.total
            self.several |= other.several
            for codes, classes in other._tuples.items():
                own = self._tuples.setdefault(codes, {})
                for cls, n in classes.items():
                    own[cls] = own.get(cls, 0.0) + n

    def close(self) -> None:
        """Number the groups; from here on :meth:`members` knows them."""
        if len({len(codes) for codes in self._tuples}) > 1:
            raise ValueError("batches have different numbers of attributes; give the same for every example")
        width = len(next(iter(self._tuples), ()))
        self.values = [sorted({codes[a] for codes in self._tuples} - {-1}) for a in range(width)]
        self.codes, families = [], []
        for a, values in enumerate(self.values):
            self.codes += [tuple(v if b == a else -1 for b in range(width)) for v in values]
            families += [a] * len(values)
        if self.intersections and width > 1:
            seen = [codes for codes in product(*self.values) if codes in self._tuples]
            self.codes += seen
            families += [width] * len(seen)
        self.families = torch.tensor(families, dtype=torch.long)
        self._of_groups = torch.tensor(self.codes, dtype=torch.long).reshape(self.groups, width)
        classes = max((cls for one in self._tuples.values() for cls in one), default=-1) + 1
        self.labelled = classes > 0
        self.cells = torch.zeros(self.groups, max(classes, 1), dtype=torch.float64)
        self.counts = torch.zeros(self.groups, dtype=torch.float64)
        for codes, by_class in self._tuples.items():
            within = [all(want in (-1, have) for want, have in zip(code, codes, strict=True)) for code in self.codes]
            inside = torch.tensor(within, dtype=torch.bool)
            for cls, n in by_class.items():
                if cls < 0:
                    self.counts[inside] += n
                if cls >= 0 or not classes:
                    self.cells[inside, max(cls, 0)] += n

    def support(self, notion: Notion, rates: int) -> Tensor:
        """How many training examples each rate of each group is a mean of, ``(R, G)``."""
        labelled = self.counts if self.several or not self.labelled else self.cells.sum(1)
        if notion in ("accuracy_parity", "calibration"):
            return labelled.expand(rates, -1)
        if notion not in ("equal_opportunity", "predictive_equality", "equalized_odds"):
            return self.counts.expand(rates, -1)
        columns = rates // 2 if notion == "equalized_odds" else rates
        actual = self.cells.T if self.several or columns > 1 else self.cells.T[1:]  # one column of two is class 1
        missing = columns - len(actual)
        actual = torch.cat([actual, torch.zeros(max(missing, 0), self.groups, dtype=actual.dtype)])[:columns]
        others = labelled - actual
        if notion == "equal_opportunity":
            return actual
        return others if notion == "predictive_equality" else torch.cat([actual, others])

    def members(self, group: Tensor) -> Tensor:
        """Who belongs to which group: ``(N, G)`` of 0 and 1."""
        rows = _columns(group)
        codes = self._of_groups.to(rows.device)
        if codes.shape[1] != rows.shape[1]:
            raise ValueError(f"{rows.shape[1]} attributes, but the training data have {codes.shape[1]}")
        return ((rows.unsqueeze(1) == codes) | (codes < 0)).all(2).float()

    def name(self, group: int, names: Sequence[str] | None = None) -> str:
        """A group as people read it."""
        codes = self.codes[group]
        if len(codes) == 1:
            return names[codes[0]] if names is not None and codes[0] < len(names) else f"group {codes[0]}"
        return ", ".join(f"attribute {a} = {v}" for a, v in enumerate(codes) if v >= 0)

    def state(self) -> dict[str, Any]:
        """Plain numbers, so that a resumed training need not count again."""
        rows = [[*codes, cls, n] for codes, classes in self._tuples.items() for cls, n in classes.items()]
        return {"rows": torch.tensor(rows, dtype=torch.float64), "total": self.total, "several": self.several}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave."""
        self.total, self.several, self._tuples = state["total"], state["several"], {}
        for *codes, cls, n in state["rows"].tolist():
            self._tuples.setdefault(tuple(int(c) for c in codes), {})[int(cls)] = n
        self.close()


def _columns(group: Tensor) -> Tensor:
    return group.unsqueeze(1) if group.dim() == 1 else group
