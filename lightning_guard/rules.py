"""The table of composition: what becomes of two promises that meet, as data."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from lightning_guard.guard import Guard, Phase, Trait

ANY = "any guard"
ASKS_ONCE = "asks_once"  # a guard one of whose queries counts all examples before training


class Verdict(StrEnum):
    """What becomes of two promises when they meet."""

    SOUND = "sound"
    SOUND_IF = "sound if"
    REFUSED = "refused"


@dataclass(frozen=True)
class Setting:
    """Values of an option that a row speaks of.

    Args:
        option: of the guard, or another attribute of it.
        values: that the row is about; without ``among``, all others.
        among: see there.

    | case                            | result                                    |
    |---------------------------------|-------------------------------------------|
    | the guard has no such attribute | the setting holds: it is taken for the worst |
    """

    option: str
    values: tuple[Any, ...]
    among: bool = True

    def holds(self, guard: Guard) -> bool:
        """Whether this guard has it so."""
        if not hasattr(guard, self.option):
            return True
        value = getattr(guard, self.option)
        same = any(value is one or (isinstance(value, str | int | float) and value == one) for one in self.values)
        return same is self.among

    @property
    def told(self) -> bool:
        """Whether a user can set it."""
        return self.option not in ("phase", "name")

    def __str__(self) -> str:
        values = " or ".join(one.name.lower() if isinstance(one, Phase) else str(one) for one in self.values)
        return f"{self.option} {'is' if self.among else 'is not'} {values}"


def having(option: str, *values: Any) -> Setting:
    """The option is one of these."""
    return Setting(option, values)


def beyond(option: str, *values: Any) -> Setting:
    """The option is none of these."""
    return Setting(option, values, among=False)


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    Args:
        first: a guard's name, a trait, a place that a guard acts at (``rewrite``, ``on_batch``, ``on_loss``,
            ``on_weights``), ``asks_once`` or ``any guard``.
        second: another of these, or the class name of a Lightning callback.
        verdict: what becomes of their promises together.
        reason: why, in one sentence.
        remedy: what to do instead, or the condition of ``SOUND_IF``.
        source: where this is known from.
        first_has: the row is about these settings of the first alone, all of them at once.
        second_has: likewise of the second.
    """

    first: str
    second: str
    verdict: Verdict
    reason: str
    remedy: str = ""
    source: str = ""
    first_has: tuple[Setting, ...] = ()
    second_has: tuple[Setting, ...] = ()

    @property
    def together(self) -> str:
        """Both sides with their settings, e.g. ``bounds_examples + fairness (groups is None)``."""
        both = (self.first, self.first_has), (self.second, self.second_has)
        return " + ".join(name + (f" ({', '.join(map(str, has))})" if has else "") for name, has in both)


def rows() -> Iterator[dict[str, str]]:
    """The whole table as it is printed: ``together``, ``verdict``, ``why``, ``then`` and ``source`` of each row."""
    for rule in RULES:
        yield {
            "together": rule.together,
            "verdict": rule.verdict.value,
            "why": rule.reason,
            "then": rule.remedy,
            "source": rule.source,
        }


