"""Codes of a scan as a whole: which scans have them, what they depend on, and what reads them."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from nilearn.connectome import ConnectivityMeasure
from sklearn.base import BaseEstimator

from fmrilm import FmriCodecConfig, FmriCodecModel, FmriLMForConditionalGeneration


ROIS = 6
FURTHER = {"num_scan_levels": 2, "num_scan_rois": ROIS}


@pytest.fixture
def codec(make_codec: Callable[..., FmriCodecModel]) -> FmriCodecModel:
    """With codes of scans in `places`; its components are random."""
    return with_components(make_codec(**FURTHER))


def with_components(codec: FmriCodecModel) -> FmriCodecModel:
    generator = torch.Generator().manual_seed(0)
    quantizer = codec.scan_quantizer
    assert quantizer is not None
    quantizer.coordinates.copy_(places())
    quantizer.components.copy_(torch.randn(quantizer.components.shape, generator=generator))
    return codec


def places() -> torch.Tensor:
    return 20 * torch.arange(ROIS)[:, None].float() + torch.tensor([0.0, 5.0, 10.0])


def scans(count: int = 3, time: int = 16, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(count, ROIS, ROIS, generator=generator)
    values = mixing @ torch.randn(count, ROIS, time, generator=generator)
    return {"fmri_values": values, "roi_coordinates": places().repeat(count, 1, 1)}


def test_every_patch_holds_the_codes_of_its_scan(codec: FmriCodecModel, make_codec) -> None:
    codes = codec.encode(**scans())
    assert codes.shape == (3, 8, 5) and codes.dtype == torch.int64
    own = codes[..., 3:].unflatten(1, (4, 2))
    assert (own == own[:, :1]).all() and (own >= 0).all() and len(own.unique()) > 6
    # the other levels are those of a codec without
    plain = make_codec()
    assert torch.equal(codes[..., :3], plain.encode(**scans()))
    there = scans()["roi_coordinates"]
    assert torch.equal(codec.decode(codes, there), plain.decode(codes[..., :3], there))
    outputs = codec(**scans())
    assert torch.equal(outputs.codes, codes) and outputs.perplexity.shape == (3,)
    assert not torch.equal(codec.encode(**scans(seed=2))[..., 3:], codes[..., 3:])


def test_order_of_rois_padding_and_neighbouring_scans_do_not_matter(codec: FmriCodecModel) -> None:
    inputs, expected = scans(), codec.encode(**scans())
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = {name: value[:, order] for name, value in inputs.items()}
    # in another program's table, centres differ by a millimetre
    permuted["roi_coordinates"] = permuted["roi_coordinates"] + 1
    assert torch.equal(codec.encode(**permuted)[..., 3:], expected[..., 3:])
    padded = torch.zeros(3, ROIS + 2, 24)
    padded[:, :ROIS, :16] = inputs["fmri_values"]
    mask = torch.zeros(3, ROIS + 2, 24, dtype=torch.bool)
    mask[:, :ROIS, :16] = True
    coordinates = torch.nn.functional.pad(inputs["roi_coordinates"], (0, 0, 0, 2))
    found = codec.encode(padded, coordinates, mask)
    assert torch.equal(found[:, :8], expected) and (found[:, 8:] == -1).all()
    alone = codec.encode(inputs["fmri_values"][1:2], inputs["roi_coordinates"][1:2])
    assert torch.equal(alone, expected[1:2])


def test_scan_of_other_rois_has_none_and_is_read_as_an_average_one(codec: FmriCodecModel) -> None:
    inputs = scans()
    inputs["roi_coordinates"][0] += 30
    codes, numbers = codec.encode(**inputs), codec.config.num_scan_numbers
    assert (codes[0, :, 3:] == -1).all() and (codes[0, :, :3] >= 0).all() and (codes[1:] >= 0).all()
    features = codec.scan_features(codes)
    assert features.shape == (3, codec.config.num_scan_features) and numbers == 12
    assert not features[0, -numbers:].any() and features[1:, -numbers:].any(1).all()
    # a prefix of the levels has none either
    prefix = codec.scan_features(codes[..., :2])
    assert not prefix[:, -numbers:].any() and prefix[:, :-numbers].isfinite().all()
    with pytest.raises(ValueError, match="expected codes of 1 to 3 or 5 levels, got 4"):
        codec.decode(codes[..., :4], inputs["roi_coordinates"])


def test_missing_roi_is_what_the_others_predict(codec: FmriCodecModel) -> None:
    quantizer, inputs = codec.scan_quantizer, scans(1)
    assert quantizer is not None
    whole, there = quantizer.correlations(inputs["fmri_values"], inputs["roi_coordinates"], None)
    assert there.all() and torch.allclose(quantizer.completed(whole, there), whole, atol=1e-5)
    # a scan that is as training scans are on average: the regression gives back what was taken away
    quantizer.mean.copy_(whole[0])
    known = torch.ones(1, ROIS, 16, dtype=torch.bool)
    known[0, 2] = False
    part, there = quantizer.correlations(inputs["fmri_values"], inputs["roi_coordinates"], known)
    assert there.tolist() == [[True, True, False, True, True, True]] and not part[0, 2].any()
    assert torch.allclose(quantizer.completed(part, there), whole, atol=1e-4)
    # one that does not move, or is masked, whatever stands there, says no more than one that is missing
    expected = codec.encode(inputs["fmri_values"], inputs["roi_coordinates"], known)[..., 3:]
    other = inputs["fmri_values"].clone()
    for value in (1.5, 1 / 3, 5.7, 0.0):
        other[0, 2] = value
        assert torch.equal(codec.encode(other, inputs["roi_coordinates"])[..., 3:], expected)
    other[0, 2] = torch.nan
    assert torch.equal(codec.encode(other, inputs["roi_coordinates"], known)[..., 3:], expected)
    # less than half of the ROIs
    known[0, 1:] = False
    assert (codec.encode(**inputs, fmri_mask=known)[..., 3:] == -1).all()


def test_tangent_vectors_equal_those_of_nilearn(codec: FmriCodecModel) -> None:
    class Shrunk(BaseEstimator):
        def fit(self, series):
            self.covariance_ = 0.7 * np.corrcoef(series.T) + 0.3 * np.eye(ROIS)
            return self

    inputs = scans(8, time=40)
    measure = ConnectivityMeasure(Shrunk(), kind="tangent", vectorize=True, standardize=False)
    expected = measure.fit_transform([series.T.numpy() for series in inputs["fmri_values"]])
    quantizer = codec.scan_quantizer
    assert quantizer is not None
    quantizer.whitening.copy_(torch.from_numpy(measure.whitening_))
    found = quantizer.tangent(quantizer.correlations(*inputs.values(), None)[0])
    assert np.allclose(found, expected, atol=1e-4)


def test_codes_are_the_nearest_of_a_grid(codec: FmriCodecModel) -> None:
    quantizer, inputs = codec.scan_quantizer, scans(20)
    assert quantizer is not None
    codes = codec.encode(**inputs)
    numbers = quantizer.tangent(quantizer.correlations(*inputs.values(), None)[0]) @ quantizer.components.T
    decoded = codec.scan_features(codes)[:, -12:]
    assert len(decoded.unique()) <= 8 and decoded.abs().max() <= 1
    for column, value in zip(decoded.T, numbers.T, strict=True):
        order = value.argsort()
        assert (column[order].diff() >= 0).all()


def test_saved_codec_gives_the_same_codes(codec: FmriCodecModel, tmp_path) -> None:
    codec.save_pretrained(tmp_path)
    loaded = FmriCodecModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(loaded.encode(**scans()), codec.encode(**scans()))
    # before a fit, no scan has any
    unfitted = FmriCodecModel(codec.config).eval()
    assert (unfitted.encode(**scans())[..., 3:] == -1).all()
    with pytest.raises(ValueError, match="num_scan_levels and num_scan_rois, or neither, got 2 and 0"):
        FmriCodecConfig(num_scan_levels=2)


def test_next_codes_are_those_of_patches_alone(joined: Callable, make_language_model: Callable, processor) -> None:
    language_model = make_language_model("llama", len(processor.tokenizer))
    model: FmriLMForConditionalGeneration = joined(language_model, **FURTHER)
    codec = with_components(model.model.codec)
    codes = codec.encode(**scans(1))
    other = codes.clone()
    other[..., 3:] = 7
    assert model.surprise(codes).shape == (1, 4, 3)
    assert torch.equal(model.surprise(codes).nan_to_num(), model.surprise(other).nan_to_num())
    text = processor.scan_text(8) + "Female."
    inputs = processor.tokenizer(text, return_tensors="pt")
    first, second = (
        model(**inputs, labels=inputs["input_ids"], fmri_codes=each, fmri_scores=torch.zeros(1, 2))
        for each in (codes, other)
    )
    assert torch.equal(first.fmri_level_losses, second.fmri_level_losses) and torch.equal(first.logits, second.logits)
    assert not torch.equal(model.model.get_fmri_scores(codes), model.model.get_fmri_scores(other))


def test_encode_compiles_to_one_graph(codec: FmriCodecModel) -> None:
    compiled = torch.compile(codec.encode, backend="eager", fullgraph=True)
    assert torch.equal(compiled(**scans()), codec.encode(**scans()))
