"""Quantisation-aware training in whole fits: what is rounded when, what is left, and what a resume and a copy get."""

import os
import socket

import pytest
import pytorch_lightning as pl
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from pytorch_lightning.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from torch import nn

from lightning_guard.callbacks import DPSGD, AdversarialTraining, MagnitudePruning, QuantizationAwareTraining
from lightning_guard.functional.quantization import FakeQuantization, fake_quantize, fake_quantized, weight_grid
from lightning_guard.guard import Batch, GuardConflict, Trait
from tests.toys import FEATURES, PlainNet, Rows, fit, loader, same, trainer


def guard(**options):
    return QuantizationAwareTraining(**{"start": 0.25, "end": 0.75, **options})


def linear(module):
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def on_grid(module, bits=8):
    return all(torch.equal(fake_quantize(layer.weight, bits), layer.weight) for layer in linear(module))


class Looking(pl.Callback):
    """Keeps what `look(trainer, module)` gives after every step."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_train_batch_end(self, trainer, module, *args):
        self.seen.append(self.look(trainer, module))


# Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 1}, {"bits": 16}, {"activation_bits": 9}, {"scheme": "dorefa"}, {"batchnorm": "freeze"},
        {"start": -1}, {"end": 1.5}, {"start": 0.9, "end": 0.5}, {"step_lr": 0.0}, {"ranges": (1.0, 2.0)},
        {"ranges": (0.0, 0.0)}, {"ranges": {"net.0": (0.0, float("inf"))}},
        {"ranges": (0.0, 1.0), "activation_bits": None},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_describe_nothing_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        QuantizationAwareTraining(**options)


@pytest.mark.parametrize(
    ("options", "kwargs", "message"),
    [
        ({"targets": ["nit.*"]}, {}, "targets='nit.*' matches nothing.*net.0, net.4"),
        ({"ignore": ["net.1"]}, {}, "ignore='net.1' matches nothing"),
        ({"ignore": ["net.*"]}, {}, "no layer is left"),
        ({"ranges": {"net.0": (0.0, 1.0)}}, {}, "no pair for the inputs of net.4"),
        ({"ranges": {"*": (0.0, 1.0), "net.9": (0.0, 1.0)}}, {}, "'net.9' names no layer"),
        ({}, {"max_epochs": -1}, "without end"),
        ({"start": 8, "end": 9}, {"max_steps": 8}, "start=8 comes after"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_runs_that_cannot_be_quantised_are_refused(options, kwargs, message):
    with pytest.raises(GuardConflict, match=message):
        fit([guard(**options)], **kwargs)


class Odd(PlainNet):
    """One more layer that something is the matter with."""

    def __init__(self, layer, **kwargs):
        super().__init__(**kwargs)
        self.odd = layer() if callable(layer) else layer

    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "odd: its weight is computed"),
        (lambda: nn.Embedding(3, 2, max_norm=1.0), "odd: max_norm"),
        (lambda: nn.Embedding(3, 2, sparse=True), "odd: max_norm and sparse"),
        (lambda: nn.Linear(2, 2).bfloat16(), "odd: torch.bfloat16 weights"),
    ],
)
def test_layers_that_cannot_be_quantised_are_refused_by_name(layer, message):
    with pytest.raises(GuardConflict, match=message):
        fit([guard()], lambda: Odd(layer))
    fit([guard(ignore=["odd"])], lambda: Odd(layer))


def test_weights_shared_across_different_channels_are_refused():
    class Shared(PlainNet):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Conv1d(4, 4, 3), nn.ConvTranspose1d(4, 4, 3)
            self.other.weight = self.one.weight

    with pytest.raises(GuardConflict, match="one and other share a weight"):
        fit([guard()], Shared)


def test_learned_steps_are_refused_where_they_cannot_learn():
    class Two(PlainNet):
        def configure_optimizers(self):
            return [torch.optim.SGD(layer.parameters(), 0.1) for layer in linear(self)]

        automatic_optimization = False

    with pytest.raises(GuardConflict, match="several optimizers"):
        fit([guard()], Two)
    with pytest.raises(GuardConflict, match="2 losses"):
        fit([guard(scheme="lsq", start=1, end=5)], Two)


def test_batch_norm_without_a_forward_is_refused_before_training():
    class Blind(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = PlainNet().net

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    with pytest.raises(GuardConflict, match="batchnorm='reestimate'"):
        fit([guard()], Blind)
    fit([guard(batchnorm="keep")], Blind)
    fit([guard(batch=Batch(logits="net"))], Blind)


def test_traits_follow_what_is_read():
    assert guard().traits == {Trait.QUERIES_DATA}
    assert guard(scheme="lsq", activation_bits=None).traits == {Trait.REMEMBERS_DATA}
    for options in ({"activation_bits": None}, {"ranges": (0.0, 1.0)}):
        assert guard(**options).traits == {Trait.POST_PROCESSING}
    private = DPSGD(delta=1e-3, noise_multiplier=0.5, max_grad_norm=0.5, test_seed=5)
    with pytest.raises(GuardConflict, match="statistics of private data"):
        fit([private, guard(scheme="lsq")], lambda: PlainNet(norm=False))
    for options in ({"activation_bits": None}, {"ranges": (-4.0, 4.0)}):
        private = DPSGD(delta=1e-3, noise_multiplier=0.5, max_grad_norm=0.5, test_seed=5)
        assert on_grid(fit([private, guard(**options)], lambda: PlainNet(norm=False)))


# What is rounded, when --------------------------------------------------------------------------------------------


def test_training_rounds_from_start_on_and_ranges_rest_from_end_on():
    made = guard()
    x = torch.rand(4, FEATURES, generator=torch.Generator().manual_seed(0))

    def look(trainer, module):
        module.eval()
        with torch.no_grad():
            out = module(x)
        module.train()
        return out, {k: v.clone() for k, v in module.state_dict().items()}, made._model.ranges

    looking = Looking(look)
    fit([made, looking])  # 8 steps: rounding in steps 2 to 7, ranges final after step 6
    for i, (out, state, ranges) in enumerate(looking.seen):
        alone = PlainNet()
        alone.load_state_dict(state)
        with torch.no_grad():
            plain = alone.eval()(x)
            with fake_quantized(alone, ranges):
                rounded = alone(x)
        assert torch.equal(out, rounded if i >= 2 else plain)
        assert torch.equal(out, plain) is (i < 2)
        assert sorted(ranges) == (["net.0", "net.4"] if i >= 2 else [])
    kept = [ranges for *_, ranges in looking.seen]
    assert kept[2] != kept[3] != kept[4] != kept[5]
    assert kept[5] == kept[6] == kept[7] == made.activation_ranges


def test_ranges_are_the_moving_average_of_what_the_layer_was_given():
    made, given = guard(start=0, end=1.0), []

    class Spied(PlainNet):
        def forward(self, x):
            if self.training:
                given.append((x.min().item(), x.max().item()))
            return super().forward(x)

    fit([made], Spied)
    low, high = given[0]
    for bottom, top in given[1:8]:  # what follows is for BatchNorm
        low, high = low + 0.05 * (bottom - low), high + 0.05 * (top - high)
    assert made.activation_ranges["net.0"] == pytest.approx((low, high), rel=1e-5)


def test_only_training_itself_is_observed(monkeypatch):
    seen, passes = [], []
    own = FakeQuantization._input

    def spying(self, index, x):
        (seen if self.observing else passes).append(x.abs().max().item())
        return own(self, index, x)

    monkeypatch.setattr(FakeQuantization, "_input", spying)

    class Wild(PlainNet):
        def validation_step(self, batch, batch_idx):
            self(1000 * batch[0])

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return loader()

        val_dataloader = train_dataloader

    made = guard(start=0, end=1.0)
    fit([made, AdversarialTraining(eps=0.1, steps=3, bounds=(0.0, 1.0))], Wild, Data())
    assert len(seen) == 2 * 8  # layers times steps
    assert len(passes) > 2 * 8 * 3
    assert made.activation_ranges["net.0"][1] <= 1.2
    assert max(passes) > 100


def test_validation_and_the_last_checkpoint_see_the_model_that_ships(tmp_path):
    class Judged(PlainNet):
        def validation_step(self, batch, batch_idx):
            self.outputs = self(batch[0])

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return loader()

        def val_dataloader(self):
            return loader(batch_size=64, shuffle=False)

    made, kept = guard(), ModelCheckpoint(tmp_path, filename="last")
    module = fit([made, kept], Judged, Data(), enable_checkpointing=True)
    assert on_grid(module)
    with torch.no_grad(), fake_quantized(module.eval(), made.activation_ranges, None):
        assert torch.equal(module(loader(batch_size=64, shuffle=False).dataset.data[0]), module.outputs)
    assert same(PlainNet.load_from_checkpoint(tmp_path / "last.ckpt"), module)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("scheme", ["minmax", "lsq"])
def test_released_weights_are_codes_times_a_step(bits, scheme):
    module = fit([guard(bits=bits, scheme=scheme)])
    for layer in linear(module):
        assert all(row.unique().numel() <= 2**bits - 1 for row in layer.weight.detach())
        if scheme == "minmax":
            codes, _ = weight_grid(layer.weight, bits)
            assert (codes.abs().amax(1) == 2 ** (bits - 1) - 1).all()
    if scheme == "minmax":
        assert on_grid(module, bits)


def test_every_checkpoint_from_start_on_holds_the_rounded_model(tmp_path):
    kept = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    looking = Looking(lambda _, module: {k: v.clone() for k, v in module.state_dict().items()})
    fit([guard(bits=4), looking, kept], enable_checkpointing=True)
    for step in range(1, 9):
        stored = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        live, section = looking.seen[step - 1], stored["lightning_guard"]["guards"]["quantization"]
        for key in ("net.0.weight", "net.4.weight"):
            if step <= 2:
                assert torch.equal(stored["state_dict"][key], live[key])
                assert "latent" not in section
            else:
                assert torch.equal(stored["state_dict"][key], fake_quantize(live[key], 4))
                assert torch.equal(section["latent"].get(key, live[key]), live[key])
        if step > 2:
            assert all(pair.shape == (2,) for pair in section["ranges"].values())
            PlainNet.load_from_checkpoint(tmp_path / f"step={step}.ckpt", weights_only=True)


# Resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"scheme": "lsq", "bits": 4}, {"activation_bits": None}, {"scheme": "lsq", "ranges": (-3.0, 3.0)}],
    ids=str,
)
def test_resume_is_bitwise_in_every_phase(options, tmp_path):
    class Rewound(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            torch.manual_seed(trainer.global_step)

    kept = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
    made = guard(start=0.4, end=0.7, **options)  # of 16 steps: 6 and 11; after epochs at 4, 8 and 12
    data = loader(shuffle=False)
    whole = fit([Rewound(), made, kept], data=data, enable_checkpointing=True, max_epochs=4)
    for epoch in range(3):
        again = guard(start=0.4, end=0.7, **options)
        path = tmp_path / f"epoch={epoch}.ckpt"
        resumed = fit([Rewound(), again], data=data, max_epochs=4, ckpt_path=path, seed=1)
        assert same(resumed, whole), epoch
        assert again.activation_ranges == made.activation_ranges


def test_a_resume_with_other_options_is_refused(tmp_path):
    module = fit([guard()])
    module.fitted.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(GuardConflict, match=r"bits=8.*bits=4"):
        fit([guard(bits=4)], max_epochs=3, ckpt_path=tmp_path / "a.ckpt")
    with pytest.raises(GuardConflict, match=r"quantise: net\.0"):
        fit([guard(ignore=["net.0"])], max_epochs=3, ckpt_path=tmp_path / "a.ckpt")


def test_a_stopped_training_is_released_and_can_go_on(tmp_path):
    stopping = EarlyStopping("train_loss", stopping_threshold=1e9, check_on_train_epoch_end=True)
    module = fit([guard(), stopping], max_epochs=4, min_epochs=2)
    assert module.fitted.global_step == 8
    assert on_grid(module)
    module.fitted.save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(stored["state_dict"]["net.0.weight"], module.net[0].weight)
    latent = stored["lightning_guard"]["guards"]["quantization"]["latent"]["net.0.weight"]
    assert not torch.equal(latent, module.net[0].weight)
    assert torch.equal(fake_quantize(latent), module.net[0].weight)


def test_a_start_that_is_never_reached_is_refused_or_said(tmp_path):
    with pytest.raises(GuardConflict, match=r"start=20 is 20 optimizer steps away and training has 8 left"):
        fit([guard(start=20, end=30)])
    stopping = EarlyStopping("train_loss", stopping_threshold=1e9, check_on_train_epoch_end=True)
    with pytest.warns(UserWarning, match="before start=6: nothing is quantised"):
        assert not on_grid(fit([guard(start=6, end=7), stopping]))
    plain = fit()
    plain.fitted.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(GuardConflict, match="training has 4 left"):
        fit([guard(start=4, end=6)], max_epochs=3, ckpt_path=tmp_path / "plain.ckpt")
    late = fit([guard(start=2, end=3)], max_epochs=3, ckpt_path=tmp_path / "plain.ckpt")
    assert on_grid(late)


# BatchNorm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [False, True])
def test_batch_norm_fits_the_weights_that_ship(stops):
    made = guard()
    stopping = [EarlyStopping("train_loss", stopping_threshold=1e9, check_on_train_epoch_end=True)] if stops else []
    data = loader(shuffle=False)
    module = fit([made, *stopping], data=data, max_epochs=4 if stops else 2, min_epochs=2)
    norm, (ranges, net) = module.net[1], (made.activation_ranges, module.net)
    means, variances = [], []
    with torch.no_grad(), fake_quantized(module, ranges, None):
        for x, *_ in data:
            out = net[0](x)
            means.append(out.mean(0))
            variances.append(out.var(0))
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack(variances).mean(0))
    assert (norm.momentum, int(norm.num_batches_tracked)) == (0.1, 8)
    kept = fit([guard(batchnorm="keep")], data=data)
    assert (kept.net[1].running_mean - norm.running_mean).abs().max() > 1e-3


def test_reestimation_leaves_no_other_trace():
    states = []

    class After(pl.Callback):
        def on_train_end(self, trainer, module):
            own = trainer.train_dataloader.generator.get_state()
            states.append((torch.get_rng_state(), own, trainer.callback_metrics["train_accuracy"].clone()))

    def fitted(batchnorm):
        draws = torch.Generator().manual_seed(1)
        data = torch.utils.data.DataLoader(Rows(), 16, shuffle=True, generator=draws)
        return fit([guard(batchnorm=batchnorm), After()], data=data).state_dict()

    kept, again = fitted("keep"), fitted("reestimate")
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))
    assert [key for key in kept if not torch.equal(kept[key], again[key])] == [
        "net.1.running_mean", "net.1.running_var",
    ]  # fmt: skip


# Beside others ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("turned", [False, True])
def test_pruned_weights_stay_zero_through_quantisation(optimizer, turned):
    pruning = MagnitudePruning(sparsity=0.5, every=1, end=0.25, targets=["net.0"])
    looking = Looking(lambda _, module: (module.net[0].weight == 0).clone())
    guards = [pruning, guard(start=0.25)]
    module = fit([*(reversed(guards) if turned else guards), looking], lambda: PlainNet(optimizer=optimizer))
    mask = looking.seen[2]
    assert mask.sum() == mask.numel() // 2
    assert all(torch.equal(seen, mask) for seen in looking.seen[2:7])
    codes, _ = weight_grid(module.net[0].weight)
    assert (codes[mask] == 0).all()
    assert (module.net[0].weight[mask] == 0).all()
    assert on_grid(module)


@pytest.mark.parametrize("turned", [False, True])
def test_averaged_weights_are_released_on_their_grid(turned, tmp_path):
    callbacks = [guard(bits=4), EMAWeightAveraging(decay=0.9)]
    kept = ModelCheckpoint(tmp_path, filename="last")
    module = fit([*(reversed(callbacks) if turned else callbacks), kept], enable_checkpointing=True)
    assert on_grid(module, 4)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(stored["net.0.weight"], module.net[0].weight)


class Language(pl.LightningModule):
    """Embedding, attention, and a head that shares the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(FEATURES, 8)
        self.body = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, FEATURES, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.body(self.embedding((x * FEATURES).long().clamp_max(FEATURES - 1))).mean(1))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.outputs = self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


