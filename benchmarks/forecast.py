"""
How well the model foresees scans of held-out subjects, beside simple models. No scan leaves its folder.

    python benchmarks/forecast.py signal --data FOLDER --work FOLDER     R2 by lead, prediction intervals
    python benchmarks/forecast.py others --data FOLDER                   of each site and atlas of other data

The data folder is one that `fmrilm prepare` wrote; of one atlas, unless `others` splits it. The work folder holds
what `benchmarks/people.py release` made of it: fold*/splits.csv and fold*/codec/model. In `others`, codecs are fitted
by the release recipe in folds over subjects, and rows of sites and atlases that are not in the folder stay. Scored are
scans that were measured at the codec's repetition time, if there are any: interpolated frames hold a part of what
follows. All methods are fitted on such scans of training subjects, and see the same contexts of at most 160 frames,
from which their mean is removed, at every 16th frame from the 80th on. Results: `benchmarks/results/forecast_*.csv`.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from scipy.stats import norm
from sklearn.model_selection import GroupKFold

from fmrilm import FmriCodecConfig, FmriCodecModel, FmriLMFeatureExtractor
from fmrilm.modeling_fmrilm import FmriLMDynamics
from fmrilm.training.alignment.dynamics import contexts, fit_dynamics
from fmrilm.training.codec.fit import fit_codec, present
from fmrilm.training.data.dataset import Scans, load_scans
from fmrilm.training.data.shards import write_whole
from fmrilm.training.data.splits import held_out_subjects
from fmrilm.training.program import ScanArguments, read_scans


RESULTS = Path(__file__).parent / "results"
RECIPE = Path(__file__).parents[1] / "training" / "configs" / "release" / "codec.yaml"
PATCH = 16
CONTEXT, LEADS, BOOTSTRAPS, SAMPLES = 160, 16, 1000, 200
# in frames of 2 s
SHOWN = (1, 2, 3, 4, 8, 16)
ORDERS, VAR_ORDERS, COMPONENTS = (1, 2, 4, 8, 16), (1, 2, 4), 64
# shares of the mean variance
PENALTIES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
OURS = "this model"


def write(name: str, rows: list[dict]) -> None:
    table = pd.DataFrame(rows)
    write_whole(RESULTS / f"forecast_{name}.csv", table.to_csv(index=False, float_format="%.4f"))
    print(table.to_string(index=False, float_format="%.4f"), flush=True)


def folds_of(data: Path, work: Path | None, folds: int, all_scans: bool = False) -> Any:
    """Of each fold, the codec, training scans and test scans; those that were `measured`, or all."""
    found = [] if work is None else sorted(work.glob("fold*/splits.csv"))[:folds]
    if not found:
        raise ValueError(f"expected --work with fold*/splits.csv, got {work}: run benchmarks/people.py release")
    for path in found:
        folder = path.parent / "codec" / "model"
        codec, extractor = (
            FmriCodecModel.from_pretrained(folder).eval(),
            FmriLMFeatureExtractor.from_pretrained(folder),
        )
        args = ScanArguments(data=[str(data)], splits=str(path))
        parts = read_scans(args, extractor)
        yield codec, *(part if all_scans else measured(part, codec.config.repetition_time) for part in parts)


def measured(scans: Scans, repetition_time: float) -> Scans:
    rows = np.flatnonzero(scans.table["tr"].to_numpy(float) == repetition_time)
    return scans.select(rows) if len(rows) else scans


def fitted(scans: Scans, patch: int = PATCH, scan_levels: bool = False) -> FmriCodecModel:
    """By the recipe, with patches of so many frames and as many tokens a second; codes of whole scans if asked."""
    torch.manual_seed(0)
    known = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    names = ("tokens_per_patch", "num_quantizers", "codebook_size", "codebook_dim", "codebook_groups")
    values = {name: known[name] for name in names}
    values["tokens_per_patch"] = known["tokens_per_patch"] * patch // known["patch_length"]
    if scan_levels:
        values["num_scan_levels"] = known["num_scan_levels"]
        values["num_scan_rois"] = len(scans.atlases[scans.main_atlas].rois)
    model = FmriCodecModel(FmriCodecConfig(patch_length=patch, **values)).eval()
    fit_codec(model, scans, seed=0)
    return model


class Windows:
    """
    Of scans, contexts [n, rois, CONTEXT] without their mean, zero where there is nothing, their lengths [n], futures
    [n, rois, LEADS], and the scan and the subject of each [n].
    """

    def __init__(self, scans: Scans, every: int = 1):
        parts, self.scan = [], []
        for row in range(len(scans)):
            found = contexts(torch.from_numpy(np.nan_to_num(scans.signal(row))), CONTEXT, LEADS)
            if found is not None:
                parts.append([each[::every] for each in found])
                self.scan += [row] * len(parts[-1][0])
        values, lengths, future = (torch.cat(each) for each in zip(*parts, strict=True))
        self.values, self.lengths, self.future = values.numpy(), lengths.numpy(), future.numpy()
        self.scan = np.array(self.scan)
        self.subject = scans.table["subject"].to_numpy(str)[self.scan]

    def last(self, order: int) -> np.ndarray:
        """[n, rois, order], the latest frame first."""
        return self.values[..., : -order - 1 : -1]


class SharedAutoregression:
    """The signal at each lead from a ROI's own last frames, by weights [leads, order] that all ROIs share."""

    def __init__(self, order: int):
        self.order = order

    def fit(self, windows: Windows) -> None:
        inputs = windows.last(self.order).reshape(-1, self.order).astype(np.float64)
        self.weights = np.linalg.solve(inputs.T @ inputs, inputs.T @ windows.future.reshape(-1, LEADS)).T

    def predict(self, windows: Windows) -> np.ndarray:
        return windows.last(self.order) @ self.weights.T.astype(np.float32)


