"""Trainers of stages 2 and 3 on tiny models: what they train, and no step on numbers that are none."""

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Trainer
from trl import SFTTrainer

from fmrilm.training.alignment.chats import alignment_rows, chat_dataset
from fmrilm.training.alignment.joint import add_lora
from fmrilm.training.checkpoints import is_whole, last_checkpoint
from fmrilm.training.data.collator import RowCollator, encode_dataset
from fmrilm.training.program import AlignmentTrainingArguments, FmriLMSFTConfig
from fmrilm.training.trainer import AlignmentTrainer, FmriLMSFTTrainer, SeededLengthGroups
from helpers import chats, random_examples
from program_runs import checkpoints


ARGUMENTS = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 2,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}
# as the language model reads scans: the head of the next codes has no part in TRL's loss
FITTED = ("model.codec.", "model.summary.readout.", "model.dynamics.")


def mixed_rows(rows: int = 8) -> Dataset:
    """Rows of all four kinds of stage 2."""
    texts = ["the visual network talks to the default mode network", "a brain at rest is never at rest"]
    return alignment_rows(random_examples(), texts, rows, [0.3, 0.2, 0.25, 0.25], 2, 1, None, seed=1)


def build(of: type[Trainer], model, processor, output: Path, rows: Dataset | None = None, **changes) -> Trainer:
    config, fixed = AlignmentTrainingArguments, {}
    if issubclass(of, SFTTrainer):
        config, fixed = FmriLMSFTConfig, {"activation_checkpointing": False}
    return of(
        model=model,
        args=config(str(output), **{**ARGUMENTS, **fixed, **changes}),
        train_dataset=encode_dataset(chats() if rows is None else rows, processor),
        data_collator=RowCollator(processor.tokenizer.pad_token_id),
        processing_class=processor,
    )


def batch_of(rows, processor) -> dict[str, torch.Tensor]:
    encoded = encode_dataset(chat_dataset(list(rows)), processor)
    return RowCollator(processor.tokenizer.pad_token_id)(list(encoded))


def equal_states(first: torch.nn.Module, second: dict[str, torch.Tensor]) -> bool:
    state = first.state_dict()
    return state.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in state.items())


@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
def test_lora_trains_attention_mlps_and_what_a_scan_passes_through(
    backbone: str, tiny_model, processor, tmp_path
) -> None:
    model = tiny_model(backbone)
    codec = copy.deepcopy(model.model.codec.state_dict())
    adapted = add_lora(model, 2)
    trainable = {name for name, value in adapted.named_parameters() if value.requires_grad}
    whole = {
        f"projector.modules_to_save.default.{name}" for name, _ in tiny_model().model.projector.named_parameters()
    }
    whole |= {"start_end_embeddings.modules_to_save.default.weight"}
    whole |= {f"summary.embeddings.modules_to_save.default.{name}" for name in ("weight", "bias")}
    layer = "causal_lm.model.layers.{}.{}.lora_{}.default.weight"
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    matrices = [*(f"self_attn.{name}" for name in attention), *(f"mlp.{name}" for name in mlp)]
    if backbone == "gpt2":
        layer = layer.replace("model.layers", "transformer.h")
        matrices = ["attn.c_attn", "mlp.c_fc"]
    lora = {layer.format(index, name, part) for index in range(2) for name in matrices for part in "AB"}
    assert trainable == {f"base_model.model.model.{name}" for name in whole | lora}
    before = {name: value.detach().clone() for name, value in adapted.named_parameters()}
    build(AlignmentTrainer, adapted, processor, tmp_path, mixed_rows()).train()
    changed = {name for name, value in adapted.named_parameters() if not torch.equal(value, before[name])}
    assert changed == trainable and equal_states(adapted.base_model.model.model.codec, codec)


def test_full_tuning_leaves_what_is_fitted_before_as_it_was(tiny_model, processor, tmp_path) -> None:
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = build(AlignmentTrainer, model, processor, tmp_path, mixed_rows())
    trainer.train()
    unchanged = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert unchanged == {name for name in before if name.startswith(FITTED)}
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3 and all({"text_loss", "fmri_loss"} <= set(entry) for entry in logs)


