from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fmrilm.processors import Atlas
from fmrilm.processors.descriptors.gradients import fit_references
from fmrilm.processors.descriptors.measures import CORE_MEASURES, MEASURES, describe, descriptor_names
from fmrilm.processors.descriptors.networks import NETWORKS, PAIRS, membership, network_blocks, standardize
from helpers import labelled_atlas, slow_series


TIME = 80
# all that does not depend on the unit of the signal
SCALE_FREE = [name for name in MEASURES if name not in ("amplitude", "variability")]


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return labelled_atlas()


@pytest.fixture(scope="module")
def references(atlas: Atlas) -> dict[str, np.ndarray]:
    return fit_references([(slow_series(seed, TIME, len(atlas)), atlas) for seed in range(3)])


@pytest.fixture(scope="module")
def signal(atlas: Atlas) -> np.ndarray:
    return slow_series(0, TIME, len(atlas))


@pytest.fixture(scope="module")
def correlations(signal: np.ndarray) -> np.ndarray:
    """Of ROIs with others."""
    matrix = np.corrcoef(signal.T)
    np.fill_diagonal(matrix, np.nan)
    return matrix


def values(signal: np.ndarray, atlas: Atlas, measures, references=None) -> dict[str, float]:
    measures = list(measures)
    found = describe(signal, atlas, measures, 2.0, references)
    return dict(zip(descriptor_names(measures), found.tolist(), strict=True))


@pytest.mark.parametrize("measures", [["connectivity", "loudness"], ["strength", "strength"], []])
def test_measures_that_are_unknown_or_repeated_are_refused(measures: list[str], atlas: Atlas, signal) -> None:
    with pytest.raises(ValueError, match="expected (measures among connectivity.*got loudness|at least one measure)"):
        describe(signal, atlas, measures)


def test_blocks_are_means_of_the_correlation_matrix(atlas: Atlas, signal, correlations: np.ndarray) -> None:
    networks, blocks = np.array(atlas.networks), network_blocks(standardize(signal), membership(atlas))
    for i, a in enumerate(NETWORKS):
        for j, b in enumerate(NETWORKS):
            block = correlations[np.ix_(networks == a, networks == b)]
            expected = np.nanmean(block) if np.isfinite(block).any() else np.nan
            np.testing.assert_allclose(blocks[i, j], expected, atol=1e-10, err_msg=f"{a}-{b}")
    found = values(signal, atlas, ["connectivity"])
    assert list(found) == [f"connectivity/{pair}" for pair in PAIRS]
    assert found["connectivity/Vis-Default"] == blocks[0, 6]
    assert np.isnan(found["connectivity/SalVentAttn-SalVentAttn"])  # one ROI has no connectivity within


def test_strength_is_the_row_mean_of_the_correlation_matrix(atlas: Atlas, signal, correlations: np.ndarray) -> None:
    networks, rows = np.array(atlas.networks), np.nanmean(correlations, axis=1)
    expected = [rows[networks == name].mean() if name in networks else np.nan for name in NETWORKS]
    np.testing.assert_allclose(describe(signal, atlas, ["strength"]), expected, atol=1e-10)


def test_batch_equals_one_by_one(atlas: Atlas, references: dict[str, np.ndarray]) -> None:
    signals = slow_series(0, TIME, len(atlas), batch=(2, 3))
    together = describe(signals, atlas, MEASURES, 2.0, references)
    assert together.shape == (2, 3, len(descriptor_names(MEASURES))) and together.dtype == np.float64
    for index in np.ndindex(2, 3):
        alone = describe(signals[index], atlas, MEASURES, 2.0, references)
        np.testing.assert_allclose(together[index], alone, atol=1e-9)


def test_each_measure_is_the_same_alone_and_with_others(atlas: Atlas, signal, references: dict) -> None:
    together = values(signal, atlas, MEASURES, references)
    for measure in MEASURES:
        alone = values(signal, atlas, [measure], references)
        np.testing.assert_array_equal(list(alone.values()), [together[name] for name in alone], err_msg=measure)


def test_only_descriptors_of_absent_networks_are_nan(atlas: Atlas, signal, references: dict) -> None:
    found = values(signal, atlas, MEASURES, references)
    absent = {name for name in found if "Subcortical" in name} | {"connectivity/SalVentAttn-SalVentAttn"}
    assert {name for name, value in found.items() if np.isnan(value)} == absent


def test_what_a_small_atlas_cannot_have_is_nan() -> None:
    small = labelled_atlas({"Vis": 2, "Default": 2})
    signal = slow_series(0, TIME, 4)
    found = values(signal, small, MEASURES, fit_references([(signal, small)]))
    missing = {name.partition("/")[0] for name, value in found.items() if np.isnan(value) and name.endswith("global")}
    assert missing == {"efficiency", "modularity", "clustering"}
    assert all(np.isnan(value) for name, value in found.items() if name.startswith("gradient"))
    assert np.isfinite([found[f"{name}/Vis"] for name in ("strength", "falff", "amplitude")]).all()


