"""What is said of data before training: against counting, scipy and simulation."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from lightning_guard.batch import Batch
from lightning_guard.data import AdultData
from lightning_guard.evaluation import describe_groups
from lightning_guard.evaluation.base import wilson
from lightning_guard.evaluation.data_bias import _goodness_of_fit
from tests import toys


def batches(x, y, group, size: int = 64):
    return list(zip(x.split(size), y.split(size), group.split(size), strict=True))


def values(evidence):
    return {key.split("/")[1]: figure.value for key, figure in evidence.figures.items()}


def test_adult_is_described_as_it_is_counted():
    data = AdultData(group="sex")
    data.setup("fit")
    loader = data.train_dataloader()
    found = describe_groups(
        loader, group_names=data.group_names, class_names=data.class_names, population={"Female": 0.51, "Male": 0.49}
    )
    _, y, group = (torch.cat(part) for part in zip(*loader, strict=True))
    sizes = [int((group == g).sum()) for g in (0, 1)]
    ones = [int(((group == g) & (y == 1)).sum()) for g in (0, 1)]
    rate = [k / n for k, n in zip(ones, sizes, strict=True)]
    assert found.bars["data/group_size"].values == sizes
    assert found.bars["data/base_rate"].values == pytest.approx(rate)
    assert values(found)["base_rate_gap"] == pytest.approx(rate[1] - rate[0])
    low, high = found.intervals["data/base_rate_gap"]
    error = math.sqrt(sum(p * (1 - p) / n for p, n in zip(rate, sizes, strict=True)))
    assert (low, high) == pytest.approx((rate[1] - rate[0] - 1.96 * error, rate[1] - rate[0] + 1.96 * error), abs=5e-4)
    note = next(note for note in found.notes if note.startswith("Base rates of >50K"))
    for k, n in zip(ones, sizes, strict=True):
        assert "{:.1%} to {:.1%}".format(*wilson(k, n)) in note
    share = sizes[0] / sum(sizes)
    assert values(found)["representation_gap"] == pytest.approx(0.51 - share)
    assert found.bars["data/representation"].values == pytest.approx([share / 0.51, (1 - share) / 0.49])
    assert any("differ from the stated population (goodness of fit, p < 0.0001)" in note for note in found.notes)
    assert not any("too small" in note or "too few" in note for note in found.notes)


def test_groups_that_are_too_small_are_named():
    data = AdultData(group="sex+race")
    data.setup("test")
    names = {"group_names": data.group_names, "class_names": data.class_names}
    found = describe_groups(data.test_dataloader(), min_support=60, **names)
    _, y, group = (torch.cat(part) for part in zip(*data.test_dataloader(), strict=True))
    small = [name for g, name in enumerate(data.group_names) if (group == g).sum() < 60]
    few = [
        f"{name} has {int(((group == g) & (y == 1)).sum())} of >50K"
        for g, name in enumerate(data.group_names)
        if (group == g).sum() >= 60 > ((group == g) & (y == 1)).sum()
    ]
    assert small
    assert few
    sentence = next(note for note in found.notes if "too small to judge" in note)
    assert all(name in sentence for name in small)
    sentence = next(note for note in found.notes if "too few to judge" in note)
    assert all(said in sentence for said in few)
    rates = [float(y[group == g].double().mean()) for g in range(10) if (group == g).sum() >= 60]
    assert values(found)["base_rate_gap"] == pytest.approx(max(rates) - min(rates))


def test_what_is_missing_is_counted():
    x, y, group = torch.rand(100, 3), torch.arange(100) % 2, torch.arange(100) % 4 // 2
    x[:10, 1] = torch.nan
    x[50, 0] = torch.nan
    unknown = group.clone()
    unknown[:5] = -1
    found = describe_groups(batches(x, y, unknown), min_support=1)
    rates = [float(y[unknown == g].double().mean()) for g in (0, 1)]
    assert values(found) == pytest.approx(
        {"smallest_group": 47, "unknown_group": 0.05, "missing_values": 0.11, "base_rate_gap": abs(rates[1] - rates[0])}
    )
    broken = x.isnan().any(1)
    wanted = [float(broken[unknown == g].double().mean()) for g in (0, 1)]
    assert found.bars["data/missing_values"].values == pytest.approx(wanted)
    whole = describe_groups(batches(x.nan_to_num(), y, group))
    assert "data/missing_values" not in whole.bars
    assert values(whole)["missing_values"] == 0


def test_all_forms_of_batches_and_inputs_are_read():
    x, y, group = toys.rows()
    wanted = describe_groups([(x, y, group)], min_support=1)
    for form in ("triple", "named", "dict"):
        assert describe_groups(toys.loader(form, shuffle=False), min_support=1) == wanted
    stated = [{"words": x, "answer": y, "sex": group.float()}]
    batch = Batch(inputs="words", target="answer", group="sex")
    assert describe_groups(stated, batch, min_support=1) == wanted
    nested = [((x, {"mask": torch.full((len(x),), torch.nan)}), y, group)]
    assert values(describe_groups(nested))["missing_values"] == 1.0
    assert describe_groups(toys.loader("pair")).notes[0].startswith("Nothing is said of groups in the data")
    with pytest.raises(ValueError, match="batches hold nothing"):
        describe_groups([])


def test_of_many_classes_or_labels_the_one_that_differs_most_is_said():
    group = torch.arange(400) % 2
    y = torch.where(torch.arange(400) < 100, 3 * group, torch.arange(400) // 2 % 3)
    found = describe_groups([(torch.zeros(400), y, group)], class_names=["a", "b", "c", "d"])
    rate = [float((y[group == g] == 3).double().mean()) for g in (0, 1)]
    other = [float((y[group == g] == 0).double().mean()) for g in (0, 1)]
    assert values(found)["base_rate_gap"] == pytest.approx(max(abs(rate[1] - rate[0]), abs(other[1] - other[0])))
    assert any(note.startswith(("Base rates of d", "Base rates of a")) for note in found.notes)
    labels = torch.stack([torch.arange(400) // 2 % 2, (group + (torch.arange(400) < 300)) // 2], 1)
    found = describe_groups([(torch.zeros(400), labels, group)], class_names=["x", "y"])
    assert values(found)["base_rate_gap"] == pytest.approx(0.75)
    assert found.bars["data/base_rate"].values == [0.0, 0.75]
    assert any(note.startswith("Base rates of y") for note in found.notes)
    assert "Fewer than 30 examples, too few to judge rates among them: group 0 has 0 of y." in found.notes


def test_regressions_have_means():
    group = torch.arange(90) % 3
    y = torch.randn(90, generator=torch.Generator().manual_seed(0))
    found = describe_groups([(torch.zeros(90), y, group)])
    assert found.bars["data/mean_target"].values == pytest.approx([float(y[group == g].mean()) for g in range(3)])
    assert "base_rate_gap" not in values(found)
    images = describe_groups([(torch.zeros(90), torch.zeros(90, 4, 4).long() + 7, group)])
    assert any("are no labels" in note for note in images.notes)


def test_several_attributes_are_each_described():
    group = torch.stack([torch.arange(90) % 2, torch.arange(90) // 60], 1)
    found = describe_groups(
        [(torch.zeros(90), torch.arange(90) % 2, group)], group_names=[["f", "m"], ["old", "young"]],
        attribute_names=["sex", "age"], population={"old": 0.5, "young": 0.5},
    )  # fmt: skip
    assert found.bars["data/group_size"].categories == ["sex: f", "sex: m", "age: old", "age: young"]
    assert found.bars["data/group_size"].values == [45, 45, 60, 30]
    assert values(found)["representation_gap"] == pytest.approx(1 / 6)
    identifiers = describe_groups([(torch.zeros(90), torch.zeros(90).long(), torch.arange(90))])
    assert "90 groups of attribute 0 look like identifiers and are not described." in identifiers.notes


def test_the_test_of_representation_is_scipys():
    shares = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    for counts in ([50, 30, 20], [60, 25, 15], [400, 350, 250]):
        counts = torch.tensor(counts, dtype=torch.float64)
        wanted = chisquare(counts.numpy(), (counts.sum() * shares).numpy()).pvalue
        assert _goodness_of_fit(counts, shares) == pytest.approx(wanted)
    rng, small = np.random.default_rng(0), []
    for _ in range(200):  # 12 examples: the chi-square would be wrong, drawn counts are not
        drawn = torch.from_numpy(rng.multinomial(12, shares.numpy())).double()
        small.append(_goodness_of_fit(drawn, shares) <= 0.1)
    assert 0.03 <= np.mean(small) <= 0.14


def test_a_group_of_the_population_may_be_absent_and_no_other():
    data = [(torch.zeros(60), torch.arange(60) % 2, torch.arange(60) % 2)]
    names = ["a", "b", "c"]
    found = describe_groups(data, group_names=names, population={"a": 0.4, "b": 0.4, "c": 0.2})
    assert found.bars["data/representation"].values == pytest.approx([1.25, 1.25, 0])
    assert values(found)["representation_gap"] == pytest.approx(0.2)
    same = describe_groups(data, group_names=names, population={"a": 0.5, "b": 0.5})
    assert any("are compatible with the stated population" in note for note in same.notes)
    with pytest.raises(ValueError, match="population names a, c, and the groups are a, b"):
        describe_groups(data, group_names=names, population={"a": 0.5, "c": 0.5})
    for wrong in ({"a": 0.5, "b": 0.4}, {"a": 1.2, "b": -0.2}, {"a": 1.0, "b": 0.0}):
        with pytest.raises(ValueError, match="is no distribution"):
            describe_groups(data, group_names=names, population=wrong)
    with pytest.raises(ValueError, match="min_support=0"):
        describe_groups(data, min_support=0)
