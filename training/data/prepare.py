"""Scans from files to a dataset in Parquet shards, in parallel, resumable; the row schema of `load_dataset`."""

import glob
import hashlib
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Array2D, Features, List, Value
from tqdm import tqdm

from fmrilm.processors import Atlas, FmriLMFeatureExtractor, read_scan
from fmrilm.processors.atlases_fmrilm import fitting_atlases
from fmrilm.processors.scan_io_fmrilm import hemispheres, inherited_sidecars, sidecars

from .card import scans_card
from .parallel import run_parallel
from .scan_sources import IDS, ScanSource
from .shards import ATLASES, ShardStore, write_atlases, write_whole


FAILURES = "failures.csv"
ATLAS_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
IMAGES = (".nii", ".nii.gz", ".gii", ".mgh", ".mgz")
LABEL_TYPES = {int: "int64", float: "float64", str: "string"}


@dataclass(frozen=True)
class Preparation:
    """
    What is done to every scan.

    tr: s, goes before a file's header. label_image: absolute path of the parcels, for volumes. confounds: strategy of
    `nilearn.interfaces.fmriprep.load_confounds_strategy` for fMRIPrep's tables. high_pass, low_pass: Hz.
    max_missing_rois: largest share of its ROIs that a scan may lack.
    """

    tr: float | None = None
    label_image: Path | None = None
    confounds: str | None = None
    high_pass: float | None = None
    low_pass: float | None = None
    max_missing_rois: float = 0.2

    def describe(self) -> dict[str, Any]:
        """The settings without a path: a label image is named by its content."""
        image = self.label_image and hashlib.sha256(self.label_image.read_bytes()).hexdigest()[:16]
        return {**asdict(self), "label_image": image}


@dataclass(frozen=True)
class Outcome:
    """Numbers of scans that were prepared now, had been before, and failed."""

    prepared: int
    skipped: int
    failed: int
    dropped: int = 0


def prepare(
    scans: Sequence[ScanSource],
    output: Path,
    default_atlas: str | None,
    preparation: Preparation,
    jobs: int = 1,
    scheduler: str | None = None,
    shard_size: int = 64,
) -> Outcome:
    """
    Write the scans to `output`, which then holds those of `scans` that can be read, and no others.

    Args:
        default_atlas: name of a packaged atlas or path of its table, for scans that name none; a table also for the
            one atlas that all scans name.
        jobs: processes on this machine.
        scheduler: address of a Dask cluster to use instead; its workers must see the same files.
        shard_size: scans per Parquet file.
    """
    atlas_of = _load_atlases(scans, default_atlas, preparation.label_image)
    atlases = {atlas.name: atlas for atlas in atlas_of}
    label_types = _label_types(scans)
    features = {name: row_features(atlas, label_types) for name, atlas in atlases.items()}
    settings = {**preparation.describe(), "labels": label_types}
    keys = [_key(scan, atlas) for scan, atlas in zip(scans, atlas_of, strict=True)]
    store = ShardStore(output, settings, set(keys))
    write_atlases(output, atlases.values())

    done = store.keys
    todo = [item for item in zip(keys, scans, atlas_of, strict=True) if item[0] not in done]
    calls = ((scan, atlas, preparation) for _, scan, atlas in todo)
    results = run_parallel(_attempt, calls, jobs, scheduler)
    failures: list[tuple[ScanSource, str]] = []
    waiting: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    _write_failures(output, failures)
    progress = tqdm(zip(todo, results, strict=True), total=len(todo), desc="preparing", unit="scan")
    for (key, scan, atlas), result in progress:
        if isinstance(result, str):
            failures.append((scan, result))
            _write_failures(output, failures)
            continue
        waiting[atlas.name].append((key, {**result, "atlas": atlas.name, **_identity(scan), **scan.labels}))
        if len(waiting[atlas.name]) == shard_size:
            store.add(atlas.name, waiting.pop(atlas.name), features[atlas.name])
    for name, rows in waiting.items():
        store.add(name, rows, features[name])
    write_whole(output / "README.md", scans_card(output, settings, atlases))
    return Outcome(len(todo) - len(failures), len(scans) - len(todo), len(failures), store.dropped)


