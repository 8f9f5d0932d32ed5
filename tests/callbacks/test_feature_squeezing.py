"""Squeezing wherever the network is called, once, with a gradient that hides nothing, and undone when it should be."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_guard.batch import Batch
from lightning_guard.callbacks import AdversarialTraining, FeatureSqueezing, RandomizedSmoothing
from lightning_guard.evaluation import Subject
from lightning_guard.functional import Squeeze, ThreatModel, pgd, squeeze_inputs, squeezing, stream, unsqueeze
from lightning_guard.guard import GuardConflict
from lightning_guard.mixins import GuardMixin
from tests.toys import ManualNet, PlainNet, fit, loader, rows, same, trainer

SQUEEZE = Squeeze(bits=2)


def on(**options):
    return FeatureSqueezing(**{"bits": 2, **options})


class ByHand(PlainNet):
    """Squeezes in its own forward."""

    def forward(self, x):
        return super().forward((x * 3).round() / 3)


def test_bit_identical_to_a_network_that_squeezes():
    assert same(fit([on()]), fit(None, ByHand))
    assert same(fit([on()], accumulate_grad_batches=2), fit(None, ByHand, accumulate_grad_batches=2))


class Seeing(PlainNet):
    """Keeps what reaches its first layer, after any squeezing."""

    def forward(self, x):
        self.__dict__.setdefault("seen", []).append((x.detach().clone(), self.training))
        return super().forward(x)


def test_what_is_squeezed_in_training_validation_and_use():
    module = Seeing()
    trainer([on()]).fit(module, loader(), loader())
    assert {training for _, training in module.seen} == {True, False}
    levels = SQUEEZE(rows()[0]).unique()
    assert all(torch.isin(x, levels).all() for x, _ in module.seen)
    module.eval()
    x = rows()[0]
    wanted = module.net(SQUEEZE(x))
    for used in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):  # noqa: S301  our own bytes
        assert torch.equal(used(x), wanted)
    assert torch.equal(Subject(module, [x]).forward(x), wanted)
    assert unsqueeze(module) == SQUEEZE
    assert not torch.equal(module(x), wanted)


def test_a_network_built_anew_is_squeezed_by_the_guard_in_its_trainer(tmp_path):
    module = fit([on()])
    module.fitted.save_checkpoint(tmp_path / "one.ckpt")
    fresh = Seeing.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    assert squeezing(fresh) is None  # the weights know nothing of it
    for stage in ("validate", "test"):
        getattr(trainer([on()]), stage)(fresh, loader(), verbose=False)
    assert squeezing(fresh) == SQUEEZE
    assert all(torch.isin(x, SQUEEZE(rows()[0]).unique()).all() for x, _ in fresh.seen)


class Failing(PlainNet):
    def on_train_batch_end(self, *args):
        raise RuntimeError("stop")


@pytest.mark.parametrize("before", [None, Squeeze(bits=5)])
def test_a_training_that_fails_leaves_the_network_as_it_was(before):
    net = Failing()
    if before is not None:
        squeeze_inputs(net, before)
    with pytest.raises(RuntimeError, match="stop"):
        fit([on()], net)
    assert squeezing(net) == before


def test_a_second_training_replaces_the_first():
    module = fit([on()])
    fit([on(bits=3)], module)
    assert squeezing(module) == Squeeze(bits=3)
    assert len(module._forward_pre_hooks) == 1
    fit([FeatureSqueezing(bits=None)], module)  # is off: nothing is done, and nothing undone
    assert squeezing(module) == Squeeze(bits=3)


def attacked(net, threat_eps=0.1, steps=2):
    """Training on single-batch PGD, squeezed by hand with the identity as gradient."""
    optimizer = net.configure_optimizers()["optimizer"]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    step = 0
    for _ in range(2):
        for x, y, _ in loader(shuffle=False):
            net.eval()
            noise = torch.rand(x.shape, generator=stream(0, step, 0)) * 2 - 1
            moved = (x + threat_eps * noise).clamp(0, 1)
            moved = torch.min(torch.max(moved, x - threat_eps), x + threat_eps).clamp(0, 1)
            for _ in range(steps):
                squeezed = ((moved.detach() * 3).round() / 3).requires_grad_()
                (g,) = torch.autograd.grad(F.cross_entropy(net(squeezed), y, reduction="sum"), squeezed)
                moved = moved.detach() + 0.05 * g.sign()
                moved = torch.min(torch.max(moved, x - threat_eps), x + threat_eps).clamp(0, 1)
            net.train()
            optimizer.zero_grad()
            F.cross_entropy(net((moved * 3).round() / 3), y).backward()
            optimizer.step()
            step += 1
        scheduler.step()
    return net


def test_the_attack_of_training_sees_the_identity():
    attack = AdversarialTraining(eps=0.1, steps=2, step_size=0.05, bounds=(0.0, 1.0))
    guarded = fit([attack, on()], data=loader(shuffle=False))
    torch.manual_seed(0)
    wanted = attacked(PlainNet())
    for one, two in zip(guarded.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_an_attack_from_outside_goes_through_it_and_not_through_the_masked_twin():
    guarded, masked = fit([on()], max_epochs=10).eval(), fit(None, ByHand, max_epochs=10).eval()
    assert same(guarded, masked)
    x, y, _ = rows(300)
    threat = ThreatModel(0.15, bounds=(0.0, 1.0))

    def right(module, attack):
        moved = attack(lambda z: F.cross_entropy(module(z), y, reduction="none"))
        return (module(moved).argmax(1) == y).float().mean().item()

    clean = right(guarded, lambda loss: x)
    assert right(masked, lambda loss: pgd(loss, x, threat, 10, random_start=False)) == clean
    assert right(guarded, lambda loss: pgd(loss, x, threat, 10, random_start=False)) < clean - 0.1


def test_noise_of_another_guard_is_squeezed_and_may_leave_the_bounds():
    module = fit([on(), RandomizedSmoothing(0.5)], Seeing)
    assert torch.isin(module.seen[0][0], SQUEEZE(rows()[0]).unique()).all()


class Around(PlainNet):
    """Never calls itself."""

    way = "net"

    def training_step(self, batch, batch_idx):
        x, y = batch[:2]
        return F.cross_entropy(self.net(x) if self.way == "net" else self.forward(x), y)


@pytest.mark.parametrize("way", ["net", "forward"])
def test_a_step_that_goes_around_is_refused(way):
    net = Around()
    net.way = way
    with pytest.raises(GuardConflict, match=r"training_step never calls self\(x\).*Batch\(logits=...\)"):
        fit([on()], net)
    assert squeezing(net) is None


def test_the_named_submodule_is_squeezed():
    module = fit([on(batch=Batch(logits="net"))], Around)
    assert squeezing(module) is None
    assert squeezing(module.net) == SQUEEZE
    plain = fit([on()], lambda: PlainNet())
    assert all(torch.equal(a, b) for a, b in zip(module.net.parameters(), plain.net.parameters(), strict=True))


class Describing(GuardMixin, PlainNet):
    def guard_forward(self, inputs):
        return self.net(inputs)


def test_a_described_way_that_goes_around_is_refused():
    with pytest.raises(GuardConflict, match="guard_forward never calls self"):
        fit([on()], Describing())
    assert squeezing(fit([on(batch=Batch(logits="net"))], Describing).net) == SQUEEZE


def test_manual_optimisation_is_served():
    assert squeezing(fit([on()], ManualNet)) == SQUEEZE
    assert not same(fit([on()], ManualNet), fit(None, ManualNet))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bounds": (0.2, 0.8)}, r"range over .* outside bounds=\(0.2, 0.8\)"),
        ({"window": 3}, "needs images"),
        ({"batch": Batch(inputs=1)}, "int64"),
        ({"batch": Batch(inputs="pixels")}, "pixels"),
    ],
)
def test_inputs_that_cannot_be_squeezed_are_refused(options, match):
    with pytest.raises(GuardConflict, match=match):
        fit([on(**options)])


def test_resuming_with_other_options_is_refused(tmp_path):
    fit([on()]).fitted.save_checkpoint(tmp_path / "one.ckpt")
    fit([on()], ckpt_path=tmp_path / "one.ckpt", max_epochs=3)
    with pytest.raises(GuardConflict, match="resume with the same options"):
        fit([on(bits=3)], ckpt_path=tmp_path / "one.ckpt", max_epochs=3)


class Images(PlainNet):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))


def test_images_are_smoothed():
    x = torch.rand(8, 1, 6, 6)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(8).long()), 4)
    module = fit([FeatureSqueezing(bits=None, window=3)], Images, data)
    assert torch.equal(module(x), module.net(Squeeze(window=3)(x)))


def test_its_reader_is_told_that_it_is_no_defence():
    assert "no defence by themselves" in on().notes()[0]
    assert FeatureSqueezing(bits=None).notes() == []
    assert on().options()["bits"] == 2
