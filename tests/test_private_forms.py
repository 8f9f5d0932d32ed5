"""The sound form of each guard beside DP-SGD: no example moves what is released by more than the plan pays for, and
nothing but what is released decides about weights and states."""

import copy
from contextlib import contextmanager
from functools import cache
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import onnx
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from onnx import numpy_helper
from pytorch_lightning.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_guard.callbacks import (
    DPSGD,
    AdversarialTraining,
    FairnessRegularization,
    FeatureSqueezing,
    KnowledgeDistillation,
    LowRankFactorization,
    MagnitudePruning,
    QuantizationAwareTraining,
    RandomizedSmoothing,
    WeightClustering,
)
from lightning_guard.export import export
from lightning_guard.functional import cubic_sparsity, score_masks
from lightning_guard.functional.fairness import Census
from lightning_guard.functional.privacy import Draws, Findings, Noise, NoisySum, Queries
from lightning_guard.functional.privacy import queries as queries_module
from lightning_guard.functional.privacy.records import Masked
from lightning_guard.functional.quantization import fake_quantized
from lightning_guard.guard import Guard, GuardConflict
from lightning_guard.mixins import GuardMixin
from lightning_guard.parity import GroupDRO, Seen
from lightning_guard.private import PrivateSums
from tests.toys import CLASSES, ROWS, PlainNet, Rows, fit, loader, rows, same, trainer

STEPS, BOUND = 8, 0.5  # of one draw of all rows; max_grad_norm


class Quiet(GuardMixin, PlainNet):
    """Neither batch statistics nor dropout, which draws from the global generator."""

    def guard_counterfactual(self, inputs):
        return torch.cat([1 - inputs[:, :1], inputs[:, 1:]], 1)

    def __init__(self, **kwargs):
        super().__init__(**{"norm": False, **kwargs})
        self.net[-2].p = 0.0


def private(**options):
    return DPSGD(**{"delta": 1e-3, "noise_multiplier": 0.2, "max_grad_norm": BOUND, "test_seed": 3, **options})


def pruning(**options):
    return MagnitudePruning(**{"sparsity": 0.7, "every": 1, "end": 0.9, **options})


def quantization(**options):
    return QuantizationAwareTraining(**{"start": 0.1, "end": 0.9, **options})


def fair(**options):
    return FairnessRegularization(**{"groups": [2], "count_noise": 0.5, **options})


def bound(**options):
    settings = {"max_gap": 0.01, "min_support": 1, "margin": 0.0, "warmup": 0, "step_size": 20.0, "select": False}
    return fair(rate_noise=0.6, **settings, **options)


def attack(**options):
    return AdversarialTraining(eps=0.1, steps=2, bounds=(0.0, 1.0), seed=1, **options)


def averaging(**options):
    return StochasticWeightAveraging(**{"swa_lrs": 0.02, "swa_epoch_start": 3, "annealing_epochs": 2, **options})


_kept = TemporaryDirectory()


@cache
def taught():
    """A checkpoint that DP-SGD has trained on the same data."""
    kept = pl.callbacks.ModelCheckpoint(_kept.name, filename="teacher")
    fit([private(noise_multiplier=1.0), kept], Quiet, data(), enable_checkpointing=True, seed=4)
    return f"{_kept.name}/teacher.ckpt"


