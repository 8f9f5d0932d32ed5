"""How each function of torch that multiplies by a trainable tensor is run and booked.

A rule is tried when such a function meets a trainable tensor. It returns the output, or NotImplemented where it does
not apply; then the function runs natively, and a raw gradient that reaches a parameter that way stops the run.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from operator import ge
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_guard.functional.privacy.records import Conv, Full, Geometry, Outer, Rows
from lightning_guard.functional.quantization.grids import fake_quantize

if TYPE_CHECKING:
    from lightning_guard.functional.privacy.book import Bookkeeper, Part

# Gradients are written down where they take at most this many times the memory of inputs and output gradients: then
# the clipped sum costs next to nothing, and what the layer saved is free again.
KEEP = 2.0


class Rule(ABC):
    """One call of a layer: runs it, and books it when the gradient of its output comes."""

    def __init__(self, book: "Bookkeeper"):
        self.book = book

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor | None, ...]:
        """The output, and the tensors to keep for :meth:`backward`."""

    @abstractmethod
    def backward(self, b: Tensor, saved: Sequence[Tensor], wanted: bool) -> Tensor | None:
        """Book the output's gradient ``b``; the gradient of ``x`` if it is wanted."""

    def add_bias(self, part: "Part | None", b: Tensor) -> Full | None:
        """Book the bias of a layer with output gradients ``(n, T, d)``."""
        if part is None:
            return None
        record = Full(b[:, 0] if b.shape[1] == 1 else b.sum(1))
        self.book.add(part, record)
        return record


class Linear(Rule):
    """``x W^T + b``, for x of any shape ``(N, ..., p)``."""

    def __init__(self, book: "Bookkeeper", weight: Tensor, bias: Tensor | None):
        super().__init__(book)
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.weight_part, self.bias_part = book.part(weight), book.part(bias)
        self.seq_first = book.seq_first

    def forward(self, x: Tensor) -> tuple[Tensor | None, ...]:
        return F.linear(x, self.weight, self.bias), x

    def backward(self, b: Tensor, saved: Sequence[Tensor], wanted: bool) -> Tensor | None:
        book, (x,) = self.book, saved
        book.saw(b.dtype)
        part = self.weight_part or self.bias_part
        assert part is not None
        was, book.seq_first = book.seq_first, self.seq_first
        rows = book.by_unit(book.weighted(book.by_row(b, part)))
        bias = self.add_bias(self.bias_part, rows)
        if self.weight_part is not None:
            a = book.by_unit(book.by_row(x, part)).to(b.dtype)
            p, d, t = a.shape[2], rows.shape[2], a.shape[1]
            if t > 1 and p * d <= KEEP * t * (p + d):
                book.add(self.weight_part, Full(torch.bmm(rows.transpose(1, 2), a)))
            else:
                book.add(self.weight_part, Outer(a, rows, bias if t == 1 else None))
        book.seq_first = was
        return (b @ self.weight.to(b.dtype)).to(x.dtype) if wanted else None


