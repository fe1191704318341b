"""What the programs of stages 2 and 3 share: the data, what of a model is trained, and a run to its model folder."""

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data.held_out import HELD_OUT_SHARE


if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import BitsAndBytesConfig, Trainer, TrainingArguments
    from trl import ModelConfig

    from fmrilm.modeling_fmricodec import FmriCodecModel
    from fmrilm.modeling_fmrilm import FmriLMForConditionalGeneration
    from fmrilm.processors import FmriLMFeatureExtractor, FmriLMProcessor

    from .corpus.scans import Scans
    from .data.scan_windows import EncodedScans


@dataclass
class ScanArguments:
    """Which scans are learned from."""

    corpus: str | None = field(
        default=None,
        metadata={"help": "Folder that `fmrilm describe` wrote: scans with texts and labels, split by subject."},
    )
    data: str | None = field(
        default=None,
        metadata={
            "help": "Folder that `fmrilm prepare` wrote: scans and labels where there is no corpus; beside one, the "
            "atlases that are not packaged."
        },
    )
    held_out_share: float = field(
        default=HELD_OUT_SHARE,
        metadata={"help": "Share of the subjects that no row is about, where there is no corpus."},
    )
    window_stride: int = field(default=80, metadata={"help": "Frames from one window of a scan to the next."})
    rows: int | None = field(
        default=None, metadata={"help": "Rows to draw; by default one for each window of the training scans."}
    )
    evaluation_rows: int = field(
        default=64, metadata={"help": "Rows about held-out subjects, for the loss on them (eval_strategy)."}
    )
    paragraphs: int | None = field(
        default=2, metadata={"help": "Paragraphs of a description in a row; null for all of it."}
    )
    code_cache: str | None = field(
        default=None, metadata={"help": "Folder of the scans' codes, for several runs; by default OUTPUT_DIR/codes."}
    )


def begin(script_args: ScanArguments, training_args: "TrainingArguments") -> tuple["Scans", Path | None]:
    """The scans, and the checkpoint to go on from if there is one; seeds what is drawn from now on."""
    from transformers import set_seed

    from .checkpoints import last_checkpoint, output_folder
    from .corpus.scans import load_scans

    set_seed(training_args.seed)
    scans = load_scans(script_args.data, script_args.corpus, script_args.held_out_share)
    return scans, last_checkpoint(output_folder(training_args))


def quantization(model_args: "ModelConfig") -> "BitsAndBytesConfig | None":
    """How the language model's matrices are stored, for QLoRA."""
    from trl import get_quantization_config

    if not (model_args.load_in_4bit or model_args.load_in_8bit):
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "load_in_4bit and load_in_8bit (QLoRA) need bitsandbytes, which is not installed: pip install bitsandbytes"
        )
    if not model_args.use_peft:
        raise ValueError("expected use_peft with load_in_4bit or load_in_8bit: stored like that, weights do not learn")
    config: Any = get_quantization_config(model_args)
    # what a scan passes through is small, and is trained whole
    config.llm_int8_skip_modules = [
        "codec",
        "projector",
        "descriptors",
        "boundaries",
        "fmri_head",
        "fmri_autoregression",
        "lm_head",
    ]
    return config


def trainable(
    model: "FmriLMForConditionalGeneration | PeftModel", model_args: "ModelConfig"
) -> "FmriLMForConditionalGeneration | PeftModel":
    """The model as it is trained: whole, or through a new adapter if `use_peft`, or through the one that it has."""
    from peft import PeftModel
    from trl import get_peft_config

    from .alignment.joint import add_adapter

    config: Any = get_peft_config(model_args)
    return model if config is None or isinstance(model, PeftModel) else add_adapter(model, config)


def keep_base(
    model: "FmriLMForConditionalGeneration | PeftModel", args: "TrainingArguments", last: Path | None
) -> None:
    """Writes a model that is nowhere else to `base/` of a run that begins, for the run's adapters to name."""
    from .checkpoints import output_folder
    from .hub.model_folder import write_folder

    folder = output_folder(args) / "base"
    if last is None and args.should_save:
        write_folder(folder, lambda part: model.save_pretrained(str(part)))
    # a property, which a module's attributes hide
    model.name_or_path = str(folder)  # pyright: ignore[reportArgumentType]


def train_and_save(trainer: "Trainer", last: Path | None, write_more: Callable[[Path], None]) -> Path:
    """
    Trains, from the checkpoint `last` if there is one, then writes `model/` there, which the Auto classes
    load: the whole model and its processor. An adapter is also kept as `adapter/`, and merged into what it names.

    write_more: adds to the model's folder.
    """
    from peft import PeftModel

    from .checkpoints import output_folder
    from .hub.model_folder import load_model, write_folder

    processor: Any = trainer.processing_class
    output = output_folder(trainer.args)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    is_adapter = isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel)
    trained = output / ("adapter" if is_adapter else ".trained")
    # each process may hold a part of the weights
    trainer.save_model(str(trained))
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        model = load_model(str(trained), "auto", merge=True)

        def write(folder: Path) -> None:
            model.save_pretrained(str(folder))
            processor.save_pretrained(folder)
            write_more(folder)

        write_folder(output / "model", write)
        if not is_adapter:
            shutil.rmtree(trained)
    trainer.accelerator.wait_for_everyone()
    return output / "model"


def encode_both(
    script_args: ScanArguments,
    training_args: "TrainingArguments",
    codec: "FmriCodecModel",
    scans: "Scans",
    extractor: "FmriLMFeatureExtractor",
) -> tuple["EncodedScans", "EncodedScans | None"]:
    """Codes of the training scans and, if there are any and the loss on them is asked for, of the test scans."""
    from .checkpoints import output_folder
    from .data.scan_windows import encode_scans

    cache = Path(script_args.code_cache or output_folder(training_args) / "codes")

    def encode(parts: list["Dataset"]) -> "EncodedScans":
        return encode_scans(codec, parts, scans.atlases, extractor, script_args.window_stride, cache)

    # the others read what the first process has put into the cache
    with training_args.main_process_first(desc="codes"):
        training = encode(scans.training)
        wanted = scans.test and training_args.eval_strategy != "no" and script_args.evaluation_rows
        return training, encode(scans.test) if wanted else None


def on_rows(
    script_args: ScanArguments,
    training_args: "TrainingArguments",
    processor: "FmriLMProcessor",
    training: "EncodedScans",
    test: "EncodedScans | None",
    draw: "Callable[[EncodedScans, int, int], Dataset]",
) -> dict[str, Any]:
    """
    What a Trainer needs beside its model. draw: chats about windows of the scans, so many of them, by a seed.
    """
    from .data.collator import RowCollator, encode_dataset

    def rows(scans: "EncodedScans", count: int, seed: int) -> "Dataset":
        return encode_dataset(draw(scans, count, seed), processor)

    return {
        "args": training_args,
        "train_dataset": rows(training, script_args.rows or len(training.windows), training_args.seed),
        "eval_dataset": None if test is None else rows(test, script_args.evaluation_rows, training_args.seed + 1),
        "data_collator": RowCollator(processor.tokenizer.pad_token_id),
        "processing_class": processor,
    }
