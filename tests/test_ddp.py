"""What holds on one process holds on two: gloo on the processor, every guard of the table in one start."""

import os
import socket

import pytest
import pytorch_lightning as pl
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

from lightning_guard.callbacks import (
    DPSGD,
    AdversarialTraining,
    ChannelPruning,
    FairnessRegularization,
    KnowledgeDistillation,
    LowRankFactorization,
    MagnitudePruning,
    PrivacyAudit,
    QuantizationAwareTraining,
    RandomizedSmoothing,
    WeightClustering,
)
from lightning_guard.functional import stream
from lightning_guard.guard import Trait
from tests import toys
from tests.guards import GUARDS
from tests.toys import Net, PlainNet, Rows, fit, loader


def listed(guards):
    return guards if isinstance(guards, list) else [guards]


class Steady(PlainNet):
    """Without dropout and batch statistics, two halves of a batch give the gradient of the whole."""

    def __init__(self):
        super().__init__(norm=False)
        self.net[2].p = 0.0


EXACT = {
    "adversarial_training": lambda: AdversarialTraining(eps=0.1, steps=2, bounds=(0.0, 1.0), random_start=False),
    **{
        f"adversarial_training, {form}": lambda options=options: AdversarialTraining(
            eps=0.1, steps=2, bounds=(0.0, 1.0), random_start=False, collapse="ignore", **options
        )
        for form, options in {
            "fgsm": {"method": "fgsm"},
            "mixed": {"objective": "mixed"},
            "mart": {"objective": "mart"},
            "awp": {"awp": 0.05},
            "free": {"method": "free"},
        }.items()
    },
    "fairness": lambda: FairnessRegularization(max_gap=0.01, min_support=1, margin=0.0, warmup=0, step_size=20.0),
    "penalty": lambda: FairnessRegularization(mode="penalty", weight=1.0),
    "equalized_odds": lambda: FairnessRegularization("equalized_odds", mode="penalty", weight=1.0),
    "group_dro": lambda: FairnessRegularization(mode="group_dro", step_size=0.1),
    "reweigh": lambda: FairnessRegularization(mode="reweigh"),
    "adversarial": lambda: FairnessRegularization(mode="adversarial", weight=0.5),
    "counted privately": lambda: [
        FairnessRegularization(
            max_gap=0.01,
            margin=0.0,
            warmup=0,
            step_size=20.0,
            min_support=1,
            groups=[2],
            count_noise=2.0,
            rate_noise=1.0,
        ),
        DPSGD(delta=1e-3, noise_multiplier=0.5, max_grad_norm=0.3, test_seed=3),
    ],
    "channel_pruning": lambda: ChannelPruning(ratio=0.5, round_to=4),
    "distillation": lambda: KnowledgeDistillation(start=2),
    "distillation, from the beginning": lambda: KnowledgeDistillation(features=["net.0"]),
    "low_rank": lambda: LowRankFactorization(rank=2),
    "magnitude_pruning": lambda: MagnitudePruning(sparsity=0.7, every=1, end=0.75),
    "quantization": lambda: QuantizationAwareTraining(start=0.25, end=0.75),
    "privacy_audit": lambda: PrivacyAudit(canaries=32, seed=5),
    "dp_sgd": lambda: DPSGD(delta=1e-3, noise_multiplier=0.5, max_grad_norm=0.3, test_seed=3),
    "dp_sgd, chunks": lambda: DPSGD(
        delta=1e-3, noise_multiplier=0.5, max_physical_batch_size=8, target_quantile=0.5, test_seed=3
    ),
    "dp_sgd, beside others": lambda: [
        DPSGD(delta=1e-3, noise_multiplier=0.2, max_grad_norm=0.3, test_seed=3),
        FairnessRegularization(mode="group_dro", step_size=0.1, groups=[2], count_noise=2.0, rate_noise=0.6),
        MagnitudePruning(sparsity=0.5, every=1, end=0.75, score="movement"),
        QuantizationAwareTraining(start=0.25, end=0.75, range_noise=0.4),
    ],
    "dp_sgd, by layer": lambda: DPSGD(delta=1e-3, noise_multiplier=0.5, clipping="per_layer", test_seed=3),
}


RANDOM = {  # each rank draws its own starts, so the oracle is a loop by hand over both ranks' batches
    "trades": lambda: AdversarialTraining(eps=0.1, steps=2, bounds=(0.0, 1.0), objective="trades"),
    "trades with awp": lambda: AdversarialTraining(eps=0.1, steps=2, bounds=(0.0, 1.0), objective="trades", awp=0.05),
}


