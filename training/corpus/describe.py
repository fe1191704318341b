"""From a dataset of scans to a corpus: descriptors, descriptions and questions, split by subject; resumable."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from huggingface_hub import DatasetCardData
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from fmrilm.processors import Atlas, FmriLMFeatureExtractor
from fmrilm.processors.descriptors.cohort import Cohort
from fmrilm.processors.descriptors.gradients import fit_references
from fmrilm.processors.descriptors.measures import FAMILIES, describe, descriptor_names
from fmrilm.processors.descriptors.questions import Questioner

from ..data.card import CORPUS, card_config, card_row
from ..data.parallel import run_parallel
from ..data.shards import keep_settings, write_arrays, write_atlases, write_whole
from ..data.splits import SplitArguments, split_rows
from .source import Source
from .writer import CorpusSettings, CorpusWriter, Shard, plan_shards


COHORT = "cohort"


@dataclass(frozen=True)
class Outcome:
    """scans: how many were written. left_out: why others were not, by their number. rejection_rate: of rewrites."""

    scans: int
    left_out: dict[int, str]
    rejection_rate: float | None


def describe_dataset(
    source: Source,
    output: Path,
    settings: CorpusSettings,
    cohort: Cohort | None = None,
    jobs: int = 1,
    scheduler: str | None = None,
) -> Outcome:
    """
    Write the corpus to `output`, a new folder. Until it is complete, all is in `output`.partial, where the same call
    goes on after an end of any kind.

    cohort: fitted before; without one, it is fitted on the training subjects. jobs, scheduler: see `run_parallel`.
    """
    if output.exists():
        raise ValueError(f"{output} exists: expected a new folder")
    splits = subject_splits(source, settings.split)
    if cohort is not None:
        for atlas in source.atlases.values():
            cohort.check_atlas(atlas)
    shards = plan_shards(source, splits, settings.shard_size)
    work = output.with_name(f"{output.name}.partial")
    known = {"split": settings.split.describe(), "scans": source.fingerprint, "cohort": cohort and cohort.name}
    _begin(work, {**asdict(settings), **known})
    fitted = cohort is None
    cohort, values, left_out = _measure(source, shards, work, cohort, jobs, scheduler)
    asked = _ask(source, shards, cohort, values, settings)
    writer = CorpusWriter(source, cohort, values, asked, settings)
    corpus = work / "corpus"
    # `datasets` cannot read a file without rows
    planned, shards = shards, [shard for shard in shards if not left_out.keys() >= set(shard.scans)]
    if not shards:
        raise ValueError(f"no scan could be described; the first: {next(iter(left_out.values()))}")
    for shard in tqdm(shards, desc="writing", unit="shard"):
        if not (corpus / shard.file).exists():
            table = writer.table(shard, [scan for scan in shard.scans if scan not in left_out])
            write_whole(corpus / shard.file, lambda path, table=table: pq.write_table(table, path))
    rejection_rate = _rejection_rate(corpus, shards) if settings.rewrite else None
    outcome = Outcome(sum(len(shard.scans) for shard in planned) - len(left_out), left_out, rejection_rate)
    cohort.save(corpus / COHORT)
    write_atlases(corpus, source.atlases.values())
    write_whole(corpus / "README.md", _card(source, shards, corpus, cohort, fitted, outcome, settings))
    # what a run goes on from lasts until the corpus is in its place
    corpus.rename(output)
    shutil.rmtree(work)
    return outcome


def subject_splits(source: Source, args: SplitArguments) -> dict[str, str]:
    """Train or test by subject, by the rule of all programs. A name at several sites counts as one subject."""
    names = source.table["subject"].to_numpy()
    training, test = (set(names[rows]) for rows in split_rows(source.table, args))
    return dict.fromkeys(training, "train") | dict.fromkeys(test, "test")


# One scan as it goes to a worker: signal [time, rois], tr in s, name of its atlas and, if known, censored [time].
RawScan = dict[str, Any]


def prepare_shard(scans: Sequence[RawScan], atlases: dict[str, Atlas]) -> list[np.ndarray | str]:
    """Signals as the models see them, float32 [time, rois], missing ROIs NaN; of an unusable one, the reason."""
    # `prepare` refused the scans that lack too much
    extractor = FmriLMFeatureExtractor(atlases=list(atlases.values()), max_missing_rois=1.0)
    prepared: list[np.ndarray | str] = []
    for scan in scans:
        content = {name: value for name, value in scan.items() if name != "atlas" and value is not None}
        try:
            prepared.append(extractor.prepare_signal(content, atlas=scan["atlas"])[0])
        except ValueError as error:
            prepared.append(str(error))
    return prepared


def describe_shard(
    scans: Sequence[RawScan], atlases: dict[str, Atlas], measures: list[str], references: dict[str, np.ndarray]
) -> tuple[np.ndarray, list[str]]:
    """Descriptors float64 [scans, names], NaN for a scan that cannot be described, and of each why it cannot ("")."""
    repetition_time = FmriLMFeatureExtractor().repetition_time
    values = np.full((len(scans), len(descriptor_names(measures))), np.nan)
    reasons = []
    for row, (scan, signal) in enumerate(zip(scans, prepare_shard(scans, atlases), strict=True)):
        if isinstance(signal, str):
            reasons.append(signal)
            continue
        try:
            values[row] = describe(signal, atlases[scan["atlas"]], measures, repetition_time, references)
            reasons.append("")
        except ValueError as error:
            reasons.append(str(error))
    return values, reasons


def _measure(
    source: Source, shards: Sequence[Shard], work: Path, cohort: Cohort | None, jobs: int, scheduler: str | None
) -> tuple[Cohort, np.ndarray, dict[int, str]]:
    """The cohort, the descriptors [scans, names] of all scans, and why some have none, by their number."""
    measures = list(FAMILIES) if cohort is None else cohort.measures
    training = [shard for shard in shards if shard.split == "train"]
    if cohort is None:
        path = work / "references.safetensors"
        if not path.exists():
            found = fit_references(_prepared(source, training, jobs, scheduler))
            write_whole(path, lambda path: save_file(found, path))
        references = load_file(path)
    else:
        references = cohort.references
    todo = [shard for shard in shards if not _descriptor_file(work, shard).exists()]
    calls = ((_scans(source, shard), source.atlases, measures, references) for shard in todo)
    results = run_parallel(describe_shard, calls, jobs, scheduler)
    with tqdm(desc="descriptors", unit="scan", total=sum(len(shard.scans) for shard in todo)) as progress:
        for shard, (values, reasons) in zip(todo, results, strict=True):
            write_arrays(_descriptor_file(work, shard), values=values, reasons=np.array(reasons))
            progress.update(len(shard.scans))
    descriptors = np.full((len(source.table), len(descriptor_names(measures))), np.nan)
    left_out = {}
    for shard in shards:
        with np.load(_descriptor_file(work, shard), allow_pickle=False) as arrays:
            descriptors[shard.scans] = arrays["values"]
            left_out |= {scan: str(why) for scan, why in zip(shard.scans, arrays["reasons"], strict=True) if why}
    if cohort is None:
        fitted = [scan for shard in training for scan in shard.scans if scan not in left_out]
        if not fitted:
            raise ValueError(f"no training scan could be described; the first: {next(iter(left_out.values()))}")
        subjects = source.table["subject"].iloc[fitted].nunique()
        if subjects < 2:
            raise ValueError(f"expected at least 2 training subjects to fit a cohort on, got {subjects}")
        atlases = source.atlases.values()
        cohort = Cohort.fit(source.name, measures, descriptors[fitted], subjects, atlases, references)
    return cohort, descriptors, left_out


def _prepared(
    source: Source, shards: Sequence[Shard], jobs: int, scheduler: str | None
) -> Iterator[tuple[np.ndarray, Atlas]]:
    """Signals of the shards' scans that can be read, each with its atlas."""
    calls = ((_scans(source, shard), source.atlases) for shard in shards)
    with tqdm(desc="references", unit="scan", total=sum(len(shard.scans) for shard in shards)) as progress:
        for shard, signals in zip(shards, run_parallel(prepare_shard, calls, jobs, scheduler), strict=True):
            for scan, signal in zip(shard.scans, signals, strict=True):
                if not isinstance(signal, str):
                    yield signal, source.atlases[source.table.at[scan, "atlas"]]
            progress.update(len(shard.scans))


