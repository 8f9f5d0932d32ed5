"""What training may do for the sake of groups, a mode each; the guard places them."""

from lightning_guard.parity.base import Mode, Seen
from lightning_guard.parity.choice import Choice
from lightning_guard.parity.constraint import Constraint
from lightning_guard.parity.judging import count, measure
from lightning_guard.parity.penalty import Penalty

__all__ = ["Choice", "Constraint", "Mode", "Penalty", "Seen", "count", "measure"]
