"""
The codec measured on people of the open data whom no training and no fitted statistic saw (the demo's split).

    python benchmarks/codec.py rate         # R-squared and FC correlation by bits, beside principal components
    python benchmarks/codec.py codebook     # how many codes live, and how evenly they are used
    python benchmarks/codec.py transfer     # an atlas that training did not have; ROIs that the encoder did not see
    python benchmarks/codec.py alignment    # do scans find their descriptions; are tokens told from words
    python benchmarks/codec.py speed        # encoding at base size: scans per second, memory, growth

Each writes results/codec_<command>.csv, one arm after the other. An arm is a codec trained for `--steps` updates of
`--batch` mixtures with one of `--seeds`; it is kept in `--models` and not trained again.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer
from codec_arms import (
    FRAMES,
    PATCH,
    STRIDE,
    Budget,
    all_data,
    arm,
    arm_trainer,
    by_person,
    decode_items,
    decoded_by,
    fidelity,
    places_of,
    rate_arm,
    split_scans,
    trained,
)
from codec_baselines import QuantizedPCA, inverse_distance, nearest_neighbour
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from fmrilm import FmriCodecModel
from fmrilm.training.alignment.language_models import PACKAGED_MODEL, load_text_encoder
from fmrilm.training.codec.metrics import codebook_results, retrieval_results
from fmrilm.training.codec.program import CodecData, codec_data
from fmrilm.training.codec.trainer import encode_items, evaluate_items, window_items
from fmrilm.training.data.dataset import Window, cut_windows


RESULTS = Path(__file__).parent / "results"
MODELS = Path("runs/codec-benchmark")
app = typer.Typer(add_completion=False)
Steps = Annotated[int, typer.Option(help="Updates of each arm.")]
Batch = Annotated[int, typer.Option(help="Mixtures of an update.")]
Seeds = Annotated[int, typer.Option(help="Seeds 0 to n - 1 of each arm.")]
Results = Annotated[Path, typer.Option(help="Folder of the CSV files.")]
Models = Annotated[Path, typer.Option(help="Folder of trained arms.")]


def write(name: str, rows: list[dict], results: Path) -> None:
    table = pd.DataFrame(rows)
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"codec_{name}.csv"
    table.to_csv(path.with_suffix(".partial"), index=False, float_format="%.4f")
    path.with_suffix(".partial").replace(path)
    print(table.tail(1).to_string(index=False, float_format="%.3f"), flush=True)


# method, tokens of a step (the roi layout has one for each of the 94 ROIs), bits of a token, frames of a step
RATES = (
    ("latent-vq", 8, 9, 16),
    ("latent-fsq", 8, 9, 16),
    ("roi-vq", 94, 8, 160),
    ("latent-vq", 16, 9, 16),
    ("roi-vq", 94, 8, 80),
    ("latent-fsq", 16, 9, 16),
    ("latent-vq", 4, 9, 16),
    ("roi-vq", 94, 4, 160),
    ("latent-fsq", 4, 9, 16),
)


@app.command()
def rate(
    steps: Steps = 150, batch: Batch = 8, seeds: Seeds = 1, results: Results = RESULTS, models: Models = MODELS
) -> None:
    """On AAL2, the one atlas that several held-out people have; PCA is fitted on the training people of AAL2."""
    data, budget = all_data(), Budget(steps, batch, models)
    people = by_person([scan for scan in data.held_out if scan.atlas.name == "aal2-94"])
    pca = QuantizedPCA([scan.signal for scan in data.training if scan.atlas.name == "aal2-94"], PATCH)
    rows = []
    for bits in sorted({int(tokens * bits * PATCH / patch) for _, tokens, bits, patch in RATES}):
        found = fidelity(people, lambda windows, bits=bits: [pca.reconstruct(w.signal, bits) for w in windows])
        rows.append({"method": "pca", "bits_per_window": bits * FRAMES // PATCH, **found})
        write("rate", rows, results)
    for seed, (method, tokens, bits, patch) in _arms(seeds, RATES):
        model = rate_arm(budget, data, seed, method, tokens, bits, patch)
        found = fidelity(people, partial(decoded_by, model))
        spent = {"tokens_per_step": tokens, "bits_per_token": bits, "frames_per_step": patch, "seed": seed}
        rows.append(
            {
                "method": method,
                "bits_per_window": tokens * bits * FRAMES // patch,
                **found,
                **spent,
                "steps": steps,
                "batch": batch,
            }
        )
        write("rate", rows, results)


def _arms(seeds: int, arms: Iterable) -> tqdm:
    """Each arm with its first seed, then each with the next."""
    return tqdm([(seed, each) for seed in range(seeds) for each in arms], desc="arms", unit="arm")


@app.command()
def codebook(
    steps: Steps = 150, batch: Batch = 8, seeds: Seeds = 1, results: Results = RESULTS, models: Models = MODELS
) -> None:
    """Codes of the latent layout (8 a step) in windows 8 frames apart, of training and of held-out people."""
    data, budget = all_data(), Budget(steps, batch, models)
    windows = {
        name: window_items(cut_windows(scans, FRAMES, PATCH // 2))
        for name, scans in (("training", data.training), ("held-out", data.held_out))
    }
    rows = []
    for seed, bits in _arms(seeds, (9, 13)):
        model = rate_arm(budget, data, seed, "latent-vq", 8, bits, PATCH)
        for people, items in windows.items():
            used = codebook_results(encode_items(model, items), 2**bits)
            rows.append(
                {
                    "codebook_size": 2**bits,
                    "people": people,
                    "tokens": len(items) * used["numbers_per_window"],
                    "used": used["codebook_used"] / 2**bits,
                    "perplexity": used["perplexity"],
                    "perplexity_share": used["perplexity"] / 2**bits,
                    "seed": seed,
                    "steps": steps,
                    "batch": batch,
                }
            )
            write("codebook", rows, results)


@app.command()
def transfer(
    steps: Steps = 150, batch: Batch = 8, seeds: Seeds = 1, results: Results = RESULTS, models: Models = MODELS
) -> None:
    """An atlas that training did not have, with its coordinates and with them shuffled; then ROIs not encoded."""
    training, held_out = split_scans()
    budget, everyone = Budget(steps, batch, models), codec_data(training, held_out, FRAMES, STRIDE)
    # LEMON's one subject is in the demo's training split: it is new to the codec that did not have its atlas
    tested = {
        "schaefer-100-7networks": held_out,
        "aal2-94": held_out,
        "schaefer-400-7networks": training,
    }
    rows = []
    for seed, atlas in _arms(seeds, tested):
        people = by_person([scan for scan in tested[atlas] if scan.atlas.name == atlas])
        others = codec_data([scan for scan in training if scan.atlas.name != atlas], held_out, FRAMES, STRIDE)
        codecs = {"the two others": arm(budget, others, seed, f"without-{atlas}", descriptor_weight=0.0)}
        if tested[atlas] is held_out:
            codecs["all three"] = rate_arm(budget, everyone, seed, *RATES[0])
        for trained_on, model in codecs.items():
            for coordinates, decoded in (("own", decoded_by), ("shuffled", decoded_from_wrong_places)):
                found = fidelity(people, partial(decoded, model))
                rows.append(
                    {
                        "tested_on": atlas,
                        "trained_on": trained_on,
                        "coordinates": coordinates,
                        **found,
                        "seed": seed,
                        "steps": steps,
                        "batch": batch,
                    }
                )
                write("transfer", rows, results)
    completion(everyone, budget, seeds, results)


def decoded_from_wrong_places(model: FmriCodecModel, windows: list[Window]) -> list[np.ndarray]:
    """Encoded at shuffled coordinates and decoded at the ROIs' own."""
    places = places_of(windows)
    shuffled = np.random.default_rng(0).permutation(places)
    items = [{**item, "coordinates": shuffled} for item in window_items(windows)]
    return decode_items(model, items, places)


