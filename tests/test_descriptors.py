import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fmrilm.processors import Atlas
from fmrilm.processors.descriptors.cohort import DESCRIPTOR_NAMES, LEVELS, Cohort, describe
from fmrilm.processors.descriptors.connectivity import PAIRS, connectivity, network_blocks, strength
from fmrilm.processors.descriptors.networks import NETWORKS, membership, standardize
from fmrilm.processors.descriptors.temporal import autocorrelation


# ROIs per network: one has a single ROI, the last has none
SIZES = {"Vis": 4, "SomMot": 3, "DorsAttn": 2, "SalVentAttn": 1, "Limbic": 2, "Cont": 3, "Default": 5}
ROIS, TIME = sum(SIZES.values()), 40


def build_atlas(networks: tuple[str, ...]) -> Atlas:
    rois = tuple(f"roi{i}" for i in range(len(networks)))
    return Atlas("made-up", rois, networks, np.zeros((len(networks), 3)))


def build_signal(seed: int = 0, batch: tuple[int, ...] = ()) -> np.ndarray:
    """Correlated slow series [*batch, time, rois] on a large mean, as BOLD is."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(*batch, TIME, ROIS)) + rng.normal(size=(*batch, TIME, 1))
    return 1000 + 10 * noise.cumsum(-2)


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    networks = [name for name, size in SIZES.items() for _ in range(size)]
    return build_atlas(tuple(np.random.default_rng(1).permutation(networks).tolist()))


@pytest.fixture(scope="module")
def descriptors(atlas: Atlas) -> np.ndarray:
    return describe(build_signal(batch=(30,)), atlas)


def test_blocks_are_means_of_the_correlation_matrix(atlas: Atlas) -> None:
    signal, networks = build_signal(), np.array(atlas.networks)
    matrix = np.corrcoef(signal.T)
    np.fill_diagonal(matrix, np.nan)
    blocks = network_blocks(signal, atlas)
    for i, a in enumerate(NETWORKS):
        for j, b in enumerate(NETWORKS):
            block = matrix[np.ix_(networks == a, networks == b)]
            expected = np.nanmean(block) if np.isfinite(block).any() else np.nan
            np.testing.assert_allclose(blocks[i, j], expected, atol=1e-10, err_msg=f"{a}-{b}")
    named = dict(zip(PAIRS, connectivity(signal, atlas), strict=True))
    assert named["Vis", "Default"] == blocks[0, 6]
    assert np.isnan(named["SalVentAttn", "SalVentAttn"])  # one ROI has no connectivity within


def test_strength_is_the_row_mean_of_the_correlation_matrix(atlas: Atlas) -> None:
    signal, networks = build_signal(), np.array(atlas.networks)
    matrix = np.corrcoef(signal.T)
    np.fill_diagonal(matrix, np.nan)
    rows = np.nanmean(matrix, axis=1)
    expected = [rows[networks == name].mean() if name in SIZES else np.nan for name in NETWORKS]
    np.testing.assert_allclose(strength(signal, atlas), expected, atol=1e-10)


def test_autocorrelation_equals_a_loop(atlas: Atlas) -> None:
    signal, networks = build_signal(), np.array(atlas.networks)
    for value, name in zip(autocorrelation(signal, atlas), NETWORKS, strict=True):
        if name not in SIZES:
            assert np.isnan(value)
            continue
        columns = [(c - c.mean()) / c.std() for c in signal[:, networks == name].T]
        series = sum(columns) / len(columns)
        series = series - series.mean()
        expected = sum(series[t] * series[t + 1] for t in range(TIME - 1)) / sum(x * x for x in series)
        assert value == pytest.approx(expected, abs=1e-10)


def test_batch_equals_one_by_one(atlas: Atlas) -> None:
    signals = build_signal(batch=(2, 3))
    together = describe(signals, atlas)
    assert together.shape == (2, 3, len(DESCRIPTOR_NAMES)) and together.dtype == np.float64
    for index in np.ndindex(2, 3):
        np.testing.assert_allclose(together[index], describe(signals[index], atlas), atol=1e-12)


def test_float32_costs_only_its_own_rounding(atlas: Atlas) -> None:
    signal = build_signal().astype(np.float32)
    np.testing.assert_array_equal(connectivity(signal, atlas), connectivity(signal.astype(np.float64), atlas))


def test_only_descriptors_of_absent_networks_are_nan(atlas: Atlas) -> None:
    absent = ["Subcortical" in name or name.endswith("/SalVentAttn-SalVentAttn") for name in DESCRIPTOR_NAMES]
    np.testing.assert_array_equal(np.isnan(describe(build_signal(), atlas)), absent)


def test_unknown_network_is_refused() -> None:
    with pytest.raises(ValueError, match="made-up.*got also.*Auditory"):
        membership(build_atlas(("Vis", "Auditory")))


@pytest.mark.parametrize("value", [0.0, 0.1, 1234.5, np.nan, np.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, about the infinite value
def test_roi_that_does_not_vary_is_refused(value: float) -> None:
    signal = build_signal()
    signal[:, 3] = value
    with pytest.raises(ValueError, match="vary over time, got 1 "):
        standardize(signal)


def test_wrong_shape_tells_the_expected_one(atlas: Atlas) -> None:
    with pytest.raises(ValueError, match=rf"expected signal \[..., time, {ROIS}\].*\({ROIS}, {TIME}\)"):
        describe(build_signal().T, atlas)


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(ROIS)))
def test_order_of_rois_does_not_matter(atlas: Atlas, order: list[int]) -> None:
    permuted = build_atlas(tuple(atlas.networks[i] for i in order))
    signal = build_signal()
    np.testing.assert_allclose(describe(signal[:, order], permuted), describe(signal, atlas), atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(
    scale=hnp.arrays(float, ROIS, elements=st.floats(0.01, 100)),
    shift=hnp.arrays(float, ROIS, elements=st.floats(-1e4, 1e4)),
)
def test_scale_and_offset_of_a_roi_do_not_matter(atlas: Atlas, scale: np.ndarray, shift: np.ndarray) -> None:
    signal = build_signal()
    np.testing.assert_allclose(describe(scale * signal + shift, atlas), describe(signal, atlas), atol=1e-7)


def test_levels_are_thirds_of_the_training_windows(descriptors: np.ndarray) -> None:
    levels = Cohort.fit(descriptors, subjects=3).levels(descriptors)
    present = ~np.isnan(descriptors[0])
    for level in range(len(LEVELS)):
        assert ((levels == level).sum(0)[present] == 10).all()
    assert (levels[:, ~present] == -1).all()
    lowest, highest = descriptors[:, present].argmin(0), descriptors[:, present].argmax(0)
    assert (levels[:, present][lowest, range(present.sum())] == LEVELS.index("low")).all()
    assert (levels[:, present][highest, range(present.sum())] == LEVELS.index("high")).all()


def test_z_scores_have_the_cohorts_moments(descriptors: np.ndarray) -> None:
    present = ~np.isnan(descriptors[0])
    scores = Cohort.fit(descriptors, subjects=3).z_scores(descriptors)
    np.testing.assert_allclose(scores[:, present].mean(0), 0, atol=1e-10)
    np.testing.assert_allclose(scores[:, present].std(0), 1, atol=1e-10)
    assert np.isnan(scores[:, ~present]).all()


def test_windows_without_a_network_do_not_count(descriptors: np.ndarray) -> None:
    partial = descriptors.copy()
    partial[20:, 0] = np.nan
    cohort = Cohort.fit(partial, subjects=3)
    assert cohort.mean[0] == pytest.approx(partial[:20, 0].mean())
    assert (cohort.levels(partial)[20:, 0] == -1).all()


@pytest.mark.filterwarnings("error")
def test_descriptor_unknown_to_the_cohort_has_no_level(descriptors: np.ndarray) -> None:
    missing = DESCRIPTOR_NAMES.index("strength/Subcortical")
    cohort = Cohort.fit(descriptors, subjects=3)
    new = descriptors[0].copy()
    new[missing] = 0.3
    assert np.isnan(cohort.mean[missing])
    assert cohort.levels(new)[missing] == -1 and np.isnan(cohort.z_scores(new)[missing])


def test_cohort_stays_as_it_was_fitted(descriptors: np.ndarray) -> None:
    training = descriptors[:20].copy()
    cohort = Cohort.fit(training, subjects=2)
    before = repr(cohort)
    cohort.levels(descriptors[20:] + 5)
    cohort.z_scores(descriptors[20:] + 5)
    training[:] = 0
    assert repr(cohort) == before
    assert (cohort.subjects, cohort.windows, cohort.names) == (2, 20, DESCRIPTOR_NAMES)


def test_round_trip_is_exact_and_plain_json(descriptors: np.ndarray, tmp_path) -> None:
    cohort = Cohort.fit(descriptors, subjects=3)
    cohort.save(tmp_path / "cohort.json")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "cohort.json").read_text(), parse_constant=refuse)
    # by repr, because NaN is not equal to itself; it shows every digit of a float
    assert repr(Cohort.load(tmp_path / "cohort.json")) == repr(cohort)


def test_cohort_of_other_descriptors_is_refused(descriptors: np.ndarray, tmp_path) -> None:
    path = tmp_path / "cohort.json"
    Cohort.fit(descriptors, subjects=3).save(path)
    path.write_text(path.read_text().replace("strength/Vis", "strength/Other"))
    with pytest.raises(ValueError, match="cohort.json: expected the"):
        Cohort.load(path)
    with pytest.raises(ValueError, match=r"expected descriptors \[windows, \d+\], got \(3, 2\)"):
        Cohort.fit(np.zeros((3, 2)), subjects=1)
