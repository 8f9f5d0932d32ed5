"""A small convolutional network for small images."""

from torch import Tensor, nn

from lightning_guard.models.base import Classifier, Optimizer, Schedule

GROUPS = 8


class SmallCNN(Classifier):
    """Two convolutions with GroupNorm that halve the image twice, and two linear layers.

    ``forward`` takes images of shape ``(N, in_channels, image_size, image_size)`` and returns logits of shape
    ``(N, num_classes)``, or ``(N,)`` for two classes.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        image_size: Height and width of the images, in pixels, at least 4.
        width: Channels of the convolutions, a multiple of 8; the hidden layer behind them has twice as many
            units. The default makes 111,000 parameters.
        dropout: Probability of dropping a hidden unit in front of the last layer.
        lr: Learning rate, its peak with ``schedule="cosine"``.
        weight_decay: Weight decay.
        schedule: ``"constant"`` or ``"cosine"``.
        optimizer: ``"adamw"``, or ``"sgd"`` with momentum 0.9.

    Raises:
        ValueError: ``width`` is no positive multiple of 8, or ``image_size`` is below 4.

    Example:
        >>> import torch
        >>> SmallCNN()(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 28,
        width: int = 32,
        dropout: float = 0.0,
        lr: float = 2e-3,
        weight_decay: float = 0.01,
        schedule: Schedule = "constant",
        optimizer: Optimizer = "adamw",
    ) -> None:
        super().__init__(num_classes, lr, weight_decay, schedule, optimizer)
        if width < 1 or width % GROUPS:
            raise ValueError(f"width={width} must be a positive multiple of {GROUPS}, for GroupNorm")
        if image_size < 4:
            raise ValueError(f"image_size={image_size} must be at least 4; the network halves images twice")
        side = (image_size + 1) // 2 // 2
        # GroupNorm and not BatchNorm: what the network says of an example does not depend on its neighbours.
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, width, kernel_size=5, stride=2, padding=2),
            nn.GroupNorm(GROUPS, width),
            nn.ReLU(),
            nn.Conv2d(width, width, kernel_size=3, padding=1),
            nn.GroupNorm(GROUPS, width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Sequential(
            nn.Linear(width * side * side, 2 * width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(2 * width, self.num_logits),
        )

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.features(x))
        return logits.squeeze(-1) if self.num_logits == 1 else logits


class StridedCNN(Classifier):
    """Two convolutions that halve the image, and two linear layers: no normalisation, no pooling, cheap to attack.

    ``forward`` takes images of shape ``(N, in_channels, image_size, image_size)`` and returns logits of shape
    ``(N, num_classes)``, or ``(N,)`` for two classes. It is meant for adversarial training on one core: an
    input gradient costs a fifth to a third less time than with :class:`SmallCNN`.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        image_size: Height and width of the images, in pixels, at least 4.
        width: Channels of the first convolution; the second has twice as many.
        hidden: Units of the hidden linear layer. The default makes 839,000 parameters.
        dropout: Probability of dropping a feature in front of the hidden layer.
        lr: Learning rate, its peak with ``schedule="cosine"``.
        weight_decay: Weight decay.
        schedule: ``"constant"`` or ``"cosine"``.
        optimizer: ``"adamw"``, or ``"sgd"`` with momentum 0.9.

    Raises:
        ValueError: ``image_size`` is below 4.

    Example:
        >>> import torch
        >>> StridedCNN()(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 28,
        width: int = 32,
        hidden: int = 256,
        dropout: float = 0.0,
        lr: float = 2e-3,
        weight_decay: float = 0.01,
        schedule: Schedule = "constant",
        optimizer: Optimizer = "adamw",
    ) -> None:
        super().__init__(num_classes, lr, weight_decay, schedule, optimizer)
        if image_size < 4:
            raise ValueError(f"image_size={image_size} must be at least 4; the network halves images twice")
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, width, kernel_size=4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, kernel_size=4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(2 * width * (image_size // 4) ** 2, hidden),
            nn.ReLU(),
            nn.Linear(hidden, self.num_logits),
        )

    def forward(self, x: Tensor) -> Tensor:
        logits = self.layers(x)
        return logits.squeeze(-1) if self.num_logits == 1 else logits
