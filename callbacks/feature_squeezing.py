"""Feature squeezing as a guard."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, ClassVar

import pytorch_lightning as pl
from torch import Tensor, nn

from lightning_guard.functional import Squeeze, squeeze_inputs, squeezing, steps_through, unsqueeze
from lightning_guard.guard import Batch, Guard, GuardConflict, Phase, Run, Step, Trait


class FeatureSqueezing(Guard):
    r"""Squeezes the network's inputs, in training and in use, and never hides its gradient (Xu et al., 2018).

    Values are rounded to :math:`2^b` levels, and images are smoothed by a median, wherever the network is called.
    Small changes of an input then often make no difference, and the attacker's larger ones still do: this is no
    defence by itself. Seven of nine defences that Athalye et al. (2018) studied hid their gradients, and fell, one of
    them in part. Here rounding has the gradient of the identity, so that attacks by gradients see through.

    The released network goes on squeezing, as do copies and pickles of it. A network built anew, e.g. by
    ``load_from_checkpoint``, needs the guard in its Trainer, or
    :func:`~lightning_guard.functional.squeezing.squeeze_inputs`. ``unsqueeze`` takes it off.

    Args:
        bits: values are rounded to :math:`2^b` levels of ``bounds``; None leaves them.
        window: side of the window of the median in pixels; 1 leaves images. Without ``bits`` it switches the guard off.
        bounds: lowest and highest valid input before normalisation.
        mean: subtracted from inputs before the network, one number or one a channel.
        std: divided by before the network, one number or one a channel.
        batch: how a batch is read, if the defaults do not fit; its ``logits`` names the submodule whose inputs are
            squeezed.

    | case                                        | result                                                  |
    |---------------------------------------------|---------------------------------------------------------|
    | ``bits=None`` and ``window=1``              | training is bit-identical to training without the guard |
    | inputs outside ``bounds`` or not floating   | refused on the first batch                              |
    | a step that calls ``self.net(x)`` or ``self.forward(x)`` | refused on the first batch: nothing would be squeezed |
    | ``guard_forward`` that goes around it       | refused on the first batch                              |
    | training fails                              | the network is as it was                                |
    | a second training with other options        | the new ones replace the old                            |

    Raises:
        ValueError: for values that describe no squeezing.
        GuardConflict: on the first batch, if the promise cannot be kept.

    Reference:
        Xu, Evans and Qi, Feature Squeezing, NDSS 2018, arXiv:1704.01155. Gradients: Athalye, Carlini and Wagner,
        ICML 2018, arXiv:1802.00420.

    Example:
        >>> import pytorch_lightning as pl
        >>> trainer = pl.Trainer(callbacks=[FeatureSqueezing(bits=4)], logger=False)
    """

    name: ClassVar[str] = "feature_squeezing"
    phase: ClassVar[Phase] = Phase.BATCH
    traits: frozenset[Trait] | None = frozenset()

    def __init__(
        self,
        bits: int | None = 4,
        window: int = 1,
        bounds: tuple[float, float] = (0.0, 1.0),
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        batch: Batch | None = None,
    ):
        self.squeeze = Squeeze(bits, window, bounds, mean, std)
        self.batch = batch
        self._read: Batch | None = None  # how a training reads its batches
        self._bounded = self._called = self._finished = False

    def options(self) -> dict[str, Any]:
        return {**asdict(self.squeeze), **super().options()}

    def prepare(self, run: Run) -> None:
        self._read, self._bounded, self._called, self._finished = run.batch, False, False, False
        module, where = run.module, run.batch.logits or ""

        def put_back(before: Squeeze | None) -> None:
            if not self._finished and self.squeeze.acts:
                source = module.get_submodule(where)
                unsqueeze(source)
                if before is not None:
                    squeeze_inputs(source, before)

        known = where in dict(module.named_modules())  # configure_model may be yet to make it
        run.undo.callback(put_back, squeezing(module.get_submodule(where)) if known else None)

    def rewrite(self, module: pl.LightningModule) -> None:
        source = self._source(module)
        if self.squeeze.acts and squeezing(source) != self.squeeze:
            squeeze_inputs(source, self.squeeze)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._bounded or not self.squeeze.acts or self._read is None:
            return
        self._bounded = True
        try:  # the loader's batch: noise that another guard adds may leave the bounds
            x = self._read.read(batch, "inputs")
            if not isinstance(x, Tensor):
                raise ValueError(
                    f"the inputs are a {type(x).__name__}, and squeezing needs a floating-point tensor; say where it "
                    "is with Batch(inputs=...)"
                )
            self.squeeze.check(x)
        except (KeyError, ValueError) as error:
            raise GuardConflict(f"{self.name}: {error.args[0]}") from None

    @contextmanager
    def during(self, step: Step) -> Iterator[None]:
        if self._called or not self.squeeze.acts:
            yield
            return
        self._called = True
        own = getattr(type(step.module), "guard_forward", None)
        if own is not None and own.__module__ != "lightning_guard.mixins":
            with self._passing(step.module, "GuardMixin.guard_forward"), step.probe():
                step.forward(step.inputs[:1])
        with self._passing(step.module, "training_step"):
            yield

    @contextmanager
    def _passing(self, module: pl.LightningModule, who: str) -> Iterator[None]:
        """Refuses what goes around the squeezed module."""
        calls, source = 0, self._source(module)

        def count(*_: Any) -> None:
            nonlocal calls
            calls += not steps_through(source)

        handle = source.register_forward_pre_hook(count)
        try:
            yield
        finally:
            handle.remove()
        if not calls:
            where = self._read.logits if self._read else None
            called = f"self.{where}(x)" if where else "self(x)"
            raise GuardConflict(
                f"{self.name}: {who} never calls {called}, so its inputs are not squeezed; call it (and not its "
                "forward), or name the submodule that takes the inputs and gives the logits with Batch(logits=...)"
            )

    def release(self, module: pl.LightningModule) -> None:
        self._finished = True

    def notes(self) -> list[str]:
        if not self.squeeze.acts:
            return []
        return [
            "Squeezed inputs are no defence by themselves. Attacks by gradients see through the squeezing here; "
            "accuracy under an attack that does not would flatter."
        ]

    def state(self) -> dict[str, Any]:
        return {key: value if value is None else str(value) for key, value in asdict(self.squeeze).items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        was, now = dict(state), self.state()
        if was != now:
            raise GuardConflict(
                f"{self.name}: the checkpoint was trained with {was}, and the guard now says {now}; resume with the "
                "same options"
            )

    def _source(self, module: pl.LightningModule) -> nn.Module:
        # Without a training, in validation, test and prediction, nobody has told how the run reads its batches.
        batch = self._read or self.batch or getattr(module, "guard_batch", None) or Batch()
        return module.get_submodule(batch.logits or "")