def completed(windows: list[Window], predict: Callable, folds: int = 5) -> list[np.ndarray]:
    """Each fifth of the ROIs by `predict(signals, places known, places wanted)` from the other four."""
    coordinates = places_of(windows)
    order = np.random.default_rng(0).permutation(len(coordinates))
    guesses = np.zeros((len(windows), FRAMES, len(coordinates)), np.float32)
    for fold in range(folds):
        wanted = order[fold::folds]
        known = np.setdiff1d(order, wanted)
        signals = np.stack([window.signal[:, known] for window in windows])
        guesses[..., wanted] = predict(signals, coordinates[known], coordinates[wanted])
    return list(guesses)


def decoded_elsewhere(
    model: FmriCodecModel, signals: np.ndarray, known: np.ndarray, wanted: np.ndarray
) -> list[np.ndarray]:
    nothing = np.zeros(0, np.float32)
    items = [{"signal": signal, "coordinates": known, "descriptors": nothing} for signal in signals]
    return decode_items(model, items, wanted)


def completion(data: CodecData, budget: Budget, seeds: int, results: Path) -> None:
    """Signals of ROIs that were not encoded, decoded at their places, beside interpolation of the inputs' signals."""
    people, trained_on = by_person(data.held_out), by_person(data.training)
    powers = {power: partial(inverse_distance, power=power) for power in (1, 2, 3, 4)}
    # the best power is that of the training people
    best = max(powers, key=lambda power: fidelity(trained_on, partial(completed, predict=powers[power]))["r_squared"])
    interpolations = {"nearest neighbour": nearest_neighbour, f"inverse distance, power {best}": powers[best]}
    rows = [
        {"method": name, **fidelity(people, partial(completed, predict=predict))}
        for name, predict in interpolations.items()
    ]
    write("completion", rows, results)
    for seed, tokens in _arms(seeds, (8, 16)):
        model = rate_arm(budget, data, seed, "latent-vq", tokens, 9, PATCH)
        found = fidelity(people, partial(completed, predict=partial(decoded_elsewhere, model)))
        rows.append(
            {
                "method": f"latent-vq, {tokens} tokens a step",
                **found,
                "bits_per_window": tokens * 9 * FRAMES // PATCH,
                "seed": seed,
                "steps": budget.steps,
                "batch": budget.batch,
            }
        )
        write("completion", rows, results)


