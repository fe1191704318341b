"""
Which scans there are to prepare: from a manifest, a derivatives folder (fMRIPrep, BIDS), a folder of the Preprocessed
Connectomes Project, or a folder of files.
"""

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

from fmrilm.processors.scan_io_fmrilm import FORMATS, check_text_size, hemispheres, warn_once


MANIFEST_COLUMNS = ("path", "subject", "session", "task", "run", "site", "tr", "atlas", "confounds")
IDS = ("subject", "session", "task", "run", "site")
# what a prepared row holds beside the labels of a manifest, now or later
ROW_COLUMNS = (
    "signal", "censored", "missing_rois", "descriptors", "description", "messages", "questions", "rewritten", "scan",
    "dataset", "folder", "row", "frames",
)  # fmt: skip
# ids are written to the output: nothing in them may be a path or break a line
ID = re.compile(r"[^\s\x00-\x1f/\\.][^\x00-\x1f/\\]*")
# in any case
MISSING = ("", "n/a", "na", "nan")
# other names of the columns that say whose a row is, in any case
ALIASES = {"participant_id": "subject", "subject_id": "subject", "session_id": "session"}
# of a name in a derivatives folder: all others tell runs apart
KNOWN_ENTITIES = ("sub", "ses", "task", "run", "space", "res", "den", "cohort", "desc", "hemi", "suffix", "extension")
# beside the scans of a folder
NO_SCANS = re.compile(r"\..*|.*\.json|(README|CHANGES|LICENSE)(\..*)?", re.IGNORECASE)
# of the Preprocessed Connectomes Project (ABIDE): series of a subject, and the table of phenotypes
PCP_SERIES = re.compile(r"(?P<subject>.+)_rois_(?P<atlas>\w+)\.1D")
PCP_TABLE = "Phenotypic_V1_0b_preprocessed1.csv"
PCP_LABELS = (
    "DX_GROUP", "DSM_IV_TR", "AGE_AT_SCAN", "SEX", "HANDEDNESS_CATEGORY", "FIQ", "VIQ", "PIQ", "EYE_STATUS_AT_SCAN",
    "ADOS_TOTAL", "func_mean_fd",
)  # fmt: skip
PCP_IDS = ("index", "subject", "site", "FILE_ID", "SITE_ID")
PCP_MISSING = ("-9999", "-9999.0")
# repetition times (s) of the sites, by what a subject's name starts with; the series do not have them
PCP_TRS = {
    "Caltech": 2.0, "CMU_a": 2.0, "CMU_b": 1.5, "KKI": 2.5, "Leuven": 1.656, "MaxMun": 3.0, "NYU": 2.0, "OHSU": 2.5,
    "Olin": 1.5, "Pitt": 1.5, "SBL": 2.2, "SDSU": 2.0, "Stanford": 2.0, "Trinity": 2.0, "UCLA": 3.0, "UM": 2.0,
    "USM": 2.0, "Yale": 2.0,
}  # fmt: skip

Label = str | int | float | None


