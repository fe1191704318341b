"""Seconds of `fmrilm ask` on an array and on a 2 mm NIfTI, split by part, of `import fmrilm` and of `fmrilm --help`.

Every run is a process of its own. The whole is the command as a user types it, timed from outside. Its first parts are
those that it prints itself (`--json`); `begin and end` is what they leave of the whole:

    import       torch, transformers and this package
    load         the model and its processor
    answer       from the file to the probabilities

On the NIfTI, the answer's parts are those of another process that does the same with the same objects:

    read         the scan's header and the parcels of the atlas
    parcellate   the means of the parcels while the volumes stream from disk
    prepare      cleaning, resampling, z-scores, the window, the prompt
    encode       the scan's codes
    score        the probabilities of three allowed answers, given the codes

The scan is synthetic: 320 volumes of the MNI grid at 2 mm and TR 1 s, a label image that gives each voxel of an
ellipsoid to the nearest ROI. Writes one row per part to a CSV file: what, seconds (median), lowest, highest, n, others
(cores that other processes kept busy meanwhile, median), versions.

    python benchmarks/ask.py runs/demo/model --out benchmarks/results/ask.csv
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import psutil

from fmrilm.training.cli.options import let_threads_sleep


SHAPE, ORIGIN, REPETITION_TIME = (91, 109, 91), (-90, -126, -72), 1.0
ATLAS = "aal2-94"
QUESTION = "Is the connectivity between the visual and default mode networks low, typical or high?"
CHOICES = ["low", "typical", "high"]


def synthesize(folder: Path, frames: int) -> None:
    """
    `scan.nii.gz` int16 with noise in an ellipsoid; `labels.nii.gz`, the ROI that is nearest to each voxel; and
    `scan.npy`, the courses of the ROIs.
    """
    import nibabel as nib
    from scipy.spatial import KDTree

    from fmrilm.processors import Atlas

    atlas = Atlas.load(ATLAS)
    rng = np.random.default_rng(0)
    affine = nib.affines.from_matvec(np.eye(3) * 2, ORIGIN)
    points = nib.affines.apply_affine(affine, np.indices(SHAPE).reshape(3, -1).T)
    inside = (((points - [0, -18, 10]) / [70, 88, 68]) ** 2).sum(axis=1) < 1
    labels = np.zeros(len(points), dtype=np.int16)
    labels[inside] = np.array(atlas.labels)[KDTree(atlas.coordinates).query(points[inside])[1]]
    nib.save(nib.Nifti1Image(labels.reshape(SHAPE), affine), folder / "labels.nii.gz")
    # each ROI has a slow course of its own
    courses = np.cumsum(rng.standard_normal((frames, 1 + max(atlas.labels)), dtype=np.float32), axis=0)
    np.save(folder / "scan.npy", courses[:, list(atlas.labels)])
    volumes = np.empty((*SHAPE, frames), np.int16, order="F")
    for frame, course in enumerate(courses):
        volume = 8000 + 20 * course[labels] + 80 * rng.standard_normal(len(points), dtype=np.float32)
        volumes[..., frame] = np.where(inside, volume, 0).reshape(SHAPE)
    image = nib.Nifti1Image(volumes, affine)
    image.header.set_zooms((2, 2, 2, REPETITION_TIME))
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, folder / "scan.nii")
    subprocess.run(["gzip", "-6", str(folder / "scan.nii")], check=True)


def measure(model: str, folder: Path) -> None:
    """One run in this process: seconds of each part to standard output, as JSON."""
    let_threads_sleep()
    import torch

    from fmrilm.processors import parcellate, read_parcels, read_scan
    from fmrilm.scan_reader import load

    reader = load(model, device="cpu")
    times = [time.perf_counter()]
    parcels = read_parcels(folder / "labels.nii.gz")
    scan = read_scan(folder / "scan.nii.gz")
    times.append(time.perf_counter())
    series = parcellate(scan, parcels, reader.processor.feature_extractor.atlas(ATLAS).labels)
    times.append(time.perf_counter())
    content = [{"type": "fmri", "fmri": series, "tr": scan.tr, "atlas": ATLAS}, {"type": "text", "text": QUESTION}]
    chat = [{"role": "user", "content": content}]
    inputs = dict(reader.processor.apply_chat_template(chat, add_generation_prompt=True))
    times.append(time.perf_counter())
    scans = {name: inputs.pop(name) for name in reader.processor.feature_extractor.model_input_names}
    with torch.no_grad():
        inputs["fmri_codes"] = reader.model.model.get_fmri_codes(**scans)
    times.append(time.perf_counter())
    scores = reader.model.score_choices(inputs, reader.processor.encode_choices(CHOICES, QUESTION))[0]
    scores = reader.model.answer_probabilities(scores, QUESTION, CHOICES)
    times.append(time.perf_counter())
    parts = dict(zip(("read", "parcellate", "prepare", "encode", "score"), np.diff(times).tolist(), strict=True))
    print(json.dumps({"parts": parts, "probabilities": dict(zip(CHOICES, scores.tolist(), strict=True))}))


def timed(command: list[str]) -> tuple[float, str, float]:
    """Seconds of a command, what it prints, and how many cores other processes kept busy meanwhile."""
    start, before, own = time.perf_counter(), busy_seconds(), children_seconds()
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    others = (busy_seconds() - before - (children_seconds() - own)) / seconds
    return seconds, run.stdout, max(0.0, others)


def busy_seconds() -> float:
    """Of all cores since the machine was started."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0)


