"""Who is in the scans of a run, and what they are called outside of it."""

from .dataset import PreparedScan, Window


def subject(scan: PreparedScan) -> tuple[str, str]:
    return scan.dataset, scan.subject


def subjects(scans: list[PreparedScan]) -> list[tuple[str, str]]:
    return sorted({subject(scan) for scan in scans})


def pseudonyms(scans: list[PreparedScan]) -> dict[tuple[str, str], str]:
    """Names for reports: no identifier of a person leaves the run."""
    counts, names = {}, {}
    for person in subjects(scans):
        counts[person[0]] = counts.get(person[0], 0) + 1
        names[person] = f"{person[0]} {counts[person[0]]}"
    return names


def dataset_counts(training: list[PreparedScan], held_out: list[PreparedScan]) -> dict[str, dict[str, int]]:
    counts = {}
    for part, scans in (("training", training), ("held_out", held_out)):
        for dataset, _ in subjects(scans):
            counts.setdefault(dataset, {"training": 0, "held_out": 0})[part] += 1
    return counts


def first_windows(windows: list[Window]) -> list[int]:
    """Row of the first window of each subject."""
    rows = {}
    for row, window in enumerate(windows):
        rows.setdefault(subject(window.scan), row)
    return list(rows.values())
