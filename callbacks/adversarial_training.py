"""Adversarial training as a guard."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from lightning_guard.functional import ThreatModel, pgd, stream
from lightning_guard.guard import Batch, Guard, GuardConflict, Phase, Run, Step, Trait


class AdversarialTraining(Guard):
    r"""Trains on the worst input within reach of an attacker instead of the input itself (Madry et al., 2018).

    .. math:: \min_\theta \; \mathbb{E} \max_{\|\delta\| \le \epsilon} \ell(f_\theta(x + \delta), y)

    The inner maximum is found by projected gradient ascent. It climbs the loss of each example by input gradients
    only: no ``.grad`` is touched, so gradient accumulation stays exact, and BatchNorm, Dropout, metrics and logs see
    the training pass alone. Your ``training_step`` receives the attacked batch and is not changed.

    Logs ``guard/adversarial_training/attack_loss``, the mean cross-entropy where the attack took its last gradient,
    in nats.

    Args:
        eps: radius of the attack in input units before normalisation; 0 switches the guard off.
        norm: ``linf`` or ``l2``.
        method: ``pgd`` climbs for ``steps``; ``fgsm`` is a single step.
        steps: gradient steps of ``pgd``; each costs about two thirds of a training step.
        step_size: length of a step in input units; None is ``min(2.5 / steps, 1.25) * eps``.
        random_start: begin at a random point of the threat model.
        bounds: lowest and highest valid input before normalisation, e.g. ``[0, 1]`` for images.
        mean: subtracted from inputs before the network, one number or one a channel.
        std: divided by before the network, one number or one a channel.
        mutable: indices along dimension 1 that the attacker may change; None is all.
        warmup: time over which the radius grows from 0 to ``eps``, as a fraction of training (float) or in optimizer
            steps (int). A network that cannot yet tell classes apart may never learn under the full attack.
        seed: of the random starts; None takes the seed of the run.
        batch: how a batch is read, if the defaults do not fit.

    | case                                     | result                                               |
    |------------------------------------------|------------------------------------------------------|
    | ``eps=0``                                | training is bit-identical to training without the guard |
    | inputs outside ``bounds``                | refused on the first batch, with their range         |
    | inputs that are not floating point       | refused on the first batch                           |
    | training ends within ``warmup``          | refused if it can be known, else a warning at the end |
    | ``training_step`` returns None           | the batch is skipped, as without the guard           |

    Raises:
        GuardConflict: before training or on its first batch, if the promise cannot be kept.

    Reference:
        Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018, arXiv:1706.06083.
        Single step: Wong, Rice and Kolter, Fast is better than free, ICLR 2020, arXiv:2001.03994.

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
        norm: Literal["linf", "l2"] = "linf",
        method: Literal["pgd", "fgsm"] = "pgd",
        steps: int = 7,
        step_size: float | None = None,
        random_start: bool = True,
        bounds: tuple[float, float] | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        mutable: Sequence[int] | None = None,
        warmup: int | float = 0,
        seed: int | None = None,
        batch: Batch | None = None,
    ):
        self.threat = ThreatModel(eps, norm, bounds, mean, std, mutable)
        if method not in ("pgd", "fgsm"):
            raise ValueError(f"method={method!r} is not known; give 'pgd' or 'fgsm'")
        if steps < 1:
            raise ValueError(f"steps={steps} makes no attack; give at least 1, or switch the guard off with eps=0")
        if step_size is not None and not step_size > 0:
            raise ValueError(f"step_size={step_size} never moves; give a positive length in input units, or None")
        if warmup < 0 or (isinstance(warmup, float) and warmup > 1):
            raise ValueError(f"warmup={warmup} is no time; give a fraction in [0.0, 1.0] or a number of steps")
        self.warmup = warmup
        self.method, self.steps, self.step_size = method, 1 if method == "fgsm" else steps, step_size
        self.random_start, self.seed, self.batch = random_start, seed, batch
        self._seed = 0
        self._restored: int | None = None
        self._warmup: int | None = None
        self._reached = 0.0  # fraction of eps that the attack last used
        self._checked = False

    def options(self) -> dict[str, Any]:
        return {**asdict(self.threat), **super().options()}

    def problems(self, run: Run) -> Iterable[str]:
        if self.threat.eps and isinstance(self.warmup, float) and self.warmup and run.endless:
            yield (
                f"warmup={self.warmup} is a fraction of a training without end; "
                "set max_epochs or max_steps on the Trainer, or give optimizer steps"
            )
        if self.threat.eps and isinstance(self.warmup, int) and 0 <= run.trainer.max_steps < self.warmup:
            yield (
                f"warmup={self.warmup} ends after the last optimizer step, max_steps={run.trainer.max_steps}, so "
                f"eps={self.threat.eps} is never reached; train longer or give a shorter warmup"
            )
        if self.threat.eps and run.trainer.precision in ("16-mixed", "16-true") and self.threat.norm == "l2":
            yield (
                "norm='l2' squares input gradients, which underflow at precision='16-mixed'; "
                "use 'bf16-mixed' or norm='linf'"
            )

    def begin(self, run: Run) -> None:
        own = torch.initial_seed() if self.seed is None else self.seed
        self._seed, self._restored = own if self._restored is None else self._restored, None
        self._warmup, self._reached, self._checked = None, 0.0, False

    def on_batch(self, step: Step) -> Any:
        if self.threat.eps == 0:
            return step.batch
        x, y = step.inputs, step.target
        if not self._checked:
            self._check(x)
            self._checked = True
        generator = stream(self._seed, step.index, step.run.rank, device=x.device)
        self._reached = reach = self._reach(step.run)
        threat = self.threat if reach == 1 else replace(self.threat, eps=reach * self.threat.eps)
        step_size = None if self.step_size is None else reach * self.step_size
        losses = x.new_zeros(1)

        def loss(moved: Tensor) -> Tensor:
            nonlocal losses
            losses = step.losses(step.forward(moved), y)
            return losses

        with step.probe():
            attacked = pgd(loss, x, threat, self.steps, step_size, self.random_start, generator)
        self.report(step.module, attack_loss=losses.detach().mean())
        return step.with_inputs(attacked)

    def _reach(self, run: Run) -> float:
        """The fraction of ``eps`` that the attack may use by now."""
        if not self.warmup:
            return 1.0
        if self._warmup is None:
            self._warmup = round(self.warmup * run.total_steps) if isinstance(self.warmup, float) else self.warmup
        return min(1.0, (run.trainer.global_step + 1) / max(self._warmup, 1))

    def release(self, module: pl.LightningModule) -> None:
        if 0 < self._reached < 1:
            rank_zero_warn(
                f"{self.name}: training ended within warmup={self.warmup}: the radius reached "
                f"{self._reached * self.threat.eps:.4g}, not eps={self.threat.eps}. Train longer, or shorten warmup."
            )

    def state(self) -> dict[str, Any]:
        return {"seed": self._seed}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._restored = state["seed"]

    def _check(self, x: Any) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = f"{x.dtype} tensor" if isinstance(x, Tensor) else type(x).__name__
            raise GuardConflict(
                f"{self.name}: the inputs are a {kind}, and an attack by gradients needs a floating-point tensor; "
                "say where it is with Batch(inputs=...)"
            )
        try:
            self.threat.scale(x)
            self.threat.check(x)
        except ValueError as error:
            raise GuardConflict(f"{self.name}: {error}") from None
