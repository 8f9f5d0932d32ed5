"""The contract between a safeguard and the run it guards."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from inspect import signature
from typing import Any, ClassVar, Protocol

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_guard.batch import Batch
from lightning_guard.still import buffer_versions, still

__all__ = ["Batch", "Guard", "GuardConflict", "Phase", "Private", "Query", "Run", "Step", "Trait"]


class Phase(IntEnum):
    """Where on a step's way a guard acts. Guards act in this order, whatever the order of the callbacks."""

    REWRITE, LOADER, BATCH, LOSS, GRADIENTS, WEIGHTS = range(6)


class Trait(StrEnum):
    """What a guard does that matters to others; `composition` judges by it."""

    COUPLES_EXAMPLES = "couples_examples"  # one example changes what others contribute, `Run.private` or not
    REMEMBERS_DATA = "remembers_data"  # keeps what it computed from training data outside the gradient
    POST_PROCESSING = "post_processing"  # computes from weights, and gradients as the optimizer takes them, alone
    BOUNDS_EXAMPLES = "bounds_examples"  # bounds what any single example can contribute, as privacy needs
    QUERIES_DATA = "queries_data"  # remembers sums over training data, with noise wherever `Run.private` is there


class GuardConflict(ValueError):
    """These guards cannot keep their promises in this run; the message gives every reason and remedy at once."""

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__(self.problems)  # the argument, so that it pickles across processes

    def __str__(self) -> str:
        count = f"{len(self.problems)} reasons" if len(self.problems) > 1 else "one reason"
        return "\n  - ".join([f"the guards cannot keep their promises here, for {count}:", *self.problems])


@dataclass(frozen=True)
class Query:
    """A sum over examples that a guard needs, which has noise where examples are private.

    Args:
        name: of the query, one in a run.
        noise: standard deviation of its noise, in the largest contribution that one example can make (its L2 norm).
        once: over all examples, before the first step; else over the examples of every step.
    """

    name: str
    noise: float
    once: bool = False


class Private(Protocol):
    """Answers queries of private data; a guard that bounds examples offers it as ``Run.private``."""

    batch_size: int
    """Expected examples of a step, a public number."""
    units: int
    """Examples in the training data, a public number."""

    def once(self, name: str, rows: Callable[["Step"], Tensor]) -> Tensor:
        """The noisy sum ``(K,)`` of ``rows(step)``, ``(N, K)`` of norms at most 1, over all training examples."""
        ...

    def open(self, name: str, size: int, take: Callable[[Tensor], None]) -> None:
        """From now on ``take`` gets the noisy sum ``(size,)`` of each step, right after its gradients."""
        ...

    def add(self, name: str, rows: Tensor) -> None:
        """What the rows of this step's batch contribute, ``(N, size)`` of norms at most 1; longer ones are cut."""
        ...

    def mask(self, weight: nn.Parameter, kept: Tensor) -> None:
        """From now on a weight is held at zero but where ``kept``, by a function of what is private already.

        Gradients count there alone: the others take no part in an example's norm, and no noise is added to them.
        """
        ...

    def rewriting(self) -> AbstractContextManager[None]:
        """In this block weights that nothing trains are brought into another form, a function of themselves alone."""
        ...


