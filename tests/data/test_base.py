"""A table behaves as a list of examples would, only faster."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, RandomSampler, Subset, default_collate

from lightning_guard.data import AdultData, FashionMNISTData
from lightning_guard.data.base import Rows, Table, TableData, collate, read_files


def bytes_to_unit(x: torch.Tensor) -> torch.Tensor:
    return x.float() / 255


@pytest.fixture
def table() -> Table:
    x = torch.arange(40, dtype=torch.uint8).reshape(10, 4)
    return Table(x, torch.arange(10), decode=bytes_to_unit)


def test_a_batch_is_the_collated_rows(table: Table) -> None:
    rows = table.__getitems__([3, 1, 4])
    assert isinstance(rows, Rows)
    assert len(rows) == 3
    one_by_one = default_collate([table[i] for i in (3, 1, 4)])
    for batch in (collate(rows), default_collate(list(rows))):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(batch, one_by_one, strict=True))


def test_an_empty_batch_keeps_shapes_and_types(table: Table) -> None:
    x, y = collate(table.__getitems__([]))
    assert (x.shape, x.dtype) == ((0, 4), torch.float32)
    assert (y.shape, y.dtype) == ((0,), torch.int64)


@pytest.mark.parametrize("workers", [0, 2])
def test_datasets_around_a_table_load_alike(table: Table, workers: int) -> None:
    around = (
        table,
        Subset(table, range(10)),
        ConcatDataset([table.take(torch.arange(5)), Subset(table, range(5, 10))]),
    )
    for dataset in around:
        loader = DataLoader(dataset, batch_size=4, collate_fn=collate, num_workers=workers)
        assert torch.equal(torch.cat([x for x, _ in loader]), bytes_to_unit(table.columns[0]))


def test_columns_must_be_equally_long() -> None:
    with pytest.raises(ValueError, match=r"\[3, 2\]"):
        Table(torch.zeros(3), torch.zeros(2))


@pytest.mark.parametrize("make", [FashionMNISTData, AdultData])
def test_split_is_fixed_disjoint_and_free_of_global_state(make: type[TableData]) -> None:
    torch.manual_seed(1)
    first = make(val_fraction=0.2)
    before = torch.get_rng_state()
    train, val = first.train_set.columns[0], first.val_set.columns[0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = make(val_fraction=0.2)
    assert torch.equal(again.val_set.columns[0], val)
    assert torch.equal(again.train_set.columns[0], train)
    whole = make(val_fraction=0).train_set.columns[0]
    assert len(val) == int(0.2 * len(whole))
    # Every row is in one of both, as often as in the whole.
    assert torch.equal((train.double().sum(0) + val.double().sum(0)).float(), whole.double().sum(0).float())
    assert len(train) + len(val) == len(whole)


def test_training_shuffles_by_the_global_generator_and_the_rest_stands_still() -> None:
    data = FashionMNISTData(batch_size=100)
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, RandomSampler)
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        orders.append(torch.cat([y for _, y in loader]))
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert torch.equal(torch.cat([y for _, y in data.val_dataloader()]), data.val_set.columns[1])
    assert torch.equal(torch.cat([y for _, y in data.test_dataloader()]), data.test_set.columns[1])


def test_no_validation_set_means_no_loader() -> None:
    data = FashionMNISTData(val_fraction=0)
    assert data.val_dataloader() == []
    assert len(data.train_set) == 6_000


def test_wrong_options_are_named_at_once() -> None:
    says = r"batch_size=0 .*; num_workers=-1 .*; val_fraction=1.0 must lie in \[0, 1\)"
    with pytest.raises(ValueError, match=says):
        FashionMNISTData(batch_size=0, num_workers=-1, val_fraction=1.0)


@pytest.mark.parametrize("make", [FashionMNISTData, AdultData])
def test_missing_files_are_named_with_the_remedy(make: type[TableData], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"='.*nowhere' is not a folder. Point it at .* packaged"):
        _ = make(data_dir=str(tmp_path / "nowhere")).train_set
    with pytest.raises(FileNotFoundError, match=r"data_dir='.*' lacks .*, .* \(.gz or not\). Point it at"):
        _ = make(data_dir=str(tmp_path)).train_set


def test_plain_files_are_read_before_packed_ones(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"plain")
    (tmp_path / "a.gz").write_bytes(b"never opened")
    assert read_files(tmp_path, ["a"], option="data_dir", remedy="") == {"a": b"plain"}
