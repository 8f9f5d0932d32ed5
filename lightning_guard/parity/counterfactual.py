"""The same prediction for the same example with another attribute."""

import torch
from torch import Tensor

from lightning_guard.functional import stream
from lightning_guard.guard import GuardConflict, said
from lightning_guard.parity.base import Mode, Seen


class Counterfactual(Mode):
    r"""Adds the squared difference between the predictions of an example and of its counterfactual.

    .. math:: \frac{\lambda}{N K} \sum_{i,k} \big( p_k(x_i) - p_k(\tilde x_i) \big)^2

    with :math:`\tilde x` from the module's ``guard_counterfactual(inputs)``: the same inputs with the attribute
    changed and all that follows from it. What follows is for you to say; changing the attribute's column alone leaves
    what it caused. It costs one more forward pass, trained on as well; Dropout draws afresh in it.

    Args:
        weight: :math:`\lambda`, nats per squared probability.
        seed: of Dropout in the second pass.

    Reference:
        Kusner et al., Counterfactual Fairness, NeurIPS 2017, arXiv:1703.06856; pairs as a penalty: Garg et al.,
        Counterfactual Fairness in Text Classification through Robustness, AIES 2019, arXiv:1809.10610.
    """

    couples_examples = False

    def __init__(self, weight: float = 1.0, seed: int = 0):
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight={weight} would reward differences; give a finite number of at least 0")
        self.weight, self.seed = weight, seed
        self.found: float | Tensor = 0.0

    def term(self, seen: Seen) -> Tensor | None:
        step = seen.step
        inputs = said(step.module, "guard_counterfactual", step.inputs)
        if inputs is None:
            raise GuardConflict(
                f"{type(step.module).__name__} says no counterfactual inputs; inherit GuardMixin and return from "
                "guard_counterfactual(inputs) the same inputs with the attribute changed"
            )
        with step.training_pass(stream(self.seed, step.index, step.run.rank).initial_seed()):
            other = step.forward(inputs)
        if other.shape != seen.logits.shape:
            raise GuardConflict(
                f"guard_counterfactual gave logits of shape {tuple(other.shape)} for examples with logits of shape "
                f"{tuple(seen.logits.shape)}; return one counterfactual an example, in their order"
            )
        target, counted = seen.target, seen.census.groups  # private targets are not looked at before
        shaped = isinstance(target, Tensor) and target.dim() > 1 and target.shape[1] > 1
        several = seen.census.several if counted else shaped
        difference = _probabilities(seen.logits, several) - _probabilities(other.float(), several)
        found = difference.square().mean()
        self.found = found.detach()
        return self.weight * found

    def figures(self) -> dict[str, float | Tensor]:
        return {"counterfactual": self.found}


def _probabilities(logits: Tensor, several: bool) -> Tensor:
    """Of one logit, or of several labels, each by itself; of classes together."""
    single = logits.dim() == 1 or logits.shape[1] == 1
    return torch.sigmoid(logits) if single or several else torch.softmax(logits, 1)
