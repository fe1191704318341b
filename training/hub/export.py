"""
The language model as a plain checkpoint of its backbone, for servers that do not know fMRI, and prompts with scans as
the embeddings that such servers read. Attention is causal and positions count one by one, so that a server's logits
are those of this package.

With vLLM (which this package does not need):

    fmrilm export MODEL OUT --scan scan.npy --question "Describe the scan." --tr 2.0
    vllm serve OUT --enable-prompt-embeds

    from safetensors.torch import load_file
    from vllm import LLM, SamplingParams
    llm = LLM("OUT", enable_prompt_embeds=True)
    prompt = {"prompt_embeds": load_file("OUT/prompt.safetensors")["prompt_embeds"]}
    llm.generate(prompt, SamplingParams(temperature=0))
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fmrilm.modeling_fmrilm import FmriLMForConditionalGeneration
from fmrilm.processors import FmriLMProcessor

from .model_folder import load_model, write_folder


@torch.no_grad()
def prompt_embeddings(model: FmriLMForConditionalGeneration, inputs: dict[str, Any]) -> torch.Tensor:
    """Embeddings [batch, length, hidden] of prompts with their scans, as the processor makes them."""
    return model.model.embed(**{name: value for name, value in inputs.items() if name != "attention_mask"})


def export(
    folder: str | Path,
    output: Path,
    scan: str | Path | None = None,
    question: str | None = None,
    tr: float | None = None,
    atlas: str | None = None,
) -> None:
    """
    Writes backbone and tokenizer of the model in `folder` into the new folder `output`; with a scan and a question
    also `prompt.safetensors` (`prompt_embeds` [length, hidden]).
    """
    if output.exists():
        raise ValueError(f"expected a new folder, got {output}, which exists")
    if (scan is None) != (question is None):
        raise ValueError("expected a scan and a question, or neither, got one of them")
    model: Any = load_model(str(folder), "auto", merge=True).eval()
    processor = FmriLMProcessor.from_pretrained(folder)
    backbone = model.model.causal_lm
    backbone.generation_config = model.generation_config

    def write(staging: Path) -> None:
        backbone.save_pretrained(staging)
        processor.tokenizer.save_pretrained(staging)
        if scan is not None:
            content = [{"type": "fmri", "fmri": scan, "tr": tr, "atlas": atlas}, {"type": "text", "text": question}]
            chat = [{"role": "user", "content": content}]
            embeddings = prompt_embeddings(model, processor.apply_chat_template(chat, add_generation_prompt=True))
            save_file({"prompt_embeds": embeddings[0].contiguous()}, staging / "prompt.safetensors")

    write_folder(output, write)
