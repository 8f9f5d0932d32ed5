"""How far inputs may be moved before the vote of noisy copies can change."""

from collections.abc import Sequence
from copy import copy
from typing import ClassVar

import torch
from torch import Tensor

from lightning_guard.evaluation.base import Curve, Evidence, Figure, spread, wilson
from lightning_guard.evaluation.subject import Subject, column, predicted
from lightning_guard.functional import GaussianNoise, certified_radius, clopper_pearson_lower, stream


class Certificate:
    r"""Certifies the smoothed classifier: the class that most noisy copies of an input get (Cohen et al., 2019).

    For each example, the likeliest class among ``selection`` noisy copies is put to ``samples`` fresh ones. From
    its share there, a lower bound :math:`p` of its probability follows (Clopper and Pearson, 1934) that is wrong
    with probability at most ``alpha``. No attack within the Euclidean radius :math:`\sigma \Phi^{-1}(p)` can then
    change the smoothed class. Below 1/2 nothing is certified, and the example counts as abstained.

    The certificate is of the smoothed classifier, not of the network in a single pass, and of the Euclidean norm.
    It holds against every attack, so it is far below accuracy under a given one.

    Args:
        sigma: standard deviation of the noise in input units before normalisation; None takes that of
            :meth:`with_noise`.
        std: what the inputs were divided by before the network, one number or one a channel.
        radius: at which certified accuracy is the leading figure, in input units; None is ``sigma / 2``.
        curve: further radii, as multiples of ``radius``.
        samples: noisy copies an example that the bound is computed from. They limit what can be certified at all:
            1,000 copies at ``alpha=0.001`` no radius above 2.46 ``sigma``, 100,000 none above 3.81.
        selection: noisy copies that propose the class.
        alpha: probability that a certificate is wrong, for each example.
        examples: how many examples to certify, the first of the loader.
        batch_size: noisy copies in one pass through the network.
        seed: of the noise; the figures depend on it alone, not on how the loader cuts its batches.

    | case                                 | result                                            |
    |--------------------------------------|---------------------------------------------------|
    | ``sigma=None`` and no noise          | nothing, not even a note: few models are smoothed |
    | a regression, or no target           | no figures, and a note                            |
    | inputs that are no floating tensor   | no figures, and a note                            |
    | fewer than ``examples`` examples     | all of them                                       |
    | outputs that are not numbers         | votes for no class                                |
    | ``radius`` beyond what samples prove | 0, and a note that says so                        |

    Raises:
        ValueError: for values that certify nothing, naming the option.

    Reference:
        Cohen, Rosenfeld and Kolter, Certified Adversarial Robustness via Randomized Smoothing, ICML 2019,
        arXiv:1902.02918.

    Example:
        >>> import torch
        >>> data = [(torch.tensor([[2.0], [-0.1]]), torch.tensor([1, 0]))]
        >>> found = Certificate(sigma=0.5, samples=100).evaluate(Subject(torch.nn.Identity(), data))
        >>> found.figures["certificate/accuracy"].value, found.figures["certificate/smoothed_accuracy"].value
        (0.5, 1.0)
    """

    name: ClassVar[str] = "certificate"

    def __init__(
        self,
        sigma: float | None = None,
        std: float | Sequence[float] | None = None,
        radius: float | None = None,
        curve: Sequence[float] = (0.5, 1.0, 2.0, 3.0, 4.0),
        samples: int = 1000,
        selection: int = 100,
        alpha: float = 0.001,
        examples: int = 200,
        batch_size: int = 500,
        seed: int = 0,
    ):
        if sigma == 0:
            raise ValueError("sigma=0 smooths nothing; give a positive number, or None to take it from a guard")
        GaussianNoise(1.0 if sigma is None else sigma, std)  # refuses what describes no noise
        for option, value in (
            ("samples", samples),
            ("selection", selection),
            ("examples", examples),
            ("batch_size", batch_size),
        ):
            if value < 1:
                raise ValueError(f"{option}={value} certifies nothing; give at least 1")
        if not 0 < alpha < 1:
            raise ValueError(f"alpha={alpha} is no probability of being wrong; give a number in (0, 1), e.g. 0.001")
        if radius is not None and not 0 < radius < float("inf"):
            raise ValueError(f"radius={radius} is no radius; give a positive number in input units, or None")
        if not all(0 < multiple < float("inf") for multiple in curve):
            raise ValueError(f"curve={curve} must hold positive multiples of radius; 0 is there anyway")
        self.sigma, self.std, self.radius, self.curve = sigma, std, radius, tuple(curve)
        self.samples, self.selection, self.alpha = samples, selection, alpha
        self.examples, self.batch_size, self.seed = examples, batch_size, seed

    def with_noise(self, noise: GaussianNoise) -> "Certificate":
        """The same evaluation under this noise, unless ``sigma`` was stated or that of the noise is 0."""
        if self.sigma is not None or noise.sigma == 0:
            return self
        other = copy(self)
        other.sigma, other.std = noise.sigma, noise.std
        return other

    def evaluate(self, subject: Subject) -> Evidence:
        """Figures on the first examples of the loader, and a curve over the radius."""
        if self.sigma is None:
            return Evidence()
        if subject.kind not in ("binary", "multiclass"):
            return Evidence(notes=[f"Certified accuracy needs classes. {subject.problem}".strip()])
        noise = GaussianNoise(self.sigma, self.std)
        found: list[tuple[int, int, int, int]] = []  # proposed class, its votes, class with most votes, right class
        with subject.still():
            for step in subject.batches():
                x, y = step.inputs, column(step.target).long()
                if not isinstance(x, Tensor) or not x.is_floating_point():
                    return Evidence(notes=["Certified accuracy needs inputs that are one floating-point tensor."])
                for row, target in zip(x, y.tolist(), strict=True):
                    if len(found) < self.examples:
                        found.append((*self._votes(subject, row, noise, len(found)), target))
                if len(found) == self.examples:
                    break
        return self._evidence(self.sigma, torch.tensor(found))

    def _votes(self, subject: Subject, x: Tensor, noise: GaussianNoise, place: int) -> tuple[int, int, int]:
        """The proposed class (-1 for none), its votes among the fresh copies, and the class with most of these."""
        draws = stream(self.seed, place, device=x.device)

        def tally(copies: int) -> Tensor:
            classes = []
            for begun in range(0, copies, self.batch_size):
                count = min(self.batch_size, copies - begun)
                classes.append(predicted(subject.forward(noise.add(x.expand(count, *x.shape), draws))))
            return (torch.cat(classes).cpu() + 1).bincount(minlength=2)  # -1 is a logit that is not a number

        proposed = int(tally(self.selection).argmax())
        votes = tally(self.samples)
        return proposed - 1, int(votes[proposed]) if proposed < len(votes) else 0, int(votes.argmax()) - 1

    def _evidence(self, sigma: float, found: Tensor) -> Evidence:
        proposed, votes, voted, y = found.T
        n, ceiling = len(found), float(self._radii(torch.tensor([self.samples]), sigma))
        radii = torch.where(proposed >= 0, self._radii(votes, sigma), 0)
        right = torch.where(proposed == y, radii, 0)
        lead = sigma / 2 if self.radius is None else self.radius
        points = sorted({multiple * lead for multiple in (1.0, *self.curve)})
        # Strictly: on the sphere itself the two likeliest classes may tie.
        standing = {point: int((right > point).sum()) for point in (0.0, *points)}
        smoothed, abstained = int((voted == y).sum()), int((radii == 0).sum())
        certified = wilson(standing[lead], n)
        about = (
            f"Right, and certified against every attack within L2 radius {lead:.4g}: the class that most copies get "
            f"under Gaussian noise of sigma {sigma:.4g}, by {self.samples} copies of each of the first {n} test "
            f"examples; wrong with probability at most {self.alpha:.4g} an example. Of the vote, not of the network."
        )
        notes = [
            f"Certified is the class that most noisy copies get (sigma {sigma:.4g}), by {self.samples} passes an "
            f"example. A single pass through the network has no certificate, nor has another norm than L2. "
            f"95% interval of certified accuracy, from {n} examples: {spread(certified)}."
        ]
        if lead >= ceiling:
            notes.append(
                f"{self.samples} copies at alpha {self.alpha:.4g} certify no radius above {ceiling:.4g}, so that "
                f"certified accuracy at {lead:.4g} is 0 for any network; take more samples or a smaller radius."
            )
        return Evidence(
            {
                "certificate/accuracy": Figure(standing[lead] / n, "Certified accuracy", "fraction", "higher", about),
                "certificate/smoothed_accuracy": Figure(
                    smoothed / n,
                    "Accuracy of the vote",
                    "fraction",
                    "higher",
                    f"Without an attack: the class that most of {self.samples} noisy copies get, on the same examples.",
                ),
                "certificate/abstention": Figure(
                    abstained / n,
                    "Abstention",
                    "fraction",
                    "lower",
                    "Examples of which no class is certain to get half of the noisy copies; they count as not "
                    "certified.",
                ),
            },
            curves={
                "certificate/accuracy": Curve(
                    list(standing),
                    [count / n for count in standing.values()],
                    "Certified accuracy",
                    "L2 radius (input units)",
                    "Accuracy",
                    f"{about} No radius above {ceiling:.4g} can be certified by so many copies.",
                    y_unit="fraction",
                )
            },
            notes=notes,
            intervals={"certificate/accuracy": certified, "certificate/smoothed_accuracy": wilson(smoothed, n)},
        )

    def _radii(self, votes: Tensor, sigma: float) -> Tensor:
        return certified_radius(clopper_pearson_lower(votes, self.samples, self.alpha), sigma)
