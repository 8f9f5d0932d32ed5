"""Layers are split where that saves weights, with the best factors, and training follows."""

import copy

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from lightning_guard.callbacks import KnowledgeDistillation, LowRankFactorization
from lightning_guard.compression.loading import load_reshaped
from lightning_guard.guard import GuardConflict
from lightning_guard.models import SmallTransformer
from tests.toys import PlainNet, fit, loader, same, trainer


class Deep(PlainNet):
    def __init__(self, optimizer="sgd"):
        super().__init__(optimizer=optimizer)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


class Watching(pl.Callback):
    """Whether the optimizer has exactly the module's parameters after each step, and whether they move."""

    def __init__(self):
        self.split, self.moved = [], []

    def on_train_batch_start(self, trainer, module, *args):
        self.before = {name: p.detach().clone() for name, p in module.named_parameters()}

    def on_train_batch_end(self, trainer, module, *args):
        self.split.append(isinstance(module.net[2], nn.Sequential))
        held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
        assert [id(p) for p in held] == [id(p) for p in module.parameters()]
        assert set(trainer.optimizers[0].state) <= set(held)
        now = dict(module.named_parameters())
        if now.keys() == self.before.keys():
            self.moved.append(all(not torch.equal(now[name], self.before[name]) for name in now))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
@pytest.mark.parametrize(("start", "at"), [(0.0, 0), (3, 3), (0.5, 4)])
def test_layers_are_split_at_their_time_and_trained(optimizer, start, at):
    watching = Watching()
    fit([LowRankFactorization(2, start=start), watching], lambda: Deep(optimizer))
    assert watching.split == [step >= at for step in range(1, 9)]
    assert all(watching.moved)


def test_the_factors_are_those_of_the_trained_weights(tmp_path):
    dense = fit(None, Deep, max_epochs=4)
    dense.fitted.save_checkpoint(tmp_path / "dense.ckpt")
    seen = []

    class Looking(pl.Callback):
        def on_train_start(self, trainer, module):
            seen.append(copy.deepcopy(module))

    made = LowRankFactorization(2, checkpoint=str(tmp_path / "dense.ckpt"))
    fit([made, Looking()], Deep)
    pair, weight = seen[0].net[2], dense.net[2].weight
    u, s, v = torch.linalg.svd(weight.detach())
    torch.testing.assert_close(pair[1].weight @ pair[0].weight, (u[:, :2] * s[:2]) @ v[:2], rtol=1e-4, atol=1e-5)
    assert torch.equal(pair[1].bias, dense.net[2].bias)
    layers = [dense.net[i].weight.detach() for i, name in ((0, "net.0"), (2, "net.2"), (4, "net.4"))
              if name in made._taken["ranks"]]  # fmt: skip
    sigmas = [torch.linalg.svdvals(w) for w in layers]
    error = (sum(s[2:].square().sum() for s in sigmas) / sum(s.square().sum() for s in sigmas)).sqrt()
    assert made._taken["after"]["error"] == pytest.approx(error.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ({"rank": 2}, {"net.0": 2, "net.2": 2, "net.4": 2}),
        ({"rank": 4}, {"net.0": 4, "net.2": 4}),
        ({"rank": 0.25, "min_rank": 3}, {"net.0": 3, "net.2": 4}),
        ({"rank": 0.25, "min_rank": 1}, {"net.0": 2, "net.2": 4, "net.4": 1}),
        ({"rank": 2, "targets": ["net.2"]}, {"net.2": 2}),
        ({"rank": 2, "ignore": ["net.4", "*.0"]}, {"net.2": 2}),
    ],
)
def test_which_layers_at_which_rank(options, ranks):
    made = LowRankFactorization(**options)
    module = fit([made], Deep)
    assert made._taken["ranks"] == ranks
    for name, rank in ranks.items():
        assert module.get_submodule(name)[0].out_features == rank
    before = sum(p.numel() for p in Deep().parameters())
    now = sum(p.numel() for p in module.parameters())
    assert now < before
    assert f"{before} parameters became {now}" in made.notes()[0]
    assert module.fitted.callback_metrics["guard/low_rank/parameters"] == now
    if options == {"rank": 4}:
        assert "net.4 (rank 3 saves no weights)" in made.notes()[1]


def test_energy_chooses_the_rank():
    made = LowRankFactorization(energy=0.6, min_rank=1, targets=["net.2"])
    fit([made], Deep)
    torch.manual_seed(0)
    squares = torch.linalg.svdvals(Deep().net[2].weight).square()
    rank = made._taken["ranks"]["net.2"]
    assert squares[:rank].sum() >= 0.6 * squares.sum() > squares[: rank - 1].sum()


