"""
What stage 2 does and costs.

    python benchmarks/alignment.py describe runs/demo/model   # whose description is it, by likelihood
    python benchmarks/alignment.py language runs/demo/model   # does the language model keep its language
    python benchmarks/alignment.py cost                       # seconds and memory against text alone

Each writes results/alignment_<command>.csv.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer
from tqdm import tqdm
from transformers import TrainingArguments, set_seed

from fmrilm import FmriCodecConfig, FmriCodecModel, FmriLMForConditionalGeneration, FmriLMProcessor
from fmrilm.processors.descriptors.cohort import Cohort
from fmrilm.processors.descriptors.text import REQUESTS, description
from fmrilm.training.alignment.chats import alignment_dataset, assistant, scan_block, text_block, user
from fmrilm.training.alignment.joint import add_lora, join, train_alignment
from fmrilm.training.alignment.language_models import load_language_model
from fmrilm.training.alignment.plain_text import perplexity, plain_texts
from fmrilm.training.codec.trainer import encode_items, window_items
from fmrilm.training.data.collator import ChatCollator
from fmrilm.training.data.dataset import cut_windows, prepare_scans, split_subjects
from fmrilm.training.data.open_data import open_scans
from fmrilm.training.demo import ATLASES, HELD_OUT
from fmrilm.training.trainer import half_precision, training_options


RESULTS = Path(__file__).parent / "results"
STATEMENTS = 8
BOOTSTRAPS = 2000
app = typer.Typer(add_completion=False)


def write(name: str, rows: list[dict], results: Path) -> None:
    table = pd.DataFrame(rows)
    results.mkdir(parents=True, exist_ok=True)
    table.to_csv(results / f"alignment_{name}.csv", index=False, float_format="%.4f")
    print(table.to_string(index=False, float_format="%.3f"))


def load(folder: Path) -> tuple[FmriLMForConditionalGeneration, FmriLMProcessor, Cohort]:
    model = FmriLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model, FmriLMProcessor.from_pretrained(folder), Cohort.load(folder)


@torch.no_grad()
def likelihoods(model, processor, codes: np.ndarray, texts: list[str]) -> np.ndarray:
    """Log-likelihood [texts] of descriptions of one scan, codes int [tokens]."""
    rows = [
        {
            "messages": [user(scan_block(), text_block(REQUESTS[0])), assistant(text)],
            "codes": [codes.tolist()],
            "text": None,
        }
        for text in texts
    ]
    batch = ChatCollator(processor)(rows)
    labels = batch.pop("labels")[:, 1:]
    scores = model(**batch).logits[:, :-1].float().log_softmax(-1)
    chosen = scores.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (chosen * (labels >= 0)).sum(-1).numpy()


@app.command()
def describe(folder: Path, seed: int = 0, results: Path = RESULTS) -> None:
    """
    Of two descriptions that differ, a person's own and that of another of the same dataset: how often the own one is
    likelier, given the person's scan, and given another person's.
    """
    model, processor, cohort = load(folder)
    training, held_out = split_subjects(prepare_scans(open_scans(), processor.feature_extractor), HELD_OUT)
    windows, others = (cut_windows(scans, 160, stride=136) for scans in (held_out, training))
    every = [*windows, *others]
    levels = cohort.levels(np.stack([window.descriptors for window in every]))
    codes = encode_items(model.model.codec, window_items(every))
    rng = np.random.default_rng(seed)
    wins = {}
    for row, window in enumerate(tqdm(windows, desc="descriptions", unit="scan")):
        person = (window.scan.dataset, window.scan.subject)
        pool = [
            index
            for index, other in enumerate(every)
            if other.scan.dataset == person[0] and other.scan.subject != person[1]
        ]
        chosen = rng.permutation(np.flatnonzero((levels[row] >= 0) & (levels[pool] >= 0).all(0)))[:STATEMENTS]
        own, texts = description(levels[row], chosen), [description(levels[index], chosen) for index in pool]
        rivals = sorted(set(texts) - {own})
        stranger = pool[rng.integers(len(pool))]
        for condition, scan in (("right", row), ("swapped", stranger)):
            first, *rest = likelihoods(model, processor, codes[scan], [own, *rivals])
            wins.setdefault(condition, {}).setdefault(person, []).extend(first > np.array(rest))
    people = {name: np.array([np.mean(values) for values in by.values()]) for name, by in wins.items()}
    draws = np.random.default_rng(0).integers(len(people["right"]), size=(BOOTSTRAPS, len(people["right"])))
    rows = []
    for name, values in (*people.items(), ("right - swapped", people["right"] - people["swapped"])):
        low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
        pairs = sum(map(len, wins[name].values())) if name in wins else None
        rows.append({"scan": name, "pairs": pairs, "own_likelier": values.mean(), "low": low, "high": high})
    write("describe", rows, results)


@app.command()
def language(folder: Path, steps: int = 40, windows: int = 160, seed: int = 0, results: Path = RESULTS) -> None:
    """
    Perplexity of held-out plain text: of the language model itself, after stage 2 with and without rows of plain
    text, and of the finished model.
    """
    finished, processor, cohort = load(folder)
    tokenizer, codec = processor.tokenizer, finished.model.codec
    trained_on, held_out = plain_texts()
    training, _ = split_subjects(prepare_scans(open_scans(), processor.feature_extractor), HELD_OUT)
    cut = cut_windows(training, 160, stride=40)
    cut = [cut[index] for index in np.random.default_rng(seed).permutation(len(cut))[:windows]]
    codes = encode_items(codec, window_items(cut))
    levels = cohort.levels(np.stack([window.descriptors for window in cut]))
    rows = [
        {"model": "language model alone", "perplexity": perplexity(load_language_model()[0], tokenizer, held_out)},
        {"model": "finished model", "perplexity": perplexity(finished, tokenizer, held_out)},
    ]
    for name, weights in (("without plain text", (0.9, 0.1, 0.0)), ("with 30 % plain text", (0.6, 0.1, 0.3))):
        set_seed(seed)
        model = join(codec, load_language_model()[0], processor)
        with tempfile.TemporaryDirectory() as scratch:
            dataset = alignment_dataset(codes, levels, trained_on, 4 * steps, STATEMENTS, weights, seed)
            args = TrainingArguments(**training_options(Path(scratch), steps, 4, 1e-3, seed), bf16=half_precision())
            trained = train_alignment(add_lora(model, 8), dataset, processor, args)
        after = perplexity(trained.eval(), tokenizer, held_out)
        rows.append({"model": f"stage 2, {steps} updates {name}", "perplexity": after})
    write("language", rows, results)


# what is timed, each in a process of its own: layout, cached codes
COSTS = ("text", "latent", "latent-cached", "roi", "roi-cached")
ROIS, STEPS, PATCH, SLOTS = 450, 5, 32, 16
TEXT_TOKENS = 160


def prepared(kind: str, processor: FmriLMProcessor, seed: int):
    """The model and one batch of the given kind: a 450-ROI scan of 5 steps and text, or as many tokens of text."""
    layout, _, cached = kind.partition("-")
    torch.manual_seed(seed)
    language_model, _ = load_language_model()
    tokens = STEPS * (ROIS if layout.startswith("roi") else SLOTS)
    text = torch.randint(1000, 40000, (1, TEXT_TOKENS))
    if layout == "text":
        return language_model, {"input_ids": text, "labels": text}
    per_step = tokens // STEPS
    codec = FmriCodecModel(
        FmriCodecConfig(
            patch_length=PATCH,
            tokens_per_step=per_step,
            hidden_size=384,
            intermediate_size=1536,
            num_hidden_layers=12,
            num_decoder_layers=1,
            num_attention_heads=6,
            **({"token_layout": "roi"} if layout == "roi" else {}),
        )
    ).eval()
    model = join(codec, language_model, processor)
    config = model.config
    start, pad, end = config.fmri_start_token_id, config.fmri_token_id, config.fmri_end_token_id
    ids = torch.cat([torch.tensor([[start, *[pad] * tokens, end]]), text], -1)
    labels = torch.cat([torch.full((1, tokens + 2), -100), text], -1)
    values, coordinates = torch.randn(1, ROIS, STEPS * PATCH), 60 * torch.randn(1, ROIS, 3)
    scan = {"fmri_values": values, "roi_coordinates": coordinates}
    if cached:
        scan = {"fmri_codes": codec.encode(**scan)}
    return model, {"input_ids": ids, "labels": labels, **scan}


def longer_text(kind: str) -> int:
    """Tokens of text alone that make the sequence as long as that of `kind`."""
    return TEXT_TOKENS + 2 + STEPS * (ROIS if kind.startswith("roi") else SLOTS)


@app.command(hidden=True)
def measure(kind: str, length: int, repetitions: int, seed: int) -> None:
    """One process: seconds of a training step and of generation, and peak memory, as a line of JSON."""
    processor = FmriLMProcessor.from_pretrained(Path(tempfile.gettempdir()) / "fmrilm-benchmark-processor")
    model, batch = prepared(kind, processor, seed)
    if kind == "text":
        ids = torch.randint(1000, 40000, (1, length))
        labels = ids.clone()
        labels[:, :-TEXT_TOKENS] = -100
        batch = {"input_ids": ids, "labels": labels}
    model.train()
    model.requires_grad_(True)
    if kind != "text":
        model.model.codec.requires_grad_(False)
    steps = []
    for _ in range(repetitions + 1):
        start = time.perf_counter()
        model(**batch).loss.backward()
        model.zero_grad()
        steps.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    model.eval()
    prompt = {name: value for name, value in batch.items() if name != "labels"}
    timings = []
    for count in (1, 17):
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        model.generate(**prompt, **options)
        taken = []
        for _ in range(repetitions):
            start = time.perf_counter()
            model.generate(**prompt, **options)
            taken.append(time.perf_counter() - start)
        timings.append(np.median(taken))
    print(
        json.dumps(
            {
                "step_seconds": float(np.median(steps[1:])),
                "step_spread": float(np.ptp(steps[1:])),
                "peak_mib": peak,
                "first_token_seconds": float(timings[0]),
                "token_seconds": float((timings[1] - timings[0]) / 16),
            }
        )
    )


@app.command()
def cost(
    repetitions: int = 5,
    kinds: Annotated[str, typer.Option(help="Which, by comma.")] = ",".join(COSTS[1:]),
    seed: int = 0,
    results: Path = RESULTS,
) -> None:
    """
    A training step (all weights, float32, one row) and generation with a scan of 450 ROIs and 5 steps, against the
    same language model on text alone of equal length; codec of small size (384 wide, 12 layers). Alternating
    processes, ratios of their medians.
    """
    from fmrilm import Atlas, FmriLMFeatureExtractor

    _, tokenizer = load_language_model()
    extractor = FmriLMFeatureExtractor(atlases=[Atlas.load(name) for name in ATLASES])
    FmriLMProcessor(extractor, tokenizer, tokens_per_step=SLOTS).save_pretrained(
        Path(tempfile.gettempdir()) / "fmrilm-benchmark-processor"
    )
    rows = []
    for kind in kinds.split(","):
        measured = {}
        for name in ("text", kind):
            command = [sys.executable, __file__, "measure", name, str(longer_text(kind)), str(repetitions), str(seed)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            measured[name] = json.loads(output.splitlines()[-1])
        for quantity in ("step_seconds", "peak_mib", "first_token_seconds", "token_seconds"):
            ours, peer = measured[kind][quantity], measured["text"][quantity]
            rows.append(
                {
                    "input": kind,
                    "tokens": longer_text(kind),
                    "quantity": quantity,
                    "ours": ours,
                    "text_alone": peer,
                    "ratio": ours / peer,
                }
            )
    write("cost", rows, results)


if __name__ == "__main__":
    app()
