"""Sweeps are recognised, and their fronts are those of brute force."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_guard.report import ReportError, document, front, html, load_report, markdown, write_report
from lightning_guard.report.computed import computed
from lightning_guard.report.front import fronts, recognised
from tests.report.example import HOSTILE, comparison
from tests.report.test_page import check

GAP = {"axis": "fairness", "label": "Demographic parity gap", "unit": "fraction", "better": "lower", "about": "Gap."}


def guard(name="fairness", **options):
    return {"name": name, "promise": "Keeps its promise.", "options": {"notion": "demographic_parity", **options}}


def swept(pairs, seeds=1, names=None):
    """A baseline and a sweep with these (gap, accuracy) of each arm, the baseline first; seeds lie around them."""
    names = names or ["none", *(f"fairness max_gap={i}" for i in range(1, len(pairs)))]
    results = comparison(arms=names, seeds=seeds, curves=False, bars=False)
    results["figures"]["fairness/demographic_parity"] = GAP
    for i, (arm, (gap, accuracy)) in enumerate(zip(results["arms"], pairs, strict=True)):
        if i:
            arm["guards"] = [guard(max_gap=0.1 * i)]
            arm["sweep"] = {"key": "guards.fairness.max_gap", "value": 0.1 * i, "of": "fairness"}
        for run in (run for run in results["runs"] if run["arm"] == arm["name"]):
            off = 0.01 * (run["seed"] - (seeds - 1) / 2)
            run["values"] |= {"fairness/demographic_parity": gap + off, "task/accuracy": accuracy - off}
            run["intervals"] = {"task/accuracy": [accuracy - 0.05, accuracy + 0.05]}
    return results


def finished(results):
    return computed(document.prepare(results)) | {"checks": []}


def references():
    def run(method, bound, seed, gap, accuracy):
        values = {"fairness/demographic_parity": gap, "task/accuracy": accuracy}
        return {
            "method": method,
            "bound": bound,
            "seed": seed,
            "values": values,
            "intervals": {"task/accuracy": [0, 1]},
        }

    return {
        "methods": {
            "threshold_optimizer": {"label": "ThresholdOptimizer", "about": "Needs the group."},
            "exponentiated_gradient": {"label": "ExponentiatedGradient", "about": "Randomised."},
        },
        "runs": [
            run("threshold_optimizer", 0.05, 0, 0.04, 0.80),
            run("threshold_optimizer", 0.05, 1, 0.06, 0.84),
            run("exponentiated_gradient", 0.05, None, 0.07, 0.81),
        ],
        "notes": ["A method is not shown."],
    }


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=8))
def test_the_front_is_that_of_brute_force(pairs):
    pairs = [(gap / 10, accuracy / 10) for gap, accuracy in pairs]
    (found,) = fronts(finished(swept(pairs)))
    for point, (gap, accuracy) in zip(found["points"], pairs, strict=True):
        beaten = False
        for other_gap, other_accuracy in pairs:  # lower gaps and higher accuracies are better
            as_good = other_gap <= gap and other_accuracy >= accuracy
            beaten = beaten or (as_good and (other_gap, other_accuracy) != (gap, accuracy))
        assert point["front"] is not beaten


def test_points_are_means_with_the_range_of_the_seeds():
    (found,) = finished(swept([(0.2, 0.8), (0.1, 0.7), (0.15, 0.6)], seeds=3))["fronts"]
    assert (found["of"], found["keys"]) == ("fairness", ["guards.fairness.max_gap"])
    assert (found["x"], found["y"]) == ("fairness/demographic_parity", "task/accuracy")
    base, first, second = found["points"]
    assert [point["kind"] for point in found["points"]] == ["baseline", "swept", "swept"]
    assert [point["label"] for point in found["points"]] == ["none", "0.1", "0.2"]
    assert first["x"] == pytest.approx(0.1)
    assert first["x_interval"] == pytest.approx([0.09, 0.11])
    assert first["y_interval"] == pytest.approx([0.69, 0.71])
    assert first["over"] == "seeds"
    assert [base["front"], first["front"], second["front"]] == [True, True, False]


def test_one_seed_has_the_interval_of_the_test_set():
    (found,) = finished(swept([(0.2, 0.8), (0.1, 0.7), (0.15, 0.6)]))["fronts"]
    assert found["points"][1]["y_interval"] == pytest.approx([0.65, 0.75])
    assert found["points"][1]["x_interval"] is None
    assert found["points"][1]["over"] == "test set"


def test_what_is_no_part_of_the_sweep_stands_beside_it():
    results = swept([(0.2, 0.8), (0.1, 0.7), (0.15, 0.75), (0.01, 0.99)])
    del results["arms"][3]["sweep"]
    results["arms"][3]["guards"] = [guard("magnitude_pruning", sparsity=0.5)]
    (found,) = finished(results)["fronts"]
    assert [point["kind"] for point in found["points"]] == ["baseline", "swept", "swept", "other"]
    assert [point["front"] for point in found["points"]] == [True, True, True, False]


def test_a_guard_without_its_figure_has_no_front():
    results = swept([(0.2, 0.8), (0.1, 0.7), (0.15, 0.75)])
    for arm in results["arms"][1:]:
        arm["guards"][0]["options"]["notion"] = "calibration"  # of which no figure was measured
    assert finished(results)["fronts"] == []
    results = swept([(0.2, 0.8), (0.1, 0.7), (0.15, 0.75)])
    for arm in results["arms"][1:]:
        arm["sweep"]["key"] = "guards.trimmed_loss.fraction"
    assert finished(results)["fronts"] == []


def test_a_swept_notion_makes_a_front_of_each():
    results = swept([(0.2, 0.8), (0.1, 0.7), (0.15, 0.6), (0.1, 0.7), (0.15, 0.6)])
    results["figures"]["fairness/equalized_odds"] = {**GAP, "label": "Equalized odds gap"}
    for i, arm in enumerate(results["arms"][1:]):
        notion = "equalized_odds" if i > 1 else "demographic_parity"
        arm["guards"] = [guard(max_gap=0.1 * (i % 2), notion=notion)]
        arm["sweep"] |= {"value": 0.1 * (i % 2), "also": [{"key": "guards.fairness.notion", "value": notion}]}
    for run in results["runs"]:
        run["values"]["fairness/equalized_odds"] = 0.3
    found = finished(results)["fronts"]
    assert [one["x"] for one in found] == ["fairness/demographic_parity", "fairness/equalized_odds"]
    assert [point["label"] for point in found[1]["points"]][-2:] == ["0, equalized_odds", "0.1, equalized_odds"]
    assert [point["kind"] for point in found[1]["points"]].count("swept") == 2


def card(name, *guards, baseline=False):
    return {"name": name, "baseline": baseline, "guards": list(guards)}


def test_arms_that_differ_in_one_option_are_a_sweep():
    arms = [
        card("none", baseline=True),
        card("weak", guard(weight=1.0, memory=0.9)),
        card("strong", guard(weight=2.0, memory=0.9)),
        card("small", guard("magnitude_pruning", sparsity=0.5)),
    ]
    assert recognised(arms) == {
        "weak": {"of": "fairness", "key": "guards.fairness.weight", "value": 1.0},
        "strong": {"of": "fairness", "key": "guards.fairness.weight", "value": 2.0},
    }
    assert recognised([*arms, card("other", guard(weight=3.0, memory=0.5))]) == {}  # two options differ
    assert recognised([*arms, card("again", guard(weight=1.0, memory=0.9))]) == {}  # two arms do not differ
    assert recognised([{**arms[1], "baseline": True}, arms[2]]) == {}
    assert recognised([{**arms[1], "sweep": {"of": "x"}}, arms[2]]) == {}
    both = [card(str(i), guard(weight=1.0), guard("magnitude_pruning", sparsity=i)) for i in (0.5, 0.9)]
    assert recognised(both)["0.5"]["of"] == "fairness+magnitude_pruning"
    assert recognised(both)["0.9"]["key"] == "guards.magnitude_pruning.sparsity"


def test_the_page_and_the_text_show_the_front():
    results = swept([(0.2, 0.8), (0.1, 0.7), (0.15, 0.6)], seeds=2)
    results["references"] = references()
    report = finished(results)
    read = check(html.page(report))
    labels = [svg["aria-label"] for svg in read.having("svg") if "aria-label" in svg]
    (said,) = [label for label in labels if label.startswith("Front of fairness")]
    assert "fairness max_gap=1 70.0% at 10.0%, on the front" in said
    assert "fairness max_gap=2 60.0% at 15.0%;" in said
    assert "ThresholdOptimizer at 0.05 82.0% at 5.0%" in said  # the mean of both seeds
    assert not any(label.startswith("Accuracy against Demographic parity gap") for label in labels)
    words = " ".join(" ".join(read.words).split())
    assert "ThresholdOptimizer: Needs the group." in words
    assert "A method is not shown." in words
    text = markdown.text(report)
    assert "| max_gap | Demographic parity gap | Accuracy | On front |" in text
    assert "| 0.1 | 10.0% (9.5 to 10.5%) | 70.0% (69.5 to 70.5%) | yes |" in text
    assert "| ThresholdOptimizer at 0.05 | 5.0% (4.0 to 6.0%) | 82.0% (80.0 to 84.0%) |  |" in text


def test_hostile_names_in_a_front_do_nothing():
    results = swept([(0.1 * i, 0.1 * i) for i in range(len(HOSTILE))], names=list(HOSTILE))
    for arm, value in zip(results["arms"][1:], HOSTILE, strict=False):
        arm["sweep"] |= {"value": value, "of": HOSTILE[1]}
    results["references"] = references()
    results["references"]["methods"]["threshold_optimizer"] = {"label": HOSTILE[1], "about": HOSTILE[0]}
    report = finished(results)
    assert len(report["fronts"]) == 1
    read = check(html.page(report))
    assert HOSTILE[0] in "".join(read.words)
    assert "<script" not in markdown.text(report).replace("\\<script", "")


def test_a_sweep_survives_writing_and_reading(tmp_path):
    results = swept([(0.2, 0.8), (0.1, 0.7), (0.15, 0.6)], seeds=2)
    results["references"] = references()
    write_report(results, tmp_path / "one")
    report = load_report(tmp_path / "one")
    assert report["arms"][1]["sweep"] == {"key": "guards.fairness.max_gap", "value": 0.1, "of": "fairness"}
    write_report(report, tmp_path / "two")
    for name in ("report.json", "report.html", "report.md", "metrics.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_document_without_sweeps_is_read_as_before(tmp_path):
    write_report(comparison(), tmp_path)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written.pop("fronts") == []
    (tmp_path / "report.json").write_text(json.dumps(written))  # as an older version left it
    assert "fronts" not in load_report(tmp_path)
    check(html.page(load_report(tmp_path)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda r: r["arms"][1]["sweep"].pop("key"), r"arms\[1\].sweep: 'key' is a required"),
        (lambda r: r["references"]["runs"][0].update(method="threshold"), "'threshold' is not in references.methods"),
        (
            lambda r: r.update(changes=[{"figure": "fairness/x", "arm": "fair", "n": 1, "difference": 0.0,
                                         "interval": [0, 0], "p": 1.0, "narrower": 0}]),
            "'fair' is not in arms",
        ),
        (
            lambda r: r.update(data={"figures": [], "notes": [], "bars": [
                {"key": "x", "categories": ["a", "b"], "values": [1], "label": "x", "y_label": "", "y_unit": "",
                 "about": ""}]}),
            "1 values for 2 categories",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change, named):
    results = swept([(0.2, 0.8), (0.1, 0.7), (0.15, 0.6)])
    results["references"] = references()
    change(results)
    with pytest.raises(ReportError, match=named):
        document.prepare(results)


def test_a_front_reads_alike_whatever_the_scale():
    report = finished(swept([(0.2, 0.8), (0.1, 0.7), (0.15, 0.6)]))
    picture = front.drawn(report, report["fronts"][0], 0)
    assert picture.title == "Front of fairness: Accuracy against demographic parity gap"
    assert "95% intervals of the test set" in picture.about
