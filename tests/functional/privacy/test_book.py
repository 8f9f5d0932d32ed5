"""Clipped sums from one backward pass equal the slow ones, whatever the network; what cannot be bounded is refused."""

import copy
import warnings
from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from lightning_guard.functional.privacy import Bookkeeper, Clipping, Unbooked, rules
from lightning_guard.functional.quantization import fake_quantize
from tests.functional.privacy.oracle import Net, agree, booked, cross_entropy, each, norms_of, trained, weight

N = 6
KEEP = {"written": 1e9, "ghost": 0.0}


@pytest.fixture(autouse=True)
def _float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def flat(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Flatten())


def pruned() -> nn.Module:
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(25, 3))
    prune.random_unstructured(net[0], "weight", 0.3)
    prune.random_unstructured(net[1], "weight", 0.5)
    prune.random_unstructured(net[4], "bias", 0.4)
    return net


def frozen_body() -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    net[0].requires_grad_(False)
    net[2].weight.requires_grad_(False)
    net[4].bias.requires_grad_(False)
    return net


def frozen_norm() -> nn.Module:
    norm = nn.BatchNorm2d(4).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return flat(nn.Conv2d(2, 4, 3), norm, nn.ReLU())


def last(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def encoder(**options: bool) -> nn.Module:
    """With a class token, positions, a table of positions and a bare scale."""
    return Net(
        lambda s, x: s.head(s.body(torch.cat([s.token.expand(len(x), -1, -1), s.table(x)], 1) + s.places)[:, 0] * s.by),
        table=nn.Embedding(7, 8), token=weight(1, 1, 8), places=weight(1, 6, 8), by=weight(8), head=nn.Linear(8, 3),
        body=nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **options),
    )  # fmt: skip


