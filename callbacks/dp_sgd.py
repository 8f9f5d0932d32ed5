"""Differentially private training as a guard."""

import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import wraps
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lightning_guard.functional.privacy import (
    Bookkeeper,
    Clipping,
    Deal,
    Draws,
    Findings,
    Noise,
    NoisySum,
    PrivacyPlan,
    adapted,
    correct_adam_,
    dealt,
    group_norms,
    population,
    probe,
    together,
)
from lightning_guard.guard import Batch, Guard, GuardConflict, Phase, Run, Step, Trait, callbacks_of
from lightning_guard.still import buffer_versions
from lightning_guard.undo import swap, swap_value


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
        if self._off:
            self.traits = frozenset()
        self._clip = Clipping(clipping, stability)
        self._reset()

    def _reset(self) -> None:
        self.plan: PrivacyPlan | None = None
        self._steps = 0  # noisy steps released so far
        self._at = 0  # the step that is being made
        self._norm: float | None = None  # the adapted max_grad_norm, and that of the next step
        self._next: float | None = None
        self._pending = False  # a gradient was released that no optimizer has taken
        self._reached: dict[Any, set[int]] = {}  # by release and what is trained: whom the release is for
        self._kept: dict[str, tuple[float, float]] | None = None
        self._restored: Mapping[str, Any] | None = None
        self._draws: Draws | None = None
        self._deal: Deal | None = None
        self._place = (-1, -1)  # epoch and batch of the last step
        self._probing = 0  # the step from which to probe again
        self._found: Findings | None = None
        self._logged: dict[str, None] = {}  # what the user's module logged of training, in order
        self._dropped = 0

    @property
    def _off(self) -> bool:
        return self.target_epsilon == math.inf

    @property
    def _open(self) -> bool:
        """Whether nothing depends on the length of training but what it costs in the end."""
        return self.target_epsilon is None and self.noise_final == self.clip_final == 1

    # Before training ----------------------------------------------------------------------------------------------

    def problems(self, run: Run) -> Iterable[str]:
        if self._off:
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
        if not self.replace_batch_norm:
            for name, layer in module.named_modules():
                if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training:
                    yield (
                        f"{name} is a BatchNorm, which mixes examples and remembers them; set "
                        "replace_batch_norm='group', or freeze it with .eval() and statistics that are public"
                    )
        if self.target_epsilon is None and self.noise_multiplier is None:
            yield "nothing says how private; give target_epsilon, or noise_multiplier and a length of training"
        elif run.endless and (self.target_epsilon is None or self.noise_multiplier is None):
            yield "training has no end, so the noise cannot be planned; set max_epochs or max_steps on the Trainer"

    def rewrite(self, module: pl.LightningModule) -> None:
        if self.replace_batch_norm and not self._off:
            group_norms(module)

    def prepare(self, run: Run) -> None:
        self._reset()
        self._run, self._accumulated = run, run.trainer.accumulate_grad_batches

    def on_loader(self, loader: Any) -> Any:
        if self._off:
            return loader
        trainer, ready = self._run.trainer, self._draws is not None
        world, accumulated = trainer.world_size, self._accumulated
        try:
            who = population(loader, self.users)
            sizes = who if isinstance(who, int) else len(who)
            size = self.batch_size or loader.batch_size * accumulated * world
            if size > sizes:
                size = sizes
            steps = max(1, round(sizes / size)) if self.sampling == "poisson" else sizes // size
            chunks = self._chunks(size, accumulated, world)
            limit = trainer.limit_train_batches
            most = steps * chunks
            used = int(most * limit) if isinstance(limit, float) else min(limit, most)
            if used % chunks or not used:
                raise ValueError(
                    f"limit_train_batches={limit} cuts a draw of {chunks} batches in two; give a multiple of {chunks}"
                )
            plan = self._planned(sizes, size, used // chunks)
            if ready and plan.fingerprint != self.plan.fingerprint:  # type: ignore[union-attr]
                raise ValueError("the reloaded training data have another size than the plan was made for; restart")
            # A new one for each loader: a secret that is used twice draws the same batches twice.
            secret = secrets.randbits(128) if self.test_seed is None else self.test_seed
            if world > 1:
                secret = trainer.strategy.broadcast(secret)
            if chunks != trainer.accumulate_grad_batches:
                swap_value(self._run.undo, trainer, "accumulate_grad_batches", chunks)
            self._draws = Draws(
                who, plan.sample_rate, steps, chunks=chunks, views=self.views,
                rows=self.rows_per_user if self.users is not None else 1,
                rank=trainer.global_rank, world=world, secret=secret, sampling=self.sampling,
                turn=None if self.test_seed is None else lambda: trainer.current_epoch,
            )  # fmt: skip
            self.plan = plan
            together(loader, self._hooks())
            return dealt(loader, self._draws)
        except ValueError as error:
            raise GuardConflict(f"{self.name}: {error}") from error

    def _hooks(self) -> list[Callable[[Any], Any]]:
        """What the module or its data do to a batch before training_step sees it."""
        trainer, hooks = self._run.trainer, list[Callable[[Any], Any]]()
        for name in ("on_before_batch_transfer", "on_after_batch_transfer"):
            for owner in (getattr(trainer, "datamodule", None), self._run.module):
                own = getattr(type(owner), name, None)
                if owner is not None and own is not None and not own.__module__.startswith(_LIGHTNING):
                    hooks.append(_first_loader(getattr(owner, name)))
                    break
        return hooks

    def _chunks(self, size: int, accumulated: int, world: int) -> int:
        if self.max_physical_batch_size is None:
            return accumulated
        # Six standard deviations above the expected size: a larger draw comes once in a billion steps.
        most = math.ceil((size + 6 * math.sqrt(size)) * self.views * (self.rows_per_user if self.users else 1) / world)
        return max(accumulated, math.ceil(most / self.max_physical_batch_size))

    def _planned(self, units: int, size: int, steps_per_epoch: int) -> PrivacyPlan:
        trainer = self._run.trainer
        steps = None if trainer.max_epochs in (None, -1) else trainer.max_epochs * steps_per_epoch
        if trainer.max_steps != -1:
            steps = trainer.max_steps if steps is None else min(steps, trainer.max_steps)
        return PrivacyPlan.solve(
            units, size, steps_per_epoch, self.delta, self.max_grad_norm,
            target_epsilon=self.target_epsilon, noise_multiplier=self.noise_multiplier, steps=steps,
            clipping=self.clipping, sampling=self.sampling, unit="example" if self.users is None else "user",
            releases=self.releases, noise_final=self.noise_final, clip_final=self.clip_final,
            target_quantile=self.target_quantile,
        )  # fmt: skip

    def begin(self, run: Run) -> None:
        if self._off:
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
        self._noise = Noise(self.test_seed)
        self._unfollow = lambda: None
        self._follow(run)
        run.undo.callback(lambda: self._unfollow())
        swap(run.undo, module, "log", self._watching)
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
        if self._off:
            if self._restored is not None:
                raise GuardConflict(
                    f"{self.name}: target_epsilon=inf would go on without privacy where a private training stopped; "
                    "give its options, or start anew from the weights"
                )
            return
        if self.plan is None:
            raise GuardConflict(f"{self.name}: training reads no loader that could draw by a plan; give a DataLoader")
        if self._restored is not None:
            self._continue(self._restored)
        elif trainer.global_step:
            raise GuardConflict(
                f"{self.name}: the first {trainer.global_step} steps of this training were made without it, so "
                "epsilon would tell of the rest alone; begin a training of its own, from public weights or none"
            )
        elif pl_module in _trained:
            plan, steps = _trained[pl_module]
            raise GuardConflict(
                f"{self.name}: {type(pl_module).__name__} has spent epsilon = {plan.epsilon(steps):.3g} in an earlier "
                "training, which a new plan would not count; go on with that Trainer or its checkpoint, or build a new "
                "module"
            )
        self._kept = self._keep()
        rank_zero_info(self.header())

    def _continue(self, state: Mapping[str, Any]) -> None:
        assert self.plan is not None
        was = PrivacyPlan.from_dict(state["plan"])
        now = self.plan
        if self._open:
            now, was = replace(now, steps=1), replace(was, steps=1)
        changes = was.differences(now)
        if changes:
            raise GuardConflict(
                f"{self.name}: the checkpoint was trained by another plan ({'; '.join(changes)}), and one promise "
                "cannot cover both; resume with the same options, data and length, or train anew"
            )
        if not state["private"] and self.test_seed is None:
            raise GuardConflict(
                f"{self.name}: the checkpoint was trained with a test_seed and is not private, nor is what follows "
                "from it; train anew, or give a test_seed again"
            )
        self._steps, self._norm = state["steps"], state["max_grad_norm"]
        if self.sampling == "shuffle" and self._steps % self.plan.steps_per_epoch:
            raise GuardConflict(
                f"{self.name}: sampling='shuffle' promises each example one step an epoch, and a new order begins in "
                "the middle of one; resume from a checkpoint at the end of an epoch"
            )

    def _follow(self, run: Run) -> None:
        """Book what is trainable now."""
        trained = [(name, p) for name, p in run.module.named_parameters() if p.requires_grad]
        self._unfollow()
        self._book = Bookkeeper(trained, lambda message: GuardConflict(f"{self.name}: {message}"))
        self._unfollow = self._book.forbid_raw()
        self._probing = 0
        layers: dict[str, list[nn.Parameter]] = {}
        for name, p in trained:
            layers.setdefault(name.rpartition(".")[0] if self.clipping == "per_layer" else "", []).append(p)
        self._groups = list(layers.values())
        self._group = {id(p): g for g, group in enumerate(self._groups) for p in group}
        self._sum = NoisySum([p for _, p in trained], self._noise)

    # A step -------------------------------------------------------------------------------------------------------

    @contextmanager
    def during(self, step: Step) -> Iterator[None]:
        if self._off or step.rehearsal:
            yield
            return
        assert self._draws is not None
        assert self.plan is not None
        if self._book.booked:
            raise GuardConflict(
                f"{self.name}: a backward pass was made that Lightning did not see, so its gradients were never "
                "clipped; call self.manual_backward(loss) instead of loss.backward()"
            )
        place = (step.run.trainer.current_epoch, step.run.trainer.fit_loop.epoch_loop.batch_idx)
        if place == self._place:
            raise GuardConflict(
                f"{self.name}: the optimizer asks for the loss of a batch more than once, and each gradient that "
                "it sees costs privacy; use one that asks once (LBFGS does not)"
            )
        self._place, self._deal = place, self._draws.next_deal()
        deal = self._deal
        if deal.first and place[1] % self._draws.chunks:
            raise GuardConflict(
                f"{self.name}: training resumed in the middle of {self._draws.chunks} accumulated batches, whose draw "
                "is gone; resume from a checkpoint at the end of a step or an epoch"
            )
        if self._pending and step.module.automatic_optimization:
            raise GuardConflict(
                f"{self.name}: no optimizer took the last gradient, and whether one does may tell of raw data; step in "
                "every step, whatever the loss is"
            )
        if deal.first:
            self._sum.begun, self._released, self._unclipped, self._at = False, 0, 0.0, self._steps
            self._norm, self._next = self._norm if self._next is None else self._next, None
            if self.sampling == "shuffle" and deal.step == 0 and self._steps % self.plan.steps_per_epoch:
                raise GuardConflict(
                    f"{self.name}: sampling='shuffle' promises whole epochs, and the last one was cut short"
                )
        if self._steps >= self.plan.steps:
            raise GuardConflict(
                f"{self.name}: the budget is spent: {self._steps} steps are epsilon = "
                f"{self.plan.epsilon(self._steps):.3g}; take the weights as they are, or plan a longer training"
            )
        with ExitStack() as around:
            if hasattr(torch.compiler, "set_stance"):
                around.enter_context(torch.compiler.set_stance("force_eager"))  # a compiled step books nothing
            self._written = self._versions()
            self._sums = self._checksums() if self._steps < 3 else {}
            with _refused(self.name):
                self._check(step, deal)
            around.enter_context(self._book.step(max(deal.units, 1), deal.rows, deal.weights if deal.units else None))
            self._book.deferred = step.module.automatic_optimization
            yield
            if step.module.automatic_optimization:
                output = step.output
                if (output.get("loss") if isinstance(output, Mapping) else output) is None:
                    raise GuardConflict(
                        f"{self.name}: training_step returned no loss, and a step left out tells who was in it; return "
                        "a loss in every step (examples that are not finite are left out by themselves)"
                    )
                self._check_writes()
        self._report(step, deal)

    def _check(self, step: Step, deal: Deal) -> None:
        """What can only be seen on a batch: on the first steps, and the probe once there are two examples."""
        run, book = step.run, self._book
        if any(p.requires_grad and id(p) not in book.parameters for p in step.module.parameters()):
            self._follow(run)
        if self._steps < 1:
            given = run.trainer.train_dataloader
            if getattr(given, "batch_sampler", None) is not self._draws:
                raise ValueError(
                    f"training does not read the loader that draws by the plan but {type(given).__name__}; give one "
                    "DataLoader, and replace it nowhere"
                )
        # Again after 1, 4, 16 ... steps: a coupling may begin later, or hide at the first weights.
        if self._steps >= self._probing and deal.units > 1 and step.again is not None:
            self._probing = max(1, 4 * self._steps)
            self._probe(step, deal)
        if self._steps < 4:
            self._check_kept()

    def _probe(self, step: Step, deal: Deal) -> None:
        batch, book, bound = step.batch, self._book, self._bound()
        for _ in range(len(book.parameters)):
            try:
                found = probe(book, step.again, batch, deal.units, deal.rows, self._groups, self._factors, bound)
                break
            except GuardConflict:
                raw, book.raw = book.raw, None
                owner = next((m for m in step.module.modules() if any(p is raw for p in m.parameters(False))), None)
                if raw is None or owner is None or owner is step.module or "forward" in vars(owner):
                    raise
                book.fall_back(owner, step.run.undo)
        self._found = found
        if not found.independent:
            raise ValueError(
                f"the gradient of one example changed by {found.coupling:.1%} (in {found.parameter}) when another was "
                "replaced, so clipping each bounds nothing; let no layer, loss, weight or augmentation mix examples, "
                "and average a weighted loss over the number of examples, not over their weights"
            )
        if found.reduction not in (None, self.loss_reduction):
            raise ValueError(
                f"training_step gives the {found.reduction} of the examples' losses; say so with "
                f"loss_reduction={found.reduction!r}, or max_grad_norm would mean something else"
            )
        if found.influence > 2.01:
            raise ValueError(f"one example moved the clipped sum by {found.influence:.3g} times max_grad_norm, not 2")

    def on_gradients(self, module: pl.LightningModule) -> None:
        if self._off:
            return
        book, deal, plan = self._book, self._deal, self.plan
        assert deal is not None
        assert plan is not None
        if self._released >= self.releases:
            raise GuardConflict(
                f"{self.name}: more than releases={self.releases} backward passes on one batch, and each is noised and "
                "paid for; set releases to their number"
            )
        if module.automatic_optimization:
            self._check_writes()
        missing = [name for name in book.unbooked() if module.get_parameter(name).requires_grad]
        if missing and module.automatic_optimization:
            raise GuardConflict(
                f"{self.name}: {', '.join(missing[:5])} took no part in this step, so nothing bounds what examples do "
                "to it; freeze it with requires_grad_(False), or use it in every step"
            )
        trainer, bound = self._run.trainer, self._bound()
        if not self._sum.begun:
            std = plan.noise_at(self._at) * bound / plan.batch_size
            self._noise.at(self._at * self.releases + self._released)
            self._sum.begin(std if trainer.is_global_zero else 0.0)
        norms = book.squared_norms(self._groups).sqrt_()
        factors = self._factors(norms, book.units)
        if deal.units:
            if self.target_quantile is not None:
                below = norms[0] * self._scale(book.units) <= bound
                self._unclipped += float(below.sum()) - deal.units / 2
            bad = ~norms.isfinite().all(0)
            if bool(bad.any()):
                self._dropped += int(bad.sum())
                book.drop(bad)
            self._sum.add(book, factors / plan.batch_size, self._group)
        if deal.last:
            trained = frozenset(id(p) for p in book.parameters.values() if p.requires_grad)
            reached = set(trained) - {id(module.get_parameter(name)) for name in missing}
            if self._reached.setdefault((self._released, trained), reached) != reached:
                raise GuardConflict(
                    f"{self.name}: backward pass {self._released + 1} of a batch reaches other parameters than before, "
                    "which tells of its examples; let the same layers take part in every batch"
                )
            self._release(reached)
        book.clear()

    def _release(self, reached: set[int]) -> None:
        trainer, plan = self._run.trainer, self.plan
        assert plan is not None
        for flat in self._sum.flat.values() if trainer.world_size > 1 else ():
            torch.distributed.all_reduce(flat)
        self._sum.end(reached)
        self._released += 1
        self._pending = True
        if self._released > 1:
            return
        if self.target_quantile is not None:
            count = torch.tensor(self._unclipped, dtype=torch.float64, device=self._run.module.device)
            if trainer.is_global_zero and plan.count_noise is not None:
                count += self._noise.number(plan.count_noise)
            if trainer.world_size > 1:
                torch.distributed.all_reduce(count)
            fraction = float(count) / plan.batch_size + 0.5
            self._next = adapted(self._bound(), fraction, self.target_quantile, self.clip_rate)
        self._steps += 1
        _trained[self._run.module] = plan, self._steps
        if self._steps >= plan.steps:
            trainer.should_stop = True

    def _bound(self) -> float:
        """C of this step."""
        assert self.plan is not None
        return self.plan.clip_at(self._at) if self._norm is None else self._norm

    def _scale(self, units: int) -> float:
        """What makes gradients of the loss that is differentiated gradients of each unit's own loss."""
        rows = self._book.rows
        own = 1.0 if self._book.weights is not None else 1.0 / rows  # weights average over a person's rows already
        accumulated = self._run.trainer.accumulate_grad_batches  # Lightning divides the loss by it
        return own * accumulated * (units * rows if self.loss_reduction == "mean" else 1)

    def _factors(self, norms: Tensor, units: int) -> Tensor:
        scale = self._scale(units)
        return self._clip.factors(norms * scale, self._bound(), self._book.margin) * scale

    def _corrected(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        assert self.plan is not None
        assert self.adam_correction is not None
        std = self.plan.noise_at(self._at) * self._bound() / self.plan.batch_size
        correct_adam_(optimizer, std**2, self.adam_correction)

    # What must not change -------------------------------------------------------------------------------------------

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if not self._off:
            self._check_gradients(optimizer)

    def _taken(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._check_gradients(optimizer)  # once more, for steps that Lightning does not see
        self._pending = False

    def _check_gradients(self, optimizer: Any) -> None:
        """Whether all that an optimizer takes was released by us."""
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None and self._sum.handed.get(id(p)) is not p.grad:
                    p.grad = None
                    raise GuardConflict(
                        f"{self.name}: {type(optimizer).__name__} is given a gradient without clipping and noise, set "
                        "by hand or of a parameter that was unfrozen or added within the step; leave gradients to the "
                        "backward pass of Lightning, and change what is trained between steps"
                    )

    def _versions(self) -> dict[str, Any]:
        trained = {f"the weight {name}": (id(p), p._version) for name, p in self._run.module.named_parameters()}
        return trained | {f"the buffer {name}": v for name, v in buffer_versions(self._run.module).items()}

    def _checksums(self) -> dict[str, tuple[float, float]]:
        return {f"the weight {name}": _checksum(p) for name, p in self._run.module.named_parameters()}

    def _check_writes(self) -> None:
        """Whether the step that is being made has written what only the optimizer may."""
        after = self._versions()
        changed = [name for name in after if self._written.get(name) != after[name]]
        if self._sums:
            sums = self._checksums()
            changed += [name for name in sums if self._sums.get(name) != sums[name]]
        self._refuse_writes(changed)

    def _keep(self) -> dict[str, tuple[float, float]]:
        """What a checkpoint holds beside the weights that are trained."""
        module = self._run.module
        trained = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
        values = module.state_dict()
        return {
            name: _checksum(value)
            for name, value in values.items()
            if name not in trained and isinstance(value, Tensor)
        }

    def _check_kept(self) -> None:
        if self._kept is None:
            return
        now, names = self._keep(), {name for name, _ in self._run.module.named_parameters()}
        self._refuse_writes([name for name, value in now.items() if self._kept.get(name, value) != value])
        self._refuse_writes([name for name in now if name not in self._kept and name not in names])

    def _refuse_writes(self, names: Sequence[str]) -> None:
        if names:
            raise GuardConflict(
                f"{self.name}: training writes {names[0]}, which would keep raw data; freeze its layer, compute it "
                "from public data before training, or keep it out of state_dict"
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._off:
            self._check_kept()

    @contextmanager
    def paused(self) -> Iterator[None]:
        with nullcontext() if self._off else self._book.paused():
            yield

    # What is said about it ------------------------------------------------------------------------------------------

    def _watching(self, old: Any) -> Any:
        @wraps(old)
        def log(name: str, *args: Any, **kwargs: Any) -> None:
            if self._run.trainer.training and not name.startswith(f"guard/{self.name}/"):
                self._logged[name] = None
                if self.withhold_metrics:
                    return
            old(name, *args, **kwargs)

        return log

    def _report(self, step: Step, deal: Deal) -> None:
        trainer, plan = step.run.trainer, self.plan
        assert plan is not None
        if self.target_quantile is not None:
            self.report(step.module, max_grad_norm=self._bound())
        if self._steps == 0 and deal.first and self._logged and not self.withhold_metrics:
            rank_zero_info(f"{self.name}: not covered: {next(self._uncovered())}")  # the header came too early for it
        done = self._steps + (step.module.automatic_optimization and deal.last)
        plateaus = [str(c.monitor) for c in trainer.lr_scheduler_configs if c.reduce_on_plateau]
        for monitor in plateaus:
            if {monitor, monitor.removesuffix("_epoch"), monitor.removesuffix("_step")} & self._logged.keys():
                raise GuardConflict(
                    f"{self.name}: ReduceLROnPlateau sets the learning rate by {monitor}, computed from training data "
                    "without noise, so the weights would depend on it; monitor a validation metric"
                )
        if trainer.is_last_batch or done >= plan.steps:
            self.report(step.module, epsilon=plan.epsilon(done))

    def header(self) -> str:
        """What is planned and what is not covered, as printed before training."""
        assert self.plan is not None
        lines = [self.plan.describe(), *(f"not covered: {leak}" for leak in self._uncovered())]
        if self.test_seed is not None:
            lines.append("NOT PRIVATE: test_seed makes draws and noise reproducible")
        return "\n".join([f"{self.name}:", *(f"  {line}" for line in "\n".join(lines).splitlines())])

    def _uncovered(self) -> Iterator[str]:
        """What leaves this run beside the weights."""
        names = [name for name in self._logged if not self.withhold_metrics]
        if names:
            yield f"{', '.join(names)}: logged by training_step from raw data; withhold_metrics=True leaves them out"
        for callback in callbacks_of(self._run.trainer):
            monitor = getattr(callback, "monitor", None)
            if monitor and not monitor.startswith("guard/"):
                yield f"{type(callback).__name__} acts on {monitor}, which is computed from data without noise"
        for name, layer in self._run.module.named_modules():
            if isinstance(getattr(layer, "weight", None), Tensor) and isinstance(layer, nn.modules.loss._Loss):
                yield f"{name}.weight, class weights: public if they do not come from the counts of private rows"
        yield "validation and test data, and the weights that training starts from"
        if not self._run.module.automatic_optimization:
            yield "whether examples are independent: a step cannot be probed under manual optimisation"
        if self._dropped:
            yield f"that {self._dropped} gradients were not finite and were left out"

    def notes(self) -> list[str]:
        if self._off or self.plan is None:
            return []
        spent = self.plan.epsilon(self._steps)
        notes = [f"{self._steps} noisy steps spent epsilon = {spent:.3g} at delta = {self.delta:g}."]
        if self.test_seed is not None:
            notes.insert(0, "NOT PRIVATE: test_seed made draws and noise reproducible.")
        if self._found is not None:
            notes.append(
                f"A probe replaced one example after another: no other's gradient changed by more "
                f"than {self._found.coupling:.1g} of its norm, the clipped sum moved by {self._found.influence:.2g} "
                "times max_grad_norm (2 is allowed), and no step wrote a buffer. A probe refutes and does not prove."
            )
        return [*notes, *(f"Not covered by epsilon: {leak}." for leak in self._uncovered())]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._off:
            self._check_kept()

    def state(self) -> dict[str, Any]:
        if self.plan is None:
            return {} if self._restored is None else dict(self._restored)
        plan = replace(self.plan, steps=max(self._steps, 1)) if self._open else self.plan
        return {
            "plan": plan.to_dict(), "fingerprint": plan.fingerprint, "steps": self._steps,
            "max_grad_norm": self._norm if self._next is None else self._next,
            "private": self.test_seed is None,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        self._restored = state or None


_LIGHTNING = ("pytorch_lightning", "lightning")
_trained: "WeakKeyDictionary[pl.LightningModule, tuple[PrivacyPlan, int]]" = WeakKeyDictionary()  # and its steps


def _first_loader(hook: Callable[[Any, int], Any]) -> Callable[[Any], Any]:
    return lambda batch: hook(batch, 0)


def _checksum(x: Tensor) -> tuple[float, float]:
    wide = x.detach().double()
    return float(wide.sum()), float(wide.square().sum())


@contextmanager
def _refused(name: str) -> Iterator[None]:
    try:
        yield
    except GuardConflict:
        raise
    except ValueError as error:
        raise GuardConflict(f"{name}: {error}") from error
