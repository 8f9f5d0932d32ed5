"""What a run is checked for, where transforms are placed, and that everything is put back."""

from typing import ClassVar

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import StochasticWeightAveraging
from pytorch_lightning.strategies import FSDPStrategy
from torch import nn

from lightning_guard.batch import Batch
from lightning_guard.callbacks import AdversarialTraining, FairnessRegularization, MagnitudePruning
from lightning_guard.composition import RULES, Verdict, findings
from lightning_guard.guard import Guard, GuardConflict, Phase, Trait
from lightning_guard.mixins import GuardMixin
from tests.toys import ManualNet, Net, PlainNet, fit, loader, same, trainer

TRANSFORMS = ("rewrite", "on_loader", "on_batch", "on_loss", "on_gradients", "on_weights", "on_checkpoint", "release")


def recording(name_: str, phase_: Phase, log: list, traits_=frozenset()):
    """A guard that writes down when each of its transforms is asked."""

    class Recording(Guard):
        name: ClassVar[str] = name_
        phase: ClassVar[Phase] = phase_
        traits = traits_

        def note(self, transform, given):
            log.append((transform, self.name))
            return given

        def rewrite(self, module):
            self.note("rewrite", None)

        def on_loader(self, loader):
            return self.note("on_loader", loader)

        def on_batch(self, step):
            return self.note("on_batch", step.batch)

        def on_loss(self, step):
            return self.note("on_loss", step.loss)

        def on_gradients(self, module):
            self.note("on_gradients", None)

        def on_weights(self, optimizer):
            self.note("on_weights", None)

        def on_checkpoint(self, weights):
            self.note("on_checkpoint", None)

        def release(self, module):
            self.note("release", None)

    return Recording()


@pytest.mark.parametrize("reverse", [False, True])
def test_places_and_order(reverse, tmp_path):
    log: list = []
    guards = [recording("b", Phase.BATCH, log), recording("a", Phase.BATCH, log), recording("z", Phase.REWRITE, log)]
    kept = pl.callbacks.ModelCheckpoint(tmp_path)
    fit([*(guards[::-1] if reverse else guards), kept], enable_checkpointing=True, max_epochs=1, limit_train_batches=1)
    way_in, way_out = ["z", "a", "b"], ["b", "a", "z"]
    assert log == [
        (transform, name)
        for transform in TRANSFORMS
        for name in (way_in if transform in ("rewrite", "on_loader", "on_batch") else way_out)
    ]


def test_a_guard_that_does_nothing_changes_nothing():
    log: list = []
    assert same(fit([recording("a", Phase.LOSS, log)]), fit())


def test_gradient_watchers_see_what_guards_left():
    class Zeroing(Guard):
        name, phase, traits = "zeroing", Phase.GRADIENTS, frozenset()

        def on_gradients(self, module):
            for p in module.parameters():
                p.grad.zero_()

    class Watching(pl.Callback):
        def on_after_backward(self, trainer, module):
            assert all((p.grad == 0).all() for p in module.parameters())

        def on_before_optimizer_step(self, trainer, module, optimizer):
            self.on_after_backward(trainer, module)

    fit([Watching(), Zeroing()])  # although the watcher comes first
    with pytest.raises(AssertionError):
        fit([Watching()])


class Widening(Guard):
    """Replaces a layer, so parameters become other objects."""

    name, phase, traits = "widening", Phase.REWRITE, frozenset()

    def rewrite(self, module):
        if module.net[0].out_features == 16 and not hasattr(module.net[0], "seen"):
            old, new = module.net[0], nn.Linear(6, 16)
            new.load_state_dict(old.state_dict())
            new.seen = True
            module.net[0] = new


def test_a_rewrite_reaches_the_optimizer_that_was_built_before():
    """As LightningCLI does with --optimizer: it holds the old parameters, which nobody would train."""

    class Early(PlainNet):
        def __init__(self):
            super().__init__()
            self.early = torch.optim.SGD(self.parameters(), 0.1)

        def configure_optimizers(self):
            return self.early

    net = fit([Widening()], Early)
    (optimizer,) = net.fitted.optimizers
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in net.parameters()}
    assert not same(net, Early())


