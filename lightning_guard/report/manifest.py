"""What a finished comparison consists of: a hash of every file, so that a changed one is noticed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lightning_guard.report.document import ReportError, write

MANIFEST, SIGNATURES = "manifest.json", "signatures.json"
_UNLISTED = (MANIFEST, SIGNATURES)
_SUFFIXES = (".html", ".md", ".csv")  # renderings at the top: made from report.json and signatures, and made again


def contents(folder: Path) -> dict[str, dict[str, str]]:
    """Returns the hash of every file under ``folder`` by its relative name, what is measured apart from what is drawn.

    A rendering is what lies at the top and is made from the rest, such as ``report.html``. A link is listed as what
    it points to, and one that leads out of the folder is refused.

    Raises:
        ReportError: for such a link.
    """
    found: dict[str, dict[str, str]] = {"files": {}, "renderings": {}}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise ReportError(f"{path} is a link that leads out of the folder; put the file itself there")
        if path.is_file() and name not in _UNLISTED and path.name != "claim":
            drawn = name.startswith("public/") or ("/" not in name and path.suffix in _SUFFIXES)
            kind = "renderings" if drawn else "files"
            found[kind][name] = digest(path)
    return found


def write_manifest(folder: Path) -> str:
    """Writes ``manifest.json`` and returns the hash that stands for the folder."""
    found = contents(folder)
    write(folder / MANIFEST, json.dumps({"version": 1, **found}, indent=1, sort_keys=True) + "\n")
    return seal(found["files"])


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest.

    Raises:
        ReportError: if there is none, or it is none of ours.
    """
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReportError(
            f"{folder} has no {MANIFEST}, so it is no folder of a finished comparison; give the one that "
            "`lightning-guard compare` wrote its report to"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ReportError(f"{path} is not JSON ({error}), so nothing in the folder can be verified") from None
    kinds = [found.get(kind) if isinstance(found, dict) else None for kind in ("files", "renderings")]
    if not isinstance(found, dict) or found.get("version") != 1 or not all(isinstance(kind, dict) for kind in kinds):
        raise ReportError(f"{path} has not the form of version 1; use the version that wrote the folder")
    return found


def seal(files: dict[str, str]) -> str:
    """Returns one hash of all hashes: that of the files that hold what was measured, by name.

    >>> seal({"a": "0"}) == seal({"a": "0"}), seal({"a": "0"}) == seal({"b": "0"})
    (True, False)
    """
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def digest(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
