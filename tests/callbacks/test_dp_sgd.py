"""DP-SGD is what the paper says, leaks nothing beside it, and refuses what would break the promise."""

import math
from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from pytorch_lightning.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

from lightning_guard.callbacks import DPSGD, AdversarialTraining, MagnitudePruning
from lightning_guard.functional.privacy import Draws, Noise
from lightning_guard.guard import GuardConflict
from tests.toys import CLASSES, FEATURES, ManualNet, PlainNet, Rows, fit, loader, rows, same, trainer


def on(**options):
    return DPSGD(**{"delta": 1e-3, "noise_multiplier": 0.5, "max_grad_norm": 0.3, "test_seed": 7, **options})


class Small(PlainNet):
    """No dropout and no batch statistics; plain SGD."""

    def __init__(self, **kwargs):
        super().__init__(**{"norm": False, **kwargs})
        self.net[2].p = 0.0


class Double(Small):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.double()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0].double()), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def by_hand(net, guard, steps, expected=16, bound=0.3, sigma=0.5, factor=lambda norm, bound: min(1.0, bound / norm)):
    """Algorithm 1 of Abadi et al. with one example after another."""
    x, y, _ = rows()
    draws = Draws(64, expected / 64, 4, secret=7, turn=lambda: done // 4)
    noise, optimizer, done, sizes = Noise(7), net.configure_optimizers(), 0, []
    while done < steps:
        for batch in draws:
            deal = draws.next_deal()
            totals = [torch.zeros_like(p) for p in net.parameters()]
            for i in batch if deal.units else []:
                grads = torch.autograd.grad(F.cross_entropy(net(x[i][None].double()), y[i][None]), net.parameters())
                norm = float(torch.cat([g.flatten() for g in grads]).norm())
                for total, g in zip(totals, grads, strict=True):
                    total += factor(norm, bound) * g
            noise.at(done)
            flat = noise.fill_(
                torch.empty(sum(p.numel() for p in net.parameters()), dtype=torch.float64), sigma * bound / expected
            )
            parts = flat.split([p.numel() for p in net.parameters()])
            for p, total, z in zip(net.parameters(), totals, parts, strict=True):
                p.grad = total / expected + z.view_as(p)
            optimizer.step()
            sizes.append(deal.units)
            done += 1
    return net, sizes


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_it_is_the_algorithm(clipping):
    factor = {"flat": lambda n, c: min(1.0, c / n), "automatic": lambda n, c: c / (n + 0.01)}[clipping]
    pl.seed_everything(0, verbose=False)
    wanted, sizes = by_hand(Double(), None, 8, factor=factor)
    got = fit([on(clipping=clipping)], Double, precision="64-true")
    assert len(set(sizes)) > 2  # batches of all sizes
    for a, b in zip(got.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("guard", [{}, {"clipping": "per_layer"}, {"target_quantile": 0.5}, {"views": 2}])
@pytest.mark.parametrize("split", ["accumulated", "physical"])
def test_chunks_are_the_whole_draw(guard, split):
    whole = fit([on(**guard)], Small, loader(batch_size=16))
    if split == "accumulated":
        parts = fit([on(**guard)], Small, loader(batch_size=4), accumulate_grad_batches=4)
    else:
        parts = fit([on(max_physical_batch_size=9, **guard)], Small, loader(batch_size=16))
    assert parts.fitted.global_step == whole.fitted.global_step == 8
    for a, b in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert parts.fitted.accumulate_grad_batches == (4 if split == "accumulated" else 1)  # put back


def test_workers_and_prefetching_do_not_matter():
    def data(**kwargs):
        return DataLoader(Rows(), 16, **kwargs)

    assert same(fit([on()], Small, data(num_workers=2, persistent_workers=True)), fit([on()], Small, data()))


def test_empty_draws_still_make_noisy_steps():
    net = fit([on(batch_size=1)], Small, max_epochs=1)
    assert net.fitted.global_step == 64  # a third of these draws are empty
    assert all(p.isfinite().all() for p in net.parameters())


def test_an_example_that_is_not_finite_contributes_nothing():
    x, y, _ = rows()
    bad = x.clone()
    bad[::5] = float("nan")

    class Without(Small):  # the same, with a loss that ignores those rows
        def training_step(self, batch, batch_idx):
            keep = batch[2]
            logits = self(batch[0])
            return (F.cross_entropy(logits, batch[1], reduction="none") * keep).mean()

    keep = (~bad.isnan().any(1)).float()
    guard = on()
    got = fit([guard], Small, DataLoader(TensorDataset(bad, y), 16))
    wanted = fit([on()], Without, DataLoader(TensorDataset(x, y, keep), 16))
    for a, b in zip(got.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert any("not finite" in note for note in guard.notes())


# What others see --------------------------------------------------------------------------------------------------


class Peeping(pl.Callback):
    """Looks at gradients wherever Lightning lets it."""

    def __init__(self):
        self.norms = []

    def look(self, trainer, module, *args):
        self.norms += [float(p.grad.norm()) for p in module.parameters() if p.grad is not None]

    on_after_backward = on_before_optimizer_step = on_train_batch_end = look


def test_nobody_sees_a_gradient_without_noise():
    quiet, loud = Peeping(), Peeping()
    fit([quiet, on(noise_multiplier=1e-6)], Small, max_epochs=1)
    fit([loud, on(noise_multiplier=1e3)], Small, max_epochs=1)
    assert max(quiet.norms) < 1
    assert min(loud.norms) > 10


class Still(Small):
    """Weights move by the noise alone."""

    def training_step(self, batch, batch_idx):
        return 0.0 * F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1.0)


def test_the_noise_is_as_planned():
    class Wide(Still):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(FEATURES, 4000), nn.Linear(4000, CLASSES))

    class Moves(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, module, *args):
            self.before = nn.utils.parameters_to_vector(module.parameters()).detach().clone()

        def on_train_batch_end(self, trainer, module, *args):
            self.seen.append(nn.utils.parameters_to_vector(module.parameters()).detach() - self.before)

    moves = Moves()
    fit([moves, on(noise_multiplier=2.0, max_grad_norm=0.8, test_seed=None)], Wide)
    z = torch.stack(moves.seen) / (2.0 * 0.8 / 16)
    n = z.numel()
    assert abs(float(z.mean())) < 5 / math.sqrt(n)
    assert abs(float(z.var()) - 1) < 5 * math.sqrt(2 / n)
    between_steps = (z[1:] * z[:-1]).mean()
    between_weights = (z[:, 1:] * z[:, :-1]).mean()
    assert max(abs(float(between_steps)), abs(float(between_weights))) < 5 / math.sqrt(n)


def test_noise_and_draws_are_new_in_every_run_and_their_seed_is_nowhere(tmp_path):
    secret = {}

    class Spying(DPSGD):
        name = "spying"

        def on_loader(self, loader):
            made = super().on_loader(loader)
            secret[len(secret)] = self._draws._secret
            return made

    paths = []
    for run in range(2):
        net = fit([Spying(delta=1e-3, noise_multiplier=1.0)], Small, max_epochs=1)
        paths.append(tmp_path / f"{run}.ckpt")
        net.fitted.save_checkpoint(paths[-1])
    assert secret[0] != secret[1]
    for path in paths:
        text = str(torch.load(path, weights_only=True)["lightning_guard"])
        assert not any(str(value) in text or hex(value)[2:] in text for value in secret.values())


def test_what_epsilon_does_not_cover_is_named(capsys):
    guard = on()
    net = fit([guard, EarlyStopping("train_loss", patience=9), ModelCheckpoint(monitor="train_accuracy")], Small,
              enable_checkpointing=True)  # fmt: skip
    notes = " ".join(guard.notes())
    for what in ("train_loss", "train_accuracy", "EarlyStopping", "ModelCheckpoint", "NOT PRIVATE", "validation"):
        assert what in notes
    assert "train_loss" in net.fitted.callback_metrics


def test_metrics_can_be_withheld():
    net = fit([on(withhold_metrics=True)], Small)
    assert set(net.fitted.callback_metrics) == {"guard/dp_sgd/epsilon"}


# The plan -----------------------------------------------------------------------------------------------------------


def test_two_of_three_decide_the_third():
    by_budget, by_noise = on(noise_multiplier=None, target_epsilon=2.0), on(noise_multiplier=2.0)
    fit([by_budget], Small, max_epochs=3)
    assert by_budget.plan.epsilon() == pytest.approx(2.0, rel=2e-3)
    assert by_budget.plan.epsilon() <= 2.0
    fit([by_noise], Small, max_epochs=3)
    assert by_noise.plan.steps == 12
    by_both = on(noise_multiplier=2.0, target_epsilon=by_noise.plan.epsilon() * 1.001)
    net = fit([by_both], Small, max_epochs=-1)
    assert net.fitted.global_step == by_both.plan.steps == 12


def test_training_stops_before_the_step_that_would_exceed_the_budget():
    guard = on(noise_multiplier=2.0, target_epsilon=1.5)
    net = fit([guard], Small, max_epochs=50)
    steps, plan = net.fitted.global_step, guard.plan
    assert 0 < steps < 200
    assert plan.epsilon(steps) <= 1.5 < replace(plan, steps=steps + 1).epsilon()
    assert float(net.fitted.callback_metrics["guard/dp_sgd/epsilon"]) == pytest.approx(plan.epsilon(steps))


def test_a_minimum_of_epochs_does_not_buy_more_steps():
    with pytest.raises(GuardConflict, match="budget is spent"):
        fit([on(noise_multiplier=2.0, target_epsilon=1.0)], Small, max_epochs=50, min_epochs=50)


def test_epsilon_can_stop_training():
    class Longer(Small):
        pass

    stop = EarlyStopping("guard/dp_sgd/epsilon", stopping_threshold=-1.0, divergence_threshold=2.0, patience=99,
                         check_on_train_epoch_end=True)  # fmt: skip
    net = fit([on(noise_multiplier=2.0), stop], Longer, max_epochs=40)
    assert 0 < net.fitted.current_epoch < 39


def test_a_resume_continues_the_ledger_and_refuses_another_plan(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = on(noise_multiplier=None, target_epsilon=2.0)
    fit([whole, keep], Small, enable_checkpointing=True, max_epochs=3)
    path = tmp_path / "epoch=1.ckpt"
    resumed = on(noise_multiplier=None, target_epsilon=2.0)
    fit([resumed], Small, max_epochs=3, ckpt_path=path)
    assert resumed.state() == whole.state()
    for changed in ({"max_grad_norm": 0.4}, {"target_epsilon": 3.0}, {"delta": 2e-3}, {"batch_size": 8}):
        with pytest.raises(GuardConflict, match=next(iter(changed))):
            fit(
                [on(**{"noise_multiplier": None, "target_epsilon": 2.0, **changed})],
                Small,
                max_epochs=3,
                ckpt_path=path,
            )


def test_a_second_private_training_of_the_same_weights_is_refused():
    net = fit([on(noise_multiplier=2.0)], Small)
    with pytest.raises(GuardConflict, match=r"has spent epsilon = 1\."):
        fit([on(noise_multiplier=2.0)], net)


def test_a_resume_within_an_accumulated_step_is_refused(tmp_path):
    class Stopped(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 5:
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    fit([on(), Stopped()], Small, loader(batch_size=4), accumulate_grad_batches=4, max_epochs=1)
    with pytest.raises(GuardConflict, match="in the middle of 4"):
        fit([on()], Small, loader(batch_size=4), accumulate_grad_batches=4, ckpt_path=tmp_path / "within.ckpt")


@pytest.mark.parametrize("schedule", [{"noise_final": 2.0}, {"clip_final": 0.5}])
def test_schedules(schedule):
    guard = on(**schedule)
    fit([guard], Small, max_epochs=3)
    assert guard.plan.noise_at(0) == 0.5
    assert guard.plan.noise_at(11) == 0.5 * schedule.get("noise_final", 1.0)
    assert guard.plan.clip_at(11) == pytest.approx(0.3 * schedule.get("clip_final", 1.0))
    assert (guard.plan.epsilon() < replace(guard.plan, noise_final=1.0).epsilon()) == ("noise_final" in schedule)


def test_adaptive_clipping_finds_the_quantile_and_is_paid_for():
    x, y, _ = rows()
    guard = on(target_quantile=0.5, max_grad_norm=50.0, clip_rate=0.5, noise_multiplier=1.0)
    net = fit([guard], Small, max_epochs=40)
    norms = []
    for i in range(64):
        grads = torch.autograd.grad(F.cross_entropy(net(x[i][None]), y[i][None]), list(net.parameters()))
        norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))
    below = sum(norm <= guard.state()["max_grad_norm"] for norm in norms) / 64
    assert 0.2 < below < 0.8
    assert guard.plan.noise_at(0) > 1.0  # the count takes its share


def test_shuffled_batches_have_their_own_epsilon(tmp_path):
    poisson, shuffled = on(noise_multiplier=2.0), on(noise_multiplier=2.0, sampling="shuffle")
    fit([poisson], Small)
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    fit([shuffled, keep], Small, enable_checkpointing=True)
    assert shuffled.plan.epsilon() > 1.5 * poisson.plan.epsilon()
    with pytest.raises(GuardConflict, match="end of an epoch"):
        fit([on(noise_multiplier=2.0, sampling="shuffle")], Small, ckpt_path=tmp_path / "step=2.ckpt")


# Layers and losses ------------------------------------------------------------------------------------------------


def test_a_frozen_body_is_neither_booked_nor_moved():
    class Tuned(Small):
        def __init__(self):
            super().__init__()
            self.net[0].requires_grad_(False)

    start, net = Tuned(), fit([on()], Tuned)
    pl.seed_everything(0, verbose=False)
    start = Tuned()
    assert same(start.net[0], net.net[0])
    assert not same(start.net[3], net.net[3])


def test_what_is_unfrozen_later_is_private_from_then_on():
    class Thawing(Small):
        def __init__(self):
            super().__init__()
            self.net[0].requires_grad_(False)

        def on_train_epoch_start(self):
            self.net[0].requires_grad_(self.current_epoch > 0)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    loud = Peeping()
    net = fit([loud, on(noise_multiplier=1e3)], Thawing)
    assert min(loud.norms) > 1
    assert net.net[0].weight.grad is not None


def test_a_layer_without_a_rule_falls_back_to_functorch():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(FEATURES, FEATURES) / 4)

        def forward(self, x):
            return torch.logsumexp(x[:, :, None] * self.weight.exp(), 1)

    class Other(Double):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(Odd(), nn.Linear(FEATURES, CLASSES)).double()

    pl.seed_everything(0, verbose=False)
    wanted, _ = by_hand(Other(), None, 4)
    got = fit([on()], Other, precision="64-true", max_epochs=1)
    for a, b in zip(got.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert "forward" not in vars(got.net[0])


def test_batch_norm_can_be_replaced():
    net = fit([on(replace_batch_norm="group")], PlainNet)
    assert isinstance(net.net[1], nn.GroupNorm)
    with pytest.raises(GuardConflict, match=r"net\.1 is a BatchNorm"):
        fit([on()], PlainNet)


def test_frozen_batch_norm_is_welcome():
    class Frozen(PlainNet):
        def __init__(self):
            super().__init__()
            self.net[1].eval()

    net = fit([on()], Frozen)
    assert float(net.net[1].num_batches_tracked) == 0


def test_views_are_averaged_before_clipping():
    class Views(Dataset):  # every look at an example is another one
        def __init__(self):
            self.x, self.y, self.seen = *rows()[:2], {}

        def __len__(self):
            return len(self.y)

        def __getitem__(self, i):
            look = self.seen[i] = self.seen.get(i, -1) + 1
            return self.x[i] * (1 + look % 2), self.y[i]

    class Averaged(Small):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return (F.cross_entropy(self(x), y) + F.cross_entropy(self(2 * x), y)) / 2

    got = fit([on(views=2)], Small, DataLoader(Views(), 16))
    wanted = fit([on()], Averaged, DataLoader(TensorDataset(*rows()[:2]), 16))
    for a, b in zip(got.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_person_is_bounded_with_all_their_rows():
    x, y, _ = rows()
    people = torch.arange(64) // 4 % 11  # four to eight rows each

    class Sums(pl.Callback):
        seen: list = []

        def on_before_optimizer_step(self, trainer, module, optimizer):
            self.seen.append(torch.cat([p.grad.flatten() for p in module.parameters()]))

    def sums(scale):
        Sums.seen = []
        moved = torch.where((people == 3)[:, None], x * scale, x)
        guard = on(noise_multiplier=1e-9, users=people.tolist(), rows_per_user=4, batch_size=11, max_grad_norm=0.1)
        fit([guard, Sums()], Small, DataLoader(TensorDataset(moved, y), 16), max_epochs=1, limit_train_batches=1)
        return Sums.seen[0] * 11

    assert fit([on(users="who", batch_size=6)], Small, DataLoader(Named(people), 16)) is not None
    apart = max(float((sums(scale) - sums(1.0)).norm()) for scale in (-3.0, 0.0, 50.0))
    assert 0 < apart <= 2 * 0.1 * 1.001


class Named(Dataset):
    def __init__(self, people):
        self.who, self.data = people, rows()

    def __len__(self):
        return 64

    def __getitem__(self, i):
        return self.data[0][i], self.data[1][i]


def test_adam_correction_takes_the_noise_out_of_the_second_moment():
    class WithAdam(Still):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.1)

    def length(**options):
        pl.seed_everything(0, verbose=False)
        start = nn.utils.parameters_to_vector(WithAdam().parameters())
        net = fit([on(noise_multiplier=1.0, **options)], WithAdam, max_epochs=1)
        return float((nn.utils.parameters_to_vector(net.parameters()) - start).norm())

    # Noise alone: v is the noise's variance, the corrected denominator is the floor, 0.01 of it.
    assert length(adam_correction=0.01) > 2 * length()
    with pytest.raises(GuardConflict, match="Adam or AdamW"):
        fit([on(adam_correction=0.1)], Small)


def test_beside_other_guards():
    guards = [on(), AdversarialTraining(eps=0.1, steps=2, bounds=(0.0, 1.0)), MagnitudePruning(sparsity=0.5, every=1)]
    net = fit(guards, Small)
    weights = torch.cat([p.flatten() for p in net.parameters() if p.dim() > 1])
    assert float((weights == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert any("attack_loss" in note for note in guards[0].notes())


# Manual optimisation ------------------------------------------------------------------------------------------------


class Manual(ManualNet):
    def __init__(self):
        super().__init__(norm=False)
        self.net[2].p = 0.0


class Bare(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        F.cross_entropy(self(batch[0]), batch[1]).backward()
        optimizer.step()


class Pair(pl.LightningModule):
    """Two networks and two losses, as in a GAN."""

    def __init__(self, toggled):
        super().__init__()
        self.automatic_optimization, self.toggled = False, toggled
        self.first, self.second = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, CLASSES)

    def training_step(self, batch, batch_idx):
        for optimizer, part in zip(self.optimizers(), (self.first, self.second), strict=True):
            if self.toggled:
                self.toggle_optimizer(optimizer)
            hidden = self.first(batch[0])
            loss = F.cross_entropy(self.second(hidden if part is self.first else hidden.detach()), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            if self.toggled:
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return torch.optim.SGD(self.first.parameters(), 0.1), torch.optim.SGD(self.second.parameters(), 0.1)


def test_manual_optimisation_is_the_same_training():
    # One epoch: Manual does not step its scheduler.
    automatic, manual = (fit([on()], module, max_epochs=1) for module in (Small, Manual))
    for a, b in zip(automatic.parameters(), manual.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_backward_pass_of_ones_own_is_refused():
    with pytest.raises(GuardConflict, match="manual_backward"):
        fit([on()], Bare)


@pytest.mark.parametrize("toggled", [True, False])
def test_several_backward_passes_on_a_batch_are_paid_for(toggled):
    with pytest.raises(GuardConflict, match="releases=1"):
        fit([on()], Pair(toggled))
    guard, single = on(releases=2), on()
    net = fit([guard], Pair(toggled))
    fit([single], Small)
    assert guard.plan.epsilon() == pytest.approx(replace(single.plan, noise_multiplier=0.5 / 2**0.5).epsilon())
    assert guard.state()["steps"] == 8
    assert all(p.isfinite().all() for p in net.parameters())


# Refusals -----------------------------------------------------------------------------------------------------------


class Weighted(Small):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1], weight=torch.tensor([1.0, 2.0, 5.0]))


class Summed(Small):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1], reduction="sum")


class Contrasted(Small):
    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        return F.cross_entropy(logits, batch[1]) + logits.mean(0).square().sum()


class Mixed(Small):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self((batch[0] + batch[0].flip(0)) / 2), batch[1])


