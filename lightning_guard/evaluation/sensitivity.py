"""Which layers can be pruned and quantised, one at a time, and all of them for a stated loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_guard.evaluation.layers import LAYERS, TRANSPOSED
from lightning_guard.evaluation.subject import Subject, predicted
from lightning_guard.functional import example_losses, magnitude_masks


@dataclass(frozen=True)
class Trial:
    """One layer, changed alone.

    Args:
        layer: its name.
        sparsity: fraction of its weights that were set to zero, or None.
        bits: of its weights, or None.
        score: accuracy of the model then; of a regression, the share of the variance that it explains.
        loss: mean loss of the model then.
    """

    layer: str
    sparsity: float | None
    bits: int | None
    score: float
    loss: float


@dataclass(frozen=True)
class Sensitivity:
    """What the layers bear.

    Args:
        score: of the model as it is, see :class:`Trial`.
        loss: of the model as it is.
        trials: every layer with every sparsity and with every number of bits.
        sparsity: the proposed sparsity of each layer.
        bits: the proposed bits of each layer.
        reached: the score with all that is proposed at once, measured and not trained again.
        left_out: layers that were not changed, and why.
    """

    score: float
    loss: float
    trials: list[Trial]
    sparsity: dict[str, float]
    bits: dict[str, int]
    reached: float
    left_out: dict[str, str]

    def table(self) -> str:
        """The proposal as a Markdown table, most sensitive layer first."""
        worst = {one.layer: max(t.loss for t in self.trials if t.layer == one.layer) - self.loss for one in self.trials}
        lines = ["| layer | sparsity | bits | loss at worst |", "|---|---:|---:|---:|"]
        for name in sorted(worst, key=lambda name: -worst[name]):
            lines.append(f"| {name} | {self.sparsity[name]:.0%} | {self.bits[name]} | +{worst[name]:.3f} |")
        return "\n".join(lines)


def sensitivity(
    subject: Subject,
    max_drop: float = 0.01,
    sparsities: Sequence[float] = (0.5, 0.7, 0.8, 0.9, 0.95),
    bits: Sequence[int] = (8, 6, 4, 3, 2),
    examples: int = 1000,
) -> Sensitivity:
    """Prunes and quantises one layer at a time, and proposes what all of them bear together for a stated loss.

    Each layer takes the highest sparsity and the fewest bits whose loss alone stays under one bound, the same for all
    layers; the bound is the largest at which the model with all of it at once, measured, loses at most ``max_drop``.
    Training afterwards recovers some of it. Nothing is drawn, and the model is left as it is.

    Args:
        subject: the model, and examples that are not those it is tested on later.
        max_drop: of the accuracy, or of the share of the variance that a regression explains.
        sparsities: to try, each in (0, 1), smallest magnitudes first.
        bits: to try, each from 2 to 8: symmetric, a scale for each output channel.
        examples: how many to judge by, the first ones.

    Raises:
        ValueError: if an option makes no sense, nothing can be changed, or there are no targets to judge by.

    Example:
        >>> x = torch.eye(4)
        >>> layer = nn.Linear(4, 4)
        >>> _ = layer.weight.data.copy_(torch.eye(4) * 4)
        >>> found = sensitivity(Subject(nn.Sequential(layer), [(x, torch.arange(4))]), sparsities=[0.75])
        >>> found.sparsity, found.bits, found.reached
        ({'0': 0.75}, {'0': 2}, 1.0)
    """
    if not 0 <= max_drop <= 1:
        raise ValueError(f"max_drop={max_drop} is no part of the accuracy; give a number in [0, 1]")
    if not all(0 < one < 1 for one in sparsities):
        raise ValueError(f"sparsities={list(sparsities)} must each be in (0, 1)")
    if not all(2 <= one <= 8 for one in bits):
        raise ValueError(f"bits={list(bits)} must each be from 2 to 8")
    if subject.kind == "unknown":
        raise ValueError(f"there is nothing to judge by: {subject.problem}")
    weights, axes, left_out = _weights(subject.module)
    if not weights:
        raise ValueError("the model has no Linear or convolution layer with a weight of its own, so nothing to change")
    judge = _Judge(subject, examples)
    score, loss = judge({})

    def changed(name: str, drop: float, width: int) -> Tensor:
        weight = weights[name]
        if drop:
            weight = weight * magnitude_masks({name: weight}, drop, "layer")[name]
        return rounded(weight, width, axes[name]) if width < 32 else weight

    trials = []
    for name in weights:
        tried = [(drop, None) for drop in sorted(sparsities)] + [(None, width) for width in sorted(bits, reverse=True)]
        for drop, width in tried:
            trials.append(Trial(name, drop, width, *judge({name: changed(name, drop or 0.0, width or 32)})))

    def proposal(bound: float) -> tuple[dict[str, float], dict[str, int]]:
        fine = [one for one in trials if one.loss - loss <= bound]
        drops = {
            name: max((o.sparsity for o in fine if o.layer == name and o.sparsity), default=0.0) for name in weights
        }
        widths = {name: min((o.bits for o in fine if o.layer == name and o.bits), default=32) for name in weights}
        return drops, widths

    best: tuple[dict[str, float], dict[str, int]] = dict.fromkeys(weights, 0.0), dict.fromkeys(weights, 32)
    reached = score
    bounds = sorted({one.loss - loss for one in trials})
    low, high = 0, len(bounds)
    while low < high:
        middle = (low + high) // 2
        drops, widths = proposal(bounds[middle])
        found, _ = judge({name: changed(name, drops[name], widths[name]) for name in weights})
        if score - found <= max_drop:
            best, reached, low = (drops, widths), found, middle + 1
        else:
            high = middle
    return Sensitivity(score, loss, trials, *best, reached, left_out)


def rounded(weight: Tensor, bits: int, axis: int = 0) -> Tensor:
    """The weight on a symmetric grid of ``2 ** bits - 1`` values, with a scale for each output channel.

    Example:
        >>> rounded(torch.tensor([[1.0, 0.4, -0.2]]), 2)
        tensor([[1., 0., -0.]])
    """
    most = 2 ** (bits - 1) - 1
    others = [d for d in range(weight.dim()) if d != axis]
    scale = weight.abs().amax(others, keepdim=True) / most
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (weight / scale).round().clamp(-most, most) * scale


class Through(nn.Module):
    """The way of a subject from inputs to logits, for ``torch.func.functional_call`` with other weights."""

    def __init__(self, subject: Subject):
        super().__init__()
        self.module = subject.module
        vars(self)["_subject"] = subject

    def forward(self, inputs: Any) -> Tensor:
        """Logits for inputs."""
        subject: Subject = vars(self)["_subject"]
        return subject.forward(inputs)

    def at(self, weights: Mapping[str, Tensor], inputs: Any) -> Tensor:
        """Logits with these weights, by the names of the module, in place of its own."""
        own = {f"module.{name}": weight for name, weight in weights.items()}
        logits: Tensor = torch.func.functional_call(self, own, (inputs,))
        return logits


class _Judge:
    """Score and loss of a model with other weights on its first examples."""

    def __init__(self, subject: Subject, examples: int):
        self.subject, self.examples = subject, examples

    def __call__(self, weights: Mapping[str, Tensor]) -> tuple[float, float]:
        own = {f"{name}.weight".lstrip("."): weight for name, weight in weights.items()}
        through, parts, targets, count = Through(self.subject), list[Tensor](), list[Tensor](), 0
        with self.subject.still():
            for step in self.subject.batches():
                logits = through.at(own, step.inputs).cpu()[: self.examples - count]
                parts.append(logits if logits.dim() != 2 or logits.shape[1] > 1 else logits[:, 0])
                targets.append(step.target.cpu()[: len(logits)])
                count += len(logits)
                if count >= self.examples:
                    break
        logits, target = torch.cat(parts).double(), torch.cat(targets)
        target = target.reshape(len(target)) if target.numel() == len(target) else target
        if self.subject.kind == "regression":
            error = (logits - target).square().mean()
            spread = target.double().var(correction=0).clamp_min(1e-12)
            return float(1 - error / spread), float(error)
        losses = example_losses(logits, target)
        return float((predicted(logits) == target).double().mean()), float(losses.nan_to_num(1e9).mean())


def _weights(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, int], dict[str, str]]:
    parameters = dict(module.named_parameters())
    weights: dict[str, Tensor] = {}
    axes: dict[str, int] = {}
    left_out: dict[str, str] = {}
    for name, layer in module.named_modules():
        if not isinstance(layer, LAYERS):
            continue
        key = f"{name}.weight".lstrip(".")
        if key not in parameters:
            left_out[name] = "its weight is computed from others, or is another layer's"
            continue
        weights[name] = parameters[key].detach()
        axes[name] = 1 if isinstance(layer, TRANSPOSED) else 0
    return weights, axes, left_out
