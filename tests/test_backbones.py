"""Which language models can read scans, and how much of a scan fits into one."""

from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, MambaConfig, PreTrainedConfig, RwkvConfig

from fmrilm import FmriLMForConditionalGeneration
from fmrilm.backbones_fmrilm import check_backbone


@pytest.mark.parametrize("backbone", ["llama", "qwen3", "gpt2"])
def test_supported_backbones_pass(backbone: str, make_language_model) -> None:
    check_backbone(make_language_model(backbone, 64))


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=8, hidden_size=16, n_layer=1, n_head=2),
        MambaConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1),
        RwkvConfig(vocab_size=8, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2),
    ],
    ids=["other masks", "no attention", "mask unused"],
)
def test_backbone_that_cannot_see_a_step_as_a_whole_is_refused(config: PreTrainedConfig, make_codec) -> None:
    language_model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=f"{type(language_model).__name__} cannot be the backbone: .*4D"):
        FmriLMForConditionalGeneration.from_parts(make_codec(), language_model, config=None)


def test_model_without_a_head_is_refused(make_language_model, make_codec) -> None:
    headless = make_language_model("llama", 64).model
    with pytest.raises(ValueError, match="expected a causal language model, got LlamaModel, without a head"):
        FmriLMForConditionalGeneration.from_parts(make_codec(), headless, config=None)


def test_scan_beyond_the_context_is_refused_with_both_lengths(tiny_model: Callable) -> None:
    model = tiny_model("gpt2")
    config = model.config
    config.text_config.max_position_embeddings = 4

    def read(steps: int) -> torch.Tensor:
        row = [config.fmri_start_token_id, *[config.fmri_token_id] * 2 * steps, config.fmri_end_token_id]
        return model.model(torch.tensor([row]), fmri_codes=torch.ones(1, 2 * steps, dtype=torch.long))

    # the two tokens of a step share a position: six tokens fit into four
    assert read(steps=2).last_hidden_state.shape[1] == 6
    with pytest.raises(ValueError, match="at most 4 positions.*got 5"):
        read(steps=3)
