"""Reversed gradients, the adversary that needs them, and counterfactual pairs."""

from contextlib import nullcontext
from io import BytesIO
from types import SimpleNamespace

import pytest
import torch

from lightning_guard.functional.fairness.reversal import reverse_gradient
from lightning_guard.guard import GuardConflict
from lightning_guard.parity.adversary import Adversary, family_loss, predict
from lightning_guard.parity.counterfactual import Counterfactual
from tests.functional.fairness.test_group_dro import batch


def test_the_gradient_is_turned_round():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert reverse_gradient(x).equal(x)
    plain = torch.autograd.grad(x.sin().sum(), x)[0]
    assert torch.autograd.grad(reverse_gradient(x).sin().sum(), x)[0].equal(-plain)
    assert torch.allclose(torch.autograd.grad(reverse_gradient(x, 0.3).sin().sum(), x)[0], -0.3 * plain)


def told(group, strength=3.0, seed=0, census=None, rehearsal=False):
    """A batch whose logits tell the group."""
    seen = batch(group, group.clamp_min(0), seed, census, rehearsal)
    seen.logits = (seen.logits.detach() + strength * group.clamp_min(0)).requires_grad_()
    return seen


GROUP = torch.arange(60) % 2


def begun(seen, **options):
    mode = Adversary(**options)
    mode.begin(torch.nn.Identity(), seen.census)
    return mode


def test_the_network_gets_the_reversed_gradient_of_the_head_s_loss():
    group = GROUP.clone()
    group[:6] = -1
    seen = told(group)
    mode = begun(seen, weight=0.7)
    grad = torch.autograd.grad(mode.term(seen), seen.logits)[0]
    x = seen.logits.detach().requires_grad_()
    logits = predict([part.detach() for part in mode.head], x.unsqueeze(1))
    plain = torch.nn.functional.cross_entropy(logits[6:], group[6:])
    assert torch.allclose(grad, -0.7 * torch.autograd.grad(plain, x)[0])
    assert grad[6:].abs().sum() > 0
    assert grad[:6].abs().sum() == 0
    assert all(part.grad is None for part in mode.head)


def test_the_head_learns_what_is_there_and_nothing_else():
    seen = told(GROUP)
    mode = begun(seen, lr=0.05)
    for _ in range(150):
        mode.term(seen)
    assert mode.figures()["adversary_loss"] < 0.3 < 0.69 < mode.figures()["chance_loss"] < 0.70
    blank = told(GROUP, strength=0.0)
    blank.logits = torch.zeros(60, requires_grad=True)
    mode = begun(blank, lr=0.05)
    for _ in range(150):
        mode.term(blank)
    assert mode.figures()["adversary_loss"].item() == pytest.approx(mode.figures()["chance_loss"].item(), abs=1e-3)


def test_a_conditional_head_may_read_the_target():
    seen = told(GROUP)  # the target is the group here
    seen.logits = torch.zeros(60, requires_grad=True)
    mode = begun(seen, conditional=True, lr=0.05)
    for _ in range(150):
        mode.term(seen)
    assert mode.figures()["adversary_loss"] < 0.1
    seen.target = None
    with pytest.raises(ValueError, match="conditional=True"):
        mode.term(seen)


def test_rehearsals_unknown_groups_and_resumption():
    seen = told(GROUP)
    mode = begun(seen)
    rehearsal = told(GROUP, census=seen.census, rehearsal=True)
    assert mode.term(rehearsal).equal(begun(seen).term(rehearsal))
    assert mode.term(rehearsal).equal(mode.term(rehearsal))
    assert mode.term(told(torch.full((60,), -1), census=seen.census)) is None
    for _ in range(3):
        mode.term(seen)
    stored = BytesIO()
    torch.save(mode.state(), stored)
    stored.seek(0)
    other = Adversary(weight=1.0)
    other.restore(torch.load(stored, weights_only=True))
    other.begin(torch.nn.Identity(), seen.census)
    for _ in range(3):
        assert mode.term(seen).equal(other.term(seen))


def test_families_are_averaged():
    logits = torch.randn(5, 4, dtype=torch.float64)
    first, second = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([1, 1, 0, 0, -1])
    members = torch.zeros(5, 4)
    members[range(5), first] = 1
    members[range(4), 2 + second[:4]] = 1
    cross = torch.nn.functional.cross_entropy
    hand = (cross(logits[:, :2], first) + cross(logits[:4, 2:], second[:4])) / 2
    families = torch.tensor([0, 0, 1, 1])
    assert family_loss(logits, members, families, torch.tensor([5.0, 4.0])).item() == pytest.approx(hand.item())
    members[:, 2:] = 0
    alone = family_loss(logits, members, families, torch.tensor([5.0, 0.0]))
    assert alone.item() == pytest.approx(cross(logits[:, :2], first).item())


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(x)

    def guard_counterfactual(self, x):
        return torch.cat([1 - x[:, :1], x[:, 1:]], 1)


def pair(net, x):
    seen = batch(torch.arange(len(x)) % 2, torch.arange(len(x)) % 2)
    seen.logits = net(x)
    seeds = []

    def training_pass(seed):
        seeds.append(seed)
        return nullcontext()

    run = SimpleNamespace(trainer=SimpleNamespace(world_size=1), rank=0)
    seen.step = SimpleNamespace(
        module=net, inputs=x, run=run, index=4, forward=net, rehearsal=False, training_pass=training_pass
    )
    return seen, seeds


def test_counterfactual_pairs_by_hand():
    torch.manual_seed(0)
    net, x = Net(), torch.rand(6, 3).round(decimals=1)
    seen, seeds = pair(net, x)
    mode = Counterfactual(weight=4.0)
    mode.begin(net, seen.census)
    term = mode.term(seen)
    hand = 0.0
    for row in x:
        other = torch.tensor([1 - row[0], row[1], row[2]])
        hand += float((net(row).softmax(0)[1] - net(other).softmax(0)[1]) ** 2) / 6
    assert term.item() == pytest.approx(4 * hand, rel=1e-5)
    assert len(seeds) == 1
    term.backward()
    assert net.linear.weight.grad.abs().sum() > 0
    with torch.no_grad():
        net.linear.weight[:, 0] = 0.0  # a network that does not look at the attribute
    assert mode.term(pair(net, x)[0]) < 1e-12


def test_counterfactuals_must_be_said():
    net = torch.nn.Linear(3, 2)
    seen, _ = pair(net, torch.rand(4, 3))
    mode = Counterfactual()
    mode.begin(net, seen.census)
    with pytest.raises(GuardConflict, match="guard_counterfactual"):
        mode.term(seen)
