"""Cards of prepared scans and of corpora: README.md with the metadata that `load_dataset` and the Hub read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from huggingface_hub import DatasetCardData

from fmrilm.processors import Atlas

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
        rows.append(card_row(*counts))
        configs.append(card_config(name, f"{name}/*.parquet", shards))
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


def card_config(name: str, data_files: Any, shards: Sequence[Path]) -> dict[str, Any]:
    """Metadata of a configuration, whose version changes with its files' content."""
    return {"config_name": name, "data_files": data_files, "description": f"content {content_version(shards)}"}


def card_row(*cells: Any) -> str:
    """A line of a table."""
    return "| " + " | ".join(map(str, cells)) + " |"
