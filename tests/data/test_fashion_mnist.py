"""Fashion-MNIST: what batches hold, and that both ways to the data agree."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_guard.data import FashionMNISTData
from lightning_guard.data.base import Arrays
from lightning_guard.data.fashion_mnist import FILES, parse_idx


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write(folder: Path, arrays: Arrays) -> str:
    for array, name in FILES.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(idx(arrays[array]), 1))
    return str(folder)


def test_batches() -> None:
    data = FashionMNISTData(batch_size=32)
    x, y = next(iter(data.train_dataloader()))
    assert (x.shape, x.dtype) == ((32, 1, 28, 28), torch.float32)
    assert (y.shape, y.dtype) == ((32,), torch.int64)
    everything = data.test_set.__getitems__(range(1_000)).columns
    assert (everything[0].min(), everything[0].max()) == data.bounds
    assert everything[1].bincount().tolist() == [100] * data.num_classes
    assert len(data.class_names) == data.num_classes


def test_published_files_give_the_packaged_data(tmp_path: Path) -> None:
    packaged = FashionMNISTData()
    raw = FashionMNISTData(data_dir=write(tmp_path, packaged.arrays))
    for part in ("train_set", "val_set", "test_set"):
        for ours, theirs in zip(getattr(packaged, part).columns, getattr(raw, part).columns, strict=True):
            assert torch.equal(ours, theirs)
    assert packaged.provenance() == raw.provenance() | {"name": "fashion_mnist_7k"}
    assert raw.provenance()["name"] == "fashion_mnist"
    assert raw.provenance()["rows"] == {"train": 5_400, "val": 600, "test": 1_000}


@pytest.mark.parametrize("damage", [b"", b"\x00\x00\x0d\x01", idx(np.zeros(5, np.uint8))[:-1]])
def test_damaged_files_are_named(damage: bytes) -> None:
    with pytest.raises(ValueError, match="labels"):
        parse_idx(damage, "labels")


@pytest.mark.parametrize(
    "wrong",
    [{"test_labels": np.zeros(9, np.uint8)}, {"test_labels": np.full(10, 10, np.uint8)},
     {"test_images": np.zeros((10, 32, 32), np.uint8)}],
)  # fmt: skip
def test_files_that_do_not_belong_together_are_refused(wrong: Arrays, tmp_path: Path) -> None:
    images, labels = np.zeros((10, 28, 28), np.uint8), np.zeros(10, np.uint8)
    right = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    with pytest.raises(ValueError, match="t10k-images"):
        FashionMNISTData(data_dir=write(tmp_path, right | wrong)).read()
