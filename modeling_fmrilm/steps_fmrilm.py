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


__all__ = ["positions", "step_ids"]
