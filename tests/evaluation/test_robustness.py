"""Accuracy under attack: closed forms, gradient masking, and every attack counted."""

import re

import pytest
import torch
from torch import nn

from lightning_guard.evaluation import Robustness, Subject, siege
from lightning_guard.evaluation import survival as survival_module
from lightning_guard.evaluation.survival import Victim, survives_ascent, survives_noise, without_gradient
from lightning_guard.functional import ThreatModel, pgd
from lightning_guard.functional.attacks.objectives import margin


@pytest.fixture(autouse=True)
def few_queries(monkeypatch):
    monkeypatch.setattr(siege, "QUERIES", 60)
    monkeypatch.setattr(siege, "PROBES", 20)
    monkeypatch.setattr(siege, "DOUBLINGS", 5)


def linear(columns: int, seed: int = 0, features: int = 6) -> nn.Linear:
    torch.manual_seed(seed)
    module = nn.Linear(features, columns).double()
    with torch.no_grad():
        module.bias.copy_(-module.weight.sum(1) / 2)  # the boundaries run through the middle of the points
    return module


def points(n: int = 200, features: int = 6, seed: int = 1) -> torch.Tensor:
    return torch.rand(n, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def data(module: nn.Module, x: torch.Tensor, batch_size: int = 100) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the model says, with some labels wrong."""
    with torch.no_grad():
        logits = module(x.to(next(module.parameters(), x)))
    y = (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)
    y[::7] = (y[::7] + 1) % max(logits.shape[1], 2)
    return list(zip(x.split(batch_size), y.split(batch_size), strict=True))


def standing(module: nn.Linear, batches, eps: float, norm: str, bounds=None) -> float:
    """Accuracy of a linear model under the worst case, in closed form (exact in linf also within bounds)."""
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    weight, bias = module.weight.detach(), module.bias.detach()
    if len(weight) == 1:
        weight, bias = (
            torch.cat([torch.zeros_like(weight), weight]),
            torch.cat([torch.zeros_like(bias), bias]),
        )
    right = torch.ones(len(x), dtype=torch.bool)
    for c in range(len(weight)):
        gap = weight[c] - weight[y]  # (N, D): what class c gains on the right one
        if norm == "linf":
            moved = x + eps * gap.sign()
            moved = moved if bounds is None else moved.clamp(*bounds)
        else:
            moved = x + eps * gap / gap.norm(dim=1, keepdim=True).clamp_min(1e-30)
        right &= ((gap * moved).sum(1) + bias[c] - bias[y] < 0) | (y == c)
    return right.double().mean().item()


def value(evidence, key: str = "accuracy"):
    return evidence.figures[f"robustness/{key}"].value


@pytest.mark.parametrize("columns", [1, 2, 4])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.05), ("l2", 0.1)])
def test_of_a_linear_model_it_is_the_closed_form(columns, norm, eps):
    module = linear(columns)
    batches = data(module, points())
    evidence = Robustness(eps, norm, restarts=2).evaluate(Subject(module, batches))
    wanted = [standing(module, batches, m * eps, norm) for m in (0, 0.25, 0.5, 0.75, 1.0, 1.5)]
    assert wanted[0] > wanted[-1]
    found = evidence.curves["robustness/accuracy"]
    assert found.x[:6] == pytest.approx([0, 0.25 * eps, 0.5 * eps, 0.75 * eps, eps, 1.5 * eps])
    # With more than two classes uphill on the margin may take the wrong hill; PGD is an upper bound.
    assert found.y[:6] == pytest.approx(wanted, abs=1e-12 if columns < 3 else 0.01)
    assert all(f >= w - 1e-12 for f, w in zip(found.y[:6], wanted, strict=True))
    assert found.y[-1] <= 0.01  # down to nothing
    assert value(evidence) == found.y[4]
    assert value(evidence, "clean_accuracy") == found.y[0] == wanted[0]
    assert evidence.notes == [evidence.notes[0]]  # the interval; no doubts
    low, high = evidence.intervals["robustness/accuracy"]
    assert low < value(evidence) < high


def test_bounds_protect():
    module = linear(1)
    batches = data(module, points())
    for bounds in (None, (0.0, 1.0)):
        found = Robustness(0.3, bounds=bounds, curve=()).evaluate(Subject(module, batches))
        assert value(found) == pytest.approx(standing(module, batches, 0.3, "linf", bounds))
    wrong = Robustness(0.3, bounds=(0.2, 0.8)).evaluate(Subject(module, batches))
    assert not wrong.figures  # after a training nothing may raise
    assert re.search(r"range over .* outside bounds=\(0.2, 0.8\)", wrong.notes[0])


def test_eps_is_in_units_before_normalisation():
    raw, module = points(), linear(1)
    batches = data(module, raw)
    mean, std = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.5, 1.0, 2.0, 0.1, 0.3, 0.7]
    seen = [((x - torch.tensor(mean)) / torch.tensor(std), y) for x, y in batches]
    twin = linear(1)
    with torch.no_grad():  # the same function of the raw values
        twin.weight.mul_(torch.tensor(std))
        twin.bias.add_((module.weight * torch.tensor(mean)).sum())
    one = Robustness(0.04, curve=(), bounds=(0.0, 1.0)).evaluate(Subject(module, batches))
    two = Robustness(0.04, curve=(), bounds=(0.0, 1.0), mean=mean, std=std).evaluate(Subject(twin, seen))
    assert value(one) == pytest.approx(value(two))
    assert value(one) < value(one, "clean_accuracy")


def test_immutable_features_stay():
    module, x = nn.Identity(), torch.tensor([[0.1, -5.0], [-0.1, -5.0]])
    module = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 1e-9]]))
    batches = [(x, torch.tensor([1, 0]))]
    assert value(Robustness(1.0, mutable=[1]).evaluate(Subject(module, batches))) == 1.0
    assert value(Robustness(1.0, mutable=[0]).evaluate(Subject(module, batches))) == 0.0


def small_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 4))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_is_at_most_what_pgd_by_hand_leaves(norm):
    module, x = small_net(), points().float()
    batches = data(module, x)
    y = torch.cat([y for _, y in batches])
    evidence = Robustness(0.1, norm, steps=10, restarts=1).evaluate(Subject(module, batches))
    moved = pgd(lambda x: nn.functional.cross_entropy(module(x), y, reduction="none"), x, ThreatModel(0.1, norm), 10)
    under_pgd = (module(moved).argmax(1) == y).float().mean().item()
    assert value(evidence) <= under_pgd + 0.01
    assert value(evidence) >= under_pgd - 0.05
    curve = evidence.curves["robustness/accuracy"].y
    assert curve == sorted(curve, reverse=True)
    more = Robustness(0.1, norm, steps=10, restarts=4).evaluate(Subject(module, batches))
    assert value(more) <= value(evidence)


def test_the_radius_of_the_figure_does_not_depend_on_the_curve():
    subject = Subject(small_net(), data(small_net(), points().float()))
    figures = [Robustness(0.1, steps=5, curve=curve).evaluate(subject).figures for curve in ((), (0.5,), (2.0, 0.1))]
    assert figures[0] == figures[1] == figures[2]


def test_a_large_radius_leaves_nothing():
    subject = Subject(small_net(), data(small_net(), points().float()))
    evidence = Robustness(0.1, curve=(100.0,)).evaluate(subject)
    assert evidence.curves["robustness/accuracy"].y[-1] == 0.0


@pytest.mark.parametrize("batch_size", [64, 37])
def test_only_the_first_examples_are_attacked(batch_size):
    module = linear(1)
    batches = data(module, points(), batch_size)
    seen = []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    subject = Subject(module, batches)
    _ = subject.outputs
    seen.clear()
    evidence = Robustness(1e-9, examples=100, curve=(), steps=1).evaluate(subject)
    first = torch.cat([x for x, _ in batches])[:100]
    distance = torch.cdist(torch.cat(seen).detach(), first)
    assert distance.amin(1).max() < 1e-7  # nothing else was looked at
    assert distance.amin(0).max() < 1e-7  # and all of these were
    y = torch.cat([y for _, y in batches])[:100]
    assert value(evidence, "clean_accuracy") == ((module(first)[:, 0] > 0) == y).double().mean()
    everything = Robustness(1e-9, examples=10**6, curve=(), steps=1).evaluate(subject)
    assert "first 200 test examples" in everything.figures["robustness/accuracy"].about


def test_those_that_fell_are_not_attacked_again():
    module = linear(1)
    batches = data(module, points(64))
    rows = []
    module.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    subject = Subject(module, batches)
    left = round(64 * standing(module, batches, 0.05, "linf"))
    assert 0 < left < sum((y == (module(x)[:, 0] > 0)).sum() for x, y in batches)
    _ = subject.outputs
    rows.clear()
    Robustness(0.05, steps=5, restarts=1, curve=()).evaluate(subject)
    assert max(rows) == 64
    assert rows[-1] == 64  # for other models, all are attacked once more
    assert max(rows[-30:-10]) == left  # the last attacks on those that count


class Quantised(nn.Module):
    """Rounds its inputs to four levels, so that its input gradients are zero."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module((x * 3).round() / 3)


def flags(evidence) -> set[str]:
    words = {
        "masked gradients": "zero",
        "does not fall": "flat",
        "Random noise": "noise",
        "so large are the logits": "saturated",
        "More steps": "steps",
        "differently each time": "random",
        "probabilities": "probabilities",
        "Square, which": "square",
    }
    doubts = evidence.doubts.get("robustness/accuracy", [])
    assert all(any(doubt in note for note in evidence.notes) for doubt in doubts)
    return {flag for word, flag in words.items() if any(word in doubt for doubt in doubts)}


def test_masked_gradients_are_told():
    module, x = Quantised(linear(1)), points()
    batches = data(module, x)
    masked = Robustness(0.1, bounds=(0.0, 1.0)).evaluate(Subject(module, batches))
    assert "zero" in flags(masked)
    assert "the input gradient is zero" in " ".join(masked.notes).lower()
    honest = Robustness(0.1, bounds=(0.0, 1.0)).evaluate(Subject(module.module, data(module.module, x)))
    assert flags(honest) == set()
    assert "BPDA" in " ".join(masked.doubts["robustness/accuracy"])
    assert value(masked) < value(masked, "clean_accuracy")


def test_gradients_are_looked_for_where_the_attacker_may_go():
    class Half(nn.Module):
        def forward(self, x):
            return x[:, :1].round() + x[:, 1:]

    batches = [(torch.tensor([[1.0, 0.2]]), torch.tensor([1]))]
    for column, found in ((0, {"zero"}), (1, set())):
        evidence = Robustness(0.1, mutable=[column]).evaluate(Subject(Half(), batches))
        assert flags(evidence) == found


def test_a_curve_that_does_not_fall_is_told():
    batches = [(torch.tensor([[0.2], [0.8]]), torch.tensor([0, 1]))]

    class Step(nn.Module):
        def forward(self, x):
            return (x > 0.5).float() * 2 - 1  # no gradient at all

    evidence = Robustness(0.01).evaluate(Subject(Step(), batches))
    assert value(evidence) == 1.0
    assert flags(evidence) == {"zero", "flat"}
    one_radius = Robustness(0.01, curve=()).evaluate(Subject(Step(), batches))
    assert flags(one_radius) == {"zero"}


def test_noise_that_beats_the_gradient_is_told():
    """A ripple hides the way: gradients point to its next crest, and half of all random points are wrong."""

    class Ripple(nn.Module):
        def forward(self, x):
            return 1e-3 * x[:, :1] + (x[:, 1:].sum(1, keepdim=True) * 1e4).sin().detach() - 0.3

    x = torch.zeros(200, 5)
    x[:, 1:] = torch.pi / 2 / 1e4 / 4  # on a crest
    evidence = Robustness(0.01, steps=2, restarts=0).evaluate(Subject(Ripple(), [(x, torch.ones(200).long())]))
    assert value(evidence, "clean_accuracy") == 1.0
    assert "noise" in flags(evidence)
    assert value(evidence) < 0.05


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_confidence_does_not_hide_the_way(scale):
    """Cross-entropy of a model this sure has a gradient of exactly zero in float32; the margin has not."""
    module = linear(3).float()
    batches = data(module, points().float())
    with torch.no_grad():
        module.weight.mul_(scale)
        module.bias.mul_(scale)
    evidence = Robustness(0.05, restarts=1).evaluate(Subject(module, batches))
    assert value(evidence) == pytest.approx(standing(module.double(), batches, 0.05, "linf"), abs=0.01)
    assert flags(evidence) == (set() if scale == 1 else {"saturated"})


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_gradients_that_are_no_numbers_count_as_none(norm):
    class Broken(nn.Module):
        def forward(self, x):
            # The slope of the root at 0 is infinite.
            return x[:, :1].detach() + 0 * (x - x.detach()).sqrt().sum(1, keepdim=True)

    batches = [(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([1, 1]))]
    evidence = Robustness(0.1, norm).evaluate(Subject(Broken(), batches))
    assert value(evidence) == 1.0
    assert "zero" in flags(evidence)


@pytest.mark.parametrize("wrong", ["detached", "constant", "parameters only"])
def test_models_without_any_way_to_their_input_are_no_error(wrong):
    class Deaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(1, 1))

        def forward(self, x):
            if wrong == "detached":
                return x.detach()
            return (self.bias if wrong == "parameters only" else torch.zeros(1, 1)).expand(len(x), 1)

    batches = [(torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 0]))]
    assert "zero" in flags(Robustness(0.1).evaluate(Subject(Deaf(), batches)))


