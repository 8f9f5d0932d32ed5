"""The design of a comparison: every arm trained on the same seeds, judged on every axis, kept when interrupted."""

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from rich.console import Console

from lightning_guard.composition import told
from lightning_guard.evaluation import EVALUATORS, Evaluator
from lightning_guard.evaluation.references import REFERENCES
from lightning_guard.guard import Guard, guards_of
from lightning_guard.recipe import RecipeError, nearest
from lightning_guard.report import load_report
from lightning_guard.report.agreement import with_agreement
from lightning_guard.report.assembly import assembled
from lightning_guard.report.beside import references as beside
from lightning_guard.report.beside import swept_fairness
from lightning_guard.report.combined import told as combined_told
from lightning_guard.report.composed import collected
from lightning_guard.report.described import described
from lightning_guard.report.frames import Comparison
from lightning_guard.report.front import recognised
from lightning_guard.report.gates import asked_of
from lightning_guard.report.given import Given, told_apart
from lightning_guard.report.halved import attacked, half_runs, support_of
from lightning_guard.report.kept import finish, keep_arms
from lightning_guard.report.matched import matched
from lightning_guard.report.paired import changes
from lightning_guard.report.processes import carry_out
from lightning_guard.report.rehearsed import Build, Rehearsable, joined, refusals
from lightning_guard.report.runs import Arm, ArmRun, Parts, card, describe, plain_text, sources_of
from lightning_guard.report.transfer import transferred
from lightning_guard.report.turned import with_flips


def compare(
    module: Callable[[], pl.LightningModule],
    data: Callable[[], pl.LightningDataModule],
    arms: Mapping[str, Sequence[pl.Callback] | Given],
    trainer: Mapping[str, Any] | None = None,
    seeds: int | Iterable[int] = 3,
    evaluators: Sequence[Evaluator] | None = None,
    folder: str | os.PathLike[str] = "comparison",
    title: str = "Guarded and unguarded models",
    references: Sequence[str] = (),
    accept: Mapping[str, Any] | None = None,
    resplit: bool = False,
    lira: int = 0,
    combine: str = "",
) -> dict[str, Any]:
    """Train every arm on the same seeds, initial weights and data order, and write what each gained and cost.

    Args:
        module: makes the model; called after the seed is set, so that arms start from the same weights.
        data: makes the data.
        arms: callbacks by arm; the first arm is the baseline, usually ``{"none": [], ...}``. A model that is not
            trained here is the path of its checkpoint, or a function from a seed to the model; ``{seed}`` in a path
            stands for the seed, and what does not depend on it is judged with the first seed alone.
        trainer: options of the Trainer, the same for all arms.
        seeds: how many, or which.
        evaluators: what to measure; None is every axis there is.
        folder: where the report and the runs go. Finished runs are found there and kept, so an interrupted
            comparison goes on where it stopped.
        title: of the report.
        references: methods of others to stand beside arms that differ in one option of the fairness guard:
            ``threshold_optimizer``, ``exponentiated_gradient``.
        accept: what must hold of every arm but the baseline, by figure: ``{"task/accuracy": {"change": -0.02}}``, see
            docs/comparison.md. What was found is under ``gates``.
        resplit: split the training data into train and validation by seed, where the data module lets that be
            chosen (``split_seed``).
        lira: train so many models of every arm on random halves of the training rows too, even and at least 6, and
            attack them by offline LiRA, see :func:`lightning_guard.report.lira.reference_attack`. What was found is
            under ``lira``; 0 is none.
        combine: also train combinations of the arms after the baseline: ``pairs``, ``triples``, ``all``, or e.g.
            ``pairs,all``; ``pairs:private`` for those with the arm ``private`` in it. Every arm is rehearsed before;
            a combination that is refused is not trained, and the report gives its reasons under ``combinations``.

    Returns:
        The content of ``report.json``; ``report.html``, ``report.md`` and ``metrics.csv`` lie beside it.

    Example::

        compare(Net, Data, {"none": [], "pruned": [MagnitudePruning(0.9)]}, trainer={"max_epochs": 5}, seeds=3)

    Raises:
        ValueError: for arms, seeds, references or combinations that there are not.
        GuardConflict: for an arm that is refused and is no combination.
    """
    options = dict(trainer or {})

    def building(own: Sequence[pl.Callback]) -> Build:
        def build(callbacks: Sequence[pl.Callback], without: tuple[type, ...], changed: Mapping[str, Any]) -> Parts:
            quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
            # Copies: what an EarlyStopping remembers of one run must not stop the next.
            added = [*copy.deepcopy([*own, *(options.get("callbacks") or ())]), *callbacks]
            added = [one for one in added if not isinstance(one, without)]
            return (
                pl.Trainer(**{**quiet, "enable_model_summary": False, **options, **changed, "callbacks": added}),
                module(),
                data(),
            )

        return build

    own, given = told_apart(arms)
    made_of: dict[str, tuple[str, ...]] = {}
    combinations = None
    if combine:
        own, made_of = joined(own, combine, list(given))
        refused = refusals({name: Rehearsable(building(one), options) for name, one in own.items()}, made_of)
        combinations = combined_told(list(own), made_of, refused)
        own = {name: callbacks for name, callbacks in own.items() if name not in refused}
    described = {
        name: describe(callbacks) + (given[name].marks if name in given else []) for name, callbacks in own.items()
    }
    model = module()
    common = [
        str(model),
        dict(model.hparams),
        dict(data().hparams),
        {k: v for k, v in options.items() if k != "callbacks"},
        describe(options.get("callbacks") or ()),
    ]
    compare_arms(
        [
            Arm(name, _lone(building(callbacks)), {}, plain_text([common, described[name]]), given=given.get(name))
            for name, callbacks in own.items()
        ],
        range(seeds) if isinstance(seeds, int) else seeds,
        evaluators,
        folder,
        title,
        references=references,
        accept={name: accept or {} for name in list(own)[1:]},
        combinations=combinations,
        resplit=resplit,
        lira=lira,
    )
    return Comparison(load_report(folder))


