"""Losses of each example against their formulas in float64, a test a row of the table."""

import numpy as np
import pytest
import torch

from lightning_guard.functional import example_losses

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def drawn(*shape: int) -> torch.Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def whole(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(1))


def softmax_loss(logits: np.ndarray, target: int) -> float:
    return float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target])


def sigmoid_loss(logit: float, target: float) -> float:
    return float(np.logaddexp(0, logit) - target * logit)


def check(losses: torch.Tensor, wanted: list[float], dtype: torch.dtype) -> None:
    assert losses.shape == (len(wanted),)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    atol = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(losses.double(), torch.tensor(wanted, dtype=torch.float64), rtol=atol, atol=atol)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8])
def test_a_logit_a_class(dtype, kind):
    logits, target = drawn(9, 4).to(dtype), whole(4, 9)
    wanted = [softmax_loss(row, int(t)) for row, t in zip(logits.double().numpy(), target, strict=True)]
    check(example_losses(logits, target.to(kind)), wanted, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("places", [(5,), (2, 3)])
def test_a_class_a_place_is_summed_over_places(dtype, places):
    logits, target = drawn(3, 4, *places).to(dtype), whole(4, 3, *places)
    flat, labels = logits.double().flatten(2).numpy(), target.flatten(1)
    wanted = [sum(softmax_loss(flat[i, :, j], int(labels[i, j])) for j in range(flat.shape[2])) for i in range(3)]
    check(example_losses(logits, target), wanted, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(5, 4), (5, 2, 3)])
def test_several_labels_are_summed(dtype, shape):
    logits, target = drawn(*shape).to(dtype), whole(2, *shape).float()
    pairs = zip(logits.double().flatten(1).numpy(), target.flatten(1).numpy(), strict=True)
    wanted = [sum(sigmoid_loss(z, t) for z, t in zip(row, labels, strict=True)) for row, labels in pairs]
    check(example_losses(logits, target), wanted, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("logit_shape", [(6,), (6, 1)])
@pytest.mark.parametrize("target_shape", [(6,), (6, 1)])
@pytest.mark.parametrize("kind", [torch.int64, torch.float32, torch.bool])
def test_one_logit(dtype, logit_shape, target_shape, kind):
    logits, target = drawn(*logit_shape).to(dtype), whole(2, *target_shape).to(kind)
    pairs = zip(logits.double().flatten(), target.double().flatten(), strict=True)
    check(example_losses(logits, target), [sigmoid_loss(float(z), float(t)) for z, t in pairs], dtype)


def test_one_logit_takes_probabilities():
    logits, target = drawn(4), torch.tensor([0.0, 0.25, 0.5, 1.0])
    wanted = [sigmoid_loss(float(z), float(t)) for z, t in zip(logits, target, strict=True)]
    check(example_losses(logits, target), wanted, torch.float64)


def test_half_precision_keeps_small_losses_and_their_gradient():
    logits = torch.tensor([[12.0, 0.0]], dtype=torch.float16, requires_grad=True)
    losses = example_losses(logits, torch.tensor([0]))
    assert losses.item() == pytest.approx(np.log1p(np.exp(-12.0)), rel=1e-2)
    assert torch.autograd.grad(losses.sum() * 1024, logits)[0].abs().min() > 0


@pytest.mark.parametrize(
    ("logits", "target"),
    [
        (torch.zeros(()), torch.zeros(())),
        (torch.zeros(3), torch.zeros(4)),
        (torch.zeros(3, 1), torch.zeros(3, 2)),
        (torch.zeros(3, 2), torch.zeros(3)),  # floating classes
        (torch.zeros(3, 2), torch.zeros(3, 2).long()),  # whole numbers for several labels
        (torch.zeros(3, 2), torch.zeros(4).long()),
        (torch.zeros(3, 2), torch.zeros(3, 1).long()),
        (torch.zeros(3, 2, 5), torch.zeros(3, 4).long()),
        (torch.zeros(3, 1, 5), torch.zeros(3, 5).long()),  # cross-entropy of a single class would be 0
        (torch.zeros(3, 1, 5), torch.zeros(3, 1, 5)),
    ],
)
def test_what_fits_no_row_is_refused(logits, target):
    with pytest.raises(ValueError, match="no classification loss") as error:
        example_losses(logits, target)
    assert str(tuple(logits.shape)) in str(error.value)
    assert str(tuple(target.shape)) in str(error.value)
    assert "GuardMixin.guard_losses" in str(error.value)
