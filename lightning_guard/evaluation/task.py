"""How well a model does what it is for."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_guard.evaluation.base import Evidence, Figure, wilson
from lightning_guard.evaluation.subject import Subject, predicted
from lightning_guard.functional import example_losses


class Task:
    """Measures accuracy, also of the worst class, cross-entropy, AUC and calibration, or squared error of a regression.

    Args:
        bins: number of equally wide bins of the confidence in the calibration error.

    | case                                | result                                                       |
    |-------------------------------------|--------------------------------------------------------------|
    | two classes, of one or two logits   | AUC as well                                                  |
    | more than two classes               | the accuracy of the worst class as well                      |
    | one class alone among the targets   | AUC is None                                                  |
    | floating targets, not just 0 and 1  | a regression: the mean squared error alone                   |
    | outputs that are not numbers        | they count as wrong, what needs them is None, a note says so |
    | targets of another kind             | no figures, and a note                                       |

    Raises:
        ValueError: if ``bins`` is less than 1.

    Example:
        >>> data = [(torch.tensor([2.0, -1.0]), torch.tensor([1, 0]))]
        >>> Task().evaluate(Subject(torch.nn.Identity(), data)).figures["task/accuracy"].value
        1.0
    """

    name: ClassVar[str] = "task"

    def __init__(self, bins: int = 15):
        if bins < 1:
            raise ValueError(f"bins={bins} hold no confidence; give at least 1")
        self.bins = bins

    def evaluate(self, subject: Subject) -> Evidence:
        """Figures over all examples of the loader."""
        logits, target = subject.outputs.logits.double(), subject.outputs.target
        if subject.kind == "unknown" or target is None:
            return Evidence(notes=[subject.problem])
        n = len(logits)
        broken = int(logits.isnan().reshape(n, -1).any(1).sum())
        evidence = Evidence(notes=[f"{broken} of {n} outputs are not numbers."] if broken else [])

        def add(key: str, value: Tensor, label: str, unit: str, better: Literal["higher", "lower"], about: str) -> None:
            number = float(value) if value.isfinite() else None
            evidence.figures[f"task/{key}"] = Figure(number, label, unit, better, about)

        if subject.kind == "regression":
            about = f"Mean over the outputs of {n} test examples, in squared units of the target."
            add(
                "mean_squared_error",
                (logits - target).square().mean(),
                "Mean squared error",
                "",
                "lower",
                about,
            )
            return evidence

        decision = predicted(logits)
        hits, losses = decision == target, example_losses(logits, target)
        evidence.tensors = {"task/decision": decision.to(torch.int32), "task/target": target.to(torch.int32)}
        columns = torch.stack([torch.zeros_like(logits), logits], 1) if logits.dim() == 1 else logits
        add("accuracy", hits.double().mean(), "Accuracy", "fraction", "higher", f"On {n} test examples.")
        evidence.intervals["task/accuracy"] = wilson(int(hits.sum()), n)
        if columns.shape[1] > 2:
            worst = torch.stack([hits[target == c].double().mean() for c in target.unique()]).min()
            about = "Of the class that is missed most often, which may be another one in each arm."
            add("worst_class", worst, "Accuracy, worst class", "fraction", "higher", about)
        add("cross_entropy", losses.mean(), "Cross-entropy", "nats", "lower", "Mean over the test examples.")
        if columns.shape[1] == 2:
            about = "How often an example of class 1 scores above one of class 0; ties count half."
            add("auc", auc(columns[:, 1] - columns[:, 0], target), "AUC", "ratio", "higher", about)
        about = f"|confidence - accuracy|, averaged over {self.bins} equally wide bins of the confidence."
        error = calibration_error(columns.softmax(1).amax(1), hits, self.bins)
        add("calibration_error", error, "Calibration error", "fraction", "lower", about)
        return evidence


def auc(score: Tensor, target: Tensor) -> Tensor:
    """Area under the ROC curve, exact: the rank statistic of Mann and Whitney, in float64.

    Args:
        score: ``(N,)``, of any scale; larger is more positive.
        target: ``(N,)`` of 0 and 1.

    Returns:
        A scalar in [0, 1]; NaN if either class is absent or a score is not a number.

    Example:
        >>> auc(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0, 0, 1, 1])).item()
        0.875
    """
    _, place, count = score.unique(return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2.0).double()[place]  # equal scores share their mean rank
    positive, ones, zeros = target == 1, (target == 1).sum(), (target == 0).sum()
    area = (rank[positive].sum() - ones * (ones + 1) / 2.0) / (ones.double() * zeros)
    return area if not score.isnan().any() else area * torch.nan


def calibration_error(confidence: Tensor, hits: Tensor, bins: int = 15) -> Tensor:
    r"""Expected calibration error, :math:`\sum_b \frac{n_b}{n} |\mathrm{acc}_b - \mathrm{conf}_b|`.

    Few examples a bin bias it upwards.

    Args:
        confidence: probability of the predicted class ``(N,)``, in [0, 1].
        hits: whether it was right ``(N,)``.
        bins: number of equally wide bins.

    Returns:
        A scalar in [0, 1]; NaN if a confidence is not a number.

    Reference:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017, arXiv:1706.04599.

    Example:
        >>> calibration_error(torch.tensor([0.75, 0.75]), torch.tensor([True, False])).item()
        0.25
    """
    place = (confidence.double() * bins).nan_to_num().long().clamp_max(bins - 1)
    excess = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, confidence.double() - hits.double())
    return excess.abs().sum() / len(confidence)
