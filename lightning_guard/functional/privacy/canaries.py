"""Canaries: rows that nobody's data contain, by which one sees what a training keeps of a single row."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


class Mixed(Dataset):
    """A map-style dataset with further rows among its own, in an order given.

    Args:
        dataset: the rows, never changed.
        extra: further rows, of the same form.
        generator: decides where they stand, so that a loader that does not shuffle spreads them over its batches.

    Example:
        >>> sorted(Mixed([1, 2, 3], [8, 9], torch.Generator().manual_seed(0))[i] for i in range(5))
        [1, 2, 3, 8, 9]
    """

    def __init__(self, dataset: Any, extra: Sequence[Any], generator: torch.Generator):
        self.dataset, self.extra = dataset, extra
        rows = len(dataset) + len(extra)
        places = torch.randperm(rows, generator=generator)[: len(extra)]
        self.place = torch.full((rows,), -1)
        self.place[places] = torch.arange(len(extra))
        self.row = (self.place < 0).cumsum(0) - 1

    def __len__(self) -> int:
        return len(self.place)

    def __getitem__(self, i: int) -> Any:
        place = int(self.place[i])
        return self.dataset[int(self.row[i])] if place < 0 else self.extra[place]


def label(target: Any) -> float:
    """The class of a row as a number.

    Raises:
        ValueError: if the target is no class: several numbers, text, or a fraction.

    Example:
        >>> label(torch.tensor(3)), label(True), label(np.float32(1))
        (3.0, 1.0, 1.0)
    """
    if isinstance(target, Tensor | np.ndarray | np.generic):
        number = target.item() if (target.numel() if isinstance(target, Tensor) else target.size) == 1 else None
        floating = target.is_floating_point() if isinstance(target, Tensor) else target.dtype.kind == "f"
    else:
        number, floating = (target if isinstance(target, int | float) else None), isinstance(target, float)
    if number is None:
        raise ValueError(f"the target of a row is a {_what(target)}, not one class, so it cannot be a wrong one")
    if floating and number not in (0, 1):
        raise ValueError(f"the target of a row is {number:g}, a quantity and not a class, so it cannot be a wrong one")
    return float(number)


def relabelled(target: Any, number: float) -> Any:
    """Another class in the form of this target, so that a loader collates it like any other.

    Example:
        >>> relabelled(torch.tensor(3), 1.0), relabelled(2, 1.0), relabelled(np.int8(2), 1.0).dtype
        (tensor(1), 1, dtype('int8'))
    """
    if isinstance(target, Tensor):
        return torch.full_like(target, number)
    if isinstance(target, np.ndarray):
        return np.full_like(target, number)
    return type(target)(number)


class Outliers:
    """Makes inputs that no row resembles and that hardly resemble each other, of numbers within the range of the rows.

    All numbers are the median of the rows' numbers, but for one in 16 (in small inputs more), at random places, that
    are the lowest or the highest of all. So each has directions to itself, in which only it pulls the weights; dense
    noise of the same range shares half of its length with all others, and showed half as much. Token ids and other
    whole numbers (not bytes, which are pixels) are drawn from those that occur.

    Args:
        inputs: of some rows, one tensor or array each.

    Raises:
        ValueError: if they are neither.

    Example:
        >>> make = Outliers([torch.tensor([0.0, 1.0, 0.0, 0.5])])
        >>> sorted(make(torch.zeros(64), torch.Generator().manual_seed(0)).unique().tolist())
        [0.0, 1.0]
    """

    def __init__(self, inputs: Sequence[Any]):
        for one in inputs:
            if not isinstance(one, Tensor | np.ndarray):
                raise ValueError(f"the inputs of a row are a {_what(one)}, not one tensor; set kind='mislabelled'")
        rows = [torch.as_tensor(one).detach().cpu().flatten() for one in inputs]
        values = torch.cat(rows) if rows else torch.zeros(1)
        self.words = None
        if not values.is_floating_point() and values.dtype not in (torch.uint8, torch.bool):
            self.words = values.unique()
            return
        values = values[values.isfinite()].double()
        if not len(values):
            values = torch.zeros(1)
        self.extremes = torch.stack([values.min(), values.max()])
        self.median = values.median()

    def __call__(self, like: Any, generator: torch.Generator) -> Any:
        """One more, in the form of these inputs."""
        shape, size = tuple(like.shape), math.prod(like.shape)
        if self.words is not None:
            drawn = self.words[torch.randint(len(self.words), (size,), generator=generator)]
        else:
            spikes = max(size // 16, min(8, (size + 1) // 2))
            drawn = self.median.repeat(size)
            places = torch.randperm(size, generator=generator)[:spikes]
            drawn[places] = self.extremes[torch.randint(2, (spikes,), generator=generator)]
        drawn = drawn.reshape(shape)
        return drawn.to(like) if isinstance(like, Tensor) else drawn.numpy().astype(like.dtype)


def _what(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"{type(value).__name__} of shape {tuple(shape)}" if shape is not None else type(value).__name__