class Remembering(Small):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(FEATURES))

    def training_step(self, batch, batch_idx):
        self.mean.mul_(0.9).add_(0.1 * batch[0].mean(0))
        return super().training_step(batch, batch_idx)


class Unused(Small):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(2, 2)


class Flattened(Small):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(torch.cat([batch[0], batch[0]])).unflatten(0, (2, -1)).mean(0), batch[1])


class Penalised(Small):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.net[0].weight.square().sum()


class Checkpointed(Small):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)


class Hungry(Small):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), 0.1)


class Foreign(Small):
    def configure_optimizers(self):
        return torch.optim.SGD([*self.parameters(), nn.Parameter(torch.zeros(1))], 0.1)


class Stream(IterableDataset):
    def __iter__(self):
        x, y, _ = rows()
        yield from zip(x, y, strict=True)


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (Weighted, "changed by"), (Contrasted, "changed by"), (Mixed, "changed by"), (Summed, "loss_reduction='sum'"),
        (Remembering, "writes (the buffer )?mean"), (Unused, "spare.weight"), (Flattened, "sees a batch of"),
        (Penalised, "net.0.weight got a raw gradient"), (Checkpointed, "checkpoint"), (Hungry, "LBFGS"),
        (Foreign, "outside of Foreign"),
    ],
)  # fmt: skip
def test_modules_that_break_the_promise(module, match):
    with pytest.raises(GuardConflict, match=match):
        fit([on()], module)


