"""
A model learns one task from labelled scans, as in stage 3: scores of the task in closed form, LoRA on rows that teach
to answer as scores say, and a calibration.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel

from fmrilm.modeling_fmrilm import FmriLMForConditionalGeneration
from fmrilm.processors import FmriLMProcessor

from ..alignment.examples import Examples, fit_scores, score_targets
from ..alignment.joint import add_lora, with_answers
from ..data.collator import RowCollator, encode_dataset
from ..data.tasks import Task
from ..sft.calibration import fit_calibrations
from ..sft.readings import Reading, reading_rows
from .ask import EncodedWindow


@dataclass(frozen=True)
class Tuning:
    """
    steps: with 0, what is in closed form alone. rows_per_step: one scan and one question each. rank: of LoRA; None
    tunes the whole language model.
    """

    steps: int = 60
    rows_per_step: int = 8
    learning_rate: float = 1e-3
    rank: int | None = 8


def tune(
    model: FmriLMForConditionalGeneration,
    processor: FmriLMProcessor,
    task: Task,
    scans: Sequence[Sequence[EncodedWindow]],
    labels: Sequence[Any],
    subjects: Sequence[str],
    tuning: Tuning,
    seed: int,
) -> tuple[FmriLMForConditionalGeneration, FmriLMProcessor]:
    """
    A tuned copy of the model, and of the processor with the summary tokens of the task. scans: windows of each
    training scan; labels: cells of the task's column.
    """
    torch.manual_seed(seed)
    processor, count = copy.deepcopy(processor), tuning.steps * tuning.rows_per_step
    tuned, examples = with_scores(model, processor, task, scans, labels, subjects, seed)
    names = tuned.config.score_names
    readings = [Reading.fit(task, examples, names)]
    if tuning.steps:
        per_patch = tuned.config.codec_config.tokens_per_patch
        rows = reading_rows(examples, names, readings, count, per_patch, seed, descriptors=0)
        tuned = _on_rows(tuned, processor, rows, tuning, seed)
    kept = [known for known in tuned.config.calibrations or () if not set(task.questions) & set(known["questions"])]
    found = fit_calibrations(tuned, processor, examples, readings, seed, descriptors=False)
    tuned.config.calibrations = kept + found
    return tuned, processor


def _on_rows(
    model: FmriLMForConditionalGeneration, processor: FmriLMProcessor, rows: Dataset, tuning: Tuning, seed: int
) -> FmriLMForConditionalGeneration:
    """The model after training on rows, LoRA merged."""
    from ..program import FmriLMSFTConfig
    from ..trainer import FmriLMSFTTrainer

    with TemporaryDirectory() as scratch:
        args = FmriLMSFTConfig(
            output_dir=scratch,
            max_steps=tuning.steps,
            per_device_train_batch_size=tuning.rows_per_step,
            learning_rate=tuning.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            max_grad_norm=1.0,
            logging_steps=max(tuning.steps // 10, 1),
            save_strategy="no",
            report_to="none",
            activation_checkpointing=False,
            dataloader_pin_memory=False,
            seed=seed,
        )
        trainer = FmriLMSFTTrainer(
            model=model.train() if tuning.rank is None else add_lora(model.train(), tuning.rank),
            args=args,
            train_dataset=encode_dataset(rows, processor),
            data_collator=RowCollator(processor.tokenizer.pad_token_id),
            processing_class=processor,
        )
        trainer.train()
        trained: Any = trainer.accelerator.unwrap_model(trainer.model)
    return (trained.merge_and_unload() if isinstance(trained, PeftModel) else trained).eval()


def with_scores(
    model: FmriLMForConditionalGeneration,
    processor: FmriLMProcessor,
    task: Task,
    scans: Sequence[Sequence[EncodedWindow]],
    labels: Sequence[Any],
    subjects: Sequence[str],
    seed: int,
) -> tuple[FmriLMForConditionalGeneration, Examples]:
    """
    A copy of the model that also reads scores of the task, fitted on these scans, and their windows with scores. The
    processor gets to know the summary tokens that are new.
    """
    windows = [(window, scan) for scan, several in enumerate(scans) for window in several]
    nothing = np.zeros((len(windows), 0), np.float32)
    examples = Examples(
        codes=[window.codes for window, _ in windows],
        features=np.stack([window.features for window, _ in windows]),
        z_scores=nothing,
        levels=nothing.astype(int),
        rows=[
            {"subject": subjects[scan], "session": scan, "scan": scan, task.column: labels[scan]}
            for _, scan in windows
        ],
        scores=nothing,
    )
    names, targets = score_targets(examples, [], [task])
    new = [name for name in names if name not in model.config.score_names]
    tuned = with_answers(model, processor, [task], new) if new else copy.deepcopy(model)
    examples, _ = fit_scores(tuned, examples, names, targets, seed)
    return tuned, examples
