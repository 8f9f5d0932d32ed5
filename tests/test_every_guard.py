"""Every guard goes through the same tests: off means off, undo, resume, and whatever else a run may do to it."""

import copy
import pickle
import re
from itertools import combinations

import lightning.pytorch as lightning
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint

import lightning_guard.callbacks
from lightning_guard.callbacks import RandomizedSmoothing
from lightning_guard.composition import Verdict, findings
from lightning_guard.compression.loading import load_reshaped
from lightning_guard.functional.reshaping import reshape_like
from lightning_guard.guard import Guard, GuardConflict, Trait
from lightning_guard.mixins import GuardMixin
from lightning_guard.pipeline import current
from lightning_guard.undo import StandIn
from tests import toys
from tests.guards import GUARDS
from tests.toys import CLASSES, Data, ManualNet, Net, PlainNet, fit, loader, rows, same, trainer

every_guard = pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)


@pytest.fixture(autouse=True)
def _batch_norm(request, monkeypatch):
    """Guards that bound examples refuse BatchNorm; their networks come without."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    guards = [params["guard"]] if "guard" in params else params.get("pair", ())
    if any(Trait.BOUNDS_EXAMPLES in (guard.traits or ()) for guard in guards):
        monkeypatch.setattr(toys, "BATCH_NORM", False)


def ours(*owners):
    """What of ours is left on these objects."""
    return [
        (type(owner).__name__, key)
        for owner in owners
        for key, value in vars(owner).items()
        if isinstance(value, StandIn)
    ]


def test_every_guard_has_a_row():
    shipped = {value for value in vars(lightning_guard.callbacks).values() if isinstance(value, type)}
    assert {cls for cls in shipped if issubclass(cls, Guard)} == set(GUARDS)


@every_guard
def test_off_means_off(guard):
    assert same(fit([GUARDS[guard].off()]), fit())


def acted(guard, guarded, plain):
    """Whether training shows the guard as it should: changed by those that change it, to the bit the same by others."""
    return same(guarded, plain) is GUARDS[guard].watches


@every_guard
def test_on_acts(guard):
    made = GUARDS[guard].on()
    assert acted(guard, fit([made]), fit())
    assert not GUARDS[guard].watches or made.state()


def test_all_off_means_off():
    assert same(fit([row.off() for row in GUARDS.values()]), fit())


@every_guard
def test_same_seed_same_weights(guard):
    assert same(fit([GUARDS[guard].on()]), fit([GUARDS[guard].on()]))


@every_guard
def test_leaves_nothing_behind(guard):
    module, before = PlainNet(), set(vars(PlainNet()))
    fit([GUARDS[guard].on()], module)
    assert set(vars(module)) - before <= {"_hparams", "fitted"}
    assert not ours(module, module.net, module.fitted, module.fitted.strategy, module.fitted.strategy.precision_plugin)
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in module.fitted.optimizers)
    assert all(vars(c).get("_pipeline") is None for c in module.fitted.callbacks)


class Failing(PlainNet):
    error: type[BaseException] = RuntimeError

    def on_train_batch_end(self, *args):
        raise self.error("stop")


class Interrupted(Failing):
    error = KeyboardInterrupt


@every_guard
@pytest.mark.parametrize("module", [Failing, Interrupted])
def test_leaves_nothing_behind_after_an_exception(guard, module):
    net = module()
    run = trainer([GUARDS[guard].on()])
    with pytest.raises((RuntimeError, SystemExit)):
        run.fit(net, loader())
    assert not ours(net, net.net, run, run.strategy, run.strategy.precision_plugin)
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in run.optimizers)
    assert all(m.training for m in net.modules())


class Rewound(pl.Callback):
    """Dropout draws from the global generator, which Lightning does not restore: begin each step at a known state."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        torch.manual_seed(trainer.global_step)


@every_guard
def test_resume_is_bitwise(guard, tmp_path):
    data = loader(shuffle=False)  # the order of a shuffling loader is the loader's to resume
    kept = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
    whole = fit([Rewound(), GUARDS[guard].on(), kept], data=data, enable_checkpointing=True, max_epochs=3)
    for epoch in (0, 1):  # after a third and two thirds of the steps, in the middle of the schedules
        path = tmp_path / f"epoch={epoch}.ckpt"
        assert torch.load(path, weights_only=True)["lightning_guard"]["guards"].keys() == {guard.name}
        resumed = fit([Rewound(), GUARDS[guard].on()], data=data, max_epochs=3, ckpt_path=path, seed=1)
        assert resumed.fitted.global_step == whole.fitted.global_step == 3 * whole.fitted.num_training_batches
        assert same(resumed, whole)