def test_a_sum_of_losses_is_the_mean_if_it_is_said():
    for a, b in zip(fit([on(loss_reduction="sum")], Summed).parameters(), fit([on()], Small).parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def own_batches():
    return DataLoader(Rows(), batch_sampler=torch.utils.data.BatchSampler(range(64), 16, False))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (lambda: DataLoader(Stream(), 16), "Stream is a stream"),
        (lambda: DataLoader(Rows(), 16, sampler=WeightedRandomSampler(torch.ones(64), 64)), "WeightedRandomSampler"),
        (lambda: DataLoader(Rows(), batch_size=None), "batch sampler of its own"),
        (lambda: {"a": loader(), "b": loader()}, "one DataLoader"),
        (lambda: [(x, y) for x, y, _ in loader()], "come from a"),
    ],
)
def test_data_that_cannot_be_drawn_from(data, match):
    class Any(Small):
        def training_step(self, batch, batch_idx):
            batch = batch["a"] if isinstance(batch, dict) else batch
            return super().training_step(batch, batch_idx)

    with pytest.raises(GuardConflict, match=match):
        fit([on()], Any, data())


@pytest.mark.parametrize(
    ("options", "run", "match"),
    [
        ({}, {"overfit_batches": 2}, "overfit_batches"),
        ({}, {"precision": "bf16-true"}, "precision="),
        ({}, {"accumulate_grad_batches": 4, "limit_train_batches": 3}, "limit_train_batches=3"),
        ({"noise_multiplier": None}, {}, "how private"),
        ({}, {"max_epochs": -1}, "no end"),
        ({"delta": 0.5}, {}, "delta=0.5"),
        ({"target_quantile": 0.5, "clipping": "automatic"}, {}, "target_quantile"),
    ],
)
def test_runs_that_break_the_promise(options, run, match):
    with pytest.raises(GuardConflict, match=match):
        fit([on(**options)], Small, **run)


