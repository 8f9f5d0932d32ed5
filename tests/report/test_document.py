import copy
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lightning_guard.report import ReportError, document, load_report, write_report
from tests.report.example import comparison


def changed(path, value):
    """Returns a comparison with one thing set (or, with ``...``, removed)."""
    results = comparison()
    *parents, last = path
    place = results
    for part in parents:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return results


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("schema",), 2, "schema"),
        (("title",), "  ", "title"),
        (("surplus",), 1, "surplus"),
        (("created",), "yesterday", "created"),
        (("created",), "2026-11-21T18:00:00+02:00", "created"),
        (("created",), "2026-13-41T18:00:00Z", "created"),
        (("provenance", "config_sha256"), "abc", "provenance.config_sha256"),
        (("provenance", "machine", "cores"), 0, "provenance.machine.cores"),
        (("provenance", "seeds"), [0], "runs[1].seed: 1 is not in provenance.seeds"),
        (("arms",), [], "arms"),
        (("arms", 1, "baseline"), True, "arms"),
        (("arms", 1, "name"), "arm-2", "'arm-2' is there twice"),
        (("arms", 0, "guards"), [{"name": "x"}], "arms[0].guards[0]"),
        (("figures",), {}, "figures"),
        (("figures", "task/accuracy", "better"), "bigger", "figures.task/accuracy.better"),
        (("figures", "task/accuracy", "color"), "red", "color"),
        (("runs", 0, "arm"), "arm-00", "runs[0].arm: 'arm-00' is not in arms; did you mean 'arm-0'?"),
        (("runs", 0, "seed"), 1, "runs[1]: a second run of arm 'arm-0' with seed 1"),
        (("runs", 0, "values", "task/acuracy"), 1.0, "did you mean 'task/accuracy'?"),
        (("runs", 0, "values", "task/accuracy"), "0.9", "runs[0].values.task/accuracy"),
        (("runs", 0, "values", "task/accuracy"), True, "runs[0].values.task/accuracy"),
        (("runs", 0, "curves", "robustness/eps"), {"x": [1, 2], "y": [1]}, "2 x and 1 y"),
        (("runs", 0, "curves", "robustness/eps"), {"x": [None], "y": [1]}, "runs[0].curves.robustness/eps.x[0]"),
        (("runs", 0, "bars", "fairness/rates"), [1.0], "1 values for 2 categories"),
        (("runs", 0, "intervals"), {"task/accuracy": [0.1]}, "runs[0].intervals.task/accuracy"),
        (("runs", 0, "intervals"), {"task/other": [0.1, 0.2]}, "'task/other' is not in figures"),
        (("runs", 0, "data_order_sha256"), ..., "data_order_sha256"),
        (("arms", 1, "guards", 0, "options", "made"), object(), "is a object"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(tmp_path, path, value, said):
    with pytest.raises(ReportError) as caught:
        write_report(changed(path, value), tmp_path / "report")
    assert said in str(caught.value)
    assert not (tmp_path / "report").exists()


def test_all_problems_come_at_once():
    results = changed(("created",), "yesterday")
    results["arms"][0]["surplus"] = results["runs"][0]["surplus"] = 1
    with pytest.raises(ReportError) as caught:
        document.prepare(results)
    assert str(caught.value).count("\n") == 3


def test_preparing_leaves_what_was_given_alone():
    results = comparison()
    before = copy.deepcopy(results)
    document.prepare(results)
    assert results == before


def test_names_that_read_the_same_are_not_merged():
    results = comparison()
    results["figures"]["task/accuracy\u200e"] = results["figures"]["task/accuracy"]
    with pytest.raises(ReportError, match="read the same"):
        document.prepare(results)


def test_preparing_twice_changes_nothing_more():
    once = document.prepare(comparison())
    assert document.prepare(once) == once


def test_numbers_that_json_lacks():
    results = comparison()
    values = results["runs"][0]["values"]
    values |= {"task/accuracy": float("nan"), "cost/time": float("inf"), "robustness/pgd": np.float32(0.5)}
    values["efficiency/bytes"] = np.int64(7)
    results["runs"][0]["bars"]["fairness/rates"] = (np.array(0.25), float("-inf"))
    results["arms"][1]["guards"][0]["options"] = {"norm": float("inf"), "betas": (0.9, 0.99)}
    text = document.dump(document.prepare(results))
    loaded = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in report.json"))
    run = loaded["runs"][0]
    assert run["values"]["task/accuracy"] is None
    assert run["values"]["cost/time"] is None
    assert run["values"]["robustness/pgd"] == 0.5
    assert run["values"]["efficiency/bytes"] == 7
    assert run["bars"]["fairness/rates"] == [0.25, None]
    assert "cost/time was inf and is shown as not estimable." in run["notes"]
    assert loaded["arms"][1]["guards"][0]["options"] == {"norm": "inf", "betas": [0.9, 0.99]}


def test_optional_parts_may_be_absent():
    results = comparison(arms=2, curves=False, bars=False)
    del results["curves"], results["bars"], results["limits"]
    for run in results["runs"]:
        del run["curves"], run["bars"], run["notes"]
    assert document.prepare(results)["curves"] == document.prepare(results)["runs"][0]["bars"] == {}


def test_written_and_loaded_is_the_same(tmp_path):
    write_report(comparison(), tmp_path / "first")
    loaded = load_report(tmp_path / "first")
    assert len(loaded["summary"]) == len(loaded["figures"]) * len(loaded["arms"])
    write_report(loaded, tmp_path / "second")
    for path in sorted((tmp_path / "first").iterdir()):
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


def test_files_are_replaced_whole_and_can_be_read_by_others(tmp_path):
    page = write_report(comparison(arms=1, curves=False, bars=False), tmp_path)
    page.write_text("old")
    assert write_report(comparison(arms=1, curves=False, bars=False), tmp_path) == page
    assert page.read_text() != "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "annex.md",
        "card.md",
        "metrics.csv",
        "report.html",
        "report.json",
        "report.md",
    ]
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(page.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_fault_while_drawing_does_not_lose_the_measurements(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no ink")

    monkeypatch.setattr("lightning_guard.report.html.page", broken)
    with pytest.raises(RuntimeError, match="no ink"):
        write_report(comparison(), tmp_path)
    assert load_report(tmp_path)["title"] == "A comparison"


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (None, "give the folder"),
        ("{", "run the comparison again"),
        ("[]", "run the comparison again"),
        ('{"schema": 9}', "provenance.versions"),
    ],
)
def test_what_cannot_be_loaded_says_what_to_do(tmp_path, content, remedy):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(ReportError, match=remedy):
        load_report(tmp_path)


def test_a_report_is_read_without_torch_and_written_without_lightning(tmp_path):
    (tmp_path / "report.json").write_text(document.dump(document.prepare(comparison(arms=1, curves=False, bars=False))))
    code = (
        "import sys; from lightning_guard.report import load_report, write_report;"
        f"report = load_report({str(tmp_path)!r}); assert 'torch' not in sys.modules; write_report(report, '.');"
        "found = {'pytorch_lightning', 'lightning'} & set(sys.modules); assert not found, found"
    )
    path = {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={**os.environ, **path})
