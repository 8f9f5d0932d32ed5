"""Quantisation-aware training as a guard."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
import torchmetrics
from pytorch_lightning.utilities import CombinedLoader, rank_zero_warn
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_guard.functional.quantization import (
    CELLS,
    FakeQuantization,
    LostRows,
    NoisyRanges,
    Range,
    StepLearner,
    anew,
    batch_norms,
    chosen_layers,
    range_rows,
    ranges_by_layer,
)
from lightning_guard.guard import Batch, Guard, GuardConflict, Phase, Private, Query, Run, Step, Trait, said
from lightning_guard.still import still
from lightning_guard.undo import swap

_RANGES = "quantization_ranges"  # the name of a query
_MOMENTUM = 0.05  # of a new range in the moving average: the last twenty steps count
_BATCHES = 20  # for BatchNorm's statistics at the end


class QuantizationAwareTraining(Guard):
    r"""Trains a model that keeps its accuracy with weights and activations of a few bits (Jacob et al., 2018).

    From ``start`` on, weights of Linear, convolution, embedding and attention layers and the inputs of these layers are
    rounded in every forward pass, in validation too, and gradients pass the rounding straight through. Weights:
    symmetric, a step for each output channel, so zeros stay zeros. Inputs: asymmetric, one range a layer, unsigned.

    After training the module is plain, and its weights lie exactly on their grids: 32-bit evaluation is that of the
    weight-quantised model, and an exporter with symmetric steps by channel finds the very codes of training. So does
    every checkpoint from ``start`` on, which beside them stores the unrounded weights for a resume. The ranges of
    inputs are in ``activation_ranges`` and in the checkpoint. ``state_dict`` keys do not change.

    Logs ``guard/quantization/quantized``, 1 from ``start`` on.

    Args:
        bits: of weights, 2 to 8; None switches the guard off.
        activation_bits: of the inputs of layers, 2 to 8; None leaves them, so that training reads no data for it.
        scheme: ``minmax``, steps follow the largest weight and the observed range; ``lsq``, steps are learned, for 4
            bits and fewer.
        start: when rounding begins, as a fraction of training (float) or in optimizer steps (int).
        end: when ranges and learned steps are final, as a fraction of training (float) or in optimizer steps (int).
        ranges: fixed ranges of inputs, in their own units: one pair for all layers, or pairs by layer name or pattern.
            Nothing is observed then.
        range_noise: beside DP-SGD, standard deviation of the noise on the counts that tell ranges in each step up to
            ``end``, over what one example contributes to all of them; paid from the same budget.
        batchnorm: ``reestimate`` averages the statistics of BatchNorm over 20 batches after the last step; ``keep``
            leaves the moving average. Never frozen: that breaks training.
        step_lr: relative change of a learned step in one update, at the start; falls to 0 at ``end``.
        targets: names or patterns (``*``) of modules to quantise; None for all that can be.
        ignore: names or patterns (``*``) of modules to leave alone.
        batch: how a batch is read, if the defaults do not fit; used for BatchNorm alone.

    | case                                        | result                                                  |
    |---------------------------------------------|---------------------------------------------------------|
    | ``bits=None``                               | training is bit-identical to training without the guard |
    | a pattern that matches nothing              | refused, with the names that there are                  |
    | a layer without a range in ``ranges``       | refused                                                 |
    | the first step after ``start``              | inputs are only observed                                |
    | beside DP-SGD                               | ranges are noisy quantiles, told after some steps       |
    | ... with more noise than can tell any by ``end`` | refused on the first step                          |
    | ... with ``lsq``                            | refused: steps are learned from raw gradients           |
    | attacks, probes, validation                 | rounded, not observed                                   |
    | a layer that training never calls           | its input is left, with a warning                       |
    | a weight shared by two quantised layers     | one grid; refused if their channels differ              |
    | a weight shared with a layer left alone     | left alone                                              |
    | weight_norm, lazy, 16-bit weights           | refused                                                 |
    | ``nn.MultiheadAttention``                   | projections and the three inputs; not what is between   |
    | training ends before ``start``              | refused if it can be known, else a warning              |
    | ``lsq`` with 16-mixed, or several optimizers | refused                                                |

    Raises:
        ValueError: for values that describe no quantisation.
        GuardConflict: before training, if the promise cannot be kept.

    Reference:
        Jacob et al., CVPR 2018, arXiv:1712.05877. Learned steps: Esser et al., ICLR 2020, arXiv:1902.08153.
        BatchNorm: Nagel et al., ICML 2022, arXiv:2203.11086.

    Example:
        >>> import pytorch_lightning as pl
        >>> trainer = pl.Trainer(callbacks=[QuantizationAwareTraining(bits=8)], logger=False)
    """

    name: ClassVar[str] = "quantization"
    phase: ClassVar[Phase] = Phase.REWRITE
    traits: frozenset[Trait] | None = frozenset({Trait.QUERIES_DATA})  # by scheme and ranges

    def __init__(
        self,
        bits: int | None = 8,
        activation_bits: int | None = 8,
        scheme: Literal["minmax", "lsq"] = "minmax",
        start: int | float = 0.5,
        end: int | float = 0.85,
        ranges: Range | Mapping[str, Range] | None = None,
        range_noise: float = 8.0,
        batchnorm: Literal["reestimate", "keep"] = "reestimate",
        step_lr: float = 0.01,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = (),
        batch: Batch | None = None,
    ):
        for option, width in (("bits", bits), ("activation_bits", activation_bits)):
            if width is not None and not 2 <= width <= 8:
                raise ValueError(f"{option}={width} is no width of a code; give 2 to 8, or None")
        if scheme not in ("minmax", "lsq"):
            raise ValueError(f"scheme={scheme!r} is not known; give 'minmax' or 'lsq'")
        if batchnorm not in ("reestimate", "keep"):
            raise ValueError(f"batchnorm={batchnorm!r} is not known; give 'reestimate' or 'keep'")
        for option, value in (("start", start), ("end", end)):
            if value < 0 or (isinstance(value, float) and value > 1):
                raise ValueError(f"{option}={value} is no time; give a fraction in [0.0, 1.0] or a number of steps")
        if type(start) is type(end) and start > end:
            raise ValueError(f"start={start} comes after end={end}; give an earlier start")
        if step_lr <= 0:
            raise ValueError(f"step_lr={step_lr} teaches no step; give a number above 0")
        if ranges is not None and activation_bits is None:
            raise ValueError(f"ranges={ranges} are of inputs, which activation_bits=None leaves; give one of them")
        for low, high in ranges.values() if isinstance(ranges, Mapping) else [ranges] if ranges else ():
            if not -float("inf") < low <= 0 <= high < float("inf") or low == high:
                raise ValueError(f"ranges={ranges}: ({low}, {high}) must be finite and hold 0; widen it")
        if not 0 < range_noise < float("inf"):
            raise ValueError(f"range_noise={range_noise} hides nobody, or everything; give a positive number")
        self.bits, self.activation_bits, self.scheme = bits, activation_bits, scheme
        self.start, self.end, self.ranges, self.batchnorm, self.step_lr = start, end, ranges, batchnorm, step_lr
        self.targets, self.ignore, self.batch, self.range_noise = targets, ignore, batch, range_noise
        if scheme == "lsq":
            self.traits = frozenset({Trait.REMEMBERS_DATA})
        elif ranges is not None or activation_bits is None:
            self.traits = frozenset({Trait.POST_PROCESSING})
        self.activation_ranges: dict[str, Range] = {}
        """The range of each layer's inputs in the last training."""
        self._reset()

    def _reset(self) -> None:
        self._run: Run | None = None
        self._steps, self._active, self._finished = 0, False, False
        self._before = 0  # optimizer steps of a training that went on without the guard
        self._window: tuple[int, int] | None = None
        self._model: FakeQuantization | None = None
        self._asked = False  # whether ranges come from queries, since examples are private
        self._noisy: NoisyRanges | None = None
        self._counted: Mapping[str, Any] = {}  # of them, before a resumed run has made its first step
        self._learner: StepLearner | None = None
        self._norms: list[_BatchNorm] | None = None
        self._aliases: dict[str, str] = {}  # every name of a weight in the state dict
        self._optimizers: list[int] = []
        self._restored: Mapping[str, Any] | None = None

    @property
    def off(self) -> bool:
        return self.bits is None

    def overrides(self, transform: str) -> bool:
        return not self.off and super().overrides(transform)

    def problems(self, run: Run) -> Iterable[str]:
        if self.off:
            return
        if run.endless and (isinstance(self.start, float) or isinstance(self.end, float)):
            yield (
                f"start={self.start} and end={self.end} are fractions of a training without end; "
                "set max_epochs or max_steps on the Trainer, or give optimizer steps"
            )
        if isinstance(self.start, int) and 0 <= run.trainer.max_steps <= self.start:
            yield (
                f"start={self.start} comes after the last optimizer step, max_steps={run.trainer.max_steps}, so "
                "nothing is ever quantised; train longer or give an earlier start"
            )
        if self.scheme == "lsq" and run.trainer.precision == "16-mixed":
            yield (
                "scheme='lsq' learns steps from gradients that precision='16-mixed' scales; give precision='bf16-mixed'"
            )
        own = getattr(type(run.module), "guard_forward", None)
        described = own is not None and own.__module__ != "lightning_guard.mixins"
        blind = type(run.module).forward is pl.LightningModule.forward and run.batch.logits is None and not described
        if blind and self.batchnorm == "reestimate" and any(isinstance(m, _BatchNorm) for m in run.module.modules()):
            yield (
                f"batchnorm='reestimate' passes batches through the network, and {type(run.module).__name__} has no "
                "forward; name the submodule with Batch(logits=...), or give batchnorm='keep'"
            )

    def queries(self) -> Sequence[Query]:
        """Of each draw the sizes of every layer's inputs."""
        return [Query(_RANGES, self.range_noise)] if Trait.QUERIES_DATA in (self.traits or ()) else []

    # The beginning -------------------------------------------------------------------------------------------------

    def begin(self, run: Run) -> None:
        restored = self._restored
        self._reset()
        if self.bits is None:
            return
        self._run, optimizers = run, run.trainer.optimizers
        if len(optimizers) > 1 and (isinstance(self.start, float) or isinstance(self.end, float)):
            raise GuardConflict(
                f"{self.name}: start={self.start} and end={self.end} are fractions of training, which several "
                "optimizers may step at different times; give optimizer steps of the one that trains the first layer"
            )
        if len(optimizers) > 1 and self.scheme == "lsq":
            raise GuardConflict(
                f"{self.name}: scheme='lsq' cannot tell which of {len(optimizers)} losses a step is to learn from; "
                "give scheme='minmax'"
            )
        metrics = [one for one in run.module.modules() if isinstance(one, torchmetrics.Metric)]
        try:
            layers = chosen_layers(run.module, self.targets, self.ignore, without=metrics)
            given = None if self.ranges is None else ranges_by_layer(layers, self.ranges)
        except ValueError as error:
            raise GuardConflict(f"{self.name}: {error}") from None
        self._model = FakeQuantization(
            layers, self.bits, self.activation_bits, self.scheme == "lsq", given, run.module.device
        )
        names = {weight: slot.name for weight, slot in self._model.slots.items()}
        every = run.module.named_parameters(remove_duplicate=False)
        self._aliases = {alias: names[weight] for alias, weight in every if weight in names}
        self._optimizers = [id(one) for one in optimizers if names.keys() & _owned(one)][:1]  # it keeps the time
        if not self._optimizers:
            raise GuardConflict(f"{self.name}: no optimizer trains a weight that is quantised; train some, or drop it")
        self._asked = run.protected and bool(self.queries()) and bool(self._model.rounded)
        if self._asked and run.private is None:
            raise GuardConflict(
                f"{self.name}: examples are private here, and nobody answers for counts of them; give ranges=..., or "
                "activation_bits=None"
            )
        if restored is not None:
            self._resume(restored)
        for layer in layers:
            swap(run.undo, layer.module, "forward", partial(self._model.around, layer))
        # The fast path of attention and transformer layers computes with weights without calling their layers.
        run.undo.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)

    # A step --------------------------------------------------------------------------------------------------------

    @contextmanager
    def during(self, step: Step) -> Iterator[None]:
        model = self._model
        assert model is not None
        self._open(step)
        assert self._window is not None
        was, learning = model.observing, self._steps < self._window[1] and self.ranges is None
        model.observing = self._active and learning and not step.rehearsal and not self._asked
        rows = _rows(step.inputs) if self._asked and learning else None
        try:
            with model.looking(rows) as seen:
                yield
                if rows is not None and not step.rehearsal:
                    assert step.run.private is not None
                    step.run.private.add(_RANGES, range_rows(*seen()))
        except LostRows as error:
            raise GuardConflict(f"{self.name}: {error}") from None
        finally:
            model.observing = was

    def _ask(self, private: Private, end: int) -> None:
        """Ask for the sizes of inputs of each draw, in place of looking at them."""
        assert self._model is not None
        layers = len(self._model.rounded)
        found = NoisyRanges(layers, self.range_noise, private.batch_size)
        if found.draws_needed(end) is None:
            raise GuardConflict(
                f"{self.name}: range_noise={self.range_noise:g} is too much to tell the ranges of {layers} layers by "
                f"step {end} from draws of {private.batch_size} examples; give less of it, a larger batch, a later "
                "end, fixed ranges, or activation_bits=None"
            )
        if self._counted:
            found.restore(self._counted)
            self._model.take_ranges(found.ranges())
        self._noisy = found

        def take(sums: Tensor) -> None:
            if self._steps < end:
                assert self._model is not None
                found.add(sums)
                self._model.take_ranges(found.ranges())

        private.open(_RANGES, 2 * layers * CELLS, take)

    @contextmanager
    def paused(self) -> Iterator[None]:
        if self._model is None:
            yield
            return
        was, self._model.observing = self._model.observing, False
        try:
            with self._model.looking(None):
                yield
        finally:
            self._model.observing = was

    def _open(self, step: Step) -> None:
        assert self._run is not None
        assert self._model is not None
        if self._window is None:
            total = self._run.total_steps if isinstance(self.start, float) or isinstance(self.end, float) else 0
            start, end = (round(t * total) if isinstance(t, float) else t for t in (self.start, self.end))
            self._window = start, max(end, start + 1)  # a range has to be seen once
            self._fits(start)
            if self._asked:
                assert self._run.private is not None
                self._ask(self._run.private, self._window[1])
        if not self._active and self._steps >= self._window[0]:
            self._active = self._model.on = True
            self._learn()
        if self._active and self._norms is None:
            self._norms = batch_norms(step.module) if self.batchnorm == "reestimate" else []
            if self._norms:
                _ = step.inputs  # an unreadable batch is refused now and not at the end

    def _fits(self, start: int) -> None:
        """Refuse a start that a training which has just begun cannot reach, as after a late unguarded resume."""
        assert self._run is not None
        trainer = self._run.trainer
        self._before = trainer.global_step - self._steps
        if self._steps or len(trainer.optimizers) > 1 or not self._run.module.automatic_optimization:
            return
        left = trainer.estimated_stepping_batches - trainer.global_step
        if start >= left:
            raise GuardConflict(
                f"{self.name}: start={self.start} is {start} optimizer steps away and training has {left:.0f} left, so "
                "nothing is ever quantised; train longer or give an earlier start"
            )

    def _learn(self) -> None:
        assert self._model is not None
        if self.scheme == "lsq":
            self._learner = StepLearner(self._model.begin_learning(), self.step_lr)

    def on_weights(self, optimizer: Optimizer) -> None:
        if id(optimizer) not in self._optimizers or self._window is None:
            return
        assert self._model is not None
        assert self._run is not None
        start, end = self._window
        if self._active and self._steps < end and not self._asked:
            many = self._run.trainer.world_size > 1
            self._model.take_observations(_MOMENTUM, *([_smallest] if many else []))
            if self._learner is not None:
                left = 1 - (self._steps - start) / (end - start)
                self._learner.update(left, *([_mean] if many else []))
        elif self._learner is not None:
            self._learner.update(0.0)
        self._steps += 1
        self._finished = False
        trainer = self._run.trainer
        alone = len(trainer.optimizers) == 1 and self._run.module.automatic_optimization
        if self._active and alone and self._steps + self._before == trainer.estimated_stepping_batches:
            # Now and not in `release`: the last validation and the last checkpoint are of the model that ships.
            self._finish()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self.off:
            return
        if self._model is not None and not any(id(one) in self._optimizers for one in trainer.optimizers):
            raise GuardConflict(
                f"{self.name}: the optimizers were replaced during training, and the schedule counted the steps of the "
                "old ones; change them in place (param_groups), or begin a second training"
            )
        self.report(pl_module, quantized=float(self._active))

    # The end -------------------------------------------------------------------------------------------------------

    def settled(self, run: Run) -> bool:
        return self.off or (self._window is not None and self._steps >= self._window[1])

    def notes(self) -> list[str]:
        if self.off:
            return []
        if not self._active:
            return [f"Training ended before start={self.start}, so nothing is quantised."]
        if self.activation_bits is None:
            return []
        told = [
            f"Ranges of inputs are 99 % quantiles of noisy counts (range_noise={self.range_noise:g}), paid from the "
            "budget for privacy; inputs beyond them are clipped."
        ] * self._asked
        return [
            *told,
            f"The module has weights on grids of {self.bits} bits and computes with inputs in 32; an exported file "
            "rounds inputs as well, so judge that file.",
        ]

    def release(self, module: pl.LightningModule) -> None:
        if self._model is None:
            return
        if not self._active:
            rank_zero_warn(
                f"{self.name}: training ended at optimizer step {self._steps}, before start={self.start}: nothing is "
                "quantised. Train longer, or give an earlier start."
            )
        else:
            self._finish()
        self._run, self._model, self._learner, self._norms = None, None, None, None

    @torch.no_grad()
    def _finish(self) -> None:
        """Weights on their grids, and BatchNorm for these weights; a second time only if an average has moved them."""
        assert self._model is not None
        assert self._run is not None
        private = self._run.private
        with nullcontext() if private is None else private.rewriting():
            moved = self._model.snap_()
        self.activation_ranges = self._model.ranges
        unseen = [one.name for one, known in zip(self._model.rounded, self._model.known, strict=True) if not known]
        if unseen and not self._finished:
            rank_zero_warn(f"{self.name}: training never called {', '.join(unseen)}, whose inputs are not quantised.")
        if self._norms and (moved or not self._finished):
            self._reestimate(self._run, self._norms)
        self._finished = True

    def _reestimate(self, run: Run, norms: Sequence[_BatchNorm]) -> None:
        trainer = run.trainer
        loader = CombinedLoader(trainer.train_dataloader, "max_size_cycle")
        with isolate_rng(), _kept(loader), still(run.module, run._metrics), self.paused(), anew(norms):
            torch.manual_seed(self._steps)  # put back by isolate_rng
            for batch, _, _ in islice(loader, _BATCHES):
                ready = trainer.precision_plugin.convert_input(batch)
                ready = run.module._on_before_batch_transfer(ready)
                inputs = run.batch.read(trainer.strategy.batch_to_device(ready), "inputs")
                with trainer.precision_plugin.forward_context():
                    if said(run.module, "guard_forward", inputs) is None:
                        run.module.get_submodule(run.batch.logits or "")(inputs)
            if trainer.world_size > 1:
                for buffer in (b for norm in norms for b in (norm.running_mean, norm.running_var)):
                    assert buffer is not None
                    buffer.copy_(_mean(buffer.clone()))

    # Checkpoints ---------------------------------------------------------------------------------------------------

    def on_checkpoint(self, weights: dict[str, Tensor]) -> None:
        if not self._active or self._model is None:
            return
        slots = {slot.name: slot for slot in self._model.slots.values()}
        for alias, name in self._aliases.items():
            if alias in weights:
                weights[alias] = self._model.on_grid(slots[name], weights[alias])

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"steps": self._steps, "active": self._active, "method": self._method}
        if self._asked:
            state["noisy"] = self._counted if self._noisy is None else self._noisy.state()
        if self._model is None or not self._active:
            return state
        latent = {} if self._finished else {s.name: w.detach().clone() for w, s in self._model.slots.items()}
        ranges = {name: torch.tensor(pair) for name, pair in self._model.ranges.items()}
        learner = {} if self._learner is None else self._learner.adam.state_dict()
        return {**state, **self._model.state(), "ranges": ranges, "latent": latent, "learner": learner}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state["method"] != self._method:
            raise GuardConflict(
                f"{self.name}: the checkpoint was trained with {state['method']}, and the guard now says "
                f"{self._method}; resume with the same options"
            )
        self._restored = state

    @property
    def _method(self) -> str:
        return f"bits={self.bits}, activation_bits={self.activation_bits}, scheme={self.scheme!r}"

    @torch.no_grad()
    def _resume(self, state: Mapping[str, Any]) -> None:
        assert self._model is not None
        self._steps, self._active, self._counted = state["steps"], state["active"], state.get("noisy", {})
        self._model.on = self._active
        if not self._active:
            return
        weights = {slot.name: weight for weight, slot in self._model.slots.items()}
        layers = {layer.name for layer in self._model.rounded}
        gone = sorted(
            (set(state["latent"]) ^ set(weights) if state["latent"] else set()) | set(state["ranges"]) - layers
        )
        if gone:
            raise GuardConflict(
                f"{self.name}: the checkpoint and this training differ in what they quantise: {', '.join(gone)}; "
                "resume with the same model, targets and ignore"
            )
        for name, value in state["latent"].items():
            weights[name].copy_(value)
        self._finished = not state["latent"]
        with torch.enable_grad():
            self._learn()
        self._model.load(state)
        if self._learner is not None:
            self._learner.adam.load_state_dict(state["learner"])


@contextmanager
def _kept(loader: CombinedLoader) -> Iterator[None]:
    """Generators of a loader and its sampler draw in this block, and are as they were behind it."""
    owners = [owner for one in loader.flattened for owner in (one, getattr(one, "sampler", None))]
    found = {one for one in (getattr(owner, "generator", None) for owner in owners) if isinstance(one, torch.Generator)}
    states = [(one, one.get_state()) for one in found]
    try:
        yield
    finally:
        for one, state in states:
            one.set_state(state)


def _rows(inputs: Any) -> int:
    """How many rows a batch has, by the first tensor of its inputs."""
    return next((len(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()), 0)


def _owned(optimizer: Optimizer) -> set[Tensor]:
    return {parameter for group in optimizer.param_groups for parameter in group["params"]}


def _smallest(values: Tensor) -> Tensor:
    torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MIN)
    return values


def _mean(values: Tensor) -> Tensor:
    torch.distributed.all_reduce(values)
    return values / torch.distributed.get_world_size()
