"""Checkpoints of small weights: every tensor in its shortest form, the whole compressed, nothing lost."""

import hashlib
import json
import lzma
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_guard.export.codes import DTYPES, Coded, checked, decoded, forms
from lightning_guard.export.tracing import ExportError

MAGIC = b"LGWC"
VERSION = 1
_START = struct.Struct("<4sBBQ32s")  # magic, version, compression, bytes within, their sha256
_ZLIB, _LZMA = 1, 2
# Bytes without context, as codes are no text; weights do not repeat far apart, and a large window is slow to make.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 0, "lp": 0, "pb": 0, "dict_size": 2**20}]
_MOST_HEADER = 64 * 2**20


def save_compressed(weights: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str]) -> dict[str, Coded]:
    """Writes weights bit for bit, as small as their zeros, their few values or their grid allow.

    Each tensor is stored in the smallest of its forms: as it is, as places in a list of at most 256 values, or as
    whole numbers of 2, 4 or 8 bits times a scale for each output channel; each with its zeros left out, if that is
    smaller. The whole is then compressed by zlib or LZMA. There is no pickle in the file.

    Args:
        weights: a module or a state dict. Tensors that are one in memory are one in the file.
        path: of the file; it is replaced once all of it is written.

    Returns:
        The form of each tensor, by name.

    Raises:
        ValueError: if something is no tensor, or of a dtype that no file holds.

    Example:
        >>> import tempfile, torch
        >>> layer = nn.Linear(8, 4)
        >>> path = f"{tempfile.mkdtemp()}/layer.lgw"
        >>> _ = save_compressed(layer, path)
        >>> torch.equal(load_compressed(path)["weight"], layer.weight)
        True
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    content, chosen = pack(state)
    with written(path) as part:
        part.write_bytes(content)
    return chosen


def load_compressed(path: str | os.PathLike[str], max_bytes: int = 8 * 2**30) -> dict[str, Tensor]:
    """The weights of a file that :func:`save_compressed` wrote, bit for bit, for ``module.load_state_dict``.

    Nothing in the file is executed, and none of its claims about sizes is believed before it is checked.

    Args:
        path: of the file.
        max_bytes: what the weights may take in memory; larger ones are refused.

    Raises:
        ValueError: if the file is cut short, changed, of another kind or of a later version, or too large.
        FileNotFoundError: if there is no such file.
    """
    try:
        return unpack(Path(path).read_bytes(), max_bytes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def pack(state: Mapping[str, Tensor]) -> tuple[bytes, dict[str, Coded]]:
    """The content of a file, and the form of each tensor."""
    chosen: dict[str, Coded] = {}
    first: dict[Any, str] = {}
    entries: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__} and no tensor, so no compressed file holds it")
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device, tensor.layout)
        if tensor.numel() and key in first:
            entries.append({"name": name, "same": first[key]})
            chosen[name] = chosen[first[key]]
            continue
        first[key] = name
        chosen[name] = best(tensor)
        entries.append({"name": name, **chosen[name].head()})
        blobs += chosen[name].blobs
    header = json.dumps(entries, separators=(",", ":")).encode()
    content = b"".join([struct.pack("<I", len(header)), header, *blobs])
    small = {_ZLIB: zlib.compress(content, 9), _LZMA: lzma.compress(content, lzma.FORMAT_RAW, filters=_FILTERS)}
    kind = min(small, key=lambda kind: len(small[kind]))
    start = _START.pack(MAGIC, VERSION, kind, len(content), hashlib.sha256(content).digest())
    return start + small[kind], chosen


def best(tensor: Tensor) -> Coded:
    """The form of a tensor that is smallest when compressed; the simpler of equals."""

    def size(coded: Coded) -> int:
        content = b"".join(coded.blobs)
        return min(len(zlib.compress(content, 9)), len(lzma.compress(content, lzma.FORMAT_RAW, filters=_FILTERS)))

    return min(forms(tensor), key=size)


def unpack(content: bytes, max_bytes: int) -> dict[str, Tensor]:
    """The state dict of a file's content."""
    if content[:4] != MAGIC:
        raise ValueError("is no compressed checkpoint; torch.load or lightning_guard.export.load may read it")
    if len(content) < _START.size:
        raise ValueError("is cut short")
    _, version, kind, size, digest = _START.unpack_from(content)
    if version != VERSION:
        raise ValueError(f"is of format {version}, and this version of Lightning Guard reads {VERSION}; update it")
    if size > max_bytes + _MOST_HEADER:
        raise ValueError(f"claims {size} bytes of weights, above max_bytes={max_bytes}")
    inner = _inflated(content[_START.size :], kind, size)
    if len(inner) != size or hashlib.sha256(inner).digest() != digest:
        raise ValueError("is cut short or was changed: its sha256 is not what it says")
    try:
        (length,) = struct.unpack_from("<I", inner)
        entries = json.loads(inner[4 : 4 + length])
        return _tensors(entries, memoryview(inner)[4 + length :], max_bytes)
    except (struct.error, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"is no valid checkpoint ({type(error).__name__})") from None


def _inflated(packed: bytes, kind: int, size: int) -> bytes:
    if kind not in (_ZLIB, _LZMA):
        raise ValueError(f"is compressed in a way that is not known ({kind})")
    opened: Any = zlib.decompressobj() if kind == _ZLIB else lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTERS)
    try:
        inner: bytes = opened.decompress(packed, size + 1)  # never more, whatever the file holds
    except (zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"is cut short or was changed ({error})") from None
    if not opened.eof or opened.unused_data:
        raise ValueError("is cut short or was changed: its end is not where it says")
    return inner


def _tensors(entries: Any, rest: memoryview, max_bytes: int) -> dict[str, Tensor]:
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and isinstance(e.get("name"), str) for e in entries
    ):
        raise ValueError("is no valid checkpoint: its header lists no tensors")
    state: dict[str, Tensor] = {}
    budget = max_bytes
    for entry in entries:
        name = entry.pop("name")
        if name in state:
            raise ValueError(f"names {name!r} twice")
        if "same" in entry:
            state[name] = state[entry["same"]]
            continue
        coded = checked(entry)
        budget -= coded.count * DTYPES[coded.dtype].itemsize
        if budget < 0:
            raise ValueError(f"claims more weights than max_bytes={max_bytes}")
        for length in entry["blobs"]:
            if type(length) is not int or not 0 <= length <= len(rest):
                raise ValueError(f"is cut short at {name!r}")
            coded.blobs.append(bytes(rest[:length]))
            rest = rest[length:]
        try:
            state[name] = decoded(coded)
        except ValueError as error:
            raise ValueError(f"is no valid checkpoint at {name!r}: {error}") from None
    if len(rest):
        raise ValueError("holds more than its header lists")
    return state


@contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A place to write to, which becomes ``path`` when all went well, and is removed when it did not."""
    whole = Path(path)
    if not whole.parent.is_dir():
        raise ExportError(f"path={str(path)!r} is in no folder that exists; make {whole.parent} first")
    if whole.is_dir():
        raise ExportError(f"path={str(path)!r} is a folder; name a file in it")
    part = whole.with_name(f".{whole.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, whole)
    finally:
        part.unlink(missing_ok=True)