def test_transformers_and_tied_weights():
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return loader()

        def val_dataloader(self):
            return loader(batch_size=64, shuffle=False)

    made = guard(bits=4)
    module = fit([made], Language, Data())
    attention = module.body.self_attn
    for weight in (module.embedding.weight, attention.in_proj_weight, attention.out_proj.weight):
        assert torch.equal(fake_quantize(weight, 4), weight)
    assert module.head.weight is module.embedding.weight
    assert sorted(made.activation_ranges) == ["body.linear1", "body.linear2", "body.self_attn", "head"]
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad(), fake_quantized(module.eval(), made.activation_ranges, None):
        assert torch.equal(module(loader(batch_size=64, shuffle=False).dataset.data[0]), module.outputs)
    left = fit([guard(bits=4, ignore=["head"])], Language)
    assert not torch.equal(fake_quantize(left.embedding.weight, 4), left.embedding.weight)


def test_a_failing_training_puts_the_fast_path_back():
    class Failing(PlainNet):
        def on_train_batch_end(self, *args):
            assert not torch.backends.mha.get_fastpath_enabled()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fit([guard()], Failing)
    assert torch.backends.mha.get_fastpath_enabled()


def test_layers_that_training_never_calls_are_named():
    with pytest.warns(UserWarning, match="never called odd"):
        module = fit([guard(bits=4)], lambda: Odd(lambda: nn.Linear(3, 3)))
    assert on_grid(module, 4)


