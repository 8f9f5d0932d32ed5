"""How differently a model treats groups, and what narrows the difference."""

from lightning_guard.functional.fairness.census import Census
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

__all__ = [
    "ABSOLUTE",
    "NOTIONS",
    "OF_NUMBERS",
    "RATE_NOTIONS",
    "Census",
    "Moments",
    "Multipliers",
    "Notion",
    "RateNotion",
    "deviations",
    "errors_of",
    "gaps_of",
    "group_gap",
    "moments",
    "positive_scores",
    "rate_gaps",
    "rate_sums",
]
