"""
What the codec keeps of scans of held-out subjects, in which bits, and how fast. No scan leaves its folder.

    python benchmarks/codec.py labels --data FOLDER [--folds 5]     rate, distortion; autism, sex, age; identification
    python benchmarks/codec.py states --data FOLDER --state FOLDER  another atlas; cognitive states of 64 s windows
    python benchmarks/codec.py speed --data FOLDER                  encoding, summary, and the fit against subjects

A folder is one that `fmrilm prepare` wrote, of one atlas. The codec is the release recipe's
(`training/configs/release/codec.yaml`). Results: `benchmarks/results/codec_*.csv`.
"""

import argparse
import csv
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from scipy.fft import dct, idct
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, StratifiedKFold

from fmrilm import FmriCodecConfig, FmriCodecModel, FmriLMFeatureExtractor
from fmrilm.modeling_fmricodec import FmriCodecSummary
from fmrilm.training.codec.fit import fit_codec, fit_summary, present
from fmrilm.training.codec.metrics import fc_correlation, r_squared
from fmrilm.training.data.dataset import Scans, load_scans
from fmrilm.training.ridge import cross_fitted_ridge


RESULTS = Path(__file__).parent / "results"
RECIPE = Path(__file__).parents[1] / "training" / "configs" / "release" / "codec.yaml"
PATCH, BOOTSTRAPS = 16, 1000
# parts of all levels that decode on their own
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)


def load(folder: Path) -> Scans:
    scans = load_scans(folder, FmriLMFeatureExtractor(patch_length=PATCH))
    if len(scans.atlases) != 1:
        raise ValueError(f"expected scans of one atlas in {folder}, got {', '.join(scans.atlases)}")
    return scans


def signals_of(scans: Scans) -> list[np.ndarray]:
    """Of each scan, [time, rois], NaN where a ROI is missing."""
    return [scans.signal(index) for index in range(len(scans))]


def write(name: str, rows: list[dict]) -> None:
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"codec_{name}.csv", "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    for row in rows:
        print(name, row, flush=True)


