"""The design of a comparison: every arm trained on the same seeds, judged on every axis, kept when interrupted."""

import copy
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_guard.evaluation import EVALUATORS, Evaluator
from lightning_guard.evaluation.references import REFERENCES
from lightning_guard.guard import Guard, guards_of
from lightning_guard.recipe import nearest
from lightning_guard.report import load_report, write_report
from lightning_guard.report.assembly import assembled
from lightning_guard.report.beside import references as beside
from lightning_guard.report.beside import swept_fairness
from lightning_guard.report.described import described
from lightning_guard.report.front import recognised
from lightning_guard.report.paired import changes
from lightning_guard.report.runs import Arm, ArmRun, Parts, card, describe, plain_text, sources_of
from lightning_guard.report.transfer import transferred
from lightning_guard.report.turned import with_flips


def compare(
    module: Callable[[], pl.LightningModule],
    data: Callable[[], pl.LightningDataModule],
    arms: Mapping[str, Sequence[pl.Callback]],
    trainer: Mapping[str, Any] | None = None,
    seeds: int | Iterable[int] = 3,
    evaluators: Sequence[Evaluator] | None = None,
    folder: str | os.PathLike[str] = "comparison",
    title: str = "Guarded and unguarded models",
    references: Sequence[str] = (),
) -> dict[str, Any]:
    """Train every arm on the same seeds, initial weights and data order, and write what each gained and cost.

    Args:
        module: makes the model; called after the seed is set, so that arms start from the same weights.
        data: makes the data.
        arms: callbacks by arm; the first arm is the baseline, usually ``{"none": [], ...}``.
        trainer: options of the Trainer, the same for all arms.
        seeds: how many, or which.
        evaluators: what to measure; None is every axis there is.
        folder: where the report and the runs go. Finished runs are found there and kept, so an interrupted
            comparison goes on where it stopped.
        title: of the report.
        references: methods of others to stand beside arms that differ in one option of the fairness guard:
            ``threshold_optimizer``, ``exponentiated_gradient``.

    Returns:
        The content of ``report.json``; ``report.html``, ``report.md`` and ``metrics.csv`` lie beside it.

    Example::

        compare(Net, Data, {"none": [], "pruned": [MagnitudePruning(0.9)]}, trainer={"max_epochs": 5}, seeds=3)
    """
    options = dict(trainer or {})

    def building(own: Sequence[pl.Callback]) -> Callable[[list[pl.Callback]], Parts]:
        def build(callbacks: list[pl.Callback]) -> Parts:
            quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
            # Copies: what an EarlyStopping remembers of one run must not stop the next.
            added = [*copy.deepcopy([*own, *(options.get("callbacks") or ())]), *callbacks]
            return (
                pl.Trainer(**{**quiet, "enable_model_summary": False, **options, "callbacks": added}),
                module(),
                data(),
            )

        return build

    described = {name: describe(own) for name, own in arms.items()}
    model = module()
    common = [
        str(model),
        dict(model.hparams),
        dict(data().hparams),
        {k: v for k, v in options.items() if k != "callbacks"},
        describe(options.get("callbacks") or ()),
    ]
    compare_arms(
        [Arm(name, building(own), {}, plain_text([common, described[name]])) for name, own in arms.items()],
        range(seeds) if isinstance(seeds, int) else seeds, evaluators, folder, title, references=references
    )  # fmt: skip
    return load_report(folder)


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
    arms = _with_sweeps(arms, built)
    _check(references, arms)
    sources = [sources_of(parts) for parts in built]
    runs = [
        ArmRun(arm, seed, place, judges, shares_group, source)
        for seed in seeds
        for arm, source in zip(arms, sources, strict=True)
    ]
    if worker:
        del built
        for run in runs:
            if run.result() is None and run.claim():
                run.carry_out(pl.Callback())
        return place
    data = described(runs[0], built[0], place)
    del built
    for run in runs:
        run.unclaim()
    _all(runs, workers, argv)
    document = assembled(arms, seeds, with_flips(runs), title, command, transferred(runs))
    if data is not None:
        document["data"] = data
    document["changes"] = [entry for entry in changes(runs) if entry["figure"] in document["figures"]]
    if references:
        document["references"] = beside(references, runs, place, Console(stderr=True).print)
    return write_report(document, place)


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


