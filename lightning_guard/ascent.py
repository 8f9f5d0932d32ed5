"""How a guard finds attacked points: what is climbed, where, and by which method."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch
import torchmetrics
from torch import Tensor, nn

from lightning_guard.checks import read_as
from lightning_guard.functional import ThreatModel, pgd, stream
from lightning_guard.functional.attacks.pgd import n_fgsm, n_fgsm_threat
from lightning_guard.functional.embeddings import embedded, shifted
from lightning_guard.functional.robust_losses import Divergence, divergence, hits
from lightning_guard.guard import GuardConflict, Run, Step, guards_of
from lightning_guard.pipeline import current

Method = Literal["pgd", "fgsm", "n_fgsm", "free"]
Objective = Literal["adversarial", "trades", "mart", "mixed"]
# Places of the streams of random numbers, beside the step and the rank.
TARGETS, PASS, WATCH, VALIDATION = range(1, 5)

Climb = Callable[[Tensor], Tensor]  # from moved inputs to what each example's attack climbs, (N,)


@dataclass
class Ground:
    """Where an attack moves: the inputs themselves, or what an embedding makes of them.

    The network is asked about moved inputs with the noise of this step on them, if a guard adds some.
    """

    step: Step
    given: Any  # to the network
    x: Tensor  # what moves
    free: Tensor | None = None  # where it may, None for everywhere
    layer: nn.Module | None = None

    @classmethod
    def of(cls, step: Step, given: Any, embedding: str | None) -> "Ground":
        """The ground of a step; a forward pass is made if it is an embedding's."""
        if embedding is None:
            return cls(step, given, given)
        layer = step.module.get_submodule(embedding)
        with explained(f"embedding={embedding!r}"):
            return cls(step, given, *embedded(layer, lambda: step.forward(_noisy(given, step))), layer)

    @contextmanager
    def at(self, moved: Tensor) -> Iterator[None]:
        """While this lasts the embedding, if there is one, puts out the moved point."""
        if self.layer is None:
            yield
        else:
            with shifted(self.layer, moved - self.x):
                yield

    def logits(self, moved: Tensor | None = None) -> Tensor:
        """Logits at a moved point; None is the clean one."""
        if moved is None:
            return self.step.forward(_noisy(self.given, self.step))
        with self.at(moved):
            return self.step.forward(_noisy(moved if self.layer is None else self.given, self.step))


def _noisy(x: Any, step: Step) -> Any:
    for guard in step.run.guards:
        x = guard.noisy(x, step)
    return x


def up(at: Ground, y: Any) -> Climb:
    """The loss of each example."""
    return lambda moved: at.step.losses(at.logits(moved), y)


def away(at: Ground, y: Any, kind: Divergence) -> Climb:
    """The divergence from the predictions for clean inputs, as TRADES climbs it."""
    with torch.no_grad():
        clean = at.logits()

    def climb(moved: Tensor) -> Tensor:
        with explained("objective='trades'"):
            return divergence(clean, at.logits(moved), y, kind)

    return climb


def towards(at: Ground, y: Any, generator: torch.Generator) -> Climb:
    """Down the loss of a random other class of each example."""
    if not isinstance(y, Tensor) or y.is_floating_point():
        raise GuardConflict("targeted=True needs whole numbers as targets; set targeted=False")
    turn = torch.rand(y.shape, generator=generator, device=y.device)

    def climb(moved: Tensor) -> Tensor:
        logits = at.logits(moved)
        classes = logits.shape[1] if logits.dim() > 1 else 1
        if classes < 2:
            raise GuardConflict(
                f"targeted=True heads for another class, and logits of shape {tuple(logits.shape)} are of one; "
                "set targeted=False"
            )
        return -at.step.losses(logits, (y + 1 + (turn * (classes - 1)).long()) % classes)

    return climb


