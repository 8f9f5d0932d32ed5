"""Trimmed loss against loops written by hand."""

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_guard.callbacks import DPSGD, AdversarialTraining, TrimmedLoss
from lightning_guard.guard import GuardConflict
from lightning_guard.mixins import GuardMixin
from tests.toys import CLASSES, ManualNet, PlainNet, Rows, fit, loader, rows, same


def by_hand(net, share=0.25, start=3, gradual=False, epochs=2, accumulate=1, bf16=False):
    """Nothing of ours. Dropout and BatchNorm included; a pass in eval mode finds the losses."""
    optimizer = net.configure_optimizers()["optimizer"]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    done = 0
    for _ in range(epochs):
        for i, (x, y, _) in enumerate(loader(shuffle=False)):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                now = share * min(1, done / start) if gradual else share * (done >= start)
                if now:
                    net.eval()
                    with torch.no_grad():
                        losses = [F.cross_entropy(net(x).float()[j], y[j]).item() for j in range(len(y))]
                    net.train()
                    gone = sorted(range(len(y)), key=lambda j: losses[j])[len(y) - round(now * len(y)) :]
                    keep = [j for j in range(len(y)) if j not in gone]
                    x, y = x[keep], y[keep]
                loss = F.cross_entropy(net(x), y)
            (loss / accumulate).backward()
            if (i + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                done += 1
        scheduler.step()
    return net


@pytest.mark.parametrize("gradual", [False, True])
@pytest.mark.parametrize(("accumulate", "bf16"), [(1, False), (2, False), (1, True)])
def test_bit_identical_to_a_loop_by_hand(gradual, accumulate, bf16):
    torch.manual_seed(0)
    expected = by_hand(PlainNet(), gradual=gradual, accumulate=accumulate, bf16=bf16)
    found = fit(
        [TrimmedLoss(share=0.25, warmup=3, gradual=gradual)],
        PlainNet,
        loader(shuffle=False),
        accumulate_grad_batches=accumulate,
        precision="bf16-mixed" if bf16 else "32",
    )
    assert same(found, expected)
    assert not same(found, fit(None, PlainNet, loader(shuffle=False)))


class Sizes(pl.Callback):
    """How many examples training_step was given."""

    def __init__(self):
        self.seen = []

    def setup(self, trainer, module, stage):
        own = module.training_step

        def training_step(batch, batch_idx):
            self.seen.append(len(batch[0]))
            return own(batch, batch_idx)

        module.training_step = training_step


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"share": 0.25, "warmup": 0}, [12] * 8),
        ({"share": 0.25, "warmup": 3}, [16] * 3 + [12] * 5),
        ({"share": 0.25, "warmup": 0.5}, [16] * 4 + [12] * 4),
        ({"share": 0.25, "warmup": 4, "gradual": True}, [16, 15, 14, 13, 12, 12, 12, 12]),
        ({"share": 0.99, "warmup": 0}, [1] * 8),  # one stays
        ({"share": 0.0}, [16] * 8),
    ],
)
def test_what_is_left_out_and_when(options, sizes):
    seen = Sizes()
    fit([seen, TrimmedLoss(**options)], lambda: PlainNet(norm=False))  # BatchNorm refuses a single example
    assert seen.seen == sizes


def test_figures_are_those_of_the_batches():
    guarded = fit([TrimmedLoss(share=0.25, warmup=0)], max_epochs=1)
    logged = guarded.fitted.callback_metrics
    assert logged["guard/trimmed_loss/share"] == pytest.approx(0.25)
    assert logged["guard/trimmed_loss/dropped_loss"] > logged["guard/trimmed_loss/kept_loss"] > 0
    quiet = fit([TrimmedLoss(share=0.25, warmup=100)], max_epochs=1).fitted.callback_metrics
    assert quiet["guard/trimmed_loss/share"] == 0
    assert "guard/trimmed_loss/dropped_loss" not in quiet


def test_an_attack_moves_only_what_is_left():
    class Counting(PlainNet):
        def __init__(self):
            super().__init__()
            self.given = []

        def forward(self, x):
            self.given.append((len(x), self.training))
            return super().forward(x)

    net = fit(
        [AdversarialTraining(eps=0.1, steps=2, bounds=(0.0, 1.0)), TrimmedLoss(share=0.25, warmup=0)],
        Counting,
        max_steps=1,
    )
    assert net.given == [(16, False), (12, False), (12, False), (12, True)]  # losses, two steps of attack, training


