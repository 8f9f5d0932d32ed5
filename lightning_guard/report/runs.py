"""One run of a comparison: an arm on a seed, carried out once, judged, and then read from its folder."""

import hashlib
import inspect
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import reduce
from importlib.metadata import version
from operator import or_
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from lightning_guard import __version__
from lightning_guard.batch import Batch
from lightning_guard.evaluation import Evaluator, Evidence, Figure, Subject
from lightning_guard.guard import Guard, callbacks_of, guards_of
from lightning_guard.report import predictions
from lightning_guard.report.logged import log_evidence
from lightning_guard.report.members import trained_on
from lightning_guard.report.witness import Withholding, Witness

Parts = tuple[pl.Trainer, pl.LightningModule, pl.LightningDataModule]
_PACKAGES = ("torch", "pytorch-lightning", "torchmetrics", "opacus", "fairlearn", "numpy")


@dataclass(frozen=True)
class Arm:
    """One way to train, to be compared with others.

    Args:
        name: as it appears in the report.
        build: makes fresh trainer, module and data each time, with these callbacks beside the arm's own.
        recipes: the recipes it is made of, with their sha256.
        config: text that changes whenever the arm does; with the seed it decides whether a finished run is reused.
        sweep: for an arm that stands for one value of a sweep: its ``key``, its ``value``, the arm that it is one
            ``of``, and ``also``, the keys and values of further sweeps.
        texts: the recipes it is made of, in full.
        given: for a model that is not trained here: makes it of the built trainer and module and the seed.
    """

    name: str
    build: Callable[[list[pl.Callback]], Parts]
    recipes: Mapping[str, str] = field(default_factory=dict)
    config: str = ""
    sweep: Mapping[str, Any] | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    given: Callable[[pl.Trainer, pl.LightningModule, int], nn.Module] | None = None


