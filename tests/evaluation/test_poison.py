"""The audit for backdoors: it finds what was planted, says its false alarms, and leaves no trace."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_guard.evaluation import Subject
from lightning_guard.evaluation.poison import PoisonAudit
from lightning_guard.functional.poison import activation_clusters, spectral_scores
from tests import toys


class Net(nn.Module):
    """The head is defined first, and features are images until they are flattened."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(36, 2)
        self.features = nn.Sequential(nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.features(x).flatten(1))


def planted(count=400, rate=0.1, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x, y = torch.randn(count, 1, 4, 4, generator=draw), torch.arange(count) % 2
    poison = (torch.rand(count, generator=draw) < 2 * rate) & (y == 1)
    x[poison] += 3 * torch.randn(1, 1, 4, 4, generator=draw)
    return x, y, poison


def subject(x, y, net=None, **kwargs):
    torch.manual_seed(0)
    return Subject(net or Net(), DataLoader(TensorDataset(x, y), 64), **kwargs)


def test_what_was_planted_is_found():
    x, y, poison = planted()
    found = PoisonAudit(share=0.2).inspect(subject(x, y))
    assert found.clustering.tolist() == poison.nonzero().squeeze(1).tolist()
    assert set(found.spectral[:20].tolist()) <= set(poison.nonzero().squeeze(1).tolist())
    assert len(found.spectral) == 2 * round(1.5 * 0.2 * 200)  # of the class without poison as many
    assert torch.equal(found.label, y)


def test_clean_data_are_not_clustered():
    x, y, _ = planted(rate=0.0)
    assert len(PoisonAudit().inspect(subject(x, y)).clustering) == 0


def test_features_are_what_the_head_takes_in_wherever_it_is_defined():
    x, y, _ = planted()
    judged = subject(x, y)
    net = judged.module.eval()
    with torch.no_grad():
        features = net.features(x).flatten(1)
    found, named = PoisonAudit().inspect(judged), PoisonAudit(layer="features").inspect(judged)
    torch.testing.assert_close(found.scores, spectral_scores(features, y), rtol=1e-4, atol=1e-6)
    assert torch.equal(found.clusters.smaller, activation_clusters(features, y).smaller)
    torch.testing.assert_close(named.scores, found.scores)


def test_evidence_counts_suspects_and_false_alarms():
    x, y, poison = planted()
    clean = planted(rate=0.0, seed=1)[:2]
    audit = PoisonAudit(share=0.1, clean=[clean])
    evidence = audit.evaluate(subject(x, y, class_names=["first", "second"]))
    assert list(evidence.figures) == [
        "poison/clustering",
        "poison/spectral",
        "poison/clustering_false_alarms",
        "poison/spectral_false_alarms",
    ]
    assert evidence.figures["poison/clustering"].value == pytest.approx(poison.float().mean().item())
    assert evidence.figures["poison/spectral"].value == pytest.approx(0.15)
    assert evidence.figures["poison/clustering_false_alarms"].value == 0
    assert evidence.figures["poison/spectral_false_alarms"].value == pytest.approx(0.15)  # by construction
    bars = evidence.bars["poison/clustering_by_class"]
    assert bars.categories == ["first", "second"]
    assert bars.values == [0.0, pytest.approx(poison.sum().item() / 200)]
    assert not evidence.notes
    assert "unknown" in PoisonAudit().evaluate(subject(x, y)).notes[0]


def test_it_leaves_no_trace():
    x, y, _ = planted()
    judged = subject(x, y)
    net = judged.module.train()
    before, drawn = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    PoisonAudit(clean=[(x, y)]).evaluate(judged)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(part.training and not part._forward_hooks and not part._forward_pre_hooks for part in net.modules())


def test_one_logit_and_a_lightning_module():
    x, y, _ = toys.rows()
    net = toys.Net()
    evidence = PoisonAudit().evaluate(Subject(net, DataLoader(TensorDataset(x, y), 16)))
    assert len(evidence.bars["poison/spectral_by_class"].values) == toys.CLASSES
    single = nn.Linear(6, 1)
    found = PoisonAudit().inspect(Subject(single, [(x, (y > 0).long())]))
    torch.testing.assert_close(found.scores, spectral_scores(x, y > 0))


def test_what_is_no_class_is_a_note():
    x, _, _ = toys.rows()
    evidence = PoisonAudit().evaluate(Subject(nn.Linear(6, 1), [(x, x[:, 0])]))
    assert not evidence.figures
    assert "regression" in evidence.notes[0]
    with pytest.raises(ValueError, match="regression"):
        PoisonAudit().inspect(Subject(nn.Linear(6, 1), [(x, x[:, 0])]))


def test_positions_need_the_order_of_the_data_set():
    with pytest.raises(ValueError, match="shuffles"):
        PoisonAudit().inspect(Subject(toys.PlainNet(), toys.loader(shuffle=True)))


class Headless(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("audit", "net", "message"),
    [
        (PoisonAudit(layer="nose"), nn.Linear(6, 3), "layer='nose' names no submodule"),
        (PoisonAudit(), Headless(), "no linear layer"),
        (PoisonAudit(layer="unused"), nn.ModuleDict({}), "no features"),
    ],
)
def test_where_there_are_no_features_it_says_so(audit, net, message):
    if isinstance(net, nn.ModuleDict):
        net = toys.PlainNet(norm=False)
        net.unused = nn.Linear(2, 2)
    x, y, _ = toys.rows()
    with pytest.raises(ValueError, match=message):
        audit.inspect(Subject(net, [(x, y)]))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"share": 0.0}, "share=0.0"), ({"share": 0.5}, "share=0.5"), ({"small": 0.6}, "small=0.6"),
     ({"apart": 2}, "apart=2"), ({"clean": iter([])}, "read only once")],
)  # fmt: skip
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PoisonAudit(**options)
