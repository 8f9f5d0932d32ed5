"""Every form of gradients says the same as the gradients written down, in pieces or whole, with rows left out."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_guard.functional.privacy import records
from lightning_guard.functional.privacy.records import Conv, Full, Geometry, Outer, Record, Rows, Scratch, squared_norms

N = 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def words(terms: int, height: int) -> Tensor:
    return torch.randint(0, height, (N, terms), generator=torch.Generator().manual_seed(terms))


def conv(channels: int, made: int, kernel: int, places: int, rows: int = 1, groups: int = 1) -> Conv:
    geometry = Geometry((kernel,), (2,), (1,), (1,), groups)
    x, b = normal(N * rows, channels, 2 * places + kernel - 4), normal(N * rows, made, places, seed=1)
    return Conv(x, b, (made, channels // groups, kernel), geometry, N, Scratch())


RECORDS: dict[str, Record] = {
    "full": Full(normal(N, 4, 3)),
    "full of a number": Full(normal(N)),
    "full, turned": Full(normal(N, 3, 4), lambda g: g.transpose(1, 2)),
    "outer": Outer(normal(N, 1, 3), normal(N, 1, 4)),
    "outer with a bias": Outer(normal(N, 1, 3), normal(N, 1, 4), Full(normal(N, 1, 4)[:, 0])),
    "outer, written": Outer(normal(N, 7, 3), normal(N, 7, 4)),
    "outer, ghost": Outer(normal(N, 2, 30), normal(N, 2, 40)),
    "rows": Rows(words(6, 4), normal(N, 6, 3), 4),
    "conv, written": conv(3, 4, 3, 5),
    "conv, ghost": conv(20, 30, 4, 2),
    "conv, groups": conv(4, 6, 3, 4, groups=2),
    "conv, several rows": conv(3, 4, 3, 2, rows=3),
    "conv, ghost of several rows": conv(40, 60, 4, 2, rows=2, groups=2),
}
ALL = pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
SIZES = pytest.mark.parametrize("scratch", [1, 1 << 20])


@ALL
@SIZES
def test_norms_and_sums_are_those_of_the_gradients(record, scratch, monkeypatch):
    monkeypatch.setattr(records, "_SCRATCH", scratch)
    g = record.full(0, N)
    assert g.shape == (N, *record.shape)
    torch.testing.assert_close(record.full(1, 3), g[1:3])
    torch.testing.assert_close(record.squares(), g.reshape(N, -1).square().sum(1), rtol=1e-12, atol=0)
    factors, out = normal(N), normal(*record.shape)
    wanted = out + torch.einsum("n,n...->...", factors, g)
    record.add_to(out, factors)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)


def test_a_convolution_writes_what_autograd_writes():
    record = RECORDS["conv, groups"]
    for i in range(N):
        weight = torch.zeros(record.shape, dtype=torch.float64, requires_grad=True)
        out = torch.conv1d(record.x[i : i + 1], weight, stride=2, padding=1, groups=2)
        (wanted,) = torch.autograd.grad(out, weight, record.b[i : i + 1])
        torch.testing.assert_close(record.full(i, i + 1)[0], wanted)


@ALL
def test_units_are_left_out_even_if_they_are_not_finite(record):
    g = record.full(0, N)
    bad = torch.tensor([False, True, False, False, True])
    parts = [getattr(record, name) for name in ("g", "a", "b", "x") if hasattr(record, name)]
    before = [part.clone() for part in parts]
    for part in parts:
        part.unflatten(0, (N, -1))[1] = torch.nan
        part.unflatten(0, (N, -1))[4] = torch.inf
    try:
        kept, out = record.without(bad), torch.zeros(record.shape, dtype=torch.float64)
        kept.add_to(out, torch.ones(N, dtype=torch.float64))
        torch.testing.assert_close(out, g[~bad].sum(0))
        torch.testing.assert_close(kept.squares()[~bad], g[~bad].reshape(3, -1).square().sum(1))
        assert not kept.squares()[bad].any()
    finally:
        for part, was in zip(parts, before, strict=True):
            part.copy_(was)


SAME = (9, 6)
OUTERS = [Outer(normal(N, t, 6, seed=t), normal(N, t, 9, seed=t)) for t in (1, 3, 4)]
TABLES = [Rows(words(t, 9), normal(N, t, 6, seed=t), 9) for t in (5, 8)]
WRITTEN = Full(normal(N, *SAME))


@pytest.mark.parametrize(
    "several",
    [OUTERS, TABLES, [*OUTERS[:1], *TABLES[:1]], [*TABLES, *OUTERS], [WRITTEN, *OUTERS, *TABLES], [WRITTEN]],
    ids=["outers", "tables", "tied", "tied often", "all", "one"],
)
@SIZES
def test_norms_of_a_sum_of_records(several, scratch, monkeypatch):
    monkeypatch.setattr(records, "_SCRATCH", scratch)
    total = sum(record.full(0, N) for record in several)
    torch.testing.assert_close(squared_norms(several), total.square().sum((1, 2)), rtol=1e-12, atol=0)


def test_a_table_and_a_head_that_cancel():
    index, b = words(3, 9), normal(N, 3, 6)
    head = Outer(-b, torch.nn.functional.one_hot(index, 9).double())
    assert float(squared_norms([head, Rows(index, b, 9)]).max()) <= 1e-12


@pytest.mark.parametrize("size", [1, 16383, 16384, 16385, 1 << 23])
def test_long_rows_are_added_up_exactly(size):
    """torch's own norm is 0.1 % too small at ten million numbers."""
    x = torch.rand(1, size, generator=torch.Generator().manual_seed(0)) + 1
    wanted = sum(float(piece.double().square().sum()) for piece in x.split(1 << 20, 1))
    assert float(Full(x).squares()) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("left", [1.0, 1e-2, 1e-4, 1e-6, 0.0])
