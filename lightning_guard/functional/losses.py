"""The loss of each example by itself, which attacks climb."""

import torch.nn.functional as F
from torch import Tensor


def example_losses(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each example, in nats, computed in float32 or wider.

    | ``logits``                | ``target``                     | loss                                      |
    |---------------------------|--------------------------------|-------------------------------------------|
    | ``(N, C, ...)``, C >= 2   | whole ``(N, ...)``             | softmax cross-entropy, summed over ``...`` |
    | ``(N, C, ...)``, C >= 2   | floating ``(N, C, ...)``       | one sigmoid a logit, summed (multi-label) |
    | ``(N,)`` or ``(N, 1)``    | ``(N,)`` or ``(N, 1)`` in [0, 1] | sigmoid cross-entropy                     |

    Returns:
        Losses of shape ``(N,)``.

    Raises:
        ValueError: if the shapes fit no row of the table, or targets of one logit lie outside [0, 1].

    Example:
        >>> import torch
        >>> example_losses(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([1, 0]))
        tensor([0.6931, 0.3133])
        >>> example_losses(torch.tensor([0.0, 1.0]), torch.tensor([1, 1]))
        tensor([0.6931, 0.3133])
    """
    logits = logits if logits.dtype.itemsize > 2 else logits.float()  # half precision loses small losses to zero
    if logits.dim() == 1 or (logits.dim() == 2 and logits.shape[1] == 1):
        if target.numel() == len(logits):
            logits = logits.reshape(-1)
            if bool(((target < 0) | (target > 1)).any()):
                raise ValueError(
                    f"targets range over [{target.min().item():.4g}, {target.max().item():.4g}], outside [0, 1], for "
                    "one logit an example, so this is no classification; say the loss of each example with "
                    "GuardMixin.guard_losses"
                )
            return F.binary_cross_entropy_with_logits(logits, target.reshape(-1).to(logits), reduction="none")
    elif logits.dim() < 2 or logits.shape[1] < 2:
        pass  # cross-entropy over a single class would be 0, whatever the logits
    elif target.shape == logits.shape and target.is_floating_point():
        losses = F.binary_cross_entropy_with_logits(logits, target.to(logits), reduction="none")
        return losses.flatten(1).sum(1)
    elif not target.is_floating_point() and target.shape == logits.shape[:1] + logits.shape[2:]:
        losses = F.cross_entropy(logits, target.long(), reduction="none")
        return losses.flatten(1).sum(1) if losses.dim() > 1 else losses
    raise ValueError(
        f"no classification loss for logits of shape {tuple(logits.shape)} and targets of shape "
        f"{tuple(target.shape)} and type {target.dtype}; say the loss of each example with GuardMixin.guard_losses"
    )
