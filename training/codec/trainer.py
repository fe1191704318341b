"""
Stage 1: the codec learns to write scans as discrete tokens that carry their signal and their descriptors.

As a program: `accelerate launch -m fmrilm.training.codec.program --config codec.yaml`.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments

from fmrilm.alignment_fmricodec import reversal_strength
from fmrilm.modeling_fmricodec import FmriCodecModel

from ..data.dataset import Window, collate_signals
from ..trainer import LossPartsTrainer
from .fit import fit_descriptor_head
from .metrics import codebook_results, fc_correlation, r_squared, retrieval_results
from .optimizers import MuonWithAdamW


@dataclass
class CodecTrainingArguments(TrainingArguments):
    """TrainingArguments with what stage 1 adds."""

    unquantized_steps: int = field(
        default=0,
        metadata={"help": "First steps without rounding to codes: a k-means start then sees trained vectors."},
    )
    words_per_step: int = field(
        default=512, metadata={"help": "Word embeddings that the domain classifier sees beside a batch's tokens."}
    )


class CodecTrainer(LossPartsTrainer):
    """
    Trains an `FmriCodecModel` on batches of `collate_signals`, with Muon on the layers' matrices. Evaluation is of
    items as `collate_signals` takes them.
    """

    args: CodecTrainingArguments
    loss_parts = (
        "reconstruction_loss",
        "commitment_loss",
        "descriptor_loss",
        "alignment_loss",
        "domain_loss",
        "perplexity",
    )

    def __init__(self, *args, word_embeddings: torch.Tensor | None = None, head_items: int = 0, **kwargs):
        """
        word_embeddings: [vocabulary, text_hidden_size] of the frozen language model, for the domain loss. head_items:
        training items that the descriptor head is fitted to before and after training; 0: it is trained instead.
        """
        super().__init__(*args, **kwargs)
        self.word_embeddings = word_embeddings
        self.head_items = head_items

    def train(self, *args, **kwargs):
        self._fit_head()
        output = super().train(*args, **kwargs)
        self._fit_head()
        return output

    def _fit_head(self) -> None:
        model: Any = self.model
        dataset: Any = self.train_dataset
        if self.head_items:
            fit_descriptor_head(model, [dataset[index] for index in range(self.head_items)])

    def create_optimizer(self) -> torch.optim.Optimizer:
        self.optimizer = MuonWithAdamW.for_layers(self.model, self.args.learning_rate, self.args.weight_decay)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        step = self.state.global_step
        inputs = {**inputs, "quantize": step >= self.args.unquantized_steps}
        if self.word_embeddings is not None:
            rows = torch.randint(len(self.word_embeddings), (self.args.words_per_step,))
            inputs["word_embeddings"] = self.word_embeddings[rows].to(inputs["fmri_values"].device)
            inputs["reversal"] = reversal_strength(step / self.state.max_steps)
        return super().compute_loss(model, inputs, return_outputs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Each rank evaluates all items: they are few, and every rank then decides on the same numbers."""
        items: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        model: Any = self.model
        scores = evaluate_items(model, items, self.args.per_device_eval_batch_size)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def train_codec(
    model: FmriCodecModel, dataset: Dataset, args: CodecTrainingArguments, head_items: int = 0
) -> FmriCodecModel:
    CodecTrainer(
        model=model, args=args, train_dataset=dataset, data_collator=collate_signals, head_items=head_items
    ).train()
    return model.eval()


@torch.no_grad()
def evaluate_items(model: FmriCodecModel, items: list[dict[str, np.ndarray]], batch_size: int = 16) -> dict:
    """Reconstruction, codebook and, where items have a "text_embedding", retrieval over items of one length."""
    training = model.training
    model.eval()
    signals, guesses, codes, scans, texts = [], [], [], [], []
    for start in range(0, len(items), batch_size):
        chosen = items[start : start + batch_size]
        batch = {name: value.to(model.device) for name, value in collate_signals(chosen).items()}
        outputs = model(**batch)
        for item, guess in zip(chosen, outputs.reconstruction.float().cpu().numpy(), strict=True):
            signals.append(item["signal"])
            guesses.append(guess[: item["signal"].shape[1]].T)
        codes.append(outputs.codes[outputs.codes >= 0].cpu().numpy())
        if model.alignment is not None and "text_embeddings" in batch:
            scans.append(outputs.scan_embeddings.cpu().numpy())
            texts.append(model.alignment.embed_texts(batch["text_embeddings"]).cpu().numpy())
    model.train(training)
    size = model.config.codebook_size
    used = codebook_results(np.concatenate(codes)[None], size)
    results = {
        "r_squared": r_squared(signals, guesses),
        "perplexity": used["perplexity"],
        "codebook_usage": used["codebook_used"] / size,
    }
    correlation = fc_correlation(signals, guesses)
    # undefined where a ROI is decoded to a constant, as before training
    results["fc_correlation"] = float("nan") if correlation is None else correlation
    if scans:
        results.update(retrieval_results(np.concatenate(scans), np.concatenate(texts)))
    return results


@torch.no_grad()
def encode_items(model: FmriCodecModel, items: list[dict[str, np.ndarray]], batch_size: int = 16) -> np.ndarray:
    """Codes int64 [items, tokens] of items as `collate_signals` takes them, all of one length."""
    order = sorted(range(len(items)), key=lambda index: items[index]["signal"].shape[1])
    codes = [np.empty(0, np.int64)] * len(items)
    for start in range(0, len(items), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate_signals([items[index] for index in chosen])
        inputs = {name: batch[name].to(model.device) for name in ("fmri_values", "roi_coordinates", "fmri_mask")}
        for index, row in zip(chosen, model.encode(**inputs).cpu().numpy(), strict=True):
            codes[index] = row
    return np.stack(codes)


def window_items(windows: list[Window]) -> list[dict[str, np.ndarray]]:
    """Windows as `collate_signals` takes them."""
    return [
        {"signal": w.signal, "coordinates": w.scan.atlas.coordinates, "descriptors": w.descriptors.astype(np.float32)}
        for w in windows
    ]
