"""The report as Markdown, for a pull request or a model card."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_guard.report import attacked, composed, front, groups, view
from lightning_guard.report import matrix as together
from lightning_guard.report.summary import baseline
from lightning_guard.report.verdict import answers, certainty, outcome, verdicts

if TYPE_CHECKING:
    from lightning_guard.report.sign import Signature

# Everything that begins markup, HTML, or a link; an underscore inside a word begins nothing.
_MARKUP = re.compile(r"[\\`*\[\]<>|~#]|&(?=#?\w+;)|:(?=//)|(?<![^\W_])_|_(?![^\W_])")


def text(document: Mapping[str, Any], signatures: Sequence[Signature] = ()) -> str:
    """Returns ``report.md``: the same verdicts and tables as the page, without its drawings."""
    lines = [f"# {plain(document['title'])}", "", plain(view.opening(document)), ""]
    lines += [f"> **Note.** {plain(check)}\n" for check in document["checks"]]
    lines += ["## Verdict", ""]
    if document["gates"]:
        asked = [(gate.arm, gate.state, gate.asked, gate.found) for gate in answers(document)]
        lines += [plain(outcome(document)), "", *_table(("Arm", "Answer", "Asked", "Found"), asked), ""]
    for verdict in verdicts(document):
        lines.append(f"- **{plain(verdict.arm)}**: {plain(' '.join(verdict.promises))}")
        lines += [f"  - {plain(told)}" for told in verdict.told]
        for heading, _, items in verdict.findings:
            lines.append(f"  - {plain(heading)}: {plain('; '.join(map(str, items)))}")
        lines.append(f"  - {plain(verdict.tally)}")
    lines += ["", plain(certainty(document)), ""]
    if (data := groups.data(document)) is not None:
        lines += ["## Data", ""]
        for table in data.tables:
            lines += [*_table(table.heads, table.texts), ""]
        lines += [f"- {plain(line)}" for line in [*data.about, *data.notes]]
        lines.append("")
    for section in view.sections(document):
        if section.rows:
            lines += [f"## {plain(section.title)}", "", *_axis(section, document), ""]
            lines += [f"- {plain(row.label)}: {plain(row.about)}" for row in section.rows if row.about]
            lines.append("")
        if section.axis == "task" and (same := groups.matched(document)) is not None:
            lines += [*_table(same.heads, same.texts), "", plain(groups.matched_reading(document)), ""]
        if section.axis == "privacy" and (said := attacked.about(document)):
            lines += [f"## {plain(section.title)}", ""] * (not section.rows)
            lines += [f"**{attacked.TITLE}.** {plain(said[0])}", ""]
            if (listed := attacked.table(document)) is not None:
                lines += [*_table(listed.heads, listed.texts), ""]
            lines += [*(f"- {plain(line)}" for line in said[1:]), ""]
        if section.axis == "fairness" and (changes := groups.changes(document)):
            lines += ["**Change of group gaps on the same examples.** " + plain(groups.reading(document)), ""]
            heads = [arm["name"] for arm in document["arms"] if not arm["baseline"]]
            rows = [(label, *map(_changed, cells)) for label, cells in changes.items()]
            lines += [*_table(("Gap", *heads), rows), ""]
        for one in (one for one in document.get("fronts", ()) if document["figures"][one["x"]]["axis"] == section.axis):
            numbers = front.table(document, one)
            lines += [f"**{plain(front.title_of(document, one))}.** {plain(front.about(document, one))}", ""]
            lines += [
                *_table(numbers.heads, numbers.texts),
                "",
                *(f"- {plain(line)}" for line in front.told(document)),
                "",
            ]
        for matrix in view.matrices(document).get(section.axis, []):
            rows = [(arm, *(text for text, _ in row)) for arm, row in zip(matrix.arms, matrix.cells, strict=True)]
            lines += [f"**{plain(matrix.label)}.** {plain(matrix.about)}", ""]
            lines += [*_table((f"{matrix.row_label} / {matrix.column_label}", *matrix.arms), rows), ""]
    if document.get("combinations"):
        lines += ["## Combinations", "", plain(together.COMPARED), ""]
        lines += [*_table(together.heads(document), together.rows(document)), ""]
        lines += [f"- {plain(name)}, refused: {plain('; '.join(why))}" for name, why in together.refused(document)]
        lines.append("")
    if met := composed.composition(document):
        lines += ["## Composition", ""]
        rows = [(row.together, row.verdict, "; ".join(filter(None, (row.why, row.then))), row.source) for row in met]
        lines += [*_table(("Together", "Verdict", "Why, and what then", "Known from"), rows), ""]
    lines += ["## Arms", ""]
    for arm in document["arms"]:
        lines.append(f"- **{plain(arm['name'])}**" + (" (baseline)" if arm["baseline"] else ""))
        for guard in arm["guards"]:
            options = ", ".join(f"{name} = {view.option(value)}" for name, value in sorted(guard["options"].items()))
            lines.append(f"  - {plain(guard['name'])}: {plain(options or 'defaults')}")
    lines += ["", "## Provenance", ""]
    lines += _table(("", ""), [(label, value) for label, value, _ in view.provenance(document)])
    signed = [
        f"{one.name}, {one.time}: {one.note or 'no note'} ({one.sha256}{'' if one.holds else ', NO LONGER HOLDS'})"
        for one in signatures
    ]
    for heading, lists in (
        ("Signed", signed),
        ("Notes from the runs", [f"{note} ({where})" for note, where in view.notes(document)]),
        ("What this evidence cannot show", document["limits"]),
    ):
        if lists:
            lines += ["", f"## {heading}", "", *(f"- {plain(item)}" for item in lists)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def plain(words: str) -> str:
    """Returns ``words`` so that Markdown shows them and does nothing else.

    >>> plain("<b>*x*</b> dp_sgd")
    '\\\\<b\\\\>\\\\*x\\\\*\\\\</b\\\\> dp_sgd'
    """
    return _MARKUP.sub(lambda match: "\\" + match[0], words)


def _changed(cell: groups.Change | None) -> str:
    return (
        "n/a"
        if cell is None
        else f"{cell.difference} ({', '.join(filter(None, (cell.span, cell.surety, cell.seeds)))})"
    )


def _axis(section: view.Section, document: Mapping[str, Any]) -> list[str]:
    heads = [
        arm["name"] + (" (baseline)" if arm["baseline"] and baseline(document) else "") for arm in document["arms"]
    ]
    rows = []
    for row in section.rows:
        cells = [
            cell.value
            + (f" ({cell.change}, {cell.word})" if cell.change else "")
            + f", {cell.doubt}" * bool(cell.doubt)
            for cell in row.cells
        ]
        rows.append((row.label + (f" ({row.direction})" if row.direction else ""), *cells))
    return _table(("Figure", *heads), rows)


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    heads = tuple(heads)
    return [_row(heads), "|" + "---|" * len(heads), *map(_row, rows)]


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(map(plain, cells)) + " |"
