"""A bound on the difference between groups as a guard."""

from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from typing import Any, ClassVar, Literal, get_args

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_guard.functional import NOTIONS, Notion
from lightning_guard.functional.fairness import ABSOLUTE, OF_NUMBERS, Census
from lightning_guard.guard import Batch, Guard, GuardConflict, Phase, Query, Run, Step, Trait, callbacks_of
from lightning_guard.parity import (
    HSIC,
    MMD,
    Adversary,
    Choice,
    Constraint,
    Counterfactual,
    GroupDRO,
    Mode,
    Penalty,
    Reweigh,
    Seen,
    count,
    count_privately,
    measure,
)

Kind = Literal["constraint", "penalty", "group_dro", "reweigh", "mmd", "hsic", "adversarial", "counterfactual"]
_WEIGHTED = ("penalty", "mmd", "hsic", "adversarial", "counterfactual")
_BOUND = ("constraint",)
_OF_GROUPS = ("constraint", "penalty", "group_dro", "reweigh", "mmd", "hsic", "adversarial")
_QUERYING = ("constraint", "reweigh", "group_dro")  # what they remember of the data are sums, which may be noisy
_SAYS: dict[str, tuple[str, ...]] = {  # to which modes an option says something
    "weight": _WEIGHTED, "notion": ("constraint", "penalty", "adversarial"), "layer": ("mmd", "hsic", "adversarial"),
    "continuous": ("hsic",), "max_gap": _BOUND, "margin": _BOUND, "intersections": _OF_GROUPS, "min_support": _BOUND,
    "steepness": ("constraint", "penalty"), "step_size": ("constraint", "group_dro"),
    "memory": ("constraint", "penalty"), "damping": _BOUND, "cap": _BOUND, "warmup": _BOUND, "select": _BOUND,
    "thresholds": _BOUND, "groups": _OF_GROUPS, "count_noise": _QUERYING, "rate_noise": ("constraint", "group_dro"),
    "loss_bound": ("group_dro",),
}  # fmt: skip
_COUPLED = ("penalty", "mmd", "hsic", "adversarial")  # an example's term depends on others of its batch, always


