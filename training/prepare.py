"""Scans from files to a dataset in Parquet shards, in parallel, resumable; the row schema of `load_dataset`."""

import csv
import hashlib
import json
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Array2D, Dataset, Features, List, Value
from tqdm import tqdm

from fmrilm.processors import Atlas, FmriLMFeatureExtractor

from .prepared_card import card
from .scan_sources import ScanSource


LEDGER = "ledger.jsonl"
FAILURES = "failures.csv"
ATLASES = "atlases"
SHARD = "part-{:05d}.parquet"
ATLAS_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
CONNECT_SECONDS = 20
LABEL_TYPES = {int: "int64", float: "float64", str: "string"}


@dataclass(frozen=True)
class Preparation:
    """
    What is done to every scan.

    tr: s, before what a file's header says. label_image: parcels of the atlas, for volumes. confounds: a strategy of
    `nilearn.interfaces.fmriprep.load_confounds_strategy` for fMRIPrep's tables. high_pass, low_pass: Hz.
    """

    tr: float | None = None
    label_image: Path | None = None
    confounds: str | None = None
    high_pass: float | None = None
    low_pass: float | None = None

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


def prepare(
    scans: Sequence[ScanSource],
    output: Path,
    atlas: str | None,
    preparation: Preparation,
    jobs: int = 1,
    scheduler: str | None = None,
    shard_size: int = 64,
) -> Outcome:
    """
    Write the scans to `output`, which then holds those of `scans` that can be read, and no others.

    Args:
        atlas: name of a packaged atlas or path of its table, for scans that name none.
        jobs: processes on this machine.
        scheduler: address of a Dask cluster to use instead; its workers must see the same files.
        shard_size: scans per Parquet file.
    """
    atlases = _load_atlases(scans, atlas)
    known = {of.name: of for of in atlases.values()}
    features = {name: _features(of, scans) for name, of in known.items()}
    settings = {**preparation.describe(), "labels": _label_types(scans)}
    of_scan = [atlases[scan.atlas or atlas] for scan in scans]
    keys = [_key(scan, of) for scan, of in zip(scans, of_scan, strict=True)]
    store = ShardStore(output, settings, set(keys))
    for name, of in known.items():
        _write(output / ATLASES / f"{name}.json", json.dumps(of.to_dict(), ensure_ascii=False) + "\n")

    todo = [(key, scan, of) for key, scan, of in zip(keys, scans, of_scan, strict=True) if key not in store.keys]
    failures: list[tuple[ScanSource, str]] = []
    waiting: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    _write_failures(output, failures)
    work = ((scan, of, preparation) for _, scan, of in todo)
    progress = tqdm(_run(work, jobs, scheduler), total=len(todo), desc="preparing", unit="scan")
    for (key, scan, of), result in zip(todo, progress, strict=True):
        if isinstance(result, str):
            failures.append((scan, result))
            _write_failures(output, failures)
            continue
        waiting[of.name].append((key, {**result, "atlas": of.name, **_identity(scan), **scan.labels}))
        if len(waiting[of.name]) == shard_size:
            store.add(of.name, waiting.pop(of.name), features[of.name])
    for name, rows in waiting.items():
        store.add(name, rows, features[name])
    _write(output / "README.md", card(output, settings, known))
    return Outcome(len(todo) - len(failures), len(scans) - len(todo), len(failures))


def prepare_scan(scan: ScanSource, atlas: Atlas, preparation: Preparation) -> dict[str, Any]:
    """The signal float32 [time, rois] at its own TR, parcellated and, if asked, cleaned; tr in s; censored frames."""
    band = {"high_pass": preparation.high_pass, "low_pass": preparation.low_pass}
    extractor = FmriLMFeatureExtractor(cleaning=band)
    content: dict[str, Any] = {"signal": scan.path, "confounds": scan.confounds}
    if preparation.confounds is not None:
        if scan.confounds is not None:
            raise ValueError("a table of confounds is given, and a strategy to make one: expected one of the two")
        content.update(_fmriprep_confounds(scan.path, preparation.confounds))
    tr = preparation.tr if scan.tr is None else scan.tr
    measured = extractor.read_signal(content, tr=tr, atlas=atlas, label_image=preparation.label_image)
    signal, kept = measured.signal, np.ones(len(measured.signal), dtype=bool)
    if measured.confounds is not None or any(band.values()):
        signal, kept = extractor.clean_signal(measured)
    row = {"signal": signal.astype(np.float32), "tr": float(measured.tr), "censored": ~kept}
    # what a model could not read later is refused now
    FmriLMFeatureExtractor().prepare_signal(row, atlas=atlas)
    return row


