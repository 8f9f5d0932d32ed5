"""Removal of whole channels as a guard."""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_guard.compression.apart import example_inputs, move, outputs_of, plain_copy
from lightning_guard.compression.reshaping import _Reshaping, selected
from lightning_guard.functional.channels import Coupled, choose, multiplications
from lightning_guard.functional.reshaping import MIXING, apply_plan
from lightning_guard.guard import Batch, GuardConflict, Run, Trait


class ChannelPruning(_Reshaping):
    r"""Takes the least important channels out, so that the network is smaller and faster (Fang et al., 2023).

    Channels that layers add or pass on go together, as torch-pruning finds them. Each removal is exact: the network
    computes what it did with nobody reading those channels, proven on copies with random weights before anything
    changes. What cannot be removed exactly stays whole, and :meth:`notes` says why: outputs, attention heads, and
    whatever a LayerNorm or a GroupNorm of one group normalises. Of other GroupNorms whole groups go.

    Parameters stay the same objects with fewer entries, and optimizers keep the state of what is left. Weights that
    have learnt nothing say nothing about importance: either training begins with trained weights (``checkpoint``), or
    channels go in the middle of it (``start``) and the rest of it recovers accuracy.

    Logs ``guard/channel_pruning/parameters`` and ``guard/channel_pruning/macs``, multiplications an example.

    Args:
        ratio: fraction of the channels that can go that goes, in [0, 1); 0 switches the guard off. Weights and
            multiplications shrink by about its square: 0.5 leaves a quarter.
        scope: ``layer`` takes the same fraction of each layer, ``global`` compares all of them.
        importance: ``magnitude`` of the weights around a channel, ``bn_scale`` of the norm layer behind it (Liu et
            al., 2017), or ``random``.
        round_to: what stays of a layer is rounded up to a multiple of it, since processors compute in such blocks.
        start: when they go, as a fraction of training (float) or in optimizer steps (int).
        targets: names or patterns (``*``) of the layers whose output channels may go; all Linear and convolutions if
            not given.
        ignore: names or patterns of layers that keep theirs.
        checkpoint: path of a checkpoint of the same class whose weights training begins with.
        seed: of ``random``.
        batch: how a batch is read, if the defaults do not fit.

    | case                                              | result                                                    |
    |---------------------------------------------------|-----------------------------------------------------------|
    | ``ratio=0``                                       | training is bit-identical to training without the guard   |
    | the output layer                                  | always whole                                              |
    | layers as narrow as ``round_to``                  | whole                                                     |
    | nothing can go                                    | refused, with each layer's reason                         |
    | ``start`` above 0 with several processes          | refused: DistributedDataParallel has laid out gradients   |
    | ``start`` above 0 with masks or ranges of weights | refused: those guards hold the old shapes                 |
    | resume                                            | shapes are rebuilt before weights load, without the plan  |
    | a module that has lost channels in an earlier fit | refused, or removals would compound                       |

    Raises:
        GuardConflict: before training, if the promise cannot be kept.

    Reference:
        Fang et al., DepGraph: towards any structural pruning, CVPR 2023, arXiv:2301.12900. Liu et al., Learning
        efficient convolutional networks through network slimming, ICCV 2017, arXiv:1708.06519.

    Example:
        >>> import pytorch_lightning as pl
        >>> trainer = pl.Trainer(callbacks=[ChannelPruning(ratio=0.5, start=0.3)], logger=False)
    """

    name: ClassVar[str] = "channel_pruning"
    traits: frozenset[Trait] | None = frozenset({Trait.POST_PROCESSING})
    _verb = "pruned"

    def __init__(
        self,
        ratio: float = 0.5,
        scope: Literal["layer", "global"] = "layer",
        importance: Literal["magnitude", "bn_scale", "random"] = "magnitude",
        round_to: int = 8,
        start: int | float = 0.0,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = (),
        checkpoint: str | None = None,
        seed: int = 0,
        batch: Batch | None = None,
    ):
        if not 0 <= ratio < 1:
            raise ValueError(f"ratio={ratio} is no fraction of channels to take out; give a number in [0, 1)")
        if scope not in ("layer", "global"):
            raise ValueError(f"scope={scope!r} is not known; give 'layer' or 'global'")
        if importance not in ("magnitude", "bn_scale", "random"):
            raise ValueError(f"importance={importance!r} is not known; give 'magnitude', 'bn_scale' or 'random'")
        if round_to < 1:
            raise ValueError(f"round_to={round_to} is no number of channels; give at least 1")
        self.ratio, self.scope, self.importance, self.round_to = ratio, scope, importance, round_to
        self.targets, self.ignore, self.seed, self.batch = targets, ignore, seed, batch
        self._begin_options(start, checkpoint)
        self._example: Any = None
        self._wanted: set[str] = set()

    @property
    def off(self) -> bool:
        return self.ratio == 0

    @property
    def plan(self) -> dict[str, dict[str, list[int]]] | None:
        """The channels that stayed of each layer that lost some; None while none has gone."""
        return None if self._taken is None else self._taken["plan"]

    def problems(self, run: Run) -> Iterable[str]:
        if not self.off and find_spec("torch_pruning") is None:
            yield "channels are found by torch-pruning, which is not installed; pip install 'lightning-guard[prune]'"
        yield from super().problems(run)

    def rewrite(self, module: pl.LightningModule) -> None:
        if self._due and self._run is not None:
            self._example = example_inputs(self._run)
        super().rewrite(module)

    def _take(self, module: pl.LightningModule, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
        plan, left = self._agreed(self._plan(module))
        before = self._size(module)
        apply_plan(module, plan, optimizers)
        return {"plan": plan, "left": left, "before": before, "after": self._size(module)}

    def _size(self, module: pl.LightningModule) -> dict[str, float]:
        copy = plain_copy(module).eval()
        macs = multiplications(copy, move(self._example, module.device), self._forward)
        return {"parameters": float(sum(p.numel() for p in module.parameters())), "macs": macs}

    def _forward(self, module: nn.Module, inputs: Any) -> Tensor:
        assert self._run is not None
        return outputs_of(module, inputs, self._run.batch)

    def _plan(self, module: pl.LightningModule) -> tuple[dict[str, dict[str, list[int]]], dict[str, str]]:
        layers = [name for name, layer in module.named_modules() if isinstance(layer, MIXING)]
        self._wanted = selected(self, layers, self.targets, self.ignore)
        example = move(self._example, module.device)
        with torch.random.fork_rng([module.device] if module.device.type == "cuda" else []):
            try:
                plan, left = choose(
                    plain_copy(module), example, self._forward, self.ratio, self.importance, self.scope,
                    self.round_to, self._spared, self.seed,
                )  # fmt: skip
            except (ValueError, ImportError) as error:
                raise GuardConflict(f"{self.name}: {error}") from error
        if not plan:
            reasons = "; ".join(f"{name}: {why}" for name, why in left.items())
            raise GuardConflict(
                f"{self.name}: no channel of {type(module).__name__} can go with ratio={self.ratio} and "
                f"round_to={self.round_to} ({reasons or 'there are no layers'}); give a smaller round_to, or prune "
                "weights with MagnitudePruning"
            )
        return plan, left

    def _spared(self, group: Coupled) -> str:
        others = [name for name in group.makers if name not in self._wanted]
        if not others:
            return ""
        return f"{', '.join(others)} {'have' if len(others) > 1 else 'has'} the same channels and may not lose them"

    def notes(self) -> list[str]:
        if self._taken is None:
            return []
        before, after, left = (self._taken[key] for key in ("before", "after", "left"))
        said = [
            f"Channels were taken out: {before['parameters']:,.0f} parameters became {after['parameters']:,.0f}, and "
            f"{before['macs']:,.0f} multiplications an example {after['macs']:,.0f}."
        ]
        whole = "; ".join(f"{name} ({why})" for name, why in left.items())
        return said + ([f"These layers kept all their output channels: {whole}."] if whole else [])

    def release(self, module: pl.LightningModule) -> None:
        super().release(module)
        self._example = None
