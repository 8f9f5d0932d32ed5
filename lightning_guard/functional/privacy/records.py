r"""The gradient of each unit with respect to one parameter, in the form in which it is cheapest to keep.

A unit is what one promise protects: an example, or a person with several rows. A layer that multiplies makes the
gradient of unit :math:`i` a short sum of outer products, :math:`g_i = \sum_t b_{it} a_{it}^\top`, from the layer's
input :math:`a` and the gradient :math:`b` of its output. Norms and weighted sums of all :math:`g_i` follow from
:math:`a` and :math:`b` without ever writing the :math:`g_i` down.

Reference:
    Goodfellow, Efficient per-example gradient computations, 2015, arXiv:1510.01799. Li et al., Large language models
    can be strong differentially private learners, ICLR 2022, arXiv:2110.05679 (ghost norms of sequences). Bu et al.,
    Differentially private optimization on large model at small cost, ICML 2023, arXiv:2210.00038 (book-keeping).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

_SCRATCH = 1 << 22  # numbers in a temporary tensor, 16 MB of float32: what does not fit is done in pieces


class Record(Protocol):
    """Gradients ``g`` of ``n`` units with respect to one tensor, in some form."""

    units: int
    shape: tuple[int, ...]  # of the tensor

    def full(self, start: int, stop: int) -> Tensor:
        """The gradients of some of the units, ``(stop - start, *shape)``."""
        ...

    def squares(self) -> Tensor:
        """The squared norm of each unit's gradient, ``(n,)``."""
        ...

    def add_to(self, out: Tensor, factors: Tensor) -> None:
        """Add the sum of ``factors[i] * g[i]`` to a tensor of ``shape``."""
        ...

    def without(self, bad: Tensor) -> "Record":
        """The same with the gradients of some units, a mask ``(n,)``, replaced by zero, even if they are not finite."""
        ...


class Arena:
    """Memory for one step's temporary tensors, kept for the next step's.

    On a CPU fresh memory of this size comes from the operating system page by page, which costs as much as filling it.
    """

    def __init__(self) -> None:
        self._blocks: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._used: dict[tuple[torch.dtype, torch.device], int] = {}

    def take(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialised tensor that is ours until :meth:`reset`."""
        if like.device.type != "cpu":
            return like.new_empty(shape)  # the caching allocator does it better
        key, size = (like.dtype, like.device), prod(shape)
        block, start = self._blocks.get(key), self._used.get(key, 0)
        self._used[key] = start + size
        if block is None or start + size > len(block):
            return like.new_empty(shape)
        return block[start : start + size].view(shape)

    def reset(self) -> None:
        """Everything taken is free again; a step that needed more finds more the next time."""
        for (dtype, device), used in self._used.items():
            block = self._blocks.get((dtype, device))
            if block is None or used > len(block):
                self._blocks[dtype, device] = torch.empty(int(used * 1.05), dtype=dtype, device=device)
        self._used.clear()


def _itself(x: Tensor) -> Tensor:
    return x


def _squares(x: Tensor) -> Tensor:
    """The squared norm of each row, in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=wide).square_()


def _zeroed(x: Tensor, bad: Tensor) -> Tensor:
    return x.masked_fill(bad.view(-1, *[1] * (x.dim() - 1)), 0)


