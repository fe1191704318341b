"""
Descriptors measured: cost of each family on a 160 x 450 scan beside common libraries, scans per second, reliability
on real scans, and identification of a scan's other half. Writes `descriptors_*.csv` into the results folder.

    python benchmarks/descriptors.py [speed] [throughput] [reliability] [--quick]

speed needs the `benchmark` extra (bctpy); throughput takes a Dask cluster along where `distributed` is installed.
"""

import argparse
import gc
import importlib.util
import os
import statistics
import time
import timeit
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path


# one thread in each process, workers included; read when numpy is imported
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from joblib import Parallel, delayed  # noqa: E402
from scipy.ndimage import gaussian_filter1d  # noqa: E402

from fmrilm.processors import Atlas, FmriLMFeatureExtractor  # noqa: E402
from fmrilm.processors.descriptors import gradients, graph, networks  # noqa: E402
from fmrilm.processors.descriptors.cohort import Cohort  # noqa: E402
from fmrilm.processors.descriptors.gradients import fit_references  # noqa: E402
from fmrilm.processors.descriptors.measures import FAMILIES, MEASURES, describe, descriptor_names  # noqa: E402
from fmrilm.training.data.open_data import Scan, open_scans, package_folder  # noqa: E402
from fmrilm.training.data.shards import write_whole  # noqa: E402


FRAMES, TR = 160, 2.0
NAMES = descriptor_names(MEASURES)


def of_family(family: str) -> list[str]:
    return [measure for measure in MEASURES if FAMILIES[measure] == family]


def paper_atlas() -> Atlas:
    """The 450 ROIs of the paper: Tian S3, then Schaefer-400."""
    parts = [Atlas.load("tian-s3"), Atlas.load("schaefer-400-7networks")]
    return Atlas(
        "tian-s3-schaefer-400",
        tuple(roi for part in parts for roi in part.rois),
        tuple(network for part in parts for network in part.networks),
        np.concatenate([part.coordinates for part in parts]),
    )


