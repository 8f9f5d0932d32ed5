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
from lightning_guard.functional.fairness import OF_NUMBERS, Census, census_of, joint, moments
from lightning_guard.guard import GuardConflict, Run, Step
from lightning_guard.parity.base import Seen
from lightning_guard.parity.constraint import Constraint
from lightning_guard.parity.running import table

_AT_ONCE = 8192  # rows that are tabulated together


@contextmanager
def _unmoved(loader: Any) -> Iterator[None]:
    """Whatever is drawn inside is drawn again by training."""
    within = getattr(loader, "batch_sampler", None)
    owners = [loader, getattr(loader, "sampler", None), within, getattr(within, "sampler", None)]
    generators = [g for g in (getattr(owner, "generator", None) for owner in owners) if isinstance(g, torch.Generator)]
    states = [g.get_state() for g in generators]
    held = getattr(loader, "_iterator", None)  # of persistent workers: the one iterator, which training goes on with
    if held is not None:
        loader._iterator = None
    try:
        with isolate_rng(include_cuda=False):
            yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        if held is not None:
            loader._iterator = held


def count(
    run: Run, intersections: bool, continuous: bool = False, sizes: Sequence[int] | None = None
) -> tuple[Census, Tensor]:
    """The groups of the training data, over all processes, and what numbers its targets are.

    Raises:
        GuardConflict: if the data have no end, no groups, or others than ``sizes`` tells of.
    """
    trainer = run.trainer
    loader, batches = trainer.train_dataloader, trainer.num_training_batches
    if isinstance(loader, list | tuple | dict):
        raise GuardConflict(
            "several training loaders give a batch of batches, in which no group is found; give one DataLoader of "
            "(x, y, group)"
        )
    if batches == float("inf"):
        raise GuardConflict(
            "the training data have no known end, so their groups cannot be counted before training; set "
            "limit_train_batches on the Trainer"
        )
    assert loader is not None
    census = Census(intersections)
    targets: list[Tensor] = []
    with _unmoved(loader):
        for raw in islice(loader, int(batches)):
            # As training will see it: a transfer hook may make the group.
            batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(raw))
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
    if sizes is not None:
        most = [max(values, default=0) + 1 for values in census.values]
        if len(most) != len(sizes) or any(found > size for found, size in zip(most, sizes, strict=True)):
            raise GuardConflict(
                f"groups={list(sizes)} does not fit the training data, whose attributes take up to {most} values; give "
                "the number of values of each, counted from 0"
            )
    return census, numbers


def count_privately(run: Run, query: str, sizes: Sequence[int], intersections: bool) -> Census:
    """The groups of private training data, as one noisy count by attributes and class tells them."""
    assert run.private is not None
    classes = 0

    def rows(step: Step) -> Tensor:
        nonlocal classes
        if not classes:  # the shape of the logits is public, the classes in the data are not
            with step.probe(), torch.no_grad(), run.trainer.precision_plugin.forward_context():
                logits = run.forward(step.inputs)
            classes = int(logits.shape[1]) if logits.dim() == 2 and logits.shape[1] > 1 else 2
        target = step.target if run.batch.find(step.batch, "target") is not None else None
        if isinstance(target, Tensor) and target.numel() != len(target):
            raise GuardConflict("several labels an example are not built under privacy; train on one of them")
        try:
            return joint(step.group, target if isinstance(target, Tensor) else None, sizes, classes)
        except ValueError as error:
            raise GuardConflict(str(error)) from None

    return census_of(run.private.once(query, rows), sizes, run.private.units, intersections)


@dataclass
class Measured:
    """What a pass over data found of the weights of now.

    Args:
        table: sums, squares and counts, ``(3, R, G)``.
        merit: the sum of merits: right decisions, or minus the losses.
        rows: how many examples.
        decisions: how many of each class; empty for labels and numbers.
        actual: how many are of each class; empty where it is not known.
    """

    table: Tensor
    merit: float
    rows: float
    decisions: Tensor
    actual: Tensor

    def __add__(self, other: "Measured") -> "Measured":
        return Measured(
            self.table + other.table,
            self.merit + other.merit,
            self.rows + other.rows,
            self.decisions + other.decisions,
            self.actual + other.actual,
        )

    @property
    def constant(self) -> bool:
        """Whether nearly everybody is decided alike, though not nearly everybody is alike."""
        if not len(self.decisions):
            return False
        least = 0.005
        if float(self.actual.sum()):
            least = min(least, 0.5 - 0.5 * float(self.actual.max() / self.actual.sum()))
        return 1.0 - float(self.decisions.max()) / self.rows <= least