def test_targets_and_ignore_leave_the_rest_alone():
    module = fit([guard(bits=2, targets=["net.*"], ignore=["net.4"])])
    assert torch.equal(fake_quantize(module.net[0].weight, 2), module.net[0].weight)
    assert module.net[4].weight.unique().numel() == module.net[4].weight.numel()


def test_replaced_optimizers_are_refused():
    class Replacing(PlainNet):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.trainer.strategy.optimizers = [torch.optim.SGD(self.parameters(), 0.1)]

    with pytest.raises(GuardConflict, match="optimizers were replaced"):
        fit([guard()], Replacing)


def test_learned_steps_move_and_serve_the_loss():
    made = guard(bits=3, scheme="lsq", start=0, end=1.0)
    first = {}

    def look(trainer, module):
        logs = {slot.name: made._model.steps[weight].detach().clone() for weight, slot in made._model.slots.items()}
        first.setdefault("logs", logs)
        return logs

    looking = Looking(look)
    module = fit([made, looking])
    for name, start in looking.seen[0].items():
        assert not torch.equal(looking.seen[-1][name], start)
        assert (looking.seen[-1][name] - start).abs().max() < 0.2
        step = looking.seen[-1][name].exp()[:, None]
        codes = (module.get_parameter(name).detach() / step).round()
        assert codes.abs().max() <= 3
        torch.testing.assert_close(module.get_parameter(name).detach(), codes * step, rtol=2**-16, atol=0)
    assert all(weight.grad is None or torch.isfinite(weight.grad).all() for weight in module.parameters())


