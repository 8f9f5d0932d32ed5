"""Evidence where people already look: the loggers of their Trainer."""

from __future__ import annotations

import io
import re
from base64 import b64decode
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pytorch_lightning.loggers import Logger

from lightning_guard.evaluation.base import Evidence
from lightning_guard.report.drawing import collected
from lightning_guard.report.summary import in_order

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def log_evidence(evidence: Evidence, loggers: Iterable[Logger], step: int = 0) -> None:
    """Log what evaluators found, figures under their own names and pictures as images.

    Scalars go through Lightning's generic ``Logger.log_metrics``, so every logger takes them. Images go to TensorBoard
    (``experiment.add_figure``), Weights and Biases (``log_image``) and MLflow (``experiment.log_figure``); other
    loggers have no place for them. Figures without a value are left out. Curves become ``<name>/<place>``, bars
    ``<name>/<category>``.

    Args:
        evidence: of one model, all evaluators joined.
        loggers: of the Trainer, ``trainer.loggers``.
        step: at which it is logged, usually ``trainer.global_step``.

    Example::

        trainer.fit(model, data)
        log_evidence(Task().evaluate(subject), trainer.loggers, trainer.global_step)
    """
    numbers = {key: figure.value for key, figure in evidence.figures.items() if figure.value is not None}
    for key, (low, high) in evidence.intervals.items():
        if key in numbers:
            numbers |= {f"{key}/low": low, f"{key}/high": high}
    for key, curve in evidence.curves.items():
        numbers |= {f"{key}/{x:.4g}": y for x, y in zip(curve.x, curve.y, strict=True) if y is not None}
    for key, bars in evidence.bars.items():
        numbers |= {f"{key}/{name}": y for name, y in zip(bars.categories, bars.values, strict=True) if y is not None}
    images = {key: _figure_of(picture.png, picture.label) for key, picture in evidence.pictures.items()}
    _log(loggers, numbers, images, step)


def log_report(report: Mapping[str, Any], loggers: Iterable[Logger], step: int = 0) -> None:
    """Log a finished comparison: the mean of each figure over the seeds, and the figures of its page as images.

    Names are ``compare/<arm>/<figure>``, and ``compare/<arm>/<figure>/difference`` for the mean paired difference from
    the baseline.

    Args:
        report: what :func:`lightning_guard.compare` returned or ``load_report`` read.
        loggers: any Lightning loggers, with or without a Trainer.
        step: at which it is logged.

    Example::

        log_report(lg.compare(...), [TensorBoardLogger("runs", name="comparison")])
    """
    numbers: dict[str, float] = {}
    entries = {(entry["figure"], entry["arm"]): entry for entry in report["summary"]}
    for arm in report["arms"]:
        for figure in in_order(report["figures"]):
            entry = entries[figure, arm["name"]]
            key = f"compare/{arm['name']}/{figure}"
            if entry["mean"] is not None:
                numbers[key] = entry["mean"]
            if entry["paired"] and entry["paired"]["mean"] is not None:
                numbers[f"{key}/difference"] = entry["paired"]["mean"]
    loggers = list(loggers)
    takers = [logger for logger in loggers if _taker(logger) is not None]
    _log(loggers, numbers, dict(_drawn(report)) if takers else {}, step)


def harmless(name: str) -> str:
    """A name that every logger takes: what MLflow refuses becomes an underscore.

    Example:
        >>> harmless("compare/dp=3+fair<b>/task/accuracy")
        'compare/dp_3_fair_b_/task/accuracy'
    """
    return re.sub(r"[^\w\-./ ]", "_", name)


def _drawn(report: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """The drawings of a report as live figures."""
    from lightning_guard.report import figures

    with collected() as found:
        figures.overview(report)
        figures.of_axes(report)
    for name, figure in found:
        yield f"compare/figures/{name}", figure


def _log(loggers: Iterable[Logger], numbers: Mapping[str, float], images: Mapping[str, Figure], step: int) -> None:
    safe: dict[str, float] = {}
    for name, value in numbers.items():
        key = harmless(name)
        while key in safe:  # two names that differ in what loggers refuse
            key += "_"
        safe[key] = float(value)
    for logger in loggers:
        logger.log_metrics(safe, step=step)
        take = _taker(logger)
        if take is not None:
            for name, figure in images.items():
                take(harmless(name), figure, step)
        logger.save()


def _taker(logger: Logger) -> Any:
    """What takes a figure in this logger, None if nothing does."""
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_figure"):  # TensorBoard
        return lambda name, figure, step: experiment.add_figure(name, figure, global_step=step, close=False)
    if hasattr(logger, "log_image"):  # Weights and Biases
        return lambda name, figure, step: logger.log_image(key=name, images=[_pixels(figure)], step=step)
    if hasattr(experiment, "log_figure") and hasattr(logger, "run_id"):  # MLflow
        return lambda name, figure, step: experiment.log_figure(logger.run_id, figure, f"{name}.png")
    return None


def _pixels(figure: Figure) -> Any:
    """A figure as an array ``(H, W, 4)`` of bytes."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def _figure_of(png: str, label: str) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    pixels = imread(io.BytesIO(b64decode(png)), format="png")
    figure = Figure(figsize=(pixels.shape[1] / 100, pixels.shape[0] / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1), label=label)
    axes.imshow(pixels)
    axes.set_axis_off()
    return figure
