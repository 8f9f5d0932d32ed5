"""The audit end to end: what is private passes, and training that leaks, or is sabotaged, does not."""

import copy

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

from lightning_guard.callbacks import DPSGD, PrivacyAudit
from lightning_guard.functional.privacy import Clipping, Mixed, NoisySum, ceiling
from lightning_guard.guard import Batch, GuardConflict
from lightning_guard.mixins import GuardMixin
from tests.toys import ManualNet, PlainNet, Rows, fit, loader, same, trainer

FEATURES, CLASSES, ROWS = 1024, 4, 400


class Softmax(pl.LightningModule):
    """Softmax regression on many inputs, most of them always 0: an outlier has weights that only it moves."""

    def __init__(self, lr=1.0):
        super().__init__()
        self.net, self.lr = nn.Linear(FEATURES, CLASSES), lr

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


def data():
    x = torch.zeros(ROWS, FEATURES)
    x[:, :16] = torch.rand(ROWS, 16, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(x, (x[:, 0] * CLASSES).long()), 100, shuffle=True)


def audited(*guards, canaries=400, lr=1.0, epochs=10, **options):
    guard = PrivacyAudit(canaries=canaries, seed=1, **options)
    fit([guard, *guards], lambda: Softmax(lr), data(), max_epochs=epochs)
    return guard


def private(epsilon=1.0, **options):
    return DPSGD(delta=1e-5, target_epsilon=epsilon, test_seed=2, **options)


# Controls ---------------------------------------------------------------------------------------------------------


def test_plain_training_on_outliers_is_seen_to_leak():
    guard = audited()
    assert guard.result.epsilon_lower > 2
    assert guard.result.epsilon_lower <= guard.result.ceiling == ceiling(400)
    assert (guard.result.canaries, guard.result.confidence, guard.result.delta) == (400, 0.95, 0.0)
    assert not guard.refuted  # nobody claims anything


def test_plain_training_on_wrong_labels_is_seen_to_leak():
    class Deep(Softmax):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(FEATURES, 256), nn.ReLU(), nn.Linear(256, CLASSES))

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 3e-3)

    x = torch.randn(200, FEATURES, generator=torch.Generator().manual_seed(3))
    rows = DataLoader(TensorDataset(x, (x[:, :CLASSES]).argmax(1)), 50, shuffle=True)
    guard = PrivacyAudit(canaries=200, kind="mislabelled", seed=1)
    fit([guard], Deep, rows, max_epochs=10)
    assert guard.result.epsilon_lower > 1


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 4.0])
def test_private_training_keeps_its_claim(epsilon):
    guard = audited(private(epsilon))
    assert guard.result.epsilon_lower < epsilon
    assert guard.result.delta == 1e-5
    assert not guard.refuted


def test_a_training_that_learns_nothing_shows_nothing():
    assert audited(lr=0.0).result.epsilon_lower == 0


def test_disabled_clipping_is_caught(monkeypatch):
    # C = 0.1 and a learning rate to match; an outlier's own gradient is a hundred times as long.
    small = {"max_grad_norm": 0.1}
    assert not audited(private(**small), lr=10.0).refuted
    monkeypatch.setattr(Clipping, "factors", lambda self, norms, bound, margin=0.0: torch.ones_like(norms))
    with pytest.raises(GuardConflict, match="one example moved the clipped sum"):
        audited(private(**small), lr=10.0)  # the guard's own probe sees it first
    monkeypatch.setattr(DPSGD, "_probe", lambda *args: None)
    with pytest.warns(UserWarning, match="THE CLAIM IS REFUTED: dp_sgd claims epsilon = 1 "):
        guard = audited(private(**small), lr=10.0)
    assert guard.result.epsilon_lower > 1.5
    assert guard.refuted


