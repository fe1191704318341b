"""The same seed gives the same tokens, losses and text on a CPU; another one does not."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import set_seed

from fmrilm import FmriLMForConditionalGeneration
from fmrilm.processors.descriptors.cohort import Cohort
from fmrilm.processors.descriptors.measures import CORE_MEASURES, CORE_NAMES
from fmrilm.training.alignment import join
from fmrilm.training.codec import CodecTrainer, CodecTrainingArguments, encode_items, window_items
from fmrilm.training.data import MixedWindows, collate_signals, cut_windows
from fmrilm.training.sft import train_sft
from helpers import chats, prepared


OPTIONS = {"max_steps": 4, "logging_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no"}


def run_codec(make_codec: Callable, folder, seed: int) -> tuple[np.ndarray, list[float]]:
    """Codes of some windows after a short training, and its losses."""
    scans = [prepared(f"p{number}") for number in range(3)]
    windows = cut_windows(scans, 16, 8)
    cohort = Cohort.fit("tests", CORE_MEASURES, np.stack([w.descriptors for w in windows]), 3, [scans[0].atlas])
    set_seed(seed)
    model = make_codec(started=False, descriptor_names=list(CORE_NAMES))
    args = CodecTrainingArguments(
        str(folder), **OPTIONS, per_device_train_batch_size=8, remove_unused_columns=False, seed=seed,
        unquantized_steps=1, learning_rate=1e-2,
    )  # fmt: skip
    items = MixedWindows(scans, cohort, 16, None, size=32, seed=seed)
    trainer = CodecTrainer(model=model, args=args, train_dataset=items, data_collator=collate_signals)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return encode_items(model.eval(), window_items(windows)), losses


def test_same_seed_gives_the_same_codec_and_tokens(make_codec: Callable, tmp_path) -> None:
    (codes, losses), (again, losses_again) = (run_codec(make_codec, tmp_path, seed=3) for _ in range(2))
    assert np.array_equal(codes, again) and losses == losses_again and len(losses) == 4
    assert run_codec(make_codec, tmp_path, seed=4)[1] != losses


def run_language_model(
    make_codec: Callable, make_language_model: Callable, processor, folder, seed: int
) -> tuple[FmriLMForConditionalGeneration, list[float]]:
    set_seed(seed)
    model = join(make_codec(), make_language_model("llama", len(processor.tokenizer) - 3), processor)
    losses: list[float] = []
    forward = model.forward

    def noted(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        losses.append(outputs.loss.item())
        return outputs

    model.forward = noted
    options = {**OPTIONS, "seed": seed, "per_device_train_batch_size": 2, "bf16": False}
    train_sft(model, chats(), processor, output_dir=str(folder), gradient_checkpointing=False, **options)
    model.forward = forward
    return model.eval(), losses


@pytest.mark.parametrize("sampled", [False, True])
def test_same_seed_gives_the_same_losses_and_text(
    sampled: bool, make_codec: Callable, make_language_model: Callable, processor, signal, tmp_path
) -> None:
    scan = {"type": "fmri", "fmri": signal, "tr": 2.0, "atlas": "tiny"}
    chat = [{"role": "user", "content": [scan, {"type": "text", "text": "Is it connected?"}]}]
    found = []
    for seed in (3, 3, 4):
        model, losses = run_language_model(make_codec, make_language_model, processor, tmp_path, seed)
        inputs = processor.apply_chat_template(chat, add_generation_prompt=True)
        set_seed(seed)
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=8, do_sample=sampled)
        found.append((losses, processor.tokenizer.decode(ids[0])))
    assert found[0] == found[1] and found[0][1]
    assert found[0][0] != found[2][0]