FORMS = {
    "nothing": list,
    "magnitude": lambda: [pruning()],
    "gradient scores": lambda: [pruning(score="gradient")],
    "movement scores": lambda: [pruning(score="movement")],
    "regrowing": lambda: [pruning(regrow=0.3)],
    "rewinding": lambda: [pruning(rewind=0)],
    "weights quantised": lambda: [quantization(activation_bits=None)],
    "fixed ranges": lambda: [quantization(ranges=(-4.0, 4.0))],
    "noisy ranges": lambda: [quantization(range_noise=0.25)],
    "parity": lambda: [bound()],
    "equal odds": lambda: [bound(notion="equalized_odds")],
    "reweighing": lambda: [fair(mode="reweigh")],
    "worst group": lambda: [fair(mode="group_dro", step_size=0.5, rate_noise=0.6)],
    "clustering": lambda: [WeightClustering(clusters=4, start=0.25, end=0.75, every=2)],
    "average of epochs": lambda: [averaging()],
    "moving average": lambda: [EMAWeightAveraging(decay=0.5)],
    "low rank": lambda: [LowRankFactorization(rank=2)],
    "own copy": lambda: [KnowledgeDistillation(start=0.25)],
    "private teacher": lambda: [KnowledgeDistillation(taught(), features=["net.0"])],
    "attacks": lambda: [attack()],
    "trades": lambda: [attack(objective="trades")],
    "mart": lambda: [attack(objective="mart")],
    "mixed": lambda: [attack(objective="mixed")],
    "counterfactuals": lambda: [FairnessRegularization(mode="counterfactual", weight=5.0)],
    "squeezing": lambda: [FeatureSqueezing(bits=2)],
    "smoothing": lambda: [RandomizedSmoothing(sigma=0.1)],
    "pruned and quantised": lambda: [pruning(), quantization(range_noise=0.25)],
    "all": lambda: [
        attack(),
        bound(),
        pruning(score="movement"),
        quantization(range_noise=0.5),
        KnowledgeDistillation(start=0.25),
    ],
}
FIRST = (
    "magnitude", "movement scores", "noisy ranges", "parity", "reweighing", "worst group", "trades", "counterfactuals",
    "pruned and quantised", "average of epochs", "all",
)  # fmt: skip
every_form = pytest.mark.parametrize(
    "form", [form if form in FIRST else pytest.param(form, marks=pytest.mark.slow) for form in FORMS]
)


def data(change=None):
    """All rows in one draw; with a change, ``(index, x, y, group)`` of some of them are others."""
    found = Rows()
    if change is not None:
        x, y, group = (part.clone() for part in found.data)
        at = torch.as_tensor(change)
        x[at], y[at], group[at] = 1 - x[at], (y[at] + 1) % CLASSES, 1 - group[at]
        found.data = x, y, group
    return DataLoader(found, ROWS)


# What one example can move -------------------------------------------------------------------------------------------


class Enough(Exception):
    """One step is all that is looked at."""


class Stop(pl.Callback):
    def on_train_batch_end(self, *args):
        raise Enough


@contextmanager
def listening():
    """All that is released from here on, without its noise and in units of the largest contribution of an example."""
    heard = {}
    end, opened, once = NoisySum.end, Queries.open, PrivateSums.once

    def ending(self, reached=None):
        end(self, reached)
        heard.setdefault("gradient", torch.cat([p.grad.flatten() for p in self.parameters]).double() * ROWS / BOUND)

    def opening(self, name, size, noise, take):
        opened(self, name, size, noise, lambda sums: (heard.setdefault(name, sums.clone()), take(sums)))

    def counting(self, name, rows):
        return heard.setdefault(name, once(self, name, rows))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Noise, "fill_", lambda self, out, std: out.zero_())
        patch.setattr(NoisySum, "end", ending)
        patch.setattr(Queries, "open", opening)
        patch.setattr(PrivateSums, "once", counting)
        yield heard


def released(guards, change, path):
    """What one step releases, begun anew or where a checkpoint left it."""
    pl.seed_everything(0, verbose=False)
    with listening() as heard, pytest.raises(Enough):
        trainer([*guards, private(), Stop()], max_epochs=STEPS).fit(Quiet(), data(change), ckpt_path=path)
    return heard


def halfway(guards, folder):
    """A checkpoint in the middle of all schedules."""
    kept = pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit([*guards, private(), kept], Quiet, data(), max_epochs=STEPS, enable_checkpointing=True)
    return folder / "epoch=4.ckpt"


def moved(form, path, make=FORMS):
    """By how much replacing one example moves each release, at most over a few examples."""
    base = released(make[form](), None, path)
    found = dict.fromkeys(base, 0.0)
    for row in (0, 42):
        other = released(make[form](), [row], path)
        assert other.keys() == base.keys()
        for name, value in base.items():
            found[name] = max(found[name], float((other[name] - value).norm()))
    return found


@every_form
def test_no_example_moves_a_release_by_more_than_is_paid_for(form, tmp_path):
    asked = {query.name: query for guard in FORMS[form]() if isinstance(guard, Guard) for query in guard.queries()}
    paths = [None] if form == "low rank" else [halfway(FORMS[form](), tmp_path)]  # a plain class does not load it
    if any(query.once for query in asked.values()):
        paths.append(None)
    for path in paths:
        found = moved(form, path)
        assert found.keys() == {"gradient"} | {n for n, query in asked.items() if path is None or not query.once}
        assert found["gradient"] > 0.1
        assert max(found.values()) <= 2 * (1 + 1e-4)  # one out, one in


