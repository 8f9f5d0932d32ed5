"""What a user's data loader draws from, and the same loader drawing by a plan."""

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_guard.functional.privacy.sampling import Draws


def population(loader: Any, users: str | Sequence[Any] | None = None) -> int | list[list[int]]:
    """Whom the loader's data are about: the number of rows, or the rows of each person.

    Args:
        loader: as the user made it.
        users: the column that names the person of a row (an attribute or key of the dataset), or one name a row.

    Raises:
        ValueError: if the loader does not draw whole rows of a map-style dataset, each once an epoch, or there is no
            such column.
    """
    kind = type(loader).__name__
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        raise ValueError(f"the training data come from a {kind}; give a DataLoader over a map-style dataset")
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            f"{type(loader.dataset).__name__} is a stream, from which no row can be drawn independently; "
            "give a map-style dataset with __len__ and __getitem__"
        )
    if type(loader.batch_sampler) not in (BatchSampler, Joined):
        raise ValueError(
            "the DataLoader has a batch sampler of its own (or batch_size=None), which would be replaced; leave the "
            "choice of rows to the plan: give batch_size, and shuffle or not"
        )
    sampler, rows = loader.sampler, len(loader.dataset)  # type: ignore[arg-type]
    plain = isinstance(sampler, SequentialSampler | DistributedSampler) or (
        type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == rows
    )
    if not plain:
        raise ValueError(
            f"the DataLoader has a {type(sampler).__name__}, whose choice of rows would be lost; for some of the rows "
            "use torch.utils.data.Subset, and for weights or repetitions there is no privacy accounting"
        )
    if not rows:
        raise ValueError("the training data are empty")
    if users is None:
        return rows
    column = _column(loader.dataset, users) if isinstance(users, str) else users
    if len(column) != rows:
        raise ValueError(f"users names {len(column)} people's rows, and the training data have {rows}; give one a row")
    found: dict[Any, list[int]] = {}
    for row, person in enumerate(column.tolist() if isinstance(column, Tensor) else column):
        person = person.item() if isinstance(person, Tensor) else person  # tensors equal nobody but themselves
        if person != person:
            raise ValueError(f"users names nobody (NaN) for row {row}; give every row a person, or leave the row out")
        found.setdefault(person, []).append(row)
    return list(found.values())


def together(loader: DataLoader, hooks: Sequence[Callable[[Any], Any]] = ()) -> None:
    """Check that what makes a batch of rows keeps each row to itself and in its place.

    Args:
        loader: whose collate function is tried on a few rows of its data set.
        hooks: what is done to the batch afterwards.

    Raises:
        ValueError: if a row changes with another, or its place, or is left out or multiplied.
    """
    dataset: Any = loader.dataset
    count = min(4, len(dataset))
    if count < 2:
        return
    fetched = getattr(dataset, "__getitems__", None)
    rows = fetched(list(range(count))) if fetched is not None else [dataset[i] for i in range(count)]
    if not isinstance(rows, list):
        return  # a batch already, made by the data set of the rows that were asked for

    def made(order: Sequence[int]) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            state, drawn = random.getstate(), np.random.get_state()
            try:
                random.seed(0)
                np.random.seed(0)
                batch = loader.collate_fn([copy.deepcopy(rows[i]) for i in order])
                for hook in hooks:
                    batch = hook(batch)
                return batch
            finally:
                random.setstate(state)
                np.random.set_state(drawn)

    together = list(_tensors(made(range(count))))
    for i in range(count):
        alone = list(_tensors(made([i] * count)))  # beside nobody but itself
        for one, other in zip(together, alone, strict=True):
            if not (one.dim() and one.shape[:1] == other.shape[:1] == (count,)):
                continue
            part = tuple(slice(min(sizes)) for sizes in zip(one[i].shape, other[i].shape, strict=True))  # padding
            if not torch.allclose(one[i][part].double(), other[i][part].double(), equal_nan=True):
                raise ValueError(
                    "the collate function (or a hook on the batch) changes a row with the rows beside it or moves it, "
                    "so rows are not bounded one by one; do it to single rows, in the data set"
                )


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _tensors(value)