def test_without_a_threat_there_is_a_note():
    evidence = Robustness().evaluate(Subject(nn.Identity(), [(torch.zeros(2), torch.zeros(2))]))
    assert not evidence.figures
    assert "eps is not stated" in evidence.notes[0]


@pytest.mark.parametrize(
    "batch",
    [
        (torch.zeros(4, 1), torch.tensor([0.1, 0.2, 0.3, 0.4])),  # a regression
        (torch.zeros(4, 1),),  # no target
        ([torch.zeros(4, 1), torch.zeros(4, 1)], torch.zeros(4)),  # two inputs
        (torch.zeros(4, 1, dtype=torch.int64), torch.zeros(4)),  # tokens
    ],
)
def test_what_cannot_be_attacked_is_a_note(batch):
    class Net(nn.Module):
        def forward(self, x):
            return (x[0] if isinstance(x, list) else x).float()

    evidence = Robustness(0.1).evaluate(Subject(Net(), [batch]))
    assert not evidence.figures
    assert len(evidence.notes) == 1


def test_the_threat_of_a_guard_is_taken_unless_stated():
    threat = ThreatModel(0.2, "l2", (0.0, 1.0), 0.5, [0.25], [0])
    open_threat = Robustness(steps=3)
    taken = open_threat.with_threat(threat)
    assert open_threat.eps is None  # no change in place
    assert vars(taken) == vars(Robustness(0.2, "l2", "pgd", 3, 1, (0.0, 1.0), 0.5, (0.25,), (0,)))
    stated = Robustness(0.1)
    assert stated.with_threat(threat) is stated
    none = Robustness()
    assert none.with_threat(ThreatModel(0.0)) is none  # a guard that is switched off


