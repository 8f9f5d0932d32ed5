"""Pruning is exact after every step, whatever the optimizer, and touches nothing else."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BaseFinetuning, EMAWeightAveraging, ModelCheckpoint
from torch import nn

from lightning_guard.callbacks import MagnitudePruning
from lightning_guard.functional import cubic_sparsity
from lightning_guard.guard import GuardConflict
from tests.toys import ManualNet, PlainNet, fit, loader, trainer

WEIGHTS = ("net.0.weight", "net.4.weight")


def zeros(module):
    weights = [module.get_parameter(name) for name in WEIGHTS]
    return sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)


class Watching(pl.Callback):
    """Looks at the model after every optimizer step, where validation and checkpoints look too."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, *args):
        self.seen.append(zeros(module))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_sparsity_is_exact_after_every_step(optimizer, scope):
    watching = Watching()
    guard = MagnitudePruning(sparsity=0.8, scope=scope, start=2, end=10, every=3)
    fit([watching, guard], lambda: PlainNet(optimizer=optimizer), max_epochs=4)
    total = watching.seen[0][1]
    for step, (dropped, _) in enumerate(watching.seen, start=1):
        last = max((t for t in (5, 8, 10) if t <= step), default=None)
        target = 0.0 if last is None else cubic_sparsity((last - 2) / 8, 0.8)
        if scope == "global":
            assert dropped == round(target * total), step
        else:
            assert dropped == sum(round(target * n) for n in (96, 48)), step


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_momentum_of_dropped_weights_is_cleared(optimizer):
    module = fit([MagnitudePruning(sparsity=0.8, every=1)], lambda: PlainNet(optimizer=optimizer))
    (used,) = module.fitted.optimizers
    for name in WEIGHTS:
        weight = module.get_parameter(name)
        for moment in ("momentum_buffer", "exp_avg"):
            if moment in used.state[weight]:
                assert (used.state[weight][moment][weight == 0] == 0).all()


def test_norms_and_biases_are_never_pruned():
    module = fit([MagnitudePruning(sparsity=0.95, every=1)])
    for name, p in module.named_parameters():
        if name not in WEIGHTS:
            assert (p != 0).all(), name


def test_dropped_weights_stay_dropped():
    class Growing(pl.Callback):
        before = None

        def on_train_batch_end(self, trainer, module, *args):
            now = torch.cat([module.get_parameter(name).flatten() == 0 for name in WEIGHTS])
            assert self.before is None or now[self.before].all()
            self.before = now

    fit([Growing(), MagnitudePruning(sparsity=0.8, every=1)])


def test_accumulation_counts_optimizer_steps():
    watching = Watching()
    fit([watching, MagnitudePruning(sparsity=0.5, start=0, end=2, every=1)], accumulate_grad_batches=2)
    half = round(cubic_sparsity(0.5, 0.5) * 144)
    assert [dropped for dropped, _ in watching.seen] == [0, half, half, *[72] * 5]


def test_ignore_and_targets():
    kept = fit([MagnitudePruning(sparsity=0.9, every=1, ignore=["net.4"])])
    assert (kept.net[4].weight != 0).all()
    assert int((kept.net[0].weight == 0).sum()) == round(0.9 * 96)
    only = fit([MagnitudePruning(sparsity=0.9, every=1, targets=["*.4"])])
    assert (only.net[0].weight != 0).all()


def test_patterns_that_match_nothing_are_refused():
    for options in ({"ignore": ["head"]}, {"targets": ["net.1"]}):
        with pytest.raises(GuardConflict, match=r"matches nothing.*net\.0, net\.4"):
            fit([MagnitudePruning(**options)])


def test_frozen_weights_are_left_alone():
    class Half(PlainNet):
        def __init__(self):
            super().__init__()
            self.net[0].weight.requires_grad_(False)

    module = fit([MagnitudePruning(sparsity=0.9, every=1)], Half)
    assert (module.net[0].weight != 0).all()
    assert int((module.net[4].weight == 0).sum()) == round(0.9 * 48)


