"""Factorisation of layers into thin ones as a guard."""

from collections.abc import Sequence
from typing import Any, ClassVar

import pytorch_lightning as pl
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import Optimizer

from lightning_guard.compression.reshaping import _Reshaping, selected
from lightning_guard.functional.lowrank import check_rank, factorized, rank_of, saves, singular_values
from lightning_guard.functional.reshaping import CONVOLUTIONS, is_pair, replace
from lightning_guard.guard import GuardConflict, Trait

_FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class LowRankFactorization(_Reshaping):
    r"""Splits each Linear and convolution into two thin layers, the best of a given rank (Eckart and Young, 1936).

    .. math:: W \approx U_r \Sigma_r V_r^\top, \qquad r (\mathrm{out} + \mathrm{in}) < \mathrm{out} \cdot \mathrm{in}

    A Linear becomes ``Sequential(Linear(in, r, bias=False), Linear(r, out))``, a convolution one to ``r`` channels with
    a convolution of kernel size 1 behind it: plain layers, which every optimizer, exporter and other guard knows. A
    layer is only split where that saves weights; :meth:`notes` names those left whole.

    Of trained weights (``checkpoint``, or a later ``start``) the factors keep what matters most; of fresh weights they
    are the spectral initialisation of a factorised network (Khodak et al., 2021). Keys of the ``state_dict`` change
    with the layers, ``name.weight`` to ``name.0.weight`` and ``name.1.weight``.

    Logs ``guard/low_rank/parameters``, and ``guard/low_rank/error``, the relative error of the split weights,
    :math:`\sqrt{\sum_l \|W_l - W_{l,r}\|_F^2 / \sum_l \|W_l\|_F^2}`.

    Args:
        rank: of each layer (int), or a fraction of its full rank (float); ``1.0`` switches the guard off. Below the
            number of classes it costs accuracy at once in an output layer: leave that out with ``ignore``.
        energy: instead of ``rank``, the fraction of each weight's squared singular values that is left at least.
        min_rank: what a fraction or an energy gives a layer at least, so that small layers stay whole.
        start: when layers are split, as a fraction of training (float) or in optimizer steps (int). What an optimizer
            knew of a split weight (momentum and the like) begins anew.
        targets: names or patterns (``*``) of layers to split; all Linear and convolutions if not given.
        ignore: names or patterns of layers that stay whole.
        checkpoint: path of a checkpoint of the same class whose weights training begins with.

    | case                                              | result                                                   |
    |---------------------------------------------------|----------------------------------------------------------|
    | ``rank=1.0`` or ``energy=1.0``                    | training is bit-identical to training without the guard  |
    | a rank that saves no weights                      | the layer stays whole                                    |
    | no layer is left to split                         | refused, with each layer's reason                        |
    | grouped and transposed convolutions               | stay whole                                               |
    | layers whose weights others read (fused attention, tied weights) | stay whole                                |
    | ``start`` above 0 with several processes          | refused: DistributedDataParallel has laid out gradients  |
    | ``start`` above 0 with masks or ranges of weights | refused: those guards hold the old shapes                |
    | resume                                            | layers are split before weights load                     |
    | a module that was split in an earlier fit         | refused, or ranks would compound                         |

    Raises:
        GuardConflict: before training, if the promise cannot be kept.

    Reference:
        Eckart and Young, The approximation of one matrix by another of lower rank, Psychometrika 1936. Denil et al.,
        Predicting parameters in deep learning, NeurIPS 2013, arXiv:1306.0543. Khodak et al., Initialization and
        regularization of factorized neural layers, ICLR 2021, arXiv:2105.01029.

    Example:
        >>> import pytorch_lightning as pl
        >>> trainer = pl.Trainer(callbacks=[LowRankFactorization(rank=32, start=0.3)], logger=False)
    """

    name: ClassVar[str] = "low_rank"
    traits: frozenset[Trait] | None = frozenset({Trait.POST_PROCESSING})
    _verb = "factorised"

    def __init__(
        self,
        rank: int | float | None = None,
        energy: float | None = None,
        min_rank: int = 16,
        start: int | float = 0.0,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = (),
        checkpoint: str | None = None,
    ):
        check_rank(rank, energy)
        if min_rank < 1:
            raise ValueError(f"min_rank={min_rank} is no rank; give at least 1")
        self.rank, self.energy, self.min_rank = rank, energy, min_rank
        self.targets, self.ignore = targets, ignore
        self._begin_options(start, checkpoint)

    @property
    def off(self) -> bool:
        whole = self.rank if self.energy is None else self.energy
        return isinstance(whole, float) and whole == 1.0

    def _take(self, module: pl.LightningModule, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
        ranks, left = self._agreed(self._plan(module))
        before = _size(module)
        lost = whole = 0.0
        for name, rank in ranks.items():
            layer = module.get_submodule(name)
            squares = singular_values(layer).square()
            lost, whole = lost + squares[rank:].sum().item(), whole + squares.sum().item()
            pair = factorized(layer, rank)
            replace(module, name, pair)
            self._remember(layer, pair)
        error = (lost / whole) ** 0.5 if whole else 0.0
        return {"ranks": ranks, "left": left, "before": before, "after": {"parameters": _size(module), "error": error}}

    def _plan(self, module: pl.LightningModule) -> tuple[dict[str, int], dict[str, str]]:
        layers = {
            name: layer for name, layer in module.named_modules() if isinstance(layer, (nn.Linear, *CONVOLUTIONS))
        }
        wanted = selected(self, layers, self.targets, self.ignore)
        taken = {
            f"{name}.{key}".lstrip(".")
            for name, layer in module.named_modules()
            if isinstance(layer, _FUSED) or is_pair(layer)
            for key, _ in layer.named_modules()
        }
        owners: dict[nn.Parameter, int] = {}
        for _, parameter in module.named_parameters(remove_duplicate=False):
            owners[parameter] = owners.get(parameter, 0) + 1
        ranks: dict[str, int] = {}
        left: dict[str, str] = {}
        for name in sorted(wanted, key=list(layers).index):
            layer: Any = layers[name]
            if name in taken:
                left[name] = "the layer around it reads its weights"
            elif is_parametrized(layer) or "weight" not in layer._parameters:
                left[name] = "its weight is computed from other parameters"
            elif owners[layer.weight] > 1:
                left[name] = "it shares its weight"
            elif not isinstance(layer, nn.Linear) and layer.groups > 1:
                left[name] = f"it is a convolution in {layer.groups} groups"
            elif not saves(layer, rank := self._rank(layer)):
                left[name] = f"rank {rank} saves no weights"
            else:
                ranks[name] = rank
        if not ranks:
            reasons = "; ".join(f"{name}: {why}" for name, why in left.items())
            asked = f"rank={self.rank}" if self.energy is None else f"energy={self.energy}"
            raise GuardConflict(
                f"{self.name}: no layer of {type(module).__name__} can be split with {asked} "
                f"({reasons or 'there is no Linear and no convolution'}); give less"
            )
        return ranks, left

    def _rank(self, layer: nn.Module) -> int:
        rank = rank_of(layer, self.rank, self.energy)
        if isinstance(self.rank, int):
            return rank
        return min(max(rank, self.min_rank), rank_of(layer, 1.0))

    def notes(self) -> list[str]:
        if self._taken is None:
            return []
        ranks = ", ".join(f"{name} to rank {rank}" for name, rank in self._taken["ranks"].items())
        before, after = self._taken["before"], self._taken["after"]
        said = [
            f"Layers were split, {ranks}: {before:,.0f} parameters became {after['parameters']:,.0f}, with a relative "
            f"error of {after['error']:.1%} in these weights at that time."
        ]
        whole = "; ".join(f"{name} ({why})" for name, why in self._taken["left"].items())
        return said + ([f"These layers stayed whole: {whole}."] if whole else [])


def _size(module: nn.Module) -> float:
    return float(sum(parameter.numel() for parameter in module.parameters()))