def _column(dataset: Any, name: str) -> Any:
    if isinstance(dataset, torch.utils.data.Subset):
        column = _column(dataset.dataset, name)
        return [column[i] for i in dataset.indices]
    if hasattr(dataset, name):
        return getattr(dataset, name)
    if name in (dataset if isinstance(dataset, Mapping) else getattr(dataset, "column_names", ())):
        return dataset[name]
    raise ValueError(
        f"users={name!r} is neither an attribute nor a column of {type(dataset).__name__}; give its name, or a "
        "sequence with one person a row"
    )


def dealt(loader: DataLoader, draws: Draws) -> DataLoader:
    """The loader with other batches, and otherwise as it was."""
    return DataLoader(loader.dataset, batch_sampler=draws, **_options(loader))


def everyone(loader: DataLoader, at_once: int) -> DataLoader:
    """The loader over every row once, in their order, and otherwise as it was."""
    options = _options(loader) | {"persistent_workers": False}
    return DataLoader(loader.dataset, at_once, shuffle=False, **options)


def refilled(loader: DataLoader, dataset: Dataset) -> DataLoader:
    """The loader over other rows, each once an epoch in an order of the same kind, and otherwise as it was.

    A last batch of a single row, which comes by chance where the number of rows does, joins the one before it.

    Args:
        loader: one that :func:`population` does not refuse.
        dataset: the rows.
    """
    sampler: Any = loader.sampler
    batches: Any = loader.batch_sampler
    if isinstance(sampler, DistributedSampler):
        sampler = DistributedSampler(
            dataset, sampler.num_replicas, sampler.rank, sampler.shuffle, sampler.seed, sampler.drop_last
        )
    elif isinstance(sampler, RandomSampler):
        sampler = RandomSampler(dataset, generator=sampler.generator)  # type: ignore[arg-type]
    else:
        sampler = SequentialSampler(dataset)  # type: ignore[arg-type]
    joined = Joined(sampler, batches.batch_size, batches.drop_last)
    if joined.joins:
        return DataLoader(dataset, batch_sampler=joined, **_options(loader))
    return DataLoader(dataset, batches.batch_size, sampler=sampler, drop_last=batches.drop_last, **_options(loader))


class Joined(BatchSampler):
    """Batches of rows, of which a last one of a single row joins the one before it: BatchNorm cannot train on one row.

    | case                                     | result                              |
    |------------------------------------------|-------------------------------------|
    | ``drop_last``, or more than one row over | as they are                         |
    | ``batch_size=1``                         | as they are: single rows are meant  |
    | one row altogether                       | a batch of it                       |

    Example:
        >>> list(Joined(range(5), batch_size=2, drop_last=False))
        [[0, 1], [2, 3, 4]]
    """

    @property
    def joins(self) -> bool:
        """Whether a row is left over."""
        rows = len(self.sampler)  # type: ignore[arg-type]
        return not self.drop_last and rows > self.batch_size > 1 and rows % self.batch_size == 1

    def __len__(self) -> int:
        return super().__len__() - self.joins

    def __iter__(self) -> Iterator[list[int]]:
        batches, last = super().__iter__(), len(self) - 1
        for i, batch in enumerate(batches):
            yield [*batch, *next(batches)] if i == last and self.joins else batch


def _options(loader: DataLoader) -> dict[str, Any]:
    return {
        name: getattr(loader, name)
        for name in (
            "collate_fn", "generator", "multiprocessing_context", "num_workers", "persistent_workers", "pin_memory",
            "pin_memory_device", "prefetch_factor", "timeout", "worker_init_fn",
        )
    }  # fmt: skip