def trades_by_hand(awp: float) -> Steady:
    """TRADES on the union of two ranks' batches, each attacked from its own random start."""

    def kl(clean, moved):
        return F.kl_div(moved.log_softmax(1), clean.softmax(1), reduction="none").sum(1)

    torch.manual_seed(0)
    net, (x, y, _) = Steady(), toys.rows()
    optimizer = net.configure_optimizers()["optimizer"]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    weights = [p for p in net.parameters() if p.dim() > 1]
    for step in range(8):
        at = 16 * (step % 4)
        clean, moved, target = [], [], []
        for rank in (0, 1):
            part = x[at + rank : at + 16 : 2]
            noise = torch.rand(part.shape, generator=stream(0, step, rank)) * 2 - 1
            low, high = (part - 0.1).clamp_min(0), (part + 0.1).clamp_max(1)
            attacked, before = (part + 0.1 * noise).clamp(low, high), net(part).detach()
            for _ in range(2):
                attacked = attacked.detach().requires_grad_()
                (g,) = torch.autograd.grad(kl(before, net(attacked)).sum(), attacked)
                attacked = (attacked.detach() + 0.125 * g.sign()).clamp(low, high)  # min(2.5 / 2, 1.25) eps
            clean.append(part)
            moved.append(attacked)
            target.append(y[at + rank : at + 16 : 2])
        clean, moved, target = map(torch.cat, (clean, moved, target))

        def loss(clean=clean, moved=moved, target=target):
            logits = net(clean)
            return F.cross_entropy(logits, target) + 6 * kl(logits, net(moved)).mean()

        kept = [p.detach().clone() for p in weights]
        if awp:
            for p, g in zip(weights, torch.autograd.grad(loss(), weights), strict=True):
                p.data.add_(awp * p.detach().norm() * g / g.norm())
        optimizer.zero_grad()
        loss().backward()
        for p, was in zip(weights, kept, strict=True):
            p.data.copy_(was)
        optimizer.step()
        if step % 4 == 3:
            scheduler.step()
    return net


class Starts(pl.Callback):
    """Keeps the batches that a rank trained on after the attack."""

    def __init__(self):
        self.seen = []

    def setup(self, trainer, module, stage):
        own = module.training_step

        def training_step(batch, batch_idx):
            self.seen.append(batch[0].clone())
            return own(batch, batch_idx)

        module.training_step = training_step


def work(rank: int, port: int, folder: str) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        WORLD_SIZE="2",
        NODE_RANK="0",
        LOCAL_RANK=str(rank),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    two = {"strategy": "ddp", "devices": 2}
    found = {}
    rows = Rows()
    shares = torch.utils.data.DistributedSampler(
        rows, num_replicas=2, rank=rank, shuffle=False
    )  # else Lightning shuffles
    for name, guard in EXACT.items():
        loader = torch.utils.data.DataLoader(rows, 8, sampler=shares)
        found[name] = fit(listed(guard()), Steady, loader, **two).state_dict()
    for guard, row in GUARDS.items():  # as users have it: dropout, batch norm, shuffling, a step that unpacks two
        toys.BATCH_NORM = Trait.BOUNDS_EXAMPLES not in (guard.traits or ())
        found["none " + guard.name] = fit(**two).state_dict()
        found["on " + guard.name] = fit([row.on()], Net if guard.needs_group else PlainNet, **two).state_dict()
        found["off " + guard.name] = fit([row.off()], **two).state_dict()
    toys.BATCH_NORM = True
    for form, guard in RANDOM.items():
        found[form] = fit([guard()], Steady, torch.utils.data.DataLoader(rows, 8, sampler=shares), **two).state_dict()
    found["all"] = fit(
        [
            row.on()
            for guard, row in GUARDS.items()
            # The second is refused beside an attack, the third beside quantisation.
            if Trait.BOUNDS_EXAMPLES not in (guard.traits or ())
            and guard not in (RandomizedSmoothing, WeightClustering)
        ],
        **two,
    ).state_dict()
    starts = Starts()
    same_rows = torch.utils.data.TensorDataset(torch.full((16, 6), 0.5), torch.zeros(16, dtype=torch.long))
    fit(
        [starts, AdversarialTraining(eps=0.1, steps=1, step_size=1e-9)],
        data=torch.utils.data.DataLoader(same_rows, 8),
        **two,
    )
    found["start"] = {"start": starts.seen[0]}
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", EXACT)
def test_two_processes_equal_one_on_the_union(ranks, name):
    one = fit(listed(EXACT[name]()), Steady, loader(batch_size=16, shuffle=False)).state_dict()
    for key, value in ranks[0][name].items():
        torch.testing.assert_close(value, one[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", RANDOM)
def test_two_processes_equal_trades_by_hand(ranks, form):
    expected = trades_by_hand(awp=0.05 if "awp" in form else 0.0).state_dict()
    for key, value in ranks[0][form].items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)


def test_ranks_agree_and_off_means_off(ranks):
    buffers = [name for name, _ in PlainNet().named_buffers()]
    for name in ranks[0]:
        if name != "start":
            assert all(
                torch.equal(ranks[0][name][key], ranks[1][name][key]) for key in ranks[0][name] if key not in buffers
            ), name
    for guard in GUARDS:
        on, off, none = (ranks[0][f"{what} {guard.name}"] for what in ("on", "off", "none"))
        assert all(torch.equal(off[key], none[key]) for key in none if key not in buffers)
        changed = on.keys() != none.keys()  # layers that were split have other names
        changed = changed or any(not torch.equal(on[key], none[key]) for key in none if key not in buffers)
        assert changed is not GUARDS[guard].watches


def test_ranks_draw_different_random_starts(ranks):
    assert not torch.equal(ranks[0]["start"]["start"], ranks[1]["start"]["start"])
