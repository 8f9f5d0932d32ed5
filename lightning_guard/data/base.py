"""Tables that fit in memory, behind plain PyTorch loaders.

A small model spends its time in the loader when every example costs a Python call. :class:`Table` therefore
fetches a whole batch with one index per column (``__getitems__``, torch >= 2.0), and everything around it
stays ordinary: a ``DataLoader`` over a map-style ``Dataset`` with a ``RandomSampler``, so that Lightning may
put a distributed sampler in its place and anybody else a sampler of their own.
"""

import gzip
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

Arrays = dict[str, np.ndarray]
"""The source arrays of a data set, named ``train_*`` and ``test_*``."""

SPLIT_SEED = 20_170_825
"""Seed of the split into train and validation: part of what the data is, so no option and no global state.

``compare --resplit`` sets another one for every seed, as :attr:`TableData.split_seed`.
"""


class Rows(Sequence[tuple[Tensor, ...]]):
    """Some rows of a :class:`Table`: reads like a list of examples, collates without a loop over them."""

    def __init__(self, columns: tuple[Tensor, ...]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, index: Any) -> Any:
        return tuple(column[index] for column in self.columns)


class Table(Dataset[tuple[Tensor, ...]]):
    """Equally long tensors, read by row.

    Args:
        columns: Tensors of shape ``(N, ...)``. The first one holds the inputs.
        decode: Turns inputs as they are stored into inputs as a model wants them, one row or many at once.
    """

    def __init__(self, *columns: Tensor, decode: Callable[[Tensor], Tensor] | None = None) -> None:
        if len({len(column) for column in columns}) != 1:
            raise ValueError(f"columns differ in length: {[len(column) for column in columns]}")
        self.columns = columns
        self.decode = decode

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self._decoded(tuple(column[index] for column in self.columns))

    def __getitems__(self, indices: Sequence[int]) -> Rows:
        rows = torch.as_tensor(indices, dtype=torch.int64)
        return Rows(self._decoded(tuple(column[rows] for column in self.columns)))

    def take(self, indices: Tensor) -> "Table":
        """The table of these rows, in this order."""
        return Table(*(column[indices] for column in self.columns), decode=self.decode)

    def _decoded(self, row: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return row if self.decode is None else (self.decode(row[0]), *row[1:])


def collate(examples: Sequence[Any]) -> Any:
    """``default_collate``, which costs nothing where the examples come from one :class:`Table`.

    Examples from elsewhere (a ``ConcatDataset`` around the table, say) are collated as ever, and an empty
    batch of a table keeps its columns and their types, with shape ``(0, ...)``.
    """
    return list(examples.columns) if isinstance(examples, Rows) else default_collate(list(examples))


def read_files(folder: str | Path, names: Collection[str], *, option: str, remedy: str) -> dict[str, bytes]:
    """The contents of the named files of a folder, each there plain or as ``.gz``.

    Args:
        folder: Where the files are.
        names: File names without ``.gz``.
        option: What the user calls the folder, for the error.
        remedy: What the user can do about a missing file, for the error.

    Raises:
        FileNotFoundError: The folder or a file is missing; all missing files are named at once.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"{option}={str(folder)!r} is not a folder. {remedy}")
    contents = {}
    for name in names:
        if (root / name).is_file():
            contents[name] = (root / name).read_bytes()
        elif (root / f"{name}.gz").is_file():
            contents[name] = gzip.decompress((root / f"{name}.gz").read_bytes())
    if missing := [name for name in names if name not in contents]:
        raise FileNotFoundError(f"{option}={str(folder)!r} lacks {', '.join(missing)} (.gz or not). {remedy}")
    return contents


def read_packaged(file: str) -> Arrays:
    """The ``train_*`` and ``test_*`` arrays of a file that ships with this package."""
    with np.load(Path(__file__).with_name(file), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files if name.startswith(("train_", "test_"))}


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over the names, types, shapes and values of arrays, whichever file they came from."""
    sha256 = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha256.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        sha256.update(array.tobytes())
    return sha256.hexdigest()


class TableData(pl.LightningDataModule):
    """What the packaged data sets share: the split, the loaders and the provenance.

    A subclass names itself, reads its arrays and makes tables of them. Nothing is loaded before it is asked
    for, and nothing is ever downloaded.
    """

    license: str
    split_seed: int = SPLIT_SEED
    """Of the split into train and validation; to be set before the first rows are asked for."""

    def __init__(
        self,
        batch_size: int,
        eval_batch_size: int,
        data_dir: str | None,
        val_fraction: float,
        num_workers: int,
    ) -> None:
        super().__init__()
        problems = [
            f"{option}={value} must be at least {least}"
            for option, value, least in (
                ("batch_size", batch_size, 1),
                ("eval_batch_size", eval_batch_size, 1),
                ("num_workers", num_workers, 0),
            )
            if value < least
        ]
        if not 0 <= val_fraction < 1:
            problems.append(f"val_fraction={val_fraction} must lie in [0, 1); 0 means no validation set")
        if problems:
            raise ValueError("; ".join(problems))
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.data_dir = data_dir
        self.val_fraction = val_fraction
        self.num_workers = num_workers

    @property
    def source(self) -> str:
        """Name of the data set."""
        raise NotImplementedError

    def read(self) -> Arrays:
        """Reads the source arrays, from the package or from ``data_dir``."""
        raise NotImplementedError

    def table(self, part: str) -> Table:
        """The table of the published ``"train"`` or ``"test"`` part."""
        raise NotImplementedError

    @cached_property
    def arrays(self) -> Arrays:
        """The source arrays as they were published, before any scaling."""
        return self.read()

    @cached_property
    def train_set(self) -> Table:
        """The published training part without the validation rows."""
        return self._split[0]

    @cached_property
    def val_set(self) -> Table:
        """``val_fraction`` of the published training part, the same rows in every run."""
        return self._split[1]

    @cached_property
    def test_set(self) -> Table:
        """The published test part."""
        return self.table("test")

    @cached_property
    def _split(self) -> tuple[Table, Table]:
        table = self.table("train")
        order = torch.randperm(len(table), generator=torch.Generator().manual_seed(self.split_seed))
        held_out = int(len(table) * self.val_fraction)
        if not held_out:  # nothing to copy, which matters where rows are long
            return table, table.take(order[:0])
        # Ascending, so that the rows stand in their published order and do not follow the seed's.
        return table.take(order[held_out:].sort().values), table.take(order[:held_out].sort().values)

    def train_dataloader(self) -> DataLoader:
        """Shuffled by the global torch generator, as anybody's loader is."""
        return self._loader(self.train_set, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """In fixed order; no loader at all where ``val_fraction=0``."""
        return self._loader(self.val_set, self.eval_batch_size) if len(self.val_set) else []

    def test_dataloader(self) -> DataLoader:
        """In fixed order."""
        return self._loader(self.test_set, self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader:
        """The test part, with its labels."""
        return self.test_dataloader()

    def _loader(self, table: Table, batch_size: int, shuffle: bool = False) -> DataLoader:
        return DataLoader(
            table,
            batch_size=batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=collate,
        )

    def provenance(self) -> dict[str, Any]:
        """What a report should say about the data.

        Returns:
            ``name``, ``license``, ``rows`` (of ``train``, ``val`` and ``test``) and ``sha256``, the
            :func:`digest` of the source arrays. It depends on the rows alone: the packaged file and the
            published files they were built from agree, and a report carries no path.
        """
        return {
            "name": self.source,
            "license": self.license,
            "rows": {"train": len(self.train_set), "val": len(self.val_set), "test": len(self.test_set)},
            "sha256": digest(self.arrays),
        }
