"""
Codec training on more scans than memory should hold: memory, throughput, and how long the trainer waits for data.

    python benchmarks/scale.py FOLDER --scans 100000

Writes so many planted people, a scan each, to FOLDER/planted-scale (7 GB for 100,000). The tiny codec is trained from
them for some steps (results/scale_training.csv; the first, in which the worker starts, are left out). Then the loader
alone gives as many mixtures as there are scans (results/scale_loader.csv: a line for each thousand, resident memory of
the main process and of its worker): one of each scan that is not held out, and the rest of the next epoch's.
"""

import os
import time
from pathlib import Path
from typing import Annotated

import pandas as pd
import psutil
import torch
import typer
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fmrilm import FmriCodecModel
from fmrilm.training.codec.program import CodecArguments, CodecData, codec_config, prepare
from fmrilm.training.codec.trainer import CodecTrainer, CodecTrainingArguments
from fmrilm.training.data.dataset import collate_signals
from fmrilm.training.data.synthetic import PlantedCohort, training_scans, write_planted
from fmrilm.training.trainer import training_options


RESULTS = Path(__file__).parent / "results"
LINE = 1000
WARM_UP_STEPS = 5


def resident_mib(process: psutil.Process) -> float:
    return process.memory_info().rss / 2**20


def measure_loader(dataset: Dataset, batch: int, workers: int) -> pd.DataFrame:
    loader = DataLoader(dataset, batch, collate_fn=collate_signals, num_workers=workers)
    main, rows, passed = psutil.Process(), [], 0
    start = time.perf_counter()
    with tqdm(desc="loading", unit="scan", total=len(dataset)) as progress:
        for values in loader:
            count = len(values["fmri_values"])
            passed += count
            progress.update(count)
            if passed // LINE > len(rows):
                seconds = time.perf_counter() - start
                helpers = sum(resident_mib(child) for child in main.children())
                rows.append(
                    {
                        "scans": passed,
                        "seconds": round(seconds, 1),
                        "scans_per_second": round(passed / seconds, 1),
                        "main_mib": round(resident_mib(main)),
                        "worker_mib": round(helpers),
                    }
                )
    return pd.DataFrame(rows)


class TimedTrainer(CodecTrainer):
    """Knows when each step began and how long it waited for its batches."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps: list[tuple[float, float]] = []

    def get_batch_samples(self, *args, **kwargs):
        start = time.perf_counter()
        batches = super().get_batch_samples(*args, **kwargs)
        self.steps.append((start, time.perf_counter() - start))
        return batches


def measure_training(data: CodecData, arguments: CodecArguments, steps: int, batch: int, workers: int) -> dict:
    options = training_options(Path(), steps, batch, 3e-3, seed=0)
    args = CodecTrainingArguments(
        **options, dataloader_num_workers=workers, train_sampling_strategy="sequential", unquantized_steps=2
    )
    trainer = TimedTrainer(
        model=FmriCodecModel(codec_config(arguments, None)),
        args=args,
        train_dataset=data.mixtures(steps * batch, arguments.max_rois, seed=1),
        data_collator=collate_signals,
    )
    trainer.train()
    seconds = time.perf_counter() - trainer.steps[WARM_UP_STEPS][0]
    waited = sum(waiting for _, waiting in trainer.steps[WARM_UP_STEPS:])
    measured = len(trainer.steps) - WARM_UP_STEPS
    return {
        "steps": measured,
        "batch": batch,
        "seconds_per_step": round(seconds / measured, 4),
        "scans_per_second": round(measured * batch / seconds, 1),
        "waiting_share": round(waited / seconds, 5),
    }


def main(
    folder: Annotated[Path, typer.Argument(help="Where the planted scans are written; reused if they are there.")],
    scans: Annotated[int, typer.Option(help="That are written, and pass the loader.")] = 100_000,
    steps: Annotated[int, typer.Option(help="Of training.")] = 100,
    batch: Annotated[int, typer.Option(help="Scans of a step.")] = 16,
    workers: Annotated[int, typer.Option(help="Processes that load.")] = 1,
    results: Annotated[Path, typer.Option(help="Folder of the tables.")] = RESULTS,
) -> None:
    folder = folder / "planted-scale"
    write_planted(folder, PlantedCohort(training_scans("aal2-94"), scans))
    arguments = CodecArguments(str(folder), streaming=True, held_out_share=0.01)
    data = prepare(arguments)
    results.mkdir(parents=True, exist_ok=True)
    training = measure_training(data, arguments, steps, batch, workers)
    pd.DataFrame([{"scans_on_disk": scans, **training}]).to_csv(results / "scale_training.csv", index=False)
    print(training)
    loaded = measure_loader(data.mixtures(scans, None, seed=0), batch, workers)
    loaded.to_csv(results / "scale_loader.csv", index=False)
    print(loaded.iloc[[0, len(loaded) // 2, -1]])


if __name__ == "__main__":
    torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))
    typer.run(main)