def test_a_rewrite_runs_before_every_stage_and_before_weights_are_loaded(tmp_path):
    log: list = []
    kept = pl.callbacks.ModelCheckpoint(tmp_path)
    fit([recording("a", Phase.REWRITE, log), kept], enable_checkpointing=True, max_epochs=1)
    log.clear()
    run = trainer([recording("a", Phase.REWRITE, log)])
    run.test(PlainNet(), loader(), ckpt_path=kept.best_model_path, weights_only=True, verbose=False)
    assert log == [("rewrite", "a")]


def test_fit_validate_test_predict_on_one_trainer():
    run, net = trainer([AdversarialTraining(0.1), FairnessRegularization(), MagnitudePruning()]), Net()
    net.predict_step = lambda batch, batch_idx: net(batch[0])
    run.fit(net, loader(), loader())  # the group is withheld from validation_step too
    run.validate(net, loader(), verbose=False)
    run.test(net, loader(), verbose=False)
    assert len(run.predict(net, loader())) == 4
    run.fit_loop.max_epochs = 3
    run.fit(net, loader())


# What is refused -------------------------------------------------------------------------------------------------


def conflict(callbacks, module=PlainNet, **kwargs):
    with pytest.raises(GuardConflict) as raised:
        fit(callbacks, module, **kwargs)
    return raised.value


def test_all_problems_come_at_once():
    class Fetching(ManualNet):
        def training_step(self, dataloader_iter):
            raise AssertionError("never reached")

    problems = conflict(
        [AdversarialTraining(0.1), AdversarialTraining(0.2), FairnessRegularization(), MagnitudePruning(end=99)],
        lambda: Fetching(), max_steps=8, max_epochs=-1,
    ).problems  # fmt: skip
    text = "\n".join(problems)
    assert "2 guards are called 'adversarial_training'" in text
    assert "dataloader_iter" in text
    assert "GuardMixin" in text
    assert "end=99" in text
    assert len(problems) == 4
    assert str(GuardConflict(problems)).count("\n  - ") == 4


def test_strategies_that_shard_are_refused():
    run = trainer([MagnitudePruning()])
    run.strategy.__class__ = type(FSDPStrategy.__name__, (type(run.strategy),), {})
    with pytest.raises(GuardConflict, match="FSDPStrategy"):
        run.fit(PlainNet(), loader())


def test_two_readings_of_one_batch_are_refused():
    text = str(
        conflict([AdversarialTraining(0.1, batch=Batch(inputs=0)), FairnessRegularization(batch=Batch(group=2))])
    )
    assert "read in different ways" in text
    fit([AdversarialTraining(0.1), FairnessRegularization(batch=Batch(group=2))])  # one statement serves both


def test_a_reading_that_names_no_submodule_is_refused():
    assert "has net, net.0" in str(conflict([AdversarialTraining(0.1, batch=Batch(logits="nett"))]))


def test_privacy_and_a_batch_coupled_loss_are_refused():
    log: list = []
    private = recording("private", Phase.GRADIENTS, log, frozenset({Trait.BOUNDS_EXAMPLES}))
    text = str(conflict([private, FairnessRegularization(mode="penalty")]))
    assert "private and fairness: one example then changes what others contribute" in text
    undeclared = recording("unknown", Phase.LOSS, log, None)
    assert "private and unknown" in str(conflict([private, undeclared]))  # taken for the worst
    fit([private, recording("known", Phase.LOSS, log)])


def test_averaging_that_copies_before_a_rewrite_is_refused():
    assert "StochasticWeightAveraging" in str(conflict([Widening(), StochasticWeightAveraging(0.1)]))


