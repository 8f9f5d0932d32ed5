"""``lightning-guard export``, from a checkpoint to a file."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_guard.cli import main
from lightning_guard.export import load, load_compressed
from lightning_guard.models import MLP
from tests.test_cli import ROOT, SHORT, TOY, said


@pytest.fixture
def checkpoint():
    assert main(["fit", *SHORT, "--trainer.enable_checkpointing=true", "--trainer.logger=false"]) == 0
    return str(next(Path().rglob("*.ckpt")))


def test_it_writes_a_checked_file_and_says_what_it_is(checkpoint, capsys):
    code, out, err = said(
        capsys, "export", *TOY, "--ckpt_path", checkpoint, "--out", "net.onnx", "--format", "onnx-int8",
        "--tolerance", "0.2", "--batches", "2",
    )  # fmt: skip
    assert (code, err) == (0, "")
    size = Path("net.onnx").stat().st_size
    assert f"wrote net.onnx (onnx-int8)\n  bytes      {size:,}, gzipped " in out
    for words in (
        r"accuracy +\d+\.\d\d%, the model's \d+",
        r"of 64 examples flip \(20.00% may\)",
        r"smaller +\d\.\d\d",
    ):
        assert re.search(words, out), words
    for batch in (1, 64):
        assert re.search(rf"batch {batch} +float32 \d\.\d+ ms \(\d.\d+\), int8 .* times as fast", out)
    assert load("net.onnx")(torch.rand(3, 6)).shape == (3, 3)


def test_weights_alone(checkpoint, capsys):
    code, out, _ = said(capsys, "export", *TOY, "--ckpt_path", checkpoint, "--out", "net.lgw", "--format", "sparse")
    assert code == 0
    assert "0.00% of 64 examples flip (0.00% may)" in out
    stored = torch.load(checkpoint, weights_only=True)["state_dict"]
    loaded = load_compressed("net.lgw")
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[key], loaded[key]) for key in stored)


MISTAKES = [
    (["--ckpt_path", "CKPT"], "export needs a file to write; name it with --out model.onnx"),
    (["--out", "x.onnx"], "export needs a trained model; name its checkpoint with --ckpt_path FILE"),
    (["--out", "x.onnx", "--ckpt_path", "no.ckpt"], "--ckpt_path: no.ckpt is no checkpoint that loads"),
    (["--out", "x.onnx", "--ckpt_path", "CKPT", "--format", "onx"], "--format: invalid choice: 'onx'"),
    (["--out", "x.onnx", "--ckpt_path", "CKPT", "--formt", "onnx"], "--formt: unknown option of export; did you mean"),
    (["--out", "x.onnx", "--ckpt_path", "CKPT", "--batches", "0"], "--batches: 0 is too few"),
    (["--out", "x.onnx", "--ckpt_path", "CKPT", "--tolerance", "3"], "tolerance=3.0 is no share of examples"),
    (["--out", "no/x.onnx", "--ckpt_path", "CKPT"], "is in no folder that exists"),
]


@pytest.mark.parametrize(("args", "words"), MISTAKES, ids=[words[:40] for _, words in MISTAKES])
def test_mistakes_are_told_in_a_line(args, words, checkpoint, capsys):
    code, out, err = said(capsys, "export", *TOY, *(checkpoint if arg == "CKPT" else arg for arg in args))
    assert (code, out) == (2, "")
    assert words in err
    assert not list(Path().glob("*.onnx"))


def test_a_checkpoint_of_another_model_is_told(capsys):
    torch.save({"state_dict": MLP(in_features=6).state_dict()}, "other.ckpt")
    code, _, err = said(capsys, "export", *TOY, "--ckpt_path", "other.ckpt", "--out", "x.onnx")
    assert code == 2
    assert "other.ckpt is not of PlainNet" in err


def test_a_file_that_differs_is_refused(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("lightning_guard.export.files._ROUNDING", -1.0)
    code, _, err = said(capsys, "export", *TOY, "--ckpt_path", checkpoint, "--out", "net.onnx")
    assert code == 2
    assert "100.00% of 64 examples differ beyond rounding" in err
    assert not Path("net.onnx").exists()


def test_private_training_is_not_told_by_ranges(capsys):
    arguments = [*TOY, "--model.norm=false", "--recipe", "dp-sgd", "--out", "net.onnx", "--format", "onnx-int8"]
    from tests import toys

    torch.save({"state_dict": toys.PlainNet(norm=False).state_dict()}, "private.ckpt")
    code, _, err = said(capsys, "export", *arguments, "--ckpt_path", "private.ckpt")
    assert code == 2
    assert "--calibrate train: dp_sgd trained this model in private" in err
    code, out, err = said(
        capsys, "export", *arguments, "--ckpt_path", "private.ckpt", "--calibrate", "test", "--tolerance", "0.5"
    )
    assert code == 0, err
    assert "wrote net.onnx" in out


def test_help_and_list_do_not_import_torch():
    code = (
        "import sys, json; from lightning_guard.cli import main; main(['export', '--help']); "
        "print(json.dumps([name for name in ('torch', 'onnx', 'onnxruntime') if name in sys.modules]))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout.splitlines()[-1]) == []
    assert "--calibrate DATA" in run.stdout
