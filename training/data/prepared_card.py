"""The dataset card of prepared scans: README.md with the metadata `load_dataset` and the Hub read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from huggingface_hub import DatasetCardData

from fmrilm.processors import Atlas

from .shards import content_version


TEXT = """---
{metadata}
---

# {title}

One row per scan, parcellated{cleaned} at its own repetition time.

| atlas | ROIs | scans | subjects | sessions | TR, s | minutes |
|---|---|---|---|---|---|---|
{rows}

```python
from datasets import load_dataset
scans = load_dataset("path of this folder", "{first}", split="train")
```

| column | content |
|---|---|
| `signal` | float32 [time, rois], time first; ROI names, networks and MNI coordinates in `atlases/` |
| `tr` | repetition time, s |
| `censored` | bool [time], True where a frame was interpolated |
| `atlas`, `subject`, `session`, `task`, `run`, `site` | text, empty where unknown |
{labels}
Split by `subject` before anything is fitted.

Settings: {settings}.
"""


def card(
    output: Path, settings: Mapping[str, Any], atlases: Mapping[str, Atlas], title: str = "Prepared fMRI scans"
) -> str:
    """Describes the shards that are in `output`."""
    configs, rows = [], []
    for name, atlas in sorted(atlases.items()):
        shards = sorted((output / name).glob("*.parquet"))
        if not shards:
            continue
        table = pq.read_table(shards, columns=["tr", "subject", "session", "censored"]).to_pylist()
        subjects = {row["subject"] for row in table}
        sessions = {(row["subject"], row["session"]) for row in table}
        times = ", ".join(f"{tr:g}" for tr in sorted({round(row["tr"], 4) for row in table}))
        minutes = sum(len(row["censored"]) * row["tr"] for row in table) / 60
        counts = [name, len(atlas), len(table), len(subjects), len(sessions), times, f"{minutes:.0f}"]
        rows.append("| " + " | ".join(map(str, counts)) + " |")
        version = f"content {content_version(shards)}"
        configs.append({"config_name": name, "data_files": f"{name}/*.parquet", "description": version})
    data = DatasetCardData(configs=configs, tags=["fmri", "neuroimaging", "time-series"])
    cleaned = any(settings[name] is not None for name in ("confounds", "high_pass", "low_pass"))
    labels = "".join(f"| `{name}` | label, {kind} |\n" for name, kind in settings["labels"].items())
    shown = [f"{name} {value}" for name, value in settings.items() if name != "labels" and value is not None]
    return TEXT.format(
        title=title,
        metadata=data.to_yaml(),
        cleaned=" and cleaned" if cleaned else "",
        rows="\n".join(rows),
        first=configs[0]["config_name"] if configs else "",
        labels=labels,
        settings=", ".join(shown) or "none",
    )
