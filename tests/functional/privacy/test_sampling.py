"""Poisson draws: their statistics, how they are dealt, and what is told about them."""

import math
import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lightning_guard.functional.privacy.sampling import Deal, Draws, _poisson
from lightning_guard.functional.random import stream

SECRET = int.from_bytes(bytes(range(100, 116)), "big")


def told(draws: Draws) -> list[tuple[list[int], Deal]]:
    return [(batch, draws.next_deal()) for batch in draws]


def steps(draws: Draws) -> list[list[int]]:
    """The units of every step; only for plain examples."""
    drawn: list[list[int]] = []
    for batch, deal in told(draws):
        if deal.first:
            drawn.append([])
        drawn[-1] += batch if deal.units else []
    return drawn


# Statistics ----------------------------------------------------------------------------------------------------------


def chi_square(seen: np.ndarray, wanted: np.ndarray) -> float:
    """In standard deviations of its own, about normal for many classes."""
    degrees = len(seen)
    return (((seen - wanted) ** 2 / wanted).sum() - degrees) / math.sqrt(2 * degrees)


@pytest.mark.parametrize(("units", "rate"), [(50, 0.1), (50, 0.9), (7, 0.5), (1000, 0.003)])
def test_each_unit_is_drawn_independently_with_its_rate(units, rate):
    trials = 2000
    drawn = np.zeros((trials, units), dtype=bool)
    for step, batch in enumerate(steps(Draws(units, rate, trials, secret=SECRET))):
        assert len(set(batch)) == len(batch)
        drawn[step, batch] = True
    # Every unit as often as every other.
    spread = math.sqrt(trials * rate * (1 - rate))
    excess = (drawn.sum(0) - trials * rate) / spread
    assert abs((excess**2).sum() - units) < 5 * math.sqrt(2 * units)
    # Batch sizes are binomial: mean, variance, and the whole distribution.
    sizes = drawn.sum(1)
    assert abs(sizes.mean() - units * rate) < 4.5 * math.sqrt(units * rate * (1 - rate) / trials)
    kinds = np.arange(units + 1)
    log_chances = np.array([math.lgamma(units + 1) - math.lgamma(k + 1) - math.lgamma(units - k + 1) for k in kinds])
    wanted = trials * np.exp(log_chances + kinds * math.log(rate) + (units - kinds) * math.log1p(-rate))
    usual = wanted > 10
    assert abs(chi_square(np.bincount(sizes, minlength=units + 1)[usual], wanted[usual])) < 5
    # Neighbours in place and in time do not know of one another.
    centred = drawn - rate
    scale = rate * (1 - rate)
    for other in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1]):
        assert abs(other.mean() / scale) < 5 / math.sqrt(other.size)


def test_draws_of_large_data_take_no_longer():
    drawn = _poisson(10**9, 1e-6, stream(SECRET))
    assert abs(len(drawn) - 1000) < 5 * math.sqrt(1000)
    assert drawn.dtype == torch.long
    assert (drawn.diff() > 0).all()
    assert abs(drawn.double().mean() / 1e9 - 0.5) < 0.05


def test_certain_and_hardly_ever():
    assert all(sorted(batch) == list(range(9)) for batch in steps(Draws(9, 1.0, 20, secret=SECRET)))
    assert not any(steps(Draws(9, 1e-12, 20, secret=SECRET)))


def test_another_round_when_the_first_gaps_do_not_reach_the_end():
    # With 16 gaps to spare this takes many draws of a rate whose expectation is far below them.
    seen = np.zeros(40)
    for i in range(3000):
        seen[_poisson(40, 0.97, stream(SECRET, i)).numpy()] += 1
    assert abs(seen / 3000 - 0.97).max() < 5 * math.sqrt(0.97 * 0.03 / 3000)


