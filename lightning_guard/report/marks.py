"""What is put on a sheet: rows of dots, lines, ticks, and names that keep out of each other's way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_guard.report.drawing import HAIR, INK, MUTED, Look, elide, spread
from lightning_guard.report.units import MINUS, scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Dots(NamedTuple):
    """A row of a dot plot: thin seeds, a thick mean, hollow where the seeds disagree."""

    y: float
    look: Look
    seeds: Sequence[float]
    mean: float
    hollow: bool = False


def dots(axes: Axes, rows: Sequence[Dots], unit: str, origin: float | None = None) -> None:
    """Draws rows of dots on hairlines, each joined to ``origin`` where there is one."""
    values = [value for row in rows for value in (*row.seeds, row.mean)]
    step, suffix = scale(unit, max(map(abs, values)))
    axes.hlines(sorted({row.y for row in rows}), 0, 1, colors=HAIR, linewidth=0.9, transform=axes.get_yaxis_transform())
    for row in rows:
        colour = row.look.colour
        if origin is not None:
            axes.plot(
                [origin / step, row.mean / step],
                [row.y, row.y],
                color=colour,
                linewidth=2.6,
                alpha=0.35,
                solid_capstyle="butt",
            )
            axes.plot(
                [origin / step], [row.y], marker="|", markersize=12, markeredgewidth=1.2, color=MUTED, clip_on=False
            )
        seeds = [(value / step, row.y) for value in row.seeds]
        points(axes, row.look, seeds, (row.mean / step, row.y), row.hollow)
    axes.set_yticks([])
    axes.margins(x=0.04)
    widen(axes, unit)
    ticks(axes.xaxis, suffix, 4)


def points(
    axes: Axes,
    look: Look,
    seeds: Sequence[tuple[float, float]],
    mean: tuple[float, float],
    hollow: bool = False,
) -> None:
    """Draws the seeds of an arm small and their mean large."""
    # Axes.plot and not Axes.scatter, which takes five times as long.
    for places, shape, size, face, alpha, order in (
        (seeds, "o", 3.5, look.colour, 0.45, 3),
        ([mean], look.marker, 7.0, "white" if hollow else look.colour, 1.0, 4),
    ):
        axes.plot(
            [x for x, _ in places],
            [y for _, y in places],
            linestyle="",
            marker=shape,
            markersize=size,
            markerfacecolor=face,
            markeredgecolor=look.colour,
            markeredgewidth=1.4 * (order == 4),
            alpha=alpha,
            zorder=order,
            clip_on=False,
        )


def widen(axes: Axes, *units: str) -> None:
    """Keeps small differences small: an axis spans 2 points, or a twentieth of its values, at the least."""
    for which, unit in zip("xy", units, strict=False):
        low, high = getattr(axes, f"get_{which}lim")()
        least = 2.0 if unit == "fraction" else 0.05 * max(abs(low), abs(high))
        if high - low < least:
            middle = (low + high) / 2
            getattr(axes, f"set_{which}lim")(middle - least / 2, middle + least / 2)


def ticks(axis: Any, suffix: str, number: int, whole: bool = False) -> None:
    """Sets about ``number`` ticks at round places, whole numbers only where nothing lies between."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(number, steps=[1, 2, 5, 10] if whole else [1, 2, 2.5, 5, 10], integer=whole))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}".replace("-", MINUS) + suffix))


def write(
    axes: Axes,
    text: str,
    x: float,
    y: float,
    dx: float = 0.0,
    dy: float = 0.0,
    side: str = "left",
    colour: str = INK,
    size: float = 9.5,
    weight: str = "normal",
) -> None:
    """Writes at ``x`` (a fraction of the axes) and ``y`` (data), moved by ``dx`` and ``dy`` points."""
    axes.annotate(
        text,
        (x, y),
        (dx, dy),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        ha=side,
        va="center_baseline",
        color=colour,
        fontsize=size,
        weight=weight,
        annotation_clip=False,
    )


def key(figure: Figure, x: float, y: float, look: Look, text: str) -> None:
    """Draws a hollow mark of this look at ``x`` and ``y`` in points, and says beside it what it stands for."""
    from matplotlib.lines import Line2D

    width, height = figure.get_size_inches() * 72
    mark = Line2D(
        [x / width],
        [y / height],
        marker=look.marker,
        markersize=7,
        markerfacecolor="white",
        markeredgecolor=look.colour,
        markeredgewidth=1.4,
    )
    figure.add_artist(mark)
    figure.text((x + 10) / width, y / height, text, fontsize=9, va="center_baseline")


