"""The strongest membership attack at hand: reference models on random halves of the training data."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from pytorch_lightning.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, Subset

from lightning_guard.evaluation import Evidence, Subject
from lightning_guard.evaluation.base import Bars, Curve
from lightning_guard.evaluation.families import families, some
from lightning_guard.evaluation.privacy import GRID, NAMES, attack_evidence, beyond, scores_of
from lightning_guard.evaluation.rows import row_marks
from lightning_guard.functional.membership import Vector, area, offline_lira, roc
from lightning_guard.functional.privacy import everyone, largest_rate, population, refilled
from lightning_guard.functional.random import stream
from lightning_guard.guard import guards_of
from lightning_guard.report.members import partly, trained_on
from lightning_guard.report.predictions import NAMES as NAMED
from lightning_guard.report.runs import Parts, batch_of

FEWEST = 6
_AT_ONCE = 512
_MOST_CLASSES = 50  # that have a bar of their own


class Half(NamedTuple):
    """What one model, trained on a random half of the rows, knows of each of them.

    Args:
        scores: of every row ``(rows,)``, NaN for rows that occur more than once: a copy may be in and out.
        members: which rows it was trained on ``(rows,)``.
        claims: what the training claims, pairs of epsilon and delta ``(pairs, 2)``.
        target: the class of each row ``(rows,)``, or empty where they have none.
        group: the groups of each row ``(rows,)`` or ``(rows, attributes)``, or empty.
        about: how many rows are ``copies``, the names of groups and classes, and ``why`` it is no model to be attacked,
            if it is none.
    """

    scores: Vector
    members: NDArray[np.bool_]
    claims: Vector
    target: NDArray[np.int64]
    group: NDArray[np.int64]
    about: dict[str, Any]


def reference_attack(
    module: Callable[[], pl.LightningModule],
    data: Callable[[], pl.LightningDataModule],
    callbacks: Sequence[pl.Callback] = (),
    trainer: Mapping[str, Any] | None = None,
    models: int = 8,
    seed: int = 0,
) -> Evidence:
    r"""Attacks this way of training by offline LiRA: each of several models in turn, with the help of the others.

    Every model is trained on a random half of the training rows, so that every row is known to exactly half of the
    models, members and non-members are of one kind, and there are as many of the ones as of the others. What is judged
    is the recipe, not one finished model: a model trained on all rows knows each of them a little less well.
    ``compare(..., lira=8)`` does it for every arm of a comparison.

    Args:
        module: makes the model; called after the seed is set.
        data: makes the data.
        callbacks: the guards, and whatever else trains with them; copied for every model.
        trainer: options of the Trainer.
        models: how many, even, at least 6. The attack grows stronger with more; it is 64 and more in the literature.
        seed: decides the halves, and with the number of the model how it trains.

    Returns:
        Figures ``privacy/lira_auc``, ``privacy/lira_at_1``, ``privacy/lira_at_01``, the same of the plain loss attack
        on the same models, both ROC curves, and LiRA by group and class. Rates are means over the models; their
        intervals are those of a single one, which is wide of the mark on the safe side. Beside a guard that claims
        epsilon also what the claim allows; it is of a model on half of the rows.

    Raises:
        ValueError: if ``models`` is odd or too small, or the training data are not rows of one loader, all of which
            are trained on.

    Reference:
        Carlini et al., Membership Inference Attacks From First Principles, 2022, arXiv:2112.03570.

    Example::

        reference_attack(Net, Data, [DPSGD(target_epsilon=3.0, delta=1e-5)], {"max_epochs": 5}, models=16)
    """
    if problem := too_few(models):
        raise ValueError(f"models={problem}")
    options = dict(trainer or {})

    def build(added: list[pl.Callback]) -> Parts:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        own = [*copy.deepcopy([*callbacks, *(options.get("callbacks") or ())]), *added]
        made = pl.Trainer(**{**quiet, "enable_model_summary": False, **options, "callbacks": own})
        return made, module(), data()

    if reason := partly(build([])[0]):
        raise ValueError(f"{reason}; train on all of them")
    found = [trained(build, seed, number) for number in range(models)]
    if reason := next((half.about["why"] for half in found if half.about["why"]), ""):
        raise ValueError(reason)
    return evidence(found, ("lira", "loss"))


def too_few(models: int) -> str:
    """Why this many models are none to attack with; nothing if they are enough.

    >>> too_few(7), too_few(8)
    ('7 must be even and at least 6: a row needs two others that left it out', '')
    """
    wrong = models < FEWEST or models % 2
    return f"{models} must be even and at least {FEWEST}: a row needs two others that left it out" if wrong else ""


def halves(rows: int, seed: int, number: int) -> NDArray[np.bool_]:
    """Which rows a model is trained on: models 0 and 1 share out all rows, 2 and 3 again, and so on.

    Example:
        >>> bool((halves(10, 0, 4) ^ halves(10, 0, 5)).all()), int(halves(10, 0, 4).sum())
        (True, 5)
    """
    order = torch.randperm(rows, generator=stream(seed, number // 2)).numpy()
    inside = np.zeros(rows, dtype=bool)
    inside[order[: rows // 2] if number % 2 == 0 else order[rows // 2 :]] = True
    return inside


def loader_of(data: Any, seed: int) -> DataLoader:
    """The training loader of a data module, which leaves every generator as it was.

    Raises:
        ValueError: if it does not draw whole rows of one data set, each once an epoch.
    """
    with isolate_rng():
        pl.seed_everything(seed, verbose=False)  # who splits by the global generator splits alike for every model
        data.prepare_data()
        data.setup("fit")
        loader = _single(data.train_dataloader())
    population(loader)
    return loader


def trained(
    build: Callable[[list[pl.Callback]], Parts], seed: int, number: int, callbacks: Sequence[pl.Callback] = ()
) -> Half:
    """Trains one model on its half of the rows, and asks it about all of them.

    Args:
        build: makes fresh trainer, module and data, with these callbacks beside its own.
        seed: decides the halves, and with the number of the model how it trains.
        number: of the model.
        callbacks: what else looks on.
    """
    pl.seed_everything(seed + number, verbose=False)
    trainer, module, data = build(list(callbacks))
    loader, whole = loader_of(data, seed), data.train_dataloader
    inside = halves(len(loader.dataset), seed, number)  # type: ignore[arg-type]  # has a length, or was refused
    rows = Subset(loader.dataset, np.flatnonzero(inside).tolist())  # of those that are judged, whatever setup does next
    data.train_dataloader = lambda: refilled(_single(whole()), rows)  # type: ignore[method-assign]  # an object of ours
    batch = batch_of(trainer, module)
    trainer.fit(module, datamodule=data)
    names: dict[str, Any] = {name: getattr(data, name, None) for name in NAMED}
    subject = Subject(module, everyone(loader, _AT_ONCE), batch, **names)
    seen = trained_on(trainer, data)
    why = seen if isinstance(seen, str) else subject.problem
    scores = np.full(len(inside), np.nan) if why else scores_of(subject)
    marks = None if why else row_marks(subject)
    if marks is not None:
        _, places, counts = np.unique(marks, return_inverse=True, return_counts=True)
        scores[counts[places] > 1] = np.nan
    copies = 0 if marks is None else int((counts[places] > 1).sum())
    target, group = subject.outputs.target, subject.outputs.group
    classed = not why and subject.kind in ("binary", "multiclass") and target is not None and target.dim() == 1
    claims = [tuple(claim) for guard in guards_of(trainer, module) for claim in guard.privacy().get("claims", ())]
    return Half(
        scores,
        inside,
        np.array(claims, dtype=np.float64).reshape(-1, 2),
        np.asarray(target if classed else (), dtype=np.int64),
        np.asarray(group if group is not None else (), dtype=np.int64),
        {"why": why, "copies": copies, **names},
    )


def evidence(found: Sequence[Half], attacks: Sequence[str] = ("lira",), min_support: int = 30) -> Evidence:
    """Attacks each of several models with the help of the others; see :func:`reference_attack`."""
    scores, members = (np.stack([getattr(half, name) for half in found]) for name in ("scores", "members"))
    claims = [half.claims.tolist() for half in found]
    models, rows = scores.shape
    result = Evidence()
    if copies := found[0].about["copies"]:
        result.notes.append(
            f"{copies} of {rows} rows occur more than once and are left out of the attack: a copy may be in and out."
        )
    if any(len(half.target) != len(found[0].target) or (half.target != found[0].target).any() for half in found):
        return Evidence(notes=["No LiRA was made: the data module gives other rows each time."])
    if broken := int((~np.isfinite(scores)).sum()) - models * copies:
        result.notes.append(f"{broken} of {scores.size} outputs are not numbers and are left out of the attack.")
    for key in attacks:
        one = offline_lira(scores, members) if key == "lira" else scores
        told = np.isfinite(one)
        mine, theirs = one[members & told], one[~members & told]
        if min(len(mine), len(theirs)) < 2 * models:
            return Evidence(notes=[*result.notes, "No LiRA was made: fewer than two rows of a kind are left."])
        result |= attack_evidence(key, mine, theirs, models)
        grid = [float(x) for x in GRID if x * len(theirs) >= 1]
        about = f"Over {models} models, each trained on a half of {rows} rows, by the attack {NAMES[key]}."
        rates = [float(y) for y in roc(mine, theirs, np.array(grid))]
        names = ("False alarms", "Members found", about, "fraction", "fraction")
        label = "Members found at each rate of false alarms" + ", by LiRA" * (key == "lira")
        result.curves[f"privacy/{key}_roc"] = Curve(grid, rates, label, *names)
        if all(claims):
            most = [max(largest_rate(pairs, x) for pairs in claims) for x in grid]
            names = ("False alarms", "Members found", "Of a model trained on half of the rows.", "fraction", "fraction")
            result.curves["privacy/allowed"] = Curve(grid, most, "The most that the claim allows", *names)
            result.notes += beyond({key: (mine, theirs)}, claims, models)
        if key == "lira":
            result |= _parts(one, members & told, ~members & told, found[0], min_support)
    return result


def _parts(
    scores: Vector, members: NDArray[np.bool_], others: NDArray[np.bool_], of: Half, min_support: int
) -> Evidence:
    """The same attack on each group and class: a mean hides who is told apart most easily."""
    parts: list[tuple[str, str, list[tuple[str, Any]]]] = []
    names = of.about["group_names"], of.about["attribute_names"]
    kin = families(torch.from_numpy(of.group), *names) if of.group.size else []
    for number, family in enumerate(kin):
        suffix, label = (f"_{number}", f"LiRA on {family.name}") if len(kin) > 1 else ("", "LiRA by group")
        rows = [(name, family.group.numpy() == i) for i, name in enumerate(family.names)]
        parts.append((f"lira_auc_by_group{suffix}", label, rows))
    if of.target.size:
        classes = of.about["class_names"] or ()
        labels = np.unique(of.target)[:_MOST_CLASSES].tolist()
        rows = [(classes[c] if c < len(classes) else f"class {c}", of.target == c) for c in labels]
        parts.append(("lira_auc_by_class", "LiRA by class", rows))
    found, models = Evidence(), len(scores)
    for key, label, rows in parts:
        values: list[float | None] = []
        for _, here in rows:
            mine, theirs = scores[members & here], scores[others & here]
            enough = min(len(mine), len(theirs)) >= min_support * models  # of one model, as with the other attacks
            values.append(area(mine, theirs)[0] if enough else None)
        about = f"How often a trained row of it outscores one that was left out, by the attack {NAMES['lira']}."
        found.bars[f"privacy/{key}"] = Bars([name for name, _ in rows], values, label, "AUC", about, y_unit="ratio")
        if small := [name for (name, _), value in zip(rows, values, strict=True) if value is None]:
            found.notes.append(
                f"{label}: {some(small)} have fewer than {min_support} members or non-members in a model and no figure."
            )
    return found


def _single(loader: Any) -> Any:
    return loader[0] if isinstance(loader, list) and len(loader) == 1 else loader
