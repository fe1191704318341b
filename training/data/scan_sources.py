"""Which scans there are to prepare: from a manifest, a derivatives folder (fMRIPrep, BIDS) or a folder of files."""

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

from fmrilm.processors.scan_io_fmrilm import check_text_size


ENDINGS = (".nii.gz", ".dtseries.nii", ".ptseries.nii", ".nii", ".npy", ".csv", ".tsv")
MANIFEST_COLUMNS = ("path", "subject", "session", "task", "run", "site", "tr", "atlas", "confounds")
# what a prepared row holds beside the labels of a manifest, now or later
ROW_COLUMNS = ("signal", "censored", "descriptors", "description", "messages")
# ids are written to the output: nothing in them may be a path or break a line
ID = re.compile(r"[^\s\x00-\x1f/\\.][^\x00-\x1f/\\]*")
MISSING = ("", "n/a")

Label = str | int | float | None


@dataclass(frozen=True)
class ScanSource:
    """
    A scan that can be prepared.

    path, confounds: absolute paths. subject ... site: ids as they are written to the output. tr: s, if it is known.
    atlas: name or table. labels: what is known about the subject or session.
    """

    path: Path
    subject: str
    session: str | None = None
    task: str | None = None
    run: str | None = None
    site: str | None = None
    tr: float | None = None
    atlas: str | None = None
    confounds: Path | None = None
    labels: dict[str, Label] = field(default_factory=dict)

    @property
    def ids(self) -> tuple[str | None, ...]:
        """What tells this scan from all others in one atlas."""
        return self.subject, self.session, self.task, self.run


def find_scans(source: Path, labels: Path | None = None, space: str = "MNI*") -> list[ScanSource]:
    """
    All scans of a manifest or folder, with their labels.

    Args:
        source: manifest (.csv or .tsv), derivatives folder (holds `desc-preproc_bold` files) or folder of scans.
        labels: table with a column `subject` (or `participant_id`), perhaps `session`, and labels.
        space: pattern of the template space to take of a derivatives folder.
    """
    # other processes, on other machines too, start elsewhere
    source = source.absolute()
    if source.is_file():
        scans = read_manifest(source)
    elif source.is_dir():
        scans = find_derivatives(source, space) or find_files(source)
    else:
        raise ValueError(f"expected a manifest or a folder of scans, there is nothing at {source}")
    if not scans:
        raise ValueError(f"no scans in {source}: expected files that end in {', '.join(ENDINGS)}")
    _check_ids(scans)
    _check_agreement((scan.subject, scan.session, scan.labels) for scan in scans)
    return scans if labels is None else join_labels(scans, labels)


def read_manifest(path: Path) -> list[ScanSource]:
    """
    One scan per row: columns path and subject; perhaps session, task, run, site, tr (s), atlas, confounds; all others
    are labels. Relative paths start at the manifest's folder.
    """
    rows = _read_rows(path)
    header = list(rows[0])
    if missing := [column for column in ("path", "subject") if column not in header]:
        raise ValueError(f"{path.name}: expected columns path and subject, got {', '.join(header)}: no {missing[0]}")
    labels = _typed_labels(path, rows, [column for column in header if column not in MANIFEST_COLUMNS])
    scans = []
    for number, (row, values) in enumerate(zip(rows, labels, strict=True), start=2):
        cells = {column: None if row.get(column, "") in MISSING else row[column] for column in MANIFEST_COLUMNS}
        if cells["path"] is None or cells["subject"] is None:
            raise ValueError(f"{path.name}, line {number}: expected a path and a subject, got an empty cell")
        try:
            tr = None if cells["tr"] is None else float(cells["tr"])
        except ValueError as error:
            raise ValueError(f"{path.name}, line {number}: expected tr in seconds, got {cells['tr']!r}") from error
        files = {name: path.parent / cell for name in ("path", "confounds") if (cell := cells[name]) is not None}
        scans.append(ScanSource(**{**cells, **files, "tr": tr, "labels": values}))
    return scans


