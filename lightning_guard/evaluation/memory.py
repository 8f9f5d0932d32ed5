"""How much memory a forward pass takes at its height."""

from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_guard.evaluation.subject import Subject


class _Alive(TorchDispatchMode):
    """Sums the storages of the tensors that operations made and that are still there, after each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def note(self, tensor: Tensor) -> None:
        """Count the storage of a tensor once."""
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        self._made[reference.cdata] = reference, storage.nbytes()

    def measure(self) -> None:
        """Look at what is there now."""
        self._made = {key: one for key, one in self._made.items() if not one[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._made.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        apply_to_collection(output, Tensor, self.note)
        self.measure()
        return output


def peak_bytes(subject: Subject, inputs: Any) -> int:
    """Bytes of all tensors that are there at once at the height of a forward pass: weights, inputs, intermediates.

    Counted operation by operation, so the same on every machine; what kernels take for themselves is not seen.

    Example:
        >>> import torch
        >>> subject = Subject(torch.nn.Linear(8, 4, bias=False), [(torch.zeros(2, 8), torch.zeros(2).long())])
        >>> with torch.no_grad():
        ...     peak_bytes(subject, torch.zeros(2, 8)) // 4  # weights, inputs, outputs
        56
    """
    alive = _Alive()
    for tensor in (*subject.module.parameters(), *subject.module.buffers()):
        alive.note(tensor)
    apply_to_collection(inputs, Tensor, alive.note)
    alive.measure()
    with alive:
        subject.forward(inputs)
    return alive.peak
