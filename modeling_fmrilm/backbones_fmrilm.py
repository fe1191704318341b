"""Which language models can read scans."""

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate


@torch.no_grad()
def check_backbone(language_model: PreTrainedModel) -> None:
    """ValueError unless it takes embeddings, positions and a mask that lets tokens of one step see each other."""
    width = language_model.get_input_embeddings().get_parameter("weight").shape[1]
    weight = next(language_model.parameters())
    embeddings = torch.linspace(-1, 1, 3 * width, dtype=weight.dtype, device=weight.device).view(1, 3, width)
    states = []
    for blocks in ([-1, -1, -1], [0, 0, -1]):
        inputs = {
            "inputs_embeds": embeddings,
            "attention_mask": torch.ones(1, 3, dtype=torch.long, device=weight.device),
            "past_key_values": None,
            "position_ids": torch.arange(3, device=weight.device)[None],
        }
        mask = create_masks_for_generate(
            config=language_model.config.get_text_config(),
            block_sequence_ids=torch.tensor([blocks], device=weight.device),
            **inputs,
        )
        try:
            states.append(language_model.base_model(**{**inputs, "attention_mask": mask})[0])
        # whatever a foreign model raises here, it is no backbone
        except Exception as error:
            raise ValueError(
                f"{type(language_model).__name__} cannot be the backbone: expected it to take inputs_embeds, "
                f"position_ids and a 4D attention mask, got {type(error).__name__}: {error}"
            ) from error
    if torch.equal(states[0][:, 0], states[1][:, 0]):
        raise ValueError(
            f"{type(language_model).__name__} cannot be the backbone: expected a 4D attention mask to let tokens of "
            "one step see each other, got the same output without it"
        )


__all__ = ["check_backbone"]
