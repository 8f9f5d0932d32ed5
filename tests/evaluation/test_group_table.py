"""Counts that grow batch by batch and add up over processes; few imports, since each process repeats them."""

import socket

import pytest
import torch
import torch.multiprocessing as mp

from lightning_guard.evaluation import GroupTable
from lightning_guard.evaluation.table import TABLE_NOTIONS, gaps, tabulate


def rows(n: int = 200):
    """Groups, targets and predictions."""
    generator = torch.Generator().manual_seed(0)
    group, target = torch.arange(n) % 3, torch.arange(n) // 3 % 2
    return group, target, (torch.rand(n, generator=generator) < 0.3 + 0.2 * group * target).long()


@pytest.mark.parametrize("notion", TABLE_NOTIONS)
def test_a_streamed_table_is_the_table_of_all(notion):
    group, target, decision = rows()
    stream = GroupTable(3)
    for part in zip(group.split(17), target.split(17), decision.split(17), strict=True):
        stream.update(*part)
    stream.update(torch.tensor([-1, -7]), torch.tensor([1, 0]), torch.tensor([1, 1]))
    assert torch.equal(stream.counts, tabulate(group, target, decision, 3, 2))
    assert stream.unknown == 2
    assert torch.equal(stream.reduced().counts, stream.counts)  # there is one process
    assert stream.gap(notion) == pytest.approx(float(gaps(stream.counts, notion)))
    low, high = stream.interval(notion, replicates=500)
    assert low < stream.gap(notion) < high + 0.05
    assert stream.gap(notion, min_support=1000) is None
    assert stream.interval(notion, min_support=1000, replicates=10) is None


def test_a_table_counts_nothing_of_a_wrong_batch():
    table = GroupTable(2, 2)
    ok = torch.tensor([0, 1])
    for wrong in ((ok + 1, ok, ok), (ok, ok + 1, ok), (ok, ok, ok - 1), (ok, ok - 1, ok)):
        with pytest.raises(ValueError, match="outside the table's 2"):
            table.update(*wrong)
    assert table.counts.sum() == 0
    table.update(*(torch.zeros(0, dtype=torch.long),) * 3)
    assert table.gap("demographic_parity") is None
    for options in ({"groups": 0}, {"groups": 2, "classes": 1}):
        with pytest.raises(ValueError, match="leave nothing to count"):
            GroupTable(**options)


def work(rank: int, port: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    group, target, decision = rows()
    mine = slice(rank, None, 2)
    table = GroupTable(3)
    table.update(group[mine], target[mine], decision[mine])
    if rank:
        table.update(torch.tensor([-1]), torch.tensor([0]), torch.tensor([0]))
    once, twice = table.reduced(), table.reduced()
    torch.save([table.counts, once.counts, twice.counts, torch.tensor(once.unknown)], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_sum_to_the_table_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(tmp_path)), nprocs=2)
    whole = tabulate(*rows(), 3, 2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for own, once, twice, unknown in ranks:
        assert torch.equal(once, whole)
        assert torch.equal(twice, whole)
        assert 0 < own.sum() < whole.sum()
        assert unknown == 1
