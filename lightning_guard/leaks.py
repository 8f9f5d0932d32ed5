"""What leaves a run beside the weights, which a promise about the weights does not cover."""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from torch import Tensor, nn

from lightning_guard.guard import Run, callbacks_of
from lightning_guard.undo import swap


class Leaks:
    """Looks where else raw data go in a run whose weights are private.

    Args:
        run: the run; its module's ``log`` is watched until it ends.
        own: prefixes of the metrics that guards log themselves, and answer for.
        withhold: log nothing of ``training_step``.
    """

    def __init__(self, run: Run, own: tuple[str, ...], withhold: bool = False):
        self.run, self.own, self.withhold = run, own, withhold
        self.logged: dict[str, None] = {}  # what training_step logged, in order
        swap(run.undo, run.module, "log", self._watching)

    def _watching(self, old: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(old)
        def log(name: str, *args: Any, **kwargs: Any) -> None:
            if self.run.trainer.training and not name.startswith(self.own):
                self.logged[name] = None
                if self.withhold:
                    return
            old(name, *args, **kwargs)

        return log

    @property
    def metrics(self) -> list[str]:
        """Names of what left with the log."""
        return [] if self.withhold else list(self.logged)

    @property
    def steering(self) -> list[str]:
        """Metrics of ``training_step`` by which a scheduler sets the learning rate, and the weights with it."""
        plateaus = [str(c.monitor) for c in self.run.trainer.lr_scheduler_configs if c.reduce_on_plateau]
        spellings = {name: {name, name.removesuffix("_epoch"), name.removesuffix("_step")} for name in plateaus}
        return [name for name in plateaus if spellings[name] & self.logged.keys()]

    def beside_metrics(self) -> Iterator[str]:
        """What else leaves, a sentence each."""
        for callback in callbacks_of(self.run.trainer):
            monitor = getattr(callback, "monitor", None)
            if monitor and not monitor.startswith("guard/"):
                yield f"{type(callback).__name__} acts on {monitor}, which is computed from data without noise"
        for name, layer in self.run.module.named_modules():
            if isinstance(getattr(layer, "weight", None), Tensor) and isinstance(layer, nn.modules.loss._Loss):
                yield f"{name}.weight, class weights: public if they do not come from the counts of private rows"
        yield "validation and test data, and the weights that training starts from"