def _all(runs: Sequence[ArmRun], workers: int, argv: Sequence[str] | None) -> None:
    missing = sum(run.result() is None for run in runs)
    console = Console(stderr=True)
    if missing < len(runs):
        console.print(f"{len(runs) - missing} of {len(runs)} runs are already there and are kept.")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} runs"),
        TimeElapsedColumn(),
    )
    helpers: list[tuple[subprocess.Popen[bytes], Any]] = []  # with what each says, in a file: a full pipe would stop it
    threads = torch.get_num_threads()
    if argv is not None and min(workers, missing) > 1:
        # Processes that each take every core wait for one another: the same work took twenty times as long.
        share = max(1, min(threads, (os.cpu_count() or 1) // workers))
        torch.set_num_threads(share)
        environment = {**os.environ, "OMP_NUM_THREADS": str(share)}
        for _ in range(min(workers, missing) - 1):
            said = tempfile.TemporaryFile()  # noqa: SIM115  closed below, with its process
            helpers.append((subprocess.Popen([*argv], stdout=said, stderr=said, env=environment), said))
    try:
        with Progress(*columns, console=console, transient=False) as progress:
            bar = progress.add_task("comparing", total=len(runs), completed=len(runs) - missing)
            told = {run for run in runs if run.result() is not None}

            def look(description: str | None = None) -> None:
                for run in runs:
                    if run not in told and (result := run.result()) is not None:
                        told.add(run)
                        console.print(f"{run.arm.name}, seed {run.seed}: {_headline(result)}")
                progress.update(bar, completed=len(told), description=description)

            for run in runs:
                if run.result() is None and run.claim():
                    look(f"{run.arm.name}, seed {run.seed}")
                    run.carry_out(_Epochs(look, run))
            while any(helper.poll() is None for helper, _ in helpers):
                look("waiting for the other processes")
                time.sleep(0.3)
            look()
        for helper, said in helpers:
            if helper.returncode:
                said.seek(0)
                raise RuntimeError(
                    f"a worker of the comparison failed:\n{said.read().decode(errors='replace')[-4000:]}"
                )
    except (KeyboardInterrupt, SystemExit):
        console.print(
            f"Interrupted. Finished runs are kept in {runs[0].folder.parent.parent}; the same command goes on."
        )
        raise KeyboardInterrupt from None
    finally:
        for helper, said in helpers:
            helper.terminate()  # has ended by itself unless this process was stopped
            helper.wait()
            said.close()
        torch.set_num_threads(threads)


class _Epochs(pl.Callback):
    """Tells the progress bar which epoch runs."""

    def __init__(self, look: Callable[[str], None], run: ArmRun):
        self.look, self.run = look, run

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.look(f"{self.run.arm.name}, seed {self.run.seed}, epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")


def _evaluators(stated: Sequence[Evaluator] | None, guards: Sequence[Guard]) -> list[Evaluator]:
    """The stated evaluators or all; robustness without an ``eps`` takes the threat that an arm trains against."""
    judges = list(stated) if stated is not None else [make() for make in EVALUATORS.values()]
    for what, size in (("threat", "eps"), ("noise", "sigma")):
        trained = [getattr(guard, what, None) for guard in guards]
        first = next((found for found in trained if getattr(found, size, None)), None)
        take = f"with_{what}"
        if first is not None:
            judges = [getattr(judge, take)(first) if hasattr(judge, take) else judge for judge in judges]
    return judges


def _headline(result: Mapping[str, Any]) -> str:
    first = next((item for item in result["figures"].values() if item["value"] is not None), None)
    return "finished" if first is None else f"{first['label'].lower()} {first['value']:.3f}"
