"""Coupled channels, scores by hand, and removals that are exact in networks as people build them."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_guard.functional.channels import (
    channel_plan,
    channel_scores,
    channels_to_keep,
    choose,
    coupled_channels,
    multiplications,
    removes_exactly,
)
from lightning_guard.functional.reshaping import apply_plan
from lightning_guard.models import MLP, SmallCNN, SmallTransformer, StridedCNN

pytest.importorskip("torch_pruning")


def forward(net, x):
    return net(x)


class Block(nn.Module):
    def __init__(self, inn, out):
        super().__init__()
        self.a, self.b = nn.Conv2d(inn, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.c, self.d = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.skip = nn.Conv2d(inn, out, 1) if inn != out else nn.Identity()

    def forward(self, x):
        return torch.relu(self.skip(x) + self.d(self.c(torch.relu(self.b(self.a(x))))))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(1, 16, 3, padding=1), Block(16, 16), Block(16, 32)
        self.depth, self.head = nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.depth(self.two(self.one(self.stem(x)))).mean((2, 3)))


class Gated(nn.Module):
    """Squeeze and excitation, two branches that are concatenated, and a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(1, 16, 5, padding=2)
        self.squeeze, self.excite = nn.Linear(24, 8), nn.Linear(8, 24)
        self.up, self.act, self.head = nn.ConvTranspose2d(24, 16, 2, stride=2), nn.PReLU(16), nn.Linear(16 * 256, 3)

    def forward(self, x):
        x = torch.cat([self.a(x), self.b(x)], 1)
        x = x * self.excite(torch.relu(self.squeeze(x.mean((2, 3))))).sigmoid()[:, :, None, None]
        return self.head(self.act(self.up(x)).flatten(1))


NETS = {
    "group norm": (lambda: SmallCNN(), (2, 1, 28, 28)),
    "one logit": (lambda: SmallCNN(num_classes=2), (2, 1, 28, 28)),
    "strided": (lambda: StridedCNN(width=8, hidden=32), (2, 1, 28, 28)),
    "perceptron": (lambda: MLP(20, [32, 16]), (2, 20)),
    "residual": (Residual, (2, 1, 8, 8)),
    "gated": (Gated, (2, 1, 8, 8)),
    "transformer": (lambda: SmallTransformer(dim=16, depth=1), (2, 1, 28, 28)),
}


def build(name, seed=0):
    torch.manual_seed(seed)
    make, shape = NETS[name]
    net = make().eval()
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(), layer.running_var.uniform_(0.5, 2), layer.weight.normal_()
            if isinstance(layer, nn.GroupNorm):
                layer.weight.normal_(), layer.bias.normal_()
    return net, torch.rand(shape)


def masked(net, plan):
    """The network with nobody reading the channels that go: zeros in all weights that do."""
    net = copy.deepcopy(net)
    for name, kept in plan.items():
        layer = net.get_submodule(name)
        if "in" not in kept or getattr(layer, "groups", 1) > 1:
            continue
        dim = 0 if isinstance(layer, nn.ConvTranspose2d) else 1
        for i in range(layer.weight.shape[dim]):
            if i not in kept["in"]:
                layer.weight.data.select(dim, i).zero_()
    return net


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", NETS)
def test_the_pruned_network_is_the_masked_one(name, scope):
    net, x = build(name)
    plan, left = choose(net, x, forward, 0.5, scope=scope, round_to=4)
    expected, dense = masked(net, plan)(x), net(x)
    before = sum(p.numel() for p in net.parameters())
    apply_plan(net, plan)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(net(x), dense, atol=1e-3)  # channels that mattered have gone
    assert sum(p.numel() for p in net.parameters()) < 0.9 * before
    assert any("outputs" in why for why in left.values())


@pytest.mark.parametrize("name", ["group norm", "residual", "gated"])
def test_half_of_each_layer_goes(name):
    net, x = build(name)
    plan, _ = choose(net, x, forward, 0.5, scope="layer", round_to=4)
    for layer, kept in plan.items():
        module = net.get_submodule(layer)
        width = getattr(module, "out_channels", None) or getattr(module, "out_features", None)
        if "out" in kept and width:
            assert len(kept["out"]) == width / 2


def test_heads_and_norms_keep_a_transformer_whole_but_for_its_perceptrons():
    net, x = build("transformer")
    plan, left = choose(net, x, forward, 0.5)
    assert set(plan) == {"blocks.0.mlp.0", "blocks.0.mlp.2"}
    assert set(left) == {"head", "blocks.0.mlp.2", "blocks.0.mix", "blocks.0.query_key_value", "patches"}
    assert "LayerNorm" in left["patches"]


