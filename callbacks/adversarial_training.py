"""Adversarial training as a guard."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from lightning_guard.ascent import PASS, VALIDATION, Ascent, Ground, Method, Objective, explained, outside
from lightning_guard.functional import ThreatModel, stream
from lightning_guard.functional.replays import ascended, carried, replayed
from lightning_guard.functional.robust_losses import Divergence, divergence, hits, mart_terms
from lightning_guard.functional.weight_perturbation import Elsewhere, buffers_kept, worst_weights
from lightning_guard.guard import Batch, Guard, GuardConflict, Phase, Run, Step, Trait
from lightning_guard.watch import Watch

Edge = float | Sequence[float]
_EVERY = 256  # steps between two assertions that the batch lies inside the threat model


class AdversarialTraining(Guard):
    r"""Trains on the worst input within reach of an attacker instead of the input itself (Madry et al., 2018).

    .. math:: \min_\theta \; \mathbb{E} \max_{\|\delta\| \le \epsilon} \ell(f_\theta(x + \delta), y)

    ``method`` says how the inner maximum is sought, ``objective`` what is minimised there:

    | ``objective``   | trains on | loss                                                                              |
    |-----------------|-----------|-----------------------------------------------------------------------------------|
    | ``adversarial`` | attacked  | yours                                                                             |
    | ``mixed``       | attacked  | yours, and the example losses of clean inputs, with weight ``clean_weight``       |
    | ``mart``        | attacked  | yours, the margin, and ``beta`` times KL weighted by ``1 - p_y(x)``               |
    | ``trades``      | clean     | yours, and ``beta`` times KL to predictions for attacked inputs, which it climbs  |

    Attacks climb by input gradients only: no ``.grad`` is touched, so gradient accumulation stays exact, and BatchNorm,
    Dropout, metrics and logs see the training passes alone. The last three objectives make one more training pass, in
    train mode: BatchNorm sees clean and attacked inputs as two batches, dropout draws numbers of its own, nothing is
    logged.

    Logs ``guard/adversarial_training/attack_loss``, the mean of what the attack climbed where it took its last
    gradient, in nats; with ``validate`` also ``robust_accuracy``, for ModelCheckpoint and EarlyStopping; and with a
    single-step method ``single_step_accuracy``, ``pgd_accuracy`` and ``collapsed`` at the end of each epoch.

    Args:
        eps: radius of the attack in input units before normalisation; 0 switches the guard off.
        norm: ``linf``, ``l2`` or ``l1``.
        method: ``pgd`` climbs for ``steps``. Single steps: ``fgsm``, and ``n_fgsm`` from stronger noise without
            projection, whose points lie within 3 ``eps``. ``free`` repeats each batch ``steps`` times and climbs by the
            gradients of training itself, so an epoch counts ``steps`` times as many batches and no pass is added.
        steps: gradient steps of ``pgd``, each about two thirds of a training step; replays of ``free``; gradient steps
            after a collapse of ``fgsm`` and ``n_fgsm``, at least 2.
        step_size: length of a step in input units; None is ``min(2.5 / steps, 1.25) * eps``, and ``eps`` for ``free``
            and ``n_fgsm``.
        random_start: begin at a random point of the threat model.
        bounds: lowest and highest valid input before normalisation, e.g. ``[0, 1]`` for images.
        mean: subtracted from inputs before the network, one number or one a channel.
        std: divided by before the network, one number or one a channel.
        mutable: indices along dimension 1 that the attacker may change; None is all.
        warmup: time over which the radius grows from 0 to ``eps``, as a fraction of training (float) or in optimizer
            steps (int). A network that cannot yet tell classes apart may never learn under the full attack.
        seed: of the random starts; None takes the seed of the run.
        batch: how a batch is read, if the defaults do not fit.
        objective: see above.
        beta: weight of the second term of ``trades`` and ``mart``.
        clean_weight: share of clean inputs in the loss of ``mixed``, between 0 and 1.
        divergence: of ``trades``: ``kl``, or ``squared`` differences of the outputs, for regression.
        targeted: attack towards a random other class of each example; several classes only.
        restarts: attacks of ``pgd`` from as many random starts, of which the worst counts.
        awp: relative size of the adversarial perturbation of the weights during a step (Wu et al., 2020); each weight
            tensor of two or more dimensions stands ``awp`` of its length up the gradient while the step is taken, and
            is put back bit for bit after the backward pass. 0.005 is usual with ``trades``, 0.01 else.
        collapse: what to do when a single-step method stops to protect (catastrophic overfitting): accuracy under
            PGD-10 falls more than 0.2 below its best on training examples and accuracy under the single step does not.
            ``fall_back`` puts the weights of the last good epoch back, empties the optimizer's memory of later ones and
            goes on with ``pgd``; ``stop`` puts them back and ends training; ``ignore`` does not look.
        validate: examples of each validation epoch, a process, on which ``robust_accuracy`` is measured by PGD.
        validate_steps: gradient steps of that measurement.
        embedding: submodule whose output is attacked instead of the inputs, e.g. of a token model; ``eps`` is then in
            units of the embedding, and padding (``padding_idx``) is left alone.
        per: what has a radius of its own: the ``example``, or each ``position`` of embeddings.
        immutable: indices along dimension 1 that the attacker may not change.
        unit: what 1 of ``eps`` is worth in input units, one number or one an index of dimension 1.
        one_hot: groups of columns that hold one category each.
        switches: how many groups the attacker may switch to another category.
        integer: columns that stay whole before normalisation.
        increasing: columns that may only grow.
        decreasing: columns that may only fall.

    | case                                     | result                                               |
    |------------------------------------------|------------------------------------------------------|
    | ``eps=0``                                | training is bit-identical to training without the guard |
    | inputs outside ``bounds``                | refused on the first batch, with their range         |
    | inputs that are not floating point       | refused on the first batch, without ``embedding``    |
    | training ends within ``warmup``          | refused if it can be known, else a warning at the end |
    | ``training_step`` returns None           | the batch is skipped, as without the guard           |
    | an error or Ctrl-C within a step of ``awp`` | the weights are put back, in checkpoints too      |

    Raises:
        GuardConflict: before training or on its first batch, if the promise cannot be kept.

    Reference:
        Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018, arXiv:1706.06083.
        Single step: Wong, Rice and Kolter, Fast is better than free, ICLR 2020, arXiv:2001.03994; de Jorge et al., Make
        Some Noise, NeurIPS 2022, arXiv:2202.01181. Free: Shafahi et al., NeurIPS 2019, arXiv:1904.12843. TRADES: Zhang
        et al., ICML 2019, arXiv:1901.08573. MART: Wang et al., ICLR 2020. AWP: Wu et al., NeurIPS 2020,
        arXiv:2004.05884. Embeddings: Miyato, Dai and Goodfellow, ICLR 2017, arXiv:1605.07725.

    Example:
        >>> import pytorch_lightning as pl
        >>> trainer = pl.Trainer(callbacks=[AdversarialTraining(eps=8 / 255, bounds=(0.0, 1.0))], logger=False)
    """

    name: ClassVar[str] = "adversarial_training"
    phase: ClassVar[Phase] = Phase.BATCH
    traits: frozenset[Trait] | None = frozenset()

    def __init__(
        self,
        eps: float,
        norm: Literal["linf", "l2", "l1"] = "linf",
        method: Method = "pgd",
        steps: int = 7,
        step_size: float | None = None,
        random_start: bool = True,
        bounds: tuple[Edge, Edge] | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        mutable: Sequence[int] | None = None,
        warmup: int | float = 0,
        seed: int | None = None,
        batch: Batch | None = None,
        objective: Objective = "adversarial",
        beta: float = 6.0,
        clean_weight: float = 0.5,
        divergence: Divergence = "kl",
        targeted: bool = False,
        restarts: int = 1,
        awp: float = 0.0,
        collapse: Literal["fall_back", "stop", "ignore"] = "fall_back",
        validate: int = 0,
        validate_steps: int = 10,
        embedding: str | None = None,
        per: Literal["example", "position"] = "example",
        immutable: Sequence[int] | None = None,
        unit: float | Sequence[float] | None = None,
        one_hot: Sequence[Sequence[int]] | None = None,
        switches: int = 1,
        integer: Sequence[int] | None = None,
        increasing: Sequence[int] | None = None,
        decreasing: Sequence[int] | None = None,
    ):
        self.threat = ThreatModel(
            eps, norm, bounds, mean, std, mutable, immutable, unit, per, one_hot, switches, integer, increasing,
            decreasing,
        )  # fmt: skip
        self.warmup, self.method, self.steps, self.step_size = warmup, method, steps, step_size
        self.random_start, self.seed, self.batch = random_start, seed, batch
        self.objective, self.beta, self.clean_weight, self.divergence = objective, beta, clean_weight, divergence
        self.targeted, self.restarts, self.awp, self.collapse = targeted, restarts, awp, collapse
        self.validate, self.validate_steps, self.embedding = validate, validate_steps, embedding
        self._restored: Mapping[str, Any] | None = None
        self._start({})
        wrong = next(self._wrong_options(), None)
        if wrong is not None:
            raise ValueError(wrong)
        self.needs_logits = objective in ("trades", "mart") and not self.off

    def _start(self, state: Mapping[str, Any]) -> None:
        self._seed = state.get("seed", self.seed or 0)
        self._warmup: int | None = None
        self._reached = float(state.get("reached", 0.0))  # fraction of eps that the attack last used
        self._checked = False
        self._delta: Tensor | None = state.get("delta")  # what free training carries from batch to batch
        self._leaf: tuple[Tensor, Tensor, Ascent] | None = None
        self._away = Elsewhere()
        self._watch = Watch(self.method, self.collapse, self._steps, self._seed)
        self._validated = 0

    def _wrong_options(self) -> Iterator[str]:
        yield from self._ascent.problems()
        if self.steps < 1:
            yield f"steps={self.steps} makes no attack; give at least 1, or switch the guard off with eps=0"
        if self.collapse not in ("fall_back", "stop", "ignore"):
            yield f"collapse={self.collapse!r} is not known; give 'fall_back', 'stop' or 'ignore'"
        if self.warmup < 0 or (isinstance(self.warmup, float) and self.warmup > 1):
            yield f"warmup={self.warmup} is no time; give a fraction in [0.0, 1.0] or a number of steps"
        if not self.beta > 0:
            yield f"beta={self.beta} leaves its term out; give a positive weight, or objective='adversarial'"
        if not 0 < self.clean_weight < 1:
            yield f"clean_weight={self.clean_weight} mixes nothing; give a share between 0 and 1"
        if not self.awp >= 0:
            yield f"awp={self.awp} moves down the gradient; give at least 0"
        if self.validate < 0 or self.validate_steps < 1:
            yield (
                f"validate={self.validate} with validate_steps={self.validate_steps} measures nothing; give at least 0 "
                "examples and 1 step"
            )
        if self.method == "free" and (self.objective != "adversarial" or self.awp or self.targeted):
            yield (
                "method='free' climbs the training loss itself, so it has no objective of its own, no awp and no "
                "targets; use 'pgd' or 'fgsm' with them"
            )

    @property
    def off(self) -> bool:
        return self.threat.eps == 0 and not (self.threat.one_hot and self.threat.switches)

    @property
    def _steps(self) -> int:
        """Gradient steps of PGD; a fall back from replays, which go on, takes as few as protect."""
        return self.steps if self.method == "pgd" else 2 if self.method == "free" else max(2, self.steps)

    @property
    def _ascent(self) -> Ascent:
        """How points are found with the whole radius."""
        return Ascent(
            self.threat, "pgd" if self._watch.fallen else self.method, self._steps, self.step_size, self.random_start,
            self.restarts, self.objective, self.divergence, self.targeted, self.embedding, self._seed,
        )  # fmt: skip

    def overrides(self, transform: str) -> bool:
        if getattr(type(self), transform) is not getattr(AdversarialTraining, transform):
            return super().overrides(transform)  # a subclass's own
        shifts = self.embedding is not None and self.objective != "trades"
        needed = {
            "on_loader": self.method == "free",
            "during": self.awp > 0 or shifts,
            "on_loss": self.objective != "adversarial",
            "on_gradients": self.awp > 0 or self.method == "free",
            "on_checkpoint": self.awp > 0,
        }
        return super().overrides(transform) and not self.off and needed.get(transform, True)

    def options(self) -> dict[str, Any]:
        return {**asdict(self.threat), **super().options()}

    def problems(self, run: Run) -> Iterable[str]:
        if self.off:
            return
        trainer, eps = run.trainer, self.threat.eps
        if isinstance(self.warmup, float) and self.warmup and run.endless:
            yield (
                f"warmup={self.warmup} is a fraction of a training without end; "
                "set max_epochs or max_steps on the Trainer, or give optimizer steps"
            )
        if isinstance(self.warmup, int) and 0 <= trainer.max_steps < self.warmup:
            yield (
                f"warmup={self.warmup} ends after the last optimizer step, max_steps={trainer.max_steps}, so "
                f"eps={eps} is never reached; train longer or give a shorter warmup"
            )
        if trainer.precision in ("16-mixed", "16-true") and self.threat.norm == "l2":
            yield (
                "norm='l2' squares input gradients, which underflow at precision='16-mixed'; "
                "use 'bf16-mixed' or norm='linf'"
            )
        more = {"method='free'": self.method == "free", "awp": self.awp > 0, "embedding": self.embedding is not None}
        if not run.module.automatic_optimization and any(more.values()):
            yield (
                f"{', '.join(name for name in more if more[name])} need to know where a step begins and ends, and this "
                "module optimises manually; set automatic_optimization=True or leave them out"
            )
        few = isinstance(trainer.limit_train_batches, int) and trainer.limit_train_batches == 1  # 1.0 is all
        if self.method == "free" and few and self.steps > 1:
            yield (
                f"method='free' climbs from replay to replay, and limit_train_batches=1 leaves one of {self.steps}; "
                "allow more batches, or use method='pgd'"
            )
        if self.collapse == "stop" and self._watch.looking and ((trainer.min_epochs or 0) > 1 or trainer.min_steps):
            yield (
                f"collapse='stop' may end training before min_epochs={trainer.min_epochs} and "
                f"min_steps={trainer.min_steps}, which Lightning would not allow; leave them out"
            )

    def begin(self, run: Run) -> None:
        own = torch.initial_seed() if self.seed is None else self.seed
        state, self._restored = {"seed": own, **(self._restored or {})}, None
        self._start(state)
        self._watch.restore(state, run.module)
        run.undo.callback(self._away.back)
        if self.embedding is not None and not self.off:
            try:
                run.module.get_submodule(self.embedding)
            except AttributeError:
                raise GuardConflict(
                    f"{self.name}: embedding={self.embedding!r} names no submodule of {type(run.module).__name__}; it "
                    f"has {', '.join(name for name, _ in run.module.named_modules() if name)}"
                ) from None

    # The inner maximum --------------------------------------------------------------------------------------------

    def on_loader(self, loader: Any) -> Any:
        if self.off or self.method != "free":
            return loader
        with explained(f"{self.name}: method='free'"):
            return replayed(loader, self.steps)

    def on_batch(self, step: Step) -> Any:
        if self.off:
            return step.batch
        self._away.back()  # the last step may have ended without a backward pass
        self._reached = self._reach(step.run)
        ascent, y = self._ascent.reaching(self._reached), step.target
        if not self._checked and self.embedding is None:
            with explained(self.name):
                ascent.check(step.inputs)
        if ascent.method == "free":
            at, moved = self._carried(step, ascent)
        else:
            with step.probe():
                at = ascent.ground(step, step.inputs)
                generator = stream(self._seed, step.index, step.run.rank, device=at.x.device)
                moved, height = ascent.attack(at, y, generator)
            self.report(step.module, attack_loss=height)
        if not self._checked and self._watch.looking:
            with step.probe(), torch.no_grad(), explained("collapse='ignore' is needed"):
                hits(at.logits(), y)  # refused now rather than at the end of the epoch
        if not self._checked or step.index % _EVERY == 0:
            ascent.assert_inside(at, moved.detach())
        self._checked = True
        if not step.rehearsal:
            self._watch.remember(step.inputs, y)
        if self.overrides("during") or self.overrides("on_loss"):
            vars(step)[self.name] = at, moved
        if self.objective == "trades":
            return step.batch
        step.clean = step.inputs
        return step.batch if at.layer is not None else step.with_inputs(moved)

    def _carried(self, step: Step, ascent: Ascent) -> tuple[Ground, Tensor]:
        """Where the batch before left off, to be moved by the gradient of this very step."""
        at = ascent.ground(step, step.inputs)
        moved = ascent.threat.project(at.x + carried(self._delta, at.x), at.x)
        if not step.rehearsal:
            moved = moved.detach().requires_grad_()
            self._leaf = moved, at.x, ascent
        return at, moved

    def _reach(self, run: Run) -> float:
        """The fraction of ``eps`` that the attack may use by now."""
        if not self.warmup:
            return 1.0
        if self._warmup is None:
            self._warmup = round(self.warmup * run.total_steps) if isinstance(self.warmup, float) else self.warmup
        return min(1.0, (run.trainer.global_step + 1) / max(self._warmup, 1))

    def settled(self, run: Run) -> bool:
        return self._reach(run) == 1

    # The outer minimum --------------------------------------------------------------------------------------------

    @contextmanager
    def during(self, step: Step) -> Iterator[None]:
        made = vars(step).get(self.name)
        if made is None:
            yield
            return
        at, moved = made
        if self.awp and not step.rehearsal:
            self._move_weights(step, at, moved)
        with ExitStack() as undo:
            undo.callback(self._put_back_unless_trained, step)
            if not self.overrides("on_loss"):
                undo.callback(vars(step).pop, self.name, None)  # it holds the step, a cycle
            if self.objective != "trades":
                undo.enter_context(at.at(moved))
            yield

    def _put_back_unless_trained(self, step: Step) -> None:
        output = step.output
        if (output.get("loss") if isinstance(output, Mapping) else output) is None:  # skipped, or failed
            self._away.back()

    def on_loss(self, step: Step) -> Tensor:
        assert step.loss is not None
        made = vars(step).pop(self.name, None)
        if made is None or self.objective == "adversarial":
            return step.loss
        (at, moved), y = made, step.target
        with self._beside(step):
            other = at.logits(moved if self.objective == "trades" else None)
        if self.objective == "trades":
            return step.loss + self.beta * divergence(step.logits, other, y, self.divergence).mean()
        if self.objective == "mixed":
            if isinstance(y, Tensor) and y.dim() > 1 and y[0].numel() > 1:
                raise GuardConflict(
                    f"{self.name}: objective='mixed' weighs your loss against the sum over {y[0].numel()} targets an "
                    "example, and yours may be their mean; use objective='adversarial'"
                )
            return (1 - self.clean_weight) * step.loss + self.clean_weight * step.losses(other, y).mean()
        with explained("objective='mart'"):
            margin, apart = mart_terms(other, step.logits, y)
        return step.loss + margin.mean() + self.beta * apart.mean()

    def _beside(self, step: Step) -> AbstractContextManager[None]:
        return step.training_pass(stream(self._seed, step.index, step.run.rank, PASS).initial_seed())

    def _move_weights(self, step: Step, at: Ground, moved: Tensor) -> None:
        """Put the weights where the loss is worse (Wu et al., 2020), until the backward pass is done."""
        weights = [weight for weight in step.module.parameters() if weight.requires_grad and weight.dim() > 1]
        if not weights:
            raise GuardConflict(f"{self.name}: awp={self.awp} finds no trained weights of two dimensions; set awp=0")
        with self._beside(step), buffers_kept(step.module), torch.enable_grad():
            logits, y = at.logits(moved), step.target
            if self.objective == "trades":
                clean = at.logits()
                loss = (step.losses(clean, y) + self.beta * divergence(clean, logits, y, self.divergence)).sum()
            else:
                loss = step.losses(logits, y).sum()
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        strategy = step.run.trainer.strategy  # all processes move alike
        agreed = [g if g is None else strategy.reduce(g, reduce_op="mean") for g in gradients]
        self._away.move(weights, worst_weights(weights, agreed, self.awp))

    def on_gradients(self, module: pl.LightningModule) -> None:
        self._away.back()
        leaf, self._leaf = self._leaf, None
        if leaf is not None:
            moved, x, ascent = leaf
            if moved.grad is None:
                raise GuardConflict(
                    f"{self.name}: method='free' climbs by what the backward pass gives the inputs, and it gave them "
                    "nothing: training_step detaches or converts them; use method='pgd'"
                )
            self._delta = ascended(moved.detach(), x, moved.grad, ascent.threat, ascent.step_size)

    def on_checkpoint(self, weights: dict[str, Tensor]) -> None:
        self._away.originals(weights)

    # What single steps do not see, and what validation measures -------------------------------------------------

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._delta = None
        self._watch.epoch_begins()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        ascent = self._ascent.reaching(self._reached)
        self.report(pl_module, **self._watch.epoch_ends(trainer, pl_module, ascent, self._reached == 1))

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validated = 0

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        room = self.validate - self._validated
        if self.off or trainer.sanity_checking or dataloader_idx or room <= 0:
            return
        step = outside(trainer, pl_module, batch)
        x, y = step.inputs[:room], step.target[:room]
        generator = stream(self._seed, batch_idx, trainer.global_rank, VALIDATION, device=pl_module.device)
        pgd = Ascent(self.threat, steps=self.validate_steps, embedding=self.embedding)
        right = pgd.withstood(step, x, y, generator)
        self._validated += len(right)
        key = f"guard/{self.name}/robust_accuracy"  # Lightning weighs by batch_size, over batches and processes
        pl_module.log(key, right.mean(), on_epoch=True, batch_size=len(right), sync_dist=True, add_dataloader_idx=False)

    # What is said about it ------------------------------------------------------------------------------------------

    def release(self, module: pl.LightningModule) -> None:
        if 0 < self._reached < 1:
            rank_zero_warn(
                f"{self.name}: training ended within warmup={self.warmup}: the radius reached "
                f"{self._reached * self.threat.eps:.4g}, not eps={self.threat.eps}. Train longer, or shorten warmup."
            )

    def notes(self) -> list[str]:
        fallen = self._watch.fallen
        return [fallen[0].upper() + fallen[1:] + "."] if fallen else []

    def state(self) -> dict[str, Any]:
        carried_on = {} if self._delta is None else {"delta": self._delta}
        reached = {"reached": self._reached} if self._watch.looking and self._reached else {}
        return {"seed": self._seed, **carried_on, **reached, **self._watch.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._restored = state
