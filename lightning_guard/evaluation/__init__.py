"""Evidence: what a finished model does, an evaluator an axis, whichever guards it was trained with.

Example:
    >>> import torch
    >>> data = [(torch.tensor([[2.0], [-1.0]]), torch.tensor([1, 0]))]
    >>> subject = Subject(torch.nn.Linear(1, 1), data)
    >>> evidence = Task().evaluate(subject) | Efficiency(latency=False).evaluate(subject)
    >>> evidence.figures["efficiency/parameters"].value
    2.0
"""

from lightning_guard.evaluation.base import Bars, Curve, Evaluator, Evidence, Figure
from lightning_guard.evaluation.certificate import Certificate
from lightning_guard.evaluation.data_bias import describe_groups
from lightning_guard.evaluation.drift import Drift
from lightning_guard.evaluation.efficiency import Efficiency
from lightning_guard.evaluation.ensemble import Ensemble
from lightning_guard.evaluation.explanation import Explanation
from lightning_guard.evaluation.fairness import Fairness
from lightning_guard.evaluation.group_table import GroupTable
from lightning_guard.evaluation.group_thresholds import GroupThresholds
from lightning_guard.evaluation.poison import PoisonAudit
from lightning_guard.evaluation.privacy import Privacy
from lightning_guard.evaluation.robustness import Robustness
from lightning_guard.evaluation.subject import Subject
from lightning_guard.evaluation.table import paired_change
from lightning_guard.evaluation.task import Task

EVALUATORS: dict[str, type[Evaluator]] = {
    cls.name: cls for cls in (Task, Privacy, Robustness, Certificate, Fairness, Explanation, Efficiency, Drift)
}
"""Every evaluator by its axis, in the order of display; an ``optional`` one is off unless it is asked for."""

__all__ = [
    "EVALUATORS",
    "Bars",
    "Certificate",
    "Curve",
    "Drift",
    "Efficiency",
    "Ensemble",
    "Evaluator",
    "Evidence",
    "Explanation",
    "Fairness",
    "Figure",
    "GroupTable",
    "GroupThresholds",
    "PoisonAudit",
    "Privacy",
    "Robustness",
    "Subject",
    "Task",
    "describe_groups",
    "paired_change",
]