def _pieces(units: int, each: int) -> Sequence[tuple[int, int]]:
    step = max(1, _SCRATCH // max(each, 1))
    return [(start, min(start + step, units)) for start in range(0, units, step)]


@dataclass
class Full:
    """Gradients written down: ``g`` of shape ``(n, *shape)``, or of another that ``back`` turns into it."""

    g: Tensor
    back: Callable[[Tensor], Tensor] = _itself

    def __post_init__(self) -> None:
        self.units, self.shape = len(self.g), tuple(self.back(self.g[:1]).shape[1:])
        self._known: Tensor | None = None

    def full(self, start: int, stop: int) -> Tensor:
        return self.back(self.g[start:stop])

    def squares(self) -> Tensor:
        if self._known is None:
            self._known = _squares(self.g)
        return self._known

    def add_to(self, out: Tensor, factors: Tensor) -> None:
        total = factors.to(self.g.dtype)[None] @ self.g.flatten(1)
        out.add_(self.back(total.view(1, *self.g.shape[1:]))[0])

    def without(self, bad: Tensor) -> "Full":
        return Full(_zeroed(self.g, bad), self.back)


@dataclass
class Outer:
    """Gradients of a weight ``(d, p)`` as sums of T outer products: inputs ``a (n, T, p)``, ``b (n, T, d)``.

    ``bias`` may be the record of the bias of the same layer, whose norms are half of the work if T is 1.
    """

    a: Tensor
    b: Tensor
    bias: Full | None = None

    def __post_init__(self) -> None:
        self.units, self.terms, self.columns = self.a.shape
        self.shape = (self.b.shape[2], self.columns)

    def full(self, start: int, stop: int) -> Tensor:
        return self.b[start:stop].transpose(1, 2) @ self.a[start:stop]

    def squares(self) -> Tensor:
        if self.terms == 1:
            own = _squares(self.b) if self.bias is None else self.bias.squares()
            return own * _squares(self.a)
        t, p, d = self.terms, self.columns, self.shape[0]
        if t * (p + d) < p * d:  # fewer operations than writing the gradients down
            return torch.cat([self._ghost(*piece) for piece in _pieces(self.units, 2 * t * t)])
        return torch.cat([_squares(self.full(*piece)) for piece in _pieces(self.units, p * d)])

    def _ghost(self, start: int, stop: int) -> Tensor:
        a, b = self.a[start:stop], self.b[start:stop]
        gram = a @ a.transpose(1, 2)
        # Rounding can leave a tiny negative number where the terms cancel.
        return gram.mul_(b @ b.transpose(1, 2)).sum((1, 2), dtype=_wide(gram)).clamp_(min=0)

    def add_to(self, out: Tensor, factors: Tensor) -> None:
        a, b, scale = self.a, self.b, factors.to(self.b.dtype).view(-1, 1, 1)
        if self.columns < self.shape[0]:
            a = a * scale
        else:
            b = b * scale
        a, b = a.reshape(-1, self.columns), b.reshape(-1, self.shape[0])
        if a.dtype == out.dtype:
            out.addmm_(b.t(), a)
        else:
            out.add_(b.t() @ a)

    def without(self, bad: Tensor) -> "Outer":
        return Outer(_zeroed(self.a, bad), _zeroed(self.b, bad))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@dataclass
class Rows:
    """Gradients of a table ``(V, d)``: rows ``index (n, T)`` received ``b (n, T, d)``."""

    index: Tensor
    b: Tensor
    height: int

    def __post_init__(self) -> None:
        self.units, self.shape = len(self.index), (self.height, self.b.shape[2])

    def full(self, start: int, stop: int) -> Tensor:
        out = self.b.new_zeros(stop - start, *self.shape)
        index = self.index[start:stop, :, None].expand(-1, -1, self.shape[1])
        return out.scatter_add_(1, index, self.b[start:stop])

    def squares(self) -> Tensor:
        """Sums of what hit the same row of the table come before the norm."""
        unit = torch.arange(self.units, device=self.index.device)[:, None]
        cells, where = torch.unique(unit * self.height + self.index, return_inverse=True)
        b = self.b.flatten(0, 1)
        sums = b.new_zeros(len(cells), self.shape[1], dtype=_wide(b)).index_add_(0, where.flatten(), b.to(_wide(b)))
        return sums.new_zeros(self.units).index_add_(0, cells // self.height, _squares(sums))

    def add_to(self, out: Tensor, factors: Tensor) -> None:
        b = self.b * factors.to(self.b.dtype).view(-1, 1, 1)
        out.index_add_(0, self.index.flatten(), b.flatten(0, 1).to(out.dtype))

    def without(self, bad: Tensor) -> "Rows":
        return Rows(self.index, _zeroed(self.b, bad), self.height)


@dataclass
class Geometry:
    """How a convolution moves over its input; one number a spatial dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def columns(self, x: Tensor, arena: Arena) -> Tensor:
        """The patches that the kernel sees, ``(N, groups, p, L)`` with p = channels per group * kernel size."""
        # Strides do what im2col does, in a third of its time on a CPU.
        x = F.pad(x, [side for pad in reversed(self.padding) for side in (pad, pad)])
        sizes = [
            (size - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, dilation in zip(x.shape[2:], self.kernel, self.stride, self.dilation, strict=True)
        ]
        steps = x.stride()[2:]
        inside = [step * dilation for step, dilation in zip(steps, self.dilation, strict=True)]
        across = [step * stride for step, stride in zip(steps, self.stride, strict=True)]
        view = x.as_strided([*x.shape[:2], *self.kernel, *sizes], [*x.stride()[:2], *inside, *across])
        return arena.take(view.shape, x).copy_(view).view(len(x), self.groups, -1, prod(sizes))


@dataclass
class Conv:
    """Gradients of a convolution's weight: inputs ``x (n * m, C, ...)``, ``b (n * m, D, ...)``, m rows a unit."""

    x: Tensor
    b: Tensor
    weight: tuple[int, ...]  # (D, C / groups, *kernel)
    geometry: Geometry
    units: int
    arena: Arena

    def __post_init__(self) -> None:
        self.shape = self.weight

    def factors(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The same as sums of outer products: ``a (k, groups, p, m L)``, ``b (k, groups, m L, D / groups)``."""
        m, groups = len(self.x) // self.units, self.geometry.groups
        a = self.geometry.columns(self.x[start * m : stop * m], self.arena)
        b = self.b[start * m : stop * m].reshape(len(a), groups, self.weight[0] // groups, -1)
        a = a.unflatten(0, (-1, m)).permute(0, 2, 3, 1, 4).flatten(3)
        return a, b.unflatten(0, (-1, m)).permute(0, 2, 1, 4, 3).flatten(2, 3).contiguous()

    @property
    def _each(self) -> int:
        """Numbers in the patches of one unit."""
        places = prod(self.b.shape[2:]) * len(self.x) // self.units
        return places * prod(self.weight[1:]) * self.geometry.groups

    def turned(self, start: int, stop: int) -> Tensor:
        """The gradients of some units with the kernel first, ``(k, groups, p, D / groups)``."""
        out = []
        for low, high in _pieces(stop - start, self._each):
            a, b = self.factors(start + low, start + high)
            room = self.arena.take((*a.shape[:3], b.shape[3]), a)
            out.append(torch.matmul(a, b, out=room))
        return torch.cat(out) if len(out) > 1 else out[0]

    def back(self, turned: Tensor) -> Tensor:
        """Gradients of the weight's shape from those with the kernel first."""
        return turned.transpose(2, 3).reshape(len(turned), *self.weight)

    def full(self, start: int, stop: int) -> Tensor:
        return self.back(self.turned(start, stop))

    def squares(self) -> Tensor:
        places = prod(self.b.shape[2:]) * len(self.x) // self.units
        p, d = prod(self.weight[1:]), self.weight[0] // self.geometry.groups
        out = []
        for low, high in _pieces(self.units, self._each):
            if places * (p + d) < p * d:
                a, b = self.factors(low, high)
                gram = (a.transpose(2, 3) @ a).mul_(b @ b.transpose(2, 3))
                out.append(gram.sum((1, 2, 3), dtype=_wide(gram)).clamp_(min=0))
            else:
                out.append(_squares(self.turned(low, high)))
        return torch.cat(out)

    def add_to(self, out: Tensor, factors: Tensor) -> None:
        b = self.b
        scale = factors.to(b.dtype).repeat_interleave(len(b) // self.units)
        g = self.geometry
        grads = torch.ops.aten.convolution_backward(
            b * scale.view(-1, *[1] * (b.dim() - 1)), self.x, self.x.new_empty(1).expand(self.weight), None,
            g.stride, g.padding, g.dilation, False, [0] * len(g.stride), g.groups, [False, True, False],
        )  # fmt: skip
        out.add_(grads[1])

    def without(self, bad: Tensor) -> "Conv":
        rows = bad.repeat_interleave(len(self.b) // self.units)
        return Conv(_zeroed(self.x, rows), _zeroed(self.b, rows), self.weight, self.geometry, self.units, self.arena)


def squared_norms(records: Sequence[Record]) -> Tensor:
    """Squared norms ``(n,)`` of the units' gradients with respect to one tensor: of the sum of all its records."""
    if len(records) == 1:
        return records[0].squares()
    if all(isinstance(record, Outer) for record in records):
        return Outer(*(torch.cat([getattr(r, side) for r in records], 1) for side in "ab")).squares()
    if all(isinstance(record, Rows) for record in records):
        index, b = (torch.cat([getattr(r, side) for r in records], 1) for side in ("index", "b"))
        return Rows(index, b, records[0].shape[0]).squares()
    outers = [record for record in records if isinstance(record, Outer)]
    rows = [record for record in records if isinstance(record, Rows)]
    if len(outers) + len(rows) == len(records):
        return _tied(outers, rows)
    shape = records[0].shape
    pieces = _pieces(records[0].units, prod(shape))
    return torch.cat([_squares(sum(r.full(*piece).view(-1, *shape) for r in records)) for piece in pieces])


def _tied(outers: Sequence[Outer], rows: Sequence[Rows]) -> Tensor:
    """A table that is both looked up and multiplied by, as the head of a language model is."""
    squares = squared_norms(outers) + squared_norms(rows)
    for outer in outers:
        for row in rows:
            t, s = row.index.shape[1], outer.terms
            for low, high in _pieces(row.units, t * s * 2):
                index = row.index[low:high, :, None].expand(-1, -1, s)  # which entry of b, for each term
                hit = outer.b[low:high].transpose(1, 2).gather(1, index)
                met = row.b[low:high].to(hit.dtype) @ outer.a[low:high].to(hit.dtype).transpose(1, 2)
                squares[low:high] += 2 * (hit * met).sum((1, 2), dtype=squares.dtype)
    return squares.clamp_(min=0)