def children_seconds() -> float:
    """Of the processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder that `make demo` has written")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ask.csv")
    parser.add_argument("--frames", type=int, default=320)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        return measure(arguments.model, Path(arguments.work))

    fmrilm = str(Path(sys.executable).with_name("fmrilm"))
    seconds: dict[str, list[float]] = {}
    others: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthesize(folder, arguments.frames)
        options = [QUESTION, "--choices", ",".join(CHOICES), "--json", "--device", "cpu"]
        options += ["--model", arguments.model, "--atlas", ATLAS]
        parcels = ["--label-image", str(folder / "labels.nii.gz")]
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "import fmrilm": [sys.executable, "-c", "import fmrilm"],
            "fmrilm --help": [fmrilm, "--help"],
            "import torch and transformers' models alone": [
                sys.executable, "-c", "import torch; from transformers import AutoModelForCausalLM, PreTrainedModel",
            ],
            "fmrilm ask, an array": [fmrilm, "ask", str(folder / "scan.npy"), *options, "--tr", str(REPETITION_TIME)],
            "fmrilm ask, a NIfTI": [fmrilm, "ask", str(folder / "scan.nii.gz"), *options, *parcels],
        }  # fmt: skip
        # the first round warms the disk and is left out
        for number in range(1 + arguments.repeats):
            found, load = {}, {}
            for what, command in commands.items():
                found[what], told, load[what] = timed(command)
                if what.startswith("fmrilm ask"):
                    answer = json.loads(told)
                    parts = answer["seconds"]
                    parts["begin and end"] = found[what] - sum(parts.values())
                    for part, value in parts.items():
                        found[f"{what}: {part}"], load[f"{what}: {part}"] = value, load[what]
            _, output, alongside = timed([sys.executable, __file__, arguments.model, "--work", name])
            measured = json.loads(output.splitlines()[-1])
            same = [answer["probabilities"][choice] for choice in CHOICES]
            if not np.allclose(same, list(measured["probabilities"].values()), atol=1e-3):
                raise ValueError(f"expected the parts to give the command's answer, {same}, got {measured}")
            for part, value in measured["parts"].items():
                found[f"fmrilm ask, a NIfTI: answer: {part}"] = value
                load[f"fmrilm ask, a NIfTI: answer: {part}"] = alongside
            if number:
                for what, value in found.items():
                    seconds.setdefault(what, []).append(value)
                    others.setdefault(what, []).append(load[what])

    versions = ", ".join(f"{name} {version(name)}" for name in ("fmri-lm", "torch", "transformers", "numpy"))
    versions = f"python {platform.python_version()}, {versions}"
    # not in the process that is measured
    import pandas as pd

    from fmrilm.training.data.shards import write_whole

    rows = []
    for what, values in seconds.items():
        figures = {"seconds": median(values), "lowest": min(values), "highest": max(values)}
        row = {"what": what, **{name: f"{value:.3f}" for name, value in figures.items()}, "n": len(values)}
        rows.append({**row, "others": f"{median(others[what]):.2f}", "versions": versions})
    write_whole(arguments.out, pd.DataFrame(rows).to_csv(index=False))


if __name__ == "__main__":
    main()
