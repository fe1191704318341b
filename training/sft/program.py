"""
Stage 3 as a program: instruction tuning of a joint model on questions about scans, with TRL's SFTTrainer.

```bash
accelerate launch -m fmrilm.training.sft.program \\
    --config training/configs/demo/sft.yaml \\
    --model_name_or_path runs/alignment/model \\
    --data data/corpus \\
    --use_peft \\
    --lora_r 16 \\
    --learning_rate 1.0e-3 \\
    --output_dir runs/sft
```

This is LoRA on top of a model of stage 2, or going on with the adapter in a folder; `docs/training.md` has the options
of a new adapter on a merged one, of full tuning and of QLoRA. `--tasks sex age_group mytask.yaml` asks about labels:
packaged tasks, or YAML files of your own.
`OUTPUT_DIR/model` is the tuned model and its processor. The same command goes on from the last whole checkpoint.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import concatenate_datasets
from peft import PeftModel
from transformers import set_seed
from trl import ModelConfig, TrlParser

from fmrilm.processors import FmriLMProcessor
from fmrilm.processors.descriptors.cohort import Cohort
from fmrilm.scan_reader import check_source

from ..alignment.chats import chat_dataset, text_row
from ..alignment.examples import fit_scores, read_scores, score_targets
from ..alignment.joint import with_answers
from ..alignment.plain_text import plain_texts
from ..checkpoints import last_checkpoint, output_folder
from ..data.tasks import load_task, with_columns
from ..hub.model_folder import base_of, load_model
from ..program import (
    FmriLMSFTConfig,
    ScanArguments,
    TaskArguments,
    check_weights,
    keep_base,
    make_examples,
    on_rows,
    quantization,
    read_scans,
    train_and_save,
    trainable,
)
from ..trainer import FmriLMSFTTrainer, half_precision
from .calibration import fit_calibrations
from .chats import instruction_rows
from .readings import Reading, reading_rows


@dataclass
class SftArguments(TaskArguments, ScanArguments):
    """What the model is asked."""

    merge_adapter: bool = field(
        default=False, metadata={"help": "Merge the adapter of the model into it first, instead of tuning it further."}
    )
    row_weights: list[float] = field(
        default_factory=lambda: [0.1, 0.8, 0.1],
        metadata={
            "help": "Of one question, several questions in one conversation, and an open-ended request (its share of "
            "reading rows, too)."
        },
    )
    reading_share: float = field(
        default=0.0,
        metadata={
            "help": "Of the rows, short ones with questions of the tasks, whose answers follow another subject's "
            "scores, and about descriptors: they teach to answer as the scores say."
        },
    )
    reading_descriptors: int = field(default=4, metadata={"help": "Questions about descriptors in such a row."})
    text_share: float = field(default=0.0, metadata={"help": "Of the rows, plain text: it keeps the language."})
    label_share: float = field(
        default=0.5, metadata={"help": "Of the chats about scans with labels, those that ask for the labels."}
    )
    source_share: float = field(
        default=0.0, metadata={"help": "Of the chats that begin with what is known of the study (Task.about)."}
    )
    covariate_share: float = field(
        default=0.0, metadata={"help": "Of the chats about labels that begin with labels of the other tasks."}
    )
    description_share: float = field(
        default=0.0, metadata={"help": "Of the chats about labels that begin with the scan's description in a corpus."}
    )

    def __post_init__(self) -> None:
        check_weights(self.row_weights, 3)


def main(command_line: list[str] | None = None) -> Path:
    script_args, training_args, model_args = make_parser().parse_args_and_config(command_line)
    return tune(script_args, training_args, model_args)


def tune(script_args: SftArguments, training_args: FmriLMSFTConfig, model_args: ModelConfig) -> Path:
    """Trains and writes the tuned model's folder, which is returned. Rows are about training subjects alone."""
    name = model_args.model_name_or_path
    if name is None:
        raise ValueError("expected model_name_or_path, a folder or Hub id of a joint model or an adapter, got none")
    check_source(name)
    shares = script_args.reading_share, script_args.text_share
    if min(shares) < 0 or sum(shares) > 1:
        raise ValueError(f"expected reading_share and text_share of at least 0, together at most 1, got {shares}")
    if script_args.reading_share and not script_args.tasks and script_args.reading_descriptors < 1:
        raise ValueError(
            f"expected tasks or reading_descriptors of at least 1 with reading_share={script_args.reading_share}, got "
            f"no tasks and {script_args.reading_descriptors}"
        )
    set_seed(training_args.seed)
    last = last_checkpoint(output_folder(training_args, name))
    tasks = with_columns([load_task(task) for task in script_args.tasks], script_args.columns)
    if len(titles := {task.spoken for task in tasks}) < len(tasks):
        raise ValueError(f"expected tasks with a title each, got {', '.join(sorted(titles))} for {len(tasks)} tasks")
    processor = FmriLMProcessor.from_pretrained(name)
    extractor = processor.feature_extractor
    training, test = read_scans(script_args, extractor)
    script_args.compare(name)
    cohort = Cohort.load(base_of(name) or name)
    model = load_model(name, model_args.dtype, script_args.merge_adapter, quantization(model_args))
    joint: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    length, stride = extractor.window_length, script_args.window_stride
    cache = Path(script_args.code_cache or output_folder(training_args) / "codes")
    wanted = len(test) and training_args.eval_strategy != "no" and script_args.evaluation_rows
    with training_args.main_process_first(desc="codes"):
        examples = make_examples(
            joint.model.codec, training, cohort, length, stride, cache, script_args.mixtures, training_args.seed
        )
        held_out = make_examples(joint.model.codec, test, cohort, length, stride, cache) if wanted else None
    names, targets = score_targets(examples, cohort.names, tasks)
    widened = set(names) - set(joint.config.score_names)
    if widened:
        if isinstance(model, PeftModel) or model_args.load_in_4bit or model_args.load_in_8bit:
            raise ValueError(
                f"expected a whole model in full precision to learn new scores ({', '.join(sorted(widened))}): merge "
                "the adapter first (--merge_adapter)"
            )
        model = joint = with_answers(joint, processor, tasks, [name for name in names if name in widened])
    before = joint.model.summary.readout.weight.clone()
    examples, r_squared = fit_scores(joint, examples, names, targets, training_args.seed)
    readout = joint.model.summary.readout.weight
    refitted = not torch.equal(before, readout)
    if isinstance(model, PeftModel) and not torch.allclose(before, readout, rtol=1e-3, atol=1e-4):
        raise ValueError(
            "expected the data that the adapter's scores were fitted to: merge it first (--merge_adapter)"
        )
    for one, value in zip(names, r_squared, strict=True):
        # without a value: an answer that no subject has
        if one not in cohort.names and np.isfinite(value):
            print(f"score {one}: R2 {value:.2f} on subjects left out of each fold")
    if held_out is not None:
        held_out = read_scores(joint, held_out)
    if model_args.use_peft and not isinstance(model, PeftModel) and (refitted or script_args.merge_adapter):
        keep_base(model, cohort, training_args, last)
    readings = []
    if script_args.reading_share:
        readings = [Reading.fit(task, examples, joint.config.score_names) for task in tasks]

    texts, _ = plain_texts()

    def draw(of, count, seed):
        # held-out subjects are asked about themselves alone
        reading, text = (0 if of is held_out else round(count * share) for share in shares)
        parts = []
        if count > reading + text:
            parts.append(instruction_rows(of, tasks, count - reading - text, script_args, seed))
        if reading:
            per_patch = joint.config.codec_config.tokens_per_patch
            mix = {
                "descriptors": script_args.reading_descriptors,
                "described_share": script_args.row_weights[2],
                "statements": script_args.statements,
            }
            parts.append(reading_rows(of, joint.config.score_names, readings, reading, per_patch, seed, **mix))
        if text:
            rng = np.random.default_rng(seed)
            parts.append(chat_dataset([text_row(texts, rng) for _ in range(text)]))
        return concatenate_datasets(parts)

    def calibrate(tuned):
        # those of earlier weights
        tuned.config.calibrations = None
        if not script_args.reading_share:
            return
        # as an evaluation computes
        with torch.autocast(tuned.device.type, torch.bfloat16, enabled=half_precision(tuned.device.type)):
            tuned.config.calibrations = fit_calibrations(tuned, processor, examples, readings, training_args.seed)

    inputs = on_rows(script_args, training_args, processor, examples, held_out, draw)
    trainer = FmriLMSFTTrainer(model=trainable(model, model_args, training_args, inputs["train_dataset"]), **inputs)

    def write(folder: Path) -> None:
        cohort.save(folder)
        script_args.keep(folder)

    return train_and_save(trainer, last, write, calibrate)


def make_parser() -> TrlParser:
    # declared for a type of its own, which dataclasses are not
    return TrlParser((SftArguments, FmriLMSFTConfig, ModelConfig))  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
