"""Differential privacy: the plan, the draws, the book-keeping, the noise, and probes that try to refute them."""

from lightning_guard.functional.privacy.accounting import Segment, epsilon, gaussian_epsilon
from lightning_guard.functional.privacy.audit import AuditResult, audit, ceiling, contrast, epsilon_lower_bound, p_value
from lightning_guard.functional.privacy.book import Bookkeeper, Unbooked
from lightning_guard.functional.privacy.canaries import Mixed, Outliers, label, relabelled
from lightning_guard.functional.privacy.clipping import Clipping, adapted
from lightning_guard.functional.privacy.layers import correct_adam_, group_norms
from lightning_guard.functional.privacy.ledger import Ledger, released
from lightning_guard.functional.privacy.loaders import Joined, dealt, everyone, population, refilled, together
from lightning_guard.functional.privacy.mechanism import Mechanism
from lightning_guard.functional.privacy.noise import Noise
from lightning_guard.functional.privacy.plan import PrivacyPlan, noise_of_all
from lightning_guard.functional.privacy.probes import Findings, probe, take
from lightning_guard.functional.privacy.queries import Queries, contributions
from lightning_guard.functional.privacy.sampling import Deal, Draws, chunks_within
from lightning_guard.functional.privacy.sums import NoisySum
from lightning_guard.functional.privacy.trade_off import Claim, largest_rate, profile

__all__ = [
    "AuditResult",
    "Bookkeeper",
    "Claim",
    "Clipping",
    "Deal",
    "Draws",
    "Findings",
    "Joined",
    "Ledger",
    "Mechanism",
    "Mixed",
    "Noise",
    "NoisySum",
    "Outliers",
    "PrivacyPlan",
    "Queries",
    "Segment",
    "Unbooked",
    "adapted",
    "audit",
    "ceiling",
    "chunks_within",
    "contrast",
    "contributions",
    "correct_adam_",
    "dealt",
    "epsilon",
    "epsilon_lower_bound",
    "everyone",
    "gaussian_epsilon",
    "group_norms",
    "label",
    "largest_rate",
    "noise_of_all",
    "p_value",
    "population",
    "probe",
    "profile",
    "refilled",
    "relabelled",
    "released",
    "take",
    "together",
]
