"""The layers of a model: what each weighs, how much it computes, how many bits its weights need."""

import io
from base64 import b64encode
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_guard.evaluation.base import Picture
from lightning_guard.evaluation.subject import Subject

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
_SHOWN = 30


@dataclass(frozen=True)
class Layer:
    """One Linear or convolution layer.

    Args:
        name: in the module.
        kind: of its class.
        shape: of its weight.
        parameters: weight and bias; none where the weight is another layer's.
        macs: multiply-accumulates for one example, zeros included; None if no pass through it was seen.
        sparsity: fraction of the weight that is exactly zero.
        bits: that each weight needs: of a code where all weights are multiples of a scale or at most 256 values,
            else of its dtype.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    macs: float | None
    sparsity: float
    bits: int


def layers(subject: Subject) -> list[Layer]:
    """The Linear and convolution layers of a model in order; its state is not changed.

    Raises:
        ValueError: if the loader holds no batch.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.5, 0.0, -0.5], [0.5, 0.0, 0.0]]))
        >>> (found,) = layers(Subject(layer, [(torch.zeros(4, 3), torch.zeros(4).long())]))
        >>> found.parameters, found.macs, found.sparsity, found.bits
        (8, 6.0, 0.5, 32)
    """
    with subject.still():
        step = next(subject.batches(), None)
        if step is None:
            raise ValueError("loader holds no batch, so nothing can pass the model; give the test data")
        macs = multiplications(subject, step.inputs)
    found: list[Layer] = []
    seen: list[Tensor] = []
    for name, layer in subject.module.named_modules():
        if not isinstance(layer, LAYERS):
            continue
        weight = layer.weight.detach()
        own = sum(p.numel() for p in layer.parameters() if all(p is not other for other in seen))
        seen += list(layer.parameters())
        zeros = 1 - int(weight.count_nonzero()) / max(1, weight.numel())
        kind = type(layer).__name__
        found.append(Layer(name or kind, kind, tuple(weight.shape), own, macs.get(name), zeros, needed_bits(weight)))
    return found


def needed_bits(weight: Tensor) -> int:
    """Bits of a code for each weight, of those forms in which it is stored without loss; else of its dtype.

    The sign of a zero counts for nothing here.
    """
    from lightning_guard.export.codes import forms  # export rests on evaluation

    def worth(coded: Any) -> bool:  # few values of a small layer are no code if their list is as long as the layer
        return not coded.masked and all(len(listed) <= len(coded.blobs[-1]) for listed in coded.blobs)

    return min(coded.bits for coded in forms(weight + 0.0 if weight.is_floating_point() else weight) if worth(coded))


def multiplications(subject: Subject, inputs: Any) -> dict[str, float]:
    """Multiply-accumulates of each layer for one example, zeros included; those that no hook sees are left out."""
    called: dict[str, float] = {}
    with ExitStack() as undo:
        for name, layer in subject.module.named_modules():
            if not isinstance(layer, LAYERS):
                continue

            def count(layer: Any, args: Any, output: Tensor, name: str = name) -> None:
                # An output of a Linear or convolution, an input of a transposed one, meets so many weights.
                places = args[0] if isinstance(layer, TRANSPOSED) else output
                called[name] = called.get(name, 0) + places.numel() * layer.weight[0].numel() / 2

            undo.callback(layer.register_forward_hook(count).remove)
        subject.forward(rows(inputs, 2))  # two: a network that squeezes gives no logits for a single example
    return called


def rows(inputs: Any, n: int) -> Any:
    """The first ``n`` examples, again from the first where there are fewer."""
    return apply_to_collection(inputs, Tensor, lambda t: t[torch.arange(n, device=t.device) % len(t)])


def table(found: Sequence[Layer]) -> str:
    """The layers as a Markdown table, with their sum.

    Example:
        >>> print(table([Layer("head", "Linear", (2, 3), 8, 6.0, 0.5, 8)]))
        | layer | kind | shape | parameters | multiplications | sparsity | bits |
        |---|---|---|---:|---:|---:|---:|
        | head | Linear | 2 x 3 | 8 | 6 | 50.0% | 8 |
        | all | | | 8 | 6 | 50.0% | |
    """
    lines = [
        "| layer | kind | shape | parameters | multiplications | sparsity | bits |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for one in found:
        macs = "not seen" if one.macs is None else f"{one.macs:,.0f}"
        shape = " x ".join(map(str, one.shape))
        name = one.name.replace("|", "\\|")
        lines.append(
            f"| {name} | {one.kind} | {shape} | {one.parameters:,} | {macs} | {one.sparsity:.1%} | {one.bits} |"
        )
    sizes = [_weights(one) for one in found]
    zeros = sum(size * one.sparsity for size, one in zip(sizes, found, strict=True)) / max(1, sum(sizes))
    total = sum(one.macs or 0 for one in found)
    lines.append(f"| all | | | {sum(one.parameters for one in found):,} | {total:,.0f} | {zeros:.1%} | |")
    return "\n".join(lines)


def picture(found: Sequence[Layer]) -> Picture:
    """The largest layers: weights with the zeros among them, multiplications, and bits."""
    from matplotlib.figure import Figure
    from matplotlib.style import context

    largest = sorted(found, key=_weights, reverse=True)[:_SHOWN]
    shown = [one for one in found if any(one is other for other in largest)]
    places = range(len(shown))
    names = [one.name if len(one.name) <= 40 else f"…{one.name[-39:]}" for one in shown]
    with context(["default", {"text.parse_math": False, "font.size": 8.0}]):
        figure = Figure(figsize=(8.5, 1.2 + 0.24 * len(shown)), dpi=110, layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        left.barh(places, [_weights(one) for one in shown], color="#c9d1dc", label="zero")
        left.barh(places, [_weights(one) * (1 - one.sparsity) for one in shown], color="#2b5fa8", label="not zero")
        right.barh(places, [one.macs or 0 for one in shown], color="#7a8aa0")
        for place, one in zip(places, shown, strict=True):
            left.annotate(f" {one.bits} bits", (_weights(one), place), va="center", color="#1d2433")
        left.set_yticks(list(places), names)
        left.invert_yaxis()
        left.set_xlabel("weights")
        left.margins(x=0.18)
        left.legend(frameon=False)
        right.set_xlabel("multiplications an example")
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    about = "Weights of each layer, how many are not zero, the bits that each needs, and how often it multiplies."
    return Picture(b64encode(file.getvalue()).decode(), "Layers", about)


def _weights(layer: Layer) -> int:
    count = 1
    for size in layer.shape:
        count *= size
    return count
