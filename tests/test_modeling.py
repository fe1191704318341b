"""The joint model: what becomes of scans, what a place depends on, and its losses."""

import pytest
import torch
import torch.nn.functional as F

from fmrilm import FmriLMForConditionalGeneration
from scan_rows import LONG, SHORT, Model, code_logits, codes, ids, pad, text_labels


@pytest.mark.parametrize("tied", [True, False])
def test_joining_keeps_the_pretrained_weights(tied: bool, tiny_model, make_language_model, processor) -> None:
    count = len(processor.tokenizer) - 4
    old, joint = make_language_model("qwen3", count, tied), tiny_model("qwen3", tied)
    assert (joint.get_output_embeddings().weight is joint.get_input_embeddings().weight) == tied
    inputs = ids(joint, "text")
    assert torch.allclose(joint(inputs).logits[..., :count], old(inputs).logits, atol=1e-6)
    embeddings = joint.get_input_embeddings().weight
    assert torch.allclose(embeddings[count : count + 4], embeddings[:count].mean(0).expand(4, -1), atol=1e-6)
    assert torch.allclose(joint.model.start_end_embeddings.weight, embeddings.mean(0).expand(2, -1), atol=1e-6)


def test_codes_become_embeddings_by_their_vectors_and_their_place_in_the_patch(llama: Model) -> None:
    codec, features = llama.model.codec, llama.model.get_fmri_features(codes(LONG))
    places = torch.arange(8) % 2
    expected = llama.model.projector(codec.embed_codes(codes(LONG))[0], places)
    assert torch.equal(features, expected)
    assert not torch.allclose(features[1], llama.model.get_fmri_features(codes([LONG[1], LONG[1]]))[0], atol=1e-4)
    assert torch.allclose(features[1], llama.model.get_fmri_features(codes([LONG[0], LONG[1]]))[1], atol=1e-6)


def test_embeddings_hold_text_ends_tokens_and_scores_in_their_places(llama: Model) -> None:
    scores = torch.tensor([[0.5, -1.0], [2.0, 0.0]])
    embeddings = llama.model.embed(
        ids(llama, "a", SHORT, "b", SHORT), fmri_codes=codes(SHORT, SHORT), fmri_scores=scores
    )
    words = llama.get_input_embeddings()(ids(llama, "a", "b"))[0]
    start, end = llama.model.start_end_embeddings.weight
    tokens, summaries = llama.model.get_fmri_features(codes(SHORT)), llama.model.summary(scores)
    expected = []
    for word, summary in zip(words, summaries, strict=True):
        expected += [word[None], start[None], tokens, summary, end[None]]
    assert torch.equal(embeddings[0], torch.cat(expected))
    # the projection of scores is linear
    assert torch.allclose(
        llama.model.summary(2 * scores) - summaries, summaries - llama.model.summary(0 * scores), atol=1e-5
    )


def test_scores_given_are_those_read_out_of_the_codes(model: Model) -> None:
    row = ids(model, "a", LONG, "b", SHORT, "c")
    scores = model.model.get_fmri_scores(codes(LONG, SHORT))
    # padding of a scan does not count
    assert torch.allclose(scores[1:], model.model.get_fmri_scores(codes(SHORT)), atol=1e-5)
    logits = model(row, fmri_codes=codes(LONG, SHORT)).logits
    assert torch.equal(model(row, fmri_codes=codes(LONG, SHORT), fmri_scores=scores).logits, logits)
    other = model(row, fmri_codes=codes(LONG, SHORT), fmri_scores=scores + torch.tensor([[0.0], [1.0]])).logits
    summary = 1 + 12 + 1 + 1 + len(SHORT)
    assert torch.equal(other[:, :summary], logits[:, :summary])
    assert not torch.allclose(other[:, summary:], logits[:, summary:], atol=1e-3)


def test_scores_given_beside_signals_count_with_labels_and_without(llama: Model) -> None:
    scan = {"fmri_values": torch.randn(1, 5, 8), "roi_coordinates": 30 * torch.randn(1, 5, 3)}
    row = ids(llama, "a", llama.model.get_fmri_codes(**scan)[0].tolist(), "b")
    given = {**scan, "fmri_scores": torch.full((1, 2), 5.0)}
    assert not torch.allclose(llama(row, **given).logits, llama(row, **scan).logits, atol=1e-3)
    assert torch.equal(llama(row, **given, labels=row).logits, llama(row, **given).logits)


def test_what_comes_later_leaves_earlier_logits_unchanged(model: Model) -> None:
    row = ids(model, "ab", LONG, "cd")
    # the scores of a scan are behind its tokens; with scores given, a token changes what follows it alone
    scores = torch.zeros(1, 2)
    before = model(row, fmri_codes=codes(LONG), fmri_scores=scores).logits[0]
    changed = codes([*LONG[:5], [0, 0, 0], *LONG[6:]])
    after = model(row, fmri_codes=changed, fmri_scores=scores).logits[0]
    place = 2 + 1 + 5
    assert torch.equal(before[:place], after[:place])
    assert not torch.allclose(before[place:], after[place:], atol=1e-4)


