"""Defences that are broken on purpose: the report never says robust where the standard attack says broken."""

import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_guard.data import FashionMNISTData
from lightning_guard.evaluation import Robustness, Subject
from lightning_guard.evaluation.doubts import Signs
from lightning_guard.evaluation.straight import StraightThrough
from lightning_guard.functional import stream

EPS, N = 0.05, 40


def parts(name: str) -> tuple[Tensor, Tensor]:
    """Small images of the packaged set."""
    data = FashionMNISTData()
    data.setup("fit")
    data.setup("test")
    loader = data.test_dataloader() if name == "test" else data.train_dataloader()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x, y = (torch.cat(part) for part in zip(*((b[0], b[1]) for b in loader), strict=True))
    return F.avg_pool2d(x, 2), y


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """An honest network of two layers, trained for a second."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(196, 32), nn.ReLU(), nn.Linear(32, 10))
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        x, y = parts("train")
        for step in range(300):
            rows = torch.randint(len(x), (128,), generator=stream(0, step))
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def examples() -> tuple[Tensor, Tensor]:
    x, y = parts("test")
    return x[:N], y[:N]


class Defence(nn.Module):
    """A network behind one of the ways to look robust."""

    def __init__(self, net: nn.Module, kind: str):
        super().__init__()
        self.net, self.kind = net, kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "quantised":
            return self.net((x * 3).round() / 3)
        if self.kind == "detached":
            return self.net(x.detach())
        if self.kind == "saturated":
            return self.net(x) * 1e4
        if self.kind == "probabilities":
            return (20 * self.net(x)).softmax(1)
        if self.kind == "noise":
            return self.net(x + 0.1 * torch.randn_like(x))
        if self.kind == "shift":
            return self.net(torch.roll(x, torch.randint(-1, 2, (2,)).tolist(), (2, 3)))
        if self.kind == "single logit":
            logits = self.net(x)
            return logits[:, 5:].logsumexp(1) - logits[:, :5].logsumexp(1)
        return self.net(x)


SIGNS = {
    "honest": None,
    "single logit": None,  # nothing is wrong with it but that the standard, asked plainly, calls it robust
    "quantised": "masked gradients",
    "detached": "masked gradients",
    "saturated": "so large are the logits",
    "probabilities": "returns probabilities",
    "noise": "differently each time",
    "shift": "differently each time",
}


def judged(net, examples, kind, **options):
    x, y = examples
    y = (y >= 5).long() if kind == "single logit" else y
    evidence = Robustness(EPS, bounds=(0.0, 1.0), examples=N, **options).evaluate(Subject(Defence(net, kind), [(x, y)]))
    return evidence.figures["robustness/accuracy"].value, " ".join(evidence.doubts.get("robustness/accuracy", []))


@pytest.mark.parametrize("kind", SIGNS)
def test_signs_are_told_of_broken_defences_and_of_no_honest_one(net, examples, kind, monkeypatch):
    monkeypatch.setattr("lightning_guard.evaluation.siege.QUERIES", 100)
    found, doubts = judged(net, examples, kind, curve=(1.0, 2.0))
    honest, _ = judged(net, examples, "honest", curve=())
    if SIGNS[kind] is None:
        assert not doubts
    else:
        assert SIGNS[kind] in doubts
    if kind not in ("quantised", "single logit"):  # whose answers are others, so that their robustness is another
        assert found <= honest  # behind every trick stands the same network


@pytest.mark.slow
@pytest.mark.parametrize("kind", SIGNS)
def test_it_never_says_robust_where_the_standard_says_broken(net, examples, kind):
    from pyautoattack import AutoAttack

    x, y = examples
    y, defence = (y >= 5).long() if kind == "single logit" else y, Defence(net, kind)

    def logits(x: Tensor) -> Tensor:
        out = defence(x)
        columns = torch.stack([torch.zeros_like(out), out], 1) if out.dim() == 1 else out
        return columns + 0 * x.flatten(1).sum(1, keepdim=True)  # else the standard fails on what is detached

    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    version = "rand" if kind in ("noise", "shift") else "standard"
    with torch.random.fork_rng():
        attack = AutoAttack(logits, norm="Linf", eps=EPS, seed=0, version=version)
        if kind == "single logit":
            attack.attacks_to_run, attack.fab.n_target_classes = ["apgd-ce", "fab-t", "square"], 1
        moved, _ = attack.run_standard_evaluation(x, y)
        standard = (logits(moved).argmax(1) == y).double().mean().item()
    found, _ = judged(net, examples, kind)
    assert found <= standard + 1 / N


def test_straight_through_changes_no_value_and_opens_the_way():
    x = torch.tensor([0.2, 0.7, 1.4], requires_grad=True)

    def model(x: Tensor) -> Tensor:
        with torch.no_grad():
            x = (3 * x).floor() / 3
        return (x.sign() * x.ceil()).detach() * 2 + x.round()

    plain = model(x)
    assert not plain.requires_grad
    with StraightThrough():
        opened = model(x)
    assert torch.equal(opened, plain)
    assert torch.autograd.grad(opened.sum(), x)[0].abs().min() > 0
    assert torch.is_grad_enabled()


CALM = Signs(seen=100, clean=90, probed=50, steps={0: 90, 1: 60, 50: 50}, radii={0.1: 80, 0.2: 0})


@pytest.mark.parametrize(
    ("sign", "word"),
    [
        ({"passes": 10}, "differently each time"),
        ({"probabilities": True}, "probabilities"),
        ({"silent": 10}, "masked gradients"),
        ({"saturated": 10}, "large are the logits"),
        ({"noise": 1}, "Random noise"),
        ({"queried": 2}, "Square, which"),
        ({"steps": {0: 90, 1: 50, 50: 53}}, "More steps"),
        ({"radii": {0.1: 80, 0.2: 80}}, "does not fall"),
        ({"radii": {0.1: 80, 1.0: 20}, "everything": True}, "any input may become any other"),
        ({"warnings": ["it seems to be a dynamic defense! ..."]}, "adapts while it is asked"),
        ({"remedies": {"BPDA": 3}}, "BPDA (3 more fooled)"),
        ({"blocked": "an error"}, "could not be let through"),
    ],
)
def test_each_sign_is_one_sentence(sign, word):
    assert CALM.sentences() == []
    (said,) = replace(CALM, **sign).sentences()
    assert word in said
    assert said.endswith(".")
    assert said[0].isupper()


@pytest.mark.parametrize(
    "sign",
    [
        {"silent": 9},
        {"saturated": 9},
        {"noise": 0},
        {"queried": 1},
        {"steps": {0: 90, 1: 50, 50: 52}},
        {"radii": {0.1: 80}},
    ],
)
def test_what_may_be_chance_is_no_sign(sign):
    assert replace(CALM, **sign).sentences() == []