@dataclass(frozen=True)
class ScanSource:
    """
    A scan that can be prepared.

    path, confounds: absolute paths. subject ... site: ids as they are written to the output. tr: s, if it is known.
    atlas: name or table. labels: what is known about the subject or session. problem: why it cannot be prepared.
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
    problem: str | None = None

    @property
    def ids(self) -> tuple[str | None, ...]:
        """What tells this scan from all others in one atlas."""
        return self.subject, self.session, self.task, self.run


def find_scans(
    source: Path, labels: Path | None = None, space: str = "MNI*", atlas: str | None = None
) -> list[ScanSource]:
    """
    All scans of a manifest or folder, with their labels.

    Args:
        source: manifest (.csv or .tsv), derivatives folder (holds `desc-preproc_bold` files), folder of the
            Preprocessed Connectomes Project (holds `NAME_rois_ATLAS.1D` files) or folder of scans.
        labels: table with a column `subject` (or `participant_id`, `FILE_ID`), perhaps `session`, and labels; by
            default the table of phenotypes of the Preprocessed Connectomes Project, where the folder holds it.
        space: pattern of the template space to take of a derivatives folder.
        atlas: whose series to take of a folder of the Preprocessed Connectomes Project that holds several.
    """
    # other processes, on other machines too, start elsewhere
    source = source.absolute()
    if source.is_file():
        scans = read_manifest(source)
    elif source.is_dir():
        scans = find_derivatives(source, space) or find_pcp(source, atlas) or find_files(source)
        phenotypes = sorted(source.rglob(PCP_TABLE))
        labels = phenotypes[0] if labels is None and phenotypes else labels
    else:
        raise ValueError(f"expected a manifest or a folder of scans, there is nothing at {source}")
    if not scans:
        raise ValueError(f"no scans in {source}: expected files that end in {', '.join(FORMATS)}")
    _check_ids(scans)
    _check_agreement((scan.ids, scan.labels) for scan in scans)
    return scans if labels is None else join_labels(scans, labels)


def read_manifest(path: Path) -> list[ScanSource]:
    """
    One scan per row: columns path and subject; perhaps session, task, run, site, tr (s), atlas, confounds; all others
    are labels. Relative paths start at the manifest's folder.
    """
    rows = read_rows(path)
    header = list(rows[0])
    if missing := [column for column in ("path", "subject") if column not in header]:
        raise ValueError(f"{path.name}: expected columns path and subject, got {', '.join(header)}: no {missing[0]}")
    labels = _typed_labels(path, rows, [column for column in header if column not in MANIFEST_COLUMNS])
    scans = []
    for number, (row, values) in enumerate(zip(rows, labels, strict=True), start=2):
        cells = {column: None if _is_missing(row.get(column, "")) else row[column] for column in MANIFEST_COLUMNS}
        if cells["path"] is None or cells["subject"] is None:
            got = f"{row['path']!r} and {row['subject']!r}"
            raise ValueError(f"{path.name}, line {number}: expected a path and a subject, got {got}")
        try:
            tr = None if cells["tr"] is None else float(cells["tr"])
        except ValueError as error:
            raise ValueError(f"{path.name}, line {number}: expected tr in seconds, got {cells['tr']!r}") from error
        files: dict[str, Path | str] = {
            name: path.parent / cell for name in ("path", "confounds") if (cell := cells[name]) is not None
        }
        if cells["atlas"] is not None and cells["atlas"].endswith((".tsv", ".csv")):
            files["atlas"] = str(path.parent / cells["atlas"])
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

    What else is different between scans of a subject (acquisition, echo, ...) becomes part of `run`. Scans that are
    in other spaces alone, of an unknown ending or not preprocessed have a problem. ValueError for raw BIDS.
    """
    found: dict[tuple, dict[str, Path]] = {}
    elsewhere: dict[tuple, dict[str, Path]] = {}
    raw: dict[tuple, dict[str, Path]] = {}
    nameless: list[ScanSource] = []
    for path in sorted(folder.rglob("sub-*_bold.*")):
        entities = parse_bids_name(path.name)
        if path.suffix == ".json" or entities is not None and entities["suffix"] != "bold":
            continue
        if entities is None:
            problem = "expected a name of BIDS, sub-LABEL_KEY-LABEL_..._bold.ENDING"
            nameless.append(ScanSource(path, path.name, problem=problem))
            continue
        template = entities.get("space", "native")
        run = _run(entities, [key for key in entities if key not in KNOWN_ENTITIES])
        # the other entities of its grid: resolution or density
        grid = "_".join([template, *(f"{key}-{entities[key]}" for key in ("res", "den", "cohort") if key in entities)])
        ids = (entities["sub"], entities.get("ses"), entities.get("task"), run)
        # surfaces have no desc
        if entities.get("desc") != "preproc" and not entities["extension"].endswith(("series.nii", ".gii")):
            raw.setdefault(ids, {})[f"desc-{entities['desc']}" if "desc" in entities else "the raw scan"] = path
            continue
        if not path.name.endswith(FORMATS):
            grid = f"a file that ends in {entities['extension']}"
        fits = path.name.endswith(FORMATS) and fnmatchcase(template, space)
        grids = (found if fits else elsewhere).setdefault(ids, {})
        # another file of the grid; but a hemisphere stands for both
        grids[f"{grid} ({path.name})" if grid in grids and "hemi" not in entities else grid] = path
    if not found and _series(folder):
        # XCP-D's: what it denoised lies beside
        return []
    if raw and not (found or elsewhere):
        raise ValueError(f"{folder.name} is raw BIDS, run fMRIPrep first: expected desc-preproc_bold files, got none")
    if elsewhere and not found:
        spaces = ", ".join(sorted({grid for grids in elsewhere.values() for grid in grids}))
        raise ValueError(f"no preprocessed scan in a space like {space!r}; spaces found: {spaces}")
    for ids, grids in found.items():
        if len(grids) > 1:
            raise ValueError(
                f"subject {ids[0]!r} has one scan in {len(grids)} spaces or resolutions: {', '.join(sorted(grids))}; "
                "name one with --space"
            )
    if not found:
        return []
    return (
        [ScanSource(next(iter(grids.values())), *ids) for ids, grids in found.items()]
        + [
            ScanSource(
                next(iter(grids.values())),
                *ids,
                problem=f"no scan in a space like {space}, of the known endings; there is: {', '.join(sorted(grids))}",
            )
            for ids, grids in {**raw, **elsewhere}.items()
            if ids not in found
        ]
        + nameless
    )


