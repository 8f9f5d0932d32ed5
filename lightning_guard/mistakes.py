"""What is wrong with a configuration, in one line: file and line, the option, and what to write instead.

jsonargparse knows that something is wrong, but neither the file nor the line, and it takes an unknown section that is
empty for none. So what was said is examined a second time here, as nodes that know their lines.
"""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from traceback import walk_tb
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytorch_lightning as pl
import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_guard.recipe import RecipeError, is_file, items, locate, nearest, place, plain

Sources = Sequence[yaml.Node]  # files and options of the command line, in the order in which they count
_SPEC = ("class_path", "init_args", "dict_kwargs")
_BUILTIN: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str, "NoneType": NoneType}
_ABSTRACT = (pl.LightningModule, pl.LightningDataModule, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)


def refuse_unknown(node: yaml.Node, known: Mapping[str, Any], section: str = "") -> None:
    """Refuse sections and options that the parser would pass over or, worse, let replace a whole section.

    Args:
        node: what one source says in this section.
        known: the parser's defaults: an option has a value, a section has a mapping.
        section: the dotted key of the section.
    """
    for name, at, value in items(node):
        name = name.removesuffix("+")  # appends to a list
        if name not in known and not (name == "$schema" and not section):
            raise _unknown(at, name, section, known)
        inner = known.get(name)
        if isinstance(inner, Mapping) and not is_file(value):
            key = f"{section}.{name}".lstrip(".")
            if not isinstance(value, yaml.MappingNode):
                hint = "; to switch a guard off, give null to that guard" if name == "guards" else ""
                raise RecipeError(f"{place(at)}: {key} is a section of options, not {_shown(value)}{hint}")
            refuse_unknown(value, inner, key)


def examine(sources: Sources, key: str, base: type) -> None:
    """Refuse a class that is not there, options that it does not have, and values that it does not take.

    Args:
        sources: what was said.
        key: the section of an object, such as ``guards.fairness``.
        base: the class that it takes; its subclasses are taken too.
    """
    cls, on, last = base, False, None
    given: set[str] = set()
    for source in sources:
        at, value = locate(source, key.split("."))
        if at is None or value is None:
            continue
        last, on = at, not _is_null(value)
        if is_file(value):
            return  # a file of its own, which the parser reads
        cls, options = _read(value, cls, base, key) if on else (base, [])
        given = {name for name, _, _ in options} | given if on else set()
        for name, name_at, part in options:
            _examine_option(cls, name.removesuffix("+"), name_at, part, key)
    missing = [name for name in _required(cls) if name not in given] if on else []
    if missing and last is not None:
        raise RecipeError(f"{place(last)}: {key} needs the option {missing[0]!r}, which has no default")


def explained(error: Exception, sources: Sources, classes: Mapping[str, type]) -> RecipeError:
    """The parser's error with its place, or at least in one line.

    Args:
        error: what the parser raised.
        sources: what was said.
        classes: the sections that are an object, with the class that each takes.
    """
    try:
        for key, cls in classes.items():
            examine(sources, key, cls)
    except RecipeError as mistake:
        return mistake
    text = " ".join(str(error).split())
    named = re.match(r'Parser key "([\w.]+)"', text)
    for source in reversed(sources if named else ()):
        at, value = locate(source, named[1].split(".")) if named else (None, None)
        if named and at is not None and value is not None:
            types = [
                _BUILTIN[name]
                for name in re.findall(r"<class '(\w+)'>", text.split("Given value")[0])
                if name in _BUILTIN
            ]
            kinds = " or ".join(dict.fromkeys(map(_words, types))) or "something else"
            return RecipeError(f"{place(at)}: {named[1]}={_shown(value)} must be {kinds}")
    return RecipeError(text)


def blamed(error: BaseException, sources: Sources, objects: Mapping[str, type]) -> RecipeError | None:
    """What a constructor objected to, with the place of the option that it names; None for what looks like a fault.

    Args:
        error: what building the objects raised.
        sources: what was said.
        objects: the class of each section that was built.
    """
    cause: BaseException | None = error
    while cause is not None:
        for frame, _ in walk_tb(cause.__traceback__):
            owner = type(frame.f_locals.get("self"))
            key = next((key for key, cls in objects.items() if cls is owner), None)
            if key is not None and frame.f_code.co_name == "__init__":
                return _blamed(cause, sources, key, owner)
        cause = cause.__cause__  # the parser wraps what constructors raise
    return None


def _blamed(error: BaseException, sources: Sources, key: str, cls: type) -> RecipeError | None:
    if not isinstance(error, ValueError | OSError | MisconfigurationException):
        return None
    text = " ".join(str(error).split())
    named = [name for name in re.findall(r"\b(\w+)=|`(\w+)`", text) for name in name if name in _options(cls)]
    if not named and cls.__module__.split(".")[0] not in ("lightning_guard", "pytorch_lightning"):
        return None  # somebody's own class, and no word about an option: rather show where it comes from
    for path in [[*key.split("."), name] for name in named[:1]] + [key.split(".")]:
        for source in reversed(sources):
            at, _ = locate(source, path)
            if at is not None:
                return RecipeError(f"{place(at)}: {key}: {text}")
    return RecipeError(f"{key}: {text}")


# One section --------------------------------------------------------------------------------------------------

Options = list[tuple[str, yaml.Node, yaml.Node]]


