"""The sign of catastrophic overfitting."""

from dataclasses import dataclass


@dataclass
class Collapse:
    """Tells when training on single-step attacks has stopped to protect against stronger ones (Wong et al., 2020).

    Accuracy under the stronger attack lies more than ``fall`` below its best, and under the single step it does not
    (where both fall, the network has merely got worse); or it lies more than ``gap`` below that under the single step,
    which also shows where the radius has grown since and no best is known.

    Args:
        fall: in accuracy.
        gap: between two accuracies.

    Reference:
        Wong, Rice and Kolter, Fast is better than free, ICLR 2020, arXiv:2001.03994, stop at a fall of 0.2 as well.

    Example:
        >>> rule = Collapse()
        >>> [rule.sees(0.6, 0.5), rule.sees(0.6, 0.4), rule.sees(0.6, 0.25)]
        [False, False, True]
    """

    fall: float = 0.2
    gap: float = 0.4
    single: float = 0.0  # best accuracy so far under the single step
    strong: float = 0.0  # and under the stronger attack

    def sees(self, single: float, strong: float, settled: bool = True) -> bool:
        """Whether these accuracies, the next ones of a training, show a collapse; if not, they are remembered.

        Args:
            single: accuracy under the attack of training.
            strong: accuracy under the stronger one.
            settled: the radius no longer grows, so accuracies compare with earlier ones.
        """
        if single - strong > self.gap:
            return True
        if not settled:
            return False
        if strong < self.strong - self.fall and single >= self.single - self.fall:
            return True
        self.single, self.strong = max(self.single, single), max(self.strong, strong)
        return False
