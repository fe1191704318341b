"""A corpus that `fmrilm describe` wrote, or the scans of `fmrilm prepare`, on their way to stages 2 and 3."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, get_dataset_config_names, load_dataset

from fmrilm.processors import Atlas
from fmrilm.processors.descriptors.cohort import JSON_FILE, Cohort

from .describe import COHORT
from .source import held_out_subjects, load_source


@dataclass(frozen=True)
class Scans:
    """
    training, test: rows by atlas, no subject in both. atlases: by name. cohort: of the corpus, if it is one.
    """

    training: list[Dataset]
    test: list[Dataset]
    atlases: dict[str, Atlas]
    cohort: Cohort | None


def load_scans(data: str | None, corpus: str | None, held_out_share: float) -> Scans:
    """
    The rows of the corpus, split as it is; without one, those of `data`, of whose subjects a share is held out.

    data: folder that `fmrilm prepare` wrote; beside a corpus, for the atlases that are not packaged.
    """
    if corpus is not None:
        training, test = _corpus_rows(corpus)
        known = _atlases(data) | _atlases(corpus)
        used = {name for rows in (*training, *test) for name in rows.unique("atlas")}
        atlases = {name: known[name] if name in known else Atlas.load(name) for name in sorted(used)}
        folder = Path(corpus, COHORT)
        return Scans(training, test, atlases, Cohort.load(folder) if (folder / JSON_FILE).exists() else None)
    if data is None:
        raise ValueError("expected data, a folder that `fmrilm prepare` wrote, or corpus, one of `fmrilm describe`")
    source = load_source(data)
    away = held_out_subjects(source, held_out_share)
    training, test = (
        [
            part.select([row for row, subject in enumerate(part["subject"][:]) if (subject in away) == held_out])
            for part in source.parts.values()
        ]
        for held_out in (False, True)
    )
    return Scans(_filled(training), _filled(test), source.atlases, None)


def _corpus_rows(corpus: str) -> tuple[list[Dataset], list[Dataset]]:
    if not Path(corpus, "README.md").is_file():
        raise ValueError(f"expected a folder that `fmrilm describe` wrote, got {corpus!r}")
    configs = [load_dataset(corpus, config) for config in get_dataset_config_names(corpus)]
    if any("questions" not in rows.column_names for splits in configs for rows in splits.values()):
        raise ValueError(f"expected a folder that `fmrilm describe` wrote, got one without questions: {corpus!r}")
    training, test = ([splits[name] for splits in configs if name in splits] for name in ("train", "test"))
    if not training:
        raise ValueError(f"expected training scans in {corpus!r}, got test scans alone")
    return training, test


def _atlases(folder: str | None) -> dict[str, Atlas]:
    paths = [] if folder is None else sorted(Path(folder, "atlases").glob("*.json"))
    atlases = (Atlas.from_dict(json.loads(path.read_text(encoding="utf-8"))) for path in paths)
    return {atlas.name: atlas for atlas in atlases}


def _filled(parts: Sequence[Dataset]) -> list[Dataset]:
    return [part for part in parts if len(part)]
