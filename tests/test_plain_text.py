"""Plain text beside the scans, and its perplexity."""

import numpy as np
import torch

from fmrilm.training.alignment.plain_text import excerpt, perplexity, plain_texts


def test_held_out_texts_are_not_trained_on() -> None:
    training, held_out = plain_texts()
    assert len(training) > len(held_out) > 10
    lines = {line.strip() for text in held_out for line in text.splitlines() if len(line) > 70}
    shared = [line for text in training for line in text.splitlines() if line.strip() in lines]
    assert len(lines) > 50 and not shared
    assert sum(map(len, training)) > 100_000


def test_excerpts_are_stretches_of_the_text() -> None:
    rng = np.random.default_rng(0)
    text = " ".join(map(str, range(50)))
    cut = [excerpt(text, 10, rng).split() for _ in range(500)]
    assert all([int(word) for word in words] == list(range(int(words[0]), int(words[0]) + 10)) for words in cut)
    assert {int(words[0]) for words in cut} == set(range(41))
    assert excerpt("short text", 10, rng) == "short text"


@torch.no_grad()
def test_perplexity_equals_an_explicit_loop(tiny_model, processor) -> None:
    model, tokenizer = tiny_model(), processor.tokenizer
    texts = ["a brain at rest", "is never at rest, whatever it is told", "so"]
    losses = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :12]
        scores = model(ids).logits[0].log_softmax(-1)
        losses += [-scores[place, token].item() for place, token in enumerate(ids[0, 1:])]
    measured = perplexity(model, tokenizer, texts, tokens=12, batch=2)
    assert abs(np.log(measured) - np.mean(losses)) < 1e-5
