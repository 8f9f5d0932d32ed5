"""Differentially private training as a guard."""

import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_guard.functional.privacy import (
    Clipping,
    Deal,
    Draws,
    Findings,
    Ledger,
    Mechanism,
    Noise,
    PrivacyPlan,
    Queries,
    Segment,
    chunks_within,
    correct_adam_,
    dealt,
    group_norms,
    noise_of_all,
    population,
    probe,
    profile,
    released,
    together,
)
from lightning_guard.guard import Batch, Guard, GuardConflict, Phase, Query, Run, Step, Trait, callbacks_of
from lightning_guard.leaks import Leaks
from lightning_guard.private import PrivateSums
from lightning_guard.unchanged import Unchanged
from lightning_guard.undo import swap_value


class DPSGD(Guard):
    r"""Keeps what any one example can change about the weights within (epsilon, delta)-differential privacy.

    Each step draws every example independently with the same probability, clips each example's gradient to
    ``max_grad_norm``, adds Gaussian noise to the sum and divides by the expected number of examples (Abadi et al.,
    2016). Clipped sums come from one backward pass of your own mean loss; per-example gradients are never in memory,
    no module or optimizer is wrapped, and no raw gradient ever reaches a parameter. Training stops before the step that
    would exceed the budget.

    Give two of ``target_epsilon``, ``noise_multiplier`` and the Trainer's ``max_epochs`` (or ``max_steps``); the third
    follows. The plan is printed before training and kept in checkpoints, and a resume with another plan is refused.
    The promise is for the weights and what is computed from them. What else leaves a run (training metrics, checkpoints
    chosen by them) is named in the header and in the report.

    Logs ``guard/dp_sgd/epsilon``, spent by the end of each epoch, and ``guard/dp_sgd/max_grad_norm`` if it adapts.

    Args:
        delta: probability that the promise fails; well below one over the number of examples.
        target_epsilon: the budget, in nats; infinity switches the guard off.
        noise_multiplier: standard deviation of the noise over ``max_grad_norm``.
        max_grad_norm: L2 norm C to which each example's gradient is clipped.
        clipping: ``flat`` over all parameters; ``per_layer``; ``automatic`` (AUTO-S), which needs no tuning of C.
        stability: gamma of ``automatic``, in units of the gradient norm.
        batch_size: expected examples of a step, over all processes and accumulated batches; None is what the loader
            and the Trainer say.
        max_physical_batch_size: most examples in memory at once; a draw is dealt into that many batches. Rarely
            exceeded, when a draw is far larger than expected.
        sampling: ``poisson``; ``shuffle`` takes fixed batches at their own, much larger epsilon.
        users: whose privacy is meant, if a person has several rows: the name of a column (attribute or key) of the
            dataset with one number or string a row, or such a sequence. None protects single rows.
        rows_per_user: most rows of a person in one step.
        views: rows drawn of each example, for random augmentations in the dataset; their gradients are averaged before
            clipping (De et al., 2022).
        target_quantile: adapt C so that this fraction of examples is not clipped (Andrew et al., 2021); the noise of
            counting them is accounted for.
        clip_rate: learning rate of the adaptation.
        noise_final: noise multiplier of the last epoch over that of the first; changes linearly by the epoch.
        clip_final: the same for ``max_grad_norm``.
        adam_correction: subtract the noise's variance from the second moment of Adam and AdamW, down to this fraction
            of it, e.g. 0.1 (Tang et al., 2024).
        releases: backward passes on one batch, with manual optimisation of several losses (2 for a GAN).
        loss_reduction: whether ``training_step`` gives the ``mean`` or the ``sum`` of the examples' losses.
        replace_batch_norm: ``group`` puts GroupNorm where BatchNorm is; state_dict then lacks its running statistics.
        withhold_metrics: log nothing of ``training_step``, since epsilon does not cover it.
        test_seed: for tests only: draws and noise are reproducible, and nothing is private.
        batch: how a batch is read, if the defaults do not fit.

    | case                                        | result                                                     |
    |---------------------------------------------|------------------------------------------------------------|
    | ``target_epsilon=inf``                      | training is bit-identical to training without the guard    |
    | a draw without examples                     | a step of noise alone                                      |
    | an example whose gradient is NaN or infinite | contributes nothing                                       |
    | BatchNorm in training mode                  | refused; ``replace_batch_norm="group"``, or freeze it      |
    | examples that influence each other's gradient | refused on the first step (a probe; it sees what it sees) |
    | a parameter that no layer books             | refused on the first step, by name                         |
    | a buffer that a training step writes        | refused on the first step, by name                         |

    Raises:
        GuardConflict: before training or on its first step, if the promise cannot be kept.

    Reference:
        Abadi et al., Deep learning with differential privacy, CCS 2016, arXiv:1607.00133. Book-keeping: Bu et al.,
        ICML 2023, arXiv:2210.00038. Augmentation: De et al., 2022, arXiv:2204.13650.

    Example:
        >>> import pytorch_lightning as pl
        >>> trainer = pl.Trainer(callbacks=[DPSGD(target_epsilon=3.0, delta=1e-5)], max_epochs=10, logger=False)
    """

    name: ClassVar[str] = "dp_sgd"
    phase: ClassVar[Phase] = Phase.GRADIENTS
    traits: frozenset[Trait] | None = frozenset({Trait.BOUNDS_EXAMPLES})

    def __init__(
        self,
        delta: float,
        target_epsilon: float | None = None,
        noise_multiplier: float | None = None,
        max_grad_norm: float = 1.0,
        clipping: Literal["flat", "per_layer", "automatic"] = "flat",
        stability: float = 0.01,
        batch_size: int | None = None,
        max_physical_batch_size: int | None = None,
        sampling: Literal["poisson", "shuffle"] = "poisson",
        users: str | Sequence[Any] | None = None,
        rows_per_user: int = 1,
        views: int = 1,
        target_quantile: float | None = None,
        clip_rate: float = 0.2,
        noise_final: float = 1.0,
        clip_final: float = 1.0,
        adam_correction: float | None = None,
        releases: int = 1,
        loss_reduction: Literal["mean", "sum"] = "mean",
        replace_batch_norm: Literal["group"] | None = None,
        withhold_metrics: bool = False,
        test_seed: int | None = None,
        batch: Batch | None = None,
    ):
        self.delta, self.target_epsilon, self.noise_multiplier = delta, target_epsilon, noise_multiplier
        self.max_grad_norm, self.clipping, self.stability = max_grad_norm, clipping, stability
        self.batch_size, self.max_physical_batch_size, self.sampling = batch_size, max_physical_batch_size, sampling
        self.users, self.rows_per_user, self.views = users, rows_per_user, views
        self.target_quantile, self.clip_rate = target_quantile, clip_rate
        self.noise_final, self.clip_final, self.adam_correction = noise_final, clip_final, adam_correction
        self.releases, self.loss_reduction, self.replace_batch_norm = releases, loss_reduction, replace_batch_norm
        self.withhold_metrics, self.test_seed, self.batch = withhold_metrics, test_seed, batch
        for option in ("max_grad_norm", "stability", "clip_rate", "rows_per_user", "views", "releases"):
            if not getattr(self, option) > 0:
                raise ValueError(f"{option}={getattr(self, option)} must be positive")
        if views > 1 and users is not None:
            raise ValueError(f"views={views} and users together are not built; augment within the rows of a person")
        if self.off:
            self.traits = frozenset()
        self._reset()

    def _reset(self) -> None:
        self._ledger: Ledger | None = None
        self._restored: Mapping[str, Any] | None = None
        self._draws: Draws | None = None
        self._deal: Deal | None = None
        self._place = (-1, -1)  # epoch and batch of the last step
        self._probing = 0  # the step from which to probe again
        self._found: Findings | None = None

    @property
    def off(self) -> bool:
        return self.target_epsilon == math.inf

    @property
    def plan(self) -> PrivacyPlan | None:
        """What is promised; known when the training data are."""
        return None if self._ledger is None else self._ledger.plan

    # Before training ----------------------------------------------------------------------------------------------

    def problems(self, run: Run) -> Iterable[str]:
        if self.off:
            return
        trainer, module = run.trainer, run.module
        if trainer.precision not in ("32-true", "64-true", "bf16-mixed"):
            yield (
                f"precision={trainer.precision!r} rounds or rescales gradients so coarsely that they cannot be bounded "
                "and noised; use '32-true' or 'bf16-mixed'"
            )
        if fixed := getattr(trainer, "overfit_batches", 0):  # which the Trainer declares nowhere
            yield f"overfit_batches={fixed} trains on a fixed few examples; set it to 0"
        if any(type(c).__name__ == "GradientAccumulationScheduler" for c in callbacks_of(trainer)):
            yield "GradientAccumulationScheduler changes the batch size, which the plan fixes; use batch_size"
        if not module.automatic_optimization and (trainer.accumulate_grad_batches > 1 or self.max_physical_batch_size):
            yield "accumulated batches need automatic optimisation; set accumulate_grad_batches=1 and no physical limit"
        averaging = _averages(trainer)
        if not self.replace_batch_norm:
            for name, layer in module.named_modules():
                if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training:
                    yield (
                        f"{name} is a BatchNorm, which mixes examples and remembers them; set "
                        "replace_batch_norm='group', or freeze it with .eval() and statistics that are public"
                    )
                elif isinstance(layer, nn.modules.batchnorm._BatchNorm) and averaging:
                    yield (
                        f"StochasticWeightAveraging forgets the statistics of {name}, a BatchNorm, and takes those of "
                        "one more pass over the data, without noise; average with WeightAveraging, or have no BatchNorm"
                    )
        if self.target_epsilon is None and self.noise_multiplier is None:
            yield "nothing says how private; give target_epsilon, or noise_multiplier and a length of training"
        elif run.endless and (self.target_epsilon is None or self.noise_multiplier is None):
            yield "training has no end, so the noise cannot be planned; set max_epochs or max_steps on the Trainer"

    def overrides(self, transform: str) -> bool:
        if transform == "rewrite" and type(self).rewrite is DPSGD.rewrite:
            return self.replace_batch_norm is not None and not self.off
        return super().overrides(transform)

    def rewrite(self, module: pl.LightningModule) -> None:
        if self.replace_batch_norm and not self.off:
            group_norms(module)

    def prepare(self, run: Run) -> None:
        self._reset()
        self._run, self._accumulated = run, run.trainer.accumulate_grad_batches
        self._noise = Noise(self.test_seed)
        self._queries = Queries(self._noise, run.trainer.global_rank, run.trainer.world_size)
        self._sums = PrivateSums(run, self._queries, self._asked, self._dealt, self._rewriting)
        if not self.off:
            run.private = self._sums

    def _dealt(self) -> Deal:
        assert self._deal is not None
        return self._deal

    def on_loader(self, loader: Any) -> Any:
        if self.off:
            return loader
        with _refused(self.name):
            return self._drawing(loader)

    def _drawing(self, loader: Any) -> Any:
        """The loader drawing by the plan."""
        trainer, accumulated = self._run.trainer, self._accumulated
        world, limit = trainer.world_size, trainer.limit_train_batches
        who = population(loader, self.users)
        units = who if isinstance(who, int) else len(who)
        rows = 1 if self.users is None else self.rows_per_user
        size = min(self.batch_size or loader.batch_sampler.batch_size * accumulated * world, units)
        steps = max(1, round(units / size)) if self.sampling == "poisson" else units // size
        chunks = accumulated
        if self.max_physical_batch_size is not None:
            chunks = max(chunks, chunks_within(self.max_physical_batch_size, size, rows * self.views, world))
        used = int(steps * chunks * limit) if isinstance(limit, float) else min(limit, steps * chunks)
        if used % chunks or not used:
            raise ValueError(
                f"limit_train_batches={limit} cuts a draw of {chunks} batches in two; give a multiple of {chunks}"
            )
        plan = self._planned(units, size, used // chunks)
        self._sums.planned(loader, plan.batch_size, units)
        if self._ledger is None:
            # A length that only the Trainer states, and that nothing depends on, may be another after a resume.
            fixed = self.target_epsilon is not None or (self.noise_final, self.clip_final) != (1, 1)
            self._ledger = Ledger(plan, private=self.test_seed is None, fixed=fixed)
        elif plan.fingerprint != self._ledger.plan.fingerprint:
            raise ValueError("the reloaded training data have another size than the plan was made for; restart")
        # A new one for each loader: a secret that is used twice draws the same batches twice.
        secret = secrets.randbits(128) if self.test_seed is None else self.test_seed
        if world > 1:
            secret = trainer.strategy.broadcast(secret)
        if chunks != trainer.accumulate_grad_batches:
            swap_value(self._run.undo, trainer, "accumulate_grad_batches", chunks)
        self._draws = Draws(
            who, plan.sample_rate, steps, chunks=chunks, views=self.views, rows=rows,
            rank=trainer.global_rank, world=world, secret=secret, sampling=self.sampling,
            turn=None if self.test_seed is None else lambda: trainer.current_epoch,
        )  # fmt: skip
        together(loader, _batch_hooks(self._run))
        return dealt(loader, self._draws)

    def _planned(self, units: int, size: int, steps_per_epoch: int) -> PrivacyPlan:
        trainer = self._run.trainer
        steps = None if trainer.max_epochs in (None, -1) else trainer.max_epochs * steps_per_epoch
        if trainer.max_steps != -1:
            steps = trainer.max_steps if steps is None else min(steps, trainer.max_steps)
        plan = PrivacyPlan.solve(
            units, size, steps_per_epoch, self.delta, self.max_grad_norm,
            target_epsilon=self.target_epsilon, noise_multiplier=self.noise_multiplier, steps=steps,
            clipping=self.clipping, sampling=self.sampling, unit="example" if self.users is None else "user",
            releases=self.releases, noise_final=self.noise_final, clip_final=self.clip_final,
            target_quantile=self.target_quantile,
            query_noise=noise_of_all(q.noise for q in self._asked.values() if not q.once),
            once_noise=noise_of_all(q.noise for q in self._asked.values() if q.once),
            before=self._brought(units),
        )  # fmt: skip
        if _averages(trainer) and steps is not None and plan.steps < steps:
            raise ValueError(
                f"the budget pays for {plan.steps} of {steps} steps, and StochasticWeightAveraging puts its average in "
                "place only after the last epoch of max_epochs; give fewer epochs or more noise"
            )
        return plan

    def _brought(self, units: int) -> list[Segment]:
        """What earlier trainings have released whose results other guards bring in."""
        found: list[Segment] = []
        unit = "example" if self.users is None else "user"
        for guard in self._run.guards:
            state = {} if guard.off else guard.brings().get(self.name, {})
            if state:
                try:
                    found += released(state, units, unit, self.sampling, private=self.test_seed is None)
                except ValueError as error:
                    raise ValueError(
                        f"{guard.name} brings in another training that cannot be counted: {error}"
                    ) from None
        return found

    @property
    def _asked(self) -> dict[str, Query]:
        """What other guards ask of the training data, by name."""
        return {query.name: query for guard in self._run.guards if not guard.off for query in guard.queries()}

    def begin(self, run: Run) -> None:
        if self.off:
            return
        trainer, module = run.trainer, run.module
        own = {id(p) for p in module.parameters()}
        for optimizer in trainer.optimizers:
            if any(id(p) not in own for group in optimizer.param_groups for p in group["params"]):
                raise GuardConflict(
                    f"{self.name}: {type(optimizer).__name__} trains parameters outside of {type(module).__name__}, "
                    "whose gradients are not bounded; make them part of it"
                )
        for name, p in module.named_parameters():
            if isinstance(p, UninitializedParameter) or p.dtype not in (torch.float32, torch.float64):
                raise GuardConflict(
                    f"{self.name}: {name} is {getattr(p, 'dtype', 'lazy')} or not initialised yet, and noise needs "
                    "float32 or float64 weights; run a lazy module once, and use precision='bf16-mixed'"
                )
        self._mechanism = Mechanism(
            _trainable(module), Clipping(self.clipping, self.stability), self._noise, self.loss_reduction,
            self.clip_rate, trainer.global_rank, trainer.world_size, lambda text: GuardConflict(f"{self.name}: {text}"),
            self._sums.masks,
        )  # fmt: skip
        run.undo.callback(self._mechanism.close)
        noised = {Trait.QUERIES_DATA, Trait.POST_PROCESSING}  # their figures are of what is private already
        others = [guard.name for guard in run.guards if noised & (guard.traits or set())]
        self._leaks = Leaks(run, tuple(f"guard/{name}/" for name in (self.name, *others)), self.withhold_metrics)
        self._unchanged = Unchanged(module)
        if trainer.world_size > 1:  # clipped sums are exchanged by us
            swap_value(run.undo, trainer.strategy.model, "require_backward_grad_sync", False)
        for optimizer in trainer.optimizers:
            run.undo.callback(optimizer.register_step_post_hook(self._taken).remove)
        if self.adam_correction:
            for optimizer in trainer.optimizers:
                if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
                    raise GuardConflict(
                        f"{self.name}: adam_correction needs Adam or AdamW, not {type(optimizer).__name__}"
                    )
                run.undo.callback(optimizer.register_step_post_hook(self._corrected).remove)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.off:
            if self._restored is not None:
                raise GuardConflict(
                    f"{self.name}: target_epsilon=inf would go on without privacy where a private training stopped; "
                    "give its options, or start anew from the weights"
                )
            return
        if self._ledger is None:
            raise GuardConflict(f"{self.name}: training reads no loader that could draw by a plan; give a DataLoader")
        if self._restored is not None:
            with _refused(self.name):
                self._ledger.resume(self._restored)
        elif trainer.global_step:
            raise GuardConflict(
                f"{self.name}: the first {trainer.global_step} steps of this training were made without it, so "
                "epsilon would tell of the rest alone; begin a training of its own, from public weights or none"
            )
        elif pl_module in _trained:
            raise GuardConflict(
                f"{self.name}: {type(pl_module).__name__} has spent epsilon = {_trained[pl_module].spent:.3g} in an "
                "earlier training, which a new plan would not count; go on with that Trainer or its checkpoint, or "
                "build a new module"
            )
        self._unchanged.begin()
        rank_zero_info(self.header())

    # A step -------------------------------------------------------------------------------------------------------

    @contextmanager
    def during(self, step: Step) -> Iterator[None]:
        if self.off or step.rehearsal:
            yield
            return
        automatic = step.module.automatic_optimization
        with ExitStack() as around:
            with _refused(self.name):
                deal = self._next_deal(step)
                if hasattr(torch.compiler, "set_stance"):
                    around.enter_context(torch.compiler.set_stance("force_eager"))  # a compiled step books nothing
                self._check(step, deal)
            book = self._mechanism.book
            around.enter_context(book.step(max(deal.units, 1), deal.rows, deal.weights if deal.units else None))
            book.deferred = automatic
            yield
            if automatic:
                output = step.output
                if (output.get("loss") if isinstance(output, Mapping) else output) is None:
                    raise GuardConflict(
                        f"{self.name}: training_step returned no loss, and a step left out tells who was in it; return "
                        "a loss in every step (examples that are not finite are left out by themselves)"
                    )
                self._refuse(self._unchanged.written())
        self._report(step, deal)

    def _next_deal(self, step: Step) -> Deal:
        """What the batch is that has come, and with the first of a draw the beginning of a step."""
        trainer, draws, ledger = step.run.trainer, self._draws, self._ledger
        assert draws is not None
        assert ledger is not None
        if self._mechanism.book.booked:
            raise ValueError(
                "a backward pass was made that Lightning did not see, so its gradients were never clipped; call "
                "self.manual_backward(loss) instead of loss.backward()"
            )
        place = (trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx)
        if place == self._place:
            raise ValueError(
                "the optimizer asks for the loss of a batch more than once, and each gradient that it sees costs "
                "privacy; use one that asks once (LBFGS does not)"
            )
        self._place, self._deal = place, draws.next_deal()
        ledger.admit(self._deal, place[1], draws.chunks)
        if self._deal.first:
            norm = ledger.plan.clip_at(ledger.steps) if ledger.max_grad_norm is None else ledger.max_grad_norm
            self._mechanism.begin(ledger.plan, ledger.steps, norm, trainer.accumulate_grad_batches)
        return self._deal

    def _check(self, step: Step, deal: Deal) -> None:
        """What can only be seen on a batch: on the first steps, and the probe once there are two examples."""
        assert self._ledger is not None
        done = self._ledger.steps
        self._unchanged.begin_step(values=done < 3)
        if any(p.requires_grad and id(p) not in self._mechanism.book.parameters for p in step.module.parameters()):
            self._mechanism.follow(_trainable(step.module))
            self._probing = 0
        if done < 1:
            given = step.run.trainer.train_dataloader
            if getattr(given, "batch_sampler", None) is not self._draws:
                raise ValueError(
                    f"training does not read the loader that draws by the plan but {type(given).__name__}; give one "
                    "DataLoader, and replace it nowhere"
                )
        # Again after 1, 4, 16 ... steps: a coupling may begin later, or hide at the first weights.
        if done >= self._probing and deal.units > 1 and step.again is not None:
            self._probing = max(1, 4 * done)
            self._probe(step, deal)
        if done < 4:
            self._refuse(self._unchanged.kept())

    def _probe(self, step: Step, deal: Deal) -> None:
        batch, private, book = step.batch, self._mechanism, self._mechanism.book
        norm = private.max_grad_norm
        for _ in range(len(book.parameters)):
            try:
                found = probe(book, step.again, batch, deal.units, deal.rows, private.groups, private.factors, norm)
                break
            except GuardConflict:
                raw, book.raw = book.raw, None
                owner = next((m for m in step.module.modules() if any(p is raw for p in m.parameters(False))), None)
                if raw is None or owner is None or owner is step.module or "forward" in vars(owner):
                    raise
                book.fall_back(owner, step.run.undo)
        self._found = found
        found.check(self.loss_reduction)

    def on_gradients(self, module: pl.LightningModule) -> None:
        if self.off:
            return
        private, deal, ledger, automatic = self._mechanism, self._deal, self._ledger, module.automatic_optimization
        assert deal is not None
        assert ledger is not None
        if automatic:
            self._refuse(self._unchanged.written())
        with _refused(self.name):
            private.take(deal, every=automatic)
            if deal.last and private.released == 1:
                self._queries.release()
        if deal.last:
            ledger.pending = automatic
        if deal.last and private.released == 1:
            ledger.steps += 1
            ledger.max_grad_norm = private.next_norm
            _trained[self._run.module] = ledger
            if ledger.done:
                self._run.trainer.should_stop = True

    # What must not change -------------------------------------------------------------------------------------------

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if not self.off:
            self._check_gradients(optimizer)

    def _taken(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._check_gradients(optimizer)  # once more, for steps that Lightning does not see
        if self._ledger is not None:
            self._ledger.pending = False

    def _check_gradients(self, optimizer: Any) -> None:
        """Whether all that an optimizer takes was released by us."""
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None and self._mechanism.sum.handed.get(id(p)) is not p.grad:
                    p.grad = None
                    raise GuardConflict(
                        f"{self.name}: {type(optimizer).__name__} is given a gradient without clipping and noise, set "
                        "by hand or of a parameter that was unfrozen or added within the step; leave gradients to the "
                        "backward pass of Lightning, and change what is trained between steps"
                    )

    def _corrected(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        assert self.adam_correction is not None
        correct_adam_(optimizer, self._mechanism.std**2, self.adam_correction)

    def _refuse(self, written: Sequence[str]) -> None:
        if written:
            raise GuardConflict(
                f"{self.name}: training writes {written[0]}, which would keep raw data; freeze its layer, compute it "
                "from public data before training, or keep it out of state_dict"
            )

    @contextmanager
    def _rewriting(self) -> Iterator[None]:
        self._refuse(self._unchanged.kept())
        yield
        self._unchanged.begin()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.off:
            self._refuse(self._unchanged.kept())

    on_train_end = on_train_epoch_end

    @contextmanager
    def paused(self) -> Iterator[None]:
        with nullcontext() if self.off else self._mechanism.book.paused():
            yield

    @contextmanager
    def joining(self) -> Iterator[None]:
        with nullcontext() if self.off else self._mechanism.book.joined():
            yield

    # What is said about it ------------------------------------------------------------------------------------------

    def _report(self, step: Step, deal: Deal) -> None:
        ledger = self._ledger
        assert ledger is not None
        if self.target_quantile is not None:
            self.report(step.module, max_grad_norm=self._mechanism.max_grad_norm)
        if ledger.steps == 0 and deal.first and self._leaks.metrics:
            rank_zero_info(f"{self.name}: not covered: {next(self._uncovered())}")  # the header came too early for it
        for monitor in self._leaks.steering:
            raise GuardConflict(
                f"{self.name}: ReduceLROnPlateau sets the learning rate by {monitor}, computed from training data "
                "without noise, so the weights would depend on it; monitor a validation metric"
            )
        done = ledger.steps + (step.module.automatic_optimization and deal.last)
        if step.run.trainer.is_last_batch or done >= ledger.plan.steps:
            self.report(step.module, epsilon=ledger.plan.epsilon(done))

    def header(self) -> str:
        """What is planned and what is not covered, as printed before training."""
        assert self.plan is not None
        lines = [self.plan.describe(), *(f"not covered: {leak}" for leak in self._uncovered())]
        if self.test_seed is not None:
            lines.append("NOT PRIVATE: test_seed makes draws and noise reproducible")
        return "\n".join([f"{self.name}:", *(f"  {line}" for line in "\n".join(lines).splitlines())])

    def _uncovered(self) -> Iterator[str]:
        """What epsilon says nothing about."""
        if names := self._leaks.metrics:
            yield f"{', '.join(names)}: logged by training_step from raw data; withhold_metrics=True leaves them out"
        yield from self._leaks.beside_metrics()
        if not self._run.module.automatic_optimization:
            yield "whether examples are independent: a step cannot be probed under manual optimisation"
        if self._mechanism.dropped:
            yield f"that {self._mechanism.dropped} gradients were not finite and were left out"

    def notes(self) -> list[str]:
        if self.off or self._ledger is None:
            return []
        ledger = self._ledger
        notes = [f"{ledger.steps} noisy steps spent epsilon = {ledger.spent:.3g} at delta = {self.delta:g}."]
        if self.test_seed is not None:
            notes.insert(0, "NOT PRIVATE: test_seed made draws and noise reproducible.")
        if self._found is not None:
            notes.append(
                f"A probe replaced one example after another: no other's gradient changed by more "
                f"than {self._found.coupling:.1g} of its norm, the clipped sum moved by {self._found.influence:.2g} "
                "times max_grad_norm (2 is allowed), and no step wrote a buffer. A probe refutes and does not prove."
            )
        return [*notes, *(f"Not covered by epsilon: {leak}." for leak in self._uncovered())]

    def privacy(self) -> dict[str, Any]:
        if self.off or self._ledger is None or self.test_seed is not None:
            return {}
        ledger = self._ledger
        told = (ledger.spent, float(ledger.plan.delta))
        others = profile(ledger.plan.ledger(ledger.steps), told[1])
        return {"claims": [told, *(claim for claim in others if claim[1] != told[1])], "unit": ledger.plan.unit}

    def state(self) -> dict[str, Any]:
        if self._ledger is None:
            return {} if self._restored is None else dict(self._restored)
        return self._ledger.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self._restored = state or None


_LIGHTNING = ("pytorch_lightning", "lightning")
_trained: "WeakKeyDictionary[pl.LightningModule, Ledger]" = WeakKeyDictionary()


def _trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def _averages(trainer: pl.Trainer) -> bool:
    """Whether the Trainer has Lightning's StochasticWeightAveraging."""
    return any("StochasticWeightAveraging" in {c.__name__ for c in type(one).__mro__} for one in callbacks_of(trainer))


def _batch_hooks(run: Run) -> list[Callable[[Any], Any]]:
    """What the module or its data do to a batch before training_step sees it."""
    hooks = list[Callable[[Any], Any]]()
    for name in ("on_before_batch_transfer", "on_after_batch_transfer"):
        for owner in (getattr(run.trainer, "datamodule", None), run.module):
            own = getattr(type(owner), name, None)
            if owner is not None and own is not None and not own.__module__.startswith(_LIGHTNING):
                hooks.append(_first_loader(getattr(owner, name)))
                break
    return hooks


def _first_loader(hook: Callable[[Any, int], Any]) -> Callable[[Any], Any]:
    return lambda batch: hook(batch, 0)


@contextmanager
def _refused(name: str) -> Iterator[None]:
    try:
        yield
    except GuardConflict:
        raise
    except ValueError as error:
        raise GuardConflict(f"{name}: {error}") from error
