"""What is known of the training data before anything is trained."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lightning_guard.evaluation import Evidence, Subject, describe_groups
from lightning_guard.recipe import RecipeError
from lightning_guard.report.runs import ArmRun, Parts, batch_of


def described(run: ArmRun, parts: Parts, place: Path) -> dict[str, Any] | None:
    """Returns the section ``data`` of a report, from one pass through the training data of an arm.

    What was found is kept in ``data.json``.

    Args:
        run: of the baseline; its fingerprint decides whether what was kept still holds.
        parts: trainer, model and data of the baseline, freshly built. A data module may state ``population``, the
            share of each group by name in the population that the data should stand for.
        place: the folder of the comparison.

    | case                                       | result                           |
    |--------------------------------------------|----------------------------------|
    | the batches have no group                  | nothing of groups, and one batch is read |
    | several training loaders                   | None                             |
    | drift is asked for                         | what :class:`~lightning_guard.evaluation.Drift` finds, too |
    | neither                                    | None                             |
    | a ``population`` that does not fit         | a RecipeError, before training   |
    """
    path = place / "data.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    if kept.get("fingerprint") != run.fingerprint:
        kept = {"fingerprint": run.fingerprint, "data": _described(run, parts)}
        place.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(kept, indent=1))
    section: dict[str, Any] | None = kept["data"]
    return section


def _described(run: ArmRun, parts: Parts) -> dict[str, Any] | None:
    trainer, module, data = parts
    judge = next((judge for judge in run.judges if judge.name == "fairness"), None)
    options: dict[str, Any] = {
        "batch": batch_of(trainer, module),
        "min_support": getattr(judge, "min_support", 30),
        **{name: getattr(data, name, None) or None for name in ("group_names", "class_names", "attribute_names")},
    }
    with torch.random.fork_rng():  # a loader that shuffles takes nothing from the runs
        data.prepare_data()
        data.setup("fit")
        loader = data.train_dataloader()
        loader = loader[0] if isinstance(loader, list) and len(loader) == 1 else loader
        if isinstance(loader, Mapping | list):
            return None
        found = Evidence()
        if describe_groups(list(islice(loader, 1)), **options).figures:
            try:
                found = describe_groups(loader, **options, population=getattr(data, "population", None))
            except ValueError as error:
                raise RecipeError(f"data: {error}") from error
        data.setup("test")
        tested = data.test_dataloader()
        tested = tested[0] if isinstance(tested, list) else tested
        subject = Subject(
            module, tested, **_spoken(options), train=loader, feature_names=getattr(data, "feature_names", None)
        )
        for judge in run.judges:
            if getattr(judge, "once", False):
                found |= judge.evaluate(subject)
        if found == Evidence():
            return None
    return {
        "figures": [
            {"key": key, **asdict(figure), "interval": found.intervals.get(key)}
            for key, figure in found.figures.items()
        ],
        "bars": [{"key": key, **asdict(bars)} for key, bars in found.bars.items()],
        "notes": found.notes,
    }


def _spoken(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "min_support"}