def test_an_attack_that_leaves_its_threat_model_is_an_error(monkeypatch):
    monkeypatch.setattr(survival_module, "pgd", lambda loss, x, *args, **kwargs: x + 1.0)
    with pytest.raises(RuntimeError, match="outside ThreatModel"):
        Robustness(0.1).evaluate(Subject(nn.Identity(), [(torch.tensor([[1.0]]), torch.tensor([1]))]))


@pytest.mark.parametrize("low", [0.0, -1000.0])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_rounding_is_not_taken_for_leaving(norm, low):
    x = low + 2000 * torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    mean, std = [3.0, 200.0, -7.0], [0.01, 5.0, 300.0]
    seen = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    batches = [(seen, net(seen).argmax(1))]
    judge = Robustness(1e-3, norm, bounds=(low, low + 2000.0), mean=mean, std=std, curve=(), steps=5)
    assert judge.evaluate(Subject(net, batches)).figures


def test_every_point_on_the_way_counts():
    """The model is wrong in a narrow band that a long step jumps over and back."""

    class Band(nn.Module):
        def forward(self, x):
            return torch.where((x - 0.15).abs() < 0.05, -1.0, 1.0) - x + 2 * x.detach()

    x, y, threat = torch.tensor([[0.0]]), torch.tensor([1]), ThreatModel(1.0)
    victim = Victim(Subject(Band(), [(x, y)]))
    assert survives_ascent(victim, x, y, ThreatModel(0.05), 3).right.tolist() == [True]
    fallen = survives_ascent(victim, x, y, threat, 19)  # visits 0.13
    assert fallen.right.tolist() == [False]
    assert Band()(fallen.moved) < 0  # and says where
    last = pgd(lambda x: margin(Band()(x)[:, 0], y), x, threat, 19, random_start=False)
    assert Band()(last) > 0
    assert survives_noise(victim, x, y, ThreatModel(0.01), torch.Generator()).right.tolist() == [True]
    assert without_gradient(victim, x, y, threat).tolist() == [False]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"eps": 0.0}, "eps=0"),
        ({"eps": -1.0}, "eps="),
        ({"eps": 1.0, "norm": "l7"}, "norm='l7'"),
        ({"eps": 1.0, "attack": "fgsm"}, "attack='fgsm'"),
        ({"eps": 1.0, "attack": "autoattack"}, "needs the bounds"),
        ({"eps": 1.0, "attack": "autoattack", "bounds": (0.0, 1.0), "mutable": [0]}, "mutable=.* take attack='apgd'"),
        ({"eps": 1.0, "attack": "autoattack", "bounds": (0.0, [1.0, 2.0])}, "same finite bounds"),
        ({"steps": 0}, "steps=0"),
        ({"restarts": -1}, "restarts=-1"),
        ({"examples": 0}, "examples=0"),
        ({"curve": (0.5, 0.0)}, "curve="),
        ({"eps": 1.0, "bounds": (1.0, 0.0)}, "bounds="),
    ],
)
def test_what_makes_no_attack_is_refused_by_name(options, named):
    with pytest.raises(ValueError, match=named):
        Robustness(**options)