def test_unknown_network_is_refused() -> None:
    with pytest.raises(ValueError, match="made-up.*got also.*Auditory"):
        describe(slow_series(0, TIME, 3), labelled_atlas({"Vis": 2, "Auditory": 1}), CORE_MEASURES)


def test_missing_rois_are_left_out(atlas: Atlas) -> None:
    signals = slow_series(0, TIME, len(atlas), batch=(3,))
    missing = np.zeros((3, len(atlas)), dtype=bool)
    missing[0, [2, 7]] = missing[1, 5] = True
    # one network has a single ROI
    missing[1, atlas.networks.index("SalVentAttn")] = True
    holes = np.where(missing[:, None], np.nan, signals)
    references = fit_references((signal, atlas) for signal in holes)
    found = describe(holes, atlas, MEASURES, 2.0, references)
    for row in range(3):
        present = ~missing[row]
        alone = {atlas.name: references[atlas.name][present]}
        expected = describe(signals[row][:, present], atlas.without(missing[row]), MEASURES, 2.0, alone)
        np.testing.assert_allclose(found[row], expected, atol=1e-9)
    names = np.array(descriptor_names(MEASURES))
    assert {name for name in names[np.isnan(found[1])] if "SalVentAttn" not in name} == {
        name for name in names if "Subcortical" in name and "SalVentAttn" not in name
    }


def test_rois_without_a_network_count_in_no_network(atlas: Atlas, signal) -> None:
    other = replace(atlas, networks=("", *atlas.networks[1:]))
    holes = np.where(np.arange(len(atlas)) == 0, np.nan, signal)
    expected = describe(holes, atlas, ["connectivity"])
    np.testing.assert_allclose(describe(signal, other, ["connectivity"]), expected, atol=1e-12)
    assert np.isfinite(describe(slow_series(0, TIME, 200), Atlas.load("cc200"), CORE_MEASURES)).all()


@pytest.mark.parametrize("value", [0.0, 0.1, 1234.5, np.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, about the infinite value
def test_roi_that_does_not_vary_is_refused(value: float, atlas: Atlas, signal) -> None:
    with pytest.raises(ValueError, match="vary over time, got 1 "):
        describe(np.where(np.arange(len(atlas)) == 3, value, signal), atlas, CORE_MEASURES)


def test_wrong_shape_tells_the_expected_one(atlas: Atlas, signal) -> None:
    rois = len(atlas)
    with pytest.raises(ValueError, match=rf"expected signal \[..., time, {rois}\].*\({rois}, {TIME}\)"):
        describe(signal.T, atlas, CORE_MEASURES)


@pytest.mark.parametrize("repetition_time", [None, 0, -1.0])
@pytest.mark.parametrize("measure", ["falff", "spectral_ratio"])
def test_frequencies_need_a_repetition_time(measure: str, repetition_time: float | None, atlas: Atlas, signal) -> None:
    with pytest.raises(ValueError, match=f"expected repetition_time in seconds.*got {repetition_time}"):
        describe(signal, atlas, [measure], repetition_time)


@settings(max_examples=20, deadline=None)
@given(random=st.randoms(use_true_random=False))
def test_order_of_rois_does_not_matter(atlas: Atlas, signal, references: dict[str, np.ndarray], random) -> None:
    order = list(range(len(atlas)))
    random.shuffle(order)
    rois, networks = ([names[i] for i in order] for names in (atlas.rois, atlas.networks))
    permuted = Atlas(atlas.name, tuple(rois), tuple(networks), atlas.coordinates[order])
    # the communities that modularity is about are found by going through the ROIs in their order
    measures = [measure for measure in MEASURES if measure != "modularity"]
    moved = {name: reference[order] for name, reference in references.items()}
    np.testing.assert_allclose(
        describe(signal[:, order], permuted, measures, 2.0, moved),
        describe(signal, atlas, measures, 2.0, references),
        atol=1e-8,
    )


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_scale_and_offset_of_a_roi_do_not_matter(atlas: Atlas, signal, references: dict, data) -> None:
    scale = data.draw(hnp.arrays(float, len(atlas), elements=st.floats(0.01, 100)))
    shift = data.draw(hnp.arrays(float, len(atlas), elements=st.floats(-1e4, 1e4)))
    np.testing.assert_allclose(
        describe(scale * signal + shift, atlas, SCALE_FREE, 2.0, references),
        describe(signal, atlas, SCALE_FREE, 2.0, references),
        atol=1e-6,
    )
