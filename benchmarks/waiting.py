"""
How waiting OpenMP threads slow training steps down, alone and beside a busy process of one thread.

    python benchmarks/waiting.py

Each policy gets a process of its own, in turn, in which two threads train four layers of SmolLM2's size on 300 tokens,
and a small network as the codec's; `beside` is the number of busy processes that this script starts. Writes
results/waiting.csv: milliseconds of a step (median over rounds), and how many cores other programs kept busy.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
from ask import busy_seconds, children_seconds

from fmrilm.training.cli.options import WAIT_VARIABLES


RESULTS = Path(__file__).parent / "results"
POLICIES = {
    "default": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
SECONDS, ROUNDS = 2.0, 3
BUSY = "while True: pass"


def steps() -> None:
    """Prints the mean milliseconds of a step of each network."""
    import torch
    from torch import nn

    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(576, 9, 1536, dropout=0.0, batch_first=True), 4)
    small = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(256, 256), nn.GELU())])
    for network, values in ((layers, torch.randn(2, 150, 576)), (small, torch.randn(512, 256))):
        network(values).square().mean().backward()
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < SECONDS or count < 2:
            network(values).square().mean().backward()
            count += 1
        print(1000 * (time.perf_counter() - start) / count)


def timed(policy: dict[str, str], beside: int) -> dict[str, float]:
    kept = {name: value for name, value in os.environ.items() if name not in (*WAIT_VARIABLES, "OMP_NUM_THREADS")}
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(beside)]
    before, own, start = busy_seconds(), children_seconds(), time.perf_counter()
    try:
        command = [sys.executable, __file__, "steps"]
        printed = subprocess.run(command, env=kept | policy, capture_output=True, text=True, check=True).stdout
    finally:
        for process in busy:
            process.kill()
            process.wait()
    others = (busy_seconds() - before - (children_seconds() - own)) / (time.perf_counter() - start)
    layers, small = (float(line) for line in printed.split())
    return {"layers_ms": layers, "small_ms": small, "others": max(0.0, others)}


def main() -> None:
    cases = [(name, beside) for beside in (0, 1) for name in POLICIES]
    rows = [
        {"policy": name, "beside": beside, **timed(POLICIES[name], beside)}
        for _ in range(ROUNDS)
        for name, beside in cases
    ]
    table = pd.DataFrame(rows).groupby(["policy", "beside"], sort=False).median().reset_index()
    table.to_csv(RESULTS / "waiting.csv", index=False, float_format="%.2f")
    print(table.to_string(index=False))


if __name__ == "__main__":
    steps() if sys.argv[1:] == ["steps"] else main()