def parse_bids_name(name: str) -> dict[str, str] | None:
    """
    Entities of a BIDS file name, with its `suffix` and `extension`; None if it is not one.

    >>> parse_bids_name("sub-01_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz")["task"]
    'rest'
    """
    match = re.fullmatch(r"(?P<entities>sub-[A-Za-z0-9]+(?:_[A-Za-z]+-[A-Za-z0-9+]+)*)_(\w+?)(\.[\w.]+)", name)
    if match is None:
        return None
    pairs = [part.split("-", 1) for part in match["entities"].split("_")]
    entities = dict(pairs)
    if len(entities) < len(pairs):
        return None
    return {**entities, "suffix": match[2], "extension": match[3]}


def find_derivatives(folder: Path, space: str) -> list[ScanSource]:
    """
    The preprocessed scans of an fMRIPrep or other BIDS derivatives folder in one space; empty if it holds none at all.

    What else tells scans of a subject apart (acquisition, direction, reconstruction, echo) becomes part of `run`.
    """
    found: dict[tuple, dict[str, Path]] = {}
    spaces = set()
    for path in sorted(folder.rglob("sub-*_bold.*nii*")):
        entities = parse_bids_name(path.name)
        if entities is None or not path.name.endswith(ENDINGS):
            continue
        if entities.get("desc") != "preproc" and not entities["extension"].endswith("series.nii"):
            continue
        template = entities.get("space", "native")
        spaces.add(template)
        if not fnmatchcase(template, space):
            continue
        distinct = [f"{key}-{entities[key]}" for key in ("acq", "ce", "rec", "dir", "echo") if key in entities]
        if distinct and "run" in entities:
            distinct.append(f"run-{entities['run']}")
        run = "_".join(distinct) or entities.get("run")
        # the other entities of its grid: resolution or density
        grid = "_".join([template, *(f"{key}-{entities[key]}" for key in ("res", "den", "cohort") if key in entities)])
        ids = (entities["sub"], entities.get("ses"), entities.get("task"), run)
        found.setdefault(ids, {})[grid] = path
    if spaces and not found:
        raise ValueError(f"no preprocessed scan in a space like {space!r}; spaces found: {', '.join(sorted(spaces))}")
    for ids, grids in found.items():
        if len(grids) > 1:
            raise ValueError(
                f"subject {ids[0]!r} has one scan in {len(grids)} spaces or resolutions: {', '.join(sorted(grids))}; "
                "name one with --space"
            )
    return [
        ScanSource(next(iter(grids.values())), subject, session, task, run)
        for (subject, session, task, run), grids in found.items()
    ]


def find_files(folder: Path) -> list[ScanSource]:
    """Every scan file of a folder; the file's name without its ending is the subject's id."""
    scans = []
    for path in sorted(folder.iterdir()):
        ending = next((ending for ending in ENDINGS if path.name.lower().endswith(ending)), None)
        if ending and path.is_file() and not path.name.startswith("."):
            scans.append(ScanSource(path, subject=path.name[: -len(ending)]))
    return scans


def join_labels(scans: Sequence[ScanSource], path: Path) -> list[ScanSource]:
    """
    Labels of a table given to scans by subject, or by subject and session where the table has sessions. The prefixes
    `sub-` and `ses-` do not count. A column `site` fills in missing sites. Scans without a row get empty labels.
    """
    rows = _read_rows(path)
    aliases = {"participant_id": "subject", "session_id": "session"}
    rows = [{aliases.get(column, column): cell for column, cell in row.items()} for row in rows]
    header = list(rows[0])
    if "subject" not in header:
        raise ValueError(f"{path.name}: expected a column subject or participant_id, got {', '.join(header)}")
    if reserved := [c for c in header if c in MANIFEST_COLUMNS and c not in ("subject", "session", "site")]:
        raise ValueError(f"{path.name}: a label cannot be named {reserved[0]!r}")
    names = [column for column in header if column not in MANIFEST_COLUMNS]
    if twice := sorted(set(names) & {name for scan in scans for name in scan.labels}):
        raise ValueError(f"{path.name}: the labels {', '.join(twice)} stand in the manifest, too")
    by_session = "session" in header
    keys = [(_bare(row["subject"]), _bare(row["session"]) if by_session else None) for row in rows]
    sites = [None if row.get("site", "") in MISSING else row["site"] for row in rows]
    values = _typed_labels(path, rows, names)
    _check_agreement((*key, {**labels, "site": site}) for key, labels, site in zip(keys, values, sites, strict=True))
    table = dict(zip(keys, zip(values, sites, strict=True), strict=True))
    empty = (dict.fromkeys(names), None)

    joined, matches = [], 0
    for scan in scans:
        key = (_bare(scan.subject), _bare(scan.session or "") if by_session else None)
        matches += key in table
        labels, site = table.get(key, empty)
        joined.append(replace(scan, labels={**scan.labels, **labels}, site=scan.site or site))
    if not matches:
        raise ValueError(
            f"{path.name}: none of its subjects has a scan; it starts with {rows[0]['subject']!r}, the scans with "
            f"{scans[0].subject!r}"
        )
    _check_ids(joined)
    return joined


