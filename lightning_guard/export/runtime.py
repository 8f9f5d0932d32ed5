"""Written files as modules, so that whatever judges a model can judge the file."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_guard.evaluation.subject import Subject
from lightning_guard.export.compressed import MAGIC
from lightning_guard.export.graph import SIGNATURE
from lightning_guard.export.tracing import ExportError, Signature, flat, needs

PROGRAM_SIGNATURE = "lightning_guard_signature.json"


class File(nn.Module):
    """A written file as a module that maps inputs to logits; it has no parameters."""

    signature: Signature

    def tensors(self, inputs: Any) -> list[Tensor]:
        """The inputs in the order of the file."""
        form, names = self.signature
        if form == "mapping" and isinstance(inputs, Mapping):
            if missing := [name for name in names if name not in inputs]:
                raise ExportError(f"the file takes {', '.join(names)}, and these inputs lack {', '.join(missing)}")
            return [inputs[name] for name in names]
        parts = flat(inputs)
        if len(parts) != len(names) or form == "mapping":
            raise ExportError(
                f"the file takes a {form} of {', '.join(names)}, and these inputs are a {type(inputs).__name__} "
                f"of {len(parts)}"
            )
        return parts


class OnnxFile(File):
    """An ONNX file, run by onnxruntime on the CPU.

    Args:
        content: the bytes of the file.
        threads: of onnxruntime, of which each pass has the same number.

    Raises:
        ExportError: if onnxruntime is missing or cannot read the file.
    """

    def __init__(self, content: bytes, threads: int = 1):
        super().__init__()
        self.content, self.threads = content, threads
        self._open()

    def _open(self) -> None:
        needs("onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(self.content, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ExportError(f"onnxruntime cannot run this file: {str(error).strip()[:300]}") from error
        said = self.session.get_modelmeta().custom_metadata_map.get(SIGNATURE)
        names = [one.name for one in self.session.get_inputs()]
        by_itself = Signature("tensor" if len(names) == 1 else "mapping", names)
        self.signature = Signature.read(said) if said else by_itself
        taken = {one.name: one.type for one in self.session.get_inputs()}
        self._taken = [taken.get(name) for name in self.signature.names]  # an input that nobody reads is not there

    def feeds(self, inputs: Any) -> dict[str, np.ndarray]:
        """The inputs as the session takes them."""
        tensors = zip(self.signature.names, self._taken, self.tensors(inputs), strict=True)
        return {name: tensor.detach().cpu().contiguous().numpy() for name, kind, tensor in tensors if kind is not None}

    def forward(self, inputs: Any) -> Tensor:
        """Logits for inputs.

        Raises:
            ExportError: if gradients are asked for.
        """
        first = flat(inputs)[0]
        if torch.is_grad_enabled() and any(part.requires_grad for part in flat(inputs)):
            raise ExportError(
                "an ONNX file has no gradients, so it cannot be attacked by them; attack the module and judge the "
                "file on what came of it, or export with format='torch'"
            )
        logits = self.session.run(None, self.feeds(inputs))[0]
        return torch.from_numpy(logits).to(first.device)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "session"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._open()


class ProgramFile(File):
    """A file of ``torch.export``, run by torch.

    Args:
        path: of the file; torch reads it with pickle, so it must be trusted.
    """

    def __init__(self, path: str | Path):
        super().__init__()
        extra = {PROGRAM_SIGNATURE: ""}
        with Path(path).open("rb") as file:
            program = torch.export.load(file, extra_files=extra)
        self.signature = Signature.read(extra[PROGRAM_SIGNATURE] or json.dumps({"form": "tensor", "names": ["input"]}))
        vars(self)["program"] = program.module()  # no child: it refuses train() and eval()

    def forward(self, inputs: Any) -> Tensor:
        """Logits for inputs."""
        logits: Tensor = vars(self)["program"](*self.tensors(inputs))
        return logits


def load(path: str | Path, threads: int = 1) -> File:
    """A written file as a module: inputs as the exported module took them, logits as it gave them.

    Args:
        path: an ONNX file, or one of ``torch.export``, which must be trusted.
        threads: of onnxruntime.

    Raises:
        ExportError: if the file holds weights alone, or what runs it is missing.
        FileNotFoundError: if there is no such file.
    """
    with Path(path).open("rb") as file:
        start = file.read(4)
    if start == MAGIC:
        raise ExportError(f"{path} holds weights alone; module.load_state_dict(load_compressed(path)) takes them")
    return ProgramFile(path) if start[:2] == b"PK" else OnnxFile(Path(path).read_bytes(), threads)


class _Read:
    """The batches of a subject as its model reads them, as often as asked."""

    def __init__(self, subject: Subject):
        self.subject = subject

    def __iter__(self) -> Any:
        return (step.batch for step in self.subject.batches())


def judged(subject: Subject, file: nn.Module) -> Subject:
    """The subject with a file in the place of its module: the same examples, prepared as its module prepares them."""
    return Subject(
        file,
        _Read(subject),
        replace(subject._run.batch, logits=None),
        subject.group_names,
        subject.class_names,
        subject.attribute_names,
    )
