"""Ranges from noisy counts: against sorting, against simulated noise, and what one example adds."""

import math

import pytest
import torch

from lightning_guard.functional.quantization import CELLS, NoisyRanges, range_rows
from lightning_guard.functional.quantization.private_ranges import EDGES


def draws(n, layers, generator):
    """Smallest and largest inputs of the examples of a draw, of other sizes in each layer."""
    lows = [-(2.0**i) * torch.rand(n, generator=generator) if i % 2 else torch.zeros(n) for i in range(layers)]
    highs = [2.0**i * torch.randn(n, generator=generator).exp() for i in range(layers)]
    return lows, highs


def test_an_example_has_one_cell_a_side_and_norm_one():
    lows, highs = draws(50, 3, torch.Generator().manual_seed(0))
    rows = range_rows(lows, highs)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(50))
    for i, row in enumerate(rows.view(50, 6, CELLS)):
        sizes = [size for low, high in zip(lows, highs, strict=True) for size in (-low[i], high[i])]
        for size, cells in zip(sizes, row, strict=True):
            where = sum(float(edge) < float(size) for edge in EDGES)  # edges that it lies beyond
            assert cells.nonzero().flatten().tolist() == [where]
    lost = range_rows([torch.tensor([-math.inf, 0.0])], [torch.tensor([1.0, math.nan])])
    assert lost.norm(dim=1).tolist() == pytest.approx([0.5**0.5, 0.5**0.5])


@pytest.mark.parametrize("quantile", [0.9, 0.99])
def test_without_noise_it_is_the_quantile_by_sorting(quantile):
    generator = torch.Generator().manual_seed(1)
    found = NoisyRanges(3, 1e-9, 400, quantile)
    lows, highs = draws(400, 3, generator)
    found.add(range_rows(lows, highs).double().sum(0))
    for (low, high), x, y in zip(found.ranges(), lows, highs, strict=True):
        for end, sizes in ((-low, -x), (high, y)):
            wanted = min(float(e) for e in EDGES if float((sizes > e).sum()) <= (1 - quantile) * 400 + 1e-6)
            assert end == wanted


def test_noise_clips_few_examples_and_widens_little():
    generator = torch.Generator().manual_seed(2)
    layers, noise, batch = 3, 8.0, 256
    wide = clipped = 0
    for _ in range(40):
        found = NoisyRanges(layers, noise, batch)
        for _ in range(120):
            lows, highs = draws(batch, layers, generator)
            sums = range_rows(lows, highs).double().sum(0)
            found.add(sums + noise * torch.randn(len(sums), generator=generator, dtype=torch.float64))
        lows, highs = draws(20_000, layers, generator)
        exact = NoisyRanges(layers, 1e-9, 20_000)
        exact.add(range_rows(lows, highs).double().sum(0))
        for (low, high), (_, top), x, y in zip(found.ranges(), exact.ranges(), lows, highs, strict=True):
            clipped = max(clipped, float((y > high).float().mean()), float((x < low).float().mean()))
            wide += high > top
    assert clipped < 0.1
    assert wide <= 2  # of 120


def test_how_many_draws_are_needed():
    found = NoisyRanges(4, 8.0, 256)
    needed = found.draws_needed(1000)
    for draw in range(1, needed + 1):
        assert found.ranges() == []
        found.add(torch.zeros(2 * 4 * CELLS))
        assert found.resolved == (draw == needed)
    assert len(found.ranges()) == 4
    assert NoisyRanges(4, 8.0, 16).draws_needed(1000) is None
    deviation = 8.0 * math.sqrt(2 * 4 * CELLS / needed)  # of all cells, by equal weights
    assert deviation == pytest.approx(0.1 * 256, rel=0.1)


def test_its_state_is_all_of_it():
    generator = torch.Generator().manual_seed(3)
    one, other = NoisyRanges(2, 0.1, 64), NoisyRanges(2, 0.1, 64)
    one.add(range_rows(*draws(64, 2, generator)).double().sum(0))
    other.restore(one.state())
    more = range_rows(*draws(64, 2, generator)).double().sum(0)
    one.add(more)
    other.add(more)
    assert one.ranges() == other.ranges() != []
