"""``lightning-guard compare``: the arms of a comparison, from the command line."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import product
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
import yaml

from lightning_guard.afterwards import compare_finished, ended, gates_of
from lightning_guard.check import quiet, rehearse
from lightning_guard.evaluation.references import REFERENCES
from lightning_guard.guard import GuardConflict, guards_of
from lightning_guard.launch import FILES, GuardCLI, pairs
from lightning_guard.recipe import Recipe, RecipeError, find, merged, nearest, plain, read, refused
from lightning_guard.report.combined import combined, told
from lightning_guard.report.compare import Arm, Parts, compare_arms
from lightning_guard.report.given import SUFFIXES, FromCheckpoint
from lightning_guard.report.lira import too_few
from lightning_guard.report.runs import plain_text
from lightning_guard.report.witness import Withholding

T = TypeVar("T")


@dataclass(frozen=True)
class Sweep:
    """Values of one option of a guard, an arm each."""

    slot: str
    option: str  # within the guard, with dots if it is nested
    values: tuple[str, ...]  # as they were typed

    @property
    def key(self) -> str:
        return f"guards.{self.slot}.{self.option}"


@dataclass(frozen=True)
class Stated:
    """An arm as the command line states it: its recipes, and the values that a sweep gives it."""

    recipes: list[Recipe]
    swept: dict[str, str] = field(default_factory=dict)  # value by key
    of: str = ""  # the arm that is swept


def compare(args: Sequence[str]) -> int:
    """Train and judge every arm and say where the report is; before that, every arm is known to run.

    Raises:
        RecipeError: with all problems of all arms.
    """
    own, shared = _split(args)
    command = shlex.join(["lightning-guard", "compare", *args])
    if own.runs:
        return compare_finished(own, shared, command)
    own.arm, given = _given(own.arm)
    if own.workers > 1 and "OMP_NUM_THREADS" not in os.environ:
        # Threads of several processes on one core wait for each other: ten times slower on two cores.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // own.workers))
    if len(own.arm) < 2:
        raise RecipeError("compare needs at least two arms, the baseline first: --arm none --arm fairness")
    sweeps = _sweeps(own.sweep, shared)
    arms_stated = _swept([_named(text) for text in own.arm], sweeps)
    made_of = _combined(arms_stated, own.combine, sweeps)
    stated = dict(arms_stated)
    if len(stated) < len(arms_stated):
        twice = own.arm if not sweeps else [name for name, _ in arms_stated]
        raise RecipeError(f"two of the arms {', '.join(twice)} have one name; use --arm NAME=recipe+recipe")
    references = _references(own.reference, sweeps)
    with quiet():
        evaluators, judged = _shared(shared, [recipe for arm in stated.values() for recipe in arm.recipes])
        arms = _each(stated, lambda name: _parse(stated[name], shared, judged))
        refusals = {name: [""] for name in own.refused}
        if not own.worker:
            # Where one arm needs the group, the batches of every arm have one.
            needed = any(guard.needs_group for cli in arms.values() for guard in guards_of(cli.trainer))
            refusals = _rehearsed(arms, [Withholding()] if needed else [], made_of)
        arms = {name: cli for name, cli in arms.items() if name not in refusals}
        without = [f"--refused={name}" for name in refusals]
        place = compare_arms(
            [_arm(name, cli, stated[name], given.get(name)) for name, cli in arms.items()],
            seeds=range(own.seeds),
            evaluators=evaluators,
            folder=own.out,
            title=own.title,
            command=command,
            workers=own.workers,
            argv=[sys.executable, "-m", "lightning_guard", "compare", *args, "--worker", *without],
            worker=own.worker,
            references=references,
            accept=gates_of({name: cli.accept for name, cli in list(arms.items())[1:]}, own.inconclusive),
            resplit=own.resplit,
            publishable=own.publishable,
            lira=own.lira,
            combinations=told([name for name, _ in arms_stated], made_of, refusals) if own.combine else None,
        )
    return 0 if own.worker else ended(place)


def _each(names: Iterable[str], make: Callable[[str], T]) -> dict[str, T]:
    """What is made of each arm, or the problems of all arms at once."""
    made: dict[str, T] = {}
    problems: dict[str, None] = {}
    for name in names:
        try:
            made[name] = make(name)
        except Exception as error:
            if not refused(error):
                raise
            # A mistake in a sweep is no arm's own, and is told once.
            problems[str(error) if str(error).startswith("--sweep") else f"arm {name}: {error}"] = None
    if problems:
        raise RecipeError("\n".join(problems))
    return made


def _split(args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--arm", action="append", default=[])
    parser.add_argument("--sweep", action="append", default=[])
    parser.add_argument("--reference", default="")
    parser.add_argument("--combine", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", default="comparison")
    parser.add_argument("--title", default="Guarded and unguarded models")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--resplit", action="store_true")
    parser.add_argument("--lira", type=int, default=0)
    parser.add_argument("--publishable", action="store_true")
    parser.add_argument("--inconclusive", default="")
    parser.add_argument("--runs", nargs="+", default=[])
    parser.add_argument("--worker", action="store_true")  # what further workers are started with
    parser.add_argument("--refused", action="append", default=[])  # and what they need not find out again
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
    if own.lira and (problem := too_few(own.lira)):
        raise RecipeError(f"--lira: {problem}")
    return own, shared


def _given(texts: Sequence[str]) -> tuple[list[str], dict[str, FromCheckpoint]]:
    """The arms without the checkpoints among their recipes, and these by arm."""
    arms, given = [], {}
    for text in texts:
        if not text.endswith(SUFFIXES):
            arms.append(text)
            continue
        name, equals, made_of = text.partition("=")  # the first: Lightning writes one into the name of a checkpoint
        if not equals or os.path.isfile(text):
            raise RecipeError(f"--arm {text}: is a checkpoint without a name; write --arm NAME={text}")
        recipes, _, path = made_of.rpartition("+")
        path, recipes = (made_of, "") if os.path.isfile(made_of) else (path, recipes)
        arms.append(f"{name}={recipes or 'none'}")
        given[name] = FromCheckpoint(path)
    return arms, given


def _named(text: str) -> tuple[str, list[Recipe]]:
    """Name and recipes of ``none``, ``recipe+recipe`` or ``NAME=recipe+recipe``."""
    name, _, recipes = text.rpartition("=")
    return name or recipes, [] if recipes == "none" else [find(part) for part in recipes.split("+")]


def _sweeps(texts: Sequence[str], shared: Sequence[str]) -> list[Sweep]:
    """What each ``--sweep guards.NAME.OPTION=VALUE,VALUE`` says."""
    form = "; write --sweep guards.NAME.OPTION=VALUE,VALUE, for example guards.fairness.max_gap=0.02,0.05"
    found: list[Sweep] = []
    for text in texts:
        key, equals, listed = text.partition("=")
        parts = [part for part in key.split(".") if part != "init_args"]
        values = tuple(value.strip() for value in listed.split(","))
        said = f"--sweep {key}"
        if len(parts) < 3 or parts[0] != "guards" or "" in parts or parts[1] == "batch":
            raise RecipeError(f"{said}: sweeps an option of one guard{form}")
        if not equals or "" in values:
            raise RecipeError(f"{said}: {'lacks a value' if listed else 'has no values'}{form}")
        if len(set(values)) < len(values):
            raise RecipeError(f"{said}: {listed} has a value twice; each becomes an arm, so give it once")
        sweep = Sweep(parts[1], ".".join(parts[2:]), values)
        if sweep.key in [other.key for other in found]:
            raise RecipeError(f"{said}: is swept twice; give all its values to one --sweep")
        for name, _, _ in pairs(shared):
            if name.removeprefix("--").replace(".init_args", "") == sweep.key:
                raise RecipeError(f"{said}: {name} states it for every arm; leave out one of them")
        found.append(sweep)
    return found


def _swept(stated: Sequence[tuple[str, list[Recipe]]], sweeps: Sequence[Sweep]) -> list[tuple[str, Stated]]:
    """The arms, those that switch on what is swept once for each value; several sweeps multiply."""
    on = [_switched_on(recipes) for _, recipes in stated]
    for sweep in sweeps:
        if sweep.slot in on[0]:
            raise RecipeError(
                f"--sweep {sweep.key}: the first arm, {stated[0][0]}, switches {sweep.slot} on, and a baseline is one "
                "arm; put --arm none before it"
            )
        if not any(sweep.slot in slots for slots in on):
            known = nearest(sweep.slot, set().union(*on))
            raise RecipeError(
                f"--sweep {sweep.key}: no arm switches {sweep.slot} on; name a recipe that does in --arm{known}"
            )
    arms = []
    for (name, recipes), slots in zip(stated, on, strict=True):
        own = [sweep for sweep in sweeps if sweep.slot in slots]
        words = [sweep.option for sweep in own]
        for values in product(*(sweep.values for sweep in own)):
            told = [
                f"{sweep.option if words.count(sweep.option) == 1 else f'{sweep.slot}.{sweep.option}'}={value}"
                for sweep, value in zip(own, values, strict=True)
            ]
            swept = {sweep.key: value for sweep, value in zip(own, values, strict=True)}
            arms.append((" ".join([name, *told]), Stated(recipes, swept, name if own else "")))
    return arms


def _combined(arms: list[tuple[str, Stated]], kinds: str, sweeps: Sequence[Sweep]) -> dict[str, tuple[str, ...]]:
    """Add an arm for each combination that is asked for, smaller ones first; gives the parts of each."""
    if not kinds:
        return {}
    if sweeps:
        raise RecipeError("--combine and --sweep together multiply into arms that nobody reads; give one of them")
    try:
        made_of = combined([name for name, _ in arms], kinds)
    except ValueError as error:
        raise RecipeError(f"--combine: {error}") from None
    given = dict(arms)
    for name, parts in made_of.items():
        if name not in given:
            recipes = {recipe.name: recipe for part in parts for recipe in given[part].recipes}
            arms.append((name, Stated(list(recipes.values()))))
    arms.sort(key=lambda arm: len(made_of.get(arm[0], ())))  # those that are no combination stay first, as stated
    return made_of


def _rehearsed(
    arms: Mapping[str, GuardCLI], callbacks: list[pl.Callback], made_of: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """The combinations that are refused, with every reason; another arm that is refused ends the comparison."""
    refusals: dict[str, list[str]] = {}

    def one(name: str) -> None:
        try:
            _rehearse(arms[name], callbacks)
        except GuardConflict as error:
            if name not in made_of:
                raise
            refusals[name] = error.problems

    _each(arms, one)
    return refusals


def _references(text: str, sweeps: Sequence[Sweep]) -> list[str]:
    """The methods of others that are to stand beside a sweep."""
    names = [name.strip() for name in text.split(",")] if text else []
    for name in names:
        if name not in REFERENCES:
            known = nearest(name, REFERENCES) or f"; there are {', '.join(REFERENCES)}"
            raise RecipeError(f"--reference: nothing is named {name!r}{known}")
    if names and not any(sweep.slot == "fairness" for sweep in sweeps):
        raise RecipeError(
            "--reference: there is no sweep of fairness to draw it beside; add "
            "--sweep guards.fairness.max_gap=0.02,0.05,0.1"
        )
    return list(dict.fromkeys(names))


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


def _parse(stated: Stated, shared: Sequence[str], judged: Any) -> GuardCLI:
    """The shared files, the arm's recipes, those shared options that speak of what it switches on, what is swept."""
    on = _switched_on(stated.recipes)
    options = [(name, spelt) for name, _, spelt in pairs(shared) if _slot(name) is None or _slot(name) in on]
    last = max((i for i, (name, _) in enumerate(options) if name in FILES), default=-1) + 1
    args = [part for _, spelt in options[:last] for part in spelt]
    args += [part for recipe in stated.recipes for part in ("--recipe", recipe.name)]
    args += [part for _, spelt in options[last:] for part in spelt]
    args += [f"--{key}={value}" for key, value in stated.swept.items()]
    try:
        cli = GuardCLI("compare", args)
        if cli.config.evaluate != judged:
            raise RecipeError(
                "its recipes say how it is judged (evaluate); say that in --config, the same for all arms"
            )
        cli.build()
    except RecipeError as error:
        text = str(error)
        for key in stated.swept:
            if text.startswith(f"--{key}:"):
                raise RecipeError(f"--sweep {text.removeprefix('--')}") from None
        raise
    return cli


