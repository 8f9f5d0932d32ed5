"""Threat models, and the attacks that stay within them."""

from lightning_guard.functional.attacks.pgd import fgsm, pgd
from lightning_guard.functional.attacks.threat import ThreatModel

__all__ = ["ThreatModel", "fgsm", "pgd"]
