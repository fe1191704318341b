"""Embeddings of descriptions by a frozen language model."""

from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase


BATCH = 16
LONGEST = 768


@torch.no_grad()
def embed_texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> np.ndarray:
    """float32 [texts, hidden_size]: the mean of the model's last hidden states over a text's tokens."""
    # of an encoder and a decoder, the encoder reads
    model = model.get_encoder() if model.config.is_encoder_decoder else model
    # texts of like length together: less padding
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    vectors: list[np.ndarray] = [np.empty(0)] * len(texts)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for start in tqdm(range(0, len(texts), BATCH), desc="descriptions", unit="batch"):
        rows = order[start : start + BATCH]
        inputs = tokenizer(
            [texts[row] for row in rows], padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        ).to(model.device)
        states = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        weights = inputs["attention_mask"][..., None].float()
        means = (states.last_hidden_state.float() * weights).sum(1) / weights.sum(1)
        for row, mean in zip(rows, means.cpu().numpy(), strict=True):
            vectors[row] = mean
    return np.stack(vectors)
