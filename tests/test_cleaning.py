"""Scrubbing, drift, band-pass and confound regression, against nilearn and by what they promise."""

import re
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nilearn import signal as nilearn_signal

from fmrilm.processors import FmriLMFeatureExtractor
from fmrilm.processors.cleaning_fmrilm import Cleaning, clean


TR = 2.0
FRAMES = 200


def recording(seed: int = 0, frames: int = FRAMES, rois: int = 5, confounds: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """A drifting signal [time, rois] with confounds [time, confounds] in it."""
    rng = np.random.default_rng(seed)
    nuisance = rng.standard_normal((frames, confounds)).cumsum(axis=0)
    signal = 1000 + rng.normal(0, 10, (frames, rois)) + 3 * nuisance @ rng.standard_normal((confounds, rois))
    return signal + np.linspace(0, 30, frames)[:, None], nuisance


def censor(*frames: int, of: int = FRAMES) -> np.ndarray:
    out = np.zeros(of, dtype=bool)
    out[list(frames)] = True
    return out


# no frame's mirror image in time is among them: nilearn 0.14.1 then interpolates at the wrong end of the scan
SCRUBBED = (0, 40, 41, 42, 110)


@pytest.mark.parametrize("with_confounds", [False, True])
@pytest.mark.parametrize(
    "high_pass, low_pass, frames",
    [
        *((high, low, frames) for high, low in ((0.01, None), (None, 0.1), (0.01, 0.1)) for frames in ((), SCRUBBED)),
        # without a filter, nilearn fits the drift as if censored frames had taken no time: none between kept ones
        *((None, None, frames) for frames in ((), (0, 1, 2), (198, 199))),
    ],
)
def test_cleaning_equals_nilearn(high_pass, low_pass, frames: tuple[int, ...], with_confounds: bool) -> None:
    signal, confounds = recording()
    confounds = confounds if with_confounds else None
    censored = censor(*frames)
    expected = nilearn_signal.clean(
        signal,
        detrend=True,
        standardize=None,
        confounds=confounds,
        sample_mask=~censored,
        high_pass=high_pass,
        low_pass=low_pass,
        t_r=TR,
    )
    cleaned, kept = clean(signal, TR, 1, Cleaning(high_pass=high_pass, low_pass=low_pass), confounds, censored)
    first, last = np.flatnonzero(~censored)[[0, -1]]
    np.testing.assert_array_equal(kept, ~censored[first : last + 1])
    np.testing.assert_allclose(cleaned[kept], expected, atol=1e-8)


def test_censored_ends_are_cut_off() -> None:
    signal, confounds = recording()
    cleaning = Cleaning(high_pass=0.01, low_pass=0.1)
    cleaned, kept = clean(signal, TR, 2, cleaning, confounds, censor(0, 1, 2, 198, 199))
    expected, _ = clean(signal[3:198], TR, 2, cleaning, confounds[3:198])
    np.testing.assert_allclose(cleaned, expected, atol=1e-9)
    assert kept.all()


@pytest.mark.parametrize("cleaning", [Cleaning(), Cleaning(low_pass=0.1)])
@settings(max_examples=25, deadline=None)
@given(st.sets(st.integers(0, 59), max_size=20), st.integers(0, 2))
def test_values_of_censored_frames_change_nothing(cleaning: Cleaning, frames: set[int], order: int) -> None:
    signal, confounds = recording(frames=60)
    censored = censor(*frames, of=60)
    cleaned, kept = clean(signal, TR, order, cleaning, confounds, censored)
    signal[censored], confounds[censored] = 1e4, -1e4
    again, _ = clean(signal, TR, order, cleaning, confounds, censored)
    np.testing.assert_allclose(again, cleaned, atol=1e-6)
    # they lie on a line between their neighbours
    at = np.flatnonzero(kept)
    for column in range(signal.shape[1]):
        np.testing.assert_allclose(cleaned[:, column], np.interp(np.arange(len(kept)), at, cleaned[at, column]))


@pytest.mark.parametrize("cleaning", [Cleaning(), Cleaning(low_pass=0.1)])
def test_missing_roi_stays_missing_and_changes_nothing(cleaning: Cleaning) -> None:
    signal, confounds = recording()
    expected, _ = clean(signal, TR, 2, cleaning, confounds, censor(50, 51))
    signal[:, 2] = expected[:, 2] = np.nan
    cleaned, _ = clean(signal, TR, 2, cleaning, confounds, censor(50, 51))
    np.testing.assert_allclose(cleaned, expected, atol=1e-9)


def test_cleaned_scan_with_its_mask_is_clean_already() -> None:
    signal, confounds = recording()
    cleaned, kept = clean(signal, TR, 2, Cleaning(), confounds, censor(0, 50, 51, 120))
    again, kept_again = clean(cleaned, TR, 2, Cleaning(), censored=~kept)
    np.testing.assert_array_equal(kept_again, kept)
    np.testing.assert_allclose(again, cleaned, atol=1e-9)


def table(frames: int = FRAMES) -> pd.DataFrame:
    """What is a difference is NaN in the first frame."""
    moves = np.random.default_rng(5).standard_normal(frames).cumsum()
    return pd.DataFrame({"trans_x": moves, "trans_x_derivative1": np.diff(moves, prepend=np.nan)})


def test_forms_of_confounds_are_equal(tmp_path) -> None:
    signal, _ = recording()
    filled = table().bfill(limit=1).to_numpy()
    expected, _ = clean(signal, TR, 2, Cleaning(), filled)
    table().to_csv(tmp_path / "a.tsv", sep="\t", na_rep="n/a", index=False)
    table().to_csv(tmp_path / "a.csv", index=False)
    for form in (table(), tmp_path / "a.tsv", str(tmp_path / "a.csv")):
        cleaned, _ = clean(signal, TR, 2, Cleaning(), form)
        np.testing.assert_allclose(cleaned, expected, atol=1e-9)
    first, _ = clean(signal, TR, 2, Cleaning(), filled[:, 0])
    np.testing.assert_allclose(clean(signal, TR, 2, Cleaning(), filled[:, :1])[0], first)


def test_constant_and_repeated_confounds_take_nothing_away() -> None:
    signal, confounds = recording()
    expected, _ = clean(signal, TR, 1, Cleaning(low_pass=0.1), confounds)
    drift = np.arange(FRAMES, dtype=float)[:, None]
    padded = np.hstack([confounds, 1e4 * np.ones_like(drift), np.zeros_like(drift), drift, 2 * confounds])
    np.testing.assert_allclose(clean(signal, TR, 1, Cleaning(low_pass=0.1), padded)[0], expected, atol=1e-7)


@pytest.mark.parametrize(
    "cleaning, confounds, censored, message",
    [
        ({}, lambda: np.ones((199, 3)), None, "with 200 rows, one per frame, got 199 rows"),
        ({}, lambda: np.ones((200, 3, 1)), None, "got 200 rows (shape (200, 3, 1))"),
        ({}, lambda: table().drop(index=9).reindex(range(200)), None, "first in column 0, row 9, counted"),
        ({}, lambda: np.random.default_rng(0).normal(size=(200, 197)), None, "leave nothing of 200 kept frames"),
        ({}, lambda: None, censor(3, of=199), "expected censored as 200 bools, one per frame, got (199,)"),
        ({}, lambda: None, np.arange(200), "got (200,) of int64"),
        ({}, lambda: None, censor(*range(101)), "101 of 200 frames are censored; expected at most 50%"),
        ({"low_pass": 0.25}, lambda: None, None, "cutoffs under 0.250 Hz, half the sampling rate, got 0.25 Hz"),
        ({"low_pass": 0}, lambda: None, None, "expected low_pass > 0, got 0"),
        ({"high_pass": 0.1, "low_pass": 0.01}, lambda: None, None, "high_pass < low_pass (Hz), got 0.1 and 0.01"),
        ({"lowpass": 0.1}, lambda: None, None, "got lowpass"),
    ],
)
def test_unfit_cleaning_is_refused(cleaning: dict, confounds: Callable, censored, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        clean(recording()[0], TR, 2, Cleaning.from_dict(cleaning), confounds(), censored)


def test_unfit_confound_tables_are_refused(tmp_path) -> None:
    path = tmp_path / "a.tsv"
    for text, message in (
        ("", "got no row of numbers"),
        ("a\tb\n1\n", "line 2: expected 2 cells, got 1"),
        ("a\tb\n1\tx\n", "numbers below the header"),
        ("a\tb\n1\t2\n", "got 1 rows"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            clean(recording()[0], TR, 2, Cleaning(), path)


def test_too_short_a_scan_for_the_filter_is_refused() -> None:
    with pytest.raises(ValueError, match="20 frames are too few for a bandpass filter"):
        clean(recording(frames=20)[0], TR, 2, Cleaning(high_pass=0.01, low_pass=0.1))


def test_extractor_cleans_before_it_resamples(tiny_atlas, tmp_path) -> None:
    signal, confounds = recording()
    settings = {"high_pass": 0.01, "low_pass": 0.1}
    extractor = FmriLMFeatureExtractor([tiny_atlas], patch_length=4, window_length=16, cleaning=settings)
    extractor.save_pretrained(tmp_path)
    extractor = FmriLMFeatureExtractor.from_pretrained(tmp_path)
    assert extractor.cleaning == settings
    out, _ = extractor.prepare_signal({"signal": signal, "tr": 1.0, "confounds": confounds})
    cleaned, _ = clean(signal, 1.0, 2, Cleaning(**settings), confounds)
    plain = FmriLMFeatureExtractor([tiny_atlas], patch_length=4, window_length=16, detrend_order=0)
    expected, _ = plain.prepare_signal(cleaned, tr=1.0)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_censored_frames_do_not_set_the_scale(extractor) -> None:
    signal = np.random.default_rng(0).normal(0, 10, (400, 5))
    frames = np.random.default_rng(1).permutation(np.arange(1, 399))[:150]
    censored = censor(*frames, of=400)
    signal[censored] *= 50
    out, _ = extractor.prepare_signal({"signal": signal, "tr": 2.0, "censored": censored})
    assert out[~censored].std() == pytest.approx(1, abs=0.1)
    # straight lines vary less than what was measured
    assert out[censored].std() < 0.8
    inputs = extractor({"signal": signal.tolist(), "tr": 2.0, "censored": censored.tolist()}, window="full")
    np.testing.assert_array_equal(inputs["fmri_values"][0].T, out)
    assert inputs["fmri_mask"].all()
