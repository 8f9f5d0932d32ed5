"""The safeguards, one module each; `slots` types them for recipes."""

if __name__ != "lightning_guard.callbacks":  # a second copy of every class would not be the same class
    raise ImportError("callbacks/ is part of lightning_guard; write `import lightning_guard.callbacks`")

from lightning_guard.callbacks.adversarial_training import AdversarialTraining
from lightning_guard.callbacks.channel_pruning import ChannelPruning
from lightning_guard.callbacks.distillation import KnowledgeDistillation
from lightning_guard.callbacks.dp_sgd import DPSGD
from lightning_guard.callbacks.fairness import FairnessRegularization
from lightning_guard.callbacks.feature_squeezing import FeatureSqueezing
from lightning_guard.callbacks.low_rank import LowRankFactorization
from lightning_guard.callbacks.magnitude_pruning import MagnitudePruning
from lightning_guard.callbacks.privacy_audit import PrivacyAudit
from lightning_guard.callbacks.quantization import QuantizationAwareTraining
from lightning_guard.callbacks.randomized_smoothing import RandomizedSmoothing
from lightning_guard.callbacks.sample_ledger import SampleLedger
from lightning_guard.callbacks.trimmed_loss import TrimmedLoss
from lightning_guard.callbacks.weight_clustering import WeightClustering

__all__ = [
    "DPSGD",
    "AdversarialTraining",
    "ChannelPruning",
    "FairnessRegularization",
    "FeatureSqueezing",
    "KnowledgeDistillation",
    "LowRankFactorization",
    "MagnitudePruning",
    "PrivacyAudit",
    "QuantizationAwareTraining",
    "RandomizedSmoothing",
    "SampleLedger",
    "TrimmedLoss",
    "WeightClustering",
]
