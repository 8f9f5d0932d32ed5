"""Finding recipes and reading them strictly, so that a mistake is answered with file, line and the right name.

A recipe is an ordinary configuration file that says something about ``guards:``. Nothing here imports torch.
"""

import hashlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from lightning_guard import __version__

FORMAT = "1"  # of recipes, stated in their second line
_FORMAT_LINE = re.compile(r"#\s*lightning-guard:\s*(\S+)")
_SUFFIXES = (".yaml", ".yml", ".json")
_STR, _MAP = "tag:yaml.org,2002:str", "tag:yaml.org,2002:map"


class RecipeError(ValueError):
    """What is wrong with a configuration, in one line: where, what, and what to write instead."""


def refused(error: Exception) -> bool:
    """Whether an error answers what the user asked for, so that its message says all; else it is a fault."""
    guard = sys.modules.get("lightning_guard.guard")  # imported by whoever can raise its GuardConflict
    by_hand = isinstance(error, FileNotFoundError) and error.filename is None  # not open()'s: says what to do
    return by_hand or isinstance(error, RecipeError) or (guard is not None and isinstance(error, guard.GuardConflict))


@dataclass(frozen=True)
class Recipe:
    """A configuration file and what a person calls it.

    Args:
        name: the name of the recipe, or the path as it was given.
        path: the file.
        shown: the file as an error calls it.
    """

    name: str
    path: Path
    shown: str

    @cached_property
    def text(self) -> str:
        """What the file says."""
        try:
            return self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(f"{self.shown}: is not UTF-8 text ({error.reason}); save it as such") from None

    @property
    def sha256(self) -> str:
        """The hash of the file's bytes, for the record."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    @property
    def title(self) -> str:
        """The first comment line."""
        first = self.text.split("\n", 1)[0]
        return first.lstrip("#").strip() if first.startswith("#") else ""


def find(name: str) -> Recipe:
    """The configuration of this name: an existing file, else one in ``./recipes``, else one that we ship.

    Raises:
        RecipeError: if there is none, with the nearest name that there is.
    """
    if Path(name).is_file():
        return Recipe(name, Path(name), name)
    if Path(name).suffix not in _SUFFIXES:
        for folder, shown in _folders():
            path = folder / f"{name}.yaml"
            if path.is_file():
                return Recipe(name, path, f"{shown}/{name}.yaml")
        known = [recipe.name for recipe in recipes("*.yaml")] + [recipe.name for recipe in recipes("*/*.yaml")]
        hint = nearest(name, known) or "; `lightning-guard list` shows the recipes, and a file needs its suffix"
        raise RecipeError(f"no recipe named {name!r}{hint}")
    siblings = Path(name).parent.glob("*.*") if Path(name).parent.is_dir() else ()
    raise RecipeError(f"no file {name!r}{nearest(name, map(str, siblings)) or '; a recipe is named without suffix'}")


def recipes(pattern: str = "*.yaml") -> list[Recipe]:
    """All recipes by name; one in ``./recipes`` stands before a shipped one of its name, as in :func:`find`."""
    found: dict[str, Recipe] = {}
    for folder, shown in _folders():
        for path in sorted(folder.glob(pattern)):
            name = path.relative_to(folder).with_suffix("").as_posix()
            found.setdefault(name, Recipe(name, path, f"{shown}/{name}.yaml"))
    return sorted(found.values(), key=lambda recipe: recipe.name)


def _folders() -> Iterator[tuple[Path, str]]:
    yield Path("recipes"), "recipes"
    shipped = files("lightning_guard.recipes") / "fairness.yaml"  # the folder itself need not be a Path
    yield Path(str(shipped)).parent, "lightning_guard/recipes"


def nearest(name: str, names: Iterable[str]) -> str:
    """``; did you mean '...'?``, or nothing if no name is near."""
    close = get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


# Reading ------------------------------------------------------------------------------------------------------


def read(recipe: Recipe) -> yaml.MappingNode:
    """The file as nodes that know their lines, after the checks that parsers of YAML leave out.

    Raises:
        RecipeError: for syntax errors, duplicate keys, an unknown format, or a file that holds no mapping.
    """
    for number, line in enumerate(recipe.text.splitlines(), 1):
        if not line.startswith("#"):
            break
        stated = _FORMAT_LINE.fullmatch(line.strip())
        if stated and stated[1] != FORMAT:
            raise RecipeError(
                f"{recipe.shown}:{number}: recipe format {stated[1]} is not known to lightning-guard {__version__}, "
                f"which reads format {FORMAT}; use the version that the recipe was written for"
            )
    try:
        loader = yaml.SafeLoader(recipe.text)
        loader.name = recipe.shown  # the marks of all nodes carry it
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{recipe.shown}:{mark.line + 1}" if mark else recipe.shown
        raise RecipeError(f"{at}: no valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{recipe.shown}: no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(node, yaml.MappingNode):
        what = "says nothing" if node is None else "holds no mapping"
        raise RecipeError(f"{recipe.shown}: {what}; a configuration has sections such as `guards:`")
    _refuse_duplicates(node)
    return node


def _refuse_duplicates(node: yaml.Node) -> None:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise RecipeError(f"{place(key)}: a key must be a word, not a list or a mapping")
        if key.value in seen:
            first = seen[key.value].start_mark.line + 1
            raise RecipeError(f"{place(key)}: {key.value!r} is there already in line {first}; keep one of them")
        seen[key.value] = key
        _refuse_duplicates(value)


def items(node: yaml.Node | None) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """Key, node of the key and node of the value; merged mappings (``<<``) as if they were written out."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.value == "<<":
            for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                yield from items(merged)
        else:
            yield key.value, key, value


