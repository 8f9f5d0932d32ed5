"""How large a model is, how much it computes, and how long it takes."""

import gzip
import io
import time
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_guard.evaluation.base import Bars, Evidence, Figure
from lightning_guard.evaluation.flips import flip_evidence
from lightning_guard.evaluation.layers import LAYERS, multiplications, picture, rows
from lightning_guard.evaluation.layers import layers as describe
from lightning_guard.evaluation.memory import peak_bytes
from lightning_guard.evaluation.shipped import shipped
from lightning_guard.evaluation.subject import Subject
from lightning_guard.guard import GuardConflict

_MOST_LAYERS = 30
_SECONDS = 0.2  # how long each batch size is timed


class Efficiency:
    """Measures parameters, sparsity, file size, multiplications, memory, and if asked latency and the files that ship.

    Args:
        latency: time the model as well, in eager torch on the machine at hand, for half a second. Off by default:
            beside other work, as in a comparison with several workers, the clock says more about that work.
        export: write the model as ONNX in float32 and int8 and judge the files: bytes, accuracy, flips against the
            model, processor time side by side in one runtime. Needs the extra ``export`` and some ten seconds.
        linear: how linear layers of the int8 file are quantised: ``"static"`` or ``"dynamic"``.
        reference: an exported file of the model before it was made small; predictions that flipped are counted
            against it, overall, by class and by group.
        layers: picture the layers: weights, zeros, bits, multiplications.

    | case                              | result                                         |
    |-----------------------------------|------------------------------------------------|
    | no Linear and no convolution      | sparsity is None, no bars                      |
    | a weight shared by two layers     | counted once; its multiplications at every use |
    | more than 30 layers               | bars for the 30 largest, and a note            |
    | layers that no hook sees called   | a note; their multiplications are missing      |
    | no logits for a single example    | no latency at batch 1, and a note              |
    | no form in ONNX                   | figures of that file are None, and a note      |

    Raises:
        ValueError: if the loader holds no batch, the extra is missing, or the reference is of other examples.

    Example:
        >>> subject = Subject(nn.Linear(3, 2), [(torch.zeros(4, 3), torch.zeros(4).long())])
        >>> figures = Efficiency(latency=False).evaluate(subject).figures
        >>> figures["efficiency/parameters"].value, figures["efficiency/macs"].value
        (8.0, 6.0)
    """

    name: ClassVar[str] = "efficiency"

    def __init__(
        self,
        latency: bool = False,
        export: bool = False,
        linear: Literal["static", "dynamic"] = "static",
        reference: str | None = None,
        layers: bool = False,
    ):
        if linear not in ("static", "dynamic"):
            raise ValueError(f"linear={linear!r} is not known; there are 'static' and 'dynamic'")
        if export or reference is not None:
            from lightning_guard.export.tracing import needs  # export rests on evaluation

            needs("onnx", "onnxscript", "onnxruntime")
        self.latency, self.export, self.linear = latency, export, linear
        self.reference, self.layers = reference, layers

    def evaluate(self, subject: Subject) -> Evidence:
        """Figures of the model itself, by the first batch of the loader; of its files and flips, by all of it."""
        with subject.still():
            step = next(subject.batches(), None)
            if step is None:
                raise ValueError("loader holds no batch, so nothing can pass the model; give the test data")
            evidence = _size(subject.module)
            evidence |= _sparsity(subject.module)
            evidence |= _macs(subject, step.inputs)
            about = "Weights, inputs and intermediates at the height of a pass of 64 examples, kernels' own aside."
            peak = _lower(peak_bytes(subject, rows(step.inputs, 64)), "Peak memory at batch 64", "bytes", about)
            evidence.figures["efficiency/peak_bytes"] = peak
            if self.latency:
                evidence |= _latency(subject, step.inputs)
        if self.layers and (found := describe(subject)):
            evidence.pictures["efficiency/layers"] = picture(found)
        if self.export:
            evidence |= shipped(subject, self.linear)
        if self.reference is not None:
            evidence |= _flips(subject, self.reference)
        return evidence


def _flips(subject: Subject, reference: str) -> Evidence:
    """Against a file of another model, on the same examples."""
    from lightning_guard.export import judged, load

    if subject.kind not in ("binary", "multiclass"):
        return Evidence(notes=["No flips are counted: there are no classes."])
    before = judged(subject, load(reference)).outputs.logits
    target, kin = subject.outputs.target, subject.families()
    return flip_evidence(before, subject.outputs.logits, target, kin, list(subject.class_names or ()))


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
        if isinstance(layer, LAYERS) and not any(layer.weight is weight for weight in weights.values()):
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
    known = {name: layer for name, layer in subject.module.named_modules() if isinstance(layer, LAYERS)}
    called = multiplications(subject, inputs)
    about = "Multiply-accumulates of Linear and convolution layers in one forward pass, zeros included."
    evidence = Evidence({"efficiency/macs": _lower(sum(called.values()), "Multiplications an example", "count", about)})
    largest = set(sorted(called, key=lambda name: -called[name])[:_MOST_LAYERS])
    shown = [name for name in called if name in largest]
    if shown:
        names = [name or type(known[name]).__name__ for name in shown]
        label = "Multiplications by layer"
        bars = Bars(names, [called[name] for name in shown], label, "Multiplications", about, y_unit="count")
        evidence.bars["efficiency/macs"] = bars
    if missed := [name for name in known if name not in called]:
        names = missed[:5] + (["..."] if len(missed) > 5 else [])
        evidence.notes.append(
            f"{len(missed)} of {len(known)} layers were not seen in the forward pass "
            f"({', '.join(names)}); multiplications count without them."
        )
    return evidence


def _latency(subject: Subject, inputs: Any) -> Evidence:
    evidence = Evidence()
    machine = f"{torch.get_num_threads()} CPU threads" if subject.device.type == "cpu" else subject.device.type
    for size in (1, 64):
        try:
            times = _times(subject, rows(inputs, size))
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


def _lower(value: float | None, label: str, unit: str, about: str) -> Figure:
    return Figure(value if value is None else float(value), label, unit, "lower", about)
