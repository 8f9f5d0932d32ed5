"""What the table refuses does harm: each refused row has a run that shows it once nobody checks, and the check.

Private training here has a fixed seed, so that draws and noise are the same for two data sets that differ in one row:
whatever then differs is what that row has changed.
"""

import re

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import StochasticWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_guard.callbacks import (
    DPSGD,
    AdversarialTraining,
    ChannelPruning,
    FairnessRegularization,
    LowRankFactorization,
    MagnitudePruning,
    PrivacyAudit,
    QuantizationAwareTraining,
    SampleLedger,
    WeightClustering,
)
from lightning_guard.guard import Guard, GuardConflict, Phase, Query, Run, Trait
from lightning_guard.rules import RULES, Verdict
from tests.toys import CLASSES, FEATURES, fit, rows

REFUSED = {rule.together: rule for rule in RULES if rule.verdict is Verdict.REFUSED}
CLIP, BATCH = 0.1, 16
PEOPLE = [i // 8 for i in range(64)]  # eight rows each


class Net(pl.LightningModule):
    """Remembers what it was trained on; plain SGD, so that one step of length 1 is the sum of the gradients."""

    def __init__(self, lr=1.0):
        super().__init__()
        self.lr, self.seen = lr, []
        self.net = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, CLASSES))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0].detach().clone())
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


