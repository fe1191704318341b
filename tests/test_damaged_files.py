"""Files from outside that are damaged, made up or too large: a ValueError that says so, and nothing else."""

import csv
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fmrilm import FmriCodecModel
from fmrilm.processors import Atlas, FmriLMFeatureExtractor, Parcels, read_scan, scan_io_fmrilm
from fmrilm.processors.descriptors.cohort import Cohort
from fmrilm.processors.descriptors.measures import CORE_MEASURES, describe
from fmrilm.training.data.scan_sources import find_scans, read_manifest
from helpers import atlas, labels_in_a_row, slow_series


OUTSIDE = ["../x", "a/../../x", "/etc/x", "..", ".", "", "a\0b", "\0", "a\nb", "..\\x"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(OUTSIDE),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
damages = st.tuples(
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    st.none() | st.floats(0, 1),
)
thorough = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def damage(content: bytes, how: tuple[list[tuple[float, int]], float | None]) -> bytes:
    """Some bytes replaced, and the end cut off."""
    flips, end = how
    data = bytearray(content)
    for position, value in flips:
        data[int(position * len(data))] = value
    return bytes(data if end is None else data[: int(end * len(data))])


def unless_refused(read: Callable, *arguments: Any) -> Any:
    """What is read, or None."""
    try:
        return read(*arguments)
    except ValueError:
        return None


def write_csv(path: Path, rows: list[list[str]], how: tuple = ([], None)) -> None:
    with open(path, "w", newline="", encoding="utf-8", errors="replace") as handle:
        csv.writer(handle).writerows(rows)
    path.write_bytes(damage(path.read_bytes(), how))


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {**values, **{key: value for key, value in changes.items() if key in values}}


@thorough
@given(how=damages)
# a directory that sends the reader to a place before the file's beginning
@example(how=([(0.99609375, 1)], None))
def test_damaged_parcels_are_parcels_or_refused(how: tuple, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    Parcels(np.arange(8).reshape(2, 2, 2), np.eye(4), left=np.arange(5), right=np.arange(5)).save(path)
    path.write_bytes(damage(path.read_bytes(), how))
    try:
        assert Parcels.load(path).checksum
    except ValueError as error:
        assert "a.npz" in str(error)


def test_parcels_that_inflate_beyond_reason_are_refused_unread(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.npz"
    Parcels(np.ones((40, 40, 40), int), np.eye(4)).save(path)
    assert path.stat().st_size < 2000
    monkeypatch.setattr(scan_io_fmrilm, "MAX_ARCHIVE_BYTES", 100_000)
    with pytest.raises(ValueError, match="a.npz: .*at most 100000 bytes, got 256"):
        Parcels.load(path)


def test_python_objects_in_arrays_are_never_opened(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return (tmp_path.joinpath("ran").touch, ())

    np.save(tmp_path / "a.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.write(tmp_path / "a.npy", "volume.npy")
    for read in (read_scan, Parcels.load):
        with pytest.raises(ValueError, match="not a readable"):
            read(tmp_path / ("a.npy" if read is read_scan else "a.npz"))
    assert not (tmp_path / "ran").exists()


CELLS = st.one_of(st.sampled_from(["1", "2", "nan", "inf", "-1", "", "A", "1e999", *OUTSIDE]), st.text(max_size=5))


@thorough
@given(rows=st.lists(st.lists(CELLS, max_size=8), max_size=5), how=damages)
@example(rows=[["1", "A", "LH", "Vis", "0", "0", "0"], ["2", "B"]], how=([], None))
@example(rows=[["9" * 5000, "A", "LH", "Vis", "0", "0", "0"]], how=([], None))
@example(rows=[["1", "A" * 200_000, "LH", "Vis", "0", "0", "0"]], how=([], None))
def test_any_table_is_an_atlas_or_refused(rows: list[list[str]], how: tuple, tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    lines = ["\t".join(("index", "name", "hemisphere", "network", "x", "y", "z")), *map("\t".join, rows)]
    path.write_bytes(damage("\n".join(lines).encode("utf-8", "replace"), how))
    if found := unless_refused(Atlas.from_table, path):
        assert found == Atlas.from_dict(json.loads(json.dumps(found.to_dict())))
        assert None not in found.rois and None not in found.networks and "None" not in found.rois


@thorough
@given(rows=st.lists(st.lists(CELLS, max_size=4), max_size=4), how=damages)
@example(rows=[["1", "A", "Vis"], ["3", "B", "Vis"]], how=([], None))
def test_any_table_of_labels_is_an_atlas_or_refused(rows: list[list[str]], how: tuple, tmp_path: Path) -> None:
    """Without coordinates, which the label image gives."""
    path = tmp_path / "a.csv"
    lines = map(",".join, [["index", "name", "network"], *rows])
    path.write_bytes(damage("\n".join(lines).encode("utf-8", "replace"), how))
    if found := unless_refused(Atlas.from_image, labels_in_a_row(3), path):
        assert np.isfinite(found.coordinates).all() and found.parcels is not None


@thorough
@given(changes=st.dictionaries(st.sampled_from(["name", "rois", "networks", "coordinates", "labels"]), JSON))
@example(changes={"name": 7})
@example(changes={"rois": 7, "networks": None})
@example(changes={"coordinates": {"a": 1}})
@example(changes={"coordinates": [[0, 0, 10**400]] * 3})
@example(changes={"labels": [1, 2, float("inf")]})
def test_any_json_is_an_atlas_or_refused(changes: dict[str, Any], tiny_atlas: Atlas) -> None:
    found = unless_refused(Atlas.from_dict, changed(tiny_atlas.to_dict(), changes))
    assert changes if found is None else len(found) > 0


@pytest.mark.parametrize("name", OUTSIDE)
def test_atlas_names_never_lead_out_of_a_checkpoint(name: str, extractor, tmp_path: Path) -> None:
    extractor.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "preprocessor_config.json"
    values = json.loads(path.read_text())
    values["atlases"][0] |= {"name": name, "parcels_checksum": "0" * 16}
    path.write_text(json.dumps(values))
    Parcels(np.ones((2, 2, 2), int), np.eye(4)).save(tmp_path / "x.npz")
    for load in (lambda: FmriLMFeatureExtractor.from_pretrained(tmp_path / "model"), lambda: Atlas.load(name)):
        with pytest.raises(ValueError, match="an atlas' name is made of|no atlas"):
            load()


@thorough
@given(
    rows=st.lists(st.lists(CELLS | st.sampled_from(["a.npy", "b.npy"]), min_size=5, max_size=5), max_size=5),
    how=damages,
)
@example(rows=[["a.npy", "x" * 200_000, "", "", ""]], how=([], None))
@example(rows=[["a.npy", "\0", "", "", ""]], how=([], None))
def test_any_manifest_is_read_or_refused_and_its_ids_are_plain(rows: list[list[str]], how, tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    write_csv(path, [["path", "subject", "session", "tr", "age"], *rows], how)
    for scan in unless_refused(find_scans, path) or []:
        for value in filter(None, (*scan.ids, scan.site)):
            assert not set("/\\\0\n\r") & set(value) and not value.startswith("."), value


@thorough
@given(rows=st.lists(st.lists(CELLS, min_size=3, max_size=3), max_size=4), how=damages)
@example(rows=[["PITT", "-9999", "1"], ["CMU", "1", "2"]], how=([], None))
def test_any_table_of_phenotypes_is_read_or_refused(rows: list[list[str]], how: tuple, tmp_path: Path) -> None:
    (tmp_path / "Pitt_0050003_rois_cc200.1D").touch()
    path = tmp_path / "Phenotypic_V1_0b_preprocessed1.csv"
    names = ("Pitt_0050003", "no_filename", "no_filename", "Pitt_0050003")
    lines = [[name, *row] for name, row in zip(names, rows, strict=False)]
    write_csv(path, [["FILE_ID", "SITE_ID", "FIQ", "SEX"], *lines], how)
    scans = unless_refused(find_scans, tmp_path)
    if scans is not None:
        assert [scan.path.suffix for scan in scans] == [".1D"]
        assert not {str(value) for value in scans[0].labels.values()} & {"-9999", ""}


# an empty cell says that there is none
@pytest.mark.parametrize("text", [text for text in OUTSIDE if text])
@pytest.mark.parametrize("column", ["subject", "session", "task", "run", "site"])
def test_ids_that_could_be_paths_are_refused(column: str, text: str, tmp_path: Path) -> None:
    cells = {"path": "a.npy", "subject": "s1", column: text}
    write_csv(tmp_path / "m.csv", [list(cells), list(cells.values())])
    with pytest.raises(ValueError):
        find_scans(tmp_path / "m.csv")


@pytest.fixture(scope="module")
def cohort_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    descriptors = describe(slow_series(0, 40, 9, batch=(12,)), atlas(), CORE_MEASURES)
    cohort = Cohort.fit("tests", CORE_MEASURES, descriptors, 3, [atlas()])
    folder = tmp_path_factory.mktemp("cohort")
    cohort.save(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@thorough
@given(which=st.booleans(), how=damages)
def test_damaged_cohort_is_a_cohort_or_refused(cohort_files: dict, which: bool, how: tuple, tmp_path: Path) -> None:
    for number, (name, content) in enumerate(sorted(cohort_files.items())):
        (tmp_path / name).write_bytes(damage(content, how) if number == which else content)
    found = unless_refused(Cohort.load, tmp_path)
    assert found is None or found.names


@pytest.mark.parametrize(
    "read",
    [
        lambda folder: read_scan(folder / "a.csv"),
        lambda folder: read_manifest(folder / "a.csv"),
        lambda folder: Atlas.from_table(folder / "a.csv"),
        lambda folder: Cohort.load(folder),
    ],
    ids=["scan", "manifest", "atlas", "cohort"],
)
def test_text_beyond_reason_is_refused_unread(read: Callable, tmp_path: Path, monkeypatch) -> None:
    for name in ("a.csv", "cohort.json"):
        with open(tmp_path / name, "wb") as handle:
            handle.truncate(scan_io_fmrilm.MAX_TEXT_BYTES + 1)
    for name in ("reader", "DictReader"):
        monkeypatch.setattr(csv, name, None)
    with pytest.raises(ValueError, match=r"expected a text file of at most 268435456 bytes, got 268435457"):
        read(tmp_path)


@pytest.mark.parametrize("changes", [{"hidden_size": 2**20}, {"codebook_size": 2**40}, {"num_basis_functions": 2**20}])
def test_configuration_larger_than_its_weights_allocates_nothing(changes: dict, tiny_codec, tmp_path: Path) -> None:
    tiny_codec.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(changed(json.loads(path.read_text()), changes)))
    # terabytes: an attempt to allocate them would fail otherwise
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        FmriCodecModel.from_pretrained(tmp_path)
