"""Every way to write into a module in training is seen, and an optimizer's is not mistaken for one."""

import pytest
import torch
from torch import nn

from lightning_guard.unchanged import Unchanged


def module():
    made = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    made[2].requires_grad_(False)
    return made


WRITES = {
    "a weight in place": (lambda m: m[0].weight.detach().add_(1.0), "the weight 0.weight"),
    "another parameter": (lambda m: setattr(m[0], "bias", nn.Parameter(m[0].bias.detach())), "the weight 0.bias"),
    "a buffer in place": (lambda m: m[1].running_mean.add_(1.0), "the buffer 1.running_mean"),
    "another buffer": (lambda m: setattr(m[1], "running_var", torch.ones(2)), "the buffer 1.running_var"),
    "a new buffer": (lambda m: m.register_buffer("seen", torch.ones(2)), "the buffer seen"),
}


@pytest.mark.parametrize("way", WRITES)
def test_writes_within_a_step(way):
    write, name = WRITES[way]
    net = module()
    watch = Unchanged(net)
    watch.begin_step()
    assert watch.written() == []
    write(net)
    assert name in watch.written()
    watch.begin_step()
    assert watch.written() == []


def test_writes_past_the_versions_show_in_the_values():
    net = module()
    watch = Unchanged(net)
    for values, wanted in ((False, []), (True, ["the weight 0.weight"])):
        watch.begin_step(values)
        net[0].weight.data.add_(1.0)
        assert watch.written() == wanted


def test_what_a_checkpoint_keeps_beside_trained_weights():
    net = module()
    watch = Unchanged(net)
    assert watch.kept() == []  # training has not begun
    watch.begin()
    with torch.no_grad():
        net[0].weight.add_(1.0)  # as an optimizer does
    assert watch.kept() == []
    net[2].weight.data.add_(1.0)
    net[1].running_mean.data.add_(1.0)
    net.register_buffer("seen", torch.ones(2))
    assert watch.kept() == ["1.running_mean", "2.weight", "seen"]


def test_a_weight_that_is_unfrozen_later_may_move():
    net = module()
    watch = Unchanged(net)
    watch.begin()
    net[2].requires_grad_(True)
    net[2].weight.data.add_(1.0)
    assert watch.kept() == []
    net[0].requires_grad_(False)  # and one that is frozen later was trained until then
    assert watch.kept() == []
