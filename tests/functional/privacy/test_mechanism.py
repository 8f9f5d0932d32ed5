"""What reaches ``.grad`` is the clipped mean and its noise, and nothing that was not clipped or paid for."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_guard.functional.privacy import Clipping, Deal, Mechanism, Noise, PrivacyPlan

PLAN = PrivacyPlan.solve(64, 8, 8, 1e-3, 1.0, noise_multiplier=0.5, epochs=1)
BOUND = 0.2


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batch(n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


def deal(units, first=True, last=True):
    return Deal(units, 1, None, first, last, 0)


def backward(private, net, x, y, reduction="mean", divided=1):
    with private.book.step(len(x)):
        loss = F.cross_entropy(net(x), y, reduction=reduction) / divided
    loss.backward()


def clipped(net, x, y):
    """The sum of clipped gradients, one example after another."""
    total = [torch.zeros_like(p) for p in net.parameters()]
    for i in range(len(x)):
        grads = torch.autograd.grad(F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]), list(net.parameters()))
        norm = float(torch.cat([g.flatten() for g in grads]).norm())
        for part, g in zip(total, grads, strict=True):
            part += min(1.0, BOUND / norm) * g
    return torch.cat([part.flatten() for part in total])


def gradients(net):
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def noise(step, std, size):
    source = Noise(3)
    source.at(step)
    return source.fill_(torch.empty(size, dtype=torch.float64), std)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunks", [1, 2])
def test_a_step_is_the_clipped_sum_and_its_noise(reduction, chunks):
    net, (x, y) = network(), batch(6)
    private = Mechanism(net.named_parameters(), Clipping(), Noise(3), loss_reduction=reduction)
    for step in (0, 1):
        net.zero_grad()
        private.begin(PLAN, step, BOUND, accumulated=chunks)
        for chunk in range(chunks):
            part = slice(chunk, None, chunks)
            assert all(p.grad is None for p in net.parameters())
            backward(private, net, x[part], y[part], reduction, divided=chunks)
            private.take(deal(6 // chunks, first=chunk == 0, last=chunk == chunks - 1))
        got = gradients(net)
        wanted = clipped(net, x, y) / 8 + noise(step, 0.5 * BOUND / 8, len(got))
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    assert private.std == 0.5 * BOUND / 8
    assert private.released == 1


def test_padding_adds_nothing_and_what_is_not_finite_is_dropped():
    net, (x, y) = network(), batch(6)
    x[2] = torch.inf
    private = Mechanism(net.named_parameters(), Clipping(), Noise(3))
    private.begin(PLAN, 0, BOUND)
    backward(private, net, x, y)
    private.take(deal(6, last=False))
    backward(private, net, *batch(1))
    private.take(deal(0, first=False))
    got, rest = gradients(net), [0, 1, 3, 4, 5]
    wanted = clipped(net, x[rest], y[rest]) / 8 + noise(0, 0.5 * BOUND / 8, len(got))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    assert private.dropped == 1


def test_other_processes_add_their_share_and_no_noise():
    net, (x, y) = network(), batch(6)
    private = Mechanism(net.named_parameters(), Clipping(), Noise(3), rank=1)
    private.begin(PLAN, 0, BOUND)
    backward(private, net, x, y)
    private.take(deal(6))
    torch.testing.assert_close(gradients(net), clipped(net, x, y) / 8, rtol=1e-9, atol=1e-12)


def test_the_bound_follows_the_quantile():
    net, (x, y) = network(), batch(6)
    for start, grows in ((1e-6, True), (1e6, False)):
        private = Mechanism(net.named_parameters(), Clipping(), Noise(3))
        private.begin(replace(PLAN, target_quantile=0.5, count_noise=0.3), 0, start)
        assert private.next_norm is None
        backward(private, net, x, y)
        private.take(deal(6))
        assert (private.next_norm > start) == grows
        private.close()


def test_what_is_not_bounded_or_not_paid_for_is_refused():
    net, (x, y) = network(), batch(6)
    spare = nn.Linear(2, 2).double()
    named = [*net.named_parameters(), ("spare.weight", spare.weight)]
    private = Mechanism(named, Clipping(), Noise(3))
    private.begin(PLAN, 0, BOUND)
    backward(private, net, x, y)
    with pytest.raises(ValueError, match=r"spare\.weight took no part"):
        private.take(deal(6))
    private.take(deal(6), every=False)
    assert spare.weight.grad is None
    backward(private, net, x, y)
    with pytest.raises(ValueError, match="releases=1"):
        private.take(deal(6), every=False)
    private.begin(PLAN, 1, BOUND)
    with private.book.step(6):
        loss = F.cross_entropy(net(x) + F.linear(x[:, :2], spare.weight).sum(1, keepdim=True), y)
    loss.backward()
    with pytest.raises(ValueError, match="other parameters than before"):
        private.take(deal(6), every=False)


def test_raw_gradients_reach_nothing_until_it_is_closed():
    net, (x, y) = network(), batch(6)
    private = Mechanism(net[0].named_parameters(), Clipping(), Noise(3), error=KeyError)
    private.follow(net.named_parameters())
    with pytest.raises(KeyError, match="raw gradient"):
        F.cross_entropy(net(x), y).backward()
    assert all(p.grad is None for p in net.parameters())
    private.close()
    F.cross_entropy(net(x), y).backward()
    assert all(p.grad is not None for p in net.parameters())
