"""The mathematics of the safeguards: plain torch, usable without Lightning, importing nothing of ours but itself."""

from lightning_guard.functional.attacks import ThreatModel, fgsm, n_fgsm, n_fgsm_threat, pgd, search
from lightning_guard.functional.fairness import (
    NOTIONS,
    RATE_NOTIONS,
    Notion,
    group_gap,
    positive_scores,
    rate_gaps,
    rate_sums,
)
from lightning_guard.functional.losses import example_losses
from lightning_guard.functional.masks import bit_mask, clear_, cubic_sparsity, magnitude_masks, pack_mask, unpack_mask
from lightning_guard.functional.poison import activation_clusters, area_under_margin, margins, spectral_scores, trimmed
from lightning_guard.functional.random import stream
from lightning_guard.functional.smoothing import GaussianNoise, certified_radius, clopper_pearson_lower
from lightning_guard.functional.squeezing import Squeeze, squeeze_inputs, squeezing, steps_through, unsqueeze

__all__ = [
    "NOTIONS",
    "RATE_NOTIONS",
    "GaussianNoise",
    "Notion",
    "Squeeze",
    "ThreatModel",
    "activation_clusters",
    "area_under_margin",
    "bit_mask",
    "certified_radius",
    "clear_",
    "clopper_pearson_lower",
    "cubic_sparsity",
    "example_losses",
    "fgsm",
    "group_gap",
    "magnitude_masks",
    "margins",
    "n_fgsm",
    "n_fgsm_threat",
    "pack_mask",
    "pgd",
    "positive_scores",
    "rate_gaps",
    "rate_sums",
    "search",
    "spectral_scores",
    "squeeze_inputs",
    "squeezing",
    "steps_through",
    "stream",
    "trimmed",
    "unpack_mask",
    "unsqueeze",
]
