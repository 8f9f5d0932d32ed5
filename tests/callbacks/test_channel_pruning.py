"""Channels go exactly, once, at their time, and everything that holds shapes follows."""

import copy
import sys

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_guard.callbacks import (
    DPSGD,
    ChannelPruning,
    KnowledgeDistillation,
    LowRankFactorization,
    MagnitudePruning,
)
from lightning_guard.compression.loading import load_reshaped
from lightning_guard.data import FashionMNISTData
from lightning_guard.guard import GuardConflict
from lightning_guard.models import SmallCNN
from tests import toys
from tests.toys import FEATURES, ManualNet, PlainNet, fit, loader, rows, same, trainer


class Watching(pl.Callback):
    """The widths of the first layer after each optimizer step, and whether parameters are the same objects."""

    def __init__(self):
        self.widths, self.parameters = [], None

    def on_train_start(self, trainer, module):
        self.parameters = list(module.parameters())

    def on_train_batch_end(self, trainer, module, *args):
        self.widths.append(module.net[0].out_features)
        assert all(a is b for a, b in zip(self.parameters, module.parameters(), strict=True))
        for optimizer in trainer.optimizers:
            for parameter, state in optimizer.state.items():
                assert all(value.shape in (parameter.shape, ()) for value in state.values() if value is not None)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
@pytest.mark.parametrize(("start", "at"), [(0.0, 0), (3, 3), (0.5, 4)])
def test_channels_go_at_their_time(optimizer, start, at):
    watching = Watching()
    fit([ChannelPruning(0.5, round_to=4, start=start), watching], lambda: PlainNet(optimizer=optimizer))
    assert watching.widths == [16 if step < at else 8 for step in range(1, 9)]


def test_the_rest_of_training_is_that_of_a_narrow_network():
    """Beside a loop by hand: a dense network for three steps, the narrow one with its weights and momenta after."""

    class Steady(PlainNet):
        def __init__(self):
            super().__init__()
            self.net[3].p = 0.0

    made = ChannelPruning(0.5, round_to=4, start=3)
    found = fit([made], Steady, loader(shuffle=False))
    kept = made.plan["net.0"]["out"]
    assert made.plan == {"net.0": {"out": kept}, "net.1": {"out": kept}, "net.4": {"in": kept}}
    torch.manual_seed(0)
    net, done = Steady(), 0
    optimizer = net.configure_optimizers()["optimizer"]
    for epoch in range(2):
        for x, y, _ in loader(shuffle=False):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            done += 1
            if done == 3:
                old, momenta = net, [optimizer.state[p]["momentum_buffer"] for p in net.parameters()]
                net = Steady()
                net.net[0], net.net[1], net.net[4] = nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
                cuts = [lambda t: t[kept]] * 4 + [lambda t: t[:, kept], lambda t: t]
                for new, was, cut in zip(net.parameters(), old.parameters(), cuts, strict=True):
                    new.data = cut(was.data).clone()
                net.net[1].running_mean = old.net[1].running_mean[kept]
                net.net[1].running_var = old.net[1].running_var[kept]
                net.net[1].num_batches_tracked = old.net[1].num_batches_tracked
                fresh = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
                for group, was in zip(fresh.param_groups, optimizer.param_groups, strict=True):
                    group["lr"] = was["lr"]
                for p, momentum, cut in zip(net.parameters(), momenta, cuts, strict=True):
                    fresh.state[p]["momentum_buffer"] = cut(momentum).clone()
                optimizer = fresh
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        assert epoch < 2
    for key, value in found.state_dict().items():
        torch.testing.assert_close(value, net.state_dict()[key], rtol=1e-4, atol=1e-6)


