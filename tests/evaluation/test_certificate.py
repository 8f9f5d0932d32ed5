"""Certificates against the classifier whose certificate is known exactly, and claims that are too large."""

import math

import pytest
import torch
from scipy import stats
from torch import nn

from lightning_guard.evaluation import Certificate, Evidence, Subject
from lightning_guard.functional import GaussianNoise, certified_radius, clopper_pearson_lower, stream
from tests.evaluation.test_every_evaluator import finished, trace

SIGMA = 0.5


def linear(columns: int = 1) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, columns).double()


def points(n: int = 60) -> torch.Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def said(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = module(x)
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)


def distance(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """To the boundary. Smoothing a half-space keeps it, so this is the exact radius of the smoothed classifier too."""
    weight, bias = module.weight.detach(), module.bias.detach()
    if len(weight) == 2:
        weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
    return (x @ weight[0] + bias).abs() / weight.norm()


def value(evidence, key: str = "accuracy"):
    return evidence.figures[f"certificate/{key}"].value


@pytest.mark.parametrize("columns", [1, 2])
def test_of_a_linear_model_it_approaches_the_closed_form(columns):
    module, x = linear(columns), points()
    y = said(module, x)
    y[::7] = 1 - y[::7]
    right = said(module, x) == y
    judge = Certificate(SIGMA, samples=20_000, examples=len(x), batch_size=4000)
    found = judge.evaluate(Subject(module, list(zip(x.split(25), y.split(25), strict=True))))
    curve = found.curves["certificate/accuracy"]
    assert curve.x == pytest.approx([0, 0.125, 0.25, 0.5, 0.75, 1.0])
    true, wide = distance(module, x), 0.06  # 20,000 copies see a radius of 1 about so well
    for radius, share in zip(curve.x, curve.y, strict=True):
        upper = (right & (true > radius)).double().mean().item()
        lower = (right & (true > radius + wide)).double().mean().item()
        assert lower <= share <= upper
    assert curve.y[0] > curve.y[-1] > 0
    assert value(found) == curve.y[2]
    assert value(found, "smoothed_accuracy") == pytest.approx(right.double().mean().item(), abs=0.02)
    assert value(found, "abstention") <= (true < wide).double().mean().item()
    low, high = found.intervals["certificate/accuracy"]
    assert low < value(found) < high


def claims(module: nn.Module, x: torch.Tensor, drawn: GaussianNoise, sigma: float, samples: int = 2000):
    """The radius that each point would be given by votes under one noise and the formula of another."""
    votes = []
    for i, row in enumerate(x):
        copies = drawn.add(row.expand(samples, -1), stream(0, i))
        votes.append((said(module, copies) == said(module, row[None])).sum())
    return certified_radius(clopper_pearson_lower(torch.stack(votes), samples, 0.001), sigma)


def flips(module: nn.Linear, x: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Whether the strongest attack within a radius changes the smoothed class: straight to the boundary."""
    weight = module.weight.detach()[0]
    toward = -(x @ weight + module.bias.detach()).sign()[:, None] * weight / weight.norm()
    return said(module, x + toward * radius[:, None]) != said(module, x)


def test_no_attack_within_the_radius_succeeds_and_larger_claims_are_caught():
    module, x = linear(), points()
    honest = claims(module, x, GaussianNoise(SIGMA), SIGMA)
    assert (honest > 0).double().mean() > 0.8
    assert not flips(module, x, honest).any()
    beyond = distance(module, x) * 1.001
    assert flips(module, x, beyond).all()
    assert (beyond > honest).all()
    # Votes of smaller noise, as when std is forgotten: the same attack now breaks what was claimed.
    wrong = claims(module, x, GaussianNoise(SIGMA / 2), SIGMA)
    assert flips(module, x, wrong).double().mean() > 0.5


class Stripes(nn.Module):
    """Narrow stripes by the first feature, which smoothing turns into another classifier than itself."""

    def forward(self, x):
        return torch.cos(8 * x[:, :1]) + 0.3 * x[:, :1]


def test_it_is_of_the_vote_and_not_of_the_network():
    x = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None]
    for right in ("vote", "network"):
        grid = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
        share = torch.tensor(
            [
                ((Stripes()(grid[:, None])[:, 0] > 0) * torch.tensor(stats.norm.pdf(grid, z, SIGMA))).sum() * 24 / 1e5
                for z in x[:, 0].tolist()
            ]
        )
        y = (share > 0.5).long() if right == "vote" else said(Stripes(), x)
        found = Certificate(SIGMA, samples=4000).evaluate(Subject(Stripes(), [(x, y)]))
        # A bound of 4000 votes is about 0.03 below the share.
        sure = certified_radius((torch.maximum(share, 1 - share) - 0.05).clamp_min(0), SIGMA)
        true = certified_radius(torch.maximum(share, 1 - share), SIGMA)
        for radius, certified in zip(
            found.curves["certificate/accuracy"].x, found.curves["certificate/accuracy"].y, strict=True
        ):
            agreed = (share > 0.5).long() == y
            assert ((sure > radius) & agreed).double().mean() <= certified <= ((true > radius) & agreed).double().mean()
    assert value(found, "smoothed_accuracy") < 0.9  # the network itself is always right here


def test_sigma_is_in_units_before_normalisation():
    module, x, scale = linear(), points(), torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    twin = linear()
    with torch.no_grad():
        twin.weight.mul_(scale)
    y, options = said(module, x), {"samples": 1000, "examples": len(x)}
    one = Certificate(SIGMA, **options).evaluate(Subject(module, [(x, y)]))
    two = Certificate(SIGMA, std=scale.tolist(), **options).evaluate(Subject(twin, [(x / scale, y)]))
    assert two.curves["certificate/accuracy"].y == pytest.approx(one.curves["certificate/accuracy"].y, abs=0.02)
    forgotten = Certificate(SIGMA, **options).evaluate(Subject(twin, [(x / scale, y)]))
    assert value(forgotten) < value(two)


def test_batches_of_any_size_say_the_same():
    module, x = linear(3), points()
    y = said(module, x)
    judge = Certificate(SIGMA, samples=200, selection=50, examples=40)
    whole = judge.evaluate(Subject(module, [(x, y)]))
    assert judge.evaluate(Subject(module, list(zip(x.split(7), y.split(7), strict=True)))) == whole
    assert Certificate(SIGMA, samples=200, selection=50, examples=40, seed=1).evaluate(Subject(module, [(x, y)])) != (
        whole
    )
    assert "first 40 test examples" in whole.figures["certificate/accuracy"].about


def test_what_samples_cannot_prove():
    data = [(torch.tensor([[100.0]]), torch.tensor([1]))]  # every vote is right
    limit = SIGMA * stats.norm.ppf(0.001 ** (1 / 100))
    within = Certificate(SIGMA, radius=0.999 * limit, samples=100, curve=()).evaluate(Subject(nn.Identity(), data))
    beyond = Certificate(SIGMA, radius=1.001 * limit, samples=100, curve=()).evaluate(Subject(nn.Identity(), data))
    assert (value(within), value(beyond)) == (1.0, 0.0)
    assert len(within.notes) == 1
    assert f"no radius above {limit:.4g}" in beyond.notes[1]
    doc = Certificate.__doc__
    for samples, multiple in ((1000, 2.46), (100_000, 3.81)):
        assert f"{stats.norm.ppf(0.001 ** (1 / samples)):.2f}" == str(multiple)
        assert str(multiple) in doc


def test_a_network_that_cannot_decide_abstains():
    class Coin(nn.Module):
        def forward(self, x):
            return x - x.detach() + torch.where((x * 1e6).floor() % 2 == 0, 1.0, -1.0)

    found = Certificate(SIGMA).evaluate(Subject(Coin(), [(torch.zeros(50, 1), torch.ones(50).long())]))
    assert value(found, "abstention") > 0.95
    assert value(found) == 0


def test_outputs_that_are_not_numbers_certify_nothing():
    class Broken(nn.Module):
        def forward(self, x):
            return torch.where(x > 0.3, torch.nan, x)

    x = torch.tensor([[5.0], [-5.0]], dtype=torch.float64)
    found = Certificate(SIGMA).evaluate(Subject(Broken(), [(x, torch.tensor([1, 0]))]))
    assert (value(found), value(found, "smoothed_accuracy"), value(found, "abstention")) == (0.5, 0.5, 0.5)


def test_sigma_comes_from_a_guard_unless_stated():
    noise, subject = GaussianNoise(0.3, 2.0), Subject(nn.Identity(), [(torch.ones(1, 1), torch.ones(1).long())])
    followed = Certificate().with_noise(noise)
    assert (followed.sigma, followed.std) == (0.3, 2.0)
    assert "sigma 0.3" in followed.evaluate(subject).notes[0]
    assert Certificate(0.1).with_noise(noise).sigma == 0.1
    assert Certificate().with_noise(GaussianNoise(0.0)).sigma is None
    nothing = Certificate().evaluate(subject)
    assert nothing == Evidence()


def test_data_that_lacks_what_it_needs_is_a_note():
    for data in ([(torch.ones(2, 1), torch.tensor([0.3, 0.4]))], [torch.ones(2, 1)]):
        found = Certificate(SIGMA).evaluate(Subject(nn.Identity(), data))
        assert not found.figures
        assert "needs classes" in found.notes[0]
    embedding = nn.Sequential(nn.Embedding(4, 2), nn.Flatten())
    found = Certificate(SIGMA).evaluate(Subject(embedding, [(torch.tensor([[1], [2]]), torch.tensor([0, 1]))]))
    assert "floating-point" in found.notes[0]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sigma": 0}, "sigma=0"),
        ({"sigma": -1.0}, "sigma=-1"),
        ({"std": 0.0}, "std="),
        ({"radius": 0.0}, "radius=0"),
        ({"curve": [0.0]}, "curve="),
        ({"samples": 0}, "samples=0"),
        ({"selection": 0}, "selection=0"),
        ({"examples": 0}, "examples=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"alpha": 1.0}, "alpha=1"),
    ],
)
def test_options_that_certify_nothing(options, match):
    with pytest.raises(ValueError, match=match):
        Certificate(**options)


@pytest.mark.parametrize("calls", [None, 1, 3])
@pytest.mark.parametrize("inference", [False, True])
def test_nothing_is_left_behind(inference, calls):
    subject, seen = finished(), 0
    before = trace(subject.module)

    def breaks(module, args):
        nonlocal seen
        seen += 1
        if seen == calls:
            raise KeyboardInterrupt

    handle = subject.module.net.register_forward_pre_hook(breaks)
    judge = Certificate(0.1, samples=40, selection=10, examples=5)
    with torch.inference_mode(inference):
        if calls is None:
            assert judge.evaluate(subject).figures
            assert judge.evaluate(subject) == judge.evaluate(finished())
        else:
            with pytest.raises(KeyboardInterrupt):
                judge.evaluate(subject)
    handle.remove()
    assert trace(subject.module) == before


def test_what_it_says_is_plain():
    found = Certificate(0.1, samples=40, examples=5).evaluate(finished())
    assert all(math.isfinite(figure.value) and figure.about.endswith(".") for figure in found.figures.values())
    assert all(key.startswith("certificate/") for key in (*found.figures, *found.curves, *found.intervals))
    assert all(note.endswith(".") for note in found.notes)