def locate(node: yaml.Node, keys: Sequence[str]) -> tuple[yaml.Node | None, yaml.Node | None]:
    """The nodes of the last of these nested keys and of its value; ``init_args`` in between may be left out."""
    at: yaml.Node | None = None
    value: yaml.Node | None = node
    for key in keys:
        found = {name: (name_at, part) for name, name_at, part in items(value)}
        if key not in found and "init_args" in found:
            found = {name: (name_at, part) for name, name_at, part in items(found["init_args"][1])}
        at, value = found.get(key, (None, None))
    return at, value


def place(node: yaml.Node) -> str:
    """``file:line`` of a node, or the option of the command line that it stands for."""
    mark = node.start_mark
    return mark.name if mark.name.startswith("--") else f"{mark.name}:{mark.line + 1}"


def option(name: str, value: str) -> yaml.Node:
    """An option of the command line, ``--a.b value``, as the nodes of a file that says the same."""
    mark = yaml.Mark(f"--{name}", 0, 0, 0, None, 0)
    # Words and numbers are read as YAML reads them; what else a value may be is the parser's to say.
    read_as_yaml = re.fullmatch(r"[\w.+-]+", value)
    node = yaml.SafeLoader(value).get_single_node() if read_as_yaml else None
    node = yaml.ScalarNode(_STR, value) if node is None else node
    node.start_mark = mark
    for key in reversed(name.split(".")):
        node = yaml.MappingNode(_MAP, [(yaml.ScalarNode(_STR, key, mark), node)], mark)
    return node


def is_file(node: yaml.Node) -> bool:
    """Whether a section names a file of its own instead of saying what is in it."""
    return isinstance(node, yaml.ScalarNode) and node.value.endswith(_SUFFIXES)


def plain(node: yaml.Node) -> Any:
    """The value of a node in plain types."""
    loader = yaml.SafeLoader("")
    return loader.construct_document(node)


def merged(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Configurations key by key, later ones first; anything that is no mapping is replaced as a whole."""
    result: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            old = result.get(key)
            result[key] = merged([old, value]) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result
