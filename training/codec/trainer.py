"""Training of a codec after its fit: reconstruction, and where there is a language model, alignment with its text."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from ..program import one_device
from ..trainer import CheckedTrainer
from .metrics import evaluate_codec
from .optimizers import MuonWithAdamW


@dataclass
class CodecTrainingArguments(TrainingArguments):
    """TrainingArguments with what stage 1 adds. Without max_steps, the codec is fitted and not trained."""

    max_steps: int = field(default=0, metadata={"help": "Updates after the fit; 0: none."})

    def __post_init__(self) -> None:
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        # the collator reads columns that no model's signature names
        self.remove_unused_columns = False
        if self.max_steps < 0:
            raise ValueError(f"expected max_steps of at least 0, got {self.max_steps}: mixtures never end")
        super().__post_init__()
        self._n_gpu = one_device(self)


class CodecTrainer(CheckedTrainer):
    """
    Trains an `FmriCodecModel` on batches of `collate_signals`, with Muon on the layers' matrices. Evaluation is of
    items as `collate_signals` takes them.
    """

    args: CodecTrainingArguments

    def create_optimizer(self) -> torch.optim.Optimizer:
        self.optimizer = MuonWithAdamW.for_layers(self.model, self.args.learning_rate, self.args.weight_decay)
        return self.optimizer

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Each rank evaluates all items: they are few, and every rank then decides on the same numbers."""
        items: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        model: Any = self.model
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in evaluate_codec(model, items).items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
