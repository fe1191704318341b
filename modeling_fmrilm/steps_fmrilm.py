"""Which token of a sequence belongs to which step of a scan, and what follows from it."""

import torch
import torch.nn.functional as F


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


__all__ = ["positions", "step_ids", "whole_steps"]
