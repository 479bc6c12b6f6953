"""Where a result was produced: recorded in reports and benchmark files."""

import os
import platform
from importlib import metadata
from typing import TypedDict

import torch
from torch import nn

PACKAGES = ("hf_blockprune", "torch", "transformers", "accelerate", "datasets", "triton")


class Environment(TypedDict):
    """Where this process runs.

    Attributes:
        python: its version.
        platform: system and kind of processor, such as "Linux x86_64".
        cpu: name of the processor.
        cpu_count: logical processors, None where the system does not say.
        cpu_capability: instructions that torch uses, such as "AVX2".
        threads: that torch uses.
        gpu: name of the first one, None without any.
        versions: of `PACKAGES`, None for one that is not installed.
    """

    python: str
    platform: str
    cpu: str
    cpu_count: int | None
    cpu_capability: str
    threads: int
    gpu: str | None
    versions: dict[str, str | None]


class Machine(TypedDict):
    """Where a model runs: name of the processor, kind of numbers of its weights such as "float32", and the rest."""

    device: str | None
    dtype: str
    environment: Environment


class Backends(TypedDict):
    """What can multiply with block-sparse weights.

    Attributes:
        registered: names, most preferred first, joined by commas.
        cpu: which compiled kernels run, or why there are none.
        cpu_break_even: by dtype, the share of multiplications left up to which they are preferred to `dense`; None
            without them.
    """

    registered: str
    cpu: str
    cpu_break_even: dict[str, float] | None


def environment() -> Environment:
    """Versions, processor, threads and accelerator of this process, as JSON-ready values."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
    }


def machine_of(model: nn.Module) -> Machine:
    """The processor that a model is on, its dtype and the environment, as JSON-ready values."""
    device, dtype = next((p.device, p.dtype) for p in model.parameters())
    found = environment()
    return {
        "device": found["gpu" if device.type == "cuda" else "cpu"],
        "dtype": str(dtype).removeprefix("torch."),
        "environment": found,
    }


def backends() -> Backends:
    """What can multiply with block-sparse weights here, as JSON-ready values."""
    from .._cpu.backend import BREAK_EVEN
    from .._cpu.library import find_library
    from ..hub.blockprune_backends import available_backends

    library, description = find_library()
    return {
        "registered": ", ".join(available_backends()),
        "cpu": description,
        "cpu_break_even": None
        if library is None
        else {str(k).removeprefix("torch."): v for k, v in BREAK_EVEN.items()},
    }


def _cpu_name() -> str:
    """With family and model where they are known: virtual machines may call every generation by one name."""
    found: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                found.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    name = found.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{key} {found[of]}" for key, of in (("family", "cpu family"), ("model", "model")) if of in found]
    return f"{name} ({', '.join(numbers)})" if numbers else name
