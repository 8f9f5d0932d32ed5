"""Weights are shared to the bit after every step, whatever the optimizer, and move as projected steps do."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

from lightning_guard.callbacks import DPSGD, MagnitudePruning, WeightClustering
from lightning_guard.functional import kmeans
from lightning_guard.guard import GuardConflict
from tests.toys import PlainNet, fit, loader, rows, same

WEIGHTS = ("net.0.weight", "net.4.weight")
ONE = {"data": loader(batch_size=64, shuffle=False), "max_epochs": 8}  # an epoch is one step


class Steady(PlainNet):
    """Without dropout and batch statistics."""

    def __init__(self, optimizer="sgd"):
        super().__init__(norm=False, optimizer=optimizer)
        self.net.insert(1, nn.Identity())
        self.net[3].p = 0.0


class Counting(pl.Callback):
    """Distinct values of each weight after every step, where validation and checkpoints look too."""

    def __init__(self):
        self.seen, self.zeros = [], []

    def on_train_batch_end(self, trainer, module, *args):
        self.seen.append(tuple(len(module.get_parameter(name).unique()) for name in WEIGHTS))
        self.zeros.append(torch.cat([module.get_parameter(name).detach().flatten() == 0 for name in WEIGHTS]))


def clustering(**options):
    return WeightClustering(**{"clusters": 4, "start": 2, "end": 6, "every": 2, **options})


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_values_are_few_after_every_step(optimizer, tmp_path):
    counting, kept = Counting(), ModelCheckpoint(tmp_path)
    module = fit(
        [EMAWeightAveraging(decay=0.5), counting, clustering(), kept],
        lambda: PlainNet(optimizer=optimizer), enable_checkpointing=True,
    )  # fmt: skip
    assert counting.seen[0] == (96, 48)  # not begun yet
    assert all(a <= 4 and b <= 4 for a, b in counting.seen[1:])
    stored = torch.load(kept.best_model_path, weights_only=True)["state_dict"]
    for state in (stored, module.state_dict()):  # averaged weights
        assert all(1 < len(state[name].unique()) <= 4 for name in WEIGHTS)
    assert len(module.net[0].bias.unique()) == 16


def by_hand():
    """The same in plain torch, cluster by cluster."""
    pl.seed_everything(0, verbose=False)
    module = Steady()
    made = module.configure_optimizers()
    x, y, _ = rows()
    weights = {name: module.get_parameter(name) for name in WEIGHTS}
    books, labels, latent = {}, {}, {}
    for step in range(1, 9):
        made["optimizer"].zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        before = {name: w.detach().clone() for name, w in weights.items()}
        made["optimizer"].step()
        with torch.no_grad():
            for name, w in weights.items():
                if step == 2:
                    latent[name] = w.clone()
                    books[name], labels[name] = kmeans(w, 4)
                elif step > 2:
                    latent[name] = latent[name] + (w - before[name]) if step <= 6 else w
                    for again in range(2 if step in (4, 6) else 1):
                        if again:
                            labels[name] = (latent[name][..., None] - books[name]).abs().argmin(-1)
                        for j in range(4):
                            if (labels[name] == j).any():
                                books[name][j] = latent[name][labels[name] == j].double().mean().float()
                if step >= 2:
                    w.copy_(books[name][labels[name]])
        made["lr_scheduler"].step()
    return module


def test_training_is_that_of_a_loop():
    one, other = fit([clustering()], Steady, **ONE), by_hand()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_clusters_are_final_after_the_end_and_only_then():
    class Looking(pl.Callback):
        labels = []

        def on_train_batch_end(self, trainer, module, *args):
            self.labels.append({name: value.clone() for name, value in trainer.callbacks[-1]._labels.items()})

    looking = Looking()
    looking.labels = []
    fit([looking, clustering(start=0, end=4, every=1, clusters=8)], lambda: PlainNet(optimizer="adam"))
    final = looking.labels[3]
    assert any(not torch.equal(looking.labels[0][name], final[name]) for name in WEIGHTS)
    assert all(torch.equal(later[name], final[name]) for later in looking.labels[4:] for name in WEIGHTS)


def test_after_the_end_a_step_is_the_projection_of_the_optimizers():
    class Looking(pl.Callback):
        seen = []

        def on_before_zero_grad(self, trainer, module, optimizer):
            self.before = {name: module.get_parameter(name).detach().clone() for name in WEIGHTS}

        def on_train_batch_end(self, trainer, module, *args):
            if trainer.global_step == 8:
                self.after = {name: module.get_parameter(name).detach().clone() for name in WEIGHTS}
                self.slopes = {name: module.get_parameter(name).grad.clone() for name in WEIGHTS}

    class Plain(Steady):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    looking = Looking()
    fit([looking, clustering()], Plain, **ONE)
    for name in WEIGHTS:
        before, after, slope = looking.before[name], looking.after[name], looking.slopes[name]
        for value in before.unique():
            own = before == value
            torch.testing.assert_close(after[own], (value - 0.1 * slope[own].mean()).expand(int(own.sum())))


def test_zeros_stay_zero_and_count():
    class Zeros(PlainNet):
        def __init__(self):
            super().__init__(optimizer="adam")
            self.net[0].weight.data[::2] = 0

        def on_before_optimizer_step(self, optimizer):
            if self.global_step < 2:  # until the clusters are formed
                self.net[0].weight.grad[::2] = 0

    counting = Counting()
    module = fit([counting, clustering()], Zeros)
    assert (module.net[0].weight[::2] == 0).all()
    assert all(values[0] <= 4 for values in counting.seen[1:])
    assert (module.net[0].weight[1::2] != 0).any()


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("end", [2, 8], ids=["pruned before", "pruned while and after"])
def test_pruned_weights_stay_pruned(order, end):
    counting = Counting()
    guards = [clustering(start=2, end=5), MagnitudePruning(0.5, start=0, end=end, every=1)]
    module = fit([counting, *guards[::order]], lambda: PlainNet(optimizer="adam"))
    assert int(counting.zeros[-1].sum()) == 72
    assert all(a <= 4 and b <= 4 for a, b in counting.seen[2:])
    assert all(len(module.get_parameter(name).unique()) <= 4 for name in WEIGHTS)
    for earlier, later in zip(counting.zeros, counting.zeros[1:], strict=False):
        assert not (earlier & ~later).any()


def test_a_layer_of_zeros_stays_so():
    class Zeros(PlainNet):
        def __init__(self):
            super().__init__()
            nn.init.zeros_(self.net[4].weight)

        def on_before_optimizer_step(self, optimizer):
            self.net[4].weight.grad.zero_()

    module = fit([clustering(start=0)], Zeros)
    assert (module.net[4].weight == 0).all()


def test_resume_is_bitwise_in_every_phase(tmp_path):
    kept = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
    whole = fit([clustering(), kept], lambda: Steady("adam"), enable_checkpointing=True, **ONE)
    for step in range(1, 8):
        path = tmp_path / f"step={step}.ckpt"
        resumed = fit([clustering()], lambda: Steady("adam"), ckpt_path=path, seed=9, **ONE)
        assert same(resumed, whole), step
        state = torch.load(path, weights_only=True)["lightning_guard"]["guards"]["weight_clustering"]
        assert bool(state["offsets"]) is (2 <= step < 6)
        assert bool(state["labels"]) is (step >= 2)
        assert all(labels.dtype == torch.uint8 for labels in state["labels"].values())


def test_a_training_that_stops_early_is_said():
    class Stopping(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step >= 4

    with pytest.warns(UserWarning, match=r"before end=6: clusters were not final yet"):
        module = fit([Stopping(), clustering()], max_epochs=4)
    assert len(module.net[0].weight.unique()) <= 4
    with pytest.warns(UserWarning, match=r"before end=8: weights are not shared"):
        fit([Stopping(), clustering(start=6, end=8)], max_epochs=4)
    with pytest.raises(GuardConflict, match=r"end=9 .* so clusters=4 is never reached"):
        fit([clustering(end=9)])


def test_weights_that_are_not_finite_are_refused():
    class Diverging(PlainNet):
        def on_train_batch_start(self, batch, batch_idx):
            if self.global_step == 1:
                self.net[0].weight.data[0, 0] = torch.nan

    with pytest.raises(GuardConflict, match=r"net\.0\.weight holds infinite weights or NaN"):
        fit([clustering()], Diverging)


def test_targets_and_ignore():
    module = fit([clustering(ignore=["net.4"])])
    assert len(module.net[0].weight.unique()) <= 4
    assert len(module.net[4].weight.unique()) == 48
    with pytest.raises(
        GuardConflict, match=r"targets='head' matches nothing that there is to cluster; there are net\.0"
    ):
        fit([clustering(targets=["head"])])


def test_private_weights_may_be_shared():
    private = DPSGD(delta=1e-3, noise_multiplier=0.5, test_seed=5)
    module = fit([private, clustering()], lambda: PlainNet(norm=False))
    assert len(module.net[0].weight.unique()) <= 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": 1}, "clusters=1"),
        ({"clusters": -1}, "clusters=-1"),
        ({"start": 7}, "start=7"),
        ({"every": 0}, "every=0"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        clustering(**options)
