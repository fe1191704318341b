"""
What training adds to the fitted codec: reconstruction alone, with the contrastive loss on descriptions, with the
domain-adversarial loss, and with both. No scan leaves its folder.

    python benchmarks/codec_losses.py --data FOLDER --work FOLDER [--folds 3]

The folders are those of `benchmarks/forecast.py`. Each arm goes on from the fold's fitted codec for as many updates on
the same mixtures of training scans. Of windows of held-out subjects: R-squared and FC correlation of what is decoded;
how many find their own description among all, by the contrastive heads and by ridge regression of the descriptions'
embeddings on scan features; labels by ridge regression on scan features; and how well a new linear classifier tells
projected latent tokens from words. Results: `benchmarks/results/codec_losses.csv`.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from codec import RECIPE, score, targets_of, whole, write
from forecast import folds_of
from sklearn.linear_model import LogisticRegression
from trl import TrlParser

from fmrilm import FmriCodecModel
from fmrilm.processors.descriptors.cohort import Cohort
from fmrilm.training.alignment.language_models import PACKAGED_MODEL, load_text_encoder
from fmrilm.training.codec.fit import fit_summary
from fmrilm.training.codec.metrics import evaluate_codec, retrieval_results
from fmrilm.training.codec.program import CodecArguments, build_trainer, codec_config, describe
from fmrilm.training.codec.text_embeddings import TextEmbeddings
from fmrilm.training.codec.trainer import CodecTrainingArguments
from fmrilm.training.data.dataset import Scans, cut_windows, encode_windows
from fmrilm.training.program import fit_cohort
from fmrilm.training.ridge import cross_fitted_ridge


# weights of the contrastive and of the domain loss
ARMS = {
    "reconstruction": (0.0, 0.0),
    "and contrastive": (1.0, 0.0),
    "and domain": (0.0, 0.5),
    "and both": (1.0, 0.5),
}
UPDATES, BATCH, RATE, DESCRIBED, PROBED = 120, 20, 1e-3, 300, 4000


def trained(
    start: FmriCodecModel, scans: Scans, cohort: Cohort, texts: TextEmbeddings, weights: tuple[float, float], seed: int
) -> FmriCodecModel:
    """The fitted codec after `UPDATES` updates; without weights, as it was, with heads as they begin."""
    parser = TrlParser((CodecArguments, CodecTrainingArguments))  # pyright: ignore[reportArgumentType]
    options = {
        "config": RECIPE,
        "described_mixtures": DESCRIBED,
        "alignment_weight": weights[0],
        "domain_weight": weights[1],
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "max_steps": UPDATES,
        "save_strategy": "no",
        "seed": seed,
    }
    args, training_args = parser.parse_args_and_config(
        [word for k, v in options.items() for word in (f"--{k}", str(v))]
    )
    torch.manual_seed(seed)
    model = FmriCodecModel(codec_config(args, texts.word_embeddings.shape[1]))
    model.load_state_dict(start.state_dict(), strict=False)
    build_trainer(model, scans, cohort, [], args, training_args, texts).train()
    fit_summary(model.eval(), scans, np.random.default_rng(seed))
    return model


@torch.no_grad()
def measured(
    model: FmriCodecModel,
    training: Scans,
    test: Scans,
    cohort: Cohort,
    texts: TextEmbeddings,
    length: int,
    cache: Path,
) -> dict[str, float]:
    blocks = model.config.scan_feature_blocks
    features, embeddings, subjects = [], [], []
    for scans in (training, test):
        windows = cut_windows(scans, length, 10**6)
        sentences = [describe(cohort, row, 8) for row in cohort.z_scores(windows.descriptors())]
        if scans is training:
            chosen = np.random.default_rng(0).permutation(len(windows))[:DESCRIBED]
        else:
            chosen = np.arange(len(windows))
            items = [
                {**item, "text_embedding": row} for item, row in zip(windows.items(), texts(sentences), strict=True)
            ]
        features.append(encode_windows(model, windows, cache).features[chosen])
        embeddings.append(texts([sentences[row] for row in chosen]))
        subjects.append(scans.table["subject"].to_numpy(str)[[windows[int(row)].scan for row in chosen]])
    found = evaluate_codec(model, items)
    mean, std = embeddings[0].mean(0), embeddings[0].std(0).clip(1e-6)
    ridge = cross_fitted_ridge(features[0], (embeddings[0] - mean) / std, subjects[0], 0, blocks)
    pairs = ridge.predict(features[1]), (embeddings[1] - mean) / std
    units = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in pairs]
    by_ridge = retrieval_results(*units)
    row = {
        "r_squared": found["r_squared"],
        "fc_correlation": found["fc_correlation"],
        "texts": found["retrieval_texts"],
        "recall_at_5_heads": found["recall_at_5"],
        "recall_at_5_ridge": by_ridge["recall_at_5"],
        "recall_at_5_chance": by_ridge["chance_recall_at_5"],
    }
    inputs = [
        torch.cat([model.scan_features(model.encode(*whole(scans, index))) for index in range(len(scans))]).numpy()
        for scans in (training, test)
    ]
    targets, truths = (np.stack(list(targets_of(scans).values()), 1) for scans in (training, test))
    names = training.table["subject"].to_numpy(str)
    predicted = cross_fitted_ridge(inputs[0], targets, names, 0, blocks).predict(inputs[1])
    for column, name in enumerate(targets_of(test)):
        row[name] = score(name, truths[:, column], predicted[:, column])
    return {**row, "told_from_words": told_from_words(model, training, test, texts.word_embeddings)}


def told_from_words(model: FmriCodecModel, training: Scans, test: Scans, words: torch.Tensor) -> float:
    """Balanced accuracy of a linear classifier of projected latent tokens and words, on other subjects and words."""
    if model.alignment_head is None:
        raise ValueError("expected a codec with text_hidden_size, got one without")
    words = words[torch.randperm(len(words), generator=torch.Generator().manual_seed(0))].float()
    parts = []
    for scans, own in ((training, words[:PROBED]), (test, words[-PROBED:])):
        vectors = torch.cat([model.embed_codes(model.encode(*whole(scans, row)))[0] for row in range(len(scans))])
        vectors = vectors[torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:PROBED]]
        inputs = torch.cat([model.alignment_head.token_proj(vectors), own]).numpy()
        parts.append((inputs, np.repeat([0, 1], [len(vectors), len(own)])))
    (inputs, classes), (others, truth) = parts
    given = LogisticRegression(max_iter=300).fit(inputs / inputs.std(), classes).predict(others / inputs.std())
    return float(np.mean([(given[truth == label] == label).mean() for label in (0, 1)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--folds", type=int, default=3)
    args = parser.parse_args()
    texts, rows = TextEmbeddings(*load_text_encoder(PACKAGED_MODEL)), []
    for fold, (start, training, test) in enumerate(folds_of(args.data, args.work, args.folds, all_scans=True)):
        length = 10 * start.config.patch_length
        cohort = fit_cohort(training, length, length // 2)
        for name, weights in ARMS.items():
            model = trained(start, training, cohort, texts, weights, seed=fold)
            cache = args.work / "losses" / name.replace(" ", "-")
            rows.append(
                {"fold": fold, "losses": name, **measured(model, training, test, cohort, texts, length, cache)}
            )
            write("losses", rows)


if __name__ == "__main__":
    main()
