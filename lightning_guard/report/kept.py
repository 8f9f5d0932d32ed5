"""Finished runs read back from their folders: by whoever verifies them, and by whoever compares them afterwards."""

import json
import shutil
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from lightning_guard.evaluation import EVALUATORS, Evaluator
from lightning_guard.report import write_report
from lightning_guard.report.document import ReportError, write
from lightning_guard.report.manifest import write_manifest
from lightning_guard.report.runs import Arm, ArmRun, Parts, slug_of


def keep_arms(arms: Sequence[Arm], place: Path) -> None:
    """Writes what each arm is made of beside the runs: its whole configuration, and its recipes in full."""
    for arm in arms:
        folder = place / "arms" / slug_of(arm.name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write(folder / "config.yaml", arm.config)
        about = {"name": arm.name, "recipes": dict(arm.recipes), "sweep": arm.sweep, "trained": arm.given is None}
        write(folder / "arm.json", json.dumps(about, indent=1) + "\n")  # recipes in the order of the report
        for name, text in arm.texts.items():
            write(folder / f"recipe-{slug_of(name)}.yaml", text)


def finish(document: Mapping[str, Any], place: Path, publishable: bool = False) -> Path:
    """Writes the report and, last of all, the manifest of the whole folder."""
    page = write_report(document, place, publishable)
    write_manifest(place)
    return page


class KeptRun(ArmRun):
    """A run of a finished comparison, as its folder tells it.

    Args:
        arm: what is known of the arm.
        folder: of the run.
    """

    def __init__(self, arm: Arm, folder: Path):
        self.arm, self.folder = arm, folder
        self._result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        found = self._result
        self.seed, self.fingerprint = int(found["seed"]), str(found["fingerprint"])
        self.judges = evaluators_of(found.get("evaluators", []))
        self.shares_group = self.resplit = False


def kept_runs(place: Path) -> list[KeptRun]:
    """Every run of a finished comparison, the arms in the order of its report.

    Raises:
        ReportError: if there is none, or a run cannot be read.
    """
    arms: dict[str, Arm] = {}
    for path in sorted((place / "arms").glob("*/arm.json")):
        about = json.loads(path.read_text(encoding="utf-8"))
        config = (path.parent / "config.yaml").read_text(encoding="utf-8")
        texts = {
            name: kept.read_text(encoding="utf-8")
            for name in about["recipes"]
            if (kept := path.parent / f"recipe-{slug_of(name)}.yaml").exists()
        }
        given = None if about["trained"] else _not_here
        arms[about["name"]] = Arm(about["name"], _unbuilt, about["recipes"], config, about["sweep"], texts, given)
    if not arms:
        raise ReportError(f"{place} holds no arms of a finished comparison; give the folder that its report is in")
    named = [arm["name"] for arm in json.loads((place / "report.json").read_text(encoding="utf-8"))["arms"]]
    seeds = {int(path.name.removeprefix("seed-")) for path in (place / "runs").glob("*/seed-*") if path.is_dir()}
    folders = {
        (name, seed): place / "runs" / slug_of(name) / f"seed-{seed}" for seed in sorted(seeds) for name in named
    }
    found = [
        KeptRun(arms[name], folder)
        for (name, _), folder in folders.items()
        if name in arms and (folder / "result.json").exists()
    ]
    if not found:
        raise ReportError(f"{place} holds no finished run; let the comparison end first")
    return found


def evaluators_of(stated: Sequence[Sequence[Any]]) -> list[Evaluator]:
    """The evaluators that judged a run, with those of their options that are plain values.

    Example:
        >>> [judge.bins for judge in evaluators_of([["task", "Task", {"bins": 10}]])]
        [10]
    """
    found = []
    for name, qualname, options in stated:
        cls = EVALUATORS.get(name)
        if cls is not None and cls.__qualname__ == qualname:
            known = signature(cls).parameters
            plain = {key: value for key, value in options.items() if key in known and _is_plain(value)}
            found.append(cls(**plain))
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _unbuilt(callbacks: list[Any]) -> Parts:
    raise ReportError("this arm is read from its folder and cannot be built")


def _not_here(trainer: Any, module: Any, seed: int) -> Any:
    raise ReportError("this arm was not trained in its comparison, and its model is read from its folder")


def plain_config(config: str) -> Mapping[str, Any] | None:
    """The configuration that an arm was built from on the command line; None for an arm that Python code made."""
    import yaml

    try:
        found = yaml.safe_load(config)
    except yaml.YAMLError:
        return None
    return found if isinstance(found, dict) and "model" in found and "trainer" in found else None
