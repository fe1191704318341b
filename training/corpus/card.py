"""The dataset card of a described corpus."""

from collections.abc import Mapping, Sequence

from huggingface_hub import DatasetCardData

from fmrilm.processors.descriptors.cohort import Cohort


TEXT = """---
{metadata}
---

# Descriptions of fMRI scans

The scans of {source}, one per row, with descriptors computed from each, what they say in words, and questions whose
answers follow from them. Z-scores and levels refer to the cohort {cohort} of {subjects} subjects and {scans} scans,
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


def corpus_card(
    source: str,
    cohort: Cohort,
    fitted: bool,
    counts: Mapping[tuple[str, str], tuple[int, int]],
    versions: Mapping[str, str],
    families: Sequence[str],
    left_out: int,
    rewriting: str,
) -> str:
    """
    fitted: whether the cohort is that of the training split. counts: scans and subjects by configuration and split.
    versions: `content_version` of each configuration.
    """
    configs = list(dict.fromkeys(config for config, _ in counts))
    data = DatasetCardData(
        tags=["fmri", "neuroimaging"],
        configs=[
            {
                "config_name": config,
                "description": f"content {versions[config]}",
                "data_files": [
                    {"split": split, "path": f"{config}/{split}-*.parquet"} for of, split in counts if of == config
                ],
            }
            for config in configs
        ],
    )
    return TEXT.format(
        metadata=data.to_yaml(),
        source=source,
        cohort=cohort.name,
        subjects=cohort.subjects,
        scans=cohort.windows,
        fitted=" and was fitted on the training split alone" if fitted else "",
        rows="\n".join(f"| {config} | {split} | {n} | {people} |" for (config, split), (n, people) in counts.items()),
        families=", ".join(families),
        left_out=f"Left out, because they could not be read as signals: {left_out} scans. " if left_out else "",
        rewriting=rewriting,
        first=configs[0],
    )
