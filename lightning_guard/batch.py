"""Reading a batch of any common form, and writing a changed one without touching what the loader gave."""

import copy
import dataclasses
from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import Tensor

Key = int | str

# Names by which datasets commonly call the three parts, most specific first.
_NAMES = {
    "inputs": ("inputs", "input", "x", "features", "image", "images", "pixel_values", "data"),
    "target": ("target", "targets", "y", "label", "labels"),
    "group": ("group", "groups", "sensitive", "sensitive_features"),
}


@dataclasses.dataclass(frozen=True)
class Batch:
    """How a batch is read: where its inputs, target and group are, and where the logits come from.

    Positions and keys are found by themselves for ``(x, y)``, ``(x, y, group)``, named tuples, dataclasses and dicts
    with common names; a bare tensor is inputs without a target. State what is different. A batch is never changed in
    place: ``with_inputs`` and ``without_group`` give a new one of the same type.

    Args:
        inputs: position or name of the inputs.
        target: position or name of the target.
        group: position or name of the group, whole numbers ``(N,)``; negative is unknown. Where each class is a group,
            state both: ``Batch(target=1, group=1)``.
        logits: name of the submodule whose output is the logits; None is the LightningModule's own ``forward``.
        withhold_group: keep the group from ``training_step`` and its siblings, which then see the batch they were
            written for. Only done while a guard uses the group, and never where that is the inputs or the target too.

    Example:
        >>> import torch
        >>> batch = (torch.zeros(2, 3), torch.ones(2), torch.tensor([0, 1]))
        >>> Batch().read(batch, "group")
        tensor([0, 1])
        >>> len(Batch().without_group(batch))
        2
        >>> Batch(inputs="pixels").with_inputs({"pixels": 1, "label": 2}, 7)
        {'pixels': 7, 'label': 2}
    """

    inputs: Key | None = None
    target: Key | None = None
    group: Key | None = None
    logits: str | None = None
    withhold_group: bool = True

    def read(self, batch: Any, part: str) -> Any:
        """The ``inputs``, ``target`` or ``group`` of a batch.

        Raises:
            KeyError: if the batch has no such part, naming what it has.
        """
        if isinstance(batch, Tensor) and part == "inputs":
            return batch
        key = self.find(batch, part)
        if key is None:
            raise KeyError(f"this batch has no {part}: it is {_describe(batch)}; say where with Batch({part}=...)")
        return batch[key] if _by_key(batch, key) else getattr(batch, str(key))

    def find(self, batch: Any, part: str) -> Key | None:
        """The position or name of a part in this batch, None if it has none.

        Raises:
            KeyError: if what was stated is not there, or several names could be meant.
        """
        stated: Key | None = getattr(self, part)
        names = _names(batch)
        if stated is not None:
            if stated in names or (isinstance(stated, int) and -len(names) <= stated < len(names)):
                return stated
            if part == "group":
                return None  # evaluation loaders may come without the group
            raise KeyError(f"Batch({part}={stated!r}) is not in this batch: it is {_describe(batch)}")
        if not isinstance(batch, Mapping | tuple | list) and not dataclasses.is_dataclass(batch):
            return None
        found = [name for name in _NAMES[part] if name in names]
        if len(found) > 1:
            raise KeyError(f"{' and '.join(found)} could each be the {part}; say which with Batch({part}=...)")
        if found:
            return found[0]
        position = list(_NAMES).index(part)
        if position in {getattr(self, other) for other in _NAMES}:  # stated to be another part
            return None
        return position if isinstance(batch, tuple | list) and position < len(batch) else None

    def with_inputs(self, batch: Any, inputs: Any) -> Any:
        """The same batch with other inputs, as a new object of the same type."""
        return inputs if isinstance(batch, Tensor) else self._with(batch, "inputs", inputs)

    def with_target(self, batch: Any, target: Any) -> Any:
        """The same batch with another target, as a new object of the same type."""
        return self._with(batch, "target", target)

    def _with(self, batch: Any, part: str, value: Any) -> Any:
        key = self.find(batch, part)
        if key is None:
            raise KeyError(f"this batch has no {part}: it is {_describe(batch)}; say where with Batch({part}=...)")
        if isinstance(batch, MutableMapping):
            changed = copy.copy(batch)
            changed[key] = value
            return changed
        if isinstance(batch, list):
            return [value if i == int(key) % len(batch) else one for i, one in enumerate(batch)]
        if hasattr(batch, "_replace"):
            return batch._replace(**{batch._fields[key] if isinstance(key, int) else key: value})
        if isinstance(batch, tuple):
            return tuple(value if i == int(key) % len(batch) else one for i, one in enumerate(batch))
        return dataclasses.replace(batch, **{str(key): value})

    def without_group(self, batch: Any) -> Any:
        """The batch as a step expects it that knows no group; named fields stay, since nobody trips over them."""
        if not self.withhold_group or isinstance(batch, Tensor):
            return batch
        key = self.find(batch, "group")
        if key is None or key in (self.find(batch, "inputs"), self.find(batch, "target")):
            return batch
        if isinstance(batch, MutableMapping):
            changed = copy.copy(batch)
            del changed[key]
            return changed
        if hasattr(batch, "_fields") or not isinstance(batch, tuple | list):
            return batch
        return type(batch)(part for i, part in enumerate(batch) if i != int(key) % len(batch))


def _names(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return list(batch)
    if hasattr(batch, "_fields"):
        return list(batch._fields)
    if dataclasses.is_dataclass(batch):
        return [field.name for field in dataclasses.fields(batch)]
    return list(range(len(batch))) if isinstance(batch, tuple | list) else []


def _by_key(batch: Any, key: Key) -> bool:
    return isinstance(batch, Mapping) or (isinstance(key, int) and isinstance(batch, tuple | list))


def _describe(batch: Any) -> str:
    if isinstance(batch, tuple | list) and not hasattr(batch, "_fields"):
        return f"a {type(batch).__name__} of {len(batch)}"
    names = ", ".join(map(str, _names(batch)))
    return f"a {type(batch).__name__}" + (f" with {names}" if names else "")
