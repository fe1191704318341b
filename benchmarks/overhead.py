"""
What the joint model costs beside its backbone on text of equal length: seconds of the processor and peak memory.

    python benchmarks/overhead.py runs/demo/model

A prompt with a scan of ten patches, whose codes and scores are known, and as many words. Training steps are those of
LoRA of rank 8; the joint model's also predicts next codes. Both take turns in one thread; ratios are of medians.
Memory is that of processes of their own, which take one training step. Writes results/overhead.csv.
"""

import gc
import math
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from peft import LoraConfig, get_peft_model

from fmrilm import FmriLMForConditionalGeneration, FmriLMProcessor
from fmrilm.training.alignment.joint import LORA_TARGETS, add_lora
from fmrilm.training.data.shards import write_whole
from fmrilm.training.program import give_memory_back


RESULTS = Path(__file__).parent / "results"
PATCHES, ANSWER, NEW_TOKENS, RANK, PROCESSES = 10, 32, 32, 8, 5
JOINT, BACKBONE = "joint model", "backbone"


def prompts(model: Any, processor: FmriLMProcessor) -> dict[str, dict[str, torch.Tensor]]:
    """Inputs of the joint model and of its backbone, as long."""
    config = model.config.codec_config
    tokens = PATCHES * config.tokens_per_patch
    chat = [
        {"role": "user", "content": [{"type": "fmri", "tokens": tokens}, {"type": "text", "text": "Who is this?"}]}
    ]
    ids = processor.apply_chat_template([chat], add_generation_prompt=True)["input_ids"]
    words = torch.randint(1000, 20_000, (1, ids.shape[1] + ANSWER), generator=torch.Generator().manual_seed(0))
    codes = torch.randint(config.codebook_size, (1, tokens, config.num_quantizers))
    ids = torch.cat([ids, words[:, ids.shape[1] :]], 1)
    return {
        JOINT: {"input_ids": ids, "fmri_codes": codes, "fmri_scores": model.model.get_fmri_scores(codes)},
        BACKBONE: {"input_ids": words},
    }


def load(folder: Path, which: str) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model: Any = FmriLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = prompts(model, FmriLMProcessor.from_pretrained(folder))[which]
    return (model if which == JOINT else model.model.causal_lm), inputs


def with_lora(model: Any, which: str) -> Any:
    if which == JOINT:
        return add_lora(model, RANK)
    config = LoraConfig(r=RANK, task_type="CAUSAL_LM", target_modules=LORA_TARGETS.removeprefix(r".*\.causal_lm\."))
    return get_peft_model(model, config)


def train(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    model.zero_grad()


@torch.no_grad()
def first_token(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    model(**inputs, logits_to_keep=1)


@torch.no_grad()
def generate(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    model.generate(**inputs, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS)


def timed(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of the processor of each call, which take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
    # the first one prepares kernels
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}


def peak_memory(folder: Path, which: str) -> float:
    """GB (10^9 bytes) that this process holds at most in a training step."""
    torch.set_num_threads(1)
    model, inputs = load(folder, which)
    model = with_lora(model, which).train()
    # of the backbone, what it was loaded with; Linux then counts the peak anew
    gc.collect()
    give_memory_back()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    train(model, inputs)
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(peak[1]) * 1024 / 1e9 if peak else math.nan


def main(
    model: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of a joint model.")],
    repeats: int = 7,
    results: Path = RESULTS,
) -> None:
    torch.set_num_threads(1)
    loaded = {which: load(model, which) for which in (JOINT, BACKBONE)}
    measured = {"first token, seconds": first_token, f"{NEW_TOKENS} tokens generated, seconds": generate}
    rows = [
        (what, timed({which: partial(call, *one) for which, one in loaded.items()}, repeats))
        for what, call in measured.items()
    ]
    trained = {which: partial(train, with_lora(one, which).train(), inputs) for which, (one, inputs) in loaded.items()}
    rows.append(("training step, seconds", timed(trained, repeats)))
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        # how much of a file's memory counts differs from run to run
        memory = {
            which: statistics.median(pool.apply(peak_memory, (model, which)) for _ in range(PROCESSES))
            for which in loaded
        }
    rows.append(("peak memory of a training step, GB", memory))
    table = pd.DataFrame([{"what": what, **of, "ratio": of[JOINT] / of[BACKBONE]} for what, of in rows])
    write_whole(results / "overhead.csv", table.to_csv(index=False, float_format="%.4f"))
    print(table.to_string(index=False, float_format="%.3f"))


if __name__ == "__main__":
    typer.run(main)
