"""The ledger against margins read off by hand, and training that must not notice it."""

import csv
import os
import random
import socket

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from lightning_guard.callbacks import DPSGD, PrivacyAudit, SampleLedger
from lightning_guard.guard import GuardConflict
from tests.toys import CLASSES, FEATURES, ROWS, PlainNet, Rows, fit, loader, rows, same


class ByHand(pl.Callback):
    """The margins of all rows at the end of each epoch."""

    def __init__(self, change=lambda x: x):
        self.change, self.passes = change, []

    def on_train_epoch_end(self, trainer, module):
        x, y, _ = rows()
        module.eval()
        with torch.no_grad():
            logits = module.net(self.change(x))
        module.train()
        found = []
        for row, own in zip(logits.tolist(), y.tolist(), strict=True):
            found.append(row[own] - max(value for c, value in enumerate(row) if c != own))
        self.passes.append(found)


@pytest.mark.parametrize(
    ("options", "epochs"),
    [({}, [1, 2, 3, 4]), ({"every": 2}, [2, 4]), ({"until": 3}, [1, 2, 3]), ({"every": 2, "until": 3}, [2])],
)
def test_the_area_is_the_mean_of_margins_by_hand(options, epochs):
    ledger, hand = SampleLedger(**options), ByHand()
    fit([ledger, hand], max_epochs=4)
    expected = np.mean([hand.passes[epoch - 1] for epoch in epochs], axis=0)
    np.testing.assert_allclose(ledger.aum.numpy(), expected, atol=1e-5)
    assert ledger.passes == len(epochs)


def test_hooks_on_the_batch_are_applied():
    class Scaling(PlainNet):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return (3 * batch[0], *batch[1:])

    ledger, hand = SampleLedger(), ByHand(lambda x: 3 * x)
    fit([ledger, hand], Scaling)
    np.testing.assert_allclose(ledger.aum.numpy(), np.mean(hand.passes, axis=0), atol=1e-5)


class Augmented(Rows):
    """Draws from all three global generators."""

    def __getitem__(self, i):
        x, y, group = super().__getitem__(i)
        return x + 0.1 * torch.rand(FEATURES) + 0.1 * random.random() + 0.1 * float(np.random.rand()), y, group


@pytest.mark.parametrize("workers", [0, 1])
def test_training_draws_what_it_would_have(workers):
    def trained(callbacks):
        random.seed(0), np.random.seed(0)
        data = DataLoader(Augmented(), 16, shuffle=True, num_workers=workers)
        net = fit(callbacks, data=data, max_epochs=3)
        return net, torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    ledger = SampleLedger()
    (one, *draws), (other, *expected) = trained([ledger]), trained(None)
    assert same(one, other)
    assert torch.equal(draws[0], expected[0])
    assert draws[1:] == expected[1:]
    assert ledger.passes == 3
    if not workers:
        first = fit([again := SampleLedger()], data=loader(), max_epochs=3)
        assert not same(first, one)  # positive control: the augmentation matters
        assert not torch.equal(again.aum, ledger.aum)


def test_metrics_logs_and_modes_are_untouched():
    class Watching(PlainNet):
        def on_train_epoch_end(self):
            assert all(part.training for part in self.modules())
            self.counted = int(self.accuracy.update_count) if hasattr(self.accuracy, "update_count") else 0

    net, plain = fit([SampleLedger()], Watching), fit(None, Watching)
    assert net.counted == plain.counted
    assert net.fitted.callback_metrics.keys() == plain.fitted.callback_metrics.keys()
    assert all(torch.equal(net.fitted.callback_metrics[k], v) for k, v in plain.fitted.callback_metrics.items())