class ScanAutoregression:
    """The same by Yule-Walker weights from the autocorrelation of the context itself, over its ROIs."""

    def __init__(self, order: int):
        self.order = order

    def fit(self, windows: Windows) -> None:
        pass

    def predict(self, windows: Windows) -> np.ndarray:
        found = []
        for values, last in zip(windows.values, windows.last(self.order), strict=True):
            lags = [(values[:, lag:] * values[:, : CONTEXT - lag]).sum() for lag in range(self.order + LEADS)]
            lags = np.array(lags) / lags[0]
            places = np.arange(self.order)
            ahead = lags[places[:, None] + np.arange(1, LEADS + 1)]
            found.append(last @ np.linalg.solve(lags[np.abs(places[:, None] - places)], ahead))
        return np.array(found, np.float32)


class VectorAutoregression:
    """All ROIs at each lead by ridge regression on the last frames of principal components of training frames."""

    def __init__(self, order: int):
        self.order = order

    def inputs(self, windows: Windows) -> np.ndarray:
        return np.concatenate(list((self.components @ windows.last(self.order)).transpose(2, 0, 1)), 1)

    def fit(self, windows: Windows) -> None:
        frames = windows.last(LEADS).transpose(0, 2, 1).reshape(-1, windows.values.shape[1]).astype(np.float64)
        self.components = np.linalg.eigh(frames.T @ frames)[1].T[: -COMPONENTS - 1 : -1].astype(np.float32)
        inputs = self.inputs(windows).astype(np.float64)
        self.shape = windows.future.shape[1:]
        gram, right = inputs.T @ inputs, inputs.T @ windows.future.reshape(len(inputs), -1)
        ridge = np.trace(gram) / len(gram) * np.eye(len(gram))
        self.weights = [np.linalg.solve(gram + share * ridge, right).astype(np.float32) for share in PENALTIES]

    def predict(self, windows: Windows, penalty: int) -> np.ndarray:
        return (self.inputs(windows) @ self.weights[penalty]).reshape(-1, *self.shape)


def candidates(method: str) -> list[tuple]:
    if method == "ridge VAR":
        return [(order, penalty) for order in VAR_ORDERS for penalty in range(len(PENALTIES))]
    return [(order,) for order in ORDERS]


BASELINES: dict[str, Any] = {
    "AR, shared by ROIs": SharedAutoregression,
    "AR of the scan": ScanAutoregression,
    "ridge VAR": VectorAutoregression,
}


def variances(windows: Windows) -> np.ndarray:
    """Of each ROI over the context [n, rois, 1]; not zero."""
    return ((windows.values**2).sum(-1) / windows.lengths[:, None]).clip(min=1e-2)[..., None]


