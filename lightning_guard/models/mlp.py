"""A multi-layer perceptron for tables."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from lightning_guard.models.base import Classifier, Optimizer, Schedule


class MLP(Classifier):
    """Linear layers with ReLU between them.

    ``forward`` takes ``x`` of shape ``(N, in_features)``, or ``(N, ...)`` that flattens to it, and returns
    logits of shape ``(N, num_classes)``, or ``(N,)`` for two classes.

    With ``knots``, the first layer sees the columns in ``spread`` twice: as they are, and as :func:`hats`. A linear
    model (``hidden=[]``) then bends at the knots. That suits differentially private training: the places of the
    knots are fixed and no row decides them, and noise costs a linear model least.

    Args:
        in_features: Width of the data; ``AdultData.in_features`` for that data.
        hidden: Widths of the hidden layers; none make the model linear.
        num_classes: Number of classes.
        dropout: Probability of dropping a hidden unit.
        lr: Learning rate, its peak with ``schedule="cosine"``.
        weight_decay: Weight decay.
        schedule: ``"constant"`` or ``"cosine"``.
        optimizer: ``"adamw"``, or ``"sgd"`` with momentum 0.9.
        knots: Hat functions that each column in ``spread`` becomes, at least 2, or 0 for none.
        spread: Positions of columns with values in [0, 1]; ``AdultData.continuous`` for that data.

    Raises:
        ValueError: ``knots`` and ``spread`` do not go together, or an input is not ``in_features`` wide.

    Example:
        >>> MLP(in_features=104)(torch.rand(2, 104)).shape
        torch.Size([2])
        >>> MLP(in_features=104, hidden=[], knots=16, spread=[0, 1, 2, 3]).layers
        Sequential(
          (0): Linear(in_features=168, out_features=1, bias=True)
        )
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int] = (64, 64),
        num_classes: int = 2,
        dropout: float = 0.0,
        lr: float = 2e-3,
        weight_decay: float = 0.01,
        schedule: Schedule = "constant",
        optimizer: Optimizer = "adamw",
        knots: int = 0,
        spread: Sequence[int] = (),
    ) -> None:
        super().__init__(num_classes, lr, weight_decay, schedule, optimizer)
        if knots < 0 or knots == 1 or bool(knots) != bool(spread):
            raise ValueError(f"knots={knots} must be at least 2 where spread={list(spread)} names columns, and else 0")
        if len(set(spread)) < len(spread) or not all(0 <= column < in_features for column in spread):
            raise ValueError(f"spread={list(spread)} must be different columns from 0 to {in_features - 1}")
        self.in_features = in_features
        self.knots = knots
        self.spread = list(spread)
        widths = [in_features + knots * len(spread), *hidden]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], self.num_logits))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if x.shape[1] != self.in_features:
            raise ValueError(f"in_features={self.in_features} must be {x.shape[1]}, the width of the data")
        if self.knots:
            x = torch.cat([x, hats(x[:, self.spread], self.knots).flatten(1)], dim=1)
        logits = self.layers(x)
        return logits.squeeze(-1) if self.num_logits == 1 else logits


def hats(x: Tensor, knots: int) -> Tensor:
    """Piecewise linear functions of numbers in [0, 1], each 1 at its knot and 0 from the next knots on.

    With ``K`` knots at ``t_k = k / (K - 1)``, the ``k``-th is ``max(0, 1 - (K - 1) |x - t_k|)``. In [0, 1] they sum
    to one, and their weighted sums are all piecewise linear functions that bend at the knots.

    Args:
        x: Numbers of shape ``(...)``.
        knots: Number of knots, at least 2.

    Returns:
        Values of shape ``(..., knots)``.

    Example:
        >>> hats(torch.tensor([0.0, 0.125, 1.0]), knots=5)
        tensor([[1.0000, 0.0000, 0.0000, 0.0000, 0.0000],
                [0.5000, 0.5000, 0.0000, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.0000, 0.0000, 1.0000]])
    """
    places = torch.arange(knots, dtype=x.dtype, device=x.device)
    return (1 - (x.unsqueeze(-1) * (knots - 1) - places).abs()).clamp(min=0)
