"""Embeddings of descriptions by a frozen language model, computed once and kept on disk."""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..alignment.language_models import CACHE


BATCH = 16
LONGEST = 768


class TextEmbeddings:
    """
    Embeds texts with one frozen model: the mean of the last hidden states over a text's tokens. What was embedded
    once is read from `<folder>/<hash of the model's weights>.safetensors`, by the hash of the text.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path = CACHE / "text-embeddings"
    ):
        # of an encoder and a decoder, the encoder reads
        self.model = model.get_encoder() if model.config.is_encoder_decoder else model
        self.tokenizer = tokenizer
        self.path = folder / f"{model_hash(model)}.safetensors"

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, hidden_size]."""
        known = self._read()
        keys = [hashlib.sha256(text.encode()).digest() for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        if new:
            known.update(zip(new, self._embed(list(new.values())), strict=True))
            self._write(known)
        return np.stack([known[key] for key in keys])

    @torch.no_grad()
    def _embed(self, texts: list[str]) -> list[np.ndarray]:
        # texts of like length together: less padding
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        vectors: list[np.ndarray] = [np.empty(0)] * len(texts)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        for start in tqdm(range(0, len(texts), BATCH), desc="descriptions", unit="batch"):
            rows = order[start : start + BATCH]
            inputs = self.tokenizer(
                [texts[row] for row in rows], padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
            ).to(self.model.device)
            states = self.model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
            ).last_hidden_state.float()
            weights = inputs["attention_mask"][..., None].float()
            means = (states * weights).sum(1) / weights.sum(1)
            for row, mean in zip(rows, means.cpu().numpy(), strict=True):
                vectors[row] = mean
        return vectors

    def _read(self) -> dict[bytes, np.ndarray]:
        if not self.path.exists():
            return {}
        stored = load_file(self.path)
        return {key.tobytes(): vector for key, vector in zip(stored["keys"], stored["vectors"], strict=True)}

    def _write(self, known: dict[bytes, np.ndarray]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=self.path.parent)
        os.close(handle)
        keys = np.frombuffer(b"".join(known), np.uint8).reshape(len(known), -1)
        save_file({"keys": keys.copy(), "vectors": np.stack(list(known.values()))}, partial)
        os.replace(partial, self.path)


def model_hash(model: PreTrainedModel) -> str:
    """Hash of a model's class and weights."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