def titles(axes: Axes, x: str, y: str | None = None) -> None:
    """Names both axes, the upright one lying down, where it can be read."""
    axes.set_xlabel(x, fontsize=9, color=MUTED, labelpad=4)
    if y is not None:
        axes.annotate(
            y, (0, 1), (-38, 12), xycoords="axes fraction", textcoords="offset points", fontsize=9, color=MUTED
        )


def line(
    axes: Axes, x: Sequence[float | None], y: Sequence[float | None], colour: str, width: float, alpha: float
) -> None:
    """Draws a curve with gaps where ``y`` is ``None``."""
    # A sheet this narrow shows some hundred points; a curve of many thousand would only make the page heavy.
    stride = max(1, len(x) // 250)
    kept = [*range(0, len(x) - 1, stride), len(x) - 1] if x else []
    axes.plot(
        [x[i] for i in kept],
        [float("nan") if (value := y[i]) is None else value for i in kept],
        color=colour,
        linewidth=width,
        alpha=alpha,
        solid_joinstyle="round",
        solid_capstyle="round",
    )


def name_ends(axes: Axes, ends: Mapping[str, tuple[float, float]], looks: Mapping[str, Look]) -> None:
    """Writes each arm's name beside the end of its line, moved apart where lines meet."""
    _settle(axes)
    points = [axes.transData.transform(end) for end in ends.values()]
    box = axes.get_window_extent()
    heights = spread([float(y) for _, y in points], 13.0, box.y0, box.y1)
    for arm, (x, y), height in zip(ends, points, heights, strict=True):
        axes.annotate(
            "",
            (x, y),
            (box.x1 + 9, height),
            xycoords="figure points",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": looks[arm].colour, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 1},
        )
        axes.annotate(
            elide(arm, 22),
            (box.x1 + 12, height),
            xycoords="figure points",
            fontsize=9,
            va="center_baseline",
            annotation_clip=False,
        )


def name_points(
    axes: Axes,
    points: Mapping[str, tuple[float, float]],
    width: float,
    cross: str | None,
    others: Sequence[tuple[float, float]] = (),
    texts: Mapping[str, str] | None = None,
) -> None:
    """Writes each arm's name beside its point, where it covers least of all points and of the lines at ``cross``.

    ``others`` are places without a name that should stay uncovered too; ``texts`` is written in place of names.
    """
    _settle(axes)
    inside = axes.get_window_extent()
    page = Box(inside.x0, inside.y0, width - 4, inside.y1)
    centres = {arm: axes.transData.transform(point) for arm, point in points.items()}
    taken = [Box(x - 7, y - 7, x + 7, y + 7) for x, y in centres.values()]
    taken += [Box(x - 5, y - 5, x + 5, y + 5) for x, y in map(axes.transData.transform, others)]
    if cross in centres:
        x, y = centres[cross]
        taken += [Box(x - 1, page.bottom, x + 1, page.top), Box(page.left, y - 1, page.right, y + 1)]
    for arm, (x, y) in centres.items():
        text = elide(texts[arm] if texts else arm, 26)
        places = {move: _box(text, x + move[0], y + move[1], move[2]) for move in _MOVES}
        costs = {move: 50 * box.outside(page) + sum(map(box.shared, taken)) for move, box in places.items()}
        dx, dy, side = best = min(_MOVES, key=costs.__getitem__)
        taken.append(places[best])
        axes.annotate(
            text,
            (x, y),
            (dx, dy),
            xycoords="figure points",
            textcoords="offset points",
            ha=side,
            va="center_baseline",
            fontsize=9,
            annotation_clip=False,
        )


class Box(NamedTuple):
    """A rectangle in points."""

    left: float
    bottom: float
    right: float
    top: float

    def shared(self, other: Box) -> float:
        """The area that both cover."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, wide) * max(0.0, high)

    def outside(self, page: Box) -> float:
        """How far this sticks out of ``page``."""
        return sum(
            max(0.0, beyond)
            for beyond in (
                page.left - self.left,
                page.bottom - self.bottom,
                self.right - page.right,
                self.top - page.top,
            )
        )


# Where a name may stand beside its point, the best first.
_MOVES = (
    (8, 8, "left"),
    (8, -8, "left"),
    (-8, 8, "right"),
    (-8, -8, "right"),
    (10, 0, "left"),
    (-10, 0, "right"),
    (0, 14, "center"),
    (0, -14, "center"),
)


def _box(text: str, x: float, y: float, side: str) -> Box:
    wide = 5.6 * len(text)  # near enough, whatever the typeface of the page
    left = x - {"left": 0.0, "center": wide / 2, "right": wide}[side]
    return Box(left, y - 6, left + wide, y + 6)


def _settle(axes: Axes) -> None:
    """Fixes the limits, so that places in points can be asked for."""
    axes.autoscale_view()
    axes.set_xlim(axes.get_xlim())
    axes.set_ylim(axes.get_ylim())
