"""Why the guards of a run cannot keep their promises in it, found before it begins."""

import inspect
from collections.abc import Iterator

import pytorch_lightning as pl

from lightning_guard.batch import Batch
from lightning_guard.composition import judge
from lightning_guard.guard import Run, callbacks_of

_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")
_FINDERS = {"LearningRateFinder", "BatchSizeFinder"}


def whatever_the_stage(run: Run) -> Iterator[str]:
    """Problems of training, validation, test and prediction alike."""
    names = [guard.name for guard in run.guards]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"{names.count(name)} guards are called {name!r}; keep one, or give a subclass another name"
    strategy = type(run.trainer.strategy).__name__
    if strategy not in _STRATEGIES:
        yield f"strategy={strategy} shards or moves the model in ways no guard is proven with; use a device or ddp"
    yield from judge(run)


def before_a_fit(run: Run) -> Iterator[str]:
    """Problems of training."""
    for callback in callbacks_of(run.trainer):
        for name in _FINDERS & {cls.__name__ for cls in type(callback).__mro__}:
            yield (
                f"{name} trains within a training and rewinds it, and the guards' schedules would follow neither; "
                "run it (or Tuner) with a Trainer without guards (on public data, for privacy), then set "
                "what it found"
            )
    yield from _cannot_step(run)
    for guard in run.guards:
        for problem in guard.problems(run):
            yield f"{guard.name}: {problem}"


def read_as(run: Run) -> tuple[Batch, list[str]]:
    """How the guards and the module say that a batch is read, and where they disagree."""
    problems = []
    stated = {guard.name: guard.batch for guard in run.guards if guard.batch is not None}
    own = getattr(run.module, "guard_batch", None)
    if own is not None:
        stated[type(run.module).__name__] = own
    if len(set(stated.values())) > 1:
        who = "; ".join(f"{name}: {batch}" for name, batch in stated.items())
        problems.append(f"the batch is read in different ways ({who}); state it once")
    batch = next(iter(stated.values()), Batch())
    names = dict(run.module.named_modules())
    configures = getattr(type(run.module), "configure_model", None) is not pl.LightningModule.configure_model
    if batch.logits is not None and batch.logits not in names and not configures:
        problems.append(
            f"Batch(logits={batch.logits!r}) names no submodule of {type(run.module).__name__}; "
            f"it has {', '.join(name for name in names if name)}"
        )
    return batch, problems


def _cannot_step(run: Run) -> Iterator[str]:
    steppers = [g.name for g in run.guards if g.overrides("on_batch") or g.overrides("on_loss")]
    if not steppers:
        return
    name = type(run.module).__name__
    if "dataloader_iter" in inspect.signature(run.module.training_step).parameters:
        yield (
            f"{', '.join(steppers)}: {name}.training_step takes dataloader_iter and fetches its own batches; take "
            "(batch, batch_idx) instead"
        )
    if not run.module.automatic_optimization and not hasattr(run.module, "guard_step"):
        yield (
            f"{', '.join(steppers)}: {name} optimises manually and keeps batch and loss to itself; inherit "
            "GuardMixin and call self.guard_step in training_step, or set automatic_optimization=True"
        )
