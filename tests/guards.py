"""The table that puts every guard through the same tests. A guard of ours without a row fails `test_every_guard`."""

import math
from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Row:
    """The smallest form of a guard that acts on `tests.toys`, and its neutral form that must not."""

    on: Callable[[], Guard]
    off: Callable[[], Guard]
    watches: bool = False  # it acts by what it keeps, and must leave training as it is
    reshapes: bool = False  # the weights that it leaves have other shapes or names than the class has


GUARDS: dict[type[Guard], Row] = {
    AdversarialTraining: Row(
        on=lambda: AdversarialTraining(eps=0.1, steps=2, bounds=(0.0, 1.0)),
        off=lambda: AdversarialTraining(eps=0.0),
    ),
    ChannelPruning: Row(
        on=lambda: ChannelPruning(ratio=0.5, round_to=4),
        off=lambda: ChannelPruning(ratio=0.0),
        reshapes=True,
    ),
    DPSGD: Row(
        on=lambda: DPSGD(delta=1e-3, noise_multiplier=0.2, max_grad_norm=0.5, test_seed=5),
        off=lambda: DPSGD(delta=1e-3, target_epsilon=math.inf),
    ),
    FairnessRegularization: Row(
        on=lambda: FairnessRegularization(
            max_gap=0.01,
            min_support=1,
            margin=0.0,
            warmup=0,
            step_size=20.0,
            select=False,
            groups=[2],
            count_noise=0.2,
            rate_noise=0.6,
        ),
        off=lambda: FairnessRegularization(max_gap=math.inf),
    ),
    FeatureSqueezing: Row(
        on=lambda: FeatureSqueezing(bits=2),
        off=lambda: FeatureSqueezing(bits=None),
    ),
    KnowledgeDistillation: Row(
        on=lambda: KnowledgeDistillation(start=0.25),
        off=lambda: KnowledgeDistillation(alpha=0.0),
    ),
    LowRankFactorization: Row(
        on=lambda: LowRankFactorization(rank=2),
        off=lambda: LowRankFactorization(rank=1.0),
        reshapes=True,
    ),
    MagnitudePruning: Row(
        on=lambda: MagnitudePruning(sparsity=0.7, every=1, end=0.75),
        off=lambda: MagnitudePruning(sparsity=0.0),
    ),
    PrivacyAudit: Row(
        on=lambda: PrivacyAudit(canaries=32, seed=5),  # 16 of them in: five batches of 16 instead of four
        off=lambda: PrivacyAudit(canaries=0),
    ),
    QuantizationAwareTraining: Row(
        on=lambda: QuantizationAwareTraining(start=0.1, end=0.5, range_noise=0.25),
        off=lambda: QuantizationAwareTraining(bits=None),
    ),
    RandomizedSmoothing: Row(
        on=lambda: RandomizedSmoothing(sigma=0.1),
        off=lambda: RandomizedSmoothing(sigma=0.0),
    ),
    SampleLedger: Row(
        on=lambda: SampleLedger(),
        off=lambda: SampleLedger(every=0),
        watches=True,
    ),
    TrimmedLoss: Row(
        on=lambda: TrimmedLoss(share=0.25, warmup=2),
        off=lambda: TrimmedLoss(share=0.0),
    ),
    WeightClustering: Row(
        on=lambda: WeightClustering(clusters=4, start=0.25, end=0.75, every=2),
        off=lambda: WeightClustering(clusters=0),
    ),
}
