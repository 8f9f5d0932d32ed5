"""What a report says of groups beside its figures: who is in the data, and what changed on the same examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_guard.report.summary import baseline
from lightning_guard.report.units import change, count, shown
from lightning_guard.report.view import between


class Listing(NamedTuple):
    """A plain table: its heads, and rows of a name and cells, each a text and a smaller one."""

    heads: list[str]
    rows: list[tuple[str, list[tuple[str, str]]]]

    @property
    def texts(self) -> list[list[str]]:
        """The rows where there is one size of letters."""
        return [[name, *(text + f" ({small})" * bool(small) for text, small in cells)] for name, cells in self.rows]


class Data(NamedTuple):
    """What is known of the training data before anything is trained: tables, what they mean, and notes."""

    tables: list[Listing]
    about: list[str]
    notes: list[str]


class Change(NamedTuple):
    """How one gap of one arm differs from the baseline's on the same examples."""

    arm: str
    difference: str
    span: str
    surety: str
    seeds: str
    tone: str


def data(document: Mapping[str, Any]) -> Data | None:
    """Returns the section on the data, if they were looked at."""
    section = document.get("data")
    if not section:
        return None
    tables, about = [], []
    if section["figures"]:
        rows = [
            (item["label"], [(shown(item["value"], item["unit"]), _span(item)), (item["about"], "")])
            for item in section["figures"]
        ]
        tables.append(Listing(["All examples", "", ""], rows))
    alike: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for bars in section["bars"]:
        alike.setdefault(tuple(bars["categories"]), []).append(bars)
    for categories, columns in alike.items():
        rows = [
            (name, [(shown(bars["values"][i], bars["y_unit"]), "") for bars in columns])
            for i, name in enumerate(categories)
        ]
        head = "Column" if all(bars["key"].startswith("drift/") for bars in columns) else "Group"
        tables.append(Listing([head, *(bars["y_label"] or bars["label"] for bars in columns)], rows))
        about += [f"{bars['y_label'] or bars['label']}: {bars['about']}" for bars in columns if bars["about"]]
    return Data(tables, about, section["notes"])


def changes(document: Mapping[str, Any]) -> dict[str, list[Change | None]]:
    """Returns by the label of each gap what every guarded arm changes of it, None where that is not known."""
    found = {(entry["figure"], entry["arm"]): entry for entry in document.get("changes", ())}
    arms = [arm["name"] for arm in document["arms"] if not arm["baseline"]]
    return {
        document["figures"][key]["label"]: [
            _change(entry) if (entry := found.get((key, arm))) else None for arm in arms
        ]
        for key in dict.fromkeys(entry["figure"] for entry in document.get("changes", ()))
    }


def matched(document: Mapping[str, Any]) -> Listing | None:
    """Returns what each guarded arm gets right that the baseline does not, on the same examples, and the reverse."""
    entries = document.get("matched", ())
    if not entries:
        return None
    reference = baseline(document)
    rows = [
        (
            entry["arm"],
            [
                (
                    change(entry["difference"], "fraction"),
                    between(*(change(end, "fraction") for end in entry["interval"])),
                ),
                (", ".join(f"{one['gained']:,}" for one in entry["seeds"]), ""),
                (", ".join(f"{one['lost']:,}" for one in entry["seeds"]), ""),
                (", ".join(_p(one["p"]).removeprefix("p ").removeprefix("= ") for one in entry["seeds"]), ""),
            ],
        )
        for entry in entries
    ]
    heads = ["Accuracy on the same examples", f"Minus {reference}", "Only this arm right", f"Only {reference} right"]
    return Listing([*heads, "McNemar p"], rows)


def matched_reading(document: Mapping[str, Any]) -> str:
    """Returns how to read that table."""
    examples = max(entry["examples"] for entry in document["matched"])
    return (
        f"On {count(examples, 'test example')}. The difference is the mean over seeds with its 95% interval over the "
        "examples (Bonett and Price); counts and p-values (McNemar, mid-p, not corrected) are of each seed in turn. "
        "They say whether these trained models differ, not whether other seeds would."
    )


def reading(document: Mapping[str, Any]) -> str:
    """Returns how to read the table of changes."""
    mean = " Differences are means over seeds." if len(document["provenance"]["seeds"]) > 1 else ""
    return (
        f"Each arm minus {baseline(document)}, which decide about the same test examples; these are drawn again, the "
        f"same ones for both and in all seeds (paired bootstrap).{mean} Intervals (95%) and p-values are of the choice "
        "of examples: they say whether these models differ, not whether other seeds of training would. p-values are "
        "not corrected for their number."
    )


def _span(item: Mapping[str, Any]) -> str:
    ends = item["interval"]
    return between(*(shown(end, item["unit"]) for end in ends)) if ends else ""


def _change(entry: Mapping[str, Any]) -> Change:
    low, high = entry["interval"]
    p = _p(entry["p"])
    seeds = f"narrower in {entry['narrower']} of {count(entry['n'], 'seed')}" if entry["n"] > 1 else ""
    tone = "good" if high < 0 else "bad" if low > 0 else "plain"
    span = between(change(low, "fraction"), change(high, "fraction"))
    return Change(entry["arm"], change(entry["difference"], "fraction"), span, p, seeds, tone)


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}".rstrip("0").rstrip(".")
