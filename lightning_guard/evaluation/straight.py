"""The way back through steps that have no slope."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_STEPS: set[Any] = {
    getattr(owner, name)
    for owner, names in (
        (torch, ("round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "detach", "fake_quantize_per_tensor_affine")),
        (Tensor, ("round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "detach")),
    )
    for name in names
}


class StraightThrough(TorchFunctionMode):
    """Inside this block rounding, signs and detached tensors pass gradients on as if they had done nothing.

    Values stay what they are. It is the identity form of BPDA (backward pass differentiable approximation), which
    finds the way through quantised inputs and through whatever was cut from the graph. Steps inside a custom
    ``autograd.Function`` and conversions to whole-number types stay closed; Square needs no way back at all.

    Reference:
        Athalye, Carlini and Wagner, Obfuscated Gradients Give a False Sense of Security, ICML 2018, arXiv:1802.00420.

    Example:
        >>> x = torch.tensor([0.2, 0.7], requires_grad=True)
        >>> with StraightThrough():
        ...     rounded = (2 * x).round().detach()
        >>> rounded.tolist(), torch.autograd.grad(rounded.sum(), x)[0].tolist()
        ([0.0, 1.0], [2.0, 2.0])
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What ``func`` gives, with a way back where it has none."""
        if func is torch._C._set_grad_enabled:
            return None  # a `torch.no_grad()` in the model would cut the way as well
        value = func(*args, **(kwargs or {}))
        if func in _STEPS and isinstance(args[0], Tensor) and args[0].requires_grad:
            return _Back.apply(args[0], value)
        return value


class _Back(torch.autograd.Function):
    """The second of two tensors, with the gradient going to the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None
