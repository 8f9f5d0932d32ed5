"""Clipped sums the slow way, one example after another, and the same by the book."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_guard.functional.privacy import Bookkeeper, Clipping

Loss = Callable[..., Tensor]


class Net(nn.Module):
    """A network in one line: its parts by name, and what to do with them."""

    def __init__(self, run: Callable[..., Tensor], **parts: nn.Module | nn.Parameter | Tensor):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *x: Tensor) -> Tensor:
        return self.run(self, *x)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / 2)


def cross_entropy(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Of the first three outputs."""
    return F.cross_entropy(net(x).flatten(1)[:, :3], y)


def trained(net: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in net.named_parameters() if p.requires_grad]


def each(net: nn.Module, loss: Loss, batch: Sequence[Tensor]) -> list[Tensor]:
    """Gradients ``(N, *shape)`` for each parameter, by one backward pass an example."""
    parameters = [p for _, p in trained(net)]
    rows = []
    for i in range(len(batch[0])):
        one = loss(net, *[part[i : i + 1] for part in batch])
        rows.append(torch.autograd.grad(one, parameters, allow_unused=True, materialize_grads=True))
    return [torch.stack(gradients) for gradients in zip(*rows, strict=True)]


def norms_of(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([g.reshape(len(g), -1) for g in gradients], 1).norm(dim=1)


def booked(
    net: nn.Module,
    loss: Loss,
    batch: Sequence[Tensor],
    bound: float | None = None,
    rows: int = 1,
    weights: Tensor | None = None,
    clipping: Clipping | None = None,
    groups: Sequence[Sequence[nn.Parameter]] | None = None,
    book: Bookkeeper | None = None,
) -> tuple[Tensor, list[Tensor], Bookkeeper]:
    """Norms ``(G, n)``, clipped sums of each parameter and the book; the bound is the median norm if none is given."""
    book = book or Bookkeeper(trained(net))
    count = len(batch[0])
    undo = book.forbid_raw()
    try:
        with book.step(units=count // rows, rows=rows, weights=weights):
            mean = loss(net, *batch)
        mean.backward()
    finally:
        undo()
    assert not book.unbooked()
    assert all(p.grad is None for _, p in trained(net))
    norms = book.squared_norms(groups).sqrt() * count
    bound = float(norms.median()) if bound is None else bound
    factors = (clipping or Clipping()).factors(norms, bound) * count
    book.drop(~norms.isfinite().all(0))
    sums = {id(p): torch.zeros(p.shape, dtype=p.dtype) for _, p in trained(net)}
    book.add_sums(factors, sums, {id(p): g for g, group in enumerate(groups or ()) for p in group})
    return norms, list(sums.values()), book


def agree(got: Any, wanted: Any, tolerance: float = 1e-10) -> None:
    """Up to rounding of the largest of all numbers."""
    size = max(float(w.norm()) for w in wanted)
    for g, w in zip(got, wanted, strict=True):
        assert float((g - w).norm()) <= tolerance * size
