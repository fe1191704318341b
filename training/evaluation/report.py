"""Results of an evaluation as files: JSON, CSV, plots, and entries of a model card."""

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import EvalResult, ModelCard

from ..data.shards import write_whole
from ..hub.model_card import PIPELINE_TAG
from .results import BASELINES, FULL


RESULTS = "results.json"
# what the plots show of each kind of task, and what guessing gives
MAIN_METRICS = ("roc_auc", "balanced_accuracy", "mean_absolute_error", "pearson_r")
TITLES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "f1": "macro F1",
    "roc_auc": "ROC-AUC",
    "calibration_error": "expected calibration error",
    "mean_absolute_error": "mean absolute error",
    "pearson_r": "Pearson r",
}


def write_report(results: dict, output: Path) -> None:
    """results.json, results.csv (a row for each metric), metrics.png and, of probabilities, calibration.png."""
    write_whole(output / RESULTS, json.dumps(results, indent=2) + "\n")
    write_whole(output / "results.csv", table(results).to_csv(index=False))
    _plot_metrics(results, output / "metrics.png")
    if any(entry["calibration"] for entry in results["methods"]):
        _plot_calibration(results, output / "calibration.png")


def table(results: dict) -> pd.DataFrame:
    """A row for each method, number of shots, reading ("right", "swapped", ...) and metric."""
    return pd.DataFrame(
        {
            "task": results["task"],
            "method": entry["method"],
            "shots": entry["shots"],
            "variant": entry["variant"],
            "reading": reading,
            "metric": metric,
            "value": estimate["value"],
            "low": estimate["interval"] and estimate["interval"][0],
            "high": estimate["interval"] and estimate["interval"][1],
            "undefined_draws": estimate["undefined_draws"],
            "training_draws": entry["draws"],
            "scans": entry["rows"] if reading in ("right", "minus connectivity") else entry["swapped_rows"],
            "parse_failures": entry["parse_failures"],
        }
        for entry in results["methods"]
        for reading, values in entry["metrics"].items()
        for metric, estimate in values.items()
    )


def eval_results(results: dict) -> list[EvalResult]:
    """Entries for the model-index of a card: the model's own answers, and their lead over swapped scans."""
    data = results["data"]
    entries = []
    for entry in results["methods"]:
        if entry["method"] in BASELINES or entry["variant"]:
            continue
        for reading in ("right", "right minus swapped"):
            for metric, estimate in entry["metrics"].get(reading, {}).items():
                if estimate["value"] is None:
                    continue
                lead = "" if reading == "right" else " minus swapped scan"
                arguments = {"shots": entry["shots"], "training_draws": entry["draws"]}
                if estimate["interval"]:
                    arguments["interval_95"] = [round(bound, 4) for bound in estimate["interval"]]
                entries.append(
                    EvalResult(
                        task_type=PIPELINE_TAG,
                        task_name=f"{results['task']}, {entry['method']}",
                        dataset_type="prepared-scans",
                        dataset_name=f"{data['dataset']}: {sum(data['test_subjects'])} test subjects",
                        dataset_config=f"{entry['method']}-{entry['shots']}",
                        metric_type=metric if reading == "right" else f"{metric}_difference",
                        metric_name=TITLES[metric] + lead,
                        metric_value=round(estimate["value"], 4),
                        metric_args=arguments,
                    )
                )
    return entries


def add_to_card(card_path: Path, results: dict) -> None:
    """Enter the results in the model-index of a card; those of the same task and dataset are replaced."""
    card = ModelCard.load(card_path)
    facts: Any = card.data
    if not facts.model_name:
        facts.model_name = card_path.parent.name
    new = eval_results(results)
    key = {(entry.task_name, entry.dataset_name) for entry in new}
    kept = [entry for entry in facts.eval_results or [] if (entry.task_name, entry.dataset_name) not in key]
    facts.eval_results = kept + new
    write_whole(card_path, str(card))


def _plot_metrics(results: dict, path: Path) -> None:
    """The main metrics by shots: each method with the right scan, and dashed with another person's."""
    from matplotlib.figure import Figure

    entries = [entry for entry in results["methods"] if not entry["variant"]]
    shown = [name for name in MAIN_METRICS if name in entries[0]["metrics"]["right"]]
    shots = sorted({entry["shots"] for entry in entries}, key=lambda count: math.inf if count == FULL else count)
    methods = list(dict.fromkeys(entry["method"] for entry in entries))
    figure = Figure(figsize=(5 * len(shown) + 2, 4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for number, method in enumerate(methods):
            own = [entry for entry in entries if entry["method"] == method]
            for reading, style in (("right", "o-"), ("swapped", "x--")):
                aside = 0.06 * (number - (len(methods) - 1) / 2)
                points = [
                    (shots.index(entry["shots"]) + aside, entry["metrics"][reading][metric])
                    for entry in own
                    if entry["metrics"].get(reading, {}).get(metric, {}).get("interval")
                ]
                if not points or (reading == "swapped" and method in BASELINES):
                    continue
                places, values = zip(*sorted(points, key=lambda point: point[0]), strict=True)
                middle = [value["value"] for value in values]
                spread = [
                    [max(value["value"] - value["interval"][0], 0) for value in values],
                    [max(value["interval"][1] - value["value"], 0) for value in values],
                ]
                label = method if reading == "right" else f"{method}, swapped scan"
                axes.errorbar(places, middle, spread, fmt=style, color=f"C{number}", capsize=2, label=label)
        axes.set_xticks(range(len(shots)), [str(count) for count in shots])
        axes.set_xlabel("training subjects of each class")
        unit = f" ({results['unit']})" if metric == "mean_absolute_error" and results["unit"] else ""
        axes.set_ylabel(TITLES[metric] + unit)
    figure.legend(*axes.get_legend_handles_labels(), fontsize="small", loc="outside right upper")
    figure.suptitle(f"{results['task']}: {results['data']['dataset']}, 95 % intervals over subjects")
    _save(figure, path)


def _plot_calibration(results: dict, path: Path) -> None:
    """Share of right answers by the probability they were given."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    for entry in results["methods"]:
        if entry["calibration"] and entry["method"] != "majority":
            places = [place["probability"] for place in entry["calibration"]]
            right = [place["right"] for place in entry["calibration"]]
            label = " ".join(str(part) for part in (entry["method"], entry["shots"], entry["variant"]) if part != "")
            axes.plot(places, right, ":" if entry["variant"] else "-", marker="o", label=label)
    axes.set_xlabel("probability of the likeliest answer")
    axes.set_ylabel("share of right answers")
    axes.legend(fontsize="small")
    _save(figure, path)


def _save(figure, path: Path) -> None:
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
