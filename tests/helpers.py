"""Scans and codes that several test files make, and a place to run in without this package."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from datasets import Array2D, Dataset, Features, Value
from packaging.requirements import Requirement

from fmrilm.processors import Atlas
from fmrilm.processors.descriptors.measures import CORE_NAMES
from fmrilm.training.data.dataset import Scans
from fmrilm.training.data.prepare import row_features
from fmrilm.training.data.shards import ShardStore


def atlas(name: str = "small", rois: int = 9) -> Atlas:
    return Atlas(
        name=name,
        rois=tuple(f"{name}_{i}" for i in range(rois)),
        networks=tuple(("Vis", "SomMot", "Default")[i % 3] for i in range(rois)),
        coordinates=np.random.default_rng(rois).uniform(-60, 60, (rois, 3)),
    )


# ROIs per network: one has a single ROI, the last of all networks has none
SIZES = {"Vis": 8, "SomMot": 6, "DorsAttn": 5, "SalVentAttn": 1, "Limbic": 4, "Cont": 6, "Default": 10}


def labelled_atlas(sizes: dict[str, int] | None = None, name: str = "made-up") -> Atlas:
    """An atlas with so many ROIs of each network, in random order."""
    networks = [network for network, size in (sizes or SIZES).items() for _ in range(size)]
    rois = tuple(f"roi{i}" for i in range(len(networks)))
    shuffled = tuple(np.random.default_rng(1).permutation(networks).tolist())
    return Atlas(name, rois, shuffled, np.zeros((len(networks), 3)))


def slow_series(seed: int, time: int, rois: int, batch: tuple[int, ...] = ()) -> np.ndarray:
    """Correlated slow series [*batch, time, rois] on a large mean, as BOLD is."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(*batch, time, rois)) + rng.normal(size=(*batch, time, 3)) @ rng.normal(size=(3, rois))
    return 1000 + 10 * sum(np.roll(noise, lag, axis=-2) for lag in range(5))


def confounds_table(seed: int, frames: int) -> pd.DataFrame:
    """Confounds as fMRIPrep writes them; two frames move."""
    rng = np.random.default_rng(seed)
    names = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z", "csf", "white_matter")
    table = {}
    for name in names:
        series = rng.standard_normal(frames).cumsum()
        difference = np.diff(series, prepend=np.nan)
        table |= {name: series, f"{name}_derivative1": difference}
        table |= {f"{name}_power2": series**2, f"{name}_derivative1_power2": difference**2}
    table["cosine00"] = np.cos(np.pi * (np.arange(frames) + 0.5) / frames)
    table["framewise_displacement"] = np.where(np.isin(np.arange(frames), (20, 45)), 1.0, 0.1)
    table["std_dvars"] = np.ones(frames)
    table = pd.DataFrame(table)
    table.loc[0, "framewise_displacement"] = np.nan
    return table


def noise_signal(subject: str, frames: int = 40, of: Atlas | None = None, seed: int = 0) -> np.ndarray:
    """Noise with some memory: float32 [frames, rois]."""
    return noise(subject, frames, len(of or atlas()), seed)


def noise_scans(*subjects: str, frames: int = 40, of: Atlas | None = None, seed: int = 0) -> Scans:
    """A scan of each subject as training reads it, in memory."""
    of = of or atlas()
    signals = [noise_signal(subject, frames, of, seed) for subject in subjects]
    return scans_of(signals, of, subject=list(subjects))


def scans_of(signals: Sequence[np.ndarray], of: Atlas, **columns: list) -> Scans:
    """Scans of these signals [time, rois], in memory; columns: of the table."""
    features = Features({"signal": Array2D((None, len(of)), "float32"), "frames": Value("int64")})
    frames = [len(signal) for signal in signals]
    part = Dataset.from_dict({"signal": list(signals), "frames": frames}, features).with_format("numpy")
    known = {"subject": [f"p{row}" for row in range(len(signals))], "dataset": "study", "session": None, **columns}
    table = pd.DataFrame({**known, "atlas": of.name, "row": range(len(signals)), "frames": frames})
    return Scans({of.name: part}, table, {of.name: of}, patch_length=4)


