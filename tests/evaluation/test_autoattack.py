"""The standard AutoAttack, wrapped: of any range, shape and number of classes, and without a trace."""

import logging
import sys

import pytest
import torch
from torch import Tensor, nn

from lightning_guard.evaluation import Robustness, Subject
from lightning_guard.evaluation import autoattack as module
from lightning_guard.evaluation.autoattack import autoattack, refusal
from lightning_guard.functional import ThreatModel


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Fewer steps and queries of the package: these tests are of what stands around it."""
    from pyautoattack import AutoAttack

    init = AutoAttack.__init__

    def quick(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = 10
        self.square.n_queries = 50

    monkeypatch.setattr(AutoAttack, "__init__", quick)


def linear(classes: int, features: int = 6) -> nn.Linear:
    generator = torch.Generator().manual_seed(0)
    net = nn.Linear(features, classes)
    with torch.no_grad():
        net.weight.copy_(torch.randn(classes, features, generator=generator))
        net.bias.copy_(-net.weight.sum(1) / 2)
    return net


def points(n: int = 30, features: int = 6) -> Tensor:
    return torch.rand(n, features, generator=torch.Generator().manual_seed(1))


def right(logits: Tensor, y: Tensor) -> Tensor:
    return ((logits > 0).long() if logits.dim() == 1 else logits.argmax(1)) == y


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_of_a_linear_model_it_is_the_worst_case(classes, norm):
    """In any number of classes, in units of the user, against the closed form."""
    net, x = linear(classes), points()
    low, high, mean, std = -3.0, 5.0, 1.0, 2.0
    threat = ThreatModel(0.4, norm, (low, high), mean, std)
    seen = (low + (high - low) * x - mean) / std

    def forward(seen: Tensor) -> Tensor:
        out = net((seen * std + mean - low) / (high - low))
        return out[:, 0] if classes == 1 else out

    y = (forward(seen) > 0).long() if classes == 1 else forward(seen).argmax(1)
    found = autoattack(forward, seen, y, threat)
    assert threat.contains(found.moved, seen, threat.rounding(seen)).all()
    weight = torch.cat([0 * net.weight, net.weight]) if classes == 1 else net.weight
    bias = torch.cat([0 * net.bias, net.bias]) if classes == 1 else net.bias
    gap, eps = weight[None] - weight[y][:, None], 0.4 / (high - low)
    reach = gap.abs().sum(2) if norm == "linf" else gap.norm(dim=2)
    worst = (gap * x[:, None]).sum(2) + bias - bias[y][:, None] + eps * reach  # without the bounds: at least as bad
    worst.scatter_(1, y[:, None], -1.0)
    standing = right(forward(found.moved), y)
    assert standing[(worst < -1e-4).all(1)].all()
    inside = ((x > eps) & (x < 1 - eps)).all(1)  # where the bounds do not matter
    assert not standing[inside & (worst > 1e-3).any(1)].any()
    assert 0 < standing.sum() < len(standing)


def test_attacks_are_those_that_the_classes_allow():
    x = points(4)
    threat = ThreatModel(0.1, bounds=(0.0, 1.0))
    wanted = {
        1: ("APGD-CE", "FAB-T", "Square"),
        2: ("APGD-CE", "FAB-T", "Square"),
        3: ("APGD-CE", "APGD-DLR", "FAB-T", "Square"),
        4: ("APGD-CE", "APGD-T", "FAB-T", "Square"),
    }
    for classes, attacks in wanted.items():
        net = linear(classes)
        forward = (lambda x, net=net: net(x)[:, 0]) if classes == 1 else net
        assert autoattack(forward, x, torch.zeros(4).long(), threat).attacks == attacks
    assert autoattack(linear(4), x, torch.zeros(4).long(), threat, version="rand").attacks == ("APGD-CE", "APGD-DLR")
    assert autoattack(linear(2), x, torch.zeros(4).long(), threat, version="rand").attacks == ("APGD-CE",)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 4, 4), (3, 5, 5), (1, 2, 2, 2)])
def test_any_shape_comes_back_as_it_was(shape, norm):
    x = torch.rand(10, *shape, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Flatten(), linear(4, x[0].numel()))
    y = net(x).argmax(1)
    threat = ThreatModel({"linf": 0.3, "l2": 0.9, "l1": 2.0}[norm], norm, bounds=(0.0, 1.0))
    found = autoattack(net, x, y, threat)
    assert found.moved.shape == x.shape
    assert threat.contains(found.moved, x, threat.rounding(x)).all()
    assert ("Square" in found.attacks) is (norm == "linf" or shape == (3, 5, 5))
    assert not right(net(found.moved), y).all()


def test_wider_numbers_are_kept_and_untouched_inputs_are_bit_for_bit():
    x, net = points().double() * 255 - 17, linear(4).double()
    threat = ThreatModel(1e-9, bounds=(-17.0, 238.0))
    y = net(x).argmax(1)
    found = autoattack(net, x, y, threat)
    assert found.moved.dtype == torch.float64
    assert torch.equal(found.moved[right(net(found.moved), y)], x)


def test_it_leaves_no_trace():
    net, x = linear(4), points()
    net.weight.grad = torch.ones_like(net.weight)
    log = logging.getLogger("auto-attack")
    before = torch.get_rng_state(), log.level, list(log.handlers), log.propagate

    def tracer(frame, event, arg):
        return None

    old = sys.gettrace()
    sys.settrace(tracer)
    try:
        autoattack(net, x, torch.zeros(30).long(), ThreatModel(0.1, bounds=(0.0, 1.0)), parameters=net.parameters())
        kept = sys.gettrace()
    finally:
        sys.settrace(old)
    assert kept is tracer
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (log.level, list(log.handlers), log.propagate) == before[1:]
    assert net.weight.grad.eq(1).all()
    assert net.bias.grad is None
    assert all(p.requires_grad for p in net.parameters())


def test_after_an_exception_neither():
    net, calls = linear(4), 0

    def forward(x):
        nonlocal calls
        calls += 1
        if calls > 5:
            raise KeyboardInterrupt
        return net(x)

    before = torch.get_rng_state(), sys.gettrace()
    with pytest.raises(KeyboardInterrupt):
        autoattack(forward, points(), torch.zeros(30).long(), ThreatModel(0.1, bounds=(0.0, 1.0)))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert sys.gettrace() is before[1]


def test_a_detached_input_is_no_error_and_its_warning_is_kept():
    net, x = linear(4), points(8)
    found = autoattack(lambda x: net(x.detach()), x, net(x).argmax(1), ThreatModel(0.1, bounds=(0.0, 1.0)))
    assert any("zero gradient" in warning for warning in found.warnings)


def test_the_same_seed_finds_the_same():
    net, x = linear(4), points()
    y, threat = net(x).argmax(1), ThreatModel(0.1, bounds=(0.0, 1.0))
    first = autoattack(net, x, y, threat, seed=3)
    torch.rand(5)
    assert torch.equal(autoattack(net, x, y, threat, seed=3).moved, first.moved)


@pytest.mark.parametrize(
    ("threat", "named"),
    [
        (ThreatModel(0.1), "give bounds"),
        (ThreatModel(0.1, bounds=(0.0, (1.0, 2.0))), "same finite bounds"),
        (ThreatModel(0.1, bounds=(0.0, float("inf"))), "same finite bounds"),
        (ThreatModel(0.1, bounds=(0.0, 1.0), mutable=[0]), r"mutable=\(0,\)"),
        (ThreatModel(0.1, bounds=(0.0, 1.0), unit=[1.0, 2.0]), "unit="),
        (ThreatModel(0.1, bounds=(0.0, 1.0), one_hot=[(0, 1)]), "one_hot="),
        (ThreatModel(0.1, bounds=(0.0, 1.0), increasing=[0]), "increasing="),
    ],
)
def test_what_the_standard_does_not_know_is_refused_before_training(threat, named):
    with pytest.raises(ValueError, match=named):
        autoattack(linear(2, 2), points(2, 2), torch.zeros(2).long(), threat)
    with pytest.raises(ValueError, match=named):
        Robustness(attack="autoattack").with_threat(threat)


def test_without_the_package_the_remedy_is_told(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert "pip install lightning-guard[robustness]" in refusal(ThreatModel(0.1, bounds=(0.0, 1.0)))
    with pytest.raises(ValueError, match="pip install"):
        Robustness(0.1, attack="autoattack", bounds=(0.0, 1.0))


@pytest.mark.parametrize("attack", ["pgd", "apgd", "autoattack"])
def test_the_evaluator_runs_it_and_says_what_ran(attack, monkeypatch):
    monkeypatch.setattr("lightning_guard.evaluation.siege.QUERIES", 50)
    net, x = linear(4), points()
    subject = Subject(net, [(x, net(x).argmax(1))])
    evidence = Robustness(0.05, attack=attack, bounds=(0.0, 1.0), curve=()).evaluate(subject)
    about = evidence.figures["robustness/accuracy"].about
    said = {
        "pgd": "(PGD, ",
        "apgd": "PGD, APGD-CE and APGD-T, FAB, Square",
        "autoattack": "AutoAttack of APGD-CE, APGD-T",
    }
    assert said[attack] in about
    assert ("the standard to report" in about) is (attack != "autoattack")
    gap = net.weight[None] - net.weight[subject.outputs.target][:, None]
    height = net(x)[:, None, :].squeeze(1) - net(x).gather(1, subject.outputs.target[:, None])
    sure = (height + 0.05 * gap.abs().sum(2)).scatter(1, subject.outputs.target[:, None], -1.0) < 0
    assert evidence.figures["robustness/accuracy"].value >= sure.all(1).double().mean() - 1e-9
    assert evidence.figures["robustness/accuracy"].value < 1
