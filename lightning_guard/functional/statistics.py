"""What paired seeds and test examples can tell: intervals, tests, and a correction for many claims.

Two kinds of chance are kept apart. Another seed trains another model: intervals over seeds. Another test set holds
other examples: intervals over examples, which know nothing of the seeds.
"""

from collections.abc import Sequence
from math import ceil, isfinite, log2, sqrt
from typing import Literal

import numpy as np
from scipy import stats

Interval = tuple[float, float]
Verdict = Literal["better", "worse", "higher", "lower", "same", "equivalent", "inconclusive", "not measured"]

FEWEST_SEEDS = 6
"""Below this no verdict is given: a two-sided sign-flip test of five pairs cannot give a p-value below 0.0625."""

MOST_SEEDS = 1000
"""Where :func:`seeds_needed` stops counting."""

_EXACT = 16  # seeds up to which all sign patterns are tried
_DRAWN = 2**16  # sign patterns that are drawn beyond


def student_interval(values: Sequence[float], level: float = 0.95) -> Interval | None:
    r"""Interval of the mean of a sample, :math:`\bar d \pm t_{n-1} s / \sqrt n` (Student, 1908); it is over seeds.

    | values             | result                                        |
    |--------------------|-----------------------------------------------|
    | fewer than two     | None: one seed says nothing of others         |
    | all the same       | that value twice: no spread was seen          |

    Args:
        values: one a seed, in any unit.
        level: of confidence, in (0, 1).

    Example:
        >>> low, high = student_interval([0.01, 0.02, 0.03])
        >>> round(low, 4), round(high, 4)
        (-0.0048, 0.0448)
    """
    if len(values) < 2:
        return None
    sample = np.asarray(values, dtype=np.float64)
    reach = float(stats.t.ppf((1 + level) / 2, len(sample) - 1) * _sd(sample) / sqrt(len(sample)))
    return float(sample.mean()) - reach, float(sample.mean()) + reach