def attention(s: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return s.attend(q, k, v)[0]


def tied() -> nn.Module:
    net = Net(lambda s, x: s.head(torch.tanh(s.body(s.table(x)))), table=nn.Embedding(9, 6), body=nn.Linear(6, 6))
    net.head = nn.Linear(6, 9, bias=False)
    net.head.weight = net.table.weight
    return net


def low_rank() -> nn.Module:
    net = Net(
        lambda s, x: s.body(x) + x @ s.down.T @ s.up.T + F.linear(x, s.other + s.up @ s.down),
        body=nn.Linear(5, 3), down=weight(2, 5), up=weight(3, 2), other=weight(3, 5),
    )  # fmt: skip
    net.body.requires_grad_(False)
    return net


VECTORS, WORDS = (5,), 7
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | int]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)), VECTORS),
    "linear of sequences": (lambda: flat(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)), (7, 5)),
    "linear of images": (lambda: flat(nn.Linear(5, 4), nn.ELU(inplace=True), nn.Linear(4, 3)), (2, 3, 5)),
    "wide linear": (lambda: flat(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 3)), (2, 40)),
    "conv1d": (lambda: flat(nn.Conv1d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv1d(4, 3, 2)), (3, 9)),
    "conv2d": (lambda: flat(nn.Conv2d(2, 4, (3, 2), (2, 1), (1, 0), bias=False), nn.Conv2d(4, 3, 2)), (2, 6, 5)),
    "conv3d": (lambda: flat(nn.Conv3d(2, 3, (2, 3, 1), (1, 2, 1), 1, dilation=(2, 1, 1))), (2, 5, 6, 4)),
    "conv of few places": (lambda: flat(nn.Conv2d(9, 11, 3, padding=1)), (9, 2, 2)),
    "conv, same": (lambda: flat(nn.Conv2d(2, 3, (2, 3), padding="same", dilation=2)), (2, 5, 6)),
    "conv, valid": (lambda: flat(nn.Conv1d(2, 3, 2, padding="valid", dilation=2)), (2, 8)),
    "conv, circular": (lambda: flat(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")), (2, 5, 6)),
    "conv, reflect": (lambda: flat(nn.Conv1d(2, 3, 3, padding="same", padding_mode="reflect")), (2, 5)),
    "conv, groups": (lambda: flat(nn.Conv2d(4, 6, 3, groups=2, dilation=2)), (4, 6, 7)),
    "conv, depthwise": (lambda: flat(nn.Conv2d(4, 8, 3, groups=4, padding=1), nn.Conv2d(8, 3, 1)), (4, 4, 5)),
    "conv, transposed": (
        lambda: flat(nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), nn.ConvTranspose2d(6, 3, 2, dilation=2)), (4, 3, 4)
    ),
    "conv1d, transposed": (lambda: flat(nn.ConvTranspose1d(9, 8, 3, 1, bias=False)), (9, 2)),
    "conv of a linear": (lambda: flat(nn.Linear(5, 4), nn.Conv1d(3, 2, 2), nn.ConvTranspose1d(2, 3, 2)), (3, 5)),
    "channels last": (lambda: flat(last(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Conv2d(4, 3, 2))),
                      (2, 5, 4)),
    "embedding": (lambda: flat(nn.Embedding(7, 4, padding_idx=2), nn.Linear(4, 3)), WORDS),
    "layer norm": (lambda: flat(nn.Linear(5, 4), nn.LayerNorm(4), nn.LayerNorm((3, 4), bias=False)), (3, 5)),
    "rms norm": (lambda: flat(nn.Linear(5, 4), nn.RMSNorm(4), nn.RMSNorm((3, 4))), (3, 5)),
    "group norm": (lambda: flat(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)), (2, 5, 5)),
    "group norm of vectors": (lambda: nn.Sequential(nn.Linear(5, 4), nn.GroupNorm(2, 4), nn.Linear(4, 3)), VECTORS),
    "instance norm": (lambda: flat(nn.Conv1d(2, 4, 3), nn.InstanceNorm1d(4, affine=True)), (2, 6)),
    "frozen batch norm": (frozen_norm, (2, 5, 5)),
    "self-attention": (
        lambda: Net(lambda s, x: attention(s, x, x, x), attend=nn.MultiheadAttention(8, 2, batch_first=True)), (4, 8)
    ),
    "attention, time first": (
        lambda: Net(lambda s, x: attention(s, *3 * [x.transpose(0, 1)]).transpose(0, 1),
                    attend=nn.MultiheadAttention(8, 2, bias=False)), (4, 8)
    ),
    "cross-attention": (
        lambda: Net(lambda s, x: attention(s, s.asks.expand(len(x), -1, -1), s.keys(x), s.keys(x)),
                    asks=weight(3, 8), keys=nn.Linear(5, 8), attend=nn.MultiheadAttention(8, 2, batch_first=True)),
        (4, 5),
    ),
    "attention of other sizes": (
        lambda: Net(lambda s, x: attention(s, x, x[..., :5], x[..., 2:]),
                    attend=nn.MultiheadAttention(8, 2, kdim=5, vdim=6, batch_first=True)), (4, 8)
    ),
    "dot-product attention": (
        lambda: Net(lambda s, x: F.scaled_dot_product_attention(*s.three(x).chunk(3, -1), is_causal=True),
                    three=nn.Linear(5, 12)), (4, 5)
    ),
    "encoder": (encoder, WORDS),
    "encoder, norm first": (lambda: encoder(norm_first=True), WORDS),
    "decoder": (
        lambda: Net(lambda s, x: s.body(x, s.other(x)), other=nn.Linear(8, 8),
                    body=nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)), (4, 8)
    ),
    "prelu": (lambda: nn.Sequential(flat(nn.Conv2d(2, 4, 3), nn.PReLU(4)), nn.PReLU(), nn.Linear(16, 3)), (2, 4, 4)),
    "bare parameters": (
        lambda: Net(lambda s, x: (2 - s.a * x) / s.b + torch.where(x > 0, s.c, x @ s.d[:, None]) - (x @ s.d)[:, None],
                    a=weight(1, 5), b=nn.Parameter(torch.tensor(2.0)), c=weight(1), d=weight(5)), VECTORS
    ),
    "in place": (lambda: Net(lambda s, x: s.body(x).mul_(s.by).sub_(s.off), body=nn.Linear(5, 3), by=weight(3),
                             off=weight(3)), VECTORS),
    "copies": (
        lambda: Net(lambda s, x: torch.cat([s.a.repeat(len(x), 1, 2), s.b.expand_as(x), x], 1).tanh() * x[:, :1],
                    a=weight(1, 1, 2), b=weight(1, 3, 4)), (3, 4)
    ),
    "positions": (
        lambda: Net(lambda s, x: s.table(x) + s.places(torch.arange(5)) + s.more[:5], table=nn.Embedding(7, 3),
                    places=nn.Embedding(5, 3), more=weight(8, 3)), WORDS
    ),
    "relative positions": (
        lambda: Net(lambda s, x: x @ x.mT + s.table[(torch.arange(4)[:, None] - torch.arange(4)).abs()].mT,
                    table=weight(4)), (4, 5)
    ),
    "classes": (lambda: Net(lambda s, x: F.linear(s.body(x), s.by.exp() * s.all), all=torch.randn(5, 4), by=weight(),
                            body=nn.Linear(5, 4)), VECTORS),
    "expanded weights": (
        lambda: Net(lambda s, x: F.conv1d(F.linear(x, s.a.expand(4, 5)) * s.by, s.b.expand(3, 1, 2), groups=3),
                    a=weight(1, 5), b=weight(1, 1, 2), by=torch.randn(4)), (3, 5)
    ),
    "weights by a network": (
        lambda: Net(lambda s, x: F.linear(x, s.b(s.a(s.at).tanh()).mT, s.at[:3] @ s.bias), at=torch.randn(5, 2),
                    a=nn.Linear(2, 4), b=nn.Linear(4, 3), bias=weight(2)), VECTORS
    ),
    "one filter": (lambda: Net(lambda s, x: torch.cat([F.conv1d(x[:, :2], s.w), F.conv1d(x, s.w, groups=2)], 1),
                               w=weight(2, 2, 3)), (4, 5)),
    "part of a weight": (lambda: Net(lambda s, x: F.linear(x[:, :3], s.w[:, :3]) + F.linear(x[:, 3:], s.w[:, 3:]),
                                     w=weight(3, 5)), VECTORS),
    "rounded": (
        lambda: Net(lambda s, x: F.linear(F.linear(x, fake_quantize(s.a), s.b), s.c) + x @ fake_quantize(s.d)[:3].t(),
                    a=weight(6, 5), b=weight(6), c=weight(3, 6), d=weight(4, 5)), VECTORS
    ),
    "rounded in parts": (
        lambda: Net(lambda s, x: torch.cat([F.linear(x, w) for w in fake_quantize(s.a).chunk(3)], 2) + x[..., :1] * s.b,
                    a=weight(6, 5), b=weight(6)), (4, 5)
    ),
    "rounded and not": (
        lambda: Net(lambda s, x: F.linear(F.linear(x, s.a).tanh(), fake_quantize(s.a)) + x @ (fake_quantize(s.a) * s.b),
                    a=weight(5, 5), b=weight(5)), (4, 5)
    ),
    "rounded conv": (
        lambda: Net(lambda s, x: F.conv2d(F.conv2d(x, fake_quantize(s.a), padding=1).tanh(), fake_quantize(s.b)),
                    a=weight(4, 2, 3, 3), b=weight(3, 4, 2, 2)), (2, 4, 5)
    ),
    "called twice": (lambda: Net(lambda s, x: s.a(s.a(x).tanh()) + s.a(x[:, :1]), a=nn.Linear(5, 5)), (3, 5)),
    "conv called twice": (lambda: flat(*2 * [nn.Conv2d(3, 3, 3, padding=1)]), (3, 2, 3)),
    "norm called twice": (lambda: flat(nn.Linear(5, 4), *2 * [nn.LayerNorm(4)]), (3, 5)),
    "tied": (tied, WORDS),
    "tied by hand": (
        lambda: Net(lambda s, x: F.linear(s.body(s.body(s.table(x)).tanh()), s.table.weight), table=nn.Embedding(9, 6),
                    body=nn.Linear(6, 6)), WORDS
    ),
    "tied transposed": (
        lambda: Net(lambda s, x: s.table(x).tanh() @ s.table.weight.t(), table=nn.Embedding(9, 6)), WORDS
    ),
    "frozen": (frozen_body, VECTORS),
    "low rank": (low_rank, VECTORS),
    "pruned": (pruned, WORDS),
    "weight norm": (lambda: flat(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), nn.Tanh(),
                                 nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))), (2, 5)),
    "weight norm of a conv": (lambda: flat(nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 3))), (2, 5)),
}  # fmt: skip
ALL = pytest.mark.parametrize("name", LAYERS)


