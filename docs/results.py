"""Writes results.md, and its plots, out of the CSV files in benchmarks/results: python docs/results.py"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure


PAGE = Path(__file__).with_name("results.md")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
MAIN_METRICS = ("roc_auc", "within_site_auc", "pearson_r")
# of a model; the other conditions are baselines
MODELS = ("zero-shot", "few-shot", "tuned", "probe")
BEGINNING = """# Results

Written by `python docs/results.py` from the CSV files in [`benchmarks/results/`](../benchmarks/results).
"""


@dataclass(frozen=True)
class Section:
    """What a file holds, in a sentence; shown: the part of its table in the page; plot: draws the table."""

    heading: str
    sentence: str
    shown: Callable[[pd.DataFrame], pd.DataFrame] = lambda table: table
    plot: Callable[[pd.DataFrame, Axes], None] | None = None


def with_bounds(values: pd.Series, low: pd.Series, high: pd.Series) -> list[str]:
    """ "value (low to high)", without brackets where there are no bounds, nothing where there is no value."""
    cells = zip(values.map(number), low.map(number), high.map(number), strict=True)
    return [f"{value} ({least} to {most})" if value and least else value for value, least, most in cells]


def by_condition(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each figure, a column for each condition: mean (lowest to highest)."""
    cells = with_bounds(table["mean"], table["lowest"], table["highest"])
    table = table.assign(cell=cells, condition=table["condition"].fillna("value"))
    order = list(dict.fromkeys(table["what"])), list(dict.fromkeys(table["condition"]))
    return table.pivot(index="what", columns="condition", values="cell").loc[order].reset_index()


def by_split(table: pd.DataFrame, metrics: Sequence[str] = MAIN_METRICS) -> pd.DataFrame:
    """
    A row for each task, metric and condition, a column for each split: value (low to high) of all its test subjects
    together; where its folds have results of their own, another one for their mean (lowest to highest). Numbers are
    the expected ones where the answers are groups; where the answers are numbers, expected ones stand beside those
    that were given.
    """
    kept = (table["comparison"] == "right") | ((table["comparison"] == "shuffled") & table["condition"].isin(MODELS))
    expected = (table["variant"] == "expected value") & (table["metric"] == "pearson_r")
    kept &= table["metric"].isin(metrics) & ((table["variant"].fillna("") == "") | expected)
    given = table[(table["variant"].fillna("") == "") & (table["metric"] == "pearson_r")]
    both = expected & (table["task"] + table["condition"]).isin(given["task"] + given["condition"])
    table = table.assign(condition=table["condition"].mask(both, table["condition"] + ", expected value"))
    index = ["task", "metric", "condition", "shots", "comparison"]
    table = table[kept].drop_duplicates([*index, "split"])
    in_fold = table["split"].str.contains(", fold ")
    of_folds = table[in_fold].assign(split=table["split"].str.replace(r", fold \d+$", ", mean of folds", regex=True))
    means = of_folds.groupby([*index, "split"])["value"].agg(value="mean", low="min", high="max").reset_index()
    table = pd.concat([table[~in_fold], means])
    order = list(dict.fromkeys(table[index].itertuples(index=False, name=None))), list(dict.fromkeys(table["split"]))
    cells = table.assign(cell=with_bounds(table["value"], table["low"], table["high"]))
    return cells.pivot(index=index, columns="split", values="cell").loc[order].reset_index()


def over_folds(table: pd.DataFrame) -> pd.DataFrame:
    """Means over the folds, which hold the same rows in the same order."""
    names = [name for name in table if not pd.api.types.is_numeric_dtype(table[name])]
    place = table.groupby("fold").cumcount().rename("place")
    means = table.drop(columns="fold").groupby([place, *names], sort=False).mean()
    return means.reset_index(names).reset_index(drop=True)


