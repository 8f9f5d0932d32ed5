"""What a report claims, and what is asked of it."""

import numpy as np
import pytest
from scipy import stats

from lightning_guard.report import document as documents
from lightning_guard.report import html, markdown
from lightning_guard.report.computed import computed
from lightning_guard.report.gates import GateError, passed, rules, stated
from lightning_guard.report.public import publishable
from lightning_guard.report.verdict import answers, certainty, outcome, verdicts
from tests.report.example import HOSTILE, comparison


def made(effects, seeds=8, spread=0.01, better="higher", accept=None, arms=None):
    """A report on accuracy whose arms differ from the baseline by these effects on average."""
    draw = np.random.default_rng(0)
    names = arms or ["none", *(f"arm-{i}" for i in range(len(effects)))]
    results = comparison(arms=names, seeds=seeds, curves=False, bars=False)
    results["figures"] = {"task/accuracy": {**results["figures"]["task/accuracy"], "better": better}}
    noise = draw.normal(size=(len(names), seeds))
    noise -= noise.mean(1, keepdims=True)  # so that means are what they are said to be
    for run in results["runs"]:
        effect = dict(zip(names, [0.0, *effects], strict=True))[run["arm"]]
        run["values"] = {"task/accuracy": 0.8 + effect + spread * noise[names.index(run["arm"]), run["seed"]]}
        run["intervals"] = {"task/accuracy": [run["values"]["task/accuracy"] - 0.02, 0.9]}
    if accept is not None:
        asked = [rule for name in names[1:] for rule in rules(accept, [name], ["task"])]
        results["accept"] = {"inconclusive": stated(accept), "rules": asked}
    return computed(documents.prepare(results))


def test_claims_are_the_paired_tests_of_scipy_corrected_together():
    report = made([0.1, 0.002, -0.1])
    values = {
        arm: [run["values"]["task/accuracy"] for run in report["runs"] if run["arm"] == arm]
        for arm in ("none", "arm-0", "arm-1", "arm-2")
    }
    for claim in report["claims"]:
        found = stats.ttest_rel(values[claim["arm"]], values["none"])
        assert claim["p"] == pytest.approx(found.pvalue)
        assert claim["interval"] == pytest.approx(list(found.confidence_interval(0.95)))
        assert claim["holm_p"] >= claim["p"]
    assert [claim["verdict"] for claim in report["claims"]] == ["better", "inconclusive", "worse"]
    words = [[heading for heading, _, _ in verdict.findings] for verdict in verdicts(report)]
    assert [each[0].split(",")[0] for each in words] == ["Better", "Inconclusive", "Worse"]
    assert "seeds would tell" in str(verdicts(report)[1].findings[0][2][0])
    assert "all 3 claims" in certainty(report)


def test_few_seeds_claim_nothing_and_say_how_many_would():
    report = made([0.1], seeds=3)
    claim = report["claims"][0]
    assert (claim["verdict"], claim["holm_p"], claim["seeds_needed"]) == ("inconclusive", None, 6)
    assert "cannot give a p-value below 0.25" in certainty(report)
    assert verdicts(report)[0].findings[0][0] == "Inconclusive, better in every seed"


def test_one_seed_has_no_interval():
    claim = made([0.1], seeds=1)["claims"][0]
    assert (claim["interval"], claim["p"], claim["verdict"], claim["seeds_needed"]) == (
        None,
        None,
        "inconclusive",
        None,
    )


def test_more_claims_make_each_of_them_harder():
    alone = made([0.012], seeds=8)["claims"][0]
    among = made([0.012, *[0.0] * 20], seeds=8)["claims"]
    assert alone["holm_p"] == alone["p"]
    assert among[0]["holm_p"] > among[0]["p"]


def test_bca_stands_beside_from_twenty_seeds_on():
    assert made([0.1], seeds=19)["claims"][0]["bca"] is None
    claim = made([0.1], seeds=20)["claims"][0]
    assert claim["bca"] == pytest.approx(claim["interval"], abs=0.005)


def test_equivalence_is_claimed_where_it_was_asked_for():
    report = made([0.0, 0.1], accept={"task/accuracy": {"within": 0.05}})
    assert [claim["verdict"] for claim in report["claims"]] == ["equivalent", "better"]
    assert report["claims"][0]["margin"] == 0.05
    assert [gate["state"] for gate in report["gates"]] == ["met", "not met"]


@pytest.mark.parametrize(
    ("effect", "better", "limits", "state"),
    [
        (-0.10, "higher", {"change": -0.02}, "not met"),
        (-0.01, "higher", {"change": -0.05}, "met"),
        (-0.05, "higher", {"change": -0.05}, "inconclusive"),
        (0.10, "lower", {"change": 0.02}, "not met"),
        (-0.10, "lower", {"change": -0.05}, "met"),  # must fall by so much
        (-0.10, "higher", {"change": {"max": -0.05}}, "met"),
        (0.0, None, {"change": 0.1}, "not measured"),  # neither side is worse
        (0.0, None, {"change": {"max": 0.1}}, "met"),
        (0.0, "higher", {"min": 0.7}, "met"),
        (0.0, "higher", {"min": 0.79}, "inconclusive"),  # the seeds hold, the test set does not say so
        (0.0, "higher", {"max": 0.5}, "not met"),
        (0.0, "higher", {"max": 0.95}, "met"),
    ],
)
def test_gates(effect, better, limits, state):
    report = made([effect], better=better, accept={"task/accuracy": limits})
    assert [gate["state"] for gate in report["gates"]] == [state]
    assert passed(report) == (state == "met")
    assert ("Passed" in outcome(report)) == (state == "met")


