"""``lightning-guard compare --runs``: a comparison of what is finished already; and what every comparison ends with."""

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml

from lightning_guard.check import quiet
from lightning_guard.evaluation import Evaluator
from lightning_guard.launch import FILES, GuardCLI, pairs
from lightning_guard.recipe import RecipeError, find, merged, plain, read
from lightning_guard.report import load_report
from lightning_guard.report.assembly import assembled
from lightning_guard.report.gates import asked_of, passed
from lightning_guard.report.given import FromCheckpoint
from lightning_guard.report.kept import KeptRun, finish, keep_arms, kept_runs
from lightning_guard.report.matched import matched
from lightning_guard.report.paired import changes
from lightning_guard.report.runs import Arm, ArmRun, Parts, plain_text, slug_of, sources_of
from lightning_guard.report.turned import with_flips
from lightning_guard.report.verdict import outcome

_QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def ended(place: Path) -> int:
    """Say where the report is and whether what was asked of the arms holds; the exit code, 1 if a gate fails."""
    print(f"The report is {place}")
    report = load_report(place.parent)
    if said := outcome(report):
        print(said)
    return 0 if passed(report) else 1


def gates_of(accept: Mapping[str, Mapping[str, Any]], inconclusive: str) -> dict[str, Mapping[str, Any]]:
    """What is asked of each arm, with what the command line says of inconclusive gates."""
    return {
        name: {**own, "inconclusive": inconclusive} if inconclusive and own else own for name, own in accept.items()
    }


def compare_finished(own: argparse.Namespace, shared: Sequence[str], command: str) -> int:
    """Compare finished runs: the arms of comparisons, and models that `fit` has trained.

    Raises:
        RecipeError: for a folder that holds neither, for runs on other data or judged otherwise, and for options that
            only a training has.
    """
    for name in ("arm", "sweep", "reference", "resplit", "lira"):
        if getattr(own, name):
            raise RecipeError(f"--runs compares what is finished; leave out --{name}")
    if any(name not in FILES for name, _, _ in pairs(shared)):
        raise RecipeError("--runs takes models and data from the folders; leave out all but --config with `accept:`")
    out = Path(own.out)
    folders = [Path(folder) for folder in own.runs]
    if any(folder.resolve() == out.resolve() for folder in folders):
        raise RecipeError(f"--out {own.out}: is one of the folders of --runs; give another one")
    kept = [kept_runs(folder) if (folder / "report.json").is_file() else [] for folder in folders]
    judges = next((runs[0].judges for runs in kept if runs), None)
    runs = _renamed(kept, folders, out)
    with quiet():
        for folder, found in zip(folders, kept, strict=True):
            if not found:
                runs.append(_evaluated(folder, {run.arm.name for run in runs}, judges, out))
                judges = judges or runs[-1].judges
    _refuse_apart(runs)
    arms = list({run.arm.name: run.arm for run in runs}.values())
    if len(arms) < 2:
        raise RecipeError("--runs: these folders hold one arm together; give at least two")
    keep_arms(arms, out)
    seeds = sorted({run.seed for run in runs})
    document = assembled(arms, seeds, with_flips(runs), own.title, command)
    document["changes"] = [one for one in changes(runs) if one["figure"] in document["figures"]]
    document["matched"] = [one for one in matched(runs) if one["figure"] in document["figures"]]
    stated = merged(plain(read(find(value))) for _, value, _ in pairs(shared) if value).get("accept") or {}
    asked = asked_of(
        gates_of({arm.name: stated for arm in arms[1:]}, own.inconclusive), [judge.name for judge in judges or ()]
    )
    if asked:
        document["accept"] = asked
    document["limits"].append("The runs were brought together after they had ended; attacks were not transferred.")
    if any(runs and load_report(folder).get("lira") for folder, runs in zip(folders, kept, strict=True)):
        document["limits"].append("Offline LiRA was made in one of the folders; it stays there and is not shown here.")
    return ended(finish(document, out, own.publishable))


def _renamed(kept: Sequence[Sequence[KeptRun]], folders: Sequence[Path], out: Path) -> list[ArmRun]:
    """Copies of all finished runs: one arm where two folders hold the same one, another name where they do not."""
    found: dict[tuple[str, int], ArmRun] = {}
    configs: dict[str, str] = {}
    for folder, runs in zip(folders, kept, strict=True):
        for run in runs:
            name = run.arm.name
            if configs.setdefault(name, run.arm.config) != run.arm.config:
                name = f"{name} ({folder.name})"
                if configs.setdefault(name, run.arm.config) != run.arm.config:
                    raise RecipeError(f"--runs: two folders named {folder.name} hold different arms {run.arm.name!r}")
            known = found.get((name, run.seed))
            if known is not None and known.fingerprint == run.fingerprint:
                continue
            if known is not None:
                raise RecipeError(f"--runs: two different runs of {name}, seed {run.seed}; give one of their folders")
            place = out / "runs" / slug_of(name) / f"seed-{run.seed}"
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(run.folder, place)
            result = json.loads((place / "result.json").read_text(encoding="utf-8"))
            (place / "result.json").write_text(json.dumps({**result, "arm": name}, indent=1), encoding="utf-8")
            found[name, run.seed] = KeptRun(replace(run.arm, name=name), place)
    return list(found.values())


def _evaluated(folder: Path, taken: set[str], judges: Sequence[Evaluator] | None, out: Path) -> ArmRun:
    """What `fit` left, its checkpoint judged now."""
    checkpoints = sorted(folder.glob("checkpoints/*.ckpt"))
    if not (folder / "config.yaml").is_file() or len(checkpoints) != 1:
        raise RecipeError(
            f"--runs {folder}: holds neither a finished comparison (report.json) nor what `lightning-guard fit` leaves "
            f"(config.yaml and one file in checkpoints/, here {len(checkpoints)})"
        )
    cli = GuardCLI("fit", ["--config", str(folder / "config.yaml")])

    def build(callbacks: list[pl.Callback]) -> Parts:
        cli.build(callbacks, options=_QUIET)
        return cli.trainer, cli.model, cli.datamodule

    parts = build([])
    given = FromCheckpoint(checkpoints[0])
    config = yaml.safe_load(cli.parser.dump(cli.config, skip_unset=False))
    decides = {key: value for key, value in config.items() if key not in ("seed_everything", "evaluate", "accept")}
    text = yaml.safe_dump(decides) + f"# {plain_text(given.marks)}\n"
    name = folder.name if folder.name not in taken else str(folder)
    arm = Arm(name, build, {}, text, given=given)
    run = ArmRun(arm, int(cli.config.seed_everything or 0), out, judges or cli.evaluators, False, sources_of(parts))
    if run.result() is None:
        run.folder.mkdir(parents=True, exist_ok=True)
        run.carry_out(pl.Callback())
    return run


def _refuse_apart(runs: Sequence[ArmRun]) -> None:
    results = {run.arm.name: run.result() or {} for run in runs}
    first, own = next(iter(results.items()))
    for name, other in results.items():
        if other["data"].get("sha256") != own["data"].get("sha256") or other["data"]["name"] != own["data"]["name"]:
            raise RecipeError(f"--runs: {first} and {name} were judged on different data, so they cannot be compared")
        if other.get("evaluators") != own.get("evaluators"):
            raise RecipeError(
                f"--runs: {first} and {name} were judged by other evaluators or with other options; judge them alike, "
                "with the same `evaluate:`"
            )