def test_every_rule_says_why_and_what_to_do():
    for rule in RULES:
        assert rule.reason
        assert rule.source
        assert rule.remedy or rule.verdict is Verdict.SOUND
    shipped = [AdversarialTraining(0.1), FairnessRegularization(), MagnitudePruning()]
    assert {(a.name, b.name) for a, b, _ in findings(shipped)} == {
        ("adversarial_training", "fairness"),
        ("adversarial_training", "magnitude_pruning"),
        ("fairness", "magnitude_pruning"),
    }


def test_a_guard_may_not_disable_the_pipeline():
    with pytest.raises(TypeError, match="override begin instead"):

        class Wrong(Guard):
            name = "wrong"

            def setup(self, trainer, pl_module, stage):
                pass

    with pytest.raises(TypeError, match="must be one word"):

        class Nameless(Guard):
            name = "two words"


def test_a_conflict_in_the_middle_is_undone_too():
    net, run = PlainNet(), trainer([AdversarialTraining(0.1, bounds=(0.0, 0.1))])
    with pytest.raises(GuardConflict):
        run.fit(net, loader())
    assert "training_step" not in vars(net)


def test_somebody_who_wraps_our_wrapper_keeps_theirs():
    class Wrapping(pl.Callback):
        def on_fit_start(self, trainer, module):
            inner = module.training_step
            module.training_step = lambda batch, batch_idx: inner(batch, batch_idx)

    net = fit([Wrapping(), AdversarialTraining(0.1)])
    assert vars(net)["training_step"].__name__ == "<lambda>"
    trainer().fit(net, loader())  # their wrapper now reaches the step itself, without a guard


def test_mixin_outside_training_changes_nothing():
    class Own(GuardMixin, PlainNet):
        guard_batch = Batch(inputs=0, target=1)

    net, batch = Own(), (torch.rand(2, 6), torch.tensor([0, 1]))
    step = net.guard_step(batch)
    assert step.batch is batch
    assert step.inputs is batch[0]
    loss = torch.tensor(1.0)
    assert net.guard_loss(step, loss) is loss
    assert net.state_dict().keys() == PlainNet().state_dict().keys()


# Runs that are not the usual fit ---------------------------------------------------------------------------------


class Sharing(Net):
    """Validates by its training_step, as many do."""

    def validation_step(self, batch, batch_idx):
        return self.training_step(batch, batch_idx)


@pytest.mark.parametrize("batch", [None, Batch(inputs=0, target=2, group=1)])
def test_a_validation_step_that_calls_training_step_is_not_training(batch):
    data = loader(shuffle=False)
    data = data if batch is None else [(x, g, y) for x, y, g in data]
    data = data if batch is None else torch.utils.data.DataLoader(data, batch_size=None)
    once, twice = (FairnessRegularization(mode="penalty", batch=batch) for _ in range(2))
    alone = fit([AdversarialTraining(0.1), once], Net, data)
    with_validation = Sharing()
    run = trainer([AdversarialTraining(0.1), twice], num_sanity_val_steps=0)
    pl.seed_everything(0, verbose=False)
    run.fit(with_validation, data, data)
    assert alone.fitted.global_step == run.global_step
    assert torch.equal(once._mode.running.counts, twice._mode.running.counts)  # rates of training data only


class ManualSteps(GuardMixin, ManualNet):
    """Takes two steps at once, and shares code with validation."""

    def training_step(self, batch, batch_idx):
        halves = [[part[:8] for part in batch], [part[8:] for part in batch]]
        steps = [self.guard_step(half) for half in halves]
        assert not torch.equal(steps[0].inputs, steps[1].inputs)
        self.optimizers().zero_grad()
        for step in steps:
            logits = self(step.inputs)
            self.manual_backward(
                self.guard_loss(step, nn.functional.cross_entropy(logits, step.target), logits) / len(steps)
            )
        self.optimizers().step()

    def validation_step(self, batch, batch_idx):
        step = self.guard_step(batch)
        assert step.inputs is batch[0]
        loss = torch.zeros(())
        assert self.guard_loss(step, loss) is loss