def test_callbacks_that_break_the_promise():
    with pytest.raises(GuardConflict, match="GradientAccumulationScheduler"):
        fit([on(), GradientAccumulationScheduler({0: 1, 1: 2})], Small)
    with pytest.raises(GuardConflict, match="LearningRateFinder"):
        Tuner(trainer([on()])).lr_find(Small(), loader())


def test_nothing_is_left_after_a_refusal():
    net = Unused()
    with pytest.raises(GuardConflict):
        fit([on()], net)
    assert all(p.grad is None for p in net.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())
    F.cross_entropy(net(torch.rand(4, FEATURES)), torch.zeros(4, dtype=torch.long)).backward()
    assert net.net[0].weight.grad is not None


# Around the step ----------------------------------------------------------------------------------------------------


class Keeping(Small):
    """Keeps raw data somewhere, in a way that leaves no version behind."""

    where = "data"

    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.zeros(FEATURES))
        self.frozen = nn.Parameter(torch.zeros(FEATURES), requires_grad=False)
        self.scale = nn.Parameter(torch.zeros(FEATURES))

    def training_step(self, batch, batch_idx):
        seen = batch[0].mean(0)
        if self.where == "data":
            self.kept.data.add_(seen)
        elif self.where == "new" and not hasattr(self, "late"):
            self.register_buffer("late", seen)
        elif self.where == "frozen":
            self.frozen.data.add_(seen)
        elif self.where == "weight" and float(self.scale.sum()) == 0:
            self.scale.data.copy_(seen)
        return F.cross_entropy(self(batch[0] * (1 + self.scale)), batch[1])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.where == "later":
            self.kept.add_(batch[0].mean(0))


