"""What attacked inputs look like."""

import io
from base64 import b64encode

from torch import Tensor

from lightning_guard.evaluation.base import Evidence, Picture
from lightning_guard.evaluation.siege import Siege
from lightning_guard.evaluation.subject import Subject, predicted
from lightning_guard.functional import ThreatModel

_SHOWN = 6


def attacked_images(subject: Subject, siege: Siege) -> Evidence:
    """A picture of the first right examples, what the attack made of them, and the difference; nothing but for images.

    Images are ``(N, 1, H, W)`` or ``(N, 3, H, W)``, at least 4 by 4 pixels. The model must stand still.
    """
    chunk = next((chunk for chunk in siege.chunks if chunk.clean.any()), None)
    if chunk is None or chunk.x.dim() != 4 or chunk.x.shape[1] not in (1, 3) or min(chunk.x.shape[2:]) < 4:
        return Evidence()
    rows = chunk.clean.nonzero()[:_SHOWN, 0]
    x, moved = chunk.x[rows], chunk.moved[rows]
    labels = [[subject.class_name(int(c)) for c in predicted(subject.forward(each))] for each in (x, moved)]
    before, after = _shades(x, x, siege.threat), _shades(moved, x, siege.threat)
    factor = 0.5 / (after - before).abs().amax().clamp_min(1e-6)
    difference = 0.5 + (after - before) * factor
    said = "; ".join(
        f"{one} becomes {other}" if one != other else f"{one} stays" for one, other in zip(*labels, strict=True)
    )
    about = (
        f"The first {len(rows)} test examples that are right without attack. Above: as they are. Middle: as the attack "
        f"leaves them at eps {siege.threat.eps:.4g}. Below: the difference, {float(factor):.2g} times. {said}."
    )
    png = _png([before, after, difference], [*labels, [""] * len(rows)])
    return Evidence(pictures={"robustness/examples": Picture(png, "Attacked examples", about)})


def _shades(images: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
    """Images on a scale from 0 to 1."""
    low, high = threat.limits(x)
    if low is None or high is None or not (low.isfinite().all() and high.isfinite().all()):
        low, high = x.amin(), x.amax()
    return ((images - low) / (high - low + 1e-12)).clamp(0, 1).float().cpu()


def _png(rows: list[Tensor], labels: list[list[str]]) -> str:
    from matplotlib.figure import Figure
    from matplotlib.style import context

    count = len(rows[0])
    with context(["default", {"text.parse_math": False, "font.size": 8.0}]):
        figure = Figure(figsize=(1.1 * count, 3.6), dpi=110)
        grid = figure.subplots(len(rows), count, squeeze=False)
        for line, images, names in zip(grid, rows, labels, strict=True):
            for axes, image, name, right in zip(line, images, names, labels[0], strict=True):
                axes.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
                short = name if len(name) <= 14 else f"{name[:13]}\u2026"
                axes.set_title(short, color="#1d2433" if name == right else "#a5321b", pad=3)
                axes.set_axis_off()
        figure.subplots_adjust(0.01, 0.01, 0.99, 0.93, 0.06, 0.22)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return b64encode(file.getvalue()).decode()
