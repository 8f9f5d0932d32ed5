"""How differently a model treats groups, and what narrows the difference."""

from lightning_guard.functional.fairness.census import Census
from lightning_guard.functional.fairness.dependence import hsic, median_bandwidth, mmd2
from lightning_guard.functional.fairness.group_dro import group_weights
from lightning_guard.functional.fairness.histogram import OF_RATES, census_of, histogram, joint, largest, table_of
from lightning_guard.functional.fairness.moments import (
    ABSOLUTE,
    NOTIONS,
    OF_NUMBERS,
    Moments,
    Notion,
    deviations,
    errors_of,
    gaps_of,
    moments,
)
from lightning_guard.functional.fairness.multipliers import Multipliers
from lightning_guard.functional.fairness.rates import (
    RATE_NOTIONS,
    RateNotion,
    group_gap,
    positive_scores,
    rate_gaps,
    rate_sums,
)
from lightning_guard.functional.fairness.reversal import reverse_gradient

__all__ = [
    "ABSOLUTE",
    "NOTIONS",
    "OF_NUMBERS",
    "OF_RATES",
    "RATE_NOTIONS",
    "Census",
    "Moments",
    "Multipliers",
    "Notion",
    "RateNotion",
    "census_of",
    "deviations",
    "errors_of",
    "gaps_of",
    "group_gap",
    "group_weights",
    "histogram",
    "hsic",
    "joint",
    "largest",
    "median_bandwidth",
    "mmd2",
    "moments",
    "positive_scores",
    "rate_gaps",
    "rate_sums",
    "reverse_gradient",
    "table_of",
]
