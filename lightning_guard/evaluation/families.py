"""Groups by attribute: each attribute is a family of groups of its own, and so are their crossings."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Names = Sequence[str] | Sequence[Sequence[str]]


class Family(NamedTuple):
    """The groups of one attribute, numbered without holes in the order of their codes.

    Args:
        name: of the attribute.
        group: ``(N,)`` in [0, ``len(names)``), -1 where unknown.
        names: of the groups that have examples.
    """

    name: str
    group: Tensor
    names: list[str]


def families(
    group: Tensor,
    group_names: Names | None = None,
    attribute_names: Sequence[str] | None = None,
    intersections: bool = False,
) -> list[Family]:
    """The families of groups that examples belong to.

    Args:
        group: whole numbers ``(N,)`` of one attribute, or ``(N, A)``; negative is unknown.
        group_names: names by number: flat for one attribute, a sequence for each of several.
        attribute_names: names of the attributes.
        intersections: with several attributes, add the crossed groups as one more family; an example of which any
            attribute is unknown is unknown there.

    Raises:
        ValueError: if there are names for another number of attributes.

    Example:
        >>> group = torch.tensor([[0, 1], [1, 1], [1, -1]])
        >>> found = families(group, [["f", "m"], ["old", "young"]], ["sex", "age"], intersections=True)
        >>> [(family.name, family.names, family.group.tolist()) for family in found][1:]
        [('age', ['young'], [0, 0, -1]), ('sex, age', ['f, young', 'm, young'], [0, 1, -1])]
    """
    columns = group.reshape(len(group), -1).long().unbind(1)
    for option, given in (("attribute_names", attribute_names), ("group_names", _nested(group_names))):
        if given and len(given) != len(columns):
            raise ValueError(
                f"{option} name {len(given)} attribute{'s' * (len(given) > 1)} and the group has {len(columns)}; "
                "give a name, or a sequence of names, for each"
            )
    found = []
    for number, column in enumerate(columns):
        present, place = _dense(column)
        named = [group_name(int(code), group_names, number) for code in present]
        found.append(Family(attribute_names[number] if attribute_names else f"attribute {number}", place, named))
    if intersections and len(found) > 1:
        found.append(_crossed(found))
    return found


def group_name(code: int, group_names: Names | None, attribute: int = 0) -> str:
    """The name of a group, or its number.

    Example:
        >>> group_name(1, ["f", "m"]), group_name(1, [["f", "m"], ["old", "young"]], 1), group_name(2, ["f", "m"])
        ('m', 'young', 'group 2')
    """
    names = _nested(group_names)
    own = names[attribute] if attribute < len(names) else ()
    return own[code] if 0 <= code < len(own) else f"group {code}"


def some(names: Sequence[str], most: int = 10) -> str:
    """Names as a sentence lists them, each once; of very many the first.

    Example:
        >>> some(["a, b", "c", "c"]), some(["a", "b", "c"], most=1)
        ('a, b; c', 'a; and 2 more')
    """
    names = list(dict.fromkeys(names))
    more = f"; and {len(names) - most} more" if len(names) > most else ""
    return "; ".join(names[:most]) + more  # names of crossed groups have commas


def _nested(names: Names | None) -> list[Sequence[str]]:
    if not names:
        return []
    flat = [name for name in names if isinstance(name, str)]
    return [flat] if flat else [name for name in names if not isinstance(name, str)]


def _dense(column: Tensor) -> tuple[Tensor, Tensor]:
    known, place = column >= 0, torch.full_like(column, -1)
    present, place[known] = column[known].unique(return_inverse=True)
    return present, place


def _crossed(parts: Sequence[Family]) -> Family:
    code, known = torch.zeros_like(parts[0].group), torch.ones_like(parts[0].group, dtype=torch.bool)
    for part in parts:
        code, known = code * max(1, len(part.names)) + part.group, known & (part.group >= 0)
    present, place = _dense(torch.where(known, code, -1))
    names = []
    for crossing in present.tolist():
        own: list[str] = []
        for part in reversed(parts):
            crossing, number = divmod(crossing, len(part.names))
            own.insert(0, part.names[number])
        names.append(", ".join(own))
    return Family(", ".join(part.name for part in parts), place, names)
