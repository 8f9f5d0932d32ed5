"""Examples told apart by what they hold, so that one is found again in another run or another part of the data."""

from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_guard.evaluation.subject import Subject, part_of


def row_marks(subject: Subject) -> NDArray[np.int64] | None:
    """A number an example that its inputs and target decide, in the order of the outputs; None if rows are no tensors.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [1.0], [0.0]])
        >>> marks = row_marks(Subject(torch.nn.Identity(), [(x, torch.zeros(3))]))
        >>> bool(marks[0] == marks[2]), bool(marks[0] == marks[1])
        (True, False)
    """
    found: list[int] = []
    with subject.still():
        for step in subject.batches():
            target = part_of(step, "target")
            columns = [column for part in (step.inputs, target) for column in _tensors(part)]
            if not columns or len({len(column) for column in columns}) != 1:
                return None
            arrays = [np.ascontiguousarray(column.detach().cpu().numpy()) for column in columns]
            for parts in zip(*arrays, strict=True):
                digest = blake2b(digest_size=8)
                for one in parts:
                    digest.update(one.tobytes())
                found.append(int.from_bytes(digest.digest(), "big", signed=True))
    return np.array(found, dtype=np.int64)


def _tensors(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor) and part.dim():
        yield part.float() if part.is_floating_point() else part  # bfloat16 has no form in NumPy
    elif isinstance(part, Mapping):
        for key in sorted(part, key=str):
            yield from _tensors(part[key])
    elif isinstance(part, list | tuple):
        for one in part:
            yield from _tensors(one)
