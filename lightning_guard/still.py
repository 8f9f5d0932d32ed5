"""Passes through a model that leave no trace on its training."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_guard.undo import swap


@contextmanager
def still(module: nn.Module, metrics: Sequence[nn.Module], training: bool = False) -> Iterator[None]:
    """Passes through ``module`` inside this block log nothing, count in no metric and change no generator.

    With ``training`` layers keep their mode, so that whatever writes buffers in training does; else nothing does.
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    on_cuda = device.type == "cuda"
    active = [] if training else [layer for layer in module.modules() if layer.training]
    # cuDNN refuses a backward pass through a recurrent layer in eval mode; its dropout is stilled by hand.
    recurrent = [layer for layer in active if isinstance(layer, nn.RNNBase)] if on_cuda else []
    with ExitStack() as undo:
        undo.enter_context(torch.random.fork_rng([device] if on_cuda else []))
        undo.callback(_set_training, active, True)
        _set_training(active, False)
        for layer in recurrent:
            undo.callback(setattr, layer, "dropout", layer.dropout)
            layer.dropout, layer.training = 0.0, True
        for metric in metrics:
            undo.callback(vars(metric).update, _metric_state(metric))
        for method in ("log", "log_dict"):
            if hasattr(module, method):
                swap(undo, module, method, lambda old: lambda *args, **kwargs: None)
        yield


def _set_training(layers: Sequence[nn.Module], mode: bool) -> None:
    for layer in layers:
        vars(layer)["training"] = mode  # what `layer.training = mode` does after a microsecond of checks, twice a step


def _metric_state(metric: Any) -> dict[str, Any]:
    def copied(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else list(value) if isinstance(value, list) else value

    kept = [*metric._defaults, "_update_count", "_computed", "_forward_cache"]
    return {key: copied(getattr(metric, key)) for key in kept}


def buffer_versions(module: nn.Module) -> dict[str, tuple[int, int]]:
    """What changes when a buffer is written or replaced."""
    return {name: (id(buffer), buffer._version) for name, buffer in module.named_buffers()}