def prepare_scan(scan: ScanSource, atlas: Atlas, preparation: Preparation) -> dict[str, Any]:
    """
    The signal float32 [time, rois] at its own TR, parcellated and, if asked, cleaned; tr in s; censored frames; and
    the number of missing ROIs, which are NaN.
    """
    if scan.problem is not None:
        raise ValueError(scan.problem)
    band = {"high_pass": preparation.high_pass, "low_pass": preparation.low_pass}
    most = preparation.max_missing_rois
    extractor = FmriLMFeatureExtractor(cleaning=band, max_missing_rois=most)
    content: dict[str, Any] = {"signal": scan.path, "confounds": scan.confounds}
    if preparation.confounds is not None:
        if scan.confounds is not None:
            raise ValueError("a table of confounds is given, and a strategy to make one: expected one of the two")
        content.update(_fmriprep_confounds(scan.path, preparation.confounds))
    tr = preparation.tr if scan.tr is None else scan.tr
    measured = extractor.read_signal(content, tr=tr, atlas=atlas)
    signal, kept = measured.signal, np.ones(len(measured.signal), dtype=bool)
    if measured.confounds is not None or any(band.values()):
        signal, kept = extractor.clean_signal(measured)
    row = {"signal": signal.astype(np.float32), "tr": float(measured.tr), "censored": ~kept}
    # what a model could not read later is refused now
    seen, _ = FmriLMFeatureExtractor(max_missing_rois=most).prepare_signal(row, atlas=atlas)
    return {**row, "missing_rois": int(np.isnan(seen).all(axis=0).sum())}


def confound_tables(path: Path) -> list[Path]:
    """What fMRIPrep wrote beside a scan for its run."""
    run = re.split(r"_(?:space|hemi|desc|bold)", path.name)[0]
    return sorted(path.parent.glob(f"{glob.escape(run)}_desc-confounds_*.tsv"))


