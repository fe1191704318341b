"""Results of an evaluation as files: JSON, CSV, one plot, and entries of a model card."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import EvalResult, ModelCard

from ..data.shards import write_whole
from ..hub.model_card import PIPELINE_TAG
from .descriptors import CONDITIONS as DESCRIPTOR_CONDITIONS


TITLES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "f1": "macro F1",
    "roc_auc": "ROC-AUC",
    "within_site_auc": "ROC-AUC within sites",
    "calibration_error": "expected calibration error",
    "mean_absolute_error": "mean absolute error",
    "pearson_r": "Pearson r",
}
# conditions of a model; the others are baselines
MODELS = ("zero-shot", "few-shot", "tuned", "probe")
# what the plot shows of a task with choices, of one about a number, and of descriptor questions
MAIN_METRICS = ("roc_auc", "pearson_r", "balanced_accuracy")
NAMES = {"right": "model", "shuffled": "subject-shuffled control"}


def write_report(results: dict, output: Path) -> None:
    """results.json, results.csv (a row for each metric) and results.png."""
    write_whole(output / "results.json", json.dumps(results, indent=2) + "\n")
    write_whole(output / "results.csv", table(results).to_csv(index=False))
    _plot(table(results), output / "results.png")


def table(results: dict) -> pd.DataFrame:
    """
    A row for each task (or family of descriptor questions), condition, number of shots, variant of the answers,
    comparison ("right", "shuffled", "minus shuffled", "minus fc_ridge", ...) and metric.
    """
    rows = []

    def add(task: str, condition: str, comparison: str, metric: str, estimate: dict, **more: Any) -> None:
        low, high = estimate["interval"] or (None, None)
        row = {"task": task, "condition": condition, "shots": "", "variant": "", "comparison": comparison}
        rows.append({**row, "metric": metric, "value": estimate["value"], "low": low, "high": high, **more})

    for task, found in results["tasks"].items():
        for entry in found["conditions"]:
            more = {key: entry[key] for key in ("shots", "variant", "resamples", "scans", "parse_failures")}
            for comparison, values in entry["metrics"].items():
                for metric, estimate in values.items():
                    add(task, entry["condition"], comparison, metric, estimate, **more)
    for family, values in results.get("descriptors", {}).get("families", {}).items():
        for name in DESCRIPTOR_CONDITIONS:
            estimate = {"value": values[name]["accuracy"], "interval": values[name]["interval"]}
            condition, comparison = (name, "right") if name not in NAMES else ("zero-shot", name)
            add(f"descriptors, {family}", condition, comparison, "balanced_accuracy", estimate)
        add(f"descriptors, {family}", "zero-shot", "minus shuffled", "balanced_accuracy", values["difference"])
    for name, share in results.get("descriptors", {}).get("descriptions", {}).get("statement_accuracy", {}).items():
        condition, comparison = (name, "right") if name not in NAMES else ("zero-shot", name)
        add("descriptions", condition, comparison, "accuracy", {"value": share, "interval": None})
    return pd.DataFrame(rows)


def condition_name(row: Any) -> str:
    """Condition, shots and variant of a row of the table: "tuned 10"."""
    return " ".join(str(part) for part in (row.condition, row.shots, row.variant) if part not in ("", 0, None))


def eval_results(results: dict) -> list[EvalResult]:
    """The model-index: what the model reads with the right scan, and its lead over the subject-shuffled control."""
    data = results["data"]
    # the types of pandas' rows are not known
    shown: Any = table(results)
    if shown.empty:
        return []
    shown = shown[shown.condition.isin(MODELS) & shown.comparison.isin(["right", "minus shuffled"])]
    shown = shown[(shown.variant != "uncalibrated") & shown.value.notna()]
    subjects = f"{sum(data['test_subjects'])} held-out subjects"
    return [
        EvalResult(
            task_type=PIPELINE_TAG,
            task_name="questions about a scan",
            # the Hub merges entries that differ in the task's or the dataset's name alone
            dataset_type="-".join(["held-out-subjects", *([data["dataset"]] if "dataset" in data else [])]),
            dataset_name=f"{data['dataset']}, {subjects}" if "dataset" in data else subjects,
            dataset_config=", ".join(
                str(part) for part in (row.task, row.condition, row.shots, row.variant) if part not in ("", 0)
            ),
            metric_type=row.metric if row.comparison == "right" else f"{row.metric}_difference",
            metric_name=TITLES[row.metric] + ("" if row.comparison == "right" else ", right minus shuffled"),
            metric_value=round(row.value, 4),
            metric_args=None if pd.isna(row.low) else {"interval_95": [round(row.low, 4), round(row.high, 4)]},
        )
        for row in shown.itertuples()
    ]


def add_to_card(card_path: Path, results: dict) -> None:
    """Enter the results in the model-index of a card; those of the same task and dataset are replaced."""
    card = ModelCard.load(card_path)
    facts: Any = card.data
    facts.model_name = facts.model_name or card_path.parent.name
    new = eval_results(results)
    keys = {(entry.dataset_type, entry.dataset_config) for entry in new}
    kept = [entry for entry in facts.eval_results or [] if (entry.dataset_type, entry.dataset_config) not in keys]
    facts.eval_results = kept + new
    write_whole(card_path, str(card))


def _plot(shown: Any, path: Path) -> None:
    """The main metric of each task with 95 % intervals: a line for each condition, number of shots and control."""
    from matplotlib.figure import Figure

    shown = shown[
        shown.comparison.isin(["right", "shuffled"]) & (shown.variant != "uncalibrated") & shown.value.notna()
    ]
    tasks = []
    for task, rows in shown[shown.low.notna()].groupby("task", sort=False):
        metric = next((name for name in MAIN_METRICS if (rows.metric == name).any()), None)
        if metric is not None:
            tasks.append((task, metric, rows[rows.metric == metric].iloc[::-1]))
    heights = [len(rows) + 2 for *_, rows in tasks]
    figure = Figure(figsize=(8, 0.25 * sum(heights) + 1), layout="constrained")
    panels = figure.subplots(max(len(tasks), 1), 1, squeeze=False, height_ratios=heights or None)[:, 0]
    for axes, (task, metric, rows) in zip(panels, tasks, strict=False):
        labels = []
        for place, row in enumerate(rows.itertuples()):
            control = row.comparison == "shuffled"
            axes.plot([row.low, row.high], [place, place], color="grey" if control else "C0")
            axes.plot(row.value, place, "x" if control else "o", color="grey" if control else "C0")
            labels.append(condition_name(row) + (f" {NAMES['shuffled']}" if control else ""))
        axes.set_yticks(range(len(rows)), labels, fontsize="small")
        axes.set_title(f"{task}: {TITLES[metric]}, 95 % intervals over subjects", fontsize="small", loc="left")
        axes.grid(axis="x", alpha=0.3)
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
