"""From a module to a file that is checked before it is there."""

import gzip
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from lightning_guard.batch import Batch
from lightning_guard.evaluation.sensitivity import Through
from lightning_guard.evaluation.subject import Subject, column, predicted
from lightning_guard.export.backends import to_pt2e
from lightning_guard.export.compressed import load_compressed, save_compressed, written
from lightning_guard.export.graph import Linear, to_int8, to_onnx
from lightning_guard.export.runtime import PROGRAM_SIGNATURE, File, OnnxFile, judged, load
from lightning_guard.export.tracing import ExportError, Signature, bare, flat, needs, quiet, traced

Format = Literal["onnx", "onnx-int8", "torch", "pt2e", "sparse"]
FORMATS: tuple[Format, ...] = get_args(Format)
"""What :func:`export` writes."""

_ROUNDED = ("onnx-int8", "pt2e")
_TOLERANCE = 0.01  # of files in int8, as a share of the examples
_ROUNDING = 1e-4  # of sums in float32 in another order, as a share of the largest logit
_REGRESSION = 0.05  # of the spread of the outputs


@dataclass(frozen=True)
class Agreement:
    """How far a file agrees with the module that it was made of, on the same examples.

    Args:
        examples: how many there were.
        flips: share of the examples whose predicted class differs; of a regression, whose output differs by more
            than 5 % of the outputs' standard deviation.
        beyond_rounding: share of the examples of which a logit differs by more than float32 sums do in another
            order, 1e-4 of the largest logit.
        max_difference: the largest difference of two logits.
        module_accuracy, file_accuracy: shares of correct predictions; None without classes to compare with.
    """

    examples: int
    flips: float
    beyond_rounding: float
    max_difference: float
    module_accuracy: float | None
    file_accuracy: float | None


@dataclass(frozen=True)
class Exported:
    """A file that was written and agrees with its module as closely as was said.

    Args:
        path: of the file.
        format: what was asked for.
        bytes: of the file.
        compressed_bytes: of the file after gzip, level 6.
        agreement: with the module.
        tolerance: what was allowed.
    """

    path: Path
    format: Format
    bytes: int
    compressed_bytes: int
    agreement: Agreement
    tolerance: float

    def load(self, threads: int = 1) -> File:
        """The file as a module, see :func:`lightning_guard.export.load`."""
        return load(self.path, threads)

    def summary(self) -> dict[str, Any]:
        """All of it, flat, as JSON takes it."""
        own = {key: value for key, value in vars(self).items() if key != "agreement"}
        return {**own, "path": str(self.path), **asdict(self.agreement)}