@dataclass(frozen=True)
class Ascent:
    """How attacked points are found. The defaults are PGD on example losses from one random start.

    Args:
        threat: what the attacker may do.
        method: ``fgsm`` and ``free`` take one step of PGD, whatever ``steps``; ``n_fgsm`` one from stronger noise.
        steps: gradient steps of ``pgd``.
        step_size: in input units; None leaves it to the method.
        random_start: begin at a random point of the threat model.
        restarts: attacks of which the worst counts.
        objective: ``trades`` climbs the divergence from clean predictions, all others example losses.
        divergence: of ``trades``.
        targeted: head for a random other class.
        embedding: submodule whose output moves in the place of the inputs.
        seed: of the random other classes.
    """

    threat: ThreatModel
    method: Method = "pgd"
    steps: int = 7
    step_size: float | None = None
    random_start: bool = True
    restarts: int = 1
    objective: Objective = "adversarial"
    divergence: Divergence = "kl"
    targeted: bool = False
    embedding: str | None = None
    seed: int = 0

    def problems(self) -> Iterator[str]:
        """Why these options make no attack, each naming option, value and remedy."""
        for option, kinds in (("method", Method), ("objective", Objective), ("divergence", Divergence)):
            if getattr(self, option) not in get_args(kinds):
                known = ", ".join(map(repr, get_args(kinds)))
                yield f"{option}={getattr(self, option)!r} is not known; give one of {known}"
        if self.step_size is not None and not self.step_size > 0:
            yield f"step_size={self.step_size} never moves; give a positive length in input units, or None"
        if self.restarts < 1:
            yield f"restarts={self.restarts} makes no attack; give at least 1"
        if self.method == "n_fgsm":
            n_fgsm_threat(self.threat)
        if self.restarts > 1 and (self.method != "pgd" or not self.random_start):
            yield f"restarts={self.restarts} are random starts of method='pgd'; leave it at 1"
        if self.objective == "trades" and not (self.random_start and self.method != "free"):
            yield "objective='trades' needs a random start: at the clean input its attack has no gradient"
        if self.objective == "trades" and self.targeted:
            yield "targeted attacks head for a class, and that of objective='trades' knows none; set targeted=False"
        if self.threat.discrete and self.method in ("free", "n_fgsm"):
            yield f"method={self.method!r} moves continuously; for one_hot or integer columns use 'pgd'"
        plain = ThreatModel(self.threat.eps, self.threat.norm, per=self.threat.per)
        if self.embedding is not None and (self.threat != plain or self.method == "free"):
            yield (
                f"embedding={self.embedding!r} is attacked in a space of its own, where bounds, mean, std and columns "
                "mean nothing and nothing is replayed; leave them out, and take another method than 'free'"
            )

    def reaching(self, fraction: float) -> "Ascent":
        """The same with this fraction of the radius, and of the length of steps."""
        if fraction == 1:
            return self
        step_size = None if self.step_size is None else fraction * self.step_size
        return replace(self, threat=replace(self.threat, eps=fraction * self.threat.eps), step_size=step_size)

    def check(self, x: Any) -> None:
        """Raises ValueError for inputs that cannot be attacked, or that the threat model does not hold."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = f"{x.dtype} tensor" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"the inputs are a {kind}, and an attack by gradients needs a floating-point tensor; "
                "say where it is with Batch(inputs=...), or attack the output of a token embedding with embedding=..."
            )
        self.threat.scale(x)
        self.threat.check(x)

    def ground(self, step: Step, given: Any) -> Ground:
        """Where the attack on what the network is given moves."""
        return Ground.of(step, given, self.embedding)

    def attack(self, at: Ground, y: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Attacked points, and the mean of what was climbed where the last gradient was taken; within a probe."""
        climb, last = self._climb(at, y), at.x.new_zeros(1)

        def loss(moved: Tensor) -> Tensor:
            nonlocal last
            last = climb(moved)
            return last

        if self.method == "n_fgsm":
            moved = n_fgsm(loss, at.x, self.threat, self.step_size, generator=generator, free=at.free)
        else:
            steps = self.steps if self.method == "pgd" else 1
            how = steps, self.step_size, self.random_start, generator, self.restarts
            moved = pgd(loss, at.x, self.threat, *how, at.free)
        return moved, last.detach().mean()

    def _climb(self, at: Ground, y: Any) -> Climb:
        if self.objective == "trades":
            return away(at, y, self.divergence)
        if self.targeted:
            place = at.step.index, at.step.run.rank, TARGETS
            return towards(at, y, stream(self.seed, *place, device=at.x.device))
        return up(at, y)

    def assert_inside(self, at: Ground, moved: Tensor) -> None:
        """Raises RuntimeError if a point lies where the attacker cannot go."""
        threat = self.threat
        if self.method == "n_fgsm":  # by design beyond the radius, within the bounds
            threat = n_fgsm_threat(threat, self.step_size)
        inside = threat.contains(moved, at.x, max(1e-5, threat.rounding(at.x)), at.free)
        if not bool(inside.all()):
            raise RuntimeError(
                f"{int((~inside).sum())} of {len(inside)} attacked examples lie outside {threat}; this is a fault of "
                "Lightning Guard, please report it"
            )

    def withstood(self, step: Step, x: Any, y: Tensor, generator: torch.Generator) -> Tensor:
        """Which examples the model gets right under attack, as shares in [0, 1]; leaves no trace."""
        # Validation runs in inference mode, where nothing can be differentiated; what it made must be copied.
        precision = step.run.trainer.precision_plugin
        with torch.inference_mode(False), torch.enable_grad(), precision.forward_context(), step.probe():
            x, y = x.clone(), y.clone()
            at = self.ground(step, x)
            moved, _ = self.attack(at, y, generator)
            with torch.no_grad(), explained("validate=0 and collapse='ignore' are needed"):
                return hits(at.logits(moved), y)


def outside(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Step:
    """A step for extra passes from hooks that are called between steps, or in validation."""
    run = Run(trainer, module, guards_of(trainer))
    run.batch = read_as(run)[0]
    if current(module) is None:
        run.guards = ()  # installed for training only, so none has to stand aside
    run._metrics = [part for part in module.modules() if isinstance(part, torchmetrics.Metric)]
    step = Step(run, batch)
    step.index = trainer.global_step
    return step


@contextmanager
def explained(option: str) -> Iterator[None]:
    """Says which option a ValueError of the mathematics is about."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, GuardConflict):
            raise
        raise GuardConflict(f"{option}: {error}") from None
