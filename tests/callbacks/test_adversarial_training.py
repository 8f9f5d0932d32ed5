"""Adversarial training against loops written by hand."""

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_guard.batch import Batch
from lightning_guard.callbacks import DPSGD, AdversarialTraining, MagnitudePruning
from lightning_guard.functional import ThreatModel, pgd, stream
from lightning_guard.functional.collapse import Collapse
from lightning_guard.guard import GuardConflict
from lightning_guard.mixins import GuardMixin
from tests.toys import Data, ManualNet, PlainNet, Rows, fit, loader, rows, same, trainer

EPS, STEPS, ALPHA = 0.1, 3, 0.04


def by_hand(net, epochs=2, accumulate=1, norm="linf", bf16=False, batch_size=16):
    """Madry's loop with nothing of ours but the numbers of the random start. Dropout and BatchNorm included."""
    optimizer = net.configure_optimizers()["optimizer"]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    data, step, seed = loader(batch_size=batch_size, shuffle=False), 0, 0
    for _ in range(epochs):
        for i, (x, y, _) in enumerate(data):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                net.eval()
                generator = stream(seed, step, 0)
                if norm == "linf":
                    noise = torch.rand(x.shape, generator=generator) * 2 - 1
                    moved = (x + EPS * noise).clamp(0, 1)
                    moved = torch.min(torch.max(moved, x - EPS), x + EPS).clamp(0, 1)
                else:
                    noise = torch.randn(x.shape, generator=generator)
                    radius = torch.rand(len(x), generator=generator) ** (1 / x[0].numel())
                    moved = (x + noise / noise.norm(dim=1, keepdim=True) * EPS * radius[:, None]).clamp(0, 1)
                for _ in range(STEPS):
                    moved = moved.detach().requires_grad_()
                    loss = F.cross_entropy(net.net(moved).float(), y, reduction="sum")
                    (g,) = torch.autograd.grad(loss, moved)
                    if norm == "linf":
                        moved = moved.detach() + ALPHA * g.sign()
                        moved = torch.min(torch.max(moved, x - EPS), x + EPS).clamp(0, 1)
                    else:
                        moved = moved.detach() + ALPHA * g / g.norm(dim=1, keepdim=True)
                        delta = moved - x
                        moved = (x + delta * (EPS / delta.norm(dim=1, keepdim=True)).clamp_max(1)).clamp(0, 1)
                net.train()
                loss = F.cross_entropy(net(moved.detach()), y)
            (loss / accumulate).backward()
            step += 1
            if (i + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
        scheduler.step()
    return net


def on(**options):
    return AdversarialTraining(**{"eps": EPS, "steps": STEPS, "step_size": ALPHA, "bounds": (0.0, 1.0), **options})


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("bf16", [False, True])
def test_bit_identical_to_a_loop_by_hand(accumulate, bf16):
    torch.manual_seed(0)
    expected = by_hand(PlainNet(), accumulate=accumulate, bf16=bf16)
    found = fit(
        [on()],
        PlainNet,
        loader(shuffle=False),
        accumulate_grad_batches=accumulate,
        precision="bf16-mixed" if bf16 else "32",
    )
    assert same(found, expected)  # weights, BatchNorm statistics and its counter of batches


def test_l2_equals_a_loop_by_hand():
    torch.manual_seed(0)
    expected = by_hand(PlainNet(), norm="l2")
    found = fit([on(norm="l2")], PlainNet, loader(shuffle=False))
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_attack_leaves_no_trace():
    class Watching(PlainNet):
        def __init__(self):
            super().__init__()
            self.passes = 0

        def forward(self, x):
            self.passes += self.training
            return super().forward(x)

    guarded, plain = fit([on()], Watching), fit(None, Watching)
    assert guarded.passes == plain.passes  # passes in train mode: the step's own only
    assert guarded.net[1].num_batches_tracked == plain.net[1].num_batches_tracked == 8


def _rng_after(callbacks):
    fit(callbacks)
    return torch.get_rng_state()


def test_global_random_numbers_are_those_of_the_unguarded_run():
    assert _rng_after([on()]).equal(_rng_after(None))


def test_metrics_count_the_training_pass_alone():
    class Counting(PlainNet):
        def on_train_epoch_end(self):
            self.seen = int(sum(self.accuracy._final_state()[0] + self.accuracy._final_state()[3]))

    class InForward(Counting):
        """Updates its metric in forward, which the attack runs too."""

        def forward(self, x):
            logits = super().forward(x)
            self.accuracy.update(logits, logits.argmax(1))
            return logits

    assert fit([on()], Counting).seen == fit(None, Counting).seen
    assert fit([on()], InForward).seen == fit(None, InForward).seen


def test_grads_are_untouched_while_attacking():
    class Grads(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            for p in module.parameters():
                p.grad = torch.full_like(p, 7.0)

    class Checking(PlainNet):
        def training_step(self, batch, batch_idx):
            assert all((p.grad == 7).all() for p in self.parameters())
            return super().training_step(batch, batch_idx)

    fit([Grads(), on()], Checking)


def test_modes_are_restored_even_where_frozen():
    class Frozen(PlainNet):
        def on_train_start(self):
            self.net[1].eval()

        def training_step(self, batch, batch_idx):
            assert not self.net[1].training
            assert self.net[3].training
            return super().training_step(batch, batch_idx)

    fit([on()], Frozen)


def test_normalised_inputs_take_eps_in_the_users_units():
    mean, std = [0.5] * 6, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    seen = []

    class Seeing(PlainNet):
        def training_step(self, batch, batch_idx):
            seen.append(batch[0])
            return super().training_step(batch, batch_idx)

    data = loader(shuffle=False)
    data.dataset.data = ((data.dataset.data[0] - 0.5) / torch.tensor(std), *data.dataset.data[1:])
    fit([on(mean=mean, std=std)], Seeing, data, max_epochs=1)
    moved = (torch.cat(seen) - data.dataset.data[0]) * torch.tensor(std)
    assert moved.abs().max() <= EPS + 1e-6
    assert moved.abs().mean() > EPS / 2
    raw = torch.cat(seen) * torch.tensor(std) + 0.5
    assert raw.min() >= -1e-6
    assert raw.max() <= 1 + 1e-6


@pytest.mark.parametrize("warmup", [0.5, 4])
def test_the_radius_grows_to_eps(warmup):
    moved = []

    class Seeing(PlainNet):
        def training_step(self, batch, batch_idx):
            moved.append((batch[0] - rows()[0][batch_idx * 16 : batch_idx * 16 + 16]).abs().max().item())
            return super().training_step(batch, batch_idx)

    fit([on(warmup=warmup, step_size=None)], Seeing, loader(shuffle=False))
    assert moved == pytest.approx([EPS * min(1, t / 4) for t in range(1, 9)], rel=1e-3)


def test_inputs_outside_the_bounds_are_refused_with_their_range():
    with pytest.raises(GuardConflict, match=r"range over \[0\..*bounds=\(0.0, 0.5\)"):
        fit([on(bounds=(0.0, 0.5))])


def test_inputs_that_are_no_floats_are_refused():
    class Whole(Rows):
        def __getitem__(self, i):
            return torch.tensor([i]), torch.tensor(0)

    with pytest.raises(GuardConflict, match="floating-point"):
        fit([on()], data=torch.utils.data.DataLoader(Whole(), 4))


def test_a_loss_of_the_modules_own():
    called = []

    class Own(GuardMixin, PlainNet):
        def guard_losses(self, logits, target):
            called.append(len(target))
            return F.cross_entropy(logits, target, reduction="none")

    assert same(fit([on()], Own), fit([on()], PlainNet))
    assert called


def test_a_named_submodule_gives_the_logits():
    class NoForward(PlainNet):
        def forward(self, x):
            return {"embedding": self.net(x)}

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    with pytest.raises(GuardConflict, match="Batch\\(logits"):
        fit([on()], NoForward)
    fit([on(batch=Batch(logits="net"))], NoForward)


def test_binary_with_one_logit():
    class Binary(PlainNet):
        def __init__(self):
            super().__init__()
            self.net[4] = nn.Linear(16, 1)

        def training_step(self, batch, batch_idx):
            return F.binary_cross_entropy_with_logits(self(batch[0])[:, 0], (batch[1] > 0).float())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    data = loader()
    data.dataset.data = (data.dataset.data[0], (data.dataset.data[1] > 0).long(), data.dataset.data[2])
    assert not same(fit([on()], Binary, data), fit(None, Binary, data))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -1.0}, "eps=-1"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"norm": "l7"}, "norm='l7'"),
        ({"method": "magic"}, "method='magic'"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 0, "method": "fgsm"}, "steps=0"),
        ({"step_size": 0.0}, "step_size=0"),
        ({"warmup": 1.5}, "warmup=1.5"),
        ({"bounds": (1.0, 0.0)}, "bounds="),
        ({"std": [0.5, 0.0]}, "std="),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        on(**options)


