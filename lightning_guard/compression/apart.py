"""The model of a run apart from it: copies, an example, and the way from inputs to logits."""

import copy
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_guard.batch import Batch
from lightning_guard.guard import GuardConflict, Run, logits_in, said


def plain_copy(module: nn.Module) -> Any:
    """A copy that is itself: instance attributes that stand before methods (compiled ones) belong to the original."""
    made = copy.deepcopy(module)
    for key in [key for key, value in vars(made).items() if callable(value) and hasattr(type(made), key)]:
        delattr(made, key)
    return made


def outputs_of(module: nn.Module, inputs: Any, batch: Batch, like: type | None = None) -> Tensor:
    """Logits of a copy of the model, the way :meth:`~lightning_guard.guard.Run.forward` gives those of the model.

    Args:
        module: a module; ``Batch.logits`` names a part of it if it is of the class ``like``.
        inputs: as the module takes them.
        batch: how the model of the run is read.
        like: the class of that model; the module's own if not given.
    """
    output = said(module, "guard_forward", inputs)
    if output is None:
        name = batch.logits if batch.logits and type(module) is (like or type(module)) else ""
        output = module.get_submodule(name)(inputs)
    logits = logits_in(output)
    if logits is None:
        raise GuardConflict(
            f"{type(module).__name__} returns {type(output).__name__}, which holds no logits; name the submodule that "
            "gives them with Batch(logits=...), or say it with GuardMixin.guard_forward"
        )
    return logits


def example_inputs(run: Run) -> Any:
    """Inputs of two examples, before training: the module's ``example_input_array``, else rows of the training data.

    Rows are read from the data set itself, past the sampler, and the global random generators are put back.

    Raises:
        GuardConflict: if the data has no rows to be read before training.
    """
    example = run.module.example_input_array
    if example is None:
        state, numbers = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng():
                source = run.trainer.fit_loop._data_source.dataloader()
                example = run.batch.read(_batch_of_two(source), "inputs")
        except KeyError as error:
            raise GuardConflict(error.args[0]) from None
        finally:
            random.setstate(state)
            np.random.set_state(numbers)
    return move(example, run.module.device)


def _batch_of_two(source: Any) -> Any:
    rows: Any = source.dataset if isinstance(source, DataLoader) else None
    if hasattr(rows, "__getitem__") and hasattr(type(rows), "__len__") and len(rows):
        return source.collate_fn([rows[0], rows[len(rows) - 1]])
    raise GuardConflict(
        f"the shapes of the inputs are needed before training, and {type(source).__name__} gives no rows but in its "
        "own order; set example_input_array on the module, inputs of two examples"
    )


def move(inputs: Any, device: torch.device) -> Any:
    """Tensors of inputs on a device, nested ones too."""
    from lightning_utilities.core.apply_func import apply_to_collection

    return apply_to_collection(inputs, Tensor, lambda tensor: tensor.to(device))