class Rewound(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        torch.manual_seed(trainer.global_step)


@pytest.mark.parametrize("guards", [
    lambda: [ChannelPruning(0.5, round_to=4, start=0.5)],
    lambda: [ChannelPruning(0.5, round_to=4, start=0.5), KnowledgeDistillation(start=0.5)],
    lambda: [ChannelPruning(0.5, round_to=4), MagnitudePruning(0.5, every=1), KnowledgeDistillation()],
    lambda: [ChannelPruning(0.5, round_to=4), LowRankFactorization(2)],
])  # fmt: skip
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resume_before_and_after_the_removal_is_bitwise(guards, optimizer, tmp_path):
    data = loader(shuffle=False)

    def net():
        return PlainNet(optimizer=optimizer)

    kept = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
    whole = fit([Rewound(), *guards(), kept], net, data, max_epochs=4, enable_checkpointing=True)
    for epoch in (0, 1, 2):
        path = tmp_path / f"epoch={epoch}.ckpt"
        assert same(fit([Rewound(), *guards()], net, data, max_epochs=4, ckpt_path=path, seed=1), whole)
    # the very module that has been trained, from before the removal and from after it
    for epoch in (0, 2):
        pl.seed_everything(1, verbose=False)
        run = trainer([Rewound(), *guards()], max_epochs=4)
        again = copy.deepcopy(whole) if epoch else whole
        expected = copy.deepcopy(whole)
        run.fit(again, data, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert same(again, expected)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_other_stages_load_what_a_pruned_training_left(stage, tmp_path):
    module = fit([ChannelPruning(0.5, round_to=4)])
    module.fitted.save_checkpoint(tmp_path / "small.ckpt")
    fresh = PlainNet()
    fresh.predict_step = lambda batch, batch_idx: fresh(batch[0])
    getattr(trainer([ChannelPruning(0.5, round_to=4)]), stage)(
        fresh, loader(shuffle=False), ckpt_path=tmp_path / "small.ckpt"
    )
    assert same(fresh, module)
    assert same(load_reshaped(PlainNet, tmp_path / "small.ckpt"), module)
    with pytest.raises(ValueError, match="does not load into SmallCNN"):
        load_reshaped(SmallCNN, tmp_path / "small.ckpt")


def test_loading_needs_no_torch_pruning(tmp_path, monkeypatch):
    module = fit([ChannelPruning(0.5, round_to=4)])
    module.fitted.save_checkpoint(tmp_path / "small.ckpt")
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    assert same(load_reshaped(PlainNet, tmp_path / "small.ckpt"), module)
    with pytest.raises(GuardConflict, match="lightning-guard\\[prune\\]"):
        fit([ChannelPruning(0.5, round_to=4)])


def test_trained_weights_come_from_a_checkpoint(tmp_path):
    dense = fit(max_epochs=4)
    dense.fitted.save_checkpoint(tmp_path / "dense.ckpt")
    made = ChannelPruning(0.5, round_to=4, checkpoint=str(tmp_path / "dense.ckpt"))
    seen = []

    class Looking(pl.Callback):
        def on_train_start(self, trainer, module):
            seen.append(copy.deepcopy(module.net[0].weight))

    fit([made, Looking()])
    assert torch.equal(seen[0], dense.net[0].weight[made.plan["net.0"]["out"]])
    with pytest.raises(GuardConflict, match="is no file"):
        fit([ChannelPruning(0.5, checkpoint=str(tmp_path / "none.ckpt"))])
    with pytest.raises(GuardConflict, match="does not load into PlainNet"):
        fit([ChannelPruning(0.5, checkpoint=str(tmp_path / "dense.ckpt"))], lambda: PlainNet(norm=False))


def test_the_channels_with_the_largest_weights_stay():
    class Marked(PlainNet):
        def __init__(self):
            super().__init__(norm=False)
            self.net[0].weight.data[[2, 3, 7, 11]] *= 50

    made = ChannelPruning(0.75, round_to=4)
    fit([made], Marked)
    assert made.plan["net.0"]["out"] == [2, 3, 7, 11]


def test_targets_and_ignore():
    class Deep(PlainNet):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))

    for options, pruned in (
        ({}, {"net.0", "net.2"}),
        ({"targets": ["net.0"]}, {"net.0"}),
        ({"ignore": ["net.0"]}, {"net.2"}),
        ({"targets": ["net.*"], "ignore": ["*.2"]}, {"net.0"}),
    ):
        made = ChannelPruning(0.5, round_to=4, **options)
        module = fit([made], Deep)
        assert {name for name, kept in made.plan.items() if "out" in kept} == pruned
        assert module.net[4].out_features == 3
    for option in ("targets", "ignore"):
        with pytest.raises(GuardConflict, match=rf"{option}='head\*' matches no Linear .* net.0, net.2, net.4"):
            fit([ChannelPruning(0.5, **{option: ["head*"]})], Deep)
    with pytest.raises(GuardConflict, match="no channel of Deep can go"):
        fit([ChannelPruning(0.5, targets=["net.4"])], Deep)