@pytest.mark.parametrize("where", ["data", "new", "frozen", "weight", "later"])
def test_raw_data_kept_anywhere_in_the_module_is_found(where):
    with pytest.raises(GuardConflict, match="training writes"):
        fit([on()], type(where, (Keeping,), {"where": where}))


def test_reloaded_loaders_draw_anew():
    seen = {}

    class Reloading(pl.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(TensorDataset(*rows()[:2], torch.arange(64)), 16)

    class Looking(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.setdefault(trainer.current_epoch, []).append(sorted(batch[2].tolist()))

    guard = on(test_seed=None, max_physical_batch_size=9)
    fit([Looking(), guard], Small, Reloading(), max_epochs=3, reload_dataloaders_every_n_epochs=1)
    assert seen[0] != seen[1] != seen[2]
    assert guard.state()["steps"] == 12


class Skipping(Small):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if self.global_step == 2 else loss


class Withheld(Small):
    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        loss = closure()
        if self.global_step != 2 and float(loss) > -1 and batch_idx != 1:
            optimizer.step()


class Rare(Manual):
    def __init__(self):
        super().__init__()
        self.rare = nn.Linear(FEATURES, CLASSES)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        logits = self(batch[0]) + (self.rare(batch[0]) if batch_idx == 2 else 0)
        self.manual_backward(F.cross_entropy(logits, batch[1]))
        optimizer.step()


class ByHand(Manual):
    def training_step(self, batch, batch_idx):
        for p in self.parameters():
            p.grad = torch.ones_like(p)
        self.optimizers().step()


class Thawed(Small):
    def __init__(self):
        super().__init__()
        self.net[0].requires_grad_(False)

    def training_step(self, batch, batch_idx):
        self.net[0].requires_grad_(True)
        return super().training_step(batch, batch_idx)


class Plateau(Small):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "train_loss"}}


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (Skipping, "returned no loss"), (Withheld, "no optimizer took"), (Rare, "other parameters than before"),
        (ByHand, "without clipping and noise"), (Thawed, "without clipping and noise"), (Plateau, "ReduceLROnPlateau"),
    ],
)  # fmt: skip
def test_steps_around_the_mechanism_are_refused(module, match):
    with pytest.raises(GuardConflict, match=match):
        fit([on()], module)


