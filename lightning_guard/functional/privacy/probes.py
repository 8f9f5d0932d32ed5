"""Probes: experiments on a training step that refute what cannot be read off its code.

A probe can show that examples are not independent; that it finds nothing proves nothing. What it looks at is private
data, and its verdict, one bit, is not covered by epsilon.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_guard.functional.privacy.book import Bookkeeper

MOST = 8  # units a probe looks at: a coupling shows in a few as well as in many
_SAME = 1e-4  # relative change of a norm that rounding can explain; every coupling measured was 1.5e-3 or more


@dataclass(frozen=True)
class Findings:
    """What a probe of one step found.

    Args:
        coupling: largest relative change of one unit's gradient norm (of any parameter) when another unit is replaced;
            0 if units are independent.
        parameter: the parameter where it changed most.
        influence: largest change of the clipped sum when one unit is replaced, in multiples of the clipping norm; at
            most 2 if each unit's contribution is bounded.
        reduction: how the loss treats its batch, ``"mean"`` or ``"sum"``; None if neither.
    """

    coupling: float
    parameter: str
    influence: float
    reduction: Literal["mean", "sum"] | None

    @property
    def independent(self) -> bool:
        """Whether no unit's gradient was seen to depend on another unit."""
        return self.coupling <= _SAME

    def check(self, loss_reduction: str) -> None:
        """Check that what was found can be clipped and noised unit by unit.

        Args:
            loss_reduction: how the loss is said to treat its batch.

        Raises:
            ValueError: if it cannot.
        """
        if not self.independent:
            raise ValueError(
                f"the gradient of one example changed by {self.coupling:.1%} (in {self.parameter}) when another was "
                "replaced, so clipping each bounds nothing; let no layer, loss, weight or augmentation mix examples, "
                "and average a weighted loss over the number of examples, not over their weights"
            )
        if self.reduction not in (None, loss_reduction):
            raise ValueError(
                f"training_step gives the {self.reduction} of the examples' losses; say so with "
                f"loss_reduction={self.reduction!r}, or max_grad_norm would mean something else"
            )
        if self.influence > 2.01:
            raise ValueError(f"one example moved the clipped sum by {self.influence:.3g} times max_grad_norm, not 2")


def probe(
    book: Bookkeeper,
    loss_of: Callable[[Any], Tensor | None],
    batch: Any,
    units: int,
    rows: int,
    groups: Sequence[Sequence[nn.Parameter]],
    factors_of: Callable[[Tensor, int], Tensor],
    max_grad_norm: float,
) -> Findings:
    """Replace one unit after another in a batch of a few and look at the gradients of the others.

    Args:
        book: the book of the step.
        loss_of: the loss of a whole training step on a batch, with the same random numbers each time.
        batch: tensors, and lists as long, in any nest of tuples, lists and dicts; rows of a unit are consecutive.
        units: units in the batch, at least 2.
        rows: rows of a unit.
        groups: the groups of parameters that are clipped together.
        factors_of: factors ``(G, n)`` for what is booked, from norms ``(G, n)`` and the number of units in the batch.
        max_grad_norm: the bound that they are to keep.

    Raises:
        ValueError: if the batch cannot be taken apart.
    """
    count = min(units, MOST)
    few = list(range(count))

    def run(order: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Squared norms ``(P, n)`` of each parameter's gradients, and the clipped sum of all."""
        index = [unit * rows + row for unit in order for row in range(rows)]
        with book.step(units=len(order), rows=rows):
            loss = loss_of(take(batch, index, units * rows))
        if loss is None:
            return torch.zeros(len(book.parameters), len(order)), torch.zeros(1)
        loss.backward()
        each = book.squared_norms([[p] for p in book.parameters.values()])
        norms = book.squared_norms(groups).sqrt_()
        factors = factors_of(norms, len(order))
        book.drop(~norms.isfinite().all(0))
        sums = {key: torch.zeros_like(p) for key, p in book.parameters.items()}
        book.add_sums(factors, sums, {id(p): g for g, group in enumerate(groups) for p in group})
        return each, torch.cat([total.flatten() for total in sums.values()])

    # First another number of units, so that the book sees what only has as many rows by chance.
    twice, _ = run(few + few)
    each, total = run(few)
    coupling, parameter, influence = 0.0, 0, 0.0
    floor = each[each.isfinite()].sqrt().amax() * 1e-3 if each.isfinite().any() else 0.0
    for i in range(count):  # all of them: a largest of the batch shows only when that one is replaced
        order = few.copy()
        order[i] = (i + 1) % count
        others, moved = run(order)
        change = (others.sqrt() - each.sqrt()).abs() / (each.sqrt() + floor)
        same = (others == each) | (~others.isfinite() & ~each.isfinite())  # what is not finite is dropped
        change[same] = 0
        change = change.nan_to_num(nan=torch.inf)
        change[:, i] = 0
        if float(change.max()) > coupling:
            coupling, parameter = float(change.max()), int(change.amax(1).argmax())
        influence = max(influence, float((moved - total).norm()) / max_grad_norm)
    ratio = float((twice[:, :count].sum() / each.sum().clamp_min(torch.finfo(each.dtype).tiny)).sqrt())
    reduction: Literal["mean", "sum"] | None = None
    if abs(ratio - 0.5) < 0.01:
        reduction = "mean"
    elif abs(ratio - 1) < 0.02:
        reduction = "sum"
    book.clear()
    return Findings(coupling, list(book.names.values())[parameter], influence, reduction)


def take(batch: Any, index: Sequence[int], count: int) -> Any:
    """Some rows of a batch of ``count`` rows, of the same type.

    Raises:
        ValueError: if it holds nothing with that many rows.

    Example:
        >>> take((torch.arange(3), ["a", "b", "c"]), [2, 0], 3)
        (tensor([2, 0]), ['c', 'a'])
    """
    found = False

    def rows(part: Any) -> Any:
        nonlocal found
        if isinstance(part, Tensor):
            if part.dim() == 0 or len(part) != count:
                return part
            found = True
            return part[torch.as_tensor(index, device=part.device)]
        if isinstance(part, Mapping):
            made = {key: rows(value) for key, value in part.items()}
            kind: Any = type(part)
            return made if kind is dict else kind(made)
        if isinstance(part, tuple) and hasattr(part, "_fields"):
            return type(part)(*map(rows, part))
        if isinstance(part, list) and len(part) == count and not any(isinstance(one, Tensor) for one in part):
            return [part[i] for i in index]
        if isinstance(part, list | tuple):
            return type(part)(map(rows, part))
        return part

    taken = rows(batch)
    if not found:
        raise ValueError(f"this batch, a {type(batch).__name__}, holds no tensor with {count} rows")
    return taken
