"""By how much to scale each unit's gradient, so that no unit contributes more than its bound."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["flat", "per_layer", "automatic"]


@dataclass(frozen=True)
class Clipping:
    r"""Factors :math:`c_i` with :math:`\|c_i g_i\| \le C` for every unit.

    | kind            | factor                                                                          |
    |-----------------|---------------------------------------------------------------------------------|
    | ``"flat"``      | :math:`\min(1, C / \|g_i\|)` over all parameters (Abadi et al., 2016)            |
    | ``"per_layer"`` | the same in each of G groups with :math:`C / \sqrt G`, together at most C        |
    | ``"automatic"`` | AUTO-S, :math:`C / (\|g_i\| + \gamma)`: C only scales the learning rate          |

    A gradient that is not finite gets factor 0.

    Args:
        kind: which of them.
        stability: :math:`\gamma` of AUTO-S, in units of the gradient norm.

    Reference:
        Abadi et al., Deep learning with differential privacy, CCS 2016, arXiv:1607.00133. McMahan et al., Learning
        differentially private recurrent language models, ICLR 2018, arXiv:1710.06963 (per layer). Bu et al., Automatic
        clipping, NeurIPS 2023, arXiv:2206.07136.

    Example:
        >>> Clipping().factors(torch.tensor([[0.5, 2.0, float("nan")]]), 1.0)
        tensor([[1.0000, 0.5000, 0.0000]])
    """

    kind: Kind = "flat"
    stability: float = 0.01

    def factors(self, norms: Tensor, max_grad_norm: float, margin: float = 0.0) -> Tensor:
        """Factors ``(G, n)`` for gradient norms ``(G, n)``.

        Args:
            norms: of each group and unit.
            max_grad_norm: C.
            margin: clip to ``C * (1 - margin)``, to cover rounding.
        """
        bound = max_grad_norm * (1 - margin) / math.sqrt(len(norms))
        if self.kind == "automatic":
            factors = bound / (norms + self.stability)
        else:
            factors = (bound / norms).clamp(max=1)
        return torch.where(norms.isfinite().all(0), factors, 0.0)


def adapted(max_grad_norm: float, unclipped: float, quantile: float, rate: float) -> float:
    r"""The next bound by a noisy fraction of unclipped units, :math:`C e^{-\eta (b - q)}`.

    Reference:
        Andrew et al., Differentially private learning with adaptive clipping, NeurIPS 2021, arXiv:1905.03871.

    Example:
        >>> adapted(1.0, unclipped=0.5, quantile=0.5, rate=0.2)
        1.0
    """
    return max_grad_norm * math.exp(-rate * (min(max(unclipped, 0.0), 1.0) - quantile))
