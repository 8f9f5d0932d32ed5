"""What a private training does and what that costs, in one object."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import partial
from hashlib import sha256
from typing import Any, Literal, Self, get_args

from lightning_guard.functional.privacy import accounting
from lightning_guard.functional.privacy.accounting import Segment

Clipping = Literal["flat", "per_layer", "automatic"]
Sampling = Literal["poisson", "shuffle"]
Unit = Literal["example", "user"]

_MOST_STEPS = 10_000_000  # looked at when a budget is to tell the steps


@dataclass(frozen=True)
class PrivacyPlan:
    r"""A private training: sampling, noise, clipping and accountant from one place, so that they cannot drift apart.

    A step draws units, clips the gradient of each to a norm of at most ``max_grad_norm``, adds Gaussian noise to the
    sum and divides by ``batch_size``, the expected number of units; the realised number is private.

    Args:
        units: examples, or people, in the training data; a public number.
        batch_size: expected units a step, and the divisor of the noised sum.
        steps: noised steps planned.
        steps_per_epoch: of them in one epoch.
        delta: probability that the guarantee fails; well below ``1 / units``.
        noise_multiplier: standard deviation of the noise over ``max_grad_norm``, of everything that one release tells
            (with adaptive clipping, gradient and count together), in the first epoch.
        max_grad_norm: largest L2 norm of one unit's gradient, in the first epoch.
        target_epsilon: the budget, if there is one.
        clipping: ``"flat"`` by the norm over all weights, ``"per_layer"`` by the norm of each layer with bounds whose
            squares add up to that of ``max_grad_norm``, ``"automatic"`` scales every gradient to about that norm.
        sampling: ``"poisson"`` draws each unit independently, ``"shuffle"`` takes each at most once an epoch.
        unit: who is protected, one ``"example"`` or one ``"user"`` with all their rows.
        releases: noised backward passes on the same draw, 2 for a GAN whose two networks both see the data; each has
            ``noise_multiplier``.
        noise_final: noise multiplier in the last epoch over that in the first; it changes linearly between them and
            is constant within an epoch. A plan of one epoch has no last epoch.
        clip_final: the same for ``max_grad_norm``.
        target_quantile: fraction of the units whose gradients are to stay unclipped; the bound follows it (Andrew et
            al., 2021).
        count_noise: standard deviation of the noise on the sum of centred indicators, :math:`b_i - 1/2`; by default
            ``batch_size / 20`` with a ``target_quantile``.
        query_noise: of further sums over each draw, standard deviation of the noise over the L2 norm that one unit can
            contribute to all of them, see :func:`noise_of_all`; part of the same release, so the gradient has more.
        once_noise: the same of sums over all units that are taken once, before the first step.
        before: what earlier trainings on the same data have released that this one builds on, a private teacher for
            example; epsilon is that of all together.

    Raises:
        ValueError: if a value is impossible or two do not go together.

    Releases of one draw: a unit that is not drawn is in none of them, so the draw amplifies them once, together.
    Given that it is drawn, :math:`R` adaptive Gaussian releases with noise :math:`\sigma` tell as much as one with
    :math:`\sigma / \sqrt R` (the distributions are isotropic, so only the length of the joint shift, at most
    :math:`\sqrt R` sensitivities, counts). The ledger therefore holds one step with :math:`\sigma / \sqrt R`; booking
    :math:`R` steps would pretend :math:`R` independent draws, which costs less than what happened.

    | neighbours                                 | sampling  | a step costs                                       |
    |--------------------------------------------|-----------|----------------------------------------------------|
    | one unit added or removed                  | Poisson   | a subsampled release                               |
    | one unit's contributions replaced by zero  | shuffle   | nothing but the first of an epoch: a whole release |

    Reference:
        Abadi et al., Deep Learning with Differential Privacy, 2016, arXiv:1607.00133.
        Andrew et al., Differentially Private Learning with Adaptive Clipping, 2021, arXiv:1905.03871.

    Example:
        >>> plan = PrivacyPlan.solve(60_000, 256, 234, 1e-5, 1.0, noise_multiplier=1.1, epochs=15)
        >>> print(plan.describe())
        privacy     epsilon 1.14 at delta 1e-05, add or remove one example
        sampling    Poisson: 256 of 60,000 examples a step on average, rate 0.00427
        steps       3,510 in 15 epochs
        noise       1.1 times the clipping norm
        clipping    flat at 1
        accountant  PRV (Gopi et al., 2021), or RDP where lower
    """

    units: int
    batch_size: int
    steps: int
    steps_per_epoch: int
    delta: float
    noise_multiplier: float
    max_grad_norm: float
    target_epsilon: float | None = None
    clipping: Clipping = "flat"
    sampling: Sampling = "poisson"
    unit: Unit = "example"
    releases: int = 1
    noise_final: float = 1.0
    clip_final: float = 1.0
    target_quantile: float | None = None
    count_noise: float | None = None
    query_noise: float | None = None
    once_noise: float | None = None
    before: tuple[Segment, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "before", tuple(Segment(float(z), float(q), int(n)) for z, q, n in self.before))
        for field in fields(self):  # 8 and 8.0, or numpy's, are the same plan
            value = getattr(self, field.name)
            if field.type is int and value != int(value):
                raise ValueError(f"{field.name}={value} is no whole number; give one")
            if field.type is int or (field.type in (float, float | None) and value is not None):
                object.__setattr__(self, field.name, int(value) if field.type is int else float(value))
        if self.count_noise is None and self.target_quantile is not None:
            object.__setattr__(self, "count_noise", self.batch_size / 20)
        faults = list(self._faults())
        if faults:
            raise ValueError("\n".join(faults))

    def _faults(self) -> Iterator[str]:
        for name in ("units", "batch_size", "steps", "steps_per_epoch", "releases"):
            if getattr(self, name) < 1:
                yield f"{name}={getattr(self, name)} is too small; give 1 or more"
        for name in ("max_grad_norm", "noise_final", "clip_final", "target_epsilon", "query_noise", "once_noise"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                yield f"{name}={value} is impossible; give a finite number above 0"
        if not 0 <= self.noise_multiplier < math.inf:
            yield f"noise_multiplier={self.noise_multiplier} is impossible; give a finite number, 0 for no privacy"
        for name, kind in (("clipping", Clipping), ("sampling", Sampling), ("unit", Unit)):
            if getattr(self, name) not in get_args(kind):
                yield f"{name}={getattr(self, name)!r} is not known; give {' or '.join(map(repr, get_args(kind)))}"
        if self.batch_size > self.units:
            yield f"batch_size={self.batch_size} is more than the units={self.units}; give a smaller batch"
        if not 0 < self.delta < 1:
            yield f"delta={self.delta} is no probability; give a number in (0, 1), well below 1 / units"
        elif self.delta * self.units >= 1:
            yield (
                f"delta={self.delta} would allow publishing one of the {self.units} units outright; "
                f"give well below 1 / units = {1 / self.units:.1g}"
            )
        if self.sampling == "shuffle" and self.steps_per_epoch * self.batch_size > self.units:
            yield (
                f"steps_per_epoch={self.steps_per_epoch} batches of batch_size={self.batch_size} take some of the "
                f"units={self.units} twice an epoch; give at most {self.units // max(self.batch_size, 1)} with "
                "sampling='shuffle'"
            )
        most = self.noise_multiplier * max(1.0, self.noise_final)
        if self.query_noise is not None and self.query_noise <= most:
            yield (
                f"query_noise={self.query_noise:.3g} lets the queries of a step tell more than the whole step may with "
                f"noise_multiplier={most:.3g}; give the queries more noise"
            )
        if self.target_quantile is None:
            if self.count_noise is not None:
                yield f"count_noise={self.count_noise} has nothing to count; give target_quantile or remove it"
            return
        if not 0 < self.target_quantile < 1:
            yield f"target_quantile={self.target_quantile} is no fraction of the units; give a number in (0, 1)"
        if self.clipping != "flat":
            yield f"clipping={self.clipping!r} has no norm for target_quantile to follow; give 'flat' or remove it"
        if self.clip_final != 1:
            yield f"clip_final={self.clip_final} and target_quantile both move max_grad_norm; give only one"
        if self.count_noise is not None and 2 * self.count_noise <= most:
            yield (
                f"count_noise={self.count_noise:.3g} lets the count tell more than the whole release may with "
                f"noise_multiplier={most:.3g}; give more than {most / 2:.3g}"
            )
        elif self.count_noise and self.query_noise and (2 * self.count_noise) ** -2 + self.query_noise**-2 >= most**-2:
            yield (
                f"query_noise={self.query_noise:.3g} and count_noise={self.count_noise:.3g} together tell more than "
                f"the whole step may with noise_multiplier={most:.3g}; give either more"
            )

    @classmethod
    def solve(
        cls,
        units: int,
        batch_size: int,
        steps_per_epoch: int,
        delta: float,
        max_grad_norm: float,
        *,
        target_epsilon: float | None = None,
        noise_multiplier: float | None = None,
        epochs: int | None = None,
        steps: int | None = None,
        **other: Any,
    ) -> "PrivacyPlan":
        """The plan in which the two given of budget, noise and length decide the third.

        Args:
            units, batch_size, steps_per_epoch, delta, max_grad_norm: as in the plan.
            target_epsilon: the budget.
            noise_multiplier: the noise.
            epochs: the length; or give ``steps``.
            steps: the length in steps.
            other: other fields of the plan.

        Raises:
            ValueError: if fewer than two are given, or no plan meets them.

        | given                     | result                                                               |
        |---------------------------|----------------------------------------------------------------------|
        | budget and length         | the least noise, to a thousandth                                     |
        | noise and length          | whatever it costs                                                    |
        | budget and noise          | the most steps                                                       |
        | all                       | the steps that the budget affords, at most the length                |

        Example:
            >>> plan = PrivacyPlan.solve(60_000, 256, 234, 1e-5, 1.0, target_epsilon=1.0, noise_multiplier=1.1)
            >>> plan.steps, round(plan.epsilon(), 3)
            (2727, 1.0)
        """
        if epochs is not None and steps is not None:
            raise ValueError(f"epochs={epochs} and steps={steps} both say how long; give one of them")
        length = steps if epochs is None else epochs * steps_per_epoch

        before = accounting.epsilon(other["before"], delta) if other.get("before") else 0.0
        if target_epsilon is not None and before >= target_epsilon > 0:
            raise ValueError(
                f"target_epsilon={target_epsilon} is spent already: what this training builds on has spent "
                f"{before:.3g} on the same data; give more than that"
            )

        def plan(steps: int, noise: float, **changed: Any) -> "PrivacyPlan":
            common = {**other, "target_epsilon": target_epsilon, **changed}
            return cls(units, batch_size, steps, steps_per_epoch, delta, noise, max_grad_norm, **common)

        if target_epsilon is None and length is not None and noise_multiplier is not None:
            return plan(length, noise_multiplier)
        if target_epsilon is not None and length is not None and noise_multiplier is None:
            plan(length, 0.0)  # other faults first
            # Without count and queries, whose noise is judged only by the noise that is found.
            lone = partial(plan, length, target_quantile=None, count_noise=None, query_noise=None)
            return plan(length, accounting.noise_multiplier(target_epsilon, delta, lambda z: lone(z).ledger()))
        if target_epsilon is not None and noise_multiplier is not None:
            whole = plan(1 if length is None else length, noise_multiplier)
            if length is not None and whole.epsilon() <= target_epsilon:
                return whole
            most = _MOST_STEPS if length is None else length
            found = accounting.affordable_steps(
                target_epsilon, delta, lambda steps: replace(whole, steps=steps).ledger(), most
            )
            if found == 0:
                raise ValueError(
                    f"target_epsilon={target_epsilon} does not pay for one step, which spends "
                    f"{whole.epsilon(1):.3g} with noise_multiplier={noise_multiplier}; give more of either, or a "
                    "smaller batch_size"
                )
            if length is None and found == most:
                raise ValueError(
                    f"target_epsilon={target_epsilon} pays for more than {most:,} steps with "
                    f"noise_multiplier={noise_multiplier}; give epochs or steps"
                )
            return plan(found, noise_multiplier)
        given = {"target_epsilon": target_epsilon, "noise_multiplier": noise_multiplier, "epochs or steps": length}
        missing = ", ".join(name for name, value in given.items() if value is None)
        raise ValueError(
            f"{missing}: not given; any two of budget, noise and length decide the third, so give one more"
        )

    @property
    def sample_rate(self) -> float:
        """Expected fraction of the units in a step."""
        return self.batch_size / self.units

    @property
    def epochs(self) -> int:
        """Epochs begun by the planned steps."""
        return math.ceil(self.steps / self.steps_per_epoch)

    def _level(self, step: int, final: float) -> float:
        """Of a value that changes to ``final`` times its first over the epochs of the plan, and then stays."""
        last = self.epochs - 1
        progress = min(step // self.steps_per_epoch / last, 1.0) if last else 0.0
        return 1 + (final - 1) * progress

    def noise_at(self, step: int) -> float:
        r"""Noise multiplier of the gradient's release at a step, counted from 0.

        With adaptive clipping the count tells something too, and so do queries :math:`q`. The gradient needs
        :math:`(z^{-2} - (2 \sigma_b)^{-2} - \sigma_q^{-2})^{-1/2}` for all together to tell as much as one release with
        noise multiplier :math:`z` (Andrew et al., 2021, theorem 1): a centred indicator changes a sum by 1/2.
        """
        noise = self.noise_multiplier * self._level(step, self.noise_final)
        if noise == 0:
            return noise
        count = 0.0 if self.count_noise is None else (2 * self.count_noise) ** -2
        queries = 0.0 if self.query_noise is None else self.query_noise**-2
        return noise if count == queries == 0 else (noise**-2 - count - queries) ** -0.5

    def clip_at(self, step: int) -> float:
        """Largest norm of a unit's gradient at a step, counted from 0; where adaptive clipping starts."""
        return self.max_grad_norm * self._level(step, self.clip_final)

    def ledger(self, steps: int | None = None) -> list[Segment]:
        """What one unit takes part in during the first ``steps`` steps, by default all that are planned.

        Poisson: that many subsampled releases. Shuffle: one release without subsampling in each epoch begun. What is
        taken once is a release without subsampling before them.
        """
        steps = self.steps if steps is None else steps
        stride = max(steps, 1) if self.noise_final == 1 else self.steps_per_epoch
        segments = [*self.before, *([] if self.once_noise is None else [Segment(self.once_noise, 1.0, 1)])]
        for first in range(0, steps, stride):
            noise = self.noise_multiplier * self._level(first, self.noise_final) / math.sqrt(self.releases)
            count = min(stride, steps - first)
            if self.sampling == "shuffle":
                segments.append(Segment(noise, 1.0, math.ceil(count / self.steps_per_epoch)))
            else:
                segments.append(Segment(noise, self.sample_rate, count))
        return segments

    def epsilon(self, steps: int | None = None) -> float:
        """Privacy spent by the first ``steps`` steps, by default all that are planned, at ``delta``."""
        return accounting.epsilon(self.ledger(steps), self.delta)

    @property
    def query_cost(self) -> float:
        """How much of epsilon is for queries: what would be spent less without them at the same noise on gradients."""
        if self.query_noise is None and self.once_noise is None:
            return 0.0
        # Under a noise schedule the first epoch's ratio stands for all.
        ratio = self.noise_at(0) / self.noise_multiplier if self.noise_multiplier else 1.0
        if self.count_noise is not None:
            ratio = replace(self, count_noise=None, target_quantile=None).noise_at(0) / self.noise_multiplier
        lone = replace(self, noise_multiplier=self.noise_multiplier * ratio, query_noise=None, once_noise=None)
        return self.epsilon() - lone.epsilon()

    def to_dict(self) -> dict[str, Any]:
        """The fields as numbers, strings, None and lists of numbers."""
        return {**asdict(self), "before": [list(segment) for segment in self.before]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The plan that :meth:`to_dict` wrote.

        Raises:
            ValueError: if a field is unknown or missing.
        """
        unknown = values.keys() - {field.name for field in fields(cls)}
        missing = {field.name for field in fields(cls) if field.default is MISSING} - values.keys()
        if unknown or missing:
            raise ValueError(f"no privacy plan: {sorted(unknown)} are not known, {sorted(missing)} are missing")
        return cls(**values)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all fields, as hexadecimal digits; the same on every machine."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return sha256(text.encode()).hexdigest()

    def differences(self, other: "PrivacyPlan") -> list[str]:
        """What another plan does otherwise, as in ``"noise_multiplier 1.1 became 0.9"``."""
        pairs = ((field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return [f"{name} {mine} became {theirs}" for name, mine, theirs in pairs if mine != theirs]

    def describe(self) -> str:
        """A short text for people, printed before training."""
        shuffled = self.sampling == "shuffle"
        one, many = ("person", "people") if self.unit == "user" else ("example", "examples")
        change = f"one {one}'s contributions zeroed out" if shuffled else f"add or remove one {one}"
        budget = "" if self.target_epsilon is None else f" of {self.target_epsilon:g}"
        lines = [("privacy", f"epsilon {_short(self.epsilon())}{budget} at delta {self.delta:g}, {change}")]
        if self.noise_multiplier == 0:
            lines.append(("", "no noise, so no privacy at all"))
        elif shuffled:
            other = _short(replace(self, sampling="poisson").epsilon())
            lines.append(("", f"(epsilon {other} needs Poisson sampling and is not valid here)"))
        draw = f"{self.batch_size:,} of {self.units:,} {many} a step"
        if shuffled:
            lines.append(("sampling", f"shuffle: {draw}, each at most once an epoch"))
        else:
            lines.append(("sampling", f"Poisson: {draw} on average, rate {self.sample_rate:.3g}"))
        lines.append(("steps", f"{self.steps:,} in {self.epochs:,} epoch{'s' * (self.epochs > 1)}"))
        noise = f"{self._course(self.noise_multiplier, self.noise_final)} times the clipping norm"
        if self.releases > 1:
            noise += f", on each of {self.releases} releases a step"
        lines.append(("noise", noise))
        clipping = f"{self.clipping.replace('_', ' ')} at {self._course(self.max_grad_norm, self.clip_final)}"
        if self.target_quantile is not None:
            clipping += f", then at the {self.target_quantile:g} quantile (noise {self.count_noise:.3g} on the count)"
        lines.append(("clipping", clipping))
        if self.query_noise is not None or self.once_noise is not None:
            of = [
                f"sums over {what} (noise {_short(noise)})"
                for what, noise in (("each draw", self.query_noise), (f"all {many} once", self.once_noise))
                if noise is not None
            ]
            lines.append(("queries", f"{' and '.join(of)}: {_short(self.query_cost)} of epsilon"))
        if self.before:
            earlier = accounting.epsilon(self.before, self.delta)
            lines.append(("before", f"epsilon {_short(earlier)} of it was spent by what this training builds on"))
        exact = "Gaussian DP (Dong et al., 2022), exact for batches fixed in advance"
        lines.append(("accountant", exact if shuffled else "PRV (Gopi et al., 2021), or RDP where lower"))
        return "\n".join(f"{head:12}{text}" for head, text in lines)

    def _course(self, first: float, final: float) -> str:
        last = first * self._level(self.steps - 1, final)
        return _short(first) if last == first else f"{_short(first)} (last epoch {_short(last)})"


def noise_of_all(noises: Iterable[float]) -> float | None:
    r"""The noise of one release that tells as much as several of the same draw, :math:`(\sum_q \sigma_q^{-2})^{-1/2}`.

    Args:
        noises: standard deviations over the L2 norm that one unit can contribute.

    Returns:
        None of none.

    Example:
        >>> noise_of_all([3.0, 4.0])
        2.4
    """
    found = [noise**-2 for noise in noises]
    return sum(found) ** -0.5 if found else None


def _short(value: float) -> str:
    return "infinite" if value == math.inf else f"{value:.3g}"
