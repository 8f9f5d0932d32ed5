"""Scattering features in place of images, computed once instead of in every epoch."""

import sys
from collections import OrderedDict
from copy import copy
from functools import cached_property
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from lightning_guard.data.base import Arrays, Table, TableData, digest
from lightning_guard.models.scattering import ScatteringClassifier

_AT_ONCE = 1024  # images between two words about the progress
_KEPT = 2  # both parts of the data set that was used last
_kept: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()


class ScatteredData(TableData):
    """Another data module whose images are replaced by what :class:`ScatteringClassifier` makes of them.

    A batch is that of ``data``, with ``x`` float32 of shape ``(N, in_features)``, rows of norm one, instead of the
    images. The features are fixed: no statistic of the data enters, each image is transformed for itself, so that a
    privacy guarantee of the training leaves nothing out. Split, labels, batch sizes, names and provenance are those
    of ``data``.

    The features of a part are computed on its first use, in about a millisecond an image and core, and kept as
    float16: 8 kB for an image of 28 x 28, 476 MB for 60,000. They serve every instance of the process, until other
    images are scattered; the runs of a comparison compute them once.

    Args:
        data: Square images in [0, 1], for example :class:`MNISTData` or :class:`FashionMNISTData`.
        data_dir: Given to ``data``, if it has none of its own; what ``--data-dir`` of the command line sets.
        scales: Number of octaves of the wavelets, as in the model.
        angles: Number of orientations of the wavelets in half a turn, as in the model.

    Raises:
        ValueError: ``data_dir`` differs from that of ``data``; or, on first use, ``data`` holds no square images
            whose size is a multiple of ``2^scales`` above it.

    Example:
        >>> from lightning_guard.data import FashionMNISTData
        >>> data = ScatteredData(FashionMNISTData(batch_size=512))
        >>> data.batch_size, data.source, data.class_names[0]
        (512, 'fashion_mnist_7k', 'T-shirt/top')
    """

    def __init__(self, data: TableData, data_dir: str | None = None, scales: int = 2, angles: int = 8) -> None:
        if data_dir not in (None, data.data_dir):
            if data.data_dir is not None:
                raise ValueError(f"data_dir={data_dir!r} is not that of data, {data.data_dir!r}; give one of them")
            data = copy(data)
            data.data_dir = data_dir
        super().__init__(data.batch_size, data.eval_batch_size, data.data_dir, data.val_fraction, data.num_workers)
        self.data, self.scales, self.angles = data, scales, angles

    def __getattr__(self, name: str) -> Any:
        """Names of classes and groups and whatever else ``data`` says of itself."""
        if name.startswith("_") or name in ("data", "bounds", "continuous"):  # the last two speak of images
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        return getattr(self.data, name)

    @property
    def source(self) -> str:
        """That of ``data``."""
        return self.data.source

    def read(self) -> Arrays:
        """The arrays of ``data``: what was published, and not the features."""
        return self.data.arrays

    def table(self, part: str) -> Table:
        """The table of ``data`` with features for images, float16 until they are in a batch."""
        images = self.data.table(part)
        return Table(self._features(part, images), *images.columns[1:], decode=widened)

    def _features(self, part: str, images: Table) -> Tensor:
        key = (self._digest, part, self.scales, self.angles)
        if key not in _kept:
            while len(_kept) >= _KEPT:
                _kept.popitem(last=False)
            _kept[key] = self._scattered(images)
        _kept.move_to_end(key)
        return _kept[key]

    @cached_property
    def _digest(self) -> str:
        return digest(self.arrays)

    @torch.no_grad()
    def _scattered(self, images: Table) -> Tensor:
        shape = images[0][0].shape
        if len(shape) != 3 or shape[1] != shape[2]:
            raise ValueError(f"data={type(self.data).__name__} has inputs of shape {tuple(shape)}, no square images")
        with torch.random.fork_rng(devices=[]):  # the linear layer, which is not used, draws its weights
            net = ScatteringClassifier(
                in_channels=shape[0], image_size=shape[1], scales=self.scales, angles=self.angles
            )
        features = torch.empty(len(images), net.in_features, dtype=torch.float16)
        for start in range(0, len(images), _AT_ONCE):
            _tell(f"scattering {len(images):,} images of {self.source}, once: {start / len(images):4.0%}")
            rows = range(start, min(start + _AT_ONCE, len(images)))
            features[rows.start : rows.stop] = net.features(images.__getitems__(rows).columns[0])
        _tell(f"scattering {len(images):,} images of {self.source}, once: 100%", end=True)
        return features


def widened(stored: Tensor) -> Tensor:
    """float16 as float32, which layers want."""
    return stored.float()


@rank_zero_only
def _tell(line: str, end: bool = False) -> None:
    """One line on the terminal, written over and over; in a file only its end."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{line}" + ("\n" if end else ""))
        sys.stderr.flush()
    elif end:
        print(line, file=sys.stderr, flush=True)
