"""
Next codes of held-out subjects beside simple models, surprise of what is no scan, and the time of forecasts.

    python benchmarks/next_codes.py codes --data FOLDER --work FOLDER      bits a token, by training subjects
    python benchmarks/next_codes.py surprise --data FOLDER --work FOLDER   real scans beside randomised ones; splices

The folders are those of `benchmarks/forecast.py`. "This model" is how frequent codes are and what the dynamics expect;
its language model's state adds nothing before it is trained, so none is needed. The codec is the fold's throughout.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from forecast import BOOTSTRAPS, CONTEXT, OURS, folds_of, run, write
from sklearn.metrics import roc_auc_score

from fmrilm import FmriCodecModel
from fmrilm.modeling_fmrilm import FmriLMDynamics
from fmrilm.training.alignment.dynamics import fit_dynamics, fit_token_gains
from fmrilm.training.codec.fit import present
from fmrilm.training.data.dataset import Scans, cut_windows, encode_items
from fmrilm.training.data.splits import held_out_subjects


PEOPLE = (50, 200, 700)
PSEUDO_COUNTS, BACKOFFS = (0.1, 0.3, 1.0, 3.0), (100.0, 300.0, 1000.0, 3000.0)
RANKS, PENALTIES = (8, 32, 128), (1.0, 3.0, 10.0, 30.0)
# frames of a scan whose surprise is compared, of a spliced part, and splices of a scan
LENGTH, SPLICED, SPLICES = 144, 48, 3
Codes = torch.Tensor


def codes_of(codec: FmriCodecModel, scans: Scans) -> tuple[Codes, np.ndarray]:
    """Codes int64 [windows, patches, tokens, levels], -1 on padding, and the subject of each window."""
    windows = cut_windows(scans, CONTEXT, CONTEXT // 2)
    found = [torch.from_numpy(each).long() for each in encode_items(codec, windows.items()).codes]
    subjects = scans.table["subject"].to_numpy(str)[[window.scan for window in windows]]
    padded = torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=-1)
    # those of patches alone
    padded = padded[..., : codec.config.num_quantizers]
    return padded.unflatten(1, (-1, codec.config.tokens_per_patch)), subjects


def unigram(codes: Codes, pseudo: float, size: int) -> torch.Tensor:
    """Log frequencies [tokens, levels, codes] by place."""
    rows = codes.flatten(0, 1)
    rows = rows[rows[:, 0, 0] >= 0].permute(1, 2, 0)
    counts = torch.full((*rows.shape[:2], size), pseudo).scatter_add_(-1, rows, torch.ones(rows.shape))
    return (counts / counts.sum(-1, keepdim=True)).log()


def bits(logarithms: torch.Tensor, codes: Codes) -> torch.Tensor:
    """Of each window [windows, levels], mean over the tokens after the first patch, of their log probabilities."""
    known = codes[:, 1:, :, :1] >= 0
    return -(logarithms * known).sum((1, 2)) / known.sum((1, 2)) / np.log(2)


def by_frequency(frequencies: torch.Tensor, codes: Codes) -> torch.Tensor:
    place = torch.arange(codes.shape[2])[:, None], torch.arange(codes.shape[3])
    return bits(frequencies[(*place, codes[:, 1:].clamp(min=0))], codes)


def by_expectation(
    frequencies: torch.Tensor, expected: torch.Tensor, books: torch.Tensor, codes: Codes
) -> torch.Tensor:
    """
    Log probabilities like codes after the first patch. expected [windows, patches, tokens, dim]: the product with a
    code's vector is added to its log frequency.
    """
    found = torch.empty(codes[:, 1:].shape)
    for row, (window, vectors) in enumerate(zip(codes[:, 1:], expected[:, 1:], strict=True)):
        logits = frequencies + torch.einsum("ptd,lcd->ptlc", vectors, books)
        found[row] = logits.log_softmax(-1).gather(-1, window.clamp(min=0)[..., None])[..., 0]
    return found


def bigram(train: Codes, test: Codes, frequencies: torch.Tensor, backoff: float, level: bool) -> torch.Tensor:
    """From the code of the same place and level a patch before, or of the same token a level before."""

    def pairs(codes: Codes, place: int, at: int) -> tuple[torch.Tensor, torch.Tensor]:
        before = codes[:, 1:, place, at - 1] if level else codes[:, :-1, place, at]
        return before, codes[:, 1:, place, at]

    found = frequencies[torch.arange(test.shape[2])[:, None], torch.arange(test.shape[3]), test[:, 1:].clamp(min=0)]
    for place in range(test.shape[2]):
        for at in range(int(level), test.shape[3]):
            before, after = (each[pairs(train, place, at)[1] >= 0] for each in pairs(train, place, at))
            chances = backoff * frequencies[place, at].exp().repeat(frequencies.shape[-1], 1)
            chances.index_put_((before, after), torch.ones(len(before)), accumulate=True)
            chances = chances / chances.sum(-1, keepdim=True)
            before, after = (each.clamp(min=0) for each in pairs(test, place, at))
            found[:, :, place, at] = chances[before, after].log()
    return bits(found, test)


class LinearPrior:
    """Expected vectors by reduced-rank ridge regression on the vectors of the patch before, weighed as ours are."""

    def __init__(self, codec: FmriCodecModel, train: Codes, rank: int, penalty: float):
        self.codec = codec
        before, after = self.pairs(train)
        self.variance = after.pow(2).mean(0)
        self.scale = before.pow(2).mean(0).sqrt()
        before = before / self.scale
        gram = before.T @ before + penalty * len(before) * torch.eye(before.shape[1])
        left, sizes, right = torch.linalg.svd(torch.linalg.solve(gram, before.T @ (after / self.variance.sqrt())))
        self.weight = left[:, :rank] * sizes[:rank] @ right[:rank] * self.variance.sqrt()

    def pairs(self, codes: Codes) -> tuple[torch.Tensor, torch.Tensor]:
        vectors, known = self.codec.embed_codes(codes).flatten(2), codes[:, 1:, 0, 0] >= 0
        return vectors[:, :-1][known], vectors[:, 1:][known]

    def error(self, codes: Codes) -> float:
        before, after = self.pairs(codes)
        return float(((after - before / self.scale @ self.weight).pow(2) / self.variance).mean())

    def expected(self, codes: Codes) -> torch.Tensor:
        vectors = self.codec.embed_codes(codes)
        found = vectors.flatten(2)[:, :-1] / self.scale @ self.weight / self.variance
        return torch.nn.functional.pad(found, (0, 0, 1, 0)).view_as(vectors)


def fitted_dynamics(codec: FmriCodecModel, scans: Scans, train: Codes, subjects: np.ndarray) -> FmriLMDynamics:
    """As stage 2 fits them to scans, and to the codes of their windows."""
    dynamics = FmriLMDynamics(codec.config)
    fit_dynamics(dynamics, codec, scans, CONTEXT, seed=0)
    windows = [each[each[:, 0, 0] >= 0].flatten(0, 1).numpy() for each in train]
    fit_token_gains(dynamics, codec, windows, subjects, seed=0)
    return dynamics


@torch.no_grad()
def bits_of(codec: FmriCodecModel, scans: Scans, test: Codes) -> dict[str, torch.Tensor]:
    """Bits [windows, levels] of the test windows by each method, with constants chosen on a fifth of the subjects."""
    train, subjects = codes_of(codec, scans)
    aside = torch.from_numpy(np.isin(subjects, list(held_out_subjects(set(subjects), 0.2))))
    some, others, size, books = train[~aside], train[aside], codec.config.codebook_size, codec.codebooks()

    def least(errors: dict) -> float:
        return min(errors, key=errors.__getitem__)

    pseudo = least({each: by_frequency(unigram(some, each, size), others).sum() for each in PSEUDO_COUNTS})
    part, whole = unigram(some, pseudo, size), unigram(train, pseudo, size)
    found = {"unigram": by_frequency(whole, test)}
    for name, level in (("bigram of patches", False), ("bigram of levels", True)):
        best = least({each: bigram(some, others, part, each, level).sum() for each in BACKOFFS})
        found[name] = bigram(train, test, whole, best, level)
    tried = {(rank, each): LinearPrior(codec, some, rank, each).error(others) for rank in RANKS for each in PENALTIES}
    rank, penalty = min(tried, key=tried.__getitem__)
    prior = LinearPrior(codec, train, rank, penalty)
    found["linear prior"] = bits(by_expectation(whole, prior.expected(test), books, test), test)
    dynamics = fitted_dynamics(codec, scans, train, subjects)
    expected = dynamics.expected_vectors(codec, test.flatten(1, 2)).view(*test.shape[:3], -1) * dynamics.token_gains
    found[OURS] = bits(by_expectation(whole, expected, books, test), test)
    return found


def codes(data: Path, work: Path | None, folds: int) -> None:
    found: dict[tuple, list] = {}
    everyone: list[str] = []
    for codec, training, scans in folds_of(data, work, folds, all_scans=True):
        test, subjects = codes_of(codec, scans)
        everyone += list(subjects)
        order = np.random.default_rng(0).permutation(sorted(set(training.table["subject"])))
        for people in PEOPLE:
            rows = np.flatnonzero(training.table["subject"].isin(order[:people]))
            for name, each in bits_of(codec, training.select(rows), test).items():
                found.setdefault((people, name), []).append(each)
        stacked = {key: torch.cat(each).numpy() for key, each in found.items()}
        write("codes", code_rows(stacked, np.array(everyone)))
        most = {name: each.mean(0) for (people, name), each in stacked.items() if people == max(PEOPLE)}
        levels = [
            {"level": 1 + level} | {name: each[level] for name, each in most.items()}
            for level in range(len(most[OURS]))
        ]
        write("code_levels", levels)


def code_rows(found: dict[tuple, np.ndarray], subjects: np.ndarray) -> list[dict]:
    """Bits a token, and 95 % intervals over subjects of ours minus the best other method's."""
    rng, names = np.random.default_rng(0), np.unique(subjects)
    draws = [rng.integers(len(names), size=len(names)) for _ in range(BOOTSTRAPS)]
    rows = []
    for people in sorted({people for people, _ in found}):
        of = {name: each.sum(1) for (count, name), each in found.items() if count == people}
        best = min((name for name in of if name != OURS), key=lambda name: of[name].mean())
        for name, each in of.items():
            row = {"training_subjects": people, "method": name, "subjects": len(names), "bits_per_token": each.mean()}
            if name == OURS:
                sums = np.array([[(each - of[best])[subjects == one].sum(), (subjects == one).sum()] for one in names])
                low, high = np.quantile([np.divide(*sums[draw].sum(0)) for draw in draws], (0.025, 0.975))
                row |= {"minus_best": (each - of[best]).mean(), "low": low, "high": high}
            rows.append(row)
    return rows