def simulated_scans(count: int, frames: int = FRAMES) -> np.ndarray:
    """
    Slow noise [scans, frames, 450] whose cortical ROIs correlate as in a group of HCP subjects; each subcortical ROI
    follows eight of them. No packaged scan has the 450 ROIs, and what the graph costs depends on who correlates.
    """
    folder = package_folder("brainspace") / "datasets" / "matrices" / "main_group"
    matrix = np.loadtxt(folder / "schaefer_400_mean_connectivity_matrix.csv", delimiter=",")
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    mix = vectors * np.sqrt(values.clip(0))
    rng = np.random.default_rng(0)
    follows = np.zeros((400, 50))
    for column in range(50):
        follows[rng.permutation(400)[:8], column] = 1 / 8
    noise = gaussian_filter1d(rng.standard_normal((count, frames, 400)), 1.0, axis=1)
    cortex = noise @ mix.T
    subcortex = cortex @ follows + 0.3 * cortex.std() * rng.standard_normal((count, frames, 50))
    signal = np.concatenate([subcortex, cortex], axis=-1)
    return ((signal - signal.mean(1, keepdims=True)) / signal.std(1, keepdims=True)).astype(np.float32)


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Median over repeats, after one run that does not count."""
    function()
    return 1000 * statistics.median(timeit.repeat(function, gc.enable, repeat=repeats, number=1))


def speed(repeats: int) -> list[dict]:
    from descriptors_reference import IMPLEMENTATIONS

    atlas = paper_atlas()
    scan, *others = simulated_scans(4)
    references = fit_references((other, atlas) for other in others)
    rows = []

    def add(what: str, implementation: str, function: Callable[[], object], differences: dict | None = None) -> None:
        worst = max(differences, key=differences.get) if differences else ""
        rows.append(
            {
                "what": what,
                "implementation": implementation,
                "milliseconds": round(milliseconds(function, repeats), 3),
                "largest_difference": f"{differences[worst]:.1e}" if differences else "",
                "of": worst,
            }
        )
        print(*rows[-1].values(), sep="  ")

    add("all families", "fmrilm", lambda: describe(scan, atlas, MEASURES, TR, references))
    for family in dict.fromkeys(FAMILIES.values()):
        measures = of_family(family)
        add(family, "fmrilm", partial(describe, scan, atlas, measures, TR, references))
        found = dict(zip(descriptor_names(measures), describe(scan, atlas, measures, TR, references), strict=True))
        for (of, library), function in IMPLEMENTATIONS.items():
            if of == family:
                call = partial(function, scan.astype(np.float64), atlas, TR, references[atlas.name])
                expected = call()
                assert expected.keys() == found.keys(), family
                add(family, library, call, {name: abs(found[name] - expected[name]) for name in found})
    standardized = networks.standardize(scan)
    matrix = networks.correlation(standardized)
    weights = graph.strongest_edges(matrix)
    for name, function in (
        ("standardize", lambda: networks.standardize(scan)),
        ("correlation", lambda: networks.correlation(standardized)),
        ("gradients: affinity", lambda: gradients.affinity(matrix)),
        ("gradients: affinity, diffusion map", lambda: gradients.diffusion_gradients(matrix)),
        ("graph: threshold", lambda: graph.strongest_edges(matrix)),
        ("graph: efficiency", lambda: graph.global_efficiency(weights)),
        ("graph: modularity", lambda: graph.modularity(weights)),
        ("graph: clustering", lambda: graph.average_clustering(weights)),
    ):
        add(f"part {name}", "fmrilm", function)
    return rows


def throughput(scans: int) -> list[dict]:
    """Scans per second, workers started and warm."""
    atlas = paper_atlas()
    signals = simulated_scans(scans)
    references = fit_references((signal, atlas) for signal in signals[:3])
    one = partial(describe, atlas=atlas, measures=list(MEASURES), repetition_time=TR, references=references)
    rows = []

    def add(how: str, run: Callable[[np.ndarray], object]) -> None:
        run(signals[: min(8, scans)])
        start = time.perf_counter()
        run(signals)
        rows.append({"how": how, "scans": scans, "scans_per_second": round(scans / (time.perf_counter() - start), 2)})
        print(*rows[-1].values(), sep="  ")

    add("one process", lambda some: [one(signal) for signal in some])
    for processes in (1, 2):
        with Parallel(n_jobs=processes) as parallel:
            add(f"joblib, processes: {processes}", lambda some: parallel(delayed(one)(signal) for signal in some))
    if importlib.util.find_spec("distributed") is None:
        print("distributed is not installed: no Dask cluster")
        return rows
    from distributed import Client, LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        # pure: what was computed before, in the run that warms up, would be taken from there
        add("Dask LocalCluster, workers: 2", lambda some: client.gather(client.map(one, list(some), pure=False)))
    return rows


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="speed, throughput, reliability; all without any")
    parser.add_argument("--quick", action="store_true", help="few repeats: shows that it runs, measures nothing")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    known = ("speed", "throughput", "reliability")
    if unknown := set(args.parts) - set(known):
        parser.error(f"expected parts among {', '.join(known)}, got {', '.join(sorted(unknown))}")
    parts = args.parts or known
    if "speed" in parts:
        write(args.results / "descriptors_speed.csv", speed(1 if args.quick else 20))
    if "throughput" in parts:
        write(args.results / "descriptors_throughput.csv", throughput(4 if args.quick else 200))
    if "reliability" in parts:
        halves = prepared_halves()
        write(args.results / "descriptors_reliability.csv", reliability(halves))
        write(args.results / "descriptors_identification.csv", identification(halves))


if __name__ == "__main__":
    # of libraries, about matrices that miss symmetry by rounding
    warnings.filterwarnings("ignore", message="Affinity is not symmetric")
    main()
