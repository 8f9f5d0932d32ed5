"""The mathematics of the safeguards: plain torch, usable without Lightning, importing nothing of ours but itself."""

from lightning_guard.functional.attacks import ThreatModel, fgsm, n_fgsm, n_fgsm_threat, pgd, search
from lightning_guard.functional.clusters import cluster_means, kmeans, linear_codebook, nearest
from lightning_guard.functional.distillation import distillation_losses, feature_losses, output_losses
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
from lightning_guard.functional.lowrank import factorized
from lightning_guard.functional.masks import (
    bit_mask,
    clear_,
    cubic_sparsity,
    floors,
    magnitude_masks,
    pack_mask,
    pattern_masks,
    regrown_masks,
    score_masks,
    unpack_mask,
)
from lightning_guard.functional.poison import activation_clusters, area_under_margin, margins, spectral_scores, trimmed
from lightning_guard.functional.quantization import fake_quantize, fake_quantized, lsq, weight_grid
from lightning_guard.functional.random import stream
from lightning_guard.functional.reshaping import apply_plan, reshape_like
from lightning_guard.functional.smallest import smallest
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
    "apply_plan",
    "area_under_margin",
    "bit_mask",
    "certified_radius",
    "clear_",
    "clopper_pearson_lower",
    "cluster_means",
    "cubic_sparsity",
    "distillation_losses",
    "example_losses",
    "factorized",
    "fake_quantize",
    "fake_quantized",
    "feature_losses",
    "fgsm",
    "floors",
    "group_gap",
    "kmeans",
    "linear_codebook",
    "lsq",
    "magnitude_masks",
    "margins",
    "n_fgsm",
    "n_fgsm_threat",
    "nearest",
    "output_losses",
    "pack_mask",
    "pattern_masks",
    "pgd",
    "positive_scores",
    "rate_gaps",
    "rate_sums",
    "regrown_masks",
    "reshape_like",
    "score_masks",
    "search",
    "smallest",
    "spectral_scores",
    "squeeze_inputs",
    "squeezing",
    "steps_through",
    "stream",
    "trimmed",
    "unpack_mask",
    "unsqueeze",
    "weight_grid",
]
