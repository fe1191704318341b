"""Plain text beside the scans: what keeps a language model's language, and the measure of whether it did."""

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


# of so many topics one is held out
HELD_OUT_EVERY = 5


def plain_texts() -> tuple[list[str], list[str]]:
    """
    Training and held-out documents: the reference topics that come with Python, half a megabyte of technical English
    that needs no download. Whoever reaches the Hub passes texts of a better corpus to `alignment_dataset`.
    """
    from pydoc_data.topics import topics

    # some topics are others' aliases or chapters
    documents = sorted(set(topics.values()))
    held_out = documents[::HELD_OUT_EVERY]
    seen = {paragraph for text in held_out for paragraph in _paragraphs(text)}
    return [text for text in documents if seen.isdisjoint(_paragraphs(text))], held_out


def _paragraphs(text: str) -> set[str]:
    return {" ".join(paragraph.split()) for paragraph in text.split("\n\n") if len(paragraph) > 80}


def excerpt(text: str, words: int, rng: np.random.Generator) -> str:
    """A stretch of that many words from a random place."""
    every = text.split()
    start = rng.integers(max(len(every) - words, 0) + 1)
    return " ".join(every[start : start + words])


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], tokens: int = 256, batch: int = 8
) -> float:
    """exp of the mean negative log-likelihood of a token, over the first `tokens` tokens of each text."""
    total, count = 0.0, 0
    for start in range(0, len(texts), batch):
        inputs = tokenizer(
            texts[start : start + batch], truncation=True, max_length=tokens, padding=True, return_tensors="pt"
        ).to(model.device)
        logits = model(**inputs).logits[:, :-1].float()
        scored = inputs["attention_mask"][:, 1:].bool()
        losses = torch.nn.functional.cross_entropy(logits[scored], inputs["input_ids"][:, 1:][scored], reduction="sum")
        total, count = total + losses.item(), count + int(scored.sum())
    return float(np.exp(total / count))
