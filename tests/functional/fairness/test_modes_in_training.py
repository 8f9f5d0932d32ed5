"""Every further mode in a real training, placed by the smallest guard that can."""

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_guard.functional.fairness import Census
from lightning_guard.guard import Guard
from lightning_guard.parity.adversary import Adversary
from lightning_guard.parity.base import Seen
from lightning_guard.parity.counterfactual import Counterfactual
from lightning_guard.parity.dependence import HSIC, MMD
from lightning_guard.parity.group_dro import GroupDRO
from lightning_guard.parity.reweigh import Reweigh


class _Placed(Guard):
    name = "placed"
    needs_group = needs_logits = True

    def __init__(self, mode, census):
        self.mode, self.census = mode, census

    def begin(self, run):
        self.mode.begin(run.module, self.census)

    def on_loss(self, step):
        members = self.census.members(step.group)
        term = self.mode.term(Seen(step, self.census, step.logits, step.target, members, step.group.float()))
        return step.loss if term is None else step.loss + term

    def release(self, module):
        self.mode.end()


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU())
        self.head = torch.nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, _):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)

    def guard_counterfactual(self, x):
        return torch.cat([-x[:, :1], x[:, 1:]], 1)


def population():
    """The first input is the group (a tenth is in group 1), and the class agrees with it far more often than not."""
    generator = torch.Generator().manual_seed(0)
    n = 1000
    group = (torch.rand(n, generator=generator) < 0.1).long()
    spurious = 2.0 * group - 1
    x = torch.randn(n, 3, generator=generator)
    target = (x[:, 1] * (1 - 2 * group) > 0).long()  # the rule of the small group is the reverse
    x[:, 0] = spurious
    group[:50] = -1
    return x, target, group


def trained(mode):
    x, target, group = population()
    census = Census()
    census.add(group, target)
    census.close()
    torch.manual_seed(0)
    net = Net()
    keys, hooks = list(net.state_dict()), len(net.body._forward_hooks)
    trainer = pl.Trainer(
        max_epochs=5, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, callbacks=[_Placed(mode, census)] if mode is not None else [],
    )  # fmt: skip
    trainer.fit(net, DataLoader(TensorDataset(x, target, group), 100))
    assert list(net.state_dict()) == keys
    assert len(net.body._forward_hooks) == hooks
    assert all(p.isfinite().all() for p in net.parameters())
    with torch.no_grad():
        logits = net.eval()(x)
        pairs = (logits.softmax(1) - net(net.guard_counterfactual(x)).softmax(1)).square().mean()
        gap = (logits[group == 0].softmax(1)[:, 1].mean() - logits[group == 1].softmax(1)[:, 1].mean()).abs()
    losses = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    return float(losses[group == 1].mean()), float(pairs), float(gap), net.body(x), group


@pytest.fixture(scope="module")
def plain():
    return trained(None)


def test_group_dro_lowers_the_loss_of_the_worst_group(plain):
    assert trained(GroupDRO(step_size=0.1))[0] < 0.9 * plain[0]


def test_counterfactual_pairs_come_together(plain):
    assert trained(Counterfactual(weight=10.0))[1] < 0.2 * plain[1]


@pytest.mark.parametrize("mode", [MMD(3.0, "body"), HSIC(3.0, "body"), Adversary(3.0, "body", lr=3e-2)])
def test_a_layer_hides_the_group(plain, mode):
    def apart(found):
        body, group = found[3].detach(), found[4]
        return float((body[group == 0].mean(0) - body[group == 1].mean(0)).norm() / body[group >= 0].std(0).norm())

    assert apart(trained(mode)) < 0.7 * apart(plain)


def test_reweighing_trains(plain):
    assert trained(Reweigh())[0] != plain[0]