def _fmriprep_confounds(path: Path, strategy: str) -> dict[str, Any]:
    """Confounds [time, confounds] and censored frames, from the table that fMRIPrep wrote beside the scan."""
    from nilearn.interfaces.fmriprep import load_confounds_strategy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        confounds, kept = load_confounds_strategy(str(path), denoise_strategy=strategy)
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
        return _anonymous(reason, [scan.path, scan.confounds, preparation.label_image], {atlas.name, *atlas.rois})


def _anonymous(reason: str, paths: Iterable[Path | None], speakable: set[str]) -> str:
    """One line that names no file or folder, and quotes nothing out of a file but what is in `speakable`."""
    known = [path for path in paths if path is not None]
    for path in known:
        for form in (path.absolute(), path, path.name):
            reason = reason.replace(str(form), "<file>")
    for path in known:
        reason = reason.replace(str(path.absolute().parent), "<folder>")
    reason = re.sub(r"(^|(?<=[\s'\"(:=])|<folder>)([A-Za-z]:)?[/\\][^\s'\"]+", "<file>", reason)
    reason = re.sub(r"(['\"])(.*?)\1", lambda quote: quote[0] if quote[2] in speakable else "'...'", reason)
    return " ".join(reason.split())


def _run(work: Iterable[tuple], jobs: int, scheduler: str | None) -> Iterator[dict[str, Any] | str]:
    """Results in the order of the work, as they come."""
    with ExitStack() as stack:
        if scheduler is not None:
            try:
                from distributed import Client
            except ImportError as error:
                raise ValueError("a Dask cluster needs distributed: pip install 'fmri-lm[cluster]'") from error
            try:
                stack.enter_context(Client(scheduler, timeout=CONNECT_SECONDS))
            except OSError as error:
                raise ValueError(f"no Dask scheduler answers at {scheduler}") from error
            stack.enter_context(joblib.parallel_config(backend="dask"))
        elif jobs != 1:
            stack.enter_context(joblib.parallel_config(backend="loky", n_jobs=jobs, inner_max_num_threads=1))
        yield from joblib.Parallel(return_as="generator")(joblib.delayed(_attempt)(*item) for item in work)


class ShardStore:
    """
    Parquet shards in a folder per atlas, and a ledger: its first line holds the settings, each other one a shard and
    the keys of its rows. A shard without a line, left by a run that was killed, does not count and is removed.
    """

    def __init__(self, output: Path, settings: dict[str, Any], wanted: set[str]) -> None:
        self.output = output
        self.settings = settings
        self.shards = self._read_ledger()
        output.mkdir(parents=True, exist_ok=True)
        for shard, keys in list(self.shards.items()):
            keep = [key in wanted for key in keys]
            if not all(keep):
                del self.shards[shard]
                if any(keep):
                    table = pq.read_table(output / shard).filter(pa.array(keep))
                    again = self._next_shard(Path(shard).parent.name)
                    _write(output / again, lambda path, table=table: pq.write_table(table, path))
                    self.shards[again] = [key for key in keys if key in wanted]
        lines = [{"settings": settings}, *self.shards_as_lines()]
        _write(output / LEDGER, "".join(json.dumps(line) + "\n" for line in lines))
        for path in [*output.glob("*/part-*.parquet"), *output.glob("*/.*.tmp"), *output.glob(".*.tmp")]:
            if path.relative_to(output).as_posix() not in self.shards:
                path.unlink()

    @property
    def keys(self) -> set[str]:
        return {key for keys in self.shards.values() for key in keys}

    def shards_as_lines(self) -> list[dict[str, Any]]:
        return [{"shard": shard, "keys": keys} for shard, keys in self.shards.items()]

    def add(self, folder: str, rows: Sequence[tuple[str, dict[str, Any]]], features: Features) -> None:
        """Write a shard, then its line in the ledger."""
        shard = self._next_shard(folder)
        table = Dataset.from_list([row for _, row in rows], features=features).data.table
        _write(self.output / shard, lambda path: pq.write_table(table, path))
        self.shards[shard] = [key for key, _ in rows]
        with open(self.output / LEDGER, "a", encoding="utf-8") as handle:
            handle.write(json.dumps({"shard": shard, "keys": self.shards[shard]}) + "\n")
            handle.flush()
            os.fsync(handle.fileno())

    def _next_shard(self, folder: str) -> str:
        numbers = [int(path.stem.split("-")[1]) for path in (self.output / folder).glob("part-*.parquet")]
        return f"{folder}/{SHARD.format(max(numbers, default=-1) + 1)}"

    def _read_ledger(self) -> dict[str, list[str]]:
        path = self.output / LEDGER
        if not path.is_file():
            if self.output.is_file() or (self.output.is_dir() and any(self.output.glob("[!.]*"))):
                raise ValueError(f"{self.output} holds something else: expected a new folder, or one prepared before")
            return {}
        # a line without an end was being written when its run was killed
        first, *lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        before = json.loads(first)["settings"]
        if changed := [name for name in self.settings if before.get(name) != self.settings[name]]:
            raise ValueError(
                f"{self.output} was prepared with other settings, "
                + ", ".join(f"{name} {before.get(name)} instead of {self.settings[name]}" for name in changed)
                + "; choose another folder"
            )
        return {line["shard"]: line["keys"] for line in map(json.loads, lines)}


