"""Grids of whole numbers for weights and activations, and rounding to them that gradients pass."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

_TINY = torch.finfo(torch.float32).tiny  # the smallest scale whose inverse is finite


def weight_scale(weight: Tensor, bits: int = 8, axis: int = 0) -> Tensor:
    r"""The step of a symmetric grid for each output channel: :math:`\max|w| / (2^{b-1} - 1)`.

    The step is rounded to 17 significant bits, so that every product of a code and the step is exact in 32 bits, and
    whoever reads the largest weight of a channel gets the very same step from it.

    Args:
        weight: floating-point weights of any shape.
        bits: of a code, 2 to 8.
        axis: the dimension of the output channels.

    Returns:
        float32 steps of shape ``(channels,)``.

    | case                         | result                                     |
    |------------------------------|--------------------------------------------|
    | a channel of zeros           | step 1                                     |
    | a channel below 1e-38        | the smallest step whose inverse is finite   |

    Raises:
        ValueError: for bits outside 2 to 8.

    Example:
        >>> weight_scale(torch.tensor([[0.5, -1.27], [0.0, 0.0]]))
        tensor([0.0100, 1.0000])
    """
    _check_bits(bits)
    values = weight.detach()
    others = [dim for dim in range(weight.dim()) if dim != axis % weight.dim()]
    largest = (torch.maximum(values.amax(others), -values.amin(others)) if others else values.abs()).float()
    return short(torch.where(largest > 0, (largest / (2 ** (bits - 1) - 1)).clamp_min(_TINY), 1.0))


def short(scale: Tensor) -> Tensor:
    """The nearest number with 17 significant bits: its products with whole numbers up to 127 are exact in 32 bits."""
    return ((scale.float().view(torch.int32) + 64) & ~127).view(torch.float32)


def weight_codes(weight: Tensor, scale: Tensor, bits: int = 8, axis: int = 0) -> Tensor:
    """The nearest codes of weights on the grid of ``scale``, as floats of the weight's shape."""
    largest = 2 ** (bits - 1) - 1
    return torch.div(weight.detach(), along(scale, weight, axis)).round_().clamp_(-largest, largest)


def weight_grid(weight: Tensor, bits: int = 8, axis: int = 0) -> tuple[Tensor, Tensor]:
    r"""Weights as whole numbers and a step for each output channel: :math:`w \approx c\,s`.

    The grid is symmetric, with codes from :math:`-(2^{b-1}-1)` to :math:`2^{b-1}-1`: zeros stay zeros, and the largest
    weight of a channel has the largest code. So weights that lie on such a grid give back their codes exactly.

    Args:
        weight: floating-point weights of any shape.
        bits: of a code, 2 to 8.
        axis: the dimension of the output channels: 0, and 1 for transposed convolutions.

    Returns:
        int8 codes of the weight's shape, and float32 steps of shape ``(channels,)``.

    Reference:
        Krishnamoorthi, Quantizing deep convolutional networks for efficient inference, 2018, arXiv:1806.08342.

    Example:
        >>> codes, scale = weight_grid(torch.tensor([[0.5, -1.27], [0.0, 3.0]]))
        >>> codes.tolist()
        [[50, -127], [0, 127]]
    """
    scale = weight_scale(weight, bits, axis)
    return weight_codes(weight, scale, bits, axis).to(torch.int8), scale


def snapped(weight: Tensor, scale: Tensor, bits: int = 8, axis: int = 0) -> Tensor:
    """The nearest weights on the grid of ``scale``; weights on it are returned as they are."""
    return weight_codes(weight, scale, bits, axis).mul_(along(scale, weight, axis))


def fake_quantize(weight: Tensor, bits: int = 8, axis: int = 0) -> Tensor:
    """Weights rounded to :func:`weight_grid`, with the gradient of the identity (Bengio et al., 2013).

    No weight lies outside its grid, so the straight-through gradient is clipped nowhere.

    Reference:
        Bengio, Leonard and Courville, Estimating or Propagating Gradients, 2013, arXiv:1308.3432. Jacob et al., CVPR
        2018, arXiv:1712.05877.

    Example:
        >>> fake_quantize(torch.tensor([[1.0, 0.4, 0.1]]), bits=2)
        tensor([[1., 0., 0.]])
    """
    if has_torch_function_unary(weight):  # so that a TorchFunctionMode sees the call, as DP-SGD's book-keeping must
        seen: Tensor = handle_torch_function(fake_quantize, (weight,), weight, bits, axis)
        return seen
    rounded: Tensor = _Rounded.apply(weight, along(weight_scale(weight, bits, axis), weight, axis))
    return rounded


def activation_grid(low: Tensor, high: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    r"""Step and zero point of an asymmetric grid for values in ``[low, high]``; zero is always one of its points.

    :math:`s = (h - l) / (2^b - 1)` and :math:`z = \mathrm{round}(-l / s)`, with :math:`l \le 0 \le h` enforced.

    Returns:
        float32 steps and zero points (whole numbers in ``[0, 2^b - 1]``) of the shape of ``low``.

    | case             | result        |
    |------------------|---------------|
    | ``low=high=0``   | step 1, zero 0 |

    Example:
        >>> activation_grid(torch.tensor(-1.0), torch.tensor(1.55))
        (tensor(0.0100), tensor(100.))
    """
    _check_bits(bits)
    low, high, levels = low.float().clamp_max(0), high.float().clamp_min(0), 2**bits - 1
    scale = torch.where(high > low, ((high - low) / levels).clamp_min(_TINY), 1.0)
    return scale, (-low / scale).round().clamp(0, levels)


def fake_quantize_input(x: Tensor, scale: Tensor, zero: Tensor, bits: int = 8) -> Tensor:
    """Values rounded to the grid of :func:`activation_grid`; gradients pass where nothing is clipped.

    Args:
        x: values of any shape.
        scale: the step, a number ``()``.
        zero: the zero point, a number ``()``.
        bits: of a code, 2 to 8.

    Example:
        >>> fake_quantize_input(torch.tensor([-9.0, 0.012, 1.0]), torch.tensor(0.01), torch.tensor(100.0))
        tensor([-1.0000,  0.0100,  1.0000])
    """
    rounded: Tensor = _Clipped.apply(x, scale, zero, 2**bits - 1)
    return rounded


def along(scale: Tensor, weight: Tensor, axis: int) -> Tensor:
    """One number a channel, in a shape and type that multiplies weights."""
    shape = [1] * weight.dim()
    shape[axis] = -1
    return scale.view(shape).to(weight.dtype)


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits} is no width of a code; give 2 to 8")


class _Rounded(torch.autograd.Function):
    """Rounding to multiples of a step, with the gradient of the identity."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, scale: Tensor) -> Tensor:
        return torch.div(weight, scale).round_().mul_(scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _Clipped(torch.autograd.Function):
    """Rounding to codes from 0 to ``levels`` around a zero point, with the gradient of clipping."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
        # Clipping by tensors is several times slower than by numbers, so codes are shifted instead.
        return torch.div(x, scale).round_().add_(zero).clamp_(0, levels).sub_(zero).mul_(scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, scale, zero, ctx.levels = inputs
        ctx.save_for_backward(x, scale, zero)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, scale, zero = ctx.saved_tensors
        half = ctx.levels / 2
        inside = torch.sub(x, scale * (half - zero)).abs_().le_(scale * half)
        return inside.mul_(grad), None, None, None