def phase_randomised(signal: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same shift of phase for all ROIs at each frequency: spectra and coherences stay."""
    spectrum = np.fft.rfft(signal, axis=0)
    shift = np.exp(2j * np.pi * rng.random((len(spectrum), 1)))
    shift[[0, -1]] = 1
    return np.fft.irfft(spectrum * shift, n=len(signal), axis=0).astype(np.float32)


CHANGES: dict[str, Callable] = {
    "real": lambda signal, rng: signal,
    "phase-randomised": phase_randomised,
    "time-shuffled": lambda signal, rng: signal[rng.permutation(len(signal))],
    "noise": lambda signal, rng: rng.normal(0, signal.std(0), signal.shape).astype(np.float32),
}


class Fitted:
    """What surprise is read with, fitted to training scans."""

    def __init__(self, codec: FmriCodecModel, training: Scans):
        train, subjects = codes_of(codec, training)
        self.codec, self.dynamics = codec, fitted_dynamics(codec, training, train, subjects)
        self.frequencies = unigram(train, 1.0, codec.config.codebook_size)

    def frames(self, signal: np.ndarray, coordinates: torch.Tensor) -> np.ndarray:
        """Nats a coefficient of each frame [time] of a signal [time, rois]."""
        values = torch.from_numpy(signal.T.copy())[None]
        mask, functions = torch.ones_like(values, dtype=torch.bool), self.codec.spatial_basis(coordinates[None])
        return self.dynamics.frame_surprise(values, mask, functions)[0].numpy()

    def codes(self, signal: np.ndarray, coordinates: torch.Tensor) -> np.ndarray:
        """Bits a token of each patch but the first."""
        codes = self.codec.encode(torch.from_numpy(signal.T.copy())[None], coordinates[None])
        codes = codes[..., : self.codec.config.num_quantizers]
        shape = (-1, len(self.dynamics.token_gains))
        expected = self.dynamics.expected_vectors(self.codec, codes).unflatten(1, shape) * self.dynamics.token_gains
        found = by_expectation(self.frequencies, expected, self.codec.codebooks(), codes.unflatten(1, shape))
        return -found[0].mean(1).sum(-1).numpy() / np.log(2)


@torch.no_grad()
def surprise(data: Path, work: Path | None, folds: int) -> None:
    found: dict[tuple, list] = {}
    splices, rng = [], np.random.default_rng(0)
    for codec, training, scans in folds_of(data, work, folds):
        fitted = Fitted(codec, training)
        signals = [
            (signal[:LENGTH].numpy(), places)
            for signal, places in map(lambda row: present(scans, row), range(len(scans)))
        ]
        signals = [each for each in signals if len(each[0]) == LENGTH]
        for signal, coordinates in signals:
            for change, make in CHANGES.items():
                changed = make(signal, rng)
                found.setdefault((change, "frames"), []).append(fitted.frames(changed, coordinates))
                found.setdefault((change, "codes"), []).append(fitted.codes(changed, coordinates))
            others = [other for other, _ in signals if other is not signal and other.shape == signal.shape]
            for number in rng.permutation(len(others))[:SPLICES]:
                changed, start = spliced(signal, others[number], rng)
                guesses = np.nanargmax(fitted.frames(changed, coordinates)), rng.integers(1, LENGTH)
                ends = np.array([start, start + SPLICED])
                splices.append([np.abs(ends - guess).min() <= 16 for guess in guesses])
        write("surprise", surprise_rows(found, np.array(splices)))


def spliced(signal: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """A signal with SPLICED frames of another subject's, and the first of them."""
    start, source = int(rng.integers(32, LENGTH - SPLICED)), int(rng.integers(LENGTH - SPLICED))
    changed = signal - signal.mean(0)
    changed[start : start + SPLICED] = (other - other.mean(0))[source : source + SPLICED]
    return changed, start


def surprise_rows(found: dict[tuple, list], splices: np.ndarray) -> list[dict]:
    """AUC of the surprise of changed scans against real ones, by scan and by patch; how often splices are found."""
    rows = []
    for (change, what), parts in found.items():
        mean = np.mean([np.nanmean(each) for each in parts])
        row = {"surprise_of": what, "scans": change, "count": len(parts), "mean": mean}
        patch = 16 if what == "frames" else 1
        for name, size in (("auc_scan", len(parts[0])), ("auc_patch", patch)) if change != "real" else ():
            real, changed = (
                np.concatenate([np.nanmean(each.reshape(-1, size), 1) for each in one])
                for one in (found["real", what], parts)
            )
            labels = np.repeat([0, 1], [len(real), len(changed)])
            row[name] = roc_auc_score(labels, np.concatenate([real, changed]))
        rows.append(row)
    splice = {"surprise_of": "frames", "scans": "spliced", "count": len(splices)}
    return [*rows, splice | dict(zip(("found", "by_chance"), splices.mean(0), strict=True))]


@torch.no_grad()
def cost(data: Path, work: Path | None, folds: int) -> None:
    """Seconds of forecasts of 32 s from one scan of CONTEXT frames, by the first fold's codec."""
    codec, _, scans = next(folds_of(data, work, folds))
    dynamics = FmriLMDynamics(codec.config)
    coordinates = present(scans, 0)[1]
    values, rows = torch.randn(1, len(coordinates), CONTEXT), []
    for samples in (None, 50):
        start = time.perf_counter(), time.process_time()
        for _ in range(10):
            inputs = values, torch.ones_like(values, dtype=torch.bool), codec.spatial_basis(coordinates[None]), 16
            dynamics(*inputs, num_samples=samples)
        wall, cpu = (time.perf_counter() - start[0]) / 10, (time.process_time() - start[1]) / 10
        what = "expected signal" if samples is None else f"{samples} sampled signals"
        rows.append({"what": f"{what}, 32 s of one scan", "seconds": wall, "cpu_seconds": cpu})
    write("cost", rows)


if __name__ == "__main__":
    run(__doc__, {"codes": codes, "surprise": surprise, "cost": cost})
