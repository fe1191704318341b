"""
Stage 3: instruction tuning with TRL on chats about scans.

As a program: `accelerate launch -m fmrilm.training.sft.program --config sft.yaml`.
"""

from typing import Any, TypeVar

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel
from trl import SFTTrainer

from fmrilm.processors import FmriLMProcessor

from ..arguments import FmriLMSFTConfig
from ..data.collator import ChatCollator
from ..trainer import JointTrainer


Trained = TypeVar("Trained", bound=PreTrainedModel | PeftModel)


class FmriLMSFTTrainer(JointTrainer, SFTTrainer):
    """TRL's SFTTrainer on the model's own loss: labelled tokens alone meet the vocabulary, and codes stay in it."""


def train_sft(
    model: Trained, dataset: Dataset, processor: FmriLMProcessor, **options: Any
) -> Trained:
    """Tunes on rows {"messages", "codes"} in random order; options are those of `FmriLMSFTConfig`."""
    trainer = FmriLMSFTTrainer(
        model=model,
        args=FmriLMSFTConfig(**{"train_sampling_strategy": "random", **options}),
        train_dataset=dataset,
        data_collator=ChatCollator(processor),
        processing_class=processor,
    )
    trainer.train()
    return model