def joined(*parts: Scans) -> Scans:
    """Scans of different atlases."""
    atlases = {name: of for part in parts for name, of in part.atlases.items()}
    signals = {name: rows for part in parts for name, rows in part.parts.items()}
    return Scans(signals, pd.concat([part.table for part in parts], ignore_index=True), atlases, 4)


def noise(subject: str, frames: int, rois: int, seed: int = 0) -> np.ndarray:
    """A signal float32 [frames, rois] with some memory."""
    white = np.random.default_rng(seed + sum(map(ord, subject))).standard_normal((frames + 3, rois))
    return (sum(white[lag : lag + frames] for lag in range(4)) / 2).astype(np.float32)


def bold(frames: int, rois: int = 5, seed: int = 0) -> np.ndarray:
    """A scan float32 [frames, rois]: small fluctuations on a large mean."""
    return (1000 + np.random.default_rng(seed).normal(0, 10, (frames, rois))).astype(np.float32)


def in_a_row(signal: np.ndarray, tr: float = 2.0) -> nib.Nifti1Image:
    """A scan whose voxels, in a row, are the ROIs of a signal [frames, rois]."""
    image = nib.Nifti1Image(signal.T[:, None, None].astype(np.float32), np.eye(4))
    image.header.set_zooms((1, 1, 1, tr))
    return image


def labels_in_a_row(rois: int = 5) -> nib.Nifti1Image:
    """The label image of such scans."""
    return nib.Nifti1Image(np.arange(1, rois + 1, dtype=np.int16)[:, None, None], np.eye(4))


def write_table(path: Path, of: Atlas) -> Path:
    """The table of an atlas."""
    rows = zip(of.labels, of.rois, of.networks, *of.coordinates.T.tolist(), strict=True)
    path.write_text("\n".join(["index\tname\tnetwork\tx\ty\tz", *("\t".join(map(str, row)) for row in rows)]))
    return path


def write_prepared(folder: Path, of: Atlas, rows: list[dict], per_shard: int = 100, **labels: str) -> Path:
    """Rows as `fmrilm prepare` writes them, a subject each; labels: types of columns."""
    features = row_features(of, labels)
    store = ShardStore(folder, {"labels": labels}, {row["subject"] for row in rows})
    (folder / "atlases").mkdir(exist_ok=True)
    (folder / "atlases" / f"{of.name}.json").write_text(json.dumps(of.to_dict()))
    known = {**dict.fromkeys(features), "tr": 2.0, "atlas": of.name}
    for start in range(0, len(rows), per_shard):
        part = [(row["subject"], {**known, **row}) for row in rows[start : start + per_shard]]
        store.add(of.name, part, features)
    return folder


def write_study(folder: Path, subjects: int, prefix: str = "s", frames: int = 60, rois: int = 24) -> Path:
    """Noise scans, the table of their atlas (`net.tsv`) and their manifest, whose path is returned."""
    write_table(folder / "net.tsv", atlas("net", rois))
    lines = ["path,subject,site,tr,handedness"]
    for number in range(subjects):
        subject = f"{prefix}{number}"
        np.save(folder / f"{number}.npy", noise(subject, frames, rois))
        lines.append(f"{number}.npy,{subject},{'AB'[number % 2]},2.0,{('right', 'left')[number % 2]}")
    (folder / "manifest.csv").write_text("\n".join(lines))
    return folder / "manifest.csv"


