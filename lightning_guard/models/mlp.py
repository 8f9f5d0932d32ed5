"""A multi-layer perceptron for tables."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from lightning_guard.models.base import Classifier, Schedule


class MLP(Classifier):
    """Linear layers with ReLU between them.

    ``forward`` takes ``x`` of shape ``(N, in_features)``, or ``(N, ...)`` that flattens to it, and returns
    logits of shape ``(N, num_classes)``, or ``(N,)`` for two classes.

    Args:
        in_features: Width of the input; ``AdultData.in_features`` for that data.
        hidden: Widths of the hidden layers; none make the model linear.
        num_classes: Number of classes.
        dropout: Probability of dropping a hidden unit.
        lr: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        schedule: ``"constant"`` or ``"cosine"``.

    Raises:
        ValueError: An input is not ``in_features`` wide.

    Example:
        >>> import torch
        >>> MLP(in_features=104)(torch.rand(2, 104)).shape
        torch.Size([2])
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
    ) -> None:
        super().__init__(num_classes, lr, weight_decay, schedule)
        self.in_features = in_features
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise([in_features, *hidden]):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear([in_features, *hidden][-1], self.num_logits))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if x.shape[1] != self.in_features:
            raise ValueError(f"in_features={self.in_features} must be {x.shape[1]}, the width of the data")
        logits = self.layers(x)
        return logits.squeeze(-1) if self.num_logits == 1 else logits