@every_guard
def test_resume_without_the_guard_is_refused(guard, tmp_path):
    other = next(cls for cls in GUARDS if cls is not guard)
    guarded = ModelCheckpoint(tmp_path, filename="last")
    fit([GUARDS[guard].on(), guarded], enable_checkpointing=True, max_epochs=1)
    path = next(tmp_path.glob("last*.ckpt"))
    with pytest.raises(GuardConflict, match=guard.name):
        fit([GUARDS[other].off()], max_epochs=2, ckpt_path=path)


@every_guard
def test_a_file_written_after_training_resumes_with_its_guards(guard, tmp_path):
    other = next(cls for cls in GUARDS if cls is not guard)
    module = fit([GUARDS[guard].on()])
    module.fitted.save_checkpoint(tmp_path / "after.ckpt")
    with pytest.raises(GuardConflict, match=guard.name):
        fit([GUARDS[other].off()], max_epochs=3, ckpt_path=tmp_path / "after.ckpt")
    plain = PlainNet()
    if GUARDS[guard].reshapes:
        reshape_like(plain, module.state_dict())
    trainer([GUARDS[other].off()]).test(plain, loader(), ckpt_path=tmp_path / "after.ckpt", verbose=False)


@every_guard
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("keeper", ["model", "exception"])
def test_a_file_written_on_an_exception_resumes_with_its_guards(guard, error, keeper, tmp_path):
    class Stopped(PlainNet):
        def on_train_batch_end(self, *args):
            if self.global_step == 6:
                raise error("stop")

    keep = ModelCheckpoint(tmp_path, save_on_exception=True) if keeper == "model" else OnExceptionCheckpoint(tmp_path)
    net, run = Stopped(), trainer([GUARDS[guard].on(), keep], enable_checkpointing=True)
    with pytest.raises((RuntimeError, SystemExit)):
        run.fit(net, loader())
    for path in tmp_path.glob("*.ckpt"):
        assert torch.load(path, weights_only=True)["lightning_guard"]["guards"].keys() == {guard.name}
    assert list(tmp_path.glob("*.ckpt"))
    assert not ours(net, run, run.strategy)


@every_guard
def test_one_guard_object_serves_fit_after_fit(guard):
    made = GUARDS[guard].on()
    fit([made])
    assert same(fit([made]), fit([GUARDS[guard].on()]))  # nothing of the first training reaches the second


@every_guard
def test_a_fit_that_goes_on_is_a_resumed_one(guard, tmp_path):
    data = loader(shuffle=False)

    def longer(run):
        run.fit_loop.max_epochs = 3

    going = fit([Rewound(), GUARDS[guard].on()], data=data)
    going.fitted.save_checkpoint(tmp_path / "two.ckpt")
    states = torch.load(tmp_path / "two.ckpt", weights_only=True)["lightning_guard"]
    seen = []

    class Looking(pl.Callback):
        def on_train_start(self, trainer, module):
            seen.append(current(module)._states())

    going.fitted.callbacks.append(Looking())
    longer(going.fitted)
    going.fitted.fit(going, data)
    assert str(seen) == str([states])


@every_guard
def test_state_dict_keys_are_the_users(guard, tmp_path):
    kept = ModelCheckpoint(tmp_path, filename="last")
    module = fit([GUARDS[guard].on(), kept], enable_checkpointing=True)
    path = next(tmp_path.glob("*.ckpt"))
    if GUARDS[guard].reshapes:  # what a plain class cannot load by itself
        assert same(load_reshaped(PlainNet, path), module)
        return
    assert module.state_dict().keys() == PlainNet().state_dict().keys()
    assert same(PlainNet.load_from_checkpoint(path, weights_only=True), module)


