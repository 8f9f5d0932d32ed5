"""Noise in training against a loop written by hand."""

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

from lightning_guard.batch import Batch
from lightning_guard.callbacks import AdversarialTraining, RandomizedSmoothing
from lightning_guard.functional import ThreatModel, pgd, stream
from lightning_guard.guard import GuardConflict
from tests.toys import PlainNet, fit, loader, same

SIGMA = 0.3


def by_hand(net, std=1.0, accumulate=1):
    """Dropout and BatchNorm included, with nothing of ours but where the noise is drawn from."""
    optimizer = net.configure_optimizers()["optimizer"]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    step = 0
    for _ in range(2):
        for i, (x, y, _) in enumerate(loader(shuffle=False)):
            noise = torch.randn(x.shape, generator=stream(0, step, 0))
            loss = F.cross_entropy(net(x + noise * (SIGMA / std)), y) / accumulate
            loss.backward()
            step += 1
            if (i + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
        scheduler.step()
    return net


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("std", [None, 0.25])
def test_bit_identical_to_a_loop_by_hand(accumulate, std):
    guarded = fit([RandomizedSmoothing(SIGMA, std)], data=loader(shuffle=False), accumulate_grad_batches=accumulate)
    torch.manual_seed(0)
    assert same(guarded, by_hand(PlainNet(), std or 1.0, accumulate))


class Seeing(PlainNet):
    def training_step(self, batch, batch_idx):
        self.__dict__.setdefault("seen", []).append(batch[0].clone())
        return super().training_step(batch, batch_idx)


def test_every_step_and_example_has_its_own_noise():
    def noise(**options):
        clean = fit(None, Seeing, loader(shuffle=False)).seen
        noisy = fit([RandomizedSmoothing(SIGMA, **options)], Seeing, loader(shuffle=False)).seen
        return torch.cat(noisy) - torch.cat(clean)

    drawn = noise()
    assert drawn.unique(dim=0).shape == drawn.shape
    assert drawn.std().item() == pytest.approx(SIGMA, rel=0.1)
    assert not torch.equal(drawn, noise(seed=4))
    assert torch.equal(noise(seed=4), noise(seed=4))


def test_noise_leaves_bounds_by_design():
    seen = torch.cat(fit([RandomizedSmoothing(SIGMA)], Seeing).seen)
    assert seen.min() < 0
    assert seen.max() > 1


def test_options_that_are_none():
    with pytest.raises(ValueError, match="sigma=-1"):
        RandomizedSmoothing(-1)
    with pytest.raises(ValueError, match="std="):
        RandomizedSmoothing(std=[1.0, -1.0])


def test_inputs_that_take_no_noise_are_refused():
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(8, 6).long(), torch.zeros(8).long()))
    with pytest.raises(GuardConflict, match=r"randomized_smoothing: .*int64"):
        fit([RandomizedSmoothing(SIGMA)], data=data)
    with pytest.raises(GuardConflict, match="one a channel"):
        fit([RandomizedSmoothing(SIGMA, std=[1.0, 2.0])])
    with pytest.raises(GuardConflict, match="the inputs are a tuple"):
        fit([RandomizedSmoothing(SIGMA, batch=Batch(inputs=0))], data=[((torch.zeros(4, 6),), torch.zeros(4).long())])


def test_its_reader_is_told_what_is_certified():
    assert "single pass" in RandomizedSmoothing(SIGMA).notes()[0]
    assert RandomizedSmoothing(0.0).notes() == []
    assert RandomizedSmoothing(SIGMA, std=[2.0]).noise.std == [2.0]


class Steady(pl.LightningModule):
    """A curved network that does not move, and keeps what it was shown."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3))
        self.seen = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0].detach().clone())
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def shown(*guards):
    return fit(list(guards), Steady, loader(shuffle=False), max_epochs=1)


@pytest.mark.parametrize("steps", [1, 4])
def test_an_attack_climbs_beneath_the_noise_of_its_step(steps):
    """Salman et al. (2019), algorithm 1 with one draw, by hand."""
    attack = AdversarialTraining(0.5, norm="l2", steps=steps, seed=1)
    net = shown(attack, RandomizedSmoothing(SIGMA, seed=2))
    for index, (x, y, _) in enumerate(loader(shuffle=False)):
        noise = SIGMA * torch.randn(x.shape, generator=stream(2, index, 0))

        def loss(moved, noise=noise, y=y):
            return F.cross_entropy(net(moved + noise), y, reduction="none")

        threat = ThreatModel(0.5, "l2")
        worst = pgd(loss, x, threat, steps, generator=stream(1, index, 0))
        torch.testing.assert_close(net.seen[index], worst + noise)
        assert (net.seen[index] - noise - x).norm(dim=1).max() <= 0.5 + 1e-5
        blind = pgd(lambda moved, y=y: F.cross_entropy(net(moved), y, reduction="none"), x, threat, 4)
        assert steps == 1 or loss(worst).mean() > loss(blind).mean()


@pytest.mark.parametrize("objective", ["trades", "mart", "mixed"])
def test_both_passes_of_an_objective_see_the_same_noise(objective):
    asked = []

    class Asked(Steady):
        def forward(self, x):
            asked.append(x.detach().clone())
            return super().forward(x)

    attack = AdversarialTraining(0.5, norm="l2", steps=2, seed=1, objective=objective)
    fit([attack, RandomizedSmoothing(SIGMA, seed=2)], Asked, loader(shuffle=False), max_epochs=1)
    x = next(iter(loader(shuffle=False)))[0]
    noise = SIGMA * torch.randn(x.shape, generator=stream(2, 0, 0))
    of_first_step = asked[: len(asked) // len(loader())]
    for one in of_first_step:
        assert (one - noise - x).norm(dim=1).max() <= 0.5 + 1e-5
    assert any(torch.equal(one, x + noise) for one in of_first_step)  # the clean pass


def test_single_steps_and_replays_take_the_noise_too():
    for method in ("fgsm", "free"):
        attack = AdversarialTraining(0.5, norm="l2", steps=2, seed=1, method=method, collapse="ignore")
        net = shown(attack, RandomizedSmoothing(SIGMA, seed=2))
        x = next(iter(loader(shuffle=False)))[0]
        moved = net.seen[0] - SIGMA * torch.randn(x.shape, generator=stream(2, 0, 0)) - x
        assert moved.norm(dim=1).max() <= 0.5 + 1e-5
