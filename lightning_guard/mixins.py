"""How a LightningModule may describe itself to its guards, and carry them with it."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from torch import Tensor

from lightning_guard.batch import Batch
from lightning_guard.guard import Guard, GuardConflict, Run, Step, callbacks_of
from lightning_guard.pipeline import current

_carried: "WeakKeyDictionary[Any, list[Guard]]" = WeakKeyDictionary()


class GuardMixin:
    """Describes a LightningModule to its guards where the defaults do not fit. Everything is optional.

    Put it before ``LightningModule`` among the bases. It adds nothing to ``state_dict`` and does nothing unless a
    guard is there.

    Attributes:
        guard_batch: how a batch is read.
        guards: guards that come with the class; each module gets copies of its own, beside those of the Trainer.

    Example:
        >>> import pytorch_lightning as pl
        >>> class Net(GuardMixin, pl.LightningModule):
        ...     guard_batch = Batch(inputs="pixels", target="label")
        >>> Net().configure_callbacks()
        []
    """

    guard_batch: ClassVar[Batch | None] = None
    guards: ClassVar[Sequence[Guard]] = ()

    def guard_forward(self, inputs: Any) -> Any:
        """Logits for inputs, for a guard's own passes; None leaves it to ``Batch.logits`` or ``forward``."""
        return None

    def guard_logits(self, output: Any) -> Tensor | None:
        """The logits of the step that just returned ``output``, with their graph; None leaves it to the guards."""
        return None

    def guard_losses(self, logits: Tensor, target: Any) -> Tensor | None:
        """The loss of each example ``(N,)``, each depending on its own example alone; None is cross-entropy."""
        return None

    def guard_counterfactual(self, inputs: Any) -> Any:
        """The same inputs with the protected attribute changed, for a guard that compares both; None: not known."""
        return None

    def guard_step(self, batch: Any) -> Step:
        """For manual optimisation: the batch as the guards want it, as ``step.batch``, ``step.inputs``, ...

        Example::

            def training_step(self, batch, batch_idx):
                step = self.guard_step(batch)
                logits = self(step.inputs)
                loss = self.guard_loss(step, cross_entropy(logits, step.target), logits)
                self.manual_backward(loss)
        """
        pipeline = current(self)  # type: ignore[arg-type]
        if pipeline is None:  # no guard is here
            return Step(Run(None, self, (), self.guard_batch or Batch()), batch)  # type: ignore[arg-type]
        return pipeline.take_manual_step(batch)

    def guard_loss(self, step: Step, loss: Tensor, logits: Tensor | None = None) -> Tensor:
        """For manual optimisation: the loss as the guards want it; ``logits`` are those of this very step."""
        pipeline = current(self)  # type: ignore[arg-type]
        return loss if pipeline is None else pipeline.take_manual_loss(step, loss, logits)

    def configure_callbacks(self) -> list[Any]:
        """Lightning's hook: the guards that come with the class, the same ones for every stage of this module."""
        own = _carried.setdefault(self, [deepcopy(guard) for guard in self.guards])
        trainer = getattr(self, "_trainer", None)
        given = [guard for guard in callbacks_of(trainer) if isinstance(guard, Guard)] if trainer is not None else []
        for guard in given:  # Lightning would put the class's in its place and only print a line
            if any(type(guard) is type(mine) and guard is not mine for mine in own):
                raise GuardConflict(
                    f"{guard.name} is given to the Trainer and comes with {type(self).__name__} too; keep one of them"
                )
        return [*super().configure_callbacks(), *own]  # type: ignore[misc]
