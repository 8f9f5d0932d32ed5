"""Whether a finished comparison is what it says: every hash, every figure, every drawing, made again and compared."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_guard.report.agreement import with_agreement
from lightning_guard.report.assembly import assembled
from lightning_guard.report.computed import computed
from lightning_guard.report.document import ReportError, clean, load, plain, prepare
from lightning_guard.report.halved import remade_attacks
from lightning_guard.report.kept import KeptRun, kept_runs
from lightning_guard.report.manifest import contents, read_manifest, seal
from lightning_guard.report.matched import matched
from lightning_guard.report.paired import changes
from lightning_guard.report.remade import Build, Finding, alike, remade
from lightning_guard.report.rendered import renderings
from lightning_guard.report.runs import sha256, versions
from lightning_guard.report.sign import signatures
from lightning_guard.report.turned import with_flips

_COMPUTED = ("summary", "checks", "claims", "gates", "fronts")


def verify(folder: Path, build: Build | None = None, full: bool = False, expected: str | None = None) -> list[Finding]:
    """Makes again what a finished comparison says, from the deepest source that there is, and compares.

    Hashes tell a changed file. Where hashes were changed too, figures no longer follow from the predictions; where
    predictions were, they no longer follow from checkpoint and data. Who trains other models and writes everything
    anew is found by no check but a training of one's own.

    Args:
        folder: of the comparison.
        build: makes trainer, model and data from the configuration of an arm; without it no checkpoint is used.
        full: make again what takes long too: attacks, certificates, audits.
        expected: the hash of a signature, or of the folder, that was kept elsewhere.

    Returns:
        What was found, one entry a thing; whatever was not made again is an entry too, with the reason.

    Raises:
        ReportError: if the folder holds no finished comparison.
    """
    place = Path(folder)
    found = [*_hashes(place)]
    try:
        report = load(place / "report.json")
    except ReportError as error:
        return [*found, Finding("report.json", "differs", str(error))]
    found += [*_signed(place, expected), *_computed(report), *_drawn(report, place)]
    try:
        runs = kept_runs(place)
    except (ReportError, KeyError, ValueError, OSError) as error:
        return [*found, Finding("runs", "differs", f"cannot be read: {error}")]
    found += [*_recipes(runs, report), *_told(runs, report, place), *remade_attacks(report, place)]
    for run in runs:
        where = f"{run.arm.name}, seed {run.seed}"
        found += [finding._replace(where=where) for finding in remade(run, build, full)]
    return found


def failed(found: Sequence[Finding]) -> bool:
    """Whether anything differs from what the folder says."""
    return any(finding.state == "differs" for finding in found)


def lines(found: Sequence[Finding]) -> Iterator[str]:
    """Yields what was found for a terminal: what differs, what was not made again, and how much is the same.

    What is said of several runs alike is said once.

    >>> list(lines([Finding("a", "same", "hash"), Finding("cost", "not recomputed", "seen once", "none, seed 0")]))
    ['not recomputed: cost: seen once (none, seed 0)', '1 same, 0 differ, 1 not recomputed']
    """
    for state, heading in (("differs", "DIFFERS"), ("not recomputed", "not recomputed")):
        places: dict[tuple[str, str], list[str]] = {}
        for finding in found:
            if finding.state == state:
                places.setdefault((finding.what, finding.said), []).append(finding.where)
        for (what, said), where in places.items():
            runs = f"{len(where)} runs" if len(where) > 2 else "; ".join(filter(None, where))
            yield clean(f"{heading}: {what}: {said}" + (f" ({runs})" if runs else ""))
    tally = Counter(finding.state for finding in found)
    yield f"{tally['same']} same, {tally['differs']} differ, {tally['not recomputed']} not recomputed"


def _hashes(place: Path) -> Iterator[Finding]:
    stated, there = read_manifest(place), contents(place)
    for kind in ("files", "renderings"):
        for name in sorted(stated[kind].keys() | there[kind].keys()):
            if name not in there[kind]:
                yield Finding(name, "differs", "is missing")
            elif name not in stated[kind]:
                yield Finding(name, "differs", "is not among the files of the comparison")
            else:
                same = stated[kind][name] == there[kind][name]
                yield Finding(
                    name, "same" if same else "differs", "hash" if same else "was changed: its hash is another"
                )


def _signed(place: Path, expected: str | None) -> Iterator[Finding]:
    signed = signatures(place)
    for one in signed:
        said = "holds" if one.holds else "does not hold: the folder, or the signature, was changed since"
        yield Finding(f"signature of {one.name}, {one.time}", "same" if one.holds else "differs", said)
    if expected is not None:
        current = seal(contents(place)["files"])
        known = {current, *(one.sha256 for one in signed if one.holds)}
        same = expected in known
        said = "is that of this folder" if same else f"is none of this folder, whose own is {current}"
        yield Finding(f"the hash {expected[:12]}", "same" if same else "differs", said)


def _computed(report: Mapping[str, Any]) -> Iterator[Finding]:
    again = computed(json.loads(json.dumps(report)))
    for part in _COMPUTED:
        same = alike(report.get(part), again[part])
        said = "computed again from the runs" if same else "does not follow from the runs that it holds"
        yield Finding(f"report.json, {part}", "same" if same else "differs", said)


def _drawn(report: Mapping[str, Any], place: Path) -> Iterator[Finding]:
    stated, here = report["provenance"]["versions"], versions()
    others = sorted(name for name in stated if stated[name] != here.get(name, stated[name]))
    for name, text in renderings(report, place):
        path = place / name
        if not path.exists():
            yield Finding(name, "differs", "is missing")
        elif path.read_bytes() == text.encode():
            yield Finding(name, "same", "drawn again")
        elif others:
            yield Finding(name, "not recomputed", f"was drawn with other versions of {', '.join(others)}")
        else:
            yield Finding(name, "differs", "is not what report.json and the signatures give")


def _recipes(runs: Sequence[KeptRun], report: Mapping[str, Any]) -> Iterator[Finding]:
    arms = {run.arm.name: run.arm for run in runs}
    order = [arms[arm["name"]] for arm in report["arms"] if arm["name"] in arms]
    same = sha256("".join(arm.config for arm in order)) == report["provenance"]["config_sha256"]
    said = "hash of all arms" if same else "are not those that the report names (provenance.config_sha256)"
    yield Finding("configurations of the arms", "same" if same else "differs", said)
    for arm in order:
        for name, digest in arm.recipes.items():
            text = arm.texts.get(name)
            stated = report["provenance"]["recipes"].get(name)
            same = text is not None and sha256(text) == digest == stated
            said = "hash" if same else "is not the recipe that the report names"
            yield Finding(f"recipe {name} of {arm.name}", "same" if same else "differs", said)


def _told(runs: Sequence[KeptRun], report: Mapping[str, Any], place: Path) -> Iterator[Finding]:
    """What the report says of its runs, against the runs themselves; and what is computed of several at once."""
    again = _assembled(runs, report)
    told = {(one["arm"], one["seed"]): one for one in report["runs"]}
    own = {(run.arm.name, run.seed): run.result() or {"figures": {}} for run in runs}
    for part in ("arms", "figures", "curves", "bars"):
        same = alike(again[part], _part(report, part, again[part]))
        said = "as the runs say" if same else "is not what the runs say"
        yield Finding(f"report.json, {part}", "same" if same else "differs", said)
    for key in sorted(told.keys() | again["runs"].keys()):
        what = f"report.json, run of {key[0]}, seed {key[1]}"
        if key not in again["runs"] or key not in told:
            yield Finding(what, "differs", "is in the report or among the runs, and not in both")
            continue
        mine, theirs = again["runs"][key], told[key]
        others = {*theirs["values"]} - {*mine["values"]}
        wrong = [name for name, value in mine["values"].items() if not alike(value, theirs["values"].get(name))]
        wrong += [
            kind
            for kind in ("intervals", "pictures", "curves", "bars", "initial_weights_sha256", "data_order_sha256")
            if not alike(mine[kind], theirs[kind])
        ]
        wrong += ["notes"] if not {*mine["notes"]} <= {*theirs["notes"]} else []
        if wrong:
            yield Finding(what, "differs", f"{', '.join(wrong)}: not what the run's own result says")
        else:
            yield Finding(what, "same", f"{len(mine['values'])} figures as in the run's own result")
            both = sorted({*mine["values"]} - {*own[key]["figures"]})
            if both:
                yield Finding(f"{what}: {', '.join(both)}", "same", "computed again from the decisions of two arms")
        if others:
            yield Finding(what, "not recomputed", f"{', '.join(sorted(others))}: made of several arms at once")
    for part, found in (("changes", changes(runs)), ("matched", matched(runs))):
        if part in report:
            same = alike(report[part], [entry for entry in found if entry["figure"] in report["figures"]])
            said = "computed again from predictions" if same else "does not follow from the predictions"
            yield Finding(f"report.json, {part}", "same" if same else "differs", said)
    if report.get("data"):
        kept = json.loads((place / "data.json").read_text()) if (place / "data.json").exists() else {}
        same = alike(plain(kept.get("data")), report["data"])
        yield Finding(
            "report.json, data", "not recomputed" if same else "differs", "is data.json" + " not" * (not same)
        )
    for part in sorted(report.keys() - {*_COMPUTED, *_KNOWN}):
        if report[part]:
            yield Finding(f"report.json, {part}", "not recomputed", "is covered by its hash alone")


def _assembled(runs: Sequence[KeptRun], report: Mapping[str, Any]) -> dict[str, Any]:
    """The report that the runs give, its runs by arm and seed."""
    arms = list({run.arm.name: run.arm for run in runs}.values())
    made = assembled(arms, report["provenance"]["seeds"], with_agreement(runs, with_flips(runs)), report["title"], None)
    made = prepare(made)
    return {**made, "runs": {(one["arm"], one["seed"]): one for one in made["runs"]}}


def _part(report: Mapping[str, Any], part: str, again: Any) -> Any:
    """A part of a report without what is made of several arms at once, and without the order of display."""
    if part == "arms":
        return report["arms"]
    return {key: {**item, "order": again[key]["order"]} for key, item in report[part].items() if key in again}


_KNOWN = (
    *("schema", "title", "created", "provenance", "arms", "figures", "curves", "bars", "runs", "limits"),
    *("changes", "matched", "data", "accept", "lira"),
)
