"""Placed random streams."""

import numpy as np
import torch

from lightning_guard.functional import stream


def draw(*place: int) -> float:
    return torch.rand((), dtype=torch.float64, generator=stream(*place)).item()


def test_a_place_always_draws_the_same():
    first = draw(3, 1, 2)
    torch.manual_seed(5)
    draw(3, 1, 3)
    assert draw(3, 1, 2) == first
    assert draw(np.int64(3), torch.tensor(1), np.int32(2)) == first  # whatever kind of whole number


def test_places_differ():
    places = [(seed, step, rank) for seed in range(5) for step in range(20) for rank in range(4)]
    places += [(1,), (1, 2), (12,), (1, 2, 3, 4), (-1,), (2**63,), (-(2**63), 0)]
    assert len({draw(*place) for place in places}) == len(places)


def test_neighbours_are_not_correlated():
    """Seeding a Mersenne twister with neighbouring numbers would fail this."""
    rows = torch.stack([torch.rand(200, generator=stream(0, step), dtype=torch.float64) for step in range(40)])
    correlation = torch.corrcoef(rows).fill_diagonal_(0)
    assert correlation.abs().max() < 0.35  # five standard deviations
    assert torch.rand(4000, generator=stream(0, 0)).mean().item() - 0.5 < 0.03


def test_the_global_generators_stand_still():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    torch.rand(3, generator=stream(0, 1))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