def test_wrong_labels_are_what_goes():
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (512,), generator=draw)
    x = torch.nn.functional.one_hot(y, 6) + 0.3 * torch.randn(512, 6, generator=draw)
    wrong = torch.rand(512, generator=draw) < 0.2
    noisy = torch.where(wrong, (y + 1) % CLASSES, y)

    class Seeing(PlainNet):
        def __init__(self):
            super().__init__(lr=0.2, norm=False)
            self.kept = []

        def training_step(self, batch, batch_idx):
            self.kept.append(batch[2])
            return super().training_step(batch, batch_idx)

    data = DataLoader(TensorDataset(x, noisy, wrong), 64, shuffle=True)
    guarded = fit([TrimmedLoss(share=0.25, warmup=0.4)], Seeing, data, max_epochs=20)
    before, after = torch.cat(guarded.kept[:64]), torch.cat(guarded.kept[-32:])
    assert before.float().mean() == pytest.approx(0.2, abs=0.05)  # in the warmup wrong ones are trained on
    assert after.float().mean() < 0.03


def test_texts_and_nested_inputs_go_with_their_rows():
    class Texts(Rows):
        def __getitem__(self, i):
            x, y, _ = (part[i] for part in self.data)
            return {"inputs": x, "y": y, "text": f"row {i}", "i": i}

    class Reading(PlainNet):
        def training_step(self, batch, batch_idx):
            assert len(batch["inputs"]) == len(batch["text"]) == 12
            assert batch["text"] == [f"row {i}" for i in batch["i"].tolist()]
            assert torch.equal(batch["inputs"], rows()[0][batch["i"]])
            return F.cross_entropy(self(batch["inputs"]), batch["y"])

    fit([TrimmedLoss(share=0.25, warmup=0)], Reading, DataLoader(Texts(), 16, shuffle=True))


def test_a_batch_without_rows_is_refused():
    def packed(examples):
        x, y = torch.stack([e[0] for e in examples]), torch.stack([e[1] for e in examples])
        return x, y, torch.zeros(3)

    with pytest.raises(GuardConflict, match=r"trimmed_loss: .*shape \(3,\)"):
        fit([TrimmedLoss(share=0.25, warmup=100)], data=DataLoader(Rows(), 16, collate_fn=packed))  # at once


def test_a_loss_of_the_modules_own_decides():
    class Own(GuardMixin, PlainNet):
        def guard_losses(self, logits, target):
            return (target == 2).float()  # whatever is of class 2 goes first

    class Seeing(Own):
        def training_step(self, batch, batch_idx):
            assert not (batch[1] == 2).any()
            return super().training_step(batch, batch_idx)

    fit([TrimmedLoss(share=0.75, warmup=0)], Seeing)
    assert (rows()[1] == 2).any()


def test_manual_optimisation_trains_on_what_is_left():
    class Manual(GuardMixin, ManualNet):
        def training_step(self, batch, batch_idx):
            step = self.guard_step(batch)
            assert len(step.inputs) == len(step.target) == 12
            loss = self.guard_loss(step, F.cross_entropy(self(step.inputs), step.target))
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()

    fit([TrimmedLoss(share=0.25, warmup=0)], Manual)


def test_beside_a_privacy_guarantee_it_is_refused():
    with pytest.raises(GuardConflict, match="no longer bounds"):
        fit([TrimmedLoss(share=0.1), DPSGD(delta=1e-3, noise_multiplier=1.0)], lambda: PlainNet(norm=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.0}, "share=1.0"),
        ({"share": -0.1}, "share=-0.1"),
        ({"share": 0.1, "warmup": -1}, "warmup=-1"),
        ({"share": 0.1, "warmup": 1.5}, "warmup=1.5"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TrimmedLoss(**options)


def test_a_warmup_that_training_does_not_outlast_is_refused_or_said():
    with pytest.raises(GuardConflict, match="warmup=4"):
        fit([TrimmedLoss(share=0.1, warmup=4)], max_steps=4)
    with pytest.raises(GuardConflict, match="without end"):
        fit([TrimmedLoss(share=0.1)], max_epochs=-1)
    with pytest.warns(UserWarning, match="no example was left out"):
        fit([TrimmedLoss(share=0.1, warmup=100)])
    with pytest.warns(UserWarning, match="less than half an example"):
        fit([TrimmedLoss(share=0.1, warmup=0)], data=loader(batch_size=4))
