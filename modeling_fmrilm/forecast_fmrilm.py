"""What the brain does next: codes rolled forward and decoded to signal, and how unexpected each step was."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from .configuration_fmrilm import FmriLMConfig
from .steps_fmrilm import positions, whole_steps


if TYPE_CHECKING:
    from .modeling_fmrilm import FmriLMModel


def fading(missed: torch.Tensor, length: torch.Tensor, frames: int) -> torch.Tensor:
    """
    Forecast [batch, rois, frames] of what codes leave out of a signal: missed [batch, rois, time] in its first
    `length` [batch, 1] frames, zero after them. The last frame, times powers of the scan's lag-1 autocorrelation.
    """
    strength = (missed[..., 1:] * missed[..., :-1]).sum((1, 2)) / missed.pow(2).sum((1, 2)).clamp(min=1e-12)
    last = missed.gather(-1, (length - 1)[:, None].expand(-1, missed.shape[1], -1))
    ahead = torch.arange(1, frames + 1, device=missed.device)
    return last * strength.clamp(min=0)[:, None, None] ** ahead


class FmriLMForecastMixin:
    """For a model with `model` (`FmriLMModel`) and `next_code_logits`. A scan alone: its opening token and codes."""

    config: FmriLMConfig
    fmri_head: Any
    if TYPE_CHECKING:
        model: FmriLMModel
        # of `FmriLMLossMixin`
        codebook: Callable[[], torch.Tensor]
        next_codes: Callable[[torch.Tensor], torch.Tensor]
        next_code_logits: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

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
        robust z-scores of the context, so that nothing of the future enters. Without a temperature it is the best
        guess, which shrinks to nothing where nothing is known: each slot's vector is the mean of the codebook weighted
        by the codes' probabilities, and what the codes left out of the context's last frame fades (`fading`). With a
        temperature it is the signal of drawn codes, as lively as a brain. Frames before the first whole step, counted
        from the end, are left out. fmri_values, roi_coordinates, fmri_mask, temperature and generator are those of
        [`FmriLMModel.forward`] and `forecast_codes`.
        """
        self._check_reads_codes()
        codec = self.model.codec
        values, mask = whole_steps(fmri_values, fmri_mask, codec.config.patch_length)
        context = self.model.get_fmri_codes(values, roi_coordinates, mask)
        if temperature is None:
            codebook = self.codebook().float()
            vectors = self._roll(context, steps, lambda logits: logits.softmax(-1) @ codebook)
        else:
            codes = self.forecast_codes(context, steps, temperature, generator)
            vectors = codec.embed_codes(codes.clamp(min=0)).masked_fill((codes < 0)[..., None], float("nan"))
        # the decoder looks back as the encoder does, so it is given the context, too
        signal = codec.decode_vectors(vectors.nan_to_num(), roi_coordinates, ~vectors.isnan().any(-1))
        frames = torch.arange(steps * codec.config.patch_length, device=signal.device)
        first = (context >= 0).sum(-1, keepdim=True) // codec.config.tokens_per_step * codec.config.patch_length
        future = signal.gather(-1, (first + frames)[:, None].expand(-1, signal.shape[1], -1))
        if temperature is not None:
            return future
        missed = (values - signal[..., : values.shape[-1]]).masked_fill(~mask, 0)
        return future + fading(missed, first, len(frames))

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
        self._check_reads_codes()
        if temperature is not None and temperature <= 0:
            raise ValueError(f"expected a temperature above 0, or None for the most likely codes, got {temperature}")
        chosen = []

        def choose(logits: torch.Tensor) -> torch.Tensor:
            if temperature is None:
                codes = logits.argmax(-1)
            else:
                chances = (logits / temperature).softmax(-1).flatten(0, 1)
                codes = torch.multinomial(chances, 1, generator=generator).view(logits.shape[:2])
            chosen.append(codes)
            return self.model.codec.embed_codes(codes)

        self._roll(fmri_codes, steps, choose)
        following = torch.cat(chosen, dim=1)
        lengths = (fmri_codes >= 0).sum(-1, keepdim=True)
        codes = F.pad(fmri_codes[:, : int(lengths.max())], (0, following.shape[1]), value=-1)
        return codes.scatter(1, lengths + torch.arange(following.shape[1], device=codes.device), following)

    def _roll(
        self, fmri_codes: torch.Tensor, steps: int, follow: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """
        Vectors [scans, tokens, codebook_dim] of fmri_codes [scans, tokens] and the next `steps` steps, NaN on padding.
        follow: from the logits of the next step's codes [scans, slots, codebook_size] to the vectors that are read on.
        """
        if steps < 1:
            raise ValueError(f"expected at least one step to forecast, got {steps}")
        per_step, max_steps = self.config.codec_config.tokens_per_step, self.config.codec_config.max_steps
        lengths = (fmri_codes >= 0).sum(-1, keepdim=True)
        longest = int(lengths.max())
        if longest // per_step + steps > max_steps:
            raise ValueError(
                f"expected a context and a forecast of at most max_steps={max_steps} steps together, got "
                f"{longest // per_step} and {steps}"
            )
        codes = F.pad(fmri_codes[:, :longest], (0, steps * per_step), value=-1)
        vectors = self.model.codec.embed_codes(codes.clamp(min=0)).masked_fill((codes < 0)[..., None], float("nan"))
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
                inputs_embeds=self.model.embed(ids[:, :stop], vectors)[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=position_ids[:, start:stop],
                mm_token_type_ids=step_ids[:, :stop],
                past_key_values=cache,
                use_cache=True,
            )
            cache, start = outputs.past_key_values, stop
            places = lengths + offset + torch.arange(per_step, device=codes.device)
            present = torch.zeros_like(codes, dtype=torch.bool).scatter(1, places - per_step, True)
            logits = self.next_code_logits(outputs.last_hidden_state[:, -per_step:].flatten(0, 1), vectors, present)
            following = follow(logits.float().unflatten(0, (-1, per_step))).to(vectors.dtype)
            vectors = vectors.scatter(1, places[..., None].expand_as(following), following)
        return vectors

    @torch.no_grad()
    def surprise(self, fmri_codes: torch.Tensor) -> torch.Tensor:
        """
        Negative log-likelihood [scans, steps] of each step's codes [scans, tokens] given the steps before, in nats a
        code (mean over slots): how unexpected each step is. NaN for the first step and for padding (-1).
        """
        self._check_reads_codes()
        per_step = self.config.codec_config.tokens_per_step
        valid = fmri_codes >= 0
        ids = torch.where(valid, self.config.fmri_token_id, self.config.fmri_start_token_id)
        ids = F.pad(ids, (1, 0), value=self.config.fmri_start_token_id)
        mask = F.pad(valid.long(), (1, 0), value=1)
        hidden = self.model(ids, attention_mask=mask, fmri_codes=fmri_codes).last_hidden_state[:, 1:]
        has_next = F.pad(fmri_codes[:, per_step:] >= 0, (0, per_step))
        vectors = self.model.codec.embed_codes(fmri_codes.clamp(min=0))
        logits = self.next_code_logits(hidden[has_next], vectors, has_next).float()
        unexpected = torch.full_like(fmri_codes[:, per_step:], float("nan"), dtype=torch.float32)
        losses = F.cross_entropy(logits, self.next_codes(fmri_codes), reduction="none")
        unexpected[has_next[:, :-per_step]] = losses
        return F.pad(unexpected.unflatten(1, (-1, per_step)).mean(-1), (1, 0), value=float("nan"))

    def _check_reads_codes(self) -> None:
        """ValueError for a model that reads features: what it predicts, codes, is not what it could read on from."""
        if self.config.fmri_input != "codes":
            raise ValueError(
                'expected a model with fmri_input="codes", which can read what it predicts, got '
                f'fmri_input="{self.config.fmri_input}"'
            )


__all__ = ["FmriLMForecastMixin", "fading"]
