"""Several finished models as one."""

import math
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_guard.batch import Batch
from lightning_guard.evaluation.subject import column
from lightning_guard.guard import Run
from lightning_guard.undo import swap


class Ensemble(nn.Module):
    r"""Averages the class probabilities of several models, so that they can be judged and attacked as one.

    .. math:: z(x) = \log \frac{1}{M} \sum_m \mathrm{softmax}(z_m(x))

    Log-probabilities are logits of the same probabilities. With one logit a member, the logit of the average
    probability comes out. Gradients flow through all members, so an attack on the ensemble is an attack on all.

    Ensembles of weak defences are not strong (He et al., 2017): what fools each member tends to fool their average.
    Believe accuracy under an attack on the ensemble itself, not under attacks on members.

    Args:
        members: models that give logits of the same shape; their modes are left as they are.
        batch: where the logits of a member come from, if not from its ``forward``.

    | case                                           | result                                             |
    |------------------------------------------------|----------------------------------------------------|
    | one member                                     | the same probabilities as the member               |
    | logits ``(N, 1)``                              | taken as ``(N,)``                                  |
    | members whose outputs differ in shape          | ValueError, with the shapes                        |
    | a member that changes batches on their transfer | ValueError: its inputs would not be those of others |

    Raises:
        ValueError: if there is no member, or members do not fit together.

    Reference:
        He et al., Adversarial Example Defenses: Ensembles of Weak Defenses are not Strong, 2017, arXiv:1706.04701.

    Example:
        >>> one, two = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.5, 0.5]]).log()
        >>> Ensemble([nn.Identity(), nn.Identity()])(one).exp()
        tensor([[0.5000, 0.5000]])
    """

    def __init__(self, members: Iterable[nn.Module], batch: Batch | None = None):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.batch = batch or Batch()
        if not len(self.members):
            raise ValueError("members is empty; give at least one finished model")
        for member in self.members:
            for hook in ("on_before_batch_transfer", "on_after_batch_transfer"):
                own = getattr(type(member), hook, None)
                if own is not None and not own.__module__.startswith(("pytorch_lightning.", "lightning.")):
                    raise ValueError(
                        f"members: {type(member).__name__}.{hook} changes batches, which an ensemble cannot do for "
                        "each member; normalise in the member's forward, or in the loader for all"
                    )

    def forward(self, inputs: Any) -> Tensor:
        """Logits of the averaged probabilities, ``(N,)`` for one logit, else ``(N, C)``, in float32 or wider."""
        with ExitStack() as undo:
            for member in self.members:
                for method in ("log", "log_dict"):
                    if hasattr(member, method):  # a LightningModule may log only inside its own Trainer
                        swap(undo, member, method, lambda old: lambda *args, **kwargs: None)
            logits = [column(self._run(member).forward(inputs)) for member in self.members]
        shapes = {tuple(one.shape) for one in logits}
        if len(shapes) > 1 or logits[0].dim() > 2:
            raise ValueError(f"members give logits of shapes {sorted(shapes)}; they must agree in (N,) or (N, C)")
        stack = torch.stack([one if one.dtype.itemsize > 2 else one.float() for one in logits])
        if stack.dim() == 2:
            return F.logsigmoid(stack).logsumexp(0) - F.logsigmoid(-stack).logsumexp(0)
        return stack.log_softmax(2).logsumexp(0) - math.log(len(stack))

    def _run(self, member: nn.Module) -> Run:
        return Run(None, member, (), self.batch)  # type: ignore[arg-type]  # nobody trains here
