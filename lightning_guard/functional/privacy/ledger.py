"""How far a private training has come, and whether it may go on."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning_guard.functional.privacy.accounting import Segment
from lightning_guard.functional.privacy.plan import PrivacyPlan
from lightning_guard.functional.privacy.sampling import Deal


class Ledger:
    """Counts the noisy steps of a training and refuses those that its plan does not pay for.

    Args:
        plan: what is promised, and what pays for it.
        private: False if draws and noise come from a seed, which what follows from them cannot make good.
        fixed: whether the length of training is part of the promise; else it may be resumed for longer.

    Example:
        >>> plan = PrivacyPlan.solve(60_000, 256, 234, 1e-5, 1.0, noise_multiplier=1.1, epochs=15)
        >>> ledger = Ledger(plan)
        >>> ledger.steps += 1
        >>> again = Ledger(plan)
        >>> again.resume(ledger.state())
        >>> again.steps, again.done
        (1, False)
    """

    def __init__(self, plan: PrivacyPlan, private: bool = True, fixed: bool = True):
        self.plan, self.private, self.fixed = plan, private, fixed
        self.steps = 0  # released so far
        self.max_grad_norm: float | None = None  # of the next step, where it adapts
        self.pending = False  # a gradient was released that no optimizer has taken

    @property
    def done(self) -> bool:
        """Whether nothing is left to pay for another step."""
        return self.steps >= self.plan.steps

    @property
    def spent(self) -> float:
        """Epsilon of the steps so far."""
        return self.plan.epsilon(self.steps)

    def admit(self, deal: Deal, batch: int, chunks: int) -> None:
        """Check that a batch may be trained on now.

        Args:
            deal: what it is.
            batch: its number in the epoch.
            chunks: batches of a step.

        Raises:
            ValueError: if steps would be made otherwise than they are counted.
        """
        if deal.first and batch % chunks:
            raise ValueError(
                f"training resumed in the middle of {chunks} accumulated batches, whose draw is gone; resume from a "
                "checkpoint at the end of a step or an epoch"
            )
        if self.pending:
            raise ValueError(
                "no optimizer took the last gradient, and whether one does may tell of raw data; step in every step, "
                "whatever the loss is"
            )
        if deal.first and deal.step == 0 and self._within_shuffled:
            raise ValueError("sampling='shuffle' promises whole epochs, and the last one was cut short")
        if self.done:
            raise ValueError(
                f"the budget is spent: {self.steps} steps are epsilon = {self.spent:.3g}; take the weights as they "
                "are, or plan a longer training"
            )

    @property
    def _within_shuffled(self) -> bool:
        """Whether the steps so far end within an epoch whose order they used up in part."""
        return self.plan.sampling == "shuffle" and self.steps % self.plan.steps_per_epoch != 0

    def state(self) -> dict[str, Any]:
        """What :meth:`resume` takes: numbers, strings and None, and no secret."""
        plan = self.plan if self.fixed else replace(self.plan, steps=max(self.steps, 1))
        return {
            "plan": plan.to_dict(), "fingerprint": plan.fingerprint, "steps": self.steps,
            "max_grad_norm": self.max_grad_norm, "private": self.private,
        }  # fmt: skip

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on where a training of the same promise stopped.

        Raises:
            ValueError: if it was another promise, or cannot be kept from there.
        """
        was, now = PrivacyPlan.from_dict(state["plan"]), self.plan
        if not self.fixed:
            now, was = replace(now, steps=1), replace(was, steps=1)
        if changes := was.differences(now):
            raise ValueError(
                f"the checkpoint was trained by another plan ({'; '.join(changes)}), and one promise cannot cover "
                "both; resume with the same options, data and length, or train anew"
            )
        if self.private and not state["private"]:
            raise ValueError(
                "the checkpoint was trained with a test_seed and is not private, nor is what follows from it; train "
                "anew, or give a test_seed again"
            )
        self.steps, self.max_grad_norm = state["steps"], state["max_grad_norm"]
        if self._within_shuffled:
            raise ValueError(
                "sampling='shuffle' promises each example one step an epoch, and a new order begins in the middle of "
                "one; resume from a checkpoint at the end of an epoch"
            )


def released(state: Mapping[str, Any], units: int, unit: str, sampling: str, private: bool = True) -> list[Segment]:
    """What an earlier training on the same data has released, by its ledger's state, for a plan that counts on.

    Args:
        state: what :meth:`Ledger.state` gave.
        units: examples, or people, in the training data of now.
        unit: who is protected now.
        sampling: how batches are drawn now.
        private: False if the training of now is a test that protects nobody.

    Raises:
        ValueError: if the two make no promise together.

    Example:
        >>> plan = PrivacyPlan.solve(60_000, 256, 234, 1e-5, 1.0, noise_multiplier=1.1, epochs=15)
        >>> ledger = Ledger(plan)
        >>> ledger.steps = 100
        >>> released(ledger.state(), 60_000, "example", "poisson")[0].steps
        100
    """
    plan = PrivacyPlan.from_dict(state["plan"])
    if private and not state["private"]:
        raise ValueError(
            "it was trained with a test_seed and is not private, nor is what follows from it; train it without one"
        )
    for option, was, now in (
        ("units", plan.units, units),
        ("unit", plan.unit, unit),
        ("sampling", plan.sampling, sampling),
    ):
        if was != now:
            raise ValueError(
                f"it was trained with {option}={was} and this training has {option}={now}, so the two costs do not add "
                "up to one promise; train both on the same data in the same way"
            )
    return plan.ledger(state["steps"])
