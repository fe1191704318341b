"""The joint model: equal to its backbone on text, consistent over batches and padding, and its losses."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

from fmrilm import FmriLMForConditionalGeneration
from fmrilm.steps_fmrilm import positions, step_ids
from scan_rows import BACKBONES, LONG, SHORT, codes, expected_code_logits, ids, pad


Model = FmriLMForConditionalGeneration


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_text_alone_gives_the_backbones_logits(
    backbone: str, tied: bool, tiny_model, make_language_model, processor
) -> None:
    joint = tiny_model(backbone, tied)
    plain = make_language_model(backbone, len(processor.tokenizer), tied)
    plain.base_model.load_state_dict(joint.model.language_model.state_dict())
    plain.get_output_embeddings().load_state_dict(joint.lm_head.state_dict())
    assert (joint.lm_head.weight is joint.get_input_embeddings().weight) == tied
    inputs = {"input_ids": ids(joint, "what is a brain?").repeat(2, 1)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, :4] = 0
    # GPT-2 alone does not count its positions from the mask
    given = {"position_ids": positions(torch.zeros_like(inputs["input_ids"]), inputs["attention_mask"])}
    assert torch.equal(joint(**inputs).logits, plain(**inputs, **given).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_joining_keeps_the_pretrained_weights(tied: bool, tiny_model, make_language_model, processor) -> None:
    old = make_language_model("qwen3", len(processor.tokenizer) - 3, tied)
    joint = tiny_model("qwen3", tied)
    count = len(processor.tokenizer) - 3
    inputs = ids(joint, "text")
    assert torch.allclose(joint(inputs).logits[..., :count], old(inputs).logits, atol=1e-6)
    embeddings = joint.get_input_embeddings().weight
    assert torch.allclose(embeddings[-3:], embeddings[:-3].mean(0).expand(3, -1), atol=1e-6)
    assert torch.allclose(joint.model.boundaries.weight, embeddings.mean(0).expand(2, -1), atol=1e-6)


def test_projected_codes_have_the_size_of_word_embeddings(llama: Model) -> None:
    features = llama.model.get_fmri_features(codes(LONG))
    size = llama.get_input_embeddings().weight.pow(2).mean().sqrt()
    assert torch.allclose(features.pow(2).mean().sqrt(), size, rtol=0.05)
    # codes 1 stand in slots of both kinds
    assert not torch.allclose(features[1], llama.model.get_fmri_features(codes([1, 1]))[0], atol=1e-2)
    assert torch.allclose(features[1], llama.model.get_fmri_features(codes([9, 1]))[1], atol=1e-5)


def test_steps_and_positions_of_a_row() -> None:
    row = torch.tensor([[0, 0, 7, 5, 5, 5, 5, 8, 1, 7, 5, 5, 8, 2]])
    mask = torch.ones_like(row)
    mask[:, :2] = 0
    steps = step_ids(row, fmri_token_id=5, tokens_per_step=2)
    assert steps.tolist() == [[0, 0, 0, 1, 1, 2, 2, 0, 0, 0, 3, 3, 0, 0]]
    assert positions(steps, mask).tolist() == [[0, 0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 6, 7, 8]]


def test_model_counts_steps_by_its_own_configuration(llama: Model) -> None:
    assert llama.model.step_ids(ids(llama, "a", SHORT, "b")).tolist() == [[0, 0, 1, 1, 2, 2, 0, 0]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_mates_and_padding_change_nothing(model: Model, side: str) -> None:
    rows = [ids(model, "a", LONG, "some question"), ids(model, SHORT, "b", LONG, "c"), ids(model, "only text")]
    scans = [[LONG], [SHORT, LONG], []]
    batch = pad(rows, side)
    logits = model(**batch, fmri_codes=codes(*sum(scans, []))).logits
    for index, (row, own) in enumerate(zip(rows, scans, strict=True)):
        alone = model(row, fmri_codes=codes(*own) if own else None).logits[0]
        assert torch.allclose(logits[index, batch["attention_mask"][index].bool()], alone, atol=1e-5)


def test_later_text_leaves_earlier_logits_unchanged(model: Model) -> None:
    first, second = ids(model, "ab", LONG, "cde"), ids(model, "ab", LONG, "cXe")
    before, after = (model(row, fmri_codes=codes(LONG)).logits[0] for row in (first, second))
    place = first.shape[1] - 2
    assert torch.equal(before[:place], after[:place])
    assert not torch.allclose(before[place:], after[place:], atol=1e-3)


def test_steps_are_causal_and_open_inside(model: Model) -> None:
    row = ids(model, "ab", LONG, "cd")
    changed = LONG[:5] + [0] + LONG[6:]
    before, after = (model(row, fmri_codes=codes(scan)).logits[0] for scan in (LONG, changed))
    # the second slot of the third step stands behind "ab", the start token and two steps
    slot = 3 + 5
    assert torch.equal(before[: slot - 1], after[: slot - 1])
    # the first slot of that step sees it
    assert not torch.allclose(before[slot - 1], after[slot - 1], atol=1e-4)
    assert not torch.allclose(before[slot + 1 :], after[slot + 1 :], atol=1e-4)


def test_scans_go_to_their_own_places(llama: Model) -> None:
    row = ids(llama, "a", LONG, "b", LONG, "c")
    other = LONG[::-1]
    first, second = (llama(row, fmri_codes=codes(*scans)).logits for scans in ((LONG, other), (other, LONG)))
    assert not torch.allclose(first, second, atol=1e-3)
    # until the second scan begins, only the first one counts
    begin = 1 + 10 + 1
    alone = llama(row[:, :begin], fmri_codes=codes(LONG)).logits
    assert torch.allclose(first[:, :begin], alone, atol=1e-5)


def test_scans_and_their_codes_are_the_same_input(model: Model) -> None:
    torch.manual_seed(0)
    scan = {"fmri_values": torch.randn(2, 5, 16), "roi_coordinates": 60 * torch.randn(2, 5, 3)}
    scan["fmri_mask"] = torch.ones(2, 5, 16, dtype=torch.bool)
    scan["fmri_mask"][0, :, 8:] = False
    inputs = pad([ids(model, SHORT, "a"), ids(model, LONG, "b")], "left")
    encoded = model.model.get_fmri_codes(**scan)
    assert (encoded >= 0).sum(-1).tolist() == [4, 8]
    from_values = model(**inputs, **scan).logits
    assert torch.equal(from_values, model(**inputs, fmri_codes=encoded).logits)
    assert torch.equal(
        model.generate(**inputs, **scan, max_new_tokens=5, do_sample=False),
        model.generate(**inputs, fmri_codes=encoded, max_new_tokens=5, do_sample=False),
    )
    hidden = model.model(**inputs, **scan).last_hidden_state
    assert torch.equal(model.lm_head(hidden), from_values)


@pytest.mark.parametrize(
    ("scans", "message"),
    [
        ((LONG, SHORT), "expected 12 fMRI placeholder tokens for the scans, got 8"),
        ((SHORT,), "expected 4 fMRI placeholder tokens for the scans, got 8"),
        ((), "expected 0 fMRI placeholder tokens for the scans, got 8"),
    ],
)
def test_placeholders_and_codes_must_match(llama: Model, scans: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llama(ids(llama, "a", LONG), fmri_codes=codes(*scans) if scans else None)


def test_scan_without_any_placeholder_is_refused(llama: Model) -> None:
    with pytest.raises(ValueError, match="expected 4 fMRI placeholder tokens for the scans, got 0"):
        llama(ids(llama, "text"), fmri_codes=codes(SHORT))


def test_ids_or_embeddings_are_needed_and_not_both(llama: Model) -> None:
    row = ids(llama, "text")
    embeddings = llama.get_input_embeddings()(row)
    for inputs in ({}, {"input_ids": row, "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="both or neither"):
            llama(**inputs)
    with pytest.raises(ValueError, match="inputs_embeds and scans"):
        llama(inputs_embeds=embeddings, fmri_codes=codes(SHORT))
    assert torch.equal(llama(inputs_embeds=embeddings).logits, llama(row).logits)


def test_text_loss_is_transformers_own(model: Model) -> None:
    inputs = pad([ids(model, "a", LONG, "answer"), ids(model, SHORT, "b", LONG, "c")], "right")
    scans = codes(LONG, SHORT, LONG)
    labels = inputs["input_ids"].masked_fill(model.model.step_ids(inputs["input_ids"]) > 0, -100)
    labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :2] = -100
    outputs = model(**inputs, fmri_codes=scans, labels=labels)
    vocabulary = model.config.text_config.vocab_size
    expected = model.loss_function(logits=outputs.logits, labels=labels, vocab_size=vocabulary)
    assert torch.allclose(outputs.text_loss, expected, atol=1e-6)
    weight = model.config.fmri_loss_weight
    assert weight > 0 and torch.allclose(outputs.loss, expected + weight * outputs.fmri_loss, atol=1e-6)
    # in training, the vocabulary meets labelled tokens alone, and the loss is the same
    training = model.train()(**inputs, fmri_codes=scans, labels=labels)
    assert training.logits is None and torch.allclose(training.loss, outputs.loss, atol=1e-6)


def test_loss_of_text_alone_is_the_backbones(model: Model) -> None:
    row = ids(model, "plain text")
    outputs = model(row, labels=row, num_items_in_batch=30)
    vocabulary = model.config.text_config.vocab_size
    expected = model.loss_function(logits=outputs.logits, labels=row, vocab_size=vocabulary, num_items_in_batch=30)
    assert outputs.fmri_loss is None and torch.allclose(outputs.loss, expected, atol=1e-6)


def test_parts_of_an_accumulated_batch_add_up_to_its_loss(llama: Model) -> None:
    rows = [ids(llama, LONG, "answer"), ids(llama, LONG[::-1], "answer")]
    scans = codes(LONG, LONG[::-1])
    labels = [row.masked_fill(llama.model.step_ids(row) > 0, -100) for row in rows]
    items = sum(int((label[:, 1:] != -100).sum()) for label in labels)
    whole = llama(torch.cat(rows), fmri_codes=scans, labels=torch.cat(labels)).loss
    parts = [
        llama(row, fmri_codes=scan[None], labels=label, num_items_in_batch=items).loss
        for row, scan, label in zip(rows, scans, labels, strict=True)
    ]
    assert torch.allclose(sum(parts), whole, atol=1e-5)


def test_next_step_loss_equals_an_explicit_loop(model: Model) -> None:
    inputs = pad([ids(model, "a", LONG, "b"), ids(model, SHORT, "c", SHORT[::-1])], "left")
    scans = [LONG, SHORT, SHORT[::-1]]
    outputs = model(**inputs, fmri_codes=codes(*scans), labels=inputs["input_ids"])
    hidden = model.model(**inputs, fmri_codes=codes(*scans)).last_hidden_state
    states = hidden[inputs["input_ids"] == model.config.fmri_token_id]
    losses, place = [], 0
    for scan in scans:
        for token in range(len(scan)):
            if token + 2 < len(scan):
                scores = expected_code_logits(model, states[place], scan, token).log_softmax(-1)
                losses.append(-scores[scan[token + 2]])
            place += 1
    assert place == len(states) and len(losses) == 6 + 2 + 2
    assert torch.allclose(outputs.fmri_loss, torch.stack(losses).mean(), atol=1e-5)


def test_scan_of_one_step_has_no_next_step_loss(llama: Model) -> None:
    row = ids(llama, [3, 1], "text")
    outputs = llama(row, fmri_codes=codes([3, 1]), labels=row)
    assert outputs.fmri_loss == 0 and outputs.loss == outputs.text_loss


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_saved_model_is_the_same_model(backbone: str, tied: bool, tiny_model, tmp_path) -> None:
    model = tiny_model(backbone, tied)
    model.save_pretrained(tmp_path)
    row, scan = ids(model, "a", LONG, "b"), codes(LONG)
    expected = model(row, fmri_codes=scan).logits
    for auto in (FmriLMForConditionalGeneration, AutoModelForMultimodalLM, AutoModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is FmriLMForConditionalGeneration
        assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
        assert torch.equal(loaded(row, fmri_codes=scan).logits, expected)
        state = model.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
        frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
        assert frozen == {name for name, value in loaded.named_parameters() if not value.requires_grad} != set()
    assert loaded.generation_config.suppress_tokens == model.generation_config.suppress_tokens


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_vocabulary_can_grow_and_be_saved(backbone: str, tied: bool, tiny_model, tmp_path) -> None:
    model = tiny_model(backbone, tied)
    row, scan = ids(model, "a", LONG, "b"), codes(LONG)
    before = model(row, fmri_codes=scan).logits
    size = before.shape[-1]
    model.resize_token_embeddings(size + 5, mean_resizing=False)
    assert model.config.text_config.vocab_size == size + 5
    after = model(row, fmri_codes=scan).logits
    assert after.shape[-1] == size + 5 and torch.allclose(after[..., :size], before, atol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = FmriLMForConditionalGeneration.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    assert torch.equal(loaded(row, fmri_codes=scan).logits, after)


def test_eager_and_sdpa_attention_agree(model: Model) -> None:
    row, scan = ids(model, "ab", LONG, "c"), codes(LONG)
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    assert other.model.language_model.config._attn_implementation == "eager"
    assert model.model.language_model.config._attn_implementation == "sdpa"
    assert torch.allclose(model(row, fmri_codes=scan).logits, other(row, fmri_codes=scan).logits, atol=1e-5)


def test_codec_and_autoregression_are_frozen_and_the_rest_learns(llama: Model) -> None:
    row = ids(llama, "a", LONG, "b")
    before = copy.deepcopy(llama.model.codec.state_dict())
    llama.train()(row, fmri_codes=codes(LONG), labels=row).loss.backward()
    for name, parameter in llama.named_parameters():
        frozen = name.startswith(("model.codec.", "fmri_autoregression."))
        assert (parameter.grad is None) == frozen, name
    assert all(torch.equal(value, before[name]) for name, value in llama.model.codec.state_dict().items())
