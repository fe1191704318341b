"""One self-contained page that shows what a run learned and what it did not."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fmrilm.processors.descriptors.networks import NETWORKS


CHANCE = 1 / 3  # of balanced accuracy over low, typical, high
# Mid-tones of a colour-blind safe palette: the same lines are legible on the light and the dark page.
CONDITIONS = {
    "right": ("right scan", "#0b7fc7", "o"),
    "swapped": ("swapped scan", "#e0690c", "s"),
    "noise": ("noise", "#8b93a0", "D"),
    "majority": ("majority answer", "#12a07a", "^"),
}
SIGNAL, RECONSTRUCTION = "#8b93a0", "#0b7fc7"
INKS = {"light": "#2b3440", "dark": "#cfd7e1"}
STYLE = """
:root{color-scheme:light dark;--page:#f4f5f7;--card:#fff;--ink:#1a2330;--soft:#566273;--line:#e0e4ea;--accent:#0b6cab;
--fill:#e8edf3;--good:#0a6b4f;--good-fill:#dcf3ea;--bad:#a3370b;--bad-fill:#fde7db}
@media(prefers-color-scheme:dark){:root{--page:#10141a;--card:#191f28;--ink:#e4e9ef;--soft:#9ba7b6;--line:#2c3541;
--accent:#5db2ee;--fill:#28313d;--good:#6fdcb6;--good-fill:#12372c;--bad:#ffa679;--bad-fill:#432212}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.6 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:68rem;margin:0 auto;padding:3.5rem 1.25rem 4rem}
.kicker{margin:0;color:var(--accent);font-size:.8rem;font-weight:650;letter-spacing:.09em;text-transform:uppercase}
h1{margin:.2rem 0 .8rem;font-size:clamp(1.9rem,4vw,2.7rem);line-height:1.15;letter-spacing:-.02em}
h2{margin:0 0 .35rem;font-size:1.35rem;line-height:1.3;letter-spacing:-.01em}
h3{margin:2rem 0 .3rem;font-size:1.02rem}
p{max-width:46rem;margin:.4rem 0}.summary p{font-size:1.1rem}.summary .kicker,p.note{font-size:.9rem}
.verdict{padding:.1rem 0 .1rem 1rem;border-left:4px solid var(--good)}.verdict.no{border-color:var(--bad)}
.note,figcaption{color:var(--soft);font-size:.9rem;line-height:1.5}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;margin:1.6rem 0 0;font-size:.92rem}
a{color:var(--accent);text-underline-offset:.2em}
.card{margin-top:1.5rem;padding:1.7rem 1.8rem;background:var(--card);border:1px solid var(--line);border-radius:14px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(10.5rem,1fr));gap:.8rem;margin:1.6rem 0 0}
.tiles div{padding:.9rem 1.1rem;background:var(--card);border:1px solid var(--line);border-radius:12px}
dt,dd{margin:0;color:var(--soft);font-size:.82rem}
dd b{display:block;color:var(--ink);font-size:1.75rem;font-weight:650;line-height:1.3;letter-spacing:-.02em}
figure{margin:.8rem 0 0}figure div{overflow-x:auto}figure img{display:block;width:100%;min-width:40rem;height:auto}
figcaption{max-width:46rem;margin-top:.6rem}
.scroll{overflow:auto;max-height:60rem;margin-top:1rem}.answers td:first-child{min-width:15rem}
table{width:100%;border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:.5rem .9rem .5rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
th{position:sticky;top:0;background:var(--card);color:var(--soft);font-size:.82rem;vertical-align:bottom}
.numbers :is(td,th):not(:first-child),.stages :is(td,th):last-child{text-align:right;white-space:nowrap}
:is(.numbers,.stages) tr:last-child td{font-weight:650;border-bottom:0}.stages td{vertical-align:middle}
small{display:block;color:var(--soft);font-size:.82rem;font-weight:400}
.pill{padding:.1rem .6rem;border-radius:1rem;font-size:.82rem;font-weight:650;white-space:nowrap}
.pill.yes{color:var(--good);background:var(--good-fill)}.pill.no{color:var(--bad);background:var(--bad-fill)}
.choices{display:grid;grid-auto-flow:column;grid-auto-columns:6.2rem;gap:.9rem;font-size:.82rem;color:var(--soft)}
.choices .chosen{color:var(--ink);font-weight:650}.choices span{float:right}
.bar{display:block;height:.45rem;border-radius:1rem;
background:linear-gradient(var(--accent) 0 0) 0/var(--share) 100% no-repeat var(--fill)}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(24rem,100%),1fr));gap:.8rem 2rem;padding:1.1rem 0}
.pair+.pair{border-top:1px solid var(--line)}.pair h3{grid-column:1/-1;margin:0}.pair p{margin:0}
@media print{.scroll{max-height:none}body{background:none}}
"""


@dataclass(frozen=True)
class ReportExample:
    """
    One held-out window and what the codec makes of it.

    signal, reconstruction: [time, rois], z-scores. repetition_time: s. networks: one per ROI. codes: [steps,
    tokens_per_step]. code_counts: [codebook_size], occurrences of each code over all held-out windows.
    """

    title: str
    signal: np.ndarray
    reconstruction: np.ndarray
    repetition_time: float
    networks: tuple[str, ...]
    codes: np.ndarray
    code_counts: np.ndarray


def write_report(path: Path, results: dict[str, Any], example: ReportExample) -> None:
    """Writes the page to `path` in one move, so that nobody ever opens half a page."""
    sections = {
        "answers": ("Answers", _answers(results["answers"])),
        "families": ("Question families", _families(results["questions"]["families"])),
        "codec": ("From signal to codes and back", _codec(results["codec"], example)),
        "tokens": ("The codes", _tokens(results["codec"], example)),
        "subjects": ("Reconstruction per person", _subjects(results["codec"]["subjects"])),
        "descriptions": ("Descriptions in free text", _descriptions(results["descriptions"])),
        "run": ("The run", _run(results["run"])),
    }
    links = "".join(f'<a href="#{key}">{title}</a>' for key, (title, _) in sections.items())
    cards = "".join(
        f'<section class="card" id="{key}"><h2>{title}</h2>{body}</section>' for key, (title, body) in sections.items()
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>fMRI-LM: report of a run</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head><body><main>'
        f"{_summary(results)}<nav>{links}</nav>{cards}"
        '<footer><p class="note">A demonstration, not a medical device: nothing here says anything about a person\'s '
        "health.</p></footer></main></body></html>\n"
    )
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)


def _text(value: Any) -> str:
    return "—" if value is None else escape(str(value))


def _number(value: float | None, form: str = ".2f", unit: str = "") -> str:
    if value is None or not np.isfinite(value):
        return "—"
    return f"{value:{form}}{unit}".replace("-", "−")


def _percent(value: float | None) -> str:
    return _number(None if value is None else 100 * value, ".0f", " %")


def _points(value: float | None) -> str:
    return _number(None if value is None else 100 * value, "+.0f", " points")


def _interval(bounds: Sequence[float | None] | None, form: str = ".0f", unit: str = " %") -> str:
    lower, upper = (_number(None if bound is None else 100 * bound, form) for bound in bounds or (None, None))
    return "—" if "—" in (lower, upper) else f"{lower} to {upper}{unit}"


def _count(number: int | None, one: str, many: str) -> str:
    return f"{_number(number, ',')} {one if number == 1 else many}"


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _bar(share: float) -> str:
    return f'<i class="bar" style="--share:{100 * share:.1f}%"></i>'


def _pill(value: bool | None, yes: str, no: str) -> str:
    return "—" if value is None else f'<span class="pill {"yes" if value else "no"}">{yes if value else no}</span>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], style: str, label: str) -> str:
    """A table of cells that are HTML already; it scrolls inside its card and can be reached by keyboard."""
    header = "".join(f"<th scope=col>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table class="{style}">'
        f"<thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _figure(title: str, draw: Callable[[Figure], None], height: float, caption: str) -> str:
    """A headed figure, its drawing embedded as SVG once for light and once for dark pages."""
    sources = {}
    for theme, ink in INKS.items():
        style = {"text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": ink, "xtick.color": ink}
        style |= {"ytick.color": ink, "font.size": 9, "axes.titlesize": 9.5, "axes.linewidth": 0.6}
        # names come from data: a dollar sign in one must not start a formula; the salt makes the file repeatable
        style |= {"text.parse_math": False, "svg.hashsalt": "fmrilm", "legend.frameon": False}
        style |= {"axes.spines.top": False, "axes.spines.right": False}
        with rc_context(style):
            figure = Figure(figsize=(10.5, height), layout="constrained")
            draw(figure)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        sources[theme] = f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return (
        f"<h3>{title}</h3><figure><div><picture>"
        f'<source media="(prefers-color-scheme:dark)" srcset="{sources["dark"]}">'
        f'<img src="{sources["light"]}" alt="{title}"></picture></div><figcaption>{caption}</figcaption></figure>'
    )


def _summary(results: dict[str, Any]) -> str:
    data, codec, families = results["data"], results["codec"], results["questions"]["families"]
    overall = families["all"]
    right, swapped = overall["right"], overall["swapped"]
    difference = overall["difference"]
    gap, gap_interval = _points(difference["value"]), _interval(difference["interval"], "+.0f", "")
    single = {name: family["beats_swapped"] for name, family in families.items() if name != "all"}
    winners = [_text(name) for name, beats in single.items() if beats]
    if overall["beats_swapped"]:
        verdict = f"The right scan beats a swapped one ({gap}, {gap_interval}): the answers depend on the scan."
    else:
        verdict = (
            f"<strong>The right scan does not beat a swapped one</strong> ({gap}, {gap_interval}): "
            "these numbers do not show that the answers depend on the scan."
        )
    verdict += f" Of {_count(len(single), 'question family', 'question families')}, each taken alone, the right scan "
    verdict += f"beats a swapped one in {len(winners)}{': ' if winners else ''}{', '.join(winners)}."
    people = ", ".join(
        f"{_text(name)} ({_number(n['training'], 'd')} + {_number(n['held_out'], 'd')})"
        for name, n in data["datasets"].items()
    )
    quick = " This was a quick run: it shows that every part works, not how well." if results["run"]["quick"] else ""
    r_squared = _mean([subject["r_squared"] for subject in codec["subjects"]])
    bits = _number(codec["bits_per_window"], ",")
    tiles = [
        ("Right scan", _percent(right["accuracy"]), f"balanced accuracy, {_interval(right['interval'])}"),
        ("Swapped scan", _percent(swapped["accuracy"]), f"balanced accuracy, {_interval(swapped['interval'])}"),
        ("Right − swapped", gap, f"95 % interval {gap_interval}"),
        ("Signal kept by the codes", _percent(r_squared), f"of the variance, in {bits} bits a window"),
    ]
    cells = "".join(f"<div><dt>{name}</dt><dd><b>{value}</b>{note}</dd></div>" for name, value, note in tiles)
    return (
        '<header class="summary"><p class="kicker">fMRI-LM · report of a run</p>'
        "<h1>What the model reads in a brain scan</h1>"
        f"<p>The model learned from {_count(data['training_windows'], 'window', 'windows')} of "
        f"{_count(data['training_subjects'], 'person', 'people')} and was then asked about "
        f"{_count(data['held_out_windows'], 'window', 'windows')} of "
        f"{_count(data['held_out_subjects'], 'other', 'others')} it had never seen. Given the right scan, it answers "
        f"with {_percent(right['accuracy'])} balanced accuracy (95 % interval {_interval(right['interval'])}); given "
        f"a swapped scan, with {_percent(swapped['accuracy'])} ({_interval(swapped['interval'])}). Guessing gives "
        f"{_percent(CHANCE)}.</p>"
        f'<p class="verdict{"" if overall["beats_swapped"] else " no"}">{verdict}</p>'
        f"<p>This is a demonstration, not a medical device.{quick}</p>"
        f'<p class="note">Datasets (training + held-out people): {people}. '
        f'Atlases: {", ".join(map(_text, data["atlases"]))}.</p><dl class="tiles">{cells}</dl></header>'
    )


def _answers(answers: Sequence[dict[str, Any]]) -> str:
    rows = []
    for item in answers:
        bars = "".join(
            f"<div{' class=chosen' if choice == item['answer'] else ''}>{_text(choice)}<span>{_percent(share)}</span>"
            f"{_bar(share or 0)}</div>"
            for choice, share in item["probabilities"].items()
        )
        correct = None if item["truth"] is None else item["answer"] == item["truth"]
        start = _number(item["window_start_seconds"], ".0f", " s")
        rows.append(
            [
                f"{_text(item['question'])}<small>{_text(item['subject'])}, window from {start}</small>",
                _text(item["truth"]),
                _text(item["answer"]),
                f'<div class="choices">{bars}</div>',
                _pill(correct, "correct", "wrong"),
            ]
        )
    right = sum(item["truth"] is not None and item["answer"] == item["truth"] for item in answers)
    return (
        f"<p>{_count(len(answers), 'question', 'questions')} about people the model never saw, {right} answered "
        "correctly. The bars are the probability the model gives to each allowed answer; its answer is in bold.</p>"
        + _table(["Question", "Truth", "Answer", "Probability", "Result"], rows, "answers", "Answers to questions")
    )


def _families(families: dict[str, dict[str, Any]]) -> str:
    ordered = {name: family for name, family in families.items() if name != "all"} | {"all": families["all"]}
    rows = []
    for name, family in ordered.items():
        measured = [family[key] for key in CONDITIONS]
        scores = [f"{_percent(m['accuracy'])}<small>{_interval(m['interval'])}</small>" for m in measured]
        gap = family["difference"]
        gap = f"{_points(gap['value'])}<small>{_interval(gap['interval'], '+.0f', '')}</small>"
        beats = _pill(family["beats_swapped"], "yes", "no")
        rows.append([_text(name), _number(family["questions"], ","), *scores, gap, beats])
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
        "<p>The same questions, answered four ways: with the right scan, with another scan in its place, with noise "
        "in its place, and always with the commonest answer.</p>"
        + _figure("Accuracy of each question family", draw, 1.2 + 0.62 * len(ordered), caption)
        + _table(head, rows, "numbers", "Accuracy of each question family")
    )


def _codec(codec: dict[str, Any], example: ReportExample) -> str:
    # networks in Yeo's order, then the others by name
    known = list(NETWORKS)
    rank = {n: (known.index(n) if n in known else len(known), n) for n in example.networks}
    order = np.array(sorted(range(len(example.networks)), key=lambda roi: rank[example.networks[roi]]))
    networks = np.array(example.networks)[order]
    pair = [np.asarray(values, float)[:, order] for values in (example.signal, example.reconstruction)]
    time, rois = pair[0].shape
    seconds = time * example.repetition_time
    edges = np.flatnonzero(networks[1:] != networks[:-1]) + 1
    bounds = np.array([0, *edges, rois])
    middles, names = (bounds[:-1] + bounds[1:]) / 2, [NETWORKS.get(n, n) for n in networks[bounds[:-1]]]
    # a flat reconstruction has no correlation: NaN, drawn blank
    with np.errstate(invalid="ignore", divide="ignore"):
        matrices = [np.corrcoef(values.T) for values in pair]
        cross = [float(np.corrcoef(pair[0][:, roi], pair[1][:, roi])[0, 1]) for roi in range(rois)]
    upper = np.triu_indices(rois, 1)
    similarity = float(np.corrcoef(*(matrix[upper] for matrix in matrices))[0, 1])
    # chosen by rule, not by hand: from nearly the best to nearly the worst
    chosen = [int(np.argsort(-np.array(cross))[int(share * (rois - 1))]) for share in (0.05, 0.35, 0.65, 0.95)]

    def mark(axes: Axes, *lines: Callable[..., Any]) -> None:
        for edge in edges:
            for line in lines:
                line(edge, color="#1a2330", linewidth=0.4, alpha=0.6)
        axes.set_yticks(middles, names)
        axes.tick_params(length=0)

    def carpets(figure: Figure) -> None:
        limit = np.percentile(np.abs(pair[0]), 98)
        panels = figure.subplots(1, 2, sharey=True)
        for axes, values, title in zip(panels, pair, ("signal", "reconstruction from codes"), strict=True):
            image = axes.imshow(
                values.T,
                cmap="RdBu_r",
                vmin=-limit,
                vmax=limit,
                aspect="auto",
                interpolation="none",
                extent=(0, seconds, rois, 0),
            )
            mark(axes, axes.axhline)
            axes.set(title=title, xlabel="time (s)")
        panels[0].set_ylabel("ROIs, by network")
        figure.colorbar(image, ax=panels, label="z-score", extend="both", shrink=0.7, pad=0.01)

    def traces(figure: Figure) -> None:
        clock = np.arange(time) * example.repetition_time
        panels = figure.subplots(len(chosen), 1, sharex=True, sharey=True)
        for axes, roi in zip(panels, chosen, strict=True):
            axes.plot(clock, pair[0][:, roi], color=SIGNAL, linewidth=1.1, label="signal")
            axes.plot(clock, pair[1][:, roi], color=RECONSTRUCTION, linewidth=1.5, label="reconstruction")
            name = NETWORKS.get(networks[roi], networks[roi])
            axes.set_title(f"{name}, ROI {order[roi] + 1}: r = {_number(cross[roi])}", loc="left")
            axes.set(ylabel="z-score", xlim=(0, seconds))
        panels[-1].set_xlabel("time (s)")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)

    def connectivity(figure: Figure) -> None:
        panels = figure.subplots(1, 3, sharey=True)
        titles = ("signal", "reconstruction", "reconstruction − signal")
        for axes, matrix, title in zip(panels, [*matrices, matrices[1] - matrices[0]], titles, strict=True):
            image = axes.imshow(matrix, "RdBu_r", vmin=-1, vmax=1, interpolation="none", extent=(0, rois, rois, 0))
            mark(axes, axes.axhline, axes.axvline)
            axes.set(title=title, xticks=[], xlabel="ROIs, same order")
        figure.colorbar(image, ax=panels, label="correlation (difference: same scale)", shrink=0.75, pad=0.01)

    return (
        f"<p>The codec writes a window of {time * rois:,} values ({time} frames × {rois} ROIs) as "
        f"{_number(codec['numbers_per_window'], ',')} codes, {_number(codec['bits_per_window'], ',')} bits. This is "
        f"what it keeps of one held-out window: {_text(example.title)}.</p>"
        + _figure(
            "Every ROI over time: signal and reconstruction",
            carpets,
            3.9,
            "One row per ROI, the same colours in both panels. Slow waves shared by many ROIs should stand in both; a "
            "paler reconstruction has lost amplitude.",
        )
        + _figure(
            "Four ROIs over time",
            traces,
            5.6,
            "From nearly the best to nearly the worst ROI of this window: 5, 35, 65 and 95 % down the list, ranked by "
            "the correlation r of signal and reconstruction.",
        )
        + _figure(
            "Functional connectivity of signal and reconstruction",
            connectivity,
            3.7,
            "Correlation of every ROI with every other. Over all pairs the two matrices correlate with r = "
            f"{_number(similarity)}; red in the difference is correlation that the codec adds.",
        )
    )


def _tokens(codec: dict[str, Any], example: ReportExample) -> str:
    codes, counts = np.asarray(example.codes), np.asarray(example.code_counts)
    steps, slots = codes.shape
    seconds = len(example.signal) * example.repetition_time
    ranked = np.sort(counts)[::-1]
    used, size, perplexity = codec["codebook_used"], codec["codebook_size"], codec["perplexity"]
    # 0: the commonest code of all, 1: the rarest
    rarity = (np.argsort(np.argsort(-counts, kind="stable")) / max((counts > 0).sum() - 1, 1)).clip(0, 1)

    def token_map(figure: Figure) -> None:
        axes = figure.subplots()
        image = axes.imshow(
            rarity[codes].T,
            cmap="viridis_r",
            vmin=0,
            vmax=1,
            aspect="auto",
            interpolation="none",
            extent=(0, seconds, slots - 0.5, -0.5),
        )
        if codes.size <= 320:
            for (step, slot), code in np.ndenumerate(codes):
                axes.text(
                    (step + 0.5) * seconds / steps,
                    slot,
                    str(code),
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color="white" if rarity[code] > 0.45 else "#1a2330",
                )
        axes.set(xlabel="time (s)", ylabel="token of the step", xticks=np.linspace(0, seconds, steps + 1))
        axes.set_yticks(range(slots))
        bar = figure.colorbar(image, ax=axes, label="how usual the code is", ticks=[0, 1], pad=0.01)
        bar.ax.set_yticklabels(["commonest", "rarest"])

    def usage(figure: Figure) -> None:
        axes = figure.subplots()
        ranks = np.arange(1, len(ranked) + 1)
        axes.fill_between(ranks, ranked, step="mid", color=RECONSTRUCTION, alpha=0.85, linewidth=0)
        axes.axhline(ranked.mean(), color=CONDITIONS["swapped"][1], linewidth=1.2, label="even use")
        if perplexity is not None:
            axes.axvline(perplexity, color=SIGNAL, linewidth=1.2, linestyle="--", label="perplexity")
        axes.set(xlabel="code, from the commonest to the rarest", ylabel="occurrences", xlim=(0.5, len(ranked) + 0.5))
        axes.set_yscale("symlog", linthresh=1)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper right")

    share = _percent(None if used is None or not size else used / size)
    return (
        f"<p>What the language model reads of the window above: {steps} steps of {seconds / steps:.0f} s, "
        f"{slots} codes each.</p>"
        + _figure(
            "Codes over time",
            token_map,
            1.1 + 0.3 * slots,
            "Each cell is one code with its number in the codebook; dark cells are codes rare in held-out windows.",
        )
        + _figure(
            "Use of the codebook",
            usage,
            3.2,
            f"{_number(used, ',')} of {_number(size, ',')} codes ({share}) occur in the held-out windows. The "
            f"perplexity is {_number(perplexity, '.0f')}: use is as varied as if that many codes occurred equally.",
        )
    )


def _subjects(subjects: Sequence[dict[str, Any]]) -> str:
    columns = [f"{model}{score}" for score in ("r_squared", "fc_correlation") for model in ("", "pca_", "mean_")]
    rows = [
        [
            f"{_text(s['subject'])}<small>{_text(s['dataset'])}</small>",
            _number(s["windows"], ","),
            *(_number(s[column]) for column in columns),
        ]
        for s in subjects
    ]
    windows = _number(sum(s["windows"] or 0 for s in subjects), ",")
    rows.append(["All, mean over people", windows, *(_number(_mean([s[c] for s in subjects])) for c in columns)])
    head = ["Person", "Windows", "R²", "R² of PCA", "R² of the mean", "FC", "FC of PCA", "FC of the mean"]
    return (
        "<p>R² is the share of the signal's variance that is kept; FC is the correlation of the functional "
        "connectivity before and after. Beside the codec stand two baselines: principal components, and the mean.</p>"
        + _table(head, rows, "numbers", "Reconstruction of each held-out person")
    )


def _descriptions(descriptions: dict[str, Any]) -> str:
    accuracy = descriptions["statement_accuracy"]
    pairs = "".join(
        f'<div class="pair"><h3>{_text(item["subject"])}</h3>'
        f'<div><p class="note">Written by the model</p><p>{_text(item["generated"])}</p></div>'
        f'<div><p class="note">True description</p><p>{_text(item["truth"])}</p></div></div>'
        for item in descriptions["examples"]
    )
    return (
        f"<p>Asked to describe a scan, the model makes statements; {_percent(accuracy['right'])} of them are true "
        f"when it is given the right scan, {_percent(accuracy['swapped'])} when given a swapped one. Always stating "
        f"the commonest makes {_percent(accuracy['majority'])} true.</p>{pairs}"
    )


def _run(run: dict[str, Any]) -> str:
    total = sum(value or 0 for value in run["seconds"].values())
    rows = [
        [_text(stage), _bar((value or 0) / (total or 1)), _number(value, ",.1f")]
        for stage, value in run["seconds"].items()
    ]
    rows.append(["total", "", _number(total, ",.1f")])
    versions = ", ".join(f"{_text(name)} {_text(version)}" for name, version in run["versions"].items())
    return (
        _table(["Stage", "Share of the time", "Seconds"], rows, "stages", "Seconds of each stage")
        + f'<p class="note">Peak memory {_number(run["peak_memory_gb"], ".1f", " GB")}. Versions: {versions}.</p>'
    )
