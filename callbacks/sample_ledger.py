"""A ledger of how training went for each example, as a guard."""

import csv
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_guard.functional.poison import margins, suspects
from lightning_guard.guard import Batch, Guard, GuardConflict, Phase, Run, Step, Trait


class SampleLedger(Guard):
    """Follows each training example's margin through training and names those whose label looks wrong.

    The area under the margin (AUM, Pleiss et al., 2020) is the mean over training of the logit of an example's own
    class less the largest other: low where the other examples teach another class than the label says. The paper
    reads margins off the training steps; here a pass of its own at the end of an epoch goes through the data set in
    its order, in eval mode and without gradients. So batches need no ids, and training is bit-identical to training
    without the guard. A pass costs about a third of an epoch.

    During and after ``fit`` there are ``aum``, ``(N,)`` in logits, and ``suspicious``, the positions of suspicious
    examples in your data set, the worst first. Look at them, correct or leave them out, and train again. The guard
    itself removes nothing.

    Args:
        every: epochs between two passes; 0 switches the guard off.
        until: epochs after which no more passes are made; None is the end of training. The paper stops where the
            learning rate first falls: a network that goes on learns wrong labels by heart, and margins close.
        share: of the examples that are known to be wrong, in (0, 1): as many are suspicious. None: those with a
            negative area that are also low among their class, see :func:`lightning_guard.functional.poison.suspects`.
        path: where to write the ledger as a CSV file when training ends: index, label, mean_margin, last_margin and
            predicted, the suspicious first. None writes nothing.
        batch: how a batch is read, if the defaults do not fit.

    | case                                             | result                                                  |
    |--------------------------------------------------|---------------------------------------------------------|
    | a stream, several loaders, batches made by the data set | refused: there is no row to follow               |
    | targets that are quantities, several, or none    | refused before training: a margin needs a class         |
    | a target that is no class, e.g. -100             | the area is NaN, and the example is never suspicious    |
    | random augmentation                              | each pass sees one draw; training draws what it would   |
    | a data set with a generator of its own           | a pass advances it; draw from the global ones           |
    | several processes                                | each passes over its part, all hold the whole ledger    |
    | beside :class:`DPSGD`                            | refused: margins of private rows would leave the run    |

    Raises:
        GuardConflict: before training, if no row can be followed.

    Reference:
        Pleiss, Zhang, Elenberg and Weinberger, Identifying mislabeled data using the area under the margin ranking,
        NeurIPS 2020, arXiv:2001.10528.

    Example:
        >>> import pytorch_lightning as pl
        >>> trainer = pl.Trainer(callbacks=[SampleLedger()], logger=False)
    """

    name: ClassVar[str] = "sample_ledger"
    phase: ClassVar[Phase] = Phase.REWRITE  # before any guard that puts other rows into the loader
    traits: frozenset[Trait] | None = frozenset({Trait.REMEMBERS_DATA})

    def __init__(
        self,
        every: int = 1,
        until: int | None = None,
        share: float | None = None,
        path: str | None = None,
        batch: Batch | None = None,
    ):
        if every < 0:
            raise ValueError(f"every={every} is no number of epochs; give at least 1, or 0 to switch the guard off")
        if until is not None and until < max(every, 1):
            raise ValueError(f"until={until} ends before the first pass, after epoch {max(every, 1)}; give more epochs")
        if share is not None and not 0 < share < 1:
            raise ValueError(f"share={share} is no share of examples; give a fraction in (0, 1), or none if unknown")
        self.every, self.until, self.share, self.batch = every, until, share, batch
        self.path = None if path is None else str(path)
        self._reset()

    def _reset(self) -> None:
        self._run: Run | None = None
        self._loader: Any = None
        self.passes = 0
        self._sum = torch.zeros(0, dtype=torch.float64)
        self._last = torch.zeros(0)
        self._label = self._predicted = torch.zeros(0, dtype=torch.long)

    @property
    def aum(self) -> Tensor:
        """The mean margin of each example over the passes so far, ``(N,)``, in logits."""
        return (self._sum / self.passes).float() if self.passes else self._last

    @property
    def suspicious(self) -> Tensor:
        """Positions in the data set of the examples whose label looks wrong, the worst first."""
        return suspects(self.aum, self._label, self.share)

    def problems(self, run: Run) -> Iterable[str]:
        epochs = run.trainer.max_epochs
        if self.every and epochs is not None and 0 <= epochs < self.every:
            yield f"every={self.every} epochs makes no pass in max_epochs={epochs}; give at most {epochs}"

    def prepare(self, run: Run) -> None:
        self._reset()
        self._run = run

    def on_loader(self, loader: Any) -> Any:
        self._loader = loader if self.every else None
        return loader

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.every:
            return
        given = trainer.train_dataloader
        if not isinstance(self._loader, DataLoader) or not isinstance(given, DataLoader):
            raise GuardConflict(
                f"{self.name}: the training data come from a {type(given).__name__}, whose rows have no numbers; give "
                "one DataLoader over a map-style data set"
            )
        self._rows()
        list(self._pass(trainer, range(1)))  # what cannot be read is refused before training

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if not self.every or epoch % self.every or (self.until is not None and epoch > self.until):
            return
        count, device = self._rows(), trainer.strategy.root_device
        if self.passes and count != len(self._sum):
            raise GuardConflict(
                f"{self.name}: the training data had {len(self._sum)} rows and have {count} now, so rows cannot be "
                "followed; give the same data set in every epoch, and when training is resumed"
            )
        found = torch.zeros(3, count, device=device)
        mine = range(trainer.global_rank, count, trainer.world_size)
        done = 0
        for margin, target, predicted in self._pass(trainer, mine):
            rows = torch.tensor(mine[done : done + len(margin)], device=device)
            found[:, rows] = torch.stack([margin.float(), target.float(), predicted.float()])
            done += len(margin)
        if trainer.world_size > 1:  # the others' rows are zero here
            found = torch.as_tensor(trainer.strategy.reduce(found, reduce_op="sum"))
        self._last, label, predicted = found.cpu()
        self._label, self._predicted = label.long(), predicted.long()
        self._sum = self._last.double() + (self._sum if self.passes else 0.0)
        self.passes += 1

    def _rows(self) -> int:
        """How many rows there are to follow; refused if they cannot be told apart."""
        dataset = self._loader.dataset
        if isinstance(dataset, IterableDataset) or self._loader.batch_sampler is None:
            why = "is a stream" if isinstance(dataset, IterableDataset) else "makes whole batches (batch_size=None)"
            raise GuardConflict(
                f"{self.name}: {type(dataset).__name__} {why}, so no row can be found again; give a map-style data set "
                "of rows, with __len__ and __getitem__"
            )
        known = (SequentialSampler, RandomSampler, DistributedSampler)
        if type(self._loader.batch_sampler) is not BatchSampler or not isinstance(self._loader.sampler, known):
            kind = type(self._loader.batch_sampler.sampler if hasattr(self._loader.batch_sampler, "sampler") else None)
            raise GuardConflict(
                f"{self.name}: the loader draws rows in a way of its own ({kind.__name__}), so it is not known which "
                "rows are trained on, and others would be accused; give Subset(data, indices) and shuffle=True"
            )
        return len(dataset)

    @torch.no_grad()
    def _pass(self, trainer: pl.Trainer, rows: range) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Margin, label and predicted class of these rows, by the batch."""
        run, loader = self._run, self._loader
        assert run is not None
        step, precision, size = Step(run, None), trainer.precision_plugin, loader.batch_size or 64
        workers = loader.num_workers if len(rows) > size else 0
        with isolate_rng(include_cuda=False), step.probe(), precision.forward_context():
            batches = DataLoader(
                loader.dataset, size, sampler=rows, collate_fn=loader.collate_fn, num_workers=workers,
                worker_init_fn=loader.worker_init_fn if workers else None,
                multiprocessing_context=loader.multiprocessing_context if workers else None,
            )  # fmt: skip
            for start, batch in zip(range(0, len(rows), size), batches, strict=True):
                step.batch = trainer.strategy.batch_to_device(precision.convert_input(batch))
                logits, target = run.forward(step.inputs), step.target
                try:
                    margin = margins(logits, torch.as_tensor(target, device=logits.device))
                except ValueError as error:
                    raise GuardConflict(f"{self.name}: {error}") from None
                if len(margin) != len(rows[start : start + size]):
                    raise GuardConflict(
                        f"{self.name}: the collate function made a batch of {len(margin)} examples from "
                        f"{len(rows[start : start + size])} rows, so it is not known which is which; keep every row"
                    )
                single = logits.dim() == 1 or logits.shape[1] == 1
                predicted = (logits.reshape(-1) > 0) if single else logits.argmax(1)
                yield margin, step.target.reshape(-1), predicted

    def release(self, module: pl.LightningModule) -> None:
        run, self._run, self._loader = self._run, None, None
        if not self.passes:
            return
        rank_zero_info(f"{self.name}: {self._found()}")
        if self.path is not None and (run is None or run.rank == 0):
            self.write(self.path)

    def write(self, path: str | Path) -> None:
        """Write the ledger as a CSV file, the suspicious first, then the rest from the lowest area on."""
        areas, named = self.aum, self.suspicious
        rest = torch.ones(len(areas), dtype=torch.bool)
        rest[named] = False
        order = torch.argsort(areas.nan_to_num(nan=torch.inf), stable=True)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["index", "label", "mean_margin", "last_margin", "predicted", "suspicious"])
            for i in [*named.tolist(), *order[rest[order]].tolist()]:
                figures = (f"{areas[i]:.6g}", f"{self._last[i]:.6g}")
                writer.writerow([i, int(self._label[i]), *figures, int(self._predicted[i]), int(not rest[i])])

    def _found(self) -> str:
        named, count = self.suspicious, len(self._sum)
        worst = ", ".join(map(str, islice(named.tolist(), 5)))
        rule = "the lowest, as share says" if self.share is not None else "negative and low among their class"
        return (
            f"{len(named)} of {count} training examples ({len(named) / count:.1%}) have a label that looks wrong by "
            f"their margin over {self.passes} passes ({rule}){'; the worst are ' + worst if worst else ''}"
        )

    def notes(self) -> list[str]:
        if not self.passes:
            return []
        return [f"{self._found()}. Suspicion is no proof: hard and rare examples have low margins too."]

    def state(self) -> dict[str, Any]:
        if not self.passes:
            return {}
        return {
            "passes": self.passes, "sum": self._sum, "last": self._last, "label": self._label,
            "predicted": self._predicted,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        if state:
            self.passes, self._sum, self._last = state["passes"], state["sum"], state["last"]
            self._label, self._predicted = state["label"], state["predicted"]
