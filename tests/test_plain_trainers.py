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


def trainer(
    of: type[Trainer], model: Model, processor, output: Path, data: Dataset, own: bool = True, **changes
) -> Trainer:
    """With our collator or its own."""
    config, fixed = (SFTConfig, SFT) if issubclass(of, SFTTrainer) else (TrainingArguments, {})
    return of(
        model=model,
        args=config(str(output), **{**OPTIONS, **fixed, **changes}),
        train_dataset=data,
        data_collator=RowCollator(processor.tokenizer.pad_token_id) if own else None,
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


def test_ours_compute_the_same_losses_from_the_labelled_positions_alone(llama: Model, processor, tmp_path) -> None:
    data, logs = rows(llama), defaultdict(list)
    for of in (Trainer, AlignmentTrainer, SFTTrainer, FmriLMSFTTrainer):
        run = trainer(of, copy.deepcopy(llama), processor, tmp_path / of.__name__, data)
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


# --- what a plain SFTTrainer itself does to rows


def prepared(model: Model, processor, output: Path, data: Dataset, own: bool = True, **changes) -> Trainer:
    return trainer(SFTTrainer, model, processor, output, data, own, dataset_kwargs=None, **changes)


def answered_between(model: Model) -> Dataset:
    """Rows of two scans with an answer behind each."""
    row = ids(model, SHORT, "yes", LONG, "no")[0].tolist()
    labels = [token if 10 <= token < 138 else -100 for token in row]
    return Dataset.from_list(
        [{"input_ids": row, "labels": labels, "codes": [SHORT, LONG], "scores": [[0.5, -1.0]] * 2}] * 4
    )


def test_max_length_in_an_answer_trains_on_what_is_left_of_it(llama: Model, processor, tmp_path) -> None:
    data = answered_between(llama)
    length = len(data[0]["input_ids"])
    trainer = prepared(llama, processor, tmp_path, data, max_length=length - 1)
    cut = trainer.train_dataset
    assert cut[0] == {**data[0], "input_ids": data[0]["input_ids"][:-1], "labels": data[0]["labels"][:-1]}
    losses = [llama(**RowCollator(0)(list(rows)[:2])).text_loss for rows in (data, cut)]
    trainer.train()
    assert losses[0] != losses[1] and trainer.state.log_history[0]["loss"] > 0


@pytest.mark.parametrize(
    ("mode", "left_out", "tokens"),
    [
        ("keep_start", 4, "summary"),
        ("keep_start", 6, "summary"),
        ("keep_start", 13, "fMRI placeholder"),
        ("keep_end", 4, "fMRI placeholder"),
        ("keep_end", 6, "fMRI placeholder"),
        ("keep_end", 13, "fMRI placeholder"),
    ],
)
def test_max_length_that_cuts_a_scan_is_refused(
    mode: str, left_out: int, tokens: str, llama: Model, processor, tmp_path
) -> None:
    data = answered_between(llama)
    length = len(data[0]["input_ids"]) - left_out
    trainer = prepared(llama, processor, tmp_path, data, max_length=length, truncation_mode=mode)
    with pytest.raises(ValueError, match=rf"expected \d+ {tokens} tokens for the scans, got"):
        trainer.train()


@pytest.mark.parametrize(
    ("own", "strategy", "reason"),
    [
        (True, "bfd", "custom data collator is not supported"),
        (
            True,
            "wrapped",
            "expected rows with input_ids, labels, codes and scores, got none of codes, scores: packing",
        ),
        (False, "bfd", "expected 0 fMRI placeholder tokens for the scans, got"),
        (False, "bfd_split", "expected 0 fMRI placeholder tokens for the scans, got"),
        (False, "wrapped", "expected 0 fMRI placeholder tokens for the scans, got"),
    ],
)
def test_packing_by_a_plain_sft_trainer_is_refused(
    own: bool, strategy: str, reason: str, llama: Model, processor, tmp_path
) -> None:
    options = {"packing": True, "packing_strategy": strategy, "max_length": 64}
    with pytest.raises(ValueError, match=reason):
        prepared(llama, processor, tmp_path, rows(llama), own, **options).train()


def test_text_alone_may_be_packed(llama: Model, processor, tmp_path) -> None:
    row = ids(llama, "some words")[0].tolist()
    data = Dataset.from_list([{"input_ids": row, "labels": row}] * 8)
    options = {"packing": True, "packing_strategy": "wrapped", "max_length": 16}
    trainer = prepared(llama, processor, tmp_path, data, False, **options)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > trainer.state.log_history[5]["loss"]


def test_adapter_on_the_codec_is_refused(llama: Model) -> None:
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="expected LoRA targets in model.causal_lm. alone"):
        add_adapter(llama, config)