def _fmriprep_confounds(path: Path, strategy: str) -> dict[str, Any]:
    """Confounds [time, confounds] and censored frames, from the table that fMRIPrep wrote beside the scan."""
    from nilearn.interfaces.fmriprep import load_confounds_strategy

    if not confound_tables(path):
        raise ValueError("no confounds: expected the run's file *_desc-confounds_timeseries.tsv beside the scan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        confounds, kept = load_confounds_strategy(str(path), denoise_strategy=strategy)
    if confounds is None:
        raise ValueError(f"{path.name}: expected confounds for the strategy {strategy!r}, got none")
    censored = np.zeros(len(confounds), dtype=bool)
    if kept is not None:
        censored[:] = True
        censored[kept] = False
    return {"confounds": confounds, "censored": censored}


def _attempt(scan: ScanSource, atlas: Atlas, preparation: Preparation) -> dict[str, Any] | str:
    """The prepared row, or why there is none."""
    try:
        return prepare_scan(scan, atlas, preparation)
    # whatever a broken file raises, it must not stop the others
    except Exception as error:
        reason = str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
        return _anonymous(reason, [scan.path, scan.confounds], {atlas.name, *atlas.rois})


def _anonymous(reason: str, paths: Iterable[Path | None], speakable: set[str]) -> str:
    """One line that names no file or folder, and quotes nothing out of a file but what is in `speakable`."""
    known = [path for path in paths if path is not None]
    for path in known:
        reason = reason.replace(str(path), "<file>").replace(path.name, "<file>")
    for path in known:
        reason = reason.replace(str(path.parent), "<folder>")
    reason = re.sub(r"(^|(?<=[\s'\"(:=])|<folder>)/[^\s'\"]+", "<file>", reason)
    reason = re.sub(r"(['\"])(.*?)\1", lambda quote: quote[0] if quote[2] in speakable else "'...'", reason)
    return " ".join(reason.split())


def _write_failures(output: Path, failures: Sequence[tuple[ScanSource, str]]) -> None:
    path = output / FAILURES
    if not failures:
        path.unlink(missing_ok=True)
        return
    rows = pd.DataFrame([(*scan.ids, reason) for scan, reason in failures], columns=[*IDS[:4], "reason"])
    write_whole(path, lambda temporary: rows.to_csv(temporary, index=False, lineterminator="\r\n"))


def _load_atlases(scans: Sequence[ScanSource], default: str | None, label_image: Path | None) -> list[Atlas]:
    """The atlas of each scan."""
    if default is None and (nameless := [scan for scan in scans if scan.atlas is None]):
        fitting = ""
        # what is wrong with the scan itself is for its own message
        with suppress(ValueError, OSError):
            first = read_scan(nameless[0].path)
            fitting = f"; well-known ones that fit {first.name}: {', '.join(fitting_atlases(first)) or 'none'}"
        message = "which atlas are the scans' ROIs from? Give --atlas, or a column atlas in the manifest"
        raise ValueError(message + fitting)
    is_table = default is not None and default.endswith((".tsv", ".csv"))
    named = [scan.atlas or default for scan in scans]
    alias = None
    if is_table and len(set(named)) == 1:
        # the table is that of the name which the manifest has for it
        alias, named = scans[0].atlas, [default] * len(scans)
    loaded: dict[str, Atlas] = {}
    for name in sorted({name for name in named if name is not None}):
        # tables of ROI series need no parcels, which may have to be fetched
        images = any(scan.path.name.endswith(IMAGES) for scan, own in zip(scans, named, strict=True) if own == name)
        atlas = Atlas.resolve(name, label_image if is_table or images else None, images)
        loaded[name] = replace(atlas, name=alias) if alias and not alias.endswith((".tsv", ".csv")) else atlas
        # it names a folder of the output
        if not ATLAS_NAME.fullmatch(loaded[name].name) or loaded[name].name == ATLASES:
            raise ValueError(f"expected an atlas name of letters, digits and '_.-', got {loaded[name].name!r}")
    if len({atlas.name for atlas in loaded.values()}) < len(loaded):
        raise ValueError(f"two atlases of one name among {', '.join(loaded)}")
    return [loaded[name] for name in named if name is not None]


def _key(scan: ScanSource, atlas: Atlas) -> str:
    """
    Changes when anything about the scan does: its ids, labels, atlas, or the size or time of its files and of those
    that are read with them. Holds no path.
    """
    beside = [*sidecars(scan.path), *inherited_sidecars(scan.path)]
    if scan.path.name.startswith("sub-"):
        beside += confound_tables(scan.path)
    with suppress(ValueError):
        beside += hemispheres(scan.path)
    files = []
    for path in (scan.path, scan.confounds, *beside):
        if path is not None and path.is_file():
            status = path.stat()
            files.append((status.st_size, status.st_mtime_ns))
    content = [_identity(scan), scan.labels, scan.tr, atlas.name, atlas.checksum, atlas.labels, files]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _identity(scan: ScanSource) -> dict[str, str | None]:
    return {name: getattr(scan, name) for name in IDS}


def _label_types(scans: Sequence[ScanSource]) -> dict[str, str]:
    """Arrow type of each label; text where all are missing."""
    types = {}
    for name in sorted({name for scan in scans for name in scan.labels}):
        kind = next((type(scan.labels[name]) for scan in scans if scan.labels.get(name) is not None), str)
        types[name] = LABEL_TYPES[kind]
    return types


def row_features(atlas: Atlas, label_types: Mapping[str, str]) -> Features:
    """Columns of the prepared scans of an atlas."""
    return Features(
        {
            "signal": Array2D((None, len(atlas)), "float32"),
            "tr": Value("float64"),
            "censored": List(Value("bool")),
            "missing_rois": Value("int32"),
            **{name: Value("string") for name in ("atlas", *IDS)},
            **{name: Value(kind) for name, kind in label_types.items()},
        }
    )
