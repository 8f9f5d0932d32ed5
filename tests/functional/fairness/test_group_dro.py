"""Group DRO and reweighing against hand-written loops."""

import math
from types import SimpleNamespace

import pytest
import torch

from lightning_guard.functional import example_losses
from lightning_guard.functional.fairness import Census
from lightning_guard.functional.fairness.group_dro import group_weights
from lightning_guard.parity.base import Seen
from lightning_guard.parity.group_dro import GroupDRO
from lightning_guard.parity.reweigh import Reweigh, cell_weights


def batch(group, target, seed=0, census=None, rehearsal=False):
    """What a mode sees of one process's batch, with logits in float64."""
    census = census or taken(group, target)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(group), generator=generator, dtype=torch.float64).requires_grad_()
    run = SimpleNamespace(trainer=SimpleNamespace(world_size=1))
    step = SimpleNamespace(run=run, rehearsal=rehearsal, losses=example_losses)
    return Seen(step, census, logits, target, census.members(group), group.float())


def taken(group, target=None):
    census = Census()
    census.add(group, target)
    census.close()
    return census


def test_weights_follow_the_paper_s_loop():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([10, 200, 3000])
    q = torch.full((3,), 1 / 3, dtype=torch.float64)
    hand = [1 / 3] * 3
    for _ in range(50):
        losses = torch.rand(3, generator=generator, dtype=torch.float64)
        counts = torch.randint(0, 3, (3,), generator=generator)
        q = group_weights(q, losses, counts, 0.3, adjustment=2.0, sizes=sizes)
        for g in range(3):
            if counts[g] > 0:
                hand[g] *= math.exp(0.3 * (float(losses[g]) + 2.0 / math.sqrt(sizes[g])))
        hand = [one / sum(hand) for one in hand]
        assert q.tolist() == pytest.approx(hand, rel=1e-10)
    assert q[0] > q[2]  # positive control: the adjustment favours the small group


def test_weights_where_nothing_can_be_learnt():
    q = torch.tensor([0.2, 0.8], dtype=torch.float64)
    for losses, counts in (([5.0, 9.0], [0, 0]), ([float("nan"), float("inf")], [1, 1])):
        same = group_weights(q, torch.tensor(losses), torch.tensor(counts), 1.0)
        assert same.tolist() == pytest.approx(q.tolist())
    back = group_weights(torch.tensor([0.0, 1.0]), torch.tensor([1e4, 0.0]), torch.tensor([1, 1]), 1.0)
    assert back.tolist() == [1.0, 0.0]  # neither overflows nor stays at 0
    with pytest.raises(ValueError, match=r"adjustment=1\.0"):
        group_weights(q, q, q, 0.1, adjustment=1.0)


def test_loss_and_term_are_the_loss_of_group_dro():
    group, target = torch.tensor([0, 0, 0, 2, 2, 5]), torch.tensor([0, 1, 1, 0, 1, 0])
    census = taken(group, target)
    mode = GroupDRO(step_size=0.5, adjustment=0.3)
    mode.begin(torch.nn.Identity(), census)
    hand = dict.fromkeys((0, 2, 5), 1 / 3)
    for seed, keep in enumerate(([0, 1, 2, 3, 4, 5], [0, 1, 3], [5, 2, 1])):
        seen = batch(group[keep], target[keep], seed, census)
        losses = seen.losses()
        means = {g: losses[group[keep] == g].mean() for g in hand if bool((group[keep] == g).any())}
        for g, mean in means.items():
            hand[g] *= math.exp(0.5 * (mean.item() + 0.3 / math.sqrt(int((group == g).sum()))))
        hand = {g: q / sum(hand.values()) for g, q in hand.items()}
        robust = sum(hand[g] * mean for g, mean in means.items())
        ours = losses.mean() + mode.term(seen)
        assert ours.item() == pytest.approx(robust.item(), rel=1e-10)
        want, got = (torch.autograd.grad(one, seen.logits, retain_graph=True)[0] for one in (robust, ours))
        assert torch.allclose(want, got, rtol=1e-9)
    assert mode.figures()["largest_weight"].item() == pytest.approx(max(hand.values()))


