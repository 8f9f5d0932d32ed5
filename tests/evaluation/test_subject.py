"""What a subject collects, and what it makes of unusual models and data."""

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_guard.batch import Batch
from lightning_guard.evaluation import Subject
from lightning_guard.evaluation.base import spread, wilson
from lightning_guard.evaluation.subject import predicted
from lightning_guard.guard import GuardConflict
from lightning_guard.mixins import GuardMixin
from tests import toys


def subject(logits: torch.Tensor, target: torch.Tensor | None, **kwargs) -> Subject:
    """A model that says ``logits``."""
    return Subject(nn.Identity(), [logits if target is None else (logits, target)], **kwargs)


def test_outputs_are_those_of_a_loop_by_hand():
    torch.manual_seed(0)
    module = toys.Net().train()
    found = Subject(module, toys.loader(shuffle=False)).outputs
    x, y, group = toys.rows()
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(found.logits, module(x))
    assert torch.equal(found.target, y)
    assert torch.equal(found.group, group)
    assert found.lacking == {}
    assert not found.logits.requires_grad


@pytest.mark.parametrize(
    ("logits", "target", "kind"),
    [
        (torch.zeros(4), torch.tensor([0, 1, 1, 0]), "binary"),
        (torch.zeros(4), torch.tensor([0.0, 1, 1, 0]), "binary"),
        (torch.zeros(4, 1), torch.tensor([True, False, True, True]), "binary"),
        (torch.zeros(4), torch.tensor([[0], [1], [1], [0]]), "binary"),
        (torch.zeros(4, 2), torch.tensor([0, 1, 1, 0]), "multiclass"),
        (torch.zeros(4, 5), torch.tensor([0, 1, 4, 0], dtype=torch.uint8), "multiclass"),
        (torch.zeros(4), torch.tensor([0.0, 1, 0.5, 0]), "regression"),
        (torch.zeros(4, 1), torch.tensor([3.0, 1, 0.5, 0]), "regression"),
        (torch.zeros(4, 2), torch.tensor([[3.0, 1], [0, 0], [0, 0], [0, 0]]), "regression"),
        (torch.zeros(4), torch.tensor([0, 1, 2, 0]), "unknown"),
        (torch.zeros(4), torch.tensor([-1, 1, 1, -1]), "unknown"),
        (torch.zeros(4, 3), torch.tensor([0, 1, 3, 0]), "unknown"),
        (torch.zeros(4, 3), torch.tensor([0, 1, -100, 0]), "unknown"),
        (torch.zeros(4, 3), torch.tensor([0.0, 1, 2, 0]), "unknown"),
        (torch.zeros(4, 3), torch.zeros(4, 3), "unknown"),  # several labels
        (torch.zeros(4, 3, 5), torch.zeros(4, 5).long(), "unknown"),
        (torch.zeros(4, 3), torch.zeros(3).long(), "unknown"),
        (torch.zeros(4), None, "unknown"),
    ],
)
def test_what_a_model_is_for_follows_from_shapes_and_values(logits, target, kind):
    found = subject(logits, target)
    assert found.kind == kind
    assert bool(found.problem) is (kind == "unknown")


def test_a_third_part_that_is_no_group_is_none():
    weights = torch.tensor([0.3, 1.7])
    found = Subject(nn.Identity(), [(torch.zeros(2), torch.ones(2), weights)])
    assert found.outputs.group is None
    assert "fractions" in found.outputs.lacking["group"]
    with pytest.raises(GuardConflict, match="fractions"):  # stated, it is a mistake
        _ = Subject(nn.Identity(), [(torch.zeros(2), torch.ones(2), weights)], Batch(group=2)).outputs


def test_several_attributes_are_columns():
    x, y = torch.zeros(3), torch.ones(3)
    group = torch.tensor([[0.0, 2.0], [1.0, torch.nan], [-1.0, 0.0]])
    found = Subject(nn.Identity(), [(x, y, group)] * 2, group_names=[["f", "m"], ["a", "b", "c"]])
    assert found.outputs.group.tolist() == [[0, 2], [1, -1], [-1, 0]] * 2
    assert [found.group_name(1, attribute) for attribute in (0, 1)] == ["m", "b"]
    sex, other = found.families()
    assert (sex.names, sex.group.tolist()[:3]) == (["f", "m"], [0, 1, -1])
    assert (other.names, other.group.tolist()[:3]) == (["a", "c"], [1, -1, 0])
    crossed = found.families(intersections=True)[-1]
    assert (crossed.name, crossed.names) == ("attribute 0, attribute 1", ["f, c"])
    assert crossed.group.tolist()[:3] == [0, -1, -1]
    one = Subject(nn.Identity(), [(x, y, group[:, :1])])
    assert one.outputs.group.tolist() == [0, 1, -1]
    assert len(one.families(intersections=True)) == 1
    for shape in ((3, 2, 2), (3, 0)):
        none = Subject(nn.Identity(), [(x, y, torch.zeros(shape))])
        assert "a column of them for each attribute" in none.outputs.lacking["group"]
        assert none.families() == []


def test_several_labels_are_no_kind_of_their_own():
    """What judges classes is not disturbed by them."""
    assert subject(torch.zeros(4, 3), torch.ones(4, 3)).multilabel
    assert subject(torch.zeros(4, 3), torch.ones(4, 3).long()).kind == "unknown"
    for logits, target in (
        (torch.zeros(4, 3), 2 * torch.ones(4, 3)),
        (torch.zeros(4), torch.ones(4)),
        (torch.zeros(4, 3), torch.ones(4).long()),
        (torch.zeros(4), None),
    ):
        assert not subject(logits, target).multilabel


