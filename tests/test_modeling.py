"""The joint model: equal to its backbone on text, consistent over caches, batches and padding, and its losses."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

from fmrilm import FmriLMConfig, FmriLMForConditionalGeneration
from fmrilm.steps_fmrilm import positions, step_ids


Model = FmriLMForConditionalGeneration
BACKBONES = ["llama", "qwen3", "gpt2"]
# two tokens make a step: a scan of four steps, one of two
LONG, SHORT = [3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8]


@pytest.fixture(params=BACKBONES)
def model(request, tiny_model: Callable[..., Model]) -> Model:
    return tiny_model(request.param)


@pytest.fixture
def llama(tiny_model: Callable[..., Model]) -> Model:
    return tiny_model("llama")


def ids(model: Model, *parts: list[int] | str) -> torch.Tensor:
    """One row [1, length]: lists are codes of a scan and become its placeholders, strings become their bytes."""
    config, row = model.config, []
    for part in parts:
        if isinstance(part, str):
            row += [10 + ord(character) for character in part]
        else:
            row += [config.fmri_start_token_id, *[config.fmri_token_id] * len(part), config.fmri_end_token_id]
    return torch.tensor([row])


def codes(*scans: list[int]) -> torch.Tensor:
    longest = max(len(scan) for scan in scans)
    return torch.tensor([scan + [-1] * (longest - len(scan)) for scan in scans])


def pad(rows: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    longest = max(row.shape[1] for row in rows)
    sides = {"left": lambda row: (longest - row.shape[1], 0), "right": lambda row: (0, longest - row.shape[1])}
    return {
        "input_ids": torch.cat([F.pad(row, sides[side](row)) for row in rows]),
        "attention_mask": torch.cat([F.pad(torch.ones_like(row), sides[side](row)) for row in rows]),
    }


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


def test_one_token_at_a_time_equals_the_whole(model: Model) -> None:
    row, scan = ids(model, "ab", SHORT, "cd", LONG, "efgh"), codes(SHORT, LONG)
    whole = model(row, fmri_codes=scan).logits
    steps = model.model.step_ids(row)
    cut = row.shape[1] - 4
    outputs = model(row[:, :cut], fmri_codes=scan, use_cache=True)
    logits = [outputs.logits]
    for place in range(cut, row.shape[1]):
        outputs = model(
            row[:, place : place + 1],
            past_key_values=outputs.past_key_values,
            mm_token_type_ids=steps[:, : place + 1],
        )
        logits.append(outputs.logits)
    assert torch.allclose(torch.cat(logits, 1), whole, atol=1e-5)


def test_cache_without_steps_or_positions_is_refused(llama: Model) -> None:
    cache = llama(ids(llama, SHORT), fmri_codes=codes(SHORT), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="6 cached and the 2 given"):
        llama(ids(llama, "ab"), past_key_values=cache)


def test_generation_with_and_without_cache_agree(model: Model) -> None:
    inputs = pad([ids(model, "a", SHORT, "bc", LONG, "d"), ids(model, "question ", LONG)], "left")
    scans = codes(SHORT, LONG, LONG)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached, uncached, static = (
        model.generate(**inputs, fmri_codes=scans, **options, **more)
        for more in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True})
    )
    assert cached.shape[1] == inputs["input_ids"].shape[1] + 8
    assert torch.equal(cached, uncached) and torch.equal(cached, static)


def test_generation_without_padding_agrees_with_and_without_cache(model: Model) -> None:
    # where nothing is padded, generation passes no attention mask on
    inputs, scans = pad([ids(model, "a", SHORT, "b")], "left"), codes(SHORT)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached, uncached = (model.generate(**inputs, fmri_codes=scans, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, uncached)


def test_static_cache_gives_the_scores_of_the_dynamic_one(model: Model) -> None:
    inputs, scans = pad([ids(model, "a", SHORT, "b"), ids(model, LONG)], "left"), codes(SHORT, LONG)
    options = {"max_new_tokens": 4, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    dynamic = model.generate(**inputs, fmri_codes=scans, **options).scores
    static = model.generate(
        **inputs, fmri_codes=scans, **options, cache_implementation="static", disable_compile=True
    ).scores
    for first, second in zip(dynamic, static, strict=True):
        assert torch.allclose(first, second, atol=1e-5)


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


def test_generates_from_embeddings_of_text(model: Model) -> None:
    inputs = pad([ids(model, "a question"), ids(model, "text")], "left")
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    options = {"attention_mask": inputs["attention_mask"], "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(inputs["input_ids"], **options)[:, inputs["input_ids"].shape[1] :]
    for cache in (True, False):
        assert torch.equal(model.generate(inputs_embeds=embeddings, use_cache=cache, **options), expected)


def test_beams_repeat_the_scans_of_a_row_as_a_block(llama: Model) -> None:
    rows = pad([ids(llama, LONG, "a", SHORT), ids(llama, "text"), ids(llama, SHORT)], "left")
    expanded, kwargs = llama._expand_inputs_for_generation(
        expand_size=2,
        input_ids=rows["input_ids"],
        attention_mask=rows["attention_mask"],
        fmri_codes=codes(LONG, SHORT, SHORT[::-1]),
    )
    assert torch.equal(expanded, rows["input_ids"].repeat_interleave(2, 0))
    assert torch.equal(kwargs["attention_mask"], rows["attention_mask"].repeat_interleave(2, 0))
    assert torch.equal(kwargs["fmri_codes"], codes(LONG, SHORT, LONG, SHORT, SHORT[::-1], SHORT[::-1]))


def test_beam_search_reads_the_right_scans(model: Model) -> None:
    rows, scans = [ids(model, LONG, "a", SHORT), ids(model, SHORT, "b", LONG)], codes(LONG, SHORT, SHORT, LONG)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    inputs = pad(rows, "left")
    together = model.generate(**inputs, fmri_codes=scans, num_beams=3, **options)
    for index, row in enumerate(rows):
        alone = model.generate(row, fmri_codes=scans[2 * index : 2 * index + 2], num_beams=3, **options)
        assert torch.equal(together[index, -4:], alone[0, -4:])
    # with one new token, the best beam is the best token
    greedy = model.generate(**inputs, fmri_codes=scans, num_beams=1, **options)
    one = {**options, "max_new_tokens": 1}
    assert torch.equal(model.generate(**inputs, fmri_codes=scans, num_beams=3, **one), greedy[:, :-3])


def test_placeholders_are_never_generated(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model("llama", tied=False)
    config = model.config
    special = {config.fmri_start_token_id, config.fmri_token_id, config.fmri_end_token_id}
    row, scan = ids(model, "a", LONG), codes(LONG)
    with torch.no_grad():
        # now they are by far the likeliest words
        model.lm_head.weight[list(special)] = 10 * model.model(row, fmri_codes=scan).last_hidden_state[0, -1]
    options = {"max_new_tokens": 1, "do_sample": True, "num_return_sequences": 8}
    said = model.generate(row, fmri_codes=scan, **options)[:, -1]
    assert not special & set(said.tolist())
    model.generation_config.suppress_tokens = None
    assert set(model.generate(row, fmri_codes=scan, **options)[:, -1].tolist()) <= special


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
                scores = model.fmri_head(states[place]).log_softmax(-1)
                losses.append(-scores[scan[token + 2]])
            place += 1
    assert place == len(states) and len(losses) == 6 + 2 + 2
    assert torch.allclose(outputs.fmri_loss, torch.stack(losses).mean(), atol=1e-5)


def test_scan_of_one_step_has_no_next_step_loss(llama: Model) -> None:
    row = ids(llama, [3, 1], "text")
    outputs = llama(row, fmri_codes=codes([3, 1]), labels=row)
    assert outputs.fmri_loss == 0 and outputs.loss == outputs.text_loss


def choice_scores(model: Model, row: torch.Tensor, scans: torch.Tensor, choices: list[list[int]]) -> torch.Tensor:
    """Log-likelihood of each choice by one uncached run over prompt and choice."""
    totals = []
    for choice in choices:
        logits = model(torch.cat([row, torch.tensor([choice])], -1), fmri_codes=scans).logits[0].log_softmax(-1)
        start = row.shape[1] - 1
        totals.append(sum(logits[start + place, token] for place, token in enumerate(choice)))
    return torch.stack(totals)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("choices", [[[20], [30], [40]], [[20, 21, 22], [30], [20, 50]]])
def test_scores_of_choices_are_their_log_likelihoods(model: Model, side: str, choices: list[list[int]]) -> None:
    rows = [ids(model, "a", LONG, "a longer question"), ids(model, SHORT, "b", LONG, "c")]
    scans = [codes(LONG), codes(SHORT, LONG)]
    scores = model.score_choices({**pad(rows, side), "fmri_codes": codes(LONG, SHORT, LONG)}, choices)
    expected = torch.stack([choice_scores(model, *pair, choices) for pair in zip(rows, scans, strict=True)])
    assert scores.shape == (2, len(choices)) and torch.allclose(scores, expected, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_choices_are_scored_after_a_cached_prefix(model: Model, side: str) -> None:
    choices = [[20, 21, 22], [30], [20, 50]]
    prefix, questions = ids(model, "a", LONG), [ids(model, "a longer question"), ids(model, "short")]
    cache = model(prefix, fmri_codes=codes(LONG), use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    batch = pad(questions, side)
    prefixes = prefix.repeat(2, 1)
    mask = torch.cat([torch.ones_like(prefixes), batch["attention_mask"]], -1)
    steps = model.model.step_ids(torch.cat([prefixes, batch["input_ids"]], -1))
    inputs = {"input_ids": batch["input_ids"], "attention_mask": mask, "past_key_values": cache}
    scores = model.score_choices({**inputs, "mm_token_type_ids": steps}, choices)
    rows = [torch.cat([prefix, question], -1) for question in questions]
    expected = torch.stack([choice_scores(model, row, codes(LONG), choices) for row in rows])
    assert torch.allclose(scores, expected, atol=1e-4)


def test_cached_prefix_needs_steps_of_all_tokens(llama: Model) -> None:
    prefix = ids(llama, "a", LONG)
    cache = llama(prefix, fmri_codes=codes(LONG), use_cache=True).past_key_values
    inputs = {"input_ids": ids(llama, "bc"), "attention_mask": torch.ones(1, 13), "past_key_values": cache}
    with pytest.raises(ValueError, match=r"shape \(1, 13\), got \(1, 2\)"):
        llama.score_choices(inputs, [[20], [30]])


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


def test_codec_is_frozen_and_the_rest_learns(llama: Model) -> None:
    row = ids(llama, "a", LONG, "b")
    before = copy.deepcopy(llama.model.codec.state_dict())
    llama.train()(row, fmri_codes=codes(LONG), labels=row).loss.backward()
    for name, parameter in llama.named_parameters():
        assert (parameter.grad is None) == name.startswith("model.codec."), name
    assert all(torch.equal(value, before[name]) for name, value in llama.model.codec.state_dict().items())


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
