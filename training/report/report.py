"""The page about a run: what a model reads in the scans of held-out subjects, and what the codec keeps of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..evaluation.report import MODELS, TITLES, condition_name, table
from .page import as_interval, as_number, as_percent, drawing, write_page


# mid-tones of a colour-blind safe palette: the same lines are legible on the light and the dark page
MODEL, CONTROL, BASELINE = "#0b7fc7", "#e0690c", "#8b93a0"


def write_report(path: Path, results: dict[str, Any]) -> None:
    """Writes the page to `path`. results: of `training.evaluation.evaluate`, with "run" those of a demo."""
    descriptors = results.get("descriptors") or {}
    # the types of pandas' rows are not known
    shown: Any = table(results)
    shown = shown[(shown["variant"] != "uncalibrated") & shown["value"].notna()]
    sections = [
        ("results", "Does it read the scan?", _results(shown)),
        ("answers", "Answers", _answers(descriptors.get("answers"))),
        ("descriptions", "Descriptions in free text", _descriptions(descriptors.get("descriptions"))),
        ("codec", "What the codec keeps", _facts(results.get("codec"))),
        ("run", "The run", _run(results.get("run"))),
    ]
    data, overall = results["data"], (descriptors.get("families") or {}).get("all")
    verdict = None
    tiles = [("Held-out subjects", as_number(sum(data["test_subjects"]), ",.0f"), "of no training data")]
    if overall:
        right, control, difference = overall["right"], overall["shuffled"], overall["difference"]
        verdict = {"text": f"{descriptors['verdict'][:1].upper()}{descriptors['verdict'][1:]}."}
        verdict["good"] = overall["beats_shuffled"]
        tiles += [
            ("Right scan", as_percent(right["accuracy"]), f"balanced accuracy, {_interval(right['interval'])}"),
            ("Subject-shuffled", as_percent(control["accuracy"]), f"the same, {_interval(control['interval'])}"),
            ("Difference", _points(difference["value"]), f"95 % interval {_interval(difference['interval'])}"),
        ]
    quick = bool((results.get("settings") or {}).get("quick"))
    write_page(
        path,
        title="fMRI-LM: report of a run",
        kicker="fMRI-LM · report of a run",
        heading="What the model reads in a brain scan",
        summary=[
            f"Questions about {as_number(data['windows'], ',')} windows of {as_number(data['scans'], ',')} scans: "
            f"{as_number(sum(data['training_subjects']), ',')} training and "
            f"{as_number(sum(data['test_subjects']), ',')} held-out subjects. Beside each number of the model stands "
            "the subject-shuffled control: the same answers, compared with the labels of other subjects of the same "
            "site and atlas. Intervals are 95 % bootstrap intervals over subjects.",
            *(["This was a quick run: it shows that every part works, not how well."] if quick else []),
        ],
        verdict=verdict,
        tiles=tiles,
        sections=[section for section in sections if section[-1]],
    )


def _interval(bounds: Any) -> str:
    return as_interval(None if bounds is None else [None if one is None else 100 * one for one in bounds], ".0f", " %")


def _points(value: float | None) -> str:
    return as_number(None if value is None else 100 * value, "+.0f", " points")


def _results(shown: Any) -> list[dict[str, Any]]:
    """The main rows of all tasks: model, control and baselines; drawn where there are intervals, and as a table."""
    if shown.empty:
        return []
    rows = [
        [
            {"text": row.task, "small": TITLES.get(row.metric, row.metric)},
            condition_name(row),
            row.comparison,
            as_number(row.value),
            as_interval(None if pd.isna(row.low) else (row.low, row.high)),
        ]
        for row in shown.itertuples()
    ]
    drawn = shown[shown["comparison"].isin(["right", "shuffled"]) & shown["low"].notna()]
    metrics = {task: group["metric"].iloc[0] for task, group in drawn.groupby("task", sort=False)}
    drawn = drawn[drawn["metric"] == drawn["task"].map(metrics)] if len(drawn) else drawn
    names = [f"{row.task}: {condition_name(row)} {row.comparison}" for row in drawn.itertuples()]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for place, row in enumerate(drawn.itertuples()):
            colour = BASELINE if row.condition not in MODELS else MODEL if row.comparison == "right" else CONTROL
            axes.plot([row.low, row.high], [place, place], color=colour, linewidth=2)
            axes.plot(row.value, place, "o" if row.comparison == "right" else "s", color=colour)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.25, linewidth=0.6)

    head = ["Task", "Condition", "Comparison", "Value", "95 % interval"]
    figure = (
        drawing(
            "Model, control and baselines",
            draw,
            0.8 + 0.24 * len(names),
            "The first metric of each task with 95 % intervals over subjects. Blue circles: the model, right scan; "
            "orange squares: the subject-shuffled control; grey: baselines.",
        )
        if len(names)
        else None
    )
    return [{"figure": figure}, {"head": head, "rows": rows, "label": "All results"}]


def _answers(answers: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    if not answers:
        return []
    rows = [
        [
            {
                "text": item["question"],
                "small": f"{item['subject']}, window from {as_number(item['window_start_seconds'], '.0f', ' s')}",
            },
            item["truth"],
            item["answer"],
            {"choices": item["probabilities"], "chosen": item["answer"]},
            {"correct": None if item["truth"] is None else item["answer"] == item["truth"]},
        ]
        for item in answers
    ]
    right = sum(item["truth"] is not None and item["answer"] == item["truth"] for item in answers)
    head = ["Question", "Truth", "Answer", "Probability of each answer", ""]
    return [
        {"text": f"{len(answers)} questions about held-out subjects, {right} answered correctly."},
        {"head": head, "rows": rows, "label": "Answers to questions", "style": "answers"},
    ]


def _descriptions(descriptions: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if not descriptions:
        return []
    accuracy = descriptions["statement_accuracy"]
    pairs = [
        {
            "title": item["subject"],
            "texts": [("Written by the model", item["generated"]), ("True description", item["truth"])],
        }
        for item in descriptions.get("examples", ())
    ]
    shares = ", ".join(f"{as_percent(share)} ({name})" for name, share in accuracy.items())
    return [{"text": f"Share of the statements in free descriptions that are true: {shares}."}, {"pairs": pairs}]


def _facts(values: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Numbers by key, estimates with their intervals; lists of subjects become a table of their own."""
    if not values:
        return []
    rows, tables = [], []
    for key, value in values.items():
        name = TITLES.get(key, key.replace("_", " "))
        if isinstance(value, Mapping) and "value" in value:
            rows.append([name, as_number(value["value"]), as_interval(value.get("interval"))])
        elif isinstance(value, int | float):
            rows.append([name, as_number(value, ",.4g"), ""])
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            head = [str(column).replace("_", " ") for column in value[0]]
            body = [[cell if isinstance(cell, str) else as_number(cell) for cell in row.values()] for row in value]
            tables.append({"head": head, "rows": body, "label": name})
    return [{"head": ["", "Value", "95 % interval"], "rows": rows, "label": "Codec"}, *tables]


def _run(run: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if not run:
        return []
    seconds = {stage: value or 0 for stage, value in run["seconds"].items() if stage != "total"}
    total = float(np.sum(list(seconds.values()))) or 1.0
    rows = [[stage, {"share": value / total}, as_number(value, ",.1f")] for stage, value in seconds.items()]
    rows.append(["total", "", as_number(total, ",.1f")])
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    note = f"Peak memory {as_number(run['peak_memory_gb'], '.1f', ' GB')}. Versions: {versions}."
    head = ["Stage", "Share of the time", "Seconds"]
    return [
        {"head": head, "rows": rows, "label": "Seconds of each stage", "style": "stages"},
        {"text": note, "note": True},
    ]
