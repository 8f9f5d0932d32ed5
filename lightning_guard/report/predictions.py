"""What a model said about every test example, kept so that others can compute the figures again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_guard.evaluation import Subject
from lightning_guard.evaluation.subject import Outputs

FILE = "predictions.npz"
NAMES = ("group_names", "class_names", "attribute_names")
_PARTS = ("logits", "target", "group")


def save(subject: Subject, folder: Path) -> None:
    """Writes ``predictions.npz``: logits, targets and groups of all test examples, as arrays without any object."""
    parts = {name: getattr(subject.outputs, name) for name in _PARTS}
    np.savez_compressed(folder / FILE, **{name: part.numpy() for name, part in parts.items() if part is not None})


def load(folder: Path) -> Outputs:
    """Reads them back; what is absent is so for a reason that the notes of the run say.

    Raises:
        ValueError: if the file holds objects, or no logits.
    """
    with np.load(folder / FILE, allow_pickle=False) as arrays:
        if "logits" not in arrays.files:
            raise ValueError(f"{folder / FILE} holds no logits")
        parts = {name: torch.from_numpy(arrays[name]) for name in _PARTS if name in arrays.files}
    lacking = {name: f"the run kept no {name}" for name in _PARTS[1:] if name not in parts}
    return Outputs(parts["logits"], parts.get("target"), parts.get("group"), lacking)


def subject_of(folder: Path, names: Mapping[str, Any]) -> Subject:
    """A subject that answers from what was kept: for evaluators that need no model."""
    group_names, class_names, attribute_names = (names.get(name) for name in NAMES)
    subject = Subject(nn.Identity(), [], None, group_names, class_names, attribute_names)
    subject.__dict__["outputs"] = load(folder)  # in place of what a pass over the loader would find
    return subject