@pytest.mark.parametrize(("start", "logged"), [(0, 1.0), (0.5, 1.0), (0.9, 0.25)])
def test_it_logs_when_it_acts(start, logged):
    module = fit([guard(start=start, end=1.0)])  # the figure is the mean of the last epoch
    assert module.fitted.callback_metrics["guard/quantization/quantized"] == logged


def test_notes_say_what_the_module_is():
    made, late = guard(bits=4), guard(start=6, end=7)
    fit([made])
    fit([late, EarlyStopping("train_loss", stopping_threshold=1e9, check_on_train_epoch_end=True)])
    assert "weights on grids of 4 bits" in made.notes()[0]
    assert "nothing is quantised" in late.notes()[0]
    assert guard(bits=None).notes() == []


def test_trainer_test_after_the_fit_sees_the_released_weights():
    run = trainer([guard(bits=2)])
    pl.seed_everything(0, verbose=False)
    module = PlainNet()
    run.fit(module, loader())
    (found,) = run.test(module, loader(shuffle=False, batch_size=64), verbose=False)
    x, y, _ = Rows().data
    with torch.no_grad():
        assert found["val_loss"] == pytest.approx(F.cross_entropy(module.eval()(x), y).item(), rel=1e-5)


# Two processes ----------------------------------------------------------------------------------------------------


