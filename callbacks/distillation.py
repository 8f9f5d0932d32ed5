"""Knowledge distillation as a guard."""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_guard.compression.apart import outputs_of, plain_copy
from lightning_guard.functional.distillation import (
    distillation_losses,
    feature_losses,
    hits_and_counts,
    output_losses,
)
from lightning_guard.functional.reshaping import reshape_like
from lightning_guard.guard import Batch, Guard, GuardConflict, Phase, Run, Step, Trait
from lightning_guard.pipeline import SECTION
from lightning_guard.still import still

_DENSE = "dense_copy"


class KnowledgeDistillation(Guard):
    r"""Trains the model to predict what a teacher predicts, softened, besides the labels (Hinton et al., 2015).

    .. math:: (1 - \alpha) \, \ell + \alpha \, T^2 \, \mathrm{KL}\big(\sigma(z_t / T) \,\|\, \sigma(z_s / T)\big)

    The teacher sees the very inputs that the student trains on, as the guards before have made them, attacked ones
    for instance. It stands outside the module: not in its ``state_dict``, its optimizer or its copies, in eval mode,
    without gradients, on its device and in its precision. Its pass draws no random number of the run and logs nothing.

    Logs ``guard/distillation/divergence``, the distance to the teacher in nats, ``guard/distillation/features``, and
    ``guard/distillation/active``, 1 while the teacher teaches.

    Args:
        teacher: ``dense_copy``, the path of a checkpoint of the same class, or any module.
            ``dense_copy`` is the model itself before it is compressed: as it is when training begins and before other
            guards rewrite it, or, with a later ``start``, as it is then, so that one training from scratch teaches
            its own compressed self.
        temperature: :math:`T`; the higher it is, the more the wrong classes say.
        alpha: :math:`\alpha`, the share of the teacher in the loss, in [0, 1]; 0 without ``features`` switches the
            guard off.
        loss: ``kl`` for classifiers, or ``mse``, the squared distance of the outputs, for regression or logits.
        features: layers whose outputs the student imitates too (Romero et al., 2015): names that both have, or a
            mapping from the student's to the teacher's. Shapes must be equal.
        feature_weight: weight of the features' distance in the loss.
        start: when the teacher begins, as a fraction of training (float) or in optimizer steps (int); with
            ``dense_copy``, what it is a copy of.
        end: when it ends, likewise.
        public: the teacher was trained on public data only. Otherwise it holds private rows, which DP-SGD refuses, but
            for a checkpoint that DP-SGD has trained on the same data: what that has spent is then counted as well.
        batch: how a batch is read, if the defaults do not fit.

    | case                                              | result                                                     |
    |---------------------------------------------------|------------------------------------------------------------|
    | ``alpha=0`` without ``features``                  | training is bit-identical to training without the guard    |
    | one logit an example, targets in [0, 1]           | the divergence of the sigmoid                              |
    | floating targets of the logits' shape             | one sigmoid a logit                                        |
    | targets of one output outside [0, 1] with ``kl``  | refused: regression takes ``loss="mse"``                   |
    | a teacher no better than one constant answer      | a warning and a note                                       |
    | outputs or features of other shapes               | refused on the first batch                                 |
    | another teacher on resume                         | refused; a dense copy is in the checkpoint                 |
    | several processes                                 | each asks its own copy of the first one's teacher          |

    Raises:
        GuardConflict: before training or on a batch, if the promise cannot be kept.

    Reference:
        Hinton, Vinyals and Dean, Distilling the knowledge in a neural network, 2015, arXiv:1503.02531.
        Romero et al., FitNets, ICLR 2015, arXiv:1412.6550.

    Example:
        >>> import pytorch_lightning as pl
        >>> trainer = pl.Trainer(callbacks=[KnowledgeDistillation(start=0.5)], logger=False)
    """

    name: ClassVar[str] = "distillation"
    phase: ClassVar[Phase] = Phase.LOSS
    traits: frozenset[Trait] | None = frozenset()  # with a teacher that nobody has paid for, REMEMBERS_DATA

    def __init__(
        self,
        teacher: Any = _DENSE,  # a string or a module; command lines give strings
        temperature: float = 4.0,
        alpha: float = 0.5,
        loss: Literal["kl", "mse"] = "kl",
        features: list[str] | dict[str, str] | None = None,
        feature_weight: float = 1.0,
        start: int | float = 0.0,
        end: int | float = 1.0,
        public: bool = False,
        batch: Batch | None = None,
    ):
        if not isinstance(teacher, str | nn.Module):
            raise ValueError(
                f"teacher={teacher!r} is no teacher; give {_DENSE!r}, the path of a checkpoint or a module"
            )
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be above 0; 4 is common")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} is no share of the loss; give a number in [0, 1]")
        if loss not in ("kl", "mse"):
            raise ValueError(f"loss={loss!r} is not known; give 'kl' or 'mse'")
        if not feature_weight > 0:
            raise ValueError(f"feature_weight={feature_weight} must be above 0; leave out features to switch them off")
        for key, time in (("start", start), ("end", end)):
            if time < 0 or (isinstance(time, float) and time > 1):
                raise ValueError(f"{key}={time} is no time; give a fraction in [0.0, 1.0] or a number of steps")
        if type(start) is type(end) and start >= end:
            raise ValueError(f"start={start} does not come before end={end}; give an earlier start")
        self.teacher, self.temperature, self.alpha, self.loss = teacher, temperature, alpha, loss
        self.features, self.feature_weight = features, feature_weight
        self.start, self.end, self.public, self.batch = start, end, public, batch
        self.needs_logits = not self.off
        self._known: tuple[Any, Mapping[str, Mapping[str, Any]]] = (None, {})  # a file, and the guards of its training
        self.traits = frozenset() if self._paid else frozenset({Trait.REMEMBERS_DATA})
        self._pairs = dict(features) if isinstance(features, Mapping) else {name: name for name in features or ()}
        self._steps = 0
        self._window: tuple[int, int] | None = None
        self._run: Run | None = None
        self._teacher: nn.Module | None = None
        self._plain: Any = None  # the module as it was before any guard rewrote it
        self._restored: Mapping[str, Any] | None = None
        self._counted: tuple[Tensor, Tensor] | None = None  # what the teacher got right, and the answers
        self._seen: MutableMapping[Step, dict[str, list[Tensor]]] = {}  # the student's features of each step
        self._outer: Any = None
        self._loaded: Mapping[str, Tensor] | None = None
        self._looked = self._said = False

    @property
    def _paid(self) -> bool:
        """Whether the teacher holds no private rows, or such as a plan has paid for."""
        # A copy holds no more than the weights that training begins with.
        return self.teacher == _DENSE or self.public or any("plan" in state for state in self.brings().values())

    def brings(self) -> Mapping[str, Mapping[str, Any]]:
        path = Path(self.teacher) if isinstance(self.teacher, str) else None
        if self.public or self.teacher == _DENSE or path is None or not path.is_file():
            return {}
        if self._known[0] != (version := (path, path.stat().st_mtime_ns)):
            stored = torch.load(path, map_location="cpu", weights_only=True)
            self._known = version, stored.get(SECTION, {}).get("guards", {})
        return self._known[1]

    @property
    def off(self) -> bool:
        return not self.alpha and not self.features

    def overrides(self, transform: str) -> bool:
        acting = ("reshape", "during", "on_loss", "on_weights")
        return not (self.off and transform in acting) and super().overrides(transform)

    # Before training --------------------------------------------------------------------------------------------

    def problems(self, run: Run) -> Iterable[str]:
        if self.off:
            return
        if run.endless and self._timed:
            yield (
                f"start={self.start} and end={self.end} are fractions of a training without end; "
                "set max_epochs or max_steps on the Trainer, or give optimizer steps"
            )
        if isinstance(self.start, int) and 0 <= run.trainer.max_steps <= self.start:
            yield (
                f"start={self.start} comes after the last optimizer step, max_steps={run.trainer.max_steps}, so the "
                "teacher never teaches; train longer or give an earlier start"
            )
        if isinstance(self.teacher, str) and self.teacher != _DENSE and not Path(self.teacher).is_file():
            yield f"teacher={self.teacher!r} is no file; give the path of a checkpoint, or {_DENSE!r}"
        elif run.protected and not self._paid and not self.traits:  # another file than when the guard was made
            yield f"teacher={self.teacher!r} is no longer a checkpoint of a private training; give one, or a public one"
        made_later = getattr(type(run.module), "configure_model", None) is not pl.LightningModule.configure_model
        if made_later and self.teacher == _DENSE and not self.start:
            yield (
                f"{type(run.module).__name__}.configure_model makes layers as training is set up, so there is nothing "
                "to copy before; make them in __init__, give a later start, or give a checkpoint as teacher"
            )
        if isinstance(self.teacher, nn.Module) and not any(True for _ in self.teacher.parameters()):
            yield f"teacher={type(self.teacher).__name__} has no parameters; give a trained module"

    @property
    def _timed(self) -> bool:
        """Whether the schedule needs to know how long training is."""
        return any(isinstance(time, float) and 0 < time < 1 for time in (self.start, self.end))

    @property
    def _ends(self) -> bool:
        return self.end != 1.0 or isinstance(self.end, int)

    def prepare(self, run: Run) -> None:
        self._teacher = self._plain = self._restored = self._counted = self._window = None
        self._steps, self._looked, self._said, self._loaded = 0, False, False, None
        if self.off:
            return
        if isinstance(self.teacher, nn.Module):
            self._teacher = plain_copy(self.teacher)
            return
        self._plain = plain_copy(run.module)
        if self.teacher == _DENSE:
            self._teacher = None if self.start else self._plain
            return
        with torch.random.fork_rng():
            self._plain.configure_model()
        stored = torch.load(self.teacher, map_location="cpu", weights_only=True)
        weights = stored.get("state_dict", stored)
        try:
            reshape_like(self._plain, weights)
            self._plain.load_state_dict(weights)
        except (RuntimeError, ValueError) as error:
            raise GuardConflict(
                f"{self.name}: teacher={self.teacher!r} does not fit {type(run.module).__name__}: {error}; give a "
                "checkpoint of the same class, or the teacher as a module"
            ) from error
        self._teacher = self._plain

    def begin(self, run: Run) -> None:
        self._run, self._seen = run, WeakKeyDictionary()
        if self.off:
            return
        for name in self._pairs:
            self._layer(run.module, name, "the model")
        kept, self._restored = self._restored, None
        if kept is not None:
            self._take_up(kept, run)
        if self._teacher is not None:
            if kept is None:
                self._copy_loaded()
            self._enter()
        self._loaded = None

    def reshape(self, module: pl.LightningModule, weights: Mapping[str, Tensor]) -> None:
        if self.teacher == _DENSE and self._teacher is not None and not self.off:
            self._loaded = weights  # training begins with these, if it is none of ours that goes on

    def _copy_loaded(self) -> None:
        """A dense copy of what an unguarded training left, from which this one begins."""
        assert self._teacher is not None
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            reshape_like(self._teacher, loaded)
            self._teacher.load_state_dict(loaded)

    def _take_up(self, kept: Mapping[str, Any], run: Run) -> None:
        self._steps = kept["steps"]
        self._counted = None if kept["hits"] is None else (kept["hits"], kept["counts"])
        if "hash" in kept:
            assert self._teacher is not None
            if kept["hash"] != _hash(self._teacher):
                raise GuardConflict(
                    f"{self.name}: the checkpoint was trained with another teacher than this one (its weights differ); "
                    "give that teacher, or begin a new training"
                )
        elif kept["weights"] is not None:
            self._teacher = plain_copy(run.module) if self._plain is None else self._plain
            reshape_like(self._teacher, kept["weights"])
            self._teacher.load_state_dict(kept["weights"])

    def _enter(self) -> None:
        """The teacher takes its place: constant, where the student is and in its precision, the same everywhere."""
        assert self._run is not None
        assert self._teacher is not None
        trainer = self._run.trainer
        if self.teacher == _DENSE and trainer.world_size > 1:  # processes may have begun with other weights
            weights = {name: value.cpu() for name, value in self._teacher.state_dict().items()}
            self._teacher.load_state_dict(trainer.strategy.broadcast(weights))
        self._teacher = trainer.precision_plugin.convert_module(self._teacher).to(self._run.module.device)
        self._teacher.requires_grad_(False).eval()
        for name in self._pairs.values():
            self._layer(self._teacher, name, "the teacher")

    def _layer(self, module: nn.Module, name: str, whose: str) -> nn.Module:
        layers = dict(module.named_modules())
        if name not in layers or not name:
            raise GuardConflict(
                f"{self.name}: features={name!r} names no layer of {whose}; it has "
                f"{', '.join(filter(None, layers)) or 'none'}"
            )
        return layers[name]

    # A step -----------------------------------------------------------------------------------------------------

    @property
    def _active(self) -> bool:
        if self._window is None:
            assert self._run is not None
            total = self._run.total_steps if self._timed else 0
            start = round(self.start * total) if isinstance(self.start, float) else self.start
            end = round(self.end * total) if isinstance(self.end, float) else self.end  # 1.0 is never looked at
            self._window = start, end if self._ends else -1
        start, end = self._window
        return self._teacher is not None and start <= self._steps and (end < 0 or self._steps < end)

    @contextmanager
    def during(self, step: Step) -> Iterator[None]:
        self._outer = step  # of a manual training_step, which asks for a step of its own
        self._seen[step] = {name: [] for name in self._pairs}
        with ExitStack() as undo:
            if not self._looked:
                self._watch_inputs(step, undo)
            if self._active:
                for name in self._pairs:
                    layer = step.module.get_submodule(name)
                    undo.callback(layer.register_forward_hook(self._keeping(step, name)).remove)
            yield

    def _keeping(self, step: Step, name: str) -> Any:
        def keep(layer: nn.Module, args: Any, output: Any) -> None:
            if not step.probing and _running(step):
                self._seen[step][name].append(output)

        return keep

    def _watch_inputs(self, step: Step, undo: ExitStack) -> None:
        """Once: whether the student is given the batch's inputs, or the teacher would see something else."""
        described = getattr(type(step.module), "guard_forward", None)
        own = described is not None and described.__module__ != "lightning_guard.mixins"
        if own or getattr(step.module, "_compiler_ctx", None):
            return

        def look(source: nn.Module, args: tuple[Any, ...]) -> None:
            if step.probing or not _running(step):
                return
            given, batch = args[0] if args else None, step.inputs
            if not isinstance(given, Tensor) or not isinstance(batch, Tensor) or given is batch:
                return
            if given.shape != batch.shape or not bool((given - batch).abs().max() <= 0.02 * batch.abs().max()):
                raise GuardConflict(
                    f"{self.name}: training_step changes the inputs before {type(source).__name__} sees them "
                    "(normalisation, augmentation), so the teacher would see others; change them in the loader or in "
                    "on_after_batch_transfer, or say the whole way to the logits with GuardMixin.guard_forward"
                )

        source = step.module.get_submodule(step.run.batch.logits or "")
        undo.callback(source.register_forward_pre_hook(look, prepend=True).remove)

    def on_loss(self, step: Step) -> Tensor:
        loss = super().on_loss(step)
        if not self._active:
            self.report(step.module, active=0.0)
            return loss
        logits, target = step.logits, self._target(step)
        outputs, hints = self._ask(step)
        if not self._looked:
            self._refuse_regression(logits, target)
        self._looked = True
        figures = {"active": torch.tensor(1.0)}
        try:
            if self.loss == "mse":
                divergence = output_losses(logits, outputs).mean()
            else:
                labels = target is not None and target.is_floating_point() and target.shape == logits.shape
                divergence = distillation_losses(logits, outputs, self.temperature, labels).mean()
            loss = (1 - self.alpha) * loss + self.alpha * divergence
            figures["divergence"] = divergence.detach()
            if self._pairs:
                distances = [feature_losses(self._feature(step, name), hints[name]).mean() for name in self._pairs]
                features = torch.stack(distances).mean()
                loss = loss + self.feature_weight * features
                figures["features"] = features.detach()
        except ValueError as error:
            raise GuardConflict(f"{self.name}: {error}") from None
        if not step.rehearsal:
            self._count(step, outputs, target)
        self.report(step.module, **figures)
        return loss

    def _target(self, step: Step) -> Tensor | None:
        found = None if step.run.batch.find(step.batch, "target") is None else step.target
        return found if isinstance(found, Tensor) else None

    def _feature(self, step: Step, name: str) -> Tensor:
        seen = self._seen[step if step in self._seen else self._outer][name]
        if len(seen) != 1 or not isinstance(seen[0], Tensor):
            what = "gave no tensor" if len(seen) == 1 else f"was called {len(seen)} times"
            raise GuardConflict(
                f"{self.name}: features={name!r} {what} in training_step; name a layer that gives one tensor a step"
            )
        return seen[0]

    def _ask(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher's outputs for the inputs of this step, and its features by the student's names."""
        teacher, hints = self._teacher, dict[str, Tensor]()
        assert teacher is not None
        with torch.no_grad(), still(teacher, ()), ExitStack() as undo:
            for name, other in self._pairs.items():

                def keep(layer: nn.Module, args: Any, output: Any, name: str = name) -> None:
                    hints[name] = output

                undo.callback(teacher.get_submodule(other).register_forward_hook(keep).remove)
            logits = outputs_of(teacher, step.inputs, step.run.batch, like=type(step.module))
        missing = [name for name in self._pairs if not isinstance(hints.get(name), Tensor)]
        if missing:
            raise GuardConflict(
                f"{self.name}: features={self._pairs[missing[0]]!r} gives no tensor in the teacher; name another layer"
            )
        return logits, hints

    def _refuse_regression(self, logits: Tensor, target: Tensor | None) -> None:
        if self.loss != "kl" or target is None:
            return
        single = logits.dim() == 1 or (logits.dim() == 2 and logits.shape[1] == 1)
        if single and bool(((target < 0) | (target > 1)).any()):
            raise GuardConflict(
                f"{self.name}: loss='kl' compares classes, and targets range over [{target.min().item():.4g}, "
                f"{target.max().item():.4g}] for one output an example, which is regression; give loss='mse'"
            )

    def _count(self, step: Step, outputs: Tensor, target: Tensor | None) -> None:
        if (
            target is None or self.loss == "mse" or step.run.protected
        ):  # a count of private rows would leave without noise
            return
        found = hits_and_counts(outputs, target)
        if found is not None:
            old = self._counted
            self._counted = found if old is None else (old[0].to(found[0]) + found[0], old[1].to(found[1]) + found[1])

    def on_weights(self, optimizer: Optimizer) -> None:
        assert self._run is not None
        if optimizer is not self._run.trainer.optimizers[0]:  # several optimizers: the first one keeps time
            return
        self._steps += 1
        if self._teacher is None and self._window is not None and self._steps >= self._window[0]:
            self._teacher = self._snapshot(self._run.module)
            self._enter()

    def _snapshot(self, module: pl.LightningModule) -> nn.Module:
        """The model as it is now, in the user's own classes where its shapes are still the user's."""
        weights, plain = module.state_dict(), self._plain
        if plain is None or {k: v.shape for k, v in plain.state_dict().items()} != {
            k: v.shape for k, v in weights.items()
        }:
            return plain_copy(module)
        plain.load_state_dict(weights)
        return plain

    # After it ---------------------------------------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._said and (blind := self._blind()):
            self._said = True
            rank_zero_warn(f"{self.name}: {blind}")

    def _blind(self) -> str:
        """What to say of a teacher that knows nothing; nothing if it knows something."""
        if self._counted is None:
            return ""
        hits, counts = (value.double().cpu() for value in self._counted)
        total, constant = counts.sum().item(), counts.amax(1).sum().item()
        spread = (constant * (1 - constant / max(total, 1))) ** 0.5
        if not total or hits.item() > constant + 2 * spread:
            return ""
        copied = "a later start, after which there is something to copy" if self.teacher == _DENSE else "another one"
        return (
            f"the teacher gets {hits.item() / total:.1%} of the training answers right that it has seen, and the most "
            f"frequent answer {constant / total:.1%}, so there is nothing to learn from it; give {copied}"
        )

    def notes(self) -> list[str]:
        blind = self._blind()
        return [blind[0].upper() + blind[1:] + "."] if blind else []

    def settled(self, run: Run) -> bool:
        return self.off or self._teacher is not None

    def release(self, module: pl.LightningModule) -> None:
        if not self.off and self._teacher is None:
            rank_zero_warn(
                f"{self.name}: training ended at optimizer step {self._steps}, before start={self.start}, so the "
                "teacher never taught. Train longer, or give an earlier start."
            )
        self._run, self._plain, self._outer, self._seen = None, None, None, {}

    def state(self) -> dict[str, Any]:
        if self.off:
            return {}
        hits, counts = (None, None) if self._counted is None else (value.cpu() for value in self._counted)
        state = {"steps": self._steps, "hits": hits, "counts": counts}
        if self.teacher != _DENSE:
            return {**state, "hash": "" if self._teacher is None else _hash(self._teacher)}
        weights = None if self._teacher is None else self._teacher.state_dict()
        return {**state, "weights": weights and {name: value.cpu() for name, value in weights.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state:
            self._restored = state


def _running(step: Step) -> bool:
    """Whether the forward pass of now is of this step, and not of a repetition of it on other rows."""
    return not step.module.automatic_optimization or getattr(step.run, "step", step) is step


def _hash(module: nn.Module) -> str:
    digest = sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
