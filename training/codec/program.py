"""Stage 1 as a program: options, data, one training run, and what it leaves behind."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.utils.data import Dataset
from trl import TrlParser

from fmrilm import Atlas, FmriCodecConfig, FmriCodecModel, FmriLMFeatureExtractor
from fmrilm.processors.descriptors.cohort import Cohort
from fmrilm.processors.descriptors.measures import CORE_MEASURES, CORE_NAMES
from fmrilm.processors.descriptors.text import description

from ..alignment.language_models import load_text_encoder
from ..checkpoints import last_checkpoint
from ..data.dataset import (
    MixedWindows,
    PreparedScan,
    collate_signals,
    cut_windows,
    load_prepared,
    prepare_scans,
)
from ..data.open_data import open_scans
from ..data.splits import HELD_OUT_SHARE, held_out_subjects
from ..data.streaming import ShardedScans, StreamedMixtures
from .fit import HEAD_ITEMS, fit_start
from .text_embeddings import TextEmbeddings
from .trainer import CodecTrainer, CodecTrainingArguments, window_items


# of a streamed folder: scans that the cohort is fitted on, and scans to evaluate on
STREAMED_COHORT, STREAMED_HELD_OUT = 1000, 100


@dataclass
class CodecArguments:
    """What is trained, and on what."""

    data: str | None = field(
        default=None,
        metadata={"help": "Folder that `fmrilm prepare` wrote (none: the open data)."},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read `data` shard by shard, for folders that memory does not hold."}
    )
    skip_broken_shards: bool = field(
        default=False, metadata={"help": "With streaming: report a damaged shard and go on without it."}
    )
    held_out_share: float = field(
        default=HELD_OUT_SHARE,
        metadata={"help": "Share of the subjects to evaluate on; with less, evaluations meet people trained on."},
    )
    window_length: int = field(default=160, metadata={"help": "Frames of a training example."})
    window_stride: int = field(default=136, metadata={"help": "Frames between the windows of evaluation."})
    max_rois: int | None = field(default=64, metadata={"help": "ROIs drawn from each training example."})
    size: str = field(default="tiny", metadata={"help": "tiny, small, base or large."})
    token_layout: str = field(default="latent", metadata={"help": "latent or roi."})
    patch_length: int = 16
    tokens_per_step: int = 8
    quantizer: str = field(default="vq", metadata={"help": "vq or fsq."})
    codebook_size: int = 512
    codebook_dim: int = 32
    fsq_levels: list[int] | None = None
    initializer_range: float = 0.08
    ema_decay: float = 0.95
    start_steps: int = field(
        default=400,
        metadata={"help": "Updates of the functions of place in the fit that training starts from; 0: no such fit."},
    )
    language_model: str | None = field(
        default=None, metadata={"help": "Frozen language model of the alignment losses: a folder or any Hub id."}
    )
    commitment_weight: float = field(
        default=100.0,
        metadata={"help": "Of the distance to the codebook; vectors that keep their length lie close to each other."},
    )
    descriptor_weight: float = field(default=1.0, metadata={"help": "Of the descriptors' regression."})
    alignment_weight: float = 1.0
    domain_weight: float = field(default=0.5, metadata={"help": "0 leaves the domain loss out."})
    described_mixtures: int = field(
        default=600, metadata={"help": "Training mixtures that get a description where there is a language model."}
    )
    statements: int = field(default=8, metadata={"help": "Statements in a description."})


@dataclass(frozen=True)
class CodecData:
    """training: all scans to train on, or with `streamed` some of them, on which the cohort was fitted."""

    training: list[PreparedScan]
    held_out: list[PreparedScan]
    cohort: Cohort
    window_length: int
    window_stride: int
    streamed: ShardedScans | None = None

    def items(self, scans: Sequence[PreparedScan] | None = None) -> list[dict[str, np.ndarray]]:
        """Windows of the held-out scans (or of those given) with z-scored descriptors, for evaluation."""
        items = window_items(cut_windows(scans or self.held_out, self.window_length, self.window_stride))
        return [
            {**item, "descriptors": self.cohort.z_scores(item["descriptors"]).astype(np.float32)} for item in items
        ]

    def mixtures(self, size: int, max_rois: int | None, seed: int) -> Dataset:
        if self.streamed is not None:
            return StreamedMixtures(self.streamed, self.cohort, self.window_length, max_rois, size, seed)
        return MixedWindows(self.training, self.cohort, self.window_length, max_rois, size, seed)

    def describe(self, z_scores: np.ndarray, statements: int) -> str:
        """The most unusual things about a scan, by its z-scores [descriptors]."""
        levels = self.cohort.levels(self.cohort.from_z_scores(z_scores))
        order = np.argsort(-np.abs(np.where(levels >= 0, z_scores, 0)))
        return description(levels, [index for index in order[:statements] if levels[index] >= 0])


class DescribedItems(Dataset):
    """The first `len(embeddings)` items of a dataset over and over, each with the embedding of its description."""

    def __init__(self, items: Dataset, embeddings: np.ndarray, size: int):
        self.items, self.embeddings, self.size = items, embeddings, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        index %= len(self.embeddings)
        return {**self.items[index], "text_embedding": self.embeddings[index]}


def prepare(args: CodecArguments) -> CodecData:
    """Scans, split by subject before anything is fitted."""
    streamed = None
    if args.streaming:
        if args.data is None:
            raise ValueError("expected data, a prepared folder, to stream from; got none")
        extractor = FmriLMFeatureExtractor()
        streamed = ShardedScans(Path(args.data), extractor, args.held_out_share, args.skip_broken_shards)
        training = streamed.sample(streamed.training, STREAMED_COHORT, args.window_length, seed=0)
        held_out = streamed.sample(streamed.held_out, STREAMED_HELD_OUT, args.window_length, seed=0)
    else:
        scans = _read_whole(args)
        away = held_out_subjects((scan.subject for scan in scans), args.held_out_share)
        training = [scan for scan in scans if scan.subject not in away]
        held_out = [scan for scan in scans if scan.subject in away]
    if not training or not held_out:
        raise ValueError(
            f"expected subjects to train and to evaluate on, got {len(training)} and {len(held_out)} scans with "
            f"held_out_share={args.held_out_share}"
        )
    return codec_data(training, held_out, args.window_length, args.window_stride, streamed)


def codec_data(
    training: Sequence[PreparedScan],
    held_out: Sequence[PreparedScan],
    window_length: int,
    window_stride: int,
    streamed: ShardedScans | None = None,
) -> CodecData:
    """Scans of two sets of people, and the cohort that the first of them make."""
    windows = cut_windows(training, window_length, window_length // 4)
    cohort = Cohort.fit(
        "the codec's training subjects",
        CORE_MEASURES,
        np.stack([window.descriptors for window in windows]),
        subjects=len({(scan.dataset, scan.subject) for scan in training}),
        atlases=[scan.atlas for scan in training],
    )
    return CodecData(list(training), list(held_out), cohort, window_length, window_stride, streamed)


def _read_whole(args: CodecArguments) -> list[PreparedScan]:
    if args.data is not None:
        return load_prepared(Path(args.data), FmriLMFeatureExtractor())
    scans = open_scans()
    atlases = [Atlas.load(name) for name in sorted({scan.atlas for scan in scans})]
    return prepare_scans(scans, FmriLMFeatureExtractor(atlases=atlases))


def codec_config(args: CodecArguments, text_hidden_size: int | None) -> FmriCodecConfig:
    codebook = {"codebook_size": args.codebook_size, "codebook_dim": args.codebook_dim}
    return FmriCodecConfig.from_size(
        args.size,
        **({"fsq_levels": args.fsq_levels} if args.quantizer == "fsq" else codebook),
        quantizer=args.quantizer,
        token_layout=args.token_layout,
        patch_length=args.patch_length,
        tokens_per_step=args.tokens_per_step,
        initializer_range=args.initializer_range,
        ema_decay=args.ema_decay,
        max_steps=max(32, -(-args.window_length // args.patch_length)),
        descriptor_names=list(CORE_NAMES),
        text_hidden_size=text_hidden_size,
        commitment_weight=args.commitment_weight,
        descriptor_weight=args.descriptor_weight,
        alignment_weight=args.alignment_weight,
        domain_weight=args.domain_weight,
    )


def build_trainer(args: CodecArguments, training_args: CodecTrainingArguments, data: CodecData) -> CodecTrainer:
    """Everything that a run needs, with descriptions embedded where there is a language model."""
    transformers.set_seed(training_args.seed)
    texts = TextEmbeddings(*load_text_encoder(args.language_model)) if args.language_model else None
    text_hidden_size = None if texts is None else texts.word_embeddings.shape[1]
    model = FmriCodecModel(codec_config(args, text_hidden_size))
    fitted = args.start_steps > 0 and args.token_layout == "latent"
    if fitted:
        kept = fit_start(model, data.training, args.start_steps, training_args.seed)
        print(f"before training, codes keep {kept:.2f} of the training scans' variance on functions of place")
    size = training_args.max_steps * training_args.train_batch_size * training_args.world_size
    size *= training_args.gradient_accumulation_steps
    if size <= 0:
        raise ValueError(f"expected max_steps of at least 1, got {training_args.max_steps}: mixtures never end")
    dataset: Dataset = data.mixtures(size, args.max_rois, training_args.seed)
    items = data.items()
    words = None
    if texts is not None:
        described = [
            data.describe(dataset[index]["descriptors"], args.statements)
            for index in range(min(args.described_mixtures, size))
        ]
        embeddings = texts(described)
        if model.alignment is not None:
            model.alignment.fit_texts(torch.from_numpy(embeddings))
        dataset = DescribedItems(dataset, embeddings, size)
        held_out = texts([data.describe(item["descriptors"], args.statements) for item in items])
        items = [{**item, "text_embedding": row} for item, row in zip(items, held_out, strict=True)]
        words = texts.word_embeddings if args.domain_weight else None
    return CodecTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset,
        eval_dataset=items,
        data_collator=collate_signals,
        word_embeddings=words,
        head_items=min(HEAD_ITEMS, size) if fitted and (args.descriptor_weight or texts) else 0,
    )


def main(command_line: list[str] | None = None) -> None:
    # declared for a type of its own, which dataclasses are not
    parser = TrlParser((CodecArguments, CodecTrainingArguments))  # pyright: ignore[reportArgumentType]
    args, training_args = parser.parse_args_and_config(command_line)
    # the collator reads columns that no model's signature names
    training_args.remove_unused_columns = False
    if args.streaming:
        # neighbours are of one shard, whose order is random already
        training_args.train_sampling_strategy = "sequential"
    last = last_checkpoint(Path(training_args.output_dir))
    trainer = build_trainer(args, training_args, prepare(args))
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    trainer.save_model(str(Path(training_args.output_dir) / "model"))
    trainer.evaluate()
    trainer.save_state()


if __name__ == "__main__":
    main()
