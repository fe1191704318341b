"""Training and held-out subjects: one rule for all programs, and the folds of evaluations."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.model_selection import KFold, StratifiedKFold

from fmrilm.processors.scan_io_fmrilm import warn_once

from .scan_sources import bare_id, read_rows
from .shards import write_whole


if TYPE_CHECKING:
    from .dataset import Scans


HELD_OUT_SHARE = 0.2
# Another one holds out other subjects: checkpoints from before a change would be tested on those they were trained on.
# This one holds out of the open data the five subjects that all results on them were reported for.
SALT = "held out 48185"
SPLITS = ("train", "test")
# in a model's folder
HELD_OUT = "held_out.json"
# names that an error lists
SHOWN = 5


@dataclass
class SplitArguments:
    """Which subjects are held out, in every program alike."""

    held_out_share: float = field(
        default=HELD_OUT_SHARE, metadata={"help": "Share of the subjects that are held out, by a hash of their names."}
    )
    splits: str | None = field(
        default=None,
        metadata={
            "help": "Table (.csv, .tsv) with the columns subject and split (train or test), in place of the hash."
        },
    )
    leave_out: str | None = field(
        default=None, metadata={"help": "COLUMN=VALUE: hold out the subjects with this value, in place of the hash."}
    )

    def describe(self) -> dict[str, Any]:
        """The settings, the table of splits named by its content: a run goes on with the same subjects alone."""
        try:
            content = self.splits and hashlib.sha256(Path(self.splits).read_bytes()).hexdigest()[:16]
        except OSError as error:
            raise ValueError(f"{Path(str(self.splits)).name}: not a readable table of splits: {error}") from error
        return {**asdict(self), "splits": content}

    def keep(self, folder: Path) -> None:
        """Which subjects a model did not learn from, into its folder: the rule, and none of their names."""
        write_whole(folder / HELD_OUT, json.dumps(self._rule()) + "\n")

    def compare(self, model: str | Path) -> None:
        """Warns if a model's folder says that other subjects were held out in its training."""
        path = Path(model, HELD_OUT)
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else self._rule()
        if known != self._rule():
            warn_once(
                f"{path.parent.name} was trained with other subjects held out ({known}) than these ({self._rule()}): "
                "it may have learned from subjects that are held out here"
            )

    def _rule(self) -> dict[str, Any]:
        rule = {name: value for name, value in self.describe().items() if name in ("splits", "leave_out") and value}
        return rule or {"held_out_share": self.held_out_share}


def held_out_subjects(subjects: Iterable[str], share: float = HELD_OUT_SHARE) -> set[str]:
    """
    About this share of the subjects, drawn by a hash of each one's name. Nothing else counts, neither a seed nor who
    else is there: a codec, a corpus, a tuned model and an evaluation hold out the same subjects, whatever part of the
    data each of them reads, and those of a smaller share are among those of a larger one.
    """
    if not 0 <= share < 1:
        raise ValueError(f"expected a share of held-out subjects from 0 to below 1, got {share}")
    return {subject for subject in subjects if _place(subject) < share}


def _place(subject: str) -> float:
    """Uniform from 0 to below 1; the same with the prefix `sub-`, which fMRIPrep's folders lose, and without."""
    digest = hashlib.sha256(f"{SALT} {subject.removeprefix('sub-')}".encode()).digest()
    return int.from_bytes(digest[:4]) / 2**32


def split_scans(scans: "Scans", args: SplitArguments) -> "tuple[Scans, Scans]":
    """Training and held-out scans, no subject in both; the held-out part may be empty, the training part not."""
    training, test = split_rows(scans.table, args)
    return scans.select(training), scans.select(test)


def split_rows(table: Any, args: SplitArguments) -> tuple[np.ndarray, np.ndarray]:
    """
    Rows of the training and of the held-out subjects of a table with the column subject; see `split_scans`. With
    `leave_out`, those held out are the rows of the value.
    """
    subjects: Any = table["subject"].astype(str)
    if args.splits is not None and args.leave_out is not None:
        raise ValueError(f"expected splits or leave_out, got both: {args.splits} and {args.leave_out}")
    if args.splits is not None:
        sides = subjects.map(read_splits(Path(args.splits), set(subjects)))
        training, test = ((sides == side).to_numpy() for side in SPLITS)
    elif args.leave_out is not None:
        # a subject who also has scans of other values is learned from in none of them
        test = _with_value(table, args.leave_out)
        training = ~subjects.isin(set(subjects[test])).to_numpy()
    else:
        test = subjects.isin(held_out_subjects(subjects, args.held_out_share)).to_numpy()
        training = ~test
    if not training.any():
        raise ValueError(f"expected subjects to learn from, got {subjects.nunique()} subjects, none in training")
    return np.flatnonzero(training), np.flatnonzero(test)


