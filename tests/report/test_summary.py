import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lightning_guard.report import document as documents
from lightning_guard.report.summary import checks, headlines, in_order, summarise, word
from tests.report.example import comparison, digest

NUMBER = st.one_of(st.none(), st.floats(-1e6, 1e6, allow_nan=False), st.integers(-5, 5))


def summary(results):
    prepared = documents.prepare(results)
    return {(entry["figure"], entry["arm"]): entry for entry in summarise(prepared)}


@settings(deadline=None, max_examples=50)
@given(
    table=st.lists(st.tuples(NUMBER, NUMBER), min_size=1, max_size=6), better=st.sampled_from(["higher", "lower", None])
)
def test_statistics_are_those_of_numpy(table, better):
    results = comparison(arms=2, seeds=len(table), curves=False, bars=False)
    results["figures"]["task/accuracy"]["better"] = better
    for run in results["runs"]:
        run["values"]["task/accuracy"] = table[run["seed"]][int(run["arm"][-1])]
    entries = summary(results)

    for arm in (0, 1):
        values = np.array([row[arm] for row in table if row[arm] is not None], dtype=np.float64)
        entry = entries["task/accuracy", f"arm-{arm}"]
        assert entry["n"] == len(values)
        for key, count, statistic in (
            ("mean", 1, np.mean),
            ("min", 1, np.min),
            ("max", 1, np.max),
            ("sd", 2, lambda x: np.std(x, ddof=1)),
        ):
            if len(values) < count:
                assert entry[key] is None
            else:
                assert entry[key] == pytest.approx(statistic(values), rel=1e-9, abs=1e-6)

    assert entries["task/accuracy", "arm-0"]["paired"] is None
    differences = np.array([b - a for a, b in table if a is not None and b is not None], dtype=np.float64)
    paired = entries["task/accuracy", "arm-1"]["paired"]
    assert paired["n"] == len(differences)
    if len(differences):
        assert paired["mean"] == pytest.approx(differences.mean(), rel=1e-9, abs=1e-6)
        assert (paired["lowest"], paired["highest"]) == (differences.min(), differences.max())
    if len(differences) < 3:
        assert paired["interval"] is None
    else:
        own = stats.t.interval(0.95, len(differences) - 1, differences.mean(), stats.sem(differences) or 1e-300)
        assert paired["interval"] == pytest.approx(list(own), rel=1e-6, abs=1e-6)
    signs = {int(sign) for sign in np.sign(differences)}
    expected = {0: "not measured", 1: "one seed"}.get(len(differences)) or (
        "same" if signs == {0} else
        "seeds disagree" if len(signs) > 1 else
        {(1, "higher"): "better", (-1, "lower"): "better", (1, "lower"): "worse", (-1, "higher"): "worse",
         (1, None): "higher", (-1, None): "lower"}[signs.pop(), better]
    )  # fmt: skip
    assert paired["word"] == expected


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1, 1), max_size=6))
def test_turning_the_direction_turns_the_word(differences):
    turned = {"better": "worse", "worse": "better"}
    assert word(differences, "lower") == turned.get(word(differences, "higher"), word(differences, "higher"))


def test_a_difference_of_zero_agrees_with_no_sign():
    assert word([0.1, 0.0, 0.2], "higher") == "seeds disagree"


def test_pairs_are_by_seed_whatever_the_order_of_the_runs():
    results = comparison(arms=2, seeds=3)
    turned = {**results, "runs": results["runs"][::-1]}
    assert summary(results) == summary(turned)


def test_without_a_baseline_nothing_is_compared():
    results = comparison(arms=2)
    results["arms"][0]["baseline"] = False
    assert all(entry["paired"] is None for entry in summary(results).values())


def test_shared_hashes_leave_no_line():
    assert checks(documents.prepare(comparison())) == []


def test_a_different_data_order_is_a_line():
    results = comparison(arms=3, seeds=3)
    for run in results["runs"]:
        if run["arm"] == "arm-2" and run["seed"] != 0:
            run["data_order_sha256"] = digest("another")
    results["runs"][0]["initial_weights_sha256"] = None
    assert checks(documents.prepare(results)) == [
        "It was not recorded whether arm-0 started from the same weights for seed 0.",
        "The arms were not trained on the same data order for seeds 1, 2: arm-2 differs from arm-0.",
    ]


def test_a_missing_run_is_a_line():
    results = comparison(arms=2, seeds=3)
    results["runs"] = [run for run in results["runs"] if (run["arm"], run["seed"]) != ("arm-1", 2)]
    assert checks(documents.prepare(results)) == ["There is no run of arm-1 for seed 2."]
    assert {entry["paired"]["n"] for (_, arm), entry in summary(results).items() if arm == "arm-1"} == {2}


def test_axes_have_their_places_and_unknown_ones_follow():
    results = comparison()
    spec = {"label": "Doubt", "unit": "ratio", "better": "lower", "about": "Unheard of."}
    results["figures"] = {"doubt/much": {"axis": "doubt", **spec}, **dict(reversed(results["figures"].items()))}
    prepared = documents.prepare(results)
    axes = [prepared["figures"][key]["axis"] for key in in_order(prepared["figures"])]
    assert axes == ["task", "robustness", "fairness", "efficiency", "cost", "doubt"]


def test_headlines_are_chosen_without_looking_at_the_values():
    results = comparison(arms=2)
    extra = {"axis": "task", "label": "Loss", "unit": "nats", "better": "lower", "about": "Mean."}
    results["figures"]["task/loss"] = extra
    results["figures"]["task/f1"] = {**extra, "label": "F1", "better": "higher"}
    for run in results["runs"]:
        run["values"] |= {"task/loss": 0.1, "task/f1": None, "cost/time": None}
    axes = ["task/accuracy", "robustness/pgd", "fairness/rate", "efficiency/bytes"]
    assert headlines(documents.prepare(results)) == axes  # cost has no value, and nothing to show
    results["figures"]["task/loss"]["headline"] = True
    assert headlines(documents.prepare(results)) == ["task/loss", *axes[1:]]


def test_the_largest_values_stay_finite():
    results = comparison(arms=2)
    for run in results["runs"]:
        run["values"]["task/accuracy"] = 1e300 if run["arm"] == "arm-0" else -1e300
    entry = summary(results)["task/accuracy", "arm-1"]
    assert all(math.isfinite(entry["paired"][key]) for key in ("mean", "lowest", "highest"))