@dataclass
class Run:
    """One fit, validation, test or prediction as its guards see it."""

    trainer: pl.Trainer
    module: pl.LightningModule
    guards: Sequence["Guard"]
    batch: Batch = field(default_factory=Batch)
    steps: int = 0  # training steps (micro-batches) begun since the start of training, resumed ones counted
    undo: ExitStack = field(default_factory=ExitStack)  # what ends with the run, also if it fails
    private: Private | None = None  # examples are private: what is remembered of them must come from here
    _metrics: list[nn.Module] = field(default_factory=list)
    _probed: bool = False  # a first probe has shown that probes leave no trace

    @property
    def rank(self) -> int:
        """The index of this process among all that train."""
        return int(self.trainer.global_rank)

    @property
    def protected(self) -> bool:
        """Whether examples are private, so that nothing of them may be remembered without noise."""
        return any(Trait.BOUNDS_EXAMPLES in (guard.traits or ()) and not guard.off for guard in self.guards)

    @property
    def endless(self) -> bool:
        """Whether training has no end that is known before it."""
        return bool(self.trainer.max_epochs == -1 and self.trainer.max_steps == -1)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training; raises where it has no end."""
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise GuardConflict(
                "a schedule in fractions of training needs an end; set max_epochs or max_steps on the Trainer, "
                "or give the guard's schedule in optimizer steps"
            )
        return int(total)

    def forward(self, inputs: Any) -> Tensor:
        """Logits for inputs: from the mixin, from the submodule that ``Batch.logits`` names, or from ``forward``."""
        output = said(self.module, "guard_forward", inputs)
        if output is None:
            output = self.module.get_submodule(self.batch.logits or "")(inputs)
        logits = logits_in(output)
        if logits is None:
            raise GuardConflict(
                f"{type(self.module).__name__}.forward returns {type(output).__name__}, which holds no logits; name "
                "the submodule that gives them with Batch(logits=...), or say it with GuardMixin.guard_forward"
            )
        return logits


class Step:
    """One training step as its guards see it: the batch going in, the loss coming out."""

    def __init__(self, run: Run, batch: Any):
        self.run = run
        self.module = run.module
        self.index = run.steps
        self.batch = batch  # as the guards so far have made it
        self.output: Any = None  # what training_step returned
        self.loss: Tensor | None = None
        self.probing = False
        self.rehearsal = False  # made by `again`: counts for nothing, and nothing may be learnt from it
        self.again: Any = None  # (batch) -> loss: this step once more on another batch, leaving no trace
        self.changed = False  # a guard put another batch in the place of the loader's
        self.clean: Any = None  # the inputs before an attack, if the step trains on attacked ones; the same rows
        self.forwards: list[Any] = []  # what the step's own forward passes returned
        self._group = None

    @property
    def inputs(self) -> Any:
        """The inputs as the guards so far have made them."""
        return self._read("inputs")

    @property
    def target(self) -> Any:
        """The target of each example."""
        return self._read("target")

    @property
    def attribute(self) -> Tensor:
        """The group as a quantity: floats ``(N,)`` or ``(N, A)``, NaN where unknown; negative numbers are values."""
        group = self._read("group")
        if not isinstance(group, Tensor) or group.dim() not in (1, 2):
            raise GuardConflict(
                "the group is no tensor of one or more numbers an example; say where with Batch(group=...)"
            )
        return group.float()

    @property
    def group(self) -> Tensor:
        """The group of each example, whole numbers ``(N,)``, or ``(N, A)`` of A attributes; negative where unknown."""
        group = self._read("group")
        if not isinstance(group, Tensor):
            raise GuardConflict(
                f"the group is a {type(group).__name__}, not a tensor of whole numbers; say where it is with "
                "Batch(group=...), and mind that several loaders give a batch of batches"
            )
        if group.dim() == 2 and group.shape[1] == 1:
            group = group[:, 0]
        if group.dim() not in (1, 2) or group.shape[1:] == (0,):
            raise GuardConflict(
                f"the group has shape {tuple(group.shape)}; give one whole number an example, "
                "or a column of them for each attribute"
            )
        if group.is_floating_point():
            if not bool((group.isnan() | (group == group.round())).all()):
                raise GuardConflict(
                    "the group holds fractions, so it is not a group; give whole numbers, and say where they are "
                    "with Batch(group=...)"
                )
            group = torch.nan_to_num(group, nan=-1.0)
        return group.long()

    def _read(self, part: str) -> Any:
        try:
            return self.run.batch.read(self.batch, part)
        except KeyError as error:
            raise GuardConflict(error.args[0]) from None

    def with_inputs(self, inputs: Any) -> Any:
        """The batch with other inputs, for a guard to return."""
        return self.run.batch.with_inputs(self.batch, inputs)

    @property
    def logits(self) -> Tensor:
        """The logits that this very step trains on, with their graph.

        Taken from the mixin's ``guard_logits``, else from ``logits`` or ``preds`` in what ``training_step`` returned,
        else from the one forward pass that the step made; never from a second pass or a probe.
        """
        described: Tensor | None = said(self.module, "guard_logits", self.output)
        if described is not None:
            return no_probabilities(described)
        if isinstance(self.output, Mapping):
            for key in ("logits", "preds"):
                value = self.output.get(key)
                if isinstance(value, Tensor) and value.requires_grad:
                    return no_probabilities(value)
        found = [logits for logits in map(logits_in, self.forwards) if logits is not None]
        if len(found) == 1:
            return no_probabilities(found[0])
        where = f"submodule {self.run.batch.logits!r}" if self.run.batch.logits else type(self.module).__name__
        problem = "was called and returned no logits" if self.forwards else "was not called"
        problem = f"gave logits {len(found)} times" if found else problem
        raise GuardConflict(
            f"{where} {problem} in training_step, so its logits are not known; name the submodule that gives "
            "them with Batch(logits=...), return {'loss': ..., 'logits': ...} from training_step, or say it with "
            "GuardMixin.guard_logits"
        )

    def forward(self, inputs: Any) -> Tensor:
        """Logits for inputs of a guard's own making; inside :meth:`probe`, or they count as the step's."""
        return self.run.forward(inputs)

    def losses(self, logits: Tensor, target: Any) -> Tensor:
        """The loss of each example ``(N,)``: the mixin's, or cross-entropy by the shape of the logits."""
        from lightning_guard.functional import example_losses

        described: Tensor | None = said(self.module, "guard_losses", logits, target)
        if described is None and target is None:
            raise GuardConflict(
                "this batch has no target, so the losses of its examples are not known; say where it is with "
                "Batch(target=...), or say the losses with GuardMixin.guard_losses"
            )
        return example_losses(no_probabilities(logits), target) if described is None else described

    @contextmanager
    def probe(self) -> Iterator[None]:
        """For extra passes that leave no trace on training.

        Nothing is logged and no metric counts; BatchNorm, Dropout and whatever else asks ``training`` stand still;
        other guards are paused; the global random generators are put back. Take gradients with
        ``torch.autograd.grad``, so that no ``.grad`` is touched.
        """
        with ExitStack() as undo:
            undo.enter_context(still(self.module, self.run._metrics))
            for guard in self.run.guards:
                undo.enter_context(guard.paused())
            was, self.probing = self.probing, True
            undo.callback(setattr, self, "probing", was)
            before = {} if self.run._probed else buffer_versions(self.module)
            yield
            if before:
                after = buffer_versions(self.module)
                written = [name for name, version in before.items() if after.get(name, version) != version]
                if written:
                    raise GuardConflict(
                        f"a forward pass writes the buffer {', '.join(written)} even in eval mode, so the passes of a "
                        "guard would change it; write it only if self.training"
                    )
            self.run._probed = True

    @contextmanager
    def training_pass(self, seed: int) -> Iterator[None]:
        """For one more pass that is trained on, with random numbers of its own.

        Layers are in the mode of the step, so BatchNorm counts the pass and Dropout draws by ``seed``. As in
        :meth:`probe` nothing is logged, no metric counts, other guards stand aside or join in (:meth:`Guard.joining`),
        and the global random generators are put back.
        """
        with ExitStack() as undo:
            undo.enter_context(still(self.module, self.run._metrics, training=True))
            for guard in self.run.guards:
                undo.enter_context(guard.joining())
            was, self.probing = self.probing, True
            undo.callback(setattr, self, "probing", was)
            torch.manual_seed(seed)
            yield


