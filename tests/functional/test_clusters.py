"""Clusters against loops and brute force."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_guard.functional import cluster_means, kmeans, linear_codebook, nearest

NUMBERS = st.lists(st.sampled_from([-2.0, -1.5, -0.25, 0.0, 0.125, 1.0, 1.125, 3.0, 8.0]), min_size=1, max_size=12)


def cost(values, codebook):
    return sum(min((v - c) ** 2 for c in codebook) for v in values)


def best(values, size):
    """The least cost of any split of the sorted values into intervals, which the optimum is in one dimension."""
    ordered = sorted(values)
    found = float("inf")
    for k in range(1, min(size, len(ordered)) + 1):
        for cuts in combinations(range(1, len(ordered)), k - 1):
            parts = [ordered[a:b] for a, b in zip((0, *cuts), (*cuts, len(ordered)), strict=True)]
            found = min(found, sum(sum((v - sum(p) / len(p)) ** 2 for v in p) for p in parts))
    return found


@settings(max_examples=150, deadline=None)
@given(NUMBERS, st.integers(1, 5))
def test_kmeans_ends_where_lloyd_cannot_go_on(numbers, size):
    values = torch.tensor(numbers)
    codebook, labels = kmeans(values, size)
    assert len(codebook) <= size
    assert torch.equal(codebook, codebook.sort().values)
    assert labels.unique().tolist() == list(range(len(codebook)))  # no entry is wasted
    for value, label in zip(numbers, labels.tolist(), strict=True):
        assert abs(value - codebook[label]) == min(abs(value - c) for c in codebook)
    for j, c in enumerate(codebook):
        assert float(c) == pytest.approx(
            sum(v for v, k in zip(numbers, labels, strict=True) if k == j) / int((labels == j).sum())
        )
    assert cost(numbers, codebook.tolist()) >= best(numbers, size) - 1e-6
    if len(set(numbers)) <= size:
        assert torch.equal(codebook[labels], values)


def test_kmeans_is_near_the_optimum_on_weights():
    values = torch.randn(40, generator=torch.Generator().manual_seed(1))
    codebook, _ = kmeans(values, 3)
    assert cost(values.tolist(), codebook.tolist()) <= 1.1 * best(values.tolist(), 3)
    assert cost(values.tolist(), linear_codebook(values, 3).tolist()) > 1.5 * best(values.tolist(), 3)  # it has moved


def test_kmeans_of_nothing_and_of_equals():
    codebook, labels = kmeans(torch.empty(0, 3), 4)
    assert codebook.numel() == labels.numel() == 0
    codebook, labels = kmeans(torch.full((2, 3), 0.5), 4)
    assert codebook.tolist() == [0.5]
    assert labels.shape == (2, 3)


@settings(max_examples=100, deadline=None)
@given(NUMBERS, st.integers(0, 2**30))
def test_means_are_those_of_a_loop(numbers, seed):
    values = torch.tensor(numbers)
    labels = torch.randint(0, 4, values.shape, generator=torch.Generator().manual_seed(seed))
    codebook = torch.tensor([10.0, 20.0, 30.0, 40.0])
    for j, mean in enumerate(cluster_means(values, labels, codebook).tolist()):
        own = [v for v, k in zip(numbers, labels.tolist(), strict=True) if k == j]
        assert mean == pytest.approx(sum(own) / len(own) if own else float(codebook[j]))


def test_the_mean_of_equal_values_is_that_value_to_the_bit():
    codebook = torch.randn(5, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 5, (100_001,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(cluster_means(codebook[labels], labels, codebook), codebook)


def test_nearest_takes_the_lower_of_two():
    assert nearest(torch.tensor([0.5, -9.0, 9.0]), torch.tensor([0.0, 1.0, 2.0])).tolist() == [0, 0, 2]