def export(
    module: nn.Module,
    path: str | os.PathLike[str],
    batches: Iterable[Any],
    format: Format = "onnx",
    tolerance: float | None = None,
    calibration: Iterable[Any] | None = None,
    calibration_batches: int = 16,
    linear: Linear = "static",
    ranges: Mapping[str, tuple[float, float]] | None = None,
    batch: Batch | None = None,
) -> Exported:
    """Writes a module as a file for use, and keeps it only if it predicts what the module predicts.

    The file is written beside ``path``, loaded, and run on every example of ``batches``. If predictions differ on a
    larger share of them than ``tolerance``, it is removed and the difference told; what was at ``path`` before stays.
    The module is left as it was: its mode, device, hooks, metrics and weights.

    Args:
        module: a LightningModule, or any module that maps inputs to logits, in float32.
        path: of the file. Its folder must exist.
        batches: real batches to check the file on, as a loader or list that can be read more than once.
        format: see the table.
        tolerance: share of the examples whose prediction may differ: of the class in int8, 0.01 unless stated; else
            of any logit beyond rounding, 0 unless stated.
        calibration: batches to read the ranges of activations from; None takes those of ``batches``. What they
            contain, the file's ranges tell: after private training give public ones.
        calibration_batches: how many of them to read.
        linear: inputs of linear layers in int8: ``"static"``, in ranges fixed by calibration; or ``"dynamic"``, in
            the range of each batch, which suits transformers, though an example's output then depends on its batch.
        ranges: fixed ranges ``(low, high)`` of the inputs of layers by name, instead of those of calibration; of layers
            that stay in float, or are dynamic, they count for nothing.
        batch: how a batch is read, if the defaults do not fit.

    | format          | the file                                                                             |
    |-----------------|--------------------------------------------------------------------------------------|
    | ``"onnx"``      | ONNX in float32, normalisation folded into convolutions                              |
    | ``"onnx-int8"`` | ONNX with int8 weights per channel and uint8 activations, by onnxruntime's quantiser |
    | ``"torch"``     | ``torch.export``, for torch and what compiles it                                     |
    | ``"pt2e"``      | ``torch.export`` in int8, by torchao for Inductor on x86                             |
    | ``"sparse"``    | weights alone, compressed without loss: :func:`load_compressed`                      |

    | case                                       | result                                             |
    |--------------------------------------------|----------------------------------------------------|
    | a batch of another size than the traced    | runs: the batch dimension is free                  |
    | BatchNorm, Dropout                         | as in evaluation                                   |
    | inputs of several tensors in a dict        | inputs of the file by these names                  |
    | two equal logits, ordered by rounding      | no difference, except in int8                      |
    | outputs that are not numbers, in both      | no difference                                      |

    Raises:
        ExportError: if the module cannot be written in this format, a package is missing, an option makes no sense,
            or the file differs from the module by more than said.

    Example::

        export(model, "model.onnx", data.val_dataloader())
        export(model, "model.int8.onnx", data.val_dataloader(), "onnx-int8", calibration=data.train_dataloader())
    """
    if format not in FORMATS:
        raise ExportError(f"format={format!r} is not known; there are {', '.join(FORMATS)}")
    allowed = (_TOLERANCE if format in _ROUNDED else 0.0) if tolerance is None else tolerance
    if not 0 <= allowed <= 1:
        raise ExportError(f"tolerance={tolerance} is no share of examples; give a number in [0, 1]")
    if calibration_batches < 1:
        raise ExportError(f"calibration_batches={calibration_batches} give no range; give at least 1")
    if linear not in get_args(Linear):
        raise ExportError(f"linear={linear!r} is not known; there are {', '.join(get_args(Linear))}")
    if ranges and format != "onnx-int8":
        raise ExportError(f"ranges are those of int8 activations, and format={format!r} has none; use 'onnx-int8'")
    for name, (low, high) in (ranges or {}).items():
        if not low <= 0 <= high or low == high:
            raise ExportError(f"ranges: ({low}, {high}) of {name!r} is no range around 0, which padding needs")
    subject = Subject(module, batches, batch)
    examples = Subject(module, batches if calibration is None else calibration, batch)
    with written(path) as part:
        file = _write(subject, examples, part, format, calibration_batches, linear, ranges)
        found = agreement(subject, file)
        _judge(found, format, allowed)
        content = part.read_bytes()
    packed = len(gzip.compress(content, 6, mtime=0))
    return Exported(Path(path), format, len(content), packed, found, allowed)


def _write(
    subject: Subject,
    examples: Subject,
    part: Path,
    format: Format,
    count: int,
    linear: Linear,
    ranges: Mapping[str, tuple[float, float]] | None,
) -> nn.Module:
    """The file, read back as a module."""
    if format == "sparse":
        save_compressed(subject.module, part)
        return _Loaded(subject, load_compressed(part))
    if format.startswith("onnx"):
        needs("onnx", "onnxscript", "onnxruntime")
    program, signature = traced(subject)
    if format.startswith("onnx"):
        feeds = _feeds(examples, signature, count) if format == "onnx-int8" else []
        model, layers = to_onnx(program, signature)
        if format == "onnx-int8":
            model = to_int8(model, layers, feeds, linear, ranges)
        part.write_bytes(model.SerializeToString(deterministic=True))
        return OnnxFile(part.read_bytes())
    if format == "pt2e":
        with examples.still():
            program = to_pt2e(program, (flat(step.inputs) for step in islice(examples.batches(), count)))
    bare(program)
    with quiet(), part.open("wb") as file:
        torch.export.save(program, file, extra_files={PROGRAM_SIGNATURE: signature.text()})
    return load(part)


