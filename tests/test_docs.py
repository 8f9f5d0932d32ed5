"""Every Python example in README and docs runs, and what the docs state as data is what the code says."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from lightning_guard.callbacks.slots import slots
from lightning_guard.rules import rows

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"(?:<!-- file: (\S+) -->\n)?```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_examples_run(page):
    namespace = {"__name__": page.stem}
    for _, code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=lambda page: page.name)
def test_recipes_in_the_docs_are_recipes(page):
    for _, text in blocks(page, "yaml"):
        for name, guard in yaml.safe_load(text).get("guards", {}).items():
            slots()[name](**guard["init_args"])


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_composition_page_is_the_code():
    table = ["| together | verdict | why | then | source |", "|---|---|---|---|---|"]
    table += [f"| {' | '.join(row.values())} |" for row in rows()]
    assert "\n".join(table) in (ROOT / "docs" / "composition.md").read_text()


def test_a_guard_from_another_package_needs_no_change_here(tmp_path):
    """The example of docs/writing-a-guard.md, installed as pip would: a module and its entry point."""
    page = ROOT / "docs" / "writing-a-guard.md"
    files = {name: text for language in ("python", "toml") for name, text in blocks(page, language) if name}
    (tmp_path / "input_noise.py").write_text(files["input_noise.py"])
    project = tomllib.loads(files["pyproject.toml"])["project"]
    info = tmp_path / f"input_noise-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]["lightning_guard.guards"]
    (info / "entry_points.txt").write_text(
        "[lightning_guard.guards]\n" + "".join(f"{k} = {v}\n" for k, v in points.items())
    )
    command = [
        sys.executable, "-m", "lightning_guard", "fit", "--config", "demo/adult", "--recipe", "fairness",
        "--guards.input_noise.sigma", "0.25", "--trainer.max_steps", "2", "--trainer.limit_val_batches", "1",
        "--trainer.logger", "false", "--trainer.enable_checkpointing", "false",
    ]  # fmt: skip
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    bad = subprocess.run(
        [*command, "--guards.input_noise.sigma", "-1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert bad.returncode == 2
    assert "sigma=-1" in bad.stderr
