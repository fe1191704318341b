"""
Descriptors of the open scans: reliability, and identification of a scan's other half. Writes `descriptors_*.csv`.

    python benchmarks/descriptors.py
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import typer

from fmrilm.processors import Atlas, FmriLMFeatureExtractor
from fmrilm.processors.descriptors.cohort import Cohort
from fmrilm.processors.descriptors.gradients import fit_references
from fmrilm.processors.descriptors.measures import FAMILIES, MEASURES, describe, descriptor_names
from fmrilm.training.data.open_data import Scan, open_scans
from fmrilm.training.data.shards import write_whole


TR = 2.0
NAMES = descriptor_names(MEASURES)


def of_family(family: str) -> list[str]:
    return [measure for measure in MEASURES if FAMILIES[measure] == family]


@dataclass(frozen=True)
class PreparedScan:
    """A scan as the codec takes it. signal: float32 [time, rois]."""

    signal: np.ndarray
    atlas: Atlas
    dataset: str
    subject: str
    session: str


def prepared_halves() -> list[tuple[PreparedScan, PreparedScan]]:
    """
    First and second half of each open scan, cut before anything is done to them: normalised together, what one half
    has more of the other would have less of.
    """
    names = ("aal2-94", "schaefer-100-7networks", "schaefer-400-7networks")
    extractor = FmriLMFeatureExtractor(atlases=[Atlas.load(name) for name in names])

    def prepared(scan: Scan, half: int) -> PreparedScan:
        part = np.array_split(scan.signal, 2)[half]
        signal, atlas = extractor.prepare_signal(part, tr=scan.tr, atlas=scan.atlas)
        return PreparedScan(signal, atlas, scan.dataset, scan.subject, scan.session)

    return [(prepared(scan, 0), prepared(scan, 1)) for scan in open_scans()]


def paired(halves: list[tuple[PreparedScan, PreparedScan]]) -> tuple[np.ndarray, np.ndarray]:
    """
    Z-scores [scans, names] of the first and the second halves against the cohort of the first ones: the second have
    no part in its moments or its reference gradients.
    """
    first = [half for half, _ in halves]
    references = fit_references((scan.signal, scan.atlas) for scan in first)
    descriptors = np.stack([describe(scan.signal, scan.atlas, MEASURES, TR, references) for scan in first])
    people = len({(scan.dataset, scan.subject) for scan in first})
    atlases = [scan.atlas for scan in first]
    cohort = Cohort.fit("first halves", MEASURES, descriptors, people, atlases, references)
    others = np.stack([cohort.describe(scan.signal, scan.atlas, TR) for _, scan in halves])
    return cohort.z_scores(descriptors), cohort.z_scores(others)


def correlate(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson correlation of what both know; NaN with fewer than three such values or without variance."""
    known = np.isfinite(first) & np.isfinite(second)
    if known.sum() < 3 or np.ptp(first[known]) == 0 or np.ptp(second[known]) == 0:
        return float("nan")
    return float(np.corrcoef(first[known], second[known])[0, 1])


def reliability(halves: list[tuple[PreparedScan, PreparedScan]]) -> list[dict]:
    """
    Of each descriptor: correlation over scans between first and second halves, of all scans and after each dataset's
    mean is taken away (scanners and atlases differ, which alone makes halves agree). Of the subjects with two
    sessions, who are too few to correlate: mean absolute difference between sessions of a subject and between
    subjects, in standard deviations of the cohort of first halves.
    """
    first, second = paired(halves)
    scans = [scan for scan, _ in halves]
    datasets = np.array([scan.dataset for scan in scans])
    several = np.isin(datasets, [name for name in set(datasets) if (datasets == name).sum() > 1])
    centred = [
        np.stack([row - half[datasets == name].mean(0) for row, name in zip(half, datasets, strict=True)])[several]
        for half in (first, second)
    ]
    whole = (first + second) / 2
    people = defaultdict(list)
    for row, scan in enumerate(scans):
        people[scan.dataset, scan.subject].append(row)
    twice = [rows for rows in people.values() if len(rows) == 2]
    sessions = np.mean([np.abs(whole[a] - whole[b]) for a, b in twice], axis=0)
    pairs = [(a, b) for place, one in enumerate(twice) for other in twice[place + 1 :] for a in one for b in other]
    between = np.mean([np.abs(whole[a] - whole[b]) for a, b in pairs], axis=0)
    rows = []
    for column, name in enumerate(NAMES):
        known = np.isfinite(first[:, column]) & np.isfinite(second[:, column])
        rows.append(
            {
                "descriptor": name,
                "family": FAMILIES[name.partition("/")[0]],
                "scans": int(known.sum()),
                "halves_correlation": round(correlate(first[:, column], second[:, column]), 3),
                "halves_correlation_within_datasets": round(correlate(*(half[:, column] for half in centred)), 3),
                "difference_between_sessions": round(float(sessions[column]), 3),
                "difference_between_subjects": round(float(between[column]), 3),
            }
        )
    return rows


def identification(halves: list[tuple[PreparedScan, PreparedScan]]) -> list[dict]:
    """
    For the second half of each scan, the first half with the most similar z-scores (Pearson correlation over the
    descriptors both have): how often it is the same scan's, or the same subject's. Among all scans, and among those
    of one dataset with a cohort of that dataset alone. No second half has a part in any cohort.
    """
    rows = []
    groups = {"all": halves}
    for pair in halves:
        groups.setdefault(pair[0].dataset, []).append(pair)
    chosen_of = {"all families": list(MEASURES)}
    chosen_of |= {family: of_family(family) for family in dict.fromkeys(FAMILIES.values())}
    for group, members in groups.items():
        if len(members) < 2:
            continue
        first, second = paired(members)
        keys = [(scan.dataset, scan.subject) for scan, _ in members]
        for what, measures in chosen_of.items():
            columns = [NAMES.index(name) for name in descriptor_names(measures)]
            similarity = np.array([[correlate(a, b) for b in first[:, columns]] for a in second[:, columns]])
            nearest = np.nan_to_num(similarity, nan=-1).argmax(1)
            rows.append(
                {
                    "among": group,
                    "descriptors": what,
                    "scans": len(members),
                    "subjects": len(set(keys)),
                    "right_scan": int((nearest == np.arange(len(members))).sum()),
                    "right_subject": sum(keys[place] == key for place, key in zip(nearest, keys, strict=True)),
                }
            )
            print(*rows[-1].values(), sep="  ")
    return rows


def write(path: Path, rows: list[dict]) -> None:
    write_whole(path, pd.DataFrame(rows).to_csv(index=False, na_rep="nan"))
    print(path)


def main(results: Path = Path(__file__).parent / "results") -> None:
    halves = prepared_halves()
    write(results / "descriptors_reliability.csv", reliability(halves))
    write(results / "descriptors_identification.csv", identification(halves))


if __name__ == "__main__":
    typer.run(main)
