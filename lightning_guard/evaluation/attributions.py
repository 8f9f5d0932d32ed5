"""The examples that are explained, and what their explanations look like."""

import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_guard.evaluation.base import Picture
from lightning_guard.evaluation.subject import Subject, column, part_of

_SHOWN = 6
_LONGEST = 5  # columns of an example


def rows_of(subject: Subject, chosen: Tensor) -> tuple[Tensor, Tensor] | str:
    """Inputs and targets of the examples at these ascending places, on the model's device, or why there are none.

    The model must stand still.
    """
    x: list[Tensor] = []
    y: list[Tensor] = []
    first = 0
    for step in subject.batches():
        inputs, target = step.inputs, part_of(step, "target")
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or isinstance(target, str):
            kind = type(inputs).__name__ if not isinstance(inputs, Tensor) else str(inputs.dtype)
            return f"Nothing is explained: the inputs are a {kind} and no floating tensor, which has gradients."
        here = chosen[(chosen >= first) & (chosen < first + len(inputs))].to(inputs.device) - first
        x.append(inputs[here].detach().clone())
        y.append(column(target)[here])
        first += len(inputs)
    return torch.cat(x), torch.cat(y)


def maps_of(subject: Subject, x: Tensor, y: Tensor, attributions: Tensor, about: str) -> dict[str, Picture]:
    """Pictures of a few examples with what moved their scores; of images also the mean map."""
    names = [subject.class_name(int(one)) if subject.kind != "regression" else f"{float(one):.3g}" for one in y]
    if x.dim() == 4 and x.shape[1] in (1, 3):
        size = attributions.abs().sum(1)
        common = sorted(dict.fromkeys(names), key=lambda name: -names.count(name))[: _SHOWN - 1]
        means = {"all": size.mean(0)} | {
            name: size[[i for i, own in enumerate(names) if own == name]].mean(0) for name in common
        }
        images = x[:_SHOWN].detach().cpu().float()
        maps = attributions[:_SHOWN].sum(1)
        local = f"Examples of the test set above, below what raised (blue) and lowered (red) the right class. {about}"
        overall = f"Mean absolute attribution of each pixel, of all and of classes; black where there is none. {about}"
        return {
            "explanation/mean": Picture(_means_png(means), "Where the model looks", overall),
            "explanation/examples": Picture(_images_png(images, maps, names), "Single decisions", local),
        }
    if x.dim() != 2:
        return {}
    given = subject.feature_names
    columns = (
        list(given) if given is not None and len(given) == x.shape[1] else [f"column {i}" for i in range(x.shape[1])]
    )
    local = (
        f"Examples of the test set, and the {_LONGEST} columns that moved the score of the right class most. {about}"
    )
    return {"explanation/examples": Picture(_table_png(attributions[:3], columns, names), "Single decisions", local)}


def _png(draw: Any, width: float, height: float) -> str:
    from matplotlib.figure import Figure
    from matplotlib.style import context

    with context(["default", {"text.parse_math": False, "font.size": 8.0}]):
        figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
        draw(figure)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return b64encode(file.getvalue()).decode()


def _means_png(means: Mapping[str, Tensor]) -> str:
    def draw(figure: Any) -> None:
        for axes, (name, mean) in zip(figure.subplots(1, len(means), squeeze=False)[0], means.items(), strict=True):
            axes.imshow(mean.numpy(), cmap="gray", vmin=0)
            axes.set_title(_short(name), color="#1d2433", pad=3)
            axes.set_axis_off()

    return _png(draw, 1.1 * len(means), 1.4)


def _images_png(images: Tensor, maps: Tensor, names: Sequence[str]) -> str:
    low, high = images.amin(), images.amax()
    shades = ((images - low) / (high - low + 1e-12)).permute(0, 2, 3, 1).squeeze(-1).numpy()

    def draw(figure: Any) -> None:
        grid = figure.subplots(2, len(images), squeeze=False)
        for above, below, image, own, name in zip(*grid, shades, maps, names, strict=False):
            above.imshow(image, cmap="gray", vmin=0, vmax=1)
            above.set_title(_short(name), color="#1d2433", pad=3)
            reach = float(own.abs().amax()) or 1.0
            below.imshow(own.numpy(), cmap="RdBu", vmin=-reach, vmax=reach)
            above.set_axis_off()
            below.set_axis_off()

    return _png(draw, 1.1 * len(images), 2.5)


def _table_png(attributions: Tensor, columns: Sequence[str], names: Sequence[str]) -> str:
    def draw(figure: Any) -> None:
        grid = figure.subplots(1, len(attributions), squeeze=False)[0]
        for axes, own, name in zip(grid, attributions, names, strict=False):
            longest = own.abs().topk(min(_LONGEST, len(own))).indices.tolist()
            axes.barh(
                range(len(longest)),
                [float(own[i]) for i in longest],
                color=["#2b5fa8" if own[i] > 0 else "#a5321b" for i in longest],
            )
            axes.set_yticks(range(len(longest)), [_short(columns[i], 24) for i in longest])
            axes.invert_yaxis()
            axes.set_title(_short(name, 30), color="#1d2433")
            axes.set_xlabel("attribution")

    return _png(draw, 3.2 * len(attributions), 1.9)


def _short(name: str, length: int = 14) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}\u2026"