def _rehearse(cli: GuardCLI, callbacks: list[pl.Callback]) -> None:
    result = rehearse(cli, callbacks, logs=cli.config.trainer.logger is not None)
    if result.error is not None:
        raise result.error


def _arm(name: str, cli: GuardCLI, stated: Stated, given: FromCheckpoint | None = None) -> Arm:
    options = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    quietly = {option: False for option in options if cli.config.trainer[option] is None}

    def build(callbacks: list[pl.Callback]) -> Parts:
        cli.build(callbacks, options=quietly)
        return cli.trainer, cli.model, cli.datamodule

    config = yaml.safe_load(cli.parser.dump(cli.config, skip_unset=False))
    decides = {key: value for key, value in config.items() if key not in ("seed_everything", "evaluate", "accept")}
    values = [{"key": key, "value": _number(value)} for key, value in stated.swept.items()]
    sweep = {"of": stated.of, **values[0], "also": values[1:]} if values else None
    digests = {recipe.name: recipe.sha256 for recipe in stated.recipes}
    texts = {recipe.name: recipe.path.read_bytes().decode() for recipe in stated.recipes}
    text = yaml.safe_dump(decides) + (f"# {plain_text(given.marks)}\n" if given is not None else "")
    return Arm(name, build, digests, text, sweep, texts, given)


def _number(text: str) -> Any:
    """A value as it was meant: YAML takes 1e-2 for a word."""
    value = yaml.safe_load(text)
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _switched_on(recipes: Sequence[Recipe]) -> set[str]:
    guards = merged(plain(read(recipe)) for recipe in recipes).get("guards")
    stated = guards.items() if isinstance(guards, dict) else ()
    return {slot for slot, value in stated if value is not None and slot != "batch"}


def _slot(name: str) -> str | None:
    """The guard that an option of the command line speaks of; what holds for all guards speaks of none."""
    parts = name.removeprefix("--").split(".")
    return parts[1] if parts[0] == "guards" and len(parts) > 1 and parts[1] != "batch" else None
