"""
The Space and the pipeline under load: many clients at once, for some minutes.

    python benchmarks/load.py runs/demo/model --seconds 120

Each client has a scan of its own (a random process) and asks about it without a pause; in the Space it uploads
the scan anew for each. An answer counts as different where it is another one than a single client gets, or its
probabilities are off by more than `TOLERANCE`. Memory is that of the process that answers, after one request of each
client (before), at its highest, and at the end. Writes results/load.csv.

It takes longer than twice the seconds: every client's answers are first computed one by one, and each of the two is
warmed up by a request of each client. Answers share the cores, so that a wait is about the clients times one answer.
"""

import contextlib
import gc
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import psutil
import typer
from gradio_client import Client, handle_file
from tqdm import tqdm
from transformers import pipeline

from fmrilm import ScanReader, load
from fmrilm.processors.descriptors.text import question
from fmrilm.training.data.shards import write_whole
from fmrilm.training.space import DESCRIPTORS, EXAMPLE_TR, synthetic_scan


ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
CHOICES = ["low", "typical", "high"]
TOLERANCE = 1e-3
STARTING_SECONDS = 180
# of one request; whoever waits longer counts as an error
PATIENCE = 900

# an answer to the n-th question of a client: its probabilities
Visit = Callable[[int, str], dict[str, float]]


@dataclass
class Tally:
    """What the clients saw. latencies: s, of the requests that were answered."""

    latencies: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    different: int = 0
    largest_difference: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, seconds: float, got: dict[str, float], expected: dict[str, float]) -> None:
        difference = max(abs(got.get(choice, -1.0) - expected[choice]) for choice in expected)
        with self.lock:
            self.latencies.append(seconds)
            self.largest_difference = max(self.largest_difference, difference)
            self.different += max(got, key=got.get) != max(expected, key=expected.get) or difference > TOLERANCE

    def fail(self, error: Exception) -> None:
        with self.lock:
            self.errors.append(f"{type(error).__name__}: {error}")


def measure(
    target: str, visit: Visit, expected: list[dict[str, dict[str, float]]], seconds: float, process: psutil.Process
) -> dict:
    """Lets as many clients as `expected` has entries ask for so many seconds; expected: by client and question."""
    clients, asked, tally, peak = len(expected), list(expected[0]), Tally(), 0
    with ThreadPoolExecutor(clients) as pool, tqdm(desc=target, unit="answer") as progress:
        for _ in pool.map(lambda client: visit(client, asked[0]), range(clients)):
            progress.update()
        before = process.memory_info().rss
        start = time.perf_counter()

        def ask_on(client: int) -> None:
            number = client
            while time.perf_counter() - start < seconds:
                question = asked[number % len(asked)]
                begun = time.perf_counter()
                try:
                    got = visit(client, question)
                    tally.add(time.perf_counter() - begun, got, expected[client][question])
                except Exception as error:
                    tally.fail(error)
                number += 1

        running = [pool.submit(ask_on, client) for client in range(clients)]
        while not all(task.done() for task in running):
            peak = max(peak, process.memory_info().rss)
            progress.update(clients + len(tally.latencies) - progress.n)
            time.sleep(0.5)
        for task in running:
            task.result()
    elapsed = time.perf_counter() - start
    gc.collect()
    after = process.memory_info().rss
    latencies = np.array(tally.latencies)
    return {
        "target": target,
        "clients": clients,
        "questions": len(asked),
        "seconds": elapsed,
        "answers": len(latencies),
        "errors": len(tally.errors),
        "first_error": tally.errors[0] if tally.errors else "",
        "different": tally.different,
        "largest_difference": tally.largest_difference,
        "answers_per_second": len(latencies) / elapsed,
        **{f"p{q}_seconds": float(np.percentile(latencies, q)) if len(latencies) else np.nan for q in (50, 90, 99)},
        "rss_before_mb": before / 1e6,
        "rss_peak_mb": max(peak, after) / 1e6,
        "rss_after_mb": after / 1e6,
    }


@contextlib.contextmanager
def space_process(model: Path, temporary: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The address of a Space on this machine, and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(ROOT / "app.py"), str(model), "--port", str(port)]
    with open(temporary / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(temporary)})
    try:
        for _ in range(STARTING_SECONDS):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if process.poll() is not None:
                raise RuntimeError(f"the Space did not start: {(temporary / 'log').read_text()}")
            time.sleep(1)
        yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def load_space(model: Path, scans: list[Path], atlas: str, expected: list, seconds: float, temporary: Path) -> dict:
    with space_process(model, temporary) as (address, process):
        visitors = [Client(address, verbose=False, download_files=False) for _ in scans]

        def visit(client: int, question: str) -> dict[str, float]:
            visitor = visitors[client]
            visitor.predict(handle_file(scans[client]), api_name="/upload")
            visitor.submit(atlas, EXAMPLE_TR, api_name="/read").result(PATIENCE)
            _, label, _, problem = visitor.submit(question, "", api_name="/ask").result(PATIENCE)
            # where there is none, an empty one comes
            if not label:
                raise RuntimeError(problem)
            return {entry["label"]: entry["confidence"] for entry in label["confidences"]}

        row = measure("space", visit, expected, seconds, process)
    left = [path for path in temporary.rglob("*") if path.is_file() and path.name != "log"]
    return {**row, "files_left": len(left)}


def load_pipeline(reader: ScanReader, scans: list[Path], atlas: str, expected: list, seconds: float) -> dict:
    pipe = pipeline("fmri-text-to-text", model=reader.model, processor=reader.processor)

    def visit(client: int, question: str) -> dict[str, float]:
        answer: dict[str, Any] = pipe(str(scans[client]), question, choices=CHOICES, tr=EXAMPLE_TR, atlas=atlas)
        return answer["probabilities"]

    return measure("pipeline", visit, expected, seconds, psutil.Process())


def main(
    model: Annotated[Path, typer.Argument(help="A model and its processor, as `fmrilm demo` saves them.")],
    seconds: Annotated[float, typer.Option(help="Of each of the two.")] = 120,
    clients: int = 8,
    questions: Annotated[int, typer.Option(min=1, max=3, help="That each client asks in turn.")] = 3,
    results: Annotated[Path, typer.Option(help="Folder of the CSV file.")] = RESULTS,
) -> None:
    reader, asked = load(model), [question(name) for name in DESCRIPTORS[:questions]]
    atlas = reader.processor.feature_extractor.atlases[0]["name"]
    with tempfile.TemporaryDirectory() as folder:
        scans = [Path(folder, f"scan-{client}.npy") for client in range(clients)]
        for seed, path in enumerate(scans):
            np.save(path, synthetic_scan(reader.processor.feature_extractor.atlas(atlas), shared=0.5, seed=seed))
        expected = [
            {text: reader.ask(path, text, CHOICES, tr=EXAMPLE_TR, atlas=atlas)["probabilities"] for text in asked}
            for path in tqdm(scans, desc="single answers", unit="client")
        ]
        temporary = Path(folder, "space")
        temporary.mkdir()
        rows = [
            load_space(model, scans, atlas, expected, seconds, temporary),
            load_pipeline(reader, scans, atlas, expected, seconds),
        ]
    table = pd.DataFrame(rows)
    write_whole(results / "load.csv", table.to_csv(index=False, float_format="%.4f"))
    print(table.T.to_string(header=False))


if __name__ == "__main__":
    typer.run(main)