class FairnessRegularization(Guard):
    r"""Keeps the difference between groups within max_gap, or says that it could not.

    .. math:: \min_\theta \; E[\ell] \quad \text{so that} \quad \max_g p_{r,g} - \min_g p_{r,g} \le \varepsilon
              \quad \text{for each rate } r

    State the notion and the gap you accept; the guard finds the multipliers. Each example pays for what it does to the
    rate of its group, by a soft decision :math:`\sigma(k z)` over the group's share of the training data. So the loss
    of an example depends on no other, a group that is absent from a batch adds nothing, and batches may be small.
    Prices follow running rates of hard decisions, which are what is judged in the end (Cotter et al., 2019).

    After each epoch the weights of then are measured on training and validation data. Training ends with the best that
    keep the gap with a margin of its uncertainty. If none do, those with the smallest gap are taken, and a warning and
    a note in the report say what was reached. The attribute is needed in training only.

    Logs ``guard/fairness/gap`` (running, hard), ``measured_gap`` and ``feasible`` (after an epoch), ``multiplier``.

    Args:
        notion: what is compared, see the table in ``docs/fairness.md``.
        max_gap: the largest difference between groups, a fraction (``mean_parity``: in units of the target;
            ``bounded_group_loss``: the largest mean loss of a group); infinity switches the guard off.
        mode: ``constraint``. The others promise no bound: ``penalty`` weighs the squared gap; ``group_dro`` trains on
            the worst group (Sagawa et al., 2020); ``reweigh`` makes group and class independent (Kamiran and Calders,
            2012); ``mmd`` and ``hsic`` make outputs, or a layer's, independent of the group; ``adversarial`` hides it
            from a head that guesses it (Zhang et al., 2018); ``counterfactual`` compares pairs of
            ``GuardMixin.guard_counterfactual``.
        weight: of ``penalty`` (nats per squared gap), ``mmd``, ``hsic``, ``adversarial`` and ``counterfactual``; 0
            switches the guard off.
        layer: submodule whose outputs ``mmd``, ``hsic`` and ``adversarial`` look at; None is the logits.
        continuous: the group is a quantity, e.g. an age; for ``hsic``.
        margin: how far below ``max_gap`` to aim; None is one standard error of the gap on the training data.
        intersections: with several attributes, bound the gap between the groups of all of them at once as well.
        min_support: rates of fewer training examples are not bounded; a warning names them.
        steepness: :math:`k`. Large moves examples near the boundary only, and keeps more of the ranking.
        step_size: of the multipliers, how fast they rise in an epoch for a gap that is too wide, None is 4; of
            ``group_dro``, in each step, None is 0.01.
        memory: of the running rates, in epochs.
        damping: in epochs, how far multipliers follow the change of a gap as well, which keeps them from swinging
            where clipping delays what they do. None is 1 beside DP-SGD, and 0 elsewhere.
        cap: largest multiplier.
        warmup: time before multipliers rise, as a fraction of training (float) or in optimizer steps (int).
        select: take the best weights that keep the gap; else the last are kept.
        thresholds: of ``quantile_parity``, in units of the target; None is the nine deciles of the training targets.
        groups: how many values each attribute can take, e.g. ``[2, 5]`` for 0 and 1, and 0 to 4. Beside DP-SGD it must
            be given: which groups there are tells who is in the data.
        count_noise: beside DP-SGD, standard deviation of the noise on the count of each group and class, in examples.
        rate_noise: beside DP-SGD, of the noise on the counts of decisions in each step, or of ``group_dro`` on the
            losses of groups; over what one example contributes, see the docs.
        loss_bound: of ``group_dro`` beside DP-SGD, the largest loss that an example may tell of, in nats.
        batch: how a batch is read, if the defaults do not fit. The group is whole numbers ``(N,)``, or ``(N, A)`` for
            several attributes, negative or NaN where unknown.

    | case                                         | result                                                       |
    |----------------------------------------------|--------------------------------------------------------------|
    | ``max_gap=inf``; ``mode="penalty"``, ``weight=0`` | trained weights are bit-identical to those without the guard |
    | a group absent from a batch, or from many    | it adds nothing                                              |
    | group unknown (negative or NaN)              | the example counts for the task loss only                    |
    | fewer than two groups in the training data   | refused before training                                      |
    | too few examples of a rate                   | it is not bounded, and a warning names it                    |
    | several processes                            | the rates of the union of their batches                      |
    | ``max_gap`` is not reached                   | a warning and a note with the gap that was                   |
    | the model decides alike for nearly everybody | a warning and a note: it closes every gap and is of no use   |
    | data without an end                          | refused: their groups cannot be counted                      |
    | beside DP-SGD                                | counts and rates have noise, paid from the same budget       |
    | ... in the modes ``penalty``, ``mmd``, ``hsic`` and ``adversarial`` | refused                               |

    Raises:
        GuardConflict: before training, if the promise cannot be kept.

    Reference:
        Agarwal et al., ICML 2018, arXiv:1803.02453 (constraints as linear moments). Cotter et al., JMLR 20(172), 2019,
        arXiv:1809.04198 (multipliers that follow hard rates). Notions: Hardt et al., NeurIPS 2016, arXiv:1610.02413.

    Example:
        >>> import pytorch_lightning as pl
        >>> trainer = pl.Trainer(callbacks=[FairnessRegularization("equalized_odds", max_gap=0.05)], logger=False)
    """

    name: ClassVar[str] = "fairness"
    phase: ClassVar[Phase] = Phase.LOSS
    traits: frozenset[Trait] | None = frozenset({Trait.QUERIES_DATA})  # of the constraint; by mode
    needs_group: ClassVar[bool] = True
    needs_logits: bool = True

    def __init__(
        self,
        notion: Notion = "demographic_parity",
        max_gap: float | None = None,
        mode: Kind = "constraint",
        weight: float | None = None,
        layer: str | None = None,
        continuous: bool = False,
        margin: float | None = None,
        intersections: bool = False,
        min_support: int = 30,
        steepness: float = 3.0,
        step_size: float | None = None,
        memory: float | None = None,
        damping: float | None = None,
        cap: float = 20.0,
        warmup: int | float = 0.1,
        select: bool = True,
        thresholds: Sequence[float] | None = None,
        groups: Sequence[int] | None = None,
        count_noise: float = 50.0,
        rate_noise: float = 8.0,
        loss_bound: float = 2.0,
        batch: Batch | None = None,
    ):
        if mode not in get_args(Kind):
            raise ValueError(f"mode={mode!r} is not known; give one of {', '.join(get_args(Kind))}")
        if notion not in NOTIONS:
            raise ValueError(f"notion={notion!r} is not known; give one of {', '.join(NOTIONS)}")
        given = {name: value for name, value in locals().items() if name in _SAYS}
        for option, value in given.items():
            if (
                value != signature(FairnessRegularization.__init__).parameters[option].default
                and mode not in _SAYS[option]
            ):
                also = "; it is of a penalty: give mode='penalty', or max_gap alone" if option == "weight" else ""
                also = "; it is promised by mode='constraint' alone" if option == "max_gap" else also
                raise ValueError(f"{option}={value!r} says nothing to mode={mode!r}{also}; leave it out")
        if mode == "adversarial" and notion not in ("demographic_parity", "equalized_odds"):
            raise ValueError(f"notion={notion!r} is not built for mode='adversarial'; give equalized_odds, or none")
        if thresholds is not None and notion != "quantile_parity":
            raise ValueError(f"thresholds={thresholds} are of notion='quantile_parity'; leave them out")
        if not 0 < loss_bound < float("inf"):
            raise ValueError(f"loss_bound={loss_bound} bounds nothing; give a positive number of nats")
        for option, noise in (("count_noise", count_noise), ("rate_noise", rate_noise)):
            if not 0 < noise < float("inf"):
                raise ValueError(f"{option}={noise} hides nobody, or everything; give a positive number")
        if groups is not None and not (groups and min(groups) >= 2):
            raise ValueError(f"groups={groups} leave nothing to compare; give the number of values of each attribute")
        if max_gap is None and mode == "constraint" and notion not in ("bounded_group_loss", "mean_parity"):
            max_gap = 0.05  # a fraction; of losses and numbers nobody but the user knows the unit
        if mode == "constraint" and (max_gap is None or not max_gap > 0):
            raise ValueError(f"max_gap={max_gap} with notion={notion!r} is no bound; give a positive number")
        weight = (2.0 if mode == "penalty" else 1.0) if weight is None and mode in _WEIGHTED else weight
        if weight is not None and not 0 <= weight < float("inf"):
            raise ValueError(f"weight={weight} would reward or overflow the gap; give a finite number of at least 0")
        if mode == "penalty" and notion in ("quantile_parity", "calibration"):
            raise ValueError(f"notion={notion!r} has no squared gap of running rates; give mode='constraint'")
        for option, value in (("steepness", steepness), ("step_size", step_size), ("cap", cap)):
            if value is not None and not value > 0:
                raise ValueError(f"{option}={value} moves nothing towards parity; give a positive number")
        if memory is not None and memory < 0:
            raise ValueError(f"memory={memory} is no time; give a number of epochs, at least 0")
        if damping is not None and not 0 <= damping < float("inf"):
            raise ValueError(f"damping={damping} is no time; give a finite number of epochs, at least 0")
        if margin is not None and not (max_gap is not None and 0 <= margin < max_gap):
            raise ValueError(f"margin={margin} must be at least 0 and below max_gap={max_gap}")
        if min_support < 1:
            raise ValueError(f"min_support={min_support} is no number of examples; give at least 1")
        if warmup < 0 or (isinstance(warmup, float) and warmup > 1):
            raise ValueError(f"warmup={warmup} is no time; give a fraction in [0.0, 1.0] or a number of steps")
        self.notion: Notion = notion
        self.max_gap, self.mode, self.weight, self.margin = max_gap, mode, weight, margin
        self.layer, self.continuous = layer, continuous
        self.intersections, self.min_support, self.steepness = intersections, min_support, steepness
        self.step_size, self.memory, self.damping, self.cap, self.warmup = step_size, memory, damping, cap, warmup
        self.select, self.thresholds, self.batch = select, thresholds, batch
        self.groups, self.count_noise, self.rate_noise, self.loss_bound = groups, count_noise, rate_noise, loss_bound
        coupled = {Trait.COUPLES_EXAMPLES} if mode in _COUPLED else set()
        remembers = {Trait.QUERIES_DATA if mode in _QUERYING else Trait.REMEMBERS_DATA}
        self.traits = frozenset() if mode == "counterfactual" else frozenset(remembers | coupled)
        self._state: Mapping[str, Any] | None = None
        self._fresh()

    def _fresh(self) -> None:
        self._mode: Mode | None = None
        self._census: Census | None = None
        self._choice, self._outcome = Choice(), ""
        self._run: Run | None = None
        self._unbounded = ""  # groups with too few examples
        self._vain = False  # no rate has enough examples to be bounded
        self._private = False  # nothing of the data may be remembered without noise

    @property
    def off(self) -> bool:
        return self.max_gap == float("inf") or self.weight == 0

    def overrides(self, transform: str) -> bool:
        return not self.off and super().overrides(transform)

    # Before training ----------------------------------------------------------------------------------------------

    def queries(self) -> Sequence[Query]:
        """One count of groups and classes, and of each draw the hard decisions or losses of each group."""
        asked = [Query("fairness_count", self.count_noise, once=True)] if self.mode in _QUERYING else []
        each = {"constraint": "fairness_rates", "group_dro": "fairness_losses"}.get(self.mode)
        return [*asked, Query(each, self.rate_noise)] if each else asked

    def problems(self, run: Run) -> Iterable[str]:
        if isinstance(self.warmup, float) and run.endless and not self.off:
            yield (
                f"warmup={self.warmup} is a fraction of a training without end; "
                "set max_epochs or max_steps on the Trainer, or give optimizer steps"
            )
        if self.select and self.mode == "constraint" and not self.off:
            for callback in callbacks_of(run.trainer):
                if {"WeightAveraging", "StochasticWeightAveraging"} & {c.__name__ for c in type(callback).__mro__}:
                    yield (
                        f"{type(callback).__name__} puts an average in the place of the weights that were measured; "
                        "set select=False, or remove it"
                    )

    def begin(self, run: Run) -> None:
        state, self._state = self._state, None
        self._fresh()
        self._run = run
        if self.off:
            return
        self._private = run.protected
        if self._private and run.private is None:
            raise GuardConflict(
                f"{self.name}: examples are private here, and nobody answers for sums over them; use DPSGD, or let the "
                "guard that bounds examples offer Run.private"
            )
        self._mode = self._made()
        run.undo.callback(self._mode.end)
        if state:
            self._mode.restore(state["mode"])
            if state["bound"] == [self.notion, self.max_gap, self.margin]:  # else it was judged by another
                self._choice.restore(state["choice"])
            if state["census"]:
                self._census = Census(self.intersections)
                self._census.restore(state["census"])
                self._limits = state["thresholds"]

    def _made(self) -> Mode:
        weight = float(self.weight or 0.0)
        if self.mode == "constraint":
            assert self.max_gap is not None
            memory = 0.5 if self.memory is None else self.memory
            query, least, damping = "", float(self.min_support), 0.0
            if self._private:  # of fewer, the noise alone makes as many
                query, least, damping = "fairness_rates", max(least, 4 * self.count_noise), 1.0
            damping = damping if self.damping is None else self.damping
            return Constraint(
                self.notion, self.max_gap, self.margin, self.steepness, self.step_size or 4.0, memory, self.cap, least,
                query, self.rate_noise, damping,
            )  # fmt: skip
        if self.mode == "penalty":
            return Penalty(self.notion, weight, self.steepness, 0.1 if self.memory is None else self.memory)
        if self.mode == "group_dro":
            query, least = ("fairness_losses", 4 * self.count_noise) if self._private else ("", 1.0)
            return GroupDRO(self.step_size or 0.01, query=query, bound=self.loss_bound, least=least)
        if self.mode == "reweigh":
            return Reweigh()
        if self.mode == "mmd":
            return MMD(weight, self.layer)
        if self.mode == "hsic":
            return HSIC(weight, self.layer, self.continuous)
        if self.mode == "adversarial":
            return Adversary(weight, self.layer, conditional=self.notion == "equalized_odds")
        return Counterfactual(weight)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.off:
            return
        assert self._run is not None
        assert self._mode is not None
        if self._census is None and self._private and self.mode == "counterfactual":
            self._census = Census()  # pairs are compared example by example, whatever their group
            self._limits = torch.zeros(0)
        elif self._census is None and self._private:
            assert self.groups is not None
            self._census = count_privately(self._run, "fairness_count", self.groups, self.intersections)
            self._limits = torch.zeros(0)
        elif self._census is None:
            self._census, numbers = count(self._run, self.intersections, self.continuous, self.groups)
            self._limits = numbers.quantile(torch.arange(0.1, 1.0, 0.1)) if len(numbers) else torch.zeros(0)
        if not self.continuous and not (self._private and self.mode == "counterfactual"):
            self._judge_groups(self._census)
        if self.thresholds is not None:
            self._limits = torch.tensor(self.thresholds, dtype=torch.float32)
        if self.notion == "quantile_parity" and not len(self._limits):
            raise GuardConflict(f"{self.name}: notion='quantile_parity' compares numbers, and the targets are none")
        self._mode.begin(pl_module, self._census)
        if isinstance(self._mode, Constraint):
            self._mode.thresholds = self._limits

    def _judge_groups(self, census: Census) -> None:
        if census.groups == len(census.families.unique()):  # at most one group an attribute
            raise GuardConflict(
                f"{self.name}: {census.groups} groups of {len(census.values)} attributes in {census.total:.0f} "
                "training examples leave nothing to compare; "
                "say where the group is with Batch(group=...), or leave the guard out"
            )
        if self.mode != "constraint":
            return
        rates = 2 if self.notion == "equalized_odds" else 1
        columns = census.cells.shape[1]
        rates *= columns if census.several or columns > 2 else 1
        assert isinstance(self._mode, Constraint)
        least = self._mode.min_support
        small = census.support(self.notion, rates) < least
        if bool(small.any()):
            names = [census.name(g) for g in small.any(0).nonzero()[:, 0].tolist()]
            option = "min_support=" if least == self.min_support else ""
            self._unbounded = (
                f"fewer than {option}{least:g} training examples of {', '.join(names[:10])} "
                f"for {self.notion}, so their rates are not bounded"
            )
            remedy = "lower min_support" if least == self.min_support else f"lower count_noise={self.count_noise:g}"
            rank_zero_warn(f"{self.name}: {self._unbounded}; merge small groups, or {remedy}")
        families = [~small[:, census.families == f] for f in census.families.unique()]
        enough = 1 if self.notion in ABSOLUTE else 2
        self._vain = all(int(judged.sum(1).max()) < enough for judged in families)

    # In training --------------------------------------------------------------------------------------------------

    def on_loss(self, step: Step) -> Tensor:
        assert step.loss is not None
        assert self._census is not None
        assert self._mode is not None
        logits = step.logits
        attribute = step.attribute if self.mode == "hsic" else torch.zeros(0)
        group = torch.zeros(len(attribute), 0) if self.continuous else step.group
        if len(group) != len(logits):
            raise GuardConflict(
                f"{self.name}: {len(group)} groups for {len(logits)} rows of logits; an example has one each"
            )
        known = step.run.batch.find(step.batch, "target") is not None
        target = step.target if known or self.notion != "demographic_parity" else None
        self._refuse(target, logits)
        uncounted = self.continuous or not self._census.groups
        members = group.new_zeros(len(group), 0) if uncounted else self._census.members(group)
        if isinstance(self._mode, Constraint):
            self._mode.active = self._warm(step.run)
        term = self._mode.term(Seen(step, self._census, logits.float(), target, members, attribute))
        return step.loss if term is None else step.loss + term

    def _refuse(self, target: Any, logits: Tensor) -> None:
        if not isinstance(target, Tensor) or self.mode not in ("constraint", "penalty"):
            return
        numbers = target.is_floating_point() and not bool(((target == 0) | (target == 1)).all())
        if numbers and self.notion not in (*OF_NUMBERS, "bounded_group_loss"):
            raise GuardConflict(
                f"{self.name}: notion={self.notion!r} compares decisions, and the targets are quantities; give "
                f"{', '.join(sorted(OF_NUMBERS))} or bounded_group_loss"
            )
        if target.dim() > 1 and target.shape[1] > 1 and target.shape != logits.shape:
            raise GuardConflict(
                f"{self.name}: targets of shape {tuple(target.shape)} do not fit logits of shape "
                f"{tuple(logits.shape)}; give one class an example, or as many labels as logits"
            )

    def _warm(self, run: Run) -> bool:
        warmup = self.warmup * run.total_steps if isinstance(self.warmup, float) else self.warmup
        return bool(run.trainer.global_step >= warmup)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        mode, run = self._mode, self._run
        if mode is not None:
            self.report(pl_module, **mode.figures())
        if not isinstance(mode, Constraint) or not mode.active or run is None:
            return
        if self._vain or not all(guard.settled(run) for guard in run.guards):
            return
        if self._private:
            self._judge_privately(mode, trainer, pl_module)
            return
        training = measure(trainer, pl_module, [(trainer.train_dataloader, trainer.num_training_batches)], mode)
        assert training is not None
        assert self.max_gap is not None
        loaders = [] if trainer.val_dataloaders is None else tree_leaves(trainer.val_dataloaders)
        validation = measure(trainer, pl_module, zip(loaders, trainer.num_val_batches, strict=False), mode)
        both = training if validation is None else training + validation
        gap, kept = mode.judged(both.table)
        if validation is not None and mode.refuted(validation.table):  # learnt by heart: training rows say nothing
            gap, kept = max(gap, mode.judged(validation.table)[0]), False
        found = self._choice.found
        if not self.select or (found and both.rows > found["rows"]):  # measured on less, so not to be compared
            self._choice = Choice()
        merit = both.merit / both.rows
        error = mode.error(both.table)
        self._choice.offer(pl_module, trainer.current_epoch, gap, self.max_gap, kept, merit, both.constant, error)
        self._choice.found |= {"rows": both.rows, "on": "training" if validation is None else "training and validation"}
        if not self.select:
            self._choice.weights = {}
        self.report(pl_module, measured_gap=gap, feasible=float(gap <= self.max_gap))

    def _judge_privately(self, mode: Constraint, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """By the noisy rates of the last steps, which cost nothing more: the last weights that keep the bound."""
        if mode.running.parts is None:
            return
        assert self.max_gap is not None
        table = mode.standing()
        gap, kept = mode.judged(table)
        rates = (table[0] / table[2])[mode.present(len(table[0]))]
        constant = bool(((rates < 0.005) | (rates > 0.995)).all())
        epoch = trainer.current_epoch
        self._choice.offer(module, epoch, gap, self.max_gap, kept, float(epoch), constant, mode.error(table))
        self._choice.found |= {"rows": 0, "on": "noisy counts of training"}
        if not self.select:
            self._choice.weights = {}
        self.report(module, measured_gap=gap, feasible=float(gap <= self.max_gap))

    # After it -----------------------------------------------------------------------------------------------------

    def release(self, module: pl.LightningModule) -> None:
        self._run = None
        found, mode = self._choice.found, self._mode
        if isinstance(mode, Penalty) and self.weight and mode.running.parts is not None:
            rates = mode.running.rates[mode.running.counts > 0]
            if self.notion not in OF_NUMBERS and bool(((rates < 0.005) | (rates > 0.995)).all()):
                self._say(
                    "the model predicts the same for nearly everybody, which closes every gap and is of no use",
                    f"lower weight={self.weight}",
                )
        if not isinstance(mode, Constraint):
            return
        if self._vain:
            self._say(
                f"nothing was bounded: no {self.notion} has min_support={self.min_support} training examples in each "
                "of the groups to compare",
                "lower it, or merge groups",
            )
        elif not found and mode.multipliers is not None:
            self._say(
                "no weights were measured: training ended within the warmup or before another guard had settled",
                "train longer; the last weights are kept",
            )
        if not found:
            return
        self._choice.take(module)
        error = float(found.get("error", 0.0))
        where = (
            f"{self.notion} gap of {found['gap']:.4f} (standard error {error:.4f}) on {found['on']} data, "
            f"epoch {found['epoch']}"
        )
        if found["constant"]:
            self._say(
                "the model predicts the same for nearly everybody, which closes every gap and is of no use",
                f"allow more than max_gap={self.max_gap}",
            )
        elif not found["feasible"]:
            self._say(
                f"max_gap={self.max_gap} was not reached; the smallest was a {where}",
                "train longer, raise step_size or cap, or allow more",
            )
        else:
            self._outcome = f"max_gap={self.max_gap} is kept: {where}"
            if 2 * error > float(self.max_gap or 0.0):
                most = found["gap"] + 2 * error
                self._say(
                    f"{self._outcome}, but of so few examples that the gap on others may be {most:.2f}",
                    "merge small groups, or judge it on more data",
                )
            else:
                rank_zero_info(f"{self.name}: {self._outcome}")

    def _say(self, what: str, remedy: str) -> None:
        self._outcome = what
        rank_zero_warn(f"{self.name}: {what}; {remedy}")

    def notes(self) -> list[str]:
        return [f"{what}." for what in (self._outcome, self._unbounded) if what]

    def state(self) -> dict[str, Any]:
        if self._mode is None:
            return {}
        census = {} if self._census is None else self._census.state()
        limits = torch.zeros(0) if self._census is None else self._limits
        bound = [self.notion, self.max_gap, self.margin]
        choice = {"choice": self._choice.state(), "bound": bound}
        return {"mode": self._mode.state(), **choice, "census": census, "thresholds": limits}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._state = state
