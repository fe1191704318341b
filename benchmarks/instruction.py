"""
What instruction tuning gives on a cohort with a planted effect (made-up people, `training/data/synthetic.py`), and
what it costs.

    python benchmarks/instruction.py planted runs/demo/model    # 4 and 10 shots and all of 200 people, beside FC
    python benchmarks/instruction.py zeroshot runs/demo/model   # asked in the words of descriptions, never trained
    python benchmarks/instruction.py tuning runs/demo/model     # LoRA against tuning the whole language model
    python benchmarks/instruction.py scoring runs/demo/model    # scoring choices against generating and parsing

Each writes results/instruction_<command>.csv. What is done already is kept in `--work` and not done again; `--quick`
shows that the chain works. Each takes less than 9 minutes on two cores; `planted` is the longest.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer

from fmrilm import FmriLMForConditionalGeneration, FmriLMProcessor
from fmrilm.processors.descriptors.networks import NETWORKS
from fmrilm.training.alignment.joint import add_lora
from fmrilm.training.data.shards import write_whole
from fmrilm.training.data.splits import hold_out
from fmrilm.training.data.synthetic import PlantedCohort, training_scans, write_planted
from fmrilm.training.data.tasks import Task, load_task
from fmrilm.training.evaluation.adapt import Tuning, tune
from fmrilm.training.evaluation.ask import answer_scans, parse_answer, score_scans
from fmrilm.training.evaluation.labelled_scans import load_labelled
from fmrilm.training.evaluation.metrics import Answers, bootstrap, statistics
from fmrilm.training.evaluation.program import FULL, Protocol, evaluate
from fmrilm.training.evaluation.report import table
from fmrilm.training.trainer import half_precision


RESULTS = Path(__file__).parent / "results"
WORK = Path("runs/instruction")
PEOPLE, TEST_SHARE = 300, 1 / 3
# people, shots, draws of them and steps of tuning in a run that only shows that the chain works
QUICK_PEOPLE, QUICK_SHOTS, QUICK_STEPS = 24, (2,), 1
GROUP, WORDS = "planted_group", "planted_connectivity"
DEFAULT_METHODS = "tuned,probe,connectivity,majority"
app = typer.Typer(add_completion=False)

Folder = Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Model and its processor.")]
Work = Annotated[Path, typer.Option(help="Folder for the cohort and what is done already.")]
Quick = Annotated[bool, typer.Option("--quick", help="A few people and steps.")]


def cohort(work: Path, quick: bool) -> Path:
    """The planted people, of the first atlas of the demo."""
    folder = work / ("planted-quick" if quick else "planted-people")
    people = QUICK_PEOPLE if quick else PEOPLE
    write_planted(folder, PlantedCohort(training_scans("aal2-94"), people))
    return folder


def write(name: str, rows: pd.DataFrame, results: Path) -> None:
    write_whole(results / f"instruction_{name}.csv", rows.to_csv(index=False, float_format="%.4f"))
    if "reading" in rows:
        rows = rows[rows.metric.isin(["roc_auc", "balanced_accuracy"]) & (rows.variant == "")]
        rows = rows.drop(columns=["task", "variant", "undefined_draws", "parse_failures"])
    print(rows.to_string(index=False, float_format="%.3f"))


def load(folder: Path) -> tuple[FmriLMForConditionalGeneration, FmriLMProcessor]:
    model = FmriLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model, FmriLMProcessor.from_pretrained(folder)


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=half_precision())


@app.command()
def planted(
    model: Folder,
    draws: Annotated[int, typer.Option(help="Draws of the shots.")] = 2,
    steps: Annotated[int, typer.Option(help="Steps of tuning, at most.")] = 50,
    epochs: Annotated[int, typer.Option(help="Of tuning on few shots.")] = 8,
    methods: Annotated[str, typer.Option(help="By comma; also context, which takes 4 minutes.")] = DEFAULT_METHODS,
    seed: int = 0,
    work: Work = WORK,
    quick: Quick = False,
    results: Path = RESULTS,
) -> None:
    """The group of unseen people after 4 and 10 shots a group and after 200 people, beside regression on FC."""
    protocol = Protocol(
        shots=(*(QUICK_SHOTS if quick else (4, 10)), FULL),
        draws=1 if quick else draws,
        methods=tuple(methods.split(",")),
        new_people=True,
        test_share=TEST_SHARE,
        tuning=Tuning(steps=QUICK_STEPS if quick else steps, epochs=epochs),
        seed=seed,
    )
    settings = f"{model.resolve().parent.name}-{methods}-{steps}-{epochs}-{draws}-{seed}"
    output = work / f"planted{'-quick' if quick else ''}-{settings}"
    write("planted", table(evaluate(model, cohort(work, quick), GROUP, output, protocol)), results)
    print(f"plots are in {output}")


@app.command()
def zeroshot(model: Folder, seed: int = 0, work: Work = WORK, quick: Quick = False, results: Path = RESULTS) -> None:
    """
    The planted difference asked about as a description would say it: is the connectivity low or high? The model was
    never told a group; the baselines learn from the 200 other people.
    """
    protocol = Protocol(
        shots=(0,),
        methods=("zero-shot", "connectivity", "majority"),
        new_people=True,
        test_share=TEST_SHARE,
        seed=seed,
    )
    output = work / f"zeroshot{'-quick' if quick else ''}-{model.resolve().parent.name}-{seed}"
    write("zeroshot", table(evaluate(model, cohort(work, quick), WORDS, output, protocol)), results)


@app.command()
def tuning(
    model: Folder,
    steps: Annotated[int, typer.Option(help="Steps of tuning.")] = 30,
    ranks: Annotated[str, typer.Option(help="Of LoRA, by comma; 0 is the whole language model.")] = "8,0",
    seed: int = 0,
    work: Work = WORK,
    quick: Quick = False,
    results: Path = RESULTS,
) -> None:
    """
    Tuned on 200 planted people with each rank, in a process of its own: quality, parameters, seconds, memory. The
    learning rate of the whole model is a fiftieth of LoRA's; the untuned model stays in memory beside the tuned one.
    """
    steps = QUICK_STEPS if quick else steps
    rows = []
    for rank in ranks.split(","):
        kept = work / f"tuning{'-quick' if quick else ''}-{model.resolve().parent.name}-{rank}-{steps}-{seed}.json"
        if not kept.exists():
            arguments = [str(model), rank, str(steps), str(seed), str(cohort(work, quick))]
            command = [sys.executable, __file__, "measure-tuning", *arguments]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            write_whole(kept, output.splitlines()[-1])
        rows.append(json.loads(kept.read_text()))
    write("tuning", pd.DataFrame(rows), results)


@app.command(hidden=True)
def measure_tuning(folder: Path, rank: int, steps: int, seed: int, data: Path) -> None:
    """One rank of `tuning`, as JSON on the last line."""
    model, processor = load(folder)
    task = load_task(GROUP)
    scans = load_labelled(data, task, processor.feature_extractor, model.model.codec)
    split = hold_out(scans.subjects, scans.truth, TEST_SHARE, seed)
    settings = Tuning(steps, steps, learning_rate=1e-3 if rank else 2e-5, rank=rank or None)
    known = [scans.codes[row] for row in split.training], [scans.answers[row] for row in split.training]
    start = time.perf_counter()
    tuned = tune(model, processor, task, *known, settings, seed)
    seconds = time.perf_counter() - start
    with autocast():
        windows = [scans.codes[row][0] for row in split.test]
        scores = score_scans(tuned, processor, task.questions[0], task.choice_words, windows)
    truth = scans.truth[split.test]
    answered = statistics(truth, [Answers(scores.argmax(-1), np.exp(scores))])
    auc = bootstrap(answered["roc_auc"], scans.subjects[split.test])
    # after all else: this changes the model it is given
    counted = add_lora(model, rank) if rank else model
    print(
        json.dumps(
            {
                "rank": rank or "all weights",
                "steps": steps,
                "rows_per_step": settings.rows_per_step,
                "roc_auc": auc.value,
                "low": auc.interval[0],
                "high": auc.interval[1],
                "trained_parameters": sum(item.numel() for item in counted.parameters() if item.requires_grad),
                "seconds_per_step": seconds / steps,
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )
    )


@app.command()
def scoring(
    model: Folder,
    questions: Annotated[int, typer.Option(help="Scans that are asked about, each once.")] = 64,
    repetitions: int = 3,
    seed: int = 0,
    quick: Quick = False,
    results: Path = RESULTS,
) -> None:
    """Questions a second: probabilities of 2 and of 7 choices against greedy answers in words that are parsed."""
    loaded, processor = load(model)
    if quick:
        questions, repetitions = 4, 1
    config = loaded.config.codec_config
    rng = np.random.default_rng(seed)
    # what is in a scan changes no time: ten steps, as in a window of the demo
    scans = list(rng.integers(config.codebook_size, size=(questions, 10 * config.tokens_per_step)))
    names = list(NETWORKS.values())[:7]
    two = Task("two", "-", ("Is connectivity within the visual network low or high?",), {"a": "low", "b": "high"})
    seven = Task("seven", "-", ("Which network is connected most strongly?",), {name: name for name in names})
    rows = []
    for task in (two, seven):
        ways = {
            "scoring": lambda task=task: score_scans(loaded, processor, task.questions[0], task.choice_words, scans),
            "generating and parsing": lambda task=task: [
                parse_answer(task, text) for text in answer_scans(loaded, processor, task.questions[0], scans)
            ],
        }
        for way, ask in ways.items():
            seconds = []
            with autocast():
                for _ in range(repetitions + 1):
                    start = time.perf_counter()
                    answers = ask()
                    seconds.append(time.perf_counter() - start)
            # the first one prepares kernels
            rates = questions / np.array(seconds[1:])
            rows.append(
                {
                    "choices": len(task.choice_words),
                    "way": way,
                    "questions_per_second": np.median(rates),
                    "spread": np.ptp(rates),
                    "without_answer": sum(answer is None for answer in answers) / questions,
                }
            )
    write("scoring", pd.DataFrame(rows), results)


if __name__ == "__main__":
    app()
