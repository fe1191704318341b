"""Temporal descriptors against loops, against scipy, and on waves of known frequency."""

import numpy as np
import pytest
import scipy.signal
import scipy.stats

from fmrilm.processors.descriptors.measures import describe, descriptor_names
from fmrilm.processors.descriptors.networks import NETWORKS
from fmrilm.processors.descriptors.temporal import detrend, falff, spectral_ratio
from helpers import labelled_atlas, slow_series


TIME = 160
ATLAS = labelled_atlas()


def found(signal: np.ndarray, measure: str, repetition_time: float = 2.0) -> dict[str, float]:
    values = describe(signal, ATLAS, [measure], repetition_time)
    return {name.partition("/")[2]: value for name, value in zip(descriptor_names([measure]), values, strict=True)}


def network_mean(signal: np.ndarray, network: str) -> np.ndarray:
    return signal[:, [name == network for name in ATLAS.networks]].mean(1)


def expected(signal: np.ndarray, function, standardized: bool = True) -> dict[str, float]:
    """function of each network's mean series, NaN where there is none, and the mean of those as `global`."""
    signal = scipy.stats.zscore(signal) if standardized else signal
    values = {
        network: function(network_mean(signal, network)) if network in ATLAS.networks else np.nan
        for network in NETWORKS
    }
    return values | {"global": np.nanmean(list(values.values()))}


def assert_equal(measured: dict[str, float], wanted: dict[str, float]) -> None:
    np.testing.assert_allclose(list(measured.values()), [wanted[name] for name in measured], atol=1e-9)


def test_detrend_equals_scipy_and_leaves_nan_columns_alone() -> None:
    series = slow_series(0, TIME, 3, batch=(2,)) + np.arange(TIME)[:, None]
    np.testing.assert_allclose(detrend(series), scipy.signal.detrend(series, axis=-2), atol=1e-9)
    series[..., 1] = np.nan
    assert (np.isnan(detrend(series)) == np.isnan(series)).all()


def test_amplitude_and_variability_are_in_the_signals_unit_without_its_trend() -> None:
    signal = slow_series(0, TIME, len(ATLAS)) + 3 * np.arange(TIME)[:, None]
    detrended = scipy.signal.detrend(signal, axis=0)
    assert_equal(found(signal, "amplitude"), expected(detrended, lambda x: np.abs(x).mean(), standardized=False))
    assert_equal(found(signal, "variability"), expected(detrended, np.std, standardized=False))
    twice = found(2 * signal, "variability")
    assert twice["Vis"] == pytest.approx(2 * found(signal, "variability")["Vis"])


def test_outliers_are_the_share_of_frames_beyond_three_deviations() -> None:
    signal = slow_series(0, TIME, len(ATLAS))
    signal[[5, 90]] += 300
    wanted = expected(signal, lambda x: np.mean(np.abs(scipy.stats.zscore(scipy.signal.detrend(x))) > 3))
    assert_equal(found(signal, "outliers"), wanted)
    assert wanted["Vis"] == 2 / TIME


def test_autocorrelation_equals_a_loop() -> None:
    signal = slow_series(0, TIME, len(ATLAS))

    def lagged(x: np.ndarray) -> float:
        x = x - x.mean()
        return sum(x[t] * x[t + 1] for t in range(TIME - 1)) / sum(v * v for v in x)

    assert_equal(found(signal, "autocorrelation"), expected(signal, lagged))


def test_fnc_is_the_correlation_of_network_means() -> None:
    signal = slow_series(0, TIME, len(ATLAS))
    scores = scipy.stats.zscore(signal)
    values = found(signal, "fnc")
    for i, a in enumerate(NETWORKS):
        for b in list(NETWORKS)[i + 1 :]:
            if "Subcortical" in (a, b):
                assert np.isnan(values[f"{a}-{b}"])
            else:
                wanted = np.corrcoef(network_mean(scores, a), network_mean(scores, b))[0, 1]
                assert values[f"{a}-{b}"] == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("repetition_time", [0.72, 1.4, 2.0, 3.0])
def test_spectral_ratio_is_welchs_at_the_real_repetition_time(repetition_time: float) -> None:
    signal = slow_series(0, TIME, len(ATLAS))

    def ratio(x: np.ndarray) -> float:
        length = min(TIME, round(512 / repetition_time))
        hertz, power = scipy.signal.welch(scipy.signal.detrend(x), 1 / repetition_time, nperseg=length)
        return power[(hertz >= 0.01) & (hertz < 0.1)].sum() / power[(hertz >= 0.1) & (hertz <= 0.25)].sum()

    assert_equal(found(signal, "spectral_ratio", repetition_time), expected(signal, ratio))


def wave(hertz: float, repetition_time: float, seconds: float) -> np.ndarray:
    """[time, 1]"""
    return np.sin(2 * np.pi * hertz * np.arange(round(seconds / repetition_time)) * repetition_time)[:, None]


@pytest.mark.parametrize("repetition_time", [0.5, 1.0, 2.0])
def test_waves_count_in_their_band_whatever_the_repetition_time(repetition_time: float) -> None:
    slow, fast = (wave(hertz, repetition_time, 400) for hertz in (0.05, 0.2))
    assert falff(slow, repetition_time)[0] > 0.999 and falff(fast, repetition_time)[0] < 0.001
    # amplitudes add up in fALFF, powers in the spectral ratio
    assert falff(slow + 3 * fast, repetition_time)[0] == pytest.approx(1 / 4, abs=0.001)
    assert spectral_ratio(2 * slow + fast, repetition_time)[0] == pytest.approx(4, rel=0.02)


def test_network_falff_is_the_mean_over_its_rois() -> None:
    signal = slow_series(0, TIME, len(ATLAS))
    spectrum = np.abs(np.fft.rfft(scipy.signal.detrend(signal, axis=0), axis=0))
    hertz = np.fft.rfftfreq(TIME, 2.0)
    per_roi = spectrum[(hertz >= 0.01) & (hertz <= 0.08)].sum(0) / spectrum[1:].sum(0)
    values = found(signal, "falff")
    for network in set(ATLAS.networks):
        inside = np.array(ATLAS.networks) == network
        assert values[network] == pytest.approx(per_roi[inside].mean(), abs=1e-10)


@pytest.mark.parametrize(
    "frames, repetition_time, ratio, falff_known",
    [
        (50, 2.0, True, True),  # 100 s: one period of 0.01 Hz
        (49, 2.0, False, False),
        (160, 5.0, False, True),  # Nyquist at 0.1 Hz: nothing above
        (160, 6.5, False, False),  # Nyquist below 0.08 Hz
        (160, 4.9, True, True),
    ],
)
@pytest.mark.filterwarnings("error")
def test_scans_too_short_or_too_slow_have_no_frequencies(
    frames: int, repetition_time: float, ratio: bool, falff_known: bool
) -> None:
    signal = slow_series(0, frames, len(ATLAS))
    assert np.isfinite(found(signal, "spectral_ratio", repetition_time)["global"]) == ratio
    assert np.isfinite(found(signal, "falff", repetition_time)["global"]) == falff_known
    assert np.isfinite(found(signal, "amplitude", repetition_time)["global"])
