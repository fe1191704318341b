"""The report of one scan, and the measures in it, against what they are defined by."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_tiny_atlas
from test_report import EVIL, Page

from fmrilm import ScanReader
from fmrilm.processors import FmriLMProcessor
from fmrilm.training.report.scan_figures import _four
from fmrilm.training.report.scan_report import (
    forecast_last_patch,
    network_nll,
    read_scan,
    token_contributions,
    token_places,
    view_scan,
    write_scan_report,
)


CHOICES = ["yes", "no", "maybe so"]
QUESTION = "Is this person older?"


@pytest.fixture
def reader(tiny_model, processor: FmriLMProcessor) -> ScanReader:
    return ScanReader(tiny_model(), processor)


@pytest.fixture
def scan(reader: ScanReader, signal: np.ndarray) -> dict:
    return read_scan(reader, signal, tr=2.0)


def test_a_scan_read_once_gives_what_its_file_gives(reader: ScanReader, signal: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "scan.npy"
    signal[:, 3] = np.nan
    np.save(path, signal)
    scan = read_scan(reader, path, tr=1.0)
    assert reader.ask(scan, QUESTION, CHOICES) == reader.ask(path, QUESTION, CHOICES, tr=1.0)
    view = view_scan(reader, scan)
    assert np.array_equal(view.codes, reader.tokenize(path, tr=1.0))
    assert np.array_equal(view.signal, reader.signal(path, tr=1.0), equal_nan=True)
    # the missing ROI has no correlation and takes none from the others
    assert np.isnan(view.roi_correlations).tolist() == [roi == 3 for roi in range(5)]
    assert np.isfinite(view.connectivity_similarity)


@pytest.mark.parametrize("answer", CHOICES)
def test_contributions_are_what_the_answer_loses_with_its_tokens(
    reader: ScanReader, scan: dict, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    contributions, summary = token_contributions(reader, scan, QUESTION, answer, CHOICES)
    assert contributions.shape == reader.tokenize(scan).shape[:2] and np.isfinite(summary)
    features = reader.model.model.get_fmri_features

    def log_probability(scale: torch.Tensor) -> float:
        monkeypatch.setattr(reader.model.model, "get_fmri_features", lambda scans: features(scans) * scale[:, None])
        found = reader.ask(scan, QUESTION, CHOICES, window="first")
        return float(np.log(found["probabilities"][answer]))

    for token in (0, 3):
        change = torch.zeros(contributions.size)
        change[token] = 0.02
        slope = (log_probability(1 + change) - log_probability(1 - change)) / 0.04
        assert contributions.ravel()[token] == pytest.approx(slope, rel=0.05, abs=2e-4)


def test_contributions_to_free_text_are_of_its_log_likelihood(reader: ScanReader, scan: dict) -> None:
    of_words = [token_contributions(reader, scan, QUESTION, text)[0] for text in ("yes", "no")]
    # the likelihood of both answers, each shifted by the same: what differs is what separates them
    among, _ = token_contributions(reader, scan, QUESTION, "yes", ["yes", "no"])
    share = reader.ask(scan, QUESTION, ["yes", "no"])["probabilities"]["no"]
    np.testing.assert_allclose(among, share * (of_words[0] - of_words[1]), atol=1e-5)


def test_nll_is_the_models_and_falls_to_networks_by_occlusion(reader: ScanReader, scan: dict) -> None:
    nll, networks = network_nll(reader, scan)
    np.testing.assert_allclose(nll, reader.surprise(scan, window="first").mean(-1), rtol=1e-5)
    assert list(networks) == ["Vis", "SomMot", "Default"]
    features = reader.processor.feature_extractor([scan], window="first")
    features["fmri_values"][:, [0, 3]] = 0
    without = reader.model.surprise(reader.model.model.get_fmri_codes(**features))[0].mean(-1)
    np.testing.assert_allclose(networks["Vis"], nll - without.numpy(), rtol=1e-4, atol=1e-5)
    assert np.isfinite(nll).all()


def test_the_last_patch_is_forecast_from_the_frames_before(reader: ScanReader, scan: dict) -> None:
    found = forecast_last_patch(reader, scan)
    assert found is not None
    samples, expected = found
    length = reader.model.config.codec_config.patch_length
    assert samples.shape[1:] == expected.shape == (length, 5)
    assert np.abs(samples.mean(0) - expected).max() < samples.std(0).max()
    # what is forecast is not looked at
    start = reader.processor.feature_extractor.window_length - length
    features = reader.processor.feature_extractor([scan], window="first")
    before = features["fmri_values"][..., :start], features["roi_coordinates"], features["fmri_mask"][..., :start]
    wanted = reader.model.forecast(*before, seconds=length * 2.0)[0].mT
    np.testing.assert_allclose(expected, wanted, rtol=1e-4, atol=1e-5)
    drawn = {"num_samples": len(samples), "generator": torch.Generator().manual_seed(0)}
    wanted = reader.model.forecast(*before, seconds=length * 2.0, **drawn)[:, 0].mT
    np.testing.assert_allclose(samples, wanted, rtol=1e-4, atol=1e-5)
    assert forecast_last_patch(reader, {**scan, "signal": scan["signal"][: length + 1]}) is None


def test_rois_are_shown_from_the_best_to_the_worst_of_those_there_are() -> None:
    errors = np.full(40, np.nan)
    errors[[30, 3, 20]] = 0.1, 0.2, 0.3
    assert _four(errors) == [30, 30, 3, 3]


def test_like_tokens_have_like_places(reader: ScanReader) -> None:
    codes = np.random.default_rng(0).integers(0, 16, (8, 2, 3))
    places = token_places(reader, codes).ravel()
    assert sorted(places) == pytest.approx(np.linspace(0, 1, 16))
    vectors = reader.model.model.codec.embed_codes(torch.tensor(codes)).reshape(16, -1).detach().numpy()
    vectors -= vectors.mean(0)
    near, far = np.argsort(places)[:5], np.argsort(places)[-5:]
    within = vectors[near] @ vectors[near].T
    assert within[~np.eye(5, dtype=bool)].mean() > (vectors[near] @ vectors[far].T).mean()


def test_the_page_holds_everything_and_fetches_nothing(reader: ScanReader, signal: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    questions = {QUESTION: CHOICES, f"Describe {EVIL} $it$.": None}
    write_scan_report(path, reader, signal, questions, title=EVIL, tr=2.0)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert EVIL not in html and page.text.count(EVIL) >= 3
    assert len(page.ids) == 6
    # tokens of answers, carpet, traces, connectivity, codes, forecast, surprise, two glass brains: in light and dark
    assert len(page.images) == len(page.sources) == page.tags.count("figcaption") == 9
    found = reader.ask(signal, QUESTION, CHOICES, tr=2.0, window="first")
    assert found["answer"] in page.cells
    shares = page.cells[page.cells.index(found["answer"]) + 1]
    assert all(f"{choice}{100 * share:.0f}" in shares for choice, share in found["probabilities"].items())
    assert "20 frames of 5 ROIs (tiny)" in page.text


def test_atlases_may_bring_networks_of_their_own(reader: ScanReader) -> None:
    atlas = build_tiny_atlas(5)
    object.__setattr__(atlas, "networks", ("Vis", "Vis", "mine", "mine", "mine"))
    scan = read_scan(reader, np.random.default_rng(0).normal(size=(20, 5)), tr=2.0, atlas=atlas)
    assert list(network_nll(reader, scan)[1]) == ["Vis", "mine"]
    assert view_scan(reader, scan).order.tolist() == [0, 1, 2, 3, 4]
