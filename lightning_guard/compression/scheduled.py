"""Guards that bring the weights of chosen layers into a form over a schedule, and hold them there."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import Optimizer

from lightning_guard.guard import Guard, GuardConflict, Phase, Run, callbacks_of

CHOSEN = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.MultiheadAttention,
)  # fmt: skip
_SPARED = (nn.Embedding, nn.EmbeddingBag)
_MOMENTS = ("momentum_buffer", "exp_avg")  # what pushes a weight at the next step; second moments only scale


class ScheduledWeights(Guard):
    """Holds the weights of chosen layers in a form after every optimizer step, in every checkpoint and at the end.

    What the form is, a subclass says with ``off``, ``take_up``, ``advance``, ``hold``, ``formed`` and ``short``. This
    class finds the weights, keeps time by the optimizer's steps, and sees to it that nobody else sees other weights.

    Args:
        start: when to begin, as a fraction of training (float) or in optimizer steps (int).
        end: when the final form is reached, as a fraction of training (float) or in optimizer steps (int).
        every: optimizer steps between two changes of the form.
        targets: names or patterns (``*``) of modules; None is every Linear, convolution and attention projection.
        ignore: names or patterns (``*``) of modules to leave alone.
    """

    name: ClassVar[str] = "scheduled_weights"
    phase: ClassVar[Phase] = Phase.WEIGHTS
    verb: ClassVar[str] = "change"  # for messages: "nothing that can be ...d", "no weight is left to ..."

    def __init__(
        self,
        start: int | float,
        end: int | float,
        every: int,
        targets: Sequence[str] | None,
        ignore: Sequence[str],
    ):
        for option, value in (("start", start), ("end", end)):
            self.check_time(option, value)
        if type(start) is type(end) and start > end:
            raise ValueError(f"start={start} comes after end={end}; give an earlier start")
        if every < 1:
            raise ValueError(f"every={every} never acts; give at least 1 optimizer step")
        self.start, self.end, self.every = start, end, every
        self.targets, self.ignore = targets, ignore
        self._steps = 0
        self._window: tuple[int, int] | None = None
        self._run: Run | None = None
        self._weights: dict[str, nn.Parameter] = {}
        self._layers: dict[str, nn.Module] = {}  # of each weight
        self._left: dict[str, nn.Parameter] = {}  # would be chosen, but nothing trains them
        self._aliases: dict[str, str] = {}  # every name of a weight in the state dict
        self._optimizers: list[int] = []
        self._restored: Mapping[str, Any] | None = None

    @staticmethod
    def check_time(option: str, value: int | float) -> None:
        """Refuse what is neither a fraction of training nor a number of optimizer steps."""
        if value < 0 or (isinstance(value, float) and value > 1):
            raise ValueError(f"{option}={value} is no time; give a fraction in [0.0, 1.0] or a number of steps")

    # What a subclass says ---------------------------------------------------------------------------------------

    def take_up(self, state: Mapping[str, Any] | None) -> None:
        """The weights are known: begin with them, or go on from what :meth:`kept` gave."""

    def kept(self) -> dict[str, Any]:
        """What a resume needs beside the number of steps."""
        return {}

    def advance(self, step: int) -> None:
        """An optimizer step is done and :meth:`hold` has followed it: change the form if it is due."""

    def hold(self, names: Iterable[str]) -> None:
        """Bring these weights into their form, in place, after somebody has moved them."""

    def formed(self, name: str, values: Tensor) -> Tensor:
        """Other values of a weight, an average for example, in its form."""
        return values

    @property
    def short(self) -> str:
        """What has been reached instead of what was asked, for a training that ended before ``end``."""
        return ""

    @property
    def asked(self) -> str:
        """The option that is not met then, with its value."""
        return ""

    @property
    def figures(self) -> dict[str, float]:
        """What to log at the end of each epoch."""
        return {}

    @property
    def times(self) -> dict[str, int | float]:
        """The options that are times."""
        return {"start": self.start, "end": self.end}

    # Before training --------------------------------------------------------------------------------------------

    @property
    def _in_fractions(self) -> bool:
        return any(isinstance(value, float) for value in self.times.values())

    @property
    def _said(self) -> str:
        return " and ".join(f"{option}={value}" for option, value in self.times.items())

    def problems(self, run: Run) -> Iterable[str]:
        if self.off:
            return
        if run.endless and self._in_fractions:
            yield (
                f"{self._said} are fractions of a training without end; "
                "set max_epochs or max_steps on the Trainer, or give optimizer steps"
            )
        if isinstance(self.end, int) and 0 <= run.trainer.max_steps < self.end:
            yield (
                f"end={self.end} comes after the last optimizer step, max_steps={run.trainer.max_steps}, so "
                f"{self.asked} is never reached; train longer or give an earlier end"
            )

    def begin(self, run: Run) -> None:
        self._run, self._window = run, None
        self._optimizers = [id(optimizer) for optimizer in run.trainer.optimizers]
        state, self._restored = self._restored, None
        self._weights, self._left, self._layers = {}, {}, {}
        if self.off:
            self._steps = 0 if state is None else state["steps"]
            return
        if self._in_fractions and len(run.trainer.optimizers) > 1:
            raise GuardConflict(
                f"{self.name}: {self._said} are fractions of training, which several optimizers may step at different "
                "times; give optimizer steps of the one that trains the first layer"
            )
        self._select(run)
        names = {weight: name for name, weight in self._weights.items()}
        every = run.module.named_parameters(remove_duplicate=False)
        self._aliases = {alias: names[weight] for alias, weight in every if weight in names}
        if state is not None and list(state["weights"]) != list(self._weights):
            raise GuardConflict(
                f"{self.name}: the checkpoint holds {', '.join(state['weights']) or 'nothing'}, but the weights to "
                f"{self.verb} are now {', '.join(self._weights)}; resume with the same model, targets and ignore"
            )
        self._steps = 0 if state is None else state["steps"]
        self.take_up(state)

    def _select(self, run: Run) -> None:
        """Find the weights to act on, and those that would be if anything trained them."""
        module = run.module
        layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, CHOSEN)}
        for option, patterns in (("targets", self.targets or ()), ("ignore", self.ignore)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in layers):
                    raise GuardConflict(
                        f"{self.name}: {option}={pattern!r} matches nothing that there is to {self.verb}; "
                        f"there are {', '.join(layers) or 'no Linear and no convolution'}"
                    )
        owned = {p for optimizer in run.trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        ignored = {name for name in layers if any(fnmatchcase(name, pattern) for pattern in self.ignore)}
        seen = {p for layer in module.modules() if isinstance(layer, _SPARED) for p in layer.parameters(False)}
        seen |= {p for name in ignored for p in layers[name].parameters(False)}
        for name, layer in layers.items():
            wanted = self.targets is None or any(fnmatchcase(name, pattern) for pattern in self.targets)
            if not wanted or name in ignored:
                continue
            for full, weight in self._weights_of(name, layer):
                if weight not in seen:
                    seen.add(weight)
                    (self._weights if weight.requires_grad and weight in owned else self._left)[full] = weight
                    self._layers[full] = layer
        finetunes = [c for c in callbacks_of(run.trainer) if "BaseFinetuning" in {k.__name__ for k in type(c).__mro__}]
        if self._left and finetunes:
            raise GuardConflict(self._thaws(self._left, type(finetunes[0]).__name__))
        if not self._weights:
            raise GuardConflict(f"{self.name}: no trainable weight of a Linear or convolution is left to {self.verb}")

    def _weights_of(self, name: str, layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        made = "weight" not in layer._parameters and not isinstance(layer, nn.MultiheadAttention)
        if made or is_parametrized(layer):
            raise GuardConflict(
                f"{self.name}: the weight of {name} is computed from other parameters (weight_norm, spectral_norm, "
                f"torch.nn.utils.prune), so nothing holds it; remove that, or give ignore=[{name!r}]"
            )
        for key, weight in layer.named_parameters(recurse=False):
            if "bias" in key:
                continue
            if is_lazy(weight):
                raise GuardConflict(
                    f"{self.name}: {name}.{key} has no shape yet; pass an example through the lazy modules before "
                    "training, e.g. at the end of __init__"
                )
            yield f"{name}.{key}".lstrip("."), weight

    def _thaws(self, left: Iterable[str], who: str) -> str:
        return (
            f"{self.name}: {who} trains {', '.join(left)} later, but this guard acts on the weights that are trained "
            "from the beginning; train them from the start, leave them out with ignore, or use it in a second training"
        )

    # In training ------------------------------------------------------------------------------------------------

    @property
    def window(self) -> tuple[int, int]:
        """First and last optimizer step of the schedule."""
        if self._window is None:
            start, end = self.in_steps(self.start), self.in_steps(self.end)
            self._window = start, max(end, start, 1)
            self._fits(self._window[1])
        return self._window

    def in_steps(self, time: int | float) -> int:
        """A time as a number of optimizer steps."""
        assert self._run is not None
        return round(time * self._run.total_steps) if isinstance(time, float) else time

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
                f"{self.asked} is never reached; train longer or give an earlier end"
            )

    def present(self) -> None:
        """Refuse weights that were replaced by others, which no form holds."""
        assert self._run is not None
        now = dict(self._run.module.named_parameters(remove_duplicate=False))
        gone = [name for name, weight in self._weights.items() if now.get(name) is not weight]
        if gone:
            raise GuardConflict(
                f"{self.name}: {', '.join(gone)} was replaced by another parameter during training, which nothing "
                "holds; change it in place (weight.data.copy_), or replace it before training"
            )

    def on_weights(self, optimizer: Optimizer) -> None:
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        thawed = [name for name, p in self._left.items() if p.requires_grad and id(p) in owned]
        if thawed:
            raise GuardConflict(self._thaws(thawed, "this run"))
        self.hold([name for name, weight in self._weights.items() if id(weight) in owned])
        if id(next(iter(self._weights.values()), None)) in owned:  # several optimizers: the first one keeps time
            self._steps += 1
            self.advance(self._steps)

    def moments(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The first moments that optimizers keep of these weights."""
        assert self._run is not None
        for optimizer in self._run.trainer.optimizers:
            for name in names:
                state = optimizer.state.get(self._weights[name], {})
                yield from ((name, state[key]) for key in _MOMENTS if isinstance(state.get(key), Tensor))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self.off:
            return
        if [id(optimizer) for optimizer in trainer.optimizers] != self._optimizers:
            raise GuardConflict(
                f"{self.name}: the optimizers were replaced during training, and nothing follows the steps of the "
                "new ones; change the old ones in place (param_groups), or begin a second training"
            )
        if trainer.is_last_batch:  # the value at the end of an epoch; logging each step would cost more than the masks
            self.report(pl_module, **self.figures)

    def on_checkpoint(self, weights: dict[str, Tensor]) -> None:
        for alias, name in self._aliases.items():
            if alias in weights:
                weights[alias] = self.formed(name, weights[alias])

    @torch.no_grad()
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and trainer.state.fn == "fit":  # an average may be in their place just now
            self._form()

    def _form(self) -> None:
        for name, weight in self._weights.items():
            formed = self.formed(name, weight)
            if formed is not weight:
                weight.copy_(formed)

    # At the end -------------------------------------------------------------------------------------------------

    def settled(self, run: Run) -> bool:
        return not self._weights or (self._window is not None and self._steps >= self._window[1])

    @torch.no_grad()
    def release(self, module: pl.LightningModule) -> None:
        if self._weights:
            self.present()
            self._form()  # an average may have been put in their place
            end = self.end if self._window is None else self._window[1]
            if not self._steps if self._window is None else self._steps < end:
                rank_zero_warn(
                    f"{self.name}: training ended at optimizer step {self._steps}, before end={end}: "
                    f"{self.short}. Train longer, or give an earlier end."
                )
        self._run, self._weights, self._left, self._layers = None, {}, {}, {}

    def state(self) -> dict[str, Any]:
        return {"steps": self._steps, "weights": list(self._aliases_of), **self.kept()}

    @property
    def _aliases_of(self) -> list[str]:
        return list(dict.fromkeys(self._aliases.values()))

    def restore(self, state: Mapping[str, Any]) -> None:
        self._restored = state