def test_unknown_groups_keep_their_loss():
    group, target = torch.tensor([0, 0, 1, -1, -1]), torch.tensor([0, 1, 1, 0, 1])
    mode = GroupDRO(step_size=0.0)
    seen = batch(group, target)
    mode.begin(torch.nn.Identity(), seen.census)
    losses = seen.losses()
    hand = 3 / 5 * (0.5 * losses[:2].mean() + 0.5 * losses[2]) + losses[3:].sum() / 5
    assert (losses.mean() + mode.term(seen)).item() == pytest.approx(hand.item())
    assert mode.term(batch(torch.tensor([-1, -1]), target[:2], census=seen.census)) is None


def test_a_rehearsal_teaches_nothing_and_the_state_goes_on():
    group, target = torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0])
    census = taken(group, target)
    mode, other = GroupDRO(0.5), GroupDRO(0.5)
    mode.begin(torch.nn.Identity(), census)
    before = mode.weights.clone()
    mode.term(batch(group, target, 0, census, rehearsal=True))
    assert mode.weights.equal(before)
    mode.term(batch(group, target, 0, census))
    assert not mode.weights.equal(before)
    other.restore(mode.state())
    other.begin(torch.nn.Identity(), census)
    assert mode.term(batch(group, target, 1, census)).equal(other.term(batch(group, target, 1, census)))


def test_the_union_of_two_processes_is_one():
    group, target = torch.tensor([0, 0, 1, 1, 1, -1]), torch.tensor([0, 1, 1, 0, 1, 1])
    whole = batch(group, target)
    mode = GroupDRO(0.5)
    mode.begin(torch.nn.Identity(), whole.census)
    want = torch.autograd.grad(mode.term(whole), whole.logits)[0]

    halves = [slice(0, 3), slice(3, 6)]
    sums = []
    for replay in (False, True):  # first note what each would send, then answer with the sum
        grads, terms = [], []
        for half in halves:
            part = batch(group[half], target[half], census=whole.census)
            part.logits = whole.logits[half].detach().requires_grad_()

            def reduce(value, reduce_op, replay=replay):
                sums.append(value)
                return sums[0] + sums[1] if replay else value

            part.step.run.trainer = SimpleNamespace(world_size=2, strategy=SimpleNamespace(reduce=reduce))
            mode = GroupDRO(0.5)
            mode.begin(torch.nn.Identity(), whole.census)
            terms.append(mode.term(part))
            grads.append(torch.autograd.grad(terms[-1], part.logits)[0] / 2)  # DDP averages
    assert torch.allclose(torch.cat(grads), want)


def test_reweighing_makes_class_and_group_independent():
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(3, (500,), generator=generator)
    target = (torch.rand(500, generator=generator) < 0.2 + 0.3 * group).long()
    seen = batch(group, target)
    mode = Reweigh()
    mode.begin(torch.nn.Identity(), seen.census)
    w = mode.weights(seen.members, target)
    for i in range(0, 500, 50):
        g, y = group == group[i], target == target[i]
        hand = g.double().mean() * y.double().mean() / (g & y).double().mean()
        assert w[i].item() == pytest.approx(hand.item())
    rates = [float((w * target)[group == g].sum() / w[group == g].sum()) for g in range(3)]
    assert rates == pytest.approx([float(target.double().mean())] * 3)
    losses = seen.losses()
    assert (losses.mean() + mode.term(seen)).item() == pytest.approx((w * losses).mean().item())


def test_reweighing_several_families_unknown_groups_and_no_classes():
    group = torch.tensor([[0, 0], [0, 1], [1, 1], [1, -1], [-1, -1], [0, 0]])
    target = torch.tensor([0, 1, 1, 0, 1, 1])
    census = taken(group, target)
    mode = Reweigh()
    mode.begin(torch.nn.Identity(), census)
    w = mode.weights(census.members(group), target)
    alone = []
    for a in range(2):
        one = taken(group[:, a], target)
        mode.begin(torch.nn.Identity(), one)
        alone.append(mode.weights(one.members(group[:, a]), target))
    both = torch.stack(alone).mean(0)
    assert torch.allclose(w[[0, 1, 2, 5]], both[[0, 1, 2, 5]])
    assert w[3] == alone[0][3]
    assert w[4] == 1.0

    quantities = taken(torch.tensor([0, 0, 0, 1]), torch.tensor([0.5, 1.5, 2.0, 3.0]))
    assert cell_weights(quantities).tolist() == [[pytest.approx(2 / 3)], [2.0]]
