"""Which token of a sequence belongs to which step of a scan, and what follows from it."""

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate


def step_ids(input_ids: torch.Tensor, fmri_token_id: int, tokens_per_step: int) -> torch.Tensor:
    """
    The one place that says which token belongs to which step: int64 [batch, length], 0 for text and n > 0 for the
    n-th step of its row (counted over all its scans). Attention blocks and positions follow from it.
    """
    is_fmri = input_ids == fmri_token_id
    index = is_fmri.long().cumsum(-1) - 1
    return (index // tokens_per_step + 1) * is_fmri


def positions(steps: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids [batch, length]: each text token takes one, the tokens of a step share one, padding takes none."""
    opens_step = F.pad(steps[:, 1:] != steps[:, :-1], (1, 0), value=True)
    advances = ((steps == 0) | opens_step) & attention_mask.bool()
    return (advances.long().cumsum(-1) - 1).clamp(min=0)


def check_context(text_config: PreTrainedConfig, position_ids: torch.Tensor, steps: torch.Tensor) -> None:
    """ValueError if scans and text take more positions than the language model has."""
    limit = getattr(text_config, "max_position_embeddings", None)
    # few sequences have as many tokens; only then is it worth looking at the positions themselves
    if limit is None or steps.shape[1] <= limit:
        return
    taken = int(position_ids.max()) + 1
    if taken > limit and (steps > 0).any():
        raise ValueError(
            f"expected at most {limit} positions, the language model's context, got {taken}: cut the scan into "
            "windows (the processor's window='sliding') or ask less at a time"
        )


def attention_masks(
    text_config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    past_key_values: Cache | None,
    position_ids: torch.Tensor | None,
    steps: torch.Tensor,
) -> torch.Tensor | dict | None:
    """Causal over text and steps, bidirectional inside a step: what the language model's layers expect."""
    # where no scan is read now, the backbone's own fast path (no mask at all) applies; blocks are looked up by
    # places in the whole sequence, what is cached included
    blocks = steps - 1 if bool((steps[:, -inputs_embeds.shape[1] :] > 0).any()) else None
    return create_masks_for_generate(
        config=text_config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
        block_sequence_ids=blocks,
    )


def whole_steps(
    fmri_values: torch.Tensor, fmri_mask: torch.Tensor | None, patch_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Scans [batch, rois, time] and their masks without the frames before the first whole step counted from the end, so
    that the last step ends with the last frame; ValueError for a scan of less than one step.
    """
    if fmri_mask is None:
        fmri_mask = torch.ones_like(fmri_values, dtype=torch.bool)
    frames = fmri_mask.any(1).sum(-1)
    kept = frames // patch_length * patch_length
    if not kept.all():
        raise ValueError(f"expected scans of at least one step of {patch_length} frames, got {int(frames.min())}")
    index = torch.arange(int(kept.max()), device=fmri_values.device)
    source = (index + (frames - kept)[:, None]).clamp(max=fmri_values.shape[-1] - 1)
    source = source[:, None].expand(-1, fmri_values.shape[1], -1)
    inside = (index < kept[:, None])[:, None]
    return fmri_values.gather(-1, source), fmri_mask.gather(-1, source) & inside


__all__ = ["attention_masks", "check_context", "positions", "step_ids", "whole_steps"]
