"""``lightning-guard compare``: the arms of a comparison, from the command line."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
import yaml

from lightning_guard.check import quiet, rehearse
from lightning_guard.guard import guards_of
from lightning_guard.launch import FILES, GuardCLI, pairs
from lightning_guard.recipe import Recipe, RecipeError, find, merged, nearest, plain, read, refused
from lightning_guard.report.compare import Arm, Parts, compare_arms
from lightning_guard.report.witness import Withholding

T = TypeVar("T")


def compare(args: Sequence[str]) -> int:
    """Train and judge every arm and say where the report is; before that, every arm is known to run.

    Raises:
        RecipeError: with all problems of all arms.
    """
    own, shared = _split(args)
    if own.workers > 1 and "OMP_NUM_THREADS" not in os.environ:
        # Threads of several processes on one core wait for each other: ten times slower on two cores.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // own.workers))
    recipes = dict(map(_named, own.arm))
    if len(own.arm) < 2:
        raise RecipeError("compare needs at least two arms, the baseline first: --arm none --arm fairness")
    if len(recipes) < len(own.arm):
        raise RecipeError(f"two of the arms {', '.join(own.arm)} have one name; use --arm NAME=recipe+recipe")
    with quiet():
        evaluators, judged = _shared(shared, [recipe for stated in recipes.values() for recipe in stated])
        arms = _each(recipes, lambda name: _parse(recipes[name], shared, judged))
        if not own.worker:
            # Where one arm needs the group, the batches of every arm have one.
            needed = any(guard.needs_group for cli in arms.values() for guard in guards_of(cli.trainer))
            _each(arms, lambda name: _rehearse(arms[name], [Withholding()] if needed else []))
        place = compare_arms(
            [_arm(name, cli, recipes[name]) for name, cli in arms.items()],
            seeds=range(own.seeds),
            evaluators=evaluators,
            folder=own.out,
            title=own.title,
            command=shlex.join(["lightning-guard", "compare", *args]),
            workers=own.workers,
            argv=[sys.executable, "-m", "lightning_guard", "compare", *args, "--worker"],
            worker=own.worker,
        )
    if not own.worker:
        print(f"The report is {place}")
    return 0


def _each(names: Iterable[str], make: Callable[[str], T]) -> dict[str, T]:
    """What is made of each arm, or the problems of all arms at once."""
    made, problems = {}, []
    for name in names:
        try:
            made[name] = make(name)
        except Exception as error:
            if not refused(error):
                raise
            problems.append(f"arm {name}: {error}")
    if problems:
        raise RecipeError("\n".join(problems))
    return made


def _split(args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--arm", action="append", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", default="comparison")
    parser.add_argument("--title", default="Guarded and unguarded models")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--worker", action="store_true")  # what further workers are started with
    try:
        own, shared = parser.parse_known_args(list(args))
    except argparse.ArgumentError as error:
        raise RecipeError(f"{error.argument_name}: {error.message}") from None
    for name, _, _ in pairs(shared):
        if meant := get_close_matches(name, [f"--{option}" for option in vars(own)], n=1, cutoff=0.75):
            raise RecipeError(f"{name}: unknown option of compare; did you mean {meant[0]!r}?")
    for name in ("seeds", "workers"):
        if getattr(own, name) < 1:
            raise RecipeError(f"--{name}: {getattr(own, name)} is too few; give at least 1")
    return own, shared


def _named(text: str) -> tuple[str, list[Recipe]]:
    """Name and recipes of ``none``, ``recipe+recipe`` or ``NAME=recipe+recipe``."""
    name, _, recipes = text.rpartition("=")
    return name or recipes, [] if recipes == "none" else [find(part) for part in recipes.split("+")]


def _shared(shared: Sequence[str], recipes: Sequence[Recipe]) -> tuple[list[Any], Any]:
    """How all arms are judged. What is shared may switch on no guard, or arms were not what they are called."""
    cli = GuardCLI("compare", [part for name, _, spelt in pairs(shared) if _slot(name) is None for part in spelt])
    for slot in cli.slots:
        if cli.config.guards[slot] is not None:
            raise RecipeError(
                f"{cli.place_of(f'guards.{slot}')}: {slot} is switched on for every arm; put it in a recipe and name "
                "that in --arm, so that an arm is what it is called"
            )
    if cli.config.ckpt_path is not None:
        raise RecipeError(f"{cli.place_of('ckpt_path')}: compare trains every arm from the start; leave out ckpt_path")
    if cli.config.get("data") is None:
        raise RecipeError("compare needs data to judge by; name its class with --data my_module.MyData, or in a file")
    on = _switched_on(recipes)
    for name, _, _ in pairs(shared):
        meant = _slot(name)
        if meant is not None and meant not in on:
            raise RecipeError(
                f"{name}: no arm switches {meant} on; name a recipe that does in --arm{nearest(meant, on)}"
            )
    cli.build()
    if found := [guard.name for guard in guards_of(cli.trainer)]:
        raise RecipeError(
            f"{cli.place_of('trainer.callbacks')}: {', '.join(found)} is among the callbacks of every arm; put it in a "
            "recipe under `guards:` and name that in --arm"
        )
    return cli.evaluators, cli.config.evaluate


def _parse(recipes: list[Recipe], shared: Sequence[str], judged: Any) -> GuardCLI:
    """The shared files, the recipes of the arm, then those shared options that speak of what the arm switches on."""
    on = _switched_on(recipes)
    options = [(name, spelt) for name, _, spelt in pairs(shared) if _slot(name) is None or _slot(name) in on]
    last = max((i for i, (name, _) in enumerate(options) if name in FILES), default=-1) + 1
    args = [part for _, spelt in options[:last] for part in spelt]
    args += [part for recipe in recipes for part in ("--recipe", recipe.name)]
    args += [part for _, spelt in options[last:] for part in spelt]
    cli = GuardCLI("compare", args)
    if cli.config.evaluate != judged:
        raise RecipeError("its recipes say how it is judged (evaluate); say that in --config, the same for all arms")
    cli.build()
    return cli


def _rehearse(cli: GuardCLI, callbacks: list[pl.Callback]) -> None:
    result = rehearse(cli, callbacks, logs=cli.config.trainer.logger is not None)
    if result.error is not None:
        raise result.error


def _arm(name: str, cli: GuardCLI, recipes: list[Recipe]) -> Arm:
    options = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    quietly = {option: False for option in options if cli.config.trainer[option] is None}

    def build(callbacks: list[pl.Callback]) -> Parts:
        cli.build(callbacks, options=quietly)
        return cli.trainer, cli.model, cli.datamodule

    config = yaml.safe_load(cli.parser.dump(cli.config, skip_unset=False))
    decides = {key: value for key, value in config.items() if key not in ("seed_everything", "evaluate")}
    return Arm(name, build, {recipe.name: recipe.sha256 for recipe in recipes}, yaml.safe_dump(decides))


def _switched_on(recipes: Sequence[Recipe]) -> set[str]:
    guards = merged(plain(read(recipe)) for recipe in recipes).get("guards")
    stated = guards.items() if isinstance(guards, dict) else ()
    return {slot for slot, value in stated if value is not None and slot != "batch"}


def _slot(name: str) -> str | None:
    """The guard that an option of the command line speaks of; what holds for all guards speaks of none."""
    parts = name.removeprefix("--").split(".")
    return parts[1] if parts[0] == "guards" and len(parts) > 1 and parts[1] != "batch" else None
