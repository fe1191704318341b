"""The joint model on continuous features in place of codes."""


import pytest
import torch

from fmrilm import FmriLMConfig, FmriLMForConditionalGeneration
from scan_rows import LONG, SHORT, codes, ids, pad


Model = FmriLMForConditionalGeneration


@pytest.fixture
def reader(model: Model) -> Model:
    """A model that reads continuous features."""
    model.config.fmri_input = "features"
    return model


def scans_of(*steps: int) -> dict[str, torch.Tensor]:
    """Random scans of so many steps, padded to the longest."""
    torch.manual_seed(0)
    shape = len(steps), 5, 4 * max(steps)
    mask = torch.arange(shape[2]) < 4 * torch.tensor(steps)[:, None, None]
    return {
        "fmri_values": torch.randn(shape) * mask,
        "roi_coordinates": 60 * torch.randn(len(steps), 5, 3),
        "fmri_mask": mask.expand(shape),
    }


def test_features_are_what_codes_round(tiny_codec) -> None:
    scans = scans_of(4, 2)
    features, valid = tiny_codec.encode_features(**scans)
    assert features.shape == (2, 8, 8) and valid.sum(-1).tolist() == [8, 4]
    codes = tiny_codec.encode(**scans)
    assert torch.equal(tiny_codec.quantizer.encode(features)[valid], codes[valid])
    assert not torch.allclose(features[valid], tiny_codec.embed_codes(codes[valid]), atol=1e-2)


def test_features_that_are_codebook_vectors_read_like_codes(model: Model) -> None:
    inputs = pad([ids(model, SHORT, "b", LONG, "c"), ids(model, "a", SHORT)], "left")
    scans = codes(SHORT, LONG, SHORT[::-1])
    features = model.model.codec.embed_codes(scans.clamp(min=0)).masked_fill(scans[..., None] < 0, float("nan"))
    from_codes = model(**inputs, fmri_codes=scans, labels=inputs["input_ids"])
    model.config.fmri_input = "features"
    from_features = model(**inputs, fmri_features=features, fmri_codes=scans, labels=inputs["input_ids"])
    for name in ("logits", "text_loss", "fmri_loss", "loss"):
        assert torch.equal(from_codes[name], from_features[name]), name


def test_scans_and_their_features_are_the_same_input(reader: Model) -> None:
    inputs, scans = pad([ids(reader, SHORT, "a"), ids(reader, LONG, "b")], "left"), scans_of(2, 4)
    features = reader.model.read_scans(**scans)
    assert features.isnan().any(-1).sum(-1).tolist() == [4, 0]
    encoded = reader.model.get_fmri_codes(**scans)
    options = {**inputs, "labels": inputs["input_ids"]}
    from_values = reader(**options, **scans)
    from_features = reader(**options, fmri_features=features, fmri_codes=encoded)
    assert torch.equal(from_values.logits, from_features.logits)
    assert from_values.fmri_loss > 0 and torch.equal(from_values.loss, from_features.loss)
    # without codes, features have no next step to be scored on
    assert reader(**options, fmri_features=features).fmri_loss is None
    reader.config.fmri_input = "codes"
    assert not torch.allclose(reader(**inputs, **scans).logits, from_values.logits, atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_features_of_batch_mates_and_padding_change_nothing(reader: Model, side: str) -> None:
    batch, scans = pad([ids(reader, SHORT, "some question"), ids(reader, "b", LONG)], side), scans_of(2, 4)
    logits = reader(**batch, **scans).logits
    short = {name: value[:1, ..., :8] for name, value in scans.items()}
    long = {name: value[1:] for name, value in scans.items()}
    for index, (row, own) in enumerate(((ids(reader, SHORT, "some question"), short), (ids(reader, "b", LONG), long))):
        alone = reader(row, **own).logits[0]
        assert torch.allclose(logits[index, batch["attention_mask"][index].bool()], alone, atol=1e-5)


def test_every_way_of_generating_reads_features_alike(reader: Model) -> None:
    inputs, scans = pad([ids(reader, SHORT, "a", LONG), ids(reader, LONG, "b")], "left"), scans_of(2, 4, 4)
    features = reader.model.read_scans(**scans)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    static = {"cache_implementation": "static", "disable_compile": True}
    cached, *others = (
        reader.generate(**inputs, **given, **options, **more)
        for given, more in (
            (scans, {}),
            (scans, {"use_cache": False}),
            (scans, static),
            ({"fmri_features": features}, {}),
        )
    )
    assert all(torch.equal(cached, other) for other in others)
    beams = reader.generate(**inputs, **scans, **options, num_beams=3)
    alone = reader.generate(ids(reader, LONG, "b"), fmri_features=features[2:], **options, num_beams=3)
    assert torch.equal(beams[1, -5:], alone[0, -5:])


def test_choices_after_features_are_scored_by_their_log_likelihoods(reader: Model) -> None:
    row, scans, choices = ids(reader, "a", LONG, "question"), scans_of(4), [[20, 21, 22], [30], [20, 50]]
    scores = reader.score_choices({"input_ids": row, **scans}, choices)
    for choice, score in zip(choices, scores[0], strict=True):
        logits = reader(torch.cat([row, torch.tensor([choice])], -1), **scans).logits[0].log_softmax(-1)
        expected = sum(logits[row.shape[1] - 1 + place, token] for place, token in enumerate(choice))
        assert torch.allclose(score, expected, atol=1e-4)


def test_input_of_the_other_kind_is_refused(llama: Model) -> None:
    features = llama.model.codec.embed_codes(codes(LONG))
    with pytest.raises(ValueError, match='fmri_input="codes", got fmri_features'):
        llama(ids(llama, LONG), fmri_features=features)
    llama.config.fmri_input = "features"
    with pytest.raises(ValueError, match="expected fmri_values or fmri_features.*got fmri_codes"):
        llama(ids(llama, LONG), fmri_codes=codes(LONG))
    with pytest.raises(ValueError, match="expected 8 fMRI placeholder tokens for the scans, got 4"):
        llama(ids(llama, SHORT), fmri_features=features)
    with pytest.raises(ValueError, match="inputs_embeds and scans"):
        llama(inputs_embeds=torch.zeros(1, 8, 32), fmri_features=features)
    with pytest.raises(ValueError, match="\"codes\" or \"features\", got 'tokens'"):
        FmriLMConfig(fmri_input="tokens")


def test_saved_model_reads_features_again(reader: Model, tmp_path) -> None:
    reader.save_pretrained(tmp_path)
    loaded = FmriLMForConditionalGeneration.from_pretrained(tmp_path)
    row, scans = ids(reader, LONG, "a"), scans_of(4)
    assert loaded.config.fmri_input == "features"
    assert torch.allclose(loaded(row, **scans).logits, reader(row, **scans).logits, atol=1e-5)
