"""How many examples a model still gets right when an attacker may move its inputs."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_guard.evaluation.base import Curve, Evidence, Figure, spread, wilson
from lightning_guard.evaluation.subject import Subject, column, predicted
from lightning_guard.evaluation.survival import survives_ascent, survives_noise, without_gradient
from lightning_guard.functional import ThreatModel, stream


class Robustness:
    """Measures accuracy under projected gradient ascent (PGD; Madry et al., 2018), at ``eps`` and around it.

    An example counts only if the model gets it right as it is and at every point that any attack visits: from
    the input itself uphill on the margin between the logits, from random points uphill on the cross-entropy,
    and, at ``eps``, at random points alone. Smaller radii are tried on what fell at ``eps``, larger ones on what
    did not. Every visited point is checked to lie within the threat model.

    This bounds robustness from above: stronger attacks (AutoAttack) find more, and gradients that say nothing
    find nothing. Notes tell when that is likely.

    Args:
        eps: radius in input units before normalisation; None takes the threat model of :meth:`with_threat`.
        norm: ``linf`` or ``l2``.
        steps: gradient steps of each attack.
        restarts: attacks from random points, besides the one from the input itself.
        bounds: lowest and highest valid input before normalisation, e.g. ``[0, 1]`` for images.
        mean: subtracted from inputs before the network, one number or one a channel.
        std: divided by before the network, one number or one a channel.
        mutable: indices along dimension 1 that the attacker may change; None is all.
        examples: how many examples to attack, the first of the loader.
        curve: further radii, as multiples of ``eps``.
        seed: of the random points.

    | case                                 | result                                                     |
    |--------------------------------------|------------------------------------------------------------|
    | ``eps=None`` and no threat           | no figures, and a note                                     |
    | a regression, or no target           | no figures, and a note                                     |
    | inputs that are no floating tensor   | no figures, and a note                                     |
    | inputs outside ``bounds``            | ValueError, with their range                               |
    | fewer than ``examples`` examples     | all of them                                                |
    | a gradient that is zero or NaN       | no step there; a note if more than a tenth are             |

    Raises:
        ValueError: for values that make no attack, naming the option.

    Reference:
        Madry et al., ICLR 2018, arXiv:1706.06083. The notes: Carlini et al., On Evaluating Adversarial
        Robustness, 2019, arXiv:1902.06705.

    Example:
        >>> import torch
        >>> data = [(torch.tensor([[2.0], [-0.4]]), torch.tensor([1, 0]))]
        >>> found = Robustness(eps=1.0).evaluate(Subject(torch.nn.Identity(), data))
        >>> found.figures["robustness/accuracy"].value, found.curves["robustness/accuracy"].y
        (0.5, [1.0, 1.0, 0.5, 0.5, 0.5, 0.5])
    """

    name: ClassVar[str] = "robustness"

    def __init__(
        self,
        eps: float | None = None,
        norm: Literal["linf", "l2"] = "linf",
        steps: int = 20,
        restarts: int = 1,
        bounds: tuple[float, float] | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        mutable: Sequence[int] | None = None,
        examples: int = 1000,
        curve: Sequence[float] = (0.25, 0.5, 0.75, 1.0, 1.5),
        seed: int = 0,
    ):
        if eps == 0:
            raise ValueError("eps=0 attacks nothing; give a positive radius, or None to take it from a guard")
        for option, value, least in (
            ("steps", steps, 1),
            ("restarts", restarts, 0),
            ("examples", examples, 1),
        ):
            if value < least:
                raise ValueError(f"{option}={value} makes no attack; give at least {least}")
        if not all(0 < multiple < float("inf") for multiple in curve):
            raise ValueError(f"curve={curve} must hold positive multiples of eps; 0 is there anyway")
        self.eps, self.norm, self.steps, self.restarts = eps, norm, steps, restarts
        self.bounds, self.mean, self.std, self.mutable = bounds, mean, std, mutable
        self.examples, self.curve, self.seed = examples, tuple(curve), seed
        self._threats()  # refuses what describes no threat

    def with_threat(self, threat: ThreatModel) -> "Robustness":
        """The same evaluation of this threat, unless ``eps`` was stated or that of the threat is 0."""
        if self.eps is not None or threat.eps == 0:
            return self
        other = copy(self)
        for option in ("eps", "norm", "bounds", "mean", "std", "mutable"):
            setattr(other, option, getattr(threat, option))
        return other

    def evaluate(self, subject: Subject) -> Evidence:
        """Figures on the first examples of the loader, and a curve over the radius."""
        if self.eps is None:
            reason = "eps is not stated, and no guard trains against a threat."
            return Evidence(notes=[f"Accuracy under attack was not measured: {reason}"])
        if subject.kind not in ("binary", "multiclass"):
            return Evidence(notes=[f"Accuracy under attack needs classes. {subject.problem}".strip()])
        threats = self._threats()
        tally = _Tally(left=[0] * len(threats))
        with subject.still():
            for step in subject.batches():
                x, y, wanted = step.inputs, column(step.target).long(), self.examples - tally.seen
                if not isinstance(x, Tensor) or not x.is_floating_point():
                    return Evidence(notes=["Accuracy under attack needs inputs that are one floating-point tensor."])
                self._attack(subject, x[:wanted], y[:wanted], threats, tally)
                if tally.seen == self.examples:
                    break
        return self._evidence(self.eps, threats, tally)

    def _threats(self) -> list[ThreatModel]:
        if self.eps is None:
            return []
        threat = ThreatModel(self.eps, self.norm, self.bounds, self.mean, self.std, self.mutable)
        return [replace(threat, eps=multiple * self.eps) for multiple in sorted({1.0, *self.curve})]

    def _attack(self, subject: Subject, x: Tensor, y: Tensor, threats: Sequence[ThreatModel], tally: "_Tally") -> None:
        threats[0].check(x)
        right = predicted(subject.forward(x)) == y
        tally.clean += int(right.sum())
        if right.any():
            tally.silent += int(without_gradient(subject, x[right], y[right], threats[0]).sum())

        def withstand(rows: Tensor, threat: ThreatModel) -> Tensor:
            for attack, (steps, random) in enumerate(self._ascents()):
                if len(rows):  # those that fell are not attacked again
                    draws = stream(self.seed, tally.seen, attack, device=x.device) if random else None
                    # Rows are copies: tensors that were made in inference mode cannot be differentiated.
                    rows = rows[survives_ascent(subject, x[rows], y[rows], threat, steps, draws)]
            return rows

        middle = next(i for i, threat in enumerate(threats) if threat.eps == self.eps)
        rows = right.nonzero()[:, 0]
        strong = withstand(rows, threats[middle])
        if len(strong):
            draws = stream(self.seed, tally.seen, device=x.device)
            steady = survives_noise(subject, x[strong], y[strong], threats[middle], draws)
            tally.noise += int((~steady).sum())
            strong = strong[steady]
        tally.left[middle] += len(strong)
        # Whoever stands at a radius stands at every smaller one, and whoever falls falls at every larger one:
        # below eps only those that fell at eps are attacked, and above it only those that did not.
        weak = rows[~torch.isin(rows, strong)]
        for i, threat in enumerate(threats[:middle]):
            weak = withstand(weak, threat)
            tally.left[i] += len(weak) + len(strong)
        for i, threat in enumerate(threats[middle + 1 :], middle + 1):
            strong = withstand(strong, threat)
            tally.left[i] += len(strong)
        tally.seen += len(x)

    def _ascents(self) -> list[tuple[int, bool]]:
        """Steps, and whether from a random point. The first is short: most of what can fall falls at once."""
        return [(min(3, self.steps), False), (self.steps, False), *[(self.steps, True)] * self.restarts]

    def _evidence(self, eps: float, threats: Sequence[ThreatModel], tally: "_Tally") -> Evidence:
        n, radii = tally.seen, [threat.eps for threat in threats]
        left = tally.left[radii.index(eps)]
        clean, robust = wilson(tally.clean, n), wilson(left, n)
        starts = f"the input and {self.restarts} random point{'' if self.restarts == 1 else 's'}"
        about = (
            f"Right under PGD ({self.norm}, eps {eps:.4g}, {self.steps} steps, from {starts}) at every point "
            f"tried, on the first {n} test examples. An upper bound of robustness: PGD, not AutoAttack."
        )
        return Evidence(
            {
                "robustness/accuracy": Figure(left / n, "Accuracy under attack", "fraction", "higher", about),
                "robustness/clean_accuracy": Figure(
                    tally.clean / n, "Accuracy without attack", "fraction", "higher", "On the same examples."
                ),
            },
            curves={
                "robustness/accuracy": Curve(
                    [0.0, *radii],
                    [count / n for count in (tally.clean, *tally.left)],
                    "Accuracy under attack",
                    f"eps ({self.norm}, input units)",
                    "Accuracy",
                    about,
                    y_unit="fraction",
                )
            },
            notes=[
                f"95% interval of accuracy under attack, from {n} examples: {spread(robust)}.",
                *tally.doubts(radii),
            ],
            intervals={"robustness/accuracy": robust, "robustness/clean_accuracy": clean},
        )


@dataclass
class _Tally:
    """Counts of examples.

    Args:
        seen: all of them.
        clean: right without an attack.
        silent: of these, without an input gradient.
        noise: fooled by noise and by no gradient attack.
        left: right under attack, by radius.
    """

    seen: int = 0
    clean: int = 0
    silent: int = 0
    noise: int = 0
    left: list[int] = field(default_factory=list)

    def doubts(self, radii: Sequence[float]) -> list[str]:
        """Why the attack may have missed what is there."""
        doubts = []
        if self.silent > 0.1 * self.clean:
            doubts.append(
                f"The input gradient is zero for {self.silent} of {self.clean} examples (masked gradients): "
                "the attack cannot see where to go, and accuracy under attack says little."
            )
        if len(radii) > 1 and self.left[0] == self.left[-1] > 0:
            doubts.append(
                f"Accuracy does not fall between eps {radii[0]:.4g} and {radii[-1]:.4g}: either these are "
                "too small to matter, or gradients mislead the attack."
            )
        if self.noise > 0.005 * self.seen:
            doubts.append(
                f"Random noise fools {self.noise} of {self.seen} examples that the gradient attack did not: "
                "gradients mislead it, and stronger attacks will find more."
            )
        return doubts