class Crossing(nn.Module):
    """Layers that look at all channels at once, which tracing takes for elementwise."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(4, 8), nn.Linear(8, 2), how

    def forward(self, x):
        return self.b(self.how(self.a(x)))


@pytest.mark.parametrize(
    "how",
    [
        lambda h: h.softmax(1),
        lambda h: h - h.mean(1, keepdim=True),
        lambda h: h.cumsum(1),
        lambda h: nn.functional.normalize(h, dim=1),
        lambda h: nn.functional.layer_norm(h, (8,)),
    ],
)
def test_channels_that_mix_stay_whole(how):
    net, x = Crossing(how), torch.randn(2, 4)
    plan, left = choose(net, x, forward, 0.5)
    assert plan == {}
    assert "mixed with others" in left["a"]
    assert choose(Crossing(torch.relu), x, forward, 0.5)[0]


def test_flipped_channels_are_no_obstacle_or_stay():
    net, x = Crossing(lambda h: h.flip(1)), torch.randn(2, 4)
    plan, left = choose(net, x, forward, 0.5)
    assert plan == {} or removes_exactly(net, x, forward, plan)
    assert plan or left["a"]


def test_tied_weights_and_computed_weights_stay_whole():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.c(self.b(self.a(x).relu()).relu())

    plan, left = choose(Tied(), torch.randn(2, 8), forward, 0.5)
    assert plan == {}
    assert "share a parameter" in left["a"]
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 2))
    plan, left = choose(net, torch.randn(2, 4), forward, 0.5)
    assert plan == {}
    assert left["0"]


def test_removes_exactly_knows_wrong_plans():
    net, x = build("residual")
    plan, _ = choose(net, x, forward, 0.5)
    assert removes_exactly(net, x, forward, plan)
    wrong = {**plan, "head": {"in": [i + 1 if i < 31 else 0 for i in plan["head"]["in"]]}}
    assert not removes_exactly(net, x, forward, wrong)
    short = {name: kept for name, kept in plan.items() if name != "one.b"}
    assert not removes_exactly(net, x, forward, short)
    for parameter in net.parameters():  # weights of zero hide no mistake
        parameter.data.zero_()
    assert not removes_exactly(net, x, forward, wrong)


def test_finding_channels_changes_nothing():
    net, x = build("residual")
    net.train()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    choose(net, x, forward, 0.5)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in net.modules())
    assert not any(m._forward_hooks for m in net.modules())
    assert all(p.grad is None for p in net.parameters())


def test_magnitude_is_the_sum_by_hand():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4, 2))
    net[1].weight.data = torch.tensor([1.0, -2.0, 0.5])
    (group,) = [g for g in coupled_channels(net, torch.randn(2, 1, 4, 4), forward) if not g.obstacle]
    conv = [net[0].weight[c].square().sum().item() for c in range(3)]
    scale = [1.0, 4.0, 0.25]
    read = [net[4].weight[:, 4 * c : 4 * c + 4].square().sum().item() for c in range(3)]
    by_hand = [sum(3 * part[c] / sum(part) for part in (conv, scale, read)) / 3 for c in range(3)]
    assert channel_scores(net, group, "magnitude").tolist() == pytest.approx(by_hand)
    assert channel_scores(net, group, "bn_scale").tolist() == pytest.approx([3 / 3.5, 6 / 3.5, 1.5 / 3.5])


def test_bn_scale_without_a_norm_is_refused():
    with pytest.raises(ValueError, match=r"bn_scale.*layers\.0"):
        choose(MLP(20, [16]), torch.randn(2, 20), forward, 0.5, importance="bn_scale")


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_what_stays_is_best_and_counted(ratio, scope):
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(n, generator=generator) for n in (16, 8, 40)]
    for multiple in (1, 8):
        kept = channels_to_keep(scores, ratio, scope, multiple)
        for score, stay in zip(scores, kept, strict=True):
            assert stay == sorted(set(stay))
            assert len(stay) % multiple == 0
            gone = set(range(len(score))) - set(stay)
            assert not gone or min(score[i] for i in stay) >= max(score[i] for i in gone)
            if scope == "layer":
                assert len(stay) == math.ceil(len(score) * (1 - ratio) / multiple - 1e-9) * multiple
    if scope == "global":
        kept = channels_to_keep(scores, ratio, scope)
        whole = [len(stay) for stay in kept]
        assert min(whole) >= 1
        if min(whole) > 1:
            assert sum(whole) == math.ceil(64 * (1 - ratio) - 1e-9)


def test_units_go_as_one():
    scores = [torch.tensor([0.0, 9.0, 5.0, 5.0, 1.0, 1.0])]
    assert channels_to_keep(scores, 0.6, "layer", 1, [2]) == [[0, 1, 2, 3]]
    assert channels_to_keep(scores, 0.7, "global", 1, [2]) == [[2, 3]]


def test_random_depends_on_the_seed_alone():
    net, x = build("perceptron")
    plans = [choose(net, x, forward, 0.5, "random", seed=seed)[0] for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]


def test_multiplications_of_a_convolution():
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(3 * 16, 5))
    assert multiplications(net, torch.zeros(2, 2, 4, 4), forward) == 3 * 16 * 2 * 9 + 48 * 5
    assert not net[0]._forward_hooks


def test_a_plan_of_several_groups_is_their_union():
    net, x = build("gated")
    groups = [g for g in coupled_channels(net, x, forward) if not g.obstacle]
    kept = [list(range(g.channels // 2)) for g in groups]
    whole = channel_plan(net, groups, kept)
    for group, stay in zip(groups, kept, strict=True):
        for layer, sides in channel_plan(net, [group], [stay]).items():
            for side, index in sides.items():
                assert set(whole[layer][side]) <= set(index)
