"""Training on the group that is worst off."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_guard.functional.fairness import Census
from lightning_guard.functional.fairness.group_dro import group_weights
from lightning_guard.parity.base import Mode, Seen


class GroupDRO(Mode):
    r"""Minimises the loss of the worst group instead of the mean loss (group DRO).

    .. math:: \ell' = \frac{K}{N} \sum_g q_g \hat\ell_g + \frac{1}{N} \sum_{i\ \text{unknown}} \ell_i

    with :math:`\hat\ell_g` the mean loss of group :math:`g` in the batch, :math:`K` of its :math:`N` examples of known
    group, and weights :math:`q` that rise where the loss is large, updated before they are used. Groups of all
    families share the weights. The term takes away the mean loss of the known examples, so it is right where the
    user's loss is the mean of :meth:`Seen.losses`. Large models fit every group of their training data: group DRO
    then needs strong weight decay or early stopping.

    Args:
        step_size: of the weights, per nat.
        adjustment: :math:`C` in :math:`C / \sqrt{n_g}`, nats added to the loss of a group of :math:`n_g` training
            examples when weights are updated.

    | case                          | result                                                    |
    |-------------------------------|-----------------------------------------------------------|
    | a group absent from the batch | it adds no loss, and its weight waits                     |
    | no example of known group     | no term                                                   |
    | group unknown                 | the example counts for the user's loss only               |
    | several processes             | the same weights, and the groups of the union of batches  |

    Reference:
        Sagawa et al., ICLR 2020, arXiv:1911.08731.
    """

    def __init__(self, step_size: float = 0.01, adjustment: float = 0.0):
        if not 0 <= step_size < float("inf"):
            raise ValueError(f"step_size={step_size} would favour the best group; give a finite number of at least 0")
        if not 0 <= adjustment < float("inf"):
            raise ValueError(f"adjustment={adjustment} would favour small groups' luck; give a number of at least 0")
        self.step_size, self.adjustment = step_size, adjustment
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
