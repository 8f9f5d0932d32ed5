"""The strongest membership attack at hand: reference models on random halves of the training data."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch.utils.data import Subset

from lightning_guard.evaluation import Evidence, Subject
from lightning_guard.evaluation.base import Curve
from lightning_guard.evaluation.privacy import GRID, attack_evidence, scores_of
from lightning_guard.functional.membership import offline_lira, roc
from lightning_guard.functional.privacy import everyone, largest_rate, population, refilled
from lightning_guard.functional.random import stream
from lightning_guard.guard import guards_of
from lightning_guard.report.runs import batch_of

_AT_ONCE = 512


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

    Args:
        module: makes the model; called after the seed is set.
        data: makes the data.
        callbacks: the guards, and whatever else trains with them; copied for every model.
        trainer: options of the Trainer.
        models: how many, even, at least 6. The attack grows stronger with more; it is 64 and more in the literature.
        seed: decides the halves, and with the number of the model how it trains.

    Returns:
        Figures ``privacy/lira_auc``, ``privacy/lira_at_1``, ``privacy/lira_at_01``, the same of the plain loss attack
        on the same models, and both ROC curves. Rates are means over the models; their intervals are those of a single
        one, which is wide of the mark on the safe side. Beside a guard that claims epsilon also what the claim
        allows; it is of a model on half of the rows.

    Raises:
        ValueError: if ``models`` is odd or too small, or the training data are not rows of one loader.

    Reference:
        Carlini et al., Membership Inference Attacks From First Principles, 2022, arXiv:2112.03570.

    Example::

        reference_attack(Net, Data, [DPSGD(target_epsilon=3.0, delta=1e-5)], {"max_epochs": 5}, models=16)
    """
    if models < 6 or models % 2:
        raise ValueError(f"models={models} must be even and at least 6: a row needs two others that left it out")
    scores: list[NDArray[np.float64]] = []
    members: list[NDArray[np.bool_]] = []
    claims: list[tuple[float, float]] = []
    for number in range(models):
        found = _trained(module, data, callbacks, dict(trainer or {}), seed, number)
        scores.append(found[0])
        members.append(found[1])
        claims = found[2]
    return _evidence(np.stack(scores), np.stack(members), claims)


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


def _trained(
    make: Callable[[], pl.LightningModule],
    data: Callable[[], pl.LightningDataModule],
    callbacks: Sequence[pl.Callback],
    options: dict[str, Any],
    seed: int,
    number: int,
) -> tuple[NDArray[np.float64], NDArray[np.bool_], list[tuple[float, float]]]:
    pl.seed_everything(seed + number, verbose=False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    own = copy.deepcopy([*callbacks, *(options.get("callbacks") or ())])
    trainer = pl.Trainer(**{**quiet, "enable_model_summary": False, **options, "callbacks": own})
    module, source = make(), data()
    with torch.random.fork_rng():
        source.prepare_data()
        source.setup("fit")
        loader = source.train_dataloader()
    loader = loader[0] if isinstance(loader, list) and len(loader) == 1 else loader
    inside = halves(int(population(loader)), seed, number)  # type: ignore[arg-type]  # an int without users
    rows = np.flatnonzero(inside).tolist()

    def half() -> Any:
        given: Any = type(source).train_dataloader(source)
        given = given[0] if isinstance(given, list) else given
        return refilled(given, Subset(given.dataset, rows))

    source.train_dataloader = half  # type: ignore[method-assign]  # of an object that is ours
    batch = batch_of(trainer, module)
    trainer.fit(module, datamodule=source)
    claims = [tuple(c) for guard in guards_of(trainer, module) for c in guard.privacy().get("claims", ())]
    return scores_of(Subject(module, everyone(loader, _AT_ONCE), batch)), inside, claims


def _evidence(
    scores: NDArray[np.float64], members: NDArray[np.bool_], claims: Sequence[tuple[float, float]]
) -> Evidence:
    models = len(scores)
    found = {"lira": offline_lira(scores, members), "loss": scores}
    evidence = Evidence()
    for key, one in found.items():
        told = np.isfinite(one)
        mine, theirs = one[members & told], one[~members & told]
        evidence |= attack_evidence(key, mine, theirs, models)
        grid = [float(x) for x in GRID if x * len(theirs) >= 1]
        label = "Members found at each rate of false alarms"
        about = f"Over {models} models, each trained on a half of {scores.shape[1]} rows, by {key}."
        rates = [float(y) for y in roc(mine, theirs, np.array(grid))]
        names = (label, "False alarms", "Members found", about, "fraction", "fraction")
        evidence.curves[f"privacy/{key}_roc"] = Curve(grid, rates, *names)
        if claims:
            most = [largest_rate(claims, x) for x in grid]
            about = "Of a model trained on half of the rows."
            names = ("The most that the claim allows", "False alarms", "Members found", about, "fraction", "fraction")
            evidence.curves["privacy/allowed"] = Curve(grid, most, *names)
    return evidence
