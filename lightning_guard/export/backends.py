"""Programs in int8 for compilers other than onnxruntime, where what makes them is installed."""

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from lightning_guard.export.tracing import ExportError, needs, quiet


def to_pt2e(program: Any, batches: Iterable[list[Tensor]]) -> Any:
    """The program in int8 as Inductor on x86 compiles it, quantised by torchao.

    Run eagerly it computes in simulated int8; ``torch.compile`` with ``TORCHINDUCTOR_FREEZING=1`` makes it fast.
    """
    needs("torchao")
    with quiet():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(deepcopy(program.module()), quantizer)
        seen: list[Tensor] = []
        for seen in batches:
            prepared(*seen)
        if not seen:
            raise ExportError("calibration holds no batch, so activations have no range; give real ones")
        converted = convert_pt2e(prepared)
        _without_dead_weights(converted)
        free = {0: torch.export.Dim("batch", min=1)}
        shapes = tuple(free if t.dim() and len(t) == len(seen[0]) else None for t in seen)
        return torch.export.export(converted, tuple(seen), dynamic_shapes=shapes, strict=False)


def _without_dead_weights(module: Any) -> None:
    """The float weights stay beside the int8 ones otherwise, and the file grows."""
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name, _ in [*module.named_parameters(), *module.named_buffers()]:
        if name not in used:
            owner, _, own = name.rpartition(".")
            delattr(module.get_submodule(owner), own)
