"""``lightning-guard check``: everything but the training, in numbered steps."""

import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from shutil import get_terminal_size
from tempfile import TemporaryDirectory
from typing import Any, Protocol, TextIO

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import nn

from lightning_guard.composition import told
from lightning_guard.guard import Guard, GuardConflict, callbacks_of, guards_of
from lightning_guard.launch import GuardCLI
from lightning_guard.pipeline import Pipeline, current
from lightning_guard.recipe import RecipeError, refused
from lightning_guard.record import read_checkpoint, refuse_to_resume
from lightning_guard.report.composed import lines
from lightning_guard.rules import rows
from lightning_guard.undo import StandIn

_INDENT = 13  # of what a step says

_TRANSFORMS = (
    "rewrite",
    "on_loader",
    "on_batch",
    "during",
    "on_loss",
    "on_gradients",
    "on_weights",
    "on_checkpoint",
    "release",
)


def check(args: Sequence[str]) -> int:
    """Parse, build, compose, run one step through every transform and undo it, telling each.

    With ``--rules`` alone it prints the whole table of composition instead.

    Returns:
        0 if all is well, 2 if something is refused.

    Raises:
        Exception: what a fault in a model, its data or a guard raises, with its traceback.
    """
    if "--rules" in args:
        if len(args) > 1:
            raise RecipeError("check --rules prints the whole table and takes nothing else; leave out --rules to check")
        for line in lines(rows(), _width()):
            _tell(line, sys.stdout)
        return 0
    step = _Steps()
    try:
        with quiet(), step("parse") as said:
            cli = GuardCLI("check", args)
            said.append(", ".join(recipe.shown for recipe in cli.recipes) or "the options of the command line")
        with quiet(), step("build") as said:
            cli.build()
            parts = [cli.model, cli.datamodule, *cli.guards]
            said.append(", ".join(type(part).__name__ for part in parts if part is not None))
        with step("compose") as said:
            if cli.config.ckpt_path is not None:
                refuse_to_resume(read_checkpoint(str(cli.config.ckpt_path)), callbacks_of(cli.trainer))
            rehearsal = rehearse(cli)
            if isinstance(rehearsal.error, GuardConflict) and not rehearsal.began:
                raise rehearsal.error
            said += list(_composition(rehearsal.guards))
        with step("step") as said:
            if rehearsal.error is not None:
                raise rehearsal.error
            said += list(_places(rehearsal.guards))
            said += [f"{guard.name}: {note}" for guard in rehearsal.guards for note in guard.notes()]
        with step("undo") as said:
            if rehearsal.left:
                raise GuardConflict([f"{what} is left after training; undo it" for what in rehearsal.left])
            said.append("nothing of the guards is left in module, trainer or optimizers")
    except Exception as error:
        if not refused(error):
            raise
        return 2
    return 0


class _Steps:
    """Numbers steps and tells how each went, once for all processes."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def __call__(self, name: str) -> Iterator[list[str]]:
        self.count += 1
        said: list[str] = []
        mark, stream = "✗", sys.stderr
        try:
            yield said
            mark, stream = "✓", sys.stdout
        except Exception as error:
            said[:] = (str(error) if refused(error) else f"{type(error).__name__}: {error}").splitlines()
            raise
        finally:
            first, *more = said or [""]
            _tell(f"{self.count} {mark} {name:<8} {first}".rstrip(), stream)
            for line in more:
                _tell(f"{' ' * _INDENT}{line}", stream)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the Trainer's news about devices and limits; warnings stay."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@rank_zero_only
def _tell(line: str, stream: TextIO) -> None:
    print(line, file=stream, flush=True)


def _composition(guards: Sequence[Guard]) -> Iterator[str]:
    width = max((len(guard.name) for guard in guards), default=0)
    yield "the guards, in the order in which they act:" if guards else "no guard is switched on"
    for guard in guards:
        yield f"{guard.name:<{width}}  {guard.phase.name.lower():<9}  {guard.promise}"
    if rows := told(guards):
        yield "which of their promises survive together:"
        yield from lines(rows, _width() - _INDENT)


def _width() -> int:
    return max(60, min(140, get_terminal_size((100, 24)).columns))


def _places(guards: Sequence[Guard]) -> Iterator[str]:
    yield "one optimizer step, and a checkpoint that loads with weights_only=True"
    for transform in _TRANSFORMS:
        acting = [guard.name for guard in guards if guard.overrides(transform)]
        if acting:
            yield f"{transform}: {', '.join(acting)}"


# One step -----------------------------------------------------------------------------------------------------


@dataclass
class Rehearsal:
    """How one step of a training went."""

    guards: list[Guard] = field(default_factory=list)
    began: bool = False  # the guards let the training begin
    stepped: bool = False
    error: Exception | None = None
    left: list[str] = field(default_factory=list)  # what guards did not undo


class Trainable(Protocol):
    """What can be built again and again: a configuration, or an arm of Python callbacks."""

    config: Any
    trainer: Any
    model: Any
    datamodule: Any

    def build(
        self,
        callbacks: Sequence[pl.Callback] = (),
        without: tuple[type, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Make fresh ``trainer``, ``model`` and ``datamodule``."""
        ...


