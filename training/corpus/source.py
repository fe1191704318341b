"""The scans that a corpus is made of: a `datasets` folder or a Hub dataset, and its atlases."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
from datasets import Dataset, concatenate_datasets, get_dataset_config_names, load_dataset

from fmrilm.processors import Atlas

from ..data.scan_sources import one_name_each
from ..data.shards import read_atlases


COLUMNS = ("signal", "tr", "atlas", "subject")
SIGNALS = ("signal", "censored")
ADDED_COLUMNS = ("scan", "descriptors", "description", "messages", "questions", "rewritten")


@dataclass(frozen=True)
class Source:
    """
    Scans in rows of `COLUMNS` and others.

    name: Hub id, or a folder's own name. parts: rows by configuration; a scan's number counts through all of them.
    atlases: by name.
    """

    name: str
    parts: dict[str, Dataset]
    atlases: dict[str, Atlas]

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row a scan without its signal."""
        tables = []
        for rows in self.parts.values():
            known = rows.select_columns([name for name in rows.column_names if name not in SIGNALS])
            tables.append(pd.DataFrame(known.to_list()))
        table = pd.concat(tables, ignore_index=True)
        table["subject"] = one_name_each(table["subject"])
        return table

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any value of any scan, signals and labels included, and with the order of the scans."""
        digest = hashlib.sha256("-".join(rows._fingerprint for rows in self.parts.values()).encode())
        return digest.hexdigest()[:16]


def load_source(dataset: str, atlases: dict[str, Atlas] | None = None) -> Source:
    """
    All rows of all configurations and splits of a folder or Hub dataset.

    atlases: by name, beside those that are packaged and those in the folder's own `atlases/`.
    """
    folder = Path(dataset)
    known = read_atlases(folder) | (atlases or {})
    try:
        loaded = {config: load_dataset(dataset, config) for config in get_dataset_config_names(dataset)}
    except FileNotFoundError as error:
        raise ValueError(f"expected a folder of Parquet files or a Hub dataset, got {dataset!r}: {error}") from error
    parts = {config: concatenate_datasets(list(splits.values())) for config, splits in loaded.items()}
    for rows in parts.values():
        _check(rows, dataset)
    used = {name for part in parts.values() for name in part.unique("atlas")}
    return Source(
        name=folder.resolve().name if folder.exists() else dataset,
        parts=parts,
        atlases={name: known[name] if name in known else Atlas.load(name) for name in sorted(used)},
    )


def _check(rows: Dataset, dataset: str) -> None:
    if missing := [name for name in COLUMNS if name not in rows.column_names]:
        raise ValueError(
            f"{dataset}: expected the columns {', '.join(COLUMNS)}; missing {', '.join(missing)}, "
            f"got {', '.join(rows.column_names)}"
        )
    if taken := [name for name in ADDED_COLUMNS if name in rows.column_names]:
        raise ValueError(f"{dataset}: the columns {', '.join(taken)} are there already, and would be written")
    for name in COLUMNS[1:]:
        if empty := sum(value is None for value in rows[name][:]):
            raise ValueError(f"{dataset}: expected a value of {name} in every row, got none in {empty}")
