"""What training may do for the sake of groups, a mode each; the guard places them."""

from lightning_guard.parity.adversary import Adversary
from lightning_guard.parity.base import Mode, Seen
from lightning_guard.parity.choice import Choice
from lightning_guard.parity.constraint import Constraint
from lightning_guard.parity.counterfactual import Counterfactual
from lightning_guard.parity.dependence import HSIC, MMD
from lightning_guard.parity.group_dro import GroupDRO
from lightning_guard.parity.judging import count, count_privately, measure
from lightning_guard.parity.penalty import Penalty
from lightning_guard.parity.reweigh import Reweigh

__all__ = [
    "HSIC",
    "MMD",
    "Adversary",
    "Choice",
    "Constraint",
    "Counterfactual",
    "GroupDRO",
    "Mode",
    "Penalty",
    "Reweigh",
    "Seen",
    "count",
    "count_privately",
    "measure",
]