class Convolution(Rule):
    """Convolutions, and with ``extra`` output padding transposed ones; x is ``(N, C, ...)`` of 1 to 3 dimensions."""

    def __init__(
        self, book: "Bookkeeper", call: Callable[..., Tensor], weight: Tensor, bias: Tensor | None, geometry: Geometry,
        extra: Sequence[int] | None = None,
    ):  # fmt: skip
        super().__init__(book)
        self.call = call  # one that autocast knows
        self.transposed, self.extra = extra is not None, list(extra or [0] * len(geometry.stride))
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.weight_part, self.bias_part, self.geometry = book.part(weight), book.part(bias), geometry

    def forward(self, x: Tensor) -> tuple[Tensor | None, ...]:
        g = self.geometry
        rest = (self.extra, g.groups, g.dilation) if self.transposed else (g.dilation, g.groups)
        return self.call(x, self.weight, self.bias, g.stride, g.padding, *rest), x

    def backward(self, b: Tensor, saved: Sequence[Tensor], wanted: bool) -> Tensor | None:
        book, g, (x,) = self.book, self.geometry, saved
        book.saw(b.dtype)
        part = self.weight_part or self.bias_part
        assert part is not None
        rows = book.weighted(book.by_row(b, part))
        if self.bias_part is not None:
            self.add_bias(self.bias_part, book.by_unit(rows.flatten(2).sum(2)))
        if self.weight_part is not None:
            size = tuple(self.weight.shape)
            sides = (book.by_row(x, part).to(b.dtype), rows)
            # A transposed convolution is the adjoint: what it puts out is what the convolution would take in.
            record = Conv(*(sides[::-1] if self.transposed else sides), size, g, book.units, book.scratch)
            if self.weight.numel() <= 2 * KEEP * (x[0].numel() + b[0].numel()) * book.rows:
                book.add(self.weight_part, Full(record.turned(0, book.units), record.back))
            else:
                book.add(self.weight_part, record)
        if not wanted:
            return None
        grads = torch.ops.aten.convolution_backward(
            b, x.to(b.dtype), self.weight.to(b.dtype), None, g.stride, g.padding, g.dilation, self.transposed,
            self.extra, g.groups, [True, False, False],
        )  # fmt: skip
        return grads[0].to(x.dtype)


class Lookup(Rule):
    """Rows of a table; x are their numbers ``(N, ...)``."""

    def __init__(self, book: "Bookkeeper", table: Tensor, padding: int | None):
        super().__init__(book)
        part = book.part(table)
        assert part is not None
        self.table, self.part, self.padding = table.detach(), part, padding

    def forward(self, x: Tensor) -> tuple[Tensor | None, ...]:
        return F.embedding(x, self.table), x

    def backward(self, b: Tensor, saved: Sequence[Tensor], wanted: bool) -> None:
        book, (x,) = self.book, saved
        book.saw(b.dtype)
        index = book.by_row(x, self.part).reshape(book.units, -1)
        b = book.weighted(book.by_row(b, self.part)).reshape(*index.shape, -1)
        if self.padding is not None:
            b = b.masked_fill((index == self.padding)[..., None], 0)
        book.add(self.part, Rows(index, b, len(self.table)))


class Affine(Rule):
    """``x w + c`` along some dimensions of x, the end of every normalisation; ``shape`` is w's against x."""

    def __init__(self, book: "Bookkeeper", weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]):
        super().__init__(book)
        self.weight, self.bias = (None if p is None else p.detach().view(shape) for p in (weight, bias))
        self.weight_part, self.bias_part, self.shape = book.part(weight), book.part(bias), tuple(shape)
        given = weight if weight is not None else bias
        assert given is not None
        self.size = given.shape

    def forward(self, x: Tensor) -> tuple[Tensor | None, ...]:
        if self.weight is None:
            assert self.bias is not None
            return x + self.bias, x
        return (x * self.weight if self.bias is None else torch.addcmul(self.bias, x, self.weight)), x

    def backward(self, b: Tensor, saved: Sequence[Tensor], wanted: bool) -> Tensor | None:
        book, (x,) = self.book, saved
        book.saw(b.dtype)
        part = self.weight_part or self.bias_part
        assert part is not None
        rows = book.weighted(book.by_row(b, part))
        if self.bias_part is not None:
            book.add(self.bias_part, Full(self._sum(rows)))
        if self.weight_part is not None:
            book.add(self.weight_part, Full(self._sum(rows * x)))
        if not wanted:
            return None
        return b if self.weight is None else (b * self.weight).to(x.dtype)

    def _sum(self, rows: Tensor) -> Tensor:
        # Every dimension but the rows' along which the weight is one number.
        dims = [i for i in range(1, rows.dim()) if i - rows.dim() < -len(self.shape) or self.shape[i - rows.dim()] == 1]
        out = rows.sum(dims) if dims else rows
        out = out.reshape(self.book.units, self.book.rows, *self.size)
        return out.sum(1) if self.book.rows > 1 else out[:, 0]


