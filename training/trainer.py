"""Trainers: those of transformers and TRL, with checkpoints that are whole and losses that are finite."""

import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import SFTTrainer

from .checkpoints import output_folder, remove_broken, seal
from .data.collator import IGNORED


class SeededLengthGroups(LengthGroupedSampler):
    """
    The library's batches of rows of similar length, of an epoch's own seed: a resumed epoch has the same ones. They
    come in random order: the library's own goes from long rows to short ones, again and again.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int, epoch: Callable[[], int]):
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, epoch

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        rows = list(super().__iter__())
        whole = len(rows) // self.batch_size * self.batch_size
        batches = torch.tensor(rows[:whole], dtype=torch.long).view(-1, self.batch_size)
        order = torch.randperm(len(batches), generator=self.generator)
        return iter(batches[order].flatten().tolist() + rows[whole:])


class CheckedTrainer(Trainer):
    """
    A loss or a weight that is not finite ends training with FloatingPointError before anything of it is saved. A
    checkpoint is sealed when it is whole, and only then do older ones go.
    """

    model: torch.nn.Module

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        # what the processes train on together
        batch = sampler.batch_size * self.args.world_size
        return SeededLengthGroups(batch, sampler.lengths, seed, lambda: int(self.state.epoch or 0))

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not loss.isfinite():
            raise FloatingPointError(f"step {self.state.global_step + 1}: loss is {loss.item()}")
        return loss

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


class AlignmentTrainer(CheckedTrainer):
    """
    For stage 2: the two losses, each weighted by its own labels over an accumulated batch, and the mean of each since
    the last log. Logits are computed where some row has a label.
    """

    loss_parts = ("text_loss", "fmri_loss")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._parts = defaultdict(list)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs: Any
        if model.training:
            labelled = (inputs["labels"][:, 1:] != IGNORED).any(0)
            inputs = {**inputs, "logits_to_keep": labelled.nonzero()[:, 0]}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        # evaluation must not mix into what is logged of training
        if model.training:
            for name in self.loss_parts:
                if outputs.get(name) is not None and (name != "text_loss" or labelled.any()):
                    self._parts[name].append(outputs[name].detach().float().mean())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            logs.update({name: torch.stack(values).mean().item() for name, values in self._parts.items()})
            self._parts.clear()
        super().log(logs, *args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [(batch["fmri_codes"][:, 1:, 0] >= 0).sum() for batch in batches if "fmri_codes" in batch]
        total = torch.tensor(sum(map(int, counts)), device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            # by every rank, whether it has scans or not: the others wait for it
            total = torch.as_tensor(self.accelerator.gather(total)).sum()
        for batch in batches:
            if "fmri_codes" in batch:
                batch["num_fmri_items_in_batch"] = total.clamp(min=1)
        return batches, items


class FmriLMSFTTrainer(CheckedTrainer, SFTTrainer):
    """
    TRL's SFTTrainer, its loss and its metrics, with checkpoints that are whole. Without Triton, the library computes
    logits of whole prompts, up to half of a step: here it gets the labelled tokens alone.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not return_outputs:
            inputs = dict(inputs)
            labels = F.pad(inputs.pop("labels")[:, 1:], (0, 1), value=IGNORED)
            kept = labels != IGNORED
            inputs |= {"shift_labels": labels[kept][None], "logits_to_keep": kept}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def half_precision(device: str) -> bool:
    """Whether bfloat16 is fast on such a device, "cuda" or "cpu": there the language model trains twice as fast."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and torch.cpu._is_avx512_bf16_supported()