class Tokens(Net):
    def __init__(self):
        super().__init__()
        self.words, self.net = nn.Embedding(20, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.net(self.words(x).mean(1))


def data(row=None, times=-1.0, group=None):
    """The toys' rows, of which one is another: its inputs times a number, its label and its group changed."""
    x, y, own = (part.clone() for part in rows())
    if row is not None:
        x[row], y[row] = x[row] * times, (y[row] + 1) % CLASSES
        own[row] = 1 - own[row] if group is None else group
    return DataLoader(TensorDataset(x, y, own), BATCH)


def words(row=None):
    x = torch.randint(0, 20, (64, 5), generator=torch.Generator().manual_seed(0))
    if row is not None:
        x[row] = (x[row] + 7) % 20
    return DataLoader(TensorDataset(x, x[:, 0] % CLASSES), BATCH)


def private(**options):
    given = {"delta": 1e-3, "noise_multiplier": 1.0, "max_grad_norm": CLIP, "test_seed": 5}
    return DPSGD(**given | options)


def moved(*guards, rows_of=data, net=Net):
    """How far the clipped sum of the first step moves when one row is another, in clipping norms; 2 is allowed."""

    def weights(row):
        trained = fit([private(), *(make() for make in guards)], net, rows_of(row), max_steps=1)
        return torch.cat([p.detach().flatten() for p in trained.parameters()])

    before = weights(None)
    return max(float((weights(row) - before).norm()) for row in range(0, 64, 7)) * BATCH / CLIP


def unprotected(monkeypatch):
    """As if nobody knew that examples are private: guards take from them what they take without DP-SGD."""
    monkeypatch.setattr(Run, "protected", False)


# The harm ---------------------------------------------------------------------------------------------------------


def coupled(monkeypatch):
    unprotected(monkeypatch)
    assert moved() <= 2
    assert moved(lambda: FairnessRegularization(mode="penalty", weight=100.0)) > 5


def remembered(monkeypatch):
    def margins(row):
        made = SampleLedger()
        fit([private(noise_multiplier=50.0), made], lambda: Net(0.01), data(row), max_epochs=1)
        return made.aum

    apart = (margins(None) - margins(3)).abs()  # hidden in the weights by fifty times the noise
    others = torch.arange(64) != 3
    assert apart[3] > 50 * apart[others].max()


def groups(monkeypatch):
    unprotected(monkeypatch)

    def known(row):
        made = FairnessRegularization(max_gap=0.05, min_support=1, margin=0.0, warmup=0)
        fit([private(), made], lambda: Net(0.01), data(row, group=7), max_epochs=1)
        return set(made.state()["census"]["rows"][:, 0].tolist())

    assert known(3) - known(None) == {7.0}


def unbounded(monkeypatch):
    unprotected(monkeypatch)

    def gap(notion, row):
        made = FairnessRegularization(notion, max_gap=0.5, min_support=1, margin=0.0, warmup=0)
        trained = fit([private(), made], lambda: Net(0.0), data(row, times=1e4), max_epochs=1)
        return float(trained.fitted.callback_metrics["guard/fairness/measured_gap"])

    smallest = min(data().dataset.tensors[2].bincount().tolist())
    for notion, bounded in (("demographic_parity", True), ("bounded_group_loss", False)):
        change = max(abs(gap(notion, row) - gap(notion, None)) for row in range(0, 64, 7))
        assert change <= 2 / smallest if bounded else change > 50


class Counting(Guard):
    """Counts the rows of group 0."""

    name, phase, traits = "counting", Phase.LOSS, frozenset({Trait.QUERIES_DATA})

    def queries(self):
        return [Query("count", 1.0, once=True)]

    def begin(self, run):
        self.run = run

    def on_train_start(self, trainer, module):
        self.counted = self.run.private.once("count", lambda step: (step.group == 0)[:, None].float())


def people(monkeypatch):
    def count(group):
        given, made = data(), Counting()
        given.dataset.tensors[2][:8] = group  # all rows of the first person
        fit([private(users=PEOPLE), made], Net, given, max_epochs=1)
        return float(made.counted)

    assert count(0) - count(1) == pytest.approx(8)  # its noise is for a change of 1


def replayed(monkeypatch):
    def inputs(row, **options):
        guard = AdversarialTraining(0.1, steps=2, random_start=False, collapse="ignore", seed=1, **options)
        return fit([guard], lambda: Net(0.0), data(row), max_epochs=1).seen  # with weights that stay

    row = 3  # of the first batch
    first, again = inputs(row, method="free"), inputs(None, method="free")
    assert (first[2] - again[2]).abs().max() > 0.05  # the second batch, whose rows are the same
    first, again = inputs(row), inputs(None)
    assert torch.equal(first[1], again[1])
    with pytest.raises(GuardConflict, match="Replayed"):  # what draws by the plan would not let it anyway
        fit([private(), AdversarialTraining(0.1, method="free", collapse="ignore")], Net, data())


def perturbed_weights(monkeypatch):
    assert moved(lambda: AdversarialTraining(0.1, steps=2, seed=1)) <= 2
    assert moved(lambda: AdversarialTraining(0.1, steps=2, awp=30.0, seed=1)) > 2.2


def embeddings(monkeypatch):
    monkeypatch.undo()  # the probe is what cannot be passed: the attack counts the calls of the embedding
    monkeypatch.setattr("lightning_guard.checks.judge", lambda run: iter(()))
    with pytest.raises(GuardConflict, match="called once a forward pass"):
        fit([private(), AdversarialTraining(0.5, norm="l2", steps=2, embedding="words")], Tokens, words())


def watched(monkeypatch):
    def seen(row):
        guard = AdversarialTraining(0.1, steps=2, method="fgsm", seed=1)
        trained = fit([private(), guard], lambda: Net(0.0), data(row), max_epochs=1)
        return float(trained.fitted.callback_metrics["guard/adversarial_training/pgd_accuracy"])

    assert len({seen(row) for row in (None, 3, 5, 7)}) > 1  # at the same weights, and it decides which are kept


def put_back(monkeypatch):
    def sees(self, single, strong, settled=True):
        self.single += 1
        return self.single == 2

    monkeypatch.setattr("lightning_guard.functional.collapse.Collapse.sees", sees)
    zeros = []

    class Looking(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            weights = torch.cat([module.net[i].weight.flatten() for i in (0, 2)])
            zeros.append(float((weights == 0).float().mean()))

    pruning = MagnitudePruning(0.7, every=1, start=4, end=7)
    with pytest.warns(UserWarning, match="collapsed"):
        fit([AdversarialTraining(**SINGLE), pruning, Looking()], lambda: Net(0.1), data(), max_epochs=2)
    assert zeros[-1] < 0.6  # promised: 0.7, from step 7 on


def parted(monkeypatch):
    def values(*others):
        shared = WeightClustering(clusters=4, start=0.0, end=0.5, every=2)
        net = fit([shared, *others], lambda: Net(0.1), data(), max_epochs=2).net
        return max(len(net[i].weight.unique()) for i in (0, 2))

    assert values() == 4
    assert values(QuantizationAwareTraining(start=0.0, end=0.5)) > 4


def nobodys(monkeypatch):
    with pytest.raises(GuardConflict, match="64 people's rows, and the training data have 80"):
        fit([private(users=PEOPLE), PrivacyAudit(canaries=32, seed=5)], Net, data(), max_epochs=1)


def reshaped(guard):
    def harm(monkeypatch):
        with pytest.raises((RuntimeError, GuardConflict), match=r"size|replaced by another parameter"):  # a mask's
            fit([guard(), MagnitudePruning(0.7, every=1, end=0.4)], lambda: Net(0.1), data(), max_epochs=3)

    return harm


def averaged(monkeypatch):
    for guard in (ChannelPruning(0.5, round_to=4), LowRankFactorization(2)):
        with pytest.raises(RuntimeError, match="size of tensor"):  # the average is still of the dense network
            fit([guard, StochasticWeightAveraging(0.1, swa_epoch_start=1)], lambda: Net(0.1), data(), max_epochs=4)


def late_channels():
    return ChannelPruning(0.5, round_to=4, start=6)


def late_rank():
    return LowRankFactorization(2, start=6)


SINGLE = {"eps": 0.1, "steps": 2, "method": "fgsm"}
HARM = {
    "bounds_examples + couples_examples": (
        coupled, lambda: [private(), FairnessRegularization(mode="penalty", weight=100.0)],
    ),
    "bounds_examples + remembers_data": (remembered, lambda: [private(), SampleLedger()]),
    "fairness groups": (groups, lambda: [private(), FairnessRegularization(max_gap=0.05)]),
    "fairness notion": (
        unbounded, lambda: [private(), FairnessRegularization("bounded_group_loss", max_gap=0.5, groups=[2])],
    ),
    "dp_sgd (users is not None) + asks_once": (people, lambda: [private(users=PEOPLE), Counting()]),
    "method is free": (replayed, lambda: [private(), AdversarialTraining(0.1, method="free")]),
    "awp is not 0": (perturbed_weights, lambda: [private(), AdversarialTraining(0.1, awp=3.0)]),
    "embedding": (embeddings, lambda: [private(), AdversarialTraining(0.1, embedding="words")]),
    "bounds_examples + adversarial_training (method is not pgd": (
        watched, lambda: [private(), AdversarialTraining(**SINGLE)],
    ),
    "+ on_weights": (put_back, lambda: [AdversarialTraining(**SINGLE), MagnitudePruning(0.7)]),
    "quantization + weight_clustering": (parted, lambda: [WeightClustering(4), QuantizationAwareTraining()]),
    "dp_sgd (users is not None) + privacy_audit": (
        nobodys, lambda: [private(users=PEOPLE), PrivacyAudit(canaries=32)],
    ),
    "channel_pruning (start is not 0)": (reshaped(late_channels), lambda: [late_channels(), MagnitudePruning(0.7)]),
    "low_rank (start is not 0)": (reshaped(late_rank), lambda: [late_rank(), MagnitudePruning(0.7)]),
    "rewrite + StochasticWeightAveraging": (averaged, lambda: [ChannelPruning(0.5), StochasticWeightAveraging(0.1)]),
}  # fmt: skip


def of(together):
    """The entry for a row: all words of its key are in the row's."""
    (found,) = [entry for key, entry in HARM.items() if all(word in together for word in key.split())] or [None]
    assert found is not None, f"nothing shows the harm of {together}; add it to HARM"
    return found


@pytest.mark.parametrize("together", REFUSED)
def test_what_is_refused_does_harm_when_nobody_checks(together, monkeypatch):
    monkeypatch.setattr("lightning_guard.checks.judge", lambda run: iter(()))
    monkeypatch.setattr(DPSGD, "_probe", lambda self, step, deal: None)
    of(together)[0](monkeypatch)


@pytest.mark.parametrize("together", REFUSED)
def test_the_check_stops_it_before_training(together):
    guards, net = of(together)[1](), Net()
    with pytest.raises(GuardConflict, match=re.escape(REFUSED[together].reason)):
        fit(guards, net, data(), max_epochs=2)
    assert not net.seen