@pytest.mark.parametrize("ghost", [True, False])
@pytest.mark.parametrize("conv", [True, False])
def test_a_norm_is_never_much_too_small(dtype, left, ghost, conv):
    """Terms that cancel leave a ghost norm to rounding; it may then be too large."""
    units, terms, p, d = 100, 5, (60, 4)[not ghost], (400, 30)[not ghost]
    a = (normal(units, 1, p).expand(units, terms, p) + left * normal(units, terms, p)).to(dtype)
    b = normal(units, terms, d)
    b = (b - (1 - left) * b.mean(1, keepdim=True)).to(dtype)
    geometry = Geometry((1,), (1,), (0,), (1,), 1)
    record = Conv(a.mT, b.mT, (d, p, 1), geometry, units, Scratch()) if conv else Outer(a, b)
    got, alone, wide = record.squares().sqrt(), torch.zeros(units), torch.zeros(record.shape)
    for i in range(units):
        record.add_to(wide.zero_(), torch.eye(units)[i] / alone.new_tensor(3.0))
        alone[i] = 3 * wide.double().norm()
    assert bool((got >= alone * (1 - {torch.float32: 1e-5, torch.bfloat16: 2.0**-6}[dtype])).all())


def test_sums_in_bfloat16_are_rounded_only_at_the_end():
    geometry = Geometry((3,), (1,), (1,), (1,), 1)
    conv = Conv(normal(200, 2, 5), normal(200, 4, 5), (4, 2, 3), geometry, 200, Scratch())
    for record in (Full(normal(200, 4, 3)), Outer(normal(200, 2, 3), normal(200, 2, 4)), conv):
        names = [name for name in ("g", "a", "b", "x") if hasattr(record, name)]
        coarse = replace(record, **{name: getattr(record, name).bfloat16() for name in names})
        wide = replace(record, **{name: getattr(coarse, name).double() for name in names})
        outs = torch.zeros(record.shape), torch.zeros(record.shape, dtype=torch.float64)
        for one, out in zip((coarse, wide), outs, strict=True):
            one.add_to(out, torch.linspace(0.1, 1, 200, dtype=out.dtype))
        torch.testing.assert_close(outs[0].double(), outs[1], rtol=1e-4, atol=1e-4)
