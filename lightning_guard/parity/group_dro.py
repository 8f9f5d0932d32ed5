"""Training on the group that is worst off."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_guard.functional.fairness import Census
from lightning_guard.functional.fairness.group_dro import group_weights
from lightning_guard.guard import Private
from lightning_guard.parity.base import Mode, Seen


class GroupDRO(Mode):
    r"""Minimises the loss of the worst group instead of the mean loss (group DRO).

    .. math:: \ell' = \frac{K}{N} \sum_g q_g \hat\ell_g + \frac{1}{N} \sum_{i\ \text{unknown}} \ell_i

    with :math:`\hat\ell_g` the mean loss of group :math:`g` in the batch, :math:`K` of its :math:`N` examples of known
    group, and weights :math:`q` that rise where the loss is large, updated before they are used. Groups of all
    families share the weights. The term takes away the mean loss of the known examples, so it is right where the
    user's loss is the mean of :meth:`Seen.losses`. Large models fit every group of their training data: group DRO
    then needs strong weight decay or early stopping.

    Where examples are private, the loss is a sum over examples, and what the weights follow has noise:

    .. math:: \ell' = \frac1N \sum_i \Big(\sum_{g \ni i} \frac{q_g\, n}{n_g}\Big) \ell_i, \qquad
              \hat\ell_g = \frac{n}{B\, n_g} \Big(\sum_{i \in g} \min(\max(\ell_i, 0), b) + \text{noise}\Big)

    with noisy counts :math:`n_g` of :math:`n` known training examples, weights :math:`q` of the steps before, the
    expected size :math:`B` of a draw and a bound :math:`b` on the loss that an example may tell. Groups that the noise
    of the count hides weigh no more than the smallest that it does not, and their own weights wait.

    Args:
        step_size: of the weights, per nat.
        adjustment: :math:`C` in :math:`C / \sqrt{n_g}`, nats added to the loss of a group of :math:`n_g` training
            examples when weights are updated.
        query: where examples are private, the name of the query that answers for the losses of each draw. The weights
            then follow what it releases and nothing else.
        bound: :math:`b`, nats.
        least: training examples that a group must have for its loss to be told from the noise.

    | case                          | result                                                    |
    |-------------------------------|-----------------------------------------------------------|
    | a group absent from the batch | it adds no loss, and its weight waits                     |
    | no example of known group     | no term                                                   |
    | group unknown                 | the example counts for the user's loss only               |
    | several processes             | the same weights, and the groups of the union of batches  |

    Reference:
        Sagawa et al., ICLR 2020, arXiv:1911.08731.
    """

    def __init__(
        self, step_size: float = 0.01, adjustment: float = 0.0, query: str = "", bound: float = 2.0, least: float = 1.0
    ):
        if not 0 <= step_size < float("inf"):
            raise ValueError(f"step_size={step_size} would favour the best group; give a finite number of at least 0")
        if not 0 <= adjustment < float("inf"):
            raise ValueError(f"adjustment={adjustment} would favour small groups' luck; give a number of at least 0")
        self.step_size, self.adjustment = step_size, adjustment
        self.query, self.bound, self.least = query, bound, least
        self._open = False
        self.weights: Tensor | None = None
        self.running: Tensor | None = None  # loss of each group, NaN before its first example

    def begin(self, module: nn.Module, census: Census) -> None:
        if self.weights is None:
            self.weights = torch.full((census.groups,), 1 / census.groups, dtype=torch.float64)
            self.running = torch.full((census.groups,), torch.nan, dtype=torch.float64)

    def term(self, seen: Seen) -> Tensor | None:
        assert self.weights is not None
        assert self.running is not None
        losses = seen.losses()
        members = seen.members.to(losses)
        if self.query:
            return self._privately(seen, losses, members)
        known = (members.sum(1) > 0).to(losses)
        sums = members.T @ losses
        with torch.no_grad():
            whole = torch.stack([known.sum(), known.new_tensor(len(known))])
            local = torch.cat([sums, members.sum(0), whole]).double()
            union = seen.summed(local)
            groups = len(sums)
            counts, (of_known, rows) = union[groups : 2 * groups], union[2 * groups :]
            means = union[:groups] / counts.clamp_min(1)
        if not seen.step.rehearsal:
            self._learn(means.cpu(), counts.cpu(), seen.census.counts)
        if not of_known:
            return None
        q = self.weights.to(sums.device)
        share = (q * of_known / rows / counts.clamp_min(1)).to(losses)
        # DDP averages gradients over processes; over the counts of the union their parts add up.
        return seen.processes * ((share * sums).sum() - (known * losses).sum() / rows.to(losses))

    def _privately(self, seen: Seen, losses: Tensor, members: Tensor) -> Tensor:
        private, census, q = seen.step.run.private, seen.census, self.weights
        assert private is not None
        assert q is not None
        if not self._open:
            self._ask(private, census)
        families = len(census.families.unique())
        if not seen.step.rehearsal:
            told = (losses.detach() / self.bound).clamp(0, 1).unsqueeze(1)
            private.add(self.query, members * told / math.sqrt(families))
        whole = max(float(census.counts[census.families == f].sum()) for f in census.families.unique())
        price = (q * whole / census.counts.clamp_min(self.least)).to(losses)
        known = (members.sum(1) > 0).to(losses)
        return ((members @ price - known) * losses).sum() / max(len(losses), 1)

    def _ask(self, private: Private, census: Census) -> None:
        """Ask for the losses of each draw by group, in place of looking at them."""
        self._open = True
        unit = self.bound * math.sqrt(len(census.families.unique()))
        expected = private.batch_size * census.counts / private.units

        def take(sums: Tensor) -> None:
            told = torch.where(census.counts >= self.least, expected, 0.0)
            self._learn(unit * sums / expected.clamp_min(1e-9), told, census.counts)

        private.open(self.query, census.groups, take)

    def _learn(self, means: Tensor, counts: Tensor, sizes: Tensor) -> None:
        assert self.weights is not None
        assert self.running is not None
        self.weights = group_weights(self.weights, means, counts, self.step_size, self.adjustment, sizes)
        kept = torch.where(self.running.isnan(), means, 0.9 * self.running + 0.1 * means)
        self.running = torch.where((counts > 0) & means.isfinite(), kept, self.running)

    def figures(self) -> dict[str, float | Tensor]:
        if self.weights is None or self.running is None or bool(self.running.isnan().all()):
            return {}
        return {"worst_loss": self.running.nan_to_num(-torch.inf).amax(), "largest_weight": self.weights.amax()}

    def state(self) -> dict[str, Any]:
        if self.weights is None or self.running is None:
            return {}
        return {"weights": self.weights, "running": self.running}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.weights, self.running = state.get("weights"), state.get("running")
