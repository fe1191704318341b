import copy
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmrilm.processors import Atlas, atlases


PACKAGED = {"aal2-94": 94, "schaefer-100-7networks": 100, "schaefer-400-7networks": 400, "tian-s3": 50}
HEADER = "index\tname\themisphere\tnetwork\tx\ty\tz\n"


@pytest.mark.parametrize("name, rois", PACKAGED.items())
def test_packaged_atlas_is_complete(name: str, rois: int) -> None:
    atlas = Atlas.load(name)
    assert len(atlas) == len(atlas.rois) == len(atlas.networks) == len(atlas.labels) == rois
    assert atlas.coordinates.shape == (rois, 3) and atlas.coordinates.dtype == np.float32
    assert np.abs(atlas.coordinates).max() < 120
    assert Atlas.from_dict(json.loads(json.dumps(atlas.to_dict()))) == atlas


@pytest.mark.parametrize("name", ["aal", "../tables/aal2-94", ""])
def test_unknown_atlas_tells_what_exists(name: str) -> None:
    with pytest.raises(ValueError, match="packaged: aal2-94, schaefer-100.*from_table"):
        Atlas.load(name)


def test_load_without_tables_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(atlases, "TABLES", tmp_path / "absent")
    with pytest.raises(ValueError, match="packaged: none.*from_table"):
        Atlas.load("aal2-94")


def test_table_gives_labels_and_name(tmp_path) -> None:
    path = tmp_path / "mine.tsv"
    path.write_text(HEADER + "7\tA\tLH\tVis\t-1.5\t2\t3\n9\tB\tRH\tDefault\t1\t2\t3\n")
    atlas = Atlas.from_table(path)
    assert (atlas.name, atlas.rois, atlas.networks, atlas.labels) == ("mine", ("A", "B"), ("Vis", "Default"), (7, 9))
    assert atlas.coordinates[0].tolist() == [-1.5, 2, 3]
    assert Atlas.from_table(path, name="other").name == "other"


@pytest.mark.parametrize(
    "table, message",
    [
        ("", "missing index, name"),
        ("index,name\n", "missing index.*got index,name"),
        (HEADER, "at least one ROI"),
        (HEADER + "1\tA\tLH\tVis\t1\t2\n", "line 2: expected a whole index"),
        (HEADER + "1.5\tA\tLH\tVis\t1\t2\t3\n", "line 2: expected a whole index"),
        (HEADER + "1\tA\tLH\tVis\t1\t2\tnan\n", "finite coordinates in mm, ROI 'A'"),
        (HEADER + "1\tA\tLH\tVis\t1\t2\t3\n2\tA\tLH\tVis\t1\t2\t3\n", "ROI name 'A' stands twice"),
        (HEADER + "1\tA\tLH\tVis\t1\t2\t3\n1\tB\tLH\tVis\t1\t2\t3\n", "label 1 stands twice"),
        (HEADER + "0\tA\tLH\tVis\t1\t2\t3\n", "labels >= 1"),
    ],
)
def test_broken_table_is_refused(tmp_path, table: str, message: str) -> None:
    path = tmp_path / "broken.tsv"
    path.write_text(table)
    with pytest.raises(ValueError, match=message):
        Atlas.from_table(path)


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="expected 2 networks, one per ROI, got 1"):
        Atlas("x", ("A", "B"), ("Vis",), np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"shape \(2, 3\), got \(3, 2\)"):
        Atlas("x", ("A", "B"), ("Vis", "Vis"), np.zeros((3, 2)))


def test_equality_sees_every_part() -> None:
    atlas = Atlas("x", ("A", "B"), ("Vis", "Vis"), np.eye(2, 3))
    values = atlas.to_dict()
    assert atlas == copy.deepcopy(atlas) == pickle.loads(pickle.dumps(atlas))
    assert len({atlas, Atlas.from_dict(values)}) == 1
    changes = {"name": "y", "rois": ["A", "C"], "networks": ["Vis", "Cont"], "labels": [1, 3]}
    for key, value in {**changes, "coordinates": [[1, 0, 0], [0, 1, 0.1]]}.items():
        assert Atlas.from_dict({**values, key: value}) != atlas
    assert Atlas.from_dict({**values, "name": "y"}).checksum == atlas.checksum
    assert atlas != "x"


def test_coordinates_cannot_be_changed() -> None:
    source = np.zeros((1, 3), dtype=np.float32)
    atlas = Atlas("x", ("A",), ("Vis",), source)
    source[0, 0] = 1
    assert atlas.coordinates[0, 0] == 0
    with pytest.raises(ValueError):
        atlas.coordinates[0, 0] = 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-200, 200, width=32), min_size=3, max_size=3))
def test_dict_round_trip_is_exact(point: list[float]) -> None:
    atlas = Atlas("x", ("A",), ("Vis",), np.array([point]))
    again = Atlas.from_dict(json.loads(json.dumps(atlas.to_dict())))
    assert again.coordinates.tobytes() == atlas.coordinates.tobytes() and again == atlas
