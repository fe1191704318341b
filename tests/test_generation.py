"""Generation: on either side of padding, over beams, from embeddings and prefixes, and scores of choices."""

import pytest
import torch

from fmrilm.modeling_fmrilm import MOST_SEQUENCES
from scan_rows import LONG, SHORT, Model, codes, ids, pad


GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def test_generation_settings_of_the_backbone_are_kept(make_language_model, joined, processor) -> None:
    backbone = make_language_model("llama", len(processor.tokenizer))
    backbone.generation_config.update(do_sample=True, temperature=0.6, top_p=0.8, eos_token_id=5)
    found = joined(backbone).generation_config
    assert (found.do_sample, found.temperature, found.top_p) == (True, 0.6, 0.8)
    # its own end ends an answer, and so does that of the chat template
    assert found.eos_token_id == sorted({5, *processor.eos_token_ids})


def test_padded_batch_is_generated_as_each_row_alone_and_by_looking_up_the_prompt(model: Model) -> None:
    prompts = [ids(model, "a", SHORT, "bc", LONG, "d"), ids(model, "question ", LONG)]
    inputs, scans = pad(prompts, "left"), codes(SHORT, LONG, LONG)
    expected = model.generate(**inputs, fmri_codes=scans, **GREEDY)
    assert expected.shape[1] == inputs["input_ids"].shape[1] + 8
    # each alone, without padding and without a mask
    for row, prompt, own in zip(expected, prompts, ([SHORT, LONG], [LONG]), strict=True):
        for more in ({}, {"prompt_lookup_num_tokens": 3}):
            alone = model.generate(prompt, fmri_codes=codes(*own), **GREEDY, **more)
            assert torch.equal(alone[0], row[-alone.shape[1] :]), more


def test_an_assistant_reads_the_scan_too_or_is_refused(tiny_model, make_language_model, processor) -> None:
    model, assistant = tiny_model("llama"), tiny_model("llama", tied=False)
    row, scan = ids(model, "a", LONG, "question"), codes(LONG)
    expected = model.generate(row, fmri_codes=scan, **GREEDY)
    assert torch.equal(model.generate(row, fmri_codes=scan, assistant_model=assistant, **GREEDY), expected)
    text_alone = make_language_model("llama", len(processor.tokenizer))
    with pytest.raises(ValueError, match="fmri_codes"):
        model.generate(row, fmri_codes=scan, assistant_model=text_alone, **GREEDY)


def test_generates_from_embeddings_of_text_and_scans(model: Model) -> None:
    inputs, scans = pad([ids(model, "a ", LONG, "b"), ids(model, "text", SHORT)], "left"), codes(LONG, SHORT)
    embeddings = model.model.embed(inputs["input_ids"], fmri_codes=scans)
    expected = model.generate(**inputs, fmri_codes=scans, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    for cache in (True, False):
        given = {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"], "use_cache": cache}
        assert torch.equal(model.generate(**given, **GREEDY), expected)
    # one row without padding: no mask and one of ones are the same
    one, mask = embeddings[:1], torch.ones_like(inputs["input_ids"][:1])
    assert inputs["attention_mask"][0].all()
    for given in ({}, {"attention_mask": mask}):
        assert torch.equal(model.generate(inputs_embeds=one, **given, **GREEDY), expected[:1])


def test_generates_after_a_prefix_that_was_read_before(model: Model) -> None:
    row, scan = ids(model, "a", LONG, "question"), codes(LONG)
    prefix = ids(model, "a", LONG)
    cache = model(prefix, fmri_codes=scan, use_cache=True).past_key_values
    expected = model.generate(row, fmri_codes=scan, **GREEDY)
    assert torch.equal(model.generate(row, past_key_values=cache, **GREEDY), expected)


def test_beams_repeat_the_scans_of_a_row_as_a_block(llama: Model) -> None:
    rows = pad([ids(llama, LONG, "a", SHORT), ids(llama, "text"), ids(llama, SHORT)], "left")
    scores = torch.arange(6.0).view(3, 2)
    expanded, kwargs = llama._expand_inputs_for_generation(
        expand_size=2, **rows, fmri_codes=codes(LONG, SHORT, SHORT[::-1]), fmri_scores=scores
    )
    assert torch.equal(expanded, rows["input_ids"].repeat_interleave(2, 0))
    assert torch.equal(kwargs["attention_mask"], rows["attention_mask"].repeat_interleave(2, 0))
    assert torch.equal(kwargs["fmri_codes"], codes(LONG, SHORT, LONG, SHORT, SHORT[::-1], SHORT[::-1]))
    assert torch.equal(kwargs["fmri_scores"], scores[[0, 1, 0, 1, 2, 2]])


def test_beams_and_several_answers_read_the_right_scans(model: Model) -> None:
    rows, scans = [ids(model, LONG, "a", SHORT), ids(model, SHORT, "b", LONG)], codes(LONG, SHORT, SHORT, LONG)
    inputs = pad(rows, "left")
    together = model.generate(**inputs, fmri_codes=scans, num_beams=3, num_return_sequences=2, **GREEDY)
    for index, row in enumerate(rows):
        own = scans[2 * index : 2 * index + 2]
        alone = model.generate(row, fmri_codes=own, num_beams=3, num_return_sequences=2, **GREEDY)
        assert torch.equal(together[2 * index : 2 * index + 2, -8:], alone[:, -8:])
    # with one new token, the best beam is the best token
    greedy = model.generate(**inputs, fmri_codes=scans, **GREEDY)
    one = {**GREEDY, "max_new_tokens": 1}
    assert torch.equal(model.generate(**inputs, fmri_codes=scans, num_beams=3, **one), greedy[:, :-7])
    likely = {**GREEDY, "do_sample": True, "top_k": 1, "num_return_sequences": 2}
    assert torch.equal(model.generate(**inputs, fmri_codes=scans, **likely), greedy.repeat_interleave(2, 0))


@pytest.mark.parametrize("depth", [1, 3])
def test_scores_of_choices_are_probabilities_of_what_follows(llama: Model, depth: int) -> None:
    row, scan = ids(llama, "a", LONG, "question"), codes(LONG)
    # all words, each with the same continuation: their first tokens' probabilities sum to one
    words = llama.config.text_config.vocab_size
    choices = [[word, *[7] * (depth - 1)] for word in range(words)]
    scores = llama.score_choices({"input_ids": row, "fmri_codes": scan}, choices)
    total = scores.exp().sum()
    assert torch.allclose(total, torch.ones(()), atol=1e-4) if depth == 1 else total < 1
    # however many are scored together
    assert words > 2 * MOST_SEQUENCES
    few = llama.score_choices({"input_ids": row, "fmri_codes": scan}, choices[-3:])
    assert torch.allclose(scores[:, -3:], few, atol=1e-4)
