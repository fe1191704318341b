"""What is fitted to a codec's codes in seconds, before any step through the language model."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from fmrilm.modeling_fmrilm import FmriLMForConditionalGeneration


WARM_UP_BATCH, WARM_UP_RATE = 32, 1e-3
LEVEL_STEPS, LEVEL_RATE = 200, 2e-2
FIT_TOKENS, FIT_RATE, FIT_DROPOUT = 1280, 3e-3, 0.5
# added to how often each slot held each code: people to come will hold others
PSEUDO_COUNT = 10


def warm_up_projector(
    model: FmriLMForConditionalGeneration, codes: np.ndarray, targets: np.ndarray, steps: int, seed: int
) -> float:
    """
    Turns the projector's output towards what descriptions are about before any step through the language model: the
    mean of a scan's projected tokens regresses its standardised descriptors through a linear map that is then
    thrown away. Seconds here save many minutes there, where this learns slowly.

    Args:
        codes: int [scans, tokens]; targets: [scans, descriptors], NaN where unknown.

    Returns:
        Share of the targets' variance explained in the last batches.
    """
    projector = model.model.projector
    scans, aims = torch.from_numpy(codes), torch.from_numpy(targets).float()
    head = nn.Linear(projector.output_proj.out_features, aims.shape[1])
    scale = projector.output_norm.weight.detach().mean()
    optimizer = torch.optim.AdamW([*projector.parameters(), *head.parameters()], lr=WARM_UP_RATE)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    generator = torch.Generator().manual_seed(seed)
    errors = []
    for _ in tqdm(range(steps), desc="projector", unit="step"):
        rows = torch.randint(len(scans), (WARM_UP_BATCH,), generator=generator)
        features = model.model.get_fmri_features(scans[rows]).unflatten(0, scans[rows].shape)
        guess = head(features.mean(1) / scale)
        known = ~aims[rows].isnan()
        loss = F.mse_loss(guess[known], aims[rows][known])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        errors.append(loss.item())
    return 1 - float(np.mean(errors[-20:])) / float(np.nanvar(targets.astype(np.float32)))


def fit_levels(model: FmriLMForConditionalGeneration, codes: np.ndarray, levels: np.ndarray) -> float:
    """
    Fits what the codec tells from codes int [scans, tokens] to their scans' levels int [scans, descriptors] (-1 where
    unknown): where one level ends and the next begins, and how sure the codec is.

    Returns:
        Share of the levels that are the likeliest ones to the codec.
    """
    tokens = model.model.descriptors
    if tokens is None:
        raise ValueError("expected a model whose prompts hold descriptor tokens, got one without")
    with torch.no_grad():
        z_scores = torch.cat([model.model.describe_scans(part) for part in torch.from_numpy(codes).split(256)])
    truth = torch.from_numpy(levels).long()
    known = truth >= 0
    optimizer = torch.optim.Adam([tokens.middle, tokens.log_width, tokens.log_sharpness], lr=LEVEL_RATE)
    for _ in range(LEVEL_STEPS):
        chances = tokens.probabilities(z_scores)
        loss = F.nll_loss(chances[known].clamp(min=1e-6).log(), truth[known])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float((chances.argmax(-1) == truth)[known].float().mean())


def fit_autoregression(model: FmriLMForConditionalGeneration, codes: np.ndarray, steps: int, seed: int) -> float:
    """
    Fits what codes say of the next step by themselves: how common each is in its slot, then the map of low rank, by
    cross-entropy. What the language model adds starts at nothing. Seconds here give what it would take long to reach.

    Args:
        codes: int [scans, tokens], at least two steps.

    Returns:
        Perplexity of the next codes in the last batches.
    """
    part, codec = model.fmri_autoregression, model.model.codec
    slots, size = codec.config.tokens_per_step, codec.config.codebook_size
    codebook = model.codebook()
    in_steps = torch.from_numpy(codes).unflatten(1, (-1, slots))
    places = in_steps + size * torch.arange(slots)
    counts = torch.bincount(places.flatten(), minlength=slots * size).view(slots, size) + PSEUDO_COUNT
    batch = max(FIT_TOKENS // in_steps[0].numel(), 1)
    with torch.no_grad():
        part.frequencies.copy_((counts / counts.sum(-1, keepdim=True)).log())
        part.output_proj.weight.zero_()
        model.fmri_head.weight.zero_()
    projections = [part.input_proj.weight, part.output_proj.weight]
    for weight in projections:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(projections, lr=FIT_RATE, weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, steps)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in tqdm(range(steps), desc="autoregression", unit="step"):
        rows = in_steps[torch.randint(len(in_steps), (batch,), generator=generator)]
        vectors = codec.embed_codes(rows).flatten(1, 2)
        kept = torch.rand(vectors.shape, generator=generator) > FIT_DROPOUT
        chosen = torch.ones(rows.shape, dtype=torch.bool)
        chosen[:, -1] = False
        logits = part(vectors * kept / (1 - FIT_DROPOUT), codebook, chosen.flatten(1))
        loss = F.cross_entropy(logits, rows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    for weight in projections:
        weight.requires_grad_(False)
    return float(np.exp(np.mean(losses[-20:])))
