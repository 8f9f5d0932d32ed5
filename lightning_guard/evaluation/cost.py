"""What a training costs the machine: memory at its height and energy, where the machine tells."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lightning_guard.evaluation.base import Evidence, Figure

_RAPL = Path("/sys/class/powercap")
_STATUS = Path("/proc/self")


class Rapl:
    """Reads the energy counters of processor packages (RAPL), which run over every few minutes to hours.

    Args:
        folder: where the kernel shows them.

    | case                                     | result                                           |
    |------------------------------------------|--------------------------------------------------|
    | no such folder, or root alone may read   | ``why`` says so, and nothing is counted          |
    | a counter runs over once between looks   | counted on                                       |
    | parts of a package (cores, memory)       | left out: the package has them already           |

    Example:
        >>> Rapl(Path("/nowhere")).why
        'this machine shows no energy counters'
    """

    def __init__(self, folder: Path = _RAPL):
        self.why = ""
        self.joules = 0.0
        self._zones: dict[Path, tuple[int, int]] = {}  # the last value and where it runs over, in microjoules
        packages = [zone for zone in sorted(folder.glob("intel-rapl:*")) if zone.name.count(":") == 1]
        if not packages:
            self.why = "this machine shows no energy counters"
        try:
            for zone in packages:
                most = int((zone / "max_energy_range_uj").read_text())
                self._zones[zone] = int((zone / "energy_uj").read_text()), most
        except (OSError, ValueError) as error:
            self._zones, self.why = {}, f"the energy counters cannot be read ({type(error).__name__})"

    def look(self) -> None:
        """Count on to now; a counter must not run over twice between two looks."""
        for zone, (last, most) in list(self._zones.items()):
            try:
                now = int((zone / "energy_uj").read_text())
            except (OSError, ValueError) as error:
                self._zones, self.why = {}, f"the energy counters cannot be read any more ({type(error).__name__})"
                return
            self.joules += (now - last if now >= last else now + most - last) / 1e6
            self._zones[zone] = now, most


class Nvml:
    """Reads the energy counter of one GPU, in joules since some start.

    Args:
        device: the model's; anything but CUDA has nothing to read.
    """

    def __init__(self, device: torch.device):
        self.why, self.joules, self._read, self._first = "", 0.0, None, 0.0
        if device.type != "cuda":
            self.why = "the model is on no GPU"
            return
        if find_spec("pynvml") is None:
            self.why = "pynvml is not installed"
            return
        import pynvml  # type: ignore[import-not-found,import-untyped,unused-ignore]

        try:
            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)  # an index would ignore CUDA_VISIBLE_DEVICES
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            self._read = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
            self._first = self._read()
        except pynvml.NVMLError as error:
            self._read, self.why = None, f"the GPU does not tell its energy ({error})"

    def look(self) -> None:
        """Count on to now."""
        if self._read is not None:
            self.joules = self._read() - self._first


class Meter:
    """Measures memory and energy from its making to :meth:`evidence`; never a guess.

    Energy is of whole packages and GPUs: other work on the machine at the time is in it.

    Args:
        device: the model's.
        rapl: folder of the kernel's energy counters.
        status: folder of this process in the kernel's view.
    """

    def __init__(self, device: torch.device, rapl: Path = _RAPL, status: Path = _STATUS):
        self.device, self._status = device, status
        self.energy: Sequence[Any] = (Rapl(rapl), Nvml(device))
        self._memory_why = ""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            self._memory_why = self._forget_peak()

    def _forget_peak(self) -> str:
        try:
            (self._status / "clear_refs").write_text("5")  # forgets the height so far (Linux 4.0)
        except OSError as error:
            return f"the height of memory cannot be reset here ({type(error).__name__})"
        return ""

    def look(self) -> None:
        """Count on to now; often enough that no counter runs over twice."""
        for counter in self.energy:
            counter.look()

    def evidence(self) -> Evidence:
        """``cost/peak_memory`` and ``cost/energy``, None with a note where the machine does not tell."""
        self.look()
        evidence = Evidence()
        memory = self._peak()
        where = (
            "GPU memory of tensors" if self.device.type == "cuda" else "Memory of the process, all of torch included"
        )
        about = f"{where} at its height during training."
        evidence.figures["cost/peak_memory"] = Figure(memory, "Memory at its height", "bytes", "lower", about)
        read = [counter for counter in self.energy if not counter.why]
        joules = sum(counter.joules for counter in read) if read else None
        named = " and ".join("processor packages" if isinstance(one, Rapl) else "GPU" for one in read) or "nothing"
        about = f"Of {named}, whatever else ran on them included." if read else "Not readable here."
        evidence.figures["cost/energy"] = Figure(joules, "Energy of training", "J", "lower", about)
        if memory is None:
            evidence.notes.append(f"Memory in training is not readable here: {self._memory_why}.")
        if joules is None:
            evidence.notes.append(f"Energy is not readable here: {'; '.join(one.why for one in self.energy)}.")
        return evidence

    def _peak(self) -> float | None:
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device))
        if self._memory_why:
            return None
        for line in (self._status / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) * 1024
        self._memory_why = f"the kernel of {os.name} does not tell it"
        return None