@pytest.mark.parametrize("options", [{"rank": 1.0}, {"energy": 1.0}])
def test_off_is_off(options):
    assert same(fit([LowRankFactorization(**options)]), fit())


class Rewound(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        torch.manual_seed(trainer.global_step)


@pytest.mark.parametrize("guards", [
    lambda: [LowRankFactorization(2, start=0.5)],
    lambda: [LowRankFactorization(2, start=0.5), KnowledgeDistillation(start=0.5)],
    lambda: [LowRankFactorization(2), KnowledgeDistillation()],
])  # fmt: skip
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resume_before_and_after_the_split_is_bitwise(guards, optimizer, tmp_path):
    data = loader(shuffle=False)

    def net():
        return Deep(optimizer)

    kept = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
    whole = fit([Rewound(), *guards(), kept], net, data, max_epochs=4, enable_checkpointing=True)
    for epoch in (0, 1, 2):
        path = tmp_path / f"epoch={epoch}.ckpt"
        assert same(fit([Rewound(), *guards()], net, data, max_epochs=4, ckpt_path=path, seed=1), whole)
    expected = copy.deepcopy(whole)
    trainer([Rewound(), *guards()], max_epochs=4).fit(whole, data, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert same(whole, expected)


def test_optimizers_made_before_the_split_follow():
    """As LightningCLI makes them: from the parameters, before any guard has looked at the module."""

    class Early(Deep):
        def __init__(self):
            super().__init__()
            self.early = [torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)]

        def configure_optimizers(self):
            return {"optimizer": self.early[0],
                    "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(self.early[0], 0.9)}  # fmt: skip

    early = fit([LowRankFactorization(2)], Early)
    late = fit([LowRankFactorization(2)], Deep)
    assert same(early, late)


def test_loading_into_the_plain_class(tmp_path):
    module = fit([LowRankFactorization(2)], Deep)
    module.fitted.save_checkpoint(tmp_path / "thin.ckpt")
    loaded = load_reshaped(Deep, tmp_path / "thin.ckpt")
    assert same(loaded, module)
    assert loaded.net[0][1].out_features == 16
    fresh = Deep()
    trainer([LowRankFactorization(2)]).test(fresh, loader(), ckpt_path=tmp_path / "thin.ckpt", verbose=False)
    assert same(fresh, module)


def test_layers_whose_weights_others_read_stay_whole():
    class Mixed(PlainNet):
        def __init__(self):
            super().__init__()
            tied = nn.Linear(16, 16)
            other = nn.Linear(16, 16)
            other.weight = tied.weight
            normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
            self.net = nn.Sequential(nn.Linear(6, 16), tied, other, normed, nn.Linear(16, 3))
            self.attention = nn.MultiheadAttention(16, 2)
            self.encoder = nn.TransformerEncoderLayer(16, 2, 32)
            self.grouped = nn.Conv2d(8, 8, 3, groups=2)

    made = LowRankFactorization(2)
    fit([made], Mixed)
    assert set(made._taken["ranks"]) == {"net.0", "net.4"}
    assert set(made._taken["left"]) >= {"net.1", "net.2", "net.3", "attention.out_proj", "encoder.linear1", "grouped"}


def test_a_transformer_is_split_throughout():
    pl.seed_everything(0, verbose=False)
    module, x = SmallTransformer(dim=32, depth=1), torch.rand(4, 1, 28, 28)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.arange(4)), 4)
    made = LowRankFactorization(0.25, min_rank=4, ignore=["head"])
    trainer([made], max_epochs=1).fit(module, data)
    assert {"blocks.0.query_key_value", "blocks.0.mix", "blocks.0.mlp.0", "blocks.0.mlp.2"} <= set(made._taken["ranks"])
    assert module(x).shape == (4, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "give one of them"), ({"rank": 0}, "rank=0"), ({"rank": 2, "start": 1.0}, "start=1.0"),
     ({"energy": 2.0}, "energy=2.0"), ({"rank": 0.5, "min_rank": 0}, "min_rank=0")],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LowRankFactorization(**options)


def test_runs_in_which_nothing_can_be_split_are_refused():
    with pytest.raises(GuardConflict, match=r"no layer of Deep can be split with rank=16.*net.4: rank 3 saves"):
        fit([LowRankFactorization(16)], Deep)
    with pytest.raises(GuardConflict, match="targets='head' matches no Linear"):
        fit([LowRankFactorization(2, targets=["head"])], Deep)
    module = fit([LowRankFactorization(2)], Deep)
    with pytest.raises(GuardConflict, match="factorised in an earlier training"):
        trainer([LowRankFactorization(2)]).fit(module, loader())