def bca_interval(
    values: Sequence[float], level: float = 0.95, replicates: int = 10_000, seed: int = 0
) -> Interval | None:
    """Bias-corrected and accelerated bootstrap interval of the mean of a sample (Efron, 1987).

    With few values it is too short: see docs/comparison.md for how often it holds the truth.

    Args:
        values: one a seed.
        level: of confidence, in (0, 1).
        replicates: samples that are drawn.
        seed: of the draws.

    | values             | result                               |
    |--------------------|--------------------------------------|
    | fewer than two     | None                                 |
    | all the same       | that value twice                     |

    Reference:
        Efron, Better Bootstrap Confidence Intervals, JASA 82, 1987.

    Example:
        >>> low, high = bca_interval([0.01, 0.02, 0.03, 0.02, 0.02, 0.07])
        >>> low > 0, high < 0.07
        (True, True)
    """
    if len(values) < 2:
        return None
    sample = np.asarray(values, dtype=np.float64)
    if not _sd(sample):
        return float(sample[0]), float(sample[0])
    found = stats.bootstrap(
        (sample,),
        np.mean,
        confidence_level=level,
        n_resamples=replicates,
        method="BCa",
        vectorized=True,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def student_p(values: Sequence[float]) -> float | None:
    """Two-sided p-value of Student's test that the mean is 0.

    | values                   | result                                  |
    |--------------------------|-----------------------------------------|
    | fewer than two           | None                                    |
    | all 0                    | 1                                       |
    | all the same, not 0      | 0: no spread was seen                   |

    Example:
        >>> round(student_p([0.01, 0.02, 0.03]), 3)
        0.074
    """
    if len(values) < 2:
        return None
    sample = np.asarray(values, dtype=np.float64)
    mean, sd = float(sample.mean()), _sd(sample)
    if not sd:
        return 0.0 if mean else 1.0
    return float(2 * stats.t.sf(abs(mean) / sd * sqrt(len(sample)), len(sample) - 1))


def sign_flip_p(values: Sequence[float], seed: int = 0) -> float | None:
    """Two-sided p-value of the test that flips signs: exact if the values are symmetric about 0, whatever their form.

    Differences of two arms that are alike are symmetric, since either could be called the first. All sign patterns
    are tried for up to 16 values, 65,536 drawn ones (and the one seen) beyond. At best it is ``2 / 2^n``.

    | values           | result |
    |------------------|--------|
    | none             | None   |
    | all 0            | 1      |

    Reference:
        Fisher, The Design of Experiments, 1935, section 21.

    Example:
        >>> sign_flip_p([0.01, 0.02, 0.03]), sign_flip_p([0.1, 0.2, 0.3, 0.1, 0.2, 0.4])
        (0.25, 0.03125)
    """
    n = len(values)
    if not n:
        return None
    sample = np.asarray(values, dtype=np.float64)
    if n <= _EXACT:
        patterns = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
    else:
        patterns = np.random.default_rng(seed).integers(2, size=(_DRAWN, n))
    sums = np.abs((2 * patterns - 1) @ sample)
    reached = int((sums >= abs(sample.sum()) - 1e-12 * np.abs(sample).sum()).sum())  # sums that only rounding parts
    return reached / len(sums) if n <= _EXACT else (reached + 1) / (_DRAWN + 1)


def mcnemar_p(first: int, second: int) -> float:
    r"""Two-sided mid-p value of McNemar's test: whether two models err equally often on the same examples.

    Args:
        first: examples that only the first model gets right.
        second: examples that only the second gets right.

    | case                      | result |
    |---------------------------|--------|
    | no example parts them     | 1      |

    Reference:
        Fagerland, Lydersen and Laake, The McNemar test for binary matched-pairs data, BMC Medical Research
        Methodology 13, 2013: the mid-p value keeps the level where the exact one is needlessly strict.

    Example:
        >>> round(mcnemar_p(1, 9), 4)
        0.0117
    """
    apart = first + second
    if not apart:
        return 1.0
    fewer = min(first, second)
    tail = stats.binom.cdf(fewer, apart, 0.5) - 0.5 * stats.binom.pmf(fewer, apart, 0.5)
    return float(min(1.0, 2 * tail))


def example_interval(differences: Sequence[float] | np.ndarray, level: float = 0.95) -> Interval | None:
    r"""Interval of a mean difference over test examples, adjusted as Bonett and Price do; it is over examples.

    Two examples are added, one that differs by 1 and one by -1, and the interval is that of the normal distribution.
    So it has a width where no example differs. For one pair of models it is theirs for paired proportions.

    Args:
        differences: of each example, in [-1, 1]: right minus right of two models, or the mean of it over seeds.
        level: of confidence, in (0, 1).

    | case             | result |
    |------------------|--------|
    | no example       | None   |

    Reference:
        Bonett and Price, Adjusted Wald confidence interval for a difference of binomial proportions based on paired
        data, Journal of Educational and Behavioral Statistics 37, 2012.

    Example:
        >>> low, high = example_interval([0.0] * 98)
        >>> round(low, 4), round(high, 4)
        (-0.0277, 0.0277)
    """
    if not len(differences):
        return None
    sample = np.concatenate([np.asarray(differences, dtype=np.float64), [1.0, -1.0]])
    middle, n = float(sample.mean()), len(sample)
    reach = float(stats.norm.ppf((1 + level) / 2)) * sqrt(float(sample.var()) / n)
    return max(-1.0, middle - reach), min(1.0, middle + reach)


def clopper_pearson(successes: int, trials: int, level: float = 0.95) -> Interval:
    """Exact interval of a proportion (Clopper and Pearson, 1934): never too short; all of [0, 1] without trials.

    Raises:
        ValueError: for counts that are none.

    Example:
        >>> low, high = clopper_pearson(0, 10)
        >>> low, round(high, 4)
        (0.0, 0.3085)
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes={successes} of trials={trials}; give counts from 0 to trials")
    if not trials:
        return 0.0, 1.0
    found = stats.binomtest(successes, trials).proportion_ci(level, method="exact")
    return float(found.low), float(found.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, so that any false claim at all has probability alpha (Holm, 1979).

    Example:
        >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = largest
    return corrected


def equivalence_p(values: Sequence[float], margin: float) -> float | None:
    """p-value of two one-sided tests that the mean lies within ``margin`` of 0 (Schuirmann, 1987).

    | values                       | result              |
    |------------------------------|---------------------|
    | fewer than two               | None                |
    | all the same, inside margin  | 0                   |
    | all the same, outside        | 1                   |

    Raises:
        ValueError: for a margin that is not above 0.

    Example:
        >>> round(equivalence_p([0.001, -0.001, 0.0, 0.002], margin=0.01), 4)
        0.0003
    """
    if not margin > 0:
        raise ValueError(f"margin={margin} holds no difference; give one above 0")
    if len(values) < 2:
        return None
    sample = np.asarray(values, dtype=np.float64)
    mean, sd = float(sample.mean()), _sd(sample)
    if not sd:
        return 0.0 if abs(mean) < margin else 1.0
    return float(stats.t.sf((margin - abs(mean)) / sd * sqrt(len(sample)), len(sample) - 1))


def judge(
    differences: Sequence[float], better: str | None, p: float | None, alpha: float = 0.05, equivalence: float = 1.0
) -> Verdict:
    """What paired differences over seeds show of one claim.

    A direction needs three things: six seeds, the given p-value (Student's, corrected for the number of claims) at
    most ``alpha``, and that of the sign-flip test, which needs no normal distribution, at most ``alpha``. So neither
    a lucky spread of few seeds nor a strange distribution makes a claim alone.

    Args:
        differences: one a seed.
        better: ``"higher"``, ``"lower"`` or None.
        p: corrected p-value of no difference.
        alpha: how often a false claim may be made.
        equivalence: p-value of a difference beyond the margin that was asked for, corrected; 1 if none was.

    | case                                    | result                    |
    |-----------------------------------------|---------------------------|
    | no differences                          | not measured              |
    | all 0, in two seeds or more             | same                      |
    | fewer than six seeds                    | inconclusive              |
    | a direction is shown                    | better or worse; higher or lower if ``better`` is None |
    | within the margin, by ``equivalence``   | equivalent                |
    | a direction and within the margin       | equivalent                |

    Example:
        >>> judge([0.1, 0.2, 0.1, 0.3, 0.2, 0.2], "higher", p=0.001), judge([0.1, 0.2, 0.1], "higher", p=0.001)
        ('better', 'inconclusive')
    """
    if not len(differences):
        return "not measured"
    if len(differences) > 1 and not any(differences):
        return "same"
    if len(differences) < FEWEST_SEEDS:
        return "inconclusive"
    if equivalence <= alpha:
        return "equivalent"
    flipped = sign_flip_p(differences)
    if p is None or p > alpha or flipped is None or flipped > alpha:
        return "inconclusive"
    up = sum(differences) > 0
    if better is None:
        return "higher" if up else "lower"
    return "better" if up == (better == "higher") else "worse"


def seeds_needed(differences: Sequence[float], claims: int = 1, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """How many seeds would show a difference, if mean and spread stay as they are.

    The smallest number with which Student's test at ``alpha / claims`` finds the observed mean with probability
    ``power`` (noncentral t), and at least as many as the sign-flip test needs. Mean and spread of a few seeds are
    rough, so the number is no more than an order of magnitude.

    Args:
        differences: one a seed.
        claims: among which this is one.
        alpha: how often a false claim may be made.
        power: how surely the difference is to be found.

    | case                              | result                              |
    |-----------------------------------|-------------------------------------|
    | fewer than two differences        | None: no spread is known            |
    | a mean of 0                       | None: no number would               |
    | more than 1000                    | None                                |
    | no spread                         | as many as the sign-flip test needs |

    Example:
        >>> seeds_needed([0.01, 0.03, -0.01])
        34
    """
    if len(differences) < 2:
        return None
    sample = np.asarray(differences, dtype=np.float64)
    mean, sd, fewest = abs(float(sample.mean())), _sd(sample), max(FEWEST_SEEDS, ceil(1 - log2(alpha)))
    if not mean or not sd:
        return fewest if mean else None

    def enough(n: int) -> bool:
        away = mean / sd * sqrt(n)
        critical = float(stats.t.ppf(1 - alpha / claims / 2, n - 1))
        found = float(stats.nct.sf(critical, n - 1, away))
        if not isfinite(found):  # far out, where the normal distribution says the same
            found = float(stats.norm.sf(critical - away))
        return found >= power

    low, high = fewest - 1, fewest
    while not enough(high):
        if high >= MOST_SEEDS:
            return None
        low, high = high, min(MOST_SEEDS, 2 * high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _sd(sample: np.ndarray) -> float:
    """0 where all values are the same, which the rounding of their mean would not give."""
    return float(sample.std(ddof=1)) if (sample != sample[0]).any() else 0.0