class Spread(Rule):
    """A tensor that every example gets a copy of: a bare parameter beside a batch; ``shape`` is its against x."""

    def __init__(self, book: "Bookkeeper", given: Tensor, shape: Sequence[int]):
        super().__init__(book)
        part = book.part(given)
        assert part is not None
        self.given, self.part, self.shape = given.detach(), part, tuple(shape)

    def forward(self, x: Tensor) -> tuple[Tensor | None, ...]:
        return (self.given.reshape(self.shape).expand(self.book.units * self.book.rows, *self.shape[1:]).clone(),)

    def backward(self, b: Tensor, saved: Sequence[Tensor], wanted: bool) -> None:
        book = self.book
        book.saw(b.dtype)
        rows = book.weighted(b).reshape(book.units, book.rows, *self.given.shape)
        book.add(self.part, Full(rows.sum(1) if book.rows > 1 else rows[:, 0]))


class PerExample(Rule):
    """A module without a rule: one forward pass, then each example's own backward pass by functorch."""

    def __init__(self, book: "Bookkeeper", module: nn.Module, forward: Callable[[Tensor], Tensor]):
        super().__init__(book)
        self.module, self.call = module, forward

    def forward(self, x: Tensor) -> tuple[Tensor | None, ...]:
        self.autocast = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
        out = self.call(x)
        if not isinstance(out, Tensor):
            raise self.book.error(
                f"{type(self.module).__name__} has no rule and gives a {type(out).__name__}, so its gradients cannot "
                "be computed example by example; write it with layers that give one tensor, or freeze it"
            )
        return out, x

    def backward(self, b: Tensor, saved: Sequence[Tensor], wanted: bool) -> Tensor | None:
        book, (x,) = self.book, saved
        book.saw(b.dtype)
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        rest = dict(self.module.named_buffers()) | {
            name: p.detach() for name, p in self.module.named_parameters() if not p.requires_grad
        }

        def one(row: Tensor, gradient: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            def run(weights: dict[str, Tensor], row: Tensor) -> Tensor:
                return torch.func.functional_call(self.module, (weights, rest), (row[None],))[0]

            _, back, *_ = torch.func.vjp(run, {name: p.detach() for name, p in trained.items()}, row)
            grads, gx = back(gradient)
            return grads, gx

        parts = {name: book.part(p) for name, p in trained.items()}
        first = next(part for part in parts.values() if part is not None)
        again = torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None, cache_enabled=False)
        with torch.enable_grad(), book.paused(), again:
            grads, gx = torch.func.vmap(one)(book.by_row(x, first), book.by_row(b, first))
        for name, grad in grads.items():
            rows = book.weighted(grad).reshape(book.units, book.rows, *grad.shape[1:])
            part = parts[name]
            assert part is not None
            book.add(part, Full(rows.sum(1)))
        return gx if wanted else None


# What torch's functions are run by. Each takes the book, the function and its arguments. ---------------------------

Handler = Callable[["Bookkeeper", Any, Sequence[Any], Mapping[str, Any]], Any]
RULES: dict[Any, Handler] = {}


def _for(*functions: Any) -> Callable[[Handler], Handler]:
    def note(handler: Handler) -> Handler:
        RULES.update(dict.fromkeys(functions, handler))
        return handler

    return note


def _free(book: "Bookkeeper", *given: Any) -> bool:
    """Whether all of these are constants or booked: a weight that a layer made of the batch is neither."""
    return all(x is None or not x.requires_grad or book.part(x) is not None for x in given)