def _lone(build: Build) -> Callable[[list[pl.Callback]], Parts]:
    return lambda callbacks: build(callbacks, (), {})


def compare_arms(
    arms: Sequence[Arm],
    seeds: Iterable[int] = range(3),
    evaluators: Sequence[Evaluator] | None = None,
    folder: str | os.PathLike[str] = "comparison",
    title: str = "Guarded and unguarded models",
    command: str | None = None,
    workers: int = 1,
    argv: Sequence[str] | None = None,
    worker: bool = False,
    references: Sequence[str] = (),
    combinations: Mapping[str, Any] | None = None,
    accept: Mapping[str, Mapping[str, Any]] | None = None,
    resplit: bool = False,
    publishable: bool = False,
    lira: int = 0,
) -> Path:
    """Train and judge what is not yet there, then write the report; the form under :func:`compare`.

    Args:
        arms: the first is the baseline.
        seeds: one run an arm and seed.
        evaluators: what to measure; None is every axis there is.
        folder: where the report and the runs go.
        title: of the report.
        command: what a reader would type to get the same.
        workers: processes that share the runs; more than one needs ``argv``.
        argv: the command that starts a further worker on the same comparison.
        worker: this process is such a worker: it takes runs until none is left, and writes no report.
        references: names of methods of others, see :func:`compare`.
        combinations: which arms are ``parts``, which ``arms`` combine them, and which are ``refused``.
        accept: by arm, what must hold of it, see :func:`lightning_guard.report.gates.rules`.
        resplit: split train and validation by seed.
        publishable: write what may leave the house into ``public/`` too.
        lira: how many models of every arm are trained on halves of the rows and attacked.

    Returns:
        The path of ``report.html``.
    """
    place, seeds = Path(folder), list(seeds)
    if len({arm.name for arm in arms}) < len(arms):
        raise ValueError(f"arms={[arm.name for arm in arms]} must have different names")
    if not arms or not seeds:
        raise ValueError(f"{len(arms)} arms and {len(seeds)} seeds make no comparison; give at least one of each")
    built = [arm.build([]) for arm in arms]  # before anything is trained: every arm can be
    judges = _evaluators(evaluators, [guard for parts in built for guard in guards_of(parts[0], parts[1])])
    shares_group = any(guard.needs_group for parts in built for guard in guards_of(parts[0], parts[1]))
    asked = asked_of(accept or {}, [judge.name for judge in judges])
    if resplit:
        _check_resplit(built)
    arms = _with_sweeps(arms, built)
    _check(references, arms)
    sources = [sources_of(parts) for parts in built]
    composition = collected({arm.name: told(guards_of(*parts[:2])) for arm, parts in zip(arms, built, strict=True)})
    runs = [
        ArmRun(arm, seed, place, judges, shares_group, source, resplit)
        for seed in seeds
        for arm, source in zip(arms, sources, strict=True)
        if arm.given is None or seed == seeds[0] or getattr(arm.given, "seeded", True)
    ]
    halves = half_runs(lira, arms, built, sources, seeds[0], place, shares_group, resplit) if lira else []
    if worker:
        del built
        for run in (*runs, *halves):
            if run.result() is None and run.claim():
                run.carry_out(pl.Callback())
        return place
    data = described(runs[0], built[0], place)
    del built
    for run in (*runs, *halves):
        run.unclaim()
    carry_out([*runs, *halves], workers, argv)
    keep_arms(arms, place)
    matrices = transferred(runs)  # first: it adds to the results, which the others copy
    document = assembled(arms, seeds, with_agreement(runs, with_flips(runs)), title, command, matrices, resplit)
    if data is not None:
        document["data"] = data
    document["changes"] = [entry for entry in changes(runs) if entry["figure"] in document["figures"]]
    document["matched"] = [entry for entry in matched(runs) if entry["figure"] in document["figures"]]
    document["composition"] = composition
    if lira:
        own = {arm.name: arm.given is None for arm in arms}
        document["lira"] = attacked(place, own, lira, seeds[0], support_of(judges))
    if combinations:
        document["combinations"] = dict(combinations)
    if asked:
        document["accept"] = asked
    if references:
        document["references"] = beside(references, runs, place, Console(stderr=True).print)
    return finish(document, place, publishable)


