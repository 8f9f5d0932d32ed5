"""GroupNorm for BatchNorm, and Adam's step by its formula."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_guard.functional.privacy import correct_adam_, group_norms


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.a = self.b = nn.BatchNorm2d(8)


@pytest.mark.parametrize(
    ("channels", "groups"), [(1, 1), (3, 1), (7, 1), (8, 1), (16, 2), (24, 3), (48, 6), (256, 32), (510, 30), (512, 32)]
)
def test_groups(channels, groups):
    net = nn.Sequential(nn.BatchNorm1d(channels))
    assert group_norms(net) == 1
    assert net[0].num_groups == groups


@pytest.mark.parametrize(
    ("norm", "shape"),
    [(nn.BatchNorm1d, ()), (nn.BatchNorm1d, (5,)), (nn.BatchNorm2d, (5, 4)), (nn.BatchNorm3d, (2, 3, 4))],
)
def test_it_computes_with_the_weights_of_the_old_layer(norm, shape):
    net = nn.ModuleDict({"in": nn.Sequential(norm(16, eps=1e-3))})
    old = net["in"][0]
    nn.init.normal_(old.weight)
    nn.init.normal_(old.bias)
    assert group_norms(net) == 1
    assert net["in"][0].weight is old.weight
    assert net["in"][0].bias is old.bias
    x = torch.randn(3, 16, *shape)
    torch.testing.assert_close(net["in"](x), F.group_norm(x, 2, old.weight, old.bias, 1e-3))
    assert not list(net.buffers())


def test_none_is_left():
    shared = Twice()
    net = nn.Sequential(shared, nn.Sequential(shared.a), nn.BatchNorm1d(9, affine=False).eval(), nn.Linear(2, 2))
    assert group_norms(net) == 2
    assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in net.modules())
    assert shared.a is shared.b is net[1][0]
    assert net[2].weight is None
    assert not net[2].training
    assert net.training


@pytest.mark.parametrize(
    "options",
    [
        {}, {"weight_decay": 0.1}, {"maximize": True}, {"amsgrad": True}, {"betas": (0.5, 0.8)}, {"foreach": True},
        {"lr": torch.tensor(0.01), "foreach": False},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("variance", [0.5, 0.0])
def test_corrected_adam_by_hand(options, kind, variance):
    torch.manual_seed(0)
    p, idle = nn.Parameter(torch.randn(50, dtype=torch.float64)), nn.Parameter(torch.zeros(2))
    options = {"lr": 0.03, "weight_decay": 0.0, **options}
    optimizer, floor = kind([p, idle], **options), 0.1
    theta, m, v, most = p.detach().clone(), 0.0, 0.0, torch.zeros(50, dtype=torch.float64)
    first, second = options.get("betas", (0.9, 0.999))
    decay, rate = options["weight_decay"], float(options["lr"])
    for step in range(1, 8):
        gradient = torch.randn_like(p)
        p.grad = gradient.clone()
        optimizer.step()
        correct_adam_(optimizer, variance, floor)

        gradient = -gradient if "maximize" in options else gradient
        if kind is torch.optim.Adam:
            gradient = gradient + decay * theta
        else:
            theta = theta * (1 - rate * decay)
        m, v = first * m + (1 - first) * gradient, second * v + (1 - second) * gradient**2
        most = torch.maximum(most, v)
        second_moment = (most if "amsgrad" in options else v) / (1 - second**step)
        least = max(floor * variance, 1e-16)
        theta = theta - rate * m / (1 - first**step) / (second_moment - variance).clamp(min=least).sqrt()
        torch.testing.assert_close(p.detach(), theta, rtol=1e-6, atol=1e-8)
    assert not idle.any()
