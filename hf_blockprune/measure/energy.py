"""Energy by the counters that hardware keeps: NVML on NVIDIA GPUs, RAPL on Linux CPUs. None where there is no counter.

Gross energy is all that the counter saw; net is what came on top of idling. Windows should last five seconds and more:
NVML's counter moves in steps of a tenth of a second or so.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

Counter = Callable[[], float]
POWERCAP = Path("/sys/class/powercap")
CALLS_BETWEEN_LOOKS = 8  # at the clock and, on a GPU, waits for the work that was handed over


@dataclass(frozen=True)
class Energy:
    """What a number of calls took.

    Attributes:
        calls: how many ran.
        seconds: how long they took together.
        gross_joules: what the counter counted in that time.
        idle_watts: what it counts for each second without work.
    """

    calls: int
    seconds: float
    gross_joules: float
    idle_watts: float

    @property
    def net_joules(self) -> float:
        """Without what idling for as long would have taken."""
        return self.gross_joules - self.idle_watts * self.seconds

    @property
    def watts(self) -> float:
        """Mean power while the calls ran."""
        return self.gross_joules / self.seconds

    def mj_per_call(self, *, net: bool = True) -> float:
        """Millijoules of one call."""
        return 1000 * (self.net_joules if net else self.gross_joules) / self.calls


def energy_counter(device: torch.device | str) -> Counter | None:
    """A function that says how many joules a device has used since some moment, or None where nothing tells.

    Args:
        device: "cpu" (all processor packages together) or a CUDA device.
    """
    device = torch.device(device)
    return _nvml_counter(device) if device.type == "cuda" else rapl_counter()


def measure_energy(
    run: Callable[[], object],
    counter: Counter,
    *,
    seconds: float = 5.0,
    idle_seconds: float = 3.0,
    wait: Callable[[], None] = lambda: None,
) -> Energy:
    """Let a device idle, then run the same work over and over, and read the counter around both.

    Args:
        run: the work; inputs should be like real ones, never zeros, which take less energy.
        counter: joules so far.
        seconds, idle_seconds: how long to measure work and idling.
        wait: returns when all work handed to the device is done (`torch.cuda.synchronize`).
    """
    run()
    wait()
    start, before = time.perf_counter(), counter()
    time.sleep(idle_seconds)
    idle_watts = (counter() - before) / (time.perf_counter() - start)
    run()  # clocks rise again
    wait()
    calls, start, before = 0, time.perf_counter(), counter()
    while time.perf_counter() - start < seconds:
        for _ in range(CALLS_BETWEEN_LOOKS):
            run()
        wait()
        calls += CALLS_BETWEEN_LOOKS
    joules, elapsed = counter() - before, time.perf_counter() - start
    return Energy(calls, elapsed, joules, idle_watts)


def rapl_counter(root: Path = POWERCAP) -> Counter | None:
    """Joules of all processor packages, from the kernel's powercap files; None where they are missing or closed.

    Args:
        root: the folder of `intel-rapl:0` and so on (AMD processors have them too).
    """
    packages = [folder for folder in sorted(root.glob("intel-rapl:*")) if folder.name.count(":") == 1]
    try:
        counters = [_WrappingCounter(folder) for folder in packages]
    except (OSError, ValueError):
        return None
    if not counters:
        return None
    return lambda: sum(counter() for counter in counters)


class _WrappingCounter:
    """A file of microjoules that starts at zero again past a limit; must be read more often than that happens."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self._limit = int((folder / "max_energy_range_uj").read_text())
        self._last, self._total = int(self._file.read_text()), 0

    def __call__(self) -> float:
        now = int(self._file.read_text())
        self._total += (now - self._last) % (self._limit + 1)
        self._last = now
        return self._total / 1e6


def _nvml_counter(device: torch.device) -> Counter | None:
    try:
        import pynvml  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:  # an old card, or one that hides its counter
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