def test_shared_weights_count_once():
    class Tied(PlainNet):
        def __init__(self):
            super().__init__(norm=False)
            self.net.insert(1, nn.Linear(16, 16))
            self.net.insert(2, nn.Linear(16, 16))
            self.net[2].weight = self.net[1].weight

    module = fit([MagnitudePruning(sparsity=0.5, every=1)], Tied)
    weights = [p for name, p in module.named_parameters() if p.dim() == 2]
    assert sum(int((w == 0).sum()) for w in weights) == round(0.5 * sum(w.numel() for w in weights))


def test_several_optimizers_by_hand():
    class Two(ManualNet):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[0].parameters(), 0.1), torch.optim.Adam(self.net[4].parameters(), 0.01)]

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
                optimizer.step()

    watching = Watching()
    fit([watching, MagnitudePruning(sparsity=0.5, start=0, end=4, every=1)], Two)
    assert [dropped for dropped, _ in watching.seen] == [
        round(cubic_sparsity(t / 4, 0.5) * 144) for t in (1, 2, 3, *[4] * 5)
    ]


def test_several_optimizers_want_steps_not_fractions():
    class Two(ManualNet):
        def configure_optimizers(self):
            return [torch.optim.SGD(layer.parameters(), 0.1) for layer in (self.net[0], self.net[4])]

    with pytest.raises(GuardConflict, match="optimizer steps"):
        fit([MagnitudePruning(sparsity=0.5)], Two)


