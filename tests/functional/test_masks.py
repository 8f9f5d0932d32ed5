"""Masks against brute force."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_guard.functional import bit_mask, clear_, cubic_sparsity, magnitude_masks, pack_mask, unpack_mask

# Few values, so that ties are common.
NUMBERS = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 2.0, 1e-30, math.inf, math.nan])
WEIGHTS = st.dictionaries(st.sampled_from("abcd"), st.lists(NUMBERS, max_size=12), max_size=4)
SPARSITY = st.floats(0, 0.999)


def tensors(weights: dict[str, list[float]]) -> dict[str, torch.Tensor]:
    found = {name: torch.tensor(values, dtype=torch.float32) for name, values in weights.items()}
    return {name: w.reshape(2, -1) if w.numel() % 2 == 0 and w.numel() else w for name, w in found.items()}


def brute_force(weights, sparsity, masks=None):
    """Places dropped one by one: those already dropped, then by magnitude, NaN last; equals in their order."""
    places = [(name, i) for name, w in weights.items() for i in range(w.numel())]

    def rank(place):
        name, i = place
        if masks is not None and not masks[name].flatten()[i]:
            return False, -1.0
        value = abs(weights[name].flatten()[i].item())
        return math.isnan(value), 0.0 if math.isnan(value) else value

    order = sorted(places, key=rank)  # stable
    gone = sum(rank(place) == (False, -1.0) for place in places)
    dropped = set(order[: max(round(sparsity * len(places)), gone)])
    return {name: [(name, i) not in dropped for i in range(w.numel())] for name, w in weights.items()}


@settings(max_examples=150, deadline=None)
@given(WEIGHTS, SPARSITY, st.sampled_from(["global", "layer"]))
def test_masks_are_those_of_brute_force(values, sparsity, scope):
    weights = tensors(values)
    masks = magnitude_masks(weights, sparsity, scope)
    if scope == "global":
        wanted = brute_force(weights, sparsity)
    else:
        wanted = {name: brute_force({name: w}, sparsity)[name] for name, w in weights.items()}
    assert {name: mask.flatten().tolist() for name, mask in masks.items()} == wanted
    assert all(mask.dtype == torch.bool and mask.shape == weights[name].shape for name, mask in masks.items())


@settings(max_examples=100, deadline=None)
@given(WEIGHTS, SPARSITY, SPARSITY, st.sampled_from(["global", "layer"]))
def test_what_is_dropped_stays_dropped(values, first, second, scope):
    weights = tensors(values)
    earlier = magnitude_masks(weights, first, scope)
    moved = {name: w.flip(0) for name, w in weights.items()}  # other weights are small now
    later = magnitude_masks(moved, second, scope, earlier)
    for name in weights:
        assert not (later[name] & ~earlier[name]).any()
    parts = [weights] if scope == "global" else [{name: w} for name, w in weights.items()]
    for part in parts:
        n = sum(w.numel() for w in part.values())
        dropped = sum(int((~later[name]).sum()) for name in part)
        assert dropped == max(round(first * n), round(second * n))
        if scope == "global":
            assert {k: v.flatten().tolist() for k, v in later.items()} == brute_force(moved, second, earlier)


@pytest.mark.parametrize("n", [1, 7, 64, 1000])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.995])
def test_the_count_is_exact_even_where_all_are_equal(n, sparsity):
    mask = magnitude_masks({"w": torch.ones(n)}, sparsity)["w"]
    gone = round(sparsity * n)
    assert mask.tolist() == [False] * gone + [True] * (n - gone)


def test_types_and_small_differences_count():
    half, full = torch.tensor([3.0, 0.1], dtype=torch.bfloat16), torch.tensor([1.0, 0.05])
    masks = magnitude_masks({"half": half, "full": full}, 0.5)
    assert masks["half"].tolist() == [True, False]
    assert masks["full"].tolist() == [True, False]
    double = torch.tensor([1.0 + 1e-12, 1.0], dtype=torch.float64)  # equal in float32
    assert magnitude_masks({"w": double}, 0.5)["w"].tolist() == [True, False]
    assert magnitude_masks({"w": torch.nn.Parameter(double)}, 0.5)["w"].requires_grad is False


def test_nothing_to_prune_is_no_error():
    assert magnitude_masks({}, 0.5) == {}
    assert magnitude_masks({"w": torch.empty(0, 3)}, 0.5)["w"].shape == (0, 3)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan])
def test_no_fraction_is_refused_by_name(sparsity):
    with pytest.raises(ValueError, match=f"sparsity={sparsity}"):
        magnitude_masks({"w": torch.ones(2)}, sparsity)


def test_an_unknown_scope_is_refused_by_name():
    with pytest.raises(ValueError, match="scope='row'"):
        magnitude_masks({"w": torch.ones(2)}, 0.5, "row")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=4).map(tuple), st.integers(0, 100))
def test_packing_comes_back(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (-(-mask.numel() // 8),)
    assert torch.equal(unpack_mask(packed, mask.shape), mask)
    assert torch.equal(unpack_mask(packed, tuple(mask.shape)), mask)


def test_bits_are_packed_from_the_lowest():
    assert pack_mask(torch.tensor([True] + [False] * 8 + [True])).tolist() == [1, 2]


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 0.99), st.floats(0, 0.99), st.floats(0, 1), st.floats(0, 1))
def test_the_cubic_schedule_rises_from_end_to_end(a, b, early, late):
    initial, final = sorted((a, b))
    early, late = sorted((early, late))
    assert cubic_sparsity(0.0, final, initial) == pytest.approx(initial, abs=1e-15)
    assert cubic_sparsity(1.0, final, initial) == final
    assert cubic_sparsity(early, final, initial) <= cubic_sparsity(late, final, initial) + 1e-15
    assert cubic_sparsity(late, final, initial) == pytest.approx(final + (initial - final) * (1 - late) ** 3)


def test_outside_the_schedule_its_ends_hold():
    assert cubic_sparsity(-1.0, 0.8, 0.1) == pytest.approx(0.1)
    assert cubic_sparsity(2.0, 0.8, 0.1) == 0.8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_clearing_is_exact_even_for_what_is_no_number(dtype):
    values = torch.tensor([1.5, -2.0, float("nan"), float("inf"), -0.0, 3.0], dtype=dtype)
    kept = torch.tensor([True, False, False, False, False, True])
    expected = values.masked_fill(~kept, 0)
    clear_(values, bit_mask(kept, dtype))
    assert torch.equal(values, expected)
    assert not values.signbit()[1:5].any()


def test_clearing_counts_as_a_change_for_autograd():
    weight = torch.nn.Parameter(torch.ones(2))
    squared = (weight * weight).sum()
    clear_(weight, bit_mask(torch.tensor([True, False]), weight.dtype))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()