def test_resumed_it_goes_on(tmp_path):
    data = loader(shuffle=False)
    whole, first, second = SampleLedger(), SampleLedger(), SampleLedger()

    class Calm(PlainNet):
        def __init__(self):
            super().__init__()
            self.net[3].p = 0.0  # dropout draws from the global generator, which no resume restores

    calm = {"module": Calm, "data": data}
    fit([whole], **calm, max_epochs=4)
    kept = ModelCheckpoint(tmp_path, filename="half", save_on_train_epoch_end=True)
    fit([first, kept], **calm, max_epochs=2, enable_checkpointing=True)
    fit([second], **calm, max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert second.passes == 4
    assert torch.equal(second.aum, whole.aum)
    with pytest.raises(GuardConflict, match="64 rows and have 48 now"):
        fit([SampleLedger()], Calm, loader(n=48), max_epochs=4, ckpt_path=tmp_path / "half.ckpt")


def noisy(count=600, rate=0.2):
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (count,), generator=draw)
    x = F.one_hot(y, FEATURES) + 0.3 * torch.randn(count, FEATURES, generator=draw)
    wrong = torch.rand(count, generator=draw) < rate
    return x, torch.where(wrong, (y + 1) % CLASSES, y), wrong


def ledger_of(noise, **options):
    x, y, wrong = noisy(rate=noise)
    ledger = SampleLedger(**options)
    fit(
        [ledger], lambda: PlainNet(lr=0.2, norm=False), DataLoader(TensorDataset(x, y), 32, shuffle=True), max_epochs=10
    )
    return ledger, wrong


def test_wrong_labels_are_named():
    ledger, wrong = ledger_of(0.2)
    assert roc_auc_score(wrong, -ledger.aum) > 0.97
    named = ledger.suspicious
    assert wrong[named].float().mean() > 0.9
    assert wrong[named].sum() > 0.7 * wrong.sum()
    assert torch.equal(ledger.aum[named], ledger.aum[named].sort().values)  # the worst first
    assert f"{len(named)} of 600" in ledger.notes()[0]


def test_right_labels_are_hardly_named():
    ledger, _ = ledger_of(0.0)
    assert len(ledger.suspicious) < 0.03 * 600


def test_a_known_share():
    ledger, wrong = ledger_of(0.2, share=0.1)
    assert len(ledger.suspicious) == 60
    assert wrong[ledger.suspicious].float().mean() > 0.9


def test_the_file_says_what_was_found(tmp_path):
    ledger, _ = ledger_of(0.2, path=str(tmp_path / "new" / "ledger.csv"))
    with (tmp_path / "new" / "ledger.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert sorted(int(line["index"]) for line in lines) == list(range(600))
    named = ledger.suspicious.tolist()
    assert [int(line["index"]) for line in lines[: len(named)]] == named
    assert [line["suspicious"] for line in lines] == ["1"] * len(named) + ["0"] * (600 - len(named))
    _, y, _ = noisy()
    for line in lines:
        i = int(line["index"])
        assert int(line["label"]) == y[i]
        assert float(line["mean_margin"]) == pytest.approx(ledger.aum[i].item(), rel=1e-4)
        assert (float(line["last_margin"]) > 0) == (int(line["predicted"]) == y[i])


def test_rows_are_the_users_beside_canaries():
    ledger = SampleLedger()
    fit([PrivacyAudit(canaries=32, seed=5), ledger])
    assert len(ledger.aum) == ROWS
    picked = SampleLedger()
    fit([picked], data=DataLoader(Subset(Rows(), range(0, 64, 2)), 8, shuffle=True))
    assert torch.equal(picked._label, rows()[1][::2])


def test_targets_that_are_no_class_are_never_suspicious():
    x, y, _ = rows()
    y = y.clone()
    y[5] = -100

    class Ignoring(PlainNet):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1], ignore_index=-100)

    ledger = SampleLedger(share=0.99)
    fit([ledger], Ignoring, DataLoader(TensorDataset(x, y), 16))
    assert ledger.aum.isnan().nonzero().tolist() == [[5]]
    assert 5 not in ledger.suspicious.tolist()


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(x, y) for x, y, _ in zip(*rows(), strict=True)])


class Regression(PlainNet):
    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()