def test_noise_that_is_too_small_is_caught(monkeypatch):
    begin = NoisySum.begin
    monkeypatch.setattr(NoisySum, "begin", lambda self, std: begin(self, std / 50))
    with pytest.warns(UserWarning, match="THE CLAIM IS REFUTED"):
        guard = audited(private())
    assert guard.result.epsilon_lower > 1.5
    assert guard.refuted
    assert guard.notes()[0].startswith("THE CLAIM IS REFUTED: dp_sgd claims epsilon = 1 at delta = 1e-05")


def test_a_bound_at_a_smaller_delta_refutes_nothing(monkeypatch):
    begin = NoisySum.begin
    monkeypatch.setattr(NoisySum, "begin", lambda self, std: begin(self, std / 50))
    guard = audited(private(), delta=0.0)
    assert guard.result.epsilon_lower > 1.5
    assert not guard.refuted  # (epsilon, 1e-5)-privacy promises nothing at delta = 0


# What it does to a training ----------------------------------------------------------------------------------------


class Looking(Callback):
    def on_train_start(self, trainer, module):
        self.loader = trainer.train_dataloader


def test_the_rows_are_the_users_and_half_of_the_canaries():
    looking, given = Looking(), data()
    guard = PrivacyAudit(canaries=100, seed=1)
    fit([guard, looking], Softmax, given, max_epochs=1)
    mixed = looking.loader.dataset
    assert isinstance(mixed, Mixed)
    assert mixed.dataset is given.dataset
    coins = guard.state()["coins"]
    assert len(mixed) == ROWS + int(coins.sum())
    assert 30 < int(coins.sum()) < 70
    assert (looking.loader.batch_size, looking.loader.drop_last) == (100, False)
    assert len(given.dataset) == ROWS


@pytest.mark.parametrize("kind", ["noise", "mislabelled"])
@pytest.mark.parametrize("form", ["pair", "triple", "named", "dict"])
def test_canaries_have_the_form_of_the_rows(kind, form):
    looking = Looking()
    fit([PrivacyAudit(canaries=40, kind=kind, seed=1), looking], PlainNet, loader(form), max_epochs=1)
    row, canaries = Rows(form)[0], looking.loader.dataset.extra
    assert {type(canary) for canary in canaries} == {type(row)}
    inputs, batch = Rows(form).data[0], Batch()
    for canary in canaries:
        x, y = batch.read(canary, "inputs"), batch.read(canary, "target")
        assert (x.shape, x.dtype, y.shape, y.dtype) == (inputs[0].shape, inputs.dtype, (), torch.int64)
        assert inputs.min() <= x.min() <= x.max() <= inputs.max()
        copied = (inputs == x).all(1)
        assert copied.any() == (kind == "mislabelled")
        assert not (Rows(form).data[1][copied] == y).any()


def test_coins_come_from_the_operating_system():
    guards = [PrivacyAudit(canaries=64), PrivacyAudit(canaries=64)]
    for guard in guards:
        fit([guard], Softmax, data(), seed=0, max_epochs=1)
    first, second = (guard.state()["coins"] for guard in guards)
    assert not torch.equal(first, second)


