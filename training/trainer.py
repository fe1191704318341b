"""What the Trainers of the three stages share: they log each part of the loss."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Trainer


class LossPartsTrainer(Trainer):
    """A Trainer on the model's own loss that also logs the mean of each named part of it since the last log."""

    loss_parts: Sequence[str] = ()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._parts = defaultdict(list)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # not super(): TRL's trainers put a loss of their own in between, which knows nothing of the codes
        loss, outputs = Trainer.compute_loss(
            self, model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        for name in self.loss_parts:
            value = outputs.get(name)
            # evaluation must not mix into what is logged of training
            if value is not None and model.training:
                self._parts[name].append(value.detach())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            logs.update({name: torch.stack(values).mean().item() for name, values in self._parts.items()})
            self._parts.clear()
        super().log(logs, *args, **kwargs)


class JointTrainer(LossPartsTrainer):
    """For the language model: the two losses, each weighted by its own labels over an accumulated batch."""

    loss_parts = ("text_loss", "fmri_loss")

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        per_step = self.model.config.codec_config.tokens_per_step
        counts = [(batch["fmri_codes"][:, per_step:] >= 0).sum() for batch in batches if "fmri_codes" in batch]
        if counts:
            total = torch.stack(counts).sum().to(device)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                total = self.accelerator.gather(total).sum()
            for batch in batches:
                batch["num_fmri_items_in_batch"] = total.clamp(min=1)
        return batches, items


def training_options(output: Path, steps: int, batch: int, learning_rate: float, seed: int) -> dict:
    """Trainer arguments that the demo's three stages share: one warm-up, one cosine, nothing reported elsewhere."""
    return {
        "output_dir": str(output),
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "max_grad_norm": 1.0,
        "logging_steps": max(steps // 10, 1),
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": False,
        # the collators read columns that no model's signature names
        "remove_unused_columns": False,
        "seed": seed,
    }


def half_precision() -> bool:
    """Whether bfloat16 arithmetic is fast here: on such a CPU the language model trains twice as fast with it."""
    return torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
