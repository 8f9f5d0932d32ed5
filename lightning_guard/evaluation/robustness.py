"""How many examples a model still gets right when an attacker may move its inputs."""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import fields
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_guard.evaluation.autoattack import refusal
from lightning_guard.evaluation.base import Bars, Curve, Evidence, Figure, spread, wilson
from lightning_guard.evaluation.pictures import attacked_images
from lightning_guard.evaluation.robust_groups import robust_groups, under_attack
from lightning_guard.evaluation.siege import Siege, Tier
from lightning_guard.evaluation.subject import Subject, column, predicted
from lightning_guard.functional import ThreatModel, pgd
from lightning_guard.functional.attacks.objectives import log_odds

UNDER_ATTACK = {
    f"robustness/{name}" for name in ("accuracy", "worst_class", "worst_group", "accuracy_gap", "demographic_parity")
}
"""The figures that are only as good as the attacks."""

_MOST_BARS = 20
_MOST_SHARED = 500  # examples that other models may be judged by


class Robustness:
    """Measures accuracy under attack at ``eps``, over a range of radii and over steps, and says when to doubt it.

    Where examples have groups, also of the worst group, and the gaps between groups when all examples are attacked:
    in accuracy, and in decisions (demographic parity), with intervals as of the fairness axis.

    An example counts only if the model gets it right as it is and at every point to which any attack takes it. Cheap
    attacks come first, and only what still stands is attacked further. Every point is checked to lie within the threat
    model. Accuracy under attack is an upper bound of robustness, whatever the attack.

    Where gradients are masked, the model draws numbers, accuracy does not fall with the radius, or something simpler
    beats the gradient attack, the figure is marked as doubtful, the reason is told in a sentence, and what sees more
    there is tried as well: gradients through rounding and detached tensors (BPDA), the mean over several passes (EOT),
    and Square, which needs no gradients.

    Args:
        eps: radius in input units before normalisation; None takes the threat model of :meth:`with_threat`.
        norm: ``linf``, ``l2`` or ``l1``.
        attack: ``pgd`` is quick: projected gradient ascent (Madry et al., 2018) on the margin and on the cross-entropy.
            ``apgd`` adds APGD-CE, targeted APGD, FAB and Square. ``autoattack`` is the standard of the literature and
            needs ``pip install lightning-guard[robustness]``.
        steps: gradient steps of each projected gradient ascent.
        restarts: ascents from random points, besides the one from the input itself.
        bounds: lowest and highest valid input before normalisation, e.g. ``[0, 1]`` for images.
        mean: subtracted from inputs before the network, one number or one a channel.
        std: divided by before the network, one number or one a channel.
        mutable: indices along dimension 1 that the attacker may change; None is all.
        immutable: indices along dimension 1 that stay.
        unit: what 1 of ``eps`` is worth, one number or one an index of dimension 1.
        per: whether ``eps`` bounds each ``example`` or each ``position`` of a sequence.
        one_hot: groups of columns that hold a category each.
        switches: how many categories the attacker may change.
        integer: columns that stay whole.
        increasing: columns that may only grow.
        decreasing: columns that may only fall.
        examples: how many examples to attack, the first of the loader.
        curve: further radii, as multiples of ``eps``. Unless there are none, the largest is then doubled until nothing
            is left.
        seed: of whatever is drawn.
        min_support: groups of fewer attacked examples take no part in the worst group and in gaps.

    | case                                 | result                                                          |
    |--------------------------------------|-----------------------------------------------------------------|
    | ``eps=None`` and no threat           | no figures, and a note                                          |
    | a regression, or no target           | no figures, and a note                                          |
    | inputs that are no floating tensor   | no figures, and a note                                          |
    | inputs outside ``bounds``            | no figures, and a note with their range                         |
    | fewer than ``examples`` examples     | all of them                                                     |
    | a gradient that is zero or NaN       | no step there; a doubt, BPDA and Square if more than a tenth are |
    | a model that draws numbers           | right means right in each of 10 passes; a doubt                 |
    | probabilities instead of logits      | their logarithm is attacked; a doubt                            |
    | no groups                            | no worst group and no gaps                                      |
    | more than 20 classes or groups       | bars for the 20 worst, and a note                               |

    Raises:
        ValueError: for values that make no attack, or that AutoAttack cannot take, naming the option.

    Reference:
        Madry et al., ICLR 2018, arXiv:1706.06083. Croce and Hein, ICML 2020, arXiv:2003.01690. The doubts: Carlini et
        al., On Evaluating Adversarial Robustness, 2019, arXiv:1902.06705; Athalye et al., ICML 2018, arXiv:1802.00420.

    Example:
        >>> import torch
        >>> data = [(torch.tensor([[2.0], [-0.4]]), torch.tensor([1, 0]))]
        >>> found = Robustness(eps=1.0).evaluate(Subject(torch.nn.Identity(), data))
        >>> found.figures["robustness/accuracy"].value, found.doubts
        (0.5, {})
        >>> curve = found.curves["robustness/accuracy"]
        >>> dict(zip(curve.x, curve.y))
        {0.0: 1.0, 0.25: 1.0, 0.5: 0.5, 0.75: 0.5, 1.0: 0.5, 1.5: 0.5, 3.0: 0.0}
    """

    name: ClassVar[str] = "robustness"

    def __init__(
        self,
        eps: float | None = None,
        norm: Literal["linf", "l2", "l1"] = "linf",
        attack: Tier = "pgd",
        steps: int = 20,
        restarts: int = 1,
        bounds: tuple[float | Sequence[float], float | Sequence[float]] | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        mutable: Sequence[int] | None = None,
        immutable: Sequence[int] | None = None,
        unit: float | Sequence[float] | None = None,
        per: Literal["example", "position"] = "example",
        one_hot: Sequence[Sequence[int]] | None = None,
        switches: int = 1,
        integer: Sequence[int] | None = None,
        increasing: Sequence[int] | None = None,
        decreasing: Sequence[int] | None = None,
        examples: int = 1000,
        curve: Sequence[float] = (0.25, 0.5, 0.75, 1.0, 1.5),
        seed: int = 0,
        min_support: int = 30,
    ):
        if eps == 0:
            raise ValueError("eps=0 attacks nothing; give a positive radius, or None to take it from a guard")
        if attack not in ("pgd", "apgd", "autoattack"):
            raise ValueError(f"attack={attack!r} is not known; give 'pgd', 'apgd' or 'autoattack'")
        for option, value, least in (("steps", steps, 1), ("restarts", restarts, 0), ("examples", examples, 1)):
            if value < least:
                raise ValueError(f"{option}={value} makes no attack; give at least {least}")
        if min_support < 1:
            raise ValueError(f"min_support={min_support} is no number of examples; give at least 1")
        if not all(0 < multiple < float("inf") for multiple in curve):
            raise ValueError(f"curve={curve} must hold positive multiples of eps; 0 is there anyway")
        self.eps, self.norm, self.attack, self.steps, self.restarts = eps, norm, attack, steps, restarts
        self.bounds, self.mean, self.std, self.mutable, self.immutable = bounds, mean, std, mutable, immutable
        self.unit, self.per, self.one_hot, self.switches, self.integer = unit, per, one_hot, switches, integer
        self.increasing, self.decreasing = increasing, decreasing
        self.examples, self.curve, self.seed, self.min_support = examples, tuple(curve), seed, min_support
        self._threat()  # refuses what describes no threat

    def with_threat(self, threat: ThreatModel) -> "Robustness":
        """The same evaluation of this threat, unless ``eps`` was stated or that of the threat is 0."""
        if self.eps is not None or threat.eps == 0:
            return self
        other = copy(self)
        for option in fields(threat):
            setattr(other, option.name, getattr(threat, option.name))
        other._threat()
        return other

    def evaluate(self, subject: Subject) -> Evidence:
        """Figures on the first examples of the loader, curves over radius and steps, bars, and example images."""
        threat = self._threat()
        if threat is None:
            reason = "eps is not stated, and no guard trains against a threat."
            return Evidence(notes=[f"Accuracy under attack was not measured: {reason}"])
        if subject.kind not in ("binary", "multiclass"):
            return Evidence(notes=[f"Accuracy under attack needs classes. {subject.problem}".strip()])
        with subject.still():
            batches = self._batches(subject, threat)
            if isinstance(batches, str):
                return Evidence(notes=[batches])
            siege = Siege(subject, batches, threat, self.attack, self.steps, self.restarts, self.curve, self.seed)
            evidence = self._figures(siege) | self._curves(siege) | _bars(subject, siege)
            evidence |= self._groups(subject, siege)
            for figure in UNDER_ATTACK & evidence.figures.keys():
                if misled := siege.signs.sentences():
                    evidence.doubts[figure] = [*misled, *evidence.doubts.get(figure, ())]
            evidence |= attacked_images(subject, siege)
            evidence.tensors |= self._shared(siege)
        return evidence

    def _threat(self) -> ThreatModel | None:
        if self.eps is None:
            return None
        threat = ThreatModel(**{option.name: getattr(self, option.name) for option in fields(ThreatModel)})
        if self.attack == "autoattack" and (reason := refusal(threat)):
            raise ValueError(reason)
        return threat

    def _batches(self, subject: Subject, threat: ThreatModel) -> list[tuple[Tensor, Tensor]] | str:
        """The first examples, or why they cannot be attacked."""
        batches: list[tuple[Tensor, Tensor]] = []
        for step in subject.batches():
            wanted = self.examples - sum(len(x) for x, _ in batches)
            if not isinstance(step.inputs, Tensor) or not step.inputs.is_floating_point():
                return "Accuracy under attack needs inputs that are one floating-point tensor."
            x, y = step.inputs[:wanted], column(step.target)[:wanted].long()
            try:
                threat.scale(x)
                threat.check(x)
            except ValueError as error:
                return f"Accuracy under attack was not measured: {error}."
            if len(x):
                batches.append((x.clone(), y.clone()))  # what was made in inference mode cannot be differentiated
            if wanted <= len(x):
                break
        return batches

    def _figures(self, siege: Siege) -> Evidence:
        n, threat, signs = siege.signs.seen, siege.threat, siege.signs
        standing = int(siege.standing().sum())
        clean, robust = wilson(signs.clean, n), wilson(standing, n)
        units = "" if threat.unit is None else " units"
        parts = f"AutoAttack of {', '.join(siege.standard)}" if siege.standard else "AutoAttack"
        names = [parts if name == "AutoAttack" else name for name in siege.names]
        about = (
            f"Right at every point of every attack ({', '.join(names)}; {threat.norm}, eps {threat.eps:.4g}"
            f"{units}, PGD with {self.steps} steps), on the first {n} test examples. An upper bound of robustness"
            f"{'.' if self.attack == 'autoattack' or refusal(threat) else '; the standard to report is AutoAttack.'}"
        )
        doubts = signs.sentences()
        return Evidence(
            {
                "robustness/accuracy": Figure(standing / n, "Accuracy under attack", "fraction", "higher", about),
                "robustness/clean_accuracy": Figure(
                    signs.clean / n, "Accuracy without attack", "fraction", "higher", "On the same examples."
                ),
            },
            notes=[
                f"95% interval of accuracy under attack, from {n} examples: {spread(robust)}.",
                *(f"Accuracy under attack is doubtful. {doubt}" for doubt in doubts),
            ],
            intervals={"robustness/accuracy": robust, "robustness/clean_accuracy": clean},
        )

    def _groups(self, subject: Subject, siege: Siege) -> Evidence:
        """How differently attacks hurt groups."""
        kin = [family._replace(group=family.group[: siege.signs.seen]) for family in subject.families()]
        clean = subject.outputs.logits[: siege.signs.seen]
        attacked = clean.clone()
        if clean.dim() > 1:  # with one logit whatever is not right is the other class
            for chunk in siege.chunks:
                fell = (chunk.clean & ~chunk.standing).nonzero()[:, 0]
                if len(fell):
                    attacked[chunk.start + fell.cpu()] = siege.victim(chunk.moved[fell]).to(clean)
        y, right = (torch.cat([getattr(chunk, part) for chunk in siege.chunks]).cpu() for part in ("y", "clean"))
        before, after = under_attack(clean, y, right), under_attack(attacked, y, siege.standing().cpu())
        classes = 2 if clean.dim() == 1 else clean.shape[1]
        return robust_groups(kin, y, before, after, classes, self.min_support, seed=self.seed)

    def _curves(self, siege: Siege) -> Evidence:
        signs, threat = siege.signs, siege.threat
        radii = sorted(siege.left)
        left = [sum(int(mask.sum()) for mask in siege.left[radius]) for radius in radii]
        unit = "input units" if threat.unit is None else "units of each column"
        over_radii = Curve(
            [0.0, *radii],
            [count / signs.seen for count in (signs.clean, *left)],
            "Accuracy under attack",
            f"eps ({threat.norm}, {unit})",
            "Accuracy",
            f"All attacks at eps {threat.eps:.4g}, PGD at the other radii"
            f"{', doubled until nothing is left.' if self.curve else '.'}",
            y_unit="fraction",
        )
        curves = {"robustness/accuracy": over_radii}
        if tried := signs.steps.get(0, 0):
            curves["robustness/steps"] = Curve(
                [float(steps) for steps in signs.steps],
                [count / tried for count in signs.steps.values()],
                "Accuracy by effort",
                "gradient steps",
                "Accuracy",
                f"PGD from the input, each number of steps by itself, on {tried} examples that are right without "
                "attack. It should fall and then stay.",
                y_unit="fraction",
            )
        return Evidence(curves=curves)

    def _shared(self, siege: Siege) -> dict[str, Tensor]:
        """Inputs moved to where this model errs most, for other models to be judged by (transfer)."""
        found: list[tuple[Tensor, ...]] = []
        for chunk in siege.chunks:
            x, y = chunk.x, chunk.y
            if not found or x.shape[1:] == found[0][0].shape[1:]:

                def losses(moved: Tensor, y: Tensor = y) -> Tensor:
                    moved.register_hook(torch.nan_to_num)
                    return log_odds((siege.through or siege.victim)(moved), y)

                moved = pgd(losses, x, siege.threat, self.steps, random_start=False)
                found.append((moved, y, chunk.standing, predicted(siege.victim(moved)), x))
        names = ("moved", "target", "standing", "predicted", "inputs")
        return {
            f"robustness/{name}": torch.cat(parts)[:_MOST_SHARED].cpu()
            for name, parts in zip(names, zip(*found, strict=True), strict=True)
        }


