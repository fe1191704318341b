"""Heads that draw the codec's tokens towards a frozen language model's space. They serve training alone."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .configuration_fmrilm import FmriCodecConfig
from .ranks_fmrilm import gather_rows


# SigLIP starts at the odds of a random pair being a match. This is the logarithm of those in a batch of 20.
INITIAL_BIAS = -3.0
INITIAL_SCALE = 10.0
CLASSIFIER_SIZE = 256


def siglip_loss(
    scans: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor | float, bias: torch.Tensor | float, first: int = 0
) -> torch.Tensor:
    """
    Sigmoid loss (Zhai et al. 2023) of unit vectors scans [batch, dim] and texts [all texts, dim], the matching ones
    of which begin at row `first`: summed over texts, mean over scans.
    """
    logits = scale * scans @ texts.T + bias
    matches = torch.arange(len(scans), device=scans.device)[:, None] + first
    matches = matches == torch.arange(len(texts), device=scans.device)
    return -F.logsigmoid(torch.where(matches, logits, -logits)).sum() / len(scans)


def reversal_strength(progress: float) -> float:
    """Factor of the reversed gradient, from 0 at the start of training (progress 0) to 1 (Ganin et al. 2016)."""
    return 2 / (1 + math.exp(-10 * progress)) - 1


class GradientReversal(torch.autograd.Function):
    """Identity whose gradient is multiplied by -strength."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, strength: float) -> torch.Tensor:
        ctx.strength = strength
        return states.view_as(states)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return -ctx.strength * gradient, None


class FmriCodecAlignment(nn.Module):
    """
    Two losses. `siglip` brings a scan near the embedding of its own description and away from others'. `tell_apart`
    trains a classifier to tell projected tokens from word embeddings, and the codec and the projection to fool it.
    """

    text_mean: torch.Tensor
    text_deviation: torch.Tensor

    def __init__(self, config: FmriCodecConfig, pooled_size: int):
        super().__init__()
        if config.text_hidden_size is None:
            raise ValueError("expected text_hidden_size, the width of what the codec is aligned to, got None")
        self.scan_projection = nn.Linear(pooled_size, config.alignment_size, bias=False)
        self.text_projection = nn.Linear(config.text_hidden_size, config.alignment_size, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(INITIAL_SCALE)))
        self.bias = nn.Parameter(torch.tensor(INITIAL_BIAS))
        # sentences of one language model all point almost the same way: what they share is taken off
        self.register_buffer("text_mean", torch.zeros(config.text_hidden_size))
        self.register_buffer("text_deviation", torch.ones(config.text_hidden_size))
        self.token_projection = nn.Linear(config.codebook_dim, config.text_hidden_size)
        self.classifier = nn.Sequential(
            nn.Linear(config.text_hidden_size, CLASSIFIER_SIZE), nn.GELU(), nn.Linear(CLASSIFIER_SIZE, 2)
        )

    def init_weights(self) -> None:
        init.constant_(self.log_scale, math.log(INITIAL_SCALE))
        init.constant_(self.bias, INITIAL_BIAS)
        init.zeros_(self.text_mean)
        init.ones_(self.text_deviation)

    @torch.no_grad()
    def fit_texts(self, text_embeddings: torch.Tensor) -> None:
        """Standardises texts by the embeddings [texts, text_hidden_size] of the training scans' descriptions."""
        self.text_mean.copy_(text_embeddings.mean(0))
        self.text_deviation.copy_(text_embeddings.std(0).clamp(min=1e-6))

    def embed_scans(self, pooled: torch.Tensor) -> torch.Tensor:
        """Unit vectors [batch, alignment_size] of pooled tokens [batch, pooled_size]."""
        return F.normalize(self.scan_projection(pooled.to(self.scan_projection.weight.dtype)).float(), dim=-1)

    def embed_texts(self, text_embeddings: torch.Tensor) -> torch.Tensor:
        """Unit vectors [texts, alignment_size] of frozen embeddings [texts, text_hidden_size]."""
        standardised = (text_embeddings - self.text_mean) / self.text_deviation
        return F.normalize(self.text_projection(standardised.to(self.text_projection.weight.dtype)).float(), dim=-1)

    def siglip(self, scan_embeddings: torch.Tensor, text_embeddings: torch.Tensor) -> torch.Tensor:
        """
        Loss of this rank's scans [batch, alignment_size] against the descriptions of all ranks. Their frozen
        embeddings are what travels: the mean over ranks is the loss of one process on all scans, and so is its
        gradient.
        """
        everyones, first = gather_rows(text_embeddings)
        return siglip_loss(scan_embeddings, self.embed_texts(everyones), self.log_scale.exp(), self.bias, first)

    def tell_apart(self, vectors: torch.Tensor, words: torch.Tensor, reversal: float) -> torch.Tensor:
        """
        Cross-entropy of the classifier on projected vectors [tokens, codebook_dim] (class 0) and word embeddings
        [words, text_hidden_size] (class 1), each a mean.
        """
        dtype = self.token_projection.weight.dtype
        tokens = GradientReversal.apply(self.token_projection(vectors.to(dtype)), reversal)
        of_tokens, of_words = self.classifier(tokens).float(), self.classifier(words.to(dtype)).float()
        zeros = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
        ones = torch.ones(len(words), dtype=torch.long, device=tokens.device)
        return F.cross_entropy(of_tokens, zeros) + F.cross_entropy(of_words, ones)


__all__ = ["FmriCodecAlignment", "GradientReversal", "reversal_strength", "siglip_loss"]