def test_scan_alone_teaches_next_codes_and_plain_text_teaches_words(tiny_model, processor, tmp_path) -> None:
    rows, model = list(mixed_rows()), tiny_model()
    alone = [row for row in rows if row["codes"] and not row["messages"]]
    inputs = batch_of(alone, processor)
    assert (inputs["labels"] == -100).all()
    outputs = model(**inputs)
    before = outputs.fmri_loss
    assert outputs.text_loss == 0 and torch.isclose(outputs.loss, model.config.fmri_loss_weight * before)
    build(AlignmentTrainer, model, processor, tmp_path, chat_dataset(alone), max_steps=12).train()
    assert model.eval()(**inputs).fmri_loss < 0.9 * before
    text = next(row for row in rows if row["text"])
    inputs = batch_of([text], processor)
    assert "fmri_codes" not in inputs and torch.equal(inputs["labels"] != -100, inputs["attention_mask"].bool())
    assert processor.tokenizer.decode(inputs["input_ids"][0][inputs["attention_mask"][0] == 1]) == text["text"]
    assert model(**inputs).fmri_loss is None


def test_accumulated_batches_of_mixed_rows_train_as_one(tiny_model, processor, tmp_path) -> None:
    rows = mixed_rows()
    kinds = {(bool(row["messages"]), bool(row["codes"])) for row in rows}
    assert kinds == {(True, True), (False, True), (False, False)}
    models = [tiny_model()]
    for size in (len(rows), 1):
        values = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 1, "max_grad_norm": 0.0}
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": len(rows) // size}
        models.append(tiny_model())
        build(AlignmentTrainer, models[-1], processor, tmp_path, rows, **values, **sizes).train()
    for name in ("model.causal_lm.lm_head", "model.fmri_head.proj"):
        untrained, whole, parts = (model.get_submodule(name).weight for model in models)
        assert not torch.allclose(whole, untrained, atol=1e-3)
        assert torch.allclose(whole, parts, atol=1e-5)


@pytest.mark.parametrize("of", [AlignmentTrainer, FmriLMSFTTrainer])
def test_loss_that_is_no_number_ends_training(of: type[Trainer], llama, processor, tmp_path) -> None:
    trainer = build(of, llama, processor, tmp_path, save_strategy="steps", save_steps=2)

    def broken(module, arguments, found: torch.Tensor) -> torch.Tensor:
        return found * (float("nan") if trainer.state.global_step == 3 else 1)

    llama.model.projector.register_forward_hook(broken)
    with pytest.raises(FloatingPointError, match="step 4: loss is nan"):
        trainer.train()
    (last,) = checkpoints(tmp_path)
    assert last.name == "checkpoint-2" and is_whole(last) and last_checkpoint(tmp_path) == last


def test_weights_that_are_no_numbers_are_not_saved(llama, processor, tmp_path) -> None:
    trainer = build(AlignmentTrainer, llama, processor, tmp_path)
    with torch.no_grad():
        llama.model.fmri_head.proj.weight[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match="step 0: model.fmri_head.proj.weight"):
        trainer.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_batches_of_similar_length_come_in_random_order_that_an_epoch_has_to_itself() -> None:
    lengths = torch.randint(10, 500, (402,), generator=torch.Generator().manual_seed(0)).tolist()
    first, again, other = (
        list(SeededLengthGroups(4, lengths, seed=0, epoch=lambda epoch=epoch: epoch)) for epoch in (0, 0, 1)
    )
    assert first == again != other and sorted(first) == list(range(402))
    batches = torch.tensor([lengths[row] for row in first[:400]], dtype=torch.float).view(-1, 4)
    assert batches.std(1).mean() < 0.2 * torch.tensor(lengths, dtype=torch.float).std()
    # neighbours are no more alike than others
    means = batches.mean(1)
    assert abs(torch.corrcoef(torch.stack([means[1:], means[:-1]]))[0, 1]) < 0.3
