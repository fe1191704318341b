"""Parcel means of a 4D scan: `parcellate` against nilearn's NiftiLabelsMasker on the same files.

Every run is a process of its own, so that nothing is cached but the files themselves, and the two take turns. What is
timed is file to series; imports are not. "Inflating alone" reads the compressed file to its end into a buffer of 1 MiB
and keeps nothing. Memory is the largest resident size of the process, and by how much the work raised it over the
imports. Writes one row per comparison to a CSV file:
what, ours, peer, ratio (peer / ours), n (runs of each), spread (range of ours and of peer), versions.

    python benchmarks/parcellation.py --out benchmarks/results/parcellation.csv
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np


LABELS = 450
# MNI152NLin6Asym at 2 mm, where the labels are, and MNI152NLin2009cAsym at 2 mm
GRIDS = {"same grid": ((91, 109, 91), (-90, -126, -72)), "other grid": ((97, 115, 97), (-96.5, -132.5, -78.5))}


def synthesize(folder: Path, frames: int) -> None:
    """A label image of 450 parcels, and int16 scans with a smooth brain, drift and noise."""
    import nibabel as nib
    from scipy.ndimage import gaussian_filter
    from scipy.spatial import KDTree

    rng = np.random.default_rng(0)
    for name, (shape, origin) in GRIDS.items():
        affine = nib.affines.from_matvec(np.eye(3) * 2, origin)
        points = nib.affines.apply_affine(affine, np.indices(shape).reshape(3, -1).T)
        inside = (((points - [0, -18, 10]) / [70, 88, 68]) ** 2).sum(axis=1) < 1
        if name == "same grid":
            centers = points[rng.choice(np.flatnonzero(inside), LABELS, replace=False)]
            labels = np.zeros(len(points), dtype=np.int16)
            labels[inside] = 1 + KDTree(centers).query(points[inside])[1]
            nib.save(nib.Nifti1Image(labels.reshape(shape), affine), folder / "labels.nii.gz")
        anatomy = np.where(inside, 8000 + 2000 * rng.standard_normal(len(points)), 0).reshape(shape)
        anatomy = gaussian_filter(anatomy, 1)
        volumes = np.empty((*shape, frames), np.int16, order="F")
        for frame in range(frames):
            noise = 80 * rng.standard_normal(shape, dtype=np.float32) + 10 * np.sin(frame / 9)
            volumes[..., frame] = np.where(anatomy > 500, anatomy + noise, 0)
        image = nib.Nifti1Image(volumes, affine)
        image.header.set_zooms((2, 2, 2, 2))
        image.header.set_xyzt_units("mm", "sec")
        path = folder / f"{name}.nii"
        nib.save(image, path)
        if name == "same grid":
            subprocess.run(["gzip", "-k", "-6", str(path)], check=True)


def ours(scan: str, labels: str) -> Callable[[], np.ndarray]:
    from fmrilm.processors import parcellate, read_parcels, read_scan

    def run() -> np.ndarray:
        parcels = read_parcels(labels)
        return parcellate(read_scan(scan), parcels, tuple(np.unique(parcels.volume)[1:].tolist()))

    return run


def peer(scan: str, labels: str) -> Callable[[], np.ndarray]:
    from nilearn.maskers import NiftiLabelsMasker

    return lambda: NiftiLabelsMasker(labels, standardize=None, resampling_target="data").fit_transform(scan)


def inflate_alone(scan: str, module: str) -> Callable[[], np.ndarray]:
    if module == "isal":
        from isal import igzip as gzip
    else:
        import gzip

    def run() -> np.ndarray:
        buffer = bytearray(2**20)
        with gzip.open(scan, "rb") as file:
            while file.readinto(buffer):
                pass
        return np.zeros(0)

    return run


def measure(work: list[str], result: str) -> None:
    """One run in this process: seconds and memory in MiB to standard output, the series to a file."""
    name, *arguments = work
    run = {"ours": ours, "nilearn": peer, "inflate": inflate_alone}[name](*arguments)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    series = run()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    np.save(result, series)
    print(json.dumps({"seconds": seconds, "peak": peak / 1024, "raised": (peak - before) / 1024}))


def in_turns(works: list[list[str]], repeats: int, folder: Path) -> tuple[list[list[dict]], list[np.ndarray]]:
    """Measurements of each work, and its last series. The order turns round from one repetition to the next."""
    found: list[list[dict]] = [[] for _ in works]
    files = [folder / f"{i}.npy" for i in range(len(works))]
    for repetition in range(repeats):
        order = range(len(works)) if repetition % 2 == 0 else reversed(range(len(works)))
        for i in order:
            command = [sys.executable, __file__, "--result", str(files[i]), "--work", *works[i]]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[i].append(json.loads(run.stdout.splitlines()[-1]))
            print(f"{works[i][0]} {Path(works[i][1]).name}: {found[i][-1]}", file=sys.stderr)
    return found, [np.load(file) for file in files]


def row(what: str, ours: list[float], peer: list[float]) -> dict[str, str | int]:
    spread = " / ".join(f"{min(values):.3g}-{max(values):.3g}" for values in (ours, peer))
    middle, other = median(ours), median(peer)
    ratio = f"{other / middle:.3g}" if middle else "inf"
    numbers = {"ours": f"{middle:.4g}", "peer": f"{other:.4g}", "ratio": ratio}
    return {"what": what, **numbers, "n": len(ours), "spread": spread}


def compare(name: str, scan: Path, labels: Path, repeats: int, folder: Path, inflated: bool) -> list[dict]:
    """Rows on time, memory and agreement for one scan; with `inflated` also against inflating alone."""
    files = [str(scan), str(labels)]
    inflaters = ["zlib", "isal"] if inflated else []
    works = [["ours", *files], ["nilearn", *files], *(["inflate", str(scan), module] for module in inflaters)]
    found, series = in_turns(works, repeats, folder)
    columns = {key: [[run[key] for run in runs] for runs in found] for key in found[0][0]}
    rows = [row(f"{name}: seconds, nilearn", columns["seconds"][0], columns["seconds"][1])]
    for i, module in enumerate(inflaters, start=2):
        what = f"{name}: seconds, inflating alone ({module})"
        rows.append(row(what, columns["seconds"][0], columns["seconds"][i]))
    for key, what in (("peak", "peak memory, MiB"), ("raised", "memory over the imports, MiB")):
        rows.append(row(f"{name}: {what}, nilearn", columns[key][0], columns[key][1]))
    scale = np.abs(series[1]).max(axis=0)
    largest = float((np.abs(series[0] - series[1]) / scale).max())
    agreement = {"what": f"{name}: largest relative difference", "ours": f"{largest:.2g}", "n": 1}
    return [*rows, agreement]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "parcellation.csv")
    parser.add_argument("--frames", type=int, default=160)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scan", type=Path, help="also a real 4D scan, such as niworkflows' *_bold_volreg.nii.gz")
    parser.add_argument("--labels", type=Path, help="its label image, such as niworkflows' *_bold_parc.nii.gz")
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work and arguments.work[0] == "synthesize":
        return synthesize(Path(arguments.work[1]), arguments.frames)
    if arguments.work:
        return measure(arguments.work, arguments.result)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # in a process of its own: a child's peak memory begins at its parent's
        command = [sys.executable, __file__, "--frames", str(arguments.frames), "--work", "synthesize", name]
        subprocess.run(command, check=True)
        labels = folder / "labels.nii.gz"
        plain, packed, other = (folder / file for file in ("same grid.nii", "same grid.nii.gz", "other grid.nii"))
        rows = compare(".nii", plain, labels, arguments.repeats, folder, False)
        rows += compare(".nii.gz", packed, labels, arguments.repeats, folder, True)
        rows += compare(".nii on another grid", other, labels, arguments.repeats, folder, False)
        if arguments.scan:
            rows += compare("real .nii.gz", arguments.scan, arguments.labels, arguments.repeats, folder, True)

    # not in the processes that are measured
    import pandas as pd

    from fmrilm.training.data.shards import write_whole

    packages = ("fmri-lm", "numpy", "scipy", "nibabel", "nilearn", "isal")
    versions = ", ".join([f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)])
    write_whole(arguments.out, pd.DataFrame(rows).assign(versions=versions).to_csv(index=False))


if __name__ == "__main__":
    main()