# Dealing -------------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 40),
    st.floats(0.01, 1),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 2**128),
)
def test_ranks_and_chunks_split_the_draw_of_one_process(units, rate, count, chunks, world, secret):
    whole = steps(Draws(units, rate, count, secret=secret))
    everybody = [
        told(Draws(units, rate, count, chunks=chunks, rank=r, world=world, secret=secret)) for r in range(world)
    ]
    for each in everybody:
        assert len(each) == count * chunks
        assert [deal.step for _, deal in each] == [i // chunks for i in range(count * chunks)]
        assert [deal.first for _, deal in each] == [i % chunks == 0 for i in range(count * chunks)]
        assert [deal.last for _, deal in each] == [i % chunks == chunks - 1 for i in range(count * chunks)]
    for step, drawn in enumerate(whole):
        cut = slice(step * chunks, (step + 1) * chunks)
        shares = []
        for each in everybody:
            sizes = [deal.units for _, deal in each[cut]]
            assert max(sizes) - min(sizes) <= 1
            shares.append([unit for batch, deal in each[cut] if deal.units for unit in batch])
            assert len(shares[-1]) == sum(sizes)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert sorted(unit for share in shares for unit in share) == sorted(drawn)


def test_the_deal_is_random():
    """A unit is in either chunk half of the time, and beside any other unit half of the time."""
    first, together = np.zeros(10), 0
    for batch, deal in told(Draws(10, 1.0, 2000, chunks=2, secret=SECRET)):
        if deal.first:
            first[batch] += 1
            together += {0, 1} <= set(batch)
    assert abs(first / 2000 - 0.5).max() < 5 * 0.5 / math.sqrt(2000)
    assert abs(together / 2000 - 5 / 10 * 4 / 9) < 5 * 0.42 / math.sqrt(2000)


def test_empty_chunks_are_padded():
    for batch, deal in told(Draws(30, 1e-9, 3, chunks=2, views=3, secret=SECRET)):
        assert batch == [0, 0, 0]
        assert (deal.units, deal.rows) == (0, 3)
        assert deal.weights.tolist() == [0, 0, 0]
    for batch, deal in told(Draws([[7, 8], [9]], 1e-9, 3, rows=2, secret=SECRET)):
        assert sorted(batch) == [7, 8]
        assert (deal.units, deal.rows) == (0, 2)
        assert deal.weights.tolist() == [0, 0]
    # More chunks than units.
    deals = [deal for _, deal in told(Draws(2, 1.0, 1, chunks=5, secret=SECRET))]
    assert [deal.units for deal in deals] == [1, 1, 0, 0, 0]
    assert [deal.weights is None for deal in deals] == [True, True, False, False, False]


# Shuffling -----------------------------------------------------------------------------------------------------------


def test_shuffled_epochs_take_each_unit_at_most_once():
    draws = Draws(103, 10 / 103, 10, sampling="shuffle", chunks=3, secret=SECRET)
    epochs = [steps(draws) for _ in range(4)]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [10] * 10
        assert len({unit for batch in epoch for unit in batch}) == 100
    assert len({str(epoch) for epoch in epochs}) == 4
    both = [Draws(103, 10 / 103, 10, sampling="shuffle", rank=r, world=2, secret=SECRET) for r in range(2)]
    for mine, other, whole in zip(steps(both[0]), steps(both[1]), epochs[0], strict=True):
        assert sorted(mine + other) == sorted(whole)
    with pytest.raises(ValueError, match="give at most 10 steps with sampling='shuffle'"):
        Draws(103, 10 / 103, 11, sampling="shuffle", secret=SECRET)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 10**7), st.data())
def test_a_batch_size_survives_being_a_rate(units, data):
    size = data.draw(st.integers(1, units))
    assert Draws(units, size / units, 1, sampling="shuffle", secret=0).batch == size


# Rows ----------------------------------------------------------------------------------------------------------------


