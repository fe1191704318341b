"""
Forecasts of held-out people's BOLD signal beside time-series baselines, and next codes beside n-grams.

    python benchmarks/forecast.py runs/demo/model --steps 150

Context: 4 steps, normalised by themselves. The model of the demo saw little of this task, so it is first tuned for
`--steps` updates on windows of the training people alone (rows of a scan without text); `--steps 0` measures it as it
is. Writes results/forecast.csv (one row for a method, horizon and metric), results/forecast_lead.csv (by frame) and
results/forecast_codes.csv.
"""

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

from fmrilm import FmriLMForConditionalGeneration, FmriLMProcessor
from fmrilm.processors.cleaning_fmrilm import NORMAL_IQR, interquartile_range
from fmrilm.training.alignment.chats import chat_dataset
from fmrilm.training.alignment.joint import add_lora, train_alignment
from fmrilm.training.codec.trainer import encode_items
from fmrilm.training.data.dataset import PreparedScan, prepare_scans, split_subjects
from fmrilm.training.data.open_data import open_scans
from fmrilm.training.demo import HELD_OUT
from fmrilm.training.trainer import half_precision, training_options


RESULTS = Path(__file__).parent / "results"
CONTEXT, HORIZON = 4, 2
ORDER = 4
SAMPLES = 16
BOOTSTRAPS = 2000
RIDGE_ALPHAS = (1e2, 1e3, 1e4, 1e5)
SMOOTHING = (1, 10, 100, 1000)


def windows_of(scan: PreparedScan, frames: int, stride: int, context: int) -> np.ndarray:
    """Windows [n, frames, rois], each scaled by the median and IQR of its first `context` frames."""
    starts = range(0, len(scan.signal) - frames + 1, stride)
    cut = np.stack([scan.signal[start : start + frames] for start in starts])
    center = np.median(cut[:, :context], axis=1, keepdims=True)
    scale = np.stack([interquartile_range(window[:context]) for window in cut])[:, None] / NORMAL_IQR
    return np.clip((cut - center) / scale, -6, 6).astype(np.float32)


def items_of(windows: np.ndarray, scan: PreparedScan) -> list[dict[str, np.ndarray]]:
    """As `collate_signals` takes them."""
    nothing = np.zeros(0, np.float32)
    return [
        {"signal": window, "coordinates": scan.atlas.coordinates, "descriptors": nothing} for window in windows
    ]


def tune(model, processor, scans: list[PreparedScan], steps: int, seed: int):
    """Updates on scans alone: windows of ten steps that start anywhere."""
    patch = model.config.codec_config.patch_length
    rng = np.random.default_rng(seed)
    items = []
    for scan in scans:
        stretches = windows_of(scan, 10 * patch, stride=4, context=CONTEXT * patch)
        items += items_of(stretches, scan)
    chosen = [items[index] for index in rng.permutation(len(items))[: 8 * steps]]
    codes = encode_items(model.model.codec, chosen)
    rows = [{"messages": [], "codes": [row.tolist()]} for row in codes]
    model.config.fmri_loss_weight = 1.0
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(**training_options(Path(folder), steps, 8, 1e-3, seed), bf16=half_precision())
        adapted = add_lora(model, 8)
        train_alignment(adapted, chat_dataset(rows), processor, args)
    return adapted.merge_and_unload().eval()


class Autoregression:
    """Each ROI from its own last `ORDER` frames, least squares over the training people, rolled on."""

    def __init__(self, scans: list[PreparedScan]):
        past, following = zip(*(_lagged(scan.signal) for scan in scans), strict=True)
        past, following = np.concatenate(past), np.concatenate(following)
        self.weights = np.stack(
            [np.linalg.lstsq(past[:, :, roi], following[:, roi], rcond=None)[0] for roi in range(past.shape[2])], 1
        )

    def forecast(self, context: np.ndarray, frames: int) -> np.ndarray:
        series = context
        for _ in range(frames):
            following = (series[:, -ORDER:] * self.weights).sum(1, keepdims=True)
            series = np.concatenate([series, following], 1)
        return series[:, context.shape[1] :]


class RidgeVAR:
    """Every ROI and frame of the horizon from the last `ORDER` frames of all ROIs; penalty chosen on one left-out
    training scan."""

    def __init__(self, scans: list[PreparedScan], frames: int):
        pairs = [self._pairs(scan.signal, frames) for scan in scans]
        inside, outside = (pairs[:-1], pairs[-1]) if len(pairs) > 1 else (pairs, pairs[0])
        past, future = (np.concatenate(part) for part in zip(*inside, strict=True))
        errors = [np.mean((outside[0] @ self._solve(past, future, alpha) - outside[1]) ** 2) for alpha in RIDGE_ALPHAS]
        past, future = (np.concatenate(part) for part in zip(*pairs, strict=True))
        self.weights = self._solve(past, future, RIDGE_ALPHAS[int(np.argmin(errors))])
        self.frames = frames

    @staticmethod
    def _pairs(signal: np.ndarray, frames: int) -> tuple[np.ndarray, np.ndarray]:
        stop = len(signal) - frames + 1
        past = np.stack([signal[start - ORDER : start].ravel() for start in range(ORDER, stop)])
        return past, np.stack([signal[start : start + frames].ravel() for start in range(ORDER, stop)])

    @staticmethod
    def _solve(past: np.ndarray, future: np.ndarray, alpha: float) -> np.ndarray:
        return np.linalg.solve(past.T @ past + alpha * np.eye(past.shape[1]), past.T @ future)

    def forecast(self, context: np.ndarray, frames: int) -> np.ndarray:
        flat = context[:, -ORDER:].reshape(len(context), -1) @ self.weights
        return flat.reshape(len(context), self.frames, -1)[:, :frames]