def test_a_training_too_short_is_refused_or_said():
    with pytest.raises(GuardConflict, match="end=100"):
        fit([MagnitudePruning(end=100)], max_steps=8, max_epochs=-1)
    with pytest.raises(GuardConflict, match="without end"):
        fit([MagnitudePruning(end=0.5)], max_epochs=-1)

    class Stopping(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step >= 4

    with pytest.warns(UserWarning, match="before end=8"):
        fit([Stopping(), MagnitudePruning(sparsity=0.8, end=8, every=1)], max_epochs=4)


def test_convolutions_and_attention():
    class Both(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 4, 3, padding=1)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.norm = nn.LayerNorm(4)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            x = self.conv(x[:, None]).mT
            return self.head(self.norm(x + self.attention(x, x, x)[0]).mean(1))

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.01)

    module = fit([MagnitudePruning(sparsity=0.5, scope="layer", every=1)], Both)
    for weight in (
        module.conv.weight,
        module.attention.in_proj_weight,
        module.attention.out_proj.weight,
        module.head.weight,
    ):
        assert int((weight == 0).sum()) == round(0.5 * weight.numel())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "sparsity=1"),
        ({"sparsity": -0.1}, "sparsity=-0.1"),
        ({"scope": "all"}, "scope='all'"),
        ({"start": 1.5}, "start=1.5"),
        ({"start": 0.7, "end": 0.2}, "start=0.7"),
        ({"every": 0}, "every=0"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MagnitudePruning(**options)


def test_validation_sees_masked_weights():
    class Validating(pl.Callback):
        seen = 0

        def on_validation_start(self, trainer, module):
            if trainer.global_step == 8:
                assert zeros(module)[0] == round(0.5 * 144)
                self.seen += 1

    watching = Validating()
    run = [watching, MagnitudePruning(sparsity=0.5, every=1)]
    pl.seed_everything(0, verbose=False)
    trainer(run).fit(PlainNet(), loader(), loader())
    assert watching.seen == 1


class HeadOnly(PlainNet):
    """Trains its last layer; the others require gradients all the same."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[4].parameters(), 0.1)


def test_weights_in_no_optimizer_are_left_alone_and_do_not_keep_time():
    module = fit([MagnitudePruning(sparsity=0.9, every=1)], HeadOnly)
    assert (module.net[0].weight != 0).all()
    assert int((module.net[4].weight == 0).sum()) == round(0.9 * 48)


class Thawing(BaseFinetuning):
    def freeze_before_training(self, module):
        self.freeze(module.net[0])

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.net[0], optimizer)


def test_weights_that_are_trained_later_are_refused():
    with pytest.raises(GuardConflict, match=r"Thawing trains net\.0\.weight later"):
        fit([Thawing(), MagnitudePruning(0.7)])
    fit([Thawing(), MagnitudePruning(0.7, ignore=["net.0"])])

    class ByHand(HeadOnly):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.optimizers().add_param_group({"params": list(self.net[0].parameters())})

    with pytest.raises(GuardConflict, match=r"this run trains net\.0\.weight later"):
        fit([MagnitudePruning(0.7)], ByHand)


@pytest.mark.parametrize(
    "norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm], ids=str
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_weights_computed_from_others_are_refused(norm):
    def made():
        module = PlainNet()
        norm(module.net[0])
        return module

    with pytest.raises(GuardConflict, match=r"weight of net\.0 is computed"):
        fit([MagnitudePruning(0.7)], made)
    fit([MagnitudePruning(0.7, ignore=["net.0"])], made)


def test_lazy_weights_are_refused():
    class Lazy(PlainNet):
        def __init__(self):
            super().__init__()
            self.net[0] = nn.LazyLinear(16)

    with pytest.raises(GuardConflict, match="no shape yet"):
        fit([MagnitudePruning(0.7)], Lazy)


def test_a_weight_shared_with_an_embedding_or_an_ignored_layer_is_left_alone():
    class Tied(PlainNet):
        def __init__(self):
            super().__init__()
            self.embedding, self.head, self.twin = nn.Embedding(4, 16), nn.Linear(16, 4), nn.Linear(6, 16)
            self.head.weight, self.twin.weight = self.embedding.weight, self.net[0].weight

    module = fit([MagnitudePruning(0.9, every=1, ignore=["twin"])], Tied)
    assert (module.embedding.weight != 0).all()
    assert (module.net[0].weight != 0).all()
    assert int((module.net[4].weight == 0).sum()) == round(0.9 * 48)


def test_every_name_of_a_shared_weight_is_masked_in_a_file(tmp_path):
    class Tied(PlainNet):
        def __init__(self):
            super().__init__()
            self.twin = nn.Linear(6, 16)
            self.twin.weight = self.net[0].weight

    kept = ModelCheckpoint(tmp_path)
    fit([EMAWeightAveraging(decay=0.9), MagnitudePruning(0.9, every=1), kept], Tied, enable_checkpointing=True)
    stored = torch.load(kept.best_model_path, weights_only=True)["state_dict"]
    assert torch.equal(stored["twin.weight"], stored["net.0.weight"])
    assert int((stored["twin.weight"] == 0).sum()) > 48


def test_a_weight_replaced_during_training_is_refused():
    class Replacing(PlainNet):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.net[0].weight = nn.Parameter(torch.randn(16, 6))

    with pytest.raises(GuardConflict, match=r"net\.0\.weight was replaced"):
        fit([MagnitudePruning(0.7, end=2)], Replacing)


def test_validation_of_an_average_sees_it_masked():
    class Looking(PlainNet):
        def validation_step(self, batch, batch_idx):
            assert zeros(self)[0] >= round(self.trainer.callbacks[-1].reached * 144)

    made = MagnitudePruning(0.7, every=1)
    run = trainer([EMAWeightAveraging(decay=0.9), made], num_sanity_val_steps=0)
    run.fit(Looking(), loader(), loader(shuffle=False))
    assert made.reached > 0.69


def test_no_step_at_all_is_said():
    with pytest.warns(UserWarning, match="ended at optimizer step 0"):
        fit([MagnitudePruning(0.7)], limit_train_batches=0)


def test_optimizers_replaced_in_training_are_refused():
    class Replacing(pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                trainer.strategy.optimizers = [torch.optim.SGD(module.parameters(), 0.1)]

    with pytest.raises(GuardConflict, match="optimizers were replaced"):
        fit([Replacing(), MagnitudePruning(sparsity=0.5, every=1)])


def test_a_schedule_that_cannot_be_finished_is_refused_when_training_begins(tmp_path):
    with pytest.raises(GuardConflict, match="end=9 is 9 optimizer steps away and training has 8 left"):
        fit([MagnitudePruning(end=9)])  # two epochs of four steps, which max_steps does not tell
    kept = pl.callbacks.ModelCheckpoint(tmp_path, filename="unguarded")
    fit([kept], enable_checkpointing=True, max_epochs=3)
    with pytest.raises(GuardConflict, match="end=8 is 8 optimizer steps away and training has 4 left"):
        fit([MagnitudePruning(end=0.5)], max_epochs=4, ckpt_path=tmp_path / "unguarded.ckpt")
