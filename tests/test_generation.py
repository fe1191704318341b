"""Generation and scoring: the same with every cache, on either side of padding, over beams."""

from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM, Lfm2Config, PreTrainedConfig, Qwen3Config

from fmrilm import FmriLMForConditionalGeneration
from fmrilm.training.alignment.joint import join
from scan_rows import LONG, SHORT, choice_scores, codes, ids, pad


Model = FmriLMForConditionalGeneration
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
}
# answers that begin alike, of one to four tokens
TREE = [[20, 21, 22, 23], [30], [20, 50], [20, 21, 40]]


@pytest.fixture
def joined(tiny_codec, processor) -> Callable[[PreTrainedConfig], Model]:
    """Builds the joint model on a backbone of this configuration."""

    def build(config: PreTrainedConfig) -> Model:
        torch.manual_seed(0)
        config.vocab_size = len(processor.tokenizer) - 3
        return join(tiny_codec, AutoModelForCausalLM.from_config(config).eval(), processor).eval()

    return build


def batch_scores(model: Model, side: str, choices: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the choices in a padded batch, and those of each row and choice on its own."""
    rows = [ids(model, "a", LONG, "a longer question"), ids(model, SHORT, "b", LONG, "c")]
    scans = [codes(LONG), codes(SHORT, LONG)]
    scores = model.score_choices({**pad(rows, side), "fmri_codes": codes(LONG, SHORT, LONG)}, choices)
    return scores, torch.stack([choice_scores(model, *pair, choices) for pair in zip(rows, scans, strict=True)])


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


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "choices",
    [
        [[20], [30], [40]],
        [[20, 21, 22], [30], [20, 50]],
        # beginnings that are shared, not next to each other, and alike at another place of an answer
        [[20, 21, 22, 23], [30, 20, 21], [20, 50], [20, 21, 40], [30, 20, 22], [21, 20, 50, 51, 52], [60]],
    ],
    ids=["one token each", "several", "a tree"],
)
def test_scores_of_choices_are_their_log_likelihoods(model: Model, side: str, choices: list[list[int]]) -> None:
    scores, expected = batch_scores(model, side, choices)
    assert scores.shape == (2, len(choices)) and torch.allclose(scores, expected, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_choices_are_scored_through_layers_with_a_window(joined: Callable[..., Model], attention: str) -> None:
    layers = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    model = joined(Qwen3Config(**TINY, **layers, head_dim=16))
    model.set_attn_implementation(attention)
    whole = joined(Qwen3Config(**TINY, head_dim=16))
    (scores, expected), (without, _) = (batch_scores(one, "left", TREE) for one in (model, whole))
    assert torch.allclose(scores, expected, atol=1e-4)
    assert not torch.allclose(scores, without, atol=1e-2)


def test_choices_of_several_tokens_need_attention_in_all_layers(joined: Callable[..., Model]) -> None:
    model = joined(Lfm2Config(**TINY, layer_types=["conv", "full_attention"]))
    scores, expected = batch_scores(model, "left", [[20], [30]])
    assert torch.allclose(scores, expected, atol=1e-4)
    with pytest.raises(ValueError, match=r"attention layers alone.*mask of shape \(2, "):
        batch_scores(model, "left", TREE)


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
