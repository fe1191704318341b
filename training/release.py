"""
The release recipe: codec, alignment and instruction tuning for hundreds of subjects with labels.

```bash
fmrilm train release \\
    --data prepared-abide prepared-song \\
    --tasks asd sex age age_group state \\
    --columns asd=diagnosis \\
    --output_dir runs/release
```

Each stage is a program of its own with a YAML file of `configs/release/`. The same command goes on where it was
stopped. `OUTPUT_DIR/sft/model` is the model of the last one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from .data.shards import keep_settings
from .data.splits import SplitArguments
from .program import TaskArguments, give_memory_back


CONFIGS = Path(__file__).parent / "configs"


@dataclass
class ReleaseArguments(TaskArguments, SplitArguments):
    """What is learned, of whom."""

    data: list[str] = field(default_factory=list, metadata={"help": "Folders that `fmrilm prepare` wrote."})
    output_dir: str = field(default="runs/release", metadata={"help": "Folder of the stages."})
    seed: int = field(default=42, metadata={"help": "Of each stage."})

    def __post_init__(self) -> None:
        for name in ("data", "tasks"):
            if not getattr(self, name):
                raise ValueError(f"expected --{name} with one or more, got none")


def train_stage(recipe: str, stage: str, output: Path, *options: str) -> Path:
    """
    Runs a stage's program with `configs/RECIPE/STAGE.yaml`, and options that go before those of the file, unless it
    has finished before. Returns the folder of its model.
    """
    model = output / "model"
    if not model.exists():
        config = str(CONFIGS / recipe / f"{stage}.yaml")
        main = import_module(f"{__package__}.{stage}.program").main
        main(["--config", config, "--output_dir", str(output), *options])
        give_memory_back()
    return model


def train_release(args: ReleaseArguments) -> Path:
    """Returns the model folder of the last stage. ValueError if `output_dir` is of a run with other arguments."""
    output = Path(args.output_dir)
    settings = {name: value for name, value in args.describe().items() if name != "output_dir"}
    keep_settings(output / "settings.json", settings)
    shared = _words(data=args.data, seed=[str(args.seed)], held_out_share=[str(args.held_out_share)])
    shared += _words(**{name: [value] for name in ("splits", "leave_out") if (value := getattr(args, name))})
    # the stages after the codec learn from the same codes
    codes = _words(code_cache=[str(output / "codes")])
    asked = _words(tasks=args.tasks, columns=args.columns)
    codec = train_stage("release", "codec", output / "codec", *shared)
    before = _words(codec=[str(codec)])
    model = train_stage("release", "alignment", output / "alignment", *shared, *codes, *before)
    before = _words(model_name_or_path=[str(model)])
    return train_stage("release", "sft", output / "sft", *shared, *codes, *before, *asked)


def main(command_line: list[str] | None = None) -> Path:
    from transformers import HfArgumentParser

    # declared for a type of its own, which dataclasses are not
    parser = HfArgumentParser(ReleaseArguments)  # pyright: ignore[reportArgumentType]
    return train_release(*parser.parse_args_into_dataclasses(command_line))


def _words(**values: Sequence[str]) -> list[str]:
    """Of a command line; an option without a value is left out."""
    return [word for name, each in values.items() if each for word in (f"--{name}", *each)]


if __name__ == "__main__":
    main()