def test_acts_where_it_should():
    """On data that a small perturbation ruins, guarded training keeps accuracy under attack and unguarded does not."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (512,), generator=generator)
    strong = (2 * y - 1)[:, None] * 0.3 + 0.3 * torch.randn(512, 1, generator=generator)
    weak = (2 * y - 1)[:, None] * 0.05 + 0.05 * torch.randn(512, 40, generator=generator)  # predictive, easily undone
    x = torch.cat([strong, weak], 1)

    class Linear(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(41, 2)

        def forward(self, x):
            return self.layer(x)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.05)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 64, shuffle=True)
    threat = ThreatModel(eps=0.1)

    def robust(net):
        moved = pgd(lambda z: F.cross_entropy(net(z), y, reduction="none"), x, threat, steps=20)
        return (net(moved).argmax(1) == y).float().mean()

    plain, guarded = (
        fit(None, Linear, data, max_epochs=10),
        fit([AdversarialTraining(eps=0.1)], Linear, data, max_epochs=10),
    )
    assert robust(plain) < 0.4
    assert robust(guarded) > 0.7


def test_a_warmup_that_training_does_not_outlast_is_refused_or_said():
    with pytest.raises(GuardConflict, match="warmup=99 ends after"):
        fit([AdversarialTraining(0.1, warmup=99)], max_steps=8, max_epochs=-1)
    with pytest.warns(UserWarning, match="training ended within warmup=99"):
        fit([AdversarialTraining(0.1, warmup=99)])


def test_regression_is_refused():
    class Regression(PlainNet):
        def forward(self, x):
            return super().forward(x)[:, :1]

        def training_step(self, batch, batch_idx):
            return F.mse_loss(self(batch[0])[:, 0], batch[1].float())

    with pytest.raises(ValueError, match="no classification"):
        fit([AdversarialTraining(0.1)], Regression)


def test_an_index_beyond_the_inputs_is_refused():
    with pytest.raises(GuardConflict, match=r"mutable=\[17\]"):
        fit([AdversarialTraining(0.1, mutable=[17])])


# Every method against its own loop by hand, with dropout and BatchNorm ---------------------------------------------


def box(moved, x):
    return torch.min(torch.max(moved, x - EPS), x + EPS).clamp(0, 1)


def climbed(net, x, loss, generator, steps=STEPS, alpha=ALPHA, start=True):
    """Madry's attack in eval mode; ``loss`` takes logits."""
    moved = x
    if start:
        moved = box((x + EPS * (torch.rand(x.shape, generator=generator) * 2 - 1)).clamp(0, 1), x)
    for _ in range(steps):
        moved = moved.detach().requires_grad_()
        (g,) = torch.autograd.grad(loss(net.net(moved)).sum(), moved)
        moved = box(moved.detach() + alpha * g.sign(), x)
    return moved.detach()


def kl(clean, moved):
    return F.kl_div(moved.log_softmax(1), clean.log_softmax(1), reduction="none", log_target=True).sum(1)


