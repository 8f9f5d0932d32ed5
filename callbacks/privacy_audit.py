"""An audit of a training's privacy as a guard."""

import random
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_guard.functional.privacy import (
    AuditResult,
    Mixed,
    Outliers,
    audit,
    ceiling,
    contrast,
    label,
    population,
    refilled,
    relabelled,
)
from lightning_guard.functional.random import stream
from lightning_guard.guard import Batch, Guard, GuardConflict, Phase, Run, Step, Trait

Kind = Literal["noise", "mislabelled"]
_OTHERS = 32  # labels, at most, that a canary's own is compared with


class PrivacyAudit(Guard):
    r"""Refutes a claim of privacy, or fails to: bounds epsilon from below by canaries in this one training.

    Canaries are rows that nobody's data contain. For each a fair coin of the operating system decides whether it is
    put among the rows that are trained on. After training, those that the model has learnt most are guessed to have
    been in and those that it has learnt least to have been out. Were the training (epsilon, delta)-differentially
    private, the guesses could be right only so often (Steinke, Nasr and Jagielski, 2023); what is exceeded with
    ``confidence`` is refuted.

    It refutes and never proves: a low bound can mean privacy, too few canaries, or canaries that this model hardly
    learns. ``result.ceiling`` says what the bound would be had every guess been right. The model itself has been
    trained on canaries, so it is for auditing; train the one to use without them.

    Beside :class:`DPSGD` its claim is checked; beside nothing, plain training is audited. The rest of the loader is as
    it was. A score is how much better the model likes a canary's label than others that it could have been given, less
    what that was before training; by ``GuardMixin.guard_forward`` and ``guard_losses`` where given, else by ``forward``
    and cross-entropy. It is taken of the finished model, as the other guards release it.

    After ``fit`` there is ``result`` (an :class:`AuditResult`), ``guard/privacy_audit/epsilon_lower_bound`` in
    ``callback_metrics`` and the loggers, a line in the log, and a warning if a claim is refuted.

    Args:
        canaries: how many, about half of which are trained on; 0 switches the audit off. More can show more: 1000 show
            an epsilon of 5.4 at most.
        kind: ``noise``, inputs unlike any row with a random label, which show most; ``mislabelled``, copies of rows
            with a wrong label, which resemble what an attacker would look for, and put those rows in twice.
        confidence: probability that the bound holds, over the coins.
        delta: at which epsilon is bounded; None takes the claim's, and 0 where nothing is claimed.
        seed: for tests only: coins and canaries are reproducible.
        batch: how a batch is read, if the defaults do not fit.

    | case                                        | result                                                     |
    |---------------------------------------------|------------------------------------------------------------|
    | ``canaries=0``                              | training is bit-identical to training without the guard    |
    | a stream, a sampler with weights, several loaders | refused                                              |
    | targets that are quantities, several, or none | refused: a canary needs a class                          |
    | ``DPSGD(users=...)``                        | refused: canaries belong to nobody                         |
    | resumed training                            | goes on with the coins and canaries of the checkpoint      |
    | canaries leave a last batch of a single row | joins the batch before it: BatchNorm cannot train on one   |
    | several processes                           | the same coins and canaries in all of them                 |
    | an example's loss is NaN in the end         | the canary counts as not learnt                            |

    Raises:
        GuardConflict: before training, if there can be no canaries.

    Reference:
        Steinke, Nasr and Jagielski, Privacy auditing with one (1) training run, NeurIPS 2023, arXiv:2305.08846.

    Example:
        >>> import pytorch_lightning as pl
        >>> trainer = pl.Trainer(callbacks=[PrivacyAudit(canaries=1000)], logger=False)
    """

    name: ClassVar[str] = "privacy_audit"
    phase: ClassVar[Phase] = Phase.LOADER
    traits: frozenset[Trait] | None = frozenset()

    def __init__(
        self,
        canaries: int = 1000,
        kind: Kind = "noise",
        confidence: float = 0.95,
        delta: float | None = None,
        seed: int | None = None,
        batch: Batch | None = None,
    ):
        if kind not in get_args(Kind):
            raise ValueError(f"kind={kind!r} is not known; give one of {', '.join(get_args(Kind))}")
        if not 0 < confidence < 1:
            raise ValueError(f"confidence={confidence} is no probability below 1; give e.g. 0.95")
        if delta is not None and not 0 <= delta < 1:
            raise ValueError(f"delta={delta} is no probability; give a number in [0, 1), or none for the claim's")
        if canaries < 0 or (canaries and not ceiling(canaries, confidence)):
            raise ValueError(
                f"canaries={canaries} could show nothing even if every guess were right; give at least 100, or 0 to "
                "switch the audit off"
            )
        self.canaries, self.kind, self.confidence, self.delta = canaries, kind, confidence, delta
        self.seed, self.batch = seed, batch
        self._reset()

    def _reset(self) -> None:
        self.result: AuditResult | None = None
        self._claim: tuple[str, float, float] | None = None  # who claims which epsilon and delta
        self._run: Run | None = None
        self._source: int | None = None  # of what is random about the canaries themselves, which is no secret
        self._known = self.kind  # that of the checkpoint, if there is one
        self._coins = torch.zeros(0, dtype=torch.bool)
        self._before: Tensor | None = None  # scores before training
        self._rows: list[Any] = []  # the canaries
        self._labels = torch.zeros(0)
        self._wrong = torch.zeros(0)  # what their labels were, NaN where any label is as good
        self._classes: list[float] = []
        self._collate: Any = None
        self._size = 1

    def problems(self, run: Run) -> Iterable[str]:
        if not self.canaries:
            return
        few = getattr(run.trainer, "overfit_batches", 0)
        if few:
            yield f"overfit_batches={few} trains on a fixed few rows, so most canaries would never be seen; set it to 0"

    def prepare(self, run: Run) -> None:
        self._reset()
        self._run = run

    def begin(self, run: Run) -> None:
        if self._source is not None and (len(self._coins), self._known) != (self.canaries, self.kind):
            raise GuardConflict(
                f"{self.name}: the checkpoint was trained with {len(self._coins)} canaries of kind {self._known}, now "
                f"canaries={self.canaries} and kind={self.kind!r}; an audit is of one training, so resume with the same"
            )

    # The data -----------------------------------------------------------------------------------------------------

    def on_loader(self, loader: Any) -> Any:
        if not self.canaries:
            return loader
        assert self._run is not None
        try:
            population(loader)
            source = self._toss(self._run) if self._source is None else self._source
            if not self._rows:
                with _aside(source):
                    self._make(loader.dataset, self._run.batch, source)
                self._collate, self._size = loader.collate_fn, loader.batch_size
        except (ValueError, KeyError) as error:
            raise GuardConflict(f"{self.name}: {error.args[0]}") from error
        trained = [row for row, coin in zip(self._rows, self._coins.tolist(), strict=True) if coin]
        return refilled(loader, Mixed(loader.dataset, trained, stream(source, 1)))

    def _toss(self, run: Run) -> int:
        if self.seed is None:
            tossed = torch.frombuffer(bytearray(secrets.token_bytes(self.canaries)), dtype=torch.uint8) % 2 == 1
            source = secrets.randbits(62)
        else:
            tossed, source = torch.rand(self.canaries, generator=stream(self.seed, 2)) < 0.5, self.seed
        if run.trainer.world_size > 1:
            tossed, source = run.trainer.strategy.broadcast((tossed, source))
        self._coins, self._source = tossed, source
        return source

    def _make(self, dataset: Any, batch: Batch, source: int) -> None:
        draw = stream(source, 0)
        rows = [dataset[i] for i in torch.randint(len(dataset), (self.canaries,), generator=draw).tolist()]
        labels = torch.tensor([label(batch.read(row, "target")) for row in rows])
        self._classes = labels[labels >= 0].unique().tolist()  # negative marks rows without a label
        if len(self._classes) < 2:
            raise ValueError(f"{self.canaries} rows have one class between them, so none can be mislabelled")
        classes = torch.tensor(self._classes)
        if self.kind == "noise":
            inputs = [batch.read(row, "inputs") for row in rows]
            make = Outliers(inputs)
            rows = [batch.with_inputs(row, make(one, draw)) for row, one in zip(rows, inputs, strict=True)]
            self._labels = classes[torch.randint(len(classes), (len(rows),), generator=draw)]
            self._wrong = torch.full_like(labels, torch.nan)
        else:
            shift = torch.randint(1, len(classes), (len(rows),), generator=draw)
            self._labels = classes[(torch.searchsorted(classes, labels) + shift) % len(classes)]
            self._wrong = labels
        self._rows = [
            batch.with_target(row, relabelled(batch.read(row, "target"), number))
            for row, number in zip(rows, self._labels.tolist(), strict=True)
        ]

    # The scores ---------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.canaries:
            return
        assert self._run is not None
        given = trainer.train_dataloader
        if not isinstance(getattr(given, "dataset", None), Mixed):
            raise GuardConflict(
                f"{self.name}: training does not read one loader with the canaries but a {type(given).__name__}; give "
                "one DataLoader, and replace it nowhere"
            )
        if self._before is None:
            try:
                self._before = self._scores(self._run)
            except (ValueError, KeyError) as error:
                if isinstance(error, GuardConflict):
                    raise
                raise GuardConflict(f"{self.name}: {error.args[0]}") from error

    def _scores(self, run: Run) -> Tensor:
        """How much the model likes each canary's label, on the CPU and the same on all ranks."""
        strategy, precision = run.trainer.strategy, run.trainer.precision_plugin
        step, scores, others = Step(run, None), [], self._classes
        assert self._source is not None
        if len(others) > _OTHERS:
            some = torch.randperm(len(others), generator=stream(self._source, 3))[:_OTHERS]
            others = [others[i] for i in some.tolist()]
        with _aside(self._source), step.probe(), torch.no_grad(), precision.forward_context():
            for start in range(0, len(self._rows), self._size):
                part = slice(start, start + self._size)
                batch = strategy.batch_to_device(precision.convert_input(self._collate(self._rows[part])))
                logits, target = run.forward(run.batch.read(batch, "inputs")), run.batch.read(batch, "target")
                own, labels, wrong = step.losses(logits, target), self._labels[part], self._wrong[part]
                losses = []
                if isinstance(target, Tensor) and target.numel() == len(labels):
                    for other in others:
                        counts = (labels != other) & ((wrong != other) | (len(self._classes) == 2))
                        loss = step.losses(logits, torch.full_like(target, other)).cpu()
                        losses.append(torch.where(counts, loss, torch.nan))
                scores.append(contrast(own.cpu(), losses).double())
        found = torch.cat(scores)
        return strategy.broadcast(found) if run.trainer.world_size > 1 else found

    def release(self, module: pl.LightningModule) -> None:
        run, self._run = self._run, None
        if run is None or self._before is None or not self._rows:
            return
        with ExitStack() as undo:
            if run.trainer.strategy.root_device != module.device:  # Lightning has put it on the CPU by now
                undo.callback(module.to, module.device)
                module.to(run.trainer.strategy.root_device)
            scores = self._scores(run) - self._before
        self._rows = []
        self._claim = _claim(run)
        delta = self.delta if self.delta is not None else 0.0 if self._claim is None else self._claim[2]
        self.result = audit(scores, self._coins, self.confidence, delta)
        self._tell(run.trainer)

    # What is said about it ------------------------------------------------------------------------------------------

    def _tell(self, trainer: pl.Trainer) -> None:
        assert self.result is not None
        figures = {f"guard/{self.name}/epsilon_lower_bound": self.result.epsilon_lower}
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in figures.items()})
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)
        rank_zero_info(f"{self.name}: {self._found()}")
        if self.refuted:
            rank_zero_warn(f"{self.name}: {self._refutation()}")

    @property
    def refuted(self) -> bool:
        """Whether the training that has just ended was less private than another guard of the run claims."""
        if self.result is None or self._claim is None:
            return False
        _, epsilon, delta = self._claim
        return self.result.delta >= delta and self.result.epsilon_lower > epsilon

    def _found(self) -> str:
        assert self.result is not None
        found = self.result
        claimed = "" if self._claim is None else f" (claimed: {self._claim[1]:.3g} by {self._claim[0]})"
        return (
            f"epsilon >= {found.epsilon_lower:.2f} at delta = {found.delta:g} with {100 * found.confidence:g} % "
            f"confidence{claimed}; {found.canaries} canaries could have shown at most {found.ceiling:.2f}"
        )

    def _refutation(self) -> str:
        assert self.result is not None
        assert self._claim is not None
        name, epsilon, delta = self._claim
        return (
            f"THE CLAIM IS REFUTED: {name} claims epsilon = {epsilon:.3g} at delta = {delta:g}, and "
            f"{self.result.correct} of {self.result.guesses} guesses about canaries were right, which shows epsilon >= "
            f"{self.result.epsilon_lower:.3g} (by chance in at most {100 * (1 - self.result.confidence):.3g} % of "
            "trainings); something reaches the weights that is not clipped or not noised as planned, so do not use them"
        )

    def notes(self) -> list[str]:
        if self.result is None:
            return []
        notes = [f"{self._refutation()}."] if self.refuted else []
        found = self._found()
        notes.append(f"{found[0].upper()}{found[1:]}. An audit refutes privacy and never proves it.")
        if self.seed is not None:
            notes.append("Coins of the audit came from a seed, which is for tests.")
        return [*notes, "This model was trained on canaries: it is for auditing, not for use."]

    def privacy(self) -> dict[str, Any]:
        if self.result is None:
            return {}
        found = self.result
        return {
            "lower_bound": found.epsilon_lower, "ceiling": found.ceiling, "confidence": found.confidence,
            "audit_delta": found.delta,
        }  # fmt: skip

    def state(self) -> dict[str, Any]:
        if not self.canaries or self._source is None:
            return {}
        before = torch.zeros(0) if self._before is None else self._before
        return {"kind": self.kind, "source": self._source, "coins": self._coins, "before": before}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state:
            self._known, self._source, self._coins = state["kind"], state["source"], state["coins"]
            self._before = state["before"] if len(state["before"]) else None


def _claim(run: Run) -> tuple[str, float, float] | None:
    """Who says how private this training was: name, epsilon and delta."""
    for guard in run.guards:
        plan = getattr(guard, "plan", None) if guard.name == "dp_sgd" else None
        if plan is not None:
            return guard.name, float(plan.epsilon(guard.state().get("steps"))), float(plan.delta)
    return None


@contextmanager
def _aside(seed: int | None) -> Iterator[None]:
    """Whatever draws from the global generators in here draws the same each time, and nothing after it notices."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([]):
        try:
            random.seed(seed)
            np.random.seed((seed or 0) % 2**32)
            torch.default_generator.manual_seed(seed or 0)  # torch.manual_seed would reach the GPU too
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
