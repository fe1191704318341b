import json

import numpy as np
import pytest

from fmrilm.processors import Atlas
from fmrilm.processors.descriptors.cohort import LEVELS, Cohort
from fmrilm.processors.descriptors.gradients import fit_references
from fmrilm.processors.descriptors.measures import CORE_MEASURES, CORE_NAMES, MEASURES, describe, descriptor_names
from helpers import labelled_atlas, slow_series


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return labelled_atlas()


@pytest.fixture(scope="module")
def descriptors(atlas: Atlas) -> np.ndarray:
    return describe(slow_series(0, 40, len(atlas), batch=(30,)), atlas, CORE_MEASURES)


def fit(descriptors: np.ndarray, subjects: int = 3, atlases=()) -> Cohort:
    return Cohort.fit("tests", CORE_MEASURES, descriptors, subjects, atlases)


def contents(cohort: Cohort) -> tuple:
    arrays = (cohort.mean, cohort.std, cohort.quantiles, *cohort.references.values())
    return (
        (cohort.name, cohort.names, cohort.subjects, cohort.windows, cohort.atlases, list(cohort.references)),
        [(array.dtype, array.shape, array.tobytes()) for array in arrays],
    )


def test_levels_are_thirds_of_the_training_windows(descriptors: np.ndarray) -> None:
    levels = fit(descriptors).levels(descriptors)
    present = ~np.isnan(descriptors[0])
    for level in range(len(LEVELS)):
        assert ((levels == level).sum(0)[present] == 10).all()
    assert (levels[:, ~present] == -1).all()
    lowest, highest = descriptors[:, present].argmin(0), descriptors[:, present].argmax(0)
    assert (levels[:, present][lowest, range(present.sum())] == LEVELS.index("low")).all()
    assert (levels[:, present][highest, range(present.sum())] == LEVELS.index("high")).all()


def test_z_scores_have_the_cohorts_moments_and_an_inverse(descriptors: np.ndarray) -> None:
    present = ~np.isnan(descriptors[0])
    cohort = fit(descriptors)
    scores = cohort.z_scores(descriptors)
    np.testing.assert_allclose(scores[:, present].mean(0), 0, atol=1e-10)
    np.testing.assert_allclose(scores[:, present].std(0), 1, atol=1e-10)
    assert np.isnan(scores[:, ~present]).all()
    np.testing.assert_allclose(cohort.from_z_scores(scores), descriptors, atol=1e-12)


def test_windows_without_a_network_do_not_count(descriptors: np.ndarray) -> None:
    partial = descriptors.copy()
    partial[20:, 0] = np.nan
    cohort = fit(partial)
    assert cohort.mean[0] == pytest.approx(partial[:20, 0].mean())
    assert (cohort.levels(partial)[20:, 0] == -1).all()


@pytest.mark.filterwarnings("error")
def test_descriptor_unknown_to_the_cohort_has_no_level(descriptors: np.ndarray) -> None:
    missing = CORE_NAMES.index("strength/Subcortical")
    cohort = fit(descriptors)
    new = descriptors[0].copy()
    new[missing] = 0.3
    assert np.isnan(cohort.mean[missing])
    assert cohort.levels(new)[missing] == -1 and np.isnan(cohort.z_scores(new)[missing])


@pytest.mark.filterwarnings("error")
def test_descriptor_that_never_varies_has_no_level_and_no_z_score(descriptors: np.ndarray) -> None:
    same = descriptors.copy()
    same[:, 0] = 0.5
    cohort = fit(same)
    assert (cohort.levels(same)[:, 0] == -1).all() and np.isnan(cohort.z_scores(same)[:, 0]).all()
    assert (cohort.levels(same)[:, 1] >= 0).all()


def test_cohort_stays_as_it_was_fitted(descriptors: np.ndarray) -> None:
    training = descriptors[:20].copy()
    cohort = fit(training, subjects=2)
    before = contents(cohort)
    cohort.levels(descriptors[20:] + 5)
    cohort.z_scores(descriptors[20:] + 5)
    training[:] = 0
    assert contents(cohort) == before
    assert (cohort.subjects, cohort.windows, cohort.names) == (2, 20, CORE_NAMES)


def fit_all(atlas: Atlas) -> Cohort:
    signals = slow_series(0, 80, len(atlas), batch=(3,))
    references = fit_references((signal, atlas) for signal in signals)
    descriptors = describe(signals, atlas, MEASURES, 2.0, references)
    return Cohort.fit("all families", MEASURES, descriptors, 3, [atlas], references)


def test_round_trip_is_exact_and_plain_json(atlas: Atlas, tmp_path) -> None:
    cohort = fit_all(atlas)
    cohort.save(tmp_path / "new" / "cohort")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    folder = tmp_path / "new" / "cohort"
    assert sorted(path.name for path in folder.iterdir()) == ["cohort.json", "cohort.safetensors"]
    json.loads((folder / "cohort.json").read_text(), parse_constant=refuse)
    loaded = Cohort.load(folder)
    assert contents(loaded) == contents(cohort)
    signal = slow_series(9, 80, len(atlas))
    expected = describe(signal, atlas, MEASURES, 2.0, cohort.references)
    assert np.array_equal(loaded.describe(signal, atlas, 2.0), expected, equal_nan=True)


def test_scan_of_another_atlas_is_refused(atlas: Atlas) -> None:
    cohort = fit_all(atlas)
    signal = slow_series(0, 80, len(atlas))
    renamed = Atlas("other", atlas.rois, atlas.networks, atlas.coordinates)
    moved = Atlas(atlas.name, atlas.rois, atlas.networks, atlas.coordinates + 1)
    for wrong in (renamed, moved):
        message = f"'all families': expected a scan of the atlas 'made-up' .*got one of Atlas\\('{wrong.name}'"
        with pytest.raises(ValueError, match=message):
            cohort.describe(signal, wrong, 2.0)
    with pytest.raises(ValueError, match="expected reference gradients of atlas 'other'.* got made-up"):
        describe(signal, renamed, ["gradient_range"], references=cohort.references)
    with pytest.raises(ValueError, match="expected reference gradients of atlas 'made-up'.* got none"):
        describe(signal, atlas, ["gradient_range"])
    short = {atlas.name: cohort.references[atlas.name][1:]}
    with pytest.raises(ValueError, match="another atlas of that name"):
        describe(signal, atlas, ["gradient_range"], references=short)


def test_other_descriptors_are_refused(descriptors: np.ndarray, tmp_path) -> None:
    cohort = fit(descriptors)
    for use in (cohort.z_scores, cohort.from_z_scores, cohort.levels):
        with pytest.raises(ValueError, match=r"'tests': expected its 52 descriptors .*got shape \(3,\)"):
            use(np.zeros(3))
    with pytest.raises(ValueError, match=r"expected descriptors \[windows, 52\], got \(3, 2\)"):
        fit(np.zeros((3, 2)))
    cohort.save(tmp_path)
    path = tmp_path / "cohort.json"
    for wrong in ("strength/Other", "loudness/Vis"):
        text = path.read_text()
        path.write_text(text.replace("strength/Vis", wrong))
        with pytest.raises(ValueError, match="expected a cohort of this version"):
            Cohort.load(tmp_path)
        path.write_text(text)
    facts = json.loads(path.read_text())
    facts["names"] = descriptor_names(["connectivity"])
    path.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"expected mean \(36,\), got \(52,\)"):
        Cohort.load(tmp_path)
