"""A finished comparison verifies, and one that was tampered with does not, however deep the hand went."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_guard.cli import main
from lightning_guard.report import ReportError, load_report
from lightning_guard.report.manifest import contents, read_manifest, write_manifest
from lightning_guard.report.runs import ArmRun
from lightning_guard.report.sign import sign, signatures
from lightning_guard.report.verify import failed, lines, verify
from lightning_guard.review import built_from

SHORT = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "8"]
GATED = """# Eighty in a hundred
guards:
  magnitude_pruning:
    class_path: lightning_guard.callbacks.MagnitudePruning
    init_args: {sparsity: 0.8}
accept:
  efficiency/sparsity: {min: 0.7}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """From the command line, so that every arm can be built again from its folder."""
    place = tmp_path_factory.mktemp("finished")
    (place / "small.yaml").write_text(GATED)
    assert main(stated(place / "small.yaml", "--out", str(place / "out"), "--publishable")) == 0
    return place / "out"


def stated(recipe, *more):
    arms = ["--arm", "none", "--arm", f"small=pruning+{recipe}", "--seeds", "2", "--evaluate.privacy", "null"]
    return ["compare", "--config", "demo/adult", *arms, *SHORT, *more]


@pytest.fixture
def folder(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def differing(folder, **options):
    return [finding.what for finding in verify(folder, built_from, **options) if finding.state == "differs"]


def test_an_untouched_folder_verifies_from_predictions_and_checkpoints(folder):
    found = verify(folder, built_from)
    assert not failed(found), list(lines(found))
    same = {finding.what for finding in found if finding.state == "same"}
    assert {"task/accuracy", "fairness/demographic_parity", "predictions.npz", "efficiency/sparsity"} <= same
    assert {"report.html", "report.json", "report.json, claims", "public/report.html"} <= same
    left = {finding.what.split(" ")[0] for finding in found if finding.state == "not recomputed"}
    assert "cost" in left  # told, never passed over
    stated = {key for run in load_report(folder)["runs"] for key in run["values"]}
    told = " ".join(finding.what for finding in found)
    assert all(key in told or key.split("/")[1] in told for key in stated)


def test_the_exit_code_says_it(folder, capsys):
    (folder / "metrics.csv").write_text("arm,seed\n")
    assert main(["verify", str(folder)]) == 1
    assert "DIFFERS: metrics.csv" in capsys.readouterr().out
    assert main(["verify", str(folder / "runs")]) == 2
    assert "no folder of a finished comparison" in capsys.readouterr().err


def test_gates_decide_the_exit_code_and_train_nothing_again(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ArmRun, "carry_out", lambda *_: pytest.fail("trained again"))
    recipe = tmp_path / "asks.yaml"
    for gate, more, code in (
        ("efficiency/sparsity: {min: 0.9}", [], 1),
        ("efficiency/sparsity: {min: 0.7}\n  cost/train_seconds: {change: 0.0}", [], 1),
        ("efficiency/sparsity: {min: 0.7}\n  task/accuracy: {change: {min: 0.0}}", ["--inconclusive", "pass"], 0),
    ):
        recipe.write_text(GATED.replace("efficiency/sparsity: {min: 0.7}", gate))
        assert main(stated(recipe, "--out", str(folder), *more)) == code
        assert ("Passed" in capsys.readouterr().out) == (code == 0)
    recipe.write_text(GATED.replace("min: 0.7", "least: 0.7"))
    assert main(stated(recipe, "--out", str(folder))) == 2
    assert "no limit 'least'" in capsys.readouterr().err


def edit(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found, indent=2, sort_keys=True, allow_nan=False) + "\n")


def of_report(folder):
    edit(folder / "report.json", lambda report: report["runs"][0]["values"].update({"task/accuracy": 0.99}))


def of_result(folder):
    of_report(folder)
    result = folder / "runs/none/seed-0/result.json"
    edit(result, lambda found: found["figures"]["task/accuracy"].update(value=0.99))


def of_direction(folder):
    edit(folder / "report.json", lambda report: report["figures"]["task/accuracy"].update(better="lower"))


def of_verdict(folder):
    edit(folder / "report.json", lambda report: report["claims"][0].update(verdict="better"))


def of_gate(folder):
    edit(folder / "report.json", lambda report: report["gates"][0].update(state="met", value=1.0))


def of_predictions(folder):
    path = folder / "runs/small/seed-1/predictions.npz"
    with np.load(path) as arrays:
        kept = dict(arrays)
    kept["logits"] = -kept["logits"]
    np.savez_compressed(path, **kept)


def of_checkpoint(folder):
    path = folder / "runs/small/seed-1/weights.pt"
    weights = torch.load(path, weights_only=True)
    torch.save({key: value + 0.1 if value.is_floating_point() else value for key, value in weights.items()}, path)


def of_recipe(folder):
    path = next((folder / "arms/small").glob("recipe-*.yaml"))
    path.write_text(path.read_text().replace("0.8", "0.1"))


def of_config(folder):
    path = folder / "arms/small/config.yaml"
    path.write_text(path.read_text().replace("max_epochs: 1", "max_epochs: 9"))