def measure(
    trainer: pl.Trainer, module: pl.LightningModule, loaders: Iterable[tuple[Any, float]], mode: Constraint
) -> Measured | None:
    """Measures the weights of now on whatever these loaders hold, over all processes; None if they hold no groups."""
    step = outside(trainer, module, None)
    found: Measured | None = None
    precision = trainer.precision_plugin
    for loader, batches in loaders:
        if batches == float("inf"):
            raise GuardConflict("data without an end cannot be measured; set limit_val_batches on the Trainer")
        kept: list[tuple[Tensor, Tensor | None, Tensor]] = []  # logits, targets, groups: tabulated many at a time
        with _unmoved(loader), step.probe(), torch.no_grad(), precision.forward_context():
            for batch in islice(loader, int(batches)):
                step.batch = trainer.strategy.batch_to_device(precision.convert_input(batch))
                if step.run.batch.find(step.batch, "group") is None:
                    break  # this loader has none
                target = step.target if step.run.batch.find(step.batch, "target") is not None else None
                kept.append((step.run.forward(step.inputs), target, step.group))
                if sum(len(logits) for logits, _, _ in kept) >= _AT_ONCE:
                    found = _with(found, _measured(step, mode, kept))
                    kept = []
            if kept:
                found = _with(found, _measured(step, mode, kept))
    if trainer.world_size > 1:
        here = torch.tensor(float(found is not None), device=module.device)
        if float(torch.as_tensor(trainer.strategy.reduce(here, reduce_op="sum"))) < trainer.world_size:
            return None  # on every process, or one would wait for another
    if found is not None and trainer.world_size > 1:
        k, n = len(found.decisions), found.table.numel()
        sums = torch.tensor([found.merit, found.rows], dtype=torch.float64)
        flat = torch.cat([found.table.flatten(), found.decisions, found.actual, sums]).to(module.device)
        flat = torch.as_tensor(trainer.strategy.reduce(flat, reduce_op="sum")).cpu()
        rates, decisions, actual, (merit, rows) = flat.split([n, k, k, 2])
        found = Measured(rates.reshape(found.table.shape), float(merit), float(rows), decisions, actual)
    return found


def _with(found: Measured | None, more: Measured) -> Measured:
    return more if found is None else found + more


def _measured(step: Step, mode: Constraint, kept: Sequence[tuple[Tensor, Tensor | None, Tensor]]) -> Measured:
    logits = torch.cat([logits for logits, _, _ in kept])
    targets = [target for _, target, _ in kept if target is not None]
    target = torch.cat(targets) if targets else None
    if target is None and mode.notion not in ("demographic_parity", *OF_NUMBERS):
        raise GuardConflict(
            f"validation batches have a group and no target, without which {mode.notion} cannot be measured on them; "
            "give (x, y, group), or batches without the group"
        )
    members = mode.census.members(torch.cat([group for _, _, group in kept]))
    seen = Seen(step, mode.census, logits, target, members, torch.zeros(0))
    rates = table(mode.moments(seen, None), seen.members)
    none = torch.zeros(0, dtype=torch.float64)
    zero_one = target is None or not target.is_floating_point() or bool(((target == 0) | (target == 1)).all())
    if mode.numbers or not zero_one:
        return Measured(rates, -float(seen.losses().sum()), len(logits), none, none)
    several = target is not None and target.dim() == 2 and target.shape[1] > 1
    right = len(logits) if target is None else moments(logits, target, "accuracy_parity").values.mean(1).sum()
    if several:
        return Measured(rates, float(right), len(logits), none, none)
    decided = moments(logits, None, "demographic_parity").values.double()
    decided = torch.cat([1 - decided, decided], 1) if decided.shape[1] == 1 else decided
    actual = torch.zeros(decided.shape[1], dtype=torch.float64)
    if target is not None:
        flat = target.reshape(-1).long().cpu()
        actual = torch.bincount(flat[(flat >= 0) & (flat < len(actual))], minlength=len(actual)).double()
    return Measured(rates, float(right), len(logits), decided.sum(0).cpu(), actual)
