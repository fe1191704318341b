"""
The whole chain on open data: prepare, describe, codec, align, sft, evaluate, as a user calls them, with the YAML files
of `configs/demo/`. `fmrilm train ... --config training/configs/demo/X.yaml` on the same folders does the same.
"""

import csv
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from .alignment.language_models import PACKAGED_MODEL_CARD
from .corpus.describe import CorpusSettings, describe_dataset
from .corpus.source import load_source
from .data.open_data import TERMS, open_scans
from .data.prepare import Preparation, prepare
from .data.scan_sources import find_scans
from .evaluation.program import EvaluationSettings, evaluate
from .hub.model_card import fill_card
from .release import train_stage
from .report.report import write_report


PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "numpy")
# the same chain in about a minute, which learns next to nothing
FEW_ROWS = "--max_steps 1 --rows 2 --per_device_train_batch_size 2 --questions 2 --statements 2 --paragraphs 1".split()
FEW_WINDOWS = "--mixtures 8 --window_stride 160".split()
QUICK = {
    "codec": ["--start_steps", "20", "--mixtures", "40"],
    "alignment": [*FEW_ROWS, *FEW_WINDOWS],
    "sft": [*FEW_ROWS, *FEW_WINDOWS],
}
# of the whole chain: half of what an evaluation asks by default
QUESTIONS_PER_FAMILY = 4


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
    """Costs of this process so far, memory in GB (10^9 bytes), None where the system does not count it."""
    try:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        memory = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)
    except ImportError:
        memory = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "seconds": {**clock.seconds, "total": round(sum(clock.seconds.values()), 1)},
        "peak_memory_gb": memory,
        "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()}), {gpu}",
        "versions": {name: version(name) for name in PACKAGES},
    }


def write_open_scans(folder: Path) -> Path:
    """The open scans as files [time, rois], and their manifest, whose path is returned."""
    folder.mkdir(parents=True)
    with open(folder / "manifest.csv", "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["path", "subject", "session", "site", "tr", "atlas"])
        for number, scan in enumerate(open_scans()):
            np.save(folder / f"{number:02}.npy", scan.signal)
            writer.writerow([f"{number:02}.npy", scan.subject, scan.session, scan.dataset, scan.tr, scan.atlas])
    return folder / "manifest.csv"


def run_demo(output: Path, quick: bool = False, seed: int = 0) -> dict:
    """
    Runs the chain and writes `model/` (model, processor and card), `results.json` and `report.html` into `output`,
    beside what each stage wrote. A finished run of the same settings is not repeated; ValueError if `output` holds
    anything else.
    """
    settings = {"quick": quick, "seed": seed}
    finished = output / "results.json"
    if finished.exists():
        results = json.loads(finished.read_text(encoding="utf-8"))
        if results.get("settings") == settings:
            print(f"{finished} holds a finished run with these settings; delete {output} to run anew")
            return results
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(
            f"expected an output folder that is new or of a run with these settings, got {output}: delete it, or name "
            "another one (--output)"
        )
    if output.exists():
        # empty: the finished run takes its place
        output.rmdir()
    work = output.with_name(output.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    clock = Clock()

    def train(stage: str, *options: str) -> None:
        train_stage("demo", stage, work / stage, "--seed", str(seed), *options, *(QUICK[stage] if quick else ()))

    # stages 2 and 3 learn from the same codes
    encoded = ("--data", str(work / "corpus"), "--code_cache", str(work / "codes"))
    with clock.part("prepare", "Preparing the open scans: three atlases, four scanners"):
        prepare(find_scans(write_open_scans(work / "scans")), work / "prepared", None, Preparation())
    with clock.part("describe", "Describing them: descriptors, texts, questions"):
        describe_dataset(load_source(str(work / "prepared")), work / "corpus", CorpusSettings(seed=seed))
    with clock.part("codec", "Stage 1: the codec turns scans into discrete tokens"):
        train("codec", "--data", str(work / "prepared"))
    with clock.part("alignment", "Stage 2: the language model learns to read and to predict the tokens"):
        train("alignment", *encoded, "--codec", str(work / "codec" / "model"))
    with clock.part("sft", "Stage 3: instruction tuning on chats about scans"):
        train("sft", *encoded, "--model_name_or_path", str(work / "alignment" / "model"))
    shutil.move(work / "sft" / "model", work / "model")
    with clock.part("evaluate", "Questions about held-out subjects"):
        asked = EvaluationSettings(questions_per_family=QUESTIONS_PER_FAMILY)
        settings_of = replace(EvaluationSettings.quick() if quick else asked, seed=seed)
        results = evaluate(
            work / "model", work / "corpus", work / "evaluation", descriptors=True, settings=settings_of, show=True
        )
    results |= {"run": run_costs(clock), "settings": settings, "model": PACKAGED_MODEL_CARD}
    results["data"] = {**results.get("data", {}), "terms": TERMS}
    write_report(work / "report.html", results)
    (work / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    fill_card(work / "model", results).save(work / "model" / "README.md")
    # checkpoints, and the codes that they were trained on
    for folder in ("alignment", "sft", "codes"):
        shutil.rmtree(work / folder)
    work.rename(output)
    return results