def _run(entities: dict[str, str], others: Sequence[str]) -> str | None:
    """What tells apart the scans of a session and task: the entity `run`, and the others named."""
    parts = [f"{key}-{entities[key]}" for key in others if key in entities]
    if parts and "run" in entities:
        parts.append(f"run-{entities['run']}")
    return "_".join(parts) or entities.get("run")


def find_pcp(folder: Path, wanted: str | None = None) -> list[ScanSource]:
    """
    The series of ROIs that `nilearn.datasets.fetch_abide_pcp` leaves; of the site's repetition time. Files beside them
    of subjects without a series have a problem. wanted: the atlas, if there are series of it.
    """
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(folder.rglob("*_rois_*.1D")):
        if (match := PCP_SERIES.fullmatch(path.name)) is None:
            continue
        subject, atlas = match["subject"], match["atlas"]
        if (before := found.setdefault((subject, atlas), path)) != path:
            places = " and ".join(str(one.parent.relative_to(folder)) for one in (before, path))
            raise ValueError(f"subject {subject!r} has series in {places}: expected the folder of one of them")
    subjects = tuple(f"{subject}_" for subject, _ in found)
    if any(atlas == wanted for _, atlas in found):
        found = {(subject, atlas): path for (subject, atlas), path in found.items() if atlas == wanted}
    times = {subject: [tr for site, tr in PCP_TRS.items() if subject.startswith(f"{site}_")] for subject, _ in found}
    return [
        ScanSource(path, subject, tr=times[subject][0] if times[subject] else None, atlas=atlas)
        for (subject, atlas), path in found.items()
    ] + [
        # of an atlas that is there: none has to be named for it
        ScanSource(path, path.name, atlas=atlas, problem="expected a series by the name NAME_rois_ATLAS.1D")
        for parent, atlas in {path.parent: atlas for (_, atlas), path in found.items()}.items()
        for path in sorted(parent.iterdir())
        if path.is_file()
        and path.suffix != ".csv"
        and not NO_SCANS.fullmatch(path.name)
        and not path.name.startswith(subjects)
    ]


