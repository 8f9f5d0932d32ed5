"""The search without gradients against enumeration, and what it must leave alone."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_guard.functional import ThreatModel, pgd, search
from lightning_guard.functional.attacks.objectives import fooled, margin
from tests.functional.attacks.test_pgd import ROWS, TABLE, all_within, seeded, worst_l1

ZEROS = torch.zeros(3, dtype=torch.long)


def network(seed, classes=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, classes)).requires_grad_(False)


@pytest.mark.parametrize("switches", [1, 2])
def test_the_worst_row_of_a_linear_model_is_found_among_all(switches):
    threat = replace(TABLE, switches=switches)
    for seed in range(10):
        weights = torch.randn(7, generator=seeded(seed))
        best = torch.stack([(all_within(threat, row) @ weights).max() for row in ROWS])
        moved = search(lambda z, w=weights: z @ w - 1e3, ROWS, ZEROS, threat, 20, seeded())
        assert threat.contains(moved, ROWS).all()
        torch.testing.assert_close(moved @ weights, best)


def test_the_worst_row_of_a_network_is_mostly_found_among_all():
    threat, found = replace(TABLE, switches=2), []
    for seed in range(12):
        net = network(seed)
        best, worst = (
            torch.stack([pick(net(all_within(threat, row))) for row in ROWS]) for pick in (torch.max, torch.min)
        )
        moved = search(lambda z, net=net: net(z) - 1e3, ROWS, ZEROS, threat, 60, seeded())
        found.append((net(moved)[:, 0] - worst) / (best - worst))
    assert torch.cat(found).mean() > 0.97


def test_a_row_that_can_fall_falls():
    """Thresholds between the present and the worst output: enumeration says that each row can be fooled."""
    fallen, could = 0, 0
    for seed in range(12):
        net, threat = network(seed), replace(TABLE, switches=2)
        best = torch.stack([net(all_within(threat, row)).max() for row in ROWS])
        level = net(ROWS)[:, 0] + 0.8 * (best - net(ROWS)[:, 0])
        for row in range(3):
            forward = lambda z, net=net, at=level[row]: net(z) - at  # noqa: E731
            moved = search(forward, ROWS[[row]], ZEROS[:1], threat, 60, seeded())
            fallen += int(fooled(forward(moved), ZEROS[:1]))
            could += 1
    assert fallen >= 0.95 * could


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_gradients_are_no_stronger_on_a_model_without_any(norm):
    """A staircase: its gradient is 0 everywhere, so only the search moves."""
    weights, x = torch.randn(6, generator=seeded()), torch.rand(40, 6, generator=seeded(1))
    threat = ThreatModel(0.5, norm, (0.0, 1.0))

    def forward(z):
        return (4 * z).round() @ weights - 1e3

    y = torch.zeros(40, dtype=torch.long)
    climbed = pgd(lambda z: forward(z) + 0 * z.sum(1), x, threat, 10, random_start=False)
    found = search(forward, x, y, threat, 100, seeded())
    assert threat.contains(found, x).all()
    assert torch.equal(climbed, x)
    assert (forward(found) >= forward(x)).all()
    assert (forward(found) > forward(x)).float().mean() > 0.8


def test_an_l1_ball_is_searched_to_its_corners():
    weights, x = torch.randn(6, generator=seeded()), torch.rand(20, 6, generator=seeded(1))
    threat, y = ThreatModel(0.3, "l1", (0.0, 1.0)), torch.zeros(20, dtype=torch.long)
    moved = search(lambda z: z @ weights - 1e3, x, y, threat, 200, seeded())
    gained = (moved @ weights - x @ weights) / (worst_l1(weights, x, 0.3) - x @ weights)
    assert gained.mean() > 0.9


def test_several_classes_and_images():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 5)).requires_grad_(False)
    x, threat = torch.rand(30, 3, 4, 4), ThreatModel(0.2, bounds=(0.0, 1.0))
    y = net(x).argmax(1)
    moved = search(net, x, y, threat, 300, seeded())
    assert threat.contains(moved, x).all()
    assert (margin(net(moved), y) >= margin(net(x), y)).all()
    assert fooled(net(moved), y).float().mean() > 0.5
    assert not fooled(net(x), y).any()


def test_rows_that_are_wrong_stay_and_are_not_asked_again():
    asked = []

    def forward(z):
        asked.append(len(z))
        return z[:, 0] - 10

    wrong = torch.ones(3, dtype=torch.long)
    assert torch.equal(search(forward, ROWS, wrong, TABLE, 10, seeded()), ROWS)
    assert asked == [3]


def test_it_stops_at_the_first_point_that_is_wrong():
    threat = ThreatModel(1.0)
    moved = search(lambda z: z[:, 0] + 100 * z[:, 1] - 0.5, torch.zeros(1, 2), ZEROS[:1], threat, 20, seeded())
    assert moved.tolist() == [[1.0, 0.0]]  # the first column was enough


def test_no_number_counts_as_wrong_and_what_is_not_asked_is_not_answered():
    broken = search(lambda z: z[:, 0].where(z[:, 0] < 3.5, torch.nan) - 10, ROWS, ZEROS, TABLE, 20, seeded())
    assert broken[0, 0] == 4  # only the first row reaches it
    assert search(None, ROWS[:0], ZEROS[:0], TABLE).shape == (0, 7)
    with pytest.raises(ValueError, match="tries=-1"):
        search(lambda z: z[:, 0], ROWS, ZEROS, TABLE, -1)


def test_without_tries_only_categories_switch():
    moved = search(lambda z: z[:, 0] + z[:, 3] - 10, ROWS, ZEROS, TABLE, 0)
    assert torch.equal(moved[:, :2], ROWS[:, :2])
    assert (moved[:, 3] == 1).all()
    still = search(lambda z: z[:, 3] - 10, ROWS, ZEROS, replace(TABLE, switches=0, eps=0.0), 10)
    assert torch.equal(still, ROWS)


def test_many_rows_are_asked_in_parts_and_no_gradient_or_random_state_is_touched():
    net, sizes = network(0), []
    net.requires_grad_(True)

    def forward(z):
        sizes.append(len(z))
        return net(z)

    state, x = torch.get_rng_state(), ROWS.repeat(3000, 1)
    moved = search(forward, x, torch.zeros(9000, dtype=torch.long), TABLE, 2, seeded())
    assert max(sizes) <= 8192 < len(x)
    assert TABLE.contains(moved, x).all()
    assert not moved.requires_grad
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    again = search(net, x, torch.zeros(9000, dtype=torch.long), TABLE, 2, seeded())
    assert torch.equal(moved, again)