def test_an_inconclusive_gate_lets_pass_if_that_is_said_and_a_missing_one_never():
    accept = {"task/accuracy": {"change": -0.05}, "task/nothing": {"min": 0.1}}
    report = made([-0.05], accept={"inconclusive": "pass", **accept})
    assert [(gate["state"], gate["passed"]) for gate in report["gates"]] == [
        ("inconclusive", True),
        ("not measured", False),
    ]
    assert answers(report)[0].state == "inconclusive, let pass"


def test_one_seed_decides_no_gate():
    assert made([0.0], seeds=1, accept={"task/accuracy": {"min": 0.1}})["gates"][0]["state"] == "inconclusive"


@pytest.mark.parametrize(
    ("accept", "said"),
    [
        ({"robustness/accuracy": {"min": 0.5}}, "no figure of an axis that is measured"),
        ({"accuracy": {"min": 0.5}}, "no figure of an axis that is measured"),
        ({"task/accuracy": 0.5}, "states no limit"),
        ({"task/accuracy": {}}, "states no limit"),
        ({"task/accuracy": {"mni": 0.5}}, "no limit 'mni'"),
        ({"task/accuracy": {"min": "high"}}, "no number"),
        ({"task/accuracy": {"min": True}}, "no number"),
        ({"task/accuracy": {"within": 0}}, "holds no difference"),
        ({"task/accuracy": {"change": {"up": 1}}}, "no side 'up'"),
        ({"inconclusive": "maybe"}, "give fail or pass"),
    ],
)
def test_what_cannot_be_asked_is_refused(accept, said):
    with pytest.raises(GateError, match=said):
        (rules(accept, ["small"], ["task"]), stated(accept))


def test_gates_with_hostile_names_are_shown_and_do_nothing():
    report = made([0.0] * (len(HOSTILE) - 1), arms=list(HOSTILE), accept={"task/accuracy": {"min": 0.5}})
    page, text = html.page(report), markdown.text(report)
    assert page.count("<script") == page.count("onerror=alert(1)>") == 0
    assert "[b](javascript" not in text
    assert len(answers(report)) == len(HOSTILE) - 1


def test_what_guards_say_of_their_promise_stands_beside_it_once():
    results = comparison(arms=2, seeds=3)
    for run in results["runs"]:
        if run["arm"] == "arm-1":
            run["notes"] = [f"a_guard: max_gap=0.05 was not reached; the smallest was 0.{run['seed'] + 1}", "other: no"]
    report = computed(documents.prepare(results))
    said = "a_guard: max_gap=0.05 was not reached; the smallest was 0.1 (Alike in 2 further runs.)"
    assert verdicts(report)[0].told == [said]
    assert said in html.page(report)


def test_a_promise_that_one_seed_missed_is_told_first():
    results = comparison(arms=2, seeds=3)
    for run in results["runs"]:
        if run["arm"] == "arm-1":
            kept = "was not reached" if run["seed"] == 2 else "is kept"
            run["notes"] = ["a_guard: first", "a_guard: second", "a_guard: third", f"a_guard: max_gap=0.05 {kept}"]
    report = computed(documents.prepare(results))
    first, second, *_ = verdicts(report)[0].told
    assert first == "a_guard: max_gap=0.05 was not reached (Seed 2.)"
    assert second == "a_guard: max_gap=0.05 is kept (Seeds 0, 1.)"
    assert first in html.page(report)


def test_publishing_several_private_models_adds_up():
    results = comparison(arms=2, seeds=3)
    results["figures"]["privacy/epsilon"] = {
        "axis": "privacy", "label": "Epsilon", "unit": "", "better": "lower", "about": "Of one model.",
    }  # fmt: skip
    for run in results["runs"]:
        run["values"]["privacy/epsilon"] = 2.5 if run["arm"] == "arm-1" else None
    limits = publishable(computed(documents.prepare(results)))["limits"]
    assert "The 3 models of arm-1 together have an epsilon of at most 7.5" in limits[1]
    assert not any("arm-0 together" in limit for limit in limits)


def test_what_examples_say_stands_apart_from_the_seeds():
    results = comparison(arms=2, seeds=2)
    seeds = [{"seed": 0, "gained": 5, "lost": 1_205, "p": 0.00001}, {"seed": 1, "gained": 7, "lost": 9, "p": 0.62}]
    results["matched"] = [
        {"figure": "task/accuracy", "arm": "arm-1", "n": 2, "examples": 5000, "difference": -0.12,
         "interval": [-0.13, -0.11], "seeds": seeds},
    ]  # fmt: skip
    report = computed(documents.prepare(results))
    text = markdown.text(report)
    assert "| arm-1 | −12.0 pts (−13.0 to −11.0 pts) | 5, 7 | 1,205, 9 | \\< 0.001, 0.62 |" in text
    assert "Only arm-0 right" in html.page(report)
