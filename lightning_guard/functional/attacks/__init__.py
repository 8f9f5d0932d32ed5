"""Threat models, and the attacks that stay within them."""

from lightning_guard.functional.attacks.apgd import apgd, apgd_pair
from lightning_guard.functional.attacks.fab import fab
from lightning_guard.functional.attacks.pgd import fgsm, n_fgsm, n_fgsm_threat, pgd
from lightning_guard.functional.attacks.search import search
from lightning_guard.functional.attacks.square import square
from lightning_guard.functional.attacks.threat import ThreatModel

__all__ = ["ThreatModel", "apgd", "apgd_pair", "fab", "fgsm", "n_fgsm", "n_fgsm_threat", "pgd", "search", "square"]
