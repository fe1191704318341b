"""
Random folders made from a grammar of real ones: every scan in them is in the output or in failures.csv.

Of most folders it is only looked at which scans are found, of some also what `prepare` writes. With
`FMRILM_ALL_FOLDERS=1` there are 1,000, all prepared.
"""

import csv
import json
import os
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
from helpers import atlas, in_a_row, labels_in_a_row, write_table


ROIS, FRAMES = 5, 20
IDENTITY = IDS[:4]
ALL = "FMRILM_ALL_FOLDERS" in os.environ
unchecked = [HealthCheck.function_scoped_fixture]
some = settings(max_examples=340 if ALL else 100, deadline=None, suppress_health_check=unchecked)
prepared = st.just(True) if ALL else st.sampled_from([False] * 24 + [True])
# what may be wrong with a file of a scan
DAMAGES = ("none", "none", "none", "cut", "empty", "short", "dead", "all dead")
SPACES = (
    "space-MNI152NLin6Asym_desc-preproc", "space-T1w_desc-preproc", "desc-preproc", "desc-smoothed", "",
    "hemi-L_space-fsaverage5", "hemi-R_space-fsaverage5",
)  # fmt: skip
# beside the scans of a derivatives folder, named after them
COMPANIONS = ("desc-confounds_timeseries.tsv", "desc-brain_mask.nii.gz", "boldref.nii.gz", "bold.json", "bold.svg")
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
    nib.save(in_a_row(signal(damage)), path.with_name("volume.nii"))
    path.with_name("volume.nii").rename(path)
    spoil(path, damage)


