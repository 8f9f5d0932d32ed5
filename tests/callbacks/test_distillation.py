"""Distillation against loops written by hand, and what the teacher may and may not be."""

import copy

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_guard.callbacks import (
    DPSGD,
    AdversarialTraining,
    ChannelPruning,
    KnowledgeDistillation,
    LowRankFactorization,
)
from lightning_guard.guard import Batch, GuardConflict
from lightning_guard.mixins import GuardMixin
from tests import toys
from tests.toys import CLASSES, FEATURES, ManualNet, PlainNet, fit, loader, rows, same


def divergence(student, teacher, temperature):
    q, p = (z.div(temperature).log_softmax(1) for z in (student, teacher))
    return temperature**2 * (p.exp() * (p - q)).sum(1).mean()


def by_hand(net, teacher=None, start=0, end=99, alpha=0.5, temperature=4.0, epochs=2, accumulate=1):
    """Nothing of ours. Without a teacher, a copy as it is at ``start``."""
    optimizer = net.configure_optimizers()["optimizer"]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    done = 0
    for _ in range(epochs):
        for i, (x, y, _) in enumerate(loader(shuffle=False)):
            if teacher is None and done == start:
                teacher = copy.deepcopy(net).eval()
            loss, logits = None, net(x)
            loss = F.cross_entropy(logits, y)
            if start <= done < end:
                with torch.no_grad():
                    said = teacher(x)
                loss = (1 - alpha) * loss + alpha * divergence(logits, said, temperature)
            (loss / accumulate).backward()
            if (i + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                done += 1
        scheduler.step()
    return net


def close(first, second):
    for key, value in first.state_dict().items():
        torch.testing.assert_close(value, second.state_dict()[key], rtol=1e-4, atol=1e-6)


def trained(seed=3, epochs=10):
    return fit(None, seed=seed, max_epochs=epochs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 1.0, "temperature": 1.0},
        {"start": 3},
        {"start": 0.5},
        {"end": 5},
        {"start": 2, "end": 6, "alpha": 0.9},
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_equals_a_loop_by_hand(options, given):
    teacher = trained() if given else None
    made = KnowledgeDistillation(**options, **({"teacher": teacher} if given else {}))
    found = fit([made], PlainNet, loader(shuffle=False))
    torch.manual_seed(0)
    times = {key: int(8 * value) if isinstance(value, float) and key == "start" else value
             for key, value in options.items()}  # fmt: skip
    close(found, by_hand(PlainNet(), teacher=copy.deepcopy(teacher).eval() if given else None, **times))
    assert not same(found, fit(None, PlainNet, loader(shuffle=False)))


def test_accumulated_batches_count_optimizer_steps():
    found = fit([KnowledgeDistillation(start=1)], PlainNet, loader(shuffle=False), accumulate_grad_batches=2)
    torch.manual_seed(0)
    close(found, by_hand(PlainNet(), start=1, accumulate=2))


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"alpha": 0.0, "features": []}])
def test_off_is_off(options):
    assert KnowledgeDistillation(**options).off
    assert same(fit([KnowledgeDistillation(**options)]), fit())


class Drawing(nn.Module):
    """A teacher that draws, logs nothing and is handed over in training mode."""

    def __init__(self, net, draws):
        super().__init__()
        self.net, self.draws = net, draws

    def forward(self, x):
        if self.draws:
            torch.rand(5)
        return self.net(x)


def test_the_teacher_leaves_no_trace():
    teacher = trained().train()
    before, flags = copy.deepcopy(teacher.state_dict()), [p.requires_grad for p in teacher.parameters()]
    results = [fit([KnowledgeDistillation(Drawing(teacher, draws))]) for draws in (True, False)]
    assert same(*results)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert [p.requires_grad for p in teacher.parameters()] == flags
    assert teacher.training
    assert results[0].state_dict().keys() == PlainNet().state_dict().keys()
    count = sum(len(group["params"]) for group in results[0].fitted.optimizers[0].param_groups)
    assert count == len(list(PlainNet().parameters()))


