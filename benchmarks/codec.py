"""
What the codec keeps of scans of held-out subjects, in which bits, and how fast. No scan leaves its folder.

    python benchmarks/codec.py labels --data FOLDER [--folds 5]     rate, distortion; autism, sex, age; identification
    python benchmarks/codec.py states --data FOLDER --state FOLDER  another atlas; cognitive states of 64 s windows
    python benchmarks/codec.py parcellations --data FOLDER [--folds 5]  half as many ROIs; use of the codes
    python benchmarks/codec.py patches --data FOLDER [--folds 5]    patches of 4, 8 and 16 frames, equal bits a second
    python benchmarks/codec.py losses --data FOLDER [--folds 5]     training after the fit, and the contrastive loss
    python benchmarks/codec.py speed --data FOLDER                  encoding, summary, and the fit against subjects

A folder is one that `fmrilm prepare` wrote, of one atlas. The codec is the release recipe's
(`training/configs/release/codec.yaml`). Results: `benchmarks/results/codec_*.csv`.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from ask import busy_seconds
from forecast import CONTEXT, PATCH, RECIPE, SHOWN, Windows, figures, fitted, measured, sampled, sums
from next_codes import bits as code_bits
from next_codes import by_expectation, by_frequency, codes_of, fitted_dynamics, unigram
from people import write_splits
from scipy.fft import dct, idct
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, StratifiedKFold
from torch.utils.flop_counter import FlopCounterMode

from fmrilm import FmriCodecConfig, FmriCodecModel, FmriLMFeatureExtractor
from fmrilm.modeling_fmricodec import FmriCodecSummary
from fmrilm.modeling_fmrilm import FmriLMDynamics
from fmrilm.training.alignment.dynamics import fit_dynamics
from fmrilm.training.alignment.language_models import load_text_encoder
from fmrilm.training.codec.fit import fit_summary, present
from fmrilm.training.codec.metrics import codebook_results, fc_correlation, r_squared, retrieval_results
from fmrilm.training.codec.program import describe
from fmrilm.training.codec.program import main as train_codec
from fmrilm.training.codec.text_embeddings import embed_texts
from fmrilm.training.data.dataset import Scans, cut_windows, encode_items, load_scans
from fmrilm.training.data.shards import write_whole
from fmrilm.training.data.splits import Split
from fmrilm.training.program import fit_cohort
from fmrilm.training.ridge import Ridge, cross_fitted_ridge


RESULTS = Path(__file__).parent / "results"
BOOTSTRAPS = 1000
# frames of a patch that are compared; they divide PATCH
PATCHES = (4, 8, 16)
# parts of all levels that decode on their own
SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
# of timings
REPEATS, MATRIX = 50, 1024
# frames, windows that are described, and statements of a description
WINDOW, DESCRIBED, STATEMENTS = 160, 400, 8
# Options of the stage's program. Half of the recipe's levels, which train in half the time; the transformers are tiny.
LEVELS = ["--num_quantizers", "16", "--num_scan_levels", "0"]
TRAINED = ["--size", "tiny", "--per_device_train_batch_size", "8", "--learning_rate", "1e-3", "--save_strategy", "no"]
LOSSES = {
    "fitted": [],
    "trained": TRAINED,
    "contrastive loss": [*TRAINED, "--language_model", "smollm2-135m-instruct"],
}


def load(folder: Path) -> Scans:
    scans = load_scans(folder, FmriLMFeatureExtractor(patch_length=PATCH))
    if len(scans.atlases) != 1:
        raise ValueError(f"expected scans of one atlas in {folder}, got {', '.join(scans.atlases)}")
    return scans


def signals_of(scans: Scans) -> list[np.ndarray]:
    """Of each scan, [time, rois], NaN where a ROI is missing."""
    return [scans.signal(index) for index in range(len(scans))]


def write(name: str, rows: list[dict]) -> None:
    write_whole(RESULTS / f"codec_{name}.csv", pd.DataFrame(rows).round(4).to_csv(index=False))
    for row in rows:
        print(name, row, flush=True)


def whole(scans: Scans, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [1, rois, time] of whole patches and coordinates [1, rois, 3]."""
    signal, coordinates = present(scans, index)
    return signal[: len(signal) // PATCH * PATCH].T[None], coordinates[None]


def bits(config: FmriCodecConfig, levels: int) -> float:
    """Of a patch, in so many levels."""
    return config.tokens_per_patch * levels * float(np.log2(config.codebook_size))


@torch.no_grad()
def distortion(model: FmriCodecModel, scans: Scans, codes: list[torch.Tensor], levels: int) -> tuple[float, float]:
    pairs = []
    for index, row in enumerate(codes):
        values, coordinates = whole(scans, index)
        pairs.append((values[0].T.numpy(), model.decode(row[..., :levels], coordinates)[0].T.numpy()))
    signals, guesses = zip(*pairs, strict=True)
    return r_squared(signals, guesses), fc_correlation(signals, guesses) or float("nan")


class TransformCoder:
    """Principal components of training frames, cosines over a patch, one uniform step, ideal entropy coding."""

    def __init__(self, scans: Scans, components: int = 64):
        frames = np.nan_to_num(np.concatenate(signals_of(scans)))
        self.components = np.linalg.eigh(frames.T @ frames)[1][:, ::-1][:, :components]

    def code(self, scans: Scans, step: float) -> tuple[float, float, float]:
        """Bits a patch, R-squared, FC correlation."""
        signals, guesses, numbers = [], [], []
        for signal in signals_of(scans):
            signal = signal[: len(signal) // PATCH * PATCH]
            patches = (np.nan_to_num(signal) @ self.components).reshape(-1, PATCH, self.components.shape[1])
            rounded = np.round(dct(patches, axis=1, norm="ortho") / step)
            numbers.append(rounded)
            guess = idct(rounded * step, axis=1, norm="ortho").reshape(len(signal), -1) @ self.components.T
            there = ~np.isnan(signal).any(0)
            signals.append(signal[:, there])
            guesses.append(
                guess[:, there] + 1e-5 * np.random.default_rng(0).standard_normal((len(signal), there.sum()))
            )
        spent = 0.0
        for column in np.concatenate(numbers).reshape(-1, PATCH * self.components.shape[1]).T:
            shares = np.unique(column, return_counts=True)[1] / len(column)
            spent -= float((shares * np.log2(shares)).sum())
        return spent, r_squared(signals, guesses), fc_correlation(signals, guesses) or float("nan")


def correlations(signal: np.ndarray) -> np.ndarray:
    """Fisher z of all pairs of ROIs, zero where one is missing."""
    with np.errstate(invalid="ignore", divide="ignore"):
        matrix = np.nan_to_num(np.corrcoef(signal.T))
    return np.arctanh(matrix[np.triu_indices(len(matrix), 1)].clip(-0.999, 0.999)).astype(np.float32)


def raw_tangent(signals: list[np.ndarray], training: np.ndarray) -> np.ndarray:
    """Tangent space of all ROIs at the training scans' mean covariance, shrunk by .3 towards it."""
    summary = FmriCodecSummary(FmriCodecConfig(num_basis_functions=signals[0].shape[1]))
    covariance = np.stack([np.cov(np.nan_to_num(signal).T) for signal in signals]).astype(np.float32)
    covariance += 1e-2 * np.eye(covariance.shape[1], dtype=np.float32)
    values, vectors = np.linalg.eigh(covariance[training].mean(0))
    summary.whitening.copy_(torch.from_numpy(vectors / np.sqrt(values) @ vectors.T))
    return torch.cat([summary.tangent(part) for part in torch.from_numpy(covariance).split(32)]).numpy()


def pearson(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(first, second)[0, 1])


def score(name: str, truth: np.ndarray, found: np.ndarray) -> float:
    return pearson(truth, found) if name == "age" else float(roc_auc_score(truth, found))


def split(scans: Scans, folds: int) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
    """Number, training and test rows of the first of five folds; a subject has one scan."""
    strata = scans.table["site"] + scans.table["diagnosis"]
    return islice(enumerate(StratifiedKFold(5, shuffle=True, random_state=0).split(strata, strata)), folds)


def targets_of(scans: Scans) -> dict[str, np.ndarray]:
    table = scans.table
    return {
        "autism": (table["diagnosis"] == "autism").to_numpy(float),
        "sex": (table["sex"] == "F").to_numpy(float),
        "age": table["age"].to_numpy(float),
    }


@torch.no_grad()
def labels(folder: Path, folds: int) -> None:
    scans = load(folder)
    table, targets = scans.table, targets_of(scans)
    stacked = np.stack(list(targets.values()), 1)
    subjects = table["subject"].to_numpy(str)
    signals = signals_of(scans)
    raw = np.stack([correlations(signal) for signal in signals])
    predictions: dict[str, np.ndarray] = {}
    rate, identified = [], []
    tested = []
    for fold, (training, test) in split(scans, folds):
        tested.append(test)
        learned, held_out = scans.select(training), scans.select(test)
        start = time.perf_counter()
        model = fitted(learned, scan_levels=True)
        print(f"fold {fold}: fitted in {time.perf_counter() - start:.0f} s", flush=True)
        codes = [model.encode(*whole(scans, index)) for index in range(len(scans))]
        config = model.config
        all_levels = config.num_quantizers
        for levels in sorted({max(1, int(share * all_levels)) for share in SHARES}):
            r2, fc = distortion(model, held_out, [codes[index] for index in test], levels)
            spent = bits(config, levels)
            rate.append({"fold": fold, "coder": "codec", "bits": spent, "r_squared": r2, "fc_correlation": fc})
        coder = TransformCoder(learned)
        for step in (1.0, 1.5, 2.5, 4.0, 6.0, 9.0):
            spent, r2, fc = coder.code(held_out, step)
            rate.append({"fold": fold, "coder": "transform", "bits": spent, "r_squared": r2, "fc_correlation": fc})
        features = {"FC, raw": raw, "tangent, raw": raw_tangent(signals, training)}
        apart = config.num_scan_numbers
        numbers = torch.stack([model.scan_features(row)[0, -apart:] for row in codes]).numpy()
        once = f"{bits(config, config.num_scan_levels):.0f} bits a scan"
        features[f"codes of whole scans, {once}"] = numbers
        for levels in (all_levels // 8, all_levels // 2, all_levels):
            if levels < all_levels:
                # a prefix of the levels decodes to other covariances: its own mean
                refit(model, learned, levels)
            else:
                fit_summary(model, learned, np.random.default_rng(0))
            rows = torch.stack([model.scan_features(row[..., :levels])[0, :-apart] for row in codes]).numpy()
            name = f"codes, {bits(config, levels):.0f} bits"
            features |= {name: rows, f"{name} and {once}": np.concatenate([rows, numbers], 1)}
        for name, values in features.items():
            found = predictions.setdefault(name, np.full(stacked.shape, np.nan))
            blocks = config.scan_feature_blocks if name.startswith("codes, ") else None
            added = apart if name.endswith(f"and {once}") else 0
            ridge = cross_fitted_ridge(values[training], stacked[training], subjects[training], 0, blocks, added)
            found[test] = ridge.predict(values[test])
        identified.append({"fold": fold, **identification(model, held_out)})
        write("rate", rate)
        write("labels", label_rows(targets, predictions, np.concatenate(tested)))
        write("identification", identified)


def refit(model: FmriCodecModel, scans: Scans, levels: int) -> None:
    encode = model.encode
    model.encode = lambda *inputs: encode(*inputs)[..., :levels]  # pyright: ignore[reportAttributeAccessIssue]
    fit_summary(model, scans, np.random.default_rng(0))
    model.encode = encode  # pyright: ignore[reportAttributeAccessIssue]


def label_rows(targets: dict[str, np.ndarray], predictions: dict[str, np.ndarray], rows: np.ndarray) -> list[dict]:
    """Scores of pooled out-of-fold predictions, and 95 % intervals over subjects of the difference to raw tangent."""
    rng, found = np.random.default_rng(0), []
    samples = [rng.integers(len(rows), size=len(rows)) for _ in range(BOOTSTRAPS)]
    for features, values in predictions.items():
        for column, (name, target) in enumerate(targets.items()):
            truth, ours, raw = target[rows], values[rows, column], predictions["tangent, raw"][rows, column]
            differences = [score(name, truth[s], ours[s]) - score(name, truth[s], raw[s]) for s in samples]
            low, high = np.quantile(differences, (0.025, 0.975))
            row = {"features": features, "label": name, "subjects": len(rows), "score": score(name, truth, ours)}
            found.append(
                {**row, "minus_raw_tangent": row["score"] - score(name, truth, raw), "low": low, "high": high}
            )
    return found


@torch.no_grad()
def identification(model: FmriCodecModel, scans: Scans) -> dict[str, float]:
    """Share of scans whose first half is nearest (correlation) to their second half, of `len(scans)` of them."""
    halves: dict[str, list] = {"codes": [], "raw": []}
    for index in range(len(scans)):
        values, coordinates = whole(scans, index)
        middle = values.shape[-1] // 2 // PATCH * PATCH
        parts = values[..., :middle], values[..., middle : 2 * middle]
        halves["codes"].append([model.summarize(model.encode(part, coordinates))[0].numpy() for part in parts])
        signal = scans.signal(index)
        halves["raw"].append([correlations(signal[:middle]), correlations(signal[middle : 2 * middle])])
    found = {"scans": float(len(scans))}
    for name, rows in halves.items():
        first, second = (np.array(part) for part in zip(*rows, strict=True))
        first, second = ((part - part.mean(1, keepdims=True)) / part.std(1, keepdims=True) for part in (first, second))
        found[name] = float(((first @ second.T).argmax(1) == np.arange(len(first))).mean())
    return found


@torch.no_grad()
def states(folder: Path, state_folder: Path) -> None:
    scans, others = load(folder), load(state_folder)
    model = fitted(scans)
    groups = others.table["subject"].to_numpy()
    training, test = next(GroupKFold(5).split(groups, groups=groups))
    there, held_out = others.select(training), others.select(test)
    rows = []
    for name, codec in (("fitted on the other atlas", model), ("fitted there", fitted(there))):
        codes = [codec.encode(*whole(held_out, index)) for index in range(len(held_out))]
        r2, fc = distortion(codec, held_out, codes, codec.config.num_quantizers)
        rows.append({"codec": name, "r_squared": r2, "fc_correlation": fc})
    write("atlases", rows)

    features: dict[str, list] = {"codes": [], "raw FC": []}
    conditions, subjects = [], []
    for index in range(len(others)):
        values, places = whole(others, index)
        for start in range(0, values.shape[-1] - 31, 32):
            window = values[..., start : start + 32]
            features["codes"].append(model.summarize(model.encode(window, places))[0].numpy())
            features["raw FC"].append(correlations(window[0].T.numpy()))
            conditions.append(others.table["condition"][index])
            subjects.append(groups[index])
    names, truth = np.unique(conditions, return_inverse=True)
    rows = []
    for name, values in features.items():
        inputs, found = np.stack(values), np.zeros(len(truth), int)
        groups = np.array(subjects)
        for training, test in GroupKFold(5).split(inputs, groups=groups):
            ridge = cross_fitted_ridge(inputs[training], np.eye(len(names))[truth[training]], groups[training])
            found[test] = ridge.predict(inputs[test]).argmax(1)
        majority = np.bincount(truth).max() / len(truth)
        rows.append(
            {"features": name, "windows": len(truth), "accuracy": float((found == truth).mean()), "majority": majority}
        )
    write("states", rows)


def merged(coordinates: torch.Tensor) -> torch.Tensor:
    """Pairs of near ROIs int [rois / 2, 2]: each ROI in turn takes the nearest one that is left."""
    left, pairs = list(range(len(coordinates))), []
    while len(left) > 1:
        first = left.pop(0)
        second = min(left, key=lambda other: float((coordinates[first] - coordinates[other]).norm()))
        left.remove(second)
        pairs.append((first, second))
    return torch.tensor(pairs)


def halved(scans: Scans, index: int, pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `whole`, of the means of pairs of ROIs, standardised; a pair without one of its ROIs is missing."""
    signal = torch.from_numpy(scans.signal(index).T)
    values = signal[pairs, : signal.shape[1] // PATCH * PATCH].mean(1)
    there = ~values.isnan().any(1)
    scale = signal[~signal.isnan().any(1)].std() / values[there].std(-1, keepdim=True)
    coordinates = torch.tensor(scans.atlas(index).coordinates, dtype=torch.float32)[pairs].mean(1)
    return (values[there] * scale)[None], coordinates[there][None]


def agreement(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Of two sets of features [scans, features]: mean correlation within scans, and over scans by feature."""

    def correlation(first: np.ndarray, second: np.ndarray) -> float:
        first, second = (part - part.mean(1, keepdims=True) for part in (first, second))
        lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
        return float(((first * second).sum(1) / lengths).mean())

    return {"within_scans": correlation(first, second), "over_scans": correlation(first.T, second.T)}


@torch.no_grad()
def features_of(model: FmriCodecModel, scans: Scans) -> np.ndarray:
    """Scan features float32 [scans, features] of the codes."""
    rows = [model.scan_features(model.encode(*whole(scans, index))) for index in range(len(scans))]
    return torch.cat(rows).numpy()


def label_ridge(model: FmriCodecModel, training: Scans) -> Ridge:
    """Of the labels of training subjects, on scan features."""
    stacked = np.stack(list(targets_of(training).values()), 1)
    subjects = training.table["subject"].to_numpy(str)
    return cross_fitted_ridge(features_of(model, training), stacked, subjects, 0, model.config.scan_feature_blocks)


@torch.no_grad()
def parcellations(folder: Path, folds: int) -> None:
    """Scans of test subjects in the ROIs of their atlas, and in half as many: each the mean of two neighbours."""
    rows, levels = [], []
    scans = load(folder)
    for fold, (learned, held_out) in split(scans, folds):
        training, test = scans.select(learned), scans.select(held_out)
        model = fitted(training)
        coordinates = torch.tensor(test.atlas(0).coordinates, dtype=torch.float32)
        pairs, functions = merged(coordinates), model.spatial_basis(coordinates)
        found: list[dict[str, list]] = [{}, {}]
        written = []
        for index in range(len(test)):
            for inputs, features in zip((whole(test, index), halved(test, index, pairs)), found, strict=True):
                codes = model.encode(*inputs)
                if features is found[0]:
                    written.append(codes[0].numpy())
                series = functions @ model.decode_coefficients(codes)[0]
                for name, values in (
                    ("scan features", model.scan_features(codes)[0].numpy()),
                    ("decoded connectivity at all ROIs", correlations(series.T.numpy())),
                ):
                    features.setdefault(name, []).append(values)
        first, second = ({name: np.stack(part) for name, part in one.items()} for one in found)
        parts = {"tangent summary": slice(model.config.num_summary_features)}
        parts["covariance of networks"] = slice(model.config.scan_feature_blocks[0], -model.config.num_networks)
        for name, part in parts.items():
            first[name], second[name] = (features["scan features"][:, part] for features in (first, second))
        for name in (*parts, "decoded connectivity at all ROIs"):
            rows.append({"fold": fold, "what": name, **agreement(first[name], second[name])})
        ridge = label_ridge(model, training)
        predicted = [ridge.predict(features["scan features"]) for features in (first, second)]
        for column, (name, truth) in enumerate(targets_of(test).items()):
            ours, other = (each[:, column] for each in predicted)
            row = {"fold": fold, "what": f"score of {name}", "over_scans": pearson(ours, other)}
            rows.append({**row, "read": score(name, truth, ours), "read_in_the_other": score(name, truth, other)})
        use = codebook_results(written, model.config.codebook_size)
        for level, (usage, perplexity) in enumerate(zip(use["codebook_usage"], use["perplexity"], strict=True)):
            levels.append({"fold": fold, "level": level + 1, "codebook_usage": usage, "perplexity": perplexity})
        write("levels", levels)
        write("parcellations", rows)


@torch.no_grad()
def patches(folder: Path, folds: int) -> None:
    """
    What codecs of shorter patches keep of test subjects: signal, connectivity, labels by ridge regression; how many
    bits of next codes what is expected of them saves, beside their frequencies; R2 of forecasts by lead.
    """
    scans, rows = load(folder), []
    for fold, (learned, held_out) in split(scans, folds):
        training, test = scans.select(learned), scans.select(held_out)
        for patch in PATCHES:
            model = fitted(training, patch)
            codes = [model.encode(*whole(test, index)) for index in range(len(test))]
            r2, fc = distortion(model, test, codes, model.config.num_quantizers)
            row = {"fold": fold, "patch_length": patch, "r_squared": r2, "fc_correlation": fc}
            predicted = label_ridge(model, training).predict(features_of(model, test))
            for column, (name, truth) in enumerate(targets_of(test).items()):
                row[name] = score(name, truth, predicted[:, column])
            rows.append(row | next_codes(model, training, test) | forecasts(model, training, test))
            write("patches", rows)


def next_codes(model: FmriCodecModel, training: Scans, test: Scans) -> dict[str, float]:
    """Bits a second of next codes by their frequencies, and the share that expected vectors save."""
    (train, subjects), (held_out, _) = codes_of(model, training), codes_of(model, test)
    dynamics = fitted_dynamics(model, training, train, subjects)
    frequencies = unigram(train, 1.0, model.config.codebook_size)
    expected = dynamics.expected_vectors(model, held_out.flatten(1, 2)).unflatten(1, held_out.shape[1:3])
    alone = by_frequency(frequencies, held_out).sum(1).mean()
    found = by_expectation(frequencies, expected * dynamics.token_gains, model.codebooks(), held_out)
    tokens = model.config.tokens_per_patch / model.config.patch_length / model.config.repetition_time
    saved = alone - code_bits(found, held_out).sum(1).mean()
    return {"bits_per_second": float(alone * tokens), "share_saved": float(saved / alone)}


def forecasts(model: FmriCodecModel, training: Scans, test: Scans) -> dict[str, float]:
    """R2 of the expected signal of scans that were measured at the codec's repetition time, by lead."""
    training, test = (measured(part, model.config.repetition_time) for part in (training, test))
    # those of next codes also learn from faster scans: as in `forecast.py`, these do not
    dynamics, windows = FmriLMDynamics(model.config), Windows(test, every=2)
    fit_dynamics(dynamics, model, training, CONTEXT, seed=0)
    # the expected signal alone counts
    r_squared = figures(sums(*sampled(dynamics, model, test, windows, count=2), windows).sum(0))[0]
    return {f"r_squared_{2 * lead}_s": float(value) for lead, value in zip(SHOWN, r_squared, strict=True)}


def losses(folder: Path, folds: int, updates: int) -> None:
    """
    Codecs of the stage's program: as fitted, trained after that, and with a loss against a frozen language model.
    What they keep of test subjects, and which windows find their own description: by the alignment head, and by ridge
    regression of the descriptions' embeddings on scan features.
    """
    scans, rows = load(folder), []
    texts = partial(embed_texts, *load_text_encoder())
    with tempfile.TemporaryDirectory() as scratch:
        for fold, (learned, held_out) in split(scans, folds):
            splits = write_splits(Path(scratch, "splits.csv"), [scans], [Split(learned, held_out)])
            training, test = scans.select(learned), scans.select(held_out)
            cohort = fit_cohort(training, WINDOW, WINDOW)
            windows = [cut_windows(part, WINDOW, WINDOW) for part in (training, test)]
            described = [
                texts([describe(cohort, row, STATEMENTS) for row in cohort.z_scores(part.descriptors())[:DESCRIBED]])
                for part in windows
            ]
            for name, options in LOSSES.items():
                output = Path(scratch, f"{fold} {name}")
                trained = ["--max_steps", str(updates)] if options else []
                train_codec(
                    ["--config", str(RECIPE), "--data", str(folder), "--splits", str(splits)]
                    + ["--output_dir", str(output), *LEVELS, *trained, *options]
                )
                model = FmriCodecModel.from_pretrained(output / "model").eval()
                results = json.loads((output / "results.json").read_text(encoding="utf-8"))
                row = {key: results.get(key) for key in ("r_squared", "fc_correlation", "recall_at_5", "median_rank")}
                predicted = label_ridge(model, training).predict(features_of(model, test))
                for column, (label, truth) in enumerate(targets_of(test).items()):
                    row[label] = score(label, truth, predicted[:, column])
                features = [encode_items(model, part.items()[:DESCRIBED]).features for part in windows]
                mean, std = described[0].mean(0), described[0].std(0)
                targets = [(part - mean) / std for part in described]
                subjects = training.table["subject"].to_numpy(str)[[window.scan for window in windows[0]][:DESCRIBED]]
                blocks = model.config.scan_feature_blocks
                found = cross_fitted_ridge(features[0], targets[0], subjects, 0, blocks).predict(features[1])
                lengths = [np.linalg.norm(part, axis=1, keepdims=True) for part in (found, targets[1])]
                linear = retrieval_results(found / lengths[0], targets[1] / lengths[1])
                row |= {f"linear_{key}": linear[key] for key in ("recall_at_5", "median_rank", "chance_recall_at_5")}
                rows.append({"fold": fold, "codec": name, **row})
                write("losses", rows)


def timed(what: str, call: Callable[[], object], repeats: int = 1) -> dict:
    """Seconds of a call, of the clock and of the processor, and how many cores other programs kept busy meanwhile."""
    start, own, all_cores = time.perf_counter(), time.process_time(), busy_seconds()
    for _ in range(repeats):
        call()
    wall, own, all_cores = time.perf_counter() - start, time.process_time() - own, busy_seconds() - all_cores
    others = max(0.0, (all_cores - own) / wall)
    return {"what": what, "seconds": wall / repeats, "cpu_seconds": own / repeats, "others": others}


@torch.no_grad()
def speed(folder: Path) -> None:
    torch.set_num_threads(1)
    scans, rows = load(folder), []
    square = torch.randn(MATRIX, MATRIX)
    product = timed(f"product of two matrices, {MATRIX} x {MATRIX}", lambda: square @ square, REPEATS)
    rate = 2 * MATRIX**3 / product["cpu_seconds"]
    rows.append({**product, "gflop": 2 * MATRIX**3 / 1e9, "share_of_matrix_rate": 1.0})
    model = FmriCodecModel(FmriCodecConfig()).eval()
    for subjects in (100, 300, len(scans)):
        some = scans.select(range(subjects))
        rows.append(timed(f"fit, {subjects} scans", lambda some=some: fitted(some)))
    for rois in (200, 450):
        values, places = torch.randn(1, rois, 160), 60 * torch.randn(1, rois, 3)
        codes = model.encode(values, places)
        for name, call in (
            ("encode", lambda values=values, places=places: model.encode(values, places)),
            ("scan features", lambda codes=codes: model.scan_features(codes)),
            ("decode", lambda codes=codes, places=places: model.decode(codes, places)),
        ):
            with FlopCounterMode(display=False) as counter:
                call()
            operations = counter.get_total_flops()
            row = timed(f"{name}, {rois} ROIs x 160 frames", call, REPEATS)
            share = operations / row["cpu_seconds"] / rate
            rows.append({**row, "gflop": operations / 1e9, "share_of_matrix_rate": share})
    write("speed", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("labels", "states", "parcellations", "patches", "losses", "speed"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=300)
    args = parser.parse_args()
    if args.what == "labels":
        labels(args.data, args.folds)
    elif args.what == "states":
        states(args.data, args.state)
    elif args.what == "parcellations":
        parcellations(args.data, args.folds)
    elif args.what == "patches":
        patches(args.data, args.folds)
    elif args.what == "losses":
        losses(args.data, args.folds, args.updates)
    else:
        speed(args.data)


if __name__ == "__main__":
    main()