@every_guard
@pytest.mark.parametrize("form", ["triple", "named", "dict"])
@pytest.mark.parametrize("outputs", ["tensor", "dict", "none"])
def test_forms_of_batch_and_output(guard, form, outputs):
    # Net unpacks exactly two: where a guard needs the group, it must be kept from the step.
    net = Net if guard.needs_group else PlainNet
    if outputs == "none" and Trait.BOUNDS_EXAMPLES in (guard.traits or ()):
        with pytest.raises(GuardConflict, match="returned no loss"):
            fit([GUARDS[guard].on()], lambda: net(outputs=outputs), loader(form))
        return
    guarded = fit([GUARDS[guard].on()], lambda: net(outputs=outputs), loader(form))
    off = fit([GUARDS[guard].off()], lambda: net(outputs=outputs), loader(form))
    plain = fit(None, lambda: PlainNet(outputs=outputs), loader(form))
    assert same(off, plain)
    assert acted(guard, guarded, plain)


@every_guard
@pytest.mark.parametrize("source", ["loader", "datamodule", "module"])
def test_sources_of_data(guard, source):
    net = Net() if guard.needs_group else PlainNet()
    if source == "module":
        net.train_dataloader = loader
        pl.seed_everything(0, verbose=False)
        module = net
        trainer([GUARDS[guard].on()]).fit(net)
    else:
        module = fit([GUARDS[guard].on()], net, Data() if source == "datamodule" else loader())
    assert all(torch.isfinite(p).all() for p in module.parameters())


@every_guard
def test_the_loaders_data_is_never_changed(guard):
    data = loader()
    before = [part.clone() for part in data.dataset.data]
    fit([GUARDS[guard].on()], data=data)
    assert all(torch.equal(a, b) for a, b in zip(before, data.dataset.data, strict=True))


@pytest.mark.parametrize(
    "guard",
    [cls for cls in GUARDS if Trait.COUPLES_EXAMPLES not in (cls.traits or ()) and cls is not RandomizedSmoothing],
    ids=lambda guard: guard.name,
)
def test_accumulation_equals_the_larger_batch(guard):  # of a batch-coupled loss, see test_fairness; of noise, its own
    class Plain(PlainNet):  # without dropout and batch statistics, two halves are the whole
        def __init__(self):
            super().__init__(norm=False, optimizer="sgd")
            self.net[2].p = 0.0

    def on():
        made = GUARDS[guard].on()
        made.random_start = False  # random starts are drawn by micro-batch
        return made

    halves = fit([on()], Plain, loader(batch_size=8, shuffle=False), accumulate_grad_batches=2)
    wholes = fit([on()], Plain, loader(batch_size=16, shuffle=False))
    for a, b in zip(halves.parameters(), wholes.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@every_guard
def test_bf16(guard):
    module = fit([GUARDS[guard].on()], precision="bf16-mixed")
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert acted(guard, module, fit(precision="bf16-mixed"))
    assert same(fit([GUARDS[guard].off()], precision="bf16-mixed"), fit(precision="bf16-mixed"))


class Compilable(PlainNet):
    """self.log of a metric breaks inductor's graphs with or without guards; a compiled step logs nothing here."""

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])


@every_guard
def test_compile(guard):
    def compiled():
        torch._dynamo.reset()
        pl.seed_everything(0, verbose=False)
        return torch.compile(Compilable(), backend="eager")

    pl.seed_everything(0, verbose=False)
    run, net = trainer([GUARDS[guard].on()]), compiled()
    run.fit(net, loader())
    guarded = net._orig_mod
    assert not ours(guarded, run, run.strategy)
    plain = compiled()
    trainer().fit(plain, loader())
    assert acted(guard, guarded, plain._orig_mod)
    off = compiled()
    trainer([GUARDS[guard].off()]).fit(off, loader())
    assert same(off._orig_mod, plain._orig_mod)


@every_guard
def test_manual_optimisation_is_served_or_refused(guard):
    made = GUARDS[guard].on()
    if made.overrides("on_batch") or made.overrides("on_loss"):
        with pytest.raises(GuardConflict, match="GuardMixin"):
            fit([made], ManualNet())
    else:
        assert acted(guard, fit([GUARDS[guard].on()], ManualNet), fit(None, ManualNet))


class GuardedManualNet(GuardMixin, ManualNet):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        step = self.guard_step(batch)
        logits = self(step.inputs)
        loss = self.guard_loss(step, torch.nn.functional.cross_entropy(logits, step.target), logits)
        self.manual_backward(loss)
        optimizer.step()


@every_guard
def test_manual_optimisation_with_the_mixin(guard):
    assert acted(guard, fit([GUARDS[guard].on()], GuardedManualNet), fit(None, GuardedManualNet))
    assert same(fit([GUARDS[guard].off()], GuardedManualNet), fit(None, ManualNet))


