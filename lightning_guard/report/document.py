"""The document behind a report: made plain, checked against its schema, written and read."""

from __future__ import annotations

import json
import os
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping
from datetime import datetime
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from lightning_guard.recipe import RecipeError

VERSION = 1

# Beyond this the differences and squares of two values leave the range of a float.
_LARGEST = 1e300

# Marks that turn the reading direction of everything after them: a name must not rearrange a page.
_DIRECTION_MARKS = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class ReportError(RecipeError):
    """A comparison that cannot be written or read as a report; names every problem at once."""


def clean(text: str) -> str:
    """Returns ``text`` on one line, without characters that XML, CSV or a terminal cannot carry.

    >>> clean("two" + chr(10) + "lines")
    'two lines'
    """

    def keep(character: str) -> str:
        category = unicodedata.category(character)
        if category in ("Cc", "Zl", "Zp"):
            return " "
        if category in ("Cs", "Cn"):
            return "\ufffd"
        return "" if character in _DIRECTION_MARKS else character

    return "".join(map(keep, text))


def prepare(results: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a checked plain copy of ``results``, with one spelling for everything that has several.

    | given                                    | becomes                                               |
    |------------------------------------------|-------------------------------------------------------|
    | tuple                                    | list                                                  |
    | 0-d array or tensor                      | its Python number                                     |
    | NaN                                      | null                                                  |
    | an infinite value of a run               | null, and a note in that run: JSON has no infinity    |
    | NaN or infinity among a guard's options  | "nan", "inf"                                          |
    | control and direction characters         | a space, or nothing                                   |
    | absent intervals, curves, bars, notes, doubts, pictures, matrices | empty                        |
    | figures without ``order``                | numbered as given, because report.json sorts its keys |

    Raises:
        ReportError: with every place where ``results`` is not a version 1 comparison.
    """
    from jsonschema import Draft202012Validator  # 0.1 s that `import lightning_guard.report` need not cost

    document = plain(results)
    problems = [
        f"{_where(error.absolute_path)}: {error.message[:300]}"
        for error in Draft202012Validator(_schema()).iter_errors(document)
    ]
    if not problems:  # what follows can rely on the shape
        _complete(document, results)
        problems = list(_dangling(document))
    if problems:
        raise ReportError("this comparison cannot become a report:\n" + "\n".join(f"  {p}" for p in problems))
    return document


def dump(document: Mapping[str, Any]) -> str:
    """Returns the text of ``report.json``: sorted, indented, and never with NaN or infinity."""
    return json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n"


def load(path: Path) -> dict[str, Any]:
    """Reads and checks a ``report.json``."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReportError(
            f"{path} does not exist; give the folder that `lightning-guard compare` wrote its report to"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ReportError(f"{path} is not JSON ({error}); run the comparison again") from None
    version = document.get("schema") if isinstance(document, dict) else None
    if version != VERSION:
        raise ReportError(
            f"{path} has schema {version!r} and this version reads schema {VERSION}; read it with the version of "
            "lightning-guard named under provenance.versions, or run the comparison again"
        )
    return prepare(document)


def write(path: Path, text: str) -> None:
    """Writes ``text`` to ``path`` so that a reader sees the old file or the new one, never a half."""
    # A temporary folder, not a temporary file: the latter would be readable by its owner only.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        new = Path(folder, path.name)
        with open(new, "w", encoding="utf-8", newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(new, path)


@cache
def _schema() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("schema.json").read_text(encoding="utf-8"))


def _number(value: Any) -> Any:
    # Numbers of NumPy and torch are taken without importing either.
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value


def plain(value: Any, spell: bool = False) -> Any:
    """Copies plain data; ``spell`` keeps numbers that JSON lacks as words (``norm: inf``)."""
    value = _number(value)
    if isinstance(value, Mapping):
        named = {clean(str(key)): plain(item, spell or key == "options") for key, item in value.items()}
        if len(named) < len(value):
            raise ReportError(f"two of these names read the same, give them different ones: {list(value)}")
        return named
    if isinstance(value, list | tuple):
        return [plain(item, spell) for item in value]
    if isinstance(value, str):
        return clean(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float | int):
        return value if abs(value) <= _LARGEST else str(value) if spell else None
    raise ReportError(f"{value!r} is a {type(value).__name__}; a comparison holds plain data only")


def _complete(document: dict[str, Any], results: Mapping[str, Any]) -> None:
    document.setdefault("limits", [])
    for kind in ("figures", "curves", "bars", "matrices"):
        for position, figure in enumerate(document.setdefault(kind, {}).values()):
            figure.setdefault("order", position)
    for run, given in zip(document["runs"], results["runs"], strict=True):
        for key, empty in (
            ("intervals", {}),
            ("curves", {}),
            ("bars", {}),
            ("notes", []),
            ("doubts", {}),
            ("pictures", {}),
        ):
            run.setdefault(key, empty)
        for figure, value in given["values"].items():
            value = _number(value)
            if value is not None and abs(value) > _LARGEST:
                run["notes"].append(f"{clean(str(figure))} was {value} and is shown as not estimable.")


def _where(path: Any) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.lstrip(".") or "comparison"


def _dangling(document: Mapping[str, Any]) -> Iterator[str]:
    """Yields what a schema cannot say: names that nothing declares, lengths that do not match."""
    try:
        datetime.fromisoformat(document["created"].replace("Z", "+00:00"))
    except ValueError as error:
        yield f"created: {error}"
    names = [arm["name"] for arm in document["arms"]]
    yield from (f"arms: {name!r} is there twice" for name in sorted(set(names)) if names.count(name) > 1)
    seen = set()
    for position, run in enumerate(document["runs"]):
        here = f"runs[{position}]"
        yield from _unknown(f"{here}.arm", [run["arm"]], names, "arms")
        if run["seed"] not in document["provenance"]["seeds"]:
            yield f"{here}.seed: {run['seed']} is not in provenance.seeds"
        if (run["arm"], run["seed"]) in seen:
            yield f"{here}: a second run of arm {run['arm']!r} with seed {run['seed']}"
        seen.add((run["arm"], run["seed"]))
        for kind, declared in (
            ("values", "figures"),
            ("intervals", "figures"),
            ("doubts", "figures"),
            ("curves", "curves"),
            ("bars", "bars"),
        ):
            yield from _unknown(f"{here}.{kind}", run[kind], document[declared], declared)
        for key, curve in run["curves"].items():
            if len(curve["x"]) != len(curve["y"]):
                yield f"{here}.curves.{key}: {len(curve['x'])} x and {len(curve['y'])} y"
        for key, heights in run["bars"].items():
            wanted = len(document["bars"].get(key, {}).get("categories", heights))
            if len(heights) != wanted:
                yield f"{here}.bars.{key}: {len(heights)} values for {wanted} categories"

    for position, change in enumerate(document.get("changes", ())):
        yield from _unknown(f"changes[{position}].arm", [change["arm"]], names, "arms")
        yield from _unknown(f"changes[{position}].figure", [change["figure"]], document["figures"], "figures")
    for row in document.get("composition", ()):
        yield from _unknown("composition.arms", row["arms"], names, "arms")
    together = document.get("combinations") or {"parts": [], "arms": [], "refused": []}
    yield from _unknown("combinations.parts", together["parts"], names, "arms")
    yield from _unknown("combinations.arms", [one["arm"] for one in together["arms"]], names, "arms")
    for one in (*together["arms"], *together["refused"]):
        yield from _unknown("combinations", one["parts"], together["parts"], "combinations.parts")
    references = document.get("references") or {"methods": {}, "runs": []}
    for position, run in enumerate(references["runs"]):
        here = f"references.runs[{position}]"
        yield from _unknown(f"{here}.method", [run["method"]], references["methods"], "references.methods")
    for position, bars in enumerate((document.get("data") or {"bars": []})["bars"]):
        if len(bars["values"]) != len(bars["categories"]):
            yield f"data.bars[{position}]: {len(bars['values'])} values for {len(bars['categories'])} categories"
    section = document.get("lira") or {"arms": [], "bars": []}
    wide = {item["key"]: len(item["categories"]) for item in section["bars"]}
    for position, one in enumerate(section["arms"]):
        here = f"lira.arms[{position}]"
        yield from _unknown(f"{here}.arm", [one["arm"]], names, "arms")
        yield from _unknown(f"{here}.bars", one["bars"], wide, "lira.bars")
        for key, heights in one["bars"].items():
            if len(heights) != wide.get(key, len(heights)):
                yield f"{here}.bars.{key}: {len(heights)} values for {wide[key]} categories"
    for key, matrix in document["matrices"].items():
        yield from _unknown(f"matrices.{key}.arms", matrix["arms"], names, "arms")
        sizes = [len(matrix["values"]), *map(len, matrix["values"])]
        if any(size != len(matrix["arms"]) for size in sizes):
            yield f"matrices.{key}: {sizes[0]} rows of {sizes[1:]} values for {len(matrix['arms'])} arms"


def _unknown(where: str, names: Any, declared: Any, place: str) -> Iterator[str]:
    for name in names:
        if name not in declared:
            close = get_close_matches(name, list(declared), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            yield f"{where}: {name!r} is not in {place}{hint}"
