"""Arms of Python callbacks that are joined into combinations, and which of these are refused."""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytorch_lightning as pl

from lightning_guard.guard import GuardConflict, guards_of
from lightning_guard.report.combined import combined
from lightning_guard.report.runs import Parts
from lightning_guard.report.witness import Withholding

Build = Callable[[Sequence[pl.Callback], tuple[type, ...], Mapping[str, Any]], Parts]


class Rehearsable:
    """An arm as :func:`lightning_guard.check.rehearse` takes it.

    Args:
        make: of callbacks to add, classes of callbacks to leave out, and options of the Trainer in place of others.
        options: of the Trainer.
    """

    def __init__(self, make: Build, options: Mapping[str, Any]):
        names = ("limit_val_batches", "num_sanity_val_steps")
        stated = {"logger": options.get("logger", False), **{name: options.get(name) for name in names}}
        self.config: Any = SimpleNamespace(trainer=SimpleNamespace(**stated))
        self.make = make
        self.trainer: Any = None
        self.model: Any = None
        self.datamodule: Any = None

    def build(
        self,
        callbacks: Sequence[pl.Callback] = (),
        without: tuple[type, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Make fresh ``trainer``, ``model`` and ``datamodule``."""
        self.trainer, self.model, self.datamodule = self.make(callbacks, without, options or {})


def joined(
    own: Mapping[str, Sequence[pl.Callback]], kinds: str, given: Sequence[str] = ()
) -> tuple[dict[str, Sequence[pl.Callback]], dict[str, tuple[str, ...]]]:
    """The arms with one more for each combination that is asked for, small ones first; and the parts of each.

    Args:
        own: callbacks by arm; the first arm is the baseline.
        kinds: see :func:`lightning_guard.report.combined.subsets`.
        given: arms that are not trained, so that nothing of them can be combined.

    Example:
        >>> arms, made_of = joined({"none": [], "a": [pl.Callback()], "b": [pl.Callback()]}, "all")
        >>> list(arms), len(arms["a+b"]), made_of
        (['none', 'a', 'b', 'a+b'], 2, {'a+b': ('a', 'b')})

    Raises:
        ValueError: for what cannot be combined.
    """
    try:
        made_of = combined(list(own), kinds)
    except ValueError as error:
        raise ValueError(f"combine: {error}") from None
    for name, parts in made_of.items():
        if untrained := [part for part in parts if part in given and name not in own]:
            raise ValueError(
                f"combine: {untrained[0]} is a model that is not trained here, so nothing can be combined with it; "
                "compare it without combine, or give its safeguards as callbacks"
            )
    # A callback that two arms share is there once.
    added = {
        name: list({id(one): one for part in parts for one in own[part]}.values())
        for name, parts in made_of.items()
        if name not in own
    }
    arms = {**own, **added}
    return dict(sorted(arms.items(), key=lambda arm: len(made_of.get(arm[0], ())))), made_of


def refusals(arms: Mapping[str, Rehearsable], made_of: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The combinations that are refused, with every reason, after one step of each arm.

    Raises:
        GuardConflict: for an arm that is no combination and is refused.
    """
    from lightning_guard.check import rehearse  # which knows the command line

    for arm in arms.values():
        arm.build()
    # Where one arm needs the group, the batches of every arm have one.
    needed = any(guard.needs_group for arm in arms.values() for guard in guards_of(arm.trainer, arm.model))
    found: dict[str, list[str]] = {}
    for name, arm in arms.items():
        error = rehearse(arm, [Withholding()] if needed else []).error
        if isinstance(error, GuardConflict) and name in made_of:
            found[name] = error.problems
        elif error is not None:
            raise error
    return found