def of_page(folder):
    path = folder / "report.html"
    path.write_text(path.read_text().replace("Accuracy", "Accurracy"))


def of_broken_file(folder):
    (folder / "runs/none/seed-1/predictions.npz").write_bytes(b"nothing")


HANDS = {
    of_report: "task/accuracy",
    of_result: "task/accuracy",
    of_direction: "report.json, figures",
    of_verdict: "report.json, claims",
    of_gate: "report.json, gates",
    of_predictions: "predictions.npz",
    of_checkpoint: "predictions.npz",
    of_recipe: "recipe",
    of_config: "configurations of the arms",
    of_page: "report.html",
    of_broken_file: "predictions.npz",
}


@pytest.mark.parametrize("hand", HANDS, ids=lambda hand: hand.__name__)
def test_a_tampered_folder_is_caught(folder, hand):
    hand(folder)
    stated, there = read_manifest(folder), contents(folder)
    assert any(stated[kind] != there[kind] for kind in ("files", "renderings"))
    write_manifest(folder)  # whoever tampers knows of the manifest, too
    found = verify(folder, built_from if hand is of_checkpoint else None)
    said = " ".join(lines([finding for finding in found if finding.state == "differs"]))
    assert HANDS[hand] in said, said


def test_what_was_added_or_taken_away_is_told(folder):
    (folder / "runs/none/extra.txt").write_text("x")
    (folder / "runs/none/seed-0/weights.pt").unlink()
    found = {finding.what: finding.said for finding in verify(folder)}
    assert "not among" in found["runs/none/extra.txt"]
    assert found["runs/none/seed-0/weights.pt"] == "is missing"


def test_a_whole_forgery_is_not_found_but_by_a_hash_kept_elsewhere(folder, finished):
    """The limit that the docs state: a folder made anew is consistent in itself."""
    signed = sign(folder, "Ada", "seen")
    forged = Path(shutil.copytree(finished, folder.parent / "forged"))
    edit(forged / "arms/none/arm.json", lambda arm: arm.update(forged=True))
    write_manifest(forged)
    sign(forged, "Ada", "seen")
    assert [finding.what for finding in verify(forged, expected=signed.sha256) if finding.state == "differs"] == [
        f"the hash {signed.sha256[:12]}"
    ]
    assert not failed(verify(folder, expected=signed.sha256))


def test_signatures_are_shown_and_hold_until_something_changes(folder, capsys):
    assert main(["sign", str(folder), "--name", "<b>Ada</b>", "--note", "Seen | *all* of it\u202e"]) == 0
    assert signatures(folder)[0].sha256 in capsys.readouterr().out
    sign(folder, "Bea")
    assert [one.holds for one in signatures(folder)] == [True, True]
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert "&lt;b&gt;Ada&lt;/b&gt;" in page
    assert "<b>Ada" not in page
    assert "\\<b\\>Ada" in text
    assert "Ada" not in (folder / "public/report.html").read_text()
    of_checkpoint(folder)
    assert [one.holds for one in signatures(folder)] == [False, False]
    assert any(what.startswith("signature of Bea") for what in differing(folder))
    with pytest.raises(ReportError, match=r"not what the comparison left: runs/small/seed-1/weights\.pt"):
        sign(folder, "Cec")


def test_an_altered_signature_does_not_hold(folder):
    sign(folder, "Ada", "not good")
    sign(folder, "Bea")
    whole = (folder / "signatures.json").read_text()
    for change in ({"name": "Eve"}, {"note": "all is well"}, {"time": "2020-01-01T00:00:00+00:00"}):
        (folder / "signatures.json").write_text(whole)
        edit(folder / "signatures.json", lambda found, change=change: found[0].update(change))
        assert [one.holds for one in signatures(folder)] == [False, True]
    edit(folder / "signatures.json", lambda found: found.pop(0))  # the second stands on the first
    assert [one.holds for one in signatures(folder)] == [False]
    (folder / "signatures.json").write_text("[1]")
    with pytest.raises(ReportError, match="no signatures of the form"):
        signatures(folder)


def test_a_signature_is_the_hash_of_what_it_says(folder):
    sign(folder, "Ada", "seen")
    record = json.loads((folder / "signatures.json").read_text())[0]
    stated = record.pop("sha256")
    assert hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest() == stated


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["sign", "{}", "--note", "x"], "--name is empty"),
        (["sign", "{}", "--nmae", "x"], "takes no '--nmae'"),
        (["sign"], "needs the folder"),
        (["verify", "nowhere"], "is no folder"),
    ],
)
def test_what_is_wrong_is_said(folder, capsys, args, said):
    assert main([arg.format(folder) for arg in args]) == 2
    assert said in capsys.readouterr().err


def test_the_publishable_report_holds_no_pictures_no_command_and_says_what_leaks(folder):
    public, own = load_report(folder / "public"), load_report(folder)
    assert own["provenance"]["command"]
    assert public["provenance"]["command"] is public["provenance"]["git"] is None
    assert not any(run["pictures"] for run in public["runs"])
    assert public["claims"] == own["claims"]
    page = (folder / "public/report.html").read_text()
    assert "Do not publish the models of two arms together" in page
    assert str(folder.parent) not in page
    assert "data:image/png" not in page