def test_several_manual_steps_keep_their_batches_and_validation_is_left_alone():
    trainer([AdversarialTraining(0.1), FairnessRegularization()]).fit(ManualSteps(), loader(), loader())


def test_guards_do_not_act_twice_where_an_automatic_step_asks_for_them():
    class Asking(GuardMixin, PlainNet):
        def training_step(self, batch, batch_idx):
            return super().training_step(self.guard_step(batch).batch, batch_idx)

    assert "twice" in str(conflict([AdversarialTraining(0.1)], Asking))
    fit(None, Asking)


@pytest.mark.parametrize("finder", [pl.callbacks.LearningRateFinder, pl.callbacks.BatchSizeFinder])
def test_trial_trainings_within_a_training_are_refused(finder):
    class Sized(pl.LightningDataModule):
        batch_size = 16

        def train_dataloader(self):
            return loader(batch_size=self.batch_size)

    # Some finders refuse more in their own setup; the guards come first here.
    assert f"{finder.__name__} trains within" in str(conflict([MagnitudePruning(), finder()], data=Sized()))


def test_a_guard_that_joins_late_is_refused():
    class Late(PlainNet):
        def setup(self, stage):
            self.trainer.callbacks.append(AdversarialTraining(0.1))

    assert "after the run was set up" in str(conflict([], Late))


def test_the_classs_guard_does_not_replace_the_trainers():
    class Carrying(GuardMixin, PlainNet):
        guards: ClassVar = [AdversarialTraining(0.01)]

    assert "comes with Carrying too" in str(conflict([AdversarialTraining(0.3)], Carrying))
    net = fit(None, Carrying)
    net.fitted.validate(net, loader(), verbose=False)  # its own, found again, is no second one


def test_probabilities_are_not_taken_for_logits():
    class Squashed(PlainNet):
        def training_step(self, batch, batch_idx):
            scores = torch.sigmoid(self(batch[0])[:, :1]).squeeze(1)
            loss = nn.functional.binary_cross_entropy(scores, (batch[1] > 0).float())
            return {"loss": loss, "preds": scores}

        def forward(self, x):
            return self.net(x)

    assert "probabilities" in str(conflict([FairnessRegularization()], Squashed))

    class Softmax(PlainNet):
        def forward(self, x):
            return self.net(x).softmax(1)

    assert "probabilities" in str(conflict([AdversarialTraining(0.1)], Softmax))


def test_a_group_that_is_no_tensor_is_refused():
    class Nested(PlainNet):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[0], batch_idx)

    assert "several training loaders" in str(conflict([FairnessRegularization()], Nested, data=[loader()] * 3))


def test_inputs_that_training_step_changes_are_refused():
    class Normalising(PlainNet):
        def training_step(self, batch, batch_idx):
            return super().training_step(((batch[0] - 0.5) / 0.25, *batch[1:]), batch_idx)

    assert "changes the inputs" in str(conflict([AdversarialTraining(0.1)], Normalising))
    fit([AdversarialTraining(0.0)], Normalising)

    class Saying(GuardMixin, Normalising):
        def guard_forward(self, inputs):
            return self((inputs - 0.5) / 0.25)

    net = fit([AdversarialTraining(0.1)], Saying)
    assert not net._forward_pre_hooks


def test_a_buffer_that_a_probe_would_write_is_named():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls += 1
            return x

    class Counted(PlainNet):
        def __init__(self):
            super().__init__()
            self.net.append(Counting())

    assert "net.5.calls" in str(conflict([AdversarialTraining(0.1)], Counted))


def test_a_run_that_lightning_gave_up_is_undone_by_the_next():
    class Rude(pl.Callback):
        def on_exception(self, trainer, module, exception):
            raise ValueError("rude")

    class Failing(PlainNet):
        def on_train_start(self):
            raise RuntimeError

    guard, net = AdversarialTraining(0.1), Failing()
    with pytest.raises(ValueError, match="rude"):
        trainer([Rude(), guard]).fit(net, loader())
    fit([guard])
    assert "training_step" not in vars(net)
