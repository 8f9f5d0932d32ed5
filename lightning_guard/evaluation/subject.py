"""The finished model that evidence is about."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
import torchmetrics
from lightning_fabric.utilities import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_guard.batch import Batch
from lightning_guard.evaluation.families import Family, Names, families, group_name
from lightning_guard.guard import GuardConflict, Run, Step
from lightning_guard.still import still

Kind = Literal["binary", "multiclass", "regression", "unknown"]


class Outputs(NamedTuple):
    """What a model says about all examples, and what there is to compare it with, on the CPU.

    Args:
        logits: ``(N,)`` for one logit, else ``(N, C, ...)``, in float32 or wider.
        target: ``(N,)`` or ``(N, ...)``; None if the batches have none.
        group: whole numbers ``(N,)``, or ``(N, A)`` of A attributes, negative where unknown; None if the batches
            have none.
        lacking: why a target or group is None, by name.
    """

    logits: Tensor
    target: Tensor | None
    group: Tensor | None
    lacking: dict[str, str]


class Subject:
    """A finished model and the examples it is judged by.

    The outputs are collected once for all evaluators, in evaluation mode and without gradients.

    Args:
        module: a LightningModule, or any module that maps inputs to logits.
        loader: batches, as often as they are asked for: a DataLoader or a list.
        batch: how a batch is read and where the logits come from, if the defaults do not fit.
        group_names: names of the groups, by their number; for several attributes a sequence of names for each.
        class_names: names of the classes, or of several labels, by their number.
        attribute_names: names of the attributes that the columns of the group are.
        train: batches of the examples that the model was trained on, or why there are none; a loader that shuffles
            will do, one that draws or augments will not.
        privacy: what the training claims or shows of privacy, as :meth:`lightning_guard.guard.Guard.privacy` says it.
        feature_names: names of the columns of a table.

    Raises:
        ValueError: if ``loader`` or ``train`` can be read only once, or, when the first batch is needed, holds none.

    | case                                          | result                                                |
    |-----------------------------------------------|-------------------------------------------------------|
    | a loader that shuffles                        | the same order each time; the generators stand still  |
    | the caller is in ``torch.inference_mode``     | it is left for the time of the evaluation             |
    | targets that are missing or of a strange kind | ``kind`` is ``"unknown"`` and ``problem`` says why    |
    | a third part of a batch that is no group      | no group, and ``outputs.lacking`` says why            |
    | a module in half or double precision          | inputs are converted on their way in                  |

    Example:
        >>> data = [(torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 1]))]
        >>> subject = Subject(nn.Identity(), data)
        >>> subject.kind, predicted(subject.outputs.logits).tolist()
        ('binary', [1, 0])
    """

    def __init__(
        self,
        module: nn.Module,
        loader: Iterable[Any],
        batch: Batch | None = None,
        group_names: Names | None = None,
        class_names: Sequence[str] | None = None,
        attribute_names: Sequence[str] | None = None,
        train: Iterable[Any] | str = "the training examples are not given; give Subject(train=...)",
        privacy: Mapping[str, Any] | None = None,
        feature_names: Sequence[str] | None = None,
    ):
        for name, given in (("loader", loader), ("train", train)):
            if isinstance(given, Iterator):
                raise ValueError(f"{name}={type(given).__name__} can be read only once; give a DataLoader or a list")
        self.train, self.privacy, self.feature_names = train, dict(privacy or {}), feature_names
        self.module, self.loader = module, loader
        self.group_names, self.class_names, self.attribute_names = group_names, class_names, attribute_names
        self._run = Run(None, module, (), batch or Batch())  # type: ignore[arg-type]  # nobody trains here

    @contextmanager
    def still(self) -> Iterator[None]:
        """Whatever passes through the model inside this block leaves no trace; gradients are off."""
        metrics = [m for m in self.module.modules() if isinstance(m, torchmetrics.Metric)]
        with still(self.module, metrics), torch.inference_mode(False), torch.no_grad():
            torch.default_generator.manual_seed(0)  # so that a loader that shuffles repeats itself
            yield

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    def batches(self) -> Iterator[Step]:
        """The batches on the model's device, each with ``inputs``, ``target`` and ``group`` to be read."""
        module: Any = self.module
        for batch in self.loader:
            if hasattr(module, "on_after_batch_transfer"):  # where a LightningModule may normalise its inputs
                batch = module.on_before_batch_transfer(batch, 0)
                batch = module.transfer_batch_to_device(batch, self.device, 0)
                batch = module.on_after_batch_transfer(batch, 0)
            else:
                batch = move_data_to_device(batch, self.device)
            yield Step(self._run, batch)

    def forward(self, inputs: Any) -> Tensor:
        """Logits for inputs, ``(N,)`` or ``(N, C, ...)``."""
        dtype = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)
        if dtype != torch.float32:  # the Trainer's "bf16-true" and "64-true" convert inputs as well
            inputs = apply_to_collection(inputs, Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t)
        logits = column(self._run.forward(inputs))
        return logits if logits.dtype.itemsize > 2 else logits.float()

    @cached_property
    def outputs(self) -> Outputs:
        """The model's outputs over the whole loader."""
        parts: dict[str, list[Tensor]] = {"logits": [], "target": [], "group": []}
        lacking: dict[str, str] = {}
        with self.still():
            for step in self.batches():
                parts["logits"].append(self.forward(step.inputs).cpu())
                for name in {"target", "group"} - lacking.keys():
                    part = part_of(step, name)
                    if isinstance(part, str):
                        lacking[name] = part
                    else:
                        parts[name].append(column(part).cpu())
        if not any(map(len, parts["logits"])):
            raise ValueError("loader holds no example, so there is nothing to judge the model by; give the test data")
        logits, target, group = (None if name in lacking else torch.cat(parts[name]) for name in parts)
        assert logits is not None  # nothing ever lacks them
        return Outputs(logits, target, group, lacking)

    @cached_property
    def trained(self) -> "Subject | None":
        """The same model on what it was trained on; None if that is not known."""
        if isinstance(self.train, str):
            return None
        names = self.group_names, self.class_names, self.attribute_names
        return Subject(self.module, self.train, self._run.batch, *names, feature_names=self.feature_names)

    @property
    def kind(self) -> Kind:
        """What the model is for, by the shapes and values of outputs and targets."""
        return self._kind[0]

    @property
    def problem(self) -> str:
        """Why ``kind`` is ``"unknown"``, as a sentence."""
        return self._kind[1]

    @property
    def multilabel(self) -> bool:
        """Whether each example has several labels of 0 and 1, and a logit for each."""
        logits, target, _, _ = self.outputs
        if target is None or logits.dim() != 2 or target.shape != logits.shape:
            return False
        return bool(((target == 0) | (target == 1)).all())

    def families(self, intersections: bool = False) -> list[Family]:
        """The groups of each attribute, and the crossed ones if asked for; none if there is no group."""
        group = self.outputs.group
        if group is None:
            return []
        return families(group, self.group_names, self.attribute_names, intersections)

    def group_name(self, group: int, attribute: int = 0) -> str:
        """The name of a group, or its number."""
        return group_name(group, self.group_names, attribute)

    def class_name(self, label: int) -> str:
        """The name of a class, or its number."""
        names = self.class_names
        return names[label] if names is not None and 0 <= label < len(names) else f"class {label}"

    @cached_property
    def _kind(self) -> tuple[Kind, str]:
        logits, target, _, lacking = self.outputs
        if target is None:
            return "unknown", f"Nothing can be compared with a target: {lacking['target']}."
        floating, zero_one = target.is_floating_point(), bool(((target == 0) | (target == 1)).all())
        classes = logits.shape[1] if logits.dim() == 2 else 0
        if target.shape == logits.shape:
            if logits.dim() == 1 and zero_one:
                return "binary", ""
            if floating and not zero_one:
                return "regression", ""
        elif target.shape == logits.shape[:1] and not floating and bool(((target >= 0) & (target < classes)).all()):
            return "multiclass", ""
        span = f" from {target.min()} to {target.max()}" if target.numel() else ""
        return "unknown", (
            f"Outputs of shape {tuple(logits.shape)} and {target.dtype} targets of shape {tuple(target.shape)}{span} "
            "are not understood; give one logit with targets 0 and 1, a logit a class with whole numbers, or "
            "floating targets for a regression."
        )


