"""Answers to what guards ask of private data, over all examples once or over each step's."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_guard.functional.privacy import Deal, Queries, contributions, everyone
from lightning_guard.guard import GuardConflict, Query, Run, Step

_AT_ONCE = 1024  # rows of a pass over all
_BEFORE_STEPS = 2**40  # the place of noise before training, in tests


class PrivateSums:
    """What :class:`lightning_guard.guard.Private` promises, for a plan that has booked the queries.

    Args:
        run: whose data they are.
        queries: the mechanism.
        booked: every query of the run by its name.
        deal: the batch of now.
        rewriting: a context in which frozen weights may be written.
    """

    batch_size: int
    units: int

    def __init__(
        self,
        run: Run,
        queries: Queries,
        booked: Mapping[str, Query],
        deal: Callable[[], Deal],
        rewriting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self._run, self._queries, self._booked, self._deal = run, queries, booked, deal
        self._loader: DataLoader | None = None
        self.rewriting = rewriting
        self.masks: dict[Tensor, Tensor] = {}  # of weights held at zero in part, for the mechanism

    def planned(self, loader: DataLoader, batch_size: int, units: int) -> None:
        """The training data as the user gave them, and what the plan says of them."""
        self._loader, self.batch_size, self.units = loader, batch_size, units

    def once(self, name: str, rows: Callable[[Step], Tensor]) -> Tensor:
        """The noisy sum over all training examples; asked anew it would have to be paid for anew."""
        trainer = self._run.trainer
        if trainer.global_step:
            raise GuardConflict(
                f"{name} was counted before the first step of this training, and counting again would cost privacy "
                "again; resume with the guards that the checkpoint was trained with"
            )
        assert self._loader is not None
        total: Any = None
        if trainer.global_rank == 0:  # every process has all rows
            with isolate_rng(include_cuda=False), torch.no_grad():
                for raw in everyone(self._loader, _AT_ONCE):
                    batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(raw))
                    part = contributions(rows(Step(self._run, batch))).sum(0)
                    total = part if total is None else total + part
            self._queries.noise.at(_BEFORE_STEPS + sorted(self._booked).index(name))
            total += self._queries.noise.fill_(torch.empty_like(total), self._booked[name].noise)
        return torch.as_tensor(trainer.strategy.broadcast(total))

    def open(self, name: str, size: int, take: Callable[[Tensor], None]) -> None:
        """Ask for a sum of every step."""
        self._queries.open(name, size, self._booked[name].noise, take)

    def mask(self, weight: nn.Parameter, kept: Tensor) -> None:
        """A weight is held at zero but where ``kept``: its gradient counts there alone."""
        self.masks[weight] = kept.to(weight.device, weight.dtype).contiguous()

    def add(self, name: str, rows: Tensor) -> None:
        """Contribute to it."""
        self._queries.add(name, rows, self._deal())
