"""What the language model learns from: the words of an answer, and the codes of a scan's next step."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_fmrilm import FmriLMConfig


if TYPE_CHECKING:
    from .modeling_fmrilm import FmriLMModel

# label of what carries no loss
IGNORED = -100


class FmriLMLossMixin:
    """For a model with a `model` (`FmriLMModel`), an `lm_head`, an `fmri_head` and an `fmri_autoregression`."""

    config: FmriLMConfig
    lm_head: nn.Module
    fmri_head: Any
    fmri_autoregression: Any
    if TYPE_CHECKING:
        model: FmriLMModel

    def text_loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """
        Mean cross-entropy of the labelled tokens given the states before them. hidden: [batch, length, hidden];
        labels: [batch, length].
        """
        following = labels[:, 1:]
        scored = following != IGNORED
        logits = self.lm_head(hidden[:, :-1][scored]).float()
        total = F.cross_entropy(logits, following[scored], reduction="sum")
        return total / scored.sum().clamp(min=1)

    def next_codes(self, fmri_codes: torch.Tensor) -> torch.Tensor:
        """The codes [labels] that `next_step_loss` predicts: fmri_codes [scans, tokens] after the first step."""
        following = fmri_codes[:, self.config.codec_config.tokens_per_step :]
        return following[following >= 0]

    def next_step_loss(
        self, hidden: torch.Tensor, input_ids: torch.Tensor, fmri_codes: torch.Tensor
    ) -> torch.Tensor:
        """
        Mean cross-entropy of code k of step t+1 given slot k of step t (paper Eq. 5); the last step of a scan has
        no label. hidden: [batch, length, hidden]; fmri_codes: [scans, tokens].
        """
        following = self.next_codes(fmri_codes)
        if not len(following):
            return hidden.new_zeros(())
        states = hidden[input_ids == self.config.fmri_token_id]
        # the states are those of all valid codes, scan after scan; a scan's last step has nothing to predict
        per_step = self.config.codec_config.tokens_per_step
        has_next = F.pad(fmri_codes[:, per_step:] >= 0, (0, per_step))
        vectors = self.model.codec.embed_codes(fmri_codes.clamp(min=0))
        logits = self.next_code_logits(states[has_next[fmri_codes >= 0]], vectors, has_next)
        return F.cross_entropy(logits.float(), following)

    def next_code_logits(self, states: torch.Tensor, vectors: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """
        Logits [n, codebook_size] of the codes that follow the tokens chosen, bool [scans, tokens], whole steps of the
        codes' vectors [scans, tokens, codebook_dim]; states [n, hidden]: the language model's at those tokens.
        """
        return self.fmri_head(states) + self.fmri_autoregression(vectors, self.codebook(), chosen)

    def codebook(self) -> torch.Tensor:
        """Vectors [codebook_size, codebook_dim] of all codes."""
        codec = self.model.codec
        return codec.embed_codes(torch.arange(codec.config.codebook_size, device=codec.device))


__all__ = ["FmriLMLossMixin", "IGNORED"]