def find_files(folder: Path) -> list[ScanSource]:
    """
    Every file of a folder; without any, the tables of series in the folders of its subjects, as XCP-D leaves them. A
    name of BIDS says subject, session, task and run; of another name, all but the ending is the subject's id. Files of
    other endings have a problem, and so have folders that hold scans.
    """
    scans, right = [], set()
    for path in sorted(folder.iterdir()):
        if path in right or NO_SCANS.fullmatch(path.name):
            continue
        if path.is_dir():
            if any(file.name.endswith(FORMATS) for file in path.rglob("*")):
                problem = "a folder with scans in it: prepare it by itself, or list its files in a manifest"
                scans.append(ScanSource(path, path.name, problem=problem))
            continue
        ending = next((ending for ending in FORMATS if path.name.lower().endswith(ending.lower())), None)
        if ending is None:
            problem = f"unknown ending {path.suffix or 'of a file without any'}: expected {', '.join(FORMATS)}"
            scans.append(ScanSource(path, subject=path.name, problem=problem))
            continue
        if ending in (".gii", ".func.gii", ".mgh", ".mgz"):
            try:
                right.add(hemispheres(path)[1])
            except ValueError:
                # said when it is read
                pass
        scans.append(ScanSource(path, subject=path.name[: -len(ending)]))
    if any(scan.problem is None for scan in scans):
        return _named_by_bids(scans)
    return _named_by_bids([ScanSource(path, subject=path.stem) for path in _series(folder)])


def _series(folder: Path) -> list[Path]:
    """Tables of series in the folders of subjects."""
    found = folder.rglob("sub-*_timeseries.[ct]sv")
    return sorted(path for path in found if "_desc-confounds_" not in path.name and path.parent != folder)


def _named_by_bids(scans: Sequence[ScanSource]) -> list[ScanSource]:
    """
    Scans whose subject is the name of a file so far: where that is of BIDS, its ids. What `find_derivatives` makes a
    part of `run`, and suffixes, are so here where they are not the same in all names.
    """
    names: dict[Path, dict[str, str]] = {}
    own = []
    for scan in scans:
        if scan.problem is not None or not scan.subject.startswith("sub-"):
            continue
        # BIDS asks for a suffix, which many leave out
        whole = re.fullmatch(r".*_[A-Za-z]+", scan.subject) is not None
        entities = parse_bids_name(f"{scan.subject}.x" if whole else f"{scan.subject}_none.x")
        if entities is None or not entities["suffix"].isalpha():
            own.append(scan.subject)
            continue
        names[scan.path] = {**entities, "suffix": entities["suffix"] if whole else ""}
    if own:
        warn_once(
            f"{len(own)} names, the first one {own[0]!r}, are not of BIDS (sub-LABEL_ses-LABEL_task-LABEL_run-LABEL): "
            "each is taken for a subject of its own; list several scans of one subject in a manifest"
        )
    keys = dict.fromkeys(key for entities in names.values() for key in entities)
    differ = [key for key in keys if len({entities.get(key) for entities in names.values()}) > 1]
    others = [key for key in differ if key == "suffix" or key not in KNOWN_ENTITIES]
    return [
        replace(scan, subject=of["sub"], session=of.get("ses"), task=of.get("task"), run=_run(of, others))
        if (of := names.get(scan.path)) is not None
        else scan
        for scan in scans
    ]


