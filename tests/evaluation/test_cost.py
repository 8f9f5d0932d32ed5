"""Memory and energy are read where they can be, and nowhere guessed."""

import pytest
import torch

import lightning_guard as lg
from lightning_guard.evaluation import Task
from lightning_guard.evaluation.cost import Meter, Nvml, Rapl
from tests import toys

CPU = torch.device("cpu")


def zone(folder, name, energy, most=1000):
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    (place / "energy_uj").write_text(f"{energy}\n")
    (place / "max_energy_range_uj").write_text(f"{most}\n")


def test_packages_are_added_and_their_parts_are_not(tmp_path):
    zone(tmp_path, "intel-rapl:0", 100)
    zone(tmp_path, "intel-rapl:1", 500)
    zone(tmp_path, "intel-rapl:0:0", 1)
    found = Rapl(tmp_path)
    zone(tmp_path, "intel-rapl:0", 350)
    zone(tmp_path, "intel-rapl:1", 900)
    zone(tmp_path, "intel-rapl:0:0", 999)
    found.look()
    assert found.joules == pytest.approx((250 + 400) / 1e6)


def test_a_counter_that_runs_over_counts_on(tmp_path):
    zone(tmp_path, "intel-rapl:0", 900)
    found = Rapl(tmp_path)
    for now in (50, 700, 20):
        zone(tmp_path, "intel-rapl:0", now)
        found.look()
    assert found.joules == pytest.approx((150 + 650 + 320) / 1e6)


def test_what_cannot_be_read_says_so(tmp_path):
    zone(tmp_path, "intel-rapl:0", "nonsense")
    assert "cannot be read (ValueError)" in Rapl(tmp_path).why
    zone(tmp_path, "intel-rapl:0", 5)
    found = Rapl(tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    found.look()
    assert "any more" in found.why
    assert Nvml(CPU).why == "the model is on no GPU"


def status(folder, kilobytes):
    (folder / "clear_refs").write_text("")
    (folder / "status").write_text(f"Name:\tpython\nVmHWM:\t{kilobytes} kB\n")


def test_figures_where_the_machine_tells(tmp_path):
    zone(tmp_path / "rapl", "intel-rapl:0", 0, most=10**9)
    status(tmp_path, 2048)
    meter = Meter(CPU, tmp_path / "rapl", tmp_path)
    assert (tmp_path / "clear_refs").read_text() == "5"
    zone(tmp_path / "rapl", "intel-rapl:0", 3_000_000)
    evidence = meter.evidence()
    assert evidence.figures["cost/peak_memory"].value == 2048 * 1024
    assert evidence.figures["cost/energy"].value == pytest.approx(3.0)
    assert not evidence.notes


def test_no_figures_where_it_does_not(tmp_path):
    evidence = Meter(CPU, tmp_path / "none", tmp_path / "nowhere").evidence()
    assert [figure.value for figure in evidence.figures.values()] == [None, None]
    assert evidence.notes == [
        "Memory in training is not readable here: the height of memory cannot be reset here (FileNotFoundError).",
        "Energy is not readable here: this machine shows no energy counters; the model is on no GPU.",
    ]


def test_the_height_of_memory_is_of_this_time_alone():
    """Twice: a height before the meter does not count, one after it does."""
    try:
        first = Meter(CPU).evidence().figures["cost/peak_memory"].value
    except OSError:
        first = None
    if first is None:
        pytest.skip("this kernel does not let a process forget its height")
    meter = Meter(CPU)
    block = torch.ones(40_000_000)
    high = meter.evidence().figures["cost/peak_memory"].value
    del block
    again = Meter(CPU).evidence().figures["cost/peak_memory"].value
    assert high > first + 100e6
    assert again < high - 100e6


def test_a_comparison_tells_what_training_cost(tmp_path):
    report = lg.compare(toys.PlainNet, toys.Data, {"none": []}, {"max_epochs": 1, "accelerator": "cpu"}, 1, [Task()],
                        tmp_path)  # fmt: skip
    (run,) = report["runs"]
    for key in ("cost/train_seconds", "cost/passes", "cost/steps", "cost/peak_memory", "cost/energy"):
        assert key in run["values"]
    told = " ".join(run["notes"])
    assert (run["values"]["cost/energy"] is None) == ("Energy is not readable here" in told)