def ce(y):
    return lambda logits: F.cross_entropy(logits, y, reduction="none")


class Aside:
    """A pass in train mode that draws its own dropout; ``buffers`` puts BatchNorm's statistics back."""

    def __init__(self, net, step, buffers=False):
        self.net, self.step, self.buffers = net, step, buffers

    def __enter__(self):
        self.state = torch.get_rng_state()
        self.kept = [b.clone() for b in self.net.buffers()]
        torch.manual_seed(stream(0, self.step, 0, 2).initial_seed())

    def __exit__(self, *error):
        torch.set_rng_state(self.state)
        if self.buffers:
            for b, was in zip(self.net.buffers(), self.kept, strict=True):
                b.copy_(was)


def moved_weights(net, loss, gamma):
    """Wu et al.'s step up the gradient, by layer; returns what puts it back."""
    weights = [p for p in net.parameters() if p.dim() > 1]
    kept = [p.detach().clone() for p in weights]
    for p, g in zip(weights, torch.autograd.grad(loss, weights), strict=True):
        g = g / g.abs().max()  # the direction is what counts
        with torch.no_grad():
            p.add_(g * (gamma * p.norm() / g.norm()))

    def back():
        with torch.no_grad():
            for p, was in zip(weights, kept, strict=True):
                p.copy_(was)

    return back


def one_step(net, step, x, y, method, objective, awp, beta, share):
    """The loss of one micro-batch, and what to call after its backward pass."""
    net.eval()
    generator = stream(0, step, 0)
    if objective == "trades":
        with torch.no_grad():
            clean = net.net(x)
        attacked = climbed(net, x, lambda logits: kl(clean, logits), generator)
    elif method == "n_fgsm":
        moved = (x + 2 * EPS * (torch.rand(x.shape, generator=generator) * 2 - 1)).clamp(0, 1).requires_grad_()
        (g,) = torch.autograd.grad(ce(y)(net.net(moved)).sum(), moved)
        attacked = (moved.detach() + ALPHA * g.sign()).clamp(0, 1)
    else:
        attacked = climbed(net, x, ce(y), generator, steps=1 if method == "fgsm" else STEPS)
    net.train()
    back = None
    if awp:
        with Aside(net, step, buffers=True):
            loss = ce(y)(there := net.net(attacked))
            if objective == "trades":
                loss = ce(y)(here := net.net(x)) + beta * kl(here, there)
            back = moved_weights(net, loss.sum(), awp)
    logits = net(x if objective == "trades" else attacked)
    loss = F.cross_entropy(logits, y)
    if objective != "adversarial":
        with Aside(net, step):
            other = net.net(attacked if objective == "trades" else x)
    if objective == "trades":
        loss = loss + beta * kl(logits, other).mean()
    if objective == "mixed":
        loss = (1 - share) * loss + share * ce(y)(other).mean()
    if objective == "mart":
        wrong = logits.softmax(1).scatter(1, y[:, None], 0).argmax(1)
        margin = logits.logsumexp(1) - logits.scatter(1, wrong[:, None], -torch.inf).logsumexp(1)  # -log(1 - p_wrong)
        sure = other.softmax(1)[torch.arange(len(y)), y]
        loss = loss + margin.mean() + beta * (kl(other, logits) * (1 - sure)).mean()
    return loss, back