def test_a_stated_place_is_read():
    batches = [{"pixels": torch.ones(2), "answer": torch.ones(2), "sex": torch.tensor([0.0, torch.nan])}]
    found = Subject(nn.Identity(), batches, Batch(inputs="pixels", target="answer", group="sex")).outputs
    assert found.group.tolist() == [0, -1]
    with pytest.raises(GuardConflict, match="has no inputs"):
        _ = Subject(nn.Identity(), batches).outputs


def test_what_is_unstated_may_lack_and_what_is_stated_may_not():
    x, y = torch.ones(2), torch.ones(2)
    several = [{"x": x, "y": y, "label": y}]
    assert "y and label could each be the target" in Subject(nn.Identity(), several).problem
    assert Subject(nn.Identity(), several, Batch(target="label")).kind == "binary"
    with pytest.raises((KeyError, GuardConflict), match="answer"):
        _ = Subject(nn.Identity(), several, Batch(target="answer")).outputs
    assert "is a list and no tensor" in Subject(nn.Identity(), [(x, ["yes", "no"])]).problem
    without = Subject(nn.Identity(), [(x, y)], Batch(group=2)).outputs  # evaluation data may come without
    assert "have no group" in without.lacking["group"]
    assert Subject(nn.Identity(), [(x, y, y), (x, y)]).outputs.group is None


def test_logits_come_from_where_the_guards_take_them():
    class Described(GuardMixin, toys.Net):
        def guard_forward(self, inputs):
            return -self.net(inputs)

    class Loss(toys.Net):
        def forward(self, x):
            return {"loss": self.net(x).sum()}

    torch.manual_seed(0)
    module, x = Described().eval(), toys.rows()[0]
    torch.testing.assert_close(Subject(module, toys.loader(shuffle=False)).outputs.logits, -module.net(x).detach())
    module = Loss().eval()
    found = Subject(module, toys.loader(shuffle=False), Batch(logits="net")).outputs.logits
    torch.testing.assert_close(found, module.net(x).detach())
    with pytest.raises(GuardConflict, match=r"Batch\(logits=...\)"):
        _ = Subject(module, toys.loader()).outputs


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_inputs_follow_the_precision_of_the_model(dtype):
    found = Subject(toys.Net().to(dtype), toys.loader()).outputs.logits
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_lightning_module_may_change_its_batches():
    class Normalising(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Identity()

        def forward(self, x):
            return self.net(x)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            x, y = batch
            return (x - 5) / 2, y

    found = Subject(Normalising(), [(torch.tensor([5.0, 9.0]), torch.tensor([0, 1]))])
    assert found.outputs.logits.tolist() == [0.0, 2.0]


def test_shuffled_examples_come_in_the_same_order():
    x = torch.arange(50.0)
    loader = DataLoader(TensorDataset(x, (x > 25).float()), batch_size=7, shuffle=True)
    one = Subject(nn.Identity(), loader).outputs.logits
    torch.rand(3)
    two = Subject(nn.Identity(), loader)
    with two.still():
        three = torch.cat([step.inputs for step in two.batches()])
    assert torch.equal(one, two.outputs.logits)
    assert torch.equal(one, three)
    assert not torch.equal(one, x)


def test_what_can_be_read_only_once_is_refused():
    with pytest.raises(ValueError, match="only once"):
        Subject(nn.Identity(), iter([torch.zeros(2)]))
    with pytest.raises(ValueError, match="only once"):
        Subject(nn.Identity(), (torch.zeros(2) for _ in range(3)))


def test_names_or_numbers():
    named = subject(torch.zeros(2), None, group_names=("f", "m"), class_names=["no"])
    assert [named.group_name(g) for g in (0, 1, 2, -1)] == ["f", "m", "group 2", "group -1"]
    assert [named.class_name(c) for c in (0, 1)] == ["no", "class 1"]


def test_of_equal_logits_the_first_class_wins_and_nan_none():
    assert predicted(torch.tensor([0.0, 1.0, -1.0, torch.nan, torch.inf])).tolist() == [0, 1, 0, -1, 1]
    assert predicted(torch.tensor([[0.0, 0.0], [0.0, torch.nan], [0.0, torch.inf]])).tolist() == [0, -1, 1]


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (3, 10), (1, 1000), (500, 1000)])
def test_wilson_intervals_are_where_the_score_test_turns(k, n):
    for bound in wilson(k, n):
        if 1e-12 < bound < 1 - 1e-12:
            assert abs(k / n - bound) / (bound * (1 - bound) / n) ** 0.5 == pytest.approx(1.959964, rel=1e-5)
    assert wilson(k, n)[0] <= k / n <= wilson(k, n)[1]


def test_intervals_of_nothing_and_as_text():
    assert wilson(0, 0) == (0.0, 1.0)
    assert spread((0.0, 0.12345)) == "0.0% to 12.3%"


def test_classes_as_groups_are_no_groups_to_compare():
    data = [(torch.randn(8, 3), torch.arange(8) % 3)]
    subject = Subject(torch.nn.Identity(), data, Batch(target=1, group=1))
    assert subject.outputs.group is None
    assert "task/worst_class" in subject.outputs.lacking["group"]
    assert subject.outputs.target is not None
