"""Going back to earlier weights in the middle of training."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_guard.guard import GuardConflict, Run


class Rewinding:
    """Remembers a module's trained weights and its buffers, and puts them back with optimizers that begin anew.

    The copies share no memory with the model, neither before a rewind nor after it.

    Args:
        copies: what :meth:`kept` of an earlier one gave.
    """

    def __init__(self, copies: Mapping[str, Tensor] | None = None):
        self._copies = dict(copies or {})

    def remember(self, run: Run) -> None:
        """Copy the weights as they are now."""
        self._copies = {name: value.detach().clone() for name, value in self._of(run).items()}

    @torch.no_grad()
    def rewind(self, run: Run, forget: bool) -> None:
        """Put the copies back in place, clear the optimizers' states, and ``forget`` the copies if they have served."""
        if not self._copies:
            raise GuardConflict(
                "there are no weights to rewind to: the checkpoint that training resumed from was written without "
                "rewind; leave rewind out, or begin a new training"
            )
        for name, value in self._of(run).items():
            value.copy_(self._copies[name])
        for optimizer in run.trainer.optimizers:
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    optimizer.state.pop(weight, None)
        if forget:
            self._copies = {}

    @staticmethod
    def _of(run: Run) -> dict[str, Tensor]:
        groups = [group for optimizer in run.trainer.optimizers for group in optimizer.param_groups]
        trained = {weight for group in groups for weight in group["params"]}
        stored = run.module.state_dict(keep_vars=True)
        buffers = {name for name, _ in run.module.named_buffers(remove_duplicate=False)}
        return {name: value for name, value in stored.items() if name in buffers or value in trained}

    def kept(self) -> dict[str, Tensor]:
        """The copies, for a checkpoint."""
        return dict(self._copies)