def _feeds(examples: Subject, signature: Signature, count: int) -> list[dict[str, np.ndarray]]:
    with examples.still():
        batches = [flat(step.inputs) for step in islice(examples.batches(), count)]
    if not batches:
        raise ExportError("calibration holds no batch, so activations have no range; give real ones")
    arrays = ([t.detach().cpu().contiguous().numpy() for t in tensors] for tensors in batches)
    return [dict(zip(signature.names, each, strict=True)) for each in arrays]


class _Loaded(nn.Module):
    """The module of a subject with other weights, for as long as it computes."""

    def __init__(self, subject: Subject, state: dict[str, Tensor]):
        super().__init__()
        vars(self)["_place"] = Through(subject), {key: value.to(subject.device) for key, value in state.items()}

    def forward(self, inputs: Any) -> Tensor:
        through, state = vars(self)["_place"]
        logits: Tensor = through.at(state, inputs)
        return logits


def agreement(subject: Subject, file: nn.Module) -> Agreement:
    """How far a file agrees with the module of a subject, over all its examples.

    Example:
        >>> data = [(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))]
        >>> agreement(Subject(nn.Identity(), data), nn.Softplus()).flips
        0.0
    """
    reference, target = subject.outputs.logits, subject.outputs.target
    with subject.still():
        logits = torch.cat([column(file(step.inputs)).cpu() for step in subject.batches()])
    if logits.shape != reference.shape:
        raise ExportError(f"the file gives {tuple(logits.shape)} and the module {tuple(reference.shape)}")
    ours, theirs = (part.double().reshape(len(part), -1) for part in (reference, logits))
    odd = (ours.isfinite() != theirs.isfinite()).any(1)
    apart = (ours - theirs).abs().nan_to_num(0.0, 0.0, 0.0).amax(1) if ours.numel() else torch.zeros(len(ours))
    finite = ours[ours.isfinite()]
    largest = max(1.0, float(finite.abs().max())) if len(finite) else 1.0
    beyond = (apart > _ROUNDING * largest) | odd
    right: tuple[float | None, float | None] = None, None
    if subject.kind == "regression":
        spread = float(finite.std()) if len(finite) > 1 else 0.0
        flips = (apart > max(_REGRESSION * spread, _ROUNDING * largest)) | odd
    else:
        one, other = predicted(reference), predicted(logits)
        flips = (one != other).reshape(len(one), -1).any(1)
        known = target is not None and subject.kind in ("binary", "multiclass")
        if known:
            right = _share(one == target), _share(other == target)
    return Agreement(len(reference), _share(flips), _share(beyond), float(apart.max()), *right)


def _share(rows: Any) -> float:
    return float(rows.double().mean())


def _judge(found: Agreement, format: Format, allowed: float) -> None:
    flips = format in _ROUNDED
    share, what = (
        (found.flips, "are predicted otherwise") if flips else (found.beyond_rounding, "differ beyond rounding")
    )
    if share <= allowed:
        return
    remedy = (
        "calibrate on more batches (calibration_batches), train with quantisation, leave linear layers dynamic, or "
        "state the tolerance that you accept"
        if flips
        else "look for what differs between training's forward and the exported one, or state a tolerance"
    )
    raise ExportError(
        f"{share:.2%} of {found.examples} examples {what} by the file (logits differ by up to "
        f"{found.max_difference:.3g}), and tolerance={allowed:g} allows {allowed:.2%}; nothing was written: {remedy}"
    )


__all__ = ["FORMATS", "Agreement", "Exported", "Format", "agreement", "export", "judged"]
