"""A finished run brought back: the arm built anew, its model as training left it."""

from typing import Any

import torch

from lightning_guard.functional.reshaping import reshape_like
from lightning_guard.guard import guards_of
from lightning_guard.report.runs import ArmRun, Parts


def rebuilt(run: ArmRun) -> Parts | None:
    """Trainer, model and data of a finished run, the model with its weights; None if they do not fit any more.

    What guards change in the structure of a model, such as a step that squeezes its inputs, is no weight, so it is
    made again. Whatever else training changed is not: whoever judges the model checks that it answers as it did.
    """
    trainer, module, data = run.arm.build([])
    module.configure_model()
    for guard in guards_of(trainer, module):
        if guard.overrides("rewrite"):
            guard.rewrite(module)
    weights = torch.load(run.folder / "weights.pt", weights_only=True)
    try:
        reshape_like(module, weights)  # a guard may have taken channels out
        module.load_state_dict(weights)
    except (RuntimeError, ValueError):  # keys or shapes that training changed
        return None
    return trainer, module, data


def kept_tensors(run: ArmRun) -> dict[str, Any]:
    """The tensors that a finished run kept of its evidence; none if there are none."""
    path = run.folder / "tensors.pt"
    return torch.load(path, weights_only=True) if run.result() is not None and path.exists() else {}
