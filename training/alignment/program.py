"""
Stage 2 as a program: a pretrained language model learns to read and to predict the codes of a trained codec.

```bash
accelerate launch -m fmrilm.training.alignment.program \\
    --config training/configs/demo/alignment.yaml \\
    --codec runs/codec/model \\
    --model_name_or_path Qwen/Qwen3-0.6B \\
    --data data/corpus \\
    --use_peft \\
    --lora_r 16 \\
    --learning_rate 1.0e-3 \\
    --output_dir runs/alignment
```

This is LoRA on the language model; the whole of it learns with `--use_peft false --learning_rate 2.0e-5`.
`OUTPUT_DIR/model` is the joint model and its processor. The same command goes on from the last whole checkpoint.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import AutoFeatureExtractor, set_seed
from trl import ModelConfig, TrlParser

from fmrilm.modeling_fmricodec import FmriCodecModel
from fmrilm.processors import FmriLMProcessor

from ..checkpoints import last_checkpoint, output_folder
from ..hub.model_folder import load_model
from ..program import (
    AlignmentTrainingArguments,
    ScanArguments,
    check_weights,
    fit_cohort,
    keep_base,
    make_examples,
    on_rows,
    read_scans,
    train_and_save,
    trainable,
)
from ..trainer import AlignmentTrainer
from .chats import alignment_rows
from .dynamics import fit_dynamics, fit_token_gains
from .examples import fit_frequencies, fit_scores, read_scores, score_targets
from .joint import join
from .language_models import PACKAGED_MODEL, load_language_model
from .plain_text import plain_texts


@dataclass
class AlignmentArguments(ScanArguments):
    """What is joined, and what the joint model learns from."""

    codec: str | None = field(default=None, metadata={"help": "Trained codec: a folder or Hub id."})
    row_weights: list[float] = field(
        default_factory=lambda: [0.4, 0.4, 0.1, 0.1],
        metadata={
            "help": "Of rows of a scan and its description, of a scan and questions about its descriptors, of a scan "
            "alone, and of plain text."
        },
    )

    def __post_init__(self) -> None:
        check_weights(self.row_weights, 4)


def main(command_line: list[str] | None = None) -> Path:
    script_args, training_args, model_args = make_parser().parse_args_and_config(command_line)
    return align(script_args, training_args, model_args)


def align(script_args: AlignmentArguments, training_args: AlignmentTrainingArguments, model_args: ModelConfig) -> Path:
    """Trains and writes the joint model's folder, which is returned. Rows are about training subjects alone."""
    if script_args.codec is None:
        raise ValueError("expected codec, a folder or Hub id of a trained one, got none")
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise ValueError("expected stage 2 in full precision: QLoRA is for stage 3, got load_in_4bit or load_in_8bit")
    set_seed(training_args.seed)
    last = last_checkpoint(output_folder(training_args, script_args.codec, model_args.model_name_or_path))
    codec = FmriCodecModel.from_pretrained(script_args.codec, dtype=torch.float32).eval()
    extractor = AutoFeatureExtractor.from_pretrained(script_args.codec)
    training, test = read_scans(script_args, extractor)
    script_args.compare(script_args.codec)
    length, stride = extractor.window_length, script_args.window_stride
    cohort = fit_cohort(training, length, stride)
    cache = Path(script_args.code_cache or output_folder(training_args) / "codes")
    wanted = len(test) and training_args.eval_strategy != "no" and script_args.evaluation_rows
    # the others read what the first process has put into the cache
    with training_args.main_process_first(desc="codes"):
        examples = make_examples(
            codec, training, cohort, length, stride, cache, script_args.mixtures, training_args.seed
        )
        held_out = make_examples(codec, test, cohort, length, stride, cache) if wanted else None
    names, targets = score_targets(examples, cohort.names, [])
    language_model, tokenizer = load_language_model(model_args.model_name_or_path or PACKAGED_MODEL)
    processor = FmriLMProcessor(extractor, tokenizer, tokens_per_patch=codec.config.tokens_per_patch)
    model = join(codec, language_model, processor, names)
    examples, r_squared = fit_scores(model, examples, names, targets, training_args.seed)
    fit_frequencies(model, examples.codes)
    forecasts = fit_dynamics(model.model.dynamics, codec, training, length, training_args.seed)
    # mixtures are of no scan
    real = [place for place, row in enumerate(examples.rows) if row.get("scan") is not None]
    of_scans = [examples.codes[place] for place in real]
    fit_token_gains(model.model.dynamics, codec, of_scans, examples.subjects[real], training_args.seed)
    print(f"forecasts: R2 {forecasts[0]:.2f} one frame ahead, on subjects left out of each fold")
    print(f"scores of {len(names)} descriptors: mean R2 {np.nanmean(r_squared):.2f} on subjects left out of each fold")
    if held_out is not None:
        held_out = read_scores(model, held_out)
    if last is not None and model_args.use_peft:
        # an adapter's checkpoint does not hold what it was trained on
        model = load_model(str(output_folder(training_args) / "base"), torch.float32, merge=False)
    if model_args.use_peft:
        keep_base(model, cohort, training_args, last)
    texts, held_out_texts = plain_texts()

    def draw(of, count, seed):
        return alignment_rows(
            of,
            held_out_texts if of is held_out else texts,
            count,
            script_args.row_weights,
            script_args.questions,
            script_args.statements,
            script_args.paragraphs,
            seed,
        )

    inputs = on_rows(script_args, training_args, processor, examples, held_out, draw)
    trainer = AlignmentTrainer(model=trainable(model, model_args, training_args, inputs["train_dataset"]), **inputs)

    def write(folder: Path) -> None:
        cohort.save(folder)
        script_args.keep(folder)

    return train_and_save(trainer, last, write)


def make_parser() -> TrlParser:
    # declared for a type of its own, which dataclasses are not
    return TrlParser((AlignmentArguments, AlignmentTrainingArguments, ModelConfig))  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
