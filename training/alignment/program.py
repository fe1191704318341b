"""
Stage 2 as a program: a pretrained language model learns to read and to predict the codes of a trained codec.

# LoRA on the language model
```bash
accelerate launch -m fmrilm.training.alignment.program \\
    --config training/configs/alignment.yaml \\
    --codec runs/codec/model \\
    --model_name_or_path Qwen/Qwen3-0.6B \\
    --corpus data/corpus \\
    --data data/prepared \\
    --use_peft \\
    --lora_r 16 \\
    --learning_rate 1.0e-3 \\
    --output_dir runs/alignment
```

# Full tuning
```bash
accelerate launch -m fmrilm.training.alignment.program \\
    --config training/configs/alignment.yaml \\
    --codec runs/codec/model \\
    --model_name_or_path Qwen/Qwen3-0.6B \\
    --corpus data/corpus \\
    --data data/prepared \\
    --use_peft false \\
    --learning_rate 2.0e-5 \\
    --output_dir runs/alignment
```

`OUTPUT_DIR/model` is the joint model and its processor. The same command goes on from the last whole checkpoint.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..program import ScanArguments


if TYPE_CHECKING:
    from trl import ModelConfig, TrlParser

    from ..arguments import AlignmentTrainingArguments


@dataclass
class AlignmentArguments(ScanArguments):
    """What is joined, and what the joint model learns from."""

    codec: str | None = field(default=None, metadata={"help": "Trained codec: a folder or Hub id."})
    window_length: int = field(default=160, metadata={"help": "Frames of a window, also of the finished processor."})
    row_weights: list[float] = field(
        default_factory=lambda: [0.8, 0.1, 0.1],
        metadata={"help": "Of rows of a scan and its description, of a scan alone, and of plain text."},
    )
    projector_steps: int = field(
        default=250, metadata={"help": "Steps of the projector alone on the descriptors, before all else."}
    )
    autoregression_steps: int = field(
        default=300, metadata={"help": "Steps of the autoregression alone on the codes, before all else."}
    )


def main(command_line: list[str] | None = None) -> Path:
    script_args, training_args, model_args = make_parser().parse_args_and_config(command_line)
    return align(script_args, training_args, model_args)


def align(
    script_args: AlignmentArguments, training_args: "AlignmentTrainingArguments", model_args: "ModelConfig"
) -> Path:
    """Trains and writes the joint model's folder, which is returned. Rows are about the corpus' training subjects."""
    import torch

    from fmrilm.modeling_fmricodec import FmriCodecModel
    from fmrilm.processors import FmriLMFeatureExtractor

    from ..checkpoints import output_folder
    from ..hub.model_folder import load_model
    from ..program import begin, encode_both, keep_base, on_rows, train_and_save, trainable
    from ..trainer import JointTrainer
    from .corpus_chats import alignment_rows
    from .joint import join, scan_processor
    from .language_models import PACKAGED_MODEL, load_language_model
    from .plain_text import plain_texts

    if script_args.codec is None or script_args.corpus is None:
        raise ValueError(
            "expected codec, a trained one, and corpus, a folder that `fmrilm describe` wrote, got "
            f"codec={script_args.codec} and corpus={script_args.corpus}"
        )
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise ValueError("expected stage 2 in full precision: QLoRA is for stage 3, got load_in_4bit or load_in_8bit")
    scans, last = begin(script_args, training_args)
    codec = FmriCodecModel.from_pretrained(script_args.codec, dtype=torch.float32).eval()
    extractor = FmriLMFeatureExtractor(
        atlases=list(scans.atlases.values()),
        repetition_time=codec.config.repetition_time,
        patch_length=codec.config.patch_length,
        window_length=script_args.window_length,
    )
    if scans.cohort is None:
        raise ValueError(f"expected a corpus with its cohort in {script_args.corpus}, got one without")
    language_model, tokenizer = load_language_model(model_args.model_name_or_path or PACKAGED_MODEL)
    processor = scan_processor(extractor, tokenizer, codec.config)
    model = join(codec, language_model, processor)
    training, test = encode_both(script_args, training_args, codec, scans, extractor)
    if last is None:
        warm_up(model, training, scans.cohort, script_args, training_args.seed)
    elif model_args.use_peft:
        # an adapter's checkpoint does not hold what was fitted before
        model = load_model(str(output_folder(training_args) / "base"), torch.float32, merge=False)
    if model_args.use_peft:
        keep_base(model, training_args, last)

    texts, held_out_texts = plain_texts()

    def draw(of, count, seed):
        about = held_out_texts if of is test else texts
        return alignment_rows(of, about, count, script_args.row_weights, script_args.paragraphs, seed)

    inputs = on_rows(script_args, training_args, processor, training, test, draw)
    trainer = JointTrainer(model=trainable(model, model_args), **inputs)
    return train_and_save(trainer, last, scans.cohort.save)


def warm_up(model, scans, cohort, script_args: AlignmentArguments, seed: int) -> None:
    """
    What is fitted before the language model learns, on the windows of the most frequent length and the descriptors of
    their scans.
    """
    from collections import Counter

    import numpy as np

    from .start import fit_autoregression, fit_levels, warm_up_projector

    length, _ = Counter(len(window) for codes in scans.codes for window in codes).most_common(1)[0]
    chosen = [(scan, window) for scan, window in scans.windows if len(scans.codes[scan][window]) == length]
    codes = np.stack([scans.codes[scan][window] for scan, window in chosen])
    values = np.array([[row["descriptors"][name] for name in cohort.names] for row in scans.rows], float)
    rows = [scan for scan, _ in chosen]
    config = model.config.codec_config
    if model.model.descriptors is not None:
        known = dict(zip(cohort.names, cohort.levels(values)[rows].T, strict=True))
        levels = [known.get(name, np.full(len(rows), -1)) for name in config.descriptor_names]
        told = fit_levels(model, codes, np.stack(levels, axis=1))
        print(f"the codec's head tells {told:.2f} of the training levels from the codes")
    if script_args.projector_steps:
        targets = cohort.z_scores(values)[rows]
        explained = warm_up_projector(model, codes, targets, script_args.projector_steps, seed)
        print(f"the projected codes explain {explained:.2f} of the training descriptors' variance")
    # windows of one step have no next one
    if script_args.autoregression_steps and length > config.tokens_per_step:
        perplexity = fit_autoregression(model, codes, script_args.autoregression_steps, seed)
        print(f"the codes tell the next ones at a perplexity of {perplexity:.0f}")


def make_parser() -> "TrlParser":
    from trl import ModelConfig, TrlParser

    from ..arguments import AlignmentTrainingArguments

    # declared for a type of its own, which dataclasses are not
    return TrlParser((AlignmentArguments, AlignmentTrainingArguments, ModelConfig))  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
