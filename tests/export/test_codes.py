"""Forms of weights: each is the tensor bit for bit, and those that should be short are."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_guard.export.codes import checked, decoded, forms
from lightning_guard.export.compressed import best
from lightning_guard.functional import stream

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def same_bits(one, other):
    """Bitwise, so that NaN equals itself and zeros have signs; the oracle is numpy's bytes."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    raw = [t.contiguous().reshape(-1).view(torch.uint8) if t.numel() else t.reshape(-1) for t in (one, other)]
    return torch.equal(*raw)


def kinds(tensor):
    return {(coded.kind, coded.bits, coded.masked) for coded in forms(tensor)}


def on_grid(shape, qmax, axis=0, seed=0, dtype=torch.float32):
    """Codes and scales multiplied as quantisation-aware training does."""
    draws = stream(seed)
    codes = torch.randint(-qmax, qmax + 1, shape, generator=draws)
    scales = (torch.rand(shape[axis], generator=draws) + 0.1) / 37
    wide = scales.to(dtype).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return codes, codes.to(dtype) * wide


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 5), max_size=3),
    st.sampled_from(["any", "few", "sparse", "grid", "zeros", "odd"]),
    st.integers(0, 10**6),
)
def test_every_form_is_the_tensor(dtype, shape, content, seed):
    draws = stream(seed)
    x = torch.randn(shape, generator=draws)
    x = {
        "any": x * 50,
        "few": x.sign(),
        "sparse": x * (torch.rand(shape, generator=draws) > 0.8),  # with negative zeros
        "grid": (x * 3).round() * 0.037,
        "zeros": x * 0,
        "odd": torch.where(x > 0, x / 0, x * float("nan")),
    }[content]
    tensor = (x.nan_to_num(0, 1, 1) if not dtype.is_floating_point else x).to(dtype)
    found = list(forms(tensor))
    assert found[0].kind == "dense"
    for coded in found:
        again = checked(coded.head())
        again.blobs = coded.blobs
        assert same_bits(decoded(again), tensor)


@pytest.mark.parametrize(("qmax", "bits"), [(127, 8), (7, 4), (1, 2)])
@pytest.mark.parametrize("axis", [0, 1])
def test_weights_on_a_grid_are_found_there(qmax, bits, axis):
    codes, weight = on_grid((24, 24, 3, 3), qmax, axis)
    found = [coded for coded in forms(weight) if coded.kind == "grid"]
    assert {(coded.bits, coded.axis) for coded in found} == {(bits, axis)}
    sizes = {coded.masked: sum(map(len, coded.blobs)) for coded in found}
    assert sizes[False] == codes.numel() * bits / 8 + 4 * 24  # codes and a scale a channel
    assert all(same_bits(decoded(coded), weight) for coded in found)


def test_the_scale_is_found_where_no_weight_has_the_largest_code():
    _, weight = on_grid((4, 50), 127)
    weight = torch.where(weight.abs() > weight.abs().amax(1, keepdim=True) * 0.6, 0.0, weight)
    assert ("grid", 8, False) in kinds(weight)


def test_off_the_grid_by_one_bit_is_no_grid():
    _, weight = on_grid((4, 400), 127)
    assert ("grid", 8, False) in kinds(weight)
    weight[2, 7] = torch.nextafter(weight[2, 7], torch.tensor(9.0))
    assert not any(kind == "grid" for kind, _, _ in kinds(weight))
    assert same_bits(decoded(best(weight)), weight)


def test_random_weights_are_on_no_grid():
    assert {kind for kind, _, _ in kinds(torch.randn(16, 200, generator=stream(0)))} == {"dense"}


def test_few_values_are_a_palette():
    book = torch.randn(16, generator=stream(1))
    weight = book[torch.randint(16, (64, 64), generator=stream(2))]
    palette = next(coded for coded in forms(weight) if coded.kind == "palette")
    assert palette.bits == 4
    assert sum(map(len, palette.blobs)) == 64 * 64 // 2 + 16 * 4
    assert best(weight).kind == "palette"


@pytest.mark.parametrize("values", [256, 257])
def test_a_palette_has_256_values_at_most(values):
    weight = torch.arange(values).float().exp2() if values < 100 else torch.randn(values, generator=stream(3))
    assert any(kind == "palette" for kind, _, _ in kinds(weight)) is (values == 256)


def test_zeros_are_left_out_and_keep_their_sign():
    weight = torch.randn(100, 100, generator=stream(4))
    weight[torch.rand(100, 100, generator=stream(5)) < 0.9] = 0.0
    masked = next(coded for coded in forms(weight) if coded.masked)
    assert sum(map(len, masked.blobs)) == 100 * 100 // 8 + 4 * int(weight.count_nonzero())
    assert best(weight).masked
    weight[weight == 0] = -0.0
    assert torch.signbit(decoded(best(weight))[weight == 0]).all()


def test_one_value_takes_no_codes():
    assert best(torch.full((50, 50), 0.1)).bits == 0
    assert same_bits(decoded(best(torch.full((50, 50), 0.1))), torch.full((50, 50), 0.1))


def test_what_no_file_holds_is_refused():
    with pytest.raises(ValueError, match="no compressed form"):
        list(forms(torch.eye(3).to_sparse()))
    with pytest.raises(ValueError, match="float8"):
        list(forms(torch.zeros(3).to(torch.float8_e4m3fn)))


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "zip"}, {"dtype": "object"}, {"bits": 3}, {"shape": [-1]}, {"shape": [1.5]}, {"axis": 7},
        {"surprise": 1}, {"kind": "grid", "dtype": "int64", "bits": 8}, {"dtype": "complex128", "masked": True},
    ],
)  # fmt: skip
def test_a_head_that_is_no_form_is_refused(change):
    head = next(forms(torch.randn(3, 4))).head()
    checked(head)
    with pytest.raises(ValueError, match="entry is no"):
        checked({**head, **change})


def test_codes_are_little_endian_within_a_byte():
    """The format on disk must not change unnoticed: two codes a byte, the first in the low half."""
    weight = torch.tensor([0.5, 2.0, 2.0, -1.0, 0.5])
    palette = next(coded for coded in forms(weight) if coded.kind == "palette")
    values = np.frombuffer(palette.blobs[0], np.float32).tolist()
    assert values == [0.5, 2.0, -1.0]  # in the order of their bits
    assert palette.blobs[1] == bytes([0b10_01_01_00, 0b00])
