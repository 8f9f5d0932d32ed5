"""The packaged files are what the build makes of the published ones, and the build takes no others."""

import gzip
import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest

import lightning_guard.data
from lightning_guard.data import AdultData, FashionMNISTData, adult, build
from lightning_guard.data.base import digest

PACKAGE = Path(lightning_guard.data.__file__).parent

# Of the arrays, however they are compressed; docs/data.md prints the same.
DIGESTS = {
    "adult.npz": "684ddb17640362aff4528526f788c0049173c30de6df024e263428a42c35fc61",
    "fashion_mnist_7k.npz": "62fc85aed1b09dfdba8c31c4c5a9dbd6ffeb570418dd38f4ce3f5d8ae40aa66e",
}


def test_packaged_files_have_the_published_hashes() -> None:
    lines = (PACKAGE / "SHA256SUMS").read_text().splitlines()
    listed = {name: sha256 for sha256, name in (line.split() for line in lines)}
    assert listed == {name: hashlib.sha256((PACKAGE / name).read_bytes()).hexdigest() for name in DIGESTS}


def test_packaged_arrays_have_the_published_digests() -> None:
    assert digest(AdultData().arrays) == DIGESTS["adult.npz"]
    assert digest(FashionMNISTData().arrays) == DIGESTS["fashion_mnist_7k.npz"]


@pytest.mark.parametrize("name", DIGESTS)
def test_packaged_files_carry_no_clock_and_no_pickle(name: str) -> None:
    with zipfile.ZipFile(PACKAGE / name) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    with np.load(PACKAGE / name, allow_pickle=False) as arrays:
        assert all(arrays[key].dtype.kind in "iuU" for key in arrays.files)


def test_both_licences_are_beside_the_files() -> None:
    assert "Zalando SE" in (PACKAGE / "LICENSE-fashion-mnist.txt").read_text()
    assert "CC BY 4.0" in (PACKAGE / "LICENSE-adult.txt").read_text()


def test_adult_file_names_its_own_categories() -> None:
    with np.load(PACKAGE / "adult.npz", allow_pickle=False) as arrays:
        assert tuple(arrays["columns_numbers"]) == tuple(adult.NUMERIC)
        assert tuple(arrays["columns_codes"]) == tuple(adult.CATEGORIES)
        assert all(tuple(arrays[f"categories_{name}"]) == values for name, values in adult.CATEGORIES.items())


def test_subset_takes_the_first_of_each_class_in_their_order() -> None:
    labels = np.random.default_rng(0).integers(0, 10, 8_000).astype(np.uint8)
    serial = np.arange(8_000, dtype=np.int32)
    few = build.fashion_mnist_7k(
        {"train_images": serial, "train_labels": labels, "test_images": serial, "test_labels": labels}
    )
    rows = few["train_images"]
    assert (np.diff(rows) > 0).all()
    assert (labels[rows] == few["train_labels"]).all()
    for label in range(10):
        assert rows[few["train_labels"] == label].tolist() == serial[labels == label][:600].tolist()
    assert np.bincount(few["test_labels"]).tolist() == [100] * 10


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    arrays = build.adult_with_names({"train_numbers": np.arange(8).reshape(2, 4)})
    for name in ("one.npz", "two.npz"):
        build.write_npz(tmp_path / name, arrays)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    with np.load(tmp_path / "one.npz", allow_pickle=False) as written:
        assert written["train_numbers"].tolist() == arrays["train_numbers"].tolist()


def test_build_refuses_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in build.MD5:
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(b"not that"))
    folder = str(tmp_path)
    with pytest.raises(SystemExit):
        build.main(["--fashion-mnist", folder, "--adult", folder, "--out", folder])
    assert "does not hold the published train-images-idx3-ubyte (md5" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.npz"))


def test_build_names_every_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--adult='.*' lacks adult.data, adult.test.*docs/data.md"):
        build.published(str(tmp_path), adult.FILES, "--adult")
