"""Which promises survive together: the judgement of a run by the rows of :mod:`lightning_guard.rules`."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

from lightning_guard.guard import Guard, Run, Trait, callbacks_of
from lightning_guard.rules import ANY, ASKS_ONCE, RULES, Rule, Setting, Verdict

__all__ = ["RULES", "Finding", "Rule", "Verdict", "findings", "judge", "told", "unnamed"]

_WORST = (Trait.COUPLES_EXAMPLES, Trait.REMEMBERS_DATA)  # of traits that nobody declared
_PLACES = ("rewrite", "on_batch", "on_loss", "on_weights")


class Finding(NamedTuple):
    """What a row says of two guards of a run; ``first`` and ``second`` stand as they do in the row."""

    first: Guard
    second: Guard
    rule: Rule

    @property
    def sides(self) -> list[str]:
        """Both guards with the options that matter, e.g. ``dp_sgd`` and ``fairness (groups=None)``."""
        both = (self.first, self.rule.first_has), (self.second, self.rule.second_has)
        return [
            guard.name + (f" ({', '.join(told)})" if told else "")
            for guard, has in both
            for told in [[f"{one.option}={getattr(guard, one.option, None)!r}" for one in has if one.told]]
        ]


def judge(run: Run) -> Iterator[str]:
    """Every refused pair among the guards and callbacks of a run, with reason and remedy."""
    for found in findings(run.guards):
        if found.rule.verdict is Verdict.REFUSED:
            yield f"{' and '.join(found.sides)}: {found.rule.reason}; {found.rule.remedy}"
    for callback in callbacks_of(run.trainer):
        classes = {cls.__name__ for cls in type(callback).__mro__}
        for rule in RULES:
            refuses = rule.verdict is Verdict.REFUSED and rule.second in classes
            for guard in run.guards if refuses else ():
                if not guard.off and _is(guard, rule.first):
                    yield f"{guard.name} and {type(callback).__name__}: {rule.reason}; {rule.remedy}"


def findings(guards: Iterable[Guard]) -> list[Finding]:
    """What the rows say of each pair of guards that are on; a trait that is not declared is taken for the worst.

    | rows that fit a pair                        | found                                               |
    |---------------------------------------------|-----------------------------------------------------|
    | none                                        | nothing: :func:`unnamed`                            |
    | some of them refuse                         | all that refuse: no other row makes them sound      |
    | several, and none refuses                   | the nearest, which name the most                    |

    Guards are named rather than traits, traits rather than any guard, and settings rather than none.
    """
    return [found for pair in _pairs(guards) for found in _nearest(list(_fitting(*pair)))]


def unnamed(guards: Iterable[Guard]) -> list[tuple[Guard, Guard]]:
    """Pairs of guards that no row speaks of: neither known to be sound nor to break."""
    return [pair for pair in _pairs(guards) if next(_fitting(*pair), None) is None]


def told(guards: Iterable[Guard]) -> list[dict[str, str]]:
    """What becomes of each pair of guards, in the form of :func:`lightning_guard.rules.rows`.

    Pairs that no row speaks of have the verdict ``not known``.
    """
    guards = list(guards)
    rows = [
        {
            "together": " + ".join(found.sides),
            "verdict": found.rule.verdict.value,
            "why": found.rule.reason,
            "then": found.rule.remedy,
            "source": found.rule.source,
        }
        for found in findings(guards)
    ]
    unknown = {"verdict": "not known", "why": "no row of the table speaks of them; each guard checks the run by itself"}
    ask = {"then": "look at what each promises after a training with both", "source": ""}
    rows += [{"together": f"{one.name} + {other.name}", **unknown, **ask} for one, other in unnamed(guards)]
    return sorted(rows, key=lambda row: row["together"])


def _pairs(guards: Iterable[Guard]) -> Iterator[tuple[Guard, Guard]]:
    return combinations(sorted((guard for guard in guards if not guard.off), key=lambda guard: guard.name), 2)


def _fitting(one: Guard, other: Guard) -> Iterator[Finding]:
    for rule in RULES:
        for first, second in ((one, other), (other, one)):
            if _fits(rule, first, rule.first, rule.first_has) and _fits(rule, second, rule.second, rule.second_has):
                yield Finding(first, second, rule)
                break


def _nearest(found: list[Finding]) -> list[Finding]:
    refused = [one for one in found if one.rule.verdict is Verdict.REFUSED]
    return refused or [one for one in found if _near(one) == max(map(_near, found))]


def _near(found: Finding) -> tuple[int, bool]:
    rule = found.rule
    named = (rule.first == found.first.name) + (rule.second == found.second.name)
    return named - (ANY in (rule.first, rule.second)), bool(rule.first_has or rule.second_has)


def _fits(rule: Rule, guard: Guard, word: str, settings: Sequence[Setting]) -> bool:
    # A subclass is refused what its base is refused, and vouched for by rows of its own.
    names = {getattr(cls, "name", "") for cls in type(guard).__mro__} if rule.verdict is Verdict.REFUSED else ()
    return (_is(guard, word) or word in names) and all(setting.holds(guard) for setting in settings)


def _is(guard: Guard, word: str) -> bool:
    if word in _PLACES:
        return guard.overrides(word)
    if word == ASKS_ONCE:
        return any(query.once for query in guard.queries())
    if guard.traits is None and word in _WORST:
        return True
    return word in (ANY, guard.name) or word in (guard.traits or ())
