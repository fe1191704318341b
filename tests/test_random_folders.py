"""Random folders made from a grammar of real ones: every scan in them is in the output or in failures.csv."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fmrilm.training.data.prepare import Outcome, Preparation, prepare
from fmrilm.training.data.scan_sources import IDS, find_scans


ROIS, FRAMES = 5, 20
IDENTITY = IDS[:4]
some = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# what may be wrong with a file of a scan
DAMAGES = ("none", "none", "none", "cut", "empty", "short", "dead", "all dead")
SPACES = ("space-MNI152NLin6Asym_desc-preproc", "space-T1w_desc-preproc", "desc-preproc", "desc-smoothed", "")
SIDECARS = (
    None, None, {"RepetitionTime": 2.0}, {"TaskName": "rest"}, {"RepetitionTime": 2000}, {"RepetitionTime": "2"}, "{",
)  # fmt: skip


def signal(damage: str) -> np.ndarray:
    """float32 [frames, rois]."""
    values = np.random.default_rng(0).normal(100, 5, (3 if damage == "short" else FRAMES, ROIS)).astype(np.float32)
    values[:, : {"dead": 1, "all dead": ROIS}.get(damage, 0)] = 0
    return values


def spoil(path: Path, damage: str) -> None:
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b""}.get(damage, content))


def write_volume(path: Path, damage: str) -> None:
    image = nib.Nifti1Image(signal(damage).T[:, None, None], np.eye(4))
    image.header.set_zooms((1, 1, 1, 2.0))
    nib.save(image, path.with_name("volume.nii"))
    path.with_name("volume.nii").rename(path)
    spoil(path, damage)


def write_series(path: Path, damage: str) -> None:
    match path.suffix.lower():
        case ".npy":
            np.save(path, signal(damage))
        case ".csv" | ".tsv":
            np.savetxt(path, signal(damage), delimiter="," if path.suffix == ".csv" else "\t")
        case ".1d":
            np.savetxt(path, signal(damage), header="\t".join(f"#{i + 1}" for i in range(ROIS)), comments="")
        case _:
            write_volume(path, damage)
            return
    spoil(path, damage)


def write_sidecar(path: Path, values: dict | str) -> None:
    path.write_text(values if isinstance(values, str) else json.dumps(values))


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Table and label image of five voxels in a row."""
    folder = tmp_path_factory.mktemp("atlas")
    rows = [f"{i + 1}\tR{i}\tVis\t{-10 * i}\t0\t{i}" for i in range(ROIS)]
    (folder / "cc200.tsv").write_text("\n".join(["index\tname\tnetwork\tx\ty\tz", *rows]))
    labels = np.arange(1, ROIS + 1, dtype=np.int16)[:, None, None]
    nib.save(nib.Nifti1Image(labels, np.eye(4)), folder / "labels.nii")
    return folder / "cc200.tsv", folder / "labels.nii"


@pytest.fixture
def accounted(atlas: tuple[Path, Path], tmp_path: Path) -> Callable[[Path], set[tuple]]:
    """Prepares a folder; ids of all scans that are in the output or, with a reason, in failures.csv."""

    def run(folder: Path) -> set[tuple]:
        output = tmp_path / "out"
        shutil.rmtree(output, ignore_errors=True)
        preparation = Preparation(tr=None, label_image=atlas[1])
        outcome = prepare(find_scans(folder), output, str(atlas[0]), preparation)
        rows = [row for part in output.rglob("*.parquet") for row in pq.read_table(part).to_pylist()]
        failures = []
        if (output / "failures.csv").exists():
            with open(output / "failures.csv", newline="") as handle:
                failures = list(csv.DictReader(handle))
        assert outcome == Outcome(len(rows), 0, len(failures)) and all(row["reason"].strip() for row in failures)
        return {tuple(row[name] or None for name in IDENTITY) for row in [*rows, *failures]}

    return run


bids_scans = st.dictionaries(
    st.tuples(st.sampled_from(["01", "02", "x3"]), st.sampled_from([None, "a"]), st.sampled_from([None, "1", "2"])),
    st.tuples(
        st.lists(st.sampled_from(SPACES), min_size=1, max_size=3, unique=True),
        st.sampled_from([".nii.gz", ".nii", ".nii.zst"]),
        st.sampled_from(DAMAGES),
        st.sampled_from(SIDECARS),
    ),
    min_size=1,
    max_size=4,
)


