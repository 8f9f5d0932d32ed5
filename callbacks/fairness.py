"""A fairness-regularised loss as a guard."""

from collections.abc import Mapping
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from lightning_guard.functional import NOTIONS, Notion, positive_scores, rate_gaps, rate_sums
from lightning_guard.guard import Batch, Guard, GuardConflict, Phase, Run, Step, Trait


class FairnessRegularization(Guard):
    r"""Adds the squared gap between groups to the loss, so that training narrows it.

    .. math:: \ell' = \ell + \lambda \sum_r \Big( \max_g \hat p_{r,g} - \min_g \hat p_{r,g} \Big)^2

    with :math:`\hat p_{r,g}` the rate of group :math:`g` (selection rate, true positive rate, ...). The gap of one
    small batch is mostly noise: its absolute value is biased upwards, and pushing it down pushes towards a constant
    predictor. So the **value** of each rate, which says who is ahead, is a running mean of hard rates, the
    thing that is judged in the end; the **gradient** is that of the current batch's rates with the step replaced by
    :math:`\sigma(k z)`. Groups absent from a batch contribute nothing. The attribute is needed in training only.
    The square lets go as the gap closes; the gap itself would push equally hard to the end and past it.

    This penalises the gap; it does not bound it. Read the gap that was reached from ``guard/fairness/gap`` (running,
    hard, on training data, the largest over the rates of the notion; usable by EarlyStopping) and measure it on test
    data.

    Args:
        notion: ``demographic_parity``, ``equal_opportunity`` or ``equalized_odds``.
        weight: :math:`\lambda`, in nats per squared gap; 0 switches the penalty off and still logs the gap.
        steepness: :math:`k` of the surrogate.
        memory: fraction of the running counts that a step keeps, in [0, 1); 0 takes each batch by itself.
        batch: how a batch is read, if the defaults do not fit; the group is whole numbers, negative where unknown.

    | case                                    | result                                             |
    |-----------------------------------------|----------------------------------------------------|
    | ``weight=0``                            | trained weights are bit-identical to those without the guard |
    | a group absent from the batch           | it contributes no gradient                         |
    | fewer than two groups seen so far       | no penalty                                         |
    | several labels an example (multi-label) | refused on the first batch                         |
    | group unknown (negative or NaN)         | the example counts for the task loss only          |
    | several processes                       | the rates of the union of their batches            |
    | a constant predictor in the end         | a warning: it closes every gap and is of no use    |

    Reference:
        Notions: Hardt, Price and Srebro, NeurIPS 2016, arXiv:1610.02413. Hard rates for the decision and a surrogate
        for the gradient: Cotter et al., JMLR 20(172), 2019, arXiv:1809.04198.

    Example:
        >>> import pytorch_lightning as pl
        >>> trainer = pl.Trainer(callbacks=[FairnessRegularization(weight=2.0)], logger=False)
    """

    name: ClassVar[str] = "fairness"
    phase: ClassVar[Phase] = Phase.LOSS
    traits: frozenset[Trait] | None = frozenset({Trait.COUPLES_EXAMPLES, Trait.REMEMBERS_DATA})
    needs_group: ClassVar[bool] = True
    needs_logits: bool = True

    def __init__(
        self,
        notion: Notion = "demographic_parity",
        weight: float = 2.0,
        steepness: float = 3.0,
        memory: float = 0.9,
        batch: Batch | None = None,
    ):
        if notion not in NOTIONS:
            raise ValueError(f"notion={notion!r} is not known; give one of {', '.join(NOTIONS)}")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight={weight} would reward or overflow the gap; give a finite number of at least 0")
        if not steepness > 0:
            raise ValueError(f"steepness={steepness} has no gradient towards parity; give a positive number")
        if not 0 <= memory < 1:
            raise ValueError(f"memory={memory} is no fraction to keep; give a number in [0, 1)")
        self.notion: Notion = notion
        self.weight, self.steepness, self.memory, self.batch = weight, steepness, memory, batch
        self._sums = torch.zeros(0, 0)
        self._counts = torch.zeros(0, 0)
        self._restored = False

    def begin(self, run: Run) -> None:
        if not self._restored:  # else the rates of another training would steer this one
            self._sums, self._counts = torch.zeros(0, 0), torch.zeros(0, 0)
        self._restored = False

    def on_loss(self, step: Step) -> Tensor:
        assert step.loss is not None
        logits, group = step.logits, step.group
        if len(group) != len(logits):
            raise GuardConflict(
                f"{self.name}: {len(group)} groups for {len(logits)} rows of logits; an example has one each"
            )
        known = step.run.batch.find(step.batch, "target") is not None
        target = step.target if known or self.notion != "demographic_parity" else None
        if isinstance(target, Tensor) and target.dim() > 1 and target.shape[1] > 1:
            raise GuardConflict(
                f"{self.name}: targets of shape {tuple(target.shape)} are several labels an example, whose rates are "
                "not those of classes; give one class an example, or use the guard on one label at a time"
            )
        seen = max(int(group.max()) + 1 if len(group) else 0, self._sums.shape[1])
        groups = int(_over_ranks(torch.tensor(seen, device=logits.device), step, "max"))
        with torch.no_grad():
            hard = rate_sums(positive_scores(logits.float()), group, target, self.notion, groups)
            sums, counts = (_over_ranks(part, step, "sum") for part in hard)
            all_sums = self.memory * _grown(self._sums, sums) + sums
            all_counts = self.memory * _grown(self._counts, counts) + counts
            if not step.rehearsal:
                self._sums, self._counts = all_sums, all_counts
            gaps = rate_gaps(all_sums, all_counts)
        self.report(step.module, gap=gaps.amax())
        if self.weight == 0:
            return step.loss
        soft, _ = rate_sums(positive_scores(logits.float(), self.steepness), group, target, self.notion, groups)
        # DDP averages gradients over ranks; the rate of the union is the sum of their parts over its count.
        soft = soft * step.run.trainer.world_size / counts.clamp_min(1)
        # Value of the running rate, gradient of the batch's.
        rates = all_sums / all_counts.clamp_min(torch.finfo(torch.float32).tiny) + (soft - soft.detach())
        return step.loss + self.weight * rate_gaps(rates, (all_counts > 0).to(rates)).square().sum()

    def release(self, module: pl.LightningModule) -> None:
        rates = (self._sums / self._counts)[self._counts > 0]
        if self.weight and len(rates) and bool(((rates < 0.005) | (rates > 0.995)).all()):
            rank_zero_warn(
                f"{self.name}: the model predicts the same for nearly everybody, which closes every gap and is of no "
                f"use; lower weight={self.weight}"
            )

    def state(self) -> dict[str, Any]:
        return {"sums": self._sums.cpu(), "counts": self._counts.cpu()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._sums, self._counts, self._restored = state["sums"], state["counts"], True


def _over_ranks(value: Tensor, step: Step, how: str) -> Tensor:
    strategy = step.run.trainer.strategy
    return strategy.reduce(value, reduce_op=how) if step.run.trainer.world_size > 1 else value


def _grown(running: Tensor, like: Tensor) -> Tensor:
    grown = torch.zeros_like(like)
    grown[: running.shape[0], : running.shape[1]] = running.to(like)
    return grown
