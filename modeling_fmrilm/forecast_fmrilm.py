"""What the brain does next: codes rolled forward and decoded to signal, and how unexpected each step was."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from .configuration_fmrilm import FmriLMConfig
from .steps_fmrilm import positions, whole_steps


if TYPE_CHECKING:
    from .modeling_fmrilm import FmriLMModel


class FmriLMForecastMixin:
    """For a model with a `model` (`FmriLMModel`) and an `fmri_head`. A scan alone: its opening token and its codes."""

    config: FmriLMConfig
    fmri_head: Any
    if TYPE_CHECKING:
        model: FmriLMModel

    @torch.no_grad()
    def forecast(
        self,
        fmri_values: torch.Tensor,
        roi_coordinates: torch.Tensor,
        fmri_mask: torch.Tensor | None = None,
        steps: int = 1,
        temperature: float | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """
        Signal [batch, rois, steps * patch_length] that follows the scans' last frames, in the unit of fmri_values:
        robust z-scores of the context, so that nothing of the future enters. Frames before the first whole step,
        counted from the end, are left out. fmri_values, roi_coordinates, fmri_mask, temperature and generator are
        those of [`FmriLMModel.forward`] and `forecast_codes`.
        """
        codec = self.model.codec
        values, mask = whole_steps(fmri_values, fmri_mask, codec.config.patch_length)
        context = self.model.get_fmri_codes(values, roi_coordinates, mask)
        codes = self.forecast_codes(context, steps, temperature, generator)
        # the decoder looks back as the encoder does, so it is given the context, too
        signal = codec.decode(codes, roi_coordinates)
        frames = torch.arange(steps * codec.config.patch_length, device=signal.device)
        first = (context >= 0).sum(-1, keepdim=True) // codec.config.tokens_per_step * codec.config.patch_length
        return signal.gather(-1, (first + frames)[:, None].expand(-1, signal.shape[1], -1))

    @torch.no_grad()
    def forecast_codes(
        self,
        fmri_codes: torch.Tensor,
        steps: int,
        temperature: float | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """
        Codes [scans, tokens] (-1 is padding), followed by those of the next `steps` steps. Each slot takes its most
        likely code, or with a `temperature` a draw; the slots of one step are drawn independently.
        """
        if steps < 1:
            raise ValueError(f"expected at least one step to forecast, got {steps}")
        if temperature is not None and temperature <= 0:
            raise ValueError(f"expected a temperature above 0, or None for the most likely codes, got {temperature}")
        per_step, max_steps = self.config.codec_config.tokens_per_step, self.config.codec_config.max_steps
        lengths = (fmri_codes >= 0).sum(-1, keepdim=True)
        longest = int(lengths.max())
        if longest // per_step + steps > max_steps:
            raise ValueError(
                f"expected a context and a forecast of at most max_steps={max_steps} steps together, got "
                f"{longest // per_step} and {steps}"
            )
        codes = F.pad(fmri_codes[:, :longest], (0, steps * per_step), value=-1)
        # contexts end together, so that all scans go on at the same place
        place = torch.arange(1 + codes.shape[1], device=codes.device) - (longest - lengths)
        ids = torch.where(place > 0, self.config.fmri_token_id, self.config.fmri_start_token_id)
        mask = (place >= 0).long()
        step_ids = self.model.step_ids(ids)
        position_ids = positions(step_ids, mask)
        cache, start = None, 0
        for offset in range(0, steps * per_step, per_step):
            stop = 1 + longest + offset
            outputs = self.model(
                inputs_embeds=self.model.embed(ids[:, :stop], codes)[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=position_ids[:, start:stop],
                mm_token_type_ids=step_ids[:, :stop],
                past_key_values=cache,
                use_cache=True,
            )
            cache, start = outputs.past_key_values, stop
            logits = self.fmri_head(outputs.last_hidden_state[:, -per_step:]).float()
            if temperature is None:
                following = logits.argmax(-1)
            else:
                chances = (logits / temperature).softmax(-1).flatten(0, 1)
                following = torch.multinomial(chances, 1, generator=generator).view(-1, per_step)
            codes = codes.scatter(1, lengths + offset + torch.arange(per_step, device=codes.device), following)
        return codes

    @torch.no_grad()
    def surprise(self, fmri_codes: torch.Tensor) -> torch.Tensor:
        """
        Negative log-likelihood [scans, steps] of each step's codes [scans, tokens] given the steps before, in nats a
        code (mean over slots): how unexpected each step is. NaN for the first step and for padding (-1).
        """
        per_step = self.config.codec_config.tokens_per_step
        valid = fmri_codes >= 0
        ids = torch.where(valid, self.config.fmri_token_id, self.config.fmri_start_token_id)
        ids = F.pad(ids, (1, 0), value=self.config.fmri_start_token_id)
        mask = F.pad(valid.long(), (1, 0), value=1)
        hidden = self.model(ids, attention_mask=mask, fmri_codes=fmri_codes).last_hidden_state
        scores = self.fmri_head(hidden[:, 1:-per_step]).float().log_softmax(-1)
        following = fmri_codes[:, per_step:]
        unexpected = -scores.gather(-1, following.clamp(min=0)[..., None])[..., 0]
        unexpected = unexpected.masked_fill(following < 0, float("nan")).unflatten(1, (-1, per_step)).mean(-1)
        return F.pad(unexpected, (1, 0), value=float("nan"))


__all__ = ["FmriLMForecastMixin"]
