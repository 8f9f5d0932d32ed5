"""What a report says of safeguards that were on together: the rows of the composition table that applied."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

TONES = {"sound": "good", "sound if": "plain", "not known": "plain", "refused": "bad"}


class Met(NamedTuple):
    """Two safeguards that met in some of the arms. ``tone`` is how the page colours the verdict."""

    together: str
    verdict: str
    tone: str
    why: str
    then: str
    source: str
    arms: list[str]


def lines(rows: Iterable[Mapping[str, str]], width: int = 100) -> Iterator[str]:
    """Yields rows as a table for a terminal of this width.

    >>> row = {"together": "a + b", "verdict": "sound", "why": "they differ", "then": "go on"}
    >>> print(*lines([row], 40), sep=chr(10))
    together  verdict  why, and what then
    a + b     sound    they differ; go on
    """
    table = [("together", "verdict", "why, and what then")]
    table += [(row["together"], row["verdict"], "; ".join(filter(None, (row["why"], row["then"])))) for row in rows]
    first = min(max(len(row[0]) for row in table), max(20, width * 2 // 5))
    second = max(len(row[1]) for row in table)
    rest = max(30, width - first - second - 4)
    for together, verdict, why in table:
        wrapped = _wrapped(together, first), [verdict], _wrapped(why, rest)
        for i in range(max(map(len, wrapped))):
            cells = [column[i] if i < len(column) else "" for column in wrapped]
            yield f"{cells[0]:<{first}}  {cells[1]:<{second}}  {cells[2]}".rstrip()


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False) or [""]


def collected(arms: Mapping[str, Sequence[Mapping[str, str]]]) -> list[dict[str, Any]]:
    """Returns each row once, with the arms that it was found in: what ``report.json`` holds as ``composition``.

    >>> row = {"together": "a + b", "verdict": "sound", "why": "", "then": "", "source": ""}
    >>> [found["arms"] for found in collected({"one": [row], "two": [row]})]
    [['one', 'two']]
    """
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for arm, rows in arms.items():
        for row in rows:
            key = tuple(row[part] for part in ("together", "verdict", "why"))
            found.setdefault(key, {**row, "arms": []})["arms"].append(arm)
    return list(found.values())


def composition(document: Mapping[str, Any]) -> list[Met]:
    """Returns who met whom in which arms, refusals first."""
    order = list(reversed(TONES))
    met = [
        Met(row["together"], row["verdict"], TONES[row["verdict"]], row["why"], row["then"], row["source"], row["arms"])
        for row in document.get("composition", ())
    ]
    return sorted(met, key=lambda row: (order.index(row.verdict), row.together))
