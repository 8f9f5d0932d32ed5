"""Adversarial training against loops written by hand."""

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

from lightning_guard.batch import Batch
from lightning_guard.callbacks import AdversarialTraining
from lightning_guard.functional import stream
from lightning_guard.guard import GuardConflict
from lightning_guard.mixins import GuardMixin
from tests.toys import PlainNet, Rows, fit, loader, rows, same

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
    from lightning_guard.functional import ThreatModel, pgd

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
