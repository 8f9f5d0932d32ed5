"""Noise in training, for a network that is to be smoothed."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_guard.functional import GaussianNoise, stream
from lightning_guard.guard import Batch, Guard, GuardConflict, Phase, Run, Step, Trait


class RandomizedSmoothing(Guard):
    r"""Trains on inputs with Gaussian noise, so that votes of noisy copies can be certified (Cohen et al., 2019).

    .. math:: g(x) = \arg\max_c \; P(f(x + \eta) = c), \qquad \eta \sim \mathcal{N}(0, \sigma^2 I)

    This is the training half. The network alone is not certified: what is, is the smoothed classifier :math:`g`, by
    the evaluator ``Certificate``, which takes ``sigma`` from here. Each example gets its own noise in every step.
    Beside ``AdversarialTraining`` the attack climbs the loss of the noisy input, SmoothAdv with one draw of noise
    (Salman et al., 2019), which certifies larger radii.
    Noisy inputs leave the bounds of images by design. A larger ``sigma`` certifies larger radii and costs accuracy.

    Args:
        sigma: standard deviation of the noise in input units before normalisation; 0 switches the guard off.
        std: what the inputs were divided by before the network, one number or one a channel.
        seed: of the noise; None takes the seed of the run.
        batch: how a batch is read, if the defaults do not fit.

    | case                               | result                                                  |
    |------------------------------------|---------------------------------------------------------|
    | ``sigma=0``                        | training is bit-identical to training without the guard |
    | inputs that are not floating point | refused on the first batch                              |
    | ``std`` that does not fit inputs   | refused on the first batch                              |

    Raises:
        ValueError: for values that describe no noise.
        GuardConflict: on the first batch, if the inputs can have none.

    Reference:
        Cohen, Rosenfeld and Kolter, Certified Adversarial Robustness via Randomized Smoothing, ICML 2019,
        arXiv:1902.02918. Salman et al., Provably Robust Deep Learning via Adversarially Trained Smoothed Classifiers,
        NeurIPS 2019, arXiv:1906.04584.

    Example:
        >>> import pytorch_lightning as pl
        >>> trainer = pl.Trainer(callbacks=[RandomizedSmoothing(sigma=0.25)], logger=False)
    """

    name: ClassVar[str] = "randomized_smoothing"
    phase: ClassVar[Phase] = Phase.BATCH
    traits: frozenset[Trait] | None = frozenset()

    def __init__(
        self,
        sigma: float = 0.25,
        std: float | Sequence[float] | None = None,
        seed: int | None = None,
        batch: Batch | None = None,
    ):
        self.noise = GaussianNoise(sigma, std)
        self.sigma, self.std, self.seed, self.batch = sigma, std, seed, batch
        self._seed = 0
        self._restored: int | None = None
        self._checked = False

    @property
    def off(self) -> bool:
        return self.sigma == 0

    def begin(self, run: Run) -> None:
        own = torch.initial_seed() if self.seed is None else self.seed
        self._seed, self._restored = own if self._restored is None else self._restored, None
        self._checked = False

    def on_batch(self, step: Step) -> Any:
        if self.off:
            return step.batch
        if step.clean is not None:
            step.clean = self.noisy(step.clean, step)
        return step.with_inputs(self.noisy(step.inputs, step))

    def noisy(self, x: Tensor, step: Step) -> Tensor:
        """The inputs with the noise of this step, the same at every call."""
        if self.off:
            return x
        if not self._checked:
            self._check(x)
            self._checked = True
        return self.noise.add(x, stream(self._seed, step.index, step.run.rank, device=x.device))

    def notes(self) -> list[str]:
        if self.off:
            return []
        return [
            f"The network was trained on inputs with Gaussian noise of sigma {self.sigma:.4g}. What can be certified "
            "is the vote of its noisy copies; a single pass through the network has no guarantee."
        ]

    def state(self) -> dict[str, Any]:
        return {"seed": self._seed}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._restored = state["seed"]

    def _check(self, x: Any) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = f"{x.dtype} tensor" if isinstance(x, Tensor) else type(x).__name__
            raise GuardConflict(
                f"{self.name}: the inputs are a {kind}, and Gaussian noise needs a floating-point tensor; "
                "say where it is with Batch(inputs=...)"
            )
        try:
            self.noise.check(x)
        except ValueError as error:
            raise GuardConflict(f"{self.name}: {error}") from None
