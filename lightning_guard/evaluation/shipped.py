"""The files that a model becomes, judged as files."""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning_guard.evaluation.base import Evidence, Figure
from lightning_guard.evaluation.layers import rows
from lightning_guard.evaluation.subject import Subject

_WORDS = {"file": "float32", "int8": "int8"}


def shipped(subject: Subject, linear: Any = "static", seconds: float = 0.5) -> Evidence:
    """The ONNX files of a model in float32 and int8: bytes, accuracy, flips, and times in one runtime, in turns.

    Args:
        subject: the model and its test examples; the int8 file is calibrated on the first batches of them.
        linear: how linear layers are quantised, see :func:`lightning_guard.export.export`.
        seconds: how long each batch size is timed.

    | case                                     | result                                   |
    |------------------------------------------|------------------------------------------|
    | the model has no form in ONNX            | figures are None, and a note says why    |
    | the int8 file is not faster              | a note says so                           |
    """
    from lightning_guard.export import Exported, ExportError, export  # export rests on evaluation
    from lightning_guard.export.timing import Times, interleaved

    evidence, done = Evidence(), dict[str, Exported]()
    with TemporaryDirectory() as folder:
        forms: dict[str, Any] = {"file": "onnx", "int8": "onnx-int8"}
        for key, form in forms.items():
            try:
                done[key] = export(
                    subject.module, Path(folder, form), subject.loader, form, 1.0, linear=linear,
                    batch=subject._run.batch,
                )  # fmt: skip
            except ExportError as error:
                evidence.notes.append(f"No {_WORDS[key]} file: {str(error).rstrip('.')}.")
        times: dict[tuple[str, int], Times] = {}
        files: dict[str, Any] = {key: one.load() for key, one in done.items()}
        with subject.still():
            inputs = next(subject.batches()).inputs
        for size in (1, 64) if files else ():
            runs = {key: partial(file.session.run, None, file.feeds(rows(inputs, size))) for key, file in files.items()}
            times |= {(key, size): one for key, one in interleaved(runs, seconds).items()}
    for key, word in _WORDS.items():
        one = done.get(key)
        agreement = one.agreement if one else None
        about = f"ONNX in {word}" + (", calibrated on the first test batches." if key == "int8" else ".")
        figures = {
            "bytes": (one and one.bytes, f"{word} file", "bytes", "lower", about),
            "compressed_bytes": (
                one and one.compressed_bytes, f"{word} file, compressed", "bytes", "lower", f"{about[:-1]}, after gzip."
            ),
            "accuracy": (
                agreement and agreement.file_accuracy, f"Accuracy of the {word} file", "fraction", "higher",
                "Of the file as onnxruntime runs it, on the test examples.",
            ),
            "flips": (
                agreement and agreement.flips, f"Flips of the {word} file", "fraction", "lower",
                "Share of the test examples that the file predicts otherwise than the model.",
            ),
        }  # fmt: skip
        for name, (value, *rest) in figures.items():
            evidence.figures[f"efficiency/{key}_{name}"] = Figure(None if value is None else float(value), *rest)  # type: ignore[arg-type]
        for size in (1, 64):
            taken = times.get((key, size))
            for end, part, said in (
                ("", "median", "median"),
                ("_min", "minimum", "least"),
                ("_p95", "p95", "95th percentile"),
            ):
                evidence.figures[f"efficiency/{key}_latency_batch_{size}{end}"] = Figure(
                    getattr(taken, part) if taken else None, f"{word} file at batch {size}, {said}", "s", "lower",
                    "Processor time of a pass by onnxruntime on one thread, both files in turns, after a warm-up.",
                )  # fmt: skip
    for size in (1, 64):
        both = times.get(("file", size)), times.get(("int8", size))
        ratio = both[0].minimum / both[1].minimum if both[0] and both[1] else None
        evidence.figures[f"efficiency/int8_speedup_batch_{size}"] = Figure(
            ratio,
            f"Speed-up by int8 at batch {size}",
            "ratio",
            "higher",
            "Least times of the two files, in one runtime.",
        )
        if ratio is not None and ratio < 1.05:
            evidence.notes.append(
                f"The int8 file is not faster at batch {size} ({ratio:.2f} times as fast as float32 in the same "
                "runtime): it saves bytes only."
            )
    return evidence