def baseline_forecasts(training: Scans, test: Windows) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """
    Forecasts and the standard deviations of their errors [n, rois, LEADS]. Orders and penalties are chosen for each
    lead on a fifth of the training subjects, and the errors, in variances of the ROI, are those on them.
    """
    subjects = training.table["subject"]
    validation = subjects.isin(held_out_subjects(subjects, 0.2)).to_numpy()
    some, others = (Windows(training.select(np.flatnonzero(part))) for part in (~validation, validation))
    zero, last = np.zeros_like(test.future), np.repeat(test.values[..., -1:], LEADS, -1)
    found, ratios = {"mean": zero, "persistence": last}, {}
    for name, kind in BASELINES.items():
        models, missed = {order: kind(order) for order in {each[0] for each in candidates(name)}}, []
        for model in models.values():
            model.fit(some)
        for order, *rest in candidates(name):
            missed.append((others.future - models[order].predict(others, *rest)) ** 2)
        best = np.argmin([each.sum((0, 1)) for each in missed], 0)
        ratios[name] = [(missed[choice] / variances(others)).mean((0, 1))[lead] for lead, choice in enumerate(best)]
        every = Windows(training)
        for model in models.values():
            model.fit(every)
        found[name] = np.empty_like(test.future)
        for choice in np.unique(best):
            order, *rest = candidates(name)[choice]
            found[name][..., best == choice] = models[order].predict(test, *rest)[..., best == choice]
    ratios["mean"] = (others.future**2 / variances(others)).mean((0, 1))
    ratios["persistence"] = ((others.future - others.values[..., -1:]) ** 2 / variances(others)).mean((0, 1))
    return {name: (each, np.sqrt(variances(test) * ratios[name])) for name, each in found.items()}


