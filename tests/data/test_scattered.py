"""Features in place of images: the same rows, labels and names, computed once, and nothing else is moved."""

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_guard.data import AdultData, FashionMNISTData, MNISTData, ScatteredData, scattered
from lightning_guard.data.base import Arrays
from lightning_guard.models import ScatteringClassifier
from tests.data.test_fashion_mnist import write


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Some of the packaged images."""
    arrays: Arrays = FashionMNISTData().arrays
    return write(tmp_path, {name: array[:40] for name, array in arrays.items()})


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    scattered._kept.clear()
    yield
    scattered._kept.clear()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images were transformed, call by call."""
    calls: list[int] = []
    ours = ScatteringClassifier.features

    def features(self: ScatteringClassifier, images: torch.Tensor, *args: Any) -> torch.Tensor:
        calls.append(len(images))
        return ours(self, images, *args)

    monkeypatch.setattr(ScatteringClassifier, "features", features)
    return calls


def test_batches_are_the_features_of_the_same_images(folder: str) -> None:
    images = FashionMNISTData(data_dir=folder, val_fraction=0.25, batch_size=7, eval_batch_size=6)
    data, net = ScatteredData(images), ScatteringClassifier()
    for part in ("train_set", "val_set", "test_set"):
        ours, theirs = getattr(data, part), getattr(images, part)
        x, y = ours.__getitems__(range(len(ours))).columns
        pixels, labels = theirs.__getitems__(range(len(theirs))).columns
        assert (x.shape, x.dtype) == ((len(theirs), net.in_features), torch.float32)
        assert torch.equal(x, net.features(pixels).float())
        assert torch.equal(y, labels)
        assert torch.equal(ours[3][0], x[3])
    assert [len(x) for x, _ in data.val_dataloader()] == [6, 4]
    torch.manual_seed(0)
    ours = torch.cat([y for _, y in data.train_dataloader()])
    torch.manual_seed(0)
    assert torch.equal(ours, torch.cat([y for _, y in images.train_dataloader()]))


def test_half_precision_costs_the_features_no_accuracy() -> None:
    images = FashionMNISTData().test_set.__getitems__(range(200)).columns[0]
    net = ScatteringClassifier()
    torch.nn.init.normal_(net.head.weight, std=100.0, generator=torch.Generator().manual_seed(0))
    exact, stored = net(images), net(net.features(images))
    assert (exact - stored).norm() < 1e-3 * exact.norm()
    assert torch.equal(exact.argmax(1), stored.argmax(1))


def test_it_says_of_itself_what_the_images_do(folder: str) -> None:
    images = FashionMNISTData(data_dir=folder, val_fraction=0.25, batch_size=7)
    data = ScatteredData(images)
    assert data.provenance() == images.provenance()
    assert (data.batch_size, data.eval_batch_size, data.val_fraction) == (7, 500, 0.25)
    assert (data.class_names, data.num_classes, data.license) == (images.class_names, 10, "MIT")
    assert not hasattr(data, "bounds")  # of pixels, and an attack on features would mean nothing
    assert not hasattr(data, "group_names")


def test_features_are_computed_once_for_all_instances(folder: str, counted: list[int]) -> None:
    for _ in range(3):
        data = ScatteredData(FashionMNISTData(data_dir=folder, val_fraction=0.25))
        assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (30, 10, 40)
    assert counted == [40, 40]
    assert len(ScatteredData(FashionMNISTData(data_dir=folder), scales=1).train_set[0][0]) == 9 * 14 * 14
    assert counted == [40, 40, 40]
    assert len(scattered._kept) == 2  # other features took the place of the oldest


def test_nothing_is_copied_without_a_validation_set(folder: str) -> None:
    data = ScatteredData(FashionMNISTData(data_dir=folder, val_fraction=0))
    (features,) = [data.train_set.columns[0]]
    assert features.dtype == torch.float16
    assert features.data_ptr() == next(iter(scattered._kept.values())).data_ptr()
    assert data.val_dataloader() == []


def test_random_numbers_of_the_run_stay_where_they_are(folder: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert len(ScatteredData(FashionMNISTData(data_dir=folder)).train_set)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_folder_reaches_the_images(folder: str) -> None:
    images = MNISTData(val_fraction=0)
    data = ScatteredData(images, data_dir=folder)
    assert (len(data.train_set), data.source, data.data_dir) == (40, "mnist", folder)
    assert images.data_dir is None  # what was given is not changed
    assert ScatteredData(MNISTData(data_dir=folder), data_dir=folder).data_dir == folder
    with pytest.raises(ValueError, match="data_dir='elsewhere' is not that of data, "):
        ScatteredData(MNISTData(data_dir=folder), data_dir="elsewhere")


def test_what_is_no_image_is_refused(folder: str) -> None:
    with pytest.raises(ValueError, match=r"data=AdultData has inputs of shape \(104,\), no square images"):
        _ = ScatteredData(AdultData()).train_set
    with pytest.raises(ValueError, match="image_size=28 must be a multiple of 2\\^scales=8"):
        _ = ScatteredData(FashionMNISTData(data_dir=folder), scales=3).train_set


def test_workers_and_copies_get_the_table(folder: str) -> None:
    data = ScatteredData(FashionMNISTData(data_dir=folder, num_workers=1, eval_batch_size=8))
    table = pickle.loads(pickle.dumps(data.test_set))  # noqa: S301
    batches = [x for x, _ in data.test_dataloader()]
    assert torch.equal(torch.cat(batches), table.__getitems__(range(40)).columns[0])


@pytest.mark.parametrize(("terminal", "lines"), [(False, 1), (True, 2)])
def test_progress_is_told(folder: str, terminal: bool, lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    monkeypatch.setattr(said, "isatty", lambda: terminal)
    monkeypatch.setattr("sys.stderr", said)
    assert len(ScatteredData(FashionMNISTData(data_dir=folder)).test_set)
    told = said.getvalue()
    assert told.strip("\r\n").split("\r")[-1] == "scattering 40 images of fashion_mnist, once: 100%"
    assert told.count("scattering") == lines
    assert told.endswith("%\n")


def test_a_model_learns_from_features_as_from_images(folder: str) -> None:
    """One step of SGD on features and on images moves the same weights."""
    weights = []
    images = FashionMNISTData(data_dir=folder, val_fraction=0, batch_size=40)
    for data in (images, ScatteredData(images)):
        net = ScatteringClassifier(lr=10.0)
        x, y = data.train_set.__getitems__(range(40)).columns
        net.loss(net(x), y).backward()
        net.configure_optimizers().step()
        weights.append(net.head.weight.detach().numpy())
    np.testing.assert_allclose(weights[0], weights[1], atol=1e-3)
