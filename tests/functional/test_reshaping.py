"""Channels taken out in place, and shapes taken on from stored weights."""

import copy

import pytest
import torch
from torch import nn

from lightning_guard.functional.lowrank import factorized
from lightning_guard.functional.reshaping import apply_plan, blank_merged, is_pair, replace, reshape_like


def network():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.PReLU(6), nn.Conv2d(6, 6, 3, groups=6),
        nn.GroupNorm(3, 6), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2), nn.InstanceNorm2d(4, affine=True),
        nn.Flatten(), nn.Linear(4 * 25, 3),
    )  # fmt: skip
    for parameter in net.parameters():
        parameter.data = torch.randn_like(parameter)
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 1.5)
    return net.eval()


SIX, FOUR = [0, 1, 4, 5], [1, 2, 3]
PLAN = {
    "0": {"out": SIX},
    "1": {"out": SIX},
    "2": {"out": SIX},
    "3": {"out": SIX, "in": SIX},
    "4": {"out": SIX},
    "6": {"in": SIX, "out": FOUR},
    "7": {"out": FOUR},
    "9": {"in": [i for i in range(100) if i >= 25]},
}


def masked(net):
    """The same network in which nobody reads the channels that go."""
    net = copy.deepcopy(net)
    net[6].weight.data[[2, 3]] = 0
    net[9].weight.data[:, :25] = 0
    return net


def test_the_pruned_network_is_the_masked_one():
    net, x = network(), torch.randn(5, 1, 6, 6)
    expected = masked(net)(x)
    parameters = list(net.parameters())
    assert not torch.allclose(net(x), expected)
    apply_plan(net, PLAN)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))
    assert (net[0].out_channels, net[3].groups, net[3].in_channels, net[4].num_groups) == (4, 4, 4, 2)
    assert (net[1].num_features, net[2].num_parameters, net[6].in_channels, net[6].out_channels) == (4, 4, 4, 3)
    assert (net[7].num_features, net[9].in_features, net[9].out_features) == (3, 75, 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    ],
)
def test_training_goes_on_as_if_unread_channels_had_never_been(make):
    """Beside a network whose dead channels have zero gradients, step after step."""
    torch.manual_seed(0)
    big = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    optimizer, x = make(big.parameters()), torch.randn(8, 3).double()
    for _ in range(3):
        optimizer.zero_grad()
        big(x).square().sum().backward()
        optimizer.step()
    small = copy.deepcopy(big)
    other = make(small.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    keep = [0, 2, 5]
    loss = small(x).sum()  # somebody still holds a graph of the old shapes
    loss.backward(retain_graph=True)
    apply_plan(small, {"0": {"out": keep}, "2": {"in": keep}}, [other])
    assert all(p.grad is None for p in [small[0].weight, small[0].bias, small[2].weight])
    with torch.no_grad():
        gone = [1, 3, 4]
        big[2].weight[:, gone] = 0
        for entry in optimizer.state[big[2].weight].values():
            if entry.dim():
                entry[:, gone] = 0
    for _ in range(3):
        for net, stepper in ((big, optimizer), (small, other)):
            stepper.zero_grad()
            net(x).square().sum().backward()
            if net is big:  # dead channels stay dead
                net[2].weight.grad[:, gone] = 0
            stepper.step()
    torch.testing.assert_close(small[0].weight, big[0].weight[keep])
    torch.testing.assert_close(small[2].weight, big[2].weight[:, keep])
    torch.testing.assert_close(small[2].bias, big[2].bias)
    assert loss is not None


def test_optimizer_state_of_another_shape_is_refused_and_nothing_changed():
    net = nn.Linear(3, 6)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    optimizer.state[net.weight]["rows"] = torch.ones(6)
    with pytest.raises(ValueError, match=r"'rows'.*Adam"):
        apply_plan(net, {"": {"out": [0, 1]}}, [optimizer])
    assert net.weight.shape == (6, 3)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"nothing": {"out": [0]}}, "is not there"),
        ({"5": {"out": [0]}}, "is a ReLU"),
        ({"0": {"out": [6]}}, "channel 6 is to stay of 6"),
        ({"4": {"out": [0, 2]}}, "groups of 2 channels"),
        ({"4": {"out": [1, 2]}}, "groups of 2 channels"),
    ],
)
def test_plans_of_other_networks_are_refused(plan, message):
    net = network()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=message):
        apply_plan(net, plan)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_shapes_come_from_weights_there_and_back():
    dense, small, x = network(), network(), torch.randn(5, 1, 6, 6)
    apply_plan(small, PLAN)
    fresh = network()
    assert reshape_like(fresh, dense.state_dict()) == []
    changed = reshape_like(fresh, small.state_dict())
    assert set(changed) == set(PLAN)
    fresh.load_state_dict(small.state_dict())
    torch.testing.assert_close(fresh(x), small(x))
    reshape_like(fresh, dense.state_dict())
    fresh.load_state_dict(dense.state_dict())
    torch.testing.assert_close(fresh(x), dense(x))


def test_split_layers_come_from_weights_there_and_back():
    def net():
        torch.manual_seed(0)
        return nn.ModuleDict({"a": nn.Linear(6, 5), "b": nn.Conv2d(2, 8, 3, stride=2, padding=1, bias=False)})

    split = net()
    replace(split, "a", factorized(split["a"], 2))
    replace(split, "b", factorized(split["b"], 3))
    fresh = net()
    assert reshape_like(fresh, split.state_dict()) == ["a", "b"]
    assert reshape_like(fresh, split.state_dict()) == []
    fresh.load_state_dict(split.state_dict())
    x = torch.randn(2, 2, 5, 5)
    torch.testing.assert_close(fresh["b"](x), split["b"](x))
    assert fresh["b"][0].stride == (2, 2)
    reshape_like(fresh, net().state_dict())
    fresh.load_state_dict(net().state_dict())
    torch.testing.assert_close(fresh["b"](x), net()["b"](x))
    torch.testing.assert_close(fresh["a"](torch.ones(6)), net()["a"](torch.ones(6)))
    assert not is_pair(fresh["a"])
    assert isinstance(blank_merged(split["a"]), nn.Linear)


def test_another_kind_of_layer_is_refused():
    with pytest.raises(ValueError, match="another kind of layer"):
        reshape_like(nn.Sequential(nn.Conv2d(1, 2, 3)), {"0.weight": torch.zeros(2, 1, 5, 5)})
    with pytest.raises(ValueError, match="groups of 2"):
        reshape_like(nn.Sequential(nn.GroupNorm(2, 4)), {"0.weight": torch.zeros(3), "0.bias": torch.zeros(3)})