def _write(path: Path, content: str | Callable[[Path], None]) -> None:
    """All of a file or nothing: under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    if isinstance(content, str):
        temporary.write_text(content, encoding="utf-8")
    else:
        content(temporary)
    with open(temporary, "rb") as handle:
        os.fsync(handle.fileno())
    temporary.replace(path)


def _write_failures(output: Path, failures: Sequence[tuple[ScanSource, str]]) -> None:
    path = output / FAILURES
    if not failures:
        path.unlink(missing_ok=True)
        return

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle)
            writer.writerow(["subject", "session", "task", "run", "reason"])
            writer.writerows([*scan.ids, reason] for scan, reason in failures)

    _write(path, write)


def _load_atlases(scans: Sequence[ScanSource], default: str | None) -> dict[str, Atlas]:
    """Atlases by the name or path under which a scan or the command names them."""
    if default is None and any(scan.atlas is None for scan in scans):
        raise ValueError("which atlas are the scans' ROIs from? Give --atlas, or a column atlas in the manifest")
    atlases = {}
    for name in sorted({scan.atlas or default for scan in scans}):
        if name.endswith(".tsv") and not Path(name).is_file():
            raise ValueError(f"no table of an atlas at {name}")
        atlases[name] = Atlas.from_table(name) if name.endswith(".tsv") else Atlas.load(name)
        # it names a folder of the output
        if not ATLAS_NAME.fullmatch(atlases[name].name) or atlases[name].name == ATLASES:
            raise ValueError(f"expected an atlas name of letters, digits and '_.-', got {atlases[name].name!r}")
    if len({atlas.name for atlas in atlases.values()}) < len(atlases):
        raise ValueError(f"two atlases of one name among {', '.join(atlases)}")
    return atlases


def _key(scan: ScanSource, atlas: Atlas) -> str:
    """Changes when anything about the scan does: its ids, labels, atlas, or its files' size or time. Holds no path."""
    files = []
    for path in (scan.path, scan.confounds):
        if path is not None and path.is_file():
            status = path.stat()
            files.append((status.st_size, status.st_mtime_ns))
    content = [_identity(scan), scan.labels, scan.tr, atlas.name, atlas.checksum, files]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _identity(scan: ScanSource) -> dict[str, str | None]:
    return {name: getattr(scan, name) for name in ("subject", "session", "task", "run", "site")}


def _label_types(scans: Sequence[ScanSource]) -> dict[str, str]:
    """Arrow type of each label; text where all are missing."""
    types = {}
    for name in {name: None for scan in scans for name in scan.labels}:
        kind = next((type(scan.labels[name]) for scan in scans if scan.labels.get(name) is not None), str)
        types[name] = LABEL_TYPES[kind]
    return types


def _features(atlas: Atlas, scans: Sequence[ScanSource]) -> Features:
    strings = ("atlas", "subject", "session", "task", "run", "site")
    return Features(
        {
            "signal": Array2D((None, len(atlas)), "float32"),
            "tr": Value("float64"),
            "censored": List(Value("bool")),
            **{name: Value("string") for name in strings},
            **{name: Value(kind) for name, kind in _label_types(scans).items()},
        }
    )
