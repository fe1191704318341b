"""Stage 1: the fit in closed form, and the program."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoFeatureExtractor

from fmrilm import FmriCodecConfig, FmriCodecModel
from fmrilm.training.codec import program
from fmrilm.training.codec.fit import fit_codec, fit_descriptor_head, fit_summary
from fmrilm.training.codec.metrics import evaluate_codec, retrieval_results
from fmrilm.training.codec.text_embeddings import embed_texts
from fmrilm.training.codec.trainer import CodecTrainingArguments
from fmrilm.training.data.dataset import Scans, cut_windows
from helpers import atlas, scans_of
from program_runs import run, weights


ROIS, FRAMES = 24, 160


def waves(seeds: range, frames: int = FRAMES) -> Scans:
    """Waves through the brain: the signal of a ROI depends on its place. A ROI is missing in each scan."""
    of, signals, time = atlas("waves", ROIS), [], np.arange(frames)[:, None]
    for index, seed in enumerate(seeds):
        rng = np.random.default_rng(seed)
        slopes = [of.coordinates @ rng.normal(0, 0.012, 3) + rng.uniform(0, 6) for _ in range(3)]
        signal = sum(np.sin(0.3 * time + slope) for slope in slopes) + 0.1 * rng.standard_normal((frames, ROIS))
        signal[:, index % ROIS] = np.nan
        signals.append(signal / signal.std(0))
    return scans_of(signals, of)


def items(seeds: range) -> list[dict[str, np.ndarray]]:
    """Whole scans as `evaluate_codec` takes them."""
    return cut_windows(waves(seeds), FRAMES, FRAMES).items()


def inputs(item: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Signal [1, ROIs, frames] and coordinates [1, ROIs, 3]."""
    return torch.from_numpy(item["signal"].T)[None], torch.tensor(item["coordinates"])[None]


def make(**changes) -> FmriCodecModel:
    values = {
        "tokens_per_patch": 4,
        "num_quantizers": 3,
        "codebook_size": 32,
        "codebook_dim": 12,
        "codebook_groups": 3,
        "num_basis_functions": 16,
        "descriptor_names": ["a", "b"],
        **changes,
    }
    torch.manual_seed(0)
    return FmriCodecModel(FmriCodecConfig(**values)).eval()


@pytest.fixture(scope="module")
def fitted() -> FmriCodecModel:
    model = make()
    fit_codec(model, waves(range(18)), steps=100)
    return model


def test_fit_decodes_subjects_it_never_saw_the_better_the_more_levels(fitted: FmriCodecModel) -> None:
    held_out = items(range(18, 22))
    found = [evaluate_codec(fitted, held_out, levels)["r_squared"] for levels in (1, 2, 3)]
    assert 0.4 < found[0] < found[1] < found[2] < 1 and found[2] > 0.6
    results = evaluate_codec(fitted, held_out)
    assert results["fc_correlation"] > 0.7 and len(results["perplexity"]) == 3
    # dimensions of which the summary's mean is made are those of training scans: the mean summary is zero
    features = fitted.tangent_summary.feature_mean
    assert features[:136].abs().max() < 0.02


def test_fit_depends_on_its_seed_alone_and_transformers_start_from_it(fitted: FmriCodecModel) -> None:
    again = make(num_hidden_layers=1, num_decoder_layers=1, hidden_size=16, num_attention_heads=2)
    fit_codec(again, waves(range(18)), steps=100)
    expected = fitted.state_dict()
    found = again.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items() if "head" not in name)
    scan = inputs(items(range(20, 21))[0])
    assert torch.equal(fitted.encode(*scan), again.encode(*scan))


def test_fit_of_the_grid_of_short_scans_and_of_few_vectors() -> None:
    grid = make(quantizer="fsq", fsq_levels=[8, 8, 8], num_quantizers=2)
    fit_codec(grid, waves(range(12)), steps=50)
    assert evaluate_codec(grid, items(range(18, 20)))["r_squared"] > 0.3
    few = make(codebook_size=512, patch_length=8)
    assert 0 < fit_codec(few, waves(range(1), frames=20), steps=2) <= 1
    with pytest.raises(ValueError, match="scans of at least 16 frames, got 10"):
        fit_codec(make(), waves(range(2), frames=10), steps=2)
    with pytest.raises(ValueError, match="expected training scans to fit the codec to, got none"):
        fit_codec(make(), waves(range(0)), steps=2)
    with pytest.raises(ValueError, match="at most 256 dimensions .* got tokens_per_patch=4 of codebook_dim=96"):
        fit_codec(make(codebook_dim=96), waves(range(2)), steps=2)