@pytest.mark.parametrize("form", ["magnitude", "noisy ranges", "parity", "worst group"])
def test_without_the_bound_it_would_be_seen(form, tmp_path, monkeypatch):
    make = {**FORMS, "magnitude": lambda: [pruning(sparsity=0.3)]}
    monkeypatch.setattr(f"{__name__}.BOUND", 0.05)  # all are clipped
    path = halfway(make[form](), tmp_path)
    monkeypatch.setattr(Findings, "check", lambda self, reduction: None)
    if form == "magnitude":  # weights that are pruned in part enter the sum and not the norm
        monkeypatch.setattr(Masked, "squares", lambda self: torch.zeros(self.units))
    else:
        own = queries_module.contributions
        monkeypatch.setattr(queries_module, "contributions", lambda *args: 5 * own(*args))
    assert max(moved(form, path, make).values()) > 2.01


def test_a_loss_that_couples_examples_would_be_seen(tmp_path, monkeypatch):
    make = {"coupled": lambda: [fair(mode="group_dro", step_size=50.0, rate_noise=0.6)]}
    path = halfway(make["coupled"](), tmp_path)
    monkeypatch.setattr(FairnessRegularization, "_made", lambda self: GroupDRO(50.0))
    with pytest.raises(GuardConflict, match="changed by"):
        fit([*make["coupled"](), private()], Quiet, data(), max_epochs=2)
    assert path.exists()


# What decides ---------------------------------------------------------------------------------------------------------


def outcome(form, change, blinded, make=FORMS):
    """Weights and the states of all guards after a training, as text."""
    guards = [*make[form](), private()]
    states = []

    class Looking(pl.Callback):
        def on_train_end(self, trainer, module):
            states.append(str([guard.state() for guard in guards if isinstance(guard, Guard)]))

    with pytest.MonkeyPatch.context() as patch:
        if blinded:

            def ending(self, reached=None):
                own = torch.Generator().manual_seed(len(self.handed))
                for part in self.parts.values():
                    part.copy_(0.3 * torch.randn(part.shape, generator=own))
                end(self, reached)

            end = NoisySum.end
            patch.setattr(NoisySum, "end", ending)
            patch.setattr(
                Queries, "release", lambda self: [take(torch.full_like(n, 7.0)) for n, _, take in self._open.values()]
            )
            patch.setattr(PrivateSums, "once", lambda self, name, rows: torch.full((12,), 5.0, dtype=torch.float64))
        net = fit([*guards, Looking()], Quiet, data(change), max_epochs=STEPS)
    return states[0] + str({name: value.tolist() for name, value in net.state_dict().items()})


@every_form
def test_nothing_but_what_is_released_decides(form):
    everybody = list(range(ROWS))
    assert outcome(form, None, blinded=True) == outcome(form, everybody, blinded=True)
    assert outcome(form, None, blinded=False) != outcome(form, everybody, blinded=False)


def test_what_is_remembered_otherwise_would_be_seen(monkeypatch):
    monkeypatch.setattr(QuantizationAwareTraining, "queries", lambda self: [])  # ranges are observed then
    make = {"observed": lambda: [quantization()]}
    everybody = list(range(ROWS))
    assert outcome("observed", None, True, make) != outcome("observed", everybody, True, make)


# Pruning --------------------------------------------------------------------------------------------------------------