def write_series(path: Path, damage: str) -> None:
    match path.suffix.lower():
        case ".npy":
            # to an open file, because numpy adds an ending to a path
            with open(path, "wb") as handle:
                np.save(handle, signal(damage))
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
def parcellation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Table and label image of five voxels in a row."""
    folder = tmp_path_factory.mktemp("atlas")
    nib.save(labels_in_a_row(ROIS), folder / "labels.nii")
    return write_table(folder / "cc200.tsv", atlas("cc200", ROIS)), folder / "labels.nii"


@pytest.fixture
def accounted(parcellation: tuple[Path, Path], tmp_path: Path) -> Callable[[Path], set[tuple]]:
    """
    Ids of all scans that are found in a folder; or, where it is prepared, that are in the output or, with a reason, in
    failures.csv.
    """

    def run(folder: Path, prepared: bool) -> set[tuple]:
        if not prepared:
            found = find_scans(folder)
            assert all(scan.path.exists() for scan in found)
            return {scan.ids for scan in found}
        output = tmp_path / "out"
        shutil.rmtree(output, ignore_errors=True)
        preparation = Preparation(tr=None, label_image=parcellation[1])
        outcome = prepare(find_scans(folder), output, str(parcellation[0]), preparation)
        rows = [row for part in output.rglob("*.parquet") for row in pq.read_table(part).to_pylist()]
        failures = []
        if (output / "failures.csv").exists():
            with open(output / "failures.csv", newline="") as handle:
                failures = list(csv.DictReader(handle))
        assert outcome == Outcome(len(rows), 0, len(failures)) and all(row["reason"].strip() for row in failures)
        return {tuple(row[name] or None for name in IDENTITY) for row in [*rows, *failures]}

    return run


bids_scans = st.dictionaries(
    st.tuples(
        st.sampled_from(["01", "02", "x3"]),
        st.sampled_from([None, "a"]),
        st.sampled_from([None, "1", "2"]),
        st.sampled_from([None, None, "acq-a", "echo-2", "part-mag"]),
    ),
    st.tuples(
        st.lists(st.sampled_from(SPACES), min_size=1, max_size=4, unique=True),
        st.sampled_from([".nii.gz", ".nii", ".nii.zst"]),
        st.sampled_from(DAMAGES),
        st.sampled_from(SIDECARS),
        st.lists(st.sampled_from(COMPANIONS), max_size=2, unique=True),
    ),
    min_size=1,
    max_size=6,
)


@some
@given(scans=bids_scans, brought=st.booleans(), prepared=prepared)
@example(scans={("01", None, None, None): ([SPACES[1]], ".nii", "none", None, [])}, brought=True, prepared=True)
@example(scans={("01", None, None, None): ([""], ".nii", "none", None, [])}, brought=True, prepared=True)
def test_every_scan_of_a_derivatives_folder_is_prepared_or_named(
    scans: dict, brought: bool, prepared: bool, accounted: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "derivatives"
    shutil.rmtree(folder, ignore_errors=True)
    if brought:
        # one that is as it should be: a folder without any is refused whole
        scans = {**scans, ("99", None, None, None): ([SPACES[0]], ".nii", "none", None, [])}
    expected = set()
    for (subject, session, run, other), (spaces, ending, damage, sidecar, companions) in scans.items():
        place = folder / f"sub-{subject}" / (f"ses-{session}" if session else "") / "func"
        place.mkdir(parents=True, exist_ok=True)
        entities = [f"sub-{subject}", session and f"ses-{session}", "task-rest", other, run and f"run-{run}"]
        for space in spaces:
            stem = "_".join(filter(None, [*entities, space, "bold"]))
            path = place / f"{stem}{'.func.gii' if 'hemi' in space else ending}"
            write_volume(path, damage) if prepared else path.touch()
            if sidecar is not None:
                write_sidecar(place / f"{stem}.json", sidecar)
        for companion in companions:
            (place / "_".join([*filter(None, entities), companion])).touch()
        expected.add((subject, session, "rest", "_".join(filter(None, entities[3:])) if other else run))
    try:
        assert accounted(folder, prepared) == expected
    except ValueError as error:
        assert not brought and ("in a space like 'MNI*'" in str(error) or "run fMRIPrep first" in str(error))


ENDINGS = (".npy", ".csv", ".tsv", ".1D", ".nii", ".NPY", ".mat", ".h5", "")
files = st.dictionaries(
    st.sampled_from(["s1", "s2", "a.b", "sub-03", "a b", "é", "S1 (copy)", "participants"]),
    st.tuples(st.sampled_from(ENDINGS), st.sampled_from(DAMAGES), st.sampled_from(SIDECARS)),
    min_size=1,
    max_size=8,
)


@some
@given(scans=files, below=st.booleans(), prepared=prepared)
def test_every_file_of_a_folder_is_prepared_or_named(
    scans: dict, below: bool, prepared: bool, accounted: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "scans"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "below").mkdir(parents=True)
    scans = {**scans, "good": (".nii", "none", None)}
    expected = {("below", None, None, None)} if below else set()
    if below:
        np.save(folder / "below" / "s1.npy", signal("none"))
    for name, (ending, damage, sidecar) in scans.items():
        path = folder / f"{name}{ending}"
        write_series(path, damage) if prepared else path.touch()
        if sidecar is not None:
            write_sidecar(folder / f"{name}.json", sidecar)
        known = ending not in (".mat", ".h5", "")
        # a name of BIDS
        expected.add((name.removeprefix("sub-") if known else f"{name}{ending}", None, None, None))
    assert accounted(folder, prepared) == expected


PHENOTYPES = "Phenotypic_V1_0b_preprocessed1.csv"
# names of PCP files, and by what they are known afterwards
NAMES = {
    "NYU_0050952_rois_cc200.1D": "NYU_0050952",
    "CMU_b_0050646_rois_cc200.1D": "CMU_b_0050646",
    "Stanford_0051160_rois_cc200.1D": "Stanford_0051160",
    # beside a series that is always there
    "Pitt_0050003_func_preproc.nii.gz": "Pitt_0050003",
    "Lab_1_rois_cc200.1D": "Lab_1",
    "KKI_0050780_func_preproc.nii": "KKI_0050780_func_preproc.nii",
    "UCLA_2_0051292_rois_cc200.npy": "UCLA_2_0051292_rois_cc200.npy",
    "notes.txt": "notes.txt",
}


@some
@given(
    names=st.dictionaries(st.sampled_from(list(NAMES)), st.sampled_from(DAMAGES)),
    rows=st.lists(st.sampled_from(["NYU_0050952", "CMU_b_0050646", "no_filename", "Yale_0050551"]), unique=True),
    prepared=prepared,
)
def test_every_file_of_a_pcp_folder_is_prepared_or_named(
    names: dict, rows: list[str], prepared: bool, accounted: Callable, tmp_path: Path
) -> None:
    root = tmp_path / "ABIDE_pcp"
    shutil.rmtree(root, ignore_errors=True)
    folder = root / "cpac" / "nofilt_noglobal"
    folder.mkdir(parents=True)
    names = {**names, "Pitt_0050003_rois_cc200.1D": "none"}
    for name, damage in names.items():
        write_series(folder / name, damage) if prepared else (folder / name).touch()
    lines = ["FILE_ID,SITE_ID,SEX,FIQ", "Pitt_0050003,PITT,1,100", *(f"{row},X,2,-9999" for row in rows)]
    (root / PHENOTYPES).write_text("\n".join(lines) + "\n")
    assert accounted(root, prepared) == {(NAMES.get(name, "Pitt_0050003"), None, None, None) for name in names}