def _bare(name: str) -> str:
    return re.sub(r"^(sub|ses)-", "", name)


def _read_rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise ValueError(f"no table at {path}")
    check_text_size(path)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            lines = [line for line in csv.reader(handle, delimiter=delimiter) if line]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: not a readable table: {error}") from error
    if len(lines) < 2:
        raise ValueError(f"{path.name}: expected a header and at least one row, got {len(lines)} lines")
    header = [cell.strip() for cell in lines[0]]
    if len(set(header)) < len(header) or "" in header:
        raise ValueError(f"{path.name}: expected different names of columns, got {', '.join(header)}")
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header):
            raise ValueError(f"{path.name}, line {number}: expected {len(header)} cells, got {len(line)}")
    return [dict(zip(header, (cell.strip() for cell in line), strict=True)) for line in lines[1:]]


def _typed_labels(path: Path, rows: Sequence[dict[str, str]], names: Sequence[str]) -> list[dict[str, Label]]:
    """Columns of whole numbers, numbers or text, as all cells of a column allow; "007" is text."""
    if reserved := [name for name in names if name in ROW_COLUMNS]:
        raise ValueError(f"{path.name}: a label cannot be named {reserved[0]!r}")
    columns = {}
    for name in names:
        cells = [row[name] for row in rows if row[name] not in MISSING]
        kind = next((kind for kind in (int, float) if all(_is_written(kind, cell) for cell in cells)), str)
        columns[name] = kind if cells else str
    return [
        {name: None if row[name] in MISSING else kind(row[name]) for name, kind in columns.items()} for row in rows
    ]


def _is_written(kind: type, cell: str) -> bool:
    pattern = r"-?(0|[1-9]\d{0,17})" if kind is int else r"-?(0|[1-9]\d*)(\.\d*)?([eE][-+]?\d+)?"
    return re.fullmatch(pattern, cell) is not None


def _check_ids(scans: Sequence[ScanSource]) -> None:
    seen = set()
    for scan in scans:
        for what, value in zip(("subject", "session", "task", "run", "site"), (*scan.ids, scan.site), strict=True):
            if value is not None and not ID.fullmatch(value):
                raise ValueError(f"expected a {what} without slashes, line breaks or a leading dot, got {value!r}")
        if (scan.ids, scan.atlas) in seen:
            raise ValueError("two scans of subject {!r}, session {}, task {}, run {}: expected one".format(*scan.ids))
        seen.add((scan.ids, scan.atlas))


def _check_agreement(rows: Iterable[tuple[str, str | None, dict[str, Label]]]) -> None:
    """Several rows of one subject (and session, where there are any) must say the same about it."""
    known: dict[tuple[str, str | None], dict[str, Label]] = {}
    for subject, session, labels in rows:
        before = known.setdefault((subject, session), labels)
        if before != labels:
            name = next(name for name in labels if before[name] != labels[name])
            where = f"subject {subject!r}" + ("" if session is None else f", session {session!r}")
            raise ValueError(
                f"label {name!r} differs between rows of {where}: {before[name]!r} and {labels[name]!r}; "
                "a label belongs to a subject, or to its session"
            )
