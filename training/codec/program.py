"""
Stage 1, the codec: fitted to training scans in closed form, and trained on mixtures of them if asked to.

As a program: `python -m fmrilm.training.codec.program --config codec.yaml`, or `accelerate launch -m` where it trains.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch.utils.data import Dataset
from trl import TrlParser

from fmrilm import FmriCodecConfig, FmriCodecModel, FmriLMFeatureExtractor
from fmrilm.processors.descriptors.cohort import Cohort
from fmrilm.processors.descriptors.measures import CORE_NAMES
from fmrilm.processors.descriptors.text import description

from ..alignment.language_models import load_text_encoder
from ..checkpoints import last_checkpoint, output_folder
from ..data.dataset import MixedWindows, Scans, collate_signals, cut_windows
from ..hub.model_folder import write_folder
from ..program import DataArguments, fit_cohort, make_examples, read_scans
from .fit import fit_codec, fit_descriptor_head, fit_summary
from .metrics import evaluate_codec
from .text_embeddings import embed_texts
from .trainer import CodecTrainer, CodecTrainingArguments


@dataclass
class CodecArguments(DataArguments):
    """What is fitted and trained."""

    window_length: int = field(default=160, metadata={"help": "Frames of an example."})
    size: str | None = field(
        default=None, metadata={"help": "Transformers added to the linear maps: tiny, small, base or large; or none."}
    )
    patch_length: int = 16
    tokens_per_patch: int = 8
    num_quantizers: int = field(default=16, metadata={"help": "Levels: codes of a token."})
    quantizer: str = field(default="vq", metadata={"help": "vq or fsq."})
    codebook_size: int = 512
    codebook_dim: int = 128
    codebook_groups: int = field(
        default=4, metadata={"help": "Parts of a token's vector that the levels take turns over."}
    )
    fsq_levels: list[int] | None = None
    num_scan_levels: int = field(
        default=0, metadata={"help": "Further levels, of codes of the scan as a whole; for hundreds of scans."}
    )
    num_basis_functions: int = 64
    start_steps: int = field(default=400, metadata={"help": "Updates of the spatial basis in the fit."})
    max_rois: int | None = field(
        default=64, metadata={"help": "In training without num_scan_levels, ROIs drawn from each example."}
    )
    quantizer_dropout: float = field(default=0.5, metadata={"help": "In training, decoded from a part of the levels."})
    ema_decay: float = 0.99
    language_model: str | None = field(
        default=None, metadata={"help": "Frozen language model of the alignment loss: a folder or any Hub id."}
    )
    commitment_weight: float = 0.25
    descriptor_weight: float = field(default=0.0, metadata={"help": "In training, of the descriptors' regression."})
    alignment_weight: float = 1.0
    described_mixtures: int = field(
        default=600, metadata={"help": "Training mixtures that get a description where there is a language model."}
    )
    statements: int = field(default=8, metadata={"help": "Statements in a description."})


class DescribedItems(Dataset):
    """The first `len(embeddings)` items of a dataset over and over, each with the embedding of its description."""

    def __init__(self, items: Dataset, embeddings: np.ndarray, size: int):
        self.items, self.embeddings, self.size = items, embeddings, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        index %= len(self.embeddings)
        return {**self.items[index], "text_embedding": self.embeddings[index]}


def codec_config(args: CodecArguments, scans: Scans, text_hidden_size: int | None = None) -> FmriCodecConfig:
    names = ["patch_length", "tokens_per_patch", "num_quantizers", "quantizer", "num_scan_levels"]
    names += ["num_basis_functions"]
    names += ["quantizer_dropout", "ema_decay", "commitment_weight", "descriptor_weight", "alignment_weight"]
    names += ["fsq_levels"] if args.quantizer == "fsq" else ["codebook_size", "codebook_dim", "codebook_groups"]
    values: dict[str, Any] = {name: getattr(args, name) for name in names}
    values |= {"descriptor_names": list(CORE_NAMES), "text_hidden_size": text_hidden_size}
    if args.num_scan_levels:
        values["num_scan_rois"] = len(scans.atlases[scans.main_atlas].rois)
    return FmriCodecConfig.from_size(args.size, **values) if args.size else FmriCodecConfig(**values)


def describe(cohort: Cohort, z_scores: np.ndarray, statements: int) -> str:
    """The most unusual statements about a scan, by its z-scores [descriptors]."""
    levels = cohort.levels(cohort.from_z_scores(z_scores))
    order = np.argsort(-np.abs(np.where(levels >= 0, z_scores, 0)))
    return description(levels, [index for index in order[:statements] if levels[index] >= 0])


def build_trainer(
    model: FmriCodecModel,
    scans: Scans,
    cohort: Cohort,
    items: list[dict[str, Any]],
    args: CodecArguments,
    training_args: CodecTrainingArguments,
    texts: Callable[[list[str]], np.ndarray] | None,
) -> CodecTrainer:
    """On mixtures of training scans, with descriptions embedded where there is a language model."""
    size = training_args.max_steps * training_args.train_batch_size * training_args.world_size
    size *= training_args.gradient_accumulation_steps
    # codes of whole scans are of all their ROIs
    max_rois = None if args.num_scan_levels else args.max_rois
    dataset: Dataset = MixedWindows(scans, args.window_length, cohort, size, training_args.seed, max_rois)
    if texts is not None and model.alignment_head is not None:
        count = min(args.described_mixtures, size)
        sentences = [describe(cohort, dataset[index]["descriptors"], args.statements) for index in range(count)]
        embeddings = texts(sentences)
        model.alignment_head.fit_texts(torch.from_numpy(embeddings))
        dataset = DescribedItems(dataset, embeddings, size)
    return CodecTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset,
        eval_dataset=cast(Dataset, items) if items else None,
        data_collator=collate_signals,
    )


def main(command_line: list[str] | None = None) -> None:
    # declared for a type of its own, which dataclasses are not
    parser = TrlParser((CodecArguments, CodecTrainingArguments))  # pyright: ignore[reportArgumentType]
    args, training_args = parser.parse_args_and_config(command_line)
    output, seed = output_folder(training_args), training_args.seed
    transformers.set_seed(seed)
    extractor = FmriLMFeatureExtractor(patch_length=args.patch_length, window_length=args.window_length)
    training, held_out = read_scans(args, extractor)
    cohort = fit_cohort(training, args.window_length, args.window_stride)
    texts = partial(embed_texts, *load_text_encoder(args.language_model)) if args.language_model else None
    # not in every model's configuration: some project their last hidden states
    width = None if texts is None else texts(["A scan."]).shape[1]
    model = FmriCodecModel(codec_config(args, training, width)).eval()
    kept = fit_codec(model, training, args.start_steps, seed)
    print(f"the fitted codes keep {kept:.2f} of the training scans' variance on the spatial basis")
    windows = cut_windows(held_out, args.window_length, args.window_length)
    items = windows.items()
    if texts is not None and items:
        sentences = [describe(cohort, row, args.statements) for row in cohort.z_scores(windows.descriptors())]
        items = [{**item, "text_embedding": row} for item, row in zip(items, texts(sentences), strict=True)]
    if training_args.max_steps:
        last = last_checkpoint(output)
        trainer = build_trainer(model, training, cohort, items, args, training_args, texts)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        # a Trainer leaves it on an accelerator
        fit_summary(model.cpu().eval(), training, np.random.default_rng(seed))
    if not training_args.should_save:
        return
    examples = make_examples(
        model, training, cohort, args.window_length, args.window_stride, output / "codes", args.mixtures, seed
    )
    explained = fit_descriptor_head(model, examples.features, examples.z_scores, examples.subjects, seed)
    results = evaluate_codec(model, items) if items else {}
    results |= {"descriptor_r_squared": dict(zip(CORE_NAMES, explained.tolist(), strict=True))}

    def write(folder: Path) -> None:
        model.save_pretrained(str(folder))
        extractor.save_pretrained(folder)
        args.keep(folder)

    write_folder(output / "model", write)
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print("held-out scans:", {name: results[name] for name in ("r_squared", "fc_correlation") if name in results})


if __name__ == "__main__":
    main()
