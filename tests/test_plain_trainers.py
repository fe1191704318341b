"""A plain `transformers.Trainer` and a plain `trl.SFTTrainer` train the joint model, without a subclass of ours."""

import copy
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from test_training import ARGUMENTS
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from fmrilm.training.alignment.joint import add_adapter
from fmrilm.training.data.collator import RowCollator
from fmrilm.training.trainer import AlignmentTrainer, FmriLMSFTTrainer
from scan_rows import LONG, SHORT, Model, ids


OPTIONS = {**ARGUMENTS, "per_device_train_batch_size": 2, "logging_steps": 1, "remove_unused_columns": False}
SFT = {"activation_checkpointing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}


def rows(model: Model, last: str = "yes", **columns) -> Dataset:
    """Rows as `encode_dataset` makes them: half with one scan, half with two."""
    found = []
    for scans, parts in (([LONG], ("a", LONG)), ([SHORT, LONG], (SHORT, "b", LONG))):
        row = ids(model, *parts, last)[0].tolist()
        labels = [-100] * (len(row) - len(last)) + row[len(row) - len(last) :]
        scores = [[0.5, -1.0]] * len(scans)
        found.append({"input_ids": row, "labels": labels, "codes": scans, "scores": scores, **columns})
    return Dataset.from_list(found * 2)


def trainer(of: type[Trainer], model: Model, processor, output: Path, data: Dataset) -> Trainer:
    """With our collator."""
    config, fixed = (SFTConfig, SFT) if issubclass(of, SFTTrainer) else (TrainingArguments, {})
    return of(
        model=model,
        args=config(str(output), **OPTIONS, **fixed),
        train_dataset=data,
        data_collator=RowCollator(processor.tokenizer.pad_token_id),
        processing_class=processor.tokenizer,
    )


@pytest.mark.filterwarnings("ignore:.*chunked_nll:FutureWarning")
@pytest.mark.parametrize("of", [Trainer, SFTTrainer])
def test_it_trains_and_logs_the_models_loss(of: type[Trainer], llama: Model, processor, tmp_path) -> None:
    data = rows(llama, unknown="column")
    inputs = RowCollator(processor.tokenizer.pad_token_id)(list(data)[:2])
    before = llama(**inputs).text_loss.item()
    trainer(of, llama, processor, tmp_path, data).train()
    assert llama.eval()(**inputs).text_loss < 0.8 * before


@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
def test_ours_compute_the_same_losses_from_the_labelled_positions_alone(
    backbone: str, tiny_model, processor, tmp_path
) -> None:
    model = tiny_model(backbone)
    data, logs = rows(model), defaultdict(list)
    for of in (Trainer, AlignmentTrainer, SFTTrainer, FmriLMSFTTrainer):
        run = trainer(of, copy.deepcopy(model), processor, tmp_path / of.__name__, data)
        run.train()
        found = [(log["loss"], log["grad_norm"]) for log in run.state.log_history if "grad_norm" in log]
        logs[issubclass(of, SFTTrainer)].append(found)
    for plain, own in logs.values():
        assert len(plain) == OPTIONS["max_steps"]
        assert np.allclose(plain, own, rtol=1e-4)


def test_positions_kept_are_those_of_states_logits_and_losses(llama: Model, processor) -> None:
    inputs = RowCollator(processor.tokenizer.pad_token_id)(list(rows(llama))[:2])
    labelled = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100) != -100
    kept = labelled.any(0).nonzero()[:, 0]
    assert 0 < len(kept) < inputs["labels"].shape[1] - 1
    whole, part = llama(**inputs), llama(**inputs, logits_to_keep=kept)
    assert torch.allclose(part.logits, whole.logits[:, kept], atol=1e-6)
    assert torch.allclose(part.loss, whole.loss, atol=1e-6)
    inputs.pop("labels")
    states = llama.model(**inputs).last_hidden_state
    for keep, expected in ((kept, states[:, kept]), (2, states[:, -2:]), (labelled, states[labelled][None])):
        assert torch.allclose(llama.model(**inputs, logits_to_keep=keep).last_hidden_state, expected, atol=1e-6)


def test_rows_without_codes_and_scores_are_refused_with_the_reason() -> None:
    expected = "expected rows with input_ids, labels, codes and scores, got none of codes, scores: packing"
    with pytest.raises(ValueError, match=expected):
        RowCollator(0)([{"input_ids": [1], "labels": [1]}])


def test_adapter_on_the_codec_is_refused(llama: Model) -> None:
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="expected LoRA targets in model.causal_lm. alone"):
        add_adapter(llama, config)
