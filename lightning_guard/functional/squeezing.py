"""Feature squeezing: inputs with less room for an attacker, and a gradient that sees through it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_guard.functional.attacks.threat import ThreatModel


@dataclass(frozen=True)
class Squeeze:
    r"""Reduces the bits of inputs and smooths images by a median (Xu et al., 2018), with a gradient that hides nothing.

    Values are rounded to :math:`2^b` equally spaced levels of ``bounds``, then each pixel becomes the median of its
    window. Rounding has a zero gradient, which hides the way from an attack and protects nothing. Its gradient here
    is therefore that of the identity (BPDA; Athalye et al., 2018): any attack by gradients is adaptive by itself. The
    median keeps its own gradient, which leads an attack further than the identity does (measured).

    Args:
        bits: levels are :math:`2^b`; None leaves values as they are.
        window: side of the square window of the median, in pixels; 1 leaves images as they are.
        bounds: lowest and highest valid input, before normalisation.
        mean: subtracted before the network, one number or one a channel (dimension 1).
        std: divided by before the network, one number or one a channel (dimension 1).

    Raises:
        ValueError: for values that describe no squeezing, naming the option.

    | case                        | result                                                         |
    |-----------------------------|----------------------------------------------------------------|
    | ``bits=None``, ``window=1`` | the input itself, the same object                              |
    | an input outside ``bounds`` | its nearest bound, with ``bits``; ``check`` raises             |
    | an even ``window``          | reaches one pixel further up and left; of two middles, the upper |
    | pixels beyond the border    | are those of the border                                        |
    | inputs that are no images   | ValueError, with a ``window``                                  |

    Reference:
        Xu, Evans and Qi, Feature Squeezing, NDSS 2018, arXiv:1704.01155. The gradient: Athalye, Carlini and Wagner,
        Obfuscated Gradients Give a False Sense of Security, ICML 2018, arXiv:1802.00420.

    Example:
        >>> x = torch.tensor([[0.2, 0.6]], requires_grad=True)
        >>> squeezed = Squeeze(bits=1)(x)
        >>> squeezed.tolist(), torch.autograd.grad(squeezed.sum(), x)[0].tolist()
        ([[0.0, 1.0]], [[1.0, 1.0]])
    """

    bits: int | None = None
    window: int = 1
    bounds: tuple[float, float] = (0.0, 1.0)
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.bits is not None and not 1 <= self.bits <= 16:
            raise ValueError(f"bits={self.bits} gives no levels; give a whole number from 1 to 16, or None for all")
        if self.window < 1:
            raise ValueError(f"window={self.window} holds no pixel; give the side of a square, or 1 for no median")
        self._levels()  # refuses bounds and std that are none

    @property
    def acts(self) -> bool:
        """Whether anything is squeezed."""
        return self.bits is not None or self.window > 1

    def __call__(self, x: Tensor) -> Tensor:
        """Squeezed inputs ``(N, ...)``, as the network sees them."""
        if not self.acts:
            return x
        squeezed = x
        if self.bits is not None:
            low, high = self._levels().limits(x)
            assert low is not None  # bounds are there
            assert high is not None
            step = (high - low) / (2**self.bits - 1)
            rounded = ((x.detach().clamp(low, high) - low) / step).round() * step + low
            squeezed = rounded + (x - x.detach())  # zero, with the gradient of the identity
        if self.window > 1:
            squeezed = median(squeezed, self.window)
        return squeezed

    def check(self, x: Tensor) -> None:
        """Raise if these inputs cannot be squeezed, or lie outside the bounds."""
        if not x.is_floating_point():
            raise ValueError(f"inputs are a {x.dtype} tensor, and squeezing needs floating point; convert them before")
        if self.bits is not None:
            self._levels().check(x)
        self(x[:1])

    def _levels(self) -> ThreatModel:
        return ThreatModel(0.0, bounds=self.bounds, mean=self.mean, std=self.std)


def median(x: Tensor, window: int) -> Tensor:
    """Each pixel's median over a square window of its channel.

    Args:
        x: images ``(N, C, H, W)``.
        window: side of the window in pixels; an even one reaches one further up and left.

    Raises:
        ValueError: if ``x`` is no batch of images.

    Example:
        >>> spot = torch.zeros(1, 1, 3, 3)
        >>> spot[0, 0, 1, 1] = 1
        >>> median(spot, 3).max().item()
        0.0
    """
    if x.dim() != 4:
        raise ValueError(f"window={window} for inputs of shape {tuple(x.shape)}; a median needs images (N, C, H, W)")
    before, after = window // 2, (window - 1) // 2
    around = F.pad(x, (before, after, before, after), mode="replicate")
    windows = around.unfold(2, window, 1).unfold(3, window, 1).flatten(4)
    return windows.kthvalue(window * window // 2 + 1, dim=4).values


class _Hook:
    """Squeezes the first argument of a module; copied and pickled with it."""

    part_of_the_model = True  # what training leaves on purpose

    def __init__(self, squeeze: Squeeze):
        self.squeeze = squeeze

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if steps_through(module):
            return None
        if not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
            given = "no positional argument" if not args else f"a {_kind(args[0])} first"
            raise ValueError(
                f"{type(module).__name__} squeezes its inputs and was given {given}; give one floating-point tensor"
            )
        return (self.squeeze(args[0]), *args[1:])


def squeeze_inputs(module: nn.Module, squeeze: Squeeze) -> None:
    """Squeeze whatever ``module`` is called with from now on, in training and inference, copies included.

    It is part of the object and not of its ``state_dict``, whose keys stay as they are: a network that is built anew
    and loads the weights must be squeezed again. A second call replaces the first. ``module.forward(x)`` goes around
    it, as it goes around every hook.

    Args:
        module: what is called with the inputs as its first argument.
        squeeze: what to do with them.

    Example:
        >>> network = nn.Identity()
        >>> squeeze_inputs(network, Squeeze(bits=1))
        >>> network(torch.tensor([0.2, 0.6])).tolist()
        [0.0, 1.0]
        >>> unsqueeze(network)
        Squeeze(bits=1, window=1, bounds=(0.0, 1.0), mean=None, std=None)
        >>> network(torch.tensor([0.5])).tolist()
        [0.5]
    """
    unsqueeze(module)
    module.register_forward_pre_hook(_Hook(squeeze))


def unsqueeze(module: nn.Module) -> Squeeze | None:
    """Take back :func:`squeeze_inputs`; returns what was done to inputs, None if nothing was."""
    found = squeezing(module)
    for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _Hook)]:
        del module._forward_pre_hooks[key]
    return found


def squeezing(module: nn.Module) -> Squeeze | None:
    """What is done to the inputs of ``module``; None if nothing is."""
    return next((hook.squeeze for hook in module._forward_pre_hooks.values() if isinstance(hook, _Hook)), None)


def steps_through(module: nn.Module) -> bool:
    """Whether Lightning calls ``module`` in the place of its step, with a batch and no inputs, as under DDP."""
    # strategies/strategy.py, _ForwardRedirection: hooks of the LightningModule run before it puts forward back.
    # What is compiled is the step, which by then runs; and torch's compiler cannot read a bound method's names.
    return not torch.compiler.is_compiling() and "_ForwardRedirection" in getattr(
        vars(module).get("forward"), "__qualname__", ""
    )


def _kind(value: Any) -> str:
    return f"{value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
