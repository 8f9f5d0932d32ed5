"""What describes no threat is refused, one clear error each."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_guard.functional.attacks.threat import Edge, ThreatModel


def validate(threat: "ThreatModel") -> None:
    """Raise a ValueError that names the first option of ``threat`` that describes none, its value and the remedy."""
    if not 0 <= threat.eps < float("inf"):
        raise ValueError(f"eps={threat.eps} is no radius; give a finite number of at least 0, in input units")
    if threat.norm not in ("linf", "l2", "l1"):
        raise ValueError(f"norm={threat.norm!r} is not known; give 'linf', 'l2' or 'l1'")
    if threat.per not in ("example", "position"):
        raise ValueError(f"per={threat.per!r} is not known; give 'example' or 'position'")
    if threat.bounds is not None:
        _bounds(threat.bounds)
    for std in each(threat.std):
        if not std > 0:
            raise ValueError(f"std={threat.std} must be positive; give what the inputs were divided by")
    for size in each(threat.unit):
        if not 0 < size < float("inf"):
            raise ValueError(f"unit={threat.unit} measures nothing; give positive numbers, in input units")
    _columns(threat)


def _bounds(bounds: "tuple[Edge, Edge]") -> None:
    example = "give (lowest, highest), e.g. (0.0, 1.0)"
    if len(bounds) != 2:
        raise ValueError(f"bounds={bounds} are no pair; {example}")
    low, high = each(bounds[0]), each(bounds[1])
    if not low or not high:
        raise ValueError(f"bounds={bounds} hold no number; {example}")
    if len(low) != len(high) and 1 not in (len(low), len(high)):
        raise ValueError(f"bounds hold {len(low)} lowest and {len(high)} highest values; give as many of both")
    size = max(len(low), len(high))
    for a, b in zip(low * (size // len(low)), high * (size // len(high)), strict=True):
        if not a < b:
            raise ValueError(f"bounds={bounds} hold nothing{f' at ({a}, {b})' if size > 1 else ''}; {example}")


def _columns(threat: "ThreatModel") -> None:
    hot = [index for group in threat.one_hot or () for index in group]
    for group in threat.one_hot or ():
        if len(group) < 2:
            raise ValueError(f"one_hot holds the group {list(group)}; give at least 2 columns a group")
    for option, columns in (
        ("one_hot", hot),
        ("integer", threat.integer),
        ("increasing", threat.increasing),
        ("decreasing", threat.decreasing),
    ):
        if any(index < 0 for index in columns or ()):
            raise ValueError(
                f"{option}={getattr(threat, option)} must count from the front; give indices of at least 0"
            )
        if len(set(columns or ())) < len(columns or ()):
            raise ValueError(f"{option}={getattr(threat, option)} names an index twice; give each index once")
    for option in ("integer", "increasing", "decreasing"):
        if both := set(hot) & set(getattr(threat, option) or ()):
            raise ValueError(f"{option} and one_hot both name {sorted(both)}; a category is no number, name it once")
    if both := set(threat.increasing or ()) & set(threat.decreasing or ()):
        raise ValueError(f"increasing and decreasing both name {sorted(both)}; such an index is immutable")
    if threat.switches < 0 or threat.switches != int(threat.switches):
        raise ValueError(f"switches={threat.switches} is no number of groups; give at least 0")
    if threat.switches != 1 and not threat.one_hot:
        raise ValueError(f"switches={threat.switches} without categories to switch; name their columns in one_hot")
    if threat.per == "position" and (threat.one_hot or threat.integer):
        raise ValueError("per='position' is for sequences, one_hot and integer for rows of a table; give only one")


def each(value: float | Sequence[float] | None) -> list[float]:
    """The values of an option that is one number, one an index, or None."""
    return [] if value is None else [value] if isinstance(value, float | int) else list(value)