def test_fit_of_codes_of_whole_scans_tells_subjects_apart() -> None:
    model = make(num_scan_levels=2, num_scan_rois=ROIS)
    fit_codec(model, waves(range(18), frames=2 * FRAMES), steps=2)
    vectors = model.scan_quantizer.components
    norms = vectors.norm(dim=1)
    assert (norms > 0).all() and torch.allclose(
        (vectors @ vectors.T) / norms / norms[:, None], torch.eye(24), atol=1e-3
    )
    # both halves of six others
    items = cut_windows(waves(range(30, 36), frames=2 * FRAMES), FRAMES, FRAMES).items()
    numbers = torch.cat([model.scan_features(model.encode(*inputs(item)))[:, -24:] for item in items])
    assert (torch.cdist(numbers[::2], numbers[1::2]).argmin(1) == torch.arange(6)).all()
    with pytest.raises(ValueError, match="at least 5 windows for codes of whole scans, got 3"):
        fit_codec(model, waves(range(3)), steps=2)


def test_rois_that_were_not_measured_are_decoded_from_the_others(fitted: FmriCodecModel) -> None:
    signal, places = inputs(items(range(40, 41))[0])
    guess = fitted.decode(fitted.encode(signal[:, :18], places[:, :18]), places[:, 18:])
    assert 1 - (guess - signal[:, 18:]).pow(2).sum() / signal[:, 18:].pow(2).sum() > 0.3


def test_descriptor_head_reads_what_regions_do_together(fitted: FmriCodecModel) -> None:
    def rows(seeds: range) -> tuple[np.ndarray, np.ndarray]:
        features, targets = [], []
        for item in items(seeds):
            features.append(fitted.scan_features(fitted.encode(*inputs(item)))[0].detach().numpy())
            targets.append(np.corrcoef(item["signal"].T)[:4, 12:].mean())
        return np.stack(features), np.array(targets)

    features, targets = rows(range(100, 200))
    # the second descriptor is one that half of the scans do not have
    both = np.stack([targets, np.where(np.arange(100) % 2, np.nan, 1.0)], 1)
    with torch.no_grad():
        explained = fit_descriptor_head(fitted, features, both, np.arange(100))
        new, truth = rows(range(300, 330))
        head = fitted.descriptor_head(fitted.tangent_summary.standardise(torch.from_numpy(new)))
    assert np.corrcoef(head[:, 0].numpy(), truth)[0, 1] > 0.6 and explained[0] > 0.3
    np.testing.assert_allclose(head[:, 1].numpy(), 1, atol=1e-3)
    assert not any(parameter.requires_grad for parameter in fitted.descriptor_head.parameters())


def test_mean_of_one_window_gives_finite_summaries() -> None:
    model = make()
    fit_codec(model, waves(range(1), frames=16), steps=2)
    fit_summary(model, waves(range(1), frames=16), np.random.default_rng(0))
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_program_writes_a_codec_with_its_feature_extractor(program_folders: Path, tmp_path: Path) -> None:
    run("codec", program_folders, tmp_path, max_steps=0)
    model = FmriCodecModel.from_pretrained(tmp_path / "model")
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "model")
    assert extractor.patch_length == model.config.patch_length == 4 and extractor.atlases[0]["name"] == "net"
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["codebook_usage"]) == 2 and "fc_correlation" in results
    assert set(results["descriptor_r_squared"]) == set(model.config.descriptor_names)


def test_program_trains_with_a_language_model_on_scans_shorter_than_a_window(
    program_folders: Path, tmp_path: Path
) -> None:
    # without the language model's loss, training ends elsewhere
    for name, weight in (("with", 1.0), ("without", 0.0)):
        changes = {"alignment_weight": weight, "described_mixtures": 4, "window_length": 400, "mixtures": 0}
        model = program_folders / "language_model"
        run("codec", program_folders, tmp_path / name, max_steps=2, language_model=model, size="tiny", **changes)
    results = json.loads((tmp_path / "with" / "results.json").read_text())
    assert {"recall_at_5", "median_rank", "r_squared"} <= set(results)
    config = FmriCodecModel.from_pretrained(tmp_path / "with" / "model").config
    text_config = AutoConfig.from_pretrained(program_folders / "language_model").get_text_config()
    assert config.text_hidden_size == text_config.hidden_size
    trained = [weights(tmp_path / name)["alignment_head.scan_proj.weight"] for name in ("with", "without")]
    assert not torch.equal(*trained)


def test_each_scan_meets_the_embedding_of_its_own_text(make_language_model, tiny_tokenizer) -> None:
    model = make_language_model("llama", len(tiny_tokenizer)).model
    texts = ["A long text about the networks of a scan.", "A.", "Some words."]
    together = embed_texts(model, tiny_tokenizer, texts)
    for text, vector in zip(texts, together, strict=True):
        np.testing.assert_allclose(embed_texts(model, tiny_tokenizer, [text])[0], vector, atol=1e-5)
    items = program.DescribedItems([{"signal": number} for number in range(3)], together, 5)
    assert len(items) == 5 and items[4]["signal"] == 1 and np.array_equal(items[4]["text_embedding"], together[1])
    found = retrieval_results(np.eye(4), np.eye(4))
    assert (found["recall_at_1"], found["median_rank"], found["retrieval_texts"]) == (1, 1, 4)
    # a text that all others are nearer to
    assert retrieval_results(np.eye(4)[::-1], np.eye(4))["recall_at_1"] == 0


def test_training_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_steps of at least 0, got -1"):
        CodecTrainingArguments(output_dir=str(tmp_path), max_steps=-1)