RULES: tuple[Rule, ...] = (
    Rule(
        Trait.BOUNDS_EXAMPLES,
        Trait.COUPLES_EXAMPLES,
        Verdict.REFUSED,
        "one example then changes what others contribute, so clipping each example no longer bounds its influence",
        "use a form whose loss is a sum over examples, or train without the privacy guarantee",
        "tests/test_refusals.py: one row moved the clipped sum by more than 5 C; RaCO-DP, arXiv:2505.22703",
    ),
    Rule(
        Trait.BOUNDS_EXAMPLES,
        Trait.REMEMBERS_DATA,
        Verdict.REFUSED,
        "statistics of private data leave the run without noise",
        "give fixed or public values instead of observed ones",
        "tests/test_refusals.py: one margin tells its row's label; Tramer and Boneh, arXiv:2011.11660, pay for theirs",
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
        Trait.BOUNDS_EXAMPLES,
        "fairness",
        Verdict.REFUSED,
        "which groups there are tells who is in the data, which are private here",
        "give groups=[...], the number of values of each attribute, e.g. groups=[2]",
        "tests/test_refusals.py: one row more, one group more",
        second_has=(having("mode", "constraint", "reweigh", "group_dro"), having("groups", None)),
    ),
    Rule(
        Trait.BOUNDS_EXAMPLES,
        "fairness",
        Verdict.REFUSED,
        "the notion compares values without a bound, which no noise hides",
        "beside private training give demographic_parity, equalized_odds or equal_opportunity",
        "tests/test_refusals.py: one row moved a group's mean loss by any amount",
        second_has=(
            having("mode", "constraint"),
            having("notion", "bounded_group_loss", "calibration", "mean_parity", "quantile_parity"),
        ),
    ),
    Rule(
        "dp_sgd",
        ASKS_ONCE,
        Verdict.REFUSED,
        "a count of all rows takes each once, and a person may have any number of them",
        "leave users out, or the guard that counts",
        "tests/test_refusals.py: a person of 8 rows moved a count by 8",
        first_has=(beyond("users", None),),
    ),
    Rule(
        Trait.BOUNDS_EXAMPLES,
        "adversarial_training",
        Verdict.REFUSED,
        "replays carry what they learnt of one example's gradient to the rows of the next batch, without noise",
        "train with method='pgd'",
        "tests/test_refusals.py: one row moved another's input",
        second_has=(having("method", "free"),),
    ),
    Rule(
        Trait.BOUNDS_EXAMPLES,
        "adversarial_training",
        Verdict.REFUSED,
        "the weights are moved by a gradient of the whole batch, so one example changes what others contribute",
        "train with awp=0",
        "tests/test_refusals.py: one row moved the clipped sum by 2.3 C",
        second_has=(beyond("awp", 0),),
    ),
    Rule(
        Trait.BOUNDS_EXAMPLES,
        "adversarial_training",
        Verdict.REFUSED,
        "the probe of the first steps cannot pass an attacked embedding, so nothing shows that examples stay apart",
        "attack inputs, with embedding=None",
        "tests/test_refusals.py: refused on the first step even where nobody checks before",
        second_has=(beyond("embedding", None),),
    ),
    Rule(
        Trait.BOUNDS_EXAMPLES,
        "adversarial_training",
        Verdict.REFUSED,
        "whether single steps still protect is seen on training rows, without noise, and decides about the weights",
        "train with method='pgd', or with collapse='ignore'",
        "tests/test_refusals.py: one row changed what was seen",
        second_has=(beyond("method", "pgd"), beyond("collapse", "ignore")),
    ),
    Rule(
        "adversarial_training",
        "on_weights",
        Verdict.REFUSED,
        "a collapse puts earlier weights back, without what the other has done to them since",
        "use method='pgd' or collapse='ignore'",
        "tests/test_refusals.py: pruned weights came back",
        first_has=(beyond("method", "pgd"), beyond("collapse", "ignore")),
    ),
    Rule(
        "adversarial_training",
        "dp_sgd",
        Verdict.SOUND,
        "each example is attacked by its own gradient alone, in passes that book nothing, and clipped once, with the "
        "second pass of trades, mart and mixed in one norm",
        "an attack costs forward passes and no privacy, so take larger batches before more steps",
        "tests/test_private_forms.py: one example moves the clipped sum by at most 2 C",
    ),
    Rule(
        "dp_sgd",
        "magnitude_pruning",
        Verdict.SOUND,
        "masks are computed from weights and gradients that are private already, which costs nothing, and pruned "
        "weights use none of the norm that is clipped",
        "regrow needs the gradients of pruned weights, so with it they use norm as well",
        "Adamczewski and Park, arXiv:2303.04612; tests/test_private_forms.py",
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
        Verdict.SOUND,
        "the attack climbs the loss of the noisy input, so that what is trained on is the worst beneath that noise",
        "one draw of noise stands for the smoothed classifier; certify it with norm='l2' in training",
        "Salman et al., NeurIPS 2019, arXiv:1906.04584; tests/callbacks/test_randomized_smoothing.py",
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
        "rounding weights is a function of weights that are private already, and ranges of inputs are noisy counts of "
        "each draw, paid from the same budget",
        "scheme='lsq' learns steps from raw gradients and is refused; with public ranges nothing is counted",
        "tests/test_private_forms.py",
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
        "tests/test_refusals.py: 7 values where 4 were promised",
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
        "give a checkpoint that DPSGD trained on the same data, whose cost is then counted too, or say public=True of "
        "a teacher that has seen public data only; any other is refused",
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
        "dp_sgd",
        "privacy_audit",
        Verdict.REFUSED,
        "users=... protects people, and canaries are nobody's rows",
        "audit the same training without users",
        "tests/test_refusals.py: canaries are nobody's rows",
        first_has=(beyond("users", None),),
    ),
    *(
        Rule(
            reshaper,
            ANY,
            Verdict.REFUSED,
            "shapes change in the middle of training, and the other holds what belongs to each weight from the start",
            "give start=0 and the checkpoint of a dense training",
            "tests/test_refusals.py: a mask of the old shape",
            first_has=(beyond("start", 0),),
            second_has=(
                having("phase", Phase.REWRITE, Phase.GRADIENTS, Phase.WEIGHTS),
                beyond("name", "sample_ledger"),
            ),
        )
        for reshaper in ("channel_pruning", "low_rank")
    ),
    Rule(
        "on_batch",
        Trait.POST_PROCESSING,
        Verdict.SOUND,
        "one changes the batch, the other computes from the weights alone",
        "",
        "tests/test_composition.py: what each promises is there after training",
    ),
    Rule(
        "on_loss",
        Trait.POST_PROCESSING,
        Verdict.SOUND,
        "one changes the loss of the network as it is in the step, the other computes from the weights alone",
        "keep the loss on until the weights are final",
        "tests/test_composition.py: what each promises is there after training",
    ),
    Rule(
        "sample_ledger",
        ANY,
        Verdict.SOUND,
        "the ledger looks on: training beside it is bit-identical to training without it",
        "margins are those of the network as the other guard trains it",
        "tests/test_every_guard.py",
    ),
    Rule(
        "privacy_audit",
        ANY,
        Verdict.SOUND,
        "canaries are rows among the others, and what is bounded from below is the leakage of the training as it is",
        "the audited model is for auditing: train the one to use without canaries",
        "Steinke et al., NeurIPS 2023, arXiv:2305.08846",
    ),
    Rule(
        "fairness",
        "privacy_audit",
        Verdict.SOUND_IF,
        "canaries have the group of the rows they are made of, so they take part in the rates",
        "keep them few beside the rows of the smallest group",
        "by the definition of both; no measurement",
    ),
    Rule(
        "dp_sgd",
        "fairness",
        Verdict.SOUND_IF,
        "counts and rates have noise of their own, paid from the same budget, and each loss is clipped by itself",
        "give groups=[...], and a margin for the noise",
        "RaCO-DP, arXiv:2505.22703; tests/callbacks/test_fairness_private.py",
    ),
    Rule(
        "channel_pruning",
        "dp_sgd",
        Verdict.SOUND_IF,
        "channels are ranked by weights that are public or private already, before the first step",
        "give start=0; a dense checkpoint must be public, or its own epsilon counts too",
        "by post-processing; tests/test_composition.py",
    ),
    Rule(
        "dp_sgd",
        "low_rank",
        Verdict.SOUND_IF,
        "layers are split by weights that are public or private already, before the first step",
        "give start=0; a dense checkpoint must be public, or its own epsilon counts too",
        "by post-processing; tests/test_composition.py",
    ),
    Rule(
        "adversarial_training",
        "channel_pruning",
        Verdict.SOUND,
        "the attack climbs the network with the channels that are left",
        "keep the attack on after channels have gone: a smaller network has to learn it again",
        "tests/test_composition.py",
    ),
    Rule(
        "adversarial_training",
        "low_rank",
        Verdict.SOUND,
        "the attack climbs the network with its split layers",
        "keep the attack on after layers were split",
        "tests/test_composition.py",
    ),
    Rule(
        "adversarial_training",
        "weight_clustering",
        Verdict.SOUND,
        "the attack climbs the network with the shared values of the step",
        "judge the model with its shared values, which this is",
        "tests/test_composition.py",
    ),
    Rule(
        "channel_pruning",
        "quantization",
        Verdict.SOUND_IF,
        "channels go before training, and the grid is of the channels that are left",
        "give channel_pruning start=0",
        "tests/test_composition.py",
    ),
    Rule(
        "channel_pruning",
        "weight_clustering",
        Verdict.SOUND_IF,
        "channels go before training, and clusters are of the weights that are left",
        "give channel_pruning start=0",
        "tests/test_composition.py",
    ),
    Rule(
        "low_rank",
        "quantization",
        Verdict.SOUND_IF,
        "layers are split before training, and both thin layers are rounded",
        "give low_rank start=0; two roundings in a row cost more than one",
        "tests/test_composition.py",
    ),
    Rule(
        "low_rank",
        "magnitude_pruning",
        Verdict.SOUND_IF,
        "layers are split before training, and masks are of both thin layers",
        "give low_rank start=0; sparsity is of the weights that are left",
        "tests/test_composition.py",
    ),
    Rule(
        "low_rank",
        "weight_clustering",
        Verdict.SOUND_IF,
        "layers are split before training, and both thin layers share values",
        "give low_rank start=0",
        "tests/test_composition.py",
    ),
    Rule(
        "channel_pruning",
        "fairness",
        Verdict.SOUND_IF,
        "the bound is on the network with the channels that are left",
        "take channels out before training or early: the bound needs time after it",
        "tests/test_composition.py",
    ),
    Rule(
        "fairness",
        "low_rank",
        Verdict.SOUND_IF,
        "the bound is on the network with its split layers",
        "split layers before training or early: the bound needs time after it",
        "tests/test_composition.py",
    ),
    Rule(
        "fairness",
        "quantization",
        Verdict.SOUND,
        "rates are those of the rounded network, and weights are chosen once rounding is final",
        "keep the bound on to the end; the gap of the int8 file is judged by export and compare",
        "tests/test_composition.py",
    ),
    Rule(
        "fairness",
        "weight_clustering",
        Verdict.SOUND,
        "rates are those of shared values, and weights are chosen once clusters are final",
        "keep the bound on to the end",
        "tests/test_composition.py",
    ),
    Rule(
        "fairness",
        "feature_squeezing",
        Verdict.SOUND,
        "rates are those of the network that squeezes its inputs, in training and in use",
        "",
        "tests/test_composition.py",
    ),
    Rule(
        "fairness",
        "randomized_smoothing",
        Verdict.SOUND_IF,
        "rates are read off noisy inputs, which is what the smoothed classifier sees",
        "measure the gap of the smoothed classifier too, by its votes",
        "by the definition of both; no measurement",
    ),
    Rule(
        "channel_pruning",
        "feature_squeezing",
        Verdict.SOUND,
        "squeezing is of the inputs, and no channel of theirs goes",
        "",
        "tests/test_composition.py",
    ),
    Rule(
        "feature_squeezing",
        "low_rank",
        Verdict.SOUND,
        "squeezing is of the inputs, and layers are split behind it",
        "",
        "tests/test_composition.py",
    ),
    Rule(
        "feature_squeezing",
        "magnitude_pruning",
        Verdict.SOUND,
        "squeezing is of the inputs, masks are of the weights",
        "",
        "tests/test_composition.py",
    ),
    Rule(
        "feature_squeezing",
        "quantization",
        Verdict.SOUND,
        "inputs are squeezed first, and the range of the first layer is of squeezed inputs",
        "export the network with its squeezing on",
        "tests/test_composition.py",
    ),
    Rule(
        "feature_squeezing",
        "trimmed_loss",
        Verdict.SOUND,
        "the loss that rows are dropped by is that of squeezed inputs, as in training",
        "",
        "tests/test_composition.py",
    ),
    Rule(
        "feature_squeezing",
        "weight_clustering",
        Verdict.SOUND,
        "squeezing is of the inputs, shared values are of the weights",
        "",
        "tests/test_composition.py",
    ),
    Rule(
        "distillation",
        "feature_squeezing",
        Verdict.SOUND_IF,
        "a dense copy squeezes too, so teacher and student are asked about the same inputs",
        "with a teacher of your own, give one that was trained on such inputs",
        "by the definition of both; no measurement",
    ),
    Rule(
        "distillation",
        "magnitude_pruning",
        Verdict.SOUND,
        "the dense copy is made before masks, and the masked student imitates it",
        "give both the same start, or a dense checkpoint as teacher",
        "tests/test_composition.py",
    ),
    Rule(
        "distillation",
        "quantization",
        Verdict.SOUND,
        "the dense copy is not rounded, and the rounded student imitates it",
        "let the teacher begin before rounding is final",
        "tests/test_composition.py",
    ),
    Rule(
        "distillation",
        "weight_clustering",
        Verdict.SOUND,
        "the dense copy shares no values, and the student that does imitates it",
        "let the teacher begin before clusters are final",
        "tests/test_composition.py",
    ),
    Rule(
        "distillation",
        "randomized_smoothing",
        Verdict.SOUND_IF,
        "the teacher is asked about the noisy inputs that the student trains on",
        "take a teacher that was trained on such noise",
        "by the definition of both; no measurement",
    ),
    Rule(
        "distillation",
        "trimmed_loss",
        Verdict.SOUND,
        "rows are dropped by their loss before the teacher is asked, so both losses are of the kept ones",
        "",
        "tests/test_composition.py",
    ),
    Rule(
        "quantization",
        "randomized_smoothing",
        Verdict.SOUND,
        "ranges are observed on noisy inputs, and the certificate holds for any network",
        "certify the model that ships, rounding and all",
        "tests/test_composition.py",
    ),
    Rule(
        "quantization",
        "trimmed_loss",
        Verdict.SOUND,
        "ranges are observed on the rows that are kept, and the pass that ranks rows is not observed",
        "clean rows beyond the range are clipped: look at the accuracy of the file on all rows",
        "tests/test_composition.py",
    ),
    Rule(
        "randomized_smoothing",
        "trimmed_loss",
        Verdict.SOUND,
        "rows are dropped by their clean loss before the noise",
        "",
        "tests/test_composition.py",
    ),
    Rule(
        "dp_sgd",
        "StochasticWeightAveraging",
        Verdict.SOUND_IF,
        "an average of weights that are private already costs nothing, and its learning rate follows the epoch alone",
        "have no BatchNorm, frozen or not, whose statistics it would take anew, without noise; it averages the weights "
        "at the beginning of epochs, so the last epoch is paid for and in no average: WeightAveraging has every step",
        "by post-processing; tests/test_private_forms.py: it is the average of the weights that epochs began with",
    ),
    Rule(
        "dp_sgd",
        "WeightAveraging",
        Verdict.SOUND,
        "an average of weights that are private already costs nothing",
        "a longer average hides more of the noise",
        "by post-processing; tests/test_private_forms.py; De et al., 2022, arXiv:2204.13650, average so",
    ),
    Rule(
        "rewrite",
        "StochasticWeightAveraging",
        Verdict.REFUSED,
        "it copies the model before the guard rewrites it, so the average would be of another model",
        "remove it, or average with WeightAveraging after training",
        "tests/test_refusals.py; pytorch-lightning 2.6, callbacks/stochastic_weight_avg.py",
    ),
)
