"""``lightning-guard verify`` and ``sign``: whether a comparison is what it says, and who looked at it."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning_guard.check import quiet
from lightning_guard.launch import GuardCLI
from lightning_guard.recipe import RecipeError
from lightning_guard.report import sign as signing
from lightning_guard.report import verify as verifying
from lightning_guard.report.runs import Parts


def verify(args: Sequence[str]) -> int:
    """Make again what a folder says and tell what differs, what was not made again, and how much is the same.

    Returns:
        0 if nothing differs, 1 if something does.
    """
    parser = _parser()
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--hash", default=None)
    own = _parsed(parser, args, "verify")
    with quiet():
        found = verifying.verify(Path(own.folder), built_from, own.full, own.hash)
    for line in verifying.lines(found):
        print(line)
    return 1 if verifying.failed(found) else 0


def sign(args: Sequence[str]) -> int:
    """Sign a folder; what was altered since it was written is refused."""
    parser = _parser()
    parser.add_argument("--name", default="")
    parser.add_argument("--note", default="")
    own = _parsed(parser, args, "sign")
    signature = signing.sign(Path(own.folder), own.name, own.note)
    print(f"Signed by {signature.name}. Keep this hash elsewhere; `verify --hash` compares it: {signature.sha256}")
    return 0


def built_from(config: str) -> Parts:
    """Trainer, model and data from the configuration that an arm of a comparison was built from."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(config, encoding="utf-8")
        cli = GuardCLI("compare", ["--config", str(path)])
        options: dict[str, Any] = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        )
        cli.build(options=options)
    return cli.trainer, cli.model, cli.datamodule


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("folder", nargs="?")
    return parser


def _parsed(parser: argparse.ArgumentParser, args: Sequence[str], verb: str) -> argparse.Namespace:
    try:
        own, rest = parser.parse_known_args(list(args))
    except argparse.ArgumentError as error:
        raise RecipeError(f"{error.argument_name}: {error.message}") from None
    if rest:
        raise RecipeError(f"{verb} takes no {rest[0]!r}; `lightning-guard {verb} --help` explains it")
    if own.folder is None:
        raise RecipeError(f"{verb} needs the folder of a comparison: lightning-guard {verb} comparison")
    if not Path(own.folder).is_dir():
        raise RecipeError(f"{own.folder!r} is no folder; give one that `lightning-guard compare` wrote")
    return own