class Guard(pl.Callback):
    """A safeguard: a Lightning callback that changes a run at its own place. Override the transforms it needs.

    Every transform returns what it was given, or does nothing, unless it has something to change. The places are::

        rewrite(module)        the model, before weights are loaded and optimizers are made; must be idempotent
        reshape(module, ...)   the model's shapes, right before the weights of a checkpoint are loaded
        on_loader(loader)      the training data loader
        on_batch(step)         the batch the model trains on
        during(step)           around the user's training_step
        on_loss(step)          the loss
        on_gradients(module)   the gradients, right after each backward pass
        on_weights(optimizer)  the weights, right after the optimizer's step
        on_checkpoint(weights) the weights as a checkpoint is about to store them
        release(module)        the finished model, as one would ship it

    On the way in guards act in the order of their ``phase``, on the way out (loss, gradients, weights, release) in
    reverse; equals act in the order of their names, so the order of the callbacks never matters.

    Attributes:
        name: one word for slot, metric prefix, checkpoint key and recipe section.
        phase: where it acts.
        traits: what it does that matters to others; None (undeclared) is taken for the worst.
        needs_group: it reads ``step.group``.
        needs_logits: it reads ``step.logits``.
        batch: how a batch is read, if the defaults do not fit.
    """

    name: ClassVar[str] = ""
    phase: ClassVar[Phase] = Phase.LOSS
    traits: frozenset[Trait] | None = None
    needs_group: ClassVar[bool] = False
    needs_logits: bool = False
    batch: Batch | None = None
    _pipeline: Any = None  # held by one guard of a run, for all of them

    # What a guard says and does -------------------------------------------------------------------------------

    def problems(self, run: Run) -> Iterable[str]:
        """Why this guard cannot keep its promise in this run, each naming option, value and remedy."""
        return ()

    def queries(self) -> Sequence[Query]:
        """What this guard asks of training data that are private, for a plan to pay for."""
        return ()

    def brings(self) -> Mapping[str, Mapping[str, Any]]:
        """States by name of the guards that something brought in was trained under; a plan counts what they spent."""
        return {}

    def prepare(self, run: Run) -> None:
        """The run is found sound; its loaders, optimizers and restored states are not there yet."""

    def begin(self, run: Run) -> None:
        """Training is about to start: model, optimizers and the guard's restored state are there."""

    def rewrite(self, module: pl.LightningModule) -> None:
        """Change the model's structure, idempotently: this runs before every stage."""

    def reshape(self, module: pl.LightningModule, weights: Mapping[str, Tensor]) -> None:
        """Give the model the shapes of a checkpoint's weights, which are about to be loaded, whatever the stage."""

    def on_loader(self, loader: Any) -> Any:
        """The training data loader, or another in its place."""
        return loader

    def on_batch(self, step: Step) -> Any:
        """The batch to train on."""
        return step.batch

    def noisy(self, x: Tensor, step: Step) -> Tensor:
        """These inputs with the noise that this guard adds in this step; the same for every call, so that an attack,
        which comes before, climbs what the network will see."""
        return x

    @contextmanager
    def during(self, step: Step) -> Iterator[None]:
        """A context around the user's own ``training_step``."""
        yield

    def on_loss(self, step: Step) -> Tensor:
        """The loss to differentiate."""
        assert step.loss is not None
        return step.loss

    def on_gradients(self, module: pl.LightningModule) -> None:
        """Change gradients in place; loggers and clipping see only the result."""

    def on_weights(self, optimizer: Optimizer) -> None:
        """Change the weights in place that this optimizer has just stepped; gradients are off."""

    def on_checkpoint(self, weights: dict[str, Tensor]) -> None:
        """Replace entries of a state dict about to be stored; its tensors are the model's own, so never in place."""

    def release(self, module: pl.LightningModule) -> None:
        """Leave the model as one would ship it; runs after a fit that ended well."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stand aside while another guard makes passes of its own."""
        yield

    @contextmanager
    def joining(self) -> Iterator[None]:
        """Another guard makes one more pass on the batch, whose loss joins the step's: stand aside, or join in."""
        with self.paused():
            yield

    def settled(self, run: Run) -> bool:
        """Whether the weights of now are such as this guard promises, e.g. a schedule has come to its end."""
        return True

    def state(self) -> dict[str, Any]:
        """What a resume needs: numbers, strings and tensors only, so that it loads with ``weights_only=True``."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave."""

    def report(self, module: pl.LightningModule, **figures: float | Tensor) -> None:
        """Log figures as ``guard/<name>/<figure>``, averaged over an epoch's steps, for loggers and EarlyStopping."""
        for figure, value in figures.items():
            # batch_size=1: a figure of the step, not of its examples. Ranks meet once, at the end of the epoch.
            key = f"guard/{self.name}/{figure}"
            module.log(key, value, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def notes(self) -> list[str]:
        """Sentences about the training that has just ended that its reader must know, for the report."""
        return []

    def privacy(self) -> dict[str, Any]:
        """What the training that has just ended claims or shows of privacy, in plain numbers; empty if nothing.

        Known are ``claims``, pairs of epsilon and delta that all hold, the first the one to be told; ``unit``, who is
        protected; and of an audit ``lower_bound``, ``ceiling``, ``confidence`` and ``audit_delta``.
        """
        return {}

    @property
    def promise(self) -> str:
        """The first line of the docstring."""
        return (type(self).__doc__ or "").strip().split("\n")[0]

    def options(self) -> dict[str, Any]:
        """The options by name, for the record of a comparison; an option without an attribute is left out."""
        names = signature(type(self).__init__).parameters
        return {name: getattr(self, name) for name in names if name != "self" and hasattr(self, name)}

    @property
    def off(self) -> bool:
        """Whether the options switch this guard off: it promises nothing then, so no rule refuses it."""
        return False

    def overrides(self, transform: str) -> bool:
        """Whether this guard acts at this place; a guard whose options decide it may say so, the same at all times."""
        return getattr(type(self), transform) is not getattr(Guard, transform)

    # Lightning's side; the pipeline does the work ----------------------------------------------------------------

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        instead_of = {
            "setup": "begin", "on_fit_start": "begin", "on_load_checkpoint": "restore", "on_save_checkpoint": "state",
            "teardown": "release", "on_exception": "release",
        }  # fmt: skip
        for hook, instead in instead_of.items():
            if hook in vars(cls):
                raise TypeError(
                    f"{cls.__name__} overrides {hook}, which installs the guards; override {instead} instead"
                )
        if not cls.name.isidentifier() and not cls.__name__.startswith("_"):
            raise TypeError(f"{cls.__name__}.name={cls.name!r} must be one word, like a variable's name")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        from lightning_guard.pipeline import Pipeline  # the contract must not depend on what runs it

        if self._pipeline is not None:  # of a run that failed so badly that Lightning never told us
            self._pipeline.close(finished=False)
            self._pipeline = None
        guards = guards_of(trainer)
        if guards[0] is self:
            self._pipeline = Pipeline(trainer, pl_module, guards)
            self._pipeline.install(stage)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._pipeline is not None:
            self._pipeline.restore(checkpoint)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        from lightning_guard.pipeline import remember

        remember(pl_module, checkpoint)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        from lightning_guard.pipeline import current

        pipeline = current(pl_module)
        if pipeline is None or all(guard is not self for guard in pipeline.guards):
            raise GuardConflict(
                f"{self.name} was added to the callbacks after the run was set up, so it does not act; give it to the "
                "Trainer, or return it from configure_callbacks"
            )
        if self._pipeline is not None:
            self._pipeline.begin()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._pipeline is not None:
            pipeline, self._pipeline = self._pipeline, None
            pipeline.close(finished=stage == "fit")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # Lightning skips teardown when training fails (Lightning-AI/pytorch-lightning#19594).
        if self._pipeline is not None:
            self._pipeline.fail(then=lambda: setattr(self, "_pipeline", None))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_pipeline"}


def callbacks_of(trainer: Any) -> list[pl.Callback]:
    """The callbacks of a Trainer, which declares them nowhere."""
    return list(trainer.callbacks)


def guards_of(trainer: Any, module: Any = None) -> list[Guard]:
    """The guards of a run in the order in which they act; with a module, those that it carries as well."""
    carried = [] if module is None else module.configure_callbacks()
    both = [*callbacks_of(trainer), *(carried if isinstance(carried, Sequence) else [carried])]
    return sorted((one for one in both if isinstance(one, Guard)), key=lambda guard: (guard.phase, guard.name))


def said(module: Any, what: str, *args: Any) -> Any:
    """What a module that inherits GuardMixin says of itself; None if it says nothing."""
    return getattr(module, what)(*args) if hasattr(module, what) else None


def logits_in(output: Any) -> Tensor | None:
    """The logits in what a forward pass returned: itself, or its ``logits``."""
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif not isinstance(output, Tensor):
        output = getattr(output, "logits", None)
    return output if isinstance(output, Tensor) and output.is_floating_point() and output.dim() > 0 else None


_PROBABILITIES = ("SigmoidBackward0", "SoftmaxBackward0")
_SAME_VALUES = ("SqueezeBackward", "UnsqueezeBackward", "ViewBackward", "ReshapeAliasBackward", "ToCopyBackward")


def no_probabilities(logits: Tensor) -> Tensor:
    """The logits; refused if their graph says that they are probabilities already, which nobody means to pass on."""
    node = logits.grad_fn
    while node is not None and type(node).__name__.startswith(_SAME_VALUES):
        node = node.next_functions[0][0]
    if type(node).__name__ in _PROBABILITIES:
        raise GuardConflict(
            "what should be logits are probabilities, the output of a sigmoid or softmax, so gradients and decisions "
            "would be wrong; name the submodule before it with Batch(logits=...), return {'loss': ..., 'logits': ...} "
            "from training_step, or say them with GuardMixin (guard_forward, guard_logits)"
        )
    return logits