class Looking(nn.Module):
    """A teacher that keeps what it saw."""

    def __init__(self):
        super().__init__()
        self.net, self.seen, self.modes = nn.Linear(FEATURES, CLASSES), [], []

    def forward(self, x):
        self.seen.append(x.clone())
        self.modes.append((self.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return self.net(x)

    def __deepcopy__(self, memo):  # so that the test sees the copy's eyes
        made = Looking()
        made.load_state_dict(self.state_dict())
        made.seen, made.modes = self.seen, self.modes
        return made


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_the_teacher_sees_the_attacked_inputs_as_the_student_does(precision):
    trainees, teacher = [], Looking()

    class Kept(PlainNet):
        def training_step(self, batch, batch_idx):
            trainees.append(batch[0].clone())
            return super().training_step(batch, batch_idx)

    attack = AdversarialTraining(eps=0.1, steps=2, bounds=(0.0, 1.0))
    fit([attack, KnowledgeDistillation(teacher)], Kept, precision=precision)
    assert len(teacher.seen) == len(trainees) == 8
    assert all(torch.equal(a, b) for a, b in zip(teacher.seen, trainees, strict=True))
    assert not any(torch.equal(a, x[0]) for a in teacher.seen for x in loader(shuffle=False))
    assert set(teacher.modes) == {(False, False, precision != "32")}


def test_a_checkpoint_teaches_as_the_module_in_it(tmp_path):
    teacher = trained()
    teacher.fitted.save_checkpoint(tmp_path / "teacher.ckpt")
    torch.save(teacher.state_dict(), tmp_path / "weights.pt")
    expected = fit([KnowledgeDistillation(teacher)])
    for path in ("teacher.ckpt", "weights.pt"):
        assert same(fit([KnowledgeDistillation(str(tmp_path / path))]), expected)


def test_a_compressed_checkpoint_teaches_too(tmp_path):
    for guard in (ChannelPruning(0.5, round_to=4), LowRankFactorization(2)):
        teacher = fit([guard], max_epochs=4)
        teacher.fitted.save_checkpoint(tmp_path / "teacher.ckpt")
        assert same(fit([KnowledgeDistillation(str(tmp_path / "teacher.ckpt"))]), fit([KnowledgeDistillation(teacher)]))


@pytest.mark.parametrize("start", [0.0, 0.5])
@pytest.mark.parametrize("rewriter", [lambda t: ChannelPruning(0.5, round_to=4, start=t),
                                      lambda t: LowRankFactorization(2, start=t)])  # fmt: skip
def test_the_dense_copy_is_dense(start, rewriter):
    made = KnowledgeDistillation(start=start)
    student = fit([made, rewriter(start)], max_epochs=4)
    sizes = [sum(p.numel() for p in one.parameters()) for one in (made._teacher, PlainNet(), student)]
    assert sizes[0] == sizes[1] > sizes[2]
    assert type(made._teacher) is PlainNet


def test_resume_with_the_same_teacher_is_bitwise_and_with_another_refused(tmp_path):
    data, teacher, other = loader(shuffle=False), trained(), trained(seed=4)

    class Rewound(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            torch.manual_seed(trainer.global_step)

    def on(who):
        return [Rewound(), KnowledgeDistillation(who, features={"net.0": "net.0"}, start=2)]

    kept = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
    whole = fit([*on(teacher), kept], data=data, max_epochs=3, enable_checkpointing=True)
    assert same(fit(on(teacher), data=data, max_epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt", seed=1), whole)
    state = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["lightning_guard"]["guards"]["distillation"]
    assert "weights" not in state
    with pytest.raises(GuardConflict, match="another teacher"):
        fit(on(other), data=data, max_epochs=3, ckpt_path=tmp_path / "epoch=0.ckpt")


def test_a_dense_copy_of_a_checkpoint_that_an_unguarded_training_left(tmp_path):
    teacher = fit(max_epochs=2)
    teacher.fitted.save_checkpoint(tmp_path / "dense.ckpt")
    made = KnowledgeDistillation()
    fit([made], ckpt_path=tmp_path / "dense.ckpt", max_epochs=4, seed=1)
    assert same(made._teacher, teacher)


# Features ----------------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, 16), nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.last(self.first(x).relu())


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_features_equal_a_loop_by_hand(alpha):
    torch.manual_seed(5)
    teacher, data = Wide(), loader(shuffle=False)
    made = KnowledgeDistillation(teacher, alpha=alpha, features={"net.0": "first"}, feature_weight=0.7)
    found = fit([made], lambda: PlainNet(norm=False), data)
    torch.manual_seed(0)
    net = PlainNet(norm=False)
    optimizer = net.configure_optimizers()["optimizer"]
    for epoch in range(2):
        for x, y, _ in data:
            features = []
            hook = net.net[0].register_forward_hook(lambda m, a, output, features=features: features.append(output))
            logits = net(x)
            hook.remove()
            loss = (1 - alpha) * F.cross_entropy(logits, y) + alpha * divergence(logits, teacher(x).detach(), 4.0)
            cosine = F.cosine_similarity(features[0], teacher.first(x).detach())
            optimizer.zero_grad()
            (loss + 0.7 * (2 - 2 * cosine).mean()).backward()
            optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        assert epoch < 2
    close(found, net)


def test_features_with_a_dense_copy_compiled_and_by_hand_optimised():
    made = KnowledgeDistillation(features=["net.0"])
    assert not same(fit([made]), fit([KnowledgeDistillation()]))

    class Manual(GuardMixin, ManualNet):
        def training_step(self, batch, batch_idx):
            step = self.guard_step(batch)
            logits = self(step.inputs)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.guard_loss(step, F.cross_entropy(logits, step.target), logits))
            optimizer.step()

    found = [fit([KnowledgeDistillation(features=names)], Manual) for names in (["net.0"], None)]
    assert not same(*found)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (["nothing"], "'nothing' names no layer of the model; it has net"),
        ({"net.0": "nothing"}, "'nothing' names no layer of the teacher"),
        ({"net.0": "last"}, r"shape \(16, 16\).*shape \(16, 3\)"),
    ],
)
def test_features_that_do_not_fit_are_refused(features, message):
    with pytest.raises(GuardConflict, match=message):
        fit([KnowledgeDistillation(Wide(), features=features)])


def test_a_layer_that_is_called_twice_is_refused():
    class Twice(PlainNet):
        def forward(self, x):
            self.net[0](x)
            return super().forward(x)

    with pytest.raises(GuardConflict, match="called 2 times"):
        fit([KnowledgeDistillation(features=["net.0"])], Twice)


# Tasks -------------------------------------------------------------------------------------------------------------


class Single(pl.LightningModule):
    """One output an example."""

    def __init__(self, loss):
        super().__init__()
        self.net, self.loss = nn.Linear(FEATURES, 1), loss

    def forward(self, x):
        return self.net(x).squeeze(1)

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def single(scale):
    x = rows()[0]
    return DataLoader(TensorDataset(x, scale * (x[:, 0] > 0.5).float()), 16)


def test_one_logit_and_regression():
    bce, mse = F.binary_cross_entropy_with_logits, F.mse_loss
    teacher = fit(None, lambda: Single(bce), single(1), max_epochs=5, seed=1)
    found = fit([KnowledgeDistillation(teacher, temperature=1.0, alpha=1.0)], lambda: Single(bce), single(1))
    torch.manual_seed(0)
    net = Single(bce)
    optimizer = net.configure_optimizers()
    for x, _ in [*single(1), *single(1)]:  # cross-entropy with the teacher's answers has the same gradient
        optimizer.zero_grad()
        bce(net(x), teacher(x).sigmoid().detach()).backward()
        optimizer.step()
    close(found, net)
    with pytest.raises(GuardConflict, match=r"\[0, 5\].*loss='mse'"):
        fit([KnowledgeDistillation(teacher)], Single(mse), single(5))
    found = fit([KnowledgeDistillation(teacher, loss="mse")], lambda: Single(mse), single(5))
    torch.manual_seed(0)
    net = Single(mse)
    optimizer = net.configure_optimizers()
    for x, y in [*single(5), *single(5)]:
        optimizer.zero_grad()
        (0.5 * mse(net(x), y) + 0.5 * mse(net(x), teacher(x).detach())).backward()
        optimizer.step()
    close(found, net)


def test_labels_of_their_own():
    class Labels(PlainNet):
        def training_step(self, batch, batch_idx):
            return F.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    data = DataLoader(TensorDataset(rows()[0], (rows()[0][:, :CLASSES] > 0.5).float()), 16)
    teacher = Wide()
    found = fit([KnowledgeDistillation(teacher, alpha=1.0, temperature=1.0)], lambda: Labels(norm=False), data)
    torch.manual_seed(0)
    net = Labels(norm=False)
    optimizer = net.configure_optimizers()["optimizer"]
    for epoch in range(2):
        for x, _ in data:
            p, z = teacher(x).sigmoid().detach(), net(x)
            optimizer.zero_grad()  # cross-entropy with the teacher's answers has the gradient of the divergence
            F.binary_cross_entropy_with_logits(z, p, reduction="sum").div(len(x)).backward()
            optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        assert epoch < 2
    close(found, net)


# What is refused or said ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"loss": "l1"}, "loss='l1'"),
        ({"feature_weight": 0.0}, "feature_weight=0.0"),
        ({"start": 1.5}, "start=1.5"),
        ({"start": 0.8, "end": 0.5}, "start=0.8.*end=0.5"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        KnowledgeDistillation(**options)


def test_runs_that_cannot_be_taught_are_refused(tmp_path):
    for made, options, message in (
        (KnowledgeDistillation(str(tmp_path / "none.ckpt")), {}, "is no file"),
        (KnowledgeDistillation(start=9), {"max_steps": 9, "max_epochs": -1}, "start=9 comes after"),
        (KnowledgeDistillation(start=0.5), {"max_epochs": -1}, "training without end"),
        (KnowledgeDistillation(nn.ReLU()), {}, "has no parameters"),
        (KnowledgeDistillation(nn.Linear(FEATURES, 5)), {}, r"shape \(16, 3\).*shape \(16, 5\)"),
    ):
        with pytest.raises(GuardConflict, match=message):
            fit([made], **options)
    torch.save({"other": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(GuardConflict, match="does not fit PlainNet"):
        fit([KnowledgeDistillation(str(tmp_path / "other.pt"))])


def test_layers_made_by_configure_model_cannot_be_copied_before():
    class Late(PlainNet):
        def __init__(self):
            super().__init__()
            self.made, self.net = self.net, None

        def configure_model(self):
            if self.net is None:
                self.net, self.made = self.made, None

    with pytest.raises(GuardConflict, match="configure_model"):
        fit([KnowledgeDistillation()], Late)
    assert not same(fit([KnowledgeDistillation(start=2)], Late), fit(None, Late))


def test_inputs_that_the_step_changes_are_refused():
    class Scaling(PlainNet):
        def training_step(self, batch, batch_idx):
            return super().training_step((2 * batch[0] - 1, batch[1]), batch_idx)

    with pytest.raises(GuardConflict, match="changes the inputs"):
        fit([KnowledgeDistillation()], Scaling)

    class Described(GuardMixin, Scaling):
        def guard_forward(self, inputs):
            return self(2 * inputs - 1)

    teacher = fit(None, Described, seed=3)
    assert same(
        fit([KnowledgeDistillation(teacher)], Described), fit([KnowledgeDistillation(teacher)], lambda: Described())
    )


def test_the_logits_of_a_named_part():
    class Probable(PlainNet):
        def forward(self, x):
            return self.net(x).softmax(1)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    teacher = fit(None, Probable, seed=3)
    named = fit([KnowledgeDistillation(teacher, batch=Batch(logits="net"))], Probable)
    plain = fit([KnowledgeDistillation(teacher.net, batch=Batch(logits="net"))], Probable)
    assert same(named, plain)


def test_private_rows_in_a_teacher_are_refused_under_privacy(monkeypatch):
    monkeypatch.setattr(toys, "BATCH_NORM", False)

    def private():
        return DPSGD(delta=1e-3, noise_multiplier=0.5, test_seed=1)

    teacher = trained()
    with pytest.raises(GuardConflict, match="private data leave"):
        fit([private(), KnowledgeDistillation(teacher)])
    for allowed in (KnowledgeDistillation(teacher, public=True), KnowledgeDistillation(start=0.5)):
        assert not same(fit([private(), allowed]), fit([private()]))
        assert allowed.state()["counts"] is None  # no count of private rows leaves
        assert allowed.notes() == []


def test_a_teacher_that_knows_nothing_is_said_and_one_that_does_is_not(recwarn):
    ignorant = KnowledgeDistillation()
    with pytest.warns(UserWarning, match="nothing to learn from it; give a later start"):
        fit([ignorant])
    assert "Give" not in ignorant.notes()[0]
    assert "most frequent answer" in ignorant.notes()[0]
    knowing = KnowledgeDistillation(trained(epochs=20))
    recwarn.clear()
    fit([knowing])
    assert not [w for w in recwarn if "nothing to learn" in str(w.message)]
    assert knowing.notes() == []


def test_training_that_ends_before_the_start_is_said():
    with pytest.warns(UserWarning, match="before start=50"):
        fit([KnowledgeDistillation(start=50)])


def test_figures_are_logged():
    made = fit([KnowledgeDistillation(trained(), features=["net.0"])])
    logged = made.fitted.callback_metrics
    assert logged["guard/distillation/active"] == 1
    assert logged["guard/distillation/divergence"] > 0
    assert 0 < logged["guard/distillation/features"] < 4


def test_a_taught_student_agrees_more_with_its_teacher():
    teacher, x = trained(epochs=20), rows()[0]
    taught = fit([KnowledgeDistillation(teacher, alpha=1.0, temperature=2.0)], max_epochs=10).eval()
    alone = fit(max_epochs=10).eval()
    teacher.eval()
    gaps = [divergence(net(x), teacher(x), 2.0).item() for net in (taught, alone)]
    assert gaps[0] < gaps[1]