@some
@given(scans=bids_scans, brought=st.booleans())
@example(scans={("01", None, None): ([SPACES[1]], ".nii", "none", None)}, brought=True)
@example(scans={("01", None, None): ([""], ".nii", "none", None)}, brought=True)
def test_every_scan_of_a_derivatives_folder_is_prepared_or_named(
    scans: dict, brought: bool, accounted: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "derivatives"
    shutil.rmtree(folder, ignore_errors=True)
    if brought:
        # one that is as it should be: a folder without any is refused whole
        scans = {**scans, ("99", None, None): ([SPACES[0]], ".nii", "none", None)}
    expected = set()
    for (subject, session, run), (spaces, ending, damage, sidecar) in scans.items():
        place = folder / f"sub-{subject}" / (f"ses-{session}" if session else "") / "func"
        place.mkdir(parents=True, exist_ok=True)
        entities = [f"sub-{subject}", f"ses-{session}" if session else "", "task-rest", f"run-{run}" if run else ""]
        for space in spaces:
            stem = "_".join(filter(None, [*entities, space, "bold"]))
            write_volume(place / f"{stem}{ending}", damage)
            if sidecar is not None:
                write_sidecar(place / f"{stem}.json", sidecar)
        expected.add((subject, session, "rest", run))
    try:
        assert accounted(folder) == expected
    except ValueError as error:
        assert not brought and ("in a space like 'MNI*'" in str(error) or "run fMRIPrep first" in str(error))


ENDINGS = (".npy", ".csv", ".tsv", ".1D", ".nii", ".mat", ".h5", "")
files = st.dictionaries(
    st.sampled_from(["s1", "s2", "a.b", "sub-03"]),
    st.tuples(st.sampled_from(ENDINGS), st.sampled_from(DAMAGES), st.sampled_from(SIDECARS)),
    min_size=1,
    max_size=4,
)


@some
@given(scans=files, below=st.booleans())
def test_every_file_of_a_folder_is_prepared_or_named(
    scans: dict, below: bool, accounted: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "scans"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "below").mkdir(parents=True)
    scans = {**scans, "good": (".nii", "none", None)}
    expected = {("below", None, None, None)} if below else set()
    if below:
        np.save(folder / "below" / "s1.npy", signal("none"))
    for name, (ending, damage, sidecar) in scans.items():
        write_series(folder / f"{name}{ending}", damage)
        if sidecar is not None:
            write_sidecar(folder / f"{name}.json", sidecar)
        known = ending not in (".mat", ".h5", "")
        expected.add((name if known else f"{name}{ending}", None, None, None))
    assert accounted(folder) == expected


PHENOTYPES = "Phenotypic_V1_0b_preprocessed1.csv"
# names of PCP files, and by what they are known afterwards
NAMES = {
    "NYU_0050952_rois_cc200.1D": "NYU_0050952",
    "CMU_b_0050646_rois_cc200.1D": "CMU_b_0050646",
    "Lab_1_rois_cc200.1D": "Lab_1",
    "KKI_0050780_func_preproc.nii": "KKI_0050780_func_preproc.nii",
    "notes.txt": "notes.txt",
}


@some
@given(
    names=st.dictionaries(st.sampled_from(list(NAMES)), st.sampled_from(DAMAGES)),
    rows=st.lists(st.sampled_from(["NYU_0050952", "CMU_b_0050646", "no_filename", "Yale_0050551"]), unique=True),
)
def test_every_file_of_a_pcp_folder_is_prepared_or_named(
    names: dict, rows: list[str], accounted: Callable, tmp_path: Path
) -> None:
    root = tmp_path / "ABIDE_pcp"
    shutil.rmtree(root, ignore_errors=True)
    folder = root / "cpac" / "nofilt_noglobal"
    folder.mkdir(parents=True)
    names = {**names, "Pitt_0050003_rois_cc200.1D": "none"}
    for name, damage in names.items():
        write_series(folder / name, damage)
    lines = ["FILE_ID,SITE_ID,SEX,FIQ", "Pitt_0050003,PITT,1,100", *(f"{row},X,2,-9999" for row in rows)]
    (root / PHENOTYPES).write_text("\n".join(lines) + "\n")
    assert accounted(root) == {(NAMES.get(name, "Pitt_0050003"), None, None, None) for name in names}