def any_by_hand(method="pgd", objective="adversarial", awp=0.0, accumulate=1, beta=2.0, share=0.3, epochs=2):
    torch.manual_seed(0)
    net = PlainNet()
    optimizer = net.configure_optimizers()["optimizer"]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    step = 0
    for _ in range(epochs):
        for i, (x, y, _) in enumerate(loader(shuffle=False)):
            loss, back = one_step(net, step, x, y, method, objective, awp, beta, share)
            (loss / accumulate).backward()
            if back:
                back()
            step += 1
            if (i + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
        scheduler.step()
    return net


FORMS = {
    "fgsm": {"method": "fgsm"},
    "n_fgsm": {"method": "n_fgsm"},
    "trades": {"objective": "trades"},
    "mart": {"objective": "mart"},
    "mixed": {"objective": "mixed"},
    "awp": {"awp": 0.02},
    "trades with awp": {"objective": "trades", "awp": 0.02},
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_every_method_is_bit_identical_to_its_loop_by_hand(form, accumulate):
    expected = any_by_hand(**FORMS[form], accumulate=accumulate)
    guard = on(**FORMS[form], beta=2.0, clean_weight=0.3)
    found = fit([guard], PlainNet, loader(shuffle=False), accumulate_grad_batches=accumulate)
    assert same(found, expected)  # weights, BatchNorm statistics and its counter of batches
    assert not same(found, fit([on()], PlainNet, loader(shuffle=False), accumulate_grad_batches=accumulate))


def free_by_hand(accumulate, replays=3, epochs=2):
    """Shafahi et al.'s loop: the perturbation outlives its batch, the gradient is that of training."""
    torch.manual_seed(0)
    net = PlainNet()
    optimizer = net.configure_optimizers()["optimizer"]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for _ in range(epochs):
        delta, step = torch.zeros(16, 6), 0
        for x, y, _ in loader(shuffle=False):
            for _ in range(replays):
                moved = box(x + delta, x).requires_grad_()
                (F.cross_entropy(net(moved), y) / accumulate).backward()
                delta = box(moved.detach() + ALPHA * moved.grad.sign(), x) - x
                step += 1
                if step % accumulate == 0:
                    optimizer.step()
                    optimizer.zero_grad()
        scheduler.step()
    return net


@pytest.mark.parametrize("accumulate", [1, 2])
def test_free_training_is_bit_identical_to_its_loop_by_hand(accumulate):
    expected = free_by_hand(accumulate)
    guard = on(method="free", collapse="ignore")
    found = fit([guard], PlainNet, loader(shuffle=False), accumulate_grad_batches=accumulate)
    assert same(found, expected)
    assert found.fitted.num_training_batches == 12  # of 4
    assert same(fit([on(method="free")], PlainNet, loader(shuffle=False), accumulate_grad_batches=accumulate), found)


# Weights that are moved come back ----------------------------------------------------------------------------------


class Looking(PlainNet):
    """Keeps its weights as training_step meets them, and as they are between steps."""

    def __init__(self, failing=""):
        super().__init__()
        self.failing, self.inside, self.between = failing, [], []

    def training_step(self, batch, batch_idx):
        self.inside.append(self.net[0].weight.detach().clone())
        if self.failing == "step" and batch_idx == 2:
            raise RuntimeError("stop")
        if self.failing == "none" and batch_idx == 2:
            return None
        return super().training_step(batch, batch_idx)

    def on_train_batch_start(self, batch, batch_idx):
        self.between.append(self.net[0].weight.detach().clone())

    def on_before_backward(self, loss):
        if self.failing == "backward" and len(self.inside) == 3:
            raise RuntimeError("stop")

    def on_after_backward(self):
        assert torch.equal(self.net[0].weight, self.between[-1])


def test_weights_stand_elsewhere_during_the_step_only():
    net = fit([on(awp=0.05)], Looking)
    for inside, between in zip(net.inside, net.between, strict=True):
        assert (inside - between).norm().item() == pytest.approx(0.05 * between.norm().item(), rel=1e-4)


@pytest.mark.parametrize("failing", ["step", "backward", "none"])
@pytest.mark.parametrize("objective", ["adversarial", "trades"])
def test_weights_come_back_whatever_happens(failing, objective, tmp_path):
    net, stored = Looking(failing), OnExceptionCheckpoint(tmp_path)
    run = trainer(
        [stored, on(awp=0.05, objective=objective)], max_epochs=1, limit_train_batches=3, enable_checkpointing=True
    )
    if failing == "none":
        run.fit(net, loader())
        assert not torch.equal(net.inside[2], net.between[2])  # it was moved
        assert torch.equal(net.net[0].weight, net.between[2])
        return
    with pytest.raises(RuntimeError, match="stop"):
        run.fit(net, loader())
    assert not torch.equal(net.inside[2], net.between[2])
    assert torch.equal(net.net[0].weight, net.between[2])
    file = torch.load(next(tmp_path.glob("*.ckpt")), weights_only=True)["state_dict"]
    assert torch.equal(file["net.0.weight"], net.between[2])


# Extra training passes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["trades", "mart", "mixed"])
def test_an_extra_pass_is_counted_by_batch_norm_and_by_nothing_else(form):
    class Counting(PlainNet):
        def on_train_epoch_end(self):
            self.seen = int(sum(self.accuracy._final_state()[0] + self.accuracy._final_state()[3]))

        def forward(self, x):
            self.log("calls", 1.0, reduce_fx="sum", on_step=False, on_epoch=True)
            return super().forward(x)

    plain, guarded = fit(None, Counting), fit([on(objective=form)], Counting)
    assert guarded.net[1].num_batches_tracked == 2 * plain.net[1].num_batches_tracked
    assert guarded.seen == plain.seen
    assert guarded.fitted.callback_metrics["calls"] == plain.fitted.callback_metrics["calls"]
    assert _rng_after([on(objective=form)]).equal(_rng_after(None))


def test_trades_leaves_the_users_step_the_clean_batch():
    seen = []

    class Seeing(PlainNet):
        def training_step(self, batch, batch_idx):
            seen.append(batch[0])
            return super().training_step(batch, batch_idx)

    data = loader(shuffle=False)
    fit([on(objective="trades")], Seeing, data, max_epochs=1)
    assert torch.equal(torch.cat(seen), data.dataset.data[0])


@pytest.mark.parametrize("objective", ["trades", "mart"])
def test_one_logit_and_several_labels(objective):
    class Own(PlainNet):
        outputs = 1

        def __init__(self):
            super().__init__(norm=False)
            self.net[4 - 1] = nn.Linear(16, self.outputs)

        def training_step(self, batch, batch_idx):
            logits = self(batch[0])
            return F.binary_cross_entropy_with_logits(logits, batch[1].float().reshape(logits.shape))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    class Labels(Own):
        outputs = 2

    x, y, _ = rows()
    one = DataLoader(TensorDataset(x, (y > 0).long()), 16)
    assert not same(fit([on(objective=objective)], Own, one), fit([on()], Own, one))
    several = DataLoader(TensorDataset(x, torch.stack([y > 0, y > 1], 1).float()), 16)
    if objective == "mart":
        with pytest.raises(GuardConflict, match="objective='mart': mart needs one class"):
            fit([on(objective=objective)], Labels, several)
    else:
        assert not same(fit([on(objective=objective)], Labels, several), fit([on()], Labels, several))


def test_trades_for_regression_is_refused_by_kl_and_bit_identical_by_squares():
    class Regression(PlainNet):
        def __init__(self):
            super().__init__(norm=False)
            self.net[2], self.net[3] = nn.Identity(), nn.Linear(16, 1)

        def training_step(self, batch, batch_idx):
            return F.mse_loss(self(batch[0])[:, 0], batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    x = rows()[0]
    y = 3 * x[:, 0] - 1
    data = DataLoader(TensorDataset(x, y), 16)
    with pytest.raises(GuardConflict, match="divergence='squared'"):
        fit([on(objective="trades")], Regression, data)
    found = fit([on(objective="trades", divergence="squared", beta=2.0)], Regression, data, max_epochs=1)
    torch.manual_seed(0)
    net = Regression()
    optimizer = net.configure_optimizers()
    for step, (x, y) in enumerate(data):
        clean = net.net(x).detach()
        moved = climbed(net, x, lambda out, clean=clean: (clean - out).square().sum(1), stream(0, step, 0))
        out = net.net(x)
        loss = F.mse_loss(out[:, 0], y) + 2.0 * (out - net.net(moved)).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert same(found, net)


# Free training -----------------------------------------------------------------------------------------------------


def test_free_training_resumes_within_an_epoch_and_keeps_to_the_threat():
    x, threat = torch.rand(8, 6), ThreatModel(EPS, bounds=(0.0, 1.0))
    seen = []

    class Seeing(PlainNet):
        def training_step(self, batch, batch_idx):
            seen.append(batch[0].detach().clone())
            return super().training_step(batch, batch_idx)

    data = DataLoader(TensorDataset(x, torch.zeros(8, dtype=torch.long)), 5)
    fit([on(method="free")], Seeing, data, max_epochs=1)
    assert [len(one) for one in seen] == [5, 5, 5, 3, 3, 3]
    assert torch.equal(seen[0], x[:5])  # a run begins with the clean batch
    assert not torch.equal(seen[3], x[5:])  # and later batches where the ones before them ended
    for one, clean in zip(seen, [x[:5]] * 3 + [x[5:]] * 3, strict=True):
        assert threat.contains(one, clean).all()


def test_replayed_loaders_keep_their_samplers_and_workers():
    from lightning_guard.functional.replays import replayed

    data = Rows()
    sampler = torch.utils.data.DistributedSampler(data, num_replicas=2, rank=0)
    again = replayed(DataLoader(data, 8, sampler=sampler, drop_last=True), 3)
    assert again.sampler is sampler
    assert isinstance(again, DataLoader)
    assert len(again) == 12
    assert len(list(again)) == 12
    sampler.set_epoch(1)
    first = next(iter(again))[0]
    sampler.set_epoch(2)
    assert not torch.equal(first, next(iter(again))[0])


def test_free_training_needs_a_data_loader():
    with pytest.raises(GuardConflict, match="give a DataLoader"):
        fit([on(method="free")], PlainNet, [(torch.rand(4, 6), torch.zeros(4, dtype=torch.long))])


# Robust accuracy on validation data --------------------------------------------------------------------------------


def robust_accuracy(net, x, y, seed=0, batch=0, steps=10):
    net.eval()
    threat = ThreatModel(EPS, bounds=(0.0, 1.0))
    moved = pgd(lambda z: ce(y)(net.net(z)), x, threat, steps, generator=stream(seed, batch, 0, 4))
    return (net.net(moved).argmax(1) == y).float()


def test_robust_accuracy_is_logged_and_training_is_as_without():
    class Keeping(PlainNet):
        def on_train_start(self):
            self.found = []

        def on_validation_epoch_end(self):
            if not self.trainer.sanity_checking:
                self.found.append({key: p.clone() for key, p in self.state_dict().items()})

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return loader(shuffle=False)

        def val_dataloader(self):
            return loader(shuffle=False, n=40)

    kept = ModelCheckpoint(monitor="guard/adversarial_training/robust_accuracy", mode="max", save_top_k=-1)
    guard = on(validate=24)
    net = fit([guard, kept], Keeping, Data(), enable_checkpointing=True)
    (x, y, _), expected = rows(40), []
    for state in net.found:
        other = PlainNet()
        other.load_state_dict(state)
        first, second = robust_accuracy(other, x[:16], y[:16]), robust_accuracy(other, x[16:24], y[16:24], batch=1)
        expected.append(torch.cat([first, second]).mean().item())
    assert sorted(float(v) for v in kept.best_k_models.values()) == pytest.approx(sorted(expected))
    assert same(net, fit([on()], PlainNet, Data()))


def test_robust_accuracy_in_inference_mode():
    net = fit([on()], PlainNet)
    (found,) = trainer([on(validate=1000, seed=0)], inference_mode=True).validate(net, loader(), verbose=False)
    (again,) = trainer([on(validate=1000, seed=0)], inference_mode=False).validate(net, loader(), verbose=False)
    data = loader(shuffle=False)
    x, y = data.dataset.data[:2]
    (ordered,) = trainer([on(validate=1000, seed=0)]).validate(net, data, verbose=False)
    parts = [robust_accuracy(net, x[i : i + 16], y[i : i + 16], batch=i // 16) for i in range(0, 64, 16)]
    key = "guard/adversarial_training/robust_accuracy"
    assert ordered[key] == pytest.approx(torch.cat(parts).mean().item())
    assert 0 < found[key] < 1
    assert again.keys() == found.keys()


def test_robust_accuracy_beside_a_guard_of_training_only():
    def beside():
        return [on(validate=20), DPSGD(delta=1e-3, noise_multiplier=0.5, max_grad_norm=0.5, test_seed=5)]

    net, data = PlainNet(norm=False), loader(shuffle=False)
    key = "guard/adversarial_training/robust_accuracy"
    (alone,), (found,) = (trainer(g).validate(net, data, verbose=False) for g in ([on(validate=20)], beside()))
    assert found[key] == alone[key]


def test_a_loss_without_accuracy_is_refused_where_a_collapse_is_to_be_seen():
    class Regression(GuardMixin, PlainNet):
        def guard_losses(self, logits, target):
            return (logits[:, 0] - target) ** 2

        def forward(self, x):
            return super().forward(x)[:, :1]

        def training_step(self, batch, batch_idx):
            return F.mse_loss(self(batch[0])[:, 0], batch[1].float())

    with pytest.raises(GuardConflict, match=r"collapse='ignore' is needed.*no accuracy"):
        fit([on(method="fgsm")], Regression)
    fit([on(method="fgsm", collapse="ignore")], Regression)


# Embeddings --------------------------------------------------------------------------------------------------------


class Tokens(pl.LightningModule):
    """A bag of words with padding."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 4, padding_idx=0)
        self.head = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, tokens):
        return self.head(self.words(tokens).sum(1))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def sentences():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 20, (32, 5), generator=generator)
    return DataLoader(TensorDataset(tokens, tokens.sum(1) % 3), 16)


@pytest.mark.parametrize("objective", ["adversarial", "trades"])
def test_embeddings_are_attacked_as_by_hand_and_padding_is_left_alone(objective):
    found = fit([AdversarialTraining(0.5, "l2", steps=2, embedding="words", objective=objective)], Tokens, sentences())
    torch.manual_seed(0)
    net, threat = Tokens(), ThreatModel(0.5, "l2")
    optimizer = net.configure_optimizers()
    for step in range(4):
        tokens, y = list(sentences())[step % 2]
        e, real = net.words(tokens).detach(), (tokens != 0)[..., None]
        clean = net(tokens).detach()

        def loss(z, y=y, clean=clean):
            logits = net.head(z.sum(1))
            return kl(clean, logits) if objective == "trades" else ce(y)(logits)

        moved = pgd(loss, e, threat, 2, generator=stream(0, step, 0), free=real)
        assert torch.equal(moved[(tokens == 0)], e[tokens == 0])
        assert threat.contains(moved, e).all()
        optimizer.zero_grad()
        if objective == "trades":
            logits = net(tokens)
            other = net.head((net.words(tokens) + (moved - e)).sum(1))
            (F.cross_entropy(logits, y) + 6.0 * kl(logits, other).mean()).backward()
        else:
            F.cross_entropy(net.head((net.words(tokens) + (moved - e)).sum(1)), y).backward()
        optimizer.step()
    assert same(found, net)
    assert not found.words._forward_hooks


def test_hooks_on_embeddings_go_when_training_fails():
    class Failing(Tokens):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise RuntimeError("stop")

    net = Failing()
    with pytest.raises(RuntimeError, match="stop"):
        fit([AdversarialTraining(0.5, "l2", embedding="words")], net, sentences())
    assert not net.words._forward_hooks


def test_an_embedding_that_is_not_there_or_called_twice_is_refused():
    class Twice(Tokens):
        def forward(self, tokens):
            return super().forward(tokens) + super().forward(tokens)

    with pytest.raises(GuardConflict, match="embedding='word' names no submodule of Tokens; it has words, head"):
        fit([AdversarialTraining(0.5, embedding="word")], Tokens, sentences())
    with pytest.raises(GuardConflict, match="embedding='words': a forward pass called the embedding 2 times"):
        fit([AdversarialTraining(0.5, embedding="words")], Twice, sentences())


# Targets, restarts, tables -----------------------------------------------------------------------------------------


def test_targeted_attacks_head_for_another_class():
    seen = []

    class Seeing(PlainNet):
        def training_step(self, batch, batch_idx):
            seen.append((batch[0], batch[1]))
            return super().training_step(batch, batch_idx)

    data = loader(shuffle=False)
    net = fit([on(targeted=True, eps=0.3, step_size=None)], Seeing, data, max_epochs=1, limit_train_batches=1)
    untrained = fit(None, PlainNet, data, limit_train_batches=0).eval()
    (moved, y), x = seen[0], data.dataset.data[0][:16]
    turn = torch.rand(16, generator=stream(0, 0, 0, 1))
    other = (y + 1 + (turn * 2).long()) % 3
    assert (other != y).all()
    assert (ce(other)(untrained(moved)) < ce(other)(untrained(x))).all()
    assert len(set((other - y).remainder(3).tolist())) == 2  # both others are meant
    assert net is not None


def test_restarts_only_make_the_attack_worse():
    losses = {}
    for restarts in (1, 4):
        guard = on(restarts=restarts, steps=1)
        net = fit([guard], PlainNet, loader(shuffle=False), max_epochs=1, limit_train_batches=1)
        losses[restarts] = net.fitted.callback_metrics["train_loss"]
    assert losses[4] > losses[1]


def test_tables_stay_tables():
    seen = []

    class Seeing(PlainNet):
        def training_step(self, batch, batch_idx):
            seen.append(batch[0])
            return super().training_step(batch, batch_idx)

    x, y, _ = rows()
    x[:, 0] = (x[:, 0] * 40).round()
    x[:, 1:4] = F.one_hot((x[:, 1] * 3).long().clamp_max(2), 3).float()
    data = DataLoader(TensorDataset(x, y), 16)
    guard = AdversarialTraining(1.5, one_hot=[(1, 2, 3)], integer=(0,), increasing=(0,), unit=[1.0, 1, 1, 1, 0.1, 0.1])
    fit([guard], Seeing, data, max_epochs=1)
    moved = torch.cat(seen)
    assert (moved[:, 0] == moved[:, 0].round()).all()
    assert ((moved - x)[:, 0] >= 0).all()
    assert (moved[:, 1:4].sort(1).values == torch.tensor([0.0, 0, 1])).all()
    assert guard.threat.contains(moved, x).all()
    assert not torch.equal(moved[:, 1:4], x[:, 1:4])


# Beside others -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["trades", "awp"])
def test_averaged_weights_are_those_of_the_steps(form):
    class Steps(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, module, *args):
            self.seen.append(module.net[0].weight.detach().clone())

    steps, average = Steps(), EMAWeightAveraging(decay=0.5)
    net = fit([on(**FORMS[form]), average, steps], PlainNet, loader(shuffle=False))
    mean = steps.seen[0]
    for weight in steps.seen[1:]:
        mean = mean.lerp(weight, 0.5)
    torch.testing.assert_close(net.net[0].weight.detach(), mean)


@pytest.mark.parametrize("options", [{"awp": 0.01}, {"method": "fgsm"}, {"method": "free"}])
def test_what_privacy_does_not_bound_is_refused_beside_it(options):
    with pytest.raises(GuardConflict, match=r"dp_sgd and adversarial_training \("):
        fit([on(**options), DPSGD(delta=1e-3, noise_multiplier=1.0)], lambda: PlainNet(norm=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "hope"}, "objective='hope'"),
        ({"objective": "trades", "random_start": False}, "needs a random start"),
        ({"objective": "trades", "targeted": True}, "set targeted=False"),
        ({"objective": "mart", "beta": 0.0}, "beta=0"),
        ({"objective": "mixed", "clean_weight": 1.0}, "clean_weight=1"),
        ({"method": "free", "awp": 0.1}, "method='free' climbs"),
        ({"awp": -0.1}, "awp=-0.1"),
        ({"restarts": 0}, "restarts=0"),
        ({"restarts": 2, "method": "fgsm"}, "restarts=2"),
        ({"validate": -1}, "validate=-1"),
        ({"collapse": "pray"}, "collapse='pray'"),
        ({"embedding": "words"}, "a space of its own"),
        ({"method": "n_fgsm", "norm": "l2"}, "norm='l2'"),
        ({"method": "n_fgsm", "integer": (0,)}, "moves continuously"),
    ],
)
def test_wrong_new_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        on(**options)


def test_manual_optimisation_with_the_new_objectives():
    class Manual(GuardMixin, ManualNet):
        def training_step(self, batch, batch_idx):
            step = self.guard_step(batch)
            self.optimizers().zero_grad()
            logits = self(step.inputs)
            self.manual_backward(self.guard_loss(step, F.cross_entropy(logits, step.target), logits))
            self.optimizers().step()

    assert same(fit([on(objective="trades")], Manual, max_epochs=1), fit([on(objective="trades")], max_epochs=1))
    with pytest.raises(GuardConflict, match="awp need to know where a step begins"):
        fit([on(awp=0.1)], Manual)


class OnlyStep(GuardMixin, ManualNet):
    """Optimises by hand on the batch of the guards, and keeps the loss to itself."""

    def training_step(self, batch, batch_idx):
        step = self.guard_step(batch)
        self.optimizers().zero_grad()
        self.manual_backward(F.cross_entropy(self(step.inputs), step.target))
        self.optimizers().step()


def test_manual_optimisation_needs_guard_loss_only_where_the_loss_changes():
    assert same(fit([on()], OnlyStep, max_epochs=1), fit([on()], max_epochs=1))
    for objective in ("trades", "mart", "mixed"):
        with pytest.raises(GuardConflict, match=r"never called self\.guard_loss, so adversarial_training"):
            fit([on(objective=objective)], OnlyStep)


@pytest.mark.parametrize(
    ("guard", "places"),
    [
        (on(), {"on_batch"}),
        (on(method="fgsm"), {"on_batch"}),
        (on(objective="trades"), {"on_batch", "on_loss"}),
        (on(awp=0.01), {"on_batch", "during", "on_gradients", "on_checkpoint"}),
        (on(method="free"), {"on_loader", "on_batch", "on_gradients"}),
        (AdversarialTraining(0.5, embedding="words"), {"on_batch", "during"}),
        (AdversarialTraining(0.5, embedding="words", objective="trades"), {"on_batch", "on_loss"}),
        (on(eps=0.0, awp=0.01, objective="mart"), set()),
    ],
)
def test_the_guard_acts_where_its_options_need_it(guard, places):
    batch, weights = ("on_loader", "on_batch", "during", "on_loss"), ("on_gradients", "on_weights", "on_checkpoint")
    assert {place for place in ("rewrite", *batch, *weights) if guard.overrides(place)} == places


@pytest.mark.parametrize("options", [{}, {"awp": 0.01}, {"eps": 0.0}])
def test_what_a_subclass_adds_acts(options):
    class Doubled(AdversarialTraining):
        def on_loader(self, loader):
            return super().on_loader(loader)

        def on_loss(self, step):
            return 2 * super().on_loss(step)

    class Seeing(PlainNet):
        def on_before_backward(self, loss):
            self.ratio = loss.item() / self.own

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.own = (loss["loss"] if isinstance(loss, dict) else loss).item()
            return loss

    net = fit([Doubled(**{"eps": EPS, "steps": STEPS, **options})], Seeing, max_epochs=1)
    assert net.ratio == pytest.approx(2)
    assert net.fitted.num_training_batches == 4


# Catastrophic overfitting ------------------------------------------------------------------------------------------


class Ends(pl.Callback):
    """The weights at the end of each epoch, after the guards."""

    def __init__(self):
        self.seen, self.moments = [], []

    def on_train_epoch_start(self, trainer, module):
        self.seen.append({key: value.clone() for key, value in module.state_dict().items()})
        self.moments.append(len(trainer.optimizers[0].state))


class Rewound(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        torch.manual_seed(trainer.global_step)


@pytest.fixture
def second_check_fails(monkeypatch):
    def sees(self, single, strong, settled=True):
        self.single += 1  # part of the guard's state
        return self.single == 2

    monkeypatch.setattr("lightning_guard.functional.collapse.Collapse.sees", sees)


@pytest.mark.usefixtures("second_check_fails")
def test_after_a_collapse_the_last_good_weights_are_back_and_pgd_goes_on():
    ends, guard = Ends(), on(method="fgsm")
    with pytest.warns(UserWarning, match="training on fgsm collapsed in epoch 1.*went on with PGD-3"):
        net = fit([Rewound(), guard, ends], PlainNet, loader(shuffle=False), max_epochs=3)
    first, second, third = ends.seen
    assert all(torch.equal(second[key], third[key]) for key in first)
    assert not torch.equal(first["net.0.weight"], second["net.0.weight"])
    assert ends.moments == [0, 6, 0]  # the optimizer forgets what the collapsed epoch has taught it
    assert "were put back, and training went on with PGD-3." in guard.notes()[0]
    attacked = []

    class Seeing(PlainNet):
        def training_step(self, batch, batch_idx):
            attacked.append(batch[0])
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="collapsed"):
        again = fit([Rewound(), on(method="fgsm")], Seeing, loader(shuffle=False), max_epochs=3)
    assert same(net, again)
    x, y, _ = rows()
    other = PlainNet()
    other.load_state_dict(third)
    assert torch.equal(attacked[8], climbed(other.eval(), x[:16], ce(y[:16]), stream(0, 8, 0)))


@pytest.mark.usefixtures("second_check_fails")
def test_a_training_that_collapses_resumes_bit_for_bit(tmp_path):
    data = loader(shuffle=False)
    kept = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=2)
    at_ends = ModelCheckpoint(tmp_path, filename="end-{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    with pytest.warns(UserWarning, match="collapsed"):
        whole = fit([Rewound(), on(method="fgsm"), kept, at_ends], data=data, enable_checkpointing=True, max_epochs=3)
    for name in ("end-epoch=0", "end-epoch=1"):
        path = tmp_path / f"{name}.ckpt"
        resumed = fit([Rewound(), on(method="fgsm")], data=data, max_epochs=3, ckpt_path=path, seed=1)
        assert same(resumed, whole)
    within = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    state = within["lightning_guard"]["guards"]["adversarial_training"]
    assert torch.equal(state["good"]["net.0.weight"], _stored(tmp_path / "end-epoch=0.ckpt")["net.0.weight"])
    assert len(state["examples"]) == 2
    at_end = torch.load(tmp_path / "end-epoch=0.ckpt", weights_only=True)["lightning_guard"]
    assert at_end["guards"]["adversarial_training"] == {
        "seed": 0, "reached": 1.0, "fallen": "", "single": 1.0, "strong": 0.0
    }  # fmt: skip


def _stored(path):
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.usefixtures("second_check_fails")
def test_a_collapse_can_stop_training():
    ends = Ends()
    with pytest.warns(UserWarning, match="training ended there"):
        net = fit([on(method="fgsm", collapse="stop"), ends], PlainNet, loader(shuffle=False), max_epochs=4)
    assert net.fitted.current_epoch == 2
    assert all(torch.equal(value, ends.seen[1][key]) for key, value in net.state_dict().items())


def test_looking_for_a_collapse_changes_nothing_and_is_logged():
    for method in ("fgsm", "n_fgsm"):
        looking = fit([on(method=method)], PlainNet)
        assert same(looking, fit([on(method=method, collapse="ignore")], PlainNet))
        logged = looking.fitted.callback_metrics
        assert logged["guard/adversarial_training/collapsed"] == 0
        assert 0 < logged["guard/adversarial_training/pgd_accuracy"] <= 1


def test_earlier_weights_are_not_put_back_behind_a_guard_that_changed_them():
    with pytest.raises(GuardConflict, match=r"collapse='fall_back'\) and magnitude_pruning: a collapse puts"):
        fit([on(method="fgsm"), MagnitudePruning(sparsity=0.5)])
    fit([on(method="fgsm", collapse="ignore"), MagnitudePruning(sparsity=0.5)])


@pytest.mark.slow
def test_a_real_collapse_is_seen_and_the_fall_back_protects():
    """FGSM without random start on digits at 0.3 (Wong et al., 2020): it learns the single step and not the threat."""
    from sklearn.datasets import load_digits

    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = (x.float().reshape(-1, 1, 8, 8) / 16)[order], y[order]
    data = DataLoader(TensorDataset(x[:700], y[:700]), 64, shuffle=True)
    threat = ThreatModel(0.3, bounds=(0.0, 1.0))

    class Digits(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1),
                nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
            )  # fmt: skip

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.005)

    def accuracy(net, steps, start):
        net, test, truth = net.eval(), x[1400:], y[1400:]
        generator = torch.Generator().manual_seed(0)
        moved = pgd(lambda z: ce(truth)(net(z)), test, threat, steps, random_start=start, generator=generator)
        return (net(moved).argmax(1) == truth).float().mean().item()

    def trained(**options):
        guard = AdversarialTraining(0.3, method="fgsm", random_start=False, bounds=(0.0, 1.0), warmup=0.3, **options)
        return guard, fit([guard], Digits, data, max_epochs=30)

    blind, collapsed = trained(collapse="ignore")
    assert accuracy(collapsed, 1, False) > 0.4
    assert accuracy(collapsed, 20, True) < 0.2
    assert not blind.notes()
    with pytest.warns(UserWarning, match="collapsed in epoch"):
        guard, saved = trained()
    assert accuracy(saved, 20, True) > 0.3
    assert "catastrophic overfitting" in guard.notes()[0]


def test_free_training_without_a_way_back_to_the_inputs_is_refused():
    class Detached(PlainNet):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0].detach()), batch[1])

    with pytest.raises(GuardConflict, match="gave them nothing"):
        fit([AdversarialTraining(0.1, method="free", steps=3, bounds=(0.0, 1.0), collapse="ignore")], Detached)
    with pytest.raises(GuardConflict, match="limit_train_batches=1"):
        fit([AdversarialTraining(0.1, method="free", steps=3, bounds=(0.0, 1.0))], limit_train_batches=1)


def test_replays_are_not_written_twice():
    class InPlace(PlainNet):
        largest = 0.0

        def on_after_batch_transfer(self, batch, dataloader_idx):
            batch[0].sub_(0.5).div_(0.25)
            return batch

        def training_step(self, batch, batch_idx):
            self.largest = max(self.largest, float(batch[0].detach().abs().max()))
            return super().training_step(batch, batch_idx)

    guard = AdversarialTraining(1e-3, method="free", steps=3, mean=0.5, std=0.25, bounds=(0.0, 1.0), collapse="ignore")
    assert fit([guard], InPlace, max_epochs=1).largest <= 2.0 + 1e-3


def test_stopping_at_a_collapse_must_be_allowed():
    with pytest.raises(GuardConflict, match="min_epochs=2"):
        fit([AdversarialTraining(0.1, method="fgsm", collapse="stop")], min_epochs=2)


def test_the_watch_goes_on_at_the_radius_that_was_reached(tmp_path, monkeypatch):
    """A checkpoint of validation's end resumes right before the watch looks."""
    seen, sees = [], Collapse.sees

    def recording(self, single, strong, settled=True):
        seen.append((single, strong, settled))
        return sees(self, single, strong, settled)

    monkeypatch.setattr(Collapse, "sees", recording)
    data = Data()
    kept = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
    fit([on(method="fgsm"), kept], data=data, enable_checkpointing=True, max_epochs=2)
    whole = list(seen)
    seen.clear()
    fit([on(method="fgsm")], data=data, max_epochs=2, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert len(seen) == len(whole) == 2
    assert seen[0] == whole[0]
    assert seen[0][2]
