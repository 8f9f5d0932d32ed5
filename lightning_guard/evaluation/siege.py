"""All attacks of one evaluation, the cheap ones first, on what still stands."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Literal

import torch
from torch import Tensor

from lightning_guard.evaluation.autoattack import autoattack
from lightning_guard.evaluation.doubts import Signs, differs, probabilities
from lightning_guard.evaluation.subject import Subject
from lightning_guard.evaluation.survival import (
    Survival,
    Victim,
    survives_ascent,
    survives_noise,
    survives_points,
    without_gradient,
)
from lightning_guard.functional import ThreatModel, example_losses, stream
from lightning_guard.functional.attacks import apgd_pair, fab, search, square

Tier = Literal["pgd", "apgd", "autoattack"]
Attack = Callable[[Victim, Tensor, Tensor, ThreatModel, torch.Generator], Survival]

STEPS = (1, 2, 5, 10, 20, 50)
"""Numbers of gradient steps of the curve over steps."""
PASSES = 10
"""Forward passes a point for a model that draws numbers."""
QUERIES = 2000
"""Of Square where gradients are in doubt."""
PROBES = 100
"""Queries, and examples, of the Square that looks whether gradients are in doubt."""
FEW = 200
"""Examples of the curve over steps."""
DOUBLINGS = 12
"""How often the largest radius is doubled to see accuracy fall to nothing."""


@dataclass
class Chunk:
    """Examples of one batch.

    Args:
        start: place of the first of them.
        x: inputs ``(N, ...)``.
        y: classes ``(N,)``.
        clean: those right as they are.
        standing: those right under every attack so far.
        moved: where each was taken: to a point that fools the model if there is one.
    """

    start: int
    x: Tensor
    y: Tensor
    clean: Tensor
    standing: Tensor
    moved: Tensor

    def take(self, rows: Tensor, found: Survival, all_of_them: bool = False) -> None:
        """Notes what an attack on these rows found; those that still stand are moved only if asked for."""
        moves = self.standing[rows] & (~found.right | all_of_them)
        self.moved[rows[moves]] = found.moved[moves]
        self.standing[rows] &= found.right


class Siege:
    """Attacks examples in order of cost, and looks for signs that the attacks were misled.

    Args:
        subject: the model, standing still.
        batches: inputs and classes.
        threat: what the attacker may do.
        tier: which attacks.
        steps: of each projected gradient ascent.
        restarts: ascents from random points.
        curve: further radii, as multiples of that of the threat.
        seed: of whatever is drawn.

    Attributes:
        chunks: the examples, and where they were taken.
        signs: what was seen on the way.
        names: the attacks that were used, in order.
        standard: of these, the parts of AutoAttack.
        left: which examples ``(N,)`` are right at each radius.
    """

    def __init__(
        self,
        subject: Subject,
        batches: Sequence[tuple[Tensor, Tensor]],
        threat: ThreatModel,
        tier: Tier = "pgd",
        steps: int = 20,
        restarts: int = 1,
        curve: Sequence[float] = (),
        seed: int = 0,
    ):
        self.threat, self.tier, self.steps, self.restarts, self.seed = threat, tier, steps, restarts, seed
        self.signs, self.names, self.standard, self._number = Signs(), list[str](), tuple[str, ...](), 0
        self.victim = self._victim(subject, batches[0][0])
        self.chunks: list[Chunk] = []
        for x, y in batches:
            clean = self.victim.right(x, y)
            start = sum(len(chunk.x) for chunk in self.chunks)
            self.chunks.append(Chunk(start, x, y, clean, clean.clone(), x.detach().clone()))
        self.signs.seen = sum(len(chunk.x) for chunk in self.chunks)
        self.signs.clean = self._count("clean")
        self.through: Victim | None = None  # the model with a way back, where gradients are cut
        self._look()
        self.left: dict[float, list[Tensor]] = {}
        self._run(curve)

    def standing(self) -> Tensor:
        """Which examples ``(N,)`` are right under every attack at the radius of the threat."""
        return torch.cat([chunk.standing for chunk in self.chunks])

    def _run(self, curve: Sequence[float]) -> None:
        if self.signs.blind:
            self._let_through()
        self.signs.steps = self._over_steps()
        if self.through is not None:
            self.signs.remedies["BPDA"] = self.signs.clean - self._count("standing")
        for name, attack in self._ladder():
            fooled = self._storm(name, attack)
            if name == "BPDA":
                self.signs.remedies[name] = self.signs.remedies.get(name, 0) + fooled
        self.signs.noise = self._storm("random points", survives_noise)
        self._probe()
        if self.signs.blind or self.signs.misled:
            self._remedy()
        self._over_radii(curve)
        if self.signs.misled and not self.signs.remedies:
            self._remedy()
            for radius in self.left:
                if radius >= self.threat.eps:  # what falls at a radius falls at every larger one
                    kept = zip(self.left[radius], self.chunks, strict=True)
                    self.left[radius] = [left & chunk.standing for left, chunk in kept]
        self.left[self.threat.eps] = [chunk.standing for chunk in self.chunks]

    # What the model is like ------------------------------------------------------------------------------------

    def _victim(self, subject: Subject, x: Tensor) -> Victim:
        victim = Victim(subject)
        with torch.no_grad():
            first = victim(x)
            self.signs.passes = PASSES if any(differs(first, victim(x)) for _ in range(PASSES)) else 1
        self.signs.probabilities = probabilities(first)
        return Victim(subject, self.signs.passes, logarithm=self.signs.probabilities)

    def _look(self) -> None:
        """Counts examples whose gradients vanish."""
        for chunk in self.chunks:
            if chunk.clean.any():
                x, y = chunk.x[chunk.clean], chunk.y[chunk.clean]
                silent = without_gradient(self.victim, x, y, self.threat)
                self.signs.silent += int(silent.sum())
                if not silent.all():
                    flat = without_gradient(self.victim, x[~silent], y[~silent], self.threat, example_losses)
                    self.signs.saturated += int(flat.sum())

    def _let_through(self) -> None:
        """Finds a way back through rounding and detached tensors, if it leads anywhere."""
        chunk = next(chunk for chunk in self.chunks if chunk.clean.any())
        through = self.victim.behind_walls()
        rows = chunk.clean.nonzero()[:2, 0]
        try:
            silent = without_gradient(through, chunk.x[rows], chunk.y[rows], self.threat)
        except RuntimeError as error:  # a model that relies on what was cut, say by writing in place
            self.signs.blocked = str(error).splitlines()[0].rstrip(".")
            return
        self.through = None if silent.all() else through

    # What is tried ---------------------------------------------------------------------------------------------

    def _ascents(self, victim: Victim | None = None) -> Iterator[Attack]:
        """The first is short: most of what can fall falls at once."""
        for steps, random in [(min(3, self.steps), False), (self.steps, False), *[(self.steps, True)] * self.restarts]:

            def ascent(
                own: Victim,
                x: Tensor,
                y: Tensor,
                threat: ThreatModel,
                draws: torch.Generator,
                steps: int = steps,
                random: bool = random,
            ) -> Survival:
                return survives_ascent(victim or own, x, y, threat, steps, draws if random else None)

            yield ascent

    def _quick(self) -> Iterator[tuple[str, Attack]]:
        """What is tried at every radius."""
        for attack in self._ascents():
            yield "PGD", attack
        if self.through is not None:
            for attack in self._ascents(self.through):
                yield "BPDA", attack
        if self.threat.discrete:
            yield "search", _searches

    def _ladder(self) -> Iterator[tuple[str, Attack]]:
        """What is tried at the radius of the threat."""
        yield from self._quick()
        if self.tier == "apgd":
            yield "APGD-CE and APGD-T", _climbs
            if not self.threat.discrete and self.threat.per == "example":
                yield "FAB", _nears
            yield "Square", _queries(QUERIES)
        if self.tier == "autoattack":
            yield "AutoAttack", self._standard

    def _remedy(self) -> None:
        """What sees more where gradients are in doubt."""
        tried: list[tuple[str, Attack]] = []
        if "BPDA" not in self.names and self.signs.clean:
            self._let_through()
            if self.through is not None:
                tried += [("BPDA", attack) for attack in self._ascents(self.through)]
        if "Square" not in self.names:
            tried.append(("Square", _queries(QUERIES)))
        for name, attack in tried:
            self.signs.remedies[name] = self.signs.remedies.get(name, 0) + self._storm(name, attack)

    def _standard(self, victim: Victim, x: Tensor, y: Tensor, threat: ThreatModel, draws: torch.Generator) -> Survival:
        found = autoattack(
            replace(victim, passes=1),
            x,
            y,
            threat,
            seed=self.seed,
            version="standard" if victim.passes == 1 else "rand",
            parameters=victim.subject.module.parameters(),
        )
        self.standard = found.attacks
        self.signs.warnings = tuple(dict.fromkeys((*self.signs.warnings, *found.warnings)))
        return survives_points(victim, found.moved, x, y, threat)

    # How it is tried -------------------------------------------------------------------------------------------

    def _storm(self, name: str, attack: Attack) -> int:
        """Tries an attack at the radius of the threat on all that stand; returns how many fell."""
        if name not in self.names:
            self.names.append(name)
        self._number += 1
        before = self._count("standing")
        for chunk in self.chunks:
            rows = chunk.standing.nonzero()[:, 0]
            if len(rows):
                found = self._press(attack, chunk, rows, self.threat, self._number)
                chunk.take(rows, found, all_of_them=self._number == 1)
        return before - self._count("standing")

    def _press(self, attack: Attack, chunk: Chunk, rows: Tensor, threat: ThreatModel, number: int) -> Survival:
        draws = stream(self.seed, chunk.start, number, device=chunk.x.device)
        return attack(self.victim, chunk.x[rows], chunk.y[rows], threat, draws)

    def _over_steps(self) -> dict[int, int]:
        """How many of a few examples stand after so many steps, each number tried by itself."""
        left, tried = dict.fromkeys((0, *STEPS), 0), 0
        for chunk in self.chunks:
            rows = chunk.clean.nonzero()[: FEW - tried, 0]
            tried += len(rows)
            left[0] += len(rows)
            for steps in STEPS if len(rows) else ():

                def ascent(
                    own: Victim, x: Tensor, y: Tensor, threat: ThreatModel, _: torch.Generator, steps: int = steps
                ) -> Survival:
                    return survives_ascent(self.through or own, x, y, threat, steps)

                found = self._press(ascent, chunk, rows, self.threat, 0)
                left[steps] += int(found.right.sum())
                chunk.take(rows, found)
        return left

    def _probe(self) -> None:
        """Whether a few queries fool what gradients did not."""
        for chunk in self.chunks:
            rows = chunk.standing.nonzero()[: PROBES - self.signs.probed, 0]
            if len(rows):
                found = self._press(_queries(PROBES), chunk, rows, self.threat, -1)
                self.signs.probed += len(rows)
                self.signs.queried += int((~found.right).sum())
                chunk.take(rows, found)

    def _over_radii(self, curve: Sequence[float]) -> None:
        """Smaller radii are tried on what fell at that of the threat, larger ones on what did not."""
        eps, multiples = self.threat.eps, sorted({1.0, *curve})
        self.left[eps] = [chunk.standing.clone() for chunk in self.chunks]
        weak = [chunk.clean & ~chunk.standing for chunk in self.chunks]
        for multiple in (m for m in multiples if m < 1):
            # Whoever stands at a radius stands at every smaller one.
            weak = self._at(multiple * eps, weak)
            self.left[multiple * eps] = [w | c.standing for w, c in zip(weak, self.chunks, strict=True)]
        strong = self.left[eps]
        for multiple in (m for m in multiples if m > 1):
            strong = self.left[multiple * eps] = self._at(multiple * eps, strong)
        if curve:
            radius, widest = multiples[-1] * eps, self._widest()
            for _ in range(DOUBLINGS):
                if radius >= widest or sum(int(mask.sum()) for mask in strong) <= 0.01 * self.signs.seen:
                    break
                radius = min(2 * radius, widest)
                strong = self.left[radius] = self._at(radius, strong)
            whole = self.threat.mutable is None and not self.threat.immutable and not self.threat.discrete
            free = whole and not self.threat.increasing and not self.threat.decreasing
            self.signs.everything = free and (radius >= widest or radius >= 2**DOUBLINGS * eps)
        self.signs.radii = {r: sum(int(mask.sum()) for mask in masks) for r, masks in self.left.items()}

    def _at(self, radius: float, masks: Sequence[Tensor]) -> list[Tensor]:
        """Which of the examples stand at another radius."""
        threat, result = replace(self.threat, eps=radius), []
        for chunk, mask in zip(self.chunks, masks, strict=True):
            rows = mask.nonzero()[:, 0]
            for number, (_, attack) in enumerate(self._quick()):
                if len(rows):
                    rows = rows[self._press(attack, chunk, rows, threat, number).right]
            result.append(torch.zeros_like(mask).index_fill(0, rows, True))
        return result

    def _widest(self) -> float:
        """The radius at which the bounds alone hold an attacker back."""
        x = self.chunks[0].x[:1]
        low, high = replace(self.threat, increasing=None, decreasing=None).limits(x)
        if low is None or high is None:
            return inf
        scale = self.threat.scale(x)
        span = torch.where(scale > 0, (high - low) / scale.clamp_min(torch.finfo(x.dtype).tiny), 0).expand_as(x)
        order = {"linf": inf, "l2": 2.0, "l1": 1.0}[self.threat.norm]
        return float(torch.linalg.vector_norm(span.double(), order))

    def _count(self, what: Literal["clean", "standing"]) -> int:
        return sum(int(getattr(chunk, what).sum()) for chunk in self.chunks)


def _climbs(victim: Victim, x: Tensor, y: Tensor, threat: ThreatModel, draws: torch.Generator) -> Survival:
    return survives_points(victim, apgd_pair(victim, x, y, threat, generator=draws), x, y, threat)


def _queries(queries: int) -> Attack:
    def attack(victim: Victim, x: Tensor, y: Tensor, threat: ThreatModel, draws: torch.Generator) -> Survival:
        return survives_points(victim, square(victim, x, y, threat, queries=queries, generator=draws), x, y, threat)

    return attack


def _nears(victim: Victim, x: Tensor, y: Tensor, threat: ThreatModel, draws: torch.Generator) -> Survival:
    moved = fab(victim, x, y, threat, generator=draws)
    near = threat.contains(moved, x, threat.rounding(x))  # it looks for the closest point, wherever that is
    moved = torch.where(near.reshape(-1, *[1] * (x.dim() - 1)), moved, threat.project(moved, x))
    return survives_points(victim, moved, x, y, threat)


def _searches(victim: Victim, x: Tensor, y: Tensor, threat: ThreatModel, draws: torch.Generator) -> Survival:
    return survives_points(victim, search(victim, x, y, threat, generator=draws), x, y, threat)
