"""Weights that follow the group that is worst off."""

import torch
from torch import Tensor


def group_weights(
    weights: Tensor,
    group_losses: Tensor,
    counts: Tensor,
    step_size: float,
    adjustment: float = 0.0,
    sizes: Tensor | None = None,
) -> Tensor:
    r"""One step of exponentiated gradient ascent towards the group with the largest loss.

    .. math:: q_g \leftarrow \frac{q_g \exp(\eta (\ell_g + C / \sqrt{n_g}))}{\sum_h q_h \exp(\ldots)}

    Args:
        weights: :math:`q`, ``(G,)``, at least 0, of sum 1.
        group_losses: mean loss of each group in the batch :math:`\ell_g`, ``(G,)``, nats; whatever where absent.
        counts: examples of each group in the batch, ``(G,)``.
        step_size: :math:`\eta`, per nat.
        adjustment: :math:`C`, nats; small groups generalise worse, so they are made to look worse in training.
        sizes: examples of each group in the training data :math:`n_g`, ``(G,)``; needed for an adjustment.

    Returns:
        Weights ``(G,)`` in float64, of sum 1, without a gradient.

    | case                           | result                                                     |
    |--------------------------------|------------------------------------------------------------|
    | a group absent from the batch  | its exponent is 0: unchanged but for the normalisation     |
    | a loss that is not finite      | as if absent, so that one overflow does not end the weights |
    | ``step_size=0``                | unchanged                                                  |

    Raises:
        ValueError: if an adjustment is asked for without sizes.

    Reference:
        Sagawa, Koh, Hashimoto and Liang, Distributionally Robust Neural Networks for Group Shifts, ICLR 2020,
        arXiv:1911.08731.

    Example:
        >>> half = torch.tensor([0.5, 0.5])
        >>> group_weights(half, torch.tensor([1.0, 0.0]), torch.tensor([3, 3]), step_size=1.0)
        tensor([0.7311, 0.2689], dtype=torch.float64)
    """
    losses = group_losses.detach().double()
    if adjustment:
        if sizes is None:
            raise ValueError(f"adjustment={adjustment} needs the sizes of the groups in the training data")
        losses = losses + adjustment / sizes.to(losses).clamp_min(1).sqrt()
    moves = torch.where((counts > 0) & losses.isfinite(), step_size * losses, 0.0)
    # In logarithms, because exp overflows; clamped, because a weight of exactly 0 would never return.
    weights = weights.detach().to(losses).clamp_min(torch.finfo(torch.float64).tiny)
    return torch.softmax(weights.log() + moves, 0)
