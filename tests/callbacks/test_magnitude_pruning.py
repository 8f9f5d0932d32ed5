"""Pruning is exact after every step, whatever the optimizer, and touches nothing else."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BaseFinetuning, EMAWeightAveraging, ModelCheckpoint
from torch import nn

from lightning_guard.callbacks import DPSGD, MagnitudePruning
from lightning_guard.compression.masking import Masks
from lightning_guard.functional import cubic_sparsity
from lightning_guard.guard import GuardConflict
from tests.toys import ManualNet, PlainNet, fit, loader, rows, same, trainer

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
        ({"min_keep": 1.0}, "min_keep=1.0"),
        ({"min_keep": 0.1, "scope": "layer"}, "min_keep=0.1 is for scope='global'"),
        ({"min_keep": 0.1, "pattern": "2:4"}, "min_keep=0.1 is for scope='global'"),
        ({"pattern": "4:2"}, "pattern='4:2'"),
        ({"pattern": "2/4"}, "pattern='2/4'"),
        ({"pattern": "2:4", "sparsity": 0.8}, "sparsity=0.8 is not that of pattern='2:4'"),
        ({"score": "taylor"}, "score='taylor'"),
        ({"regrow": 1.0}, "regrow=1.0"),
        ({"regrow": 0.3, "score": "random"}, "regrow=0.3"),
        ({"regrow": 0.3, "pattern": "2:4"}, "regrow=0.3"),
        ({"regrow": 0.3, "rewind": 0}, "regrow=0.3"),
        ({"rewind": -1}, "rewind=-1"),
        ({"rewind": 0.5, "end": 0.5}, "rewind=0.5 does not come before end=0.5"),
        ({"rounds": 2}, "rounds=2 needs rewind"),
        ({"rounds": 0, "rewind": 0}, "rounds=0"),
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
    "norm",
    [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm],
    ids=["old weight_norm", "weight_norm", "spectral_norm"],
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


# Floors, patterns, scores ----------------------------------------------------------------------------------------


class Lopsided(PlainNet):
    """A last layer of tiny weights, which a global threshold would take whole."""

    def __init__(self, optimizer="sgd"):
        super().__init__(lr=1e-4, optimizer=optimizer)
        self.net[4].weight.data *= 1e-4


def test_no_layer_vanishes():
    collapsed = fit([MagnitudePruning(0.5, every=1, min_keep=0.0)], Lopsided)
    assert int((collapsed.net[4].weight != 0).sum()) == 0  # what the floor is there for
    module = fit([MagnitudePruning(0.5, every=1, min_keep=0.1)], Lopsided)
    assert int((module.net[4].weight != 0).sum()) == 5  # ceil(0.1 * 48)
    assert zeros(module)[0] == 72
    assert int((fit([MagnitudePruning(0.5, every=1)], Lopsided).net[4].weight != 0).sum()) == 1  # 2 % of 48


def test_a_floor_that_does_not_fit_is_refused_before_training():
    with pytest.raises(GuardConflict, match=r"sparsity=0.9 leaves 14 of 144 weights, and min_keep=0.2 keeps 30"):
        fit([MagnitudePruning(0.9, min_keep=0.2)])


class Wide(pl.LightningModule):
    """A layer of each kind, all with inputs in groups of four."""

    def __init__(self, optimizer=torch.optim.AdamW):
        super().__init__()
        self.make = optimizer
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.back = nn.ConvTranspose1d(8, 4, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = x.new_ones(1, 4, 2) * x[:, :4, None]
        x = self.back(self.conv(x))
        x = torch.cat([x, x], 1).mT
        return self.head(self.attention(x, x, x)[0].mean(1))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.make(self.parameters(), 0.01)


def groups(module):
    """Zeros in every group of four inputs."""
    found = [module.conv.weight.transpose(1, 2), module.back.weight.permute(1, 2, 0)]
    found += [module.attention.in_proj_weight, module.attention.out_proj.weight, module.head.weight]
    return torch.cat([(w.reshape(-1, 4) == 0).sum(1) for w in found])


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)])
def test_a_pattern_is_exact_after_every_step(make):
    class Looking(pl.Callback):
        seen = []

        def on_train_batch_end(self, trainer, module, *args):
            self.seen.append(set(groups(module).tolist()))

    looking = Looking()
    looking.seen = []
    fit([looking, MagnitudePruning(pattern="2:4", start=0, end=4, every=1)], lambda: Wide(make))
    steps = [round(cubic_sparsity(t / 4, 0.5) * 4) for t in (1, 2, 3, 4)]
    assert looking.seen == [{n} for n in [*steps, *[2] * 4]]
    assert MagnitudePruning(pattern="2:4").sparsity == 0.5


def test_a_pattern_that_does_not_fit_is_refused_by_name():
    with pytest.raises(GuardConflict, match=r"net\.0\.weight of shape \(16, 6\): its 6 inputs .*ignore=\['net\.0'\]"):
        fit([MagnitudePruning(pattern="2:4")])
    fit([MagnitudePruning(pattern="2:4", ignore=["net.0"])])


class Steady(PlainNet):
    """Without dropout and batch statistics; an epoch is one step."""

    def __init__(self, optimizer="sgd"):
        super().__init__(norm=False, optimizer=optimizer)
        self.net.insert(1, nn.Identity())  # where BatchNorm was
        self.net[3].p = 0.0


ONE = {"data": loader(batch_size=64, shuffle=False), "max_epochs": 8}


def by_hand(choose, optimizer="sgd"):
    """Training of `Steady` in plain torch; ``choose(step, weights, what they were, dropped)`` gives new masks."""
    pl.seed_everything(0, verbose=False)
    module = Steady(optimizer)
    made = module.configure_optimizers()
    used, scheduler = made["optimizer"], made["lr_scheduler"]
    weights = {name: module.get_parameter(name) for name in WEIGHTS}
    dropped = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in weights.items()}
    x, y, _ = rows()
    for step in range(1, 9):
        used.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        before = {name: (w.detach().clone(), w.grad.clone()) for name, w in weights.items()}
        used.step()
        with torch.no_grad():
            for name, w in weights.items():
                w[dropped[name]] = 0
            found = choose(step, {n: w.detach() for n, w in weights.items()}, before, dropped)
            if found is not None:
                for name, w in weights.items():
                    for moment in ("momentum_buffer", "exp_avg"):
                        if moment in used.state[w]:
                            used.state[w][moment][dropped[name] | found[name]] = 0
                    w[dropped[name] | found[name]] = 0
                dropped = found
        scheduler.step()
    return module


def lowest(scores, dropped, count):
    """Masks that drop ``count``, what is dropped already first, then the lowest score."""
    places = [(name, i) for name in scores for i in range(scores[name].numel())]
    key = lambda p: (not bool(dropped[p[0]].flatten()[p[1]]), float(scores[p[0]].flatten()[p[1]]))  # noqa: E731
    gone = set(sorted(places, key=key)[:count])
    return {
        name: torch.tensor([(name, i) in gone for i in range(s.numel())]).reshape(s.shape) for name, s in scores.items()
    }


@pytest.mark.parametrize("score", ["gradient", "movement"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_scores_of_gradients_are_those_of_a_loop(score, optimizer):
    sums = {}

    def choose(step, weights, before, dropped):
        for name, (w, g) in before.items():
            sums[name] = sums.get(name, 0) + ((w * g).abs() if score == "gradient" else -w * g)
        if step not in (4, 6):
            return None
        found = lowest(sums, dropped, round(cubic_sparsity((step - 2) / 4, 0.6) * 144))
        if score == "gradient":
            sums.clear()
        return found

    guard = MagnitudePruning(0.6, start=2, end=6, every=2, score=score, min_keep=0.0)
    assert same(fit([guard], lambda: Steady(optimizer), **ONE), by_hand(choose, optimizer))


def test_infinite_gradients_count_as_none():
    seen = []

    class Spiking(Steady):
        def on_after_backward(self):
            if self.global_step == 1:
                self.net[0].weight.grad[0, 0] = torch.inf
                self.net[0].weight.grad[0, 1] = torch.nan

        def on_before_optimizer_step(self, optimizer):
            self.net[0].weight.grad.nan_to_num_(0, 0, 0)

        def on_train_batch_end(self, *args):
            if self.global_step < 8:  # then they have served
                seen.append(self.trainer.callbacks[-1]._scores["net.0.weight"].clone())

    fit([MagnitudePruning(0.6, start=2, end=8, score="movement")], Spiking, **ONE)
    assert all(score.isfinite().all() for score in seen)
    assert torch.equal(seen[1][0, :2], seen[0][0, :2])
    assert not torch.equal(seen[1][0, 2:], seen[0][0, 2:])


def test_what_is_logged_is_the_sparsity_at_the_end_of_an_epoch():
    module = fit([MagnitudePruning(0.5, start=0, end=8, every=1)])
    assert module.fitted.callback_metrics["guard/magnitude_pruning/sparsity"] == pytest.approx(0.5)


def test_random_scores_know_no_data():
    def dropped(seed, **kwargs):
        module = fit([MagnitudePruning(0.6, start=2, end=6, every=2, score="random", seed=seed)], Steady, **kwargs)
        return torch.cat([module.get_parameter(name).flatten() == 0 for name in WEIGHTS])

    other = loader(batch_size=64, shuffle=False, n=48)
    assert torch.equal(dropped(1, **ONE), dropped(1, data=other, max_epochs=8))
    assert not torch.equal(dropped(1, **ONE), dropped(2, **ONE))
    assert int(dropped(1, **ONE).sum()) == round(0.6 * 144)


def test_scores_see_whole_unclipped_gradients():
    def scores(**more):
        found = {}

        class Looking(pl.Callback):
            def on_train_batch_end(self, trainer, module, *args):
                if trainer.global_step == 7:
                    found.update({name: score.clone() for name, score in trainer.callbacks[-1]._scores.items()})

        guard = MagnitudePruning(0.6, start=7, end=8, score="movement")
        fit([Looking(), guard], Steady, **{**ONE, **more})
        assert guard._scores == {}  # they have served
        return found

    whole, halves = scores(), scores(data=loader(batch_size=32, shuffle=False), accumulate_grad_batches=2)
    for name in WEIGHTS:
        torch.testing.assert_close(whole[name], halves[name], rtol=1e-4, atol=1e-6)
    clipped = torch.cat([score.flatten() for score in scores(gradient_clip_val=1e-3).values()])
    assert clipped.abs().max() > 1e-3  # clipped to 1e-3 in all, no product of it would be as large


@pytest.mark.parametrize(
    "options",
    [
        {"score": "gradient"},
        {"score": "movement"},
        {"regrow": 0.3},
        {"score": "random"},
        {"min_keep": 0.1},
        {"rewind": 0},
    ],
    ids=lambda options: "-".join(map(str, *options.items())),
)
def test_beside_dp_sgd_any_score_prunes_exactly(options):
    guard = MagnitudePruning(0.5, every=1, **options)
    net = fit([DPSGD(delta=1e-3, noise_multiplier=0.5, test_seed=5), guard], lambda: Steady())
    weights = [p for p in net.parameters() if p.dim() == 2]
    assert sum(int((p == 0).sum()) for p in weights) == round(0.5 * sum(p.numel() for p in weights))


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_short_way_is_the_long_way(scope, monkeypatch):
    def train():
        watching = Watching()
        guard = MagnitudePruning(0.8, scope=scope, start=0, end=10, every=1)
        return fit([watching, guard], lambda: PlainNet(optimizer="adam"), max_epochs=4), watching.seen

    taken = []
    own = Masks.drop_smallest
    monkeypatch.setattr(Masks, "drop_smallest", lambda *args: taken.append(own(*args)) or taken[-1])
    short = train()
    assert all(taken)
    monkeypatch.setattr(Masks, "drop_smallest", lambda *args: False)
    long = train()
    assert same(short[0], long[0])
    assert short[1] == long[1]


def test_weights_that_are_zero_by_chance_go_first():
    class Zeros(Steady):
        def __init__(self):
            super().__init__()
            self.net[0].weight.data[:4] = 0
            self.net[0].bias.data[:4] = -1e3  # dead, so they stay zero

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    module = fit([MagnitudePruning(0.5, start=0, end=2, every=1)], Zeros, **ONE)
    assert zeros(module)[0] == 72
    assert (module.net[0].weight[:4] == 0).all()


# Regrowing and rewinding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_growing_anew_is_that_of_a_loop(optimizer):
    moved = []

    def choose(step, weights, before, dropped):
        if step not in (2, 4, 6):
            return None
        progress, total = step / 6, 144
        keep = total - round(cubic_sparsity(progress, 0.6) * total)
        share = 0.9 / 2 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item()) if step < 6 else 0
        old = lowest({n: w.abs() for n, w in weights.items()}, dropped, total - keep + round(share * keep))
        slopes = {n: torch.where(old[n], before[n][1].abs(), torch.inf) for n in weights}
        found = lowest(slopes, dict.fromkeys(weights, torch.zeros(1000, dtype=torch.bool)), total - keep)
        moved.append(sum(int((dropped[n] & ~found[n]).sum()) for n in weights))
        return found

    guard = MagnitudePruning(0.6, start=0, end=6, every=2, regrow=0.9, min_keep=0.0)
    assert same(fit([guard], lambda: Steady(optimizer), **ONE), by_hand(choose, optimizer))
    assert max(moved) > 0  # something has come back


class Kept(pl.Callback):
    """Copies of everything that training changes, after each step."""

    def __init__(self):
        self.seen, self.moments = [], []

    def on_train_batch_end(self, trainer, module, *args):
        self.seen.append({key: value.clone() for key, value in module.state_dict().items()})
        self.moments.append(len(trainer.optimizers[0].state))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop"])
@pytest.mark.parametrize(("rewind", "step"), [(0, 0), (0.25, 2), (3, 3)])
def test_rewinding_truly_rewinds(optimizer, rewind, step):
    kept = Kept()
    pl.seed_everything(0, verbose=False)
    first = PlainNet(optimizer=optimizer).state_dict()
    fit([kept, MagnitudePruning(0.5, start=0, end=6, rewind=rewind, rounds=1)], lambda: PlainNet(optimizer=optimizer))
    there = [first, *kept.seen][step]
    back, dense = kept.seen[5], 0
    for key, value in there.items():
        if key in WEIGHTS:
            mask = back[key] != 0
            dense += int(mask.sum())
            assert torch.equal(back[key], value * mask), key
        else:
            assert torch.equal(back[key], value), key  # biases, BatchNorm and its statistics
    assert dense == 72
    assert kept.moments[5] == 0  # the optimizer begins anew
    assert not any(torch.equal(kept.seen[7][key], back[key]) for key in WEIGHTS)  # and training goes on


def test_every_round_goes_back_to_the_same_weights():
    """The copies must not be trained along: the peer's are, from its second round on."""
    kept = Kept()
    pl.seed_everything(0, verbose=False)
    first = PlainNet().state_dict()
    fit([kept, MagnitudePruning(0.75, start=0, end=8, rewind=0, rounds=2)], max_epochs=3)
    for step, count in ((4, 72), (8, 36)):  # half of what is left, twice
        back = kept.seen[step - 1]
        assert sum(int((back[key] != 0).sum()) for key in WEIGHTS) == count
        for key in WEIGHTS:
            assert torch.equal(back[key], first[key] * (back[key] != 0))
        assert torch.equal(back["net.0.bias"], first["net.0.bias"])


