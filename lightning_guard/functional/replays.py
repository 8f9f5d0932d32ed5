"""Free adversarial training: batches that come several times, and what their perturbations become."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_guard.functional.attacks import ThreatModel


def replayed(loader: DataLoader, times: int) -> DataLoader:
    """The loader with each of its batches ``times`` in a row, and otherwise as it was.

    The data are read once: replays are copies. Sampler, workers and length (``times`` as many) stay the
    loader's own.

    Raises:
        ValueError: if ``loader`` is no DataLoader.

    Example:
        >>> import torch
        >>> [batch.tolist() for batch in replayed(DataLoader(torch.arange(3), batch_size=2), 2)]
        [[0, 1], [0, 1], [2], [2]]
    """
    if not isinstance(loader, DataLoader):
        raise ValueError(f"the training data come from a {type(loader).__name__}; give a DataLoader to replay batches")
    again = copy.copy(loader)
    # A subclass of the loader's own class: whoever asks for its sampler, workers or options finds them.
    again.__class__ = type("Replayed", (_Replayed, type(loader)), {"times": times})
    return again


class _Replayed(DataLoader):
    times: int

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            for _ in range(self.times - 1):
                # Copies: what a transfer hook writes in place must not be written twice.
                yield apply_to_collection(batch, Tensor, Tensor.clone)
            yield batch

    def __len__(self) -> int:
        return self.times * super().__len__()


@torch.no_grad()
def carried(delta: Tensor | None, x: Tensor) -> Tensor:
    """The perturbation that a batch starts with: row by row that of the batch before, 0 where there was none.

    Example:
        >>> carried(torch.tensor([[1.0], [2.0]]), torch.zeros(3, 1)).flatten()
        tensor([1., 2., 0.])
    """
    start = torch.zeros_like(x)
    if delta is not None and delta.shape[1:] == x.shape[1:]:
        rows = min(len(delta), len(x))
        start[:rows] = delta[:rows].to(x)
    return start


@torch.no_grad()
def ascended(moved: Tensor, x: Tensor, gradient: Tensor, threat: ThreatModel, step_size: float | None = None) -> Tensor:
    r"""The perturbation after one ascent by the gradient of a training step (Shafahi et al., 2019).

    :math:`\delta \leftarrow \Pi(x' + \alpha s(g)) - x`, where :math:`s` is the steepest direction of the norm.

    Args:
        moved: the inputs ``(N, ...)`` that were trained on.
        x: the clean inputs.
        gradient: of the training loss by ``moved``, scaled as it may be.
        threat: what the attacker may do.
        step_size: :math:`\alpha`, in input units before normalisation; None is ``eps``.

    Reference:
        Shafahi et al., Adversarial Training for Free!, NeurIPS 2019, arXiv:1904.12843.

    Example:
        >>> x, threat = torch.zeros(1, 2), ThreatModel(eps=0.5)
        >>> ascended(x, x, torch.tensor([[2.0, -3.0]]), threat)
        tensor([[ 0.5000, -0.5000]])
    """
    gradient = torch.nan_to_num(gradient)  # a loss scaled for half precision may overflow in a step that is skipped
    length = threat.eps if step_size is None else step_size
    return threat.project(moved + threat.steepest(gradient, x, moved, length=length), x) - x
