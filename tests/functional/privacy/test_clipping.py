"""No unit contributes more than its bound, whatever its norms."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lightning_guard.functional.privacy import Clipping, adapted

KINDS = ["flat", "per_layer", "automatic"]
norms = arrays("float64", st.tuples(st.integers(1, 4), st.integers(1, 5)), elements=st.floats(0, 1e30))


@pytest.mark.parametrize("kind", KINDS)
@given(norms=norms, bound=st.floats(1e-6, 1e6), margin=st.floats(0, 0.5))
def test_the_contribution_of_all_groups_is_bounded(kind, norms, bound, margin):
    norms = torch.from_numpy(norms)
    contributions = (Clipping(kind).factors(norms, bound, margin) * norms).norm(dim=0)
    assert bool((contributions <= bound * (1 - margin) * (1 + 1e-12)).all())


@given(norms=norms, bound=st.floats(1e-6, 1e6))
def test_small_gradients_stay_as_they_are(norms, bound):
    norms = torch.from_numpy(norms)
    small = norms <= bound / math.sqrt(len(norms)) * (1 - 1e-12)
    assert bool((Clipping().factors(norms, bound)[small] == 1).all())


def test_automatic_clipping_by_hand():
    factors = Clipping("automatic", stability=0.5).factors(torch.tensor([[0.0, 1.5]]), 3.0)
    torch.testing.assert_close(factors, torch.tensor([[6.0, 1.5]]))


def test_groups_share_the_bound():
    factors = Clipping("per_layer").factors(torch.tensor([[10.0], [0.1], [5.0], [0.0]]), 2.0)
    torch.testing.assert_close(factors, torch.tensor([[0.1], [1.0], [0.2], [1.0]]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_anywhere_counts_nowhere(kind, bad):
    factors = Clipping(kind).factors(torch.tensor([[1.0, 1.0, bad], [1.0, bad, 1.0]]), 1.0)
    assert bool((factors[:, 0] > 0).all())
    assert not factors[:, 1:].any()


@given(start=st.floats(1e-3, 1e3), quantile=st.floats(0.3, 0.9))
def test_the_adapted_bound_finds_the_quantile(start, quantile):
    """Of norms that are evenly spread over (0, 1) the quantile is itself."""
    bound = start
    for _ in range(400):
        bound = adapted(bound, min(bound, 1.0), quantile, 0.2)
    assert bound == pytest.approx(quantile, abs=1e-2)


@pytest.mark.parametrize("noisy", [-3.0, 4.0])
def test_a_noisy_fraction_moves_the_bound_no_further_than_a_true_one(noisy):
    assert adapted(1.0, noisy, 0.5, 0.2) == adapted(1.0, min(max(noisy, 0.0), 1.0), 0.5, 0.2)
