"""Stage 1: the codec learns to write scans as discrete tokens that carry their signal and their descriptors."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments

from fmrilm.modeling_fmricodec import FmriCodecModel

from .data import Window, collate_signals
from .optimizers import MuonWithAdamW
from .trainer import LossPartsTrainer


@dataclass
class CodecTrainingArguments(TrainingArguments):
    """TrainingArguments with what stage 1 adds."""

    unquantized_steps: int = field(
        default=60,
        metadata={"help": "First steps without rounding to codes: the k-means start then sees trained vectors."},
    )


class CodecTrainer(LossPartsTrainer):
    """Trains an `FmriCodecModel` on batches of `collate_signals`, with Muon on the layers' matrices."""

    loss_parts = ("reconstruction_loss", "commitment_loss", "descriptor_loss", "perplexity")

    def create_optimizer(self) -> torch.optim.Optimizer:
        self.optimizer = MuonWithAdamW.for_layers(self.model, self.args.learning_rate, self.args.weight_decay)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {**inputs, "quantize": self.state.global_step >= self.args.unquantized_steps}
        return super().compute_loss(model, inputs, return_outputs=return_outputs)


def train_codec(model: FmriCodecModel, dataset: Dataset, args: CodecTrainingArguments) -> FmriCodecModel:
    CodecTrainer(model=model, args=args, train_dataset=dataset, data_collator=collate_signals).train()
    return model.eval()


@torch.no_grad()
def encode_items(model: FmriCodecModel, items: list[dict[str, np.ndarray]], batch_size: int = 16) -> np.ndarray:
    """Codes int64 [items, tokens] of items as `collate_signals` takes them, all of one length."""
    order = sorted(range(len(items)), key=lambda index: items[index]["signal"].shape[1])
    codes = [None] * len(items)
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
