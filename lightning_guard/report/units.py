"""Numbers as people read them, by unit."""

from __future__ import annotations

MINUS = "\N{MINUS SIGN}"
MISSING = "n/a"


def shown(value: float | None, unit: str, like: float | None = None) -> str:
    """Returns ``value`` for a table, in the multiple of its unit that suits ``like``, or itself.

    >>> shown(0.8714, "fraction"), shown(73.2, "s"), shown(407_080, "bytes"), shown(None, "s")
    ('87.1%', '1 min 13 s', '407.1 kB', 'n/a')
    >>> shown(0.278, "s"), shown(0.278, "s", like=12.0)
    ('278 ms', '0.28 s')
    """
    if value is None:
        return MISSING
    return (MINUS if value < 0 else "") + _magnitude(abs(value), unit, like)


def change(value: float | None, unit: str, like: float | None = None) -> str:
    """Returns a difference with its sign; differences of fractions are in points.

    >>> change(0.031, "fraction"), change(61.0, "s"), change(0.0, "count")
    ('+3.1 pts', '+1 min 1 s', '0')
    """
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    sign = "+" if value > 0 else MINUS
    if unit == "fraction":
        return f"{sign}{_percent(abs(value))} pts"
    return sign + _magnitude(abs(value), unit, like)


def factor(before: float | None, after: float | None, unit: str) -> str:
    """Returns "6.1 times" where a factor says more than a difference, else nothing.

    >>> factor(12.0, 73.2, "s"), factor(0.5, 0.9, "fraction"), factor(407e3, 102e3, "bytes")
    ('6.1 times', '', '0.25 times')
    """
    if unit not in ("s", "bytes", "count") or not before or not after or before < 0 or after < 0:
        return ""
    times = after / before
    if 2 / 3 < times < 1.5:
        return ""
    return f"{times:,.0f} times" if times >= 100 else f"{times:.1f} times" if times > 1 else f"{times:.2g} times"


def scale(unit: str, largest: float) -> tuple[float, str]:
    """Returns what one mark on an axis stands for, and its suffix, so that ticks are short round numbers.

    >>> scale("fraction", 0.9), scale("bytes", 4.1e5), scale("s", 500.0)
    ((0.01, '%'), (1000.0, ' kB'), (60.0, ' min'))
    """
    steps: dict[str, list[tuple[float, str]]] = {
        "fraction": [(0.01, "%")],
        "bytes": [(1e9, " GB"), (1e6, " MB"), (1e3, " kB"), (1.0, " B")],
        "s": [(3600.0, " h"), (60.0, " min"), (1.0, " s"), (1e-3, " ms"), (1e-6, " \u00b5s")],
        "count": [(1e9, " G"), (1e6, " M"), (1e3, " k"), (1.0, "")],
        "ratio": [(1.0, "")],
    }
    choices = steps.get(unit, [(1.0, f" {unit}" if 0 < len(unit) < 8 else "")])
    return next((choice for choice in choices if largest >= 2 * choice[0]), choices[-1])


def count(number: int, noun: str) -> str:
    """Returns "1 arm", "3 arms"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _magnitude(value: float, unit: str, like: float | None = None) -> str:
    like = value if like is None else abs(like)
    if unit == "fraction":
        return f"{_percent(value)}%"
    if unit == "s":
        return _seconds(value, like)
    if unit == "bytes":
        for step, suffix in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
            if like >= 0.9995 * step:
                return f"{value / step:,.1f} {suffix}"
        return f"{_digits(value)} B"
    if unit == "count" and like >= 1e7:
        return f"{value / 1e9:,.1f} G" if like >= 1e9 else f"{value / 1e6:,.1f} M"
    return _digits(value) + (f" {unit}" if unit not in ("", "count", "ratio") else "")


def _percent(value: float) -> str:
    # More digits where one would turn "hardly any" into 0 or "nearly all" into 100.
    for digits in (1, 2, 3):
        text = f"{100 * value:.{digits}f}"
        if float(text) not in (0, 100) or value in (0, 1):
            break
    return text


def _seconds(value: float, like: float) -> str:
    if value >= 3599.5:
        hours, minutes = divmod(round(value / 60), 60)
        return f"{hours:,} h {minutes:02} min"
    if value >= 59.95:
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes} min {seconds} s"
    if value >= 1 or value == 0:
        return f"{value:.1f} s"
    if like >= 1:
        return f"{value:.2f} s" if value >= 0.095 else f"{_digits(value)} s"
    return f"{_digits(1e3 * value)} ms" if max(value, like) >= 1e-3 else f"{_digits(1e6 * value)} \u00b5s"


def _digits(value: float) -> str:
    """Three significant digits, except that whole numbers stay whole."""
    if value == int(value) and value < 1e15:
        return f"{int(value):,}"
    if value >= 1e15 or value < 1e-4:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{exponent}".replace("-", MINUS)
    if value >= 99.95:
        return f"{value:,.0f}"
    digits = next(digits for digits, least in enumerate((9.995, 0.9995, 0.00095, 0.0), 1) if value >= least)
    return f"{value:.{digits}f}"
