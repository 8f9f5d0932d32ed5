"""Group figures against fairlearn, counting, and simulation."""

import re

import numpy as np
import pytest
import torch
from fairlearn.metrics import (
    MetricFrame,
    demographic_parity_difference,
    equal_opportunity_difference,
    equalized_odds_difference,
    false_positive_rate,
    selection_rate,
    true_positive_rate,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss, zero_one_loss
from torch import nn

from lightning_guard.evaluation import Evidence, Fairness, Subject, paired_change
from lightning_guard.evaluation.table import TABLE_NOTIONS


def difference(metric):
    """fairlearn's largest difference between groups."""

    def found(y_true, y_pred, *, sensitive_features):
        frame = MetricFrame(metrics=metric, y_true=y_true, y_pred=y_pred, sensitive_features=sensitive_features)
        return frame.difference()

    return found


FAIRLEARN = {
    "demographic_parity": demographic_parity_difference,
    "equal_opportunity": equal_opportunity_difference,
    "predictive_equality": difference(false_positive_rate),
    "equalized_odds": equalized_odds_difference,
}


def population(seed: int, n: int = 200, groups: int = 3, classes: int = 2):
    """Logits, targets and groups; every group has every class."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.cartesian_prod(torch.arange(groups), torch.arange(classes))
    rows = torch.randint(len(cells), (n,), generator=generator)
    group, target = torch.cat([cells, cells[rows]]).T
    logits = torch.randn((len(group), classes), generator=generator)
    logits[:, 1] += 0.4 * group
    return logits[:, 1] if classes == 2 else logits, target, group


def evaluated(logits, target, group, **options) -> Evidence:
    told = ("group_names", "class_names", "attribute_names")
    names = {key: options.pop(key) for key in told if key in options}
    batches = list(zip(logits.split(64), target.split(64), group.split(64), strict=True))
    return Fairness(**{"replicates": 20, "min_support": 1, **options}).evaluate(
        Subject(nn.Identity(), batches, **names)
    )


def values(evidence: Evidence) -> dict[str, float | None]:
    return {key.split("/")[1]: figure.value for key, figure in evidence.figures.items()}


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(20, 200))
def test_two_classes_are_as_in_fairlearn(seed, groups, n):
    logits, target, group = population(seed, n, groups)
    evidence = evaluated(logits, target, group)
    arrays = target.numpy(), (logits > 0).long().numpy()
    found = values(evidence)
    for notion, oracle in FAIRLEARN.items():
        assert found[notion] == pytest.approx(oracle(*arrays, sensitive_features=group.numpy()), abs=1e-12)
    for metric in (accuracy_score, zero_one_loss):  # the same gap
        wanted = difference(metric)(*arrays, sensitive_features=group.numpy())
        assert found["accuracy_parity"] == pytest.approx(wanted, abs=1e-12)
    loss = MetricFrame(
        metrics=lambda y, p: log_loss(y, p, labels=[0, 1]),
        y_true=arrays[0], y_pred=logits.double().sigmoid().numpy(), sensitive_features=group.numpy(),
    )  # fmt: skip
    assert found["worst_group_loss"] == pytest.approx(loss.group_max(), rel=1e-9)
    frame = MetricFrame(
        metrics={"selection_rate": selection_rate, "true_positive_rate": true_positive_rate,
                 "false_positive_rate": false_positive_rate, "accuracy": accuracy_score},
        y_true=arrays[0], y_pred=arrays[1], sensitive_features=group.numpy(),
    ).by_group  # fmt: skip
    assert {key.split("/")[1] for key in evidence.bars} == {*frame.columns, "calibration", "auc"}
    for name in frame.columns:
        assert evidence.bars[f"fairness/{name}"].values == pytest.approx(frame[name].tolist())
        assert evidence.bars[f"fairness/{name}"].categories == [f"group {g}" for g in range(groups)]
    assert found["worst_group_accuracy"] == pytest.approx(frame["accuracy"].min())


@pytest.mark.parametrize("seed", range(3))
def test_of_many_classes_the_worst_against_the_rest_counts(seed):
    logits, target, group = population(seed, groups=2, classes=4)
    evidence = evaluated(logits, target, group)
    for notion, oracle in FAIRLEARN.items():
        wanted = max(
            oracle((target == c).numpy(), (logits.argmax(1) == c).numpy(), sensitive_features=group.numpy())
            for c in range(4)
        )
        assert values(evidence)[notion] == pytest.approx(wanted, abs=1e-12)
    arrays, groups = (target.numpy(), logits.argmax(1).numpy()), {"sensitive_features": group.numpy()}
    assert values(evidence)["accuracy_parity"] == pytest.approx(difference(accuracy_score)(*arrays, **groups))
    loss = MetricFrame(
        metrics=lambda y, p: log_loss(y, np.stack(list(p)), labels=range(4)),
        y_true=arrays[0], y_pred=list(logits.double().softmax(1).numpy()), **groups,
    )  # fmt: skip
    assert values(evidence)["worst_group_loss"] == pytest.approx(loss.group_max(), rel=1e-6)
    assert list(evidence.bars) == ["fairness/accuracy", "fairness/calibration"]
    assert not evidence.curves


def test_figures_come_in_the_order_of_display():
    assert list(values(evaluated(*population(0)))) == [
        *TABLE_NOTIONS, "worst_group_accuracy", "worst_group_loss", "calibration", "auc_gap",
    ]  # fmt: skip


def test_without_groups_there_is_a_note():
    subject = Subject(nn.Identity(), [(torch.zeros(4), torch.ones(4))])
    evidence = Fairness().evaluate(subject)
    assert (evidence.figures, evidence.bars) == ({}, {})
    assert evidence.notes == ["No group rates: the batches have no group; if they do, say where with Batch(group=...)."]


def test_unknown_groups_count_nowhere():
    logits, target, group = population(0)
    wanted = values(evaluated(logits, target, group))
    more = [torch.cat([part, part[:9]]) for part in (logits, target, group)]
    more[2][-9:] = -1
    evidence = evaluated(*more)
    assert values(evidence) == wanted
    assert "9 of 215 examples are of unknown group and count in no rate." in evidence.notes
    nobody = evaluated(logits, target, torch.full_like(group, -1))
    assert not nobody.figures
    assert "no example has one" in nobody.notes[0]


def test_an_absent_group_is_no_group():
    logits, target, group = population(0)
    evidence = evaluated(logits, target, 2 * group, group_names=["a", "b", "c", "d", "e"])
    assert values(evidence) == values(evaluated(logits, target, group))
    assert evidence.bars["fairness/accuracy"].categories == ["a", "c", "e"]


def test_a_single_group_has_no_gap():
    logits, target, group = population(0)
    evidence = evaluated(logits, target, torch.zeros_like(group), group_names=["all"])
    assert [values(evidence)[notion] for notion in TABLE_NOTIONS] == [None] * 5
    assert values(evidence)["worst_group_accuracy"] > 0
    assert "There is nothing to compare: all examples are of all." in evidence.notes
    assert not any(f"fairness/{notion}" in evidence.intervals for notion in TABLE_NOTIONS)


def test_a_rate_without_examples_is_not_zero():
    """fairlearn takes the true positive rate of a group without positives for 0, and the gap for 1."""
    logits = torch.tensor([1.0, 1.0, 1.0, -1.0])
    target, group = torch.tensor([1, 0, 0, 0]), torch.tensor([0, 0, 1, 1])
    assert equal_opportunity_difference(target, logits > 0, sensitive_features=group) == 1.0
    evidence = evaluated(logits, target, group, group_names=["a", "b"], class_names=["no", "yes"])
    found = values(evidence)
    assert found["equal_opportunity"] is None
    assert found["equalized_odds"] is None
    assert found["demographic_parity"] == 0.5
    assert evidence.bars["fairness/true_positive_rate"].values == [1.0, None]
    assert any("b has 0 of yes" in note and "cannot be estimated" in note for note in evidence.notes)
    assert "fairness/equal_opportunity" not in evidence.intervals


def test_small_groups_are_named_and_take_no_part():
    logits, target, group = population(0, n=600)
    few = group != 2
    few |= torch.arange(len(group)) < 20
    three = logits[few], target[few], group[few]
    evidence = evaluated(*three, min_support=30, group_names=["a", "b", "c"])
    count = int((group[few] == 2).sum())
    assert 0 < count < 30
    assert any(f"Fewer than 30 examples: c has {count}. " in note for note in evidence.notes)
    two = [part[few & (group != 2)] for part in (logits, target, group)]
    without = values(evaluated(*two, min_support=30))
    assert values(evidence) == pytest.approx(without)
    assert evidence.doubts.keys() == evidence.figures.keys()
    assert {"".join(doubt) for doubt in evidence.doubts.values()} == {"Too few examples to be judged, so not in it: c."}
    assert values(evaluated(*three, min_support=1)) != pytest.approx(without)
    enough = evaluated(logits, target, group, min_support=30)
    assert not any("Fewer" in note for note in enough.notes)
    assert not enough.doubts


def test_a_large_group_with_few_of_a_class_is_judged_where_it_can_be():
    logits, target, group = population(0, n=900)
    keep = (group != 2) | (target == 0) | (torch.arange(len(group)) < 60)
    three = logits[keep], target[keep], group[keep]
    evidence = evaluated(*three, min_support=30, group_names=["a", "b", "c"], class_names=["no", "yes"])
    count = int(((three[2] == 2) & (three[1] == 1)).sum())
    assert any(f"c has {count} of yes" in note for note in evidence.notes)
    everyone = values(evaluated(*three, min_support=1))
    two = values(evaluated(*[part[keep & (group != 2)] for part in (logits, target, group)]))
    assert values(evidence)["demographic_parity"] == everyone["demographic_parity"]
    assert values(evidence)["predictive_equality"] == everyone["predictive_equality"]
    assert values(evidence)["equal_opportunity"] == two["equal_opportunity"]
    assert {key.split("/")[1] for key in evidence.doubts} == {"equal_opportunity", "equalized_odds", "auc_gap"}


def test_with_nobody_to_be_judged_nothing_is_said():
    evidence = evaluated(*population(0), min_support=1000)
    assert set(values(evidence).values()) == {None}
    assert evidence.intervals == evidence.doubts == {}
    assert any("Fewer than 1000 examples" in note for note in evidence.notes)


def test_identifiers_are_not_taken_for_groups():
    n = 60
    evidence = evaluated(torch.ones(n), torch.ones(n), torch.arange(n))
    assert not evidence.figures
    assert "look like identifiers" in evidence.notes[0]


@pytest.mark.parametrize(
    ("logits", "target", "word"),
    [
        (torch.zeros(2, 3), torch.tensor([[0.0, 1, 0], [1, 0, 2]]).long(), "need classes or numbers"),
        (torch.tensor([torch.nan, 1.5]), torch.tensor([0, 1]), "not numbers"),
    ],
)
def test_what_has_no_rates_is_a_note(logits, target, word):
    evidence = evaluated(logits, target, torch.tensor([0, 1]))
    assert not evidence.figures
    assert len(evidence.notes) == 1
    assert re.search(word, evidence.notes[0])


def test_intervals_agree_with_fairlearns_bootstrap():
    """fairlearn bootstraps rows; of two groups the selection rates' difference is its demographic parity."""
    logits, target, group = population(2, n=800, groups=2)
    frame = MetricFrame(
        metrics=selection_rate, y_true=target.numpy(), y_pred=(logits > 0).long().numpy(),
        sensitive_features=group.numpy(), n_boot=150, ci_quantiles=[0.025, 0.975], random_state=0,
    )  # fmt: skip
    wanted = frame.difference_ci()
    found = evaluated(logits, target, group, replicates=2000).intervals["fairness/demographic_parity"]
    assert found == pytest.approx(wanted, abs=0.02)


def test_gaps_come_with_intervals_and_what_chance_would_show():
    evidence = evaluated(*population(0), replicates=300)
    for notion in TABLE_NOTIONS:
        low, high = evidence.intervals[f"fairness/{notion}"]
        assert low < values(evidence)[notion] <= high + 0.05
    assert evidence.figures.keys() - evidence.intervals.keys() == {"fairness/calibration"}
    said = [note for note in evidence.notes if "equal rates would show by chance: demographic parity gap" in note]
    assert len(said) == 1
    shown, corrected = re.findall(r"demographic parity gap ([0-9.]+)%", said[0])
    assert float(shown) < float(
        re.search(r"demographic parity gap [0-9.%]+ \(19 times in 20 up to ([0-9.]+)%", said[0])[1]
    )
    assert float(shown) > 0
    assert float(corrected) < 100 * values(evidence)["demographic_parity"]
    assert evaluated(*population(0), replicates=300) == evidence
    assert evaluated(*population(0), replicates=300, seed=1).intervals != evidence.intervals


def test_a_gap_that_many_draws_cannot_give_has_no_interval():
    logits, target, group = population(0, n=400, groups=2)
    keep = (group == 0) | (target == 0) | (torch.arange(len(group)) < 4)  # a single positive of group 1
    evidence = evaluated(logits[keep], target[keep], group[keep], replicates=500)
    assert values(evidence)["equal_opportunity"] is not None
    assert "fairness/equal_opportunity" not in evidence.intervals
    assert "fairness/demographic_parity" in evidence.intervals


def several_attributes(seed: int = 0, n: int = 600):
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(0, 2, (n, 2), generator=generator)
    target = torch.randint(0, 2, (n,), generator=generator)
    logits = torch.randn(n, generator=generator) + 0.5 * group[:, 0] + 1.0 * (group[:, 0] != group[:, 1])
    return logits, target, group


def test_of_several_attributes_the_worst_counts():
    logits, target, group = several_attributes()
    names = {"group_names": [["f", "m"], ["old", "young"]], "attribute_names": ["sex", "age"]}
    evidence = evaluated(logits, target, group, **names)
    single = [values(evaluated(logits, target, group[:, a])) for a in (0, 1)]
    for notion in TABLE_NOTIONS:
        assert values(evidence)[notion] == max(one[notion] for one in single)
    for key in ("worst_group_loss", "calibration", "auc_gap"):
        assert values(evidence)[key] == pytest.approx(max(one[key] for one in single))
    assert values(evidence)["worst_group_accuracy"] == min(one["worst_group_accuracy"] for one in single)
    bars = evidence.bars["fairness/demographic_parity_by_attribute"]
    assert (bars.categories, bars.values) == (["sex", "age"], [one["demographic_parity"] for one in single])
    assert evidence.bars["fairness/accuracy"].categories == ["sex: f", "sex: m", "age: old", "age: young"]
    crossed = evaluated(logits, target, group, intersections=True, **names)
    four = values(evaluated(logits, target, group[:, 0] * 2 + group[:, 1]))
    assert four["demographic_parity"] > values(evidence)["demographic_parity"]
    assert values(crossed)["demographic_parity"] == four["demographic_parity"]
    assert crossed.bars["fairness/accuracy"].categories[-1] == "sex, age: m, young"
    assert "attribute 1: group 0" in evaluated(logits, target, group).bars["fairness/auc"].categories


def test_an_attribute_that_cannot_be_judged_does_not_hide_the_others():
    logits, target, group = several_attributes()
    wanted = values(evaluated(logits, target, group[:, 0]))
    for second, word in ((torch.arange(600), "identifiers"), (torch.full((600,), -1), "no example has one")):
        evidence = evaluated(logits, target, torch.stack([group[:, 0], second], 1))
        assert values(evidence) == wanted
        assert any(word in note and "attribute 1" in note for note in evidence.notes)
    alike = evaluated(logits, target, torch.stack([group[:, 0], torch.zeros(600).long()], 1))
    assert values(alike)["demographic_parity"] == wanted["demographic_parity"]
    assert "There is nothing to compare: all examples are of group 0." in alike.notes
    some = group.clone()
    some[:9, 1] = -1
    assert "9 of 600 examples are of unknown attribute 1 and count in no rate." in evaluated(logits, target, some).notes


def test_names_for_other_attributes_are_refused():
    with pytest.raises(ValueError, match="group_names name 1 attribute and the group has 2"):
        evaluated(*several_attributes(), group_names=["a", "b"])
    logits, target, _ = population(0)
    evidence = evaluated(logits, target, torch.zeros(len(target), 30).long())
    assert "30 columns of the group are more than attributes" in evidence.notes[0]


def test_of_several_labels_the_worst_counts():
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(0, 2, (500,), generator=generator)
    target = torch.randint(0, 2, (500, 3), generator=generator)
    logits = torch.randn(500, 3, generator=generator) + group[:, None] * torch.tensor([0.1, 0.9, 0.3])
    evidence = evaluated(logits, target, group)
    single = [values(evaluated(logits[:, k], target[:, k], group)) for k in range(3)]
    for notion in TABLE_NOTIONS:
        assert values(evidence)[notion] == max(one[notion] for one in single)
    assert values(evidence)["worst_group_accuracy"] == min(one["worst_group_accuracy"] for one in single)
    for key in ("calibration", "auc_gap"):
        assert values(evidence)[key] == pytest.approx(max(one[key] for one in single))
    change = paired_change(
        evidence.tensors["fairness/group"], target, evidence.tensors["fairness/decision"], (logits > 0.2).long(),
        "equalized_odds",
    )  # fmt: skip
    assert change.first == values(evidence)["equalized_odds"]
    few = evaluated(logits[:80], target[:80], group[:80], min_support=30, class_names=["x", "y", "z"])
    assert any(" of value 1 of z" in note for note in few.notes)


def test_with_very_many_cells_fewer_samples_are_drawn(monkeypatch):
    from lightning_guard.evaluation import table as module

    monkeypatch.setattr(module, "_WORK", 1000)
    evidence = evaluated(*population(0), replicates=900)
    assert "Intervals are of 500 samples, for the time's sake." in evidence.notes
    wide = evaluated(torch.randn(40, 60), torch.ones(40, 60), torch.arange(40) % 2)
    assert wide.notes == ["No group rates: 60 labels are more than 50."]


def test_other_arms_are_compared_by_what_is_left():
    logits, target, group = population(0, groups=2)
    evidence = evaluated(logits, target, 5 * group)
    left = evidence.tensors
    assert {key: part.dtype for key, part in left.items()} == {
        "fairness/group": torch.int16, "fairness/target": torch.int8, "fairness/decision": torch.int8,
    }  # fmt: skip
    assert torch.equal(left["fairness/group"], group.to(torch.int16))
    assert torch.equal(left["fairness/target"].long(), target)
    other = (logits > 0.5).long()
    change = paired_change(left["fairness/group"], left["fairness/target"], left["fairness/decision"], other)
    assert change.first == values(evidence)["demographic_parity"]
    logits, target, group = several_attributes()
    evidence = evaluated(logits, target, group, intersections=True, min_support=30)
    assert torch.equal(evidence.tensors["fairness/group"], group.to(torch.int16))
    left = [evidence.tensors[f"fairness/{part}"] for part in ("group", "target", "decision")]
    change = paired_change(*left, (logits > 1).long(), "equalized_odds", intersections=True)
    assert change.first == values(evidence)["equalized_odds"]
    wide = evaluated(torch.randn(300, 200), torch.arange(300) % 200, torch.arange(300) % 2, min_support=1)
    assert wide.tensors["fairness/decision"].dtype == torch.int16


def test_infinite_logits_are_decided_and_ranked():
    logits, target, group = population(0)
    big = torch.where(logits > 1.5, torch.inf, logits)
    evidence = evaluated(big, target, group)
    found, finite = values(evidence), values(evaluated(logits.clamp_max(1.5) + (logits > 1.5), target, group))
    assert found["worst_group_loss"] is None
    assert any("infinite" in note for note in evidence.notes)
    assert found["demographic_parity"] == finite["demographic_parity"]
    assert found["auc_gap"] == pytest.approx(finite["auc_gap"])


@pytest.mark.parametrize("options", [{"min_support": 0}, {"replicates": 0}, {"bins": 0}])
def test_what_is_no_number_is_refused_by_name(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=0"):
        Fairness(**options)
