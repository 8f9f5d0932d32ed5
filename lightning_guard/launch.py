"""One configuration from files and options to a run: read strictly, built as often as asked."""

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, Optional

import pytorch_lightning as pl
import torch
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

import lightning_guard.data
import lightning_guard.models  # noqa: F401  # with both, `--model SmallCNN --data AdultData` is known
from lightning_guard import __version__
from lightning_guard.batch import Batch
from lightning_guard.callbacks.slots import slots
from lightning_guard.evaluation import EVALUATORS
from lightning_guard.guard import Guard
from lightning_guard.mistakes import blamed, examine, explained, refuse_unknown
from lightning_guard.recipe import FORMAT, Recipe, RecipeError, find, locate, merged, option, place, plain, read
from lightning_guard.record import Resume, SavedConfig

FILES = ("-c", "--config", "--recipe")  # one option, three spellings
_RUNS = ("fit", "validate", "test", "predict")


def run(verb: str, args: Sequence[str]) -> None:
    """Do what the verb says with the configuration that the arguments state."""
    cli = GuardCLI(verb, args, save=True)
    cli.build([Resume()] if verb == "fit" else [])
    options = {name: cli.config[name] for name in cli.method_options}
    getattr(cli.trainer, verb)(model=cli.model, datamodule=cli.datamodule, **options)


def pairs(args: Sequence[str]) -> Iterable[tuple[str, str | None, list[str]]]:
    """Name, value and spelling of each option in turn."""
    rest = list(args)
    while rest:
        spelt = [rest.pop(0)]
        if not spelt[0].startswith("-"):
            raise RecipeError(f"unexpected argument {spelt[0]!r}; options begin with --")
        name, equals, value = spelt[0].partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
            spelt.append(value)
        yield name, value if equals or len(spelt) > 1 else None, spelt


