"""Whom a loader's rows are about, which loaders are refused, and that nothing else of a loader changes."""

from collections import UserDict

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_guard.functional.privacy import Draws, Joined, dealt, population, refilled


class People(Dataset):
    """Six rows of three people; ``who`` in several types."""

    def __init__(self, who=("a", "b", "a", "c", "b", "a")):
        self.who, self.column_names = who, ["who"]

    def __len__(self):
        return 6

    def __getitem__(self, row):
        return self.who if row == "who" else torch.tensor(float(row))


class Table(UserDict):
    """Columns by name, as of a Hugging Face dataset."""

    column_names = ("person",)

    def __len__(self):
        return len(self.data["person"])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(6))


class Own(DataLoader):
    def __iter__(self):
        return iter([])


ROWS = TensorDataset(torch.arange(6.0))
PLAIN = DataLoader(ROWS, 2)


@pytest.mark.parametrize(
    "loader",
    [PLAIN, DataLoader(ROWS, 2, shuffle=True), DataLoader(ROWS, 4, drop_last=True), DataLoader([1, 2, 3, 4, 5, 6])],
)
def test_rows(loader):
    assert population(loader) == 6


REFUSED = {
    "a list": ([1, 2], "come from a list"),
    "an own loader": (Own(ROWS), "come from a Own"),
    "a stream": (DataLoader(Stream()), "Stream is a stream"),
    "own batches": (DataLoader(ROWS, batch_sampler=[[0, 1]]), "batch sampler of its own"),
    "kept batches": (DataLoader(ROWS, batch_size=None), "batch sampler of its own"),
    "weights": (DataLoader(ROWS, sampler=WeightedRandomSampler([1.0] * 6, 6)), "WeightedRandomSampler"),
    "repetitions": (DataLoader(ROWS, sampler=RandomSampler(ROWS, replacement=True)), "RandomSampler"),
    "fewer": (DataLoader(ROWS, sampler=RandomSampler(ROWS, num_samples=3)), "RandomSampler"),
    "own order": (DataLoader(ROWS, sampler=[0, 0, 1]), "has a list"),
    "own kind of batches": (
        DataLoader(ROWS, batch_sampler=type("B", (BatchSampler,), {})(SequentialSampler(ROWS), 2, False)),
        "batch sampler of its own",
    ),
    "nothing": (DataLoader([]), "are empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    loader, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        population(loader)


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, lambda who: [torch.tensor(p) for p in who]])
def test_people(kind):
    who = [4, 7, 4, 1, 7, 4]
    wanted = [[0, 2, 5], [1, 4], [3]]
    assert population(DataLoader(People(kind(who))), "who") == wanted
    assert population(PLAIN, kind(who)) == wanted
    part = Subset(Subset(People(kind(who)), [5, 4, 3, 2]), [0, 1, 3])
    assert population(DataLoader(part), "who") == [[0, 2], [1]]


def test_people_by_a_name_in_the_table():
    assert population(DataLoader(Table(person=["x", "y", "x"])), "person") == [[0, 2], [1]]


@pytest.mark.parametrize("dataset", [Table(person=["x", "y", "x"]), ROWS, Subset(ROWS, [0, 1]), People()])
def test_people_without_a_name(dataset):
    with pytest.raises(ValueError, match="users='nobody' is neither"):
        population(DataLoader(dataset), "nobody")


def test_people_of_other_rows():
    with pytest.raises(ValueError, match="users names 2 people's rows, and the training data have 6"):
        population(PLAIN, ["a", "b"])


def test_dealt_changes_the_batches_alone():
    def collate(rows):
        return torch.stack([row for (row,) in rows]) * 2

    loader = DataLoader(ROWS, 2, shuffle=True, collate_fn=collate, timeout=0, drop_last=True)
    draws = Draws(6, 1.0, 3, secret=1)
    other = dealt(loader, draws)
    assert other.batch_sampler is draws
    assert other.dataset is loader.dataset
    for name in ("collate_fn", "num_workers", "pin_memory", "timeout", "worker_init_fn", "generator"):
        assert getattr(other, name) is getattr(loader, name)
    assert [sorted(batch.tolist()) for batch in other] == [[0, 2, 4, 6, 8, 10]] * 3


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("size", range(1, 6))
@pytest.mark.parametrize("rows", range(1, 14))
def test_a_single_row_joins_the_batch_before_it(rows, size, drop_last):
    plain = list(BatchSampler(range(rows), size, drop_last))
    joined = Joined(range(rows), size, drop_last)
    batches = list(joined)
    assert len(joined) == len(batches)
    lone = size > 1 and len(plain) > 1 and len(plain[-1]) == 1
    assert joined.joins == lone
    assert batches == ([*plain[:-2], plain[-2] + plain[-1]] if lone else plain)


@pytest.mark.parametrize("shuffle", [False, True])
def test_refilled_is_the_same_loader_over_other_rows(shuffle):
    for rows, drop_last in ((7, False), (7, True), (8, False), (9, False), (10, False)):
        loader = DataLoader(ROWS, 4, shuffle=shuffle, drop_last=drop_last)
        other = refilled(loader, TensorDataset(torch.arange(float(rows))))
        assert population(other) == rows
        sizes = [len(batch) for (batch,) in other]
        wanted = {(7, False): [4, 3], (7, True): [4], (8, False): [4, 4], (9, False): [4, 5], (10, False): [4, 4, 2]}
        assert sizes == wanted[rows, drop_last]
        assert len(other) == len(sizes)
        assert other.batch_sampler.batch_size == 4
        epochs = [torch.cat([batch for (batch,) in other]) for _ in range(3)]
        assert all(len(set(epoch.tolist())) == sum(sizes) for epoch in epochs)
        assert all(torch.equal(epoch, epochs[0]) for epoch in epochs) != shuffle
        again = refilled(other, ROWS)  # what was joined is a loader like any other
        assert [len(batch) for (batch,) in again] == ([4] if drop_last else [4, 2])
