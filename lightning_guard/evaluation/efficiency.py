"""How large a model is, how much it computes, and how long it takes."""

import gzip
import io
import time
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_guard.evaluation.base import Bars, Evidence, Figure
from lightning_guard.evaluation.subject import Subject
from lightning_guard.guard import GuardConflict

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)

_MOST_LAYERS = 30
_SECONDS = 0.2  # how long each batch size is timed


class Efficiency:
    """Measures parameters, sparsity, file size, multiplications and, if asked, latency.

    Args:
        latency: time the model as well, in eager torch on the machine at hand, for half a second. Off by default:
            beside other work, as in a comparison with several workers, the clock says more about that work.

    | case                              | result                                         |
    |-----------------------------------|------------------------------------------------|
    | no Linear and no convolution      | sparsity is None, no bars                      |
    | a weight shared by two layers     | counted once; its multiplications at every use |
    | more than 30 layers               | bars for the 30 largest, and a note            |
    | layers that no hook sees called   | a note; their multiplications are missing      |
    | no logits for a single example    | no latency at batch 1, and a note              |

    Raises:
        ValueError: if the loader holds no batch.

    Example:
        >>> subject = Subject(nn.Linear(3, 2), [(torch.zeros(4, 3), torch.zeros(4).long())])
        >>> figures = Efficiency(latency=False).evaluate(subject).figures
        >>> figures["efficiency/parameters"].value, figures["efficiency/macs"].value
        (8.0, 6.0)
    """

    name: ClassVar[str] = "efficiency"

    def __init__(self, latency: bool = False):
        self.latency = latency

    def evaluate(self, subject: Subject) -> Evidence:
        """Figures of the model itself; of the loader only the first batch is used."""
        with subject.still():
            step = next(subject.batches(), None)
            if step is None:
                raise ValueError("loader holds no batch, so nothing can pass the model; give the test data")
            evidence = _size(subject.module)
            evidence |= _sparsity(subject.module)
            evidence |= _macs(subject, step.inputs)
            if self.latency:
                evidence |= _latency(subject, step.inputs)
        return evidence


def _size(module: nn.Module) -> Evidence:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    packed = gzip.compress(file.getvalue(), 6, mtime=0)  # without the time, so that equal files stay equal
    parameters = list(module.parameters())
    count, filled = sum(p.numel() for p in parameters), sum(int(p.count_nonzero()) for p in parameters)
    found = {
        "compressed_bytes": (len(packed), "Compressed file", "bytes", "The file after gzip, level 6."),
        "bytes": (file.tell(), "File", "bytes", "The state dict as torch.save writes it."),
        "parameters": (count, "Parameters", "count", "Of all kinds, shared ones once."),
        "nonzero_parameters": (filled, "Parameters that are not zero", "count", "Of all kinds, shared ones once."),
    }
    return Evidence({f"efficiency/{key}": _lower(*figure) for key, figure in found.items()})


def _sparsity(module: nn.Module) -> Evidence:
    about = "Fraction of the weights of Linear and convolution layers, biases aside, that are exactly zero."
    weights: dict[str, Tensor] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, _LAYERS) and not any(layer.weight is weight for weight in weights.values()):
            weights[name or type(layer).__name__] = layer.weight
    zeros = {name: weight.numel() - int(weight.count_nonzero()) for name, weight in weights.items()}
    total = sum(weight.numel() for weight in weights.values())
    sparsity = sum(zeros.values()) / total if total else None
    evidence = Evidence({"efficiency/sparsity": Figure(sparsity, "Sparsity", "fraction", "higher", about)})
    if sparsity:
        evidence.notes.append(
            f"{sparsity:.1%} of the weights are zero: that makes the file compressible, not the network "
            "faster, for dense kernels multiply by zeros as well."
        )
    largest = set(sorted(weights, key=lambda name: -weights[name].numel())[:_MOST_LAYERS])
    shown = [name for name in weights if name in largest and weights[name].numel()]
    if shown:
        values = [zeros[name] / weights[name].numel() for name in shown]
        bars = Bars(shown, values, "Sparsity by layer", "Sparsity", about, y_unit="fraction")
        evidence.bars["efficiency/sparsity"] = bars
    if len(weights) > len(shown):
        evidence.notes.append(f"Sparsity by layer is shown for the {len(shown)} largest of {len(weights)} layers.")
    return evidence


def _macs(subject: Subject, inputs: Any) -> Evidence:
    called: dict[str, int] = {}
    layers = {name: layer for name, layer in subject.module.named_modules() if isinstance(layer, _LAYERS)}
    with ExitStack() as undo:
        for name, layer in layers.items():

            def count(layer: Any, args: Any, output: Tensor, name: str = name) -> None:
                # An output of a Linear or convolution, an input of a transposed one, meets so many weights.
                places = args[0] if isinstance(layer, _TRANSPOSED) else output
                called[name] = called.get(name, 0) + places.numel() * layer.weight[0].numel()

            undo.callback(layer.register_forward_hook(count).remove)
        subject.forward(_rows(inputs, 2))  # two: a network that squeezes gives no logits for a single example
    about = "Multiply-accumulates of Linear and convolution layers in one forward pass, zeros included."
    macs = _lower(sum(called.values()) / 2, "Multiplications an example", "count", about)
    evidence = Evidence({"efficiency/macs": macs})
    if missed := [name for name in layers if name not in called]:
        names = ", ".join(missed[:5]) + (", ..." if len(missed) > 5 else "")
        evidence.notes.append(
            f"{len(missed)} of {len(layers)} layers were not seen in the forward pass "
            f"({names}); multiplications count without them."
        )
    return evidence


def _latency(subject: Subject, inputs: Any) -> Evidence:
    evidence = Evidence()
    machine = f"{torch.get_num_threads()} CPU threads" if subject.device.type == "cpu" else subject.device.type
    for size in (1, 64):
        try:
            times = _times(subject, _rows(inputs, size))
        except GuardConflict as conflict:
            evidence.notes.append(f"No latency at batch {size}: {conflict.problems[0]}.")
            times = None
        for key, quantile, word in (("", 0.5, "median"), ("_p95", 0.95, "95th percentile")):
            value = None if times is None else float(times.quantile(quantile))
            about = f"A forward pass in eager torch on this machine ({machine}), {word} of runs after a warm-up."
            figure = _lower(value, f"Latency at batch {size}, {word}", "s", about)
            evidence.figures[f"efficiency/latency_batch_{size}{key}"] = figure
    return evidence


def _times(subject: Subject, inputs: Any) -> Tensor:
    def once() -> float:
        begun = time.perf_counter()
        subject.forward(inputs)
        if subject.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - begun

    for _ in range(3):
        once()
    times: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(times) < 10 or time.perf_counter() < end:
        times.append(once())
    return torch.tensor(times, dtype=torch.float64)


def _rows(inputs: Any, n: int) -> Any:
    """The first ``n`` examples, again from the first where there are fewer."""
    return apply_to_collection(inputs, Tensor, lambda t: t[torch.arange(n, device=t.device) % len(t)])


def _lower(value: float | None, label: str, unit: str, about: str) -> Figure:
    return Figure(value if value is None else float(value), label, unit, "lower", about)