class Sizes(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen.append(len(batch[0]))


def with_a_row_over(drop_last=False):
    """Rows that make, together with the canaries of seed 1, batches of 16 and one row more."""
    probe = PrivacyAudit(canaries=40, seed=1)
    fit([probe], max_epochs=1)
    rows = 65 - int(probe.state()["coins"].sum())
    return DataLoader(TensorDataset(torch.rand(rows, 6), torch.arange(rows) % 3), 16, drop_last=drop_last)


def test_canaries_leave_no_batch_of_a_single_row():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fit(None, lambda: PlainNet(norm=True), DataLoader(TensorDataset(torch.rand(65, 6), torch.arange(65) % 3), 16))
    sizes, guard = Sizes(), PrivacyAudit(canaries=40, seed=1)
    fit([guard, sizes], lambda: PlainNet(norm=True), with_a_row_over(), max_epochs=2)
    assert sizes.seen == [16, 16, 16, 17] * 2
    assert guard.result is not None
    sizes = Sizes()
    fit([PrivacyAudit(canaries=40, seed=1), sizes], PlainNet, with_a_row_over(drop_last=True), max_epochs=1)
    assert sizes.seen == [16] * 4


def test_private_draws_are_planned_by_the_size_that_was_given():
    claimed = private(3.0)
    fit([PrivacyAudit(canaries=40, seed=1), claimed], lambda: PlainNet(norm=False), with_a_row_over())
    assert (claimed.plan.units, claimed.plan.batch_size) == (65, 16)


def test_scoring_leaves_no_trace(monkeypatch):
    with_it = fit([PrivacyAudit(canaries=40, seed=1)])
    monkeypatch.setattr(PrivacyAudit, "_scores", lambda self, run: torch.zeros(40, dtype=torch.float64))
    assert same(with_it, fit([PrivacyAudit(canaries=40, seed=1)]))


def test_rows_that_draw_from_the_global_generators_leave_no_trace():
    class Augmented(Dataset):
        def __len__(self):
            return 64

        def __getitem__(self, i):
            return torch.rand(6) * float(np.random.rand()), i % 3

    class Kept(Callback):
        def on_train_start(self, trainer, module):
            self.after = torch.get_rng_state(), np.random.get_state()[2], trainer.train_dataloader.dataset.extra

    seen = []
    for seed in (0, 0, 1):
        kept = Kept()
        fit([PrivacyAudit(canaries=20, seed=1), kept], data=DataLoader(Augmented(), 16), max_epochs=1, seed=seed)
        seen.append(kept.after)
    assert torch.equal(seen[0][0], seen[1][0])
    assert not torch.equal(seen[0][0], seen[2][0])
    assert all(torch.equal(a[0], b[0]) for a, b in zip(seen[0][2], seen[2][2], strict=True))


def test_a_resumed_audit_is_the_uninterrupted_one(tmp_path):
    kept = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    rows = DataLoader(data().dataset, 100)
    whole = PrivacyAudit(canaries=200)
    one = fit([whole, kept], Softmax, rows, max_epochs=4, enable_checkpointing=True)
    resumed = PrivacyAudit(canaries=200)
    again = fit([resumed], Softmax, rows, max_epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt", seed=5)
    assert same(one, again)
    assert resumed.result == whole.result
    assert torch.equal(resumed.state()["coins"], whole.state()["coins"])
    for other in (PrivacyAudit(canaries=100), PrivacyAudit(canaries=0), PrivacyAudit(200, kind="mislabelled")):
        with pytest.raises(GuardConflict, match="200 canaries of kind noise"):
            fit([other], Softmax, rows, max_epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt")


def test_reloaded_loaders_get_the_same_canaries():
    class Counting(Callback):
        def __init__(self):
            self.seen = []

        def on_train_epoch_start(self, trainer, module):
            self.seen.append(trainer.train_dataloader.dataset.extra)

    counting, net = Counting(), PlainNet()
    net.train_dataloader = loader
    trainer([PrivacyAudit(canaries=40, seed=1), counting], reload_dataloaders_every_n_epochs=1).fit(net)
    first, second = counting.seen
    assert all(a[0] is b[0] for a, b in zip(first, second, strict=True))


# What it says -------------------------------------------------------------------------------------------------------


def test_what_it_says(tmp_path, caplog):
    logger = CSVLogger(tmp_path)
    guard = PrivacyAudit(canaries=100, seed=1)
    with caplog.at_level("INFO"):
        net = fit([guard, private(3.0)], Softmax, data(), max_epochs=2, logger=logger)
    result = guard.result
    name = "guard/privacy_audit/epsilon_lower_bound"
    assert float(net.fitted.callback_metrics[name]) == pytest.approx(result.epsilon_lower)
    assert name in (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    said = f"epsilon >= {result.epsilon_lower:.2f} at delta = 1e-05 with 95 % confidence (claimed: 3 by dp_sgd); 100"
    assert said in caplog.text.replace("\n", " ")
    assert guard.notes()[0].endswith(f"at most {result.ceiling:.2f}. An audit refutes privacy and never proves it.")
    assert guard.notes()[-1] == "This model was trained on canaries: it is for auditing, not for use."
    assert PrivacyAudit().notes() == []


def test_the_claim_is_what_was_spent():
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.should_stop = True

    guard, claimed = PrivacyAudit(canaries=100, seed=1), private(3.0)
    fit([guard, claimed, Stop()], Softmax, data(), max_epochs=5)
    assert guard._claim[1] == claimed.plan.epsilon(claimed.state()["steps"]) < 2


# What is refused, and what is not -----------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(torch.rand(64, 6), torch.zeros(64, dtype=torch.long), strict=True)


class Told(Dataset):
    def __init__(self, target):
        self.target = target

    def __len__(self):
        return 64

    def __getitem__(self, i):
        return torch.rand(6), self.target(i)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda: DataLoader(Stream(), 16), "is a stream"),
        (lambda: DataLoader(Rows("pair"), 16, sampler=WeightedRandomSampler(torch.ones(64), 64)), "Weighted"),
        (lambda: loader("tensor"), "no target"),
        (lambda: DataLoader(Told(lambda i: i / 7), 16), "a quantity and not a class"),
        (lambda: DataLoader(Told(lambda i: torch.zeros(3)), 16), "not one class"),
        (lambda: DataLoader(Told(lambda i: 1), 16), "have one class between them"),
        (lambda: {"a": loader("pair"), "b": loader("pair")}, "does not read one loader"),
    ],
    ids=["stream", "weights", "unlabelled", "regression", "several", "one class", "loaders"],
)
def test_data_without_canaries_are_refused(rows, message):
    with pytest.raises(GuardConflict, match=message):
        fit([PrivacyAudit(canaries=20)], data=rows())
    with pytest.raises(GuardConflict, match="mislabelled"):
        fit([PrivacyAudit(canaries=20)], data=DataLoader([("text", i % 2) for i in range(64)], 16))


def test_runs_that_cannot_be_audited_are_refused():
    with pytest.raises(GuardConflict, match="overfit_batches"):
        fit([PrivacyAudit(canaries=20)], overfit_batches=2)
    with pytest.raises(GuardConflict, match="users"):
        fit([PrivacyAudit(canaries=20), DPSGD(1e-3, noise_multiplier=1.0, users="group")], lambda: PlainNet(norm=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"canaries": 3}, "canaries=3 could show nothing"),
        ({"canaries": -1}, "canaries=-1 could show nothing"),
        ({"kind": "birds"}, "kind='birds' is not known"),
        ({"confidence": 1.0}, "confidence=1.0"),
        ({"delta": 1.0}, "delta=1.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PrivacyAudit(**options)


class OneLogit(GuardMixin, PlainNet):
    """Two classes, one logit, a loss of its own and manual optimisation."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net[-1] = nn.Linear(16, 1)

    def guard_losses(self, logits, target):
        assert not logits.requires_grad  # asked by the audit alone
        return F.softplus(-(2 * target.float() - 1) * logits[:, 0])

    def training_step(self, batch, batch_idx):
        self.optimizers().zero_grad()
        self.manual_backward(F.binary_cross_entropy_with_logits(self(batch[0])[:, 0], batch[1].float()))
        self.optimizers().step()


@pytest.mark.parametrize("kind", ["noise", "mislabelled"])
def test_two_classes_own_losses_and_manual_optimisation(kind):
    rows = TensorDataset(torch.rand(64, 6), (torch.rand(64) < 0.5).float())
    guard = PrivacyAudit(canaries=40, kind=kind, seed=1)
    fit([guard], OneLogit, DataLoader(rows, 16))
    assert guard.result.canaries == 40
    fit([guard], ManualNet, loader("pair"))
    assert guard.result is not None


def test_a_guard_is_reusable_and_copies():
    guard = PrivacyAudit(canaries=40, seed=1)
    fit([guard])
    first = guard.result
    fit([copy.deepcopy(guard)])
    fit([guard])
    assert guard.result == first
