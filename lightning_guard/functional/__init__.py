"""The mathematics of the safeguards: plain torch, usable without Lightning, importing nothing of ours but itself."""

from lightning_guard.functional.attacks import ThreatModel, fgsm, pgd
from lightning_guard.functional.losses import example_losses
from lightning_guard.functional.masks import bit_mask, clear_, cubic_sparsity, magnitude_masks, pack_mask, unpack_mask
from lightning_guard.functional.random import stream
from lightning_guard.functional.rates import NOTIONS, Notion, group_gap, positive_scores, rate_gaps, rate_sums

__all__ = [
    "NOTIONS",
    "Notion",
    "ThreatModel",
    "bit_mask",
    "clear_",
    "cubic_sparsity",
    "example_losses",
    "fgsm",
    "group_gap",
    "magnitude_masks",
    "pack_mask",
    "pgd",
    "positive_scores",
    "rate_gaps",
    "rate_sums",
    "stream",
    "unpack_mask",
]
