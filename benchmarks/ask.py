"""Seconds of `fmrilm ask` on a 2 mm NIfTI, split by part, on an array, and of `import fmrilm` and `fmrilm --help`.

Every run is a process of its own. The whole is the command as a user types it, timed from outside. The parts are those
of a process that does the same with the same objects:

    start        the interpreter, the imports, the model and its processor
    read         the scan's header and the parcels of the atlas
    parcellate   the means of the parcels while the volumes stream from disk
    prepare      cleaning, resampling, z-scores, the window, the prompt
    encode       the scan's codes
    answer       the probabilities of three allowed answers, given the codes

The scan is synthetic: 320 volumes of the MNI grid at 2 mm and TR 1 s, a label image that gives each voxel of an
ellipsoid to the nearest ROI. Writes one row per part to a CSV file: what, seconds (median), lowest, highest, n,
versions.

    python benchmarks/ask.py runs/demo/model --out benchmarks/results/ask.csv
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np


SHAPE, ORIGIN, REPETITION_TIME = (91, 109, 91), (-90, -126, -72), 1.0
ATLAS = "aal2-94"
QUESTION = "Is connectivity between the visual and default mode networks low, typical or high?"
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
    header = nib.Nifti1Image(np.zeros((*SHAPE, 1), np.int16), affine).header
    header.set_data_shape((*SHAPE, frames))
    header.set_data_offset(352)
    header.set_zooms((2, 2, 2, REPETITION_TIME))
    header.set_xyzt_units("mm", "sec")
    with open(folder / "scan.nii", "wb") as file:
        file.write(header.binaryblock + bytes(4))
        for course in courses:
            volume = 8000 + 20 * course[labels] + 80 * rng.standard_normal(len(points), dtype=np.float32)
            volume = np.where(inside, volume, 0).reshape(SHAPE)
            file.write(volume.astype("<i2").tobytes(order="F"))
    subprocess.run(["gzip", "-6", str(folder / "scan.nii")], check=True)


def measure(model: str, folder: Path, begun: float) -> None:
    """One run in this process: seconds of each part to standard output, as JSON. begun: time.time() of its start."""
    import torch

    import fmrilm
    from fmrilm.processors import parcellate, read_parcels, read_scan

    reader = fmrilm.load(model, device="cpu")
    times = [begun, time.time()]
    parcels = read_parcels(folder / "labels.nii.gz")
    scan = read_scan(folder / "scan.nii.gz")
    times.append(time.time())
    series = parcellate(scan, parcels, reader.processor.feature_extractor.atlas(ATLAS).labels)
    times.append(time.time())
    content = [{"type": "fmri", "fmri": series, "tr": scan.tr, "atlas": ATLAS}, {"type": "text", "text": QUESTION}]
    chat = [{"role": "user", "content": content}]
    inputs = dict(reader.processor.apply_chat_template(chat, add_generation_prompt=True))
    times.append(time.time())
    scans = {name: inputs.pop(name) for name in reader.processor.feature_extractor.model_input_names}
    with torch.no_grad():
        inputs["fmri_codes"] = reader.model.model.get_fmri_codes(**scans)
    times.append(time.time())
    scores = reader.model.score_choices(inputs, reader.processor.encode_choices(CHOICES)).softmax(-1)[0]
    times.append(time.time())
    names = ("start", "read", "parcellate", "prepare", "encode", "answer")
    parts = dict(zip(names, np.diff(times).tolist(), strict=True))
    print(json.dumps({"parts": parts, "probabilities": dict(zip(CHOICES, scores.tolist(), strict=True))}))


def timed(command: list[str]) -> tuple[float, str]:
    start = time.perf_counter()
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return time.perf_counter() - start, run.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder that `make demo` has written")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ask.csv")
    parser.add_argument("--frames", type=int, default=320)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        return measure(arguments.model, Path(arguments.work[0]), float(arguments.work[1]))

    fmrilm = str(Path(sys.executable).with_name("fmrilm"))
    seconds: dict[str, list[float]] = {}
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
            "fmrilm ask": [fmrilm, "ask", str(folder / "scan.nii.gz"), *options, *parcels],
        }  # fmt: skip
        # the first round warms the disk and is left out
        for number in range(1 + arguments.repeats):
            found = {}
            for what, command in commands.items():
                found[what], told = timed(command)
            _, output = timed([sys.executable, __file__, arguments.model, "--work", name, str(time.time())])
            measured = json.loads(output.splitlines()[-1])
            same = [json.loads(told)["probabilities"][choice] for choice in CHOICES]
            if not np.allclose(same, list(measured["probabilities"].values()), atol=1e-3):
                raise ValueError(f"expected the parts to give the command's answer, {same}, got {measured}")
            found |= {f"fmrilm ask: {part}": value for part, value in measured["parts"].items()}
            if number:
                for what, value in found.items():
                    seconds.setdefault(what, []).append(value)

    versions = ", ".join(f"{name} {version(name)}" for name in ("fmri-lm", "torch", "transformers", "numpy"))
    versions = f"python {platform.python_version()}, {versions}"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    partial = arguments.out.with_suffix(".partial")
    with open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["what", "seconds", "lowest", "highest", "n", "versions"])
        for what, values in seconds.items():
            figures = (f"{value:.3f}" for value in (median(values), min(values), max(values)))
            writer.writerow([what, *figures, len(values), versions])
    os.replace(partial, arguments.out)


if __name__ == "__main__":
    main()
