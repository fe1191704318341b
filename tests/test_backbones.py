"""Which language models can read scans: those pass on text what they give themselves; the others are refused."""

from collections.abc import Callable

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from fmrilm.modeling_fmrilm import LATENT_TOKEN_SPREAD, check_backbone
from scan_rows import LONG, SHORT, Model, choice_scores, codes, ids, pad, positions


LAYERS = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
}
GPT = {**LAYERS, "n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
# what stands between the last layer and the logits, or between words and the first layer, is not 1 anywhere
BACKBONES = {
    "llama": LAYERS,
    "qwen2": LAYERS,
    "qwen3": {**LAYERS, "head_dim": 16},
    "mistral": {**LAYERS, "sliding_window": 8},
    "gpt2": GPT,
    "granite": {**LAYERS, "logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "cohere": {**LAYERS, "logit_scale": 0.25},
    "gemma2": {**LAYERS, **WINDOW, "head_dim": 16, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0},
    "gemma3_text": {**LAYERS, **WINDOW, "head_dim": 16},
    "phi": LAYERS,
    "opt": {**LAYERS, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
    "gpt_neox": LAYERS,
    "olmo2": LAYERS,
    "smollm3": LAYERS,
    "glm4": {**LAYERS, "head_dim": 16},
    "falcon": LAYERS,
    "mpt": {"vocab_size": 300, "d_model": 32, "n_layers": 2, "n_heads": 2},
    "lfm2": {**LAYERS, "layer_types": ["conv", "full_attention"]},
}


def language_model(name: str, **changes) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, **{**BACKBONES.get(name, LAYERS), **changes})
    ).eval()


@pytest.fixture(params=BACKBONES)
def pair(request, joined: Callable[..., Model]) -> tuple[PreTrainedModel, Model]:
    """A language model that knows the fMRI tokens, and the joint model made of it."""
    plain = language_model(request.param)
    model = joined(plain)
    # joining has made its vocabulary larger
    assert plain.config.vocab_size == model.config.text_config.vocab_size
    return plain, model


@torch.no_grad()
def test_text_alone_gives_the_backbones_logits(pair: tuple[PreTrainedModel, Model]) -> None:
    plain, model = pair
    inputs = pad([ids(model, "what is a brain?"), ids(model, "short text")], "left")
    for given in ({}, {"position_ids": positions(inputs["attention_mask"])}, {"logits_to_keep": 2}):
        assert torch.equal(model(**inputs, **given).logits, plain(**inputs, **given).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = plain.generate(**inputs, **options, suppress_tokens=model.generation_config.suppress_tokens)
    assert torch.equal(model.generate(**inputs, **options), expected)


@torch.no_grad()
def test_a_causal_server_gives_the_same_answers_from_embeddings(pair: tuple[PreTrainedModel, Model]) -> None:
    _, model = pair
    row, scans = ids(model, "a", SHORT, "b", LONG, "question"), codes(SHORT, LONG)
    server = model.model.causal_lm
    assert type(server) is type(pair[0])
    embeddings = model.model.embed(row, fmri_codes=scans)
    logits = model(row, fmri_codes=scans).logits
    assert torch.equal(server(inputs_embeds=embeddings).logits, logits)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(row, fmri_codes=scans, **options)[:, row.shape[1] :]
    suppressed = {"suppress_tokens": model.generation_config.suppress_tokens}
    assert torch.equal(server.generate(inputs_embeds=embeddings, **options, **suppressed), expected)


@torch.no_grad()
def test_batch_mates_caches_and_attention_implementations_agree(pair: tuple[PreTrainedModel, Model]) -> None:
    _, model = pair
    rows = [ids(model, "a", SHORT, "bc", LONG, "d"), ids(model, "question ", LONG), ids(model, "only text")]
    inputs, scans = pad(rows, "left"), codes(SHORT, LONG, LONG)
    logits = model(**inputs, fmri_codes=scans, position_ids=positions(inputs["attention_mask"])).logits
    for row, own, one in zip(rows, (codes(SHORT, LONG), codes(LONG), None), logits, strict=True):
        assert torch.allclose(model(row, fmri_codes=own).logits[0], one[-row.shape[1] :], atol=1e-4)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(**inputs, fmri_codes=scans, **options)
    for more in ({"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(model.generate(**inputs, fmri_codes=scans, **options, **more), cached), more
    model.set_attn_implementation("eager")
    eager = model(**inputs, fmri_codes=scans, position_ids=positions(inputs["attention_mask"])).logits
    mask = inputs["attention_mask"].bool()
    # sdpa knows no soft caps on attention
    if not getattr(model.config.text_config, "attn_logit_softcapping", None):
        assert torch.allclose(eager[mask], logits[mask], atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_choices_are_scored_as_by_uncached_runs(side: str, pair: tuple[PreTrainedModel, Model]) -> None:
    _, model = pair
    choices = [[20, 21, 22, 23], [30], [20, 50], [20, 21]]
    rows = [ids(model, "a", LONG, "a longer question"), ids(model, SHORT, "b", LONG, "c")]
    scans = [codes(LONG), codes(SHORT, LONG)]
    scores = model.score_choices({**pad(rows, side), "fmri_codes": codes(LONG, SHORT, LONG)}, choices)
    expected = [choice_scores(model, row, own, choices) for row, own in zip(rows, scans, strict=True)]
    assert torch.allclose(scores, torch.stack(expected), atol=1e-3)
    # several questions about a scan that was read once, whose answers begin alike
    choices = [[21, 50, *choice] for choice in choices]
    prefix, question = ids(model, "a", LONG), ids(model, "a longer question")
    questions = [question, question.flip(-1)]
    cache = model(prefix, fmri_codes=codes(LONG), use_cache=True).past_key_values
    cache.reorder_cache(torch.zeros(2, dtype=torch.long))
    inputs = {"input_ids": torch.cat(questions), "attention_mask": torch.ones(2, prefix.shape[1] + question.shape[1])}
    padded = inputs["attention_mask"].index_fill(-1, torch.tensor([prefix.shape[1] if side == "left" else -1]), 0)
    with pytest.raises(ValueError, match="prompts of one length behind cached tokens"):
        model.score_choices({**inputs, "attention_mask": padded, "past_key_values": cache}, choices)
    scores = model.score_choices({**inputs, "past_key_values": cache}, choices)
    rows = [torch.cat([prefix, question], -1) for question in questions]
    expected = [choice_scores(model, row, codes(LONG), choices) for row in rows]
    assert torch.allclose(scores, torch.stack(expected), atol=1e-3)


@torch.no_grad()
def test_scans_enter_at_the_size_of_what_the_embedding_module_returns(pair: tuple[PreTrainedModel, Model]) -> None:
    plain, model = pair
    words = plain.get_input_embeddings()(torch.arange(plain.config.vocab_size))
    size = words.pow(2).mean().sqrt()
    tokens = model.model.get_fmri_features(codes(LONG)) - words.mean(0)
    assert torch.allclose(tokens.pow(2).mean().sqrt(), LATENT_TOKEN_SPREAD * size, rtol=0.05)
    scores = torch.randn(200, len(model.config.score_names), generator=torch.Generator().manual_seed(0))
    summaries = model.model.summary(scores) - words.mean(0)
    # words of a name, and the difference of two words
    assert 0.3 < summaries.pow(2).mean().sqrt() / size < 8


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("opt", {"word_embed_proj_dim": 16}, "expected embeddings and states of hidden_size=32, got 16"),
        ("bert", {"num_key_value_heads": None}, "expected a causal model, got a difference"),
        (
            "roberta",
            {"num_key_value_heads": None, "is_decoder": True, "pad_token_id": 1},
            "positions that count from 0",
        ),
        ("rwkv", {"attention_hidden_size": 32}, "expected a cache that several tokens may follow, got none"),
        ("jamba", {"attn_layer_offset": 1, "attn_layer_period": 2, "use_mamba_kernels": False}, "several tokens may"),
        ("xlm", {"emb_dim": 32, "n_layers": 1, "n_heads": 2}, "expected it to take inputs_embeds, got"),
    ],
)
def test_other_models_are_refused_with_the_reason(name: str, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_backbone(language_model(name, **changes))


def test_model_without_a_head_is_refused(joined: Callable[..., Model]) -> None:
    headless = AutoModel.from_config(AutoConfig.for_model("llama", **LAYERS))
    with pytest.raises(ValueError, match="expected a causal language model, got LlamaModel, without a head"):
        joined(headless)


def test_scan_beyond_the_context_is_refused_with_both_lengths(tiny_model: Callable[..., Model]) -> None:
    model = tiny_model("gpt2")
    model.config.text_config.max_position_embeddings = 14
    assert model(ids(model, LONG), fmri_codes=codes(LONG)).logits.shape[1] == 14
    with pytest.raises(ValueError, match="at most 14 positions, .*, got 15"):
        model(ids(model, LONG, "a"), fmri_codes=codes(LONG))