def join_labels(scans: Sequence[ScanSource], path: Path) -> list[ScanSource]:
    """
    Labels of a table given to scans by subject, or by subject and session where the table has sessions. The prefixes
    `sub-` and `ses-` do not count. A column `site` fills in missing sites. Scans without a row get empty labels, and
    are warned of.
    """
    rows = read_rows(path)
    if {"FILE_ID", "SITE_ID"} <= set(rows[0]):
        rows = _phenotypes(rows)
    elif "FILE_ID" in rows[0] and "subject" not in rows[0]:
        rows = [{"subject" if name == "FILE_ID" else name: cell for name, cell in row.items()} for row in rows]
    header = list(rows[0])
    if "subject" not in header:
        raise ValueError(f"{path.name}: expected a column subject, participant_id or FILE_ID, got {', '.join(header)}")
    if reserved := [c for c in header if c in MANIFEST_COLUMNS and c not in ("subject", "session", "site")]:
        raise ValueError(f"{path.name}: a label cannot be named {reserved[0]!r}")
    names = [column for column in header if column not in MANIFEST_COLUMNS]
    if twice := sorted(set(names) & {name for scan in scans for name in scan.labels}):
        raise ValueError(f"{path.name}: the labels {', '.join(twice)} stand in the manifest, too")
    by_session = "session" in header
    sessions = ["" if _is_missing(row.get("session", "")) else bare_id(row["session"]) for row in rows]
    subjects = [bare_id(row["subject"]) for row in rows]
    keys = [(one, session if by_session else None) for one, session in zip(subjects, sessions, strict=True)]
    sites = [None if _is_missing(row.get("site", "")) else row["site"] for row in rows]
    values = _typed_labels(path, rows, names)
    _check_agreement((key, {**labels, "site": site}) for key, labels, site in zip(keys, values, sites, strict=True))
    table = dict(zip(keys, zip(values, sites, strict=True), strict=True))
    empty = (dict.fromkeys(names), None)

    joined, without = [], []
    for scan in scans:
        key = (bare_id(scan.subject), bare_id(scan.session or "") if by_session else None)
        if key not in table:
            without.append(scan)
        labels, site = table.get(key, empty)
        joined.append(replace(scan, labels={**scan.labels, **labels}, site=scan.site or site))
    if without:
        hint = ""
        if by_session and bare_id(without[0].subject) in subjects:
            hint = f", session {without[0].session}: labels are by session where the table has sessions"
        elif {bare_id(scan.subject).lstrip("0") for scan in without} & {subject.lstrip("0") for subject in subjects}:
            hint = ": subjects differ in leading zeros, which spreadsheets drop from numbers"
        first = f"the first one is subject {without[0].subject!r}{hint}"
        if len(without) == len(scans):
            raise ValueError(
                f"{path.name}: none of its subjects has a scan; it starts with {rows[0]['subject']!r}; of the scans, "
                + first
            )
        warn_once(f"{path.name} has no row for {len(without)} of {len(scans)} scans, which get no labels; {first}")
    _check_ids(joined)
    return joined


