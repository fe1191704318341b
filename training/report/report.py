"""One self-contained page that shows what a run learned and what it did not."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .codec import ReportExample, codec_section, subjects_section, tokens_section
from .page import (
    as_count,
    as_interval,
    as_number,
    as_percent,
    as_points,
    as_text,
    bar,
    drawing,
    mean_of,
    pill,
    table,
    write_page,
)


CHANCE = 1 / 3  # of balanced accuracy over low, typical, high
# Mid-tones of a colour-blind safe palette: the same lines are legible on the light and the dark page.
CONDITIONS = {
    "right": ("right scan", "#0b7fc7", "o"),
    "swapped": ("swapped scan", "#e0690c", "s"),
    "noise": ("noise", "#8b93a0", "D"),
    "majority": ("majority answer", "#12a07a", "^"),
}


def write_report(path: Path, results: dict[str, Any], example: ReportExample) -> None:
    """Writes the page to `path` (see [`write_page`])."""
    sections = {
        "answers": ("Answers", _answers(results["answers"])),
        "families": ("Question families", _families(results["questions"]["families"])),
        "codec": ("From signal to codes and back", codec_section(results["codec"], example)),
        "tokens": ("The codes", tokens_section(results["codec"], example)),
        "subjects": ("Reconstruction per person", subjects_section(results["codec"]["subjects"])),
        "descriptions": ("Descriptions in free text", _descriptions(results["descriptions"])),
        "run": ("The run", _run(results["run"])),
    }
    write_page(path, "fMRI-LM: report of a run", _summary(results), sections)


def _summary(results: dict[str, Any]) -> str:
    data, codec, families = results["data"], results["codec"], results["questions"]["families"]
    overall = families["all"]
    right, swapped = overall["right"], overall["swapped"]
    difference = overall["difference"]
    gap, gap_interval = as_points(difference["value"]), as_interval(difference["interval"], "+.0f", "")
    single = {name: family["beats_swapped"] for name, family in families.items() if name != "all"}
    winners = [as_text(name) for name, beats in single.items() if beats]
    if overall["beats_swapped"]:
        verdict = f"The right scan beats a swapped one ({gap}, {gap_interval}): the answers depend on the scan."
    else:
        verdict = (
            f"<strong>The right scan does not beat a swapped one</strong> ({gap}, {gap_interval}): "
            "these numbers do not show that the answers depend on the scan."
        )
    verdict += f" Of {as_count(len(single), 'question family', 'question families')}, each taken alone, the right "
    verdict += f"scan beats a swapped one in {len(winners)}{': ' if winners else ''}{', '.join(winners)}."
    people = ", ".join(
        f"{as_text(name)} ({as_number(n['training'], 'd')} + {as_number(n['held_out'], 'd')})"
        for name, n in data["datasets"].items()
    )
    quick = " This was a quick run: it shows that every part works, not how well." if results["run"]["quick"] else ""
    r_squared = mean_of([subject["r_squared"] for subject in codec["subjects"]])
    bits = as_number(codec["bits_per_window"], ",")
    tiles = [
        ("Right scan", as_percent(right["accuracy"]), f"balanced accuracy, {as_interval(right['interval'])}"),
        ("Swapped scan", as_percent(swapped["accuracy"]), f"balanced accuracy, {as_interval(swapped['interval'])}"),
        ("Right − swapped", gap, f"95 % interval {gap_interval}"),
        ("Signal kept by the codes", as_percent(r_squared), f"of the variance, in {bits} bits a window"),
    ]
    cells = "".join(f"<div><dt>{name}</dt><dd><b>{value}</b>{note}</dd></div>" for name, value, note in tiles)
    return (
        '<header class="summary"><p class="kicker">fMRI-LM · report of a run</p>'
        "<h1>What the model reads in a brain scan</h1>"
        f"<p>The model learned from {as_count(data['training_windows'], 'window', 'windows')} of "
        f"{as_count(data['training_subjects'], 'person', 'people')} and was then asked about "
        f"{as_count(data['held_out_windows'], 'window', 'windows')} of "
        f"{as_count(data['held_out_subjects'], 'other', 'others')} it had never seen. Given the right scan, "
        f"it answers with {as_percent(right['accuracy'])} balanced accuracy (95 % interval "
        f"{as_interval(right['interval'])}); given a swapped scan (the same dataset, another "
        f"person), with {as_percent(swapped['accuracy'])} ({as_interval(swapped['interval'])}). Guessing gives "
        f"{as_percent(CHANCE)}.</p>"
        f'<p class="verdict{"" if overall["beats_swapped"] else " no"}">{verdict}</p>'
        f"<p>This is a demonstration, not a medical device.{quick}</p>"
        f'<p class="note">Datasets (training + held-out people): {people}. '
        f'Atlases: {", ".join(map(as_text, data["atlases"]))}.</p><dl class="tiles">{cells}</dl></header>'
    )


def _answers(answers: Sequence[dict[str, Any]]) -> str:
    rows = []
    for item in answers:
        bars = "".join(
            f"<div{' class=chosen' if choice == item['answer'] else ''}>{as_text(choice)}"
            f"<span>{as_percent(share)}</span>{bar(share or 0)}</div>"
            for choice, share in item["probabilities"].items()
        )
        correct = None if item["truth"] is None else item["answer"] == item["truth"]
        start = as_number(item["window_start_seconds"], ".0f", " s")
        rows.append(
            [
                f"{as_text(item['question'])}<small>{as_text(item['subject'])}, window from {start}</small>",
                as_text(item["truth"]),
                as_text(item["answer"]),
                f'<div class="choices">{bars}</div>',
                pill(correct, "correct", "wrong"),
            ]
        )
    right = sum(item["truth"] is not None and item["answer"] == item["truth"] for item in answers)
    return (
        f"<p>{as_count(len(answers), 'question', 'questions')} about people the model never saw, {right} answered "
        "correctly. The bars are the probability the model gives to each allowed answer; its answer is in bold.</p>"
        + table(["Question", "Truth", "Answer", "Probability", "Result"], rows, "answers", "Answers to questions")
    )


def _families(families: dict[str, dict[str, Any]]) -> str:
    ordered = {name: family for name, family in families.items() if name != "all"} | {"all": families["all"]}
    rows = []
    for name, family in ordered.items():
        measured = [family[key] for key in CONDITIONS]
        scores = [f"{as_percent(m['accuracy'])}<small>{as_interval(m['interval'])}</small>" for m in measured]
        gap = family["difference"]
        gap = f"{as_points(gap['value'])}<small>{as_interval(gap['interval'], '+.0f', '')}</small>"
        beats = pill(family["beats_swapped"], "yes", "no")
        rows.append([as_text(name), as_number(family["questions"], ","), *scores, gap, beats])
    labels = [label.capitalize() for label, *_ in CONDITIONS.values()]
    head = ["Family", "Questions", *labels, "Right − swapped", "Right beats swapped"]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, (key, (label, colour, marker)) in enumerate(CONDITIONS.items()):
            height = np.arange(len(ordered)) + 0.19 * (number - 1.5)
            bounds = np.array([family[key]["interval"] or (None, None) for family in ordered.values()], float)
            accuracy = np.array([family[key]["accuracy"] for family in ordered.values()], float)
            axes.hlines(height, *bounds.T * 100, color=colour, linewidth=2)
            axes.plot(accuracy * 100, height, marker, color=colour, markersize=6, label=label)
        ink = axes.xaxis.label.get_color()
        axes.axvline(100 * CHANCE, linestyle="--", color=ink, linewidth=1, label="chance, 1/3")
        axes.axhline(len(ordered) - 1.5, color=ink, linewidth=0.5)
        axes.set_yticks(range(len(ordered)), list(ordered))
        axes.set(xlabel="balanced accuracy (%)", xlim=(0, 100), ylim=(len(ordered) - 0.5, -0.5))
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", alpha=0.25, linewidth=0.6)
        figure.legend(loc="outside upper left", ncols=5)

    caption = (
        "Dots are balanced accuracies on the held-out questions of a family, lines their 95 % intervals. A family "
        "is read from the scan where blue lies to the right of orange; at the dashed line the model guesses."
    )
    return (
        "<p>The same questions, answered four ways: with the right scan, with other people's scans of "
        "the same dataset, with noise "
        "in its place, and always with the commonest answer.</p>"
        + drawing("Accuracy of each question family", draw, 1.2 + 0.62 * len(ordered), caption)
        + table(head, rows, "numbers", "Accuracy of each question family")
    )


def _descriptions(descriptions: dict[str, Any]) -> str:
    accuracy = descriptions["statement_accuracy"]
    pairs = "".join(
        f'<div class="pair"><h3>{as_text(item["subject"])}</h3>'
        f'<div><p class="note">Written by the model</p><p>{as_text(item["generated"])}</p></div>'
        f'<div><p class="note">True description</p><p>{as_text(item["truth"])}</p></div></div>'
        for item in descriptions["examples"]
    )
    return (
        f"<p>Asked to describe a scan, the model makes statements; {as_percent(accuracy['right'])} of them are true "
        f"when it is given the right scan, {as_percent(accuracy['swapped'])} when given a swapped one. Always stating "
        f"the commonest makes {as_percent(accuracy['majority'])} true.</p>{pairs}"
    )


def _run(run: dict[str, Any]) -> str:
    total = sum(value or 0 for value in run["seconds"].values())
    rows = [
        [as_text(stage), bar((value or 0) / (total or 1)), as_number(value, ",.1f")]
        for stage, value in run["seconds"].items()
    ]
    rows.append(["total", "", as_number(total, ",.1f")])
    versions = ", ".join(f"{as_text(name)} {as_text(version)}" for name, version in run["versions"].items())
    return (
        table(["Stage", "Share of the time", "Seconds"], rows, "stages", "Seconds of each stage")
        + f'<p class="note">Peak memory {as_number(run["peak_memory_gb"], ".1f", " GB")}. Versions: {versions}.</p>'
    )
