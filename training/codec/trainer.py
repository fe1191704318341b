"""Training of a codec after its fit: reconstruction, and where there is a language model, alignment with its text."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from fmrilm.modeling_fmricodec import reversal_strength

from ..trainer import CheckedTrainer
from .metrics import evaluate_codec
from .optimizers import MuonWithAdamW


@dataclass
class CodecTrainingArguments(TrainingArguments):
    """TrainingArguments with what stage 1 adds. Without max_steps, the codec is fitted and not trained."""

    max_steps: int = field(default=0, metadata={"help": "Updates after the fit; 0: none."})
    words_per_step: int = field(
        default=512, metadata={"help": "Word embeddings that the domain classifier sees beside a batch's tokens."}
    )

    def __post_init__(self) -> None:
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        # the collator reads columns that no model's signature names
        self.remove_unused_columns = False
        if self.max_steps < 0:
            raise ValueError(f"expected max_steps of at least 0, got {self.max_steps}: mixtures never end")
        super().__post_init__()


class CodecTrainer(CheckedTrainer):
    """
    Trains an `FmriCodecModel` on batches of `collate_signals`, with Muon on the layers' matrices. Evaluation is of
    items as `collate_signals` takes them.
    """

    args: CodecTrainingArguments

    def __init__(self, *args, word_embeddings: torch.Tensor | None = None, **kwargs):
        """word_embeddings: [vocabulary, text_hidden_size] of the frozen language model, for the domain loss."""
        super().__init__(*args, **kwargs)
        self.word_embeddings = word_embeddings

    def create_optimizer(self) -> torch.optim.Optimizer:
        self.optimizer = MuonWithAdamW.for_layers(self.model, self.args.learning_rate, self.args.weight_decay)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.word_embeddings is not None:
            rows = torch.randint(len(self.word_embeddings), (self.args.words_per_step,))
            words = self.word_embeddings[rows].to(inputs["fmri_values"].device)
            reversal = reversal_strength(self.state.global_step / self.state.max_steps)
            inputs = {**inputs, "word_embeddings": words, "reversal": reversal}
        return super().compute_loss(model, inputs, return_outputs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Each rank evaluates all items: they are few, and every rank then decides on the same numbers."""
        items: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        model: Any = self.model
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in evaluate_codec(model, items).items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


__all__ = ["CodecTrainer", "CodecTrainingArguments"]
