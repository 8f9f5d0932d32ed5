"""From a module and a batch to a graph whose batch dimension is free."""

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
import torchmetrics
from torch import Tensor, nn

from lightning_guard.evaluation.subject import Subject
from lightning_guard.undo import swap

Form = Literal["tensor", "mapping", "sequence"]
OUTPUT = "logits"


class ExportError(ValueError):
    """This module cannot become such a file, or the file is not what it should be; the message says the remedy."""


class Signature(NamedTuple):
    """How the inputs of a batch lie in a file.

    Args:
        form: what holds the tensors.
        names: of the tensors, in order.
    """

    form: Form
    names: list[str]

    @classmethod
    def of(cls, inputs: Any) -> "Signature":
        """The signature of these inputs.

        Raises:
            ExportError: if they are not a tensor, or a flat mapping or sequence of tensors.
        """
        found: Signature | None = None
        if isinstance(inputs, Tensor):
            found = cls("tensor", ["input"])
        elif isinstance(inputs, Mapping):
            found = cls("mapping", [str(key) for key in inputs])
        elif isinstance(inputs, Sequence) and not isinstance(inputs, str):
            found = cls("sequence", [f"input_{i}" for i in range(len(inputs))])
        parts = [] if found is None else flat(inputs)
        if found is None or not parts or not all(isinstance(part, Tensor) for part in parts):
            kinds = ", ".join(dict.fromkeys(type(part).__name__ for part in parts)) or "nothing"
            raise ExportError(
                f"the inputs are a {type(inputs).__name__} of {kinds}, and a file takes a tensor, or a flat dict or "
                "list of tensors; say which part of the batch they are with Batch(inputs=...)"
            )
        if OUTPUT in found.names:
            raise ExportError(f"an input is called {OUTPUT!r}, as the output of the file is; rename it in the batch")
        return found

    @classmethod
    def read(cls, text: str) -> "Signature":
        """What :meth:`text` wrote."""
        found = json.loads(text)
        return cls(found["form"], list(found["names"]))

    def text(self) -> str:
        """The signature as JSON, for the metadata of a file."""
        return json.dumps(self._asdict())


def flat(inputs: Any) -> list[Any]:
    """The parts of inputs in order."""
    if isinstance(inputs, Tensor):
        return [inputs]
    return list(inputs.values() if isinstance(inputs, Mapping) else inputs)


class Plain(nn.Module):
    """The way from inputs to logits of a subject, as a function of tensors."""

    def __init__(self, subject: Subject, inputs: Any):
        super().__init__()
        self.module = subject.module  # so that its parameters are found, under this prefix
        vars(self)["_place"] = subject, inputs

    def forward(self, *tensors: Tensor) -> Tensor:
        subject, like = vars(self)["_place"]
        return subject.forward(_rebuilt(like, tensors))


def _rebuilt(like: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(like, Tensor):
        return tensors[0]
    if isinstance(like, Mapping):
        return dict(zip(like, tensors, strict=True))
    return type(like)(*tensors) if hasattr(like, "_fields") else type(like)(tensors)


def traced(subject: Subject) -> tuple[Any, Signature]:
    """The exported program of a subject, and how its inputs lie in it; nothing of the module changes.

    Raises:
        ExportError: if there is no batch, the module is not in float32, or it cannot be traced.
    """
    dtypes = {p.dtype for p in subject.module.parameters() if p.is_floating_point()}
    if dtypes - {torch.float32}:
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ExportError(f"the parameters are in {found}, and files are written in float32; call module.float() first")
    with subject.still(), ExitStack() as undo:
        step = next(subject.batches(), None)
        if step is None:
            raise ExportError("batches holds no batch, so nothing can be traced or checked; give real ones")
        signature, tensors = Signature.of(step.inputs), flat(step.inputs)
        count = len(tensors[0]) if tensors[0].dim() else 0
        if count < 2:
            tensors = [torch.cat([t, t]) if t.dim() and len(t) == count else t for t in tensors]
            count *= 2  # a batch of one is taken for a constant
        free = {0: torch.export.Dim("batch", min=1)}
        shapes = tuple(free if t.dim() and len(t) == count else None for t in tensors)
        for metric in subject.module.modules():
            if isinstance(metric, torchmetrics.Metric | torchmetrics.MetricCollection):
                for name in ("forward", "update", "compute"):
                    swap(undo, metric, name, lambda old: lambda *args, **kwargs: torch.zeros(()))
        try:
            with quiet():
                program = torch.export.export(
                    Plain(subject, step.inputs), tuple(tensors), dynamic_shapes=(shapes,), strict=False
                )
        except Exception as error:
            raise ExportError(
                f"{type(subject.module).__name__} cannot be traced for any batch size: {_first(error)}; write its "
                "forward without Python decisions on values of tensors or on the batch size, or name the submodule "
                "that gives the logits with Batch(logits=...)"
            ) from error
    return program, signature


def bare(program: Any) -> None:
    """Take from a program what a file must not tell: examples of the data, and where the sources lie."""
    program.example_inputs = None
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or ['no message'])[0][:300]}"


_EXTRA = ("onnx", "onnxscript", "onnxruntime")


def needs(*packages: str) -> None:
    """Raise in one line if packages are missing."""
    if missing := [name for name in packages if find_spec(name) is None]:
        wanted = "'lightning-guard[export]'" if set(missing) <= set(_EXTRA) else " ".join(missing)
        raise ExportError(f"this needs {', '.join(missing)}; pip install {wanted}")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' news about packages that nobody asked for, and about preparing what we have prepared."""

    def ours(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    names = ("torch.onnx._internal.exporter._registration", "torch.onnx._internal.exporter._schemas", "onnxscript")
    loggers = [logging.getLogger(), *map(logging.getLogger, names)]
    with ExitStack() as undo, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            undo.callback(logger.removeFilter, ours)
            logger.addFilter(ours)
        yield
