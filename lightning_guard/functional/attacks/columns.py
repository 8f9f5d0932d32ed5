"""Columns of a table that take no value in between: categories and whole numbers."""

from collections.abc import Sequence

import torch
from torch import Tensor

Groups = Sequence[Sequence[int]]


def hottest(values: Tensor, groups: Groups) -> Tensor:
    """Which of its group is largest, ``(N, G)``, counted within the group.

    Example:
        >>> hottest(torch.tensor([[0.0, 1.0, 1.0, 0.0, 0.0]]), [(0, 1), (2, 3, 4)])
        tensor([[1, 0]])
    """
    return torch.stack([values[:, list(group)].argmax(1) for group in groups], dim=1)


def best_switches(score: Tensor, was: Tensor, groups: Groups, switches: int, frozen: Tensor) -> Tensor:
    """The categories of highest score, where at most ``switches`` groups may leave their own.

    Args:
        score: of every category ``(N, D)``, comparable across groups by its excess over the present category's.
        was: the present categories ``(N, G)``, counted within the group.
        groups: columns of each group.
        switches: groups that may change.
        frozen: groups that may not ``(N, G)``.

    Returns:
        Categories ``(N, G)``. A group stays unless another category scores strictly higher.

    Example:
        >>> score = torch.tensor([[0.0, 1.0, 0.0, 3.0]])
        >>> best_switches(score, torch.tensor([[0, 0]]), [(0, 1), (2, 3)], 1, torch.zeros(1, 2).bool())
        tensor([[0, 1]])
    """
    best = hottest(score, groups)
    columns = [score[:, list(group)] for group in groups]
    gain = torch.stack(
        [(part.gather(1, best[:, [g]]) - part.gather(1, was[:, [g]])).squeeze(1) for g, part in enumerate(columns)],
        dim=1,
    ).masked_fill(frozen, 0)
    top = gain.topk(min(switches, len(groups)), dim=1).indices
    chosen = torch.zeros_like(frozen.expand_as(gain)).scatter(1, top, True)
    return torch.where(chosen & (gain > 0), best, was)


def put(x: Tensor, groups: Groups, was: Tensor, categories: Tensor, cold: Tensor, hot: Tensor) -> Tensor:
    """``x`` ``(N, D)`` with these categories ``(N, G)``; groups that keep theirs stay bit for bit.

    Args:
        x: inputs.
        groups: columns of each group.
        was: the categories of ``x``.
        categories: those to take.
        cold: what every column ``(D,)`` holds for "no".
        hot: what every column ``(D,)`` holds for "yes".
    """
    x = x.clone()
    for g, group in enumerate(groups):
        columns = list(group)
        yes = torch.nn.functional.one_hot(categories[:, g], len(columns)).bool()
        switched = (categories[:, g] != was[:, g]).unsqueeze(1)
        x[:, columns] = torch.where(switched, torch.where(yes, hot[columns], cold[columns]), x[:, columns])
    return x


def whole_steps(moved: Tensor, x: Tensor, std: Tensor) -> Tensor:
    """``moved`` at a whole number of raw units from ``x``, rounded toward ``x``; ``x`` itself below one unit.

    Args:
        moved: inputs ``(N, D)``.
        x: where they come from.
        std: raw units of one unit of ``x``.

    Example:
        >>> whole_steps(torch.tensor([[0.99, -2.5]]), torch.zeros(1, 2), torch.ones(()))
        tensor([[ 0., -2.]])
    """
    delta = (moved - x) * std
    # A quarter: what is taken for whole must still be taken for inside the ball.
    steps = delta.sign() * (delta.abs() + slack(x * std) / 4).floor()
    return torch.where(steps == 0, x, x + steps / std)


def slack(size: Tensor) -> Tensor:
    """How far rounding may carry values of this size from a whole number; never as far as to be taken for a step."""
    return (16 * torch.finfo(size.dtype).eps * (1 + size.abs())).clamp_max(0.01)