def _ask(
    source: Source, shards: Sequence[Shard], cohort: Cohort, values: np.ndarray, settings: CorpusSettings
) -> dict[int, list[dict[str, Any]]]:
    """Questions by number of the scan; scans are compared within their split and atlas."""
    asked = {}
    for number, split in enumerate(("train", "test")):
        scans = [scan for shard in shards if shard.split == split for scan in shard.scans]
        if scans:
            groups = source.table["atlas"].iloc[scans].tolist()
            seed = [settings.seed, number]
            questioner = Questioner(values[scans], groups, cohort, seed)
            for row, scan in enumerate(scans):
                asked[scan] = [
                    {**asdict(question), "scans": [scans[place] for place in question.scans]}
                    for question in questioner.ask(row, settings.questions)
                ]
    return asked


def _scans(source: Source, shard: Shard) -> list[RawScan]:
    rows: Any = source.parts[shard.config]
    rows = rows.select_columns([name for name in ("signal", "tr", "atlas", "censored") if name in rows.column_names])
    rows = rows.select([scan - shard.first for scan in shard.scans]).with_format("numpy")
    return [
        {**row, "signal": np.asarray(row["signal"], np.float32), "tr": float(row["tr"]), "atlas": str(row["atlas"])}
        for row in rows
    ]


