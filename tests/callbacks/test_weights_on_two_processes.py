"""Masks and clusters of two processes: equal to the bit, and those of one process on the union of their batches."""

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp

from lightning_guard.callbacks import WeightClustering
from tests.callbacks.test_magnitude_pruning import OPTIONS, Steady, pruning
from tests.toys import Rows, fit, loader

GUARDS = {
    **{name: lambda options=options: pruning(options) for name, options in OPTIONS.items()},
    "clustering": lambda: WeightClustering(4, start=2, end=6, every=2),
}


def work(rank: int, port: int, folder: str) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        WORLD_SIZE="2",
        NODE_RANK="0",
        LOCAL_RANK=str(rank),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    rows, found = Rows(), {}
    shares = torch.utils.data.DistributedSampler(rows, num_replicas=2, rank=rank, shuffle=False)
    for name, guard in GUARDS.items():
        data = torch.utils.data.DataLoader(rows, 8, sampler=shares)
        found[name] = fit([guard()], Steady, data, strategy="ddp", devices=2).state_dict()
        halves = torch.utils.data.DataLoader(rows, 4, sampler=shares)
        more = {"strategy": "ddp", "devices": 2, "accumulate_grad_batches": 2}
        found[f"{name}, accumulated"] = fit([guard()], Steady, halves, **more).state_dict()
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", GUARDS)
def test_two_processes_equal_one_on_the_union(ranks, name):
    one = fit([GUARDS[name]()], Steady, loader(batch_size=16, shuffle=False)).state_dict()
    for form in (name, f"{name}, accumulated"):
        for key, value in ranks[0][form].items():
            assert torch.equal(value, ranks[1][form][key])
            assert torch.equal(value == 0, one[key] == 0), form
            torch.testing.assert_close(value, one[key], rtol=1e-4, atol=1e-5)
