"""A table of group counts that grows batch by batch."""

import numpy as np
import torch
from torch import Tensor

from lightning_guard.evaluation.base import Interval
from lightning_guard.evaluation.table import TableNotion, bootstrap, gaps, judged, percentiles, tabulate


class GroupTable:
    """Counts examples by group, label and prediction: batch by batch, and summed over processes.

    It keeps no examples. Every process updates a table of its own; :meth:`reduced` gives their sum.

    Args:
        groups: number of groups.
        classes: number of classes, at least 2.
        device: where the counts are; for a backend like NCCL the device of the process.

    | case                                    | result                                     |
    |-----------------------------------------|--------------------------------------------|
    | group negative                          | counted in ``unknown``, part of no rate    |
    | group, label or prediction out of range | a ValueError, and nothing is counted       |
    | no process group                        | ``reduced`` is a copy                      |
    | ``reduced`` again                       | the same sum: a table is not changed by it |

    Raises:
        ValueError: if there is no group, or fewer than two classes.

    Example:
        >>> table = GroupTable(groups=2, classes=2)
        >>> table.update(torch.tensor([0, 0, 1, 1]), torch.tensor([1, 0, 1, 1]), torch.tensor([1, 1, 0, 1]))
        >>> table.gap("demographic_parity"), table.gap("predictive_equality")
        (0.5, None)
    """

    def __init__(self, groups: int, classes: int = 2, device: torch.device | str = "cpu"):
        for option, value, least in (("groups", groups, 1), ("classes", classes, 2)):
            if value < least:
                raise ValueError(f"{option}={value} leave nothing to count; give at least {least}")
        self.groups, self.classes = groups, classes
        self._cells = torch.zeros(groups + 1, classes, classes, dtype=torch.long, device=device)

    def update(self, group: Tensor, target: Tensor, decision: Tensor) -> None:
        """Count a batch: group, label and predicted class of each example, whole numbers ``(N,)``."""
        parts = (("group", group, self.groups), ("target", target, self.classes), ("decision", decision, self.classes))
        for name, part, end in parts:
            low = 0 if name != "group" else -torch.inf
            if part.numel() and (part.min() < low or part.max() >= end):
                raise ValueError(
                    f"{name} ranges from {part.min().item()} to {part.max().item()}, outside the table's {end}; "
                    "give the number of groups and classes, and leave out outputs that are not numbers"
                )
        place = torch.where(group < 0, self.groups, group).long()
        self._cells += tabulate(place, target, decision, self.groups + 1, self.classes).to(self._cells)

    def reduced(self) -> "GroupTable":
        """The sum of the tables of all processes."""
        total = GroupTable(self.groups, self.classes, self._cells.device)
        total._cells += self._cells
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total._cells)
        return total

    @property
    def counts(self) -> Tensor:
        """Examples of known group ``(G, C, C)`` by group, label and prediction, in float64 on the CPU."""
        return self._cells[: self.groups].cpu().double()

    @property
    def unknown(self) -> int:
        """Examples of unknown group."""
        return int(self._cells[self.groups].sum())

    def gap(self, notion: TableNotion, min_support: int = 1) -> float | None:
        """The gap between the groups that can be judged; None if it cannot be estimated. See :func:`gaps`."""
        value = float(gaps(self.counts, notion, judged(self.counts, notion, min_support)))
        return None if value != value else value

    def interval(
        self, notion: TableNotion, min_support: int = 1, replicates: int = 10_000, seed: int = 0
    ) -> Interval | None:
        """The 95% interval of the gap; None if it cannot be estimated. See :func:`bootstrap`."""
        drawn = bootstrap(self.counts, replicates, np.random.default_rng(seed), min_support)
        return percentiles(drawn[notion])
