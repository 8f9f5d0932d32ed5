"""``lightning-guard export``: from a checkpoint to a file, from the command line."""

import argparse
import time
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_guard.check import quiet
from lightning_guard.evaluation.subject import Subject
from lightning_guard.export.files import Exported, Format, export
from lightning_guard.export.graph import Linear
from lightning_guard.export.runtime import load
from lightning_guard.export.timing import interleaved
from lightning_guard.export.tracing import ExportError
from lightning_guard.functional.reshaping import reshape_like
from lightning_guard.guard import Trait, guards_of
from lightning_guard.launch import GuardCLI, pairs
from lightning_guard.recipe import RecipeError
from lightning_guard.record import read_checkpoint
from lightning_guard.report.runs import batch_of

_PARTS = {
    "train": ("fit", "train_dataloader"),
    "validate": ("fit", "val_dataloader"),
    "test": ("test", "test_dataloader"),
}


def command(args: Sequence[str]) -> int:
    """Build the model, load its weights, write the file, and say what it is.

    Raises:
        RecipeError: for whatever is wrong, and if the file differs from the model by more than said.
    """
    own, shared = _split(args)
    cli = GuardCLI("export", shared)
    if cli.config.get("data") is None:
        raise RecipeError("export needs data to check the file on; name its class with --data my_module.MyData")
    if cli.config.ckpt_path is None:
        raise RecipeError("export needs a trained model; name its checkpoint with --ckpt_path FILE")
    with quiet():
        cli.build()
        _restore(cli, str(cli.config.ckpt_path))
        _refuse_private(cli, own)
        batch = batch_of(cli.trainer, cli.model)
        checked = _loader(cli.datamodule, own.check)
        try:
            done = export(
                cli.model, own.out, checked, own.format, own.tolerance, _loader(cli.datamodule, own.calibrate),
                own.batches, own.linear, batch=batch,
            )  # fmt: skip
            for line in _told(done, Subject(cli.model, checked, batch), own.threads):
                print(line)
        except ExportError as error:
            raise RecipeError(str(error)) from error
    return 0


def _split(args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--out")
    parser.add_argument("--format", choices=get_args(Format), default="onnx")
    parser.add_argument("--tolerance", type=float)
    parser.add_argument("--check", choices=list(_PARTS), default="test")
    parser.add_argument("--calibrate", choices=list(_PARTS), default="train")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--linear", choices=get_args(Linear), default="static")
    parser.add_argument("--threads", type=int, default=1)
    try:
        own, shared = parser.parse_known_args(list(args))
    except argparse.ArgumentError as error:
        raise RecipeError(f"{error.argument_name}: {error.message}") from None
    for name, _, _ in pairs(shared):
        if meant := get_close_matches(name, [f"--{option}" for option in vars(own)], n=1, cutoff=0.75):
            raise RecipeError(f"{name}: unknown option of export; did you mean {meant[0]!r}?")
    if own.out is None:
        raise RecipeError("export needs a file to write; name it with --out model.onnx")
    for name in ("batches", "threads"):
        if getattr(own, name) < 1:
            raise RecipeError(f"--{name}: {getattr(own, name)} is too few; give at least 1")
    return own, shared


def _restore(cli: GuardCLI, path: str) -> None:
    """The weights of a checkpoint, into the shapes that they have."""
    checkpoint = read_checkpoint(path)
    if checkpoint is None or "state_dict" not in checkpoint:
        raise RecipeError(f"--ckpt_path: {path} is no checkpoint that loads with weights_only=True")
    module = cli.model
    module.configure_model()
    for guard in guards_of(cli.trainer, module):
        if guard.overrides("rewrite"):
            guard.rewrite(module)
    try:
        reshape_like(module, checkpoint["state_dict"])
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
    except (RuntimeError, ValueError) as error:
        raise RecipeError(f"--ckpt_path: {path} is not of {type(module).__name__}: {str(error).strip()}") from None


def _refuse_private(cli: GuardCLI, own: argparse.Namespace) -> None:
    private = [
        g.name for g in guards_of(cli.trainer, cli.model) if Trait.BOUNDS_EXAMPLES in (g.traits or ()) and not g.off
    ]
    if private and own.format in ("onnx-int8", "pt2e") and own.calibrate == "train":
        raise RecipeError(
            f"--calibrate train: {private[0]} trained this model in private, and ranges of activations would tell of "
            "the training data outside its budget; calibrate on validate or test, if these are public"
        )


def _loader(data: Any, part: str) -> Any:
    stage, name = _PARTS[part]
    data.prepare_data()
    data.setup(stage)
    loader = getattr(data, name)()
    if not loader:
        raise RecipeError(f"{type(data).__name__} has no {name}; check or calibrate on another part")
    return loader[0] if isinstance(loader, list) else loader


def _told(done: Exported, subject: Subject, threads: int) -> Iterator[str]:
    found = done.agreement
    yield f"wrote {done.path} ({done.format})"
    yield f"  bytes      {done.bytes:,}, gzipped {done.compressed_bytes:,}"
    if found.module_accuracy is not None and found.file_accuracy is not None:
        yield f"  accuracy   {found.file_accuracy:.2%}, the model's {found.module_accuracy:.2%}"
    yield (
        f"  agreement  {found.flips:.2%} of {found.examples} examples flip ({done.tolerance:.2%} may), "
        f"logits differ by up to {found.max_difference:.3g}"
    )
    if not done.format.startswith("onnx"):
        return
    with TemporaryDirectory() as folder:
        same = done.format == "onnx"
        paths = {"float32": done.path} if same else {"float32": Path(folder, "float32.onnx"), "int8": done.path}
        if not same:
            plain = export(subject.module, paths["float32"], subject.loader, tolerance=1.0, batch=subject._run.batch)
            yield f"  smaller    {plain.bytes / done.bytes:.2f} times than in float32, {plain.bytes:,} bytes"
        yield from _latencies({name: load(path, threads) for name, path in paths.items()}, subject, threads)


def _latencies(files: dict[str, Any], subject: Subject, threads: int) -> Iterator[str]:
    with subject.still():
        inputs = next(subject.batches()).inputs
    clock, kind = (time.thread_time, "processor time") if threads == 1 else (time.perf_counter, "time")
    for size in (1, 64):
        rows = apply_to_collection(inputs, Tensor, lambda t, n=size: t[torch.arange(n) % len(t)])
        runs = {name: partial(file.session.run, None, file.feeds(rows)) for name, file in files.items()}
        times = interleaved(runs, clock=clock)
        each = ", ".join(f"{name} {1e3 * one.median:.3f} ms ({1e3 * one.minimum:.3f})" for name, one in times.items())
        faster = f", {times['float32'].minimum / times['int8'].minimum:.2f} times as fast" if "int8" in times else ""
        what = f"; {kind}, median (least), onnxruntime, threads: {threads}" if size == 1 else ""
        yield f"  batch {size:<4} {each}{faster}{what}"
