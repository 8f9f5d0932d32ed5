"""Gradual magnitude pruning as a guard."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import Optimizer

from lightning_guard.functional import bit_mask, clear_, cubic_sparsity, magnitude_masks, pack_mask, unpack_mask
from lightning_guard.guard import Guard, GuardConflict, Phase, Run, Trait, callbacks_of

_PRUNABLE = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.MultiheadAttention,
)  # fmt: skip
_SPARED = (nn.Embedding, nn.EmbeddingBag)


class MagnitudePruning(Guard):
    r"""Sets the smallest weights to zero and keeps them there, to an exact sparsity (Zhu and Gupta, 2017).

    The fraction dropped grows with the optimizer's steps, :math:`s_t = s (1 - (1 - t)^3)`, from ``start`` to ``end``.
    Weights are masked right after every optimizer step, so no momentum or weight decay revives them and whoever looks
    at the model between steps (validation, checkpoints, averaging) sees it sparse. What a checkpoint stores and what
    is left after training is masked too, averaged weights included. Masks live outside the module: ``state_dict``
    keys do not change.

    Zeros make a model compressible, not small or fast by themselves: measure the file that you ship.

    Logs ``guard/magnitude_pruning/sparsity``, the fraction of prunable weights that is masked.

    Args:
        sparsity: fraction of the prunable weights to drop in the end, in [0, 1); 0 switches the guard off.
        scope: ``global`` compares all weights, ``layer`` drops the same fraction of each layer.
        start: when to begin, as a fraction of training (float) or in optimizer steps (int).
        end: when the final sparsity is reached, as a fraction of training (float) or in optimizer steps (int).
        every: optimizer steps between two updates of the masks.
        targets: names or patterns (``*``) of modules to prune; None is all that can be pruned (Linear, convolution,
            attention projections).
        ignore: names or patterns (``*``) of modules to leave alone.

    | case                                    | result                                              |
    |-----------------------------------------|-----------------------------------------------------|
    | ``sparsity=0``                          | training is bit-identical to training without the guard |
    | a pattern that matches nothing          | refused, with the names that there are              |
    | training ends before ``end``            | refused if it can be known, else a warning at the end |
    | optimizers replaced in training         | refused                                             |
    | norms, biases, embeddings               | never pruned, nor is a weight shared with an embedding |
    | weights frozen or in no optimizer       | left alone: nothing could recover from their loss   |
    | ... that are trained later on           | refused                                             |
    | a weight shared by two modules          | masked once, and left alone if one of them is ignored |
    | weight_norm and other parametrisations  | refused: the weight itself is computed anew in every pass |
    | uninitialised (lazy) weights            | refused                                             |

    Raises:
        GuardConflict: before training, if the promise cannot be kept.

    Reference:
        Zhu and Gupta, To Prune, or Not to Prune, 2017, arXiv:1710.01878.

    Example:
        >>> import pytorch_lightning as pl
        >>> trainer = pl.Trainer(callbacks=[MagnitudePruning(sparsity=0.9, ignore=["head"])], logger=False)
    """

    name: ClassVar[str] = "magnitude_pruning"
    phase: ClassVar[Phase] = Phase.WEIGHTS
    traits: frozenset[Trait] | None = frozenset({Trait.POST_PROCESSING})

    def __init__(
        self,
        sparsity: float = 0.8,
        scope: Literal["global", "layer"] = "global",
        start: int | float = 0.0,
        end: int | float = 0.5,
        every: int = 10,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = (),
    ):
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity={sparsity} is no fraction of weights to drop; give a number in [0, 1)")
        if scope not in ("global", "layer"):
            raise ValueError(f"scope={scope!r} is not known; give 'global' or 'layer'")
        for option, value in (("start", start), ("end", end)):
            if value < 0 or (isinstance(value, float) and value > 1):
                raise ValueError(f"{option}={value} is no time; give a fraction in [0.0, 1.0] or a number of steps")
        if type(start) is type(end) and start > end:
            raise ValueError(f"start={start} comes after end={end}; give an earlier start")
        if every < 1:
            raise ValueError(f"every={every} never updates the masks; give at least 1 optimizer step")
        self.sparsity, self.scope = sparsity, scope
        self.start, self.end, self.every = start, end, every
        self.targets, self.ignore = targets, ignore
        self.reached = 0.0  # fraction of the prunable weights that is masked now
        self._steps = 0
        self._window: tuple[int, int] | None = None
        self._run: Run | None = None
        self._weights: dict[str, nn.Parameter] = {}
        self._left: dict[str, nn.Parameter] = {}  # would be pruned, but nothing trains them
        self._aliases: dict[str, str] = {}  # every name of a weight in the state dict
        self._dropped: dict[str, Tensor] = {}
        self._bits: dict[str, Tensor] = {}  # the same for `clear_`
        self._optimizers: list[int] = []
        self._packed: Mapping[str, Tensor] | None = None  # restored, not yet on the weights' device

    def problems(self, run: Run) -> Iterable[str]:
        if self.sparsity and run.endless and (isinstance(self.start, float) or isinstance(self.end, float)):
            yield (
                f"start={self.start} and end={self.end} are fractions of a training without end; "
                "set max_epochs or max_steps on the Trainer, or give optimizer steps"
            )
        if isinstance(self.end, int) and 0 <= run.trainer.max_steps < self.end:
            yield (
                f"end={self.end} comes after the last optimizer step, max_steps={run.trainer.max_steps}, so "
                f"sparsity={self.sparsity} is never reached; train longer or give an earlier end"
            )

    def begin(self, run: Run) -> None:
        self._run, self._window, self._bits = run, None, {}
        self._optimizers = [id(optimizer) for optimizer in run.trainer.optimizers]
        packed, self._packed = self._packed, None
        timed = isinstance(self.start, float) or isinstance(self.end, float)
        if self.sparsity and timed and len(run.trainer.optimizers) > 1:
            raise GuardConflict(
                f"{self.name}: start={self.start} and end={self.end} are fractions of training, which several "
                "optimizers may step at different times; give optimizer steps of the one that trains the first layer"
            )
        self._weights, self._left = self._select(run) if self.sparsity else ({}, {})
        names = {weight: name for name, weight in self._weights.items()}
        every = run.module.named_parameters(remove_duplicate=False)
        self._aliases = {alias: names[weight] for alias, weight in every if weight in names}
        if packed is not None:
            if set(packed) != set(self._weights):
                raise GuardConflict(
                    f"{self.name}: the checkpoint masks {', '.join(packed) or 'nothing'}, but the weights to "
                    f"prune are now {', '.join(self._weights)}; resume with the same model, targets and ignore"
                )
            self._dropped = {
                name: unpack_mask(packed[name], weight.shape).to(weight.device)
                for name, weight in self._weights.items()
            }
        else:
            self._steps, self.reached = 0, 0.0
            self._dropped = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in self._weights.items()}

    def _select(self, run: Run) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """The weights to prune, and those that would be if anything trained them."""
        module = run.module
        layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, _PRUNABLE)}
        for option, patterns in (("targets", self.targets or ()), ("ignore", self.ignore)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in layers):
                    raise GuardConflict(
                        f"{self.name}: {option}={pattern!r} matches nothing that can be pruned; "
                        f"there are {', '.join(layers) or 'no Linear and no convolution'}"
                    )
        owned = {p for optimizer in run.trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        ignored = {name for name in layers if any(fnmatchcase(name, pattern) for pattern in self.ignore)}
        spared = {p for layer in module.modules() if isinstance(layer, _SPARED) for p in layer.parameters(False)}
        spared |= {p for name in ignored for p in layers[name].parameters(False)}
        weights: dict[str, nn.Parameter] = {}
        left: dict[str, nn.Parameter] = {}
        seen = set(spared)
        for name, layer in layers.items():
            wanted = self.targets is None or any(fnmatchcase(name, pattern) for pattern in self.targets)
            if not wanted or name in ignored:
                continue
            made = "weight" not in layer._parameters and not isinstance(layer, nn.MultiheadAttention)
            if made or is_parametrized(layer):
                raise GuardConflict(
                    f"{self.name}: the weight of {name} is computed from other parameters (weight_norm, spectral_norm, "
                    f"torch.nn.utils.prune), so no mask holds it; remove that, or give ignore=[{name!r}]"
                )
            for key, weight in layer.named_parameters(recurse=False):
                if "bias" in key or weight in seen:
                    continue
                if is_lazy(weight):
                    raise GuardConflict(
                        f"{self.name}: {name}.{key} has no shape yet; pass an example through the lazy modules before "
                        "training, e.g. at the end of __init__"
                    )
                seen.add(weight)
                full = f"{name}.{key}".lstrip(".")
                (weights if weight.requires_grad and weight in owned else left)[full] = weight
        finetunes = [c for c in callbacks_of(run.trainer) if "BaseFinetuning" in {k.__name__ for k in type(c).__mro__}]
        if left and finetunes:
            raise GuardConflict(self._thaws(left, type(finetunes[0]).__name__))
        if not weights:
            raise GuardConflict(f"{self.name}: no trainable weight of a Linear or convolution is left to prune")
        return weights, left

    def _thaws(self, left: Iterable[str], who: str) -> str:
        return (
            f"{self.name}: {who} trains {', '.join(left)} later, but the masks are of the weights that are trained "
            "from the beginning; train them from the start, leave them out with ignore, or prune in a second training"
        )

    def _present(self, module: pl.LightningModule) -> None:
        now = dict(module.named_parameters(remove_duplicate=False))
        gone = [name for name, weight in self._weights.items() if now.get(name) is not weight]
        if gone:
            raise GuardConflict(
                f"{self.name}: {', '.join(gone)} was replaced by another parameter during training, which no mask "
                "holds; change it in place (weight.data.copy_), or replace it before training"
            )

    def on_weights(self, optimizer: Optimizer) -> None:
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        thawed = [name for name, p in self._left.items() if p.requires_grad and id(p) in owned]
        if thawed:
            raise GuardConflict(self._thaws(thawed, "this run"))
        if id(next(iter(self._weights.values()), None)) in owned:  # several optimizers: the first one keeps time
            self._steps += 1
            self._update()
        for name, weight in self._weights.items():
            if id(weight) not in owned or not self.reached:
                continue
            self._clear(name, weight)
            for moment in ("momentum_buffer", "exp_avg"):  # or it would push the weight at once; second moments stay
                buffer = optimizer.state[weight].get(moment)
                if buffer is not None:
                    self._clear(name, buffer)

    def _clear(self, name: str, values: Tensor) -> None:
        bits = self._bits.get(name)
        if bits is None or bits.device != values.device or bits.element_size() != values.element_size():
            bits = self._bits[name] = bit_mask(~self._dropped[name].to(values.device), values.dtype)
        clear_(values, bits)

    def _update(self) -> None:
        assert self._run is not None
        if self._window is None:
            total = self._run.total_steps if isinstance(self.start, float) or isinstance(self.end, float) else 0
            start, end = (round(t * total) if isinstance(t, float) else t for t in (self.start, self.end))
            self._window = start, max(end, start, 1)
            self._fits(self._window[1])
        start, end = self._window
        due = self._steps == end or (start < self._steps < end and (self._steps - start) % self.every == 0)
        if not due:
            return
        self._present(self._run.module)
        progress = 1.0 if self._steps == end else (self._steps - start) / (end - start)
        kept = {name: ~dropped for name, dropped in self._dropped.items()}
        masks = magnitude_masks(self._weights, cubic_sparsity(progress, self.sparsity), self.scope, kept)
        self._dropped = {name: ~mask for name, mask in masks.items()}
        count = sum(int(dropped.sum()) for dropped in self._dropped.values())
        self.reached = count / sum(dropped.numel() for dropped in self._dropped.values())
        self._bits = {}
        for name, weight in self._weights.items():
            self._clear(name, weight)

    def _fits(self, end: int) -> None:
        """Refuse a schedule that a training which has just begun cannot finish, as after a late unguarded resume."""
        assert self._run is not None
        trainer = self._run.trainer
        if self._steps != 1 or len(trainer.optimizers) > 1 or not self._run.module.automatic_optimization:
            return
        left = trainer.estimated_stepping_batches - trainer.global_step
        if end > left:
            raise GuardConflict(
                f"{self.name}: end={end} is {end} optimizer steps away and training has {left:.0f} left, so "
                f"sparsity={self.sparsity} is never reached; train longer or give an earlier end"
            )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self.sparsity:
            if [id(optimizer) for optimizer in trainer.optimizers] != self._optimizers:
                raise GuardConflict(
                    f"{self.name}: the optimizers were replaced during training, and no mask follows the steps of the "
                    "new ones; change the old ones in place (param_groups), or begin a second training"
                )
            self.report(pl_module, sparsity=self.reached)

    def on_checkpoint(self, weights: dict[str, Tensor]) -> None:
        for alias, name in self._aliases.items():
            if alias in weights:
                weights[alias] = weights[alias].masked_fill(self._dropped[name].to(weights[alias].device), 0)

    @torch.no_grad()
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and self.reached and trainer.state.fn == "fit":  # an average may be in their place just now
            for name, weight in self._weights.items():
                self._clear(name, weight)

    @torch.no_grad()
    def settled(self, run: Run) -> bool:
        return not self._weights or (self._window is not None and self._steps >= self._window[1])

    def release(self, module: pl.LightningModule) -> None:
        self._present(module)
        for name, weight in self._weights.items():
            self._clear(name, weight)  # an average may have been put in its place
        end = self.end if self._window is None else self._window[1]
        if self._weights and (not self._steps if self._window is None else self._steps < end):
            rank_zero_warn(
                f"{self.name}: training ended at optimizer step {self._steps}, before end={end}: "
                f"sparsity is {self.reached:.3f}, not {self.sparsity}. Train longer, or give an earlier end."
            )
        self._run, self._weights, self._left, self._bits = None, {}, {}, {}

    def state(self) -> dict[str, Any]:
        packed = {name: pack_mask(dropped.cpu()) for name, dropped in self._dropped.items()}
        return {"steps": self._steps, "reached": self.reached, "dropped": packed}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._steps, self.reached, self._packed = state["steps"], state["reached"], state["dropped"]
