"""Trained codecs for `codec.py`, and how well signals are told from their codes."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fmrilm import Atlas, FmriCodecModel, FmriLMFeatureExtractor
from fmrilm.training.codec.metrics import fc_correlation, r_squared
from fmrilm.training.codec.program import CodecArguments, CodecData, build_trainer, codec_data
from fmrilm.training.codec.trainer import CodecTrainer, CodecTrainingArguments, encode_items, window_items
from fmrilm.training.data.dataset import PreparedScan, Window, cut_windows, prepare_scans, split_subjects
from fmrilm.training.data.open_data import open_scans
from fmrilm.training.demo import ATLASES, HELD_OUT
from fmrilm.training.trainer import training_options


FRAMES, STRIDE, PATCH = 160, 136, 16
# the latent layout starts from a fit, which larger steps would undo
LEARNING_RATES = {"latent": 3e-4, "roi": 3e-3}
# nine bits; three dimensions of eight levels keep less
FSQ_LEVELS = [8, 4, 4, 4]
BOOTSTRAPS = 2000
Windows = dict[tuple[str, str], list[Window]]


@dataclass(frozen=True)
class Budget:
    steps: int
    batch: int
    models: Path


def split_scans() -> tuple[list[PreparedScan], list[PreparedScan]]:
    extractor = FmriLMFeatureExtractor(atlases=[Atlas.load(name) for name in ATLASES])
    return split_subjects(prepare_scans(open_scans(), extractor), HELD_OUT)


def all_data() -> CodecData:
    return codec_data(*split_scans(), FRAMES, STRIDE)


def arm_trainer(budget: Budget, data: CodecData, seed: int, name: str, **changes) -> CodecTrainer:
    """The trainer of an arm, not trained yet."""
    staging = budget.models / f"{name}-seed{seed}-{budget.steps}x{budget.batch}.partial"
    args = CodecArguments(**{"patch_length": PATCH, "described_mixtures": 256, **changes})
    latent = args.token_layout == "latent"
    args.commitment_weight = args.commitment_weight if latent else 1.0
    options = training_options(staging, budget.steps, budget.batch, LEARNING_RATES[args.token_layout], seed)
    return build_trainer(
        args,
        CodecTrainingArguments(**options, unquantized_steps=0 if latent else budget.steps // 8),
        data,
    )


def trained(trainer: CodecTrainer) -> FmriCodecModel:
    """The model of an arm, read where it was trained before."""
    staging = Path(trainer.args.output_dir)
    folder = staging.with_suffix("")
    if not folder.exists():
        trainer.train()
        trainer.save_model(str(staging))
        staging.rename(folder)
    return FmriCodecModel.from_pretrained(folder)


def arm(budget: Budget, data: CodecData, seed: int, name: str, **changes) -> FmriCodecModel:
    return trained(arm_trainer(budget, data, seed, name, **changes))


def rate_arm(
    budget: Budget, data: CodecData, seed: int, method: str, tokens: int, bits: int, patch: int
) -> FmriCodecModel:
    """Trained for reconstruction alone."""
    layout, _, quantizer = method.partition("-")
    return arm(
        budget,
        data,
        seed,
        f"{method}-{tokens}x{bits}bits-{patch}frames",
        token_layout=layout,
        tokens_per_step=tokens,
        patch_length=patch,
        quantizer=quantizer,
        codebook_size=2**bits,
        fsq_levels=FSQ_LEVELS,
        descriptor_weight=0.0,
    )


def by_person(scans: Sequence[PreparedScan]) -> Windows:
    people = defaultdict(list)
    for window in cut_windows(scans, FRAMES, STRIDE):
        people[window.scan.dataset, window.scan.subject].append(window)
    return people


def fidelity(people: Windows, decoded: Callable[[list[Window]], list[np.ndarray]]) -> dict[str, float]:
    """R-squared and FC correlation, means over people with 95 % bootstrap intervals, of decoded [time, rois]."""
    values = []
    for windows in people.values():
        signals, guesses = [window.signal for window in windows], decoded(windows)
        correlation = fc_correlation(signals, guesses)
        values.append((r_squared(signals, guesses), float("nan") if correlation is None else correlation))
    draws = np.random.default_rng(0).integers(len(values), size=(BOOTSTRAPS, len(values)))
    results = {"people": len(values)}
    for name, column in zip(("r_squared", "fc_correlation"), np.array(values).T, strict=True):
        low, high = np.quantile(column[draws].mean(1), [0.025, 0.975])
        results |= {name: column.mean(), f"{name}_low": low, f"{name}_high": high}
    return results


@torch.no_grad()
def decode_items(model: FmriCodecModel, items: list[dict], places: np.ndarray) -> list[np.ndarray]:
    """Signals [time, places] at places [places, 3] in mm, of the codes of items of one atlas."""
    codes = torch.from_numpy(encode_items(model, items))
    return list(model.decode(codes, torch.from_numpy(places).expand(len(codes), -1, -1)).transpose(1, 2).numpy())


def places_of(windows: list[Window]) -> np.ndarray:
    return windows[0].scan.atlas.coordinates.astype(np.float32)


def decoded_by(model: FmriCodecModel, windows: list[Window]) -> list[np.ndarray]:
    return decode_items(model, window_items(windows), places_of(windows))
