"""What an evaluation attack climbs: objectives of each example, which stay steep however sure the model is."""

import torch
from torch import Tensor


def classes(logits: Tensor) -> Tensor:
    """Logits as ``(N, C)`` with C >= 2, in float32 or wider; one logit ``z`` an example becomes ``[0, z]``.

    Raises:
        ValueError: for logits of another shape.

    Example:
        >>> classes(torch.tensor([2.0, -1.0]))
        tensor([[ 0.,  2.],
                [ 0., -1.]])
    """
    logits = logits if logits.dtype.itemsize > 2 else logits.float()
    if logits.dim() == 1 or (logits.dim() == 2 and logits.shape[1] == 1):
        logits = logits.reshape(-1)
        return torch.stack([torch.zeros_like(logits), logits], 1)
    if logits.dim() != 2:
        raise ValueError(f"logits of shape {tuple(logits.shape)} say no class; give (N,), (N, 1) or (N, C)")
    return logits


def fooled(logits: Tensor, y: Tensor) -> Tensor:
    """Which examples ``(N,)`` are not given their class ``y``; logits that are no number are never right.

    Example:
        >>> fooled(torch.tensor([[1.0, 3.0], [1.0, 3.0]]), torch.tensor([1, 0]))
        tensor([False,  True])
    """
    logits = classes(logits)
    return (logits.argmax(1) != y) | logits.isnan().any(1)


def log_odds(logits: Tensor, y: Tensor) -> Tensor:
    r"""Cross-entropy as an attacker should climb it: the log-odds against the right class.

    .. math:: m = \log \sum_{i \ne y} e^{z_i} - z_y, \qquad \mathrm{CE} = \log(1 + e^m)

    Cross-entropy is a strictly increasing function of :math:`m`, so both have the same order and the same direction
    of ascent. Only :math:`m` keeps a gradient where the model is so sure that cross-entropy rounds to 0.

    Args:
        logits: ``(N, C)``, ``(N, 1)`` or ``(N,)``.
        y: right classes ``(N,)``.

    Returns:
        Values ``(N,)`` in nats; with two classes positive is wrong.

    Example:
        >>> log_odds(torch.tensor([[2e4, 0.0, 1e4]]), torch.tensor([0]))
        tensor([-10000.])
    """
    logits = classes(logits)
    return _without(logits, y).logsumexp(1) - _at(logits, y)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """How far the best wrong logit is above the right one ``(N,)``; positive is wrong (Carlini & Wagner, 2017).

    Reference:
        Carlini & Wagner, Towards Evaluating the Robustness of Neural Networks, S&P 2017, arXiv:1608.04644.

    Example:
        >>> margin(torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([1]))
        tensor([-2.])
    """
    logits = classes(logits)
    return _without(logits, y).amax(1) - _at(logits, y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    r"""Difference of logits ratio (Croce & Hein, 2020): the margin in units of the logits' own spread.

    .. math:: -\frac{z_y - \max_{i \ne y} z_i}{z_{\pi_1} - z_{\pi_3}}

    where :math:`\pi` sorts the logits from high to low. Neither shift nor scale of the logits changes it.

    | classes   | divisor                                                                                     |
    |-----------|---------------------------------------------------------------------------------------------|
    | 3 or more | as above, at least 1e-12                                                                    |
    | 2         | 1: the only scale of two logits is their margin, and its order and direction have none anyway |

    Args:
        logits: ``(N, C)``, ``(N, 1)`` or ``(N,)``.
        y: right classes ``(N,)``.

    Returns:
        Values ``(N,)``; positive is wrong.

    Reference:
        Croce & Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
        attacks, ICML 2020, arXiv:2003.01690.

    Example:
        >>> z = torch.tensor([[4.0, 2.0, 0.0, -9.0]])
        >>> dlr(z, torch.tensor([0])), dlr(1e4 * z, torch.tensor([0]))
        (tensor([-0.5000]), tensor([-0.5000]))
    """
    logits = classes(logits)
    if logits.shape[1] == 2:
        return margin(logits, y)
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / _positive(top[:, 0] - top[:, 2])


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    r"""Difference of logits ratio towards one wrong class (Croce & Hein, 2020).

    .. math:: -\frac{z_y - z_t}{z_{\pi_1} - (z_{\pi_3} + z_{\pi_4}) / 2}

    With three classes :math:`z_{\pi_3}` takes the place of :math:`z_{\pi_4}`; with two it is :func:`dlr`.

    Args:
        logits: ``(N, C)``, ``(N, 1)`` or ``(N,)``.
        y: right classes ``(N,)``.
        target: wrong classes ``(N,)``.

    Returns:
        Values ``(N,)``; positive is wrong.

    Example:
        >>> targeted_dlr(torch.tensor([[4.0, 2.0, 1.0, -1.0]]), torch.tensor([0]), torch.tensor([3]))
        tensor([-1.2500])
    """
    logits = classes(logits)
    gap = _at(logits, target) - _at(logits, y)
    if logits.shape[1] == 2:
        return gap
    top = logits.topk(min(4, logits.shape[1]), dim=1).values
    return gap / _positive(top[:, 0] - (top[:, 2] + top[:, -1]) / 2)


def ranking(logits: Tensor, y: Tensor) -> Tensor:
    """The wrong classes of each example ``(N, C - 1)``, the most likely first.

    Example:
        >>> ranking(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([2]))
        tensor([[1, 0]])
    """
    logits = classes(logits)
    order = logits.nan_to_num().argsort(dim=1, descending=True, stable=True)
    return order[order != y[:, None]].reshape(len(logits), -1)


def input_gradient(value: Tensor, x: Tensor) -> Tensor:
    """Of the sum of the values ``(N,)``; 0 where it is no number, and everywhere if the model detached its input."""
    if not value.requires_grad:
        return torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(value.sum(), x, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient.nan_to_num()


def _at(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y[:, None])[:, 0]


def _without(logits: Tensor, y: Tensor) -> Tensor:
    return logits.scatter(1, y[:, None], -torch.inf)


def _positive(divisor: Tensor) -> Tensor:
    return divisor.clamp_min(1e-12)
