"""Arms that are not trained here: a checkpoint of the same class, or a model that somebody's code makes."""

import pickle
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from lightning_guard.recipe import RecipeError
from lightning_guard.report.again import put_weights
from lightning_guard.report.manifest import digest

Given = str | PathLike[str] | Callable[[int], nn.Module]
SUFFIXES = (".ckpt", ".pt", ".pth")


class FromCheckpoint:
    """Loads a checkpoint, of weights alone or of Lightning, into the built module.

    Args:
        path: of the file; ``{seed}`` in it stands for the seed.

    Raises:
        RecipeError: if the file is not there, is no checkpoint that loads without running code, or fits another
            model.
    """

    def __init__(self, path: str | PathLike[str]):
        self.path = str(path)
        self.seeded = "{seed}" in self.path

    @property
    def marks(self) -> list[Any]:
        """What decides whether a finished evaluation still holds."""
        place = Path(self.path).parent
        pattern = Path(self.path).name.replace("{seed}", "*")
        return [self.path, [[path.name, digest(path)] for path in sorted(place.glob(pattern))]]

    def __call__(self, trainer: pl.Trainer, module: pl.LightningModule, seed: int) -> nn.Module:
        path = Path(self.path.replace("{seed}", str(seed)))
        if not path.is_file():
            raise RecipeError(f"there is no checkpoint {str(path)!r}; give a file that is there")
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise RecipeError(
                f"{path} does not load without running code of its own ({str(error).splitlines()[0]}); save the "
                "weights alone: torch.save(model.state_dict(), path)"
            ) from None
        weights = found.get("state_dict", found) if isinstance(found, dict) else None
        if not isinstance(weights, dict):
            raise RecipeError(f"{path} holds a {type(found).__name__} and no weights; give a state_dict")
        try:
            put_weights(trainer, module, weights)
        except (RuntimeError, ValueError) as error:
            raise RecipeError(f"{path} does not fit {type(module).__name__}: {error}") from None
        return module


class FromCode:
    """A model that a function of the seed makes.

    Raises:
        TypeError: if it makes something else.
    """

    seeded = True

    def __init__(self, make: Callable[[int], nn.Module]):
        self.make = make

    @property
    def marks(self) -> list[Any]:
        """The name of the function, and its code as Python compiled it."""
        code = getattr(self.make, "__code__", None)
        return [getattr(self.make, "__qualname__", type(self.make).__qualname__), code.co_code.hex() if code else ""]

    def __call__(self, trainer: pl.Trainer, module: pl.LightningModule, seed: int) -> nn.Module:
        made = self.make(seed)
        if not isinstance(made, nn.Module):
            raise TypeError(f"the arm's function made a {type(made).__name__}; return the model, an nn.Module")
        return made


def told_apart(
    arms: Mapping[str, Sequence[pl.Callback] | Given],
) -> tuple[dict[str, Sequence[pl.Callback]], dict[str, FromCheckpoint | FromCode]]:
    """The callbacks of all arms, none for those that are not trained here; and these."""
    callbacks: dict[str, Sequence[pl.Callback]] = {}
    given: dict[str, FromCheckpoint | FromCode] = {}
    for name, stated in arms.items():
        callbacks[name] = []
        if callable(stated):
            given[name] = FromCode(stated)
        elif isinstance(stated, str | PathLike):
            given[name] = FromCheckpoint(stated)
        else:
            callbacks[name] = stated
    return callbacks, given