def test_scans_go_to_their_own_places(llama: Model) -> None:
    row, other = ids(llama, "a", LONG, "b", LONG, "c"), LONG[::-1]
    first, second = (llama(row, fmri_codes=codes(*scans)).logits for scans in ((LONG, other), (other, LONG)))
    assert not torch.allclose(first, second, atol=1e-3)
    # until the second scan begins, only the first one counts
    begin = 1 + 12 + 1
    assert torch.allclose(first[:, :begin], llama(row[:, :begin], fmri_codes=codes(LONG)).logits, atol=1e-5)


def test_scans_and_their_codes_are_the_same_input(model: Model) -> None:
    torch.manual_seed(0)
    scan = {"fmri_values": torch.randn(2, 5, 16), "roi_coordinates": 60 * torch.randn(2, 5, 3)}
    scan["fmri_mask"] = torch.ones(2, 5, 16, dtype=torch.bool)
    scan["fmri_mask"][0, :, 8:] = False
    inputs = pad([ids(model, SHORT, "a"), ids(model, LONG, "b")], "left")
    encoded = model.model.get_fmri_codes(**scan)
    assert (encoded[..., 0] >= 0).sum(-1).tolist() == [4, 8]
    from_values = model(**inputs, **scan).logits
    assert torch.equal(from_values, model(**inputs, fmri_codes=encoded).logits)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(
        model.generate(**inputs, **scan, **options), model.generate(**inputs, fmri_codes=encoded, **options)
    )
    hidden = model.model(**inputs, **scan).last_hidden_state
    assert torch.equal(model.get_output_embeddings()(hidden), from_values)
    # losses of codes need the codes
    assert model(**inputs, **scan, labels=inputs["input_ids"]).fmri_loss.isfinite()