def test_a_coupling_that_begins_later_is_found():
    class Later(Small):
        def training_step(self, batch, batch_idx):
            logits = self(batch[0])
            extra = logits.mean(0).square().sum() if self.global_step >= 2 else 0.0
            return F.cross_entropy(logits, batch[1]) + extra

    with pytest.raises(GuardConflict, match="changed by"):
        fit([on()], Later)


def test_gradients_asked_for_within_the_step_are_not_the_steps():
    class Attacking(Small):
        def training_step(self, batch, batch_idx):
            x = batch[0].clone().requires_grad_(True)
            torch.autograd.grad(50 * F.cross_entropy(self(x), batch[1]), x)
            return super().training_step(batch, batch_idx)

    assert same(fit([on()], Attacking), fit([on()], Small))


@pytest.mark.parametrize("hook", ["collate", "on_after_batch_transfer"])
@pytest.mark.parametrize("what", ["scaled", "sorted", "mixed"])
def test_rows_must_stay_themselves_on_their_way(hook, what):
    def change(batch):
        x, y = batch[0], batch[1]
        if what == "scaled":
            return x / x.abs().max(), y
        if what == "sorted":
            order = x.sum(1).argsort()
            return x[order], y[order]
        return (x + x.roll(1, 0)) / 2, y

    class Changing(Small):
        if hook != "collate":

            def on_after_batch_transfer(self, batch, dataloader_idx):
                return change(batch)

    collate = torch.utils.data.default_collate
    data = DataLoader(
        TensorDataset(*rows()[:2]), 16, collate_fn=(lambda items: change(collate(items))) if hook == "collate" else None
    )
    with pytest.raises(GuardConflict, match="rows beside it"):
        fit([on()], Changing, data)


