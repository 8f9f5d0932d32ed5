"""Masks against brute force."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_guard.functional import (
    bit_mask,
    clear_,
    cubic_sparsity,
    floors,
    magnitude_masks,
    pack_mask,
    pattern_masks,
    regrown_masks,
    score_masks,
    smallest,
    unpack_mask,
)

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


def flat(masks):
    return {name: mask.flatten().tolist() for name, mask in masks.items()}


def brute_force_with_floor(scores, sparsity, min_keep):
    """The best of each tensor are safe; the rest are dropped one by one, lowest first."""
    places = [(score.flatten()[i].item(), name, i) for name, score in scores.items() for i in range(score.numel())]
    safe = set()
    for name, score in scores.items():
        order = sorted(range(score.numel()), key=lambda i: score.flatten()[i].item())
        safe |= {(name, i) for i in order[score.numel() - math.ceil(min_keep * score.numel()) :]}
    order = sorted((place for place in places if place[1:] not in safe), key=lambda place: place[0])
    gone = {place[1:] for place in order[: round(sparsity * len(places))]}
    return {name: [(name, i) not in gone for i in range(score.numel())] for name, score in scores.items()}


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcd"), st.lists(st.integers(-3, 3), max_size=12), min_size=1, max_size=4),
    st.floats(0, 0.99),
    st.floats(0, 0.5),
)
def test_floors_are_those_of_brute_force(values, sparsity, min_keep):
    scores = {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}
    sizes = {name: score.numel() for name, score in scores.items()}
    total = sum(sizes.values())
    if sum(math.ceil(min_keep * n) for n in sizes.values()) > total - round(sparsity * total):
        with pytest.raises(ValueError, match="min_keep="):
            score_masks(scores, sparsity, min_keep=min_keep)
        return
    assert flat(score_masks(scores, sparsity, min_keep=min_keep)) == brute_force_with_floor(scores, sparsity, min_keep)
    assert all(floors(sizes, sparsity, min_keep)[name] == math.ceil(min_keep * n) for name, n in sizes.items())


def test_a_layer_of_small_weights_survives_by_its_floor_alone():
    weights = {"small": torch.arange(1.0, 101) / 1e6, "large": torch.arange(1.0, 101)}
    assert int(magnitude_masks(weights, 0.5)["small"].sum()) == 0  # the collapse that the floor is there for
    masks = magnitude_masks(weights, 0.5, min_keep=0.02)
    assert masks["small"].nonzero().flatten().tolist() == [98, 99]
    assert int(masks["large"].sum()) == 98


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**30), st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 8)]), st.sampled_from([0, 1]), st.booleans())
def test_patterns_are_those_of_a_loop(seed, pattern, dim, ties):
    keep, size = pattern
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 2 * size, 2) if dim else (2 * size, 3, 2)
    score = torch.randint(-3, 4, shape, generator=generator).float() if ties else torch.rand(shape, generator=generator)
    mask = pattern_masks(score, size - keep, size, dim)
    assert mask.shape == score.shape
    rows, kept = score.movedim(dim, -1).reshape(-1, size), mask.movedim(dim, -1).reshape(-1, size)
    for row, one in zip(rows.tolist(), kept.tolist(), strict=True):
        gone = sorted(range(size), key=lambda i: (row[i], i))[: size - keep]
        assert [i not in gone for i in range(size)] == one
    earlier = pattern_masks(score, 1, size, dim)
    later = pattern_masks(-score, size - keep, size, dim, earlier)  # the order has turned round
    assert not (later & ~earlier).any()
    assert (later.movedim(dim, -1).reshape(-1, size).sum(1) == keep).all()


def test_a_pattern_that_does_not_fit_is_refused():
    for shape in ((4, 6), (4,)):
        with pytest.raises(ValueError, match="no whole groups of 4"):
            pattern_masks(torch.rand(shape), 2, 4)


def regrown_by_hand(scores, slopes, sparsity, share, masks):
    places = [(name, i) for name, score in scores.items() for i in range(score.numel())]
    keep = len(places) - round(sparsity * len(places))
    of = lambda table: lambda place: float(table[place[0]].flatten()[place[1]])  # noqa: E731
    alive = sorted((place for place in places if masks[place[0]][place[1]]), key=of(scores))
    old = set(alive[max(len(alive) - (keep - round(share * keep)), 0) :])
    fresh = sorted((place for place in places if place not in old), key=lambda place: abs(of(slopes)(place)))
    new = set(fresh[len(fresh) - (keep - len(old)) :])
    return {name: [(name, i) in old | new for i in range(score.numel())] for name, score in scores.items()}


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**30), st.floats(0, 0.95), st.floats(0, 0.95), st.sampled_from(["global", "layer"]))
def test_growing_anew_is_that_of_a_loop(seed, sparsity, share, scope):
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(n, generator=generator) for name, n in (("a", 12), ("b", 7))}
    slopes = {name: torch.randn(len(score), generator=generator) for name, score in scores.items()}
    masks = {name: torch.rand(len(score), generator=generator) > 0.4 for name, score in scores.items()}
    found = regrown_masks(scores, slopes, sparsity, share, scope, masks)
    if scope == "global":
        wanted = regrown_by_hand(scores, slopes, sparsity, share, masks)
    else:
        one = lambda table, name: {name: table[name]}  # noqa: E731
        wanted = {
            name: regrown_by_hand(*(one(t, name) for t in (scores, slopes)), sparsity, share, one(masks, name))[name]
            for name in scores
        }
    assert flat(found) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 50, 70_000])
def test_the_smallest_are_those_that_masks_drop(dtype, n):
    generator = torch.Generator().manual_seed(n)
    values = [torch.randn(size, generator=generator).to(dtype) for size in (n, 3 * n, 1)]
    values[1][::3] = 0
    values[0][-1], values[1][-1] = math.nan, -math.inf
    zeros = sum(int((value == 0).sum()) for value in values)
    total = sum(map(len, values))
    for count in sorted({0, 1, total // 10, total // 2, total - zeros}):
        places, seen = smallest(values, count)
        assert seen == zeros
        chosen = [
            torch.zeros(len(v), dtype=torch.bool).index_fill(0, p, True) for v, p in zip(values, places, strict=True)
        ]
        assert sum(map(int, (mask.sum() for mask in chosen))) == count
        masks = magnitude_masks({str(i): v for i, v in enumerate(values)}, min(0.9999999, (zeros + count) / total))
        if round(min(0.9999999, (zeros + count) / total) * total) == zeros + count:
            for value, mask, one in zip(values, masks.values(), chosen, strict=True):
                assert torch.equal(~mask, one | (value == 0))


def test_the_smallest_of_what_a_sample_misjudges_are_exact():
    values = torch.ones(100_000)
    values[7::13] = torch.arange(1, len(values[7::13]) + 1) / 1e6  # small ones where a strided sample may not look
    (places,), zeros = smallest([values], 5000)
    assert zeros == 0
    assert places.tolist() == list(range(7, 100_000, 13))[:5000]
    (every,), _ = smallest([values], 200_000)
    assert len(every) == len(values)
