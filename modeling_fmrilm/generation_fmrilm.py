"""How the language model answers: scores of allowed answers, and what transformers' `generate` needs to know."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, GenerationMixin
from transformers.masking_utils import create_masks_for_generate

from .choices_fmrilm import ChoiceTree
from .configuration_fmrilm import FmriLMConfig
from .steps_fmrilm import check_context, positions


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
        states, cache = outputs.last_hidden_state[rows, last][:, None], outputs.past_key_values
        tree = ChoiceTree(choices, self.device)
        if tree.nodes:
            states = torch.cat([states, self._read_tree(tree, cache, steps, mask)], 1)
        return tree.totals(self.lm_head(states).float().log_softmax(-1))

    def _read_tree(
        self, tree: ChoiceTree, cache: Cache, steps: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Last hidden states [batch, nodes, hidden] after a cached prompt; mask, steps: of the prompt."""
        depth = int(tree.depths.max()) + 1
        steps, mask = F.pad(steps, (0, depth)), F.pad(mask, (0, depth), value=1)
        position_ids = positions(steps, mask)[:, -depth:]
        check_context(self.config.get_text_config(), position_ids, steps)
        embeddings = self.model.get_input_embeddings()(tree.input_ids.expand(len(mask), -1))
        masks: Any = create_masks_for_generate(
            config=self.config.get_text_config(),
            inputs_embeds=embeddings[:, :depth],
            attention_mask=mask,
            past_key_values=cache,
            position_ids=position_ids,
            # of text alone, so that no block opens; but then there is always a mask to take apart
            block_sequence_ids=torch.full_like(steps, -1),
        )
        masks = {name: tree.mask(one) for name, one in masks.items()} if isinstance(masks, dict) else tree.mask(masks)
        return self.model(
            inputs_embeds=embeddings,
            attention_mask=masks,
            position_ids=position_ids[:, tree.depths],
            past_key_values=cache,
        ).last_hidden_state

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