def evaluation_results() -> dict:
    """Those of an evaluation, with the run of a demo."""
    condition = {"accuracy": 0.6, "interval": [0.4, 0.7]}
    family = {
        "questions": 12,
        **dict.fromkeys(("right", "shuffled", "noise", "majority", "codes_ridge"), condition),
        "difference": {"value": 0.2, "interval": [-0.05, 0.3]},
    }
    return {
        "model": {"base_model": "someone/words", "license": "apache-2.0"},
        "data": {
            "scans": 5,
            "subjects": 5,
            "windows": 11,
            "training_subjects": [3],
            "test_subjects": [2],
            "terms": {"study": "the study's own"},
        },
        "settings": {"quick": False, "seed": 0},
        "tasks": {},
        "descriptors": {"families": {"connectivity": family}, "verdict": "nothing beats anything"},
        "run": {
            "hardware": "2 CPU cores, no GPU",
            "peak_memory_gb": 1.5,
            "seconds": {"codec": 60.0, "alignment": 30.0, "sft": 90.0, "total": 180.0},
        },
    }


def random_examples(windows: int = 8, rows: list[dict] | None = None, seed: int = 0):
    """
    Windows [8 tokens, 3 levels] for the tiny models, whose first token holds which window they are of, with levels of
    which a quarter is unknown. rows: what is known of their scans.
    """
    from fmrilm.training.alignment.examples import Examples

    rng = np.random.default_rng(seed)
    codes = rng.integers(16, size=(windows, 8, 3)).astype(np.int32)
    codes[:, 0] = np.stack(np.unravel_index(np.arange(windows), (16, 16, 16)), axis=1)
    levels = rng.integers(-1, 3, size=(windows, len(CORE_NAMES)))
    z_scores = np.where(levels < 0, np.nan, levels - 1 + 0.2 * rng.standard_normal(levels.shape))
    rows = rows or [{"subject": f"s{window // 2}"} for window in range(windows)]
    rows = [{"scan": number, **row} for number, row in enumerate(rows)]
    features = rng.standard_normal((windows, 27)).astype(np.float32)
    scores = rng.standard_normal((windows, 2)).astype(np.float32)
    return Examples(list(codes), features, z_scores, levels, rows, scores)


def window_of(codes: list[list[int]]) -> int:
    """Which window of `random_examples` these codes are of."""
    return int(np.ravel_multi_index(codes[0], (16, 16, 16)))


def chats(rows: int = 8, statements: int = 1) -> Dataset:
    """Rows of stage 3 about descriptors."""
    from fmrilm.training.sft.chats import instruction_rows
    from fmrilm.training.sft.program import SftArguments

    mixture = SftArguments(row_weights=[0.4, 0.3, 0.3], questions=2, statements=statements)
    return instruction_rows(random_examples(), [], rows, mixture, seed=0)


def distributions(*names: str) -> Iterator[Distribution]:
    """Installed distributions of these names and all that they require without extras."""
    waiting, seen = list(names), set()
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            # of another platform's wheels, such as CUDA's
            continue
        yield found
        requirements = [Requirement(text) for text in found.requires or []]
        waiting += [item.name for item in requirements if not item.marker or item.marker.evaluate({"extra": ""})]


def linked_site(folder: Path, *names: str) -> Path:
    """Fills a folder with links to these distributions and what they require, and nothing else; returns it."""
    for found in distributions(*names):
        for name in {path.parts[0] for path in found.files if path.parts[0] not in ("..", "__pycache__")}:
            link = folder / name
            if not link.exists():
                link.symlink_to(found.locate_file(name))
    return folder


# what stands before the code that an interpreter of its own runs
PREAMBLE = """
import importlib, json, sys

arguments = json.loads(sys.argv[1])
for place in arguments["places"]:
    sys.path.insert(0, place)
for name in arguments["absent"]:
    try:
        importlib.import_module(name)
    except ImportError:
        continue
    raise AssertionError(name + " can be imported")
"""
# neither the current folder, nor the environment's packages, nor what an editable install adds
ISOLATED = ("-I", "-S")


def run_python(code: str, *options: str, arguments: dict | None = None, **process) -> str:
    """
    What a new interpreter prints that runs code with `arguments`: packages are also found in the folders "places", and
    none of "absent" can be imported.
    """
    given = json.dumps({"places": [], "absent": [], **(arguments or {})})
    command = [sys.executable, *options, "-c", PREAMBLE + code, given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **process)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout
