"""How much privacy noised releases cost."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

_NO_NOISE = 1e-6  # a smaller noise multiplier counts as none; its powers would overflow
_MOST_CELLS = 19  # of each half of the grid of losses, as a power of two: half a second
_MOST_SEGMENTS = 32  # in one convolution: a second

Vector = NDArray[np.float64]


class Segment(NamedTuple):
    """Steps that are alike: Gaussian releases on Poisson draws.

    Args:
        noise_multiplier: standard deviation of the noise over the L2 norm that one unit can contribute.
        sample_rate: probability with which each unit is drawn, independently; 1 takes everybody.
        steps: how many of them.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int


def epsilon(ledger: Sequence[Segment], delta: float) -> float:
    r"""Privacy spent by a composition of Poisson-subsampled Gaussian releases, one unit added or removed.

    The least of upper bounds. The tight one convolves the distributions of the privacy loss (PRV, Gopi et al.,
    2021) and lies 1 or 2 % above the truth; it is Opacus' accountant, rebuilt to take noise schedules in a second
    instead of a minute, and to take the worse of adding and removing. The loose ones are Rényi differential privacy
    (RDP, Mironov et al., 2019) and the cost without subsampling, for what the tight one cannot do.

    Args:
        ledger: the releases; their order does not matter, and each may depend on the results of those before it.
        delta: probability in (0, 1).

    Returns:
        Epsilon, in nats, never below the truth but for rounding.

    Raises:
        ValueError: if ``delta`` or a segment is no such number.

    | case                                              | result                                  |
    |---------------------------------------------------|-----------------------------------------|
    | no steps                                          | 0                                       |
    | a noise multiplier of 0 (below 1e-6)              | infinity                                |
    | every sample rate 1                               | exact, :func:`gaussian_epsilon`         |
    | ``delta`` below 1e-12, or below 1e-15 a step      | RDP: rounding would show in the convolution |
    | epsilon in the hundreds                           | RDP                                     |

    Reference:
        Gopi, Lee and Wutschitz, Numerical Composition of Differential Privacy, 2021, arXiv:2106.02848.
        Mironov, Talwar and Zhang, Rényi Differential Privacy of the Sampled Gaussian Mechanism, 2019,
        arXiv:1908.10530.

    Example:
        >>> round(epsilon([Segment(noise_multiplier=1.1, sample_rate=256 / 60000, steps=3510)], delta=1e-5), 2)
        1.14
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta} is no probability; give a number in (0, 1), well below 1 / units")
    steps: Counter[tuple[float, float]] = Counter()
    for noise, rate, count in ledger:
        if not (noise >= 0 and 0 < rate <= 1 and count >= 0):
            raise ValueError(
                f"{Segment(noise, rate, count)} is no release; give noise_multiplier >= 0, sample_rate in (0, 1] "
                "and steps >= 0"
            )
        steps[float(noise), float(rate)] += int(count)
    return _epsilon(tuple(sorted((*kind, count) for kind, count in steps.items() if count)), float(delta))


@lru_cache(4096)
def _epsilon(segments: tuple[tuple[float, float, int], ...], delta: float) -> float:
    whole = gaussian_epsilon((noise / math.sqrt(steps) for noise, _, steps in segments), delta)
    if whole == math.inf or all(rate == 1 for _, rate, _ in segments):
        return whole
    segments = _coarsened(segments)
    loose = min(_renyi_epsilon(segments, delta), whole)  # sampling can only help
    if loose <= 0:
        return 0.0
    tight = _convolved_epsilon(segments, delta, 0.01 * loose)
    if tight < loose / 2:  # that was 1 % of far too much
        tight = min(tight, _convolved_epsilon(segments, delta, 0.01 * tight))
    return min(tight, loose)


def _coarsened(segments: tuple[tuple[float, float, int], ...]) -> tuple[tuple[float, float, int], ...]:
    """A long noise schedule as at most so many levels a rate, each noise rounded down, which can only cost more."""
    if len(segments) <= _MOST_SEGMENTS:
        return segments
    least, most = segments[0][0], segments[-1][0]
    ratio = (most / least) ** (1 / _MOST_SEGMENTS)
    steps: Counter[tuple[float, float]] = Counter()
    for noise, rate, count in segments:
        level = math.floor(math.log(noise / least, ratio)) if noise > least else 0
        steps[min(noise, least * ratio**level), rate] += count
    return tuple((*kind, count) for kind, count in steps.items())


def gaussian_epsilon(noise_multipliers: Iterable[float], delta: float) -> float:
    r"""Privacy spent by Gaussian releases without subsampling, exact.

    Releases with noise :math:`\sigma_e` compose to one with :math:`\mu = \sqrt{\sum_e \sigma_e^{-2}}` (Dong et al.,
    2022), whose epsilon solves (Balle and Wang, 2018)

    .. math:: \delta = \Phi(\mu / 2 - \epsilon / \mu) - e^\epsilon\, \Phi(-\mu / 2 - \epsilon / \mu).

    This is the guarantee of shuffled batches: whatever the order, a unit takes part in one release an epoch, so one
    noise multiplier an epoch goes in. Neighbours are data sets in which one unit's contribution is replaced by zero;
    under adding or removing it the batches of the others would shift.

    Args:
        noise_multipliers: of each release that one unit takes part in.
        delta: probability in (0, 1).

    Returns:
        Epsilon, in nats; 0 without releases, infinity where one has a noise multiplier of 0 (below 1e-6).

    Reference:
        Dong, Roth and Su, Gaussian Differential Privacy, 2022, arXiv:1905.02383.
        Balle and Wang, Improving the Gaussian Mechanism for Differential Privacy, 2018, arXiv:1805.06530.

    Example:
        >>> round(gaussian_epsilon([1.1] * 15, delta=1e-5), 2)
        20.56
    """
    noises = list(noise_multipliers)
    if any(noise < _NO_NOISE for noise in noises):
        return math.inf
    mu = math.sqrt(math.fsum(noise**-2 for noise in noises))
    aim = math.log(delta)
    low, high = 0.0, mu * (mu / 2 + math.sqrt(-2 * aim))  # there the first term alone is below delta
    if mu == 0 or _gaussian_log_delta(0.0, mu) <= aim:
        return 0.0
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if _gaussian_log_delta(middle, mu) <= aim else (middle, high)
    return high


def _gaussian_log_delta(epsilon: float, mu: float) -> float:
    """The logarithm of the formula above, its exponentials taken out: they overflow, and cancel where delta is tiny."""
    top = mu / 2 - epsilon / mu
    near, far = torch.special.erfcx(torch.tensor([-top, mu - top], dtype=torch.float64) / math.sqrt(2)).tolist()
    if top > 0:  # near may be infinite, but nothing is tiny here
        return math.log((math.erfc(-top / math.sqrt(2)) - far * math.exp(-(top**2) / 2)) / 2)
    return math.log((near - far) / 2) - top**2 / 2 if near > far else -math.inf


# Whole orders have a finite sum, orders below 2 a closed bound; the series of the others converge slowly or never.
_WHOLE = np.array([*range(2, 33), *(int(2 ** (5 + i / 4)) for i in range(1, 13))])
_SMALL = np.linspace(1.02, 1.98, 49)
_ORDERS = np.concatenate([_SMALL, _WHOLE])
_TERMS = np.arange(_WHOLE[-1] + 1)
_LOG_FACTORIALS = np.array([math.lgamma(k + 1) for k in _TERMS])


@lru_cache(4096)
def _renyi(noise: float, rate: float) -> Vector:
    """Upper bounds of the Rényi divergence of one release, at each order.

    Whole orders: Mironov et al., 2019, section 3.3. Below 2, by (x + y)^a <= x^a + a x^(a-1) y + y^a.
    """
    if rate == 1:
        return _ORDERS / (2 * noise**2)
    taken, left = math.log(rate), math.log1p(-rate)
    rest = np.maximum(_WHOLE[:, None] - _TERMS, 0)
    terms = _LOG_FACTORIALS[_WHOLE][:, None] - _LOG_FACTORIALS[_TERMS] - _LOG_FACTORIALS[rest]
    terms = terms + _TERMS * taken + rest * left + _TERMS * (_TERMS - 1) / (2 * noise**2)
    whole = np.logaddexp.reduce(np.where(_WHOLE[:, None] >= _TERMS, terms, -np.inf), axis=1)
    small = np.logaddexp(
        (_SMALL - 1) * left + np.log1p((_SMALL - 1) * rate),  # (1-q)^a + a (1-q)^(a-1) q
        _SMALL * taken + _SMALL * (_SMALL - 1) / (2 * noise**2),
    )
    return np.concatenate([small, whole]) / (_ORDERS - 1)


def _renyi_epsilon(segments: Iterable[tuple[float, float, int]], delta: float) -> float:
    """Balle et al., Hypothesis Testing Interpretations and Rényi Differential Privacy, 2020, theorem 21."""
    spent = sum(steps * _renyi(noise, rate) for noise, rate, steps in segments)
    return float(np.min(spent + np.log1p(-1 / _ORDERS) - np.log(delta * _ORDERS) / (_ORDERS - 1)))


def _convolved_epsilon(segments: Sequence[tuple[float, float, int]], delta: float, error: float) -> float:
    """An upper bound at most about 2 ``error`` too high, or infinity where the method has no footing.

    The accountant of Gopi et al. with the constants of Opacus, which convolves segment after segment (44 s for the
    sixty of a noise schedule; here their spectra are multiplied) and looks at removal only (nobody has proved that
    adding is never the worse).
    """
    steps = sum(count for _, _, count in segments)
    delta_error = delta / 1000
    if max(steps, 1000) * 1e-18 > delta_error:  # measured: what rounding adds to delta
        return math.inf
    # Remark 5.6: hardly any loss lies beyond the reach, in one step or in all.
    reach = max(_renyi_epsilon([(noise, rate, 1)], delta_error / (8 * steps)) for noise, rate, _ in segments)
    reach = 3 + max(reach, _renyi_epsilon(segments, delta_error / 4), error)
    if reach > 700:  # exp(reach) must stay finite
        return math.inf
    spread = math.sqrt(steps * math.log(12 / delta_error) / 2)
    half = 2 ** min(math.ceil(math.log2(reach * spread / min(error, 0.5))), _MOST_CELLS)
    mesh = reach / half
    error = mesh * spread  # what this grid guarantees; the theory wants it below 1
    if error > 0.9:
        return math.inf

    logs, turns, shifts = np.zeros((2, half + 1)), np.zeros((2, half + 1)), np.zeros(2)
    for noise, rate, count in segments:
        masses, means = _losses(noise, rate, mesh, half)
        gaps = means - masses @ (mesh * np.arange(-half, half))
        if not np.all(np.abs(gaps) < mesh / 2):  # the trap of opacus#601: an integral gone wrong
            return math.inf
        spectra = np.fft.rfft(np.fft.ifftshift(masses, axes=1))
        with np.errstate(divide="ignore"):
            logs += count * np.log(np.abs(spectra))
        turns += count * np.angle(spectra)
        shifts += count * gaps
    removed, added = np.fft.fftshift(np.fft.irfft(np.exp(logs) * np.exp(1j * turns), 2 * half), axes=1)
    # Whole cells of a shift go around the circle, so that the window stays where the losses are.
    whole = np.rint(shifts / mesh).astype(int)
    rest = shifts - whole * mesh
    return error + max(
        _tail_epsilon(np.roll(removed, whole[0])[half:], mesh, rest[0], delta - delta_error),
        _tail_epsilon(np.roll(added, whole[1])[half::-1], mesh, -rest[1], delta - delta_error),
    )


def _losses(noise: float, rate: float, mesh: float, half: int) -> tuple[Vector, Vector]:
    r"""Distribution of one release's :math:`\ell(y) = \log(1 - q + q e^{y / \sigma})` with the unit and without it.

    The output over the noise, :math:`y`, is :math:`N(-a, 1)` without the unit and :math:`(1-q) N(-a, 1) + q N(a, 1)`
    with it, where :math:`a = 1 / 2 \sigma`.

    Returns:
        Masses in the cells around ``mesh * arange(-half, half)``, shape (2, 2 * half), and means, shape (2,).
    """
    far = 0.5 / noise
    output = np.linspace(-far - 9, far + 9, 20_001)
    with np.errstate(divide="ignore"):  # log 0 at rate 1
        loss = np.logaddexp(np.log1p(-rate), math.log(rate) + output / noise)
    chances = np.exp(-((output + np.array([[-far], [far]])) ** 2) / 2)
    chances[0] = rate * chances[0] + (1 - rate) * chances[1]
    chances[:, np.abs(loss) > half * mesh] = 0
    means = chances @ loss / chances.sum(1)  # the trapezoid rule is exact for bells, but for rounding

    first, last = np.clip(np.rint(loss[[0, -1]] / mesh), -half, half - 1).astype(int)  # cells outside are empty
    with np.errstate(divide="ignore"):  # log 0: no output has so small a loss
        output = noise * np.log(np.maximum(np.expm1(mesh * (np.arange(first, last + 2) - 0.5)) / rate + 1, 0))
    below = torch.erfc(torch.from_numpy(np.stack([far - output, -far - output]) / math.sqrt(2))).numpy()
    masses = np.zeros((2, 2 * half))
    masses[:, half + first : half + last + 1] = np.diff(below)
    masses[0] = rate * masses[0] + (1 - rate) * masses[1]
    return masses / masses.sum(1, keepdims=True), means


def _tail_epsilon(masses: Vector, mesh: float, rest: float, delta: float) -> float:
    """Epsilon at ``delta`` of a loss with these masses at 0, ``mesh``, 2 ``mesh``, ... plus ``rest``."""
    losses = mesh * np.arange(len(masses)) + rest
    above = masses[::-1].cumsum()[::-1]
    scaled = (masses * np.exp(-losses))[::-1].cumsum()[::-1]
    fits = above - np.exp(losses) * scaled <= delta
    if not fits.any():  # not a number
        return math.inf
    place = int(np.argmax(fits))
    return math.log((above[place] - delta) / scaled[place]) if place else 0.0


def noise_multiplier(target_epsilon: float, delta: float, ledger_of: Callable[[float], Sequence[Segment]]) -> float:
    """The smallest noise multiplier within a budget, to a thousandth and never below it.

    Args:
        target_epsilon: the budget, above 0.
        delta: probability in (0, 1).
        ledger_of: the releases of a noise multiplier; more noise must not cost more.

    Returns:
        A noise multiplier in [0.001, 100000] whose :func:`epsilon` is at most ``target_epsilon``.

    Raises:
        ValueError: if no noise is enough.

    Example:
        >>> sigma = noise_multiplier(2.0, 1e-5, lambda sigma: [Segment(sigma, 0.01, 1000)])
        >>> round(sigma, 2), round(epsilon([Segment(sigma, 0.01, 1000)], 1e-5), 2)
        (0.96, 2.0)
    """
    _check_target(target_epsilon)

    def spent(noise: float) -> float:
        return epsilon(ledger_of(noise), delta)

    low = high = 1.0
    least, most, stride = 1e-3, 1e5, 2.0
    costs = {high: spent(high)}
    while costs[high] > target_epsilon:
        if high >= most:
            raise ValueError(
                f"target_epsilon={target_epsilon} is out of reach: even a noise multiplier of {most:g} spends "
                f"{costs[high]:.3g} at delta={delta}; give a larger target_epsilon, or fewer or smaller draws"
            )
        low, high, stride = high, min(stride * high, most), stride**2
        costs[high] = spent(high)
    while low == high or costs[low] <= target_epsilon:
        if low <= least:
            return least
        low, high, stride = max(low / stride, least), low, stride**2
        costs[low] = spent(low)
    tries = 0
    while high > low * 1.001:
        guess = _crossing(low, high, costs[low], costs[high], target_epsilon, tries)
        guess = min(max(guess, low * 1.0005), high / 1.0005)  # a guess beside an end closes the gap at once
        costs[guess] = spent(guess)
        low, high = (low, guess) if costs[guess] <= target_epsilon else (guess, high)
        tries += 1
    return high


def affordable_steps(
    target_epsilon: float, delta: float, ledger_upto: Callable[[int], Sequence[Segment]], most: int
) -> int:
    """The largest number of steps within a budget: they fit, and one more does not.

    Args:
        target_epsilon: the budget, above 0.
        delta: probability in (0, 1).
        ledger_upto: the releases of so many steps; more steps must not cost less.
        most: the answer if all of them fit.

    Returns:
        A number in [0, ``most``].

    Example:
        >>> affordable_steps(2.0, 1e-5, lambda steps: [Segment(1.0, 0.01, steps)], most=10_000)
        1175
    """
    _check_target(target_epsilon)
    low, high, costs = 0, 0, {0: 0.0}
    while costs[high] <= target_epsilon:
        if high >= most:
            return most
        low, high = high, min(max(16 * high, 1), most)
        costs[high] = epsilon(ledger_upto(high), delta)
    tries = 0
    while high - low > 1:
        guess = round(_crossing(low, high, costs[low], costs[high], target_epsilon, tries))
        guess = min(max(guess, low + 1), high - 1)
        costs[guess] = epsilon(ledger_upto(guess), delta)
        low, high = (guess, high) if costs[guess] <= target_epsilon else (low, guess)
        tries += 1
    return low


def _check_target(target_epsilon: float) -> None:
    if not target_epsilon > 0:
        raise ValueError(f"target_epsilon={target_epsilon} is no budget; give a number above 0")


def _crossing(low: float, high: float, cost_low: float, cost_high: float, target: float, tries: int) -> float:
    """Where a cost between two places meets the target: epsilon is almost a power of noise and of steps."""
    share = 0.5
    # Every third try halves, for costs that jump.
    if tries % 3 < 2 and min(cost_low, cost_high) > 0 and max(cost_low, cost_high) < math.inf:
        share = math.log(target / cost_low) / math.log(cost_high / cost_low)
    return low * (high / low) ** share
