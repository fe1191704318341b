"""What the trainers of stages 2 and 3 compute: the same loss by every way, and no step on numbers that are none."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments
from trl import SFTTrainer

from fmrilm.training.alignment.chats import chat_dataset
from fmrilm.training.arguments import AlignmentTrainingArguments, FmriLMSFTConfig
from fmrilm.training.checkpoints import is_whole, last_checkpoint
from fmrilm.training.data.collator import ChatCollator, RowCollator, encode_dataset
from fmrilm.training.sft.trainer import FmriLMSFTTrainer
from fmrilm.training.trainer import JointTrainer
from helpers import chats
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
SFT = {"gradient_checkpointing": False}


@pytest.mark.filterwarnings("ignore:.*chunked_nll:FutureWarning")
@pytest.mark.parametrize("loss_type", ["nll", "chunked_nll"])
def test_losses_of_trl_and_of_the_model_are_equal(loss_type: str, model, processor, tmp_path) -> None:
    args = FmriLMSFTConfig(str(tmp_path), **ARGUMENTS, **SFT, loss_type=loss_type)
    collator, rows = ChatCollator(processor), chats(4)
    # scans of one step: there is no next one, and the text alone makes the loss
    rows = chat_dataset([{**row, "codes": [scan[:2] for scan in row["codes"]]} for row in rows])
    batch = collator(list(rows))
    logits = model.eval()(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    count = (batch["labels"][:, 1:] != -100).sum()
    losses, gradients = [], []
    for of in (SFTTrainer, FmriLMSFTTrainer):
        trainer = of(model, args, train_dataset=rows, data_collator=collator, processing_class=processor)
        model.train()
        for items in (None, count):
            model.zero_grad()
            loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
            loss.backward()
            losses.append(loss)
            gradients.append(model.get_input_embeddings().weight.grad.clone())
    for loss, gradient in zip(losses, gradients, strict=True):
        assert loss.item() == pytest.approx(expected.item(), abs=1e-4)
        assert torch.allclose(gradient, gradients[0], atol=1e-4)


@pytest.mark.parametrize(
    ("of", "config"), [(JointTrainer, AlignmentTrainingArguments), (FmriLMSFTTrainer, FmriLMSFTConfig)]
)
@pytest.mark.parametrize("broken", ["text_loss", "fmri_loss"])
def test_loss_that_is_no_number_ends_training(
    of, config, broken: str, llama, processor, tmp_path, monkeypatch
) -> None:
    trainer = build(of, config, llama, processor, tmp_path, save_strategy="steps", save_steps=2)
    method = "text_loss" if broken == "text_loss" else "next_step_loss"
    computed = getattr(type(llama), method)

    def break_fourth_step(self, *arguments):
        return computed(self, *arguments) * (float("nan") if trainer.state.global_step == 3 else 1)

    monkeypatch.setattr(type(llama), method, break_fourth_step)
    with pytest.raises(FloatingPointError, match=f"step 4: {broken} is nan"):
        trainer.train()
    (last,) = checkpoints(tmp_path)
    assert last.name == "checkpoint-2" and is_whole(last) and last_checkpoint(tmp_path) == last


def test_weights_that_are_no_numbers_are_not_saved(llama, processor, tmp_path) -> None:
    trainer = build(JointTrainer, AlignmentTrainingArguments, llama, processor, tmp_path)
    with torch.no_grad():
        llama.fmri_head.weight[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match="step 0: fmri_head.weight"):
        trainer.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_steps_in_buckets_do_not_depend_on_their_division(tiny_model, processor, tmp_path) -> None:
    models = []
    for size in (4, 1):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        values = {**sizes, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 5}
        model = tiny_model()
        build(JointTrainer, AlignmentTrainingArguments, model, processor, tmp_path, **values).train()
        models.append(model)
    assert not torch.allclose(models[0].lm_head.weight, tiny_model().lm_head.weight, atol=1e-3)
    for (name, first), second in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(first, second, atol=1e-5), name


def build(of: type[Trainer], config: type[TrainingArguments], model, processor, output: Path, **changes) -> Trainer:
    values = {**ARGUMENTS, **(SFT if config is FmriLMSFTConfig else {}), **changes}
    return of(
        model=model,
        args=config(str(output), **values),
        train_dataset=encode_dataset(chats(10), processor),
        data_collator=RowCollator(processor.tokenizer.pad_token_id),
        processing_class=processor,
    )
