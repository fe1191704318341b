"""Cards of prepared scans and of corpora: README.md with the metadata that `load_dataset` and the Hub read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from huggingface_hub import DatasetCardData

from fmrilm.processors import Atlas
from fmrilm.processors.descriptors.cohort import Cohort

from .shards import content_version


SCANS = """---
{metadata}
---

# {title}

One row a scan, parcellated{cleaned} at its own repetition time.

| atlas | ROIs | scans | subjects | sessions | TR, s | minutes |
|---|---|---|---|---|---|---|
{rows}

```python
from datasets import load_dataset
scans = load_dataset("path of this folder", "{first}", split="train")
```

| column | content |
|---|---|
| `signal` | float32 [time, rois], time first; the atlas in `atlases/`: names, networks, MNI coordinates, parcels |
| `tr` | repetition time, s |
| `censored` | bool [time], True where a frame was interpolated |
| `missing_rois` | ROIs without a signal, such as those outside of the field of view; they are NaN |
| `atlas`, `subject`, `session`, `task`, `run`, `site` | text, empty where unknown |
{labels}
Split by `subject` before anything is fitted.

Settings: {settings}.
"""
CORPUS = """---
{metadata}
---

# Descriptions of fMRI scans

The scans of {source}, one a row, with descriptors computed from each, their descriptions, and questions whose answers
follow from them. Z-scores and tercile labels refer to the cohort {cohort} of {subjects} subjects and {scans} scans,
which is in `cohort/`{fitted}. No subject is in both splits.

| configuration | split | scans | subjects |
|---|---|---|---|
{rows}

| column | content |
|---|---|
| `scan` | number of the scan, which questions refer to |
| `descriptors` | values by name `measure/target`, empty where the scan or its atlas has none |
| `description` | text; every z-score in it is one of the cohort's |
| `messages` | chat: a request about the scan, answered with the description |
| `questions` | `kind`, `text`, `answer`, `choices` (none: an open question), `descriptors` it is about |
| `questions`, `scans` | numbers of the scans it is about, in the order of their blocks in a chat |
| `questions`, `margin` | distance to another answer in standard deviations of the cohort: small for near-ties |
| others | as in the source |

Families: {families}. {left_out}{rewriting}

```python
from datasets import load_dataset
scans = load_dataset("this folder or its Hub id", "{first}")
```
"""


def scans_card(
    output: Path, settings: Mapping[str, Any], atlases: Mapping[str, Atlas], title: str = "Prepared fMRI scans"
) -> str:
    """Describes the shards of prepared scans that are in `output`."""
    configs, rows = [], []
    for name, atlas in sorted(atlases.items()):
        shards = sorted((output / name).glob("*.parquet"))
        if not shards:
            continue
        table = pq.read_table(shards, columns=["tr", "subject", "session", "censored"]).to_pandas()
        times = ", ".join(f"{tr:g}" for tr in sorted(set(table["tr"].round(4))))
        minutes = (table["censored"].map(len) * table["tr"]).sum() / 60
        sessions = len(table[["subject", "session"]].drop_duplicates())
        counts = [name, len(atlas), len(table), table["subject"].nunique(), sessions, times, f"{minutes:.0f}"]
        rows.append(_row(*counts))
        configs.append(_config(name, f"{name}/*.parquet", shards))
    cleaned = any(settings[name] is not None for name in ("confounds", "high_pass", "low_pass"))
    shown = [f"{name} {value}" for name, value in settings.items() if name != "labels" and value is not None]
    return SCANS.format(
        title=title,
        metadata=DatasetCardData(configs=configs, tags=["fmri", "neuroimaging", "time-series"]).to_yaml(),
        cleaned=" and cleaned" if cleaned else "",
        rows="\n".join(rows),
        first=configs[0]["config_name"] if configs else "",
        labels="".join(f"| `{name}` | label, {kind} |\n" for name, kind in settings["labels"].items()),
        settings=", ".join(shown) or "none",
    )


def corpus_card(
    source: str,
    cohort: Cohort,
    fitted: bool,
    subjects: Mapping[tuple[str, str], Sequence[str]],
    shards: Mapping[str, Sequence[Path]],
    families: Sequence[str],
    left_out: int,
    rewriting: str,
) -> str:
    """
    fitted: whether the cohort is that of the training split. subjects: of each scan, by configuration and split.
    shards: files of each configuration.
    """
    configs = []
    for config, files in shards.items():
        splits = [split for of, split in subjects if of == config]
        parts = [{"split": split, "path": f"{config}/{split}-*.parquet"} for split in splits]
        configs.append(_config(config, parts, files))
    return CORPUS.format(
        metadata=DatasetCardData(tags=["fmri", "neuroimaging"], configs=configs).to_yaml(),
        source=source,
        cohort=cohort.name,
        subjects=cohort.subjects,
        scans=cohort.windows,
        fitted=" and was fitted on the training split alone" if fitted else "",
        rows="\n".join(_row(*key, len(of), len(set(of))) for key, of in subjects.items()),
        families=", ".join(families),
        left_out=f"Left out, because they could not be read as signals: {left_out} scans. " if left_out else "",
        rewriting=rewriting,
        first=configs[0]["config_name"],
    )


def _config(name: str, data_files: Any, shards: Sequence[Path]) -> dict[str, Any]:
    return {"config_name": name, "data_files": data_files, "description": f"content {content_version(shards)}"}


def _row(*cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
