"""The three stages on tiny models."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import Trainer, TrainingArguments

from fmrilm import FmriLMForConditionalGeneration
from fmrilm.training.alignment.chats import alignment_dataset, chat_dataset
from fmrilm.training.alignment.joint import add_lora, train_alignment
from fmrilm.training.data.collator import ChatCollator
from fmrilm.training.sft.trainer import train_sft
from fmrilm.training.trainer import JointTrainer
from helpers import chats, random_scans


Model = FmriLMForConditionalGeneration


def options(folder, **changes) -> dict:
    return {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
        **changes,
    }


def trainer(model: Model, processor, folder, of: type[Trainer] = Trainer, **changes) -> Trainer:
    return of(
        model=model,
        args=TrainingArguments(**options(folder, **changes)),
        train_dataset=chats(),
        eval_dataset=chats(2),
        data_collator=ChatCollator(processor),
    )


def mixed_rows(rows: int = 8) -> Dataset:
    """Rows of all three kinds of stage 2."""
    codes, levels = random_scans(8)
    texts = ["the visual network talks to the default mode network", "a brain at rest is never at rest"]
    return alignment_dataset(codes, levels, texts, rows, statements=1, weights=[0.4, 0.3, 0.3], seed=1)


@torch.no_grad()
def loss(model: Model | PeftModel, processor) -> float:
    return model.eval()(**ChatCollator(processor)(list(chats()))).loss.item()


def equal_states(first: torch.nn.Module, second: dict[str, torch.Tensor]) -> bool:
    state = first.state_dict()
    return state.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in state.items())


@pytest.mark.parametrize("backbone", ["llama", "qwen3", "gpt2"])
def test_plain_trainer_lowers_the_loss(backbone: str, tiny_model, processor, tmp_path) -> None:
    model = tiny_model(backbone)
    before = loss(model, processor)
    trainer(model, processor, tmp_path, max_steps=12).train()
    assert loss(model, processor) < 0.8 * before


def test_resumed_training_equals_uninterrupted_training(tiny_model, processor, tmp_path) -> None:
    whole, resumed = tiny_model("gpt2"), tiny_model("gpt2")
    trainer(whole, processor, tmp_path / "whole", save_strategy="steps", save_steps=3).train()
    untrained = copy.deepcopy(resumed.state_dict())
    second = trainer(resumed, processor, tmp_path / "resumed")
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert second.state.global_step == 6
    assert not equal_states(whole, untrained) and equal_states(resumed, whole.state_dict())
    assert "model.codec.quantizer.codebook" in untrained


@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
def test_lora_trains_attention_and_what_a_scan_passes_through(backbone: str, tiny_model, processor, tmp_path) -> None:
    model = tiny_model(backbone)
    codec = copy.deepcopy(model.model.codec.state_dict())
    frozen = model.model.language_model.get_input_embeddings().weight.clone()
    adapted = add_lora(model, 2)
    trainable = {name for name, value in adapted.named_parameters() if value.requires_grad}
    projector = dict(tiny_model().model.projector.named_parameters())
    whole = {f"model.projector.modules_to_save.default.{name}" for name in projector}
    whole |= {"fmri_head.modules_to_save.default.weight", "model.boundaries.modules_to_save.default.weight"}
    layer = "model.language_model.layers.{}.self_attn.{}.lora_{}.default.weight"
    projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
    if backbone == "gpt2":
        layer, projections = "model.language_model.h.{}.attn.{}.lora_{}.default.weight", ["c_attn"]
    lora = {layer.format(index, name, part) for index in range(2) for name in projections for part in "AB"}
    assert trainable == {f"base_model.model.{name}" for name in whole | lora}

    before = {name: value.detach().clone() for name, value in adapted.named_parameters()}
    train_alignment(adapted, chats(), processor, TrainingArguments(**options(tmp_path)))
    changed = {name for name, value in adapted.named_parameters() if not torch.equal(value, before[name])}
    assert changed == trainable
    assert equal_states(adapted.base_model.model.model.codec, codec)
    assert torch.equal(adapted.get_input_embeddings().weight, frozen)


def test_alignment_logs_both_losses(tiny_model, processor, tmp_path) -> None:
    model = tiny_model()
    aligned = trainer(model, processor, tmp_path, JointTrainer, max_steps=4, eval_strategy="steps", eval_steps=1)
    aligned.train()
    logs = [entry for entry in aligned.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        expected = entry["text_loss"] + model.config.fmri_loss_weight * entry["fmri_loss"]
        # losses are logged with the batches' shares of the labels, parts as means of the batches
        assert entry["loss"] == pytest.approx(expected, rel=0.02)


def test_full_tuning_leaves_what_is_fitted_before_as_it_was(tiny_model, processor, tmp_path) -> None:
    model = tiny_model()
    codec = copy.deepcopy(model.model.codec.state_dict())
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    train_alignment(model, mixed_rows(), processor, TrainingArguments(**options(tmp_path)))
    unchanged = {name for name, value in model.named_parameters() if torch.equal(value, before[name])}
    assert unchanged == {name for name in before if name.startswith(("model.codec.", "fmri_autoregression."))}
    assert equal_states(model.model.codec, codec)


def test_scan_alone_teaches_next_codes_and_plain_text_teaches_words(tiny_model, processor) -> None:
    rows, model = list(mixed_rows()), tiny_model()
    scan = next(row for row in rows if row["codes"] and not row["messages"])
    text = next(row for row in rows if row["text"])
    inputs = ChatCollator(processor)([scan])
    assert (inputs["labels"] == -100).all()
    outputs = model(**inputs)
    assert outputs.text_loss == 0 and outputs.loss == model.config.fmri_loss_weight * outputs.fmri_loss > 0
    inputs = ChatCollator(processor)([text])
    assert "fmri_codes" not in inputs and torch.equal(inputs["labels"] != -100, inputs["attention_mask"].bool())
    assert processor.tokenizer.decode(inputs["input_ids"][0][inputs["attention_mask"][0] == 1]) == text["text"]
    assert model(**inputs).fmri_loss is None


@pytest.mark.parametrize("of", [Trainer, JointTrainer])
def test_batches_of_scans_alone_lower_their_loss(of: type[Trainer], tiny_model, processor, tmp_path) -> None:
    rows = chat_dataset([row for row in mixed_rows() if row["codes"] and not row["messages"]])
    model, inputs = tiny_model(), ChatCollator(processor)(list(rows))
    before = model(**inputs).fmri_loss
    args = TrainingArguments(**options(tmp_path, max_steps=12))
    of(model=model, args=args, train_dataset=rows, data_collator=ChatCollator(processor)).train()
    assert model.eval()(**inputs).fmri_loss < 0.9 * before


def test_accumulated_batches_of_mixed_rows_train_as_one(tiny_model, processor, tmp_path) -> None:
    rows = list(mixed_rows(8))
    kinds = {(bool(row["messages"]), bool(row["codes"])) for row in rows}
    assert kinds == {(True, True), (False, True), (False, False)}
    assert_batch_size_does_not_matter(JointTrainer, rows, tiny_model, processor, tmp_path)


def test_accumulated_batches_of_equal_rows_train_as_one_by_the_plain_trainer(tiny_model, processor, tmp_path) -> None:
    # one text about four scans: each has the same number of labels
    rows = [{**chats(1)[0], "codes": [codes.tolist()]} for codes in random_scans(4)[0]]
    assert_batch_size_does_not_matter(Trainer, rows, tiny_model, processor, tmp_path)


def assert_batch_size_does_not_matter(of: type[Trainer], rows: list[dict], tiny_model, processor, tmp_path) -> None:
    models = []
    for size in (len(rows), 1):
        model = tiny_model()
        values = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 1, "max_grad_norm": 0.0}
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": len(rows) // size}
        args = TrainingArguments(**options(tmp_path, **values, **sizes))
        of(model=model, args=args, train_dataset=rows, data_collator=ChatCollator(processor)).train()
        models.append(model)
    for name in ("lm_head", "fmri_head"):
        untrained, whole, parts = (model.get_submodule(name).weight for model in (tiny_model(), *models))
        assert not torch.allclose(whole, untrained, atol=1e-3)
        assert torch.allclose(whole, parts, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tuned_adapter_merges_into_the_same_model(checkpointing: bool, tiny_model, processor, tmp_path) -> None:
    adapted = add_lora(tiny_model("qwen3"), 4)
    before = loss(adapted, processor)
    codec = copy.deepcopy(adapted.base_model.model.model.codec.state_dict())
    tuned = train_sft(
        adapted,
        chats(),
        processor,
        **options(tmp_path, max_steps=12, bf16=False, gradient_checkpointing=checkpointing),
    )
    assert tuned is adapted and loss(adapted, processor) < 0.9 * before
    inputs = ChatCollator(processor)(list(chats(2)))
    inputs.pop("labels")
    expected = adapted(**inputs).logits
    merged = adapted.merge_and_unload()
    assert isinstance(merged, FmriLMForConditionalGeneration) and equal_states(merged.model.codec, codec)
    assert torch.allclose(merged(**inputs).logits, expected, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = FmriLMForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert torch.equal(loaded(**inputs).logits, merged(**inputs).logits)
