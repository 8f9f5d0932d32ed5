"""Replacing what is not ours, and putting it back."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any


def swap(undo: ExitStack, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace ``owner.name`` by ``make(old)`` until ``undo`` closes; then ``vars(owner)`` is as it was.

    If somebody wraps our replacement in the meantime, ours stays beneath theirs and merely passes calls through.
    """
    shadowed, old = name in vars(owner), getattr(owner, name)
    standin = StandIn(owner, name, old, make(old))

    def restore() -> None:
        standin.call = old
        if vars(owner).get(name) is standin:
            if shadowed:
                setattr(owner, name, old)
            else:
                delattr(owner, name)

    undo.callback(restore)
    setattr(owner, name, standin)


def swap_value(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set ``owner.name`` until ``undo`` closes."""
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


class StandIn:
    """A callable in the place of a method; copies and pickles of its owner get the method itself."""

    def __init__(self, owner: Any, name: str, old: Callable[..., Any], call: Callable[..., Any]):
        self.owner, self.name, self.call = owner, name, call
        if hasattr(call, "__wrapped__"):
            # Lightning unwraps one level to read a step's signature, and unwraps to see whether a hook is overridden.
            self.__wrapped__ = getattr(old, "__wrapped__", old)
        self.__code__ = StandIn.__call__.__code__  # without __wrapped__: counts as overridden

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        owner = memo.get(id(self.owner), self.owner)
        return getattr(type(owner), self.name).__get__(owner)

    def __reduce__(self) -> Any:
        return getattr, (self.owner, self.name)