def _read(value: yaml.Node, cls: type, base: type, key: str) -> tuple[type, Options]:
    """The class and the options that one source states for a section, in any of their spellings."""
    parts = {name: part for name, _, part in items(value)}
    if isinstance(value, yaml.ScalarNode) or "class_path" in parts:
        cls = _class(parts.get("class_path", value), base, key)
    elif not isinstance(value, yaml.MappingNode):
        raise RecipeError(f"{place(value)}: {key} takes options, or null, not {_shown(value)}")
    if cls in _ABSTRACT and parts:
        raise RecipeError(f"{place(value)}: {key} has options but no class; say which with class_path")
    if not set(_SPEC) & set(parts):
        return cls, list(items(value))
    for name, at, _ in items(value):
        if name not in _SPEC:
            hint = "; it belongs under init_args" if name in _options(cls) else nearest(name, _SPEC)
            raise RecipeError(f"{place(at)}: unknown option {name!r} of {key}{hint}")
    return cls, list(items(parts.get("init_args")))


def _examine_option(cls: type, name: str, at: yaml.Node, value: yaml.Node, key: str) -> None:
    if name not in _options(cls):
        raise _unknown(at, name, key, [*_options(cls), *(_SPEC if cls is not pl.Trainer else ())])
    for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
        if any(inner == "class_path" for inner, _, _ in items(part)):  # an object among the options, a callback say
            inner_cls, options = _read(part, object, object, f"{key}.{name}")
            for inner, inner_at, node in options:
                _examine_option(inner_cls, inner, inner_at, node, f"{key}.{name}")
    if is_file(value) or _takes(cls, name, value):
        return
    annotation = _annotation(cls, name)
    hint = nearest(value.value, _literals(annotation)) if isinstance(value, yaml.ScalarNode) else ""
    raise RecipeError(f"{place(at)}: {name}={_shown(value)} of {key} must be {_words(annotation)}{hint}")


def _unknown(at: yaml.Node, name: str, section: str, names: Any) -> RecipeError:
    hint = "; write nested sections instead of dots" if "." in name else nearest(name, names)
    what = f"unknown option {name!r} of {section}" if section else f"unknown section or option {name!r}"
    return RecipeError(f"{place(at)}: {what}{hint}")


def _class(node: yaml.Node, base: type, key: str) -> type:
    path = plain(node)
    if not isinstance(path, str):
        raise RecipeError(f"{place(node)}: {key} takes a class or its options, or null, not {_shown(node)}")
    module, _, name = path.rpartition(".")
    if not module:
        known = {cls.__name__: cls for cls in _subclasses(base)}
        if name not in known:
            hint = nearest(name, known) or "; give module and class"
            raise RecipeError(f"{place(node)}: no class {name!r} for {key}{hint}")
        return known[name]
    try:
        cls = getattr(import_module(module), name)
    except AttributeError:
        hint = nearest(name, vars(import_module(module)))
        raise RecipeError(f"{place(node)}: no class {name!r} in {module}{hint}") from None
    except ImportError as error:
        raise RecipeError(f"{place(node)}: cannot import {module} for {key}: {error}") from None
    if isinstance(cls, type) and not issubclass(cls, base):
        raise RecipeError(f"{place(node)}: {key} takes {base.__name__}, and {name} is none")
    return cls


def _subclasses(cls: type) -> Iterator[type]:
    yield cls
    below: list[type] = type.__subclasses__(cls)
    for sub in below:
        yield from _subclasses(sub)


# What a class takes, by the same rules as the parser that takes it ----------------------------------------------


@cache
def _options(cls: type) -> list[str]:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, fail_untyped=False)
    return list(vars(parser.get_defaults()))


def _required(cls: type) -> list[str]:
    given = inspect.signature(cls).parameters.values() if cls not in _ABSTRACT else ()
    return [p.name for p in given if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _takes(cls: type, name: str, node: yaml.Node) -> bool:
    annotation, value = _annotation(cls, name), plain(node)
    if value is None:
        return annotation in (None, Any) or NoneType in get_args(annotation)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, skip={other for other in _options(cls) if other != name}, fail_untyped=False)
    try:
        parser.parse_object({name: value})
    except ArgumentError:
        return False
    return True


def _annotation(cls: type, name: str) -> Any:
    for base in cls.__mro__:
        init = vars(base).get("__init__")
        if init is not None and name in inspect.signature(init).parameters:
            try:
                return get_type_hints(inspect.unwrap(init)).get(name)
            except NameError:  # names that only type checkers import
                return None
    return None


def _literals(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [kind for kind in get_args(annotation) if isinstance(kind, str)]
    return [kind for part in get_args(annotation) for kind in _literals(part)]


def _words(annotation: Any) -> str:
    """A type as one who writes YAML would call it."""
    kinds = get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        parts = [_words(kind) for kind in kinds if not (kind is int and float in kinds)]
        return " or ".join(dict.fromkeys(parts))
    if get_origin(annotation) is Literal:
        return " or ".join(repr(kind) for kind in kinds if not (isinstance(kind, str) and kind.isdigit()))
    plain_words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    if annotation in plain_words:
        return plain_words[annotation]
    origin = get_origin(annotation) or annotation
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return "a list"
    return f"a {origin.__name__}" if isinstance(origin, type) else "something else"


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and plain(node) is None


def _shown(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
    value = plain(node)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