ALIGNMENTS = {
    "neither": (0.0, 0.0),
    "descriptions": (0.3, 0.0),
    "words": (0.0, 0.1),
    "descriptions and words": (0.3, 0.1),
}


@app.command()
def alignment(
    steps: Steps = 150, batch: Batch = 8, seeds: Seeds = 1, results: Results = RESULTS, models: Models = MODELS
) -> None:
    """
    Retrieval of held-out scans' descriptions, by the heads that were trained and by a fresh linear map of the codes
    fitted on training mixtures; a fresh classifier that tells projected codes from word embeddings.
    """
    data, budget = all_data(), Budget(steps, batch, models)
    words = load_text_encoder(PACKAGED_MODEL)[0].get_input_embeddings().weight.detach().numpy()
    windows = [window_items(cut_windows(scans, FRAMES, STRIDE)) for scans in (data.training, data.held_out)]
    rows = []
    for seed, losses in _arms(seeds, ALIGNMENTS):
        weights = dict(zip(("alignment_weight", "domain_weight"), ALIGNMENTS[losses], strict=True))
        name = f"aligned-with-{losses.replace(' ', '-')}"
        trainer = arm_trainer(budget, data, seed, name, language_model=PACKAGED_MODEL, **weights)
        described = [trainer.train_dataset[index] for index in range(len(trainer.train_dataset.embeddings))]
        told_apart = {"before": tell_apart(trainer.model, windows, words)}
        model = trained(trainer)
        told_apart["after"] = tell_apart(model, windows, words)
        own = evaluate_items(model, trainer.eval_dataset)
        fresh = fresh_retrieval(model, described, trainer.eval_dataset)
        row = {"losses": losses, "seed": seed, "steps": steps, "batch": batch}
        for heads, found in (("own", own), ("fresh", fresh)):
            row |= {f"{name}_{heads}": found[name] for name in ("recall_at_1", "recall_at_5", "median_rank")}
        row |= {name: value for name, value in fresh.items() if name.startswith(("chance", "retrieval"))}
        for when, accuracies in told_apart.items():
            row |= {f"{probe}_probe_{when}": accuracy for probe, accuracy in accuracies.items()}
        rows.append({**row, "r_squared": own["r_squared"], "fc_correlation": own["fc_correlation"]})
        write("alignment", rows, results)


def _code_vectors(model: FmriCodecModel, items: list[dict]) -> torch.Tensor:
    """Codebook vectors [items, steps, slots, codebook_dim] of items of one length."""
    codes = torch.from_numpy(encode_items(model, items))
    return model.embed_codes(codes).unflatten(1, (-1, model.config.tokens_per_step))


@torch.no_grad()
def fresh_retrieval(model: FmriCodecModel, described: list[dict], held_out: list[dict]) -> dict[str, float]:
    """Retrieval by a ridge regression of text embeddings on codes, fitted on described training mixtures."""
    scans, texts = [], []
    for items in (described, held_out):
        codes = torch.from_numpy(encode_items(model, items))
        scans.append(model.pool(model.embed_codes(codes), codes >= 0).numpy())
        texts.append(np.stack([item["text_embedding"] for item in items]))
    scaled = StandardScaler().fit(texts[0])
    texts = [scaled.transform(part) for part in texts]
    guesses = RidgeCV(np.logspace(-3, 1, 9)).fit(scans[0], texts[0]).predict(scans[1])
    guesses, targets = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (guesses, texts[1]))
    return retrieval_results(guesses, targets)


@torch.no_grad()
def tell_apart(model: FmriCodecModel, windows: Sequence[list[dict]], words: np.ndarray) -> dict[str, float]:
    """
    Accuracy (chance 0.5) of classifiers fitted on projected tokens of training windows and as many words, on the
    tokens of held-out windows and as many other words.
    """
    tokens = [model.alignment.token_projection(_code_vectors(model, items).flatten(0, 2)).numpy() for items in windows]
    order = np.random.default_rng(0).permutation(len(words))
    counts = [len(part) for part in tokens]
    chosen = words[order[: counts[0]]], words[order[counts[0] : sum(counts)]]
    train, test = (np.concatenate(pair) for pair in zip(tokens, chosen, strict=True))
    labels = [np.repeat([0, 1], count) for count in counts]
    probes = {"linear": LogisticRegression(max_iter=500), "mlp": MLPClassifier((256,), random_state=0, max_iter=50)}
    return {
        name: float(make_pipeline(StandardScaler(), probe).fit(train, labels[0]).score(test, labels[1]))
        for name, probe in probes.items()
    }


@app.command()
def speed(
    repetitions: int = 5,
    quick: Annotated[bool, typer.Option(help="A small codec: shows that it runs, measures nothing.")] = False,
    results: Results = RESULTS,
) -> None:
    """Encoding at base size, float32, without gradients, each kind and size in a process of its own."""
    from codec_speed import measurements

    rows = []
    for row in measurements(repetitions, quick):
        rows.append(row)
        write("speed", rows, results)


if __name__ == "__main__":
    app()