def merged(examples):
    x, y, _ = zip(*examples, strict=True)
    return torch.stack(x[1:] or x), torch.stack(y[1:] or y)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: DataLoader(Stream(), 16), "Stream is a stream"),
        (lambda: DataLoader([tuple(p[:16] for p in rows())] * 4, batch_size=None), "batch_size=None"),
        (lambda: [tuple(p[:16] for p in rows())] * 4, "come from a list"),
        (lambda: DataLoader(TensorDataset(rows()[0], rows()[0]), 16), "no margin for logits"),
        (lambda: DataLoader(Rows(), 16, collate_fn=merged), "batch of 15 examples from 16 rows"),
    ],
)
def test_where_no_row_can_be_followed_it_is_refused(data, message):
    with pytest.raises(GuardConflict, match=message):
        fit([SampleLedger()], Regression, data())


def test_several_loaders_are_refused():
    class Both(PlainNet):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    with pytest.raises(GuardConflict, match="come from a dict"):
        fit([SampleLedger()], Both, {"a": loader(), "b": loader()})


@pytest.mark.parametrize(
    ("options", "message"),
    [({"every": -1}, "every=-1"), ({"until": 1, "every": 2}, "until=1"), ({"share": 0.0}, "share=0.0")],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SampleLedger(**options)


def test_a_training_shorter_than_the_first_pass_is_refused():
    with pytest.raises(GuardConflict, match="every=3 epochs makes no pass in max_epochs=2"):
        fit([SampleLedger(every=3)])


def test_beside_a_privacy_guarantee_it_is_refused():
    with pytest.raises(GuardConflict, match="without noise"):
        fit([SampleLedger(), DPSGD(delta=1e-3, noise_multiplier=1.0)], lambda: PlainNet(norm=False))


def test_one_logit():
    class Binary(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(FEATURES, 1)

        def forward(self, x):
            return self.net(x).squeeze(1)

        def training_step(self, batch, batch_idx):
            return F.binary_cross_entropy_with_logits(self(batch[0]), (batch[1] > 0).float())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    x, y, _ = rows()
    ledger = SampleLedger()
    net = fit([ledger], Binary, DataLoader(TensorDataset(x, (y > 0).long()), 16), max_epochs=1)
    with torch.no_grad():
        logits = net(x)
    torch.testing.assert_close(ledger.aum, torch.where(y > 0, logits, -logits))
    assert torch.equal(ledger._predicted, (logits > 0).long())


def work(rank, port, folder):
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", NODE_RANK="0", LOCAL_RANK=str(rank),
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    x, y, _ = rows(33)  # an odd number: one rank has a row more
    ledger, hand = SampleLedger(), Keep()
    fit([ledger, hand], lambda: PlainNet(norm=False), DataLoader(TensorDataset(x, y), 8), strategy="ddp", devices=2)
    torch.save({"aum": ledger.aum, "label": ledger._label, "hand": hand.seen}, f"{folder}/{rank}.pt")


class Keep(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_epoch_end(self, trainer, module):
        module.eval()
        x, y, _ = rows(33)
        with torch.no_grad():
            logits = module(x)
        module.train()
        others = logits.masked_fill(F.one_hot(y, CLASSES).bool(), -torch.inf).amax(1)
        self.seen.append(logits[torch.arange(33), y] - others)


def test_processes_share_the_pass_and_hold_the_whole(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for rank in ranks:
        assert torch.equal(rank["label"], rows(33)[1])
        torch.testing.assert_close(rank["aum"], torch.stack(rank["hand"]).mean(0), atol=1e-5, rtol=1e-5)
    assert torch.equal(ranks[0]["aum"], ranks[1]["aum"])


def test_rows_that_a_sampler_leaves_out_are_not_accused():
    sampler = torch.utils.data.SubsetRandomSampler(range(32))
    with pytest.raises(GuardConflict, match="SubsetRandomSampler"):
        fit([SampleLedger()], data=DataLoader(Rows(), 16, sampler=sampler))
