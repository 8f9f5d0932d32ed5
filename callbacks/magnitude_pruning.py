"""Gradual pruning of weights as a guard."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_guard.compression.masking import Masks
from lightning_guard.compression.rewinding import Rewinding
from lightning_guard.compression.scheduled import ScheduledWeights
from lightning_guard.functional import cubic_sparsity, floors, pattern_masks, regrown_masks, score_masks, stream
from lightning_guard.guard import GuardConflict, Trait

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class MagnitudePruning(ScheduledWeights):
    r"""Sets the smallest weights to zero and keeps them there, to an exact sparsity (Zhu and Gupta, 2017).

    The fraction dropped grows with the optimizer's steps, :math:`s_t = s (1 - (1 - t)^3)`, from ``start`` to ``end``.
    Weights are masked right after every optimizer step, so no momentum or weight decay revives them and whoever looks
    at the model between steps (validation, checkpoints, averaging) sees it sparse. What a checkpoint stores and what
    is left after training is masked too, averaged weights included. Masks live outside the module: ``state_dict``
    keys do not change.

    Beside DP-SGD masks and scores are free, since weights and gradients are private before they are looked at, and
    dropped weights use none of ``max_grad_norm``: it is the norm of the kept ones that is clipped, and noised.

    Zeros make a model compressible, not small or fast by themselves: measure the file that you ship.

    Logs ``guard/magnitude_pruning/sparsity``, the fraction of prunable weights that is masked at the end of an epoch.

    Args:
        sparsity: fraction of the prunable weights to drop in the end, in [0, 1); 0 switches the guard off. None is
            0.8, or what ``pattern`` says.
        scope: ``global`` compares all weights, ``layer`` drops the same fraction of each layer.
        start: when to begin, as a fraction of training (float) or in optimizer steps (int).
        end: when the final sparsity is reached, as a fraction of training (float) or in optimizer steps (int).
        every: optimizer steps between two updates of the masks.
        targets: names or patterns (``*``) of modules to prune; None is all that can be pruned (Linear, convolution,
            attention projections).
        ignore: names or patterns (``*``) of modules to leave alone.
        min_keep: fraction of each layer that ``global`` keeps at least, so that none vanishes; None is 0.02, or half
            of what is kept if that is less.
        pattern: ``"N:M"`` keeps exactly N of every M consecutive weights along the inputs, such as ``"2:4"``.
        score: which weights go first: those of least ``magnitude``; at ``random``; of least ``gradient``, the sum of
            :math:`|w g|` since the last update (Molchanov et al., 2019); of least ``movement``, the sum of
            :math:`-w g` since training began (Sanh et al., 2020), which keeps what moves away from zero.
        regrow: fraction of the kept weights that each update grows anew, from zero, where the dense gradient is
            largest; it falls to 0 at ``end`` by a cosine (Evci et al., 2020).
        rewind: when, as ``start``, to remember all weights. At ``end`` the masks are final and the weights go back
            to what they were then, optimizers begin anew, and training goes on masked (Frankle et al., 2020).
        rounds: with ``rewind``, how often to prune and to rewind between ``start`` and ``end``, each round dropping
            the same fraction of what is left; ``every`` is not used then.
        seed: of ``random`` scores.

    | case                                    | result                                              |
    |-----------------------------------------|-----------------------------------------------------|
    | ``sparsity=0``                          | training is bit-identical to training without the guard |
    | a pattern that matches nothing          | refused, with the names that there are              |
    | training ends before ``end``            | refused if it can be known, else a warning at the end |
    | optimizers replaced in training         | refused                                             |
    | norms, biases, embeddings               | never pruned, nor is a weight shared with an embedding |
    | weights frozen or in no optimizer       | left alone: nothing could recover from their loss   |
    | ... that are trained later on           | refused                                             |
    | a weight shared by two modules          | masked once, and left alone if one of them is ignored |
    | weight_norm and other parametrisations  | refused: the weight itself is computed anew in every pass |
    | uninitialised (lazy) weights            | refused                                             |
    | ``pattern`` and inputs that M does not divide | refused, by name                              |
    | ``sparsity`` that leaves less than ``min_keep`` | refused                                     |
    | ``gradient``, ``movement``, ``regrow`` beside DP-SGD | read gradients that are clipped and noised |
    | ``regrow`` beside DP-SGD                | needs dense gradients, so dropped weights use norm  |
    | infinite gradients                      | count as none in a score                            |

    Raises:
        GuardConflict: before training, if the promise cannot be kept.

    Reference:
        Zhu and Gupta, To Prune, or Not to Prune, 2017, arXiv:1710.01878. Scores: Molchanov et al., CVPR 2019,
        arXiv:1906.10771; Sanh et al., NeurIPS 2020, arXiv:2005.07683. Patterns: Zhou et al., ICLR 2021,
        arXiv:2102.04010. Regrowing: Evci et al., ICML 2020, arXiv:1911.11134. Rewinding: Frankle and Carbin, ICLR
        2019, arXiv:1803.03635; Frankle et al., ICML 2020, arXiv:1912.05671.

    Example:
        >>> import pytorch_lightning as pl
        >>> trainer = pl.Trainer(callbacks=[MagnitudePruning(sparsity=0.9, ignore=["head"])], logger=False)
    """

    name: ClassVar[str] = "magnitude_pruning"
    traits: frozenset[Trait] | None = frozenset({Trait.POST_PROCESSING})
    verb: ClassVar[str] = "prune"

    def __init__(
        self,
        sparsity: float | None = None,
        scope: Literal["global", "layer"] = "global",
        start: int | float = 0.0,
        end: int | float = 0.5,
        every: int = 10,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = (),
        min_keep: float | None = None,
        pattern: str | None = None,
        score: Literal["magnitude", "random", "gradient", "movement"] = "magnitude",
        regrow: float = 0.0,
        rewind: int | float | None = None,
        rounds: int = 1,
        seed: int = 0,
    ):
        self._groups = _groups(pattern)
        if self._groups and sparsity is None:
            sparsity = self._groups[0] / self._groups[1]
        self.sparsity = 0.8 if sparsity is None else sparsity
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={sparsity} is no fraction of weights to drop; give a number in [0, 1)")
        if scope not in ("global", "layer"):
            raise ValueError(f"scope={scope!r} is not known; give 'global' or 'layer'")
        self.scope, self.pattern, self.score, self.min_keep = scope, pattern, score, min_keep
        self.regrow, self.rewind, self.rounds, self.seed = regrow, rewind, rounds, seed
        super().__init__(start, end, every, targets, ignore)
        self._agree()
        self._masks = Masks({})
        self._least: dict[str, int] = {}  # weights that each layer keeps at least
        self._scores: dict[str, Tensor] = {}
        self._read: dict[str, Tensor] = {}  # what the coming optimizer step adds to them
        self._rewinding = Rewinding()

    def _agree(self) -> None:
        """Refuse options that are wrong by themselves or contradict one another."""
        if self.score not in ("magnitude", "random", "gradient", "movement"):
            raise ValueError(f"score={self.score!r} is not known; give 'magnitude', 'random', 'gradient' or 'movement'")
        if self.min_keep is not None and not 0 <= self.min_keep < 1:
            raise ValueError(f"min_keep={self.min_keep} is no fraction of a layer; give a number in [0, 1)")
        if not 0 <= self.regrow < 1:
            raise ValueError(f"regrow={self.regrow} is no fraction of the kept weights; give a number in [0, 1)")
        if self._groups and self.sparsity not in (0, self._groups[0] / self._groups[1]):
            raise ValueError(
                f"sparsity={self.sparsity} is not that of pattern={self.pattern!r}, which drops "
                f"{self._groups[0]} of {self._groups[1]}; leave sparsity out"
            )
        if self.min_keep is not None and (self._groups or self.scope == "layer"):
            raise ValueError(
                f"min_keep={self.min_keep} is for scope='global'; scope='layer' and a pattern keep the same fraction "
                "of every layer, so leave it out"
            )
        if self.regrow and (self.score != "magnitude" or self._groups or self.rewind is not None):
            raise ValueError(
                f"regrow={self.regrow} drops the smallest weights and grows others, which goes with score='magnitude', "
                "no pattern and no rewind; leave out the other"
            )
        if self.rewind is not None:
            self.check_time("rewind", self.rewind)
            if type(self.rewind) is type(self.end) and self.rewind >= self.end:
                raise ValueError(f"rewind={self.rewind} does not come before end={self.end}; give an earlier rewind")
        if self.rounds < 1 or (self.rounds > 1 and self.rewind is None):
            raise ValueError(f"rounds={self.rounds} needs rewind and at least 1; give e.g. rewind=0, or leave it out")

    @property
    def reached(self) -> float:
        """The fraction of the prunable weights that is masked now."""
        return self._masks.sparsity

    @property
    def off(self) -> bool:
        return not self.sparsity

    @property
    def asked(self) -> str:
        return f"sparsity={self.sparsity}"

    @property
    def short(self) -> str:
        return f"sparsity is {self.reached:.3f}, not {self.sparsity}"

    @property
    def figures(self) -> dict[str, float]:
        return {"sparsity": self.reached}

    @property
    def times(self) -> dict[str, int | float]:
        return super().times | ({} if self.rewind is None else {"rewind": self.rewind})

    def take_up(self, state: Mapping[str, Any] | None) -> None:
        assert self._run is not None
        self._masks = Masks(self._weights, None if state is None else state["dropped"])
        self._least = self._fit_in()
        self._scores, self._read, self._rewinding = {}, {}, Rewinding()
        if state is not None:
            for name, score in state["scores"].items():
                self._scores[name] = score.to(self._weights[name].device, copy=True)
            self._rewinding = Rewinding(state["rewind"])
        elif self.rewind is not None and not self.rewind:
            self._rewinding.remember(self._run)
        if self.score == "random":
            for i, (name, weight) in enumerate(self._weights.items()):
                self._scores[name] = torch.rand(weight.shape, generator=stream(self.seed, i)).to(weight.device)
        self._tell()

    def _fit_in(self) -> dict[str, int]:
        """Refuse weights that cannot be pruned so; what each keeps at least."""
        self._floor = 0.0
        if self.scope == "global" and not self._groups:
            self._floor = min(0.02, (1 - self.sparsity) / 2) if self.min_keep is None else self.min_keep
        for name, weight in self._weights.items():
            dim = self._inputs(name)
            if self._groups and weight.shape[dim] % self._groups[1]:
                raise GuardConflict(
                    f"{self.name}: pattern={self.pattern!r} does not fit {name} of shape {tuple(weight.shape)}: its "
                    f"{weight.shape[dim]} inputs are no multiple of {self._groups[1]}; leave it out with "
                    f"ignore=[{name.rpartition('.')[0]!r}]"
                )
        try:
            return floors(self._masks.sizes, self.sparsity, self._floor)
        except ValueError as error:
            raise GuardConflict(f"{self.name}: {error}") from None

    def _inputs(self, name: str) -> int:
        """The dimension of a weight that its inputs run along."""
        return 0 if isinstance(self._layers[name], _TRANSPOSED) else 1

    # In training ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Read gradients where they are whole: accumulated, averaged over processes, unscaled, not clipped yet."""
        if self.score not in ("gradient", "movement") or (self._steps > 1 and self._steps >= self.window[1]):
            return
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, weight in self._weights.items():
            if id(weight) in owned and weight.grad is not None:
                product = weight * weight.grad
                if not bool(product.sum().isfinite()):
                    product = torch.nan_to_num(product, 0.0, 0.0, 0.0)
                self._read[name] = product.abs_() if self.score == "gradient" else product.neg_()

    @torch.no_grad()
    def on_weights(self, optimizer: Optimizer) -> None:
        # Only now: whoever vouches for gradients looks at them once more when the optimizer has taken its step.
        for name, product in self._read.items():
            if name not in self._scores:
                self._scores[name] = torch.zeros_like(product, dtype=torch.float32)
            self._scores[name].add_(product)
        self._read = {}
        super().on_weights(optimizer)

    def hold(self, names: Iterable[str]) -> None:
        self._masks.clear(names)

    def advance(self, step: int) -> None:
        assert self._run is not None
        start, end = self.window
        if self.rewind is not None:
            self._mark(step, start, end)
        progress = self._progress(step, start, end)
        if progress is None:
            return
        self.present()
        if self.rewind is None:
            self._choose(cubic_sparsity(progress, self.sparsity), progress)
        else:
            self._choose(1 - (1 - self.sparsity) ** progress, progress)
            self._rewinding.rewind(self._run, forget=step == end)
            self.hold(self._weights)

    def _progress(self, step: int, start: int, end: int) -> float | None:
        """How much of the schedule has passed, if an update is due."""
        if step == end:
            return 1.0
        if self.rewind is None:
            due = start < step < end and (step - start) % self.every == 0
            return (step - start) / (end - start) if due else None
        ends = [start + round((end - start) * r / self.rounds) for r in range(1, self.rounds)]
        return (ends.index(step) + 1) / self.rounds if step in ends else None

    def _mark(self, step: int, start: int, end: int) -> None:
        assert self._run is not None
        assert self.rewind is not None
        at = max(1, self.in_steps(self.rewind)) if self.rewind else 0
        first = start + round((end - start) / self.rounds)
        if at >= first or (end - start) < self.rounds:
            raise GuardConflict(
                f"{self.name}: rewind={self.rewind} is optimizer step {at}, and the first of {self.rounds} rounds of "
                f"pruning is at step {first}; give an earlier rewind, fewer rounds or a later end"
            )
        if step == at:
            self._rewinding.remember(self._run)

    def _choose(self, sparsity: float, progress: float) -> None:
        """Drop what is due, and still the moments that would push dropped weights."""
        if self.regrow:
            self._still()  # what grows anew begins at rest
        plain = self.score == "magnitude" and not self._groups and not self.regrow
        if not (plain and self._masks.drop_smallest(sparsity, self.scope, self._least)):
            self._masks.keep(self._next(sparsity, progress))
        if self.score == "gradient" or progress == 1:
            self._scores = {}
        self._still()
        self._tell()

    def _tell(self) -> None:
        """Whoever bounds gradients bounds those that are left; to grow anew takes those of dropped weights too."""
        assert self._run is not None
        if self._run.private is not None and not self.regrow:
            kept = self._masks.kept
            for name, gone in self._masks.gone.items():
                if gone:
                    self._run.private.mask(self._weights[name], kept[name])

    def _next(self, sparsity: float, progress: float) -> dict[str, Tensor]:
        """The masks at this sparsity."""
        kept = self._masks.kept
        if self.score == "magnitude":
            scores = {name: weight.detach().abs() for name, weight in self._weights.items()}
        else:
            scores = {
                n: self._scores[n] if n in self._scores else torch.zeros_like(w) for n, w in self._weights.items()
            }
        if self._groups:
            drop, size = round(sparsity * self._groups[1]), self._groups[1]
            return {name: pattern_masks(scores[name], drop, size, self._inputs(name), kept[name]) for name in scores}
        if self.regrow and progress < 1:
            share = self.regrow / 2 * (1 + math.cos(math.pi * progress))
            slopes = {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in self._weights.items()}
            return regrown_masks(scores, slopes, sparsity, share, self.scope, kept, self._floor)
        return score_masks(scores, sparsity, self.scope, kept, self._floor)

    def _still(self) -> None:
        for name, moment in self.moments(self._weights):
            self._masks.clear_values(name, moment)

    def formed(self, name: str, values: Tensor) -> Tensor:
        return self._masks.cleared(name, values)

    def release(self, module: pl.LightningModule) -> None:
        if self._weights:
            self._still()
        super().release(module)

    def kept(self) -> dict[str, Any]:
        scores = {} if self.score == "random" else {name: score.clone() for name, score in self._scores.items()}
        return {"dropped": self._masks.packed(), "scores": scores, "rewind": self._rewinding.kept()}


def _groups(pattern: str | None) -> tuple[int, int] | None:
    """How many of how many weights an N:M pattern drops."""
    if pattern is None:
        return None
    keep, _, size = pattern.partition(":")
    if not (keep.isdigit() and size.isdigit() and 0 < int(keep) < int(size)):
        raise ValueError(f"pattern={pattern!r} is no N:M with 0 < N < M; give e.g. '2:4'")
    return int(size) - int(keep), int(size)
