"""Manifests, derivatives folders, folders of files, and the labels that are joined to their scans."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmrilm.training.data.scan_sources import ScanSource, find_scans, parse_bids_name


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


MANIFEST = """\
path,subject,session,tr,site,atlas,confounds,age,sex,code,score
a.npy,01,,0.72,A,aal2-94,,30,f,007,1.5
b/c.npy,02,,,,,b/c.tsv,,m,010,2
/d.npy,3,,2,B,,,41,n/a,100,-1e3
"""


def test_manifest_is_read_as_it_is_written(tmp_path) -> None:
    first, second, third = find_scans(write(tmp_path / "m.csv", MANIFEST))
    assert first == ScanSource(
        tmp_path / "a.npy", "01", tr=0.72, site="A", atlas="aal2-94",
        labels={"age": 30, "sex": "f", "code": "007", "score": 1.5},
    )  # fmt: skip
    assert second.path == tmp_path / "b" / "c.npy" and second.confounds == tmp_path / "b" / "c.tsv"
    assert second.tr is None and second.labels == {"age": None, "sex": "m", "code": "010", "score": 2.0}
    assert third.path == Path("/d.npy") and third.labels["sex"] is None and third.labels["score"] == -1000.0
    tabs = write(tmp_path / "m.tsv", MANIFEST.replace(",", "\t"))
    assert find_scans(tabs) == [first, second, third]


def test_paths_start_at_the_manifest_and_hold_in_other_processes(tmp_path, monkeypatch) -> None:
    write(tmp_path / "study" / "m.csv", "path,subject,atlas\na.npy,1,net.tsv\nb.npy,2,cc200\n")
    monkeypatch.chdir(tmp_path)
    first, second = find_scans(Path("study/m.csv"))
    assert first.path == tmp_path / "study" / "a.npy" and first.atlas == str(tmp_path / "study" / "net.tsv")
    assert second.atlas == "cc200"


@pytest.mark.parametrize(
    "text, message",
    [
        ("path,age\na.npy,3\n", "expected columns path and subject, got path, age: no subject"),
        ("path,subject\n", "at least one row, got 1 lines"),
        ("path,subject\na.npy\n", "line 2: expected 2 cells, got 1"),
        ("path,subject\n,01\n", "line 2: expected a path and a subject, got '' and '01'"),
        ("path,subject\na.npy,NA\n", "line 2: expected a path and a subject, got 'a.npy' and 'NA'"),
        ("path,subject,age,age\na,b,1,2\n", "different names of columns"),
        ("path,subject,tr\na.npy,01,2s\n", "line 2: expected tr in seconds, got '2s'"),
        ("path,subject,signal\na.npy,01,2\n", "cannot be named 'signal'"),
        ("path,subject\na.npy,01\nb.npy,01\n", "two scans of subject '01', session None"),
        ("path,subject,run\na.npy,01,1\nb.npy,01,1\n", "run 1: expected one"),
        ("path,subject,atlas,age\na,1,x,3\nb,1,y,4\n", "label 'age' differs between rows of subject '1': 3 and 4"),
        ("path,subject,session,run,atlas,age\na,1,x,1,p,3\nb,1,x,1,q,4\n", "'1', session 'x', run '1': 3 and 4"),
        ("path,subject\na.npy,../x\n", "expected a subject without slashes.*'../x'"),
        ("path,subject,session\na.npy,1,..\n", "expected a session without"),
        ("path,subject,site\na.npy,1,a/b\n", "expected a site without"),
        ('path,subject\na.npy,"a\nb"\n', "line breaks"),
    ],
)
def test_unfit_manifest_is_refused(text: str, message: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        find_scans(write(tmp_path / "m.csv", text))


def test_labels_may_differ_between_sessions_and_runs_and_scans_between_atlases(tmp_path) -> None:
    text = "path,subject,session,atlas,age\na.npy,1,x,p,30\nb.npy,1,y,p,31\nc.npy,1,y,q,31\n"
    assert [scan.labels["age"] for scan in find_scans(write(tmp_path / "m.csv", text))] == [30, 31, 31]
    text = "path,subject,run,condition\na.npy,1,1,rest\nb.npy,1,2,movie\n"
    assert [scan.labels["condition"] for scan in find_scans(write(tmp_path / "m.csv", text))] == ["rest", "movie"]


def test_missing_source_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="nothing at"):
        find_scans(tmp_path / "none")
    with pytest.raises(ValueError, match="no scans in"):
        find_scans(tmp_path)


# --- folders


def test_names_of_files_in_a_folder_are_subjects(tmp_path) -> None:
    names = ("b.npy", "a.nii.gz", "c.ptseries.nii", "d.1D", "e.lh.mgz", "e.rh.mgz")
    for name in (*names, ".hidden.npy", "notes.txt", "a.json", "README.md"):
        write(tmp_path / name)
    write(tmp_path / "deeper" / "d.npy")
    scans = find_scans(tmp_path)
    assert [(scan.path.name, scan.subject) for scan in scans if scan.problem is None] == [
        ("a.nii.gz", "a"), ("b.npy", "b"), ("c.ptseries.nii", "c"), ("d.1D", "d"), ("e.lh.mgz", "e.lh"),
    ]  # fmt: skip
    deeper, unknown = [scan for scan in scans if scan.problem is not None]
    assert (
        deeper.subject == "deeper"
        and unknown.subject == "notes.txt"
        and unknown.problem.startswith("unknown ending .txt: expected .nii.gz, ")
    )


BIDS_NAMES = {
    "sub-01_ses-a_task-rest_run-1.npy": ("01", "a", "rest", "1"),
    "sub-01_ses-a_task-rest_run-2.npy": ("01", "a", "rest", "2"),
    "sub-02_ses-a_task-rest.npy": ("02", "a", "rest", None),
    "sub-03.npy": ("03", None, None, None),
}
SERIES = "space-MNI_seg-Schaefer100_stat-mean_timeseries"


def ids_in(folder: Path, names: dict[str, tuple]) -> list[tuple]:
    for name in names:
        write(folder / name)
    found = {scan.path.name: scan.ids for scan in find_scans(folder)}
    return [found[name] for name in names]


def test_bids_names_in_a_folder_say_subject_session_task_and_run(tmp_path) -> None:
    """Two runs of one subject as two subjects would be held out apart."""
    assert ids_in(tmp_path, BIDS_NAMES) == list(BIDS_NAMES.values())


@pytest.mark.parametrize(
    "names",
    [
        # what all names share tells nothing apart
        {f"sub-01_{SERIES}.tsv": ("01", None, None, None), f"sub-02_{SERIES}.tsv": ("02", None, None, None)},
        {"sub-01_acq-AP_run-1.npy": ("01", None, None, "acq-AP_run-1"), "sub-01.npy": ("01", None, None, None)},
        {"sub-01_rest.npy": ("01", None, None, "suffix-rest"), "sub-01_movie.npy": ("01", None, None, "suffix-movie")},
        # no labels of BIDS: not one subject NYU
        {"sub-NYU_001.npy": ("sub-NYU_001", None, None, None), "sub-NYU_002.npy": ("sub-NYU_002", None, None, None)},
    ],
)
def test_what_differs_between_bids_names_tells_runs_apart(names: dict[str, tuple], tmp_path) -> None:
    assert ids_in(tmp_path, names) == list(names.values())


def test_names_that_are_taken_for_subjects_although_they_look_like_bids_are_warned_of(tmp_path, caplog) -> None:
    ids_in(tmp_path, {"sub-01_run1.npy": (), "sub-01_run2.npy": ()})
    assert "2 names, the first one 'sub-01_run1', are not of BIDS" in caplog.text


def test_tables_of_series_in_the_folders_of_subjects_are_found(tmp_path) -> None:
    for name in (f"sub-01_ses-a_{SERIES}.tsv", f"sub-02_ses-a_{SERIES}.tsv", "sub-01_desc-confounds_timeseries.tsv"):
        write(tmp_path / name[:6] / "func" / name)
    write(tmp_path / "sub-01" / "anat" / "sub-01_T1w.nii.gz")
    expected = [("01", "a", None, None), ("02", "a", None, None)]
    assert [scan.ids for scan in find_scans(tmp_path)] == expected
    # what XCP-D writes beside them
    for suffix in ("space-MNI152NLin6Asym_desc-denoised_bold.nii.gz", "seg-Gordon_stat-coverage_bold.tsv"):
        write(tmp_path / "sub-01" / "func" / f"sub-01_ses-a_{suffix}")
    assert [scan.ids for scan in find_scans(tmp_path)] == expected


PHENOTYPES = """\
,Unnamed: 0,SUB_ID,X,subject,SITE_ID,FILE_ID,DX_GROUP,AGE_AT_SCAN,SEX,FIQ,qc_notes_rater_2
1,1,50002,1,50002,PITT,no_filename,1,16.77,1,103,
2,2,50003,2,50003,PITT,Pitt_0050003,1,24.45,1,-9999,"left, low"
3,3,50646,3,50646,CMU,CMU_b_0050646,2,19.09,2,124,
"""


def test_folder_that_fetch_abide_pcp_leaves_is_a_source(tmp_path) -> None:
    folder = tmp_path / "ABIDE_pcp"
    for name in ("Pitt_0050003_rois_cc200.1D", "CMU_b_0050646_rois_cc200.1D", "Lab_0000001_rois_cc200.1D"):
        write(folder / "cpac" / "nofilt_noglobal" / name)
    labels = write(folder / "Phenotypic_V1_0b_preprocessed1.csv", PHENOTYPES)
    scans = find_scans(folder)
    assert scans == find_scans(folder, labels) == find_scans(folder / "cpac" / "nofilt_noglobal", labels)
    assert [(scan.subject, scan.site, scan.tr, scan.atlas) for scan in scans] == [
        ("CMU_b_0050646", "CMU", 1.5, "cc200"), ("Lab_0000001", None, None, "cc200"),
        ("Pitt_0050003", "PITT", 1.5, "cc200"),
    ]  # fmt: skip
    assert scans[0].labels == {"DX_GROUP": 2, "AGE_AT_SCAN": 19.09, "SEX": 2, "FIQ": 124}
    assert scans[2].labels == {"DX_GROUP": 1, "AGE_AT_SCAN": 24.45, "SEX": 1, "FIQ": None}
    assert find_scans(folder / "cpac")[0].labels == {}
    other = write(folder / "cpac" / "nofilt_noglobal" / "Pitt_0050003_rois_aal.1D")
    assert len(find_scans(folder)) == 4 and find_scans(folder, atlas="cc200") == scans
    assert [scan.path for scan in find_scans(folder, atlas="aal")] == [other]
    write(folder / "cpac" / "filt_global" / "Pitt_0050003_rois_cc200.1D")
    with pytest.raises(ValueError, match="'Pitt_0050003' has series in cpac/filt_global and cpac/nofilt_noglobal"):
        find_scans(folder)


@given(
    st.dictionaries(
        st.text("abcdxyz", min_size=2, max_size=5).filter(lambda key: key != "sub"),
        st.text("abAB019", min_size=1, max_size=5),
        max_size=5,
    ),
    st.sampled_from([".nii.gz", ".dtseries.nii", ".nii"]),
)
def test_bids_names_are_taken_apart(entities: dict[str, str], extension: str) -> None:
    name = "_".join(["sub-01", *(f"{key}-{value}" for key, value in entities.items()), "bold"]) + extension
    assert parse_bids_name(name) == {"sub": "01", **entities, "suffix": "bold", "extension": extension}


@pytest.mark.parametrize(
    "name", ["bold.nii", "sub-01.nii", "sub-_bold.nii", "sub-01_bold", "sub-01_run-1_run-2_bold.nii", "ses-1_bold.nii"]
)
def test_other_names_are_not_bids(name: str) -> None:
    assert parse_bids_name(name) is None


def derivative(folder: Path, name: str) -> Path:
    subject, *rest = name.split("_")
    session = [part for part in rest if part.startswith("ses-")]
    return write(folder / Path(subject, *session, "func", name))


NAMES = (
    "sub-01_ses-a_task-rest_run-1_space-MNI152NLin2009cAsym_res-2_desc-preproc_bold.nii.gz",
    "sub-01_ses-a_task-rest_run-2_space-MNI152NLin2009cAsym_res-2_desc-preproc_bold.nii.gz",
    "sub-01_ses-b_task-rest_acq-AP_space-MNI152NLin2009cAsym_res-2_desc-preproc_bold.nii.gz",
    "sub-01_ses-b_task-rest_acq-AP_run-2_space-MNI152NLin2009cAsym_res-2_desc-preproc_bold.nii.gz",
    "sub-02_task-rest_space-MNI152NLin2009cAsym_res-2_desc-preproc_bold.nii.gz",
)
OTHERS = (
    "sub-02_task-rest_space-T1w_desc-preproc_bold.nii.gz",
    "sub-02_task-rest_desc-preproc_bold.nii.gz",
    "sub-02_task-rest_space-MNI152NLin2009cAsym_res-2_desc-brain_mask.nii.gz",
    "sub-02_task-rest_space-MNI152NLin2009cAsym_res-2_boldref.nii.gz",
    "sub-02_task-rest_space-MNI152NLin2009cAsym_res-2_desc-preproc_bold.json",
    "sub-02_task-rest_desc-confounds_timeseries.tsv",
    "sub-02_task-rest_bold.nii.gz",
    "sub-02__desc-preproc_bold.nii.gz",
    "sub-02_task-rest_space-MNI152NLin2009cAsym_res-2_desc-preproc_bold.nii.gz.part",
    "sub-02_task-rest_space-fsLR_den-91k_bold.dtseries.nii",
)


def test_derivatives_in_template_space_are_found(tmp_path) -> None:
    for name in (*NAMES, *OTHERS):
        derivative(tmp_path, name)
    *scans, nameless = find_scans(tmp_path)
    assert [scan.path.name for scan in scans] == sorted(NAMES)
    assert nameless.path.name == OTHERS[7] and nameless.problem.startswith("expected a name of BIDS")
    assert sorted(scan.ids for scan in scans if scan.session) == [
        ("01", "a", "rest", "1"),
        ("01", "a", "rest", "2"),
        ("01", "b", "rest", "acq-AP"),
        ("01", "b", "rest", "acq-AP_run-2"),
    ]
    assert scans[-1].ids == ("02", None, "rest", None)
    surfaces = {scan.path.name: scan.problem for scan in find_scans(tmp_path, space="fsLR")}
    assert surfaces.pop(OTHERS[-1]) is None and OTHERS[7] in surfaces
    del surfaces[OTHERS[7]]
    assert surfaces == dict.fromkeys(
        NAMES[:4], "no scan in a space like fsLR, of the known endings; there is: MNI152NLin2009cAsym_res-2"
    )


def test_scan_of_another_space_or_an_unknown_ending_is_named(tmp_path) -> None:
    others = (
        "sub-03_task-rest_space-T1w_desc-preproc_bold.nii.gz",
        "sub-04_task-rest_space-MNI152NLin2009cAsym_desc-preproc_bold.nii.zst",
    )
    for name in (NAMES[4], *others):
        derivative(tmp_path, name)
    problems = {scan.subject: scan.problem for scan in find_scans(tmp_path)}
    assert problems["02"] is None
    assert problems["03"].endswith("there is: T1w") and "a file that ends in .nii.zst" in problems["04"]


def test_two_files_of_one_scan_are_never_one_taken_for_the_other(tmp_path) -> None:
    for part in ("mag", "phase"):
        derivative(tmp_path, f"sub-02_task-rest_part-{part}_space-MNI152NLin2009cAsym_desc-preproc_bold.nii.gz")
    assert [scan.run for scan in find_scans(tmp_path)] == ["part-mag", "part-phase"]
    derivative(tmp_path, "sub-02_task-rest_part-mag_space-MNI152NLin2009cAsym_desc-preproc_bold.nii")
    with pytest.raises(ValueError, match=r"one scan in 2 spaces or resolutions: .*part-mag.*_bold\.nii\.gz"):
        find_scans(tmp_path)


def test_scan_that_was_not_preprocessed_is_named(tmp_path) -> None:
    derivative(tmp_path, "sub-05_task-rest_bold.nii.gz")
    derivative(tmp_path / "derivatives", NAMES[4])
    derivative(tmp_path / "derivatives", "sub-02_task-rest_desc-smoothed_bold.nii.gz")
    derivative(tmp_path / "derivatives", "sub-06_task-rest_desc-smoothed_bold.nii.gz")
    problems = {scan.subject: scan.problem for scan in find_scans(tmp_path)}
    assert problems.keys() == {"02", "05", "06"} and problems["02"] is None
    assert problems["05"].endswith("there is: the raw scan") and problems["06"].endswith("there is: desc-smoothed")


def test_surfaces_of_fmriprep_are_found(tmp_path) -> None:
    for mark in "LR":
        derivative(tmp_path, f"sub-02_task-rest_hemi-{mark}_space-fsaverage_bold.func.gii")
    [scan] = find_scans(tmp_path, space="fsaverage")
    assert scan.problem is None and scan.ids == ("02", None, "rest", None)


def test_raw_bids_needs_fmriprep(tmp_path) -> None:
    derivative(tmp_path, "sub-02_task-rest_bold.nii.gz")
    write(tmp_path / "participants.tsv", "participant_id\tage\nsub-02\t30\n")
    with pytest.raises(ValueError, match="is raw BIDS, run fMRIPrep first: expected desc-preproc_bold files"):
        find_scans(tmp_path)
    # its derivatives are beside it
    derivative(tmp_path / "derivatives" / "fmriprep", NAMES[4])
    assert [scan.path.name for scan in find_scans(tmp_path)] == [NAMES[4]]


def test_space_must_be_there_and_be_one(tmp_path) -> None:
    derivative(tmp_path, OTHERS[0])
    with pytest.raises(ValueError, match="no preprocessed scan in a space like 'MNI.*spaces found: T1w"):
        find_scans(tmp_path)
    for name in (NAMES[4], NAMES[4].replace("2009c", "6")):
        derivative(tmp_path, name)
    with pytest.raises(ValueError, match="one scan in 2 spaces.*MNI152NLin2009cAsym_res-2, MNI152NLin6Asym_res-2"):
        find_scans(tmp_path)
    assert len(find_scans(tmp_path, space="MNI152NLin6Asym")) == 1


# --- labels


def three(folder: Path) -> Path:
    return write(folder / "m.csv", "path,subject,session\na.npy,sub-1,x\nb.npy,1,y\nc.npy,2,x\n")


def test_labels_are_joined_by_subject(tmp_path) -> None:
    labels = write(tmp_path / "participants.tsv", "participant_id\tage\tsite\nsub-1\t30\tA\nsub-9\t50\tB\n")
    scans = find_scans(three(tmp_path), labels)
    assert [(scan.labels, scan.site) for scan in scans] == [({"age": 30}, "A")] * 2 + [({"age": None}, None)]


def test_labels_are_joined_by_session(tmp_path) -> None:
    labels = write(tmp_path / "l.csv", "subject,session_id,age\n1,ses-x,30\n1,y,31\n2,y,50\n")
    assert [scan.labels["age"] for scan in find_scans(three(tmp_path), labels)] == [30, 31, None]
    without = write(tmp_path / "m.csv", "path,subject,session\na.npy,1,n/a\n")
    labels = write(tmp_path / "l.csv", "subject;session;age\n1;n/a;20\n")
    assert [scan.labels["age"] for scan in find_scans(without, labels)] == [20]


def test_part_of_the_table_of_phenotypes_keeps_all_columns(tmp_path) -> None:
    labels = write(tmp_path / "l.csv", "FILE_ID,SITE_ID,DX_GROUP,chronotype\n1,NYU,2,-9999\n2,NYU,1,late\n")
    (first, *_, last) = find_scans(three(tmp_path), labels)
    assert first.labels == {"DX_GROUP": 2, "chronotype": None} and first.site == "NYU"
    assert last.labels == {"DX_GROUP": 1, "chronotype": "late"}
    labels = write(tmp_path / "other.csv", "FILE_ID,mood\n1,good\n2,bad\n")
    assert [scan.labels for scan in find_scans(three(tmp_path), labels)][0] == {"mood": "good"}


@pytest.mark.parametrize(
    "text, message",
    [
        ("name,age\n1,30\n", "expected a column subject, participant_id or FILE_ID, got name, age"),
        ("subject,age\n1,30\n1,31\n", "label 'age' differs between rows of subject '1': 30 and 31"),
        ("subject,path\n1,30\n", "cannot be named 'path'"),
        ("subject,dataset\n1,30\n", "cannot be named 'dataset'"),
        ("subject,age\nA,30\n", "none of its subjects has a scan; it starts with 'A'; of the scans, .*'sub-1'$"),
        ("subject,age\n01,30\n", "none of its subjects has a scan; .*differ in leading zeros"),
        ("subject,session,age\n1,z,30\n", "none of its subjects has a scan; .*session x: labels are by session"),
        ("subject,site\n1,../x\n", "expected a site without slashes"),
    ],
)
def test_unfit_labels_are_refused(text: str, message: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        find_scans(three(tmp_path), write(tmp_path / "l.csv", text))


def test_scans_without_a_row_of_labels_are_warned_of(tmp_path, caplog) -> None:
    find_scans(three(tmp_path), write(tmp_path / "partly.csv", "subject,age\n1,30\n02,40\n"))
    assert "partly.csv has no row for 1 of 3 scans" in caplog.text and "leading zeros" in caplog.text


TABLE = "subject,sex,score\n1,f,1.5\n2,NA,NaN\n"


@pytest.mark.parametrize(
    "text",
    [
        TABLE.replace(".", "@").replace(",", ";").replace("@", ","),
        TABLE.replace(",", "\t"),
        TABLE.replace(",", " , ").replace("subject", "Subject"),
        TABLE.replace("subject", "subject_id").replace("\n", ",\n"),
        TABLE.replace("subject", "Participant_ID").replace("NaN", "n/a") + "\n , ,\n",
    ],
)
def test_tables_as_spreadsheets_and_r_write_them_are_read_alike(text: str, tmp_path) -> None:
    scans = find_scans(three(tmp_path), write(tmp_path / "l.csv", text))
    assert [scan.labels for scan in scans] == [{"sex": "f", "score": 1.5}] * 2 + [{"sex": None, "score": None}]


def test_table_of_another_encoding_is_refused(tmp_path) -> None:
    (tmp_path / "l.csv").write_text("subject,sex\n1,männlich\n", encoding="latin-1")
    with pytest.raises(ValueError, match="save it as UTF-8"):
        find_scans(three(tmp_path), tmp_path / "l.csv")


def test_missing_table_of_labels_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="no table at .*none.csv"):
        find_scans(three(tmp_path), tmp_path / "none.csv")


def test_labels_of_manifest_and_table_must_not_clash(tmp_path) -> None:
    manifest = write(tmp_path / "m.csv", "path,subject,age\na.npy,1,3\n")
    with pytest.raises(ValueError, match="the labels age stand in the manifest, too"):
        find_scans(manifest, write(tmp_path / "l.csv", "subject,age\n1,4\n"))