def read_splits(path: Path, known: set[str]) -> dict[str, str]:
    """
    Split of each subject of a table with the columns subject and split, read like a table of labels: the prefix `sub-`
    does not count. Subjects without a row are in neither. ValueError for another split than train and test, a subject
    in two, and one that no scan is of.
    """
    try:
        rows = read_rows(path)
    except OSError as error:
        raise ValueError(f"{path.name}: not a readable table of splits: {error}") from error
    if not {"subject", "split"} <= set(rows[0]):
        raise ValueError(f"{path.name}: expected the columns subject and split, got {', '.join(rows[0])}")
    if others := sorted({row["split"] for row in rows} - set(SPLITS)):
        of = [row["subject"] for row in rows if row["split"] in others]
        raise ValueError(
            f"{path.name}: expected train or test as the split of a subject (those without a row are not used), "
            f"got {_listed([repr(other) for other in others])} of {_listed(of)}"
        )
    splits: dict[str, str] = {}
    for row in rows:
        splits.setdefault(bare_id(row["subject"]), row["split"])
    if twice := sorted({row["subject"] for row in rows if splits[bare_id(row["subject"])] != row["split"]}):
        raise ValueError(f"{path.name}: expected each subject in one split, got in both: {_listed(twice)}")
    scanned = {bare_id(subject) for subject in known}
    if unknown := sorted(
        {row["subject"] or "an empty cell" for row in rows if bare_id(row["subject"]) not in scanned}
    ):
        raise ValueError(f"{path.name}: expected subjects that have scans, got without: {_listed(unknown)}")
    return {subject: splits[bare_id(subject)] for subject in known if bare_id(subject) in splits}


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _with_value(table: Any, condition: str) -> np.ndarray:
    """Rows with COLUMN=VALUE, bool [rows]."""
    column, equals, value = condition.partition("=")
    if not equals:
        raise ValueError(f"expected COLUMN=VALUE of a column out of {', '.join(table)}, got {condition!r}")
    cells = values_of(table, column)
    chosen = cells == value
    if not chosen.any():
        raise ValueError(
            f"expected a value of {column!r} out of {_listed(sorted(cells.dropna().unique()))}, got {value!r}"
        )
    return chosen.to_numpy()


def values_of(table: Any, column: str) -> Any:
    """Cells of a column as text, None where empty: whole numbers without a point, as pandas makes of them."""
    if column not in table:
        raise ValueError(f"expected a column out of {', '.join(table)} to leave out values of, got {column!r}")

    def shown(cell: Any) -> str:
        return f"{cell:.0f}" if isinstance(cell, float) and cell.is_integer() else str(cell)

    return table[column].map(shown, na_action="ignore")


def subject_folds(subjects: Sequence[str] | np.ndarray, seed: int) -> np.ndarray:
    """Fold int [rows] of each row: five folds of subjects, three of fewer than twenty, with all rows of a subject."""
    names, whose = np.unique(np.asarray(subjects), return_inverse=True)
    folds = min(5 if len(names) >= 20 else 3, len(names))
    return np.random.default_rng(seed).permutation(len(names))[whose] % folds


@dataclass(frozen=True)
class Split:
    """Indices of rows, in order."""

    training: np.ndarray
    test: np.ndarray


def k_fold(subjects: Sequence[str] | np.ndarray, labels: np.ndarray | None, folds: int, seed: int) -> Iterator[Split]:
    """
    Each subject is in the test set of one of the folds, with all its rows. Stratified by labels, class int [rows],
    where each class has at least one subject for every fold.
    """
    names, classes = _by_subject(subjects, labels)
    if not 2 <= folds <= len(names):
        raise ValueError(f"expected between 2 folds and one for each of the {len(names)} subjects, got {folds}")
    stratified = classes is not None and np.unique(classes, return_counts=True)[1].min() >= folds
    splitter = (StratifiedKFold if stratified else KFold)(folds, shuffle=True, random_state=seed)
    for parts in splitter.split(names, classes if stratified else None):
        yield Split(*(np.flatnonzero(np.isin(subjects, names[part])) for part in parts))


def k_shot(subjects: Sequence[str] | np.ndarray, labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Rows of `shots` subjects of each class, drawn at random; labels: class int [rows]."""
    names, classes = _by_subject(subjects, labels)
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(np.asarray(classes)):
        members = names[classes == label]
        if len(members) < shots:
            raise ValueError(f"expected at least {shots} training subjects of class {label}, got {len(members)}")
        chosen.extend(rng.choice(members, shots, replace=False))
    return np.flatnonzero(np.isin(subjects, chosen))


def _by_subject(
    subjects: Sequence[str] | np.ndarray, labels: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Each subject's name and class; ValueError where the rows of a subject are of several classes."""
    names, first, whose = np.unique(np.asarray(subjects), return_index=True, return_inverse=True)
    if labels is None:
        return names, None
    classes = np.asarray(labels)[first]
    if (differ := classes[whose] != labels).any():
        row = int(differ.argmax())
        other = first[whose[row]]
        raise ValueError(f"expected one label for each subject, got different ones in rows {other} and {row}")
    return names, classes