def _bars(subject: Subject, siege: Siege) -> Evidence:
    """Accuracy under attack of each class and of each group, and the worst class."""
    evidence, standing = Evidence(), siege.standing().cpu()
    y = torch.cat([chunk.y for chunk in siege.chunks]).cpu()
    kin = subject.families()
    places = [("group" if len(kin) == 1 else f"group_{number}", one) for number, one in enumerate(kin)]
    worst = None
    parts: list[tuple[str, str, Tensor, str, Callable[[int], str]]] = [
        ("class", "class", y, "classes", subject.class_name)
    ]
    for key, one in places:
        word = "group" if len(kin) == 1 else one.name
        parts.append((key, word, one.group[: len(y)], "groups", _reader(one.names)))
    for key, word, of, which, name in parts:
        if len(of) < len(y):
            continue
        shares = _shares(standing, of, name)
        kept = dict(sorted(shares.items(), key=lambda item: item[1])[:_MOST_BARS])
        if len(shares) > len(kept):
            evidence.notes.append(f"Accuracy under attack is shown for the {len(kept)} worst of {len(shares)} {which}.")
        kept = {label: share for label, share in shares.items() if label in kept}
        if kept:
            evidence.bars[f"robustness/by_{key}"] = Bars(
                list(kept),
                list(kept.values()),
                f"Accuracy under attack by {word}",
                "Accuracy under attack",
                f"At eps {siege.threat.eps:.4g}, of the test examples of each {word}.",
                y_unit="fraction",
            )
        if key == "class" and shares:
            worst = min(shares.values())
    evidence.figures["robustness/worst_class"] = Figure(
        worst, "Accuracy under attack, worst class", "fraction", "higher", "The class that attacks hurt most."
    )
    return evidence


def _shares(standing: Tensor, of: Tensor, name: Callable[[int], str]) -> dict[str, float]:
    return {name(int(k)): float(standing[of == k].double().mean()) for k in of.unique() if k >= 0}


def _reader(names: Sequence[str]) -> Callable[[int], str]:
    return lambda number: names[number]
