"""Signs that an attack was misled, in plain words: accuracy under it is then no evidence of robustness."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_WARNINGS = {
    "dynamic defense": (
        "The model takes gradients or otherwise adapts while it is asked, and no attack here was fitted to that: "
        "a stronger one may exist."
    ),
}


@dataclass
class Signs:
    """What was seen of a model under attack.

    Args:
        seen: examples.
        clean: those right without an attack.
        passes: forward passes a point, more than 1 if the model draws numbers.
        probabilities: whether it returns probabilities instead of logits.
        silent: right examples whose margin has no input gradient.
        saturated: right examples whose cross-entropy has none, though the margin has.
        noise: examples that random points fooled and gradients did not.
        probed: examples that gradients did not fool and that a few queries without gradients were tried on.
        queried: of these, the fooled.
        steps: examples left by number of gradient steps, of those tried; 0 steps is without attack.
        radii: examples left by radius.
        everything: whether the largest radius lets the attacker replace the whole input.
        remedies: what was tried besides, by name, with how many more examples it fooled.
        blocked: why gradients could not be let through where they are cut, if they could not.
        warnings: what AutoAttack itself warned of.
    """

    seen: int = 0
    clean: int = 0
    passes: int = 1
    probabilities: bool = False
    silent: int = 0
    saturated: int = 0
    noise: int = 0
    probed: int = 0
    queried: int = 0
    steps: Mapping[int, int] = field(default_factory=dict)
    radii: Mapping[float, int] = field(default_factory=dict)
    everything: bool = False
    remedies: dict[str, int] = field(default_factory=dict)
    blocked: str = ""
    warnings: Sequence[str] = ()

    @property
    def blind(self) -> bool:
        """Whether gradients say nothing for many examples."""
        return self.silent > 0.1 * self.clean

    @property
    def misled(self) -> bool:
        """Whether something simpler than a gradient attack found what that did not."""
        return self._noisy or self._queried or self._stepped or self._flat

    @property
    def _noisy(self) -> bool:
        return self.noise > 0.005 * self.seen

    @property
    def _queried(self) -> bool:
        return self.queried > max(1, 0.01 * self.probed)

    @property
    def _stepped(self) -> bool:
        most = self.steps.get(max(self.steps, default=0), 0)
        return most > min(self.steps.values(), default=0) + max(2, 0.02 * self.steps.get(0, 0))

    @property
    def _flat(self) -> bool:
        """Whether accuracy does not fall though the attacker may do more and more."""
        left = [self.radii[radius] for radius in sorted(self.radii)]
        return (
            len(left) > 1 and left[-1] > 0 and (left[0] == left[-1] or (self.everything and left[-1] > 0.1 * left[0]))
        )

    def sentences(self) -> list[str]:
        """Every sign, a sentence each."""
        said = []
        if self.passes > 1:
            said.append(
                f"The model answers differently each time: gradients were averaged over {self.passes} passes, and an "
                f"example counts as right only if it is in each of {self.passes}."
            )
        if self.probabilities:
            said.append(
                "The model returns probabilities instead of logits, behind which gradients vanish: their logarithm was "
                "attacked."
            )
        if self.blind:
            said.append(
                f"The input gradient is zero for {self.silent} of {self.clean} examples (masked gradients): gradient "
                "attacks cannot see where to go."
            )
        if self.saturated > 0.1 * self.clean:
            said.append(
                f"Cross-entropy has no gradient for {self.saturated} of {self.clean} examples, so large are the "
                "logits: attacks on it fail here, and the margin was attacked instead."
            )
        if self._noisy:
            said.append(
                f"Random noise fools {self.noise} of {self.seen} examples that the gradient attack did not: gradients "
                "mislead it, and stronger attacks will find more."
            )
        if self._queried:
            said.append(
                f"Square, which sees no gradient, fools {self.queried} of {self.probed} examples that the gradient "
                "attack did not: gradients mislead it."
            )
        if self._stepped:
            best, most = min(self.steps, key=lambda step: self.steps[step]), max(self.steps)
            said.append(
                f"More steps leave more examples right: {self.steps[most]} after {most} steps and {self.steps[best]} "
                f"after {best}, so gradients mislead the attack."
            )
        if self._flat:
            last = max(self.radii)
            said.append(
                f"Accuracy does not fall between eps {min(self.radii):.4g} and {last:.4g}"
                f"{', where any input may become any other' if self.everything else ''}: gradients mislead the attack, "
                "or the model hardly looks at its inputs."
            )
        said += [sentence for sign, sentence in _WARNINGS.items() if any(sign in text for text in self.warnings)]
        if self.remedies:
            told = ", ".join(f"{name} ({count} more fooled)" for name, count in self.remedies.items())
            said.append(f"Because of these signs more was tried: {told}.")
        if self.blocked:
            said.append(f"Gradients could not be let through where the model cuts them: {self.blocked}.")
        return said


def differs(first: Tensor, second: Tensor) -> bool:
    """Whether two passes of the same inputs differ by more than the order of sums can explain.

    Example:
        >>> differs(torch.ones(2, 3), torch.ones(2, 3) + 1e-6), differs(torch.ones(2, 3), torch.ones(2, 3) + 0.1)
        (False, True)
    """
    size = torch.maximum(first.abs(), second.abs()).nan_to_num().amax()
    return bool(((first - second).abs().nan_to_num() > 1e-4 * size).any())


def probabilities(outputs: Tensor) -> bool:
    """Whether outputs ``(N, C)`` are probabilities: none negative, and every row sums to one.

    Example:
        >>> probabilities(torch.randn(4, 3).softmax(1)), probabilities(torch.tensor([[0.5, 0.7], [0.5, 0.5]]))
        (True, False)
    """
    return outputs.dim() == 2 and bool((outputs >= 0).all()) and bool(((outputs.sum(1) - 1).abs() < 1e-3).all())