def _phenotypes(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """
    Subject, site and labels of the Preprocessed Connectomes Project's table, of those who have series: of the whole
    table the well-known ones, of a part of it (without SUB_ID) all.
    """
    names = PCP_LABELS if "SUB_ID" in rows[0] else [name for name in rows[0] if name not in PCP_IDS]
    return [
        {"subject": row["FILE_ID"], "site": row["SITE_ID"]}
        | {name: "" if row[name] in PCP_MISSING else row[name] for name in names if name in row}
        for row in rows
        if row["FILE_ID"] != "no_filename"
    ]


def bare_id(name: str) -> str:
    """A subject or session without the prefix that some write before it."""
    return re.sub(r"^(sub|ses)-", "", name)


def one_name_each(subjects: Iterable[str]) -> list[str]:
    """Names of subjects: one that is also there without the prefix `sub-` is that of the same subject."""
    names = list(map(str, subjects))
    known = set(names)
    return [bare if (bare := bare_id(name)) in known else name for name in names]


def _is_missing(cell: str) -> bool:
    return cell.casefold() in MISSING


def read_rows(path: Path) -> list[dict[str, str]]:
    """
    Cells by column of a table, separated by what separates its header: tabs, semicolons (then with decimal commas) or
    commas. Columns with another name of the subject or session get that name.
    """
    if not path.is_file():
        raise ValueError(f"no table at {path}")
    check_text_size(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            delimiter = max("\t;,", key=handle.readline().count)
            handle.seek(0)
            lines = [line for line in csv.reader(handle, delimiter=delimiter) if any(map(str.strip, line))]
    except (csv.Error, UnicodeDecodeError) as error:
        hint = "; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise ValueError(f"{path.name}: not a readable table: {error}{hint}") from error
    if len(lines) < 2:
        raise ValueError(f"{path.name}: expected a header and at least one row, got {len(lines)} lines")
    if all(len(line) == len(lines[0]) and not line[-1].strip() for line in lines):
        lines = [line[:-1] for line in lines]
    # pandas leaves the name of an index empty
    header = [cell.strip() or ("index" if not number else "") for number, cell in enumerate(lines[0])]
    for number, column in enumerate(header):
        known = ALIASES.get(column.casefold(), column.casefold())
        if known in ("path", "subject", "session") and known not in header:
            header[number] = known
    if len(set(header)) < len(header) or "" in header:
        raise ValueError(f"{path.name}: expected different names of columns, got {', '.join(header)}")
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header):
            raise ValueError(f"{path.name}, line {number}: expected {len(header)} cells, got {len(line)}")
    rows = [[cell.strip() for cell in line] for line in lines[1:]]
    if delimiter == ";":
        rows = [[re.sub(r"^(-?\d+),(\d+)$", r"\1.\2", cell) for cell in row] for row in rows]
    return [dict(zip(header, row, strict=True)) for row in rows]


def _typed_labels(path: Path, rows: Sequence[dict[str, str]], names: Sequence[str]) -> list[dict[str, Label]]:
    """Columns of whole numbers, numbers or text, as all cells of a column allow; "007" is text."""
    if reserved := [name for name in names if name in ROW_COLUMNS]:
        raise ValueError(f"{path.name}: a label cannot be named {reserved[0]!r}")
    columns = {}
    for name in names:
        cells = [row[name] for row in rows if not _is_missing(row[name])]
        kind = next((kind for kind in (int, float) if all(_is_written(kind, cell) for cell in cells)), str)
        columns[name] = kind if cells else str
    return [
        {name: None if _is_missing(row[name]) else kind(row[name]) for name, kind in columns.items()} for row in rows
    ]


def _is_written(kind: type, cell: str) -> bool:
    pattern = r"-?(0|[1-9]\d{0,17})" if kind is int else r"-?(0|[1-9]\d*)(\.\d*)?([eE][-+]?\d+)?"
    return re.fullmatch(pattern, cell) is not None


def _check_ids(scans: Sequence[ScanSource]) -> None:
    seen = set()
    for scan in scans:
        for what, value in zip(IDS, (*scan.ids, scan.site), strict=True):
            if value is not None and not ID.fullmatch(value):
                raise ValueError(f"expected a {what} without slashes, line breaks or a leading dot, got {value!r}")
        if (scan.ids, scan.atlas) in seen:
            raise ValueError("two scans of subject {!r}, session {}, task {}, run {}: expected one".format(*scan.ids))
        seen.add((scan.ids, scan.atlas))


def _check_agreement(rows: Iterable[tuple[tuple[str | None, ...], dict[str, Label]]]) -> None:
    """Rows of one scan in several atlases, or of one subject and session in a table, have the same labels."""
    known: dict[tuple[str | None, ...], dict[str, Label]] = {}
    for ids, labels in rows:
        before = known.setdefault(ids, labels)
        if before != labels:
            name = next(name for name in labels if before[name] != labels[name])
            given = [f"{what} {value!r}" for what, value in zip(IDS, ids, strict=False) if value is not None]
            differ = f"{before[name]!r} and {labels[name]!r}"
            raise ValueError(f"label {name!r} differs between rows of {', '.join(given)}: {differ}")
