"""Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017, https://arxiv.org/abs/1708.07747)."""

import struct
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lightning_guard.data.base import Arrays, Table, TableData, read_files, read_packaged

FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
"""The published files, by the array that each one holds."""

REMEDY = (
    "Point it at the folder of the four published Fashion-MNIST files (the Debian package "
    "dataset-fashion-mnist installs them), or leave it out to use the packaged 7,000 images."
)


class FashionMNISTData(TableData):
    """Grey images of clothes, 28 x 28, in ten classes.

    A batch is ``(x, y)``: ``x`` float32 of shape ``(N, 1, 28, 28)``, pixels divided by 255 and so in
    ``bounds``, and ``y`` int64 of shape ``(N,)``, an index into ``class_names``.

    Args:
        batch_size: Examples in a training batch.
        eval_batch_size: Examples in a batch of validation, test and prediction.
        data_dir: ``None`` for the packaged set, the first 600 training and 100 test images of each class; or
            a folder with the four published idx files (or ``.gz``), 60,000 + 10,000. Nothing is downloaded.
        val_fraction: Fraction of the training part held out for validation, the same images in every run.
        num_workers: Worker processes of the loaders. Reading from memory is faster without.

    Raises:
        FileNotFoundError: ``data_dir`` or one of its files does not exist.
        ValueError: An option is out of range, or a file is not what it should be.

    Example:
        >>> data = FashionMNISTData()
        >>> x, y = next(iter(data.test_dataloader()))
        >>> x.shape, y.dtype, len(data.train_set), len(data.val_set)
        (torch.Size([500, 1, 28, 28]), torch.int64, 5400, 600)
    """

    license = "MIT"
    bounds = (0.0, 1.0)
    num_classes = 10
    class_names = (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
        "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    )  # fmt: skip
    remedy = REMEDY

    def __init__(
        self,
        batch_size: int = 64,
        eval_batch_size: int = 500,
        data_dir: str | None = None,
        val_fraction: float = 0.1,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, data_dir, val_fraction, num_workers)

    @property
    def source(self) -> str:
        """``fashion_mnist_7k`` from the package, ``fashion_mnist`` from ``data_dir``."""
        return "fashion_mnist_7k" if self.data_dir is None else "fashion_mnist"

    def read(self) -> Arrays:
        """Images uint8 of shape ``(N, 28, 28)`` and labels uint8 of shape ``(N,)`` of both parts."""
        if self.data_dir is None:
            return self.packaged()
        return parse(read_files(self.data_dir, FILES.values(), option="data_dir", remedy=self.remedy))

    def packaged(self) -> Arrays:
        """The images that come with the package."""
        return read_packaged("fashion_mnist_7k.npz")

    def table(self, part: str) -> Table:
        """Kept as bytes, decoded by the batch: the full set takes 55 MB instead of 220."""
        images, labels = self.arrays[f"{part}_images"], self.arrays[f"{part}_labels"]
        return Table(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels).long(), decode=pixels)


def pixels(stored: Tensor) -> Tensor:
    """Bytes as float32 in [0, 1]."""
    return stored.float() / 255


def parse(files: Mapping[str, bytes]) -> Arrays:
    """The arrays of the four published files, given as ``{file name: contents}``.

    Raises:
        ValueError: A file does not hold 28 x 28 images or labels from 0 to 9, or their numbers differ.
    """
    arrays = {array: parse_idx(files[name], name) for array, name in FILES.items()}
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if images.shape != (len(labels), 28, 28) or labels.ndim != 1 or labels.max(initial=0) > 9:
            raise ValueError(
                f"{FILES[f'{part}_images']} and {FILES[f'{part}_labels']} hold shapes {images.shape} and "
                f"{labels.shape}; expected are (N, 28, 28) and (N,), with labels from 0 to 9"
            )
    return arrays


def parse_idx(contents: bytes, name: str) -> np.ndarray:
    """The array of an idx file of unsigned bytes.

    The format: two zero bytes, the type (8), the rank, then the sizes as big-endian int32, then the values.

    Raises:
        ValueError: The contents are something else, or cut short.
    """
    if contents[:3] != b"\x00\x00\x08" or len(contents) < 4 * (1 + contents[3]):
        raise ValueError(f"{name} is not an idx file of unsigned bytes")
    rank = contents[3]
    shape = struct.unpack_from(f">{rank}I", contents, 4)
    values = np.frombuffer(contents, np.uint8, offset=4 * (1 + rank))
    if values.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{name} announces {shape} values and holds {values.size}; the file is damaged")
    # A copy, because torch wants memory that it may write to.
    return values.reshape(shape).copy()
