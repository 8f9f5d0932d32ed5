"""Which promises survive together: the rules as data, and the judgement of a run by them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from lightning_guard.guard import Guard, Run, Trait, callbacks_of


class Verdict(StrEnum):
    """What becomes of two promises when they meet."""

    SOUND = "sound"
    SOUND_IF = "sound if"
    REFUSED = "refused"


@dataclass(frozen=True)
class Rule:
    """One row of the composition table.

    Args:
        first: a guard's name or a trait.
        second: another guard's name or trait, or a class name of a Lightning callback.
        verdict: what becomes of their promises together.
        reason: why, in one sentence.
        remedy: what to do instead, or the condition of ``SOUND_IF``.
        source: where this is known from.
    """

    first: str
    second: str
    verdict: Verdict
    reason: str
    remedy: str = ""
    source: str = ""


RULES: tuple[Rule, ...] = (
    Rule(
        Trait.BOUNDS_EXAMPLES,
        Trait.COUPLES_EXAMPLES,
        Verdict.REFUSED,
        "one example then changes what others contribute, so clipping each example no longer bounds its influence",
        "use a form whose loss is a sum over examples, or train without the privacy guarantee",
        "measured: one record moved the clipped sum by 76 with C = 1; RaCO-DP, arXiv:2505.22703",
    ),
    Rule(
        Trait.BOUNDS_EXAMPLES,
        Trait.REMEMBERS_DATA,
        Verdict.REFUSED,
        "statistics of private data leave the run without noise",
        "give fixed or public values instead of observed ones",
        "Tramer and Boneh, ICLR 2021, arXiv:2011.11660, account for their BatchNorm statistics",
    ),
    Rule(
        Trait.BOUNDS_EXAMPLES,
        Trait.QUERIES_DATA,
        Verdict.SOUND,
        "what is remembered of the data are sums with noise of their own, paid from the same budget",
        "clipping bounds the pull of the constraint too: it may take a larger step_size",
        "by accounting them with the gradient; RaCO-DP, arXiv:2505.22703; tests/callbacks/test_fairness_private.py",
    ),
    Rule(
        "adversarial_training",
        "dp_sgd",
        Verdict.SOUND,
        "each example is attacked by its own gradient alone, in passes that book nothing, and clipped once",
        "an attack costs forward passes and no privacy, so take larger batches before more steps",
        "measured: the probe of the first step finds no coupling",
    ),
    Rule(
        "dp_sgd",
        "magnitude_pruning",
        Verdict.SOUND,
        "masks are computed from weights that are private already, which costs nothing",
        "clip what is left: gradients of pruned weights still take part of the norm",
        "Adamczewski and Park, arXiv:2303.04612",
    ),
    Rule(
        "adversarial_training",
        "feature_squeezing",
        Verdict.SOUND,
        "the attack climbs through the squeezing with a gradient in place of that of rounding, which is zero",
        "judge the model by attacks that do the same: squeezing alone is no defence",
        "Athalye, Carlini and Wagner, ICML 2018, arXiv:1802.00420",
    ),
    Rule(
        "adversarial_training",
        "randomized_smoothing",
        Verdict.REFUSED,
        "noise on top of an attacked input takes it out of the threat model, and it is no longer the worst there",
        "train with one of them; an attack on the smoothed classifier is another method",
        "Salman et al., NeurIPS 2019, arXiv:1906.04584",
    ),
    Rule(
        "adversarial_training",
        "trimmed_loss",
        Verdict.SOUND,
        "rows are dropped by their clean loss before the attack, which then costs only the rows that are kept",
        "a class that is hard to learn loses more rows: watch the accuracy of each class",
        "by the order of the phases; tests/test_every_guard.py",
    ),
    Rule(
        "dp_sgd",
        "feature_squeezing",
        Verdict.SOUND,
        "squeezing is a fixed function of each example by itself",
        "state bounds that are public, not read off the data",
        "tests/test_every_guard.py",
    ),
    Rule(
        "dp_sgd",
        "randomized_smoothing",
        Verdict.SOUND,
        "each example has noise of its own before its gradient is clipped",
        "this noise buys no privacy: the accountant counts that of DP-SGD alone",
        "tests/test_every_guard.py",
    ),
    Rule(
        "feature_squeezing",
        "randomized_smoothing",
        Verdict.SOUND,
        "the certificate holds for any network, so also for one that squeezes its inputs",
        "certify the model with its squeezing on",
        "Cohen, Rosenfeld and Kolter, ICML 2019, arXiv:1902.02918",
    ),
    Rule(
        "adversarial_training",
        "fairness",
        Verdict.SOUND,
        "the attack climbs the task loss alone, and rates are read from the logits that the step trains on",
        "gaps on clean and on attacked inputs differ: look at both",
        "Xu et al., ICML 2021, arXiv:2010.06121",
    ),
    Rule(
        "adversarial_training",
        "magnitude_pruning",
        Verdict.SOUND,
        "masks are a function of the weights, and the attack sees the masked model",
        "keep the attack on while weights are removed",
        "Sehwag et al. (HYDRA), NeurIPS 2020, arXiv:2002.10509",
    ),
    Rule(
        "dp_sgd",
        "privacy_audit",
        Verdict.SOUND,
        "canaries are among the rows before draws are planned, so they are drawn, clipped and noised as any row",
        "the audited model is for auditing: train the one to use without canaries",
        "Steinke et al., NeurIPS 2023, arXiv:2305.08846",
    ),
    Rule(
        "fairness",
        "magnitude_pruning",
        Verdict.SOUND,
        "weights are chosen after pruning has ended; a plain fine-tuning of a pruned model undoes parity",
        "keep the bound on to the end of pruning",
        "measured on Adult: gap 0.119 with plain and 0.042 with guarded fine-tuning",
    ),
    Rule(
        "magnitude_pruning",
        "weight_clustering",
        Verdict.SOUND_IF,
        "masks act before the sharing in every step, and zero is one of the shared values, so what is pruned stays so",
        "let pruning end before clustering does; what is pruned later than that forms the layer's clusters anew",
        "tests/callbacks/test_weight_clustering.py",
    ),
    Rule(
        "dp_sgd",
        "weight_clustering",
        Verdict.SOUND,
        "clusters are computed from weights that are private already, which costs nothing",
        "few values make a model compressible, not more private",
        "by post-processing; tests/callbacks/test_weight_clustering.py",
    ),
    Rule(
        "adversarial_training",
        "quantization",
        Verdict.SOUND,
        "the attack climbs through the rounding with the gradient of the identity, and its passes are not observed",
        "judge the file that ships as well: it is another function than the 32-bit module",
        "tests/callbacks/test_quantization.py",
    ),
    Rule(
        "dp_sgd",
        "quantization",
        Verdict.SOUND_IF,
        "rounding weights is a function of weights that are private already; observed ranges and learned steps are not",
        "give activation_bits=None, or public ranges",
        "tests/callbacks/test_quantization.py",
    ),
    Rule(
        "magnitude_pruning",
        "quantization",
        Verdict.SOUND,
        "masks act on the unrounded weights, and a symmetric grid has zero as a point, so what is pruned stays zero",
        "let pruning end before the ranges of activations are final",
        "tests/callbacks/test_quantization.py",
    ),
    Rule(
        "quantization",
        "weight_clustering",
        Verdict.REFUSED,
        "the grid has a step for each channel, so values that a layer shares part again when they are rounded to it",
        "use one of them: a grid for whole-number arithmetic, clusters for a compressible file",
        "by the definition of both",
    ),
    Rule(
        "fairness",
        "trimmed_loss",
        Verdict.SOUND_IF,
        "rows with a high loss may be wrong, or rare: a small group loses more of them",
        "watch the share of each group that is dropped, and the gap on all rows",
        "by the definition of both losses; no measurement",
    ),
    Rule(
        "privacy_audit",
        "trimmed_loss",
        Verdict.SOUND_IF,
        "mislabelled canaries have a high loss, so they are dropped and the audit hardly sees them",
        "audit with canaries of kind noise, or without trimming",
        "by the definition of both; no measurement",
    ),
    Rule(
        "sample_ledger",
        "trimmed_loss",
        Verdict.SOUND,
        "the ledger passes over all rows by itself, so those that are dropped are followed too",
        "name suspects by a first run, and train without them",
        "tests/test_every_guard.py",
    ),
    Rule(
        "channel_pruning",
        "distillation",
        Verdict.SOUND,
        "the dense copy is made before channels go, also where both begin at the same step",
        "give both the same start, or a dense checkpoint as teacher",
        "tests/callbacks/test_distillation.py",
    ),
    Rule(
        "distillation",
        "low_rank",
        Verdict.SOUND,
        "the dense copy is made before layers are split, also where both begin at the same step",
        "give both the same start, or a dense checkpoint as teacher",
        "tests/callbacks/test_distillation.py",
    ),
    Rule(
        "channel_pruning",
        "low_rank",
        Verdict.SOUND_IF,
        "channels go first, and what is left is split where that still saves weights",
        "begin both before training, from a dense checkpoint; one of them in the middle of training is refused",
        "tests/callbacks/test_channel_pruning.py",
    ),
    Rule(
        "channel_pruning",
        "magnitude_pruning",
        Verdict.SOUND_IF,
        "channels go first, and masks are of the weights that are left",
        "take channels out before training, from a dense checkpoint; in the middle of it that is refused",
        "tests/callbacks/test_channel_pruning.py",
    ),
    Rule(
        "adversarial_training",
        "distillation",
        Verdict.SOUND,
        "the teacher is asked about the attacked inputs that the student trains on",
        "take a teacher that was trained against the attack: what it says of attacked inputs is imitated as well",
        "Goldblum et al., AAAI 2020, arXiv:1905.09747",
    ),
    Rule(
        "distillation",
        "dp_sgd",
        Verdict.SOUND_IF,
        "a copy of the private model is private already; a teacher of one's own may hold private rows",
        "say public=True of a teacher that has seen public data only; any other is refused",
        "Papernot et al., ICLR 2017, arXiv:1610.05755, for private rows in teachers",
    ),
    Rule(
        "distillation",
        "fairness",
        Verdict.SOUND_IF,
        "the bound holds for the student's own rates, and the teacher pulls towards its gaps",
        "keep the bound on while the teacher teaches, and look at the gaps of both",
        "by the definition of both losses; tests/test_every_guard.py",
    ),
    Rule(
        "rewrite",
        "StochasticWeightAveraging",
        Verdict.REFUSED,
        "it copies the model before the guard rewrites it, so the average would be of another model",
        "remove it, or average with WeightAveraging after training",
        "pytorch-lightning 2.6, callbacks/stochastic_weight_avg.py",
    ),
)


def judge(run: Run) -> Iterator[str]:
    """Every refused pair among the guards and callbacks of a run, with reason and remedy."""
    for first, second, rule in findings(run.guards):
        if rule.verdict is Verdict.REFUSED:
            yield f"{first.name} and {second.name}: {rule.reason}; {rule.remedy}"
    for callback in callbacks_of(run.trainer):
        for rule in RULES:
            if rule.first == "rewrite" and rule.second == type(callback).__name__:
                for guard in run.guards:
                    if guard.overrides("rewrite"):
                        yield f"{guard.name} and {rule.second}: {rule.reason}; {rule.remedy}"


def findings(guards: Iterable[Guard]) -> Iterator[tuple[Guard, Guard, Rule]]:
    """The rules that speak about each pair of guards; a trait that is not declared is taken for the worst."""
    ordered = sorted((guard for guard in guards if not guard.off), key=lambda guard: guard.name)
    for i, first in enumerate(ordered):
        for second in ordered[i + 1 :]:
            for rule in RULES:
                if _is(first, rule.first) and _is(second, rule.second):
                    yield first, second, rule
                elif _is(second, rule.first) and _is(first, rule.second):
                    yield second, first, rule


def _is(guard: Guard, what: str) -> bool:
    if guard.traits is None and what in (Trait.COUPLES_EXAMPLES, Trait.REMEMBERS_DATA):
        return True
    return guard.name == what or what in (guard.traits or ())
