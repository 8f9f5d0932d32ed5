"""Short forms of weights, each bit for bit: zeros left out, few values, whole numbers times a scale."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

Kind = Literal["dense", "palette", "grid"]

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool, torch.complex64, torch.complex128,
    )
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_GRIDS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_UNSIGNED: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("<u2"),
    4: np.dtype("<u4"),
    8: np.dtype("<u8"),
    16: np.dtype("V16"),
}
_QMAX = 127  # of 8 bits


@dataclass
class Coded:
    """A tensor in one of its short forms.

    Args:
        kind: ``"dense"``, the values; ``"palette"``, places in a list of at most 256 values; ``"grid"``, whole
            numbers times a scale for each output channel, or for the whole tensor.
        dtype: of the tensor.
        shape: of the tensor.
        masked: zeros are left out, and a bit says where they are.
        negative: a bit for each zero says whether it is a negative one.
        bits: of each value: 1, 2, 4, 8 for codes, else those of the dtype; 0 if there is but one value.
        axis: of the output channels of a grid; None if it has one scale.
        blobs: the bytes, part by part.
    """

    kind: Kind
    dtype: str
    shape: list[int]
    masked: bool = False
    negative: bool = False
    bits: int = 32
    axis: int | None = None
    blobs: list[bytes] = field(default_factory=list, repr=False)

    def head(self) -> dict[str, Any]:
        """All but the bytes, as JSON takes it."""
        return {**{k: v for k, v in vars(self).items() if k != "blobs"}, "blobs": [len(blob) for blob in self.blobs]}

    @property
    def count(self) -> int:
        """Number of values of the tensor."""
        return math.prod(self.shape)


def forms(tensor: Tensor) -> Iterator[Coded]:
    """Every form that this tensor has, the dense one first.

    | case                                  | result                                          |
    |---------------------------------------|-------------------------------------------------|
    | negative zeros, NaN, infinities       | kept bit for bit                                |
    | no values at all                      | the dense form alone                            |
    | more than 256 different values        | no palette                                      |
    | one value off the grid by one bit     | no grid                                         |

    Raises:
        ValueError: if the tensor is of a dtype or layout that no file holds.
    """
    tensor = tensor.detach().cpu()
    if tensor.dtype not in _NAMES or tensor.layout is not torch.strided:
        raise ValueError(f"a tensor of {tensor.dtype}, {tensor.layout} has no compressed form; convert it first")
    tensor = tensor.contiguous()
    bits, name = _bits(tensor), _NAMES[tensor.dtype]
    width = 8 * tensor.element_size()
    yield Coded("dense", name, list(tensor.shape), bits=width, blobs=[_planes(bits)])
    if not bits.size or width > 64:
        return
    floating = tensor.is_floating_point()
    zero = (tensor == 0).flatten().numpy() if floating else bits == 0
    minus = bits[zero] != 0
    grid = _grid(tensor) if tensor.dtype in _GRIDS and tensor.dim() > 0 else None
    for masked in (False, True) if zero.any() else (False,):
        front = [_packed(zero)] + ([_packed(minus)] if minus.any() else []) if masked else []
        kept = bits[~zero] if masked else bits
        common: dict[str, Any] = {"dtype": name, "shape": list(tensor.shape), "masked": masked}
        common["negative"] = bool(masked and minus.any())
        if masked:
            yield Coded("dense", bits=width, blobs=[*front, _planes(kept)], **common)
        values, places = np.unique(kept, return_inverse=True)
        if 0 < len(values) <= 256:
            size = next(size for size in (0, 1, 2, 4, 8) if len(values) <= 2**size)
            blobs = [*front, values.tobytes(), _narrow(places.astype(np.uint8), size)]
            yield Coded("palette", bits=size, blobs=blobs, **common)
        if grid is not None and (masked or not minus.any()):
            codes, scales, axis = grid
            most = int(np.abs(codes).max(initial=0))
            size = next(size for size in (2, 4, 8) if most <= 2 ** (size - 1) - 1)
            shifted = (codes[~zero] if masked else codes) + 2 ** (size - 1)
            blobs = [*front, scales, _narrow(shifted.astype(np.uint8), size)]
            yield Coded("grid", bits=size, axis=axis, blobs=blobs, **common)


def decoded(coded: Coded) -> Tensor:
    """The tensor of a form, bit for bit.

    Raises:
        ValueError: if the parts do not fit together.
    """
    dtype, count = DTYPES[coded.dtype], coded.count
    raw = _UNSIGNED[dtype.itemsize]
    parts = iter(coded.blobs)
    zero = minus = None
    if coded.masked:
        zero = _unpacked(_next(parts), count)
        minus = _unpacked(_next(parts), int(zero.sum())) if coded.negative else None
    kept = count if zero is None else count - int(zero.sum())
    if coded.kind == "dense":
        values = _unplanes(_next(parts), kept, raw)
    elif coded.kind == "palette":
        book = np.frombuffer(_next(parts), raw)
        places = _wide(_next(parts), kept, coded.bits)
        if kept and int(places.max()) >= len(book):
            raise ValueError("a code has no value")
        values = book[places]
    else:
        scales = np.frombuffer(_next(parts), raw)
        codes = _wide(_next(parts), kept, coded.bits).astype(np.int16) - 2 ** (coded.bits - 1)
        whole = codes
        if zero is not None:
            whole = np.zeros(count, np.int16)
            whole[~zero] = codes
        values = _bits(_on_grid(torch.from_numpy(whole), scales, coded))
        values = values if zero is None else values[~zero]
    if next(parts, None) is not None:
        raise ValueError("there are more parts than the form has")
    if zero is not None:
        whole = np.zeros(count, raw)
        whole[~zero] = values
        if minus is not None:
            places = np.flatnonzero(zero)[minus]
            whole[places] = raw.type(1) << raw.type(8 * raw.itemsize - 1)
        values = whole
    return (
        torch.frombuffer(bytearray(values.tobytes()), dtype=torch.uint8).view(dtype).reshape(coded.shape)
        if count
        else torch.empty(coded.shape, dtype=dtype)
    )


def checked(head: dict[str, Any]) -> Coded:
    """A form without its bytes, from what a file says.

    Raises:
        ValueError: if that is no form.
    """
    try:
        coded = Coded(**{key: value for key, value in head.items() if key != "blobs"})
    except TypeError:
        raise ValueError("an entry is no tensor") from None
    whole = [*coded.shape, coded.bits, *([] if coded.axis is None else [coded.axis])]
    codes = {"dense": {8, 16, 32, 64, 128}, "palette": {0, 1, 2, 4, 8}, "grid": {2, 4, 8}}
    if (
        coded.kind not in get_args(Kind)
        or coded.dtype not in DTYPES
        or not all(type(n) is int and n >= 0 for n in whole)
        or coded.bits not in codes[coded.kind]
        or (coded.axis is not None and coded.axis >= len(coded.shape))
        or (coded.kind == "grid" and DTYPES[coded.dtype] not in _GRIDS)
        or ((coded.kind != "dense" or coded.masked) and DTYPES[coded.dtype].itemsize > 8)
    ):
        raise ValueError("an entry is no form of a tensor")
    return coded


def _grid(tensor: Tensor) -> tuple[np.ndarray, bytes, int | None] | None:
    """Codes, scales and axis such that ``codes * scales`` is the tensor; None if there are none of 8 bits."""
    for axis in (None, 0, 1)[: tensor.dim() + 1]:
        if axis is not None and (tensor.dim() < 2 or tensor.shape[axis] == 1):
            continue
        rows = tensor.reshape(1, -1) if axis is None else tensor.movedim(axis, 0).flatten(1)
        found: list[Tensor] = []
        for row in rows:
            scale = _scale(row)
            if scale is None:
                break
            found.append(scale)
        else:
            scales = torch.stack(found)
            wide = scales.reshape([-1 if i == axis else 1 for i in range(tensor.dim())])
            codes = (tensor.double() / wide.double()).round().to(torch.int16)
            if torch.equal(codes.to(tensor.dtype) * wide, tensor):
                return codes.flatten().numpy(), _bits(scales).tobytes(), axis
    return None


def _scale(row: Tensor) -> Tensor | None:
    """The coarsest scale of which all values are multiples, bit for bit, up to 127 times."""
    values = row[row != 0].abs().unique()
    if not len(values):
        return torch.ones((), dtype=row.dtype)
    if len(values) > _QMAX or not bool(values.isfinite().all()):
        return None
    most = values[-1].double()
    steps = torch.arange(len(values), _QMAX + 1, dtype=torch.float64)
    multiples = values.double()[:, None] * steps / most
    slack = 2 * torch.finfo(row.dtype).eps * steps
    fits = ((multiples - multiples.round()).abs() <= slack).all(0)
    for step in steps[fits]:
        codes = (values.double() * step / most).round().to(row.dtype)
        scale = (most / step).to(row.dtype)
        below = above = scale
        for _ in range(3):  # the scale that was multiplied may be a neighbour of this quotient
            for candidate in (below, above):
                if candidate > 0 and torch.equal(codes * candidate, values):
                    return candidate
            below = torch.nextafter(below, torch.zeros_like(scale))
            above = torch.nextafter(above, torch.full_like(scale, math.inf))
    return None


def _on_grid(codes: Tensor, scales: np.ndarray, coded: Coded) -> Tensor:
    dtype = DTYPES[coded.dtype]
    wide = torch.frombuffer(bytearray(scales.tobytes()), dtype=torch.uint8).view(dtype)
    if len(wide) != (1 if coded.axis is None else coded.shape[coded.axis]):
        raise ValueError("the scales are not those of the channels")
    shape = [-1 if i == coded.axis else 1 for i in range(len(coded.shape))]
    return codes.reshape(coded.shape).to(dtype) * wide.reshape(shape)


def _bits(tensor: Tensor) -> np.ndarray:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.zeros(0, np.uint8)
    return raw.view(_UNSIGNED[tensor.element_size()])


def _planes(bits: np.ndarray) -> bytes:
    """The first bytes of all values, then the second ones: exponents beside exponents compress."""
    return bits.view(np.uint8).reshape(-1, bits.itemsize).T.tobytes()


def _unplanes(blob: bytes, count: int, raw: np.dtype) -> np.ndarray:
    if len(blob) != count * raw.itemsize:
        raise ValueError("the values are not as many as the shape says")
    return np.frombuffer(np.frombuffer(blob, np.uint8).reshape(raw.itemsize, count).T.tobytes(), raw)


def _packed(flags: np.ndarray) -> bytes:
    return np.packbits(flags).tobytes()


def _unpacked(blob: bytes, count: int) -> np.ndarray:
    if len(blob) != -(-count // 8):
        raise ValueError("the mask is not as long as the shape says")
    return np.unpackbits(np.frombuffer(blob, np.uint8), count=count).astype(bool)


def _narrow(codes: np.ndarray, bits: int) -> bytes:
    """Codes of 1, 2, 4 or 8 bits, several a byte; of 0 bits there is nothing to say."""
    if bits in (0, 8):
        return codes.tobytes() if bits else b""
    per = 8 // bits
    padded = np.zeros(-(-len(codes) // per) * per, np.uint8)
    padded[: len(codes)] = codes
    shifts = np.arange(per, dtype=np.uint8) * bits
    return np.bitwise_or.reduce(padded.reshape(-1, per) << shifts, axis=1).astype(np.uint8).tobytes()


def _wide(blob: bytes, count: int, bits: int) -> np.ndarray:
    if len(blob) != -(-count * bits // 8):
        raise ValueError("the codes are not as many as the shape says")
    if not bits:
        return np.zeros(count, np.uint8)
    shifts = np.arange(8 // bits, dtype=np.uint8) * bits
    spread = (np.frombuffer(blob, np.uint8)[:, None] >> shifts) & np.uint8(2**bits - 1)
    return spread.reshape(-1)[:count]


def _next(parts: Iterator[bytes]) -> bytes:
    found = next(parts, None)
    if found is None:
        raise ValueError("a part is missing")
    return found
