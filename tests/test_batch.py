"""Reading batches of every common form, and never changing them."""

import dataclasses
from collections import namedtuple

import pytest
import torch

from lightning_guard.batch import Batch

Pair = namedtuple("Pair", ["image", "label"])
Triple = namedtuple("Triple", ["image", "label", "group"])
X, Y, G, NEW = torch.zeros(2, 3), torch.ones(2), torch.tensor([0, 1]), torch.full((2, 3), 9.0)


@dataclasses.dataclass
class Example:
    x: torch.Tensor
    target: torch.Tensor
    sensitive: torch.Tensor


FORMS = {
    "tensor": (X, Batch()),
    "tuple": ((X, Y), Batch()),
    "list": ([X, Y, G], Batch()),
    "triple": ((X, Y, G), Batch()),
    "named": (Triple(X, Y, G), Batch()),
    "dict": ({"pixel_values": X, "labels": Y, "group": G}, Batch()),
    "dataclass": (Example(X, Y, G), Batch()),
    "stated": ({"a": X, "b": Y, "c": G}, Batch(inputs="a", target="b", group="c")),
    "positions": ((Y, G, X), Batch(inputs=-1, target=0, group=1)),
    "named by position": (Triple(X, Y, G), Batch(inputs=0, target=1)),
}


@pytest.mark.parametrize("form", FORMS)
def test_reading_and_writing(form):
    batch, reader = FORMS[form]
    assert reader.read(batch, "inputs") is X
    if form != "tensor":
        assert reader.read(batch, "target") is Y
    changed = reader.with_inputs(batch, NEW)
    assert type(changed) is type(batch)
    assert reader.read(changed, "inputs") is NEW
    assert reader.read(batch, "inputs") is X  # never in place
    if form not in ("tensor", "tuple"):
        assert reader.read(changed, "group") is G


@pytest.mark.parametrize(
    ("batch", "left"),
    [
        ((X, Y, G), (X, Y)),
        ([X, Y, G], [X, Y]),
        ((X, Y), (X, Y)),
        (X, X),
        ({"x": X, "y": Y, "group": G}, {"x": X, "y": Y}),
        (Triple(X, Y, G), Triple(X, Y, G)),  # nobody trips over a name
        (Pair(X, Y), Pair(X, Y)),
    ],
)
def test_the_group_is_withheld(batch, left):
    found = Batch().without_group(batch)
    assert type(found) is type(left)
    assert str(found) == str(left)
    assert Batch(withhold_group=False).without_group(batch) is batch


def test_a_group_that_is_the_inputs_stays():
    batch = {"sex": G, "y": Y}
    assert Batch(inputs="sex", target="y", group="sex").without_group(batch) is batch


def test_a_group_that_is_the_target_stays():
    batch = (X, Y)
    assert Batch(target=1, group=1).without_group(batch) is batch


def test_evaluation_batches_may_lack_the_group():
    assert Batch(group=2).without_group((X, Y)) == (X, Y)


@pytest.mark.parametrize(
    ("batch", "reader", "part", "message"),
    [
        ({"a": X}, Batch(), "inputs", r"has no inputs: it is a dict with a; say where with Batch\(inputs"),
        ({"x": X, "image": X}, Batch(), "inputs", "x and image could each be the inputs"),
        ({"x": X}, Batch(target="label"), "target", r"Batch\(target='label'\) is not in this batch"),
        ((X, Y), Batch(), "group", "has no group: it is a tuple of 2"),
        ((X, Y), Batch(inputs=5), "inputs", "is not in this batch"),
        ("text", Batch(), "inputs", "has no inputs: it is a str"),
        (X, Batch(), "target", "has no target"),
    ],
)
def test_what_is_not_there_is_said(batch, reader, part, message):
    with pytest.raises(KeyError, match=message):
        reader.read(batch, part)
