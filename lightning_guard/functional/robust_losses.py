"""What robust objectives add to a loss: how far two sets of logits are apart, and how sure a wrong class is."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Literal["kl", "squared"]


def divergence(clean: Tensor, moved: Tensor, target: Tensor, kind: Divergence = "kl") -> Tensor:
    r"""How far the predictions for moved inputs are from those for clean ones, one number an example.

    ``kl`` is :math:`\mathrm{KL}(p(x) \,\|\, p(x'))` in nats, ``squared`` the squared difference of the outputs
    themselves, which is the natural distance in regression. The target only says what the logits mean.

    Args:
        clean: logits of the clean inputs.
        moved: logits of the moved inputs, of the same shape.
        target: the target of each example, as for :func:`example_losses`.
        kind: ``kl`` or ``squared``.

    | ``clean``                | ``target``                   | ``kl``                                         |
    |--------------------------|------------------------------|------------------------------------------------|
    | ``(N, C, ...)``, C >= 2  | whole ``(N, ...)``           | of two categorical laws, summed over ``...``   |
    | ``(N, C, ...)``, C >= 2  | floating ``(N, C, ...)``     | of two Bernoulli laws a logit, summed          |
    | ``(N,)`` or ``(N, 1)``   | ``(N,)`` or ``(N, 1)``       | of two Bernoulli laws                          |

    Returns:
        Divergences of shape ``(N,)``, in float32 or wider, at least 0.

    Raises:
        ValueError: if the shapes fit no row, or targets for ``kl`` are no probabilities.

    Reference:
        Zhang et al., Theoretically Principled Trade-off between Robustness and Accuracy, ICML 2019, arXiv:1901.08573.

    Example:
        >>> import torch
        >>> clean, moved = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
        >>> divergence(clean, moved, torch.tensor([0]))
        tensor([0.1201])
        >>> divergence(clean, moved, torch.tensor([0]), "squared")
        tensor([1.])
    """
    clean, moved = _wide(clean), _wide(moved)
    if clean.shape != moved.shape:
        raise ValueError(f"logits of shapes {tuple(clean.shape)} and {tuple(moved.shape)} cannot be compared")
    if kind == "squared":
        return (clean - moved).square().flatten(1).sum(1) if clean.dim() > 1 else (clean - moved).square()
    if _is_multiclass(clean, target):
        laws = F.kl_div(F.log_softmax(moved, 1), F.log_softmax(clean, 1), reduction="none", log_target=True)
        return laws.flatten(1).sum(1)
    if target.numel() != clean.numel():
        raise ValueError(
            f"no divergence for logits of shape {tuple(clean.shape)} and targets of shape {tuple(target.shape)}; "
            "for outputs that are no logits give divergence='squared'"
        )
    if bool(((target < 0) | (target > 1)).any()):
        raise ValueError(
            f"targets range over [{target.min().item():.4g}, {target.max().item():.4g}], outside [0, 1], so the "
            "outputs are no logits; give divergence='squared'"
        )
    yes = F.logsigmoid(clean)
    no = yes - clean  # log sigmoid(-z) = log sigmoid(z) - z
    other = F.logsigmoid(moved)
    laws = yes.exp() * (yes - other) + no.exp() * (no - (other - moved))
    return laws.flatten(1).sum(1) if laws.dim() > 1 else laws


def mart_terms(clean: Tensor, moved: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    r"""The two terms of MART beyond cross-entropy, one number an example each.

    The margin :math:`-\log(1 - \max_{k \ne y} p_k(x'))` pushes down the likeliest wrong class, and
    :math:`\mathrm{KL}(p(x) \,\|\, p(x')) (1 - p_y(x))` asks for the same answer most where the clean input is
    misclassified. For one logit the margin is the cross-entropy itself.

    Args:
        clean: logits of the clean inputs ``(N, C)``, C >= 2, or ``(N,)``, ``(N, 1)``.
        moved: logits of the moved inputs, of the same shape.
        target: whole numbers ``(N,)``; for one logit 0 or 1.

    Returns:
        Margin and weighted divergence, each ``(N,)``, in nats.

    Raises:
        ValueError: if an example has several targets, of which none is "the other classes".

    Reference:
        Wang et al., Improving Adversarial Robustness Requires Revisiting Misclassified Examples, ICLR 2020.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 0.0]])
        >>> mart_terms(logits, logits, torch.tensor([0]))
        (tensor([0.6931]), tensor([0.]))
    """
    clean, moved = _wide(clean), _wide(moved)
    if clean.dim() == 1 or (clean.dim() == 2 and clean.shape[1] == 1):
        clean, moved, target = (part.reshape(-1) for part in (clean, moved, target))
        clean, moved = (torch.stack([torch.zeros_like(part), part], 1) for part in (clean, moved))
    if clean.dim() != 2 or target.shape != clean.shape[:1] or not _whole(target):
        raise ValueError(
            f"mart needs one class an example, not logits of shape {tuple(clean.shape)} and targets of shape "
            f"{tuple(target.shape)} and type {target.dtype}; use objective='trades'"
        )
    y = target.long()[:, None]
    wrong = moved.scatter(1, y, -torch.inf).argmax(1, keepdim=True)
    margin = moved.logsumexp(1) - moved.scatter(1, wrong, -torch.inf).logsumexp(1)
    return margin, divergence(clean, moved, y[:, 0]) * (1 - clean.softmax(1).gather(1, y)[:, 0])


def hits(logits: Tensor, target: Tensor) -> Tensor:
    """The share of an example's decisions that are right, ``(N,)`` in [0, 1]: one decision a class, label or place.

    Raises:
        ValueError: if the shapes are of no classification.

    Example:
        >>> import torch
        >>> hits(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1]))
        tensor([1., 0.])
    """
    if not isinstance(target, Tensor):
        raise ValueError(f"a {type(target).__name__} as target has no accuracy")
    if _is_multiclass(logits, target):
        right, asked = logits.argmax(1) == target, target >= 0  # places of negative target, as -100, are ignored
        share = (right & asked).reshape(len(logits), -1).sum(1) / asked.reshape(len(logits), -1).sum(1)
        return share.nan_to_num(0.0)
    elif target.numel() == logits.numel() and bool(((target >= 0) & (target <= 1)).all()):
        right = (logits.reshape(target.shape) > 0) == (target > 0.5)
    else:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} and targets of shape {tuple(target.shape)} and type {target.dtype} "
            "are no classification, so there is no accuracy"
        )
    return right.float().reshape(len(logits), -1).mean(1)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype.itemsize > 2 else logits.float()


def _whole(target: Tensor) -> bool:
    return not target.is_floating_point() or bool((target == target.round()).all())


def _is_multiclass(logits: Tensor, target: Tensor) -> bool:
    return (
        logits.dim() > 1
        and logits.shape[1] > 1
        and not target.is_floating_point()
        and target.shape == logits.shape[:1] + logits.shape[2:]
    )
