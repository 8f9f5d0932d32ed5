"""The slots of a recipe's `guards:` section: one optional, typed place a safeguard.

Slots, not a list, because lists of callbacks in two files silently replace each other while slots merge key by key.
"""

from importlib.metadata import entry_points

from lightning_guard.callbacks import (
    DPSGD,
    AdversarialTraining,
    ChannelPruning,
    FairnessRegularization,
    FeatureSqueezing,
    KnowledgeDistillation,
    LowRankFactorization,
    MagnitudePruning,
    PrivacyAudit,
    QuantizationAwareTraining,
    RandomizedSmoothing,
    SampleLedger,
    TrimmedLoss,
    WeightClustering,
)
from lightning_guard.guard import Guard

GROUP = "lightning_guard.guards"  # the entry points by which other packages add slots of their own


OURS: tuple[type[Guard], ...] = (
    AdversarialTraining,
    ChannelPruning,
    KnowledgeDistillation,
    DPSGD,
    FairnessRegularization,
    FeatureSqueezing,
    LowRankFactorization,
    MagnitudePruning,
    PrivacyAudit,
    QuantizationAwareTraining,
    RandomizedSmoothing,
    SampleLedger,
    TrimmedLoss,
    WeightClustering,
)
TAKEN = "batch"  # under `guards:` it says how a batch is read, for all of them


def slots() -> dict[str, type[Guard]]:
    """Every slot with the class that it takes: our own, then those of installed packages.

    Raises:
        TypeError: if an entry point is no guard, or its name is not the guard's or is taken.
    """
    found = {cls.name: cls for cls in OURS}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        cls = point.load()
        if not (isinstance(cls, type) and issubclass(cls, Guard)):
            raise TypeError(
                f"entry point {point.name} = {point.value} of group {GROUP} is no Guard; remove its package"
            )
        if cls.name != point.name or point.name == TAKEN or found.get(point.name, cls) is not cls:
            raise TypeError(
                f"entry point {point.name} = {point.value} of group {GROUP} must carry the name of its guard "
                f"({cls.name!r}), and no other guard may have it; rename it or remove its package"
            )
        found[point.name] = cls
    return found
