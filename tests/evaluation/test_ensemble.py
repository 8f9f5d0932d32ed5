"""An ensemble is the average of its members' probabilities, and is attacked through all of them."""

import pytest
import torch
from torch import nn

from lightning_guard.batch import Batch
from lightning_guard.evaluation import Certificate, Ensemble, Robustness, Subject, Task
from lightning_guard.evaluation.subject import predicted
from tests import toys
from tests.evaluation.test_every_evaluator import finished, trace
from tests.toys import PlainNet, fit, rows


def net(columns: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, columns)).double()


def points(n: int = 50) -> torch.Tensor:
    return torch.rand(n, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("members", [1, 2, 5])
def test_it_averages_probabilities(members):
    nets, x = [net(3, seed) for seed in range(members)], points()
    wanted = torch.stack([one(x).softmax(1) for one in nets]).mean(0)
    found = Ensemble(nets)(x)
    torch.testing.assert_close(found.exp(), wanted)
    torch.testing.assert_close(found.softmax(1), wanted)  # they are logits as well


@pytest.mark.parametrize("members", [1, 2, 5])
def test_of_one_logit_too(members):
    nets, x = [net(1, seed) for seed in range(members)], points()
    wanted = torch.stack([one(x)[:, 0].sigmoid() for one in nets]).mean(0)
    found = Ensemble(nets)(x)
    assert found.shape == (50,)
    torch.testing.assert_close(found.sigmoid(), wanted)


def test_sure_members_lose_no_digits():
    class Sure(nn.Module):
        def forward(self, x):
            return x

    for logits in (torch.tensor([[200.0], [-200.0]]), torch.tensor([[900.0, 0.0], [0.0, 900.0]])):
        found = Ensemble([Sure(), Sure()])(logits)
        assert found.isfinite().all()
        assert predicted(found).tolist() == ([1, 0] if logits.shape[1] == 1 else [0, 1])
    torch.testing.assert_close(Ensemble([Sure(), Sure()])(torch.tensor([[200.0]])), torch.tensor([200.0]))


def test_gradients_flow_through_every_member():
    nets, x = [net(3, seed) for seed in (0, 1)], points(4).requires_grad_()
    log_p = Ensemble(nets)(x)[:, 0].sum()
    (found,) = torch.autograd.grad(log_p, x, retain_graph=True)
    mean = torch.stack([one(x).softmax(1)[:, 0] for one in nets]).mean(0)
    (wanted,) = torch.autograd.grad(mean.log().sum(), x)
    torch.testing.assert_close(found, wanted)
    assert all(g.abs().sum() > 0 for one in nets for g in torch.autograd.grad(log_p, one[0].weight, retain_graph=True))


def test_it_is_judged_as_any_model():
    members = [fit(seed=seed) for seed in (0, 1)]
    data = [tuple(rows(200)[:2])]
    subject = Subject(Ensemble(members), data)
    with torch.no_grad():
        probabilities = torch.stack([one.eval()(data[0][0]).softmax(1) for one in members]).mean(0)
    hits = (probabilities.argmax(1) == data[0][1]).double().mean().item()
    assert Task().evaluate(subject).figures["task/accuracy"].value == pytest.approx(hits)
    attacked = Robustness(0.1, bounds=(0.0, 1.0), curve=()).evaluate(subject).figures
    assert attacked["robustness/accuracy"].value < attacked["robustness/clean_accuracy"].value == pytest.approx(hits)
    assert Certificate(0.1, samples=50, examples=5).evaluate(subject).figures


def test_an_attack_on_the_ensemble_beats_one_on_a_member():
    """The point of judging it as one: what fools a member alone need not fool the average."""
    members, x = [fit(seed=seed, max_epochs=10).eval() for seed in range(3)], points(300).float()
    with torch.no_grad():
        y = Ensemble(members)(x).argmax(1)
    threat = Robustness(0.2, steps=10, curve=())
    whole = threat.evaluate(Subject(Ensemble(members), [(x, y)])).figures["robustness/accuracy"].value
    moved = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(members[0](moved), y, reduction="sum"), moved)
    with torch.no_grad():
        transferred = (Ensemble(members)(x + 0.2 * gradient.sign()).argmax(1) == y).double().mean().item()
    assert whole < transferred


def test_submodules_can_be_named():
    one, two = PlainNet(), PlainNet()
    x = rows()[0]
    by_name = Ensemble([one.eval(), two.eval()], Batch(logits="net"))(x)
    assert torch.equal(by_name, Ensemble([one.net, two.net])(x))


def test_members_stay_as_they_are_and_leave_no_trace():
    single, other = finished(), finished()
    ensemble = Ensemble([single.module, other.module])  # their forward logs and counts
    before = [trace(member) for member in ensemble.members]
    subject = Subject(ensemble, toys.loader())
    assert Task().evaluate(subject).figures
    assert Robustness(0.05, steps=2, examples=20).evaluate(subject).figures
    assert [trace(member) for member in ensemble.members] == before


def test_members_that_do_not_fit_together():
    with pytest.raises(ValueError, match="members is empty"):
        Ensemble([])
    with pytest.raises(ValueError, match=r"shapes \[\(50, 2\), \(50, 3\)\]"):
        Ensemble([net(3, 0), net(2, 0)])(points())
    with pytest.raises(ValueError, match=r"shapes \[\(50,\), \(50, 3\)\]"):
        Ensemble([net(3, 0), net(1, 0)])(points())

    class Normalising(PlainNet):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch

    with pytest.raises(ValueError, match=r"Normalising\.on_after_batch_transfer"):
        Ensemble([PlainNet(), Normalising()])
