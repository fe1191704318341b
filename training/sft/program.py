"""
Stage 3 as a program: instruction tuning of a joint model on questions about scans, with TRL's SFTTrainer.

# LoRA, on top of a model of stage 2 (or going on with the adapter in a folder)
```bash
accelerate launch -m fmrilm.training.sft.program \\
    --config training/configs/sft.yaml \\
    --model_name_or_path runs/alignment/model \\
    --corpus data/corpus \\
    --data data/prepared \\
    --use_peft \\
    --lora_r 16 \\
    --learning_rate 1.0e-3 \\
    --output_dir runs/sft
```

# A new adapter after merging the one in a folder
```bash
accelerate launch -m fmrilm.training.sft.program \\
    --config training/configs/sft.yaml \\
    --model_name_or_path runs/alignment/adapter \\
    --merge_adapter \\
    --corpus data/corpus \\
    --use_peft \\
    --output_dir runs/sft
```

# Questions about labels alone, of packaged tasks or a YAML file of your own
```bash
accelerate launch -m fmrilm.training.sft.program \\
    --config training/configs/sft.yaml \\
    --model_name_or_path runs/alignment/model \\
    --data data/prepared \\
    --tasks sex age_group mytask.yaml \\
    --use_peft \\
    --output_dir runs/sft
```

# Full tuning
```bash
accelerate launch -m fmrilm.training.sft.program \\
    --config training/configs/sft.yaml \\
    --model_name_or_path runs/alignment/model \\
    --corpus data/corpus \\
    --use_peft false \\
    --learning_rate 2.0e-5 \\
    --output_dir runs/sft
```

`OUTPUT_DIR/model` is the tuned model and its processor. The same command goes on from the last whole checkpoint.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..program import ScanArguments


if TYPE_CHECKING:
    from trl import ModelConfig, TrlParser

    from ..arguments import FmriLMSFTConfig


@dataclass
class SftArguments(ScanArguments):
    """What the model is asked."""

    merge_adapter: bool = field(
        default=False, metadata={"help": "Merge the adapter of the model into it first, instead of tuning it further."}
    )
    tasks: list[str] = field(
        default_factory=list,
        metadata={"help": "Tasks that ask about labels: names of packaged ones, or YAML files."},
    )
    row_weights: list[float] = field(
        default_factory=lambda: [0.1, 0.8, 0.1],
        metadata={"help": "Of one question, several questions in one conversation, and an open-ended request."},
    )
    questions: int = field(default=6, metadata={"help": "Questions in one conversation, at most."})
    source_share: float = field(
        default=0.0, metadata={"help": "Of the chats that begin with what is known of the study (Task.about)."}
    )
    description_share: float = field(
        default=0.0, metadata={"help": "Of the chats about labels that begin with the scan's description."}
    )


def main(command_line: list[str] | None = None) -> Path:
    script_args, training_args, model_args = make_parser().parse_args_and_config(command_line)
    return tune(script_args, training_args, model_args)


def tune(script_args: SftArguments, training_args: "FmriLMSFTConfig", model_args: "ModelConfig") -> Path:
    """Trains and writes the tuned model's folder, which is returned. Rows are about training subjects alone."""
    from peft import PeftModel

    from fmrilm.processors import FmriLMProcessor
    from fmrilm.processors.descriptors.cohort import JSON_FILE, Cohort

    from ..alignment.corpus_chats import described_windows
    from ..data.tasks import load_task
    from ..hub.model_folder import base_of, load_model
    from ..program import begin, encode_both, keep_base, on_rows, quantization, train_and_save, trainable
    from .task_chats import task_dataset
    from .trainer import FmriLMSFTTrainer

    name = model_args.model_name_or_path
    if name is None:
        raise ValueError("expected model_name_or_path, a folder or Hub id of a joint model or an adapter, got none")
    if script_args.corpus is None and not script_args.tasks:
        raise ValueError("expected tasks or a corpus to take questions from, got neither")
    tasks = [load_task(task) for task in script_args.tasks]
    scans, last = begin(script_args, training_args)
    processor = FmriLMProcessor.from_pretrained(name)
    extractor = processor.feature_extractor
    known = {atlas["name"] for atlas in extractor.atlases}
    extractor.atlases += [atlas.to_dict() for name, atlas in scans.atlases.items() if name not in known]
    model = load_model(name, model_args.dtype, script_args.merge_adapter, quantization(model_args))
    joint: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    training, test = encode_both(script_args, training_args, joint.model.codec, scans, extractor)
    if model_args.use_peft and script_args.merge_adapter and base_of(name):
        keep_base(model, training_args, last)

    def draw(of, count, seed):
        about, codes = described_windows(of, script_args.paragraphs, seed)
        return task_dataset(
            about,
            codes,
            tasks,
            count,
            script_args.questions,
            script_args.row_weights,
            seed,
            script_args.source_share,
            script_args.description_share,
        )

    inputs = on_rows(script_args, training_args, processor, training, test, draw)
    trainer = FmriLMSFTTrainer(model=trainable(model, model_args), **inputs)

    def write_cohort(folder: Path) -> None:
        """What the model's descriptions refer to: the corpus' cohort, or the one that came with the model."""
        cohort = scans.cohort
        if cohort is None and Path(name, JSON_FILE).exists():
            cohort = Cohort.load(name)
        if cohort is not None:
            cohort.save(folder)

    return train_and_save(trainer, last, write_cohort)


def make_parser() -> "TrlParser":
    from trl import ModelConfig, TrlParser

    from ..arguments import FmriLMSFTConfig

    # declared for a type of its own, which dataclasses are not
    return TrlParser((SftArguments, FmriLMSFTConfig, ModelConfig))  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