class Steady(PlainNet):
    """Without dropout, two halves of a batch give the gradient of the whole."""

    def __init__(self, norm=False):
        super().__init__(norm=norm)
        next(m for m in self.net if isinstance(m, nn.Dropout)).p = 0.0


FORMS = {"minmax": {}, "lsq": {"scheme": "lsq", "bits": 4, "activation_bits": None}, "norm": {}}


def work(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", NODE_RANK="0",
                      LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")  # fmt: skip
    torch.set_num_threads(1)
    rows = Rows()
    shares = torch.utils.data.DistributedSampler(rows, num_replicas=2, rank=rank, shuffle=False)
    found = {}
    for form, options in FORMS.items():
        made = guard(**options)
        data = torch.utils.data.DataLoader(rows, 8, sampler=shares)
        module = fit([made], lambda form=form: Steady(form == "norm"), data, strategy="ddp", devices=2)
        found[form] = module.state_dict(), made.activation_ranges
    torch.save(found, f"{folder}/{rank}.pt")


def test_two_processes_agree_and_equal_one_on_the_union(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for form, options in FORMS.items():
        (state, ranges), (other, others) = first[form], second[form]
        assert ranges == others
        assert all(torch.equal(state[key], other[key]) for key in state), form
        if form != "norm":
            made = guard(**options)
            one = fit([made], Steady, loader(batch_size=16, shuffle=False))
            for key, value in one.state_dict().items():
                torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-5)
            assert {n: pytest.approx(pair, rel=1e-5) for n, pair in ranges.items()} == made.activation_ranges


# What ships -------------------------------------------------------------------------------------------------------


class Convolutions(pl.LightningModule):
    """A residual network with BatchNorm, which an exporter folds into the convolutions."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8 * FEATURES * FEATURES, 3)

    def forward(self, x):
        x = self.first(x[:, None, :, None] * x[:, None, None, :])
        return self.head(torch.relu(x + self.second(x)).flatten(1))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


@pytest.mark.slow
def test_onnxruntime_finds_the_codes_of_training(tmp_path):
    onnx, quantization = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime.quantization")
    made = guard()
    module = fit([made], Convolutions).eval()
    x = Rows().data[0]
    torch.onnx.export(module, (x,), tmp_path / "float.onnx", dynamo=True, verbose=False)
    graph = onnx.load(tmp_path / "float.onnx")
    del graph.graph.value_info[:]
    onnx.save(graph, tmp_path / "float.onnx")

    class Reader(quantization.CalibrationDataReader):
        rows = iter([{graph.graph.input[0].name: x.numpy()}])

        def get_next(self):
            return next(self.rows, None)

    quantization.quantize_static(
        tmp_path / "float.onnx", tmp_path / "int8.onnx", Reader(), per_channel=True,
        activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
    )  # fmt: skip
    stored = onnx.load(tmp_path / "int8.onnx").graph.initializer
    stored = [torch.from_numpy(onnx.numpy_helper.to_array(one).copy()) for one in stored]
    weights = [one for one in stored if one.dtype == torch.int8 and one.dim() > 1]
    assert len(weights) == 3
    for layer, norm in ((module.first[0], module.first[1]), (module.second[0], module.second[1]), (module.head, None)):
        codes, _ = weight_grid(layer.weight)
        if norm is not None:  # folded: a negative factor turns the signs of a channel
            codes = codes * norm.weight.detach().sign().to(torch.int8)[:, None, None, None]
        same_shape = [one if one.shape == codes.shape else one.T for one in weights if one.numel() == codes.numel()]
        assert any(torch.equal(one, codes) for one in same_shape)
