"""Black-box evidence: what fools one arm, tried on every other."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_guard.evaluation import Subject
from lightning_guard.evaluation.robustness import UNDER_ATTACK
from lightning_guard.evaluation.subject import predicted
from lightning_guard.report.again import kept_tensors, rebuilt
from lightning_guard.report.runs import ArmRun, batch_of

_KEYS = ("moved", "target", "standing", "predicted", "inputs")
_NEEDED = {f"robustness/{key}" for key in _KEYS}
_ABOUT = (
    "Accuracy of each arm (columns) on inputs that PGD attacked on each (rows), mean over seeds. Whoever attacks "
    "without seeing the model does it so; if that fools an arm more often than attacks on itself, its own "
    "gradients are masked."
)


def transfer(subjects: Mapping[str, Subject], moved: Mapping[str, Tensor], target: Tensor) -> list[list[float]]:
    """Accuracy of each model on the inputs that were attacked on each: rows made them, columns are judged.

    Example:
        >>> data = [(torch.zeros(1, 1), torch.tensor([1]))]
        >>> subjects = {"a": Subject(torch.nn.Identity(), data), "b": Subject(torch.nn.LeakyReLU(-1.0), data)}
        >>> moved = {"a": torch.tensor([[-1.0]]), "b": torch.tensor([[0.0]])}
        >>> transfer(subjects, moved, torch.tensor([1]))
        [[0.0, 1.0], [0.0, 0.0]]
    """
    shares = {
        name: [_share(_classes(subject, x), target) for x in moved.values()] for name, subject in subjects.items()
    }
    return [[shares[name][row] for name in subjects] for row in range(len(moved))]


def transferred(runs: Sequence[ArmRun]) -> dict[str, Any]:
    """The matrix of a comparison, from the inputs and weights that its runs have kept; notes go into their results.

    Every arm is built anew and gets its weights back. One that then answers otherwise than it did, because something
    besides its weights was changed in training, is left out and a note says so.
    """
    names = list(dict.fromkeys(run.arm.name for run in runs))
    matrices: list[list[list[float | None]]] = []
    for seed in dict.fromkeys(run.seed for run in runs):
        kept = {run.arm.name: (run, found) for run in runs if run.seed == seed and (found := _kept(run)) is not None}
        first = next((found["target"] for _, found in kept.values()), None)
        inputs = next((found["inputs"] for _, found in kept.values()), None)
        kept = {  # other rows, or the same ones normalised otherwise, are no common ground
            name: pair
            for name, pair in kept.items()
            if torch.equal(pair[1]["target"], first) and torch.equal(pair[1]["inputs"], inputs)  # type: ignore[arg-type]
        }
        subjects = {name: subject for name, (run, found) in kept.items() if (subject := _again(run, found)) is not None}
        if len(kept) < 2 or not subjects or first is None:
            continue
        shares = transfer(subjects, {name: parts["moved"] for name, (_, parts) in kept.items()}, first)
        rows: dict[str, dict[str, float]] = {
            name: dict(zip(subjects, row, strict=True)) for name, row in zip(kept, shares, strict=True)
        }
        for name in subjects:
            _tell(name, {other: row[name] for other, row in rows.items() if other != name}, *kept[name])
        matrices.append([[rows[i].get(j) if i in rows else None for j in names] for i in names])
    if not matrices:
        return {}
    return {
        "robustness/transfer": {
            "axis": "robustness",
            "label": "Transferred attacks",
            "row_label": "attacked on ↓",
            "column_label": "judged →",
            "unit": "fraction",
            "about": _ABOUT,
            "arms": names,
            "values": [
                [_mean(matrix[i][j] for matrix in matrices) for j in range(len(names))] for i in range(len(names))
            ],
        }
    }


def _kept(run: ArmRun) -> dict[str, Tensor] | None:
    tensors = kept_tensors(run)
    return {key: tensors[f"robustness/{key}"] for key in _KEYS} if tensors.keys() >= _NEEDED else None


def _again(run: ArmRun, found: Mapping[str, Tensor]) -> Subject | None:
    """The finished model of a run; None if it cannot be had back."""
    parts = rebuilt(run)
    if parts is not None:
        trainer, module, _ = parts
        subject = Subject(module, [(found["moved"], found["target"])], batch=batch_of(trainer, module))
        if _share(_classes(subject, found["moved"]), found["predicted"]) > 0.98:
            return subject
    result = run.result()
    assert result is not None  # else nothing was kept of it
    result["notes"].append("Transferred attacks were not judged here: training changed more than the weights.")
    return None


def _tell(name: str, others: Mapping[str, float], run: ArmRun, found: Mapping[str, Tensor]) -> None:
    """Adds to the result of a run what attacks on other arms do to it."""
    result = run.result()
    assert result is not None  # else nothing was kept of it
    worst = min(others, key=lambda other: others[other])
    result["figures"]["robustness/transfer"] = {
        "value": others[worst],
        "label": "Accuracy under transferred attacks",
        "unit": "fraction",
        "better": "higher",
        "about": f"On {len(found['target'])} inputs attacked on another arm: the lowest of these.",
    }
    own, n = float(found["standing"].double().mean()), len(found["standing"])
    if others[worst] < own - max(0.01, 2 / n):
        said = (
            f"Inputs attacked on {worst} leave {others[worst]:.1%} right, attacks on the model itself {own:.1%}: its "
            "gradients mislead the attack."
        )
        for figure in UNDER_ATTACK & result["figures"].keys():
            result["doubts"].setdefault(figure, []).append(said)
        result["notes"].append(f"Accuracy under attack is doubtful. {said}")


def _classes(subject: Subject, x: Tensor) -> Tensor:
    with subject.still():
        return torch.cat([predicted(subject.forward(part.to(subject.device))).cpu() for part in x.split(250)])


def _share(classes: Tensor, wanted: Tensor) -> float:
    return float((classes == wanted).double().mean())


def _mean(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