def test_views_repeat_each_example():
    for batch, deal in told(Draws(20, 0.5, 5, views=3, secret=SECRET)):
        rows = torch.tensor(batch).reshape(deal.units, deal.rows)
        assert deal.rows == 3
        assert (rows == rows[:, :1]).all()
        assert deal.weights.reshape(-1, 3).sum(1).allclose(torch.ones(deal.units))
    plain = steps(Draws(20, 0.5, 5, secret=SECRET))
    assert [batch[::3] for batch in steps(Draws(20, 0.5, 5, views=3, secret=SECRET))] == plain


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("rows", [1, 3])
def test_people_give_their_own_rows(rows, views):
    people = [[i * 10 + j for j in range(1 + i % 6)] for i in range(30)]
    seen = set()
    for batch, deal in told(Draws(people, 0.5, 60, chunks=2, rows=rows, views=views, secret=SECRET)):
        assert deal.rows == rows * views
        assert len(batch) == deal.units * deal.rows
        weights = torch.ones(len(batch)) if deal.weights is None else deal.weights
        for hand, own in zip(torch.tensor(batch).split(deal.rows), weights.split(deal.rows), strict=True):
            person = people[hand[0] // 10]
            assert set(hand.tolist()) <= set(person)
            used = min(len(person), rows)
            counted = hand[own > 0].tolist()
            assert len(set(counted)) == used  # nobody's row counts twice, but for its views
            assert len(counted) == used * views
            assert own[own > 0].allclose(torch.tensor(1 / (used * views)))
            assert (hand.reshape(rows, views) == hand.reshape(rows, views)[:, :1]).all()
            seen.update(hand.tolist())
    assert seen == {row for person in people for row in person}  # whoever has more rows shows others each time
    assert (deal.weights is None) == (rows * views == 1)


def test_rows_of_a_person_are_chosen_evenly():
    counts = np.zeros(6)
    for batch, _ in told(Draws([list(range(6))], 1.0, 3000, rows=2, secret=SECRET)):
        assert batch[0] != batch[1]
        counts[batch] += 1
    assert abs(counts / 3000 - 1 / 3).max() < 5 * math.sqrt(2 / 9 / 3000)


def test_ranks_agree_on_the_rows_of_people():
    people = [[i * 10 + j for j in range(9)] for i in range(12)]
    whole = told(Draws(people, 0.7, 6, rows=4, secret=SECRET))
    parts = [told(Draws(people, 0.7, 6, rows=4, rank=r, world=3, secret=SECRET)) for r in range(3)]
    for step, (batch, _) in enumerate(whole):
        shares = [row for part in parts for row in (part[step][0] if part[step][1].units else [])]
        assert sorted(shares) == sorted(batch)


# The line of deals ---------------------------------------------------------------------------------------------------


class Echo(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return index

    def __len__(self):
        return 200


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_deals_match_the_batches_of_a_loader_that_fetches_ahead(workers, persistent):
    draws = Draws(200, 0.05, 6, chunks=3, secret=SECRET)
    more = {"prefetch_factor": 3, "persistent_workers": persistent} if workers else {}
    loader = DataLoader(Echo(), batch_sampler=draws, num_workers=workers, **more)
    assert len(loader) == len(draws) == 18
    for epoch in range(2):
        twin = Draws(200, 0.05, 6, chunks=3, secret=SECRET)
        for _ in range(epoch):
            next(iter(twin))
        wanted = told(twin)
        for i, batch in enumerate(loader):
            deal = draws.next_deal()
            assert batch.tolist() == wanted[i][0]
            assert (deal.units, deal.first, deal.last, deal.step) == (
                wanted[i][1].units,
                i % 3 == 0,
                i % 3 == 2,
                i // 3,
            )
            if epoch == 0 and i == 7:
                break  # an epoch that is abandoned with batches under way
    with pytest.raises(RuntimeError, match="call next_deal once for each batch"):
        draws.next_deal()


def test_the_latest_iterator_wins():
    draws = Draws(50, 0.3, 3, secret=SECRET)
    old = iter(draws)
    next(old)
    new = iter(draws)
    next(old)  # goes on, unheard
    with pytest.raises(RuntimeError):
        draws.next_deal()
    batch = next(new)
    next(old)
    assert draws.next_deal().units == len(batch)
    with pytest.raises(RuntimeError):
        draws.next_deal()


# Randomness ----------------------------------------------------------------------------------------------------------


def test_the_secret_and_the_iterator_decide():
    first, second = Draws(50, 0.3, 3, secret=SECRET), Draws(50, 0.3, 3, secret=SECRET)
    again = [steps(first), steps(first)]
    assert again[0] != again[1]
    assert [steps(second), steps(second)] == again
    # All 128 bits of the secret count, not only those that fit a seed.
    secrets = [SECRET, *(SECRET ^ (1 << bit) for bit in (0, 31, 63, 64, 100, 127))]
    assert len({str(steps(Draws(50, 0.3, 3, secret=secret))) for secret in secrets}) == len(secrets)


def test_numbered_turns_draw_the_same():
    epoch = 0
    draws = Draws(50, 0.3, 3, secret=SECRET, turn=lambda: epoch)
    first = [steps(draws), steps(draws)]
    assert first[0] == first[1]
    epoch = 1
    assert steps(draws) != first[0]


def test_no_global_generator_is_touched():
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    steps(Draws([[1, 2, 3], [4]], 0.5, 5, chunks=2, rows=2, secret=SECRET))
    steps(Draws(9, 1 / 3, 3, sampling="shuffle", secret=SECRET))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


def test_pickled_and_hidden():
    draws = Draws(50, 0.3, 3, secret=SECRET)
    next(iter(draws))
    copy = pickle.loads(pickle.dumps(draws))  # noqa: S301
    assert steps(copy) == steps(draws)
    assert str(SECRET) not in repr(draws)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"units": 0}, "units=0 draws nothing"),
        ({"units": []}, "units=0 draws nothing"),
        ({"steps": 0}, "steps=0 draws nothing"),
        ({"chunks": 0}, "chunks=0 draws nothing"),
        ({"views": 0}, "views=0 draws nothing"),
        ({"sample_rate": 0.0}, "sample_rate=0.0 is no probability"),
        ({"sample_rate": 1.1}, "sample_rate=1.1 is no probability"),
        ({"rank": 2, "world": 2}, "rank=2 is not one of world=2; give 0 to 1"),
        ({"sampling": "fixed"}, "sampling='fixed' is not known"),
        ({"rows": 2}, "rows=2 of an example make no sense"),
        ({"units": [[1], [], [2]]}, r"people \[1\] have no rows"),
        ({"sampling": "shuffle", "sample_rate": 0.001}, "give at most"),
    ],
)
def test_impossible_draws_say_what_to_change(args, message):
    with pytest.raises(ValueError, match=message):
        Draws(**({"units": 50, "sample_rate": 0.3, "steps": 3, "secret": SECRET} | args))
