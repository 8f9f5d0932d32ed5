"""Builds the packaged data files from the published ones, the same bytes every time.

``python -m lightning_guard.data.build --fashion-mnist DIR --adult DIR --out DIR``
"""

import argparse
import hashlib
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lightning_guard.data import adult, fashion_mnist
from lightning_guard.data.base import Arrays, digest, read_files

MD5 = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    "adult.data": "5d7c39d7b8804f071cdd1f2a7c460872",
    "adult.test": "35238206dfdf7f1fe215bbb874adecdc",
}
"""Of the unpacked files: distributions compress them anew, so the hashes of the ``.gz`` differ."""


def published(folder: str, names: Mapping[str, str], option: str) -> dict[str, bytes]:
    """The contents of the published files of a folder.

    Raises:
        FileNotFoundError: The folder or a file is missing.
        ValueError: A file is not the published one.
    """
    files = read_files(folder, names.values(), option=option, remedy="docs/data.md says where to get them.")
    others = []
    for name, contents in files.items():
        md5 = hashlib.md5(contents, usedforsecurity=False).hexdigest()
        if md5 != MD5[name]:
            others.append(f"{name} (md5 {md5}, expected {MD5[name]})")
    if others:
        raise ValueError(f"{option}={folder!r} does not hold the published {', '.join(others)}")
    return files


def fashion_mnist_7k(full: Arrays) -> Arrays:
    """The first 600 training and 100 test images of each class, in their published order."""
    small: Arrays = {}
    for part, per_class in (("train", 600), ("test", 100)):
        labels = full[f"{part}_labels"]
        rows = np.sort(np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in range(10)]))
        small |= {f"{part}_images": full[f"{part}_images"][rows], f"{part}_labels": labels[rows]}
    return small


def adult_with_names(rows: Arrays) -> Arrays:
    """The rows, by column because that packs better, and the names that make the file readable on its own."""
    names = {f"categories_{column}": np.array(values) for column, values in adult.CATEGORIES.items()}
    names |= {"columns_numbers": np.array([*adult.NUMERIC]), "columns_codes": np.array([*adult.CATEGORIES])}
    return {name: np.asfortranarray(array) for name, array in rows.items()} | names


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes what ``np.savez_compressed`` would, without its clock and its platform."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy")  # which dates itself 1980-01-01
            entry.create_system = 3
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, buffer.getvalue(), compresslevel=9)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    about = "Builds the packaged data files from the published ones, the same bytes every time."
    parser = argparse.ArgumentParser(prog="python -m lightning_guard.data.build", description=about)
    folder: dict[str, Any] = {"metavar": "DIR", "required": True}
    parser.add_argument("--fashion-mnist", **folder, help="folder with the four idx files, .gz or not")
    parser.add_argument("--adult", **folder, help="folder with adult.data and adult.test, .gz or not")
    parser.add_argument("--out", **folder, type=Path, help="existing folder to write to")
    options = parser.parse_args(argv)
    try:
        images = fashion_mnist.parse(published(options.fashion_mnist, fashion_mnist.FILES, "--fashion-mnist"))
        people = adult.parse(published(options.adult, adult.FILES, "--adult"))
        if not options.out.is_dir():
            raise FileNotFoundError(f"--out={str(options.out)!r} is not a folder; create it first")
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    few = fashion_mnist_7k(images)
    for name, rows in (("fashion_mnist", images), ("fashion_mnist_7k", few), ("adult", people)):
        print(f"arrays of {name}: sha256 {digest(rows)}")
    sums = ""
    for file, arrays in (("adult.npz", adult_with_names(people)), ("fashion_mnist_7k.npz", few)):
        write_npz(options.out / file, arrays)
        sums += f"{hashlib.sha256((options.out / file).read_bytes()).hexdigest()}  {file}\n"
    (options.out / "SHA256SUMS").write_text(sums)
    print(sums, end="")


if __name__ == "__main__":
    main()