def test_an_earlier_fit_does_not_compound():
    module = fit([ChannelPruning(0.5, round_to=4)])
    with pytest.raises(GuardConflict, match="pruned in an earlier training"):
        trainer([ChannelPruning(0.5, round_to=4)]).fit(module, loader())
    assert module.net[0].out_features == 8
    fit([], module)
    fit([ChannelPruning(0.5, round_to=4)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, "ratio=1.0"),
        ({"scope": "all"}, "scope='all'"),
        ({"importance": "l3"}, "importance='l3'"),
        ({"round_to": 0}, "round_to=0"),
        ({"start": 1.0}, "start=1.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ChannelPruning(**options)


def test_runs_in_which_channels_cannot_go_are_refused():
    for guards, options, message in (
        ([ChannelPruning(0.5, round_to=16)], {}, "of 16 channels, multiples of 16 stay"),
        ([ChannelPruning(start=9)], {"max_steps": 9, "max_epochs": -1}, "start=9 comes after"),
        ([ChannelPruning(start=0.5)], {"max_epochs": -1}, "training without end"),
        ([ChannelPruning(round_to=4, start=2), MagnitudePruning(0.5)], {}, r"start=2\) and magnitude_pruning: shapes"),
        ([ChannelPruning(round_to=4, start=2), LowRankFactorization(2)], {}, r"start=2\) and low_rank: shapes"),
        ([ChannelPruning(round_to=4, importance="bn_scale")], {"module": lambda: PlainNet(norm=False)}, "bn_scale"),
    ):
        with pytest.raises(GuardConflict, match=message):
            fit(guards, **options)


def test_two_processes_cannot_lose_channels_in_the_middle():
    run = trainer([ChannelPruning(0.5, round_to=4, start=2)], strategy="ddp", devices=2)
    made = run.callbacks[0] if isinstance(run.callbacks[0], ChannelPruning) else None
    made = made or next(c for c in run.callbacks if isinstance(c, ChannelPruning))

    class Two:
        trainer, guards, endless = run, [made], False

    assert any("DistributedDataParallel" in problem for problem in made.problems(Two()))


class Stream(IterableDataset):
    def __iter__(self):
        x, y, group = rows()
        yield from zip(x, y, group, strict=True)


def test_the_example_comes_from_the_module_or_the_rows():
    class Told(PlainNet):
        def __init__(self):
            super().__init__()
            self.example_input_array = torch.rand(2, FEATURES)

    with pytest.raises(GuardConflict, match="example_input_array"):
        fit([ChannelPruning(0.5, round_to=4)], data=DataLoader(Stream(), 16))
    assert fit([ChannelPruning(0.5, round_to=4)], Told, DataLoader(Stream(), 16)).net[0].out_features == 8


def test_looking_at_rows_draws_nothing():
    drawn = []

    class Seen(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            drawn.append(batch[0])

    fit([Seen(), ChannelPruning(0.5, round_to=4)])
    fit([Seen()])
    first = zip(drawn[:4], drawn[8:12], strict=True)  # of the epoch; later, fewer units have been dropped
    assert all(torch.equal(a, b) for a, b in first)


def test_manual_optimisation_and_privacy(monkeypatch):
    assert fit([ChannelPruning(0.5, round_to=4, start=2)], ManualNet, loader("pair")).net[0].out_features == 8
    monkeypatch.setattr(toys, "BATCH_NORM", False)
    private = DPSGD(delta=1e-3, noise_multiplier=0.5, test_seed=1)
    assert fit([private, ChannelPruning(0.5, round_to=4)]).net[0].out_features == 8
    with pytest.raises(GuardConflict, match=r"channel_pruning \(start=2\) and dp_sgd: shapes"):
        fit([private, ChannelPruning(0.5, round_to=4, start=2)])


def test_a_checkpoint_without_the_guard_is_no_resume(tmp_path):
    fit(max_epochs=1).fitted.save_checkpoint(tmp_path / "dense.ckpt")
    with pytest.raises(GuardConflict, match="written without it"):
        fit([ChannelPruning(0.5, round_to=4)], ckpt_path=tmp_path / "dense.ckpt", max_epochs=3)
    late = [ChannelPruning(0.5, round_to=4, start=2)]
    assert fit(late, ckpt_path=tmp_path / "dense.ckpt", max_epochs=3).net[0].out_features == 8


def test_figures_and_notes():
    made = ChannelPruning(0.5, round_to=4, start=2)
    module = fit([made])
    logged = module.fitted.callback_metrics
    assert logged["guard/channel_pruning/parameters"] == sum(p.numel() for p in module.parameters()) == 99
    assert logged["guard/channel_pruning/macs"] == 8 * FEATURES + 8 * 3
    assert "195 parameters became 99, and 144 multiplications an example 72" in made.notes()[0]
    assert "net.4 (they are the outputs)" in made.notes()[1]
    with pytest.warns(UserWarning, match="before start=50"):
        fit([ChannelPruning(0.5, round_to=4, start=50)])


def test_a_step_that_still_holds_its_graph():
    held = []

    class Holding(PlainNet):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            held.append(loss * 1)
            return loss

    assert fit([ChannelPruning(0.5, round_to=4, start=2)], Holding).net[0].out_features == 8


@pytest.mark.slow
def test_trained_channels_beat_random_ones_on_images():
    def accuracy(importance):
        torch.manual_seed(0)
        data = FashionMNISTData(batch_size=128)
        pl.seed_everything(0, verbose=False)
        module = SmallCNN(width=16)
        run = trainer([ChannelPruning(0.5, start=0.75, importance=importance)], max_epochs=4, limit_val_batches=0)
        run.fit(module, datamodule=data)
        return run.test(module, datamodule=data, verbose=False)[0]["test_accuracy"]

    assert accuracy("magnitude") > accuracy("random")
