"""What the Trainers of the three stages share: parts of the loss, numbers that stay finite, whole checkpoints."""

import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from .checkpoints import output_folder, remove_broken, seal
from .data.length_buckets import LengthBuckets


class LossPartsTrainer(Trainer):
    """
    A Trainer on the model's own loss that also logs the mean of each named part of it since the last log. A loss or a
    weight that is no number ends training with FloatingPointError before anything of it is saved. A checkpoint is
    sealed when it is whole, and only then do older ones go.
    """

    model: torch.nn.Module
    loss_parts: Sequence[str] = ()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._parts = defaultdict(list)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # not super(): TRL's trainers put a loss of their own in between, which knows nothing of the codes
        outputs: Any
        loss, outputs = Trainer.compute_loss(
            self, model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        parts = {name: outputs[name].detach() for name in self.loss_parts if outputs.get(name) is not None}
        self._check_finite({**parts, "loss": loss.detach()})
        # evaluation must not mix into what is logged of training
        if model.training:
            for name, value in parts.items():
                self._parts[name].append(value)
        return (loss, outputs) if return_outputs else loss

    def _check_finite(self, parts: dict[str, torch.Tensor]) -> None:
        finite = torch.stack(list(parts.values())).isfinite()
        if not finite.all():
            broken = next(name for name, good in zip(parts, finite.tolist(), strict=True) if not good)
            raise FloatingPointError(f"step {self.state.global_step + 1}: {broken} is {parts[broken].item()}")

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            logs.update({name: torch.stack(values).mean().item() for name, values in self._parts.items()})
            self._parts.clear()
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        for name, value in self.model.named_parameters():
            if value.requires_grad and not value.isfinite().all():
                # the update that follows a finite loss can still break the weights
                raise FloatingPointError(f"step {self.state.global_step}: {name} holds values that are not finite")
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        # a pickle with paths of this machine, which nothing reads
        Path(output_dir or output_folder(self.args), TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _save_checkpoint(self, model, trial) -> None:
        output = self._get_output_dir(trial)
        folder = Path(output, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            # what a run that did not end may have left there
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(folder)
            remove_broken(Path(output))
            rotate_checkpoints(output, limit, self.state.best_model_checkpoint)


class JointTrainer(LossPartsTrainer):
    """
    For the language model: the two losses, each weighted by its own labels over an accumulated batch. With
    `train_sampling_strategy="group_by_length"`, batches are those of `LengthBuckets`.
    """

    loss_parts = ("text_loss", "fmri_loss")

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        # the epoch is asked for when it begins, which holds for a resumed one, too
        return LengthBuckets(rows[self.args.length_column_name], per_step, seed, lambda: int(self.state.epoch or 0))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        config: Any = self.model.config
        per_step = config.codec_config.tokens_per_step
        counts = [(batch["fmri_codes"][:, per_step:] >= 0).sum() for batch in batches if "fmri_codes" in batch]
        if counts:
            total = torch.stack(counts).sum().to(device)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                total = torch.as_tensor(self.accelerator.gather(total)).sum()
            for batch in batches:
                batch["num_fmri_items_in_batch"] = total.clamp(min=1)
        return batches, items


def training_options(output: str | Path, steps: int, batch: int, learning_rate: float, seed: int) -> dict[str, Any]:
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