def rehearse(cli: Trainable, callbacks: Sequence[pl.Callback] = (), logs: bool = True) -> Rehearsal:
    """Train freshly built parts for one optimizer step, leaving no file behind.

    The run ends by itself after that step: with ``max_steps=1`` instead, guards would judge another training.

    Args:
        cli: what to train.
        callbacks: to be added to the Trainer's.
        logs: the run will have a logger, unless the configuration says that it has none.
    """
    stated = cli.config.trainer
    with TemporaryDirectory() as folder, quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a training that is meant to be longer
        stop = _AfterOneStep(f"{folder}/one-step.ckpt")
        options = {
            "logger": CSVLogger(folder) if logs and stated.logger is not False else False,
            "default_root_dir": folder,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "limit_val_batches": 0 if stated.limit_val_batches == 0 else 1,
            "num_sanity_val_steps": 0 if stated.num_sanity_val_steps == 0 else 1,
            "min_epochs": None,
            "min_steps": None,
            "fast_dev_run": False,
        }
        cli.build([*callbacks, stop], without=(Checkpoint,), options=options)
        stop.result.guards = guards_of(cli.trainer)
        before = set(_callables(cli.model))
        try:
            cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        except Exception as error:  # noqa: BLE001  # for the caller to judge
            stop.result.error = error
        result = stop.result
        if result.error is None and not result.stepped:
            result.error = RecipeError(
                "the training ends before its first step; look at max_epochs, max_steps and limit_train_batches"
            )
        result.left = [name for name in _callables(cli.model) if name not in before] + list(_ours(cli))
    return result


class _AfterOneStep(pl.Callback):
    def __init__(self, path: str):
        self.path = path
        self.result = Rehearsal()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.result.guards = guards_of(trainer)  # those that the module carries are there too

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.result.began = True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step or args[-1] + 1 >= trainer.accumulate_grad_batches:
            self.result.stepped = True
            trainer.save_checkpoint(self.path)
            if trainer.is_global_zero and read_checkpoint(self.path) is None:
                raise GuardConflict("a checkpoint does not load with weights_only=True; keep the state of guards plain")
            trainer.should_stop = True


def _callables(module: nn.Module) -> Iterator[str]:
    for name, layer in module.named_modules():
        for attribute, value in vars(layer).items():
            if callable(value):
                yield f"{name}.{attribute}".lstrip(".")
            elif "hooks" in attribute and isinstance(value, dict):
                for key, hook in value.items():
                    if not getattr(hook, "part_of_the_model", False):  # a guard's product, as a rewrite is
                        yield f"{name}.{attribute}[{key}]".lstrip(".")


def _ours(cli: Trainable) -> Iterator[str]:
    if current(cli.model) is not None:
        yield "the pipeline of the guards"
    trainer = cli.trainer
    owners = [trainer, trainer.strategy, trainer.strategy.precision_plugin, *trainer.optimizers]
    for owner in (*cli.model.modules(), *owners):
        for attribute, value in vars(owner).items():
            for part in value.values() if isinstance(value, dict) and "hooks" in attribute else [value]:
                if isinstance(part, StandIn) or isinstance(getattr(part, "__self__", None), Pipeline | Guard):
                    yield f"{type(owner).__name__}.{attribute}"