def whole(scans: Scans, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [1, rois, time] of whole patches and coordinates [1, rois, 3]."""
    signal, coordinates = present(scans, index)
    return signal[: len(signal) // PATCH * PATCH].T[None], coordinates[None]


def fitted(scans: Scans, seed: int = 0) -> FmriCodecModel:
    torch.manual_seed(seed)
    known = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    names = ("patch_length", "tokens_per_patch", "num_quantizers", "codebook_size", "codebook_dim")
    model = FmriCodecModel(FmriCodecConfig(**{name: known[name] for name in names})).eval()
    fit_codec(model, scans, seed=seed)
    return model


def bits(config: FmriCodecConfig, levels: int) -> float:
    """Of a patch."""
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


def score(name: str, truth: np.ndarray, found: np.ndarray) -> float:
    return float(np.corrcoef(truth, found)[0, 1] if name == "age" else roc_auc_score(truth, found))


@torch.no_grad()
def labels(folder: Path, folds: int) -> None:
    scans = load(folder)
    table = scans.table
    targets = {
        "autism": (table["diagnosis"] == "autism").to_numpy(float),
        "sex": (table["sex"] == "F").to_numpy(float),
        "age": table["age"].to_numpy(float),
    }
    stacked = np.stack(list(targets.values()), 1)
    strata, subjects = table["site"] + table["diagnosis"], table["subject"].to_numpy(str)
    signals = signals_of(scans)
    raw = np.stack([correlations(signal) for signal in signals])
    predictions: dict[str, np.ndarray] = {}
    rate, identified = [], []
    split = StratifiedKFold(5, shuffle=True, random_state=0).split(strata, strata)
    tested = []
    for fold, (training, test) in enumerate(split):
        if fold == folds:
            break
        tested.append(test)
        learned, held_out = scans.select(training), scans.select(test)
        start = time.perf_counter()
        model = fitted(learned)
        print(f"fold {fold}: fitted in {time.perf_counter() - start:.0f} s", flush=True)
        codes = [model.encode(*whole(scans, index)) for index in range(len(scans))]
        config = model.config
        all_levels = config.num_quantizers
        for levels in sorted({max(1, int(share * all_levels)) for share in SHARES}):
            r2, fc = distortion(model, held_out, [codes[index] for index in test], levels)
            rate.append(
                {
                    "fold": fold,
                    "coder": "codec",
                    "bits": bits(config, levels),
                    "r_squared": r2,
                    "fc_correlation": fc,
                }
            )
        coder = TransformCoder(learned)
        for step in (1.0, 1.5, 2.5, 4.0, 6.0, 9.0):
            spent, r2, fc = coder.code(held_out, step)
            rate.append({"fold": fold, "coder": "transform", "bits": spent, "r_squared": r2, "fc_correlation": fc})
        features = {"FC, raw": raw, "tangent, raw": raw_tangent(signals, training)}
        for levels in (all_levels // 8, all_levels // 2, all_levels):
            if levels < all_levels:
                # a prefix of the levels decodes to other covariances: its own mean
                refit(model, learned, levels)
            else:
                fit_summary(model, learned, np.random.default_rng(0))
            rows = [model.scan_features(row[..., :levels])[0] for row in codes]
            features[f"codes, {bits(config, levels):.0f} bits"] = torch.stack(rows).numpy()
        for name, values in features.items():
            found = predictions.setdefault(name, np.full(stacked.shape, np.nan))
            blocks = config.scan_feature_blocks if name.startswith("codes") else None
            ridge = cross_fitted_ridge(values[training], stacked[training], subjects[training], 0, blocks)
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
    # neighbours merged in pairs: the same scans in half as many ROIs
    coordinates = torch.tensor(scans.atlas(0).coordinates, dtype=torch.float32)
    pairs = merged(coordinates)
    agree = []
    for index in range(0, len(scans), 9):
        values, places = whole(scans, index)
        if values.shape[1] != len(coordinates):
            continue
        halved = values[:, pairs].mean(2)
        halved = halved / halved.std(-1, keepdim=True) * values.std()
        both = [
            model.summarize(model.encode(*one))[0] for one in ((values, places), (halved, places[:, pairs].mean(2)))
        ]
        agree.append(float(torch.stack(both).corrcoef()[0, 1]))
    rows.append({"codec": "summaries of a scan in 200 and 100 ROIs, correlation", "r_squared": float(np.mean(agree))})
    write("atlases", [{**row, "fc_correlation": row.get("fc_correlation", "")} for row in rows])

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


@torch.no_grad()
def speed(folder: Path) -> None:
    scans, rows = load(folder), []
    for subjects in (100, 300, len(scans)):
        start = time.perf_counter(), time.process_time()
        model = fitted(scans.select(range(subjects)))
        wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
        rows.append({"what": f"fit, {subjects} scans", "seconds": wall, "cpu_seconds": cpu})
    for rois in (200, 450):
        values, places = torch.randn(1, rois, 160), 60 * torch.randn(1, rois, 3)
        codes = model.encode(values, places)
        for name, call, inputs in (
            ("encode", model.encode, (values, places)),
            ("scan features", model.scan_features, (codes,)),
            ("decode", model.decode, (codes, places)),
        ):
            start = time.perf_counter(), time.process_time()
            for _ in range(20):
                call(*inputs)
            wall, cpu = (time.perf_counter() - start[0]) / 20, (time.process_time() - start[1]) / 20
            rows.append({"what": f"{name}, {rois} ROIs x 160 frames", "seconds": wall, "cpu_seconds": cpu})
    write("speed", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("labels", "states", "speed"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--folds", type=int, default=5)
    args = parser.parse_args()
    if args.what == "labels":
        labels(args.data, args.folds)
    elif args.what == "states":
        states(args.data, args.state)
    else:
        speed(args.data)


if __name__ == "__main__":
    main()
