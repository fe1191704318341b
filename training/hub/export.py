"""
The language model as a plain checkpoint of its backbone, for servers that do not know fMRI, and prompts with scans as
the embeddings that such servers read.

With vLLM (which this package does not need):

    fmrilm export MODEL OUT --scan scan.npy --question "Describe the scan." --tr 2.0
    vllm serve OUT --enable-prompt-embeds

    from safetensors.torch import load_file
    from vllm import LLM, SamplingParams
    llm = LLM("OUT", enable_prompt_embeds=True)
    prompt = {"prompt_embeds": load_file("OUT/prompt.safetensors")["prompt_embeds"]}
    llm.generate(prompt, SamplingParams(temperature=0))

A server of this kind attends causally and counts positions one by one. This package's model sees a whole step of a
scan at once, at one position: `plain_inputs` holds the mask and the positions with which a plain backbone gives the
same logits, and `served_difference` measures what is lost without them.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from fmrilm.modeling_fmrilm import FmriLMForConditionalGeneration
from fmrilm.processors import FmriLMProcessor
from fmrilm.steps_fmrilm import positions


def plain_backbone(model: FmriLMForConditionalGeneration) -> PreTrainedModel:
    """The language model as the causal language model of its own class, weights shared."""
    config = model.config.text_config
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    prefix = f"{empty.base_model_prefix}."
    state = {prefix + name: tensor for name, tensor in model.model.language_model.state_dict().items()}
    state |= {f"lm_head.{name}": tensor for name, tensor in model.lm_head.state_dict().items()}
    plain = type(empty).from_pretrained(None, config=config, state_dict=state, dtype=model.dtype)
    plain.generation_config = model.generation_config
    return plain.eval()


@torch.no_grad()
def plain_inputs(model: FmriLMForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    What makes a plain backbone compute the logits of `model(**inputs)`: inputs_embeds [batch, length, hidden],
    position_ids [batch, length] and attention_mask [batch, 1, length, length], 0 where a token may look and the
    smallest number elsewhere.
    """
    scans = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    embeddings = model.model.embed(inputs["input_ids"], model.model.read_scans(**scans))
    steps = model.model.step_ids(inputs["input_ids"])
    mask = inputs.get("attention_mask", torch.ones_like(steps)).bool()
    length = steps.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=steps.device).tril()
    seen = (seen | (steps[:, :, None] == steps[:, None]) & (steps > 0)[:, None]) & mask[:, None]
    blocked = torch.zeros_like(seen, dtype=embeddings.dtype).masked_fill(~seen, torch.finfo(embeddings.dtype).min)
    return {
        "inputs_embeds": embeddings,
        "position_ids": positions(steps, mask),
        "attention_mask": blocked[:, None],
    }


@torch.no_grad()
def served_difference(
    model: FmriLMForConditionalGeneration, backbone: PreTrainedModel, inputs: dict[str, torch.Tensor]
) -> dict[str, float]:
    """
    What a causal server changes in the next word after each prompt of `inputs` (no padding): mean total variation
    between both distributions (0: equal, 1: disjoint), and share of prompts whose likeliest word stays the same.
    """
    ours = model(**inputs).logits[:, -1].float().softmax(-1)
    embeddings = plain_inputs(model, inputs)["inputs_embeds"]
    served = backbone(inputs_embeds=embeddings).logits[:, -1].float().softmax(-1)
    return {
        "total_variation": (ours - served).abs().sum(-1).mean().item() / 2,
        "same_word": (ours.argmax(-1) == served.argmax(-1)).float().mean().item(),
    }


def export(
    folder: str | Path,
    output: Path,
    scan: str | Path | None = None,
    question: str | None = None,
    tr: float | None = None,
    atlas: str | None = None,
) -> dict[str, float]:
    """
    Writes backbone and tokenizer of the model in `folder` into the new folder `output`; with a scan and a question
    also `prompt.safetensors` (`prompt_embeds` [length, hidden]), and returns `served_difference` for them.
    """
    if output.exists():
        raise ValueError(f"expected a new folder, got {output}, which exists")
    if (scan is None) != (question is None):
        raise ValueError("expected a scan and a question, or neither, got one of them")
    model = FmriLMForConditionalGeneration.from_pretrained(folder).eval()
    processor = FmriLMProcessor.from_pretrained(folder)
    backbone = plain_backbone(model)
    staging = output.with_name(output.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    backbone.save_pretrained(staging)
    processor.tokenizer.save_pretrained(staging)
    difference = {}
    if scan is not None:
        content = [{"type": "fmri", "fmri": scan, "tr": tr, "atlas": atlas}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        inputs = processor.apply_chat_template(chat, add_generation_prompt=True)
        embeddings = plain_inputs(model, inputs)["inputs_embeds"][0].contiguous()
        save_file({"prompt_embeds": embeddings}, staging / "prompt.safetensors")
        difference = served_difference(model, backbone, inputs)
    staging.rename(output)
    return difference