def by_lead(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each figure and method, a column for each lead; differences as value (low to high)."""
    figures = ["r_squared", "correlation", "crps", "coverage"]
    long = table.melt(["seconds", "method"], figures, "figure", "value").assign(low=pd.NA, high=pd.NA)
    for figure in ("r_squared", "crps"):
        names = {f"{figure}_minus_best": "value", f"{figure}_low": "low", f"{figure}_high": "high"}
        known = table[table[f"{figure}_minus_best"].notna()]
        part = known[["seconds", "method", *names]].rename(columns=names).assign(figure=f"{figure} minus best other")
        long = pd.concat([long, part])
    values = long["value"].map(number)
    long["cell"] = values.where(long["low"].isna(), with_bounds(long["value"], long["low"], long["high"]))
    order = list(dict.fromkeys(long[["figure", "method"]].itertuples(index=False, name=None)))
    wide = long.pivot(index=["figure", "method"], columns="seconds", values="cell").loc[order]
    return wide.rename(columns=lambda seconds: f"{seconds} s").reset_index()


def others_by_lead(table: pd.DataFrame) -> pd.DataFrame:
    """R2 of each data's methods as `by_lead`, and of how many subjects."""
    parts = []
    for data, part in table.groupby("data", sort=False):
        rows = by_lead(part)
        rows = rows[rows["figure"].str.startswith("r_squared")]
        parts.append(rows.assign(data=data, subjects=part["subjects"].iloc[0]))
    every = pd.concat(parts)
    return every[["data", "subjects", *every.columns.drop(["data", "subjects"])]]


def by_family(table: pd.DataFrame) -> pd.DataFrame:
    """Medians over the descriptors of each family, and how many there are."""
    groups = table.drop(columns=["descriptor", "scans"]).groupby("family", sort=False)
    return groups.median().reset_index().assign(descriptors=groups.size().to_numpy())


def plot_rate(table: pd.DataFrame, axes: Axes) -> None:
    for coder, part in over_folds(table).groupby("coder", sort=False):
        part = part.sort_values("bits")
        for column, style in (("r_squared", "o-"), ("fc_correlation", "s--")):
            axes.plot(part["bits"], part[column], style, label=f"{coder}, {column}")
    axes.set(xscale="log", xlabel="bits a patch of 32 s", ylabel="R2, correlation of connectivity")


def plot_leads(table: pd.DataFrame, axes: Axes) -> None:
    for method, part in table.groupby("method", sort=False):
        if method != "persistence":
            axes.plot(part["seconds"], part["r_squared"], "o-", label=method)
    axes.set(xscale="log", xlabel="lead, s", ylabel="R2")
    axes.set_xticks(seconds := sorted(set(table["seconds"])), list(map(str, seconds)))
    axes.minorticks_off()


def plot_scaling(table: pd.DataFrame, axes: Axes) -> None:
    """Bits that each method saves beside frequencies of as many subjects."""
    alone = table[table["method"] == "unigram"].set_index("training_subjects")["bits_per_token"]
    for method, part in table[table["method"] != "unigram"].groupby("method", sort=False):
        saved = part["training_subjects"].map(alone) - part["bits_per_token"]
        axes.plot(part["training_subjects"], saved, "o-", label=method)
    axes.set(xscale="log", xlabel="training subjects", ylabel="bits a token less than frequencies")
    axes.set_xticks(counts := list(alone.index), list(map(str, counts)))
    axes.minorticks_off()


SECTIONS = {
    "demo.csv": Section(
        "The demo",
        "What the demo's model reads in scans of held-out subjects and what its codec keeps, "
        "as mean (lowest to highest) over seeds, at revision 9dbc8cb: `python benchmarks/demo.py runs/demo-seeds`.",
        by_condition,
    ),
    "people_release.csv": Section(
        "Labels of subjects: the release recipe",
        "Sex, age and diagnosis of test subjects by models of the release recipe, one trained for each fold on the "
        "training subjects' labels (its answers stand under zero-shot: evaluation taught it nothing more), beside the "
        "subject-shuffled control and baselines that learned from the same subjects. Brackets are 95 % intervals over "
        "the subjects of all folds together and, of means of folds, the lowest and the highest fold. Numbers of age "
        "groups are mean ages of the training subjects' groups, weighted by probabilities. How many updates stage 3 "
        "has and how large scores are was chosen with folds 0 to 2 in view; folds 3 and 4 were run once, at the end: "
        "`python benchmarks/people.py release PREPARED`.",
        by_split,
    ),
    "people_joint.csv": Section(
        "Labels and states by one model: two datasets, two atlases",
        "The same by models of the release recipe that learned from ABIDE (CC200) and SONG (Schaefer-200) at once, "
        "with the state of each of SONG's recordings: `python benchmarks/people.py release PREPARED PREPARED --tasks "
        "asd,sex,age,age_group,state`.",
        lambda table: by_split(table, (*MAIN_METRICS, "accuracy")),
    ),
    "people_sites.csv": Section(
        "Labels of subjects of other sites: the release recipe",
        "The same, settings included, with folds of whole sites: codec, alignment, tuning and baselines have seen no "
        "scan of the sites that they are tested on: `python benchmarks/people.py release PREPARED --sites "
        "--no-descriptors`.",
        by_split,
    ),
    "people_another_study.csv": Section(
        "States in another study, learned without an update",
        "The state of each of SONG's recordings (Schaefer-200), in folds over its subjects, by models of the release "
        "recipe that were trained on ABIDE (CC200), of two folds: scores by ridge regression and a calibration, no "
        "update of the language model: `python benchmarks/people.py another-study PREPARED`.",
        lambda table: by_split(table, ("accuracy", "balanced_accuracy", "calibration_error")),
    ),
    "people_new.csv": Section(
        "A task that the model was not trained on",
        "The same by models tuned on so many subjects of each class: "
        "`python benchmarks/people.py release PREPARED --new asd --shots 0,10,50 --no-descriptors`.",
        by_split,
    ),
    "people_descriptors.csv": Section(
        "Descriptors of scans: the release recipe",
        "What the same models say of the descriptors of held-out subjects' scans, from codes, as mean (lowest to "
        "highest) over folds; chance is a third: "
        "`python benchmarks/people.py release PREPARED`.",
        by_condition,
    ),
    "codec_rate.csv": Section(
        "Codec: rate and distortion",
        "R2 of the decoded signal and correlation of its connectivity by bits of a patch, means over folds; "
        "transform: principal components and cosines, as many bits as an ideal entropy coder of the test scans takes: "
        "`python benchmarks/codec.py labels --data FOLDER`.",
        over_folds,
        plot_rate,
    ),
    "codec_labels.csv": Section(
        "Codec: labels",
        "Labels of test subjects by ridge regression on scan features of the codes (of patches, of whole scans, or "
        "both) and on the signal's connectivity, with 95 % intervals over subjects of the difference to the signal's "
        "tangent space at its arithmetic mean (the tangent_ridge of evaluations, at the geometric one and with "
        "missing ROIs completed, is better): "
        "`python benchmarks/codec.py labels --data FOLDER`.",
    ),
    "codec_identification.csv": Section(
        "Codec: identification",
        "How often a scan's other half is found among those of all test subjects, by fold: "
        "`python benchmarks/codec.py labels --data FOLDER`.",
    ),
    "codec_atlases.csv": Section(
        "Codec: another atlas",
        "What codes keep of scans in ROIs that the codec was not fitted on: "
        "`python benchmarks/codec.py states --data FOLDER --state FOLDER`.",
    ),
    "codec_parcellations.csv": Section(
        "Codec: half as many ROIs",
        "Scans of test subjects in the ROIs of their atlas and in half as many, each the mean of two neighbours: "
        "correlation of what the codes give within a scan and, by feature, over scans, and labels read by one ridge "
        "regression (ROC-AUC; age: Pearson r) through the ROIs that it was fitted on and through the others; means "
        "over folds: `python benchmarks/codec.py parcellations --data FOLDER`.",
        over_folds,
    ),
    "codec_levels.csv": Section(
        "Codec: use of the codes",
        "Share of each level's codebook that occurs in the codes of test subjects' scans, and the codes' perplexity, "
        "means over folds: `python benchmarks/codec.py parcellations --data FOLDER`.",
        over_folds,
    ),
    "codec_states.csv": Section(
        "Codec: cognitive states",
        "The condition of windows of 64 s by ridge regression, over folds of subjects: "
        "`python benchmarks/codec.py states --data FOLDER --state FOLDER`.",
    ),
    "codec_patches.csv": Section(
        "Codec: patches of 8, 16 and 32 seconds",
        "Codecs of shorter patches, in as many tokens and bits a second, means over folds: what is kept of test "
        "subjects, labels by ridge regression, bits a second of next codes by their frequencies and the share that "
        "expected vectors save, R2 of forecasts by lead: `python benchmarks/codec.py patches --data FOLDER`.",
        over_folds,
    ),
    "codec_losses.csv": Section(
        "Codec: training and contrastive loss",
        "Codecs of 16 levels as fitted, trained after that, and with a loss against a frozen language model, means "
        "over folds: what is kept of test subjects, labels by ridge regression, and which windows find their "
        "description among all, by the alignment head (whole scans) and by ridge regression on scan features (linear; "
        "windows of 320 s): "
        "`python benchmarks/codec.py losses --data FOLDER`.",
        over_folds,
    ),
    "codec_speed.csv": Section(
        "Codec: speed",
        "One thread: seconds of the clock and of the processor, GFLOP of the matrix products, their rate as a share "
        "of that of a plain product, and the number of cores that other programs kept busy meanwhile (`others`): "
        "`python benchmarks/codec.py speed --data FOLDER`.",
    ),
    "forecast_signal.csv": Section(
        "Forecasts of the signal",
        "R2, correlation, CRPS and coverage of 80 % intervals by lead, on held-out subjects measured at a repetition "
        "time of 2.0 s, pooled over ROIs, with 95 % intervals over subjects of the difference to the best baseline: "
        "`python benchmarks/forecast.py signal --data PREPARED --work FOLDER`.",
        by_lead,
        plot_leads,
    ),
    "forecast_others.csv": Section(
        "Forecasts of the signal: other data",
        "R2 by lead on held-out subjects of other sites and atlases, five folds, by codecs and dynamics fitted there, "
        "with 95 % intervals over subjects of the difference to the best baseline: "
        "`python benchmarks/forecast.py others --data PREPARED`.",
        others_by_lead,
    ),
    "forecast_codes.csv": Section(
        "Next codes",
        "Bits a token of the held-out subjects of the first three of five folds, all levels, by number of training "
        "subjects, with 95 % intervals over subjects of the difference to the best other method: "
        "`python benchmarks/next_codes.py codes --data PREPARED --work FOLDER --folds 3`.",
        plot=plot_scaling,
    ),
    "forecast_code_levels.csv": Section(
        "Next codes by level",
        "The same in bits a code, with most training subjects: "
        "`python benchmarks/next_codes.py codes --data PREPARED --work FOLDER --folds 3`.",
    ),
    "forecast_surprise.csv": Section(
        "Surprise",
        "Surprise of frames (nats a coefficient) and of next codes (bits a token), on held-out subjects of the "
        "first three of five folds with 288 s or more at a repetition time of 2.0 s: "
        "the AUC of randomised scans and of their patches against real ones, and how often "
        "a splice of another subject's frames is found within a patch: "
        "`python benchmarks/next_codes.py surprise --data PREPARED --work FOLDER --folds 3`.",
    ),
    "forecast_cost.csv": Section(
        "Time of forecasts",
        "Seconds on one core: `python benchmarks/next_codes.py cost --data PREPARED --work FOLDER`.",
    ),
    "overhead.csv": Section(
        "Cost beside the backbone",
        "Seconds of the processor and peak memory of the joint model with a scan of ten patches and of its backbone "
        "with text of equal length, one thread: `python benchmarks/overhead.py MODEL`.",
    ),
    "language.csv": Section(
        "Language kept",
        "Perplexity of held-out plain text (256 tokens of each document) by the backbone and by models of the release "
        "recipe, of the five folds: `python benchmarks/language.py MODEL...`.",
    ),
    "descriptors_reliability.csv": Section(
        "Descriptors: reliability",
        "Correlation of descriptors between the halves of a scan, and their mean difference between sessions and "
        "between subjects in standard deviations, as medians over the descriptors of a family: "
        "`python benchmarks/descriptors.py`.",
        by_family,
    ),
    "descriptors_identification.csv": Section(
        "Descriptors: identification",
        "For how many scans the most similar first half, by descriptors, is the same scan's or the same subject's: "
        "`python benchmarks/descriptors.py`.",
    ),
    "ask.csv": Section(
        "One question",
        "Seconds of `fmrilm ask` from start to answer, and of its parts, as medians; `others` is the number of cores "
        "that other programs kept busy meanwhile: `python benchmarks/ask.py MODEL`.",
        lambda table: table.drop(columns="versions", errors="ignore"),
    ),
    "rates.csv": Section(
        "Rates of one core",
        "Work done in a second of processor time, from which [scaling](scaling.md) is computed: "
        "`python benchmarks/rates.py`.",
    ),
    "attention.csv": Section(
        "Attention on a CPU",
        "Processor milliseconds of a training step in bfloat16 with the library's attention kernel (sdpa) and the "
        "plain one (eager), which stages 2 and 3 take there for short rows: `python benchmarks/attention.py`.",
    ),
    "waiting.csv": Section(
        "Waiting threads",
        "Milliseconds of a training step on two threads, alone and beside a busy process of one thread, by how "
        "OpenMP's threads wait; the commands and the Space let them sleep (PASSIVE). `others` is the number of cores "
        "that other programs kept busy: `python benchmarks/waiting.py`.",
    ),
    "newcomer.csv": Section(
        "A new user",
        "Seconds from a fresh clone in an empty environment to an answer, one run; `others` is the number of cores "
        "that other programs kept busy meanwhile: `python benchmarks/newcomer.py FOLDER`.",
    ),
}


def number(value: object) -> str:
    """A cell: three decimals at most, nothing for what is not known."""
    if pd.isna(value):
        return ""
    return f"{value:,.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def page(results: Path) -> str:
    """The page about the CSV files in a folder; ValueError for a file without a section."""
    found = {path.name: path for path in results.glob("*.csv")}
    if unknown := sorted(found.keys() - SECTIONS.keys()):
        raise ValueError(f"{results}: expected files of {', '.join(SECTIONS)}, got {', '.join(unknown)}")
    parts = [BEGINNING]
    for name, section in SECTIONS.items():
        if name in found:
            shown = section.shown(pd.read_csv(found[name], keep_default_na=False, na_values=["", "nan"]))
            rows = [shown.columns, ["---"] * shown.shape[1], *shown.map(number).itertuples(index=False)]
            lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
            source = f"[`{name}`](../benchmarks/results/{name})"
            parts.append(f"## {section.heading}\n\n{section.sentence} Table: {source}.\n\n{lines}\n")
            if section.plot:
                parts.append(f"![{section.heading}](images/{Path(name).stem}.png)\n")
    return "\n".join(parts)


def draw(results: Path, images: Path) -> None:
    """The plots of the tables that have one."""
    for name, section in SECTIONS.items():
        if section.plot and (results / name).exists():
            figure = Figure(figsize=(7, 4), layout="constrained")
            axes = figure.subplots()
            section.plot(pd.read_csv(results / name), axes)
            axes.legend(fontsize="small")
            figure.savefig(images / f"{Path(name).stem}.png", dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    PAGE.write_text(page(RESULTS), encoding="utf-8")
    draw(RESULTS, PAGE.with_name("images"))