def by_hand(net, steps, end, sparsity, expected=16, bound=0.3, sigma=0.5):
    """Algorithm 1 of Abadi et al. on the kept weights alone, one example after another."""
    x, y, _ = rows()
    weights = {name: p for name, p in net.named_parameters() if p.dim() == 2}
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in weights.items()}
    draws = Draws(ROWS, expected / ROWS, 4, secret=3, turn=lambda: done // 4)
    noise, optimizer, done = Noise(3), net.configure_optimizers(), 0
    while done < steps:
        for batch in draws:
            deal = draws.next_deal()
            kept = [masks[name].double() if name in masks else torch.ones_like(p) for name, p in net.named_parameters()]
            totals = [torch.zeros_like(p) for p in net.parameters()]
            for i in batch if deal.units else []:
                loss = F.cross_entropy(net(x[i][None].double()), y[i][None])
                grads = [g * m for g, m in zip(torch.autograd.grad(loss, net.parameters()), kept, strict=True)]
                norm = float(torch.cat([g.flatten() for g in grads]).norm())
                for total, g in zip(totals, grads, strict=True):
                    total += min(1.0, bound / norm) * g
            noise.at(done)
            flat = torch.empty(sum(p.numel() for p in net.parameters()), dtype=torch.float64)
            parts = noise.fill_(flat, sigma * bound / expected).split([p.numel() for p in net.parameters()])
            for p, total, z, mask in zip(net.parameters(), totals, parts, kept, strict=True):
                p.grad = total / expected + z.view_as(p) * mask
            optimizer.step()
            done += 1
            if done <= end:
                magnitudes = {name: p.detach().abs() for name, p in weights.items()}
                masks = score_masks(magnitudes, cubic_sparsity(done / end, sparsity), "global", masks, 0.02)
            with torch.no_grad():
                for name, p in weights.items():
                    p.mul_(masks[name])
    return net


class Double(Quiet):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.double()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0].double()), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_pruned_it_is_the_algorithm_on_what_is_kept():
    pl.seed_everything(0, verbose=False)
    wanted = by_hand(Double(), 12, end=9, sparsity=0.8)
    dp = private(noise_multiplier=0.5, max_grad_norm=0.3)
    guards = [dp, pruning(sparsity=0.8, end=9, min_keep=0.02)]
    got = fit(guards, Double, loader(batch_size=16), precision="64-true", max_epochs=3)
    for a, b in zip(got.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_until_something_is_pruned_dp_sgd_is_as_it_was():
    class Copying(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            if trainer.global_step == 6:
                self.copied = copy.deepcopy(module.state_dict())

    plain, beside = Copying(), Copying()
    fit([private(), plain], Quiet)
    fit([private(), pruning(start=6, end=8), beside], Quiet)
    assert all(torch.equal(plain.copied[key], beside.copied[key]) for key in plain.copied)
    assert same(fit([private()], Quiet), fit([private(), pruning(sparsity=0.0)], Quiet))


def test_pruned_weights_use_no_norm_and_get_no_noise():
    class Looking(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_before_optimizer_step(self, trainer, module, optimizer):
            self.seen += [bool(p.grad[p == 0].any()) for p in module.parameters() if p.dim() == 2 and (p == 0).any()]

    looking, regrowing = Looking(), Looking()
    fit([private(), pruning(), looking], Quiet)
    assert looking.seen
    assert not any(looking.seen)
    fit([private(), pruning(regrow=0.3), regrowing], Quiet)
    assert any(regrowing.seen)  # or nothing could say what to grow anew


def test_raw_gradients_that_are_refused_enter_no_score():
    guard = pruning(score="gradient")

    class ByHand(Quiet):
        def on_after_backward(self):
            if self.global_step == 2:
                self.net[0].weight.grad = torch.full_like(self.net[0].weight, 1e6)

    with pytest.raises(GuardConflict, match="without clipping and noise"):
        fit([guard, private()], ByHand)
    assert all(float(score.abs().max()) < 1e3 for score in guard.state()["scores"].values())


# Groups ---------------------------------------------------------------------------------------------------------------


def unequal(n=4000):
    """A group of 15 % whose label follows another rule than that of the others."""
    generator = torch.Generator().manual_seed(5)
    group = (torch.rand(n, generator=generator) < 0.15).long()
    x = torch.randn(n, 4, generator=generator)
    y = (torch.where(group == 1, x[:, 1], x[:, 0]) > 0).long()
    return TensorDataset(torch.cat([x, group[:, None].float()], 1), y, group)


class Line(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


def worst(net):
    x, y, group = unequal().tensors
    with torch.no_grad():
        losses = F.cross_entropy(net(x), y, reduction="none")
    return float(losses[group == 1].mean())


def test_the_worst_group_is_found_through_the_noise():
    def trained(*guards):
        dp = DPSGD(delta=1e-5, noise_multiplier=0.8, test_seed=1)
        net = fit([dp, *guards], Line, DataLoader(unequal(), 200), max_epochs=8)
        return worst(net), dp

    alone, plain = trained()
    guard = FairnessRegularization(mode="group_dro", groups=[2], step_size=0.1)
    guarded, dp = trained(guard)
    assert guarded < 0.9 * alone
    assert (dp.plan.query_noise, dp.plan.once_noise) == (8.0, 50.0)
    assert dp.plan.epsilon() > plain.plan.epsilon()
    weights = guard.state()["mode"]["weights"]
    assert float(weights[1]) > 0.6
    assert not [leak for leak in dp.notes() if "guard/fairness" in leak]


def test_without_noise_the_price_is_the_weight_over_the_share():
    census = Census()
    group = torch.tensor([0, 0, 0, 1] * 10)
    census.add(group, None)
    census.close()
    asked = {}

    class Answers:
        batch_size, units = 20, 40

        def open(self, name, size, take):
            asked["take"] = take

        def add(self, name, rows):
            asked["rows"] = rows

    losses = torch.rand(20, generator=torch.Generator().manual_seed(0)).mul(4).requires_grad_()
    members = census.members(group[:20])
    step = SimpleNamespace(run=SimpleNamespace(private=Answers()), rehearsal=False, losses=lambda *_: losses)
    mode = GroupDRO(step_size=0.5, query="losses", bound=2.0)
    mode.begin(nn.Linear(1, 1), census)
    term = mode.term(Seen(step, census, torch.zeros(20, 2), group[:20], members, torch.zeros(0)))
    total = term + losses.mean()
    wanted = sum(0.5 * losses[group[:20] == g].sum() / (0.75 if g == 0 else 0.25) for g in (0, 1)) / 20
    torch.testing.assert_close(total, wanted)
    assert float(asked["rows"].norm(dim=1).max()) <= 1
    asked["take"](asked["rows"].double().sum(0))
    clipped = [float(losses[group[:20] == g].clamp(max=2).mean()) for g in (0, 1)]
    torch.testing.assert_close(mode.weights, torch.softmax(torch.tensor(clipped).double() * 0.5, 0), rtol=1e-5, atol=0)


# Ranges ---------------------------------------------------------------------------------------------------------------


def test_ranges_are_told_by_noisy_counts_and_paid_for(tmp_path):
    kept = pl.callbacks.ModelCheckpoint(tmp_path, filename="last")
    guard, dp = quantization(), DPSGD(delta=1e-5, noise_multiplier=0.8, test_seed=1)
    net = fit([dp, guard, kept], Line, DataLoader(unequal(), 200), max_epochs=4, enable_checkpointing=True)
    assert dp.plan.query_noise == 8.0
    assert dp.plan.query_cost > 0
    assert any("queries" in line for line in dp.header().splitlines())
    assert "noisy counts" in guard.notes()[0]
    x = unequal().tensors[0]
    (low, high), (below, above) = guard.activation_ranges["layer.0"], guard.activation_ranges["layer.2"]
    inside = ((x >= low) & (x <= high)).all(1)
    assert float(inside.float().mean()) > 0.85
    assert (below, above) == (-1.0, 1.0)  # of tanh
    stored = torch.load(next(tmp_path.glob("*.ckpt")), weights_only=True)["lightning_guard"]["guards"]["quantization"]
    assert torch.equal(stored["ranges"]["layer.2"], torch.tensor([-1.0, 1.0]))
    with fake_quantized(net, guard.activation_ranges, bits=None), torch.no_grad():
        rounded = net(x)
    assert float((rounded.argmax(1) == net(x).argmax(1)).float().mean()) > 0.95


def test_a_file_in_int8_has_the_noisy_ranges_and_reads_those_of_outputs_alone_off_the_rows_it_is_given(tmp_path):
    guard, dp = quantization(range_noise=5.0), DPSGD(delta=1e-5, noise_multiplier=0.8, test_seed=1)
    net = fit([dp, guard], Line, DataLoader(unequal(), 200), max_epochs=4)
    ranges, (x, y, group) = guard.activation_ranges, unequal().tensors
    done = export(net, tmp_path / "net.onnx", DataLoader(unequal(), 200), "onnx-int8", ranges=ranges)
    file = done.load()
    with fake_quantized(net, ranges, bits=None), torch.no_grad():
        rounded = net(x)  # inputs are rounded to these ranges; weights are since training ended
    with torch.no_grad():
        plain = net(x)
    assert done.agreement.flips < 0.01
    for logits in (rounded, plain):
        assert float((file(x).argmax(1) == logits.argmax(1)).float().mean()) > 0.99
    assert done.agreement.file_accuracy > float(y.bincount().max()) / len(y) + 0.1
    part = DataLoader(TensorDataset(x[:600], y[:600], group[:600]), 200)  # other rows to read ranges from
    options = {"format": "onnx-int8", "tolerance": 0.05}
    stated = ranges | {"linear": (-10.0, 10.0), "logits": (-10.0, 10.0)}  # of outputs, which no query has told

    def numbers(name, rows, ranges):
        made = export(net, tmp_path / name, rows, ranges=ranges, **options)
        return {one.name: numpy_helper.to_array(one).tolist() for one in onnx.load(made.path).graph.initializer}

    told, other = numbers("a", DataLoader(unequal(), 200), ranges), numbers("b", part, ranges)
    read = {name for name, value in told.items() if other[name] != value}
    assert read == {f"{name}_{what}" for name in ("linear", "logits") for what in ("scale", "zero_point")}
    assert numbers("c", DataLoader(unequal(), 200), stated) == numbers("d", part, stated)


@pytest.mark.parametrize(
    ("guard", "message"),
    [
        (lambda: quantization(scheme="lsq"), "statistics of private data"),
        (lambda: quantization(range_noise=100.0), "too much to tell the ranges of 2 layers by step"),
    ],
)
def test_ranges_that_cannot_be_told_are_refused(guard, message):
    with pytest.raises(GuardConflict, match=message):
        fit([guard(), private()], Quiet)


class Turned(Quiet):
    """A layer that sees positions in front, as many as a batch may have rows."""

    def forward(self, x):
        return super().forward(x) + self.net[3](torch.zeros(len(x), ROWS, 16).transpose(0, 1))[0, 0]


def test_a_layer_that_loses_the_rows_is_refused_though_their_number_fits():
    guards = [quantization(range_noise=0.25), private(batch_size=ROWS)]
    with pytest.raises(GuardConflict, match=r"net\.3 sees inputs of shape .* not known which example"):
        fit(guards, Turned, data())


# Teachers -------------------------------------------------------------------------------------------------------------


def teacher(folder, data=None, epochs=2, **options):
    kept = pl.callbacks.ModelCheckpoint(folder, filename="teacher")
    dp = private(**{"noise_multiplier": 1.0, **options})
    fit([dp, kept], Quiet, data, enable_checkpointing=True, max_epochs=epochs, seed=4)
    return next(folder.glob("teacher*.ckpt")), dp


def student(path, data=None, epochs=3, **options):
    dp = private(**{"noise_multiplier": 1.3, **options})
    net = fit([dp, KnowledgeDistillation(str(path))], Quiet, data, max_epochs=epochs)
    return net, dp


def test_a_private_teacher_is_counted_with_its_student(tmp_path):
    path, first = teacher(tmp_path)
    net, dp = student(path)
    both = PLDAccountant()
    for noise, steps in ((1.0, 8), (1.3, 12)):
        both.compose(PoissonSampledDpEvent(0.25, GaussianDpEvent(noise)), steps)
    assert dp.plan.epsilon() == pytest.approx(both.get_epsilon(1e-3), rel=0.03)
    assert dp.plan.epsilon() > first.plan.epsilon()
    assert dp.plan.epsilon(0) == pytest.approx(first.plan.epsilon())
    assert "of it was spent by what this training builds on" in dp.header()
    alone = fit([private(noise_multiplier=1.3)], Quiet, max_epochs=3)
    assert not same(net, alone)


def test_a_chain_of_teachers_is_counted_whole(tmp_path):
    path, _ = teacher(tmp_path)
    kept = pl.callbacks.ModelCheckpoint(tmp_path, filename="second")
    dp = private(noise_multiplier=1.3)
    fit([dp, KnowledgeDistillation(str(path)), kept], Quiet, enable_checkpointing=True)
    _, last = student(next(tmp_path.glob("second*.ckpt")), noise_multiplier=1.5, epochs=1)
    assert [tuple(segment) for segment in last.plan.ledger()] == [(1.0, 0.25, 8), (1.3, 0.25, 8), (1.5, 0.25, 4)]


def test_a_budget_is_of_both(tmp_path):
    path, first = teacher(tmp_path)
    budget = first.plan.epsilon() + 2
    _, dp = student(path, target_epsilon=budget, noise_multiplier=None)
    assert budget * 0.98 < dp.plan.epsilon() <= budget
    with pytest.raises(GuardConflict, match="is spent already"):
        student(path, target_epsilon=first.plan.epsilon() / 2, noise_multiplier=None)


def test_a_student_resumes_with_its_teacher_and_the_same_cost(tmp_path):
    path, _ = teacher(tmp_path)

    def run(name, epochs, ckpt_path=None):
        kept = pl.callbacks.ModelCheckpoint(tmp_path / name, filename="{epoch}", save_top_k=-1)
        dp = private(noise_multiplier=1.3)
        guards = [dp, KnowledgeDistillation(str(path)), kept]
        net = fit(guards, Quiet, data(), max_epochs=epochs, enable_checkpointing=True, ckpt_path=ckpt_path)
        return net, dp

    data = lambda: loader(shuffle=False)  # noqa: E731
    whole, dp = run("a", 4)
    run("b", 2)
    resumed, again = run("c", 4, max((tmp_path / "b").glob("*.ckpt"), key=lambda p: p.stat().st_mtime))
    assert same(whole, resumed)
    assert again.plan == dp.plan
    with pytest.raises(GuardConflict, match=r"before .* became"):
        fit([private(noise_multiplier=1.3), KnowledgeDistillation(str(path), public=True)], Quiet, data(),
            ckpt_path=tmp_path / "a" / "epoch=1.ckpt", max_epochs=4)  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({}, {"test_seed": None}, "trained with a test_seed and is not private"),
        ({"data": lambda: loader(n=48)}, {}, "units=48 and this training has units=64"),
        ({"users": [i // 2 for i in range(ROWS)]}, {}, "units=32 and this training has units=64"),
        ({"sampling": "shuffle"}, {}, "sampling=shuffle and this training has sampling=poisson"),
    ],
)
def test_teachers_that_cannot_be_counted_are_refused(first, second, message, tmp_path):
    first = {key: value() if key == "data" else value for key, value in first.items()}
    path, _ = teacher(tmp_path, **first)
    with pytest.raises(GuardConflict, match=message):
        student(path, **second)


def test_a_teacher_without_a_plan_is_refused_also_if_the_file_changes(tmp_path):
    kept = pl.callbacks.ModelCheckpoint(tmp_path, filename="plain")
    fit([pruning(), kept], Quiet, enable_checkpointing=True)
    plain = next(tmp_path.glob("plain*.ckpt"))
    with pytest.raises(GuardConflict, match="statistics of private data"):
        student(plain)
    path, _ = teacher(tmp_path)
    guard = KnowledgeDistillation(str(path))
    path.write_bytes(plain.read_bytes())
    with pytest.raises(GuardConflict, match="no longer a checkpoint of a private training"):
        fit([private(), guard], Quiet)


# Averages and last layers ---------------------------------------------------------------------------------------------


def test_an_average_of_private_weights_is_private_and_pruned():
    class Looking(EMAWeightAveraging):
        def update_parameters(self, *args, **kwargs):
            super().update_parameters(*args, **kwargs)

    dp, prune = private(), pruning()
    averaged = fit([dp, prune, Looking(decay=0.9)], Quiet)
    assert not same(averaged, fit([private(), pruning()], Quiet))
    assert dp.plan.epsilon(8) == dp.plan.epsilon()
    weights = [p for p in averaged.parameters() if p.dim() == 2]
    assert sum(int((p == 0).sum()) for p in weights) == round(0.7 * sum(p.numel() for p in weights))


class Beginnings(pl.Callback):
    """The weights that each epoch begins with, and the last."""

    def __init__(self):
        self.seen, self.last = [], []

    def on_train_epoch_start(self, trainer, module):
        self.seen.append([p.detach().clone() for p in module.parameters()])

    def on_train_batch_end(self, trainer, module, *args):
        self.last = [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("others", [list, lambda: [pruning()]])
def test_an_average_of_the_epochs_is_of_private_weights_and_costs_nothing(others):
    looking, dp, plain = Beginnings(), private(), private()
    averaged = fit([dp, looking, averaging(), *others()], Quiet, max_epochs=6)
    wanted = [torch.stack(parts).mean(0) for parts in zip(*looking.seen[2:], strict=True)]  # from the third epoch on
    if not others():  # a pruned average is masked at the end
        for found, mean in zip(averaged.parameters(), wanted, strict=True):
            torch.testing.assert_close(found, mean)
    else:
        weights = [p for p in averaged.parameters() if p.dim() == 2]
        assert sum(int((p == 0).sum()) for p in weights) == round(0.7 * sum(p.numel() for p in weights))
    assert not torch.equal(next(averaged.parameters()), looking.last[0])
    fit([plain, *others()], Quiet, max_epochs=6)
    assert dp.plan == plain.plan
    assert dp.plan.steps == dp.state()["steps"] == 24
    assert dp.notes()[1] == plain.notes()[1]  # the epsilon that was spent
    assert any("A probe replaced" in note for note in dp.notes())


def test_an_average_of_the_epochs_resumes_to_the_bit(tmp_path):
    def run(name, epochs, path=None):
        kept = pl.callbacks.ModelCheckpoint(tmp_path / name, filename="{epoch}", save_top_k=-1)
        dp, looking = private(), Beginnings()
        net = fit([dp, averaging(), looking, kept], Quiet, data(), max_epochs=epochs, enable_checkpointing=True,
                  ckpt_path=path)  # fmt: skip
        return net, dp, looking

    whole, dp, looking = run("whole", 6)
    for epoch in (0, 3):  # before the average has begun, and after
        resumed, again, later = run(f"from {epoch}", 6, tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert again.state() == dp.state()
        assert all(torch.equal(a, b) for a, b in zip(later.last, looking.last, strict=True)), epoch
        assert same(resumed, whole), epoch


def test_an_average_that_the_budget_would_cut_off_is_refused():
    with pytest.raises(GuardConflict, match="puts its average in place only after the last epoch"):
        fit([private(target_epsilon=60.0), averaging()], Quiet, max_epochs=40)


def test_an_average_that_takes_statistics_anew_is_refused_and_a_moving_one_is_not():
    with pytest.raises(GuardConflict, match=r"forgets the statistics of net\.1, a BatchNorm"):
        fit([private(), averaging()], Body, data(), max_epochs=4)
    frozen = fit([private(), EMAWeightAveraging(decay=0.5)], Body, data(), max_epochs=4).net[1]
    assert torch.equal(frozen.running_mean, torch.full_like(frozen.running_mean, 0.1))
    with pytest.raises(GuardConflict, match="it copies the model before the guard rewrites it"):
        fit([private(replace_batch_norm="group"), averaging()], lambda: Quiet(norm=True), data(), max_epochs=4)


class Body(Quiet):
    """A frozen body whose BatchNorm has public statistics."""

    def __init__(self, **kwargs):
        super().__init__(**{**kwargs, "norm": True})
        body = self.net[:-1]
        body.requires_grad_(False)
        self.net[1].running_mean.fill_(0.1)
        self.net[1].eval()


@pytest.mark.parametrize(
    "others", [list, lambda: [pruning(targets=["net.4"])], lambda: [quantization(range_noise=0.25)]]
)
def test_the_last_layer_is_trained_on_a_frozen_body(others):
    pl.seed_everything(0, verbose=False)
    before = Body().state_dict()
    dp = private()
    after = fit([dp, *others()], Body, DataLoader(Rows(), ROWS), max_epochs=8).state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {"net.4.weight", "net.4.bias"} <= moved
    assert not {name for name in moved if name.startswith("net.1.")}
    assert any("A probe replaced" in note for note in dp.notes())


# All together ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [{"activation_bits": None}, {"range_noise": 0.5}], ids=["weights", "ranges"])
def test_all_of_them_resume_to_the_bit_and_pass_the_probe(ranges, tmp_path):
    def guards():
        return [attack(), bound(), pruning(), quantization(**ranges), KnowledgeDistillation(start=0.25)]

    def run(name, path=None):
        kept = pl.callbacks.ModelCheckpoint(tmp_path / name, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
        dp = private()
        net = fit([*guards(), dp, kept], Quiet, data(), max_epochs=STEPS, enable_checkpointing=True, ckpt_path=path)
        return net, dp

    whole, dp = run("whole")
    note = next(note for note in dp.notes() if "A probe replaced" in note)
    assert "no other's gradient changed by more than 0 " in note
    for epoch in (1, 5):  # before rounding is told its ranges, and after
        resumed, _ = run(f"from {epoch}", tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert same(resumed, whole)
    assert {query.name for guard in guards() for query in guard.queries()} >= {"fairness_count", "fairness_rates"}
