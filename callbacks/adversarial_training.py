"""Adversarial training as a guard."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Any, ClassVar, Literal, get_args

import pytorch_lightning as pl
import torch
import torchmetrics
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_guard.ascent import Ground, away, explained, towards, up
from lightning_guard.checks import read_as
from lightning_guard.functional import ThreatModel, pgd, stream
from lightning_guard.functional.attacks.pgd import n_fgsm, n_fgsm_threat
from lightning_guard.functional.collapse import Collapse
from lightning_guard.functional.replays import ascended, carried, replayed
from lightning_guard.functional.robust_losses import Divergence, divergence, hits, mart_terms
from lightning_guard.functional.weight_perturbation import Elsewhere, buffers_kept, worst_weights
from lightning_guard.guard import Batch, Guard, GuardConflict, Phase, Run, Step, Trait, guards_of
from lightning_guard.pipeline import current
from lightning_guard.still import still

Edge = float | Sequence[float]
Method = Literal["pgd", "fgsm", "n_fgsm", "free"]
Objective = Literal["adversarial", "trades", "mart", "mixed"]
_EVERY = 256  # steps between two assertions that the batch lies inside the threat model
_WATCHED = 128  # training examples, a process, on which single steps are compared with PGD after each epoch
# Places of the streams of random numbers, beside the step and the rank.
_TARGETS, _PASS, _WATCH, _VALIDATION = range(1, 5)


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
        wrong = next(self._wrong_options(), None)
        if wrong is not None:
            raise ValueError(wrong)
        self.needs_logits = objective in ("trades", "mart") and not self._off  # type: ignore[misc]
        self._seed = 0
        self._restored: Mapping[str, Any] | None = None
        self._warmup: int | None = None
        self._reached = 0.0  # fraction of eps that the attack last used
        self._checked = False
        self._delta: Tensor | None = None  # what free training carries from batch to batch
        self._leaf: tuple[Tensor, Tensor, ThreatModel, float | None] | None = None
        self._away = Elsewhere()
        self._rule = Collapse()
        self._fallen = ""  # what happened, if single steps have stopped to protect
        self._good: dict[str, Tensor] = {}  # the weights when single steps were last seen to protect
        self._examples: list[tuple[Tensor, Tensor]] = []  # of this epoch, to look at when it ends
        self._validated = 0

    def _wrong_options(self) -> Iterator[str]:
        for option, kinds in (("method", Method), ("objective", Objective), ("divergence", Divergence)):
            if getattr(self, option) not in get_args(kinds):
                known = ", ".join(map(repr, get_args(kinds)))
                yield f"{option}={getattr(self, option)!r} is not known; give one of {known}"
        if self.collapse not in ("fall_back", "stop", "ignore"):
            yield f"collapse={self.collapse!r} is not known; give 'fall_back', 'stop' or 'ignore'"
        if self.steps < 1:
            yield f"steps={self.steps} makes no attack; give at least 1, or switch the guard off with eps=0"
        if self.step_size is not None and not self.step_size > 0:
            yield f"step_size={self.step_size} never moves; give a positive length in input units, or None"
        if self.warmup < 0 or (isinstance(self.warmup, float) and self.warmup > 1):
            yield f"warmup={self.warmup} is no time; give a fraction in [0.0, 1.0] or a number of steps"
        if not self.beta > 0:
            yield f"beta={self.beta} leaves its term out; give a positive weight, or objective='adversarial'"
        if not 0 < self.clean_weight < 1:
            yield f"clean_weight={self.clean_weight} mixes nothing; give a share between 0 and 1"
        if self.restarts < 1:
            yield f"restarts={self.restarts} makes no attack; give at least 1"
        if not self.awp >= 0:
            yield f"awp={self.awp} moves down the gradient; give at least 0"
        if self.validate < 0 or self.validate_steps < 1:
            yield (
                f"validate={self.validate} with validate_steps={self.validate_steps} measures nothing; give at least 0 "
                "examples and 1 step"
            )
        if self.method == "n_fgsm":
            n_fgsm_threat(self.threat)
        if self.restarts > 1 and (self.method != "pgd" or not self.random_start):
            yield f"restarts={self.restarts} are random starts of method='pgd'; leave it at 1"
        if self.objective == "trades" and not (self.random_start and self.method != "free"):
            yield "objective='trades' needs a random start: at the clean input its attack has no gradient"
        if self.objective == "trades" and self.targeted:
            yield "targeted attacks head for a class, and that of objective='trades' knows none; set targeted=False"
        if self.method == "free" and (self.objective != "adversarial" or self.awp or self.targeted):
            yield (
                "method='free' climbs the training loss itself, so it has no objective of its own, no awp and no "
                "targets; use 'pgd' or 'fgsm' with them"
            )
        if self.threat.discrete and self.method in ("free", "n_fgsm"):
            yield f"method={self.method!r} moves continuously; for one_hot or integer columns use 'pgd'"
        plain = ThreatModel(self.threat.eps, self.threat.norm, per=self.threat.per)
        if self.embedding is not None and (self.threat != plain or self.method == "free"):
            yield (
                f"embedding={self.embedding!r} is attacked in a space of its own, where bounds, mean, std and columns "
                "mean nothing and nothing is replayed; leave them out, and take another method than 'free'"
            )

    @property
    def _off(self) -> bool:
        return self.threat.eps == 0 and not (self.threat.one_hot and self.threat.switches)

    @property
    def _single(self) -> bool:
        """Whether training rests on an attack that it may learn to fool."""
        return self.method != "pgd" and not self._fallen

    @property
    def _watching(self) -> bool:
        return self._single and self.collapse != "ignore"

    def options(self) -> dict[str, Any]:
        return {**asdict(self.threat), **super().options()}

    def problems(self, run: Run) -> Iterable[str]:
        if self._off:
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
        private = [guard.name for guard in run.guards if Trait.BOUNDS_EXAMPLES in (guard.traits or ())]
        more |= {f"objective={self.objective!r}": self.objective != "adversarial"}
        more |= {f"collapse={self.collapse!r}": self._watching}
        if private and any(more.values()):
            yield (
                f"{', '.join(name for name in more if more[name])} use training data beside the one pass that "
                f"{', '.join(private)} bounds; train with method='pgd' and objective='adversarial' on inputs, or with "
                "collapse='ignore'"
            )
        later = [guard.name for guard in run.guards if guard.overrides("on_weights")]
        if later and self._watching:
            yield (
                f"collapse={self.collapse!r} may put earlier weights back, without what {', '.join(later)} has done to "
                "them since; use method='pgd' or collapse='ignore'"
            )

    def begin(self, run: Run) -> None:
        own, state = torch.initial_seed() if self.seed is None else self.seed, self._restored or {}
        self._seed, self._restored = state.get("seed", own), None
        self._warmup, self._reached, self._checked = None, 0.0, False
        self._delta, self._leaf, self._away = state.get("delta"), None, Elsewhere()
        self._rule, self._fallen = Collapse(), state.get("fallen", "")
        self._rule.single, self._rule.strong = state.get("single", 0.0), state.get("strong", 0.0)
        self._examples, self._good = list(state.get("examples", ())), dict(state.get("good", {}))
        if "fallen" in state and self._single and not self._good:
            self._good = _weights(run.module)  # of an epoch that has just ended well
        run.undo.callback(self._away.back)
        if self.embedding is not None and not self._off:
            try:
                run.module.get_submodule(self.embedding)
            except AttributeError:
                raise GuardConflict(
                    f"{self.name}: embedding={self.embedding!r} names no submodule of {type(run.module).__name__}; it "
                    f"has {', '.join(name for name, _ in run.module.named_modules() if name)}"
                ) from None

    # The inner maximum --------------------------------------------------------------------------------------------

    def on_loader(self, loader: Any) -> Any:
        if self._off or self.method != "free":
            return loader
        try:
            return replayed(loader, self.steps)
        except ValueError as error:
            raise GuardConflict(f"{self.name}: method='free': {error}") from None

    def on_batch(self, step: Step) -> Any:
        if self._off:
            return step.batch
        self._away.back()  # the last step may have ended without a backward pass
        self._reached = self._reach(step.run)
        threat, step_size = self._reachable
        y = step.target
        if not self._checked and self.embedding is None:
            self._check(step.inputs)
        if self._single and self.method == "free":
            at = Ground.of(step, step.inputs, self.embedding)
            moved = threat.project(at.x + carried(self._delta, at.x), at.x)
            if not step.rehearsal:
                moved = moved.detach().requires_grad_()
                self._leaf = moved, at.x, threat, step_size
        else:
            method = "pgd" if self._fallen else self.method
            with step.probe():
                at = Ground.of(step, step.inputs, self.embedding)
                generator = stream(self._seed, step.index, step.run.rank, device=at.x.device)
                moved, height = self._attack(at, y, method, self._steps, threat, step_size, generator)
            self.report(step.module, attack_loss=height)
        if not self._checked and self._watching:
            with step.probe(), torch.no_grad(), explained("collapse='ignore' is needed"):
                hits(at.logits(), y)  # refused now rather than at the end of the epoch
        if not self._checked or step.index % _EVERY == 0:
            self._assert_inside(at, moved.detach(), threat, step_size)
        self._checked = True
        self._remember(step, y)
        vars(step)[self.name] = at, moved
        return step.batch if self.objective == "trades" or at.layer is not None else step.with_inputs(moved)

    @property
    def _steps(self) -> int:
        """Gradient steps of PGD; a fall back from replays, which go on, takes as few as protect."""
        return self.steps if self.method == "pgd" else 2 if self.method == "free" else max(2, self.steps)

    def _attack(
        self,
        at: Ground,
        y: Any,
        method: str,
        steps: int,
        threat: ThreatModel,
        step_size: float | None,
        generator: torch.Generator,
        plain: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Attacked inputs, and the mean of what was climbed; ``plain`` climbs example losses from a random start."""
        last = at.x.new_zeros(1)
        if self.objective == "trades" and not plain:
            climb = away(at, y, self.divergence)
        elif self.targeted and not plain:
            place = at.step.index, at.step.run.rank, _TARGETS
            climb = towards(at, y, stream(self._seed, *place, device=at.x.device))
        else:
            climb = up(at, y)

        def loss(moved: Tensor) -> Tensor:
            nonlocal last
            last = climb(moved)
            return last

        if method == "n_fgsm":
            moved = n_fgsm(loss, at.x, threat, step_size, generator=generator, free=at.free)
        else:
            steps, restarts = 1 if method in ("fgsm", "free") else steps, 1 if plain else self.restarts
            start = self.random_start or plain
            moved = pgd(loss, at.x, threat, steps, step_size, start, generator, restarts, at.free)
        return moved, last.detach().mean()

    @property
    def _reachable(self) -> tuple[ThreatModel, float | None]:
        """What the attack may do by now, and the length of its steps."""
        reach = self._reached
        threat = self.threat if reach == 1 else replace(self.threat, eps=reach * self.threat.eps)
        return threat, None if self.step_size is None else reach * self.step_size

    def _assert_inside(self, at: Ground, moved: Tensor, threat: ThreatModel, step_size: float | None) -> None:
        if self._single and self.method == "n_fgsm":  # by design beyond the radius, within the bounds
            threat = n_fgsm_threat(threat, step_size)
        inside = threat.contains(moved, at.x, max(1e-5, threat.rounding(at.x)), at.free)
        if not bool(inside.all()):
            raise RuntimeError(
                f"{self.name}: {int((~inside).sum())} of {len(inside)} attacked examples lie outside {threat}; this "
                "is a fault of Lightning Guard, please report it"
            )

    def _reach(self, run: Run) -> float:
        """The fraction of ``eps`` that the attack may use by now."""
        if not self.warmup:
            return 1.0
        if self._warmup is None:
            self._warmup = round(self.warmup * run.total_steps) if isinstance(self.warmup, float) else self.warmup
        return min(1.0, (run.trainer.global_step + 1) / max(self._warmup, 1))

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
        with self._pass(step):
            other = at.logits(moved if self.objective == "trades" else None)
        if self.objective == "trades":
            return step.loss + self.beta * divergence(step.logits, other, y, self.divergence).mean()
        if self.objective == "mixed":
            return (1 - self.clean_weight) * step.loss + self.clean_weight * step.losses(other, y).mean()
        with explained("objective='mart'"):
            margin, apart = mart_terms(other, step.logits, y)
        return step.loss + margin.mean() + self.beta * apart.mean()

    @contextmanager
    def _pass(self, step: Step) -> Iterator[None]:
        """For one more pass that is trained on: layers are in train mode, all else leaves no trace."""
        with ExitStack() as undo:
            undo.enter_context(still(step.module, step.run._metrics, training=True))
            for guard in step.run.guards:
                undo.enter_context(guard.paused())
            was, step.probing = step.probing, True
            undo.callback(setattr, step, "probing", was)
            torch.manual_seed(stream(self._seed, step.index, step.run.rank, _PASS).initial_seed())
            yield

    def _move_weights(self, step: Step, at: Ground, moved: Tensor) -> None:
        """Put the weights where the loss is worse (Wu et al., 2020), until the backward pass is done."""
        weights = [weight for weight in step.module.parameters() if weight.requires_grad and weight.dim() > 1]
        if not weights:
            raise GuardConflict(f"{self.name}: awp={self.awp} finds no trained weights of two dimensions; set awp=0")
        with self._pass(step), buffers_kept(step.module), torch.enable_grad():
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
            moved, x, threat, step_size = leaf
            if moved.grad is not None:
                self._delta = ascended(moved.detach(), x, moved.grad, threat, step_size)

    def on_checkpoint(self, weights: dict[str, Tensor]) -> None:
        self._away.originals(weights)

    # What single steps do not see ---------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._delta, self._examples = None, []

    def _remember(self, step: Step, y: Any) -> None:
        room = _WATCHED - sum(len(x) for x, _ in self._examples)
        if self._watching and room > 0 and not step.rehearsal:
            self._examples.append((step.inputs[:room].detach(), y[:room].detach()))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._examples:
            return
        found = torch.zeros(3, device=pl_module.device)
        threat, step_size = self._reachable
        for i, (x, y) in enumerate(self._examples):
            x, y = x.to(pl_module.device), y.to(pl_module.device)
            generator = stream(self._seed, trainer.global_step, trainer.global_rank, _WATCH, i, device=x.device)
            step = Step(_run(trainer, pl_module), (x, y))
            found[0] += self._robust(step, x, y, self.method, 1, threat, step_size, generator).sum()
            found[1] += self._robust(step, x, y, "pgd", 10, threat, None, generator, plain=True).sum()
            found[2] += len(x)
        self._examples = []
        found = trainer.strategy.reduce(found, reduce_op="sum")
        single, strong = (found[:2] / found[2]).tolist()
        fallen = self._rule.sees(single, strong, self._reached == 1)
        self.report(pl_module, single_step_accuracy=single, pgd_accuracy=strong, collapsed=float(fallen))
        if not fallen:
            self._good = _weights(pl_module)
            return
        then = "training ended there" if self.collapse == "stop" else f"training went on with PGD-{self._steps}"
        back = "the weights of the last good epoch were put back, and " if self._good else ""
        self._fallen = (
            f"training on {self.method} collapsed in epoch {trainer.current_epoch} (catastrophic overfitting): accuracy"
            f" on training examples was {single:.2f} under the single step, {strong:.2f} under PGD-10; {back}{then}"
        )
        rank_zero_warn(f"{self.name}: {self._fallen}")
        with torch.no_grad():
            for name, value in pl_module.state_dict().items():
                if name in self._good:
                    value.copy_(self._good[name])
        for optimizer in trainer.optimizers:
            optimizer.state.clear()  # moments that lead where the weights have come from
        self._good = {}
        trainer.should_stop = trainer.should_stop or self.collapse == "stop"

    def _robust(
        self,
        step: Step,
        x: Any,
        y: Tensor,
        method: str,
        steps: int,
        threat: ThreatModel,
        step_size: float | None,
        generator: torch.Generator,
        plain: bool = False,
    ) -> Tensor:
        """Which examples the model gets right under attack, as shares in [0, 1]."""
        step.index, precision = step.run.trainer.global_step, step.run.trainer.precision_plugin
        # Validation runs in inference mode, where nothing can be differentiated; what it made must be copied.
        with torch.inference_mode(False), torch.enable_grad(), precision.forward_context(), step.probe():
            x, y = x.clone(), y.clone()
            at = Ground.of(step, x, self.embedding)
            moved, _ = self._attack(at, y, method, steps, threat, step_size, generator, plain)
            with torch.no_grad(), explained("validate=0 and collapse='ignore' are needed"):
                return hits(at.logits(moved), y)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validated = 0

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        room = self.validate - self._validated
        if self._off or trainer.sanity_checking or dataloader_idx or room <= 0:
            return
        step = Step(_run(trainer, pl_module), batch)
        x, y = step.inputs[:room], step.target[:room]
        generator = stream(self._seed, batch_idx, trainer.global_rank, _VALIDATION, device=pl_module.device)
        right = self._robust(step, x, y, "pgd", self.validate_steps, self.threat, None, generator, plain=True)
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
        return [self._fallen[0].upper() + self._fallen[1:] + "."] if self._fallen else []

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"seed": self._seed}
        if self._delta is not None:
            state |= {"delta": self._delta}
        if self._good or self._fallen:
            state |= {"fallen": self._fallen, "single": self._rule.single, "strong": self._rule.strong}
        if self._examples:  # within an epoch: the weights are no longer those of its beginning
            state |= {"examples": [list(pair) for pair in self._examples], "good": self._good}
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        self._restored = state

    def _check(self, x: Any) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = f"{x.dtype} tensor" if isinstance(x, Tensor) else type(x).__name__
            raise GuardConflict(
                f"{self.name}: the inputs are a {kind}, and an attack by gradients needs a floating-point tensor; "
                "say where it is with Batch(inputs=...), or attack the output of a token embedding with embedding=..."
            )
        try:
            self.threat.scale(x)
            self.threat.check(x)
        except ValueError as error:
            raise GuardConflict(f"{self.name}: {error}") from None


def _run(trainer: pl.Trainer, module: pl.LightningModule) -> Run:
    """The run as seen from a hook of validation, which has no step."""
    run = Run(trainer, module, guards_of(trainer))
    run.batch = read_as(run)[0]
    if current(module) is None:
        run.guards = ()  # installed for training only, so none has to stand aside
    run._metrics = [part for part in module.modules() if isinstance(part, torchmetrics.Metric)]
    return run


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}
