"""Scattering equals its definition, does not enlarge distances, hardly moves with the image, and holds no state."""

import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_guard.data import FashionMNISTData
from lightning_guard.models.scattering import Scattering, ScatteringClassifier, figures


def images(n: int = 4, channels: int = 1, size: int = 28) -> Tensor:
    """Blobs with sharp edges, in [0, 1]."""
    coarse = torch.rand(n, channels, size // 4, size // 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear").round()


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def slow_wavelet(scale: int, angle: float, slant: float, reach: int) -> Tensor:
    """``4^-j psi(2^-j R u)`` on ``[-reach, reach]^2``, pixel by pixel from the formula."""
    width = 2 * reach + 1
    bell = torch.zeros(width, width, dtype=torch.float64)
    wave = torch.zeros(width, width, dtype=torch.complex128)
    for row in range(width):
        for column in range(width):
            x, y = (column - reach) / 2**scale, (row - reach) / 2**scale
            u1 = x * math.cos(angle) + y * math.sin(angle)
            u2 = -x * math.sin(angle) + y * math.cos(angle)
            bell[row, column] = math.exp(-(u1**2 + slant**2 * u2**2) / (2 * 0.8**2))
            wave[row, column] = bell[row, column] * complex(
                math.cos(0.75 * math.pi * u1), math.sin(0.75 * math.pi * u1)
            )
    return (wave - bell * wave.sum() / bell.sum()) / bell.sum()


def slow_convolution(x: Tensor, kernel: Tensor, every: int) -> Tensor:
    """``sum_v x(u - v) kernel(v)`` of a periodic image at every ``every``-th pixel ``u``."""
    reach, out = len(kernel) // 2, torch.zeros(x.shape, dtype=kernel.dtype)
    for row in range(-reach, reach + 1):
        for column in range(-reach, reach + 1):
            out += kernel[row + reach, column + reach] * torch.roll(x, (row, column), dims=(0, 1))
    return out[::every, ::every]


def slow_smooth(x: Tensor, every: int, scales: int = 2, size: int = 28) -> Tensor:
    """Gaussian means of a periodic image around the middle of each square of ``2^scales`` pixels."""
    step = 2**scales
    side, period = size // step, len(x) * every
    place = torch.arange(len(x), dtype=torch.float64) * every - step  # pixels from the corner of the image

    def bell(centre: float) -> Tensor:
        near = [(place - centre + turn * period) / (0.8 * step / 2) for turn in (-1, 0, 1)]
        return sum((torch.exp(-(distance**2) / 2) for distance in near), torch.zeros(()))

    out = torch.zeros(side, side, dtype=torch.float64)
    for row in range(side):
        for column in range(side):
            weight = bell(row * step + (step - 1) / 2)[:, None] * bell(column * step + (step - 1) / 2)
            out[row, column] = (weight * x).sum() / weight.sum()
    return out


@pytest.mark.parametrize(("j", "t", "u"), [(0, 0, 3), (0, 5, 0), (0, 6, 7)])
def test_paths_equal_spatial_convolutions(j: int, t: int, u: int) -> None:
    x, turn = images(1).double(), math.pi / 8
    out = Scattering()(x)[0].double()
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4), mode="reflect")[0, 0]
    first = slow_convolution(padded, slow_wavelet(0, t * turn, 0.5, 9), 1).abs()
    coarse = slow_convolution(padded, slow_wavelet(1, t * turn, 0.5, 18), 2).abs()
    second = slow_convolution(first, slow_wavelet(1, u * turn, 0.5, 18), 2).abs()
    close(out[0], slow_smooth(padded, 1))
    close(out[1 + t], slow_smooth(first, 1))
    close(out[9 + t], slow_smooth(coarse, 2))
    close(out[17 + 8 * t + u], slow_smooth(second, 2))