def _bound(names: str, args: Sequence[Any], kwargs: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    return {**dict.fromkeys(names.split()), **defaults, **dict(zip(names.split(), args, strict=False)), **kwargs}


@_for(F.linear)
def _linear(book: "Bookkeeper", func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    given = _bound("input weight bias", args, kwargs)
    x, weight, bias = given["input"], given["weight"], given["bias"]
    if _constant(book, x, weight if book.part(weight) is not None else bias) or not _free(book, weight, bias):
        return NotImplemented
    return book.apply(Linear(book, weight, bias), x)


def _constant(book: "Bookkeeper", x: Tensor, weight: Tensor | None) -> bool:
    """Whether x is made of parameters, or of nothing in the batch: then a weight is computed from weights."""
    part = book.part(weight)
    if book.part(x) is not None or part is None or x.dim() < 2:
        return True
    return not x.requires_grad and not book.seq_first and book.batchless(part, "times", x.dim(), x.shape[0])


@_for(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def _matmul(book: "Bookkeeper", func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x, weight = args[0], args[1] if len(args) > 1 else next(iter(kwargs.values()))
    if weight.dim() not in (1, 2) or _constant(book, x, weight):
        return NotImplemented
    if weight.dim() == 1:
        return book.apply(Linear(book, weight[None], None), x).squeeze(-1)
    return book.apply(Linear(book, weight.t(), None), x)


@_for(torch.conv1d, torch.conv2d, torch.conv3d)
def _conv(book: "Bookkeeper", func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    given = _bound(
        "input weight bias stride padding dilation groups", args, kwargs, stride=1, padding=0, dilation=1, groups=1
    )
    x, weight = given["input"], given["weight"]
    if book.part(x) is not None or not _free(book, weight, given["bias"]):
        return NotImplemented
    kernel = tuple(weight.shape[2:])
    stride, dilation = (_sides(given[name], len(kernel)) for name in ("stride", "dilation"))
    padding = given["padding"]
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        x = F.pad(x, [side for n in reversed(total) for side in (n // 2, n - n // 2)]) if any(total) else x
        padding = 0
    padding = _sides(0 if padding == "valid" else padding, len(kernel))
    geometry = Geometry(kernel, stride, padding, dilation, given["groups"])
    return book.apply(Convolution(book, func, weight, given["bias"], geometry), x)


@_for(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
def _conv_transpose(book: "Bookkeeper", func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    names = "input weight bias stride padding output_padding groups dilation"
    given = _bound(names, args, kwargs, stride=1, padding=0, output_padding=0, groups=1, dilation=1)
    x, weight = given["input"], given["weight"]
    kernel = tuple(weight.shape[2:])
    stride, padding, extra, dilation = (
        _sides(given[name], len(kernel)) for name in ("stride", "padding", "output_padding", "dilation")
    )
    if book.part(x) is not None or not _free(book, weight, given["bias"]) or any(map(ge, extra, stride)):
        return NotImplemented
    geometry = Geometry(kernel, stride, padding, dilation, given["groups"])
    return book.apply(Convolution(book, func, weight, given["bias"], geometry, extra), x)


def _sides(given: Any, count: int) -> tuple[int, ...]:
    given = (given,) if isinstance(given, int) else tuple(given)
    return given * count if len(given) == 1 else given


@_for(fake_quantize)
def _rounded(book: "Bookkeeper", func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Rounding that gradients pass straight through."""
    if book.part(args[0]) is None:
        return NotImplemented
    out = func(*args, **kwargs)
    book.alias(out, args[0])
    return out


@_for(F.embedding)
def _embedding(book: "Bookkeeper", func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    given = _bound("input weight padding_idx max_norm norm_type scale_grad_by_freq sparse", args, kwargs)
    x, table = given["input"], given["weight"]
    if given["max_norm"] is not None or given["scale_grad_by_freq"] or given["sparse"]:
        return NotImplemented
    part = book.part(table)
    if part is None or x.dim() == 0 or book.batchless(part, "rows", x.dim(), x.shape[0]):
        return NotImplemented  # positions without a batch dimension: a tensor computed from parameters
    padding = given["padding_idx"]
    return book.apply(Lookup(book, table, None if padding is None else padding % len(table)), x)


@_for(F.layer_norm)
def _layer_norm(book: "Bookkeeper", func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    given = _bound("input normalized_shape weight bias eps", args, kwargs, eps=1e-5)
    x = F.layer_norm(given["input"], given["normalized_shape"], None, None, given["eps"])
    return _affine(book, given, x, given["normalized_shape"])


@_for(F.rms_norm)
def _rms_norm(book: "Bookkeeper", func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    given = _bound("input normalized_shape weight eps", args, kwargs)
    x = F.rms_norm(given["input"], given["normalized_shape"], None, given["eps"])
    return _affine(book, given, x, given["normalized_shape"])


@_for(F.group_norm)
def _group_norm(book: "Bookkeeper", func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    given = _bound("input num_groups weight bias eps", args, kwargs, eps=1e-5)
    x = F.group_norm(given["input"], given["num_groups"], None, None, given["eps"])
    return _affine(book, given, x, (-1, *[1] * (x.dim() - 2)))


@_for(F.instance_norm)
def _instance_norm(book: "Bookkeeper", func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    names = "input running_mean running_var weight bias use_input_stats momentum eps"
    given = _bound(names, args, kwargs, use_input_stats=True, momentum=0.1, eps=1e-5)
    plain = {name: given[name] for name in names.split() if name not in ("weight", "bias")}
    x = F.instance_norm(**plain)
    return _affine(book, given, x, (-1, *[1] * (x.dim() - 2)))


@_for(F.batch_norm)
def _batch_norm(book: "Bookkeeper", func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    names = "input running_mean running_var weight bias training momentum eps"
    given = _bound(names, args, kwargs, training=False, momentum=0.1, eps=1e-5)
    if given["training"]:
        return NotImplemented  # couples examples
    x = F.batch_norm(**{name: given[name] for name in names.split() if name not in ("weight", "bias")})
    return _affine(book, given, x, (-1, *[1] * (x.dim() - 2)))


def _affine(book: "Bookkeeper", given: Mapping[str, Any], x: Tensor, shape: Sequence[int]) -> Any:
    weight, bias = given["weight"], given.get("bias")
    if not _free(book, weight, bias):
        return NotImplemented
    given_one = weight if weight is not None else bias
    assert given_one is not None
    size = given_one.numel()
    return book.apply(Affine(book, weight, bias, [size if n == -1 else n for n in shape]), x)


@_for(
    torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__rsub__,
    torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.div, Tensor.div, Tensor.__truediv__,
    Tensor.add_, Tensor.__iadd__, Tensor.sub_, Tensor.__isub__, Tensor.mul_, Tensor.__imul__, Tensor.div_,
    Tensor.__itruediv__, torch.where, Tensor.where, F.prelu, torch.prelu,
)  # fmt: skip
def _elementwise(book: "Bookkeeper", func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A bare parameter beside a batch: each example gets a copy of it."""
    batch = [a for a in args if isinstance(a, Tensor) and book.part(a) is None]
    most = max((a.dim() for a in batch), default=0)
    first = max((a.shape[0] for a in batch if a.dim() == most > 0), default=0)
    parts = [part for part in map(book.part, args) if part is not None]
    alone = [book.batchless(part, "beside", most, first) for part in parts]  # it takes note of all of them
    if not most or any(alone):
        return NotImplemented
    spread: list[Any] = []
    for a in args:
        part = book.part(a)
        if part is None:
            spread.append(a)
            continue
        shape = [*[1] * (most - a.dim()), *a.shape]
        if func in (F.prelu, torch.prelu):
            shape = [1, a.numel(), *[1] * (most - 2)]
        if len(shape) > most or shape[0] != 1:
            return NotImplemented
        spread.append(book.apply(Spread(book, a, shape), book.anchor))
    if func in (F.prelu, torch.prelu):
        x, slope = spread
        return torch.where(x > 0, x, slope * x)
    return func(*spread, **kwargs)


@_for(Tensor.expand, Tensor.repeat, Tensor.expand_as)
def _expand(book: "Bookkeeper", func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A token or position that is copied along the batch by hand."""
    given, sizes = args[0], args[1:]
    sizes = (
        sizes[0].shape if isinstance(sizes[0], Tensor) else sizes[0] if isinstance(sizes[0], tuple | list) else sizes
    )
    new = len(sizes) - given.dim()
    front = given.shape[0] if new == 0 else 1
    part = book.part(given)
    if kwargs or part is None or front != 1 or new < 0 or book.batchless(part, "copies", len(sizes), sizes[0]):
        return NotImplemented
    out = book.apply(Spread(book, given, [*[1] * new, *given.shape]), book.anchor)
    return out.repeat(1, *sizes[1:]) if func is Tensor.repeat else out.expand(-1, *sizes[1:])
