"""Signatures of a finished comparison: who looked at it, when, and at which files exactly.

No keys are involved. A signature binds a name and a note to the hash of every file; it does not prove who wrote the
name, and who can write the folder can write another signature. What makes it binding is a copy of its hash elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from lightning_guard import __version__
from lightning_guard.report.document import ReportError, clean, load, write
from lightning_guard.report.manifest import SIGNATURES, contents, read_manifest, seal, write_manifest

_PARTS = {"name": str, "note": str, "time": str, "version": str, "seal": str, "previous": str, "sha256": str}


class Signature(NamedTuple):
    """One signature as a report shows it. ``holds`` is whether the folder is still what was signed."""

    name: str
    note: str
    time: str
    seal: str
    sha256: str
    holds: bool


def sign(folder: Path, name: str, note: str = "") -> Signature:
    """Adds a signature to ``signatures.json``, draws the report with it, and returns it.

    Args:
        folder: of a finished comparison.
        name: of who signs.
        note: what they have to say.

    Raises:
        ReportError: without a name, or if a file is not the one that the manifest names: what was altered is not
            signed.
    """
    from lightning_guard.report.rendered import renderings

    if not clean(name).strip():
        raise ReportError("--name is empty; give the name of who signs")
    stated, there = read_manifest(folder), contents(folder)
    apart = sorted(
        {file for file, _ in {*stated["files"].items()} ^ {*there["files"].items()}}
        | {file for file, _ in {*stated["renderings"].items()} ^ {*there["renderings"].items()}}
    )
    if apart:
        raise ReportError(
            f"{folder} is not what the comparison left: {', '.join(apart[:5])}{' and more' if len(apart) > 5 else ''}; "
            "`lightning-guard verify` says what differs"
        )
    records = _records(folder)
    record = {
        "name": clean(name).strip(),
        "note": clean(note).strip(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "seal": seal(there["files"]),
        "previous": records[-1]["sha256"] if records else "",
    }
    records.append({**record, "sha256": _hash(record)})
    write(folder / SIGNATURES, json.dumps(records, indent=1, sort_keys=True) + "\n")
    for file, text in renderings(load(folder / "report.json"), folder):
        write(folder / file, text)
    write_manifest(folder)
    return signatures(folder)[-1]


def signatures(folder: Path) -> list[Signature]:
    """Returns the signatures of a folder, none if there are none."""
    records = _records(folder)
    if not records:
        return []
    current, previous, found = seal(contents(folder)["files"]), "", []
    for record in records:
        own = {key: value for key, value in record.items() if key != "sha256"}
        whole = record["sha256"] == _hash(own) and record["previous"] == previous
        previous = record["sha256"]
        name, note, time, mark, sha256 = (record[key] for key in ("name", "note", "time", "seal", "sha256"))
        found.append(Signature(name, note, time, mark, sha256, whole and mark == current))
    return found


def _records(folder: Path) -> list[dict[str, Any]]:
    path = folder / SIGNATURES
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ReportError(f"{path} is not JSON ({error}); put back the file that was signed") from None
    good = isinstance(found, list) and all(
        isinstance(one, dict) and one.keys() == _PARTS.keys() and all(isinstance(one[key], str) for key in _PARTS)
        for one in found
    )
    if not good:
        raise ReportError(f"{path} holds no signatures of the form that this version writes; put back the one signed")
    return list(found)


def _hash(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
