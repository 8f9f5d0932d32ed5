"""The membership attack finds what a network memorised, finds nothing where there is nothing, and knows its claims."""

import math

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset, WeightedRandomSampler

import lightning_guard as lg
from lightning_guard.callbacks import DPSGD, PrivacyAudit
from lightning_guard.evaluation import Privacy, Subject, Task
from lightning_guard.report.members import trained_on
from tests import toys


class Memory(nn.Module):
    """Gives the label of rows that it knows, and noise that its weights decide to others."""

    def __init__(self, x, y, sure=4.0):
        super().__init__()
        self.known, self.labels, self.sure = x, y, sure
        self.weight = nn.Parameter(torch.randn(x.shape[1], 2, generator=torch.Generator().manual_seed(9)))

    def forward(self, x):
        near = (x[:, None] - self.known).abs().sum(-1)
        logits = x @ self.weight
        hit = near.min(1)
        right = nn.functional.one_hot(self.labels[hit.indices], 2) * self.sure
        return logits + right * (hit.values < 1e-6)[:, None]


def data(n=400, seed=0, width=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator)
    return x, torch.randint(2, (n,), generator=generator), torch.randint(2, (n,), generator=generator)


def judged(sure, n=1200, privacy=None, **options):
    inside, outside = data(n, 1), data(n, 2)
    module = Memory(*inside[:2], sure)
    subject = Subject(module, [outside], train=[inside], privacy=privacy, group_names=["a", "b"])
    return Privacy(**options).evaluate(subject)


def test_a_memory_is_found_and_none_is_not():
    found = judged(sure=8.0).figures
    assert found["privacy/class_auc"].value > 0.99
    assert found["privacy/loss_at_1"].value > 0.7
    assert found["privacy/loss_at_01"].value > 0.3
    nothing = judged(sure=0.0)
    low, high = nothing.intervals["privacy/class_auc"]
    assert low < 0.5 < high
    low, high = nothing.intervals["privacy/loss_at_1"]
    assert low < 0.01 < high


def test_groups_are_told_apart_each_by_itself():
    """One group is memorised, the other not: the mean hides who is at risk."""
    inside, outside = data(1200, 1), data(1200, 2)
    of_a = inside[2] == 0
    module = Memory(inside[0][of_a], inside[1][of_a], 8.0)
    subject = Subject(module, [outside], train=[inside], group_names=["a", "b"], class_names=["no", "yes"])
    evidence = Privacy().evaluate(subject)
    bars = evidence.bars["privacy/auc_by_group"]
    auc = dict(zip(bars.categories, bars.values, strict=True))
    assert auc["a"] > 0.95
    assert abs(auc["b"] - 0.5) < 0.07
    assert evidence.bars["privacy/auc_by_class"].categories == ["no", "yes"]


def test_small_groups_have_no_figure():
    evidence = judged(8.0, n=50, min_support=30)
    assert evidence.bars["privacy/auc_by_group"].values == [None, None]
    assert any("fewer than 30" in note for note in evidence.notes)
    assert evidence.figures["privacy/loss_at_01"].value is None  # of 50 examples a thousandth is nobody


def test_examples_that_occur_twice_are_neither():
    inside, outside = data(300, 1), data(300, 2)
    mixed = tuple(torch.cat([a[:100], b]) for a, b in zip(inside, outside, strict=True))
    module = Memory(*inside[:2], 8.0)
    found = Privacy().evaluate(Subject(module, [mixed], train=[inside]))
    assert "100 of 300 trained and 100 of 400 held-out examples occur more than once" in found.notes[0]
    rest = tuple(part[100:] for part in inside)
    assert found.figures == Privacy().evaluate(Subject(module, [outside], train=[rest])).figures


def test_copies_do_not_make_members_of_what_is_usual():
    """Rows of few kinds, a model that knows nothing but how usual each is: there is no membership to find."""
    draws = torch.Generator().manual_seed(0)
    kinds = (torch.rand(4000, generator=draws) ** 4 * 900).long()

    class Usual(nn.Module):
        def forward(self, x):
            logit = -x[:, 0] / 100
            return torch.stack([-logit, logit], 1)

    x, y = kinds[:, None].float(), torch.ones(4000).long()
    evidence = Privacy().evaluate(Subject(Usual(), [(x[2500:], y[2500:])], train=[(x[:2500], y[:2500])]))
    low, high = evidence.intervals["privacy/loss_auc"]
    assert low < 0.5 < high


def test_a_claim_that_is_beaten_is_told_and_one_that_holds_is_not():
    claims = {"claims": [(1.0, 1e-5)], "unit": "example"}
    beaten = judged(8.0, privacy=claims)
    assert any("finds more members than the claim of epsilon = 1 allows" in note for note in beaten.notes)
    assert beaten.figures["privacy/epsilon"].value == 1.0
    assert beaten.figures["privacy/allowed_at_1"].value == pytest.approx(math.e * 0.01 + 1e-5)
    curve = beaten.curves["privacy/allowed"]
    assert curve.y[0] == pytest.approx(math.e * curve.x[0] + 1e-5)
    for sure in (0.0, 0.5):
        assert not any("allows" in note for note in judged(sure, privacy=claims).notes)
    loose = judged(8.0, privacy={"claims": [(20.0, 1e-5)]})
    assert not any("allows" in note for note in loose.notes)
    assert "privacy/allowed" not in judged(8.0).curves
    assert "privacy/epsilon" not in judged(8.0).figures


