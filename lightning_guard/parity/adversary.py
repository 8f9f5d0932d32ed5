"""A head that tries to read the group, and a network that learns to hide it."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_guard.functional import stream
from lightning_guard.functional.fairness import Census
from lightning_guard.functional.fairness.reversal import reverse_gradient
from lightning_guard.parity.base import Mode, Seen
from lightning_guard.parity.dependence import Watched


class Adversary(Mode):
    r"""Trains a small head to predict the group, and passes its reversed gradient to the network.

    The head has one hidden layer and an optimizer (Adam) of its own, one step a training step, and is no part of the
    model: neither its state dict nor its optimizer know of it. Adversarial training of this kind is unstable; watch
    ``adversary_loss``: at ``chance_loss``, the loss of one who knows the groups' shares alone, the head reads nothing.

    Args:
        weight: :math:`\lambda` of the reversed gradient.
        layer: the submodule whose output the head reads; None is the logits.
        conditional: show the head the target as well, which asks for equalized odds instead of demographic parity.
        hidden: units of the head.
        lr: learning rate of the head; a head that learns no faster than the network hides little of the group.
        seed: of the head's initial weights.

    | case                         | result                                                     |
    |------------------------------|------------------------------------------------------------|
    | group unknown                | the example teaches the head nothing, and gets no gradient |
    | no example of known group    | no term, and the head rests                                |
    | several processes            | one head, of the union of their batches                    |

    Reference:
        Ganin et al., JMLR 17, 2016, arXiv:1505.07818; conditional on the target: Zhang, Lemoine and Mitchell,
        Mitigating Unwanted Biases with Adversarial Learning, AIES 2018, arXiv:1801.07593.
    """

    def __init__(
        self,
        weight: float = 1.0,
        layer: str | None = None,
        conditional: bool = False,
        hidden: int = 32,
        lr: float = 1e-3,
        seed: int = 0,
    ):
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight={weight} would help the head; give a finite number of at least 0")
        if hidden < 1:
            raise ValueError(f"hidden={hidden} leaves the head nothing; give at least 1 unit")
        if not lr > 0:
            raise ValueError(f"lr={lr} teaches the head nothing; give a positive number")
        self.weight, self.conditional, self.hidden, self.lr, self.seed = weight, conditional, hidden, lr, seed
        self.watched = Watched(layer)
        self.head: list[Tensor] = []
        self._optimizer: torch.optim.Adam | None = None
        self._restored: Mapping[str, Any] = {}
        self._loss: Tensor | None = None

    def begin(self, module: nn.Module, census: Census) -> None:
        self.watched.begin(module)
        sizes = [census.counts[census.families == family] for family in census.families.unique()]
        shares = [size / size.sum() for size in sizes]
        self._chance = torch.stack([-torch.xlogy(p, p).sum() for p in shares]).mean() if shares else torch.zeros(())

    def end(self) -> None:
        self.watched.end()

    def term(self, seen: Seen) -> Tensor | None:
        with torch.autocast(seen.logits.device.type, enabled=False):
            return self._term(seen)

    def _term(self, seen: Seen) -> Tensor | None:
        x = self.watched.take(seen)
        told = self._told(seen).to(x) if self.conditional else x.new_zeros(len(x), 0)
        if not self.head:
            self._make(x.shape[1] + told.shape[1], seen.census.groups, x)
        families = seen.census.families.to(x.device)
        known = seen.summed(_known(seen.members, families))
        if not known.sum():
            return None
        if not seen.step.rehearsal:
            self._learn(torch.cat([x.detach(), told], 1), seen, families, known)
        # Copies, because the head may have moved on before the user goes backward.
        head = [part.detach().clone() for part in self.head]
        guess = predict(head, torch.cat([reverse_gradient(x, self.weight), told], 1))
        return seen.processes * family_loss(guess, seen.members, families, known)

    def _learn(self, x: Tensor, seen: Seen, families: Tensor, known: Tensor) -> None:
        assert self._optimizer is not None
        with torch.enable_grad():
            loss = family_loss(predict(self.head, x), seen.members, families, known)
            grads = torch.autograd.grad(loss, self.head)
        for part, grad in zip(self.head, grads, strict=True):
            part.grad = seen.summed(grad)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._loss = seen.summed(loss.detach())

    def _told(self, seen: Seen) -> Tensor:
        if not isinstance(seen.target, Tensor):
            raise ValueError("conditional=True shows the head the target, and this batch has none; set it to False")
        classes = seen.census.cells.shape[1]
        if classes > 2 and not seen.census.several:
            labels: Tensor = torch.arange(classes, device=seen.target.device)
            return (seen.target.reshape(-1, 1) == labels).float()
        return seen.target.reshape(len(seen.members), -1).float()

    def _make(self, inputs: int, groups: int, like: Tensor) -> None:
        generator = stream(self.seed)
        shapes = [((self.hidden, inputs), inputs), ((groups, self.hidden), self.hidden)]
        for shape, fan in shapes:
            weight = (2 * torch.rand(shape, generator=generator) - 1) * (3 / fan) ** 0.5
            self.head += [weight.to(like), torch.zeros(shape[0]).to(like)]
        if self._restored:
            self.head = [part.to(like) for part in self._restored["head"]]
        self.head = [part.clone().requires_grad_() for part in self.head]
        self._optimizer = torch.optim.Adam(self.head, lr=self.lr)
        if self._restored:
            self._optimizer.load_state_dict(deepcopy(dict(self._restored["optimizer"])))
        self._restored = {}

    def figures(self) -> dict[str, float | Tensor]:
        return {} if self._loss is None else {"adversary_loss": self._loss, "chance_loss": self._chance}

    def state(self) -> dict[str, Any]:
        if self._optimizer is None:
            return dict(self._restored)
        head = [part.detach().cpu().clone() for part in self.head]
        return {"head": head, "optimizer": deepcopy(self._optimizer.state_dict())}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.head, self._optimizer, self._restored = [], None, dict(state)


def predict(head: Sequence[Tensor], x: Tensor) -> Tensor:
    """Logits of each group ``(N, G)`` from a head of one hidden layer."""
    first, first_bias, last, last_bias = head
    return F.linear(F.relu(F.linear(x, first, first_bias)), last, last_bias)


def family_loss(logits: Tensor, members: Tensor, families: Tensor, known: Tensor) -> Tensor:
    """Cross-entropy of the group within each family, over its examples of known group, averaged over families.

    Args:
        logits: ``(N, G)``.
        members: ``(N, G)``, 1 where an example belongs to a group.
        families: of each group, ``(G,)``.
        known: examples of known group of each family, ``(F,)``, which may be of more than this batch.

    Returns:
        A scalar in nats; a family without known examples adds nothing.
    """
    total = logits.sum() * 0
    for family, count in zip(families.unique(), known, strict=True):
        own = families == family
        chosen = F.log_softmax(logits[:, own], 1) * members[:, own].to(logits)
        total = total - chosen.sum() / count.clamp_min(1)
    return total / (known > 0).sum().clamp_min(1)


def _known(members: Tensor, families: Tensor) -> Tensor:
    return torch.stack([members[:, families == family].sum() for family in families.unique()])
