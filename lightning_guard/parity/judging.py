"""Passes over the data that training has: counting its groups, and measuring finished weights on them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor

from lightning_guard.ascent import outside
from lightning_guard.functional.fairness import Census, moments
from lightning_guard.guard import GuardConflict, Run, Step
from lightning_guard.parity.base import Seen
from lightning_guard.parity.constraint import Constraint
from lightning_guard.parity.running import table

_AT_ONCE = 8192  # rows that are tabulated together


@contextmanager
def _unmoved(loader: Any) -> Iterator[None]:
    """Whatever is drawn inside is drawn again by training."""
    owners = [loader, getattr(loader, "sampler", None)]
    generators = [g for g in (getattr(owner, "generator", None) for owner in owners) if isinstance(g, torch.Generator)]
    states = [g.get_state() for g in generators]
    with isolate_rng(include_cuda=False):
        yield
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)


def count(run: Run, intersections: bool, continuous: bool = False) -> tuple[Census, Tensor]:
    """The groups of the training data, over all processes, and what numbers its targets are.

    Raises:
        GuardConflict: if the data have no end, or no groups.
    """
    trainer = run.trainer
    loader, batches = trainer.train_dataloader, trainer.num_training_batches
    if batches == float("inf"):
        raise GuardConflict(
            "the training data have no known end, so their groups cannot be counted before training; set "
            "limit_train_batches on the Trainer"
        )
    assert loader is not None
    census = Census(intersections)
    targets: list[Tensor] = []
    with _unmoved(loader):
        for batch in islice(loader, int(batches)):
            step = Step(run, batch)
            target = step.target if run.batch.find(batch, "target") is not None else None
            target = target if isinstance(target, Tensor) else None
            if continuous:
                census.total += len(step.attribute)
            else:
                census.add(step.group, target)
            if target is not None and target.is_floating_point() and len(targets) < 1_000:
                targets.append(target.reshape(len(target), -1)[:, 0].float().cpu())
    numbers = torch.cat(targets) if targets else torch.zeros(0)
    if trainer.world_size > 1:
        found: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(found, (census.state(), numbers))
        census, numbers = Census(intersections), torch.cat([numbers for _, numbers in found])
        for state, _ in found:
            other = Census(intersections)
            other.restore(state)
            census.merge([other])
    census.close()
    return census, numbers


@dataclass
class Measured:
    """What a pass over data found of the weights of now.

    Args:
        table: sums, squares and counts, ``(3, R, G)``.
        merit: the sum of merits: right decisions, or minus the losses.
        rows: how many examples.
        decisions: how many of each class or label; empty for numbers.
    """

    table: Tensor
    merit: float
    rows: float
    decisions: Tensor

    def __add__(self, other: "Measured") -> "Measured":
        return Measured(
            self.table + other.table,
            self.merit + other.merit,
            self.rows + other.rows,
            self.decisions + other.decisions,
        )

    @property
    def undecided(self) -> float:
        """The share of examples that are not decided as most are; 1 where nothing is decided."""
        return 1.0 - float((self.decisions / self.rows).max()) if len(self.decisions) else 1.0


def measure(
    trainer: pl.Trainer, module: pl.LightningModule, loaders: Iterable[Any], batches: int, mode: Constraint
) -> Measured | None:
    """Measures the weights of now on whatever these loaders hold, over all processes; None if they hold no groups."""
    step = outside(trainer, module, None)
    found: Measured | None = None
    precision = trainer.precision_plugin
    for loader in loaders:
        kept: list[tuple[Tensor, Tensor | None, Tensor]] = []  # logits, targets, groups: tabulated many at a time
        with _unmoved(loader), step.probe(), torch.no_grad(), precision.forward_context():
            for batch in islice(loader, batches):
                step.batch = trainer.strategy.batch_to_device(precision.convert_input(batch))
                if step.run.batch.find(step.batch, "group") is None:
                    return None
                target = step.target if step.run.batch.find(step.batch, "target") is not None else None
                kept.append((step.run.forward(step.inputs), target, step.group))
                if sum(len(logits) for logits, _, _ in kept) >= _AT_ONCE:
                    found = _with(found, _measured(step, mode, kept))
                    kept = []
            if kept:
                found = _with(found, _measured(step, mode, kept))
    if found is not None and trainer.world_size > 1:
        flat = torch.cat(
            [found.table.flatten(), torch.tensor([found.merit, found.rows], dtype=torch.float64), found.decisions]
        ).to(module.device)
        flat = torch.as_tensor(trainer.strategy.reduce(flat, reduce_op="sum")).cpu()
        n = found.table.numel()
        found = Measured(flat[:n].reshape(found.table.shape), float(flat[n]), float(flat[n + 1]), flat[n + 2 :])
    return found


def _with(found: Measured | None, more: Measured) -> Measured:
    return more if found is None else found + more


def _measured(step: Step, mode: Constraint, kept: Sequence[tuple[Tensor, Tensor | None, Tensor]]) -> Measured:
    logits = torch.cat([logits for logits, _, _ in kept])
    targets = [target for _, target, _ in kept if target is not None]
    target = torch.cat(targets) if targets else None
    members = mode.census.members(torch.cat([group for _, _, group in kept]))
    seen = Seen(step, mode.census, logits, target, members, torch.zeros(0))
    rates = table(mode.moments(seen, None), seen.members)
    if mode.numbers:
        assert target is not None
        return Measured(rates, -float(seen.losses().sum()), len(logits), torch.zeros(0, dtype=torch.float64))
    several = isinstance(target, Tensor) and target.dim() == 2 and target.shape[1] > 1
    decided = moments(logits, target if several else None, "demographic_parity").values.double()
    if decided.shape[1] == 1:
        decided = torch.cat([1 - decided, decided], 1)
    right = len(logits) if target is None else moments(logits, target, "accuracy_parity").values.mean(1).sum()
    return Measured(rates, float(right), len(logits), decided.sum(0).cpu() if not several else torch.zeros(0).double())
