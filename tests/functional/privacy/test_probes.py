"""The probe finds examples that influence each other, and only those; and takes batches apart."""

from collections import OrderedDict, UserDict
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_guard.functional.privacy import Bookkeeper, Clipping, Findings, probe, take
from tests.functional.privacy.oracle import Net, trained, weight

UNITS = 12


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))


def found(loss, module: nn.Module | None = None, units: int = UNITS, rows: int = 1, **batch: Tensor) -> Findings:
    """Of a loss of a network and a batch."""
    torch.manual_seed(1)
    module = module or net()
    batch = {"x": torch.randn(units * rows, 5), "y": torch.randint(0, 4, (units * rows,)), **batch}
    book, clip = Bookkeeper(trained(module)), Clipping()
    groups = [[p for _, p in trained(module)]]

    def factors(norms: Tensor, units: int) -> Tensor:
        return clip.factors(norms * units, 0.5, book.margin) * units

    def run(some: dict[str, Tensor]) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return loss(module, **some)

    return probe(book, run, batch, units, rows, groups, factors, 0.5)


def plain(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x), y)


def weighted(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x), y, weight=torch.tensor([1.0, 5.0, 2.0, 0.5]))


def normed(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    h = net[0](x)
    return F.cross_entropy(net[2]((h - h.mean(0)) / h.std(0)), y)


def contrastive(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    a, b = (F.normalize(net(x + 0.1 * torch.randn_like(x)), dim=1) for _ in range(2))
    return F.cross_entropy(a @ b.T / 0.5, torch.arange(len(x)))


def mixup(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    order = torch.arange(len(x)).roll(1)
    return 0.7 * F.cross_entropy(net(0.7 * x + 0.3 * x[order]), y) + 0.3 * F.cross_entropy(net(x), y[order])


def hardest(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x), y, reduction="none").topk(2).values.mean()


def scaled(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x / x.abs().max()), y)


def fair(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    rate = net(x).softmax(1)[:, 0]
    return F.cross_entropy(net(x), y) + (rate[x[:, 0] > 0].mean() - rate.mean()).abs()


def weighted_sum(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (F.cross_entropy(net(x), y, reduction="none") * torch.tensor([1.0, 5.0, 2.0, 0.5])[y]).mean()


@pytest.mark.parametrize("loss", [weighted, normed, contrastive, mixup, hardest, scaled, fair])
def test_coupled(loss):
    findings = found(loss)
    assert findings.coupling > 1e-3
    assert not findings.independent


@pytest.mark.parametrize("loss", [plain, weighted_sum])
@pytest.mark.parametrize(("units", "rows"), [(2, 1), (3, 1), (UNITS, 1), (4, 3)])
def test_independent(loss, units, rows):
    findings = found(loss, units=units, rows=rows)
    assert findings.independent
    assert 0 < findings.influence <= 2
    assert findings.reduction == "mean"


def test_independent_although_it_makes_gradients_of_its_own():
    """An attack in the step: what it makes of one example depends on no other."""

    def attacked(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        for p in net.parameters():
            p.requires_grad_(False)
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(net(x), y, reduction="sum"), x)
        for p in net.parameters():
            p.requires_grad_(True)
        return F.cross_entropy(net((x + 0.1 * slope.sign()).detach()), y)

    assert found(attacked).independent


def test_the_coupled_parameter_is_named():
    module = Net(lambda s, x: s.b(s.a(x)), a=nn.Linear(5, 4), b=nn.Linear(4, 4))

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        h = net.a(x)
        return F.cross_entropy(net.b(h.detach() - h.detach().mean(0)), y) + h.square().mean()

    assert found(loss, module).parameter.startswith("b.")


@pytest.mark.parametrize(("scale", "wanted"), [(lambda n: 1, "mean"), (lambda n: n, "sum"), (lambda n: n**0.5, None)])
def test_reduction(scale, wanted):
    assert found(lambda net, x, y: plain(net, x, y) * scale(len(x))).reduction == wanted


@pytest.mark.parametrize("units", [3, 5, 8, 16])
@pytest.mark.parametrize("places", [3, 5, 8, 16])
def test_positions_are_no_examples_whatever_their_number(units, places):
    module = Net(
        lambda s, x: s.head(s.body(x).unsqueeze(1) + s.at(torch.arange(places)) + (s.by * s.fixed)).mean(1),
        body=nn.Linear(5, 6), at=nn.Embedding(places, 6), by=weight(), fixed=torch.randn(places, 6),
        head=nn.Sequential(nn.Tanh(), nn.Linear(6, 4)),
    )  # fmt: skip
    findings = found(plain, module, units=units)
    assert findings.independent
    assert findings.influence <= 2


@pytest.mark.parametrize("loss", [plain, mixup])
def test_examples_that_are_not_finite(loss):
    x = torch.randn(UNITS, 5)
    x[5] = torch.nan
    findings = found(loss, x=x)
    assert findings.independent == (loss is plain)
    assert findings.influence > 0
    assert findings.influence <= 2 or loss is mixup


def test_a_step_without_a_loss():
    findings = found(lambda net, x, y: None)
    assert findings.independent
    assert findings.reduction is None


class Pair(NamedTuple):
    x: Tensor
    names: list[str]


ROWS = torch.arange(6.0).view(3, 2)


@pytest.mark.parametrize(
    ("batch", "wanted"),
    [
        (ROWS, ROWS[[2, 0]]),
        ((ROWS, 5), (ROWS[[2, 0]], 5)),
        ([ROWS, ROWS, ROWS], [ROWS[[2, 0]]] * 3),
        ({"x": ROWS, "k": torch.ones(4)}, {"x": ROWS[[2, 0]], "k": torch.ones(4)}),
        (OrderedDict(x=ROWS), OrderedDict(x=ROWS[[2, 0]])),
        (UserDict(x=ROWS), UserDict(x=ROWS[[2, 0]])),
        (Pair(ROWS, ["a", "b", "c"]), Pair(ROWS[[2, 0]], ["c", "a"])),
        ((ROWS, {"deep": [ROWS, torch.tensor(3.0)]}), (ROWS[[2, 0]], {"deep": [ROWS[[2, 0]], torch.tensor(3.0)]})),
    ],
    ids=["tensor", "tuple", "as many tensors as rows", "dict", "ordered", "mapping", "named", "nested"],
)
def test_take(batch, wanted):
    taken = take(batch, [2, 0], 3)
    assert type(taken) is type(batch)
    assert repr(taken) == repr(wanted)


@pytest.mark.parametrize("batch", [torch.ones(4), (1, "a"), ["a", "b", "c"]])
def test_take_of_nothing(batch):
    with pytest.raises(ValueError, match="holds no tensor with 3 rows"):
        take(batch, [0], 3)
