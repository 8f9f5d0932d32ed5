"""MNIST: read like Fashion-MNIST from its own files, and never mistaken for it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_guard.data import FashionMNISTData, MNISTData
from lightning_guard.data.base import Arrays
from tests.data.test_fashion_mnist import write


def few() -> Arrays:
    """Twenty and ten images of noise."""
    generator = np.random.default_rng(0)
    arrays: Arrays = {}
    for part, rows in (("train", 20), ("test", 10)):
        arrays[f"{part}_images"] = generator.integers(0, 256, (rows, 28, 28)).astype(np.uint8)
        arrays[f"{part}_labels"] = (np.arange(rows) % 10).astype(np.uint8)
    return arrays


def test_batches_are_the_files(tmp_path: Path) -> None:
    arrays = few()
    data = MNISTData(data_dir=write(tmp_path, arrays), val_fraction=0.25, eval_batch_size=10)
    x, y = next(iter(data.test_dataloader()))
    assert torch.equal(x, torch.from_numpy(arrays["test_images"]).unsqueeze(1) / 255)
    assert torch.equal(y, torch.from_numpy(arrays["test_labels"]).long())
    assert (data.num_classes, data.bounds) == (10, (0.0, 1.0))
    assert data.class_names == tuple("0123456789")


def test_provenance_is_its_own(tmp_path: Path) -> None:
    folder = write(tmp_path, few())
    ours, theirs = (make(data_dir=folder, val_fraction=0.25).provenance() for make in (MNISTData, FashionMNISTData))
    assert ours["rows"] == {"train": 15, "val": 5, "test": 10}
    assert ours == theirs | {"name": "mnist", "license": "CC BY-SA 3.0"}


def test_without_a_folder_there_is_nothing(tmp_path: Path) -> None:
    data = MNISTData()
    for use in (data.read, data.train_dataloader, data.val_dataloader, data.test_dataloader, data.provenance):
        with pytest.raises(FileNotFoundError, match="data_dir=None names no folder, and MNIST is not in the package"):
            use()
    with pytest.raises(FileNotFoundError, match=r"lacks train-images-idx3-ubyte, .* as MNIST was published"):
        MNISTData(data_dir=str(tmp_path)).read()
