"""The fairness penalty: its gradient, its running rates, and that it narrows the gap."""

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from fairlearn.metrics import demographic_parity_difference
from torch import nn

from lightning_guard.batch import Batch
from lightning_guard.callbacks import FairnessRegularization
from lightning_guard.functional import NOTIONS, group_gap
from lightning_guard.guard import GuardConflict
from tests.toys import PlainNet, fit, loader, same


def biased(n=2000):
    """A label that depends on the group, and features that know both."""
    generator = torch.Generator().manual_seed(3)
    group = torch.randint(0, 2, (n,), generator=generator)
    y = (torch.rand(n, generator=generator) < 0.25 + 0.4 * group).long()
    noise = torch.randn(n, 3, generator=generator)
    x = torch.stack([y + 0.7 * noise[:, 0], group + 0.3 * noise[:, 1], noise[:, 2]], 1)
    return x, y, group


class Logit(pl.LightningModule):
    """One logit and a training_step that unpacks two parts."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x):
        return self.layer(x).squeeze(1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.binary_cross_entropy_with_logits(self(x), y.float())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.02)


def data(batch_size=100, group=None):
    x, y, s = biased()
    parts = torch.utils.data.TensorDataset(x, y, s if group is None else group)
    return torch.utils.data.DataLoader(parts, batch_size, shuffle=True)


@pytest.mark.parametrize("notion", NOTIONS)
@pytest.mark.parametrize("batch_size", [100, 16])
def test_it_narrows_the_gap(notion, batch_size):
    x, y, s = biased()
    gaps = []
    for weight in (0.0, 4.0):
        net = fit([FairnessRegularization(notion, weight)], Logit, data(batch_size), max_epochs=8)
        gaps.append(float(group_gap(net(x), s, y, notion)))
        accuracy = ((net(x) >= 0).long() == y).float().mean()
    assert gaps[1] < 0.5 * gaps[0]
    assert accuracy > 0.6  # not by a constant prediction: the larger class has 0.55


def test_the_reported_gap_is_fairlearns():
    x, y, s = biased()
    net = fit([FairnessRegularization(weight=0.0, memory=0.0)], Logit, data(len(x)), max_epochs=1)
    pl.seed_everything(0, verbose=False)
    before = Logit()  # the gap is of the logits before the step
    expected = demographic_parity_difference(y, (before(x) >= 0).numpy(), sensitive_features=s)
    assert float(net.fitted.callback_metrics["guard/fairness/gap"]) == pytest.approx(expected, abs=1e-6)


def test_gradient_is_that_of_the_soft_gap():
    """With no memory and all in one batch: task gradient plus weight times twice the hard gap times the soft one's."""
    x, y, s = biased(200)

    class Plain(Logit):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1.0)

    batch = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y, s), 200)
    net = fit([FairnessRegularization(weight=0.5, steepness=2.0, memory=0.0)], Plain, batch, max_epochs=1)
    pl.seed_everything(0, verbose=False)
    by_hand = Plain()
    logits = by_hand(x)
    hard = [(logits[s == g] >= 0).float().mean() for g in (0, 1)]
    soft = [torch.sigmoid(2.0 * logits[s == g]).mean() for g in (0, 1)]
    gap = (hard[1] - hard[0]).detach()
    loss = F.binary_cross_entropy_with_logits(logits, y.float()) + 0.5 * 2 * gap * (soft[1] - soft[0])
    loss.backward()
    for p, q in zip(net.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, q - q.grad, rtol=1e-5, atol=1e-6)


def test_accumulation_is_the_mean_of_the_micro_batches():
    """Rates of a batch and of its halves differ; what adds up is the gradient of each half's own loss."""
    x, y, s = biased(200)

    class Plain(Logit):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1.0)

    halves = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y, s), 100)
    guard = FairnessRegularization(weight=0.5, steepness=2.0, memory=0.0)
    net = fit([guard], Plain, halves, max_epochs=1, accumulate_grad_batches=2)
    pl.seed_everything(0, verbose=False)
    by_hand = Plain()
    for part in (slice(0, 100), slice(100, 200)):
        logits, group = by_hand(x[part]), s[part]
        hard = group_gap(logits, group).detach()
        soft = [torch.sigmoid(2.0 * logits[group == g]).mean() for g in (0, 1)]
        ahead = 1 if (logits[group == 1] >= 0).float().mean() > (logits[group == 0] >= 0).float().mean() else -1
        task = F.binary_cross_entropy_with_logits(logits, y[part].float())
        ((task + 0.5 * 2 * hard * ahead * (soft[1] - soft[0])) / 2).backward()
    for p, q in zip(net.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, q - q.grad, rtol=1e-5, atol=1e-6)