def test_a_rewind_that_comes_too_late_is_refused():
    with pytest.raises(GuardConflict, match=r"rewind=4 is optimizer step 4.* is at step 3"):
        fit([MagnitudePruning(0.5, start=0, end=6, rewind=4, rounds=2)])
    with pytest.raises(GuardConflict, match="fewer rounds"):
        fit([MagnitudePruning(0.5, start=4, end=6, rewind=0, rounds=3)])


# What holds for all of them --------------------------------------------------------------------------------------

OPTIONS = {
    "global": {},
    "layer": {"scope": "layer"},
    "pattern": {"sparsity": None, "pattern": "4:8", "ignore": ["net.0"]},
    "random": {"score": "random"},
    "gradient": {"score": "gradient"},
    "movement": {"score": "movement"},
    "regrow": {"regrow": 0.4},
    "rewind": {"rewind": 1},
    "rounds": {"rewind": 0, "rounds": 3},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def pruning(options):
    return MagnitudePruning(**{"sparsity": 0.6, "start": 2, "end": 6, "every": 1, **options})


@options
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_masks_hold_after_every_step_and_in_averages(options, optimizer, tmp_path):
    class Looking(pl.Callback):
        steps = 0

        def on_train_batch_end(self, trainer, module, *args):
            masks = guard._masks
            assert masks.sparsity == pytest.approx(sum(masks.gone.values()) / sum(masks.sizes.values()))
            for name, kept in masks.kept.items():
                assert (module.get_parameter(name)[~kept] == 0).all()
            self.steps += 1

    guard, looking = pruning(options), Looking()
    kept = ModelCheckpoint(tmp_path)
    module = fit(
        [EMAWeightAveraging(decay=0.5), looking, guard, kept],
        lambda: Steady(optimizer),
        enable_checkpointing=True,
        **ONE,
    )
    assert looking.steps == 8
    weights = ("net.4.weight",) if "pattern" in options else WEIGHTS
    goal = sum(round(0.6 * n) for n in (96, 48)) if "scope" in options else round(0.6 * 144)
    goal = 24 if "pattern" in options else goal
    stored = torch.load(kept.best_model_path, weights_only=True)["state_dict"]
    for state in (stored, module.state_dict()):
        assert sum(int((state[name] == 0).sum()) for name in weights) == goal


@options
def test_half_precision_throughout(options):
    module = fit([pruning(options)], Steady, precision="bf16-true", **ONE)
    assert module.net[0].weight.dtype == torch.bfloat16
    dropped = torch.cat([(module.get_parameter(name) == 0).flatten() for name in WEIGHTS])
    goal = {"layer": 58 + 29, "pattern": 24}.get(next((n for n, o in OPTIONS.items() if o is options)), 86)
    assert int(dropped.sum()) == goal


def test_a_rewind_that_nothing_was_remembered_for_is_refused(tmp_path):
    kept = ModelCheckpoint(tmp_path, filename="one")
    fit([pruning({}), kept], Steady, enable_checkpointing=True, max_steps=6, **ONE)
    with pytest.raises(GuardConflict, match="no weights to rewind to"):
        fit([pruning({"rewind": 1, "end": 8})], Steady, ckpt_path=tmp_path / "one.ckpt", **ONE)


@options
def test_resume_is_bitwise_in_every_phase(options, tmp_path):
    kept = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
    whole = fit([pruning(options), kept], lambda: Steady("adam"), enable_checkpointing=True, **ONE)
    for step in range(1, 8):
        resumed = fit(
            [pruning(options)], lambda: Steady("adam"), ckpt_path=tmp_path / f"step={step}.ckpt", seed=9, **ONE
        )
        assert same(resumed, whole), step
        assert resumed.fitted.global_step == 8