def predicted(logits: Tensor) -> Tensor:
    """The likeliest class of each example ``(N,)``: the first of equals, -1 where a logit is not a number.

    Example:
        >>> predicted(torch.tensor([-0.5, 2.0])).tolist(), predicted(torch.tensor([[0.0, 2.0, 1.0]])).tolist()
        ([0, 1], [1])
    """
    if logits.dim() == 1:
        return torch.where(logits.isnan(), -1, (logits > 0).long())
    return torch.where(logits.isnan().any(1), -1, logits.argmax(1))


def column(values: Tensor) -> Tensor:
    """``(N, 1)`` as ``(N,)``; anything else as it is."""
    return values[:, 0] if values.dim() == 2 and values.shape[1] == 1 else values


def part_of(step: Step, name: str) -> Tensor | str:
    """The target or group of a batch, or why there is none."""
    batch = step.run.batch
    try:
        if batch.find(step.batch, name) is None:
            return f"the batches have no {name}; if they do, say where with Batch({name}=...)"
        if name == "group" and batch.find(step.batch, "group") == batch.find(step.batch, "target"):
            return "each class is a group of its own, and rates of a class within it say nothing; see task/worst_class"
        part = getattr(step, name)
    except (KeyError, GuardConflict) as error:
        if getattr(batch, name) is not None:
            raise
        # Unstated, the third part of a batch may be anything, weights for instance.
        return str(error.problems[0] if isinstance(error, GuardConflict) else error.args[0])
    if isinstance(part, Tensor):
        return part
    return f"the {name} is a {type(part).__name__} and no tensor; say where with Batch({name}=...)"
