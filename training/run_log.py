"""What a run cost: seconds per part, peak memory, versions."""

import os
import platform
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import torch


PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "numpy")


class Clock:
    """Seconds spent in each named part of a run, which it announces."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str, announcement: str) -> Iterator[None]:
        print(f"\n== {announcement}", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)


def run_costs(clock: Clock) -> dict:
    """Costs of this process so far, memory in GB (10^9 bytes)."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "seconds": {**clock.seconds, "total": round(sum(clock.seconds.values()), 1)},
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()}), {gpu}",
        "versions": {name: version(name) for name in PACKAGES},
    }