def test_an_audit_is_told_with_its_ceiling():
    told = {"lower_bound": 0.7, "ceiling": 5.4, "confidence": 0.95, "audit_delta": 1e-5}
    figures = judged(0.0, privacy=told).figures
    assert figures["privacy/epsilon_lower_bound"].value == 0.7
    assert figures["privacy/audit_ceiling"].value == 5.4


def test_without_the_training_data_the_claim_alone_is_told():
    subject = Subject(nn.Linear(5, 2), [data()], privacy={"claims": [(2.0, 1e-5)]})
    evidence = Privacy().evaluate(subject)
    assert list(evidence.figures) == ["privacy/epsilon", "privacy/delta", "privacy/allowed_at_1"]
    assert evidence.notes == ["No membership attack was made: the training examples are not given; give "
                              "Subject(train=...)."]  # fmt: skip


def test_a_regression_is_attacked_by_its_error():
    inside, outside = data(300, 1), data(300, 2)
    inside, outside = ((x, x.sum(1) + torch.randn(300)) for x, *_ in (inside, outside))

    class Table(nn.Module):
        def forward(self, x):
            near = (x[:, None] - inside[0]).abs().sum(-1).min(1)
            return torch.where(near.values < 1e-6, inside[1][near.indices], x.sum(1))

    evidence = Privacy().evaluate(Subject(Table(), [outside], train=[inside]))
    assert evidence.figures["privacy/loss_auc"].value == 1.0
    assert "privacy/class_auc" not in evidence.figures


def test_broken_outputs_are_no_attack():
    inside, outside = data(100, 1), data(100, 2)
    outside[0][0] = torch.nan
    evidence = Privacy().evaluate(Subject(nn.Linear(5, 2), [outside], train=[inside]))
    assert not evidence.figures
    assert "1 outputs are not numbers" in evidence.notes[-1]


# What was trained on --------------------------------------------------------------------------------------------------


class Data(pl.LightningDataModule):
    def __init__(self, loader):
        super().__init__()
        self.loader = loader

    def train_dataloader(self):
        return self.loader

    def test_dataloader(self):
        return toys.loader(shuffle=False)


def after(loader, callbacks=(), **options):
    source = Data(loader)
    module = toys.fit(list(callbacks), toys.PlainNet, source, **options)
    return trained_on(module.fitted, source)


def test_rows_are_those_of_the_data_whatever_guards_draw():
    found = after(toys.loader(), [PrivacyAudit(canaries=100, seed=0)])
    x = torch.cat([batch[0] for batch in found])
    assert torch.equal(x, toys.rows()[0])  # in their order, without canaries
    assert torch.equal(torch.cat([batch[0] for batch in found]), x)


@pytest.mark.parametrize(
    ("loader", "options", "why"),
    [
        (toys.loader, {"limit_train_batches": 2}, "limit_train_batches=2"),
        (toys.loader, {"overfit_batches": 1}, "overfit_batches=1"),
        (toys.loader, {"max_steps": 2}, "ended after 2 of 4 batches"),
        (lambda: DataLoader(toys.Rows(), 16, sampler=WeightedRandomSampler(torch.ones(64), 64)), {}, "WeightedRandom"),
    ],
)
def test_rows_that_are_not_known_are_refused(loader, options, why):
    assert why in after(loader(), **options)


def test_a_stream_has_no_rows():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([toys.Rows()[i] for i in range(32)])

    assert "stream" in after(DataLoader(Stream(), 16))


def test_a_subset_is_what_was_trained_on():
    found = after(DataLoader(Subset(toys.Rows(), range(10, 42)), 16, shuffle=True))
    assert torch.equal(torch.cat([batch[0] for batch in found]), toys.rows()[0][10:42])


# In a comparison ------------------------------------------------------------------------------------------------------


class Noise(pl.LightningDataModule):
    """Labels that nothing predicts: whatever is right on training rows is memory."""

    def setup(self, stage):
        x, y = torch.randn(700, 20, generator=torch.Generator().manual_seed(3)), torch.arange(700) % 2
        self.parts = TensorDataset(x[:350], y[:350]), TensorDataset(x[350:], y[350:])

    def train_dataloader(self):
        return DataLoader(self.parts[0], 50, shuffle=True)

    def test_dataloader(self):
        return DataLoader(self.parts[1], 350)


class Wide(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 512), nn.ReLU(), nn.Linear(512, 2))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    arms = {"none": [], "private": [DPSGD(target_epsilon=0.1, delta=1e-4)]}
    folder = tmp_path_factory.mktemp("memory")
    return lg.compare(Wide, Noise, arms, {"max_epochs": 25, "accelerator": "cpu"}, 1, [Task(), Privacy()], folder)


def test_the_attack_works_on_an_overfitted_model_and_fails_on_the_private_one(compared):
    none, private = compared["runs"]
    assert none["intervals"]["privacy/class_auc"][0] > 0.75  # half of the strangers are guessed right, as surely
    assert abs(private["values"]["privacy/class_auc"] - 0.5) < 0.09  # four standard errors
    assert not any("allows" in note for note in private["notes"])


def test_the_claim_is_that_of_the_plan(compared):
    none, private = compared["runs"]
    assert private["values"]["privacy/epsilon"] == pytest.approx(0.1, abs=0.003)
    assert private["values"]["privacy/delta"] == 1e-4
    assert "privacy/epsilon" not in none["values"] or none["values"]["privacy/epsilon"] is None
    allowed = private["curves"]["privacy/allowed"]
    assert all(y >= x for x, y in zip(allowed["x"], allowed["y"], strict=True))
    assert allowed["y"][-1] == 1
