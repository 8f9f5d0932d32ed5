"""What guards share that give the network's weights other shapes."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_guard.functional.reshaping import MIXING, is_pair, reshape_like
from lightning_guard.guard import Guard, GuardConflict, Phase, Run, callbacks_of

_done: "WeakKeyDictionary[nn.Module, dict[str, Any]]" = WeakKeyDictionary()  # guard name -> what it did to the module


class _Reshaping(Guard):
    """Changes shapes once: before training, or in the middle of it.

    A subclass says ``off``, what it would do (:meth:`_plan`, also asked before training, so that what is refused is
    refused then) and does it (:meth:`_take`).
    """

    phase = Phase.REWRITE
    start: int | float
    checkpoint: str | None
    _verb = "reshaped"  # what the module has been after `_take`

    def _begin_options(self, start: int | float, checkpoint: str | None) -> None:
        if start < 0 or (isinstance(start, float) and start >= 1):
            raise ValueError(f"start={start} is no time; give a fraction in [0.0, 1.0) or a number of steps")
        self.start, self.checkpoint = start, checkpoint
        self._run: Run | None = None
        self._due = False  # this training has not looked at the module yet
        self._steps = 0
        self._start: int | None = None
        self._loaded = False  # weights of a checkpoint have taken the place of those that `rewrite` saw
        self._conflict: GuardConflict | None = None  # why `rewrite` could do nothing, which a resumed run need not
        self._taken: dict[str, Any] | None = None  # the record of what was done
        self._restored: Mapping[str, Any] | None = None
        self._moved: dict[Tensor, list[nn.Parameter]] = {}  # parameters that others have taken the place of

    def _plan(self, module: pl.LightningModule) -> Any:
        """What would be done to the module as it is; refused if nothing."""
        raise NotImplementedError

    def _take(self, module: pl.LightningModule, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
        """Do it; optimizers are there in the middle of training. Returns the record, of plain values."""
        raise NotImplementedError

    def problems(self, run: Run) -> Iterable[str]:
        if self.off:
            return
        if self.checkpoint is not None and not Path(self.checkpoint).is_file():
            yield f"checkpoint={self.checkpoint!r} is no file; give the path of a checkpoint of a dense training"
        for callback in callbacks_of(run.trainer):
            if "WeightAveraging" in {cls.__name__ for cls in type(callback).__mro__}:
                yield (
                    f"{type(callback).__name__} copies the model before it is {self._verb}, so the average would be of "
                    "another model; remove it, or average in a second training"
                )
        if self.start:
            yield from self._late_problems(run)

    def _late_problems(self, run: Run) -> Iterable[str]:
        if isinstance(self.start, float) and run.endless:
            yield (
                f"start={self.start} is a fraction of a training without end; set max_epochs or max_steps on the "
                "Trainer, or give optimizer steps"
            )
        if isinstance(self.start, int) and 0 <= run.trainer.max_steps <= self.start:
            yield (
                f"start={self.start} comes after the last optimizer step, max_steps={run.trainer.max_steps}, so the "
                f"model is never {self._verb}; train longer or give an earlier start"
            )
        if run.trainer.world_size > 1:
            yield (
                f"start={self.start} changes shapes in the middle of training, where DistributedDataParallel has laid "
                "out the gradients of all weights; give start=0 and the checkpoint of a dense training"
            )

    def prepare(self, run: Run) -> None:
        self._run, self._due, self._loaded, self._conflict, self._moved = run, not self.off, False, None, {}
        self._steps, self._start, self._taken, self._restored = 0, None, None, None

    def rewrite(self, module: pl.LightningModule) -> None:
        if not self._due or self._run is None:
            return
        self._due = False
        if self.name in _done.get(module, {}):  # `begin` tells a training that goes on from a new one
            return
        if self.checkpoint is not None:
            self._load(module)
        try:
            if self.start:
                self._plan(module)
            else:
                self._do(module, ())
        except GuardConflict as conflict:
            self._conflict = conflict

    def _load(self, module: pl.LightningModule) -> None:
        try:
            stored = torch.load(str(self.checkpoint), map_location="cpu", weights_only=True)
            module.load_state_dict(stored.get("state_dict", stored))
        except RuntimeError as error:
            raise GuardConflict(
                f"{self.name}: checkpoint={self.checkpoint!r} does not load into {type(module).__name__}: {error}; "
                "give a checkpoint of the same class, from a training without this guard"
            ) from error

    def _do(self, module: pl.LightningModule, optimizers: Sequence[Optimizer]) -> None:
        try:
            self._taken = self._take(module, optimizers)
        except ValueError as error:
            if isinstance(error, GuardConflict):
                raise
            raise GuardConflict(f"{self.name}: {error}") from error
        _done.setdefault(module, {})[self.name] = self._taken

    def _agreed(self, plan: Any) -> Any:
        """The first process's plan, for all of them: they may have begun with other weights."""
        assert self._run is not None
        trainer = self._run.trainer
        return trainer.strategy.broadcast(plan) if trainer.world_size > 1 else plan

    def reshape(self, module: pl.LightningModule, weights: Mapping[str, Tensor]) -> None:
        if self.off:
            return
        self._loaded = True
        before = {name: layer for name, layer in module.named_modules() if isinstance(layer, MIXING)}
        try:
            changed = reshape_like(module, weights)
        except ValueError as error:
            raise GuardConflict(f"{self.name}: {error}") from None
        for name in changed:
            now = module.get_submodule(name)
            if name in before and is_pair(now):
                self._remember(before[name], now)

    def _remember(self, layer: Any, pair: Any) -> None:
        """For optimizers that were made before: what has taken the place of a layer's parameters."""
        self._moved[layer.weight] = [pair[0].weight, pair[1].weight]
        if layer.bias is not None and layer.bias is not pair[1].bias:
            self._moved[layer.bias] = [pair[1].bias]

    def _follow(self, optimizers: Iterable[Optimizer]) -> None:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                if any(p in self._moved for p in group["params"]):
                    group["params"][:] = [new for p in group["params"] for new in self._moved.get(p, [p])]
            for old in self._moved:
                optimizer.state.pop(old, None)

    def begin(self, run: Run) -> None:
        self._run = run
        kept, self._restored = self._restored, None
        self._follow(run.trainer.optimizers)
        done = _done.setdefault(run.module, {})
        if kept is not None:
            self._steps, self._taken = kept["steps"], kept["taken"]
            done.pop(self.name, None)
            if self._taken is not None:
                done[self.name] = self._taken
        elif self._conflict is not None:
            raise self._conflict
        elif self._loaded and not self.start and not self.off:
            raise GuardConflict(
                f"{self.name}: training resumes from a checkpoint that was written without it, and start={self.start} "
                "is over there; begin a new training from it with checkpoint=..., or give a later start"
            )
        elif self.name in done and self._taken is None and not self.off:
            raise GuardConflict(
                f"{self.name}: this {type(run.module).__name__} has been {self._verb} in an earlier training, and once "
                "more would compound; train it without this guard, or begin with a fresh one"
            )

    def on_weights(self, optimizer: Optimizer) -> None:
        assert self._run is not None
        if not self.start or self.off or optimizer is not self._run.trainer.optimizers[0]:
            return
        if self._start is None:
            timed = isinstance(self.start, float)
            self._start = max(round(self.start * self._run.total_steps), 1) if timed else int(self.start)
        self._steps += 1
        if self._steps == self._start:
            self._do(self._run.module, self._run.trainer.optimizers)
            self._follow(self._run.trainer.optimizers)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self._taken is not None:
            self.report(pl_module, **self._taken["after"])

    def settled(self, run: Run) -> bool:
        return self.off or self._taken is not None

    def release(self, module: pl.LightningModule) -> None:
        if not self.off and self._taken is None:
            rank_zero_warn(
                f"{self.name}: training ended at optimizer step {self._steps}, before start={self.start}, so the model "
                f"was not {self._verb}. Train longer, or give an earlier start."
            )
        self._run, self._moved = None, {}

    def state(self) -> dict[str, Any]:
        return {} if self.off else {"steps": self._steps, "taken": self._taken}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state:
            self._restored = state


def selected(guard: Guard, names: Iterable[str], targets: Sequence[str] | None, ignore: Sequence[str]) -> set[str]:
    """Names of layers that ``targets`` has and ``ignore`` has not.

    Raises:
        GuardConflict: if a name or pattern matches nothing.
    """
    names = list(names)
    for option, patterns in (("targets", targets or ()), ("ignore", ignore)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise GuardConflict(
                    f"{guard.name}: {option}={pattern!r} matches no Linear and no convolution; "
                    f"there are {', '.join(names) or 'none'}"
                )
    wanted = {name for name in names if targets is None or any(fnmatchcase(name, pattern) for pattern in targets)}
    return {name for name in wanted if not any(fnmatchcase(name, pattern) for pattern in ignore)}