def test_features_do_not_leave_with_the_checkpoint() -> None:
    net = Scattering()
    assert net.state_dict() == {}
    assert list(net.parameters()) == []
    assert not net(images().requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("options", "shape", "expected"),
    [
        ({}, (2, 1, 28, 28), (2, 81, 7, 7)),
        ({}, (0, 1, 28, 28), (0, 81, 7, 7)),
        ({"image_size": 32}, (2, 3, 32, 32), (2, 243, 8, 8)),
        ({"scales": 3, "angles": 4, "image_size": 32}, (1, 1, 32, 32), (1, 61, 4, 4)),
        ({"scales": 1, "angles": 1}, (1, 1, 28, 28), (1, 2, 14, 14)),
    ],
)
def test_shapes(options: dict[str, int], shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert Scattering(**options)(torch.rand(shape)).shape == expected


def test_images_and_channels_do_not_see_each_other() -> None:
    net, x = Scattering(), images(3, channels=2)
    out = net(x)
    assert torch.equal(out, net(x))
    torch.testing.assert_close(out[1:2], net(x[1:2]))
    torch.testing.assert_close(out[:, 81:], net(x[:, 1:]))


def test_energy_of_the_filters_is_at_most_one() -> None:
    """The condition under which scattering enlarges no distance (Mallat 2012, proposition 2.1)."""
    net = Scattering()
    waves = torch.cat([net.get_buffer(f"psi_0_{j}") for j in range(2)]).square().sum(dim=(0, -1))
    mirrored = torch.roll(waves.flip(0, 1), (1, 1), dims=(0, 1))  # the other half turn of angles
    frequency = 2 * math.pi * torch.fft.fftfreq(36)
    low = torch.exp(-(1.6**2) * (frequency[:, None] ** 2 + frequency**2))
    assert ((waves + mirrored) / 2 + low).max() <= 1 + 1e-5


def test_distances_do_not_grow() -> None:
    net, x = Scattering(), images(8)
    for y in [x.flip(0), x + 0.1 * torch.randn(x.shape), torch.zeros_like(x)]:
        before, after = (x - y).flatten(1).norm(dim=1), (net(x) - net(y)).flatten(1).norm(dim=1)
        assert (after <= before).all()


def test_features_turn_and_mirror_with_the_image() -> None:
    net, x = Scattering(), images()
    out, mirrored = net(x), net(x.flip(-1))
    torch.testing.assert_close(mirrored[:, 0], out[:, 0].flip(-1))
    first = [1 + (8 - t) % 8 for t in range(8)]  # a mirror turns the angle t into -t
    torch.testing.assert_close(mirrored[:, 1:9], out[:, first].flip(-1))
    torch.testing.assert_close(net(x.mT)[:, 0], out[:, 0].mT)


def test_a_small_shift_moves_features_less_than_pixels() -> None:
    net = Scattering()
    x = torch.nn.functional.pad(images(4, size=20), (4, 4, 4, 4))
    moved = torch.roll(x, 1, dims=-1)
    pixels = (moved - x).norm() / x.norm()
    assert (net(moved) - net(x)).norm() / net(x).norm() < pixels / 2
    # A shift by the grid shifts the features; only windows at the edge differ.
    torch.testing.assert_close(net(torch.roll(x, 4, dims=-1))[..., 2:-1], net(x)[..., 1:-2], atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": 0}, "scales=0"),
        ({"angles": 0}, "angles=0"),
        ({"image_size": 30}, "image_size=30"),
        ({"image_size": 4}, "image_size=4"),
    ],
)
def test_arguments_out_of_range(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scattering(**options)


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (1, 28, 28)])
def test_images_of_another_size(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="image_size=28"):
        Scattering()(torch.rand(shape))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.bfloat16, 2e-2)])
def test_features_survive_another_precision(dtype: torch.dtype, tolerance: float) -> None:
    net, x = Scattering(), images()
    expected = net(x)
    out = net.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=0)


def started(**options: Any) -> ScatteringClassifier:
    """A classifier whose linear layer is not zero."""
    net = ScatteringClassifier(**options)
    torch.nn.init.normal_(net.head.weight, generator=torch.Generator().manual_seed(0))
    return net


@pytest.mark.parametrize(("num_classes", "shape"), [(2, (3,)), (10, (3, 10))])
def test_logits(num_classes: int, shape: tuple[int, ...]) -> None:
    net = started(num_classes=num_classes, in_channels=3, image_size=32)
    assert net(torch.rand(3, 3, 32, 32)).shape == shape
    assert net(torch.rand(0, 3, 32, 32)).shape == (0, *shape[1:])


def test_features_stand_for_their_images() -> None:
    net, x = started(), images()
    features = net.features(x, batch_size=3)
    assert features.dtype == torch.float16
    assert features.shape == (4, net.in_features)
    torch.testing.assert_close(net(features), net(x), atol=2e-3, rtol=0)


def test_figures_are_whitened() -> None:
    """Over random figures the inputs of the linear layer have mean zero, and variance one where they vary."""
    net = ScatteringClassifier()
    x = figures(500, 28)
    assert torch.equal(x, figures(500, 28))
    s = torch.log1p(net.scattering(x) / 0.01).transpose(0, 1).flatten(1)
    white = net.whitening @ (s - net.mean[:, None])
    torch.testing.assert_close(white.mean(dim=1), torch.zeros(81), atol=1e-3, rtol=0)
    variances = torch.linalg.eigvalsh(white.cov())
    assert variances.max() <= 1
    assert variances.max() > 0.95


def test_only_the_linear_layer_is_learnt() -> None:
    net = ScatteringClassifier()
    shapes = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
    assert shapes == {"head.weight": (10, 3969), "head.bias": (10,)}
    assert set(net.state_dict()) == {"head.weight", "head.bias", "mean", "whitening"}


def test_gradient_of_an_example_is_at_most_two() -> None:
    net = started()
    x = torch.cat([images(), torch.zeros(1, 1, 28, 28), torch.ones(1, 1, 28, 28), torch.rand(1, 1, 28, 28)])
    assert (net.features(x).float().norm(dim=1) <= 1 + 1e-3).all()
    net.head.weight.data *= 100  # sure and wrong
    for image in x:
        net.zero_grad()
        net.loss(net(image[None]), net(image[None]).argmin(dim=1)).backward()
        assert torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]).norm() <= 2 + 1e-5


def test_examples_do_not_see_each_other() -> None:
    net, x = started().train(), images()
    torch.testing.assert_close(net(x)[:1], net(x[:1]))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_images_are_learnt(precision: Any) -> None:
    pl.seed_everything(0)
    data, net = FashionMNISTData(batch_size=32), ScatteringClassifier(lr=10.0)
    run = pl.Trainer(
        accelerator="cpu",
        precision=precision,
        max_steps=20,
        limit_val_batches=0,
        limit_test_batches=8,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    run.fit(net, data)
    assert run.test(net, data, verbose=False)[0]["test_accuracy"] > 0.5
