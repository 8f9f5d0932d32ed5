"""Making a representation say less of the groups."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_guard.functional.fairness import Census
from lightning_guard.functional.fairness.dependence import hsic, median_bandwidth, mmd2
from lightning_guard.guard import GuardConflict
from lightning_guard.parity.base import Mode, Seen
from lightning_guard.pipeline import current


class Watched:
    """What a submodule returned in the step's own forward pass; the logits where none is named.

    Args:
        layer: name of the submodule, as in ``named_modules``; None is the logits.
    """

    def __init__(self, layer: str | None):
        self.layer = layer
        self._output: Any = None
        self._hook: Any = None

    def begin(self, module: nn.Module) -> None:
        """Watch from now on."""
        self.end()
        if self.layer is None:
            return
        try:
            layer = module.get_submodule(self.layer)
        except AttributeError:
            raise GuardConflict(
                f"layer={self.layer!r} is no submodule of {type(module).__name__}; give a name of named_modules()"
            ) from None

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            pipeline = current(module)  # type: ignore[arg-type]
            probing = pipeline is not None and pipeline.step is not None and pipeline.step.probing
            if module.training and torch.is_grad_enabled() and not probing:
                self._output = output

        self._hook = layer.register_forward_hook(keep)

    def end(self) -> None:
        """Watch no longer."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._output = None

    def take(self, seen: Seen) -> Tensor:
        """The representation of this batch ``(N, D)`` in float32 or wider, with its graph."""
        output, self._output = (seen.logits if self.layer is None else self._output), None
        if not isinstance(output, Tensor) or len(output) != len(seen.members):
            found = f"a tensor of {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise GuardConflict(
                f"layer={self.layer!r} gave {found} in training_step for {len(seen.members)} examples; name a "
                "submodule that is called there once and returns a row an example"
            )
        rows = output.reshape(len(output), -1)
        return rows if rows.dtype.itemsize > 2 else rows.float()


class _Dependence(Mode):
    def __init__(self, weight: float, layer: str | None = None):
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight={weight} would reward dependence; give a finite number of at least 0")
        self.weight = weight
        self.watched = Watched(layer)
        self.found: float | Tensor = 0.0

    def begin(self, module: nn.Module, census: Census) -> None:
        self.watched.begin(module)

    def end(self) -> None:
        self.watched.end()

    def term(self, seen: Seen) -> Tensor | None:
        with torch.autocast(seen.logits.device.type, enabled=False):  # distances need all digits
            found = self.between(self.watched.take(seen), seen)
        self.found = found.detach()
        return self.weight * found

    def between(self, x: Tensor, seen: Seen) -> Tensor:
        raise NotImplementedError


class MMD(_Dependence):
    """Adds the discrepancy between each group's representation and that of the rest of its family.

    The mean over a family's groups of the unbiased squared MMD, summed over families, with the family's median
    distance as bandwidth. Each process compares the groups of its own part of the batch.

    Args:
        weight: nats per squared MMD.
        layer: the submodule whose output is compared; None is the logits.

    | case                                     | result                  |
    |------------------------------------------|-------------------------|
    | fewer than two examples of a group or of the rest | it adds nothing |
    | group unknown                            | the example adds nothing |

    Reference:
        Gretton et al., JMLR 13, 2012; as a penalty Louizos et al., The Variational Fair Autoencoder, ICLR 2016,
        arXiv:1511.00830.
    """

    def between(self, x: Tensor, seen: Seen) -> Tensor:
        total = x.sum() * 0
        for family in seen.census.families.unique():
            members = seen.members[:, (seen.census.families == family).to(seen.members.device)] > 0
            known = members.any(1)
            width = median_bandwidth(x[known])
            for own in members.T:
                total = total + mmd2(x[own], x[known & ~own], width, unbiased=True) / members.shape[1]
        return total

    def figures(self) -> dict[str, float | Tensor]:
        return {"mmd2": self.found}


class HSIC(_Dependence):
    """Adds the normalised Hilbert-Schmidt independence criterion of the representation and each attribute.

    The sum over attributes of values in [0, 1]. Each process looks at its own part of the batch. The estimate is
    biased upwards for small batches, so give at least some hundred examples.

    Args:
        weight: nats per unit of the criterion.
        layer: the submodule whose output is compared; None is the logits.
        continuous: the attributes are quantities, NaN where unknown; else they are groups, of which no one is nearer
            to another.

    | case                           | result                    |
    |--------------------------------|---------------------------|
    | attribute unknown              | the example adds nothing  |
    | fewer than two known, or all of one value | nothing is added |

    Reference:
        Gretton et al., ALT 2005; as a penalty Li et al., Kernel Dependence Regularizers and Gaussian Processes with
        Applications to Algorithmic Fairness, 2019, arXiv:1911.04322.
    """

    def __init__(self, weight: float, layer: str | None = None, continuous: bool = False):
        super().__init__(weight, layer)
        self.continuous = continuous

    def between(self, x: Tensor, seen: Seen) -> Tensor:
        if self.continuous:
            attributes = list(seen.attribute.reshape(len(x), -1).T)
        else:
            families = seen.census.families.to(seen.members.device)
            attributes = [seen.members[:, families == family] for family in families.unique()]
            attributes = [one.where(one.sum(1, keepdim=True) > 0, torch.nan) for one in attributes]
        return torch.stack([hsic(x, one, normalised=True) for one in attributes]).sum()

    def figures(self) -> dict[str, float | Tensor]:
        return {"hsic": self.found}
