"""Example weights that make the class independent of the group."""

import torch
from torch import Tensor, nn

from lightning_guard.functional.fairness import Census
from lightning_guard.parity.base import Mode, Seen


class Reweigh(Mode):
    r"""Weighs each example so that class and group are independent in the weighted training data (reweighing).

    .. math:: w_{g,y} = \frac{P(g)\,P(y)}{P(g, y)}, \qquad \ell' = \frac1N \sum_i w_i \ell_i

    with probabilities from counts of the training data, within each family of groups; with several families an
    example has the average of their weights. Where there are no classes (regression), or several labels an example,
    :math:`w_g = n / (G\, n_g)`, so that each of :math:`G` groups weighs the same. The term is right where the user's
    loss is the mean of :meth:`Seen.losses`.

    | case                                     | result                              |
    |------------------------------------------|-------------------------------------|
    | group unknown in every family, or the class | weight 1                         |
    | group unknown in some families           | the average of the others' weights  |

    Reference:
        Kamiran and Calders, Data preprocessing techniques for classification without discrimination, Knowledge and
        Information Systems 33, 2012, doi:10.1007/s10115-011-0463-8.
    """

    couples_examples = False

    def begin(self, module: nn.Module, census: Census) -> None:
        self.table = cell_weights(census)

    def weights(self, members: Tensor, target: Tensor | None) -> Tensor:
        """The weight of each example, ``(N,)`` in float64.

        Args:
            members: ``(N, G)``, 1 where an example belongs to a group.
            target: classes ``(N,)`` or ``(N, 1)``; not read where the weights are of groups alone.
        """
        members = members.double()
        table = self.table.to(members.device)
        cell = torch.zeros(len(members), dtype=torch.long, device=members.device)
        known = members
        if table.shape[1] > 1:
            if target is None or target.numel() != len(members):
                raise ValueError("reweighing by class needs one class an example, and this batch has none")
            target = target.reshape(-1).to(members.device)
            seen = (target >= 0) & (target < table.shape[1]) & (target == target.long())
            cell, known = target.long().where(seen, 0), members * seen.unsqueeze(1)
        total = (known * table.T[cell]).sum(1)
        families = known.sum(1)  # an example is in one group of a family
        return torch.where(families > 0, total / families.clamp_min(1), 1.0)

    def term(self, seen: Seen) -> Tensor | None:
        losses = seen.losses()
        return ((self.weights(seen.members, seen.target).to(losses) - 1) * losses).mean()


def cell_weights(census: Census) -> Tensor:
    """The weight of an example of each group and class, ``(G, C)`` in float64; ``(G, 1)`` of groups alone.

    A cell without training examples has weight 1.
    """
    alone = census.several or census.cells.shape[1] == 1
    cells = census.counts.unsqueeze(1) if alone else census.cells
    weights = torch.ones_like(cells)
    for family in census.families.unique():
        own = census.families == family
        n = cells[own]
        groups = n.mean().expand_as(n) if alone else n.sum(1, keepdim=True) * n.sum(0) / n.sum()
        weights[own] = torch.where(n > 0, groups / n.clamp_min(1), 1.0)
    return weights
