"""The design of a comparison: every arm trained on the same seeds, judged on every axis, kept when interrupted."""

import copy
import hashlib
import inspect
import json
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from datetime import UTC, datetime
from functools import reduce
from importlib.metadata import version
from operator import or_
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_guard import __version__
from lightning_guard.batch import Batch
from lightning_guard.evaluation import EVALUATORS, Evaluator, Evidence, Figure, Subject
from lightning_guard.guard import Guard, callbacks_of
from lightning_guard.report import load_report, write_report
from lightning_guard.report.witness import Withholding, Witness

Parts = tuple[pl.Trainer, pl.LightningModule, pl.LightningDataModule]

_PACKAGES = ("torch", "pytorch-lightning", "torchmetrics", "opacus", "fairlearn", "numpy")
_LIMITS = (
    "Every figure is of this data, these networks and these seeds; another data set may order the arms differently.",
    "Accuracy under PGD is an upper bound: a stronger attack can only lower it. The standard is AutoAttack.",
    "Group gaps are of the test set's groups; groups that nobody recorded are not seen.",
    "Publishing a guarded and its unguarded model together can leak more about training data than either alone.",
)


@dataclass(frozen=True)
class Arm:
    """One way to train, to be compared with others.

    Args:
        name: as it appears in the report.
        build: makes fresh trainer, module and data each time, with these callbacks beside the arm's own.
        recipes: the recipes it is made of, with their sha256.
        config: text that changes whenever the arm does; with the seed it decides whether a finished run is reused.
    """

    name: str
    build: Callable[[list[pl.Callback]], Parts]
    recipes: Mapping[str, str] = field(default_factory=dict)
    config: str = ""