class ForgetfulNet(GuardMixin, ManualNet):
    """Inherits the mixin and never asks it."""


@every_guard
def test_a_mixin_that_is_never_asked_is_refused(guard):
    made = GUARDS[guard].on()
    if made.overrides("on_batch") or made.overrides("on_loss"):
        with pytest.raises(GuardConflict, match="never called"):
            fit([made], ForgetfulNet())


@every_guard
def test_lightning_trainer(guard):
    class LNet(lightning.LightningModule):
        __init__, forward = Net.__init__, Net.forward
        training_step, configure_optimizers = Net.training_step, Net.configure_optimizers

    LNet.__init__ = lambda self: (lightning.LightningModule.__init__(self), _build(self))[0]
    results = []
    for callbacks in ([GUARDS[guard].on()], [GUARDS[guard].off()], []):
        lightning.seed_everything(0, verbose=False)
        net = LNet()
        trainer(callbacks, cls=lightning.Trainer).fit(
            net, loader("triple" if callbacks and guard.needs_group else "pair")
        )
        assert not ours(net)
        results.append(net)
    assert acted(guard, results[0], results[2])
    assert same(results[1], results[2])


def _build(self):
    import torchmetrics
    from torch import nn

    self.save_hyperparameters({"lr": 0.05, "optimizer": "sgd", "outputs": "tensor"})
    self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=CLASSES)


@every_guard
def test_pickle_and_deepcopy_of_guard_and_module(guard):
    made = GUARDS[guard].on()
    again = pickle.loads(pickle.dumps(made))  # noqa: S301  our own bytes
    assert vars(again).keys() == vars(made).keys()

    class Copying(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            self.copied = copy.deepcopy(module)
            assert not ours(self.copied)
            self.pickled = pickle.loads(pickle.dumps(module))  # noqa: S301  our own bytes
            assert not ours(self.pickled)

    copying = Copying()
    original = fit([made, copying], limit_train_batches=2, max_epochs=1)
    step = copying.copied.training_step
    assert step.__self__ is copying.copied  # a copy trains itself, not the original
    assert same(copying.copied, original)


@every_guard
def test_an_averaging_callback_does_not_break_the_promise(guard, tmp_path):
    kept = ModelCheckpoint(tmp_path, filename="last")
    for order in (lambda g, e: [g, e], lambda g, e: [e, g]):
        made = GUARDS[guard].on()
        if GUARDS[guard].reshapes:
            with pytest.raises(GuardConflict, match="EMAWeightAveraging copies the model"):
                fit(order(made, EMAWeightAveraging(decay=0.9)))
            continue
        module = fit([*order(made, EMAWeightAveraging(decay=0.9)), kept], enable_checkpointing=True)
        stored = torch.load(max(tmp_path.glob("*.ckpt"), key=lambda p: p.stat().st_mtime), weights_only=True)[
            "state_dict"
        ]
        if guard.name == "magnitude_pruning":
            weights = [key for key, value in stored.items() if value.dim() == 2]
            for state in (stored, module.state_dict()):
                zeros = sum(int((state[key] == 0).sum()) for key in weights)
                assert zeros == round(0.7 * sum(state[key].numel() for key in weights))


@pytest.mark.parametrize("pair", list(combinations(GUARDS, 2)), ids=lambda pair: f"{pair[0].name}+{pair[1].name}")
def test_any_order_is_the_same_run(pair):
    refused = [rule for *_, rule in findings([GUARDS[guard].on() for guard in pair]) if rule.verdict is Verdict.REFUSED]
    if refused:
        with pytest.raises(GuardConflict, match=re.escape(refused[0].reason)):
            fit([GUARDS[guard].on() for guard in pair])
        return
    forwards = fit([GUARDS[guard].on() for guard in pair])
    assert same(forwards, fit([GUARDS[guard].on() for guard in reversed(pair)]))
    for guard, other in (pair, pair[::-1]):
        assert acted(other, forwards, fit([GUARDS[guard].on()]))


@every_guard
def test_guards_can_come_with_the_class(guard):
    class Carrying(GuardMixin, PlainNet):
        guards = [GUARDS[guard].on()]

    first, second = fit(None, Carrying), fit(None, Carrying)
    assert same(first, second)  # no state leaks from one module into the next
    assert same(first, fit([GUARDS[guard].on()]))


def test_rows_have_both_groups():
    assert rows()[2].float().mean() not in (0, 1)