@pytest.mark.parametrize(
    ("end", "scans", "message"),
    [
        (None, (LONG, SHORT), "expected 12 fMRI placeholder tokens for the scans, got 8"),
        (None, (SHORT,), "expected 4 fMRI placeholder tokens for the scans, got 8"),
        (None, (), "expected 0 fMRI placeholder tokens for the scans, got 8"),
        # cut off before the scan and within it
        (1, (LONG,), "expected 8 fMRI placeholder tokens for the scans, got 0"),
        (-2, (LONG,), "4 summary tokens .*, got 3"),
    ],
)
def test_placeholders_and_codes_must_match(llama: Model, end: int | None, scans: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llama(ids(llama, "a", LONG)[:, :end], fmri_codes=codes(*scans) if scans else None)


def test_ids_or_embeddings_are_needed_and_not_both(llama: Model) -> None:
    row = ids(llama, "text")
    embeddings = llama.get_input_embeddings()(row)
    for inputs in ({}, {"input_ids": row, "inputs_embeds": embeddings}):
        with pytest.raises(ValueError, match="both or neither"):
            llama(**inputs)
    with pytest.raises(ValueError, match="inputs_embeds and scans"):
        llama(inputs_embeds=embeddings, fmri_codes=codes(SHORT))
    assert torch.equal(llama(inputs_embeds=embeddings).logits, llama(row).logits)


def test_text_loss_is_transformers_own_and_shifted_labels_are_honoured(model: Model) -> None:
    inputs = pad([ids(model, "a", LONG, "answer"), ids(model, SHORT, "b", LONG, "c")], "right")
    scans, labels = codes(LONG, SHORT, LONG), text_labels(model, inputs)
    labels[:, :2] = -100
    outputs = model(**inputs, fmri_codes=scans, labels=labels)
    vocabulary = model.config.text_config.vocab_size
    expected = model.loss_function(logits=outputs.logits, labels=labels, vocab_size=vocabulary)
    assert torch.allclose(outputs.text_loss, expected, atol=1e-6)
    weight = model.config.fmri_loss_weight
    assert weight > 0 and torch.allclose(outputs.loss, expected + weight * outputs.fmri_loss, atol=1e-6)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    for given in (None, torch.full_like(labels, -100)):
        again = model(**inputs, fmri_codes=scans, labels=given, shift_labels=shifted)
        assert torch.equal(again.text_loss, outputs.text_loss)
    assert model(**inputs, fmri_codes=scans).loss is None
    # nothing is labelled: the codes alone make the loss
    unlabelled = model(**inputs, fmri_codes=scans, labels=torch.full_like(labels, -100))
    assert unlabelled.text_loss == 0 and torch.equal(unlabelled.loss, weight * outputs.fmri_loss)


def test_loss_of_text_alone_is_the_backbones(model: Model) -> None:
    row = ids(model, "plain text")
    expected = model.model.causal_lm(row, labels=row).loss
    outputs = model(row, labels=row)
    assert outputs.fmri_loss is None and torch.allclose(outputs.loss, expected, atol=1e-6)
    of_30 = model.model.causal_lm(row, labels=row, num_items_in_batch=30).loss
    assert torch.allclose(model(row, labels=row, num_items_in_batch=30).loss, of_30, atol=1e-6)


def test_parts_of_an_accumulated_batch_add_up_to_its_loss(llama: Model) -> None:
    rows, scans = [ids(llama, LONG, "answer"), ids(llama, SHORT, "yes")], [codes(LONG), codes(SHORT)]
    whole_inputs = pad(rows, "right")
    whole = llama(**whole_inputs, fmri_codes=codes(LONG, SHORT), labels=text_labels(llama, whole_inputs)).loss
    labels = [text_labels(llama, pad([row], "right")) for row in rows]
    items = sum(int((label[:, 1:] != -100).sum()) for label in labels)
    parts = [
        llama(row, fmri_codes=scan, labels=label, num_items_in_batch=items, num_fmri_items_in_batch=7 + 3).loss
        for row, scan, label in zip(rows, scans, labels, strict=True)
    ]
    assert torch.allclose(sum(parts), whole, atol=1e-5)


def test_next_code_losses_equal_an_explicit_loop(model: Model) -> None:
    inputs = pad([ids(model, "a", LONG, "b"), ids(model, SHORT, "c", SHORT[::-1])], "left")
    scans = [LONG, SHORT, SHORT[::-1]]
    outputs = model(**inputs, fmri_codes=codes(*scans), labels=inputs["input_ids"])
    hidden = model.model(**inputs, fmri_codes=codes(*scans)).last_hidden_state
    states = iter(hidden[inputs["input_ids"] == model.config.fmri_token_id])
    losses = []
    for scan in scans:
        for token, state in zip(range(1, len(scan) + 1), states, strict=False):
            if token < len(scan):
                scores = code_logits(model, state, scan, token).log_softmax(-1)
                losses.append([-scores[level, code].item() for level, code in enumerate(scan[token])])
    assert len(losses) == 7 + 3 + 3 and next(states, None) is None
    expected = torch.tensor(losses)
    assert torch.allclose(outputs.fmri_loss, expected.mean(), atol=1e-5)
    assert torch.allclose(outputs.fmri_level_losses, expected.mean(0), atol=1e-5)


def test_a_scan_of_one_token_has_no_next_code_loss(llama: Model) -> None:
    row = ids(llama, LONG[:1], "text")
    outputs = llama(row, fmri_codes=codes(LONG[:1]), fmri_scores=torch.zeros(1, 2), labels=row)
    assert outputs.fmri_loss == 0 and outputs.loss == outputs.text_loss


def test_attention_that_the_backbone_alone_has_is_the_backbones(llama: Model, tmp_path) -> None:
    llama.save_pretrained(tmp_path)
    loaded = FmriLMForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="flex_attention")
    llama.set_attn_implementation("flex_attention")
    for model in (llama, loaded):
        assert model.model.causal_lm.config._attn_implementation == "flex_attention"
        assert model.model.codec.config._attn_implementation == "sdpa"


def test_attention_implementation_is_chosen_for_each_part(llama: Model, tmp_path) -> None:
    llama.save_pretrained(tmp_path)
    chosen = {"text_config": "eager", "codec_config": "sdpa"}
    loaded = FmriLMForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=chosen)
    assert loaded.model.causal_lm.config._attn_implementation == "eager"
    assert loaded.model.codec.config._attn_implementation == "sdpa"


def test_device_map_places_the_whole_model(llama: Model, tmp_path) -> None:
    llama.save_pretrained(tmp_path)
    loaded = FmriLMForConditionalGeneration.from_pretrained(tmp_path, device_map="auto")
    inputs = {"input_ids": ids(llama, "a", LONG), "fmri_codes": codes(LONG)}
    there = {name: value.to(loaded.device) for name, value in inputs.items()}
    assert torch.allclose(loaded(**there).logits.cpu(), llama(**inputs).logits, atol=1e-5)
    assert loaded.generate(**there, max_new_tokens=2).shape[0] == 1


def test_compiled_forward_gives_the_same_logits(llama: Model) -> None:
    row, scan = ids(llama, "ab", LONG, "c"), codes(LONG)
    # what is traced is the same for all backends; this one needs no C++ compiler
    compiled = torch.compile(llama.forward, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(row, fmri_codes=scan).logits, llama(row, fmri_codes=scan).logits, atol=1e-5)


def test_scores_under_autocast_are_those_in_full_precision(llama: Model) -> None:
    scan = codes(LONG)
    plain = llama.model.get_fmri_scores(scan)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(llama.model.get_fmri_scores(scan), plain)
    assert plain.dtype == torch.float32
