"""Stage 3: instruction tuning with TRL on chats about scans."""

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from fmrilm.processors import FmriLMProcessor

from .collator import ChatCollator
from .trainer import JointTrainer


# TRL's own preparation knows neither scans nor codes: the collator does that work
REQUIRED = {"max_length": None, "remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}


class FmriLMSFTTrainer(JointTrainer, SFTTrainer):
    """TRL's SFTTrainer on the model's own loss: labelled tokens alone meet the vocabulary, and codes stay in it."""


def train_sft(
    model: PreTrainedModel | PeftModel, dataset: Dataset, processor: FmriLMProcessor, **options
) -> PreTrainedModel | PeftModel:
    """Tunes on rows {"messages", "codes"}; options are those of `SFTConfig`."""
    trainer = FmriLMSFTTrainer(
        model=model,
        args=SFTConfig(**{**options, **REQUIRED}),
        train_dataset=dataset,
        data_collator=ChatCollator(processor),
        processing_class=processor,
    )
    trainer.train()
    return model
