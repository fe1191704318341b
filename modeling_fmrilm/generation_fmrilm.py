"""How the language model answers: scores of allowed answers, and what transformers' `generate` needs to know."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin
from transformers.masking_utils import create_masks_for_generate

from .configuration_fmrilm import FmriLMConfig
from .steps_fmrilm import positions


if TYPE_CHECKING:
    from collections.abc import Callable

    from .modeling_fmrilm import FmriLMModel

# what a forward pass may hold beside text, one entry a scan
SCAN_INPUTS = ("fmri_values", "roi_coordinates", "fmri_mask", "fmri_codes", "fmri_features")


class FmriLMGenerationMixin(GenerationMixin):
    """For a model with a `model` (`FmriLMModel`) and an `lm_head`."""

    config: FmriLMConfig
    device: torch.device
    lm_head: nn.Module
    if TYPE_CHECKING:
        model: FmriLMModel
        # declared by the library for whole models alone
        generate: Callable[..., torch.Tensor]

    @torch.no_grad()
    def score_choices(self, inputs: dict[str, torch.Tensor], choices: list[list[int]]) -> torch.Tensor:
        """
        Log-likelihood [batch, choices] of each allowed answer (token ids) after the prompts in `inputs`, which run
        once; softmax over the last axis gives the probability of each choice. With a `past_key_values` (used up
        here), `attention_mask` and `mm_token_type_ids` cover the cached tokens, too.
        """
        inputs = dict(inputs)
        input_ids = inputs["input_ids"]
        mask = inputs.setdefault("attention_mask", torch.ones_like(input_ids))
        steps = inputs.setdefault("mm_token_type_ids", self.model.step_ids(input_ids))
        if steps.shape != mask.shape:
            raise ValueError(f"expected mm_token_type_ids of shape {tuple(mask.shape)}, got {tuple(steps.shape)}")
        outputs = self.model(**inputs, use_cache=True)
        length, rows = input_ids.shape[1], torch.arange(len(input_ids), device=self.device)
        last = (torch.arange(length, device=self.device) * mask[:, -length:]).argmax(-1)
        scores = self.lm_head(outputs.last_hidden_state[rows, last]).float().log_softmax(-1)
        totals = scores[:, [choice[0] for choice in choices]]
        longest = max(len(choice) for choice in choices)
        if longest == 1:
            return totals
        # each choice continues the cached prompt: all but its last token are read, all but its first are scored
        count = len(choices)
        cache = outputs.past_key_values
        cache.batch_repeat_interleave(count)
        padded = input_ids.new_zeros(count, longest)
        for row, choice in enumerate(choices):
            padded[row, : len(choice)] = torch.tensor(choice, device=self.device)
        lengths = torch.tensor([len(choice) for choice in choices], device=self.device)
        scored = torch.arange(1, longest, device=self.device) < lengths[:, None]
        read = scored.long().repeat(len(rows), 1)
        outputs = self.model(
            padded[:, :-1].repeat(len(rows), 1),
            attention_mask=torch.cat([mask.repeat_interleave(count, 0), read], -1),
            mm_token_type_ids=F.pad(steps.repeat_interleave(count, 0), (0, longest - 1)),
            past_key_values=cache,
        )
        scores = self.lm_head(outputs.last_hidden_state).float().log_softmax(-1).unflatten(0, (len(rows), count))
        following = padded[:, 1:].expand(len(rows), -1, -1)
        return totals + (scores.gather(-1, following[..., None])[..., 0] * scored).sum(-1)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs,
    ) -> dict:
        steps = self.model.step_ids(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        # a prompt of inputs_embeds has no ids: nothing is known of its steps
        steps = F.pad(steps, (mask.shape[1] - steps.shape[1], 0))
        kwargs.update(mm_token_type_ids=steps, position_ids=positions(steps, mask))
        if kwargs.get("use_cache", True) and not is_first_iteration:
            # the cache holds the scans already
            kwargs = {name: value for name, value in kwargs.items() if name not in SCAN_INPUTS}
        # the library declares its mixin's methods for whole models alone
        return super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    @staticmethod
    def create_masks_for_generate(
        config, mm_token_type_ids=None, block_sequence_ids=None, **kwargs
    ) -> torch.Tensor | dict | None:
        """The masks a static cache needs before the forward pass."""
        for name in ("token_type_ids", "is_first_iteration"):
            kwargs.pop(name, None)
        blocks = None if mm_token_type_ids is None else mm_token_type_ids - 1
        return create_masks_for_generate(config=config.get_text_config(), block_sequence_ids=blocks, **kwargs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, *, input_ids: torch.Tensor, **kwargs
    ):
        """Repeats rows for beams; a row's scans are repeated as a block: A, B, A, B for two scans and two beams."""
        if expand_size == 1:
            return input_ids, kwargs
        scans = {name: kwargs.pop(name) for name in SCAN_INPUTS if kwargs.get(name) is not None}
        is_fmri = input_ids == self.config.fmri_token_id
        # a scan begins where its placeholders do: not every prompt has start tokens
        counts = (is_fmri & ~F.pad(is_fmri[:, :-1], (1, 0))).sum(-1).tolist()
        blocks = torch.arange(sum(counts), device=input_ids.device).split(counts)
        order = torch.cat([block.repeat(expand_size) for block in blocks])
        input_ids, kwargs = super()._expand_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, {**kwargs, **{name: value[order] for name, value in scans.items()}}


__all__ = ["FmriLMGenerationMixin"]
