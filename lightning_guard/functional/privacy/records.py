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
from functools import partial
from math import prod, sqrt
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

_SCRATCH = 1 << 19  # numbers in a temporary tensor, 2 MB of float32: what does not fit is done in pieces
_ROW = 1 << 14  # numbers that are added up in one go


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


class Scratch:
    """One piece of memory for temporary tensors, used again and again.

    On a CPU fresh memory of this size comes from the operating system page by page, which costs as much as filling it.
    """

    def __init__(self) -> None:
        self._blocks: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def take(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialised tensor of this shape, until somebody else takes one."""
        if like.device.type != "cpu":
            return like.new_empty(shape)  # the caching allocator does it better
        key, size = (like.dtype, like.device), prod(shape)
        if key not in self._blocks or len(self._blocks[key]) < size:
            self._blocks[key] = like.new_empty(size)
        return self._blocks[key][:size].view(shape)


def _itself(x: Tensor) -> Tensor:
    return x


def _squares(x: Tensor) -> Tensor:
    """The squared norm of each row, in float32 at least."""
    x = x.flatten(1) if x.dim() > 1 else x[:, None]
    # torch adds up a long row one by one: ten million squares in float32 come out 0.1 % too small, fifty million 4 %.
    whole = x.shape[1] // _ROW * _ROW
    squares = torch.linalg.vector_norm(x[:, whole:], dim=1, dtype=_wide(x)).square_()
    if whole:
        rows = x[:, :whole].unflatten(1, (-1, _ROW))
        squares += torch.linalg.vector_norm(rows, dim=2, dtype=_wide(x)).square_().sum(1)
    return squares


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _doubt(x: Tensor, terms: int, length: int) -> float:
    """What rounding can take from a ghost norm, squared, as a fraction of the sum of the terms' own squared norms.

    Where terms cancel, nothing else may be left. Rounding errors are as good as independent and of either sign (Higham
    and Mary, 2019), so that is four of their standard deviations.
    """
    return 2 * torch.finfo(x.dtype).eps + 2 * torch.finfo(_wide(x)).eps * (sqrt(length) + terms)


def _order(x: Tensor, terms: int) -> float:
    """The same for the norm of a written gradient, when the clipped sum adds its terms in another order."""
    return 64 * (torch.finfo(x.dtype).eps ** 2 + torch.finfo(_wide(x)).eps ** 2 * terms)


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
        g = self.g.reshape(self.units, -1)
        # The sum of a batch in bfloat16 would be rounded by more than an example may contribute.
        for low, high in [(0, self.units)] if g.dtype == out.dtype else _pieces(self.units, g.shape[1]):
            total = factors[None, low:high].to(out.dtype) @ g[low:high].to(out.dtype)
            out.add_(self.back(total.view(1, *self.g.shape[1:]))[0])

    def without(self, bad: Tensor) -> "Full":
        return Full(_zeroed(self.g, bad), self.back)

    def masked(self, mask: Tensor) -> "Full":
        """The same with zeros where ``mask``, of the tensor's shape, is 0."""
        places = torch.arange(mask.numel(), device=mask.device).view(1, *self.g.shape[1:])
        turned = torch.empty_like(mask.flatten())
        turned[self.back(places).flatten()] = mask.flatten()
        return Full(self.g * turned.view(self.g.shape[1:]).to(self.g.dtype), self.back)


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
        self.shape: tuple[int, ...] = (self.b.shape[2], self.columns)

    def full(self, start: int, stop: int) -> Tensor:
        return self.b[start:stop].transpose(1, 2) @ self.a[start:stop]

    def squares(self) -> Tensor:
        if self.terms == 1:
            own = _squares(self.b) if self.bias is None else self.bias.squares()
            return own * _squares(self.a)
        t, p, d = self.terms, self.columns, self.shape[0]
        if t * (p + d) < p * d:  # fewer operations than writing the gradients down
            return torch.cat([self._ghost(*piece) for piece in _pieces(self.units, 2 * t * t)])
        squares = torch.cat([_squares(self.full(*piece)) for piece in _pieces(self.units, p * d)])
        each = torch.linalg.vector_norm(self.a, dim=2, dtype=_wide(self.a))
        each *= torch.linalg.vector_norm(self.b, dim=2, dtype=_wide(self.b))
        return squares.add_(each.square_().sum(1), alpha=_order(self.a, t))

    def _ghost(self, start: int, stop: int) -> Tensor:
        a, b = self.a[start:stop], self.b[start:stop]
        gram = (a @ a.transpose(1, 2)).mul_(b @ b.transpose(1, 2))
        own = gram.diagonal(dim1=1, dim2=2).sum(1, dtype=_wide(gram))
        doubt = _doubt(gram, self.terms, self.columns + self.shape[0])
        return gram.sum((1, 2), dtype=_wide(gram)).clamp_(min=0).add_(own, alpha=doubt)

    def add_to(self, out: Tensor, factors: Tensor) -> None:
        # On a CPU products of bfloat16 are no faster, and on others only the result needs more digits.
        cast = self.a.dtype != out.dtype and not self.a.is_cuda
        a, b = (self.a.to(out.dtype), self.b.to(out.dtype)) if cast else (self.a, self.b)
        scale = factors.to(b.dtype).view(-1, 1, 1)
        if self.columns < self.shape[0]:
            a = a * scale
        else:
            b = b * scale
        a, b = a.reshape(-1, self.columns), b.reshape(-1, self.shape[0])
        if a.dtype == out.dtype:
            out.addmm_(b.t(), a)
        else:
            out.add_(torch.mm(b.t(), a, out_dtype=out.dtype))

    def without(self, bad: Tensor) -> "Outer":
        return Outer(_zeroed(self.a, bad), _zeroed(self.b, bad))


@dataclass
class Rows:
    """Gradients of a table ``(V, d)``: rows ``index (n, T)`` received ``b (n, T, d)``."""

    index: Tensor
    b: Tensor
    height: int

    def __post_init__(self) -> None:
        self.units = len(self.index)
        self.shape: tuple[int, ...] = (self.height, self.b.shape[2])

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
        b = self.b.to(out.dtype) * factors.to(out.dtype).view(-1, 1, 1)
        out.index_add_(0, self.index.flatten(), b.flatten(0, 1))

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

    def columns(self, x: Tensor, scratch: Scratch) -> Tensor:
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
        return scratch.take(view.shape, x).copy_(view).view(len(x), self.groups, -1, prod(sizes))


@dataclass
class Conv:
    """Gradients of a convolution's weight: inputs ``x (n * m, C, ...)``, ``b (n * m, D, ...)``, m rows a unit."""

    x: Tensor
    b: Tensor
    weight: tuple[int, ...]  # (D, C / groups, *kernel)
    geometry: Geometry
    units: int
    scratch: Scratch

    def __post_init__(self) -> None:
        self.shape = self.weight

    def factors(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The same as sums of outer products: ``a (k, groups, p, m L)``, ``b (k, groups, m L, D / groups)``."""
        m, groups = len(self.x) // self.units, self.geometry.groups
        a = self.geometry.columns(self.x[start * m : stop * m], self.scratch)
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
        groups = self.geometry.groups
        out = self.b.new_empty(stop - start, groups, prod(self.weight[1:]), self.weight[0] // groups)
        for low, high in _pieces(stop - start, self._each):
            a, b = self.factors(start + low, start + high)
            torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=out[low:high].flatten(0, 1))
        return out

    @property
    def back(self) -> Callable[[Tensor], Tensor]:
        """Makes gradients of the weight's shape from those with the kernel first, and keeps nothing else of this."""
        return partial(_upright, self.weight)

    def full(self, start: int, stop: int) -> Tensor:
        return self.back(self.turned(start, stop))

    def squares(self) -> Tensor:
        places = prod(self.b.shape[2:]) * len(self.x) // self.units
        p, d = prod(self.weight[1:]), self.weight[0] // self.geometry.groups
        out = []
        for low, high in _pieces(self.units, self._each):
            a, b = self.factors(low, high)
            if places * (p + d) < p * d:
                gram = (a.transpose(2, 3) @ a).mul_(b @ b.transpose(2, 3))
                own = gram.diagonal(dim1=2, dim2=3).sum((1, 2), dtype=_wide(gram))
                total = gram.sum((1, 2, 3), dtype=_wide(gram)).clamp_(min=0)
                out.append(total.add_(own, alpha=_doubt(gram, places, p + d)))
            else:
                each = torch.linalg.vector_norm(a, dim=2, dtype=_wide(a))
                each *= torch.linalg.vector_norm(b, dim=3, dtype=_wide(b))
                out.append(_squares(a @ b).add_(each.square_().sum((1, 2)), alpha=_order(a, places)))
        return torch.cat(out)

    def add_to(self, out: Tensor, factors: Tensor) -> None:
        x, b, g = self.x.to(out.dtype), self.b.to(out.dtype), self.geometry
        scale = factors.to(b.dtype).repeat_interleave(len(b) // self.units)
        grads = torch.ops.aten.convolution_backward(
            b * scale.view(-1, *[1] * (b.dim() - 1)), x, x.new_empty(1).expand(self.weight), None,
            g.stride, g.padding, g.dilation, False, [0] * len(g.stride), g.groups, [False, True, False],
        )  # fmt: skip
        out.add_(grads[1])

    def without(self, bad: Tensor) -> "Conv":
        rows = bad.repeat_interleave(len(self.b) // self.units)
        return Conv(_zeroed(self.x, rows), _zeroed(self.b, rows), self.weight, self.geometry, self.units, self.scratch)


@dataclass
class Masked:
    """Gradients that count only where ``mask``, of the tensor's shape, is 1 and not 0.

    With one term a unit the norm needs no gradient to be written down: :math:`\\sum_{ij} M_{ij} b_i^2 a_j^2`.
    """

    record: Record
    mask: Tensor

    def __post_init__(self) -> None:
        self.units, self.shape = self.record.units, self.record.shape

    def full(self, start: int, stop: int) -> Tensor:
        full = self.record.full(start, stop)
        return full * self.mask.to(full.dtype)

    def squares(self) -> Tensor:
        record = self.record
        if isinstance(record, Outer) and record.terms == 1:
            wide = _wide(record.a)
            a, b = (side[:, 0].to(wide).square() for side in (record.a, record.b))
            return ((b @ self.mask.to(wide)) * a).sum(1).mul_(1 + _doubt(a, 1, len(self.mask)))
        pieces = [_squares(self.full(*piece)) for piece in _pieces(self.units, prod(self.shape))]
        return torch.cat(pieces).mul_(1 + _doubt(self.mask, 1, prod(self.shape)))

    def add_to(self, out: Tensor, factors: Tensor) -> None:
        total = torch.zeros_like(out, memory_format=torch.contiguous_format)
        self.record.add_to(total, factors)
        out.addcmul_(total, self.mask.to(out.dtype))

    def without(self, bad: Tensor) -> "Masked":
        return Masked(self.record.without(bad), self.mask)


def _upright(weight: tuple[int, ...], turned: Tensor) -> Tensor:
    return turned.transpose(2, 3).reshape(len(turned), *weight)


def squared_norms(records: Sequence[Record]) -> Tensor:
    """Squared norms ``(n,)`` of the units' gradients with respect to one tensor: of the sum of all its records."""
    if len(records) == 1:
        return records[0].squares()
    if all(isinstance(record, Outer) for record in records):
        a, b = (torch.cat([getattr(r, side) for r in records], 1) for side in "ab")
        return Outer(a, b).squares()
    masked = [record for record in records if isinstance(record, Masked)]  # by the same mask, that of the tensor
    inner = [record.record for record in masked if isinstance(record.record, Outer)]
    if len(inner) == len(records):
        a, b = (torch.cat([getattr(r, side) for r in inner], 1) for side in "ab")
        return Masked(Outer(a, b), masked[0].mask).squares()
    if all(isinstance(record, Rows) for record in records):
        index, b = (torch.cat([getattr(r, side) for r in records], 1) for side in ("index", "b"))
        return Rows(index, b, records[0].shape[0]).squares()
    outers = [record for record in records if isinstance(record, Outer)]
    rows = [record for record in records if isinstance(record, Rows)]
    if len(outers) + len(rows) == len(records):
        return _tied(outers, rows)
    shape = records[0].shape
    squares = []
    for piece in _pieces(records[0].units, prod(shape)):
        total = torch.stack([record.full(*piece).view(-1, *shape) for record in records]).sum(0)
        squares.append(_squares(total))
    return torch.cat(squares)


def _tied(outers: Sequence[Outer], rows: Sequence[Rows]) -> Tensor:
    """A table that is both looked up and multiplied by, as the head of a language model is."""
    own = squared_norms(outers) + squared_norms(rows)
    squares = own.clone()
    for outer in outers:
        for row in rows:
            t, s = row.index.shape[1], outer.terms
            for low, high in _pieces(row.units, t * s * 2):
                index = row.index[low:high, :, None].expand(-1, -1, s)  # which entry of b, for each term
                hit = outer.b[low:high].transpose(1, 2).gather(1, index)
                met = row.b[low:high].to(hit.dtype) @ outer.a[low:high].to(hit.dtype).transpose(1, 2)
                squares[low:high] += 2 * (hit * met).sum((1, 2), dtype=squares.dtype)
    wide = max(outer.terms + outer.columns for outer in outers)
    return squares.clamp_(min=0).add_(own, alpha=max(_doubt(outer.b, len(rows), wide) for outer in outers))