def test_rows_of_a_table_are_judged_where_they_are_valid():
    """Columns: a whole number 0 to 9, a number in [0, 1], a category of three; the oracle tries every valid row."""
    generator = torch.Generator().manual_seed(3)
    n = 60
    category = torch.randint(3, (n,), generator=generator)
    x = torch.cat(
        [
            torch.randint(10, (n, 1), generator=generator).double(),
            torch.rand(n, 1, generator=generator, dtype=torch.float64),
            nn.functional.one_hot(category, 3).double(),
        ],
        dim=1,
    )
    module = linear(3, features=5)
    threat = {"unit": [2.0, 0.2, 1.0, 1.0, 1.0], "integer": [0], "increasing": [0], "one_hot": [[2, 3, 4]]}
    batches = data(module, x - x.mean(0))
    batches = [(x, torch.cat([y for _, y in batches]))]
    bounds = [[0.0, 0.0, 0.0, 0.0, 0.0], [9.0, 1.0, 1.0, 1.0, 1.0]]
    right, y = torch.ones(n, dtype=torch.bool), batches[0][1]
    for older in (0, 1, 2):
        for change in torch.linspace(-0.2, 0.2, 41, dtype=torch.float64):  # linear, so an end of it is the worst
            for kind in range(3):
                moved = x.clone()
                moved[:, 0] = torch.minimum(x[:, 0] + older, torch.full_like(x[:, 0], 9).maximum(x[:, 0]))
                moved[:, 1] = (x[:, 1] + change).clamp(0, 1)
                moved[:, 2:] = nn.functional.one_hot(torch.tensor(kind), 3).double()
                with torch.no_grad():
                    right &= module(moved).argmax(1) == y
    found = Robustness(1.0, bounds=bounds, curve=(), examples=n, **threat).evaluate(Subject(module, batches))
    assert 0 < int(right.sum()) < int((module(x).argmax(1) == y).sum())
    assert found.figures["robustness/accuracy"].value == pytest.approx(float(right.double().mean()))
