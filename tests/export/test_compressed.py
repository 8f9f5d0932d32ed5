"""Compressed checkpoints: the same bits, into the plain class; hostile and broken files are refused in words."""

import hashlib
import json
import os
import struct
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_guard.export import load_compressed, save_compressed
from lightning_guard.export.compressed import MAGIC, pack
from lightning_guard.functional import stream
from lightning_guard.models import SmallTransformer
from tests import toys
from tests.export.test_codes import on_grid, same_bits


def equal(one, other):
    return list(one) == list(other) and all(same_bits(one[key].cpu(), other[key].cpu()) for key in one)


def file_of(header, content=b"", version=1, kind=1, size=None):
    """A file by the letter of the format, whatever it claims."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    inner = struct.pack("<I", len(text)) + text + content
    start = struct.pack(
        "<4sBBQ32s", MAGIC, version, kind, len(inner) if size is None else size, hashlib.sha256(inner).digest()
    )
    with open("hostile.lgw", "wb") as file:
        file.write(start + zlib.compress(inner))
    return "hostile.lgw"


@pytest.mark.parametrize("make", [toys.Net, SmallTransformer, lambda: nn.MultiheadAttention(8, 2), nn.Identity])
def test_it_loads_into_the_plain_class(make):
    module = make()
    save_compressed(module, "weights.lgw")
    loaded = load_compressed("weights.lgw")
    assert equal(module.state_dict(), loaded)
    fresh = make()
    fresh.load_state_dict(loaded)
    assert toys.same(module, fresh)


def test_sparse_weights_on_a_grid_take_a_twentieth():
    _, weight = on_grid((256, 256), 127)
    weight[torch.rand(256, 256, generator=stream(8)) < 0.9] = 0.0
    chosen = save_compressed({"weight": weight}, "small.lgw")
    assert chosen["weight"].kind == "grid"
    assert chosen["weight"].masked
    assert os.path.getsize("small.lgw") < weight.numel() * 4 / 20
    assert same_bits(load_compressed("small.lgw")["weight"], weight)


def test_weights_that_are_one_stay_one():
    module = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    apart = len(pack(module.state_dict())[0])
    module[1].weight = module[0].weight
    assert len(pack(module.state_dict())[0]) < 0.6 * apart
    save_compressed(module, "tied.lgw")
    loaded = load_compressed("tied.lgw")
    assert loaded["1.weight"] is loaded["0.weight"]
    assert equal(loaded, module.state_dict())


def test_a_part_of_a_tensor_is_no_twin_of_it():
    whole = torch.randn(6, 4)
    state = {"whole": whole, "half": whole[:3], "turned": whole.T}
    save_compressed(state, "parts.lgw")
    assert equal(load_compressed("parts.lgw"), state)


def test_the_same_weights_are_the_same_file():
    state = toys.Net().state_dict()
    assert pack(state)[0] == pack({key: value.clone() for key, value in state.items()})[0]


def test_the_file_is_replaced_whole_or_not_at_all(monkeypatch):
    save_compressed({"a": torch.ones(3)}, "file.lgw")
    with pytest.raises(ValueError, match="no tensor"):
        save_compressed({"a": torch.ones(3), "b": "text"}, "file.lgw")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        save_compressed({"a": torch.zeros(3)}, "file.lgw")
    assert torch.equal(load_compressed("file.lgw")["a"], torch.ones(3))
    assert os.listdir() == ["file.lgw"]


@pytest.mark.parametrize("cut", [3, 4, 20, 45, 46, 60, -1])
def test_a_file_cut_short_is_refused(cut):
    save_compressed(nn.Linear(50, 20), "whole.lgw")
    content = Path("whole.lgw").read_bytes()
    Path("cut.lgw").write_bytes(content[:cut])
    with pytest.raises(ValueError, match=r"cut\.lgw: is (cut short|no compressed)"):
        load_compressed("cut.lgw")


def test_a_changed_byte_is_noticed():
    save_compressed(nn.Linear(9, 5), "whole.lgw")
    content = bytearray(Path("whole.lgw").read_bytes())
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 0x40
        Path("changed.lgw").write_bytes(changed)
        with pytest.raises(ValueError, match=r"changed\.lgw: "):
            load_compressed("changed.lgw")


HEAD = {"name": "w", "kind": "dense", "dtype": "float32", "shape": [2], "masked": False, "negative": False, "bits": 32,
        "axis": None, "blobs": [8]}  # fmt: skip
PALETTE = {**HEAD, "kind": "palette", "bits": 0, "blobs": [4, 0]}

HOSTILE = [
    (([HEAD], b"\0" * 8), {"version": 2}, "format 2"),
    (([HEAD], b"\0" * 8), {"kind": 9}, "compressed in a way"),
    (([HEAD], b"\0" * 8), {"size": 2**62}, "above max_bytes"),
    ((b"[" * 100_000, b""), {}, "no valid checkpoint"),
    ((b"{}", b""), {}, "lists no tensors"),
    ((b"\xff", b""), {}, "no valid checkpoint"),
    (([{**HEAD, "name": 3}], b""), {}, "lists no tensors"),
    (([HEAD, HEAD], b"\0" * 16), {}, "names 'w' twice"),
    (([{"name": "w", "same": "v"}], b""), {}, "no valid checkpoint"),
    (([{**HEAD, "blobs": [-1]}], b""), {}, "cut short at 'w'"),
    (([{**HEAD, "blobs": [2**40]}], b""), {}, "cut short at 'w'"),
    (([{**HEAD, "blobs": []}], b""), {}, "a part is missing"),
    (([{**HEAD, "blobs": [8, 0]}], b"\0" * 8), {}, "more parts"),
    (([{**HEAD, "shape": [3]}], b"\0" * 8), {}, "not as many"),
    (([HEAD], b"\0" * 9), {}, "more than its header"),
    (([{**PALETTE, "shape": [10**9, 10**9]}], b"\0" * 4), {}, "more weights than max_bytes"),  # a bomb of one value
    (([{**PALETTE, "bits": 1, "blobs": [4, 1]}], b"\0\0\0\0\xff"), {}, "code has no value"),
    (([{**HEAD, "kind": "grid", "bits": 8, "blobs": [8, 2]}], b"\0" * 10), {}, "scales are not those"),
    (([{**HEAD, "masked": True, "blobs": [0, 8]}], b"\0" * 8), {}, "mask is not as long"),
]


@pytest.mark.parametrize(("parts", "claims", "words"), HOSTILE, ids=[words for *_, words in HOSTILE])
def test_a_hostile_file_is_refused_in_words(parts, claims, words):
    assert equal(load_compressed(file_of([HEAD], b"\0" * 8)), {"w": torch.zeros(2)})
    with pytest.raises(ValueError, match=rf"hostile\.lgw: .*{words}"):
        load_compressed(file_of(*parts, **claims), max_bytes=2**20)


def test_a_bomb_is_not_inflated():
    inner = zlib.compress(bytes(200 * 2**20), 9)
    start = struct.pack("<4sBBQ32s", MAGIC, 1, 1, 1000, bytes(32))
    Path("bomb.lgw").write_bytes(start + inner)
    with pytest.raises(ValueError, match="was changed"):
        load_compressed("bomb.lgw")


def test_other_files_are_told_apart():
    torch.save(nn.Linear(2, 2).state_dict(), "weights.pt")
    with pytest.raises(ValueError, match="no compressed checkpoint"):
        load_compressed("weights.pt")
    with pytest.raises(FileNotFoundError):
        load_compressed("nothing.lgw")


def test_a_path_that_cannot_be_is_told():
    with pytest.raises(ValueError, match="no folder that exists"):
        save_compressed(nn.Linear(2, 2), "no/such/folder.lgw")
    os.mkdir("folder")
    with pytest.raises(ValueError, match="is a folder"):
        save_compressed(nn.Linear(2, 2), "folder")
