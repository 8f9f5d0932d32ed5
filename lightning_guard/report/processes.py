"""The runs of a comparison, carried out one after another or by several processes that share them."""

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_guard.report.runs import ArmRun


def carry_out(runs: Sequence[ArmRun], workers: int, argv: Sequence[str] | None) -> None:
    """Carries out the runs that have no result yet; ``argv`` starts a further process that takes its share.

    Raises:
        KeyboardInterrupt: after saying what is kept.
        RuntimeError: with what a process that failed has said.
    """
    missing = sum(run.result() is None for run in runs)
    console = Console(stderr=True)
    if missing < len(runs):
        console.print(f"{len(runs) - missing} of {len(runs)} runs are already there and are kept.")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} runs"),
        TimeElapsedColumn(),
    )
    helpers: list[tuple[subprocess.Popen[bytes], Any]] = []  # with what each says, in a file: a full pipe would stop it
    threads = torch.get_num_threads()
    if argv is not None and min(workers, missing) > 1:
        # Processes that each take every core wait for one another: the same work took twenty times as long.
        share = max(1, min(threads, (os.cpu_count() or 1) // workers))
        torch.set_num_threads(share)
        environment = {**os.environ, "OMP_NUM_THREADS": str(share)}
        for _ in range(min(workers, missing) - 1):
            said = tempfile.TemporaryFile()  # noqa: SIM115  closed below, with its process
            helpers.append((subprocess.Popen([*argv], stdout=said, stderr=said, env=environment), said))
    try:
        with Progress(*columns, console=console, transient=False) as progress:
            bar = progress.add_task("comparing", total=len(runs), completed=len(runs) - missing)
            told = {run for run in runs if run.result() is not None}

            def look(description: str | None = None) -> None:
                for run in runs:
                    if run not in told and (result := run.result()) is not None:
                        told.add(run)
                        console.print(f"{run.title}: {_headline(result)}")
                progress.update(bar, completed=len(told), description=description)

            for run in runs:
                if run.result() is None and run.claim():
                    look(run.title)
                    run.carry_out(_Epochs(look, run))
            while any(helper.poll() is None for helper, _ in helpers):
                look("waiting for the other processes")
                time.sleep(0.3)
            look()
        for helper, said in helpers:
            if helper.returncode:
                said.seek(0)
                raise RuntimeError(
                    f"a worker of the comparison failed:\n{said.read().decode(errors='replace')[-4000:]}"
                )
    except (KeyboardInterrupt, SystemExit):
        console.print(
            f"Interrupted. Finished runs are kept in {runs[0].folder.parent.parent}; the same command goes on."
        )
        raise KeyboardInterrupt from None
    finally:
        for helper, said in helpers:
            helper.terminate()  # has ended by itself unless this process was stopped
            helper.wait()
            said.close()
        torch.set_num_threads(threads)


class _Epochs(pl.Callback):
    """Tells the progress bar which epoch runs."""

    def __init__(self, look: Callable[[str], None], run: ArmRun):
        self.look, self.run = look, run

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.look(f"{self.run.title}, epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")


def _headline(result: Mapping[str, Any]) -> str:
    first = next((item for item in result["figures"].values() if item["value"] is not None), None)
    return "finished" if first is None else f"{first['label'].lower()} {first['value']:.3f}"
