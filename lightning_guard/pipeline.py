"""Checks, installs, runs and undoes the guards of one run. The only room that touches what is not its own."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import pytorch_lightning as pl
import torch
import torchmetrics
from torch import Tensor

from lightning_guard.checks import before_a_fit, read_as, whatever_the_stage
from lightning_guard.guard import Guard, GuardConflict, Run, Step
from lightning_guard.still import still
from lightning_guard.undo import swap

SECTION = "lightning_guard"  # of a checkpoint: {"version": 1, "steps": ..., "guards": {name: state}}
_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")
_STEPS = ("validation_step", "test_step", "predict_step")

_current: "WeakKeyDictionary[pl.LightningModule, Pipeline]" = WeakKeyDictionary()


_ended: "WeakKeyDictionary[pl.LightningModule, tuple[ReferenceType[pl.Trainer], dict[str, Any]]]" = WeakKeyDictionary()


def remember(module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Put into a checkpoint written after training what the guards of that training left."""
    if module in _ended and current(module) is None:
        checkpoint.setdefault(SECTION, _ended[module][1])


def current(module: pl.LightningModule) -> "Pipeline | None":
    """The pipeline that guards this module's training just now."""
    return _current.get(module)


class Pipeline(Run):
    """The guards of one run in the order in which they act, checked, installed and removed as one."""

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, guards: Sequence[Guard]):
        super().__init__(trainer, module, guards)
        self._undo_saving = ExitStack()  # outlives a failure, see `fail`
        self._stage = ""
        self._began = self._watched = False
        self._section: Mapping[str, Any] | None = None  # of the checkpoint to resume from
        self.step: Step | None = None  # the step that is running
        self.manual: Step | None = None  # what a manual training_step asked for
        self._moved: dict[Any, Any] = {}

    def install(self, stage: str) -> None:
        """Check everything, then put the transforms in their places.

        Raises:
            GuardConflict: with every problem of this run.
        """
        self._stage = stage
        self.batch, problems = read_as(self)
        problems = [*whatever_the_stage(self), *problems]
        if stage == "fit":
            problems += before_a_fit(self)
        if problems:
            raise GuardConflict(problems)
        if stage == "fit":
            for guard in self.guards:
                guard.prepare(self)
        if self._acting("rewrite"):
            # No `wraps`: Lightning calls configure_model only if it looks overridden.
            swap(self.undo, self.module, "configure_model", self._rewriting)
        swap(self.undo, self.module, "on_load_checkpoint", self._reshaping)
        if self._withholds:
            for name in _STEPS:
                if getattr(type(self.module), name, None) is not getattr(pl.LightningModule, name):
                    swap(self.undo, self.module, name, self._withholding)
        if stage != "fit":
            return
        _current[self.module] = self
        self.undo.callback(_current.pop, self.module, None)
        strategy = self.trainer.strategy
        swap(self._undo_saving, strategy, "save_checkpoint", self._saving)
        if self._acting("on_loader"):
            swap(self.undo, strategy, "process_dataloader", self._loading)
        if any(map(self._acting, ("on_batch", "during", "on_loss"))) or self._withholds:
            swap(self.undo, self.module, "training_step", self._stepping)
        if self._acting("on_gradients"):
            # Around the precision plugin, which precedes every on_after_backward: no callback sees raw gradients.
            swap(self.undo, strategy.precision_plugin, "backward", self._differentiating)

    def begin(self) -> None:
        """Model and optimizers are there; the guards take up their states and begin."""
        if self._moved:
            # LightningCLI builds optimizers before a rewrite (Lightning-AI/pytorch-lightning#19110).
            for optimizer in self.trainer.optimizers:
                for group in optimizer.param_groups:
                    group["params"] = [self._moved.get(p, p) for p in group["params"]]
        self._metrics = [m for m in self.module.modules() if isinstance(m, torchmetrics.Metric)]
        if any(guard.needs_logits for guard in self.guards):
            source = self.module.get_submodule(self.batch.logits or "")
            swap(self.undo, source, "forward", self._recording)
            if getattr(source, "_compiler_ctx", None):  # a compiled step calls the class's forward, and hooks
                self.undo.callback(source.register_forward_hook(lambda _, __, output: self._record(output)).remove)
        section = self._continued() if self._section is None else self._section
        if section is not None:
            self.steps = section["steps"]
        for guard in self.guards:
            # Right before it begins: what a run restored and never used must not reach the next one.
            if section is not None and guard.name in section["guards"]:
                guard.restore(section["guards"][guard.name])
            guard.begin(self)
        self._began = True
        if self._acting("on_weights"):
            for optimizer in self.trainer.optimizers:
                self.undo.callback(optimizer.register_step_post_hook(self._stepped).remove)

    def close(self, finished: bool) -> None:
        """Put everything back; release the model if training ended well."""
        self._end()
        with self._undo_saving, self.undo:
            if finished:
                for guard in reversed(self.guards):
                    guard.release(self.module)

    def fail(self, then: Callable[[], None]) -> None:
        """Put everything back but the saving of checkpoints, whose turn on an exception comes after the guards'."""
        self._end()
        self._undo_saving.callback(then)

        def telling(old: Callable[..., None]) -> Callable[..., None]:
            @wraps(old)
            def on_exception(*args: Any, **kwargs: Any) -> None:
                with self._undo_saving:
                    old(*args, **kwargs)

            return on_exception

        with self.undo:
            if self._stage == "fit":
                swap(self._undo_saving, self.trainer.strategy, "on_exception", telling)  # told last of all
            else:
                self._undo_saving.close()

    def _end(self) -> None:
        if self._began:
            _ended[self.module] = ref(self.trainer), self._states()

    def _continued(self) -> Mapping[str, Any] | None:
        """What an earlier fit of this module left, if this Trainer goes on counting where that one stopped."""
        trainer, section = _ended.get(self.module, (None, None))
        if section is None or trainer is None or trainer() is not self.trainer or not self.trainer.global_step:
            return None
        problems = list(missing_guards(section, [guard.name for guard in self.guards]))
        if problems:
            raise GuardConflict(problems)
        return section

    # Places -----------------------------------------------------------------------------------------------------

    def _acting(self, transform: str) -> list[Guard]:
        return [guard for guard in self.guards if guard.overrides(transform)]

    @property
    def _withholds(self) -> bool:
        return self.batch.withhold_group and any(guard.needs_group for guard in self.guards)

    def _rewriting(self, old: Callable[[], None]) -> Callable[[], None]:
        def configure_model() -> None:
            old()
            before = dict(self.module.named_parameters())
            for guard in self._acting("rewrite"):
                guard.rewrite(self.module)
            after = dict(self.module.named_parameters())
            moved = {p: after[name] for name, p in before.items() if name in after and after[name] is not p}
            self._moved.update(moved)

        return configure_model

    def _reshaping(self, old: Callable[[Any], None]) -> Callable[[Any], None]:
        @wraps(old)
        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            self.restore(checkpoint)  # what is refused is refused before weights of other shapes fail to load
            for guard in self._acting("reshape"):
                guard.reshape(self.module, checkpoint["state_dict"])
            old(checkpoint)

        return on_load_checkpoint

    def _loading(self, old: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def process_dataloader(loader: Any) -> Any:
            loader = old(loader)
            for guard in self._acting("on_loader") if self.trainer.training else ():
                loader = guard.on_loader(loader)
            return loader

        return process_dataloader

    def _withholding(self, old: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(old)
        def step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            return old(self.batch.without_group(batch), *args, **kwargs)

        return step

    def _stepping(self, old: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(old)
        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.trainer.training:  # a validation_step that calls training_step; it has the batch it should
                return old(batch, *args, **kwargs)
            if not self.module.automatic_optimization:
                return self._step_manually(old, batch, args, kwargs)
            with self._one_step(batch) as step:
                step.again = partial(self._again, step, old, args, kwargs)
                try:
                    return self._guarded(step, old, args, kwargs)
                finally:
                    step.again = None  # a cycle, which would keep the batch until Python looks for cycles

        return training_step

    def _guarded(self, step: Step, old: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        raw = step.batch
        for guard in self._acting("on_batch"):
            step.batch = guard.on_batch(step)
        step.changed = step.batch is not raw
        given = self.batch.without_group(step.batch) if self._withholds else step.batch
        try:
            with self._during(step), self._watching(step):
                step.output = old(given, *args, **kwargs)
        except (ValueError, KeyError, IndexError) as error:
            if given is not step.batch:
                error.add_note(
                    "Lightning Guard withheld the group from this batch; if training_step expects it, "
                    "say so with Batch(withhold_group=False)"
                )
            raise
        return self._with_loss(step)

    @contextmanager
    def _during(self, step: Step) -> Iterator[None]:
        with ExitStack() as around:
            for guard in self._acting("during"):
                around.enter_context(guard.during(step))
            yield

    def _again(self, step: Step, old: Callable[..., Any], args: Any, kwargs: Any, batch: Any) -> Tensor | None:
        inner = Step(self, batch)
        inner.index, inner.rehearsal = step.index, True
        with still(self.module, self._metrics, training=True), ExitStack() as undo:
            undo.callback(setattr, self, "step", step)
            self.step = inner
            self._guarded(inner, old, args, kwargs)
        return inner.loss

    @contextmanager
    def _one_step(self, batch: Any) -> Iterator[Step]:
        self.step = Step(self, batch)
        try:
            yield self.step
        finally:
            self.step = None
            self.steps += 1

    def _with_loss(self, step: Step) -> Any:
        output = step.output
        step.loss = output.get("loss") if isinstance(output, Mapping) else output
        if step.loss is None:  # Lightning skips this batch, and so do the guards
            return output
        before = step.loss
        for guard in reversed(self._acting("on_loss")):
            step.loss = guard.on_loss(step)
        if step.loss is before:
            return output
        return {**output, "loss": step.loss} if isinstance(output, Mapping) else step.loss

    def _step_manually(self, old: Callable[..., Any], batch: Any, args: Any, kwargs: Any) -> Any:
        self.manual = None
        with self._one_step(batch) as step, self._during(step):
            output = old(batch, *args, **kwargs)
        if not (self._acting("on_batch") or self._acting("on_loss")):
            return output
        if self.manual is None or (self.manual.loss is None and self._acting("on_loss")):
            missing = "guard_step" if self.manual is None else "guard_loss"
            raise GuardConflict(
                f"{type(self.module).__name__}.training_step optimises manually and never called self.{missing}, so "
                f"{', '.join(g.name for g in self.guards)} did not act; see GuardMixin"
            )
        return output

    def take_manual_step(self, batch: Any) -> Step:
        """What ``GuardMixin.guard_step`` gives: the running step with its batch transformed."""
        step = Step(self, batch)
        if not self.trainer.training:  # a validation_step that shares code with training_step
            return step
        if self.module.automatic_optimization:
            raise GuardConflict(
                f"{type(self.module).__name__} optimises automatically, where the guards change batch and loss by "
                "themselves, and calls guard_step, so they would do it twice; leave out guard_step and guard_loss"
            )
        self.step = self.manual = step  # a new one each time: an earlier one keeps its batch
        for guard in self._acting("on_batch"):
            step.batch = guard.on_batch(step)
        return step

    def take_manual_loss(self, step: Step, loss: Tensor, logits: Tensor | None) -> Tensor:
        """What ``GuardMixin.guard_loss`` gives: the loss transformed."""
        step.loss, step.output = loss, {"logits": logits}
        if not self.trainer.training:
            return loss
        for guard in reversed(self._acting("on_loss")):
            step.loss = guard.on_loss(step)
        return step.loss

    def _recording(self, old: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(old)
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = old(*args, **kwargs)
            self._record(output)
            return output

        return forward

    def _record(self, output: Any) -> None:
        if self.step is not None and not self.step.probing and all(known is not output for known in self.step.forwards):
            self.step.forwards.append(output)

    @contextmanager
    def _watching(self, step: Step) -> Iterator[None]:
        """Once a run: whether the network is given what the guards made; else they made it for another input."""
        own = getattr(type(self.module), "guard_forward", None)
        described = own is not None and own.__module__ != "lightning_guard.mixins"  # from inputs to logits
        if self._watched or not step.changed or described or getattr(self.module, "_compiler_ctx", None):
            yield
            return
        self._watched = True
        with ExitStack() as undo:
            source = self.module.get_submodule(self.batch.logits or "")
            undo.callback(source.register_forward_pre_hook(partial(self._fed, step), prepend=True).remove)
            yield

    def _fed(self, step: Step, source: Any, args: tuple[Any, ...]) -> None:
        given, made = args[0] if args and not step.probing else None, step.inputs
        if not isinstance(given, Tensor) or not isinstance(made, Tensor) or given.shape != made.shape or given is made:
            return
        if not bool((given - made).abs().max() <= 0.02 * made.abs().max()):  # a cast to half precision may round
            raise GuardConflict(
                f"training_step changes the inputs before {type(source).__name__} sees them (normalisation, "
                "augmentation), so the batch of the guards was made for another input; change them in the loader or "
                "in on_after_batch_transfer, or say the whole way to the logits with GuardMixin.guard_forward"
            )

    def _differentiating(self, old: Callable[..., None]) -> Callable[..., None]:
        @wraps(old)
        def backward(*args: Any, **kwargs: Any) -> None:
            old(*args, **kwargs)
            with torch.no_grad():
                for guard in reversed(self._acting("on_gradients")):
                    guard.on_gradients(self.module)

        return backward

    @torch.no_grad()
    def _stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        for guard in reversed(self._acting("on_weights")):
            guard.on_weights(optimizer)

    # Checkpoints ------------------------------------------------------------------------------------------------

    def _saving(self, old: Callable[..., None]) -> Callable[..., None]:
        @wraps(old)
        def save_checkpoint(checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            # At the last moment: after averaging callbacks have put their weights in, and for weights-only files too.
            for guard in reversed(self._acting("on_checkpoint")):
                guard.on_checkpoint(checkpoint["state_dict"])
            checkpoint[SECTION] = self._states()
            old(checkpoint, *args, **kwargs)

        return save_checkpoint

    def _states(self) -> dict[str, Any]:
        return {"version": 1, "steps": self.steps, "guards": {guard.name: guard.state() for guard in self.guards}}

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Take up a guarded training where its checkpoint left it.

        Raises:
            GuardConflict: if a guard of the checkpoint is not here.
        """
        section = checkpoint.get(SECTION)
        if section is None or self._stage != "fit":
            return
        problems = list(missing_guards(section, [guard.name for guard in self.guards]))
        if problems:
            raise GuardConflict(problems)
        self._section = section


def missing_guards(section: Mapping[str, Any], present: Iterable[str]) -> Iterator[str]:
    """Why training may not resume from a checkpoint with this section and these guards."""
    present = set(present)
    if section["version"] != 1:
        yield f"the checkpoint has guard format {section['version']}, this version reads 1; use the one that wrote it"
        return
    for name in section["guards"]:
        if name not in present:
            yield (
                f"the checkpoint was trained with {name}, which is not here, so its promise would end unnoticed; "
                "add it, or start a new training from the weights alone (load_from_checkpoint)"
            )