def _lagged(signal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stretches [n, ORDER, rois] and the frame [n, rois] after each."""
    past = np.stack([signal[start : start + ORDER] for start in range(len(signal) - ORDER)])
    return past, signal[ORDER:]


@torch.no_grad()
def model_forecasts(model, contexts: np.ndarray, scan: PreparedScan, seed: int) -> dict[str, np.ndarray]:
    values = torch.from_numpy(contexts).transpose(1, 2)
    coordinates = torch.tensor(scan.atlas.coordinates).expand(len(values), -1, -1)
    generator = torch.Generator().manual_seed(seed)
    guess = model.forecast(values, coordinates, steps=HORIZON)
    draws = [model.forecast(values, coordinates, None, HORIZON, 1.0, generator) for _ in range(SAMPLES)]
    return {
        "model, best guess": guess.transpose(1, 2).numpy(),
        f"model, mean of {SAMPLES} draws": torch.stack(draws).mean(0).transpose(1, 2).numpy(),
    }


def scores(truth: np.ndarray, guess: np.ndarray) -> tuple[float, float]:
    """
    Mean over ROIs of the correlation, and R-squared against the context's median (0), over all windows and frames
    [windows, frames, rois] of one person.
    """
    error = 1 - ((truth - guess) ** 2).sum() / (truth**2).sum()
    flat, other = (array.reshape(-1, array.shape[-1]) for array in (truth, guess))
    if (other.std(0) < 1e-9).any():
        return float("nan"), float(error)
    centered, other = flat - flat.mean(0), other - other.mean(0)
    correlations = (centered * other).sum(0) / np.sqrt((centered**2).sum(0) * (other**2).sum(0))
    return float(correlations.mean()), float(error)


def forecast_tables(model, training: list[PreparedScan], held_out: list[PreparedScan], seed: int):
    """Rows by method and horizon, and by method and frame."""
    patch = model.config.codec_config.patch_length
    context, horizon = CONTEXT * patch, HORIZON * patch
    by_atlas = {}
    for scan in training:
        by_atlas.setdefault(scan.atlas.name, []).append(scan)
    baselines = {
        name: (Autoregression(scans), RidgeVAR(scans, horizon))
        for name, scans in by_atlas.items()
        if name in {scan.atlas.name for scan in held_out}
    }
    people = {}
    for scan in tqdm(held_out, desc="forecasts", unit="scan"):
        windows = windows_of(scan, context + horizon, stride=2 * patch, context=context)
        past, truth = windows[:, :context], windows[:, context:]
        autoregression, ridge = baselines[scan.atlas.name]
        codes = torch.from_numpy(encode_items(model.model.codec, items_of(windows, scan)))
        coordinates = torch.tensor(scan.atlas.coordinates).expand(len(codes), -1, -1)
        with torch.no_grad():
            ceiling = model.model.codec.decode(codes, coordinates).transpose(1, 2).numpy()[:, context:]
        guesses = {
            "ROI mean": np.zeros_like(truth),
            "persistence": np.repeat(past[:, -1:], horizon, 1),
            "autoregression by ROI": autoregression.forecast(past, horizon),
            "ridge VAR": ridge.forecast(past, horizon),
            **model_forecasts(model, past, scan, seed),
            "codec given the future (ceiling)": ceiling,
        }
        for name, guess in guesses.items():
            people.setdefault((scan.dataset, scan.subject), {}).setdefault(name, []).append((truth, guess))
    rows, leads = [], []
    for name in next(iter(people.values())):
        pairs = [tuple(map(np.concatenate, zip(*methods[name], strict=True))) for methods in people.values()]
        for step in range(1, HORIZON + 1):
            part = slice((step - 1) * patch, step * patch)
            values = np.array([scores(truth[:, part], guess[:, part]) for truth, guess in pairs])
            for metric, column in zip(("correlation", "r_squared"), values.T, strict=True):
                low, high = interval(column)
                mean = float(column.mean())
                rows.append({"method": name, "step": step, "metric": metric, "mean": mean, "low": low, "high": high})
        for frame in range(horizon):
            values = np.array([scores(t[:, frame : frame + 1], g[:, frame : frame + 1]) for t, g in pairs]).mean(0)
            leads.append({"method": name, "frame": frame + 1, "correlation": values[0], "r_squared": values[1]})
    return pd.DataFrame(rows), pd.DataFrame(leads)


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over people."""
    draws = np.random.default_rng(0).integers(len(values), size=(BOOTSTRAPS, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return float(low), float(high)


def ngram_scores(train: np.ndarray, test: np.ndarray, size: int, smoothing: float) -> dict[str, np.ndarray]:
    """
    Log-probabilities [windows, steps - 1, slots, codes] of next codes by slot: how common a code is there, and how
    common it is after the present one, leaning on the former by `smoothing` pseudo-counts. Codes: [n, steps, slots].
    """
    slots = train.shape[2]
    slot = np.arange(slots)
    counts = np.ones((slots, size))
    np.add.at(counts, (np.broadcast_to(slot, train.shape), train), 1)
    unigram = counts / counts.sum(-1, keepdims=True)
    follows = np.zeros((slots, size, size))
    np.add.at(follows, (np.broadcast_to(slot, train[:, 1:].shape), train[:, :-1], train[:, 1:]), 1)
    present = follows[np.broadcast_to(slot, test[:, :-1].shape), test[:, :-1]]
    bigram = (present + smoothing * unigram[slot]) / (present.sum(-1, keepdims=True) + smoothing)
    return {"unigram": np.log(np.broadcast_to(unigram, present.shape)), "bigram": np.log(bigram)}


@torch.no_grad()
def code_table(model, training: list[PreparedScan], held_out: list[PreparedScan]) -> pd.DataFrame:
    """Next codes of steps 5 to 10 of held-out windows."""
    config = model.config.codec_config
    patch, slots = config.patch_length, config.tokens_per_step

    def codes_of(scan: PreparedScan, stride: int) -> np.ndarray:
        windows = windows_of(scan, 10 * patch, stride, CONTEXT * patch)
        return encode_items(model.model.codec, items_of(windows, scan)).reshape(len(windows), 10, slots)

    train = [codes_of(scan, 4) for scan in training]
    test = np.concatenate([codes_of(scan, 2 * patch) for scan in held_out])
    losses = []
    for smoothing in SMOOTHING:
        tried = ngram_scores(np.concatenate(train[:-1]), train[-1], config.codebook_size, smoothing)["bigram"]
        losses.append(-np.take_along_axis(tried, train[-1][:, 1:, :, None], -1).mean())
    smoothing = SMOOTHING[int(np.argmin(losses))]
    following = test[:, CONTEXT:]
    rows = []
    for name, values in ngram_scores(np.concatenate(train), test, config.codebook_size, smoothing).items():
        values = values[:, CONTEXT - 1 :]
        loss = -np.take_along_axis(values, following[..., None], -1).mean()
        accuracy = (values.argmax(-1) == following).mean()
        rows.append({"method": name, "accuracy": accuracy, "perplexity": np.exp(loss)})
    flat = torch.from_numpy(test.reshape(len(test), -1))
    learned = model.fmri_head.weight.clone()
    for name, weight in (("autoregression alone", torch.zeros_like(learned)), ("model", learned)):
        # what the language model adds goes through its head
        model.fmri_head.weight.copy_(weight)
        chosen = [
            model.forecast_codes(flat[:, : step * slots], 1)[:, -slots:].numpy() for step in range(CONTEXT, 10)
        ]
        loss = model.surprise(flat)[:, CONTEXT:].mean().item()
        accuracy = (np.stack(chosen, 1) == following).mean()
        rows.append({"method": name, "accuracy": accuracy, "perplexity": np.exp(loss)})
    return pd.DataFrame(rows)


def main(
    folder: Annotated[Path, typer.Argument(help="A model and its processor, as `fmrilm demo` saves them.")],
    steps: Annotated[int, typer.Option(help="Updates of 8 windows on the training people first.")] = 150,
    seed: int = 0,
    results: Annotated[Path, typer.Option(help="Folder of the CSV files.")] = RESULTS,
) -> None:
    set_seed(seed)
    processor = FmriLMProcessor.from_pretrained(folder)
    model = FmriLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    training, held_out = split_subjects(prepare_scans(open_scans(), processor.feature_extractor), HELD_OUT)
    start = time.perf_counter()
    if steps:
        model = tune(model, processor, training, steps, seed)
    seconds = round(time.perf_counter() - start)
    table, leads = forecast_tables(model, training, held_out, seed)
    codes = code_table(model, training, held_out)
    results.mkdir(parents=True, exist_ok=True)
    for name, frame in (("forecast", table), ("forecast_lead", leads), ("forecast_codes", codes)):
        frame.assign(tuning_steps=steps, tuning_seconds=seconds, seed=seed).to_csv(
            results / f"{name}.csv", index=False, float_format="%.4f"
        )
        print(frame.to_string(index=False, float_format="%.3f"), "\n")


if __name__ == "__main__":
    typer.run(main)