def _descriptor_file(work: Path, shard: Shard) -> Path:
    return (work / "descriptors" / shard.file).with_suffix(".npz")


def _begin(work: Path, settings: dict[str, Any]) -> None:
    """A new folder to work in, or the one of a run of the same settings that did not end."""
    path = work / "settings.json"
    if not path.exists() and work.exists() and any(work.iterdir()):
        raise ValueError(f"{work} holds something else: expected no such folder, or one that was begun before")
    keep_settings(path, settings)


def _rejection_rate(corpus: Path, shards: Sequence[Shard]) -> float:
    """Share of the paragraphs whose rewrite was refused, over all shards, also those of a run before."""
    tables = (pq.read_table(corpus / shard.file, columns=["rewritten"]) for shard in shards)
    accepted = [value for table in tables for row in table["rewritten"].to_pylist() for value in row]
    return 1 - sum(accepted) / len(accepted)


def _card(
    source: Source,
    shards: Sequence[Shard],
    corpus: Path,
    cohort: Cohort,
    fitted: bool,
    outcome: Outcome,
    settings: CorpusSettings,
) -> str:
    members: dict[tuple[str, str], list[str]] = {}
    files: dict[str, list[Path]] = {}
    for shard in shards:
        written = [scan for scan in shard.scans if scan not in outcome.left_out]
        members.setdefault((shard.config, shard.split), []).extend(source.table["subject"].iloc[written])
        files.setdefault(shard.config, []).append(corpus / shard.file)
    configs = []
    for config, paths in files.items():
        parts = [{"split": split, "path": f"{config}/{split}-*.parquet"} for of, split in members if of == config]
        configs.append(card_config(config, parts, paths))
    left_out, rewriting = len(outcome.left_out), ""
    if outcome.rejection_rate is not None:
        rewriting = (
            f"Rewritten by {settings.rewrite} where its text has the same facts (`rewritten`, by paragraph); "
            f"{outcome.rejection_rate:.0%} of its texts did not and were refused."
        )
    return CORPUS.format(
        metadata=DatasetCardData(tags=["fmri", "neuroimaging"], configs=configs).to_yaml(),
        source=source.name,
        cohort=cohort.name,
        subjects=cohort.subjects,
        scans=cohort.windows,
        fitted=" and was fitted on the training split alone" if fitted else "",
        rows="\n".join(card_row(*key, len(of), len(set(of))) for key, of in members.items()),
        families=", ".join(dict.fromkeys(FAMILIES[measure] for measure in cohort.measures)),
        left_out=f"Left out, because they could not be read as signals: {left_out} scans. " if left_out else "",
        rewriting=rewriting,
        first=configs[0]["config_name"],
    )
