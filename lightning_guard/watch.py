"""Watches over training on single steps, which may stop to protect."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_guard.ascent import WATCH, Ascent, Method, outside
from lightning_guard.functional import stream
from lightning_guard.functional.collapse import Collapse

_ROOM = 128  # training examples, a process, that are looked at after each epoch


@dataclass
class Watch:
    """Compares single steps with PGD-10 on training examples after each epoch (Wong et al., 2020).

    At a collapse the weights of the last good epoch are put back, the optimizer forgets later ones, and training ends
    or goes on with PGD.

    Args:
        method: of training.
        collapse: what is done about one: ``fall_back``, ``stop``, or ``ignore`` for not looking.
        steps: of PGD in the training that goes on, to be named.
        seed: of the random starts.
        fallen: what happened, if single steps have stopped to protect.
    """

    method: Method
    collapse: Literal["fall_back", "stop", "ignore"]
    steps: int
    seed: int = 0
    fallen: str = ""
    rule: Collapse = field(default_factory=Collapse)
    good: dict[str, Tensor] = field(default_factory=dict)  # the weights when single steps were last seen to protect
    examples: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # of this epoch, to look at when it ends

    @property
    def single(self) -> bool:
        """Whether training rests on an attack that it may learn to fool."""
        return self.method != "pgd" and not self.fallen

    @property
    def looking(self) -> bool:
        """Whether a collapse would be seen."""
        return self.single and self.collapse != "ignore"

    def remember(self, x: Tensor, y: Tensor) -> None:
        """Keep clean training examples, until there are enough of this epoch."""
        room = _ROOM - sum(len(x) for x, _ in self.examples)
        if self.looking and room > 0:
            self.examples.append((x[:room].detach(), y[:room].detach()))

    def epoch_begins(self) -> None:
        """Forget the examples of the epoch before."""
        self.examples = []

    def epoch_ends(
        self, trainer: pl.Trainer, module: pl.LightningModule, ascent: Ascent, settled: bool
    ) -> dict[str, float]:
        """Compare, and act at a collapse; gives the figures to report, none where nothing was looked at.

        Args:
            trainer: that trains.
            module: that is trained.
            ascent: the single step as training takes it by now.
            settled: the radius no longer grows.
        """
        if not self.examples:
            return {}
        single, strong = self._accuracies(trainer, module, ascent)
        collapsed = self.rule.sees(single, strong, settled)
        if collapsed:
            self._fall(trainer, module, single, strong)
        else:
            self.good = _weights(module)
        return {"single_step_accuracy": single, "pgd_accuracy": strong, "collapsed": float(collapsed)}

    def _accuracies(self, trainer: pl.Trainer, module: pl.LightningModule, ascent: Ascent) -> tuple[float, float]:
        pgd = Ascent(ascent.threat, steps=10, embedding=ascent.embedding)
        examples, self.examples = self.examples, []
        found = torch.zeros(3, device=module.device)
        for i, (x, y) in enumerate(examples):
            x, y = x.to(module.device), y.to(module.device)
            generator = stream(self.seed, trainer.global_step, trainer.global_rank, WATCH, i, device=x.device)
            step = outside(trainer, module, (x, y))
            found[0] += ascent.withstood(step, x, y, generator).sum()
            found[1] += pgd.withstood(step, x, y, generator).sum()
            found[2] += len(x)
        found = trainer.strategy.reduce(found, reduce_op="sum")
        single, strong = (found[:2] / found[2]).tolist()
        return single, strong

    def _fall(self, trainer: pl.Trainer, module: pl.LightningModule, single: float, strong: float) -> None:
        then = "training ended there" if self.collapse == "stop" else f"training went on with PGD-{self.steps}"
        back = "the weights of the last good epoch were put back, and " if self.good else ""
        self.fallen = (
            f"training on {self.method} collapsed in epoch {trainer.current_epoch} (catastrophic overfitting): accuracy"
            f" on training examples was {single:.2f} under the single step, {strong:.2f} under PGD-10; {back}{then}"
        )
        rank_zero_warn(f"adversarial_training: {self.fallen}")
        with torch.no_grad():
            for name, value in module.state_dict().items():
                if name in self.good:
                    value.copy_(self.good[name])
        for optimizer in trainer.optimizers:
            optimizer.state.clear()  # moments that lead where the weights have come from
        self.good = {}
        trainer.should_stop = trainer.should_stop or self.collapse == "stop"

    def state(self) -> dict[str, Any]:
        """What a resume needs."""
        state: dict[str, Any] = {}
        if self.good or self.fallen:
            state |= {"fallen": self.fallen, "single": self.rule.single, "strong": self.rule.strong}
        if self.examples:  # within an epoch: the weights are no longer those of its beginning
            state |= {"examples": [list(pair) for pair in self.examples], "good": self.good}
        return state

    def restore(self, state: Mapping[str, Any], module: nn.Module) -> None:
        """Take up what :meth:`state` gave, with the module as its checkpoint left it."""
        self.fallen = state.get("fallen", "")
        self.rule.single, self.rule.strong = state.get("single", 0.0), state.get("strong", 0.0)
        self.examples, self.good = list(state.get("examples", ())), dict(state.get("good", {}))
        if "fallen" in state and self.single and not self.good:
            self.good = _weights(module)  # of an epoch that has just ended well


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}
