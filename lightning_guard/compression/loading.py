"""Loading weights whose shapes a guard has changed into the plain class."""

from inspect import Parameter, signature
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch

from lightning_guard.functional.reshaping import reshape_like

Module = TypeVar("Module", bound=pl.LightningModule)


def load_reshaped(cls: type[Module], path: str | Path, **kwargs: Any) -> Module:
    """``cls.load_from_checkpoint`` for a model that lost channels or whose layers were factorised.

    The shapes come from the stored weights, so neither the guard nor torch-pruning is needed. Dense checkpoints load
    as well.

    Args:
        cls: the LightningModule's class.
        path: of the checkpoint, which is read with ``weights_only=True``.
        kwargs: arguments of ``cls`` in place of those that the checkpoint knows.

    Returns:
        The module on the CPU, in eval mode.

    Raises:
        ValueError: if the checkpoint's weights are of another class.

    Example:
        >>> import tempfile
        >>> from lightning_guard.functional.reshaping import apply_plan
        >>> from lightning_guard.models import MLP
        >>> small = MLP(in_features=3, hidden=[8])
        >>> apply_plan(small, {"layers.0": {"out": [0, 1]}, "layers.3": {"in": [0, 1]}})
        >>> file = {"state_dict": small.state_dict(), "hyper_parameters": dict(small.hparams)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(file, f"{folder}/small.ckpt")
        ...     load_reshaped(MLP, f"{folder}/small.ckpt").layers[0]
        Linear(in_features=3, out_features=2, bias=True)
    """
    stored = torch.load(path, map_location="cpu", weights_only=True)
    known = signature(cls.__init__).parameters
    takes_all = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in known.values())
    saved = {key: value for key, value in stored.get("hyper_parameters", {}).items() if takes_all or key in known}
    module = cls(**{**saved, **kwargs})
    module.configure_model()
    weights = stored.get("state_dict", stored)
    try:
        reshape_like(module, weights)
        module.on_load_checkpoint(stored)
        module.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} does not load into {cls.__name__}: {error}") from error
    return module.eval()
