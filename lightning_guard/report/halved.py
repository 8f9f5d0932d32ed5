"""Offline LiRA in a comparison: models of every arm on halves of the rows, kept like runs, attacked, made again."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pytorch_lightning as pl

from lightning_guard.evaluation import Evaluator, Evidence
from lightning_guard.recipe import RecipeError
from lightning_guard.report.document import plain
from lightning_guard.report.lira import Half, evidence, halves, loader_of, too_few, trained
from lightning_guard.report.members import partly
from lightning_guard.report.remade import Finding, alike
from lightning_guard.report.runs import Arm, ArmRun, Parts, plain_text, sha256, slug_of, versions
from lightning_guard.report.witness import Withholding

FILE = "scores.npz"
_ABOUT = (
    "Not the models above, which know each row a little less well: of every arm {models} models were trained on random "
    "halves of the training rows and attacked, each with the help of the others, so the recipe is judged, on halves. "
    "Rates are means over these models; the range is the 95% interval of a single one."
)
_ARRAYS = ("scores", "members", "claims", "target", "group")
_UNREADABLE = (OSError, ValueError, KeyError, BadZipFile)


class HalfRun(ArmRun):
    """One model of an arm on its half of the rows: trained once, then read from its folder."""

    def __init__(self, arm: Arm, number: int, seed: int, place: Path, shares_group: bool, source: str, resplit: bool):
        self.arm, self.number, self.seed, self.shares_group, self.resplit = arm, number, seed, shares_group, resplit
        self.folder = folder_of(place, arm.name, number)
        parts = [arm.config, source, seed, "lira", number, versions()]
        self.fingerprint = sha256(plain_text([*parts, *["split by seed"] * resplit]))
        self._result: dict[str, Any] | None = None

    @property
    def title(self) -> str:
        return f"{self.arm.name}, LiRA model {self.number + 1}"

    def result(self) -> dict[str, Any] | None:
        """Whether the model was trained and asked, and nothing that decides it has changed since."""
        if self._result is None and (self.folder / FILE).exists():
            try:
                kept = read(self.folder)
            except _UNREADABLE:
                return None
            self._result = {"figures": {}} if kept.about["fingerprint"] == self.fingerprint else None
        return self._result

    def carry_out(self, progress: pl.Callback) -> None:
        def build(callbacks: list[pl.Callback]) -> Parts:
            parts = self.arm.build(callbacks)
            if self.resplit:
                setattr(parts[2], "split_seed", self.seed)  # noqa: B010  a data module need not have one
            return parts

        reading: list[pl.Callback] = [Withholding()] if self.shares_group else []
        found = trained(build, self.seed, self.number, [progress, *reading])
        arrays = {name: getattr(found, name) for name in _ARRAYS}
        about = json.dumps({**found.about, "fingerprint": self.fingerprint})
        part = self.folder / f"{FILE}.part"
        with open(part, "wb") as stream:
            np.savez_compressed(stream, about=np.array(about), **arrays)
        part.replace(self.folder / FILE)  # whole or not at all
        self.unclaim()


def folder_of(place: Path, arm: str, number: int) -> Path:
    """Where a model of an arm keeps what it said."""
    return place / "runs" / slug_of(arm) / f"lira-{number}"


def read(folder: Path) -> Half:
    """Reads what a model said of every row.

    Raises:
        OSError: or another of what a file raises that is none of ours; it may hold no objects.
    """
    with np.load(folder / FILE, allow_pickle=False) as arrays:
        return Half(**{name: arrays[name] for name in _ARRAYS}, about=json.loads(str(arrays["about"])))


def half_runs(
    models: int,
    arms: Sequence[Arm],
    built: Sequence[Parts],
    sources: Sequence[str],
    seed: int,
    place: Path,
    shares_group: bool,
    resplit: bool,
) -> list[HalfRun]:
    """The models on halves that a comparison trains, arm by arm; none of arms that are not trained here.

    Raises:
        RecipeError: if there are too few models, or no arm can be attacked so; with every arm whose rows are not known.
    """
    if problem := too_few(models):
        raise RecipeError(f"lira={problem}; 0 is none")
    problems = []
    for arm, (trainer, _, data) in zip(arms, built, strict=True):
        if arm.given is None and (reason := partly(trainer) or _no_rows(data, seed)):
            problems.append(f"lira={models}: arm {arm.name}: {reason}; train on all rows, or leave out lira")
    if problems:
        raise RecipeError("\n".join(problems))
    own = [(arm, source) for arm, source in zip(arms, sources, strict=True) if arm.given is None]
    if not own:
        raise RecipeError(f"lira={models}: no arm is trained here, so there are no halves; leave out lira")
    return [
        HalfRun(arm, number, seed, place, shares_group, source, resplit)
        for arm, source in own
        for number in range(models)
    ]


def _no_rows(data: Any, seed: int) -> str:
    """Why halves cannot be made of these data; nothing if they can."""
    try:
        loader_of(data, seed)
    except ValueError as error:
        return str(error)
    return ""


def attacked(place: Path, arms: Mapping[str, bool], models: int, seed: int, min_support: int) -> dict[str, Any]:
    """The section ``lira`` of a report, from the scores that are kept.

    Args:
        place: the folder of the comparison.
        arms: by name, whether it is trained here.
        models: of each arm.
        seed: which decided the halves.
        min_support: groups and classes of fewer members or non-members in a model have no figure.
    """
    found: dict[str, Evidence] = {}
    for name, trained_here in arms.items():
        kept = [read(folder_of(place, name, number)) for number in range(models)] if trained_here else []
        why = next((half.about["why"] for half in kept if half.about["why"]), "")
        why = why.rstrip(".") if trained_here else "the model was not trained here"
        found[name] = Evidence(notes=[f"No LiRA was made: {why}."]) if why else evidence(kept, ("lira",), min_support)
    described: dict[str, dict[str, dict[str, Any]]] = {"figures": {}, "curves": {}, "bars": {}}
    drawn = {"figures": ("value",), "curves": ("x", "y"), "bars": ("values", "categories")}
    categories: dict[str, list[str]] = {}
    for kind, values in drawn.items():
        for one in found.values():
            for key, item in getattr(one, kind).items():
                told = {name: value for name, value in asdict(item).items() if name not in values}
                described[kind].setdefault(key, {"key": key, **told})
    for one in found.values():
        for key, bars in one.bars.items():
            known = categories.setdefault(key, [])
            known += [category for category in bars.categories if category not in known]
    for key, item in described["bars"].items():
        item["categories"] = categories[key]
    return {
        "models": models,
        "seed": seed,
        "min_support": min_support,
        "about": _ABOUT.format(models=models),
        **{kind: list(items.values()) for kind, items in described.items()},
        "arms": [
            {
                "arm": name,
                "values": {key: figure.value for key, figure in one.figures.items()},
                "intervals": {key: list(ends) for key, ends in one.intervals.items()},
                "curves": {key: {"x": list(curve.x), "y": list(curve.y)} for key, curve in one.curves.items()},
                "bars": {
                    key: [dict(zip(bars.categories, bars.values, strict=True)).get(name) for name in categories[key]]
                    for key, bars in one.bars.items()
                },
                "notes": one.notes,
            }
            for name, one in found.items()
        ],
    }


def support_of(judges: Sequence[Evaluator]) -> int:
    """How few examples a group may have, as the evaluator of privacy says it."""
    return int(next((getattr(judge, "min_support", 30) for judge in judges if judge.name == "privacy"), 30))


def remade_attacks(report: Mapping[str, Any], place: Path) -> Iterator[Finding]:
    """Makes the attacks of a finished comparison again from the scores that it kept."""
    section = report.get("lira")
    if not section:
        return
    arms = {arm["name"]: arm.get("trained", True) for arm in report["arms"]}
    what = "report.json, lira"
    try:
        for name in (name for name, trained_here in arms.items() if trained_here):
            for number in range(section["models"]):
                members = read(folder_of(place, name, number)).members
                if not np.array_equal(members, halves(len(members), section["seed"], number)):
                    yield Finding(f"{what} of {name}", "differs", f"the rows of model {number} are not its half")
        again = plain(attacked(place, arms, section["models"], section["seed"], section["min_support"]))
    except _UNREADABLE as error:
        yield Finding(what, "differs", f"its scores cannot be read: {type(error).__name__}: {error}")
        return
    same = alike({**again, "arms": []}, {**section, "arms": []})
    said = "as the kept scores say" if same else "is not what the kept scores say"
    yield Finding(what, "same" if same else "differs", said)
    stated = {one["arm"]: one for one in section["arms"]}
    for one in again["arms"]:
        theirs = stated.get(one["arm"], {})
        wrong = [part for part in one if not alike(one[part], theirs.get(part), 1e-9)]
        said = f"{', '.join(wrong)}: not what the kept scores give" if wrong else "computed again from the kept scores"
        yield Finding(f"{what} of {one['arm']}", "differs" if wrong else "same", said)
    yield Finding(what, "not recomputed", "the scores themselves: the models on halves are not kept")