def test_the_ledger_survives_a_crash_and_knows_what_came_before(tmp_path):
    class Crashing(Small):
        def on_train_batch_end(self, *args):
            if self.global_step == 3:
                raise RuntimeError("stop")

    net = Crashing()
    with pytest.raises(RuntimeError, match="stop"):
        trainer([on(noise_multiplier=2.0)]).fit(net, loader())
    with pytest.raises(GuardConflict, match="has spent epsilon"):
        fit([on(noise_multiplier=2.0)], net)
    raw = fit(None, Small, max_epochs=1)
    raw.fitted.save_checkpoint(tmp_path / "raw.ckpt")
    with pytest.raises(GuardConflict, match="made without it"):
        fit([on()], Small, ckpt_path=tmp_path / "raw.ckpt")
    private = fit([on()], Small, max_epochs=1)
    private.fitted.save_checkpoint(tmp_path / "test.ckpt")
    with pytest.raises(GuardConflict, match="not private"):
        fit([on(test_seed=None)], Small, ckpt_path=tmp_path / "test.ckpt")
    with pytest.raises(GuardConflict, match="without privacy"):
        fit([on(target_epsilon=math.inf)], Small, ckpt_path=tmp_path / "test.ckpt")


def test_half_precision_weights_and_lazy_layers_are_refused():
    class Half(Small):
        def __init__(self):
            super().__init__()
            self.bfloat16()

    with pytest.raises(GuardConflict, match="bf16-mixed"):
        fit([on()], Half)
