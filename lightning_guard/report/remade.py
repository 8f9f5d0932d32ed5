"""One finished run made again: figures from its predictions, predictions from its checkpoint and the data."""

import math
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple
from zipfile import BadZipFile

import torch
from torch import Tensor

from lightning_guard.evaluation import Evidence, Subject
from lightning_guard.evaluation.subject import predicted
from lightning_guard.report.again import kept_tensors, with_weights
from lightning_guard.report.kept import KeptRun, plain_config
from lightning_guard.report.predictions import FILE, NAMES, load, subject_of
from lightning_guard.report.runs import Parts, batch_of

State = Literal["same", "differs", "not recomputed"]
Build = Callable[[str], Parts]
_FROM_OUTPUTS = ("task", "fairness")  # evaluators that ask nothing of the model but its outputs
_SEARCHING = ("robustness", "certificate", "privacy", "explanation")  # those that take long, made again if asked
_MEASURED = ("latency", "seconds", "memory", "energy")  # of a machine at a moment
_LOGITS = 1e-4  # how far logits of one model may be apart on two machines


class Finding(NamedTuple):
    """One thing that was looked at, and in which run."""

    what: str
    state: State
    said: str
    where: str = ""  # the run


def remade(run: KeptRun, build: Build | None, full: bool) -> Iterator[Finding]:
    """One run: figures from its predictions, predictions from its checkpoint and the data, figures of the model."""
    result = run.result() or {}
    left = set(result["figures"])
    try:
        kept = load(run.folder)
        subject = subject_of(run.folder, result["names"])
        decision = kept_tensors(run).get("task/decision")
    except (ValueError, OSError, KeyError, RuntimeError, pickle.UnpicklingError, BadZipFile) as error:
        yield Finding(FILE, "differs", f"it or tensors.pt cannot be read: {type(error).__name__}: {error}")
        return
    if decision is not None and not torch.equal(decision.long(), predicted(kept.logits).long()):
        yield Finding("tensors.pt", "differs", f"its decisions are not those of {FILE}")
    for judge in run.judges:
        if judge.name in _FROM_OUTPUTS:
            yield from _against(f"from {FILE}", judge.evaluate(subject), result, left, 1e-9)
    model, reason = _rebuilt(run, build)
    if model is None:
        yield Finding(FILE, "not recomputed" if reason is not None else "differs", reason or "weights.pt is unreadable")
    else:
        yield _predictions(model, kept.logits, kept.target)
        for judge in run.judges:
            if judge.name not in _FROM_OUTPUTS and (full or judge.name not in _SEARCHING):
                yield from _against("from the checkpoint", judge.evaluate(model), result, left, 1e-6)
    for axis, number in sorted(Counter(key.split("/")[0] for key in left).items()):
        if axis == "cost":
            why = "what training costs is seen once"
        elif model is None:
            why = reason or "weights.pt is unreadable"
        elif axis in _SEARCHING:
            why = "more is needed than the folder holds" if full else "takes long; verify --full does it"
        else:
            why = "of a machine at a moment"
        names = sorted(key.split("/", 1)[1] for key in left if key.split("/")[0] == axis)
        yield Finding(f"{axis} ({number}: {', '.join(names)})", "not recomputed", why)


def _against(
    source: str, again: Evidence, result: Mapping[str, Any], left: set[str], within: float
) -> Iterator[Finding]:
    for key, figure in again.figures.items():
        if any(word in key for word in _MEASURED) or key not in result["figures"]:
            continue
        left.discard(key)
        stated = result["figures"][key]["value"]
        if not alike(stated, figure.value, within):
            yield Finding(key, "differs", f"is stated as {stated} and is {figure.value} {source}")
        elif not alike(result["intervals"].get(key), again.intervals.get(key), within):
            yield Finding(key, "differs", f"its interval is another {source}")
        else:
            yield Finding(key, "same", f"computed again {source}")


def _rebuilt(run: KeptRun, build: Build | None) -> tuple[Subject | None, str | None]:
    """The finished model on the test data, from configuration and checkpoint; or why not, None if it is unreadable."""
    result, path = run.result() or {}, run.folder / "weights.pt"
    try:
        torch.load(path, weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError):
        return None, None
    if plain_config(run.arm.config) is None:
        return None, "the arm was made by Python code, which a folder does not hold"
    if build is None:
        return None, "no checkpoint was used"
    try:
        trainer, module, data = build(run.arm.config)
        stated = result["data"].get("sha256")
        if stated is not None and hasattr(data, "provenance") and data.provenance().get("sha256") != stated:
            return None, "the data are not here: what is here has another hash"
        data.prepare_data()
        data.setup("test")
        loader = data.test_dataloader()
    except Exception as error:  # noqa: BLE001  whatever somebody's model or data raise, it is told
        return None, f"model or data cannot be built here: {type(error).__name__}: {error}"
    loaded = with_weights(trainer, module, path)
    if loaded is None:
        return None, "weights.pt does not fit the model of config.yaml; training may have changed more than weights"
    loader = loader[0] if isinstance(loader, list) else loader
    names = {name: result["names"].get(name) for name in NAMES}
    return Subject(loaded, loader, batch_of(trainer, loaded), **names), ""


def _predictions(model: Subject, logits: Tensor, target: Tensor | None) -> Finding:
    again = model.outputs
    same_rows = target is None or (again.target is not None and torch.equal(again.target, target))
    if again.logits.shape != logits.shape or not same_rows:
        return Finding(FILE, "differs", "holds other examples than the test data")
    apart = float((again.logits.double() - logits.double()).abs().nan_to_num().max())
    scale = max(1.0, float(logits.double().abs().nan_to_num().max()))
    if apart <= _LOGITS * scale and torch.equal(again.logits.isnan(), logits.isnan()):
        return Finding(FILE, "same", "computed again from weights.pt and the data")
    return Finding(FILE, "differs", f"is not what weights.pt answers to the test data: logits up to {apart:.3g} apart")


def alike(one: Any, other: Any, within: float = 1e-12) -> bool:
    """Whether two plain values are the same but for the last digits of their numbers."""
    if isinstance(one, bool) or isinstance(other, bool) or one is None or other is None:
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=within, abs_tol=within) or (one != one and other != other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(alike(one[key], other[key], within) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(lambda a, b: alike(a, b, within), one, other))
    return bool(one == other)
