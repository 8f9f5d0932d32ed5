"""What others reach on the data of a comparison, for the figure of a sweep of fairness."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_guard.evaluation import Subject
from lightning_guard.evaluation.references import LABELS, REFERENCES, Reference, Unsuitable
from lightning_guard.evaluation.subject import predicted
from lightning_guard.report.again import kept_tensors, rebuilt
from lightning_guard.report.runs import Arm, ArmRun, batch_of, plain_text, sha256, versions

_BOUNDS = (0.02, 0.05, 0.1)  # where the sweep is of something that is no gap


def references(methods: Sequence[str], runs: Sequence[ArmRun], place: Path, say: Callable[[str], None]) -> Any:
    """The section ``references`` of a report: each method at the bounds of the sweep, on the data of the baseline.

    Post-processing is fitted to the baseline of each seed; what reads the inputs alone is fitted once. What was
    found is kept in ``references.json``.

    Args:
        methods: names among :data:`lightning_guard.evaluation.references.REFERENCES`.
        runs: the finished runs, the baseline's first.
        place: the folder of the comparison.
        say: tells the user what goes on.
    """
    swept = [run for run in runs if swept_fairness(run.arm)]
    first = runs[0].arm.name
    baselines = [run for run in runs if run.arm.name == first and run.result() is not None]
    notions = dict.fromkeys(
        str(guard["options"]["notion"])
        for run in swept
        for guard in (run.result() or {"guards": []})["guards"]
        if guard["name"] == "fairness" and "notion" in guard["options"]
    )
    stated = [one for run in swept for one in swept_fairness(run.arm)]
    gaps = [one["value"] for one in stated if one["key"].endswith(".max_gap")]
    bounds = sorted({float(gap) for gap in gaps if isinstance(gap, int | float)})  # null is none
    notes = [] if bounds else [f"The references are at bounds of {', '.join(map(str, _BOUNDS))}: no sweep states any."]
    bounds = bounds or list(_BOUNDS)
    path = place / "references.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    found: list[dict[str, Any]] = []
    for method in methods:
        # What reads the inputs alone knows no seed.
        for run in baselines if method == "threshold_optimizer" else baselines[:1]:
            for notion in notions:
                mark = sha256(plain_text([method, notion, bounds, run.fingerprint, versions()]))
                if mark not in kept:
                    seed = f", seed {run.seed}" if method == "threshold_optimizer" else ""
                    say(f"{LABELS[method][0]}, {notion.replace('_', ' ')}{seed}")
                    kept[mark] = _found(method, run, notion, bounds)
                    path.write_text(json.dumps(kept, indent=1))
                told = kept[mark]
                if isinstance(told, str):
                    notes += [told] if told not in notes else []
                    continue
                own = {"method": method, "seed": run.seed if method == "threshold_optimizer" else None}
                found += [{**own, **reference} for reference in told]
    used = dict.fromkeys(reference["method"] for reference in found)
    labels = {method: {"label": LABELS[method][0], "about": LABELS[method][1]} for method in used}
    return {"methods": labels, "runs": found, "notes": notes}


def swept_fairness(arm: Arm) -> list[Mapping[str, Any]]:
    """The options of fairness that an arm has a value of a sweep for: ``key`` and ``value`` of each."""
    stated = [] if arm.sweep is None else [arm.sweep, *arm.sweep.get("also", ())]
    return [one for one in stated if one["key"].startswith("guards.fairness.")]


def _found(method: str, run: ArmRun, notion: str, bounds: Sequence[float]) -> Any:
    """What a method reaches, or why it cannot be had."""
    subjects = _subjects(run)
    if subjects is None:
        return "fairlearn's methods are not shown: the trained baseline could not be built again."
    try:
        found: list[Reference] = REFERENCES[method](*subjects, notion, bounds)
    except Unsuitable as error:
        return str(error)
    return [{"bound": one.bound, "values": one.values, "intervals": one.intervals} for one in found]


def _subjects(run: ArmRun) -> tuple[Subject, Subject] | None:
    """The finished model of a run on its training and on its test examples."""
    parts = rebuilt(run)
    if parts is None:
        return None
    trainer, module, data = parts
    data.setup("fit")
    data.setup("test")
    train, test = data.train_dataloader(), data.test_dataloader()
    batch = batch_of(trainer, module)
    subjects = tuple(
        Subject(module, loader[0] if isinstance(loader, list) else loader, batch) for loader in (train, test)
    )
    decision = kept_tensors(run).get("fairness/decision")
    if decision is not None and len(decision) == len(subjects[1].outputs.logits):
        again = predicted(subjects[1].outputs.logits)
        if float((again == decision).double().mean()) < 0.999:
            return None
    return subjects[0], subjects[1]