def compare(
    module: Callable[[], pl.LightningModule],
    data: Callable[[], pl.LightningDataModule],
    arms: Mapping[str, Sequence[pl.Callback]],
    trainer: Mapping[str, Any] | None = None,
    seeds: int | Iterable[int] = 3,
    evaluators: Sequence[Evaluator] | None = None,
    folder: str | os.PathLike[str] = "comparison",
    title: str = "Guarded and unguarded models",
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

    described = {name: _describe(own) for name, own in arms.items()}
    model = module()
    common = [
        str(model),
        dict(model.hparams),
        dict(data().hparams),
        {k: v for k, v in options.items() if k != "callbacks"},
        _describe(options.get("callbacks") or ()),
    ]
    compare_arms(
        [Arm(name, building(own), {}, _plain_text([common, described[name]])) for name, own in arms.items()],
        range(seeds) if isinstance(seeds, int) else seeds, evaluators, folder, title
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

    Returns:
        The path of ``report.html``.
    """
    place, seeds = Path(folder), list(seeds)
    if len({arm.name for arm in arms}) < len(arms):
        raise ValueError(f"arms={[arm.name for arm in arms]} must have different names")
    if not arms or not seeds:
        raise ValueError(f"{len(arms)} arms and {len(seeds)} seeds make no comparison; give at least one of each")
    built = [arm.build([]) for arm in arms]  # before anything is trained: every arm can be
    judges = _evaluators(evaluators, [guard for parts in built for guard in _guards(parts[0], parts[1])])
    shares_group = any(guard.needs_group for parts in built for guard in _guards(parts[0], parts[1]))
    sources = [_sources(parts) for parts in built]
    runs = [
        _Run(arm, seed, place, judges, shares_group, source)
        for seed in seeds
        for arm, source in zip(arms, sources, strict=True)
    ]
    del built
    if worker:
        for run in runs:
            if run.result() is None and run.claim():
                run.carry_out(pl.Callback())
        return place
    for run in runs:
        run.unclaim()
    _all(runs, workers, argv)
    finished = [result for run in runs if (result := run.result()) is not None]
    return write_report(_document(arms, seeds, finished, title, command), place)


def _all(runs: "Sequence[_Run]", workers: int, argv: Sequence[str] | None) -> None:
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

    def __init__(self, look: Callable[[str], None], run: "_Run"):
        self.look, self.run = look, run

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.look(f"{self.run.arm.name}, seed {self.run.seed}, epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")


class _Run:
    """One arm on one seed: carried out once, then read from its folder."""

    def __init__(self, arm: Arm, seed: int, place: Path, judges: Sequence[Evaluator], shares_group: bool, source: str):
        self.arm, self.seed, self.judges, self.shares_group = arm, seed, judges, shares_group
        slug = re.sub(r"[^A-Za-z0-9_.+-]+", "-", arm.name)[:40]
        slug = slug if slug == arm.name and not slug.startswith(".") else f"{slug}-{_sha256(arm.name)[:8]}".lstrip(".")
        self.folder = place / "runs" / slug / f"seed-{seed}"
        parts = [arm.config, source, seed, [_describe([judge]) for judge in judges], _versions()]
        self.fingerprint = _sha256(_plain_text(parts))
        self._result: dict[str, Any] | None = None

    def result(self) -> dict[str, Any] | None:
        """What the run found, if it has ended and nothing that decides it has changed since."""
        path = self.folder / "result.json"
        if self._result is None and path.exists():
            found = json.loads(path.read_text())
            self._result = found if found.get("fingerprint") == self.fingerprint else None
        return self._result

    def claim(self) -> bool:
        """Take the run for this process; False if another has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            os.close(os.open(self.folder / "claim", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def unclaim(self) -> None:
        (self.folder / "claim").unlink(missing_ok=True)

    def carry_out(self, progress: pl.Callback) -> None:
        pl.seed_everything(self.seed, verbose=False)
        witness = Witness()
        reading: list[pl.Callback] = [Withholding()] if self.shares_group else []
        trainer, module, data = self.arm.build([witness, progress, *reading])
        guards = [guard for guard in _guards(trainer, module) if not isinstance(guard, Withholding)]
        stated = [guard.batch for guard in guards if guard.batch is not None]
        batch = stated[0] if stated else getattr(module, "guard_batch", None) or Batch()
        trainer.fit(module, datamodule=data)
        data.setup("test")
        loader = data.test_dataloader()
        subject = Subject(
            module,
            loader[0] if isinstance(loader, list) else loader,
            batch=batch,
            group_names=getattr(data, "group_names", None),
            class_names=getattr(data, "class_names", None),
        )
        evidence = reduce(or_, [*(judge.evaluate(subject) for judge in self.judges), _cost(witness, module)])
        torch.save(module.state_dict(), self.folder / "weights.pt")
        result = {
            "fingerprint": self.fingerprint,
            "arm": self.arm.name,
            "seed": self.seed,
            **asdict(evidence),
            "guards": [_card(guard) for guard in guards],
            "initial_weights_sha256": witness.initial_weights,
            "data_order_sha256": witness.data_order,
            "data": data.provenance() if hasattr(data, "provenance") else {"name": type(data).__name__},
        }
        temporary = self.folder / "result.json.part"
        temporary.write_text(json.dumps(result, indent=1, default=str))  # unsorted: the first figure leads
        temporary.replace(self.folder / "result.json")  # whole or not at all
        self.unclaim()


def _guards(trainer: pl.Trainer, module: pl.LightningModule) -> list[Guard]:
    carried = module.configure_callbacks()
    carried = list(carried) if isinstance(carried, Sequence) else [carried]
    found = [callback for callback in [*callbacks_of(trainer), *carried] if isinstance(callback, Guard)]
    return sorted(found, key=lambda guard: (guard.phase, guard.name))


def _card(guard: Guard) -> dict[str, Any]:
    return {"name": guard.name, "promise": guard.promise, "options": json.loads(_plain_text(guard.options()))}


def _evaluators(stated: Sequence[Evaluator] | None, guards: Sequence[Guard]) -> list[Evaluator]:
    """The stated evaluators or all; robustness without an ``eps`` takes the threat that an arm trains against."""
    judges = list(stated) if stated is not None else [make() for make in EVALUATORS.values()]
    threats = [getattr(guard, "threat", None) for guard in guards]
    threat = next((threat for threat in threats if threat is not None and threat.eps), None)
    return [judge.with_threat(threat) if threat and hasattr(judge, "with_threat") else judge for judge in judges]


def _cost(witness: Witness, module: pl.LightningModule) -> Evidence:
    clock = "Processor" if module.device.type == "cpu" else "Clock"
    return Evidence(
        {
            "cost/train_seconds": Figure(
                witness.seconds,
                "Training time",
                "s",
                "lower",
                f"{clock} time of the training loop, validation included.",
            ),
            "cost/passes": Figure(
                witness.passes,
                "Forward passes a batch",
                "count",
                "lower",
                "Per training batch, those of attacks included.",
            ),
            "cost/steps": Figure(float(witness.steps), "Optimizer steps", "count", None, "Of the whole training."),
        }
    )


def _document(
    arms: Sequence[Arm], seeds: Sequence[int], results: Sequence[dict[str, Any]], title: str, command: str | None
) -> dict[str, Any]:
    def described(kind: str, values: tuple[str, ...]) -> dict[str, Any]:
        merged = {key: item for result in reversed(results) for key, item in result[kind].items()}
        return {
            key: {"axis": key.split("/")[0], **{k: v for k, v in item.items() if k not in values}}
            for key, item in merged.items()
        }

    guards = {result["arm"]: result["guards"] for result in results}
    data: dict[str, Any] = next((result["data"] for result in results), {"name": ""})
    return {
        "schema": 1,
        "title": title,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "provenance": {
            "command": command,
            "config_sha256": _sha256("".join(arm.config for arm in arms)),
            "versions": _versions(),
            "recipes": {name: digest for arm in arms for name, digest in arm.recipes.items()},
            "seeds": list(seeds),
            "machine": {
                "processor": platform.processor() or platform.machine(),
                "cores": os.cpu_count() or 1,
                "threads": torch.get_num_threads(),
                "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
            },
            "data": {
                "name": data["name"],
                "sha256": data.get("sha256"),
                "train": data.get("rows", {}).get("train"),
                "test": data.get("rows", {}).get("test"),
            },
            "git": _git(),
        },
        "arms": [
            {"name": arm.name, "recipes": list(arm.recipes), "baseline": i == 0, "guards": guards.get(arm.name, [])}
            for i, arm in enumerate(arms)
        ],
        "figures": described("figures", ("value",)),
        "curves": described("curves", ("x", "y")),
        "bars": described("bars", ("values",)),
        "runs": [
            {
                "arm": result["arm"],
                "seed": result["seed"],
                "values": {key: item["value"] for key, item in result["figures"].items()},
                "curves": {key: {"x": item["x"], "y": item["y"]} for key, item in result["curves"].items()},
                "bars": {key: item["values"] for key, item in result["bars"].items()},
                "intervals": result["intervals"],
                "notes": result["notes"],
                "initial_weights_sha256": result["initial_weights_sha256"],
                "data_order_sha256": result["data_order_sha256"],
            }
            for result in results
        ],
        "limits": list(_LIMITS),
    }


def _headline(result: Mapping[str, Any]) -> str:
    first = next((item for item in result["figures"].values() if item["value"] is not None), None)
    return "finished" if first is None else f"{first['label'].lower()} {first['value']:.3f}"


def _describe(objects: Iterable[Any]) -> list[Any]:
    return [[type(o).__qualname__, o.options() if isinstance(o, Guard) else vars(o)] for o in objects]


def _sources(parts: Parts) -> str:
    """A digest of the code of an arm: an edited training_step is another training."""
    trainer, module, data = parts
    owners = [*module.modules(), data, *callbacks_of(trainer)]
    classes = {cls for owner in owners for cls in type(owner).__mro__}
    foreign = (
        "builtins",
        "abc",
        "typing",
        "torch",
        "torchmetrics",
        "pytorch_lightning",
        "lightning",
        "lightning_fabric",
    )
    texts = []
    for cls in classes:
        if cls.__module__.split(".")[0] not in foreign:
            try:
                texts.append(inspect.getsource(cls))
            except (OSError, TypeError):  # typed in a console
                texts.append(cls.__qualname__)
    return _sha256("".join(sorted(texts)))


def _plain_text(value: Any, indent: int | None = None) -> str:
    def plain(value: Any) -> Any:
        return asdict(value) if is_dataclass(value) and not isinstance(value, type) else bare(value)

    def bare(value: Any) -> str:
        return re.sub(r" at 0x[0-9a-f]+", "", str(value))  # an address differs in every process

    return json.dumps(value, default=plain, indent=indent, sort_keys=True)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _versions() -> dict[str, str]:
    return {"lightning-guard": __version__, **{name: version(name) for name in _PACKAGES}}


def _git() -> str | None:
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None
