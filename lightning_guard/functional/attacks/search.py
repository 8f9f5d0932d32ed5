"""An attack without gradients, for tables and for models that have none."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_guard.functional.attacks.objectives import margin
from lightning_guard.functional.attacks.threat import ThreatModel

ROWS = 8192
"""Rows of one forward pass, to bound memory."""


@torch.no_grad()
def search(
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    tries: int = 100,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Greedy search for a point that the model gets wrong, by its outputs alone.

    It takes, in turn and twice: the best switch of each group of categories (all of a group are tried), then
    numbers: each column at both its ends, as far as ``tries`` allow, then random corners and random points. What
    raises the margin of the best wrong class is kept, so a point never gets worse. It needs no gradient and respects
    categories, whole numbers and monotone columns, which gradient attacks only approach: together they are the
    minimal test of a defence of tables (Simonetto et al., 2024).

    Args:
        forward: maps inputs ``(N, ...)`` to logits ``(N,)``, ``(N, 1)`` or ``(N, C)``.
        x: inputs ``(N, ...)`` as the network sees them.
        y: right classes ``(N,)``.
        threat: what the attacker may do.
        tries: numeric points tried for each example; categories come on top.
        generator: where random points are drawn from.

    Returns:
        Inputs ``(N, ...)`` inside the threat model: the first found that is wrong, else that of the highest margin.

    | case                             | result                                 |
    |----------------------------------|----------------------------------------|
    | an example that is wrong already | it stays                               |
    | ``x`` of no rows                 | ``x``, and ``forward`` is not called   |
    | logits that are no number        | count as wrong                         |

    Raises:
        ValueError: for a negative number of ``tries``.

    Reference:
        Simonetto et al., Constrained Adaptive Attack: Effective Adversarial Attack Against Deep Neural Networks for
        Tabular Data, NeurIPS 2024, arXiv:2406.00775.

    Example:
        >>> threat = ThreatModel(eps=1.0, one_hot=[(1, 2)], integer=(0,))
        >>> forward = lambda x: 2 * x[:, 0] + 3 * x[:, 2] - 4  # one logit
        >>> search(forward, torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([0]), threat)
        tensor([[1., 0., 1.]])
    """
    if tries < 0:
        raise ValueError(f"tries={tries} is no number of points; give at least 0")
    x = x.detach()
    if not len(x):
        return x
    state = _State(forward, x, y, threat)
    for half in (tries - tries // 2, tries // 2):
        state.switch_categories()
        state.move_numbers(half, generator)
    state.switch_categories()
    return state.best


class _State:
    """The best point of each example so far, and its margin."""

    def __init__(self, forward: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, threat: ThreatModel):
        self.forward, self.x, self.y, self.threat = forward, x, y, threat
        self.best, self.height = x.clone(), self.margins(x, y)

    def margins(self, moved: Tensor, y: Tensor) -> Tensor:
        parts = zip(moved.split(ROWS), y.split(ROWS), strict=True)
        return torch.cat([margin(self.forward(part), classes).nan_to_num(nan=torch.inf) for part, classes in parts])

    def offer(self, rows: Tensor, moved: Tensor) -> None:
        """Keep those of ``moved`` that are better than the best of their ``rows`` (each named once)."""
        height = self.margins(moved, self.y[rows])
        better = height > self.height[rows]
        self.best[rows[better]], self.height[rows[better]] = moved[better], height[better]

    def standing(self) -> Tensor:
        """Rows that the model still gets right."""
        return (self.height <= 0).nonzero()[:, 0]

    def switch_categories(self) -> None:
        """From the categories of ``x`` and the best numbers, one best switch after the other."""
        rows = self.standing()
        if not len(rows) or not self.threat.one_hot:
            return
        threat, x, numbers = self.threat, self.x[rows], self.best[rows]
        categories = threat.categories(x)
        height = self.margins(threat.with_categories(x, categories, numbers), self.y[rows])
        for _ in range(threat.switches):
            height_of, best = self._best_categories(rows, numbers, categories)
            top, group = height_of.max(1, keepdim=True)
            better = top[:, 0] > height
            if not better.any():
                break
            switched = categories.scatter(1, group, best.gather(1, group))
            categories = torch.where(better[:, None], switched, categories)
            height = torch.maximum(height, top[:, 0])
        self.offer(rows, threat.with_categories(x, categories, numbers))

    def _best_categories(self, rows: Tensor, numbers: Tensor, categories: Tensor) -> tuple[Tensor, Tensor]:
        """The best margin of each group's categories, all else equal, and which it is, both ``(R, G)``."""
        frozen, found = self.threat.frozen(self.x[rows]), []
        for g, group in enumerate(self.threat.one_hot or ()):
            size = len(group)
            many = torch.arange(len(rows), device=rows.device).repeat_interleave(size)
            tried = categories[many]
            tried[:, g] = torch.arange(size, device=rows.device).repeat(len(rows))
            moved = self.threat.with_categories(self.x[rows][many], tried, numbers[many])
            found.append(self.margins(moved, self.y[rows][many]).reshape(-1, size).max(1))
        heights = torch.stack([one.values for one in found], dim=1)
        return heights.masked_fill(frozen, -torch.inf), torch.stack([one.indices for one in found], dim=1)

    def move_numbers(self, tries: int, generator: torch.Generator | None) -> None:
        scale = self.threat.scale(self.x).expand_as(self.x[:1]).flatten()
        columns = scale.nonzero()[:, 0].tolist()
        if not columns or not self.threat.eps:
            return
        ends = [(column, sign) for column in columns for sign in (1, -1)] if 2 * len(columns) <= tries else []
        for attempt in range(tries):
            rows = self.standing()
            if not len(rows):
                return
            x, best = self.x[rows], self.best[rows]
            if attempt < len(ends):
                column, sign = ends[attempt]
                moved = best.flatten(1).clone()
                moved[:, column] = x.flatten(1)[:, column] + sign * self.threat.eps * scale[column]
                moved = moved.reshape(x.shape)
            elif attempt % 2:
                moved = self._corner(x, best, generator)
            else:
                moved = self.threat.relaxed().draw(x, generator)
                moved = self._with_categories(moved, best)
            self.offer(rows, self.threat.project(moved, x))

    def _corner(self, x: Tensor, best: Tensor, generator: torch.Generator | None) -> Tensor:
        """The best points with a random share of columns at random ends."""
        share = torch.rand(len(x), *[1] * (x.dim() - 1), dtype=x.dtype, device=x.device, generator=generator)
        signs = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator).sub_(0.5).sign()
        taken = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator) < share
        end = x + signs * (self.threat.eps * self.threat.scale(x))
        return self._with_categories(torch.where(taken, end, best), best)

    def _with_categories(self, moved: Tensor, best: Tensor) -> Tensor:
        hot = self.threat._hot
        if hot:
            moved[:, hot] = best[:, hot]
        return moved
