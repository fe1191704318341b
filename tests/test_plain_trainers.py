"""A plain `transformers.Trainer` and a plain `trl.SFTTrainer` train the joint model, without a subclass of ours."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from fmrilm.training.alignment.joint import SCAN_MODULES, add_adapter, add_lora
from fmrilm.training.data.collator import RowCollator
from scan_rows import LONG, SHORT, Model, codes, ids


OPTIONS = {
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}
SFT = {"gradient_checkpointing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}


def rows(model: Model, last: str = "yes", **columns) -> Dataset:
    """Rows as `encode_dataset` makes them: half with one scan, half with two."""
    found = []
    for scans, parts in (([LONG], ("a", LONG)), ([SHORT, LONG], (SHORT, "b", LONG))):
        row = ids(model, *parts, last)[0].tolist()
        labels = [-100] * (len(row) - len(last)) + row[len(row) - len(last) :]
        scores = [[0.5, -1.0]] * len(scans)
        found.append({"input_ids": row, "labels": labels, "codes": scans, "scores": scores, **columns})
    return Dataset.from_list(found * 2)


def trainer(of: type[Trainer], model: Model, processor, output: Path, data: Dataset, **changes) -> Trainer:
    config = SFTConfig if of is SFTTrainer else TrainingArguments
    values = {**OPTIONS, "remove_unused_columns": False, **(SFT if of is SFTTrainer else {}), **changes}
    collator = RowCollator(processor.tokenizer.pad_token_id)
    tools = {"processing_class": processor.tokenizer}
    return of(model=model, args=config(str(output), **values), train_dataset=data, data_collator=collator, **tools)


@pytest.mark.filterwarnings("ignore:.*chunked_nll:FutureWarning")
@pytest.mark.parametrize("of", [Trainer, SFTTrainer])
def test_it_trains_and_logs_the_models_loss(of: type[Trainer], llama: Model, processor, tmp_path) -> None:
    data = rows(llama, unknown="column")
    inputs = RowCollator(processor.tokenizer.pad_token_id)(list(data)[:2])
    before = llama(**inputs).text_loss.item()
    plain = trainer(of, llama, processor, tmp_path, data)
    if of is SFTTrainer:
        logits = llama(**{name: value for name, value in inputs.items() if name != "labels"}).logits[:, :-1]
        expected = F.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten(), ignore_index=-100)
        loss = plain.compute_loss(llama, dict(inputs), num_items_in_batch=None)
        assert expected.item() == pytest.approx(before, abs=1e-4)
        # TRL's loss is the text's, to which the model adds the next codes'
        with_codes = expected + llama.config.fmri_loss_weight * llama(**inputs).fmri_loss
        assert min(abs(loss - expected), abs(loss - with_codes)) < 1e-3
    plain.train()
    assert llama.eval()(**inputs).text_loss < 0.8 * before


def test_a_chat_cut_by_max_length_is_refused_and_not_read_wrongly(llama: Model, processor, tmp_path) -> None:
    data = rows(llama, last="")
    cut = data.map(lambda row: {"input_ids": row["input_ids"][:-2], "labels": row["labels"][:-2]})
    with pytest.raises(ValueError, match=r"summary tokens for the scans, got"):
        trainer(SFTTrainer, llama, processor, tmp_path, cut).train()
    cut = data.map(lambda row: {"input_ids": row["input_ids"][:-6], "labels": row["labels"][:-6]})
    with pytest.raises(ValueError, match=r"fMRI placeholder tokens for the scans, got"):
        trainer(SFTTrainer, llama, processor, tmp_path, cut).train()


@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
def test_adapters_train_the_language_model_and_what_a_scan_passes_through(backbone: str, tiny_model) -> None:
    model = tiny_model(backbone)
    row, scan = ids(model, "a", LONG, "b"), codes(LONG)
    expected = model(row, fmri_codes=scan).logits
    adapted = add_lora(model, 2)
    assert torch.allclose(adapted(row, fmri_codes=scan).logits, expected, atol=1e-5)
    prefix = "base_model.model.model."
    trained = {name for name, value in adapted.named_parameters() if value.requires_grad}
    whole = {name for name in trained if ".modules_to_save." in name}
    assert {name.removeprefix(prefix).partition(".modules_to_save")[0] for name in whole} == set(SCAN_MODULES)
    assert (
        all(name.startswith(f"{prefix}causal_lm.") and ".lora_" in name for name in trained - whole)
        and trained - whole
    )
    adapted.train()(row, fmri_codes=scan, labels=row).loss.backward()
    for name, value in adapted.named_parameters():
        assert (value.grad is not None) == (name in trained), name
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if name in trained:
                value.add_(0.05 * torch.randn_like(value))
    expected = adapted.eval()(row, fmri_codes=scan).logits
    merged = adapted.merge_and_unload()
    assert type(merged) is type(model)
    assert torch.allclose(merged(row, fmri_codes=scan).logits, expected, atol=1e-4)


def test_adapter_on_the_codec_is_refused(llama: Model) -> None:
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="expected LoRA targets in model.causal_lm. alone"):
        add_adapter(llama, config)
