"""Training without the examples that fit worst, as a guard."""

from collections.abc import Iterable
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn

from lightning_guard.functional.poison import take_rows, trimmed
from lightning_guard.guard import Batch, Guard, GuardConflict, Phase, Run, Step, Trait


class TrimmedLoss(Guard):
    r"""Leaves the worst-fitting share of each batch out of training (Shen and Sanghavi, 2019).

    .. math:: \min_\theta \; \min_{|S| = \lceil (1 - share) n \rfloor} \; \sum_{i \in S} \ell(f_\theta(x_i), y_i)

    Networks learn what agrees before they learn what does not (Arpit et al., 2017), so after a while wrong labels have
    the highest losses. A planted pattern need not: it agrees with itself and may be learnt first.

    One pass without gradients finds the loss of each example, in eval mode, and your ``training_step`` receives the
    batch without the highest of them. Nothing else changes; other guards, an attack for instance, act on what is left.

    Logs ``guard/trimmed_loss/share``, what was left out of the batches, and the mean loss of what was kept and of what
    was left out, ``kept_loss`` and ``dropped_loss``, in nats.

    Args:
        share: of each batch that is left out, in [0, 1); 0 switches the guard off. Rather more than is wrong: a
            batch has now more and now less of it.
        warmup: time before anything is left out, as a fraction of training (float) or in optimizer steps (int). At
            least an epoch, or losses say nothing yet; too long, and what is wrong has been learnt.
        gradual: the share grows evenly over ``warmup`` instead of at its end, as in co-teaching (Han et al., 2018).
        batch: how a batch is read, if the defaults do not fit.

    | case                                      | result                                                       |
    |-------------------------------------------|--------------------------------------------------------------|
    | ``share=0``                               | training is bit-identical to training without the guard      |
    | a batch of one                            | it is kept                                                   |
    | batches so small that nothing is left out | a warning at the end                                         |
    | losses that are not a number              | are the highest                                              |
    | a batch that does not fall into examples  | refused on the first batch, with the part                    |
    | accumulated batches, several processes    | each batch of each process by itself                         |
    | training ends within ``warmup``           | refused if it can be known, else a warning at the end        |

    Raises:
        GuardConflict: before training or on a batch, if the promise cannot be kept.

    Reference:
        Shen and Sanghavi, Learning with bad training data via iterative trimmed loss minimization, ICML 2019,
        arXiv:1810.11874. Han et al., Co-teaching, NeurIPS 2018, arXiv:1804.06872.

    Example:
        >>> import pytorch_lightning as pl
        >>> trainer = pl.Trainer(callbacks=[TrimmedLoss(share=0.2)], logger=False)
    """

    name: ClassVar[str] = "trimmed_loss"
    phase: ClassVar[Phase] = Phase.LOADER  # before any guard that makes the batch another one
    traits: frozenset[Trait] | None = frozenset({Trait.COUPLES_EXAMPLES})

    def __init__(
        self,
        share: float,
        warmup: int | float = 0.1,
        gradual: bool = False,
        batch: Batch | None = None,
    ):
        if not 0 <= share < 1:
            raise ValueError(f"share={share} is no share of a batch that can go; give a fraction in [0, 1)")
        if warmup < 0 or (isinstance(warmup, float) and warmup > 1):
            raise ValueError(f"warmup={warmup} is no time; give a fraction in [0.0, 1.0] or a number of steps")
        self.share, self.warmup, self.gradual, self.batch = share, warmup, gradual, batch
        self._warmup: int | None = None
        self._checked = self._acted = False  # in this fit: a batch has been read, and examples have been left out

    def problems(self, run: Run) -> Iterable[str]:
        if not self.share or not self.warmup:
            return
        if isinstance(self.warmup, float) and run.endless:
            yield (
                f"warmup={self.warmup} is a fraction of a training without end; "
                "set max_epochs or max_steps on the Trainer, or give optimizer steps"
            )
        if isinstance(self.warmup, int) and 0 <= run.trainer.max_steps <= self.warmup and not self.gradual:
            yield (
                f"warmup={self.warmup} ends with the last optimizer step, max_steps={run.trainer.max_steps}, so "
                "nothing is ever left out; train longer or give a shorter warmup"
            )

    def begin(self, run: Run) -> None:
        self._warmup, self._checked, self._acted = None, False, False

    def on_batch(self, step: Step) -> Any:
        if not self.share:
            return step.batch
        share = self._share(step.run)
        if not share and self._checked:
            self.report(step.module, share=0.0)
            return step.batch
        with step.probe(), torch.no_grad():
            losses = step.losses(step.forward(step.inputs), step.target)
        try:
            kept = trimmed(losses, share or self.share)
            left = take_rows(step.batch, kept, len(losses))
        except ValueError as error:
            raise GuardConflict(f"{self.name}: {error}") from None
        self._checked = True  # the first batch of all, so that nothing is refused after the warmup
        if not share or len(kept) == len(losses):
            self.report(step.module, share=0.0)
            return step.batch
        gone = torch.ones_like(losses, dtype=torch.bool)
        gone[kept] = False
        self.report(
            step.module,
            share=gone.float().mean(),
            kept_loss=losses[kept].mean(),
            dropped_loss=losses[gone].mean(),
        )
        self._acted = True
        return left

    def _share(self, run: Run) -> float:
        """The share that goes by now."""
        if not self.warmup:
            return self.share
        if self._warmup is None:
            self._warmup = round(self.warmup * run.total_steps) if isinstance(self.warmup, float) else self.warmup
        done = run.trainer.global_step
        if self.gradual:
            return self.share * min(1.0, done / max(self._warmup, 1))
        return self.share if done >= self._warmup else 0.0

    def settled(self, run: Run) -> bool:
        return not self.share or self._share(run) == self.share

    def release(self, module: pl.LightningModule) -> None:
        if self._checked and not self._acted:
            rank_zero_warn(
                f"{self.name}: no example was left out of any batch: training ended within "
                f"warmup={self.warmup}, or share={self.share} of a batch is less than half an example. Train longer, "
                "shorten warmup, or give larger batches."
            )