@torch.no_grad()
def sampled(
    dynamics: FmriLMDynamics, codec: FmriCodecModel, scans: Scans, test: Windows, count: int = SAMPLES
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Our forecasts, their CRPS by samples, and whether the truth is in the 80 % interval, [n, rois, LEADS]."""
    forecast, crps, inside = (np.zeros_like(test.future) for _ in range(3))
    generator = torch.Generator().manual_seed(0)
    for scan in np.unique(test.scan):
        rows, there = np.flatnonzero(test.scan == scan), ~np.isnan(scans.signal(scan)).any(0)
        values, truth = (torch.from_numpy(each[rows][:, there]) for each in (test.values, test.future))
        mask = torch.arange(CONTEXT) >= CONTEXT - torch.from_numpy(test.lengths[rows])[:, None]
        functions = codec.spatial_basis(present(scans, scan)[1]).expand(len(rows), -1, -1)
        inputs = values, mask[:, None].expand_as(values), functions, LEADS
        samples = dynamics(*inputs, num_samples=count, generator=generator).sort(1).values
        rank = (2 * torch.arange(1, count + 1) - count - 1)[:, None, None] / (count * (count - 1))
        own = (samples - truth[:, None]).abs().mean(1) - (rank * samples).sum(1)
        low, high = samples.quantile(torch.tensor([0.1, 0.9]), dim=1)
        place = np.ix_(rows, there)
        forecast[place], crps[place] = dynamics(*inputs)[:, 0].numpy(), own.numpy()
        inside[place] = ((low <= truth) & (truth <= high)).numpy()
    return forecast, crps, inside


def normal_scores(forecast: np.ndarray, deviation: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """CRPS of normal forecasts, and whether the truth is in their 80 % interval."""
    z = (truth - forecast) / deviation
    crps = deviation * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - np.pi**-0.5)
    return crps, np.abs(z) < norm.ppf(0.9)


def sums(forecast: np.ndarray, crps: np.ndarray, inside: np.ndarray, test: Windows) -> np.ndarray:
    """Of each subject at SHOWN leads [subjects, leads, 7]: what `figures` makes figures of."""
    there, leads = (test.values != 0).any(-1, keepdims=True), np.array(SHOWN) - 1
    truth, guess = (each[..., leads] * there for each in (test.future, forecast))
    parts = [(truth - guess) ** 2, truth**2, guess**2, truth * guess]
    parts += [each[..., leads] * there for each in (crps, inside)] + [np.broadcast_to(there, truth.shape)]
    rows = np.stack([part.sum(1, dtype=np.float64) for part in parts], -1)
    return np.stack([rows[test.subject == subject].sum(0) for subject in np.unique(test.subject)])


def figures(total: np.ndarray) -> np.ndarray:
    """R2, correlation, CRPS and coverage of [leads, 7]; signals and forecasts have a mean of about zero."""
    missed, truth, guess, product, crps, inside, count = total.T
    correlation = product / np.sqrt(truth * guess).clip(min=1e-12)
    return np.stack([1 - missed / truth, correlation, crps / count, inside / count])


def compared(codec: FmriCodecModel, training: Scans, scans: Scans) -> dict[str, np.ndarray]:
    """`sums` of the test scans by each method."""
    test, dynamics = Windows(scans, every=2), FmriLMDynamics(codec.config)
    start = time.perf_counter()
    fit_dynamics(dynamics, codec, training, CONTEXT, seed=0)
    print(f"{len(training)} scans fitted in {time.perf_counter() - start:.0f} s", flush=True)
    found = {OURS: sums(*sampled(dynamics, codec, scans, test), test)}
    for name, (forecast, deviation) in baseline_forecasts(training, test).items():
        found[name] = sums(forecast, *normal_scores(forecast, deviation, test.future), test)
    return found


def signal(data: Path, work: Path | None, folds: int) -> None:
    found: dict[str, list] = {}
    for fold in folds_of(data, work, folds):
        for name, part in compared(*fold).items():
            found.setdefault(name, []).append(part)
        write("signal", signal_rows({name: np.concatenate(parts) for name, parts in found.items()}))


def others(data: Path, work: Path | None, folds: int) -> None:
    """Of each site and atlas with enough subjects."""
    scans, path = load_scans(data, FmriLMFeatureExtractor()), RESULTS / "forecast_others.csv"
    sites = scans.table["site"].fillna("") if "site" in scans.table else pd.Series("", range(len(scans)))
    names = pd.Series([f"{site}, {scans.atlas(row).name}".removeprefix(", ") for row, site in enumerate(sites)])
    for name, rows in names.groupby(names).indices.items():
        some = scans.select(rows)
        subjects = some.table["subject"]
        if subjects.nunique() < folds:
            continue
        found: dict[str, list] = {}
        for parts in GroupKFold(folds).split(rows, groups=subjects):
            training, test = (measured(some.select(part), FmriCodecConfig().repetition_time) for part in parts)
            for method, part in compared(fitted(training), training, test).items():
                found.setdefault(method, []).append(part)
        new = signal_rows({method: np.concatenate(parts) for method, parts in found.items()})
        known = pd.read_csv(path).to_dict("records") if path.exists() else []
        write("others", [*(row for row in known if row["data"] != name), *({"data": name, **row} for row in new)])


def signal_rows(found: dict[str, np.ndarray]) -> list[dict]:
    """
    Of sums by subject [subjects, leads, 7]: figures of all, and 95 % intervals over subjects of ours minus the best
    baseline's (that of the largest R2, and of the smallest CRPS).
    """
    rng, pooled = np.random.default_rng(0), {name: figures(each.sum(0)) for name, each in found.items()}
    subjects = len(found[OURS])
    draws = [rng.integers(subjects, size=subjects) for _ in range(BOOTSTRAPS)]
    resampled = {name: np.stack([figures(each[draw].sum(0)) for draw in draws]) for name, each in found.items()}
    others, rows = [name for name in found if name != OURS], []
    for place, lead in enumerate(SHOWN):
        for name in (OURS, *others):
            r_squared, correlation, crps, coverage = pooled[name][:, place]
            row = {"seconds": 2 * lead, "method": name, "subjects": subjects, "r_squared": r_squared}
            row |= {"correlation": correlation, "crps": crps, "coverage": coverage}
            for figure, what, sign in ((0, "r_squared", 1), (2, "crps", -1)) if name == OURS else ():
                best = max(others, key=lambda other: sign * pooled[other][figure, place])
                differences = resampled[OURS][:, figure, place] - resampled[best][:, figure, place]
                low, high = np.quantile(differences, (0.025, 0.975))
                difference = pooled[OURS][figure, place] - pooled[best][figure, place]
                row |= {f"{what}_minus_best": difference, f"{what}_low": low, f"{what}_high": high}
            rows.append(row)
    return rows


def run(description: str, parts: dict[str, Callable[[Path, Path | None, int], None]]) -> None:
    """The part that the command line names, of the folders and so many folds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(parts))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--folds", type=int, default=5)
    args = parser.parse_args()
    parts[args.what](args.data, args.work, args.folds)


if __name__ == "__main__":
    run(__doc__, {"signal": signal, "others": others})