class GuardCLI(LightningCLI):
    """A LightningCLI with slots for guards and evaluators, whose mistakes are answered with their place.

    Args:
        verb: what the configuration is for.
        args: options as on the command line.
        save: write the configuration into the folder of the run's logs.

    Raises:
        RecipeError: for whatever is wrong, in one line.
    """

    def __init__(self, verb: str, args: Sequence[str], save: bool = False):
        self.verb, self.slots = verb, slots()
        self.recipes: list[Recipe] = []
        self.sources: list[Any] = []  # what was said, in the order in which it counts
        self.classes = {
            **{f"guards.{name}": cls for name, cls in self.slots.items()},
            "guards.batch": Batch,
            **{f"evaluate.{name}": cls for name, cls in EVALUATORS.items()},
        }
        super().__init__(
            args=self._read(args),
            run=False,
            seed_everything_default=0,
            save_config_callback=SavedConfig if save else None,
            parser_kwargs={"prog": f"lightning-guard {verb}", "allow_abbrev": False, "exit_on_error": False},
        )

    def _read(self, args: Sequence[str]) -> list[str]:
        argv, last = [], []
        for name, value, spelt in pairs(args):
            if name in FILES:
                if value is None:
                    raise RecipeError(f"{name} needs the name of a recipe or of a file")
                recipe = find(value)
                self.recipes.append(recipe)
                self.sources.append(read(recipe))
                argv += ["--config", str(recipe.path)]
            elif name == "--data-dir":
                last += [f"--data.init_args.data_dir={value}"]  # after the class of the data is known
                self.sources.append(option("data.data_dir", str(value)))
            else:
                argv += spelt
                if value is not None and not name.endswith((".help", "--help", "--print_config")):
                    self.sources.append(option(name.lstrip("-"), value))
        return argv + last

    # What LightningCLI asks for ---------------------------------------------------------------------------------

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """The parser, whose ``--config`` has a second spelling."""
        header = [
            f"A configuration for `lightning-guard {self.verb}`, complete: use it with --config",
            f"lightning-guard: {FORMAT}",
            f"lightning-guard=={__version__} pytorch-lightning=={pl.__version__} torch=={torch.__version__} "
            f"python=={platform.python_version()}",
            *(f"from {recipe.shown} sha256:{recipe.sha256}" for recipe in self.recipes),
        ]
        parser = self.parser_class(**kwargs, dump_header=header)
        parser.add_argument(*FILES, action=ActionConfigFile, help="A recipe or a file, any number of them.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Slots for guards and evaluators, and the options of the Trainer's method."""
        for key, cls in self.classes.items():
            summary = (cls.__doc__ or "").strip().split("\n")[0]
            on = (
                {"class_path": f"{cls.__module__}.{cls.__qualname__}"}
                if key.startswith("evaluate.") and not getattr(cls, "optional", False)
                else None
            )
            parser.add_argument(f"--{key}", type=Optional[cls], default=on, help=summary)  # noqa: UP045  # made here
        parser.add_argument("--accept", type=dict[str, Any] | None, default=None, help="Gates of a comparison.")
        method = self.verb if self.verb in _RUNS else "fit"
        self.method_options = parser.add_method_arguments(pl.Trainer, method, skip=self.subcommands()[method])

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses strictly; what the parser lets pass or does not explain is looked for in what was said."""
        known = parser.get_defaults().as_dict()
        known.pop("config", None)
        known["evaluate"] = dict.fromkeys(EVALUATORS)
        for source in self.sources:
            refuse_unknown(source, known)
        for key, cls in self.classes.items():
            examine(self.sources, key, cls)
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            if all(locate(source, ["model"])[0] is None for source in self.sources):
                raise RecipeError(
                    "no model; name its class with --model my_module.MyModel, or in a file given by --config"
                ) from None
            bases = {"trainer": pl.Trainer, "model": pl.LightningModule, "data": pl.LightningDataModule}
            bases |= {"optimizer": torch.optim.Optimizer, "lr_scheduler": torch.optim.lr_scheduler.LRScheduler}
            raise explained(error, self.sources, bases) from None

    def instantiate_classes(self) -> None:
        """Nothing yet: :meth:`build` does it."""

    # Building ---------------------------------------------------------------------------------------------------

    def build(
        self,
        callbacks: Sequence[pl.Callback] = (),
        without: tuple[type, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Make fresh ``trainer``, ``model``, ``datamodule`` and ``guards``.

        Args:
            callbacks: to be added to the Trainer's.
            without: classes of callbacks to leave out of the Trainer's.
            options: options of the Trainer in place of the stated ones.
        """
        self._changes = callbacks, without, dict(options or {})
        try:
            super().instantiate_classes()
        except Exception as error:
            found = blamed(error, self.sources, self._objects())
            if found is None:
                raise
            raise found from None

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The Trainer with the guards among its callbacks."""
        callbacks, without, changes = self._changes
        stated = self.config_init.trainer.callbacks or []
        stated = [c for c in (stated if isinstance(stated, list) else [stated]) if not isinstance(c, without)]
        if any(isinstance(callback, Checkpoint) for callback in stated):
            changes.pop("enable_checkpointing", None)  # what is stated in so many words stays
        self.guards = [guard for name in self.slots if (guard := self.config_init.guards[name]) is not None]
        batch = self.config_init.guards.batch
        if batch is not None:
            for guard in [*self.guards, *(c for c in stated if isinstance(c, Guard))]:
                guard.batch = guard.batch or batch
            if getattr(self.model, "guard_batch", None) is None:
                self.model.guard_batch = batch  # for evaluators, which know no guard
        return super().instantiate_trainer(**{**changes, **kwargs, "callbacks": [*stated, *self.guards, *callbacks]})

    @property
    def evaluators(self) -> list[Any]:
        """What judges the model: every axis that is not switched off."""
        return [judge for name in EVALUATORS if (judge := self.config_init.evaluate[name]) is not None]

    @property
    def accept(self) -> dict[str, Any]:
        """What must hold of this arm in a comparison: limits by figure, those said later in place of earlier ones."""
        said = [{"accept": part} for source in self.sources if (part := plain(source).get("accept", ...)) is not ...]
        return merged(said).get("accept") or {}

    def place_of(self, key: str) -> str:
        """Where an option was said last."""
        found = [at for source in self.sources if (at := locate(source, key.split("."))[0]) is not None]
        return place(found[-1]) if found else f"--{key}"

    def _objects(self) -> dict[str, type]:
        found: dict[str, type] = {"trainer": pl.Trainer, "guards.batch": Batch}
        for key in (*self.classes, "model", "data"):
            stated = self.config.get(key)
            if isinstance(stated, Namespace) and "class_path" in stated:
                module, _, name = stated.class_path.rpartition(".")
                found[key] = getattr(import_module(module), name)
        return found


def schema() -> str:
    """JSON schema of a recipe, for editors: the guards in full, other sections as they come."""
    parser = ArgumentParser(exit_on_error=False)
    for name, cls in slots().items():
        parser.add_argument(f"--guards.{name}", type=Optional[cls], help=(cls.__doc__ or "").strip().split("\n")[0])  # noqa: UP045
    parser.add_argument("--guards.batch", type=Optional[Batch])  # noqa: UP045
    made = json.loads(parser.get_completion_script("jsonschema"))
    return json.dumps({**made, "additionalProperties": True}, indent=2)
