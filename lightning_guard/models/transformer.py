"""A small vision transformer (Dosovitskiy et al., 2021, https://arxiv.org/abs/2010.11929)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_guard.models.base import Classifier, Optimizer, Schedule


class SmallTransformer(Classifier):
    """Patches of an image as tokens, pre-norm transformer blocks, and a linear layer over all tokens.

    Tokens side by side, and not their mean: it learns more from a few thousand images.

    ``forward`` takes images of shape ``(N, in_channels, image_size, image_size)`` and returns logits of shape
    ``(N, num_classes)``, or ``(N,)`` for two classes.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        image_size: Height and width of the images, in pixels.
        patch_size: Height and width of a token, in pixels; divides ``image_size``. The defaults make 16
            tokens and 115,000 parameters.
        dim: Width of a token; a multiple of ``heads``.
        depth: Number of blocks.
        heads: Attention heads of a block.
        dropout: Probability of dropping a unit at the end of each branch.
        lr: Learning rate, its peak with ``schedule="cosine"``.
        weight_decay: Weight decay.
        schedule: ``"constant"`` or ``"cosine"``.
        optimizer: ``"adamw"``, or ``"sgd"`` with momentum 0.9.

    Raises:
        ValueError: ``patch_size`` does not divide ``image_size``, or ``heads`` does not divide ``dim``.

    Example:
        >>> SmallTransformer()(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 28,
        patch_size: int = 7,
        dim: int = 64,
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
        lr: float = 2e-3,
        weight_decay: float = 0.01,
        schedule: Schedule = "constant",
        optimizer: Optimizer = "adamw",
    ) -> None:
        super().__init__(num_classes, lr, weight_decay, schedule, optimizer)
        if image_size % patch_size:
            raise ValueError(f"patch_size={patch_size} must divide image_size={image_size}")
        if dim % heads:
            raise ValueError(f"heads={heads} must divide dim={dim}")
        self.patch_size = patch_size
        # A strided convolution in other words: as a matrix product its gradient to the image costs a tenth on a CPU.
        self.patches = nn.Linear(in_channels * patch_size**2, dim)
        tokens = (image_size // patch_size) ** 2
        self.positions = nn.Embedding(tokens, dim)
        # torch draws embeddings from N(0, 1), which would drown the patches.
        nn.init.normal_(self.positions.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(dim, heads, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(tokens * dim, self.num_logits)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.unflatten(3, (-1, self.patch_size)).unflatten(
            2, (-1, self.patch_size)
        )  # N C rows height columns width
        tokens = self.patches(rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        # One index an example, so that this layer has a batch dimension like all the others.
        places = torch.arange(tokens.shape[1], device=x.device).expand(tokens.shape[:2])
        tokens = self.blocks(tokens + self.positions(places))
        logits = self.head(self.norm(tokens).flatten(1))
        return logits.squeeze(-1) if self.num_logits == 1 else logits


class Block(nn.Module):
    """Self-attention and a two-layer perceptron, each behind a LayerNorm and beside a residual connection.

    Plain ``nn.Linear`` layers throughout. ``nn.TransformerEncoderLayer`` keeps bare parameters, and takes a
    fused path around its layers in evaluation; here whoever replaces or hooks a Linear meets every weight.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.mix = nn.Linear(dim, dim)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attend(self.norm_attention(x)))
        return x + self.dropout(self.mlp(self.norm_mlp(x)))

    def attend(self, x: Tensor) -> Tensor:
        """Multi-head self-attention, ``(N, T, dim)`` to ``(N, T, dim)``."""
        n, t, dim = x.shape
        q, k, v = self.query_key_value(x).view(n, t, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        return self.mix(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, dim))