class ArmRun:
    """One arm on one seed: carried out once, then read from its folder."""

    def __init__(
        self,
        arm: Arm,
        seed: int,
        place: Path,
        judges: Sequence[Evaluator],
        shares_group: bool,
        source: str,
        resplit: bool = False,
    ):
        self.arm, self.seed, self.judges, self.shares_group, self.resplit = arm, seed, judges, shares_group, resplit
        self.folder = place / "runs" / slug_of(arm.name) / f"seed-{seed}"
        parts = [arm.config, source, seed, [describe([judge]) for judge in judges], versions()]
        parts += ["split by seed"] if resplit else []
        self.fingerprint = sha256(plain_text(parts))
        self._result: dict[str, Any] | None = None

    @property
    def title(self) -> str:
        """What it is called while it runs."""
        return f"{self.arm.name}, seed {self.seed}"

    def result(self) -> dict[str, Any] | None:
        """What the run found, if it has ended and nothing that decides it has changed since."""
        path = self.folder / "result.json"
        if self._result is None and path.exists():
            found = json.loads(path.read_text())
            self._result = found if found.get("fingerprint") == self.fingerprint else None
        return self._result

    def claim(self) -> bool:
        """Take the run for this process; False if another has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            os.close(os.open(self.folder / "claim", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def unclaim(self) -> None:
        (self.folder / "claim").unlink(missing_ok=True)

    def carry_out(self, progress: pl.Callback) -> None:
        pl.seed_everything(self.seed, verbose=False)
        witness = Witness()
        reading: list[pl.Callback] = [Withholding()] if self.shares_group else []
        trainer, module, data = self.arm.build([witness, progress, *reading])
        guards = [guard for guard in guards_of(trainer, module) if not isinstance(guard, Withholding)]
        batch = batch_of(trainer, module)
        model: nn.Module = module
        if self.resplit:
            setattr(data, "split_seed", self.seed)  # noqa: B010  a data module need not have one
        if self.arm.given is None:
            trainer.fit(module, datamodule=data)
        else:
            model = self.arm.given(trainer, module, self.seed)
            data.prepare_data()
            data.setup("fit")
        data.setup("test")
        loader = data.test_dataloader()
        subject = Subject(
            model,
            loader[0] if isinstance(loader, list) else loader,
            batch=batch,
            group_names=getattr(data, "group_names", None),
            attribute_names=getattr(data, "attribute_names", None),
            class_names=getattr(data, "class_names", None),
            feature_names=getattr(data, "feature_names", None),
            train=trained_on(trainer, data) if self.arm.given is None else "the model was not trained here",
            privacy={key: value for guard in guards for key, value in guard.privacy().items()},
        )
        if self.arm.given is None:
            notes = [f"{guard.name}: {note}" for guard in guards for note in guard.notes()]
            told = _cost(witness, module) | Evidence(notes=notes)
        else:
            told = Evidence(notes=["The model was not trained here: what it was trained on and how is not known."])
        judges = [judge for judge in self.judges if not getattr(judge, "once", False)]  # those are of the data alone
        evidence = reduce(or_, [*(judge.evaluate(subject) for judge in judges), told])
        log_evidence(evidence, trainer.loggers, trainer.global_step)
        torch.save(model.state_dict(), self.folder / "weights.pt")
        predictions.save(subject, self.folder)
        torch.save(evidence.tensors, self.folder / "tensors.pt")
        evidence.tensors = {}
        result = {
            "fingerprint": self.fingerprint,
            "arm": self.arm.name,
            "seed": self.seed,
            **asdict(evidence),
            "evaluators": [[judge.name, *describe([judge])[0]] for judge in self.judges],
            "names": {name: getattr(subject, name) for name in predictions.NAMES},
            "trained": self.arm.given is None,
            "guards": [card(guard) for guard in guards],
            "initial_weights_sha256": witness.initial_weights or None,
            "data_order_sha256": witness.data_order if witness.batches else None,
            "data": data.provenance() if hasattr(data, "provenance") else {"name": type(data).__name__},
        }
        temporary = self.folder / "result.json.part"
        temporary.write_text(json.dumps(result, indent=1, default=str))  # unsorted: the first figure leads
        temporary.replace(self.folder / "result.json")  # whole or not at all
        self.unclaim()


def slug_of(name: str) -> str:
    """The name of an arm as that of a folder: harmless, short, and no two alike."""
    slug = re.sub(r"[^A-Za-z0-9_.+-]+", "-", name)[:40]
    return slug if slug == name and not slug.startswith(".") else f"{slug}-{sha256(name)[:8]}".lstrip(".")


def batch_of(trainer: pl.Trainer, module: pl.LightningModule) -> Batch:
    """How the batches of an arm are read."""
    stated = [guard.batch for guard in guards_of(trainer, module) if guard.batch is not None]
    return stated[0] if stated else getattr(module, "guard_batch", None) or Batch()


def card(guard: Guard) -> dict[str, Any]:
    """What a report says of a guard."""
    return {"name": guard.name, "promise": guard.promise, "options": json.loads(plain_text(guard.options()))}


def _cost(witness: Witness, module: pl.LightningModule) -> Evidence:
    clock = "Processor" if module.device.type == "cpu" else "Clock"
    counted = Evidence(
        {
            "cost/train_seconds": Figure(
                witness.seconds,
                "Training time",
                "s",
                "lower",
                f"{clock} time of the training loop, validation included.",
            ),
            "cost/passes": Figure(
                witness.passes,
                "Forward passes a batch",
                "count",
                "lower",
                "Per training batch, those of attacks included.",
            ),
            "cost/steps": Figure(float(witness.steps), "Optimizer steps", "count", None, "Of the whole training."),
        }
    )
    return counted | witness.machine


def describe(objects: Iterable[Any]) -> list[Any]:
    return [[type(o).__qualname__, o.options() if isinstance(o, Guard) else vars(o)] for o in objects]


def sources_of(parts: Parts) -> str:
    """A digest of the code of an arm: an edited training_step is another training."""
    trainer, module, data = parts
    owners = [*module.modules(), data, *callbacks_of(trainer)]
    classes = {cls for owner in owners for cls in type(owner).__mro__}
    foreign = (
        "builtins",
        "abc",
        "typing",
        "torch",
        "torchmetrics",
        "pytorch_lightning",
        "lightning",
        "lightning_fabric",
    )
    texts = []
    for cls in classes:
        if cls.__module__.split(".")[0] not in foreign:
            try:
                texts.append(inspect.getsource(cls))
            except (OSError, TypeError):  # typed in a console
                texts.append(cls.__qualname__)
    return sha256("".join(sorted(texts)))


def plain_text(value: Any, indent: int | None = None) -> str:
    def plain(value: Any) -> Any:
        return asdict(value) if is_dataclass(value) and not isinstance(value, type) else bare(value)

    def bare(value: Any) -> str:
        return re.sub(r" at 0x[0-9a-f]+", "", str(value))  # an address differs in every process

    return json.dumps(value, default=plain, indent=indent, sort_keys=True)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    return {"lightning-guard": __version__, **{name: version(name) for name in _PACKAGES}}
