"""Which arms of a comparison combine which others, by their names alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any


def combined(names: Sequence[str], kinds: str) -> dict[str, tuple[str, ...]]:
    """Returns the parts of every combination that is asked for or stated, by the name of its arm, small ones first.

    An arm that is named as a combination, ``private+fair`` beside ``private`` and ``fair``, is that combination. The
    first arm is the baseline and no part.

    >>> combined(["none", "a", "b", "c", "b+a"], "pairs:a")
    {'b+a': ('a', 'b'), 'a+c': ('a', 'c')}

    Raises:
        ValueError: for what cannot be combined, see :func:`subsets`.
    """
    stated = [name for name in names[1:] if "+" in name and set(name.split("+")) <= set(names[1:])]
    parts = [name for name in names[1:] if name not in stated]
    by_parts = {frozenset(name.split("+")): name for name in stated}
    for one in subsets(parts, [kind.strip() for kind in kinds.split(",")]):
        by_parts.setdefault(frozenset(one), "+".join(one))
    found = {name: tuple(part for part in parts if part in one) for one, name in by_parts.items()}
    return dict(sorted(found.items(), key=lambda item: len(item[1])))


def subsets(parts: Sequence[str], kinds: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns what ``--combine`` asks for: ``pairs``, ``triples``, ``all``, or e.g. ``triples:private``.

    After a colon stands a part that all of them hold. Kinds may overlap; each combination is there once.

    >>> subsets(["a", "b", "c"], ["pairs:a", "all"])
    [('a', 'b'), ('a', 'c'), ('a', 'b', 'c')]

    Raises:
        ValueError: for a kind that there is not, a part that is none, or too few parts.
    """
    sizes = {"pairs": 2, "triples": 3, "all": len(parts)}
    found: dict[tuple[str, ...], None] = {}
    for kind in kinds:
        word, _, held = kind.partition(":")
        if word not in sizes:
            raise ValueError(f"{kind!r} is no way to combine; give pairs, triples or all, or e.g. pairs:NAME")
        if held and held not in parts:
            raise ValueError(f"{kind!r} names no arm with safeguards; there are {', '.join(parts) or 'none'}")
        if len(parts) < max(2, sizes[word]):
            raise ValueError(f"{kind!r} needs more arms to combine than {', '.join(parts) or 'none'}; add --arm")
        found |= dict.fromkeys(one for one in combinations(parts, sizes[word]) if not held or held in one)
    return sorted(found, key=len)


def told(
    names: Sequence[str], made_of: Mapping[str, Sequence[str]], refused: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Returns what ``report.json`` holds as ``combinations``; ``refused`` gives the reasons by name."""
    return {
        "parts": [name for name in names[1:] if name not in made_of],
        "arms": [{"arm": name, "parts": list(parts)} for name, parts in made_of.items() if name not in refused],
        "refused": [
            {"parts": list(parts), "reasons": list(refused[name])} for name, parts in made_of.items() if name in refused
        ],
    }