def made(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    make, shape = LAYERS[name]
    x = torch.randint(0, shape, (N, 5)) if isinstance(shape, int) else torch.randn(N, *shape).to(dtype)
    if name == "channels last":
        x = x.to(memory_format=torch.channels_last)
    return make().to(dtype), (x, torch.randint(0, 3, (N,)))


# What it computes -----------------------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("form", KEEP)
def test_half_of_the_examples_clipped(name, form, monkeypatch):
    monkeypatch.setattr(rules, "KEEP", KEEP[form])
    net, batch = made(name)
    wanted = each(net, cross_entropy, batch)
    norms, sums, _ = booked(net, cross_entropy, batch)
    agree([norms[0]], [norms_of(wanted)])
    factors = (norms.median() / norms_of(wanted)).clamp(max=1)
    assert bool((factors < 0.999).any())
    agree(sums, [torch.einsum("n,n...->...", factors, g) for g in wanted])


@ALL
@pytest.mark.parametrize("form", KEEP)
def test_units_of_several_weighted_rows(name, form, monkeypatch):
    monkeypatch.setattr(rules, "KEEP", KEEP[form])
    net, batch = made(name)
    weights = torch.tensor([0.5, 0.5, 1.0, 0.0, 0.2, 0.8])
    rows = each(net, cross_entropy, batch)
    wanted = [torch.einsum("nr,nr...->n...", weights.view(3, 2), g.unflatten(0, (3, 2))) for g in rows]
    norms, sums, _ = booked(net, cross_entropy, batch, rows=2, weights=weights)
    agree([norms[0]], [norms_of(wanted)])
    factors = (norms.median() / norms_of(wanted)).clamp(max=1)
    agree(sums, [torch.einsum("n,n...->...", factors, g) for g in wanted])


@ALL
@pytest.mark.parametrize("form", KEEP)
def test_masked_weights_count_where_they_are_kept(name, form, monkeypatch):
    monkeypatch.setattr(rules, "KEEP", KEEP[form])
    net, batch = made(name)
    masks = {p: (torch.rand(p.shape) < 0.6).double().contiguous() for _, p in trained(net)}
    wanted = [g * masks[p] for g, (_, p) in zip(each(net, cross_entropy, batch), trained(net), strict=True)]
    norms, sums, _ = booked(net, cross_entropy, batch, book=Bookkeeper(trained(net), masks=masks))
    agree([norms[0]], [norms_of(wanted)])
    factors = (norms.median() / norms_of(wanted)).clamp(max=1)
    agree(sums, [torch.einsum("n,n...->...", factors, g) for g in wanted])
    for total, (_, p) in zip(sums, trained(net), strict=True):
        assert not bool(total[masks[p] == 0].any())


@pytest.mark.parametrize("name", ["linear", "encoder", "conv of few places", "tied"])
def test_a_mask_of_ones_changes_nothing_and_people_have_masks_too(name):
    net, batch = made(name)
    ones = {p: torch.ones_like(p) for _, p in trained(net)}
    _, plain, _ = booked(net, cross_entropy, batch, 0.5)
    _, masked, _ = booked(net, cross_entropy, batch, 0.5, book=Bookkeeper(trained(net), masks=ones))
    agree(masked, plain)
    half = {p: (torch.rand(p.shape) < 0.5).double() for _, p in trained(net)}
    own = [g * half[p] for g, (_, p) in zip(each(net, cross_entropy, batch), trained(net), strict=True)]
    norms, _, _ = booked(net, cross_entropy, batch, rows=2, book=Bookkeeper(trained(net), masks=half))
    agree([norms[0]], [norms_of([g.unflatten(0, (3, 2)).sum(1) for g in own])])


@pytest.mark.parametrize("name", ["linear", "linear of sequences", "conv of few places"])
def test_masks_in_single_precision_lose_nothing_of_the_bound(name):
    net, batch = made(name, torch.float32)
    masks = {p: (torch.rand(p.shape) < 0.2).float() for _, p in trained(net)}
    norms, _, book = booked(net, cross_entropy, batch, book=Bookkeeper(trained(net), masks=masks))
    exact = [g * masks[p] for g, (_, p) in zip(each(net, cross_entropy, batch), trained(net), strict=True)]
    assert bool((norms[0] >= norms_of([g.double() for g in exact]) * (1 - book.margin)).all())


@pytest.mark.parametrize("name", ["linear", "encoder", "low rank", "tied"])
def test_clipping_by_layer(name):
    net, batch = made(name)
    groups: dict[str, list[nn.Parameter]] = {}
    for key, p in trained(net):
        groups.setdefault(key.rpartition(".")[0], []).append(p)
    by_id = dict(zip((id(p) for _, p in trained(net)), each(net, cross_entropy, batch), strict=True))
    bound = float(norms_of(list(by_id.values())).median())
    norms, sums, _ = booked(net, cross_entropy, batch, bound, groups=list(groups.values()))
    wanted = {}
    for own, group in zip(norms, groups.values(), strict=True):
        agree([own], [norms_of([by_id[id(p)] for p in group])])
        for p in group:
            factors = (bound / len(groups) ** 0.5 / own).clamp(max=1)
            wanted[id(p)] = torch.einsum("n,n...->...", factors, by_id[id(p)])
    agree(sums, [wanted[id(p)] for _, p in trained(net)])


def test_automatic_clipping():
    net, batch = made("encoder")
    wanted = each(net, cross_entropy, batch)
    _, sums, _ = booked(net, cross_entropy, batch, 0.7, clipping=Clipping("automatic", stability=0.1))
    factors = 0.7 / (norms_of(wanted) + 0.1)
    agree(sums, [torch.einsum("n,n...->...", factors, g) for g in wanted])


@pytest.mark.parametrize("name", ["linear", "encoder", "conv2d", "linear of sequences", "called twice", "tied"])
def test_a_second_pass_that_joins_is_clipped_with_the_first(name):
    net, (x, y) = made(name)
    other = x.roll(1, -1)

    def loss(net: nn.Module, x: Tensor, other: Tensor, y: Tensor) -> Tensor:
        return (
            F.cross_entropy(net(x).flatten(1)[:, :3], y) + 3 * (net(x) - net(other)).square().flatten(1).mean(1).mean()
        )

    wanted = each(net, loss, (x, other, y))
    book = Bookkeeper(trained(net))
    with book.step(units=N):
        first, whole = cross_entropy(net, x, y), net(x)
    with book.joined():
        more = 3 * (whole - net(other)).square().flatten(1).mean(1).mean()
    (first + more).backward()
    norms = book.squared_norms().sqrt() * N
    agree([norms[0]], [norms_of(wanted)])
    with book.joined(), book.paused():
        assert not book.active
    assert not book.active


def test_chunks_add_up():
    net, batch = made("encoder")
    _, whole, book = booked(net, cross_entropy, batch, 0.5)
    parts = [booked(net, cross_entropy, [x[s] for x in batch], 0.5, book=book)[1] for s in (slice(2), slice(2, N))]
    agree([a + b for a, b in zip(*parts, strict=True)], whole)


def test_several_backward_passes_on_one_graph_add_up():
    net, (x, y) = made("linear")
    book = Bookkeeper(trained(net))
    with book.step(units=N):
        losses = F.cross_entropy(net(x), y), net(x).square().mean()
    for loss in losses:
        loss.backward()
    _, _, once = booked(net, lambda net, x, y: F.cross_entropy(net(x), y) + net(x).square().mean(), (x, y))
    agree(book.squared_norms(), once.squared_norms())


def test_the_forward_pass_and_what_flows_on_are_unchanged():
    for name in LAYERS:
        net, (x, y) = made(name)
        x = x.requires_grad_() if x.is_floating_point() else x
        given = [x] if x.requires_grad else [p for p in net.parameters() if False]
        plain = cross_entropy(net, x, y)
        book = Bookkeeper(trained(net))
        with book.step(units=N):
            ours = cross_entropy(net, x, y)
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
        if given:
            agree(torch.autograd.grad(ours, given), torch.autograd.grad(plain, given), 1e-12)


OPACUS: dict[str, Callable[[], nn.Module]] = {  # without what it does not take, or gets wrong
    "linear of images": lambda: flat(nn.Linear(5, 4), nn.ELU(), nn.LayerNorm(4), nn.Linear(4, 3)),
    "conv2d": LAYERS["conv2d"][0],
    "conv, groups": LAYERS["conv, groups"][0],
    "conv3d": LAYERS["conv3d"][0],
    "group norm": LAYERS["group norm"][0],
    "instance norm": LAYERS["instance norm"][0],
    "embedding": lambda: flat(nn.Embedding(7, 4), nn.RMSNorm(4), nn.Linear(4, 3)),
}


@pytest.mark.parametrize("name", OPACUS)
def test_opacus_agrees(name):
    from opacus.grad_sample import GradSampleModule

    net, batch = OPACUS[name](), made(name)[1]
    norms, sums, _ = booked(net, cross_entropy, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = GradSampleModule(copy.deepcopy(net), batch_first=True, loss_reduction="mean")
        cross_entropy(theirs, *batch).backward()
    samples = [p.grad_sample for p in theirs.parameters()]
    agree([norms[0]], [norms_of(samples)])
    factors = (norms.median() / norms_of(samples)).clamp(max=1)
    agree(sums, [torch.einsum("n,n...->...", factors, g) for g in samples])


# Sizes that agree by chance -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["positions", "classes", "expanded weights", "bare parameters", "pruned"])
def test_sizes_that_agree_by_chance(name):
    """Positions, classes and units of a layer of just the batch size, once another batch size was seen."""
    net, batch = made(name)
    book = Bookkeeper(trained(net))
    for count in (6, 5, 4, 3):
        some = [part[:count] for part in batch]
        wanted = each(net, cross_entropy, some)
        norms, _, _ = booked(net, cross_entropy, some, book=book)
        agree([norms[0]], [norms_of(wanted)])


# What is refused ------------------------------------------------------------------------------------------------------


def sparse(**options: float | bool) -> nn.Module:
    return flat(nn.Embedding(7, 3, **options))


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | int, str]] = {
    "no rule": (lambda: flat(nn.LSTM(5, 4), Net(lambda s, x: x[0])), (3, 5), "0.weight_ih_l0 got a raw .* lstm"),
    "bilinear": (lambda: Net(lambda s, x: s.two(x, x), two=nn.Bilinear(5, 5, 3)), VECTORS, "two.weight .* bilinear"),
    "einsum": (lambda: Net(lambda s, x: torch.einsum("np,dp->nd", x, s.w), w=weight(3, 5)), VECTORS, "w got a raw"),
    "scale by frequency": (lambda: sparse(scale_grad_by_freq=True), WORDS, "0.weight .* embedding"),
    "sparse": (lambda: sparse(sparse=True), WORDS, "0.weight .* embedding"),
    "max norm": (lambda: sparse(max_norm=1.0), WORDS, "0.weight .* embedding"),
    "batch norm": (lambda: flat(nn.BatchNorm1d(5)), VECTORS, "0.weight .* batch_norm"),
    "checkpoint": (
        lambda: Net(lambda s, x: checkpoint(s.a, s.b(x), use_reentrant=True), a=nn.Linear(5, 3), b=nn.Linear(5, 5)),
        VECTORS, "a.bias got a raw gradient in a pass that is not booked",
    ),
    "checkpoint that recomputes": (
        lambda: Net(lambda s, x: checkpoint(s.a, s.b(x), use_reentrant=False), a=nn.Linear(5, 3), b=nn.Linear(5, 5)),
        VECTORS, "activations are checkpointed",
    ),
    "flattened": (lambda: Net(lambda s, x: s.a(x.flatten(0, 1)).unflatten(0, (N, 3)), a=nn.Linear(5, 3)), (3, 5),
                  "a.bias got a raw .* through linear.* a batch of 6 rows"),
    "flattened inside": (
        lambda: Net(lambda s, x: s.a(s.b(x).flatten(0, 1)).unflatten(0, (N, 3)), a=nn.Linear(5, 3), b=nn.Linear(5, 5)),
        (3, 5), "a.weight sees a batch of 18 .* 6 rows",
    ),
    "time first": (lambda: Net(lambda s, x: s.a(s.b(x.mT).mT.transpose(0, 1)).transpose(0, 1), a=nn.Linear(5, 3),
                               b=nn.Linear(3, 3)), (3, 5), "a.weight sees a batch of 3"),
    "part of the batch": (lambda: Net(lambda s, x: torch.cat([s.a(s.b(x)[:2]), s.a(s.b(x)[2:])]), a=nn.Linear(5, 3),
                                      b=nn.Linear(5, 5)), VECTORS, "a.weight sees a batch of 4"),
    "weight of the batch": (
        lambda: Net(lambda s, x: F.linear(x, s.b + s.a(x).mean(0)[:, None]), a=nn.Linear(5, 3), b=weight(3, 5)),
        VECTORS, "got a raw gradient",
    ),
    "bias of the batch": (
        lambda: Net(lambda s, x: F.linear(x, s.b, s.a(x).mean(0)), a=nn.Linear(5, 3), b=weight(3, 5)), VECTORS,
        "b got a raw gradient",
    ),
    "overlap": (lambda: Net(lambda s, x: F.linear(x, s.w) + F.linear(x[:, :4], s.w[:, :4]), w=weight(3, 5)), VECTORS,
                "w is used whole and in overlapping parts"),
    "overlapping parts": (lambda: Net(lambda s, x: F.linear(x[:, :4], s.w[:, :4]) + F.linear(x[:, :4], s.w[:, 1:]),
                                      w=weight(3, 5)), VECTORS, "w is used whole and in overlapping parts"),
    "float16": (lambda: nn.Linear(5, 3).half(), VECTORS, "float16, too coarse"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, shape, message = REFUSED[name]
    net = make()
    kind = next(net.parameters()).dtype
    x = torch.randint(0, shape, (N, 5)) if isinstance(shape, int) else torch.randn(N, *shape, dtype=kind)
    with pytest.raises(Unbooked, match=message):
        booked(net, cross_entropy, (x, torch.randint(0, 3, (N,))))
    assert all(p.grad is None for p in net.parameters())


def test_a_penalty_on_weights_is_refused():
    net, batch = made("linear")
    with pytest.raises(Unbooked, match=r"0\.weight got a raw gradient through square"):
        booked(net, lambda *args: cross_entropy(*args) + net[0].weight.square().sum(), batch)


def test_a_second_backward_pass_past_the_book_is_refused():
    net, batch = made("linear")
    book = Bookkeeper(trained(net))
    undo = book.forbid_raw()
    with book.step(units=N):
        cross_entropy(net, *batch).backward()
    with pytest.raises(Unbooked, match="got a raw gradient in a pass that is not booked"):
        cross_entropy(net, *batch).backward()
    undo()
    cross_entropy(net, *batch).backward()
    assert net[0].weight.grad is not None


def test_weights_made_of_the_batch_are_refused():
    net = Net(lambda s, x: F.linear(x, torch.cat([s.b, s.a(x).mean(0)[None]])), a=nn.Linear(5, 5), b=weight(3, 5))
    with pytest.raises(Unbooked, match=r"raw gradient|computed from the batch"):
        booked(net, cross_entropy, (torch.randn(N, 5), torch.randint(0, 3, (N,))))


def test_unused_parameters_are_named():
    net = Net(lambda s, x: s.a(x), a=nn.Linear(5, 3), b=nn.Linear(5, 3), c=weight(2))
    book = Bookkeeper(trained(net))
    with book.step(units=N):
        net(torch.randn(N, 5)).sum().backward()
    assert book.unbooked() == ["c", "b.weight", "b.bias"]


def test_nothing_is_booked_without_a_step_in_a_pause_or_without_gradients():
    net, (x, _) = made("linear")
    book = Bookkeeper(trained(net))
    net(x).sum().backward()
    with book.step(units=N):
        with book.paused():
            net(x).sum().backward()
        with torch.no_grad():
            net(x)
    assert not book.booked


# Examples without a finite gradient -----------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("form", KEEP)
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_examples_without_a_finite_gradient_are_dropped(name, form, what, monkeypatch):
    monkeypatch.setattr(rules, "KEEP", KEEP[form])
    net, (x, y) = made(name)
    spoilt = torch.ones(N).index_fill(0, torch.tensor([1, 4]), what)

    def loss(net: nn.Module, x: Tensor, y: Tensor, by: Tensor) -> Tensor:
        return (F.cross_entropy(net(x).flatten(1)[:, :3], y, reduction="none") * by).mean()

    wanted = [g[[0, 2, 3, 5]] for g in each(net, loss, (x, y, torch.ones(N)))]
    bound = float(norms_of(wanted).median())
    factors = (bound / norms_of(wanted)).clamp(max=1)
    norms, sums, _ = booked(net, loss, (x, y, spoilt), bound)
    assert norms[0].isfinite().tolist() == [True, False, True, True, False, True]
    agree(sums, [torch.einsum("n,n...->...", factors, g) for g in wanted])


# Modules without a rule -----------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Nothing that a rule knows, with a buffer and a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.w, self.fixed = weight(5, 4), nn.Parameter(torch.randn(4), requires_grad=False)
        self.register_buffer("shift", torch.randn(4))

    def forward(self, x):
        return torch.einsum("n...p,pd->n...d", x, self.w).cosh() * self.fixed + self.shift


@pytest.mark.parametrize("shape", [(5,), (3, 5)])
@pytest.mark.parametrize("rows", [1, 2])
def test_fall_back(shape, rows):
    net = nn.Sequential(nn.Linear(5, 5), Odd(), Odd(), nn.Flatten())
    net[2].w = net[1].w
    net[2].forward = lambda x, old=net[2].forward: old(F.pad(x, (0, 1)))  # somebody else's replacement
    before = [dict(vars(module)) for module in net]
    batch = torch.randn(N, *shape), torch.randint(0, 3, (N,))
    book, undo = Bookkeeper(trained(net)), ExitStack()
    with pytest.raises(Unbooked, match=r"1\.w got a raw gradient"):
        booked(net, cross_entropy, batch, book=book)
    assert book.raw is net[1].w
    for module in net[1:3]:
        book.fall_back(module, undo)
    norms, sums, _ = booked(net, cross_entropy, batch, rows=rows, book=book)
    wanted = [g.unflatten(0, (-1, rows)).sum(1) for g in each(net, cross_entropy, batch)]
    agree([norms[0]], [norms_of(wanted)])
    factors = (norms.median() / norms_of(wanted)).clamp(max=1)
    agree(sums, [torch.einsum("n,n...->...", factors, g) for g in wanted])
    undo.close()
    assert [dict(vars(module)) for module in net] == before


def test_fall_back_under_autocast():
    net = nn.Sequential(nn.Linear(5, 5), Odd()).float()
    book, undo = Bookkeeper(trained(net)), ExitStack()
    book.fall_back(net[1], undo)
    batch = torch.randn(N, 5).float(), torch.randint(0, 3, (N,))
    wanted = each(net, cross_entropy, batch)

    def loss(*args):
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(*args)

    _, sums, _ = booked(net, loss, batch, 1e9, book=book)
    agree(sums, [g.sum(0) for g in wanted], 0.05)


def test_modules_of_several_outputs_cannot_fall_back():
    net = nn.Sequential(nn.LSTM(5, 3, batch_first=True), Net(lambda s, x: x[0]))
    book = Bookkeeper(trained(net))
    book.fall_back(net[0], ExitStack())
    with pytest.raises(Unbooked, match="LSTM has no rule and gives a tuple"):
        booked(net, cross_entropy, (torch.randn(N, 2, 5), torch.randint(0, 3, (N,))), book=book)


# Nobody contributes more than the bound -------------------------------------------------------------------------------


def contribution(net: nn.Module, loss: Callable[..., Tensor], batch: tuple[Tensor, ...], bound: float) -> float:
    """Norm, in float64, of what a batch of one adds to the sum."""
    book = Bookkeeper(trained(net))
    with book.step(units=1):
        one = loss(net, *batch)
    one.backward()
    norms = book.squared_norms().sqrt()
    factors = Clipping().factors(norms, bound, book.margin)
    book.drop(~norms.isfinite().all(0))
    sums = {id(p): torch.zeros_like(p) for _, p in trained(net)}
    book.add_sums(factors, sums)
    return float(torch.cat([total.double().flatten() for total in sums.values()]).norm())


exponents = st.floats(-12, 12)


@ALL
@settings(max_examples=6, deadline=None, derandomize=True)
@given(scale=exponents, bound=st.floats(-6, 6), keep=st.sampled_from([0.0, 2.0, 1e9]), seed=st.integers(0, 1 << 30))
def test_the_bound_holds_in_float32(name, scale, bound, keep, seed):
    torch.manual_seed(seed)
    net, (x, y) = made(name, torch.float32)
    x = x if name == "channels last" or not x.is_floating_point() else x * 10.0 ** (scale / 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "KEEP", keep)
        norm = contribution(net, lambda *a: cross_entropy(*a) * 10.0**scale, (x[:1], y[:1]), 10.0**bound)
    assert norm <= 10.0**bound


@ALL
@settings(max_examples=6, deadline=None, derandomize=True)
@given(keep=st.sampled_from([0.0, 2.0, 1e9]), seed=st.integers(0, 1 << 30))
def test_the_bound_holds_in_bfloat16(name, keep, seed):
    torch.manual_seed(seed)
    net, (x, y) = made(name, torch.float32)

    def loss(*args):
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(*args) * 1e3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "KEEP", keep)
        assert contribution(net, loss, (x[:1], y[:1]), 1.0) <= 1.0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    scale=exponents, spread=st.floats(-8, 0), left=st.floats(-10, 0), conv=st.booleans(), coarse=st.booleans(),
    keep=st.sampled_from([0.0, 1e9]), sizes=st.sampled_from([(12, 30, 40), (5, 4, 40)]), seed=st.integers(0, 1 << 30),
)  # fmt: skip
def test_the_bound_holds_where_terms_cancel(scale, spread, left, conv, coarse, keep, sizes, seed):
    """Inputs that are nearly equal at all times, and gradients that nearly add up to zero, as before a softmax."""
    torch.manual_seed(seed)
    t, p, d = sizes
    net = (nn.Conv1d(p, d, 1, bias=False) if conv else nn.Linear(p, d, bias=False)).float()
    x = torch.randn(1, 1, p) + 10**spread * torch.randn(1, t, p)
    b = torch.randn(1, t, d)
    b = b - (1 - 10**left) * b.mean(1, keepdim=True)
    if conv:
        x, b = x.mT, b.mT
    x, b = x.float(), b.float()

    def loss(net, x, b):
        with torch.autocast("cpu", torch.bfloat16, enabled=coarse):
            return (net(x) * b).sum() * 10.0**scale

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "KEEP", keep)
        assert contribution(net, loss, (x, b), 1.0) <= 1.0


def test_a_batch_in_bfloat16_is_added_up_in_float32():
    net, (x, y) = made("wide linear", torch.float32)
    x, y = x.repeat(50, 1, 1), y.repeat(50)

    def loss(*args):
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(*args)

    book = Bookkeeper(trained(net))
    with book.step(units=len(x)):
        loss(net, x, y).backward()
    whole, parts = ({id(p): torch.zeros_like(p) for _, p in trained(net)} for _ in range(2))
    one = torch.eye(len(x)) * len(x)
    book.add_sums(one.sum(0, keepdim=True), whole)
    for factors in one:
        book.add_sums(factors[None], parts)
    agree(whole.values(), list(parts.values()), 1e-5)


@pytest.mark.parametrize(("precision", "margin"), [("highest", 1e-5), ("medium", 2.0**-6)])
def test_the_margin_knows_how_torch_multiplies(precision, margin):
    net, batch = made("linear", torch.float32)
    _, _, book = booked(net, cross_entropy, batch)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert book.margin == margin
    finally:
        torch.set_float32_matmul_precision(before)