def _check_resplit(built: Sequence[Parts]) -> None:
    for _, _, data in built:
        if not hasattr(data, "split_seed"):
            raise RecipeError(
                f"--resplit: {type(data).__name__} has no attribute split_seed, so its split into train and validation "
                "cannot be chosen; give it one that the split depends on, or leave out --resplit"
            )


def _with_sweeps(arms: Sequence[Arm], built: Sequence[Parts]) -> list[Arm]:
    """The arms, those that differ in one option alone as the sweep of it."""
    cards = [
        {
            "name": arm.name,
            "baseline": i == 0,
            "sweep": arm.sweep,
            "guards": [card(guard) for guard in guards_of(*parts[:2])],
        }
        for i, (arm, parts) in enumerate(zip(arms, built, strict=True))
    ]
    sweeps = recognised(cards)
    return [replace(arm, sweep=sweeps.get(arm.name, arm.sweep)) for arm in arms]


def _check(references: Sequence[str], arms: Sequence[Arm]) -> None:
    for name in references:
        if name not in REFERENCES:
            known = nearest(name, REFERENCES) or f"; there are {', '.join(REFERENCES)}"
            raise ValueError(f"references: nothing is named {name!r}{known}")
    if references and not any(swept_fairness(arm) for arm in arms):
        raise ValueError(
            f"references={list(references)} stand beside a sweep of fairness, and there is none; add arms that differ "
            "in one option of FairnessRegularization, max_gap say"
        )


def _evaluators(stated: Sequence[Evaluator] | None, guards: Sequence[Guard]) -> list[Evaluator]:
    """The stated evaluators or all; robustness without an ``eps`` takes the threat that an arm trains against."""
    judges = (
        list(stated)
        if stated is not None
        else [make() for make in EVALUATORS.values() if not getattr(make, "optional", False)]
    )
    for what, size in (("threat", "eps"), ("noise", "sigma")):
        trained = [getattr(guard, what, None) for guard in guards]
        first = next((found for found in trained if getattr(found, size, None)), None)
        take = f"with_{what}"
        if first is not None:
            judges = [getattr(judge, take)(first) if hasattr(judge, take) else judge for judge in judges]
    return judges