def test_groups_absent_from_batches():
    x, y, s = biased()
    order = s.argsort()  # whole batches of one group
    parts = torch.utils.data.TensorDataset(x[order], y[order], s[order])
    net = fit([FairnessRegularization("equalized_odds", 1.0)], Logit, torch.utils.data.DataLoader(parts, 16))
    assert all(torch.isfinite(p).all() for p in net.parameters())


@pytest.mark.parametrize("unknown", [-1.0, float("nan")])
def test_unknown_groups_count_for_the_task_only(unknown):
    x, _, s = biased()
    nobody = torch.full((len(s),), unknown)
    assert same(
        fit([FairnessRegularization(weight=1.0)], Logit, data(group=nobody)),
        fit([FairnessRegularization(weight=0.0)], Logit, data()),
    )
    half = torch.where(torch.arange(len(s)) % 2 == 0, s.float(), torch.tensor(unknown))
    net = fit([FairnessRegularization(weight=4.0)], Logit, data(group=half), max_epochs=8)
    free = fit([FairnessRegularization(weight=0.0)], Logit, data(), max_epochs=8)
    assert group_gap(net(x), s) < 0.6 * group_gap(free(x), s)


def test_one_group_only_is_no_penalty():
    one = torch.zeros(2000, dtype=torch.long)
    assert same(
        fit([FairnessRegularization(weight=1.0)], Logit, data(group=one)),
        fit([FairnessRegularization(weight=0.0)], Logit, data()),
    )


def test_a_constant_predictor_is_said_to_be_one():
    x, y, s = biased()
    ones = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.ones_like(y), s), 100)
    with pytest.warns(UserWarning, match="the same for nearly everybody"):
        fit([FairnessRegularization()], Logit, ones, max_epochs=12)


def test_a_group_that_is_no_group_is_refused():
    with pytest.raises(GuardConflict, match="fractions"):
        fit([FairnessRegularization()], Logit, data(group=torch.rand(2000)))
    with pytest.raises(GuardConflict, match="no group"):
        fit([FairnessRegularization()], PlainNet, loader("pair"))
    with pytest.raises(GuardConflict, match="shape"):
        fit([FairnessRegularization()], Logit, data(group=torch.zeros(2000, 2, dtype=torch.long)))


def test_logits_that_cannot_be_known_are_refused():
    class Functional(Logit):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.binary_cross_entropy_with_logits(
                F.linear(x, self.layer.weight, self.layer.bias).squeeze(1), y.float()
            )

    class Twice(Logit):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.binary_cross_entropy_with_logits(self(x) + self(x), y.float())

    for module, message in ((Functional, "was not called"), (Twice, "gave logits 2 times")):
        with pytest.raises(GuardConflict, match=message):
            fit([FairnessRegularization()], module, data())


def test_several_labels_an_example_are_refused():
    class Labels(Logit):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def training_step(self, batch, batch_idx):
            return F.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    x, _, s = biased(64)
    parts = torch.utils.data.TensorDataset(x, torch.zeros(64, 4), s)
    with pytest.raises(GuardConflict, match="several labels"):
        fit([FairnessRegularization()], Labels, torch.utils.data.DataLoader(parts, 16))


def test_a_step_that_expects_the_group_gets_it():
    class Three(Logit):
        def training_step(self, batch, batch_idx):
            x, y, _group = batch
            return super().training_step((x, y), batch_idx)

    fit([FairnessRegularization(batch=Batch(withhold_group=False))], Three, data())
    with pytest.raises(ValueError, match="not enough values") as raised:
        fit([FairnessRegularization()], Three, data())
    assert "withhold_group=False" in raised.value.__notes__[0]


def test_early_stopping_on_the_gap():
    stop = pl.callbacks.EarlyStopping("guard/fairness/gap", stopping_threshold=1.0, check_on_train_epoch_end=True)
    net = fit([FairnessRegularization(), stop], Logit, data(), max_epochs=5)
    assert net.fitted.current_epoch == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"notion": "justice"}, "notion='justice'"),
        ({"weight": -1.0}, "weight=-1"),
        ({"steepness": 0.0}, "steepness=0"),
        ({"memory": 1.0}, "memory=1"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        FairnessRegularization(**options)


def test_groups_and_logits_of_different_length_are_refused():
    class Halving(PlainNet):
        def training_step(self, batch, batch_idx):
            return super().training_step([part[:8] for part in batch], batch_idx)

    with pytest.raises(GuardConflict, match="16 groups for 8 rows"):
        fit([FairnessRegularization(batch=Batch(withhold_group=False))], Halving)
