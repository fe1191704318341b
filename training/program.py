"""What the programs of stages 2 and 3 share: the data, what of a model is trained, and a run to its model folder."""

import ctypes
import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import BitsAndBytesConfig, Trainer, TrainingArguments
from trl import ModelConfig, SFTConfig, get_peft_config, get_quantization_config

from fmrilm.modeling_fmricodec import FmriCodecModel
from fmrilm.modeling_fmrilm import FmriLMForConditionalGeneration
from fmrilm.processors import Atlas, FmriLMFeatureExtractor, FmriLMProcessor
from fmrilm.processors.descriptors.cohort import Cohort
from fmrilm.processors.descriptors.measures import CORE_MEASURES

from .alignment.examples import Examples
from .alignment.joint import add_adapter
from .checkpoints import output_folder
from .data.collator import RowCollator, encode_dataset
from .data.dataset import MixedWindows, Scans, cut_windows, encode_windows, load_scans
from .data.splits import SplitArguments, split_scans
from .hub.model_folder import load_model, write_folder
from .trainer import half_precision


NO_PACKING = (
    "expected rows of one chat each, got packing or padding-free batches: a row's scans are counted by its own "
    "placeholders. Batches of rows of similar length (train_sampling_strategy: group_by_length, the default) waste "
    "little padding"
)
# tokens of a row up to which the plain attention is the faster one on a CPU
SHORT_ROW = 500
BUCKETS_HELP = "group_by_length: rows of similar length in each step; random; or sequential."


@dataclass
class DataArguments(SplitArguments):
    """Which scans are learned from."""

    data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Folders that `fmrilm prepare` wrote, or `fmrilm describe` (a corpus: its texts are learned, too)."
        },
    )
    window_stride: int = field(default=80, metadata={"help": "Frames from one window of a scan to the next."})
    mixtures: int = field(
        default=0, metadata={"help": "Mixtures of windows to learn from beside the windows, where subjects are few."}
    )


@dataclass
class ScanArguments(DataArguments):
    """What is said of the scans."""

    rows: int | None = field(
        default=None, metadata={"help": "Rows to draw; by default one for each window of the training scans."}
    )
    evaluation_rows: int = field(
        default=64, metadata={"help": "Rows about held-out subjects, for the loss on them (eval_strategy)."}
    )
    questions: int = field(default=8, metadata={"help": "Questions in one conversation, at most."})
    statements: int = field(default=8, metadata={"help": "Statements in a description by levels."})
    paragraphs: int | None = field(
        default=2, metadata={"help": "Paragraphs of a corpus' description in a row; null for all of it."}
    )
    code_cache: str | None = field(
        default=None, metadata={"help": "Folder of the scans' codes, for several runs; by default OUTPUT_DIR/codes."}
    )


def check_weights(weights: Sequence[float], kinds: int) -> None:
    """ValueError if `row_weights` are not a share of each kind of rows."""
    if len(weights) != kinds or min(weights) < 0 or abs(sum(weights) - 1) > 1e-8:
        raise ValueError(f"expected row_weights of {kinds} shares whose sum is 1, got {weights}")


@dataclass
class TaskArguments:
    """Which labels are asked about."""

    tasks: list[str] = field(
        default_factory=list,
        metadata={"help": "Tasks that ask about labels: names of packaged ones, or YAML files."},
    )
    columns: list[str] = field(
        default_factory=list,
        metadata={"help": "TASK=COLUMN: columns of the tasks' labels, in place of the tasks' own."},
    )


@dataclass
class AlignmentTrainingArguments(TrainingArguments):
    """TrainingArguments with the defaults of stage 2."""

    train_sampling_strategy: str = field(default="group_by_length", metadata={"help": BUCKETS_HELP})
    bf16: bool | None = field(default=None, metadata={"help": "bfloat16 arithmetic; by default, where it is fast."})

    def __post_init__(self) -> None:
        _fit(self)
        super().__post_init__()
        self._n_gpu = one_device(self)


@dataclass
class FmriLMSFTConfig(SFTConfig):
    """TRL's SFTConfig for rows that the collator prepares: TRL's own preparation knows neither scans nor codes."""

    train_sampling_strategy: str = field(default="group_by_length", metadata={"help": BUCKETS_HELP})

    def __post_init__(self) -> None:
        if self.packing or self.eval_packing or self.padding_free:
            raise ValueError(NO_PACKING)
        # rows are tokenised before, whole: a scan is never cut
        self.max_length = None
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        _fit(self)
        super().__post_init__()
        self._n_gpu = one_device(self)


def one_device(args: TrainingArguments) -> int:
    """
    GPUs of a process, 1 at most: with several, the Trainer would split a batch into equal parts (`DataParallel`), and
    scans and labels of a row do not lie at equal places. `accelerate launch` uses them all.
    """
    return min(args.n_gpu, 1)


def _fit(args: TrainingArguments) -> None:
    # transformers takes bfloat16 on a CPU only where the CPU is asked for
    args.use_cpu = args.use_cpu or not torch.accelerator.is_available()
    # the collator reads columns that no model's signature names
    args.remove_unused_columns = False
    if args.bf16 is None:
        device = None if args.use_cpu else torch.accelerator.current_accelerator()
        args.bf16 = not args.fp16 and half_precision("cpu" if device is None else device.type)


def read_scans(script_args: DataArguments, extractor: FmriLMFeatureExtractor) -> tuple[Scans, Scans]:
    """Training and held-out scans; extractor: that of the codec, which gets to know their atlases and parcels."""
    scans = load_scans(script_args.data, extractor)
    for name, atlas in scans.atlases.items():
        known = next((known for known in extractor.atlases if known["name"] == name), None)
        if known is not None and Atlas.from_dict(known).checksum != atlas.checksum:
            raise ValueError(f"expected the atlas {name!r} that the codec knows, got another one of that name")
        if known is None or "parcels_checksum" not in known:
            # known anew, with the parcels that it lacked
            extractor.atlases = [other for other in extractor.atlases if other is not known]
            extractor.add_atlas(atlas.with_packaged_parcels())
    return split_scans(scans, script_args)


def fit_cohort(scans: Scans, window_length: int, stride: int) -> Cohort:
    """Means and terciles of the core descriptors over the windows of training scans."""
    windows = cut_windows(scans, window_length, stride)
    return Cohort.fit(
        "the model's training subjects",
        CORE_MEASURES,
        windows.descriptors(),
        subjects=len(set(scans.table["subject"])),
        atlases=list(scans.atlases.values()),
    )


def make_examples(
    codec: FmriCodecModel,
    scans: Scans,
    cohort: Cohort,
    window_length: int,
    stride: int,
    cache: Path,
    mixtures: int = 0,
    seed: int = 0,
) -> Examples:
    """Windows of the scans and mixtures of them, encoded once (see [`Examples`]); without scores."""
    windows = cut_windows(scans, window_length, stride)
    encoded = encode_windows(codec, windows, cache)
    descriptors = windows.descriptors()
    # a column that one folder has and another has not
    known = scans.table.astype(object).where(scans.table.notna(), None).to_dict("records")
    # only a corpus numbers its scans; mixtures are of none
    numbers = [number if row.get("scan") is None else row["scan"] for number, row in enumerate(known)]
    rows = [{**known[window.scan], "scan": numbers[window.scan]} for window in windows]
    codes, features, z_scores = list(encoded.codes), encoded.features, cohort.z_scores(descriptors)
    levels = cohort.levels(descriptors)
    if mixtures:
        more = encode_windows(codec, MixedWindows(scans, window_length, cohort, mixtures, seed), cache)
        z_mixed = more.known["descriptors"]
        codes += list(more.codes)
        features = np.concatenate([features, more.features])
        z_scores = np.concatenate([z_scores, z_mixed])
        levels = np.concatenate([levels, cohort.levels(cohort.from_z_scores(z_mixed))])
        rows += [{**dict.fromkeys(known[0]), "subject": subject} for subject in more.known["subject"].tolist()]
    return Examples(codes, features, z_scores, levels, rows, np.zeros((len(codes), 0), np.float32))


def quantization(model_args: ModelConfig) -> BitsAndBytesConfig | None:
    """How the language model's matrices are stored, for QLoRA."""
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
    config.llm_int8_skip_modules = ["codec", "projector", "summary", "start_end_embeddings", "fmri_head", "lm_head"]
    return config


def trainable(
    model: FmriLMForConditionalGeneration | PeftModel,
    model_args: ModelConfig,
    args: TrainingArguments,
    rows: Dataset,
) -> FmriLMForConditionalGeneration | PeftModel:
    """
    The model as it is trained on `rows`: whole, or through a new adapter if `use_peft`, or through the one that it
    has. Its attention is that of `attn_implementation`; by default, in half precision on a CPU, the plain one where
    all rows are short: it is faster there than the library's kernel (`benchmarks/attention.py`).
    """
    attention = model_args.attn_implementation
    if attention is None and args.bf16 and args.use_cpu and max(rows["length"]) <= SHORT_ROW:
        attention = "eager"
    if attention is not None:
        joint: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        joint.model.causal_lm.set_attn_implementation(attention)
    config: Any = get_peft_config(model_args)
    return model if config is None or isinstance(model, PeftModel) else add_adapter(model, config)


def keep_base(
    model: FmriLMForConditionalGeneration | PeftModel, cohort: Cohort, args: TrainingArguments, last: Path | None
) -> None:
    """Writes a model that is nowhere else to `base/` of a run that begins, for the run's adapters to name."""
    folder = output_folder(args) / "base"
    if last is None and args.should_save:

        def write(part: Path) -> None:
            model.save_pretrained(str(part))
            cohort.save(part)

        write_folder(folder, write)
    # a property, which a module's attributes hide
    model.name_or_path = str(folder)  # pyright: ignore[reportArgumentType]


def train_and_save(
    trainer: Trainer,
    last: Path | None,
    write_more: Callable[[Path], None],
    finish: Callable[[Any], None] | None = None,
) -> Path:
    """
    Trains, from the checkpoint `last` if there is one, then writes `model/` there, which the Auto classes
    load: the whole model and its processor. An adapter is also kept as `adapter/`, and merged into what it names.

    write_more: adds to the model's folder. finish: changes the merged model before it is written.
    """
    processor: Any = trainer.processing_class
    output = output_folder(trainer.args)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    is_adapter = isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel)
    trained = output / ("adapter" if is_adapter else ".trained")
    # each process may hold a part of the weights
    trainer.save_model(str(trained))
    trainer.accelerator.wait_for_everyone()
    if trainer.args.world_size == 1:
        # they are on disk: their memory is for the model that is made of them
        for weight in cast(Any, trainer.model).parameters():
            weight.data = weight.data.new_empty(0)
        give_memory_back()
    if trainer.args.should_save:
        model: Any = load_model(str(trained), "auto", merge=True)
        if finish is not None:
            finish(model.to(trainer.args.device).eval())

        def write(folder: Path) -> None:
            model.save_pretrained(str(folder))
            processor.save_pretrained(folder)
            write_more(folder)

        write_folder(output / "model", write)
        if not is_adapter:
            shutil.rmtree(trained)
    trainer.accelerator.wait_for_everyone()
    return output / "model"


def give_memory_back() -> None:
    """glibc keeps what is freed, in which larger blocks find no place: 1.5 GB after the demo's stage 2."""
    if os.name == "posix" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def on_rows(
    script_args: ScanArguments,
    training_args: TrainingArguments,
    processor: FmriLMProcessor,
    training: Examples,
    test: Examples | None,
    draw: Callable[[Examples, int, int], Dataset],
) -> dict[str, Any]:
    """What a Trainer needs beside its model. draw: chats about windows of the examples, so many of them, by a seed."""

    def rows(examples: Examples, count: int, seed: int) -> Dataset:
        return encode_dataset(draw(examples, count, seed), processor)

    return {
        "args": training_args,
        "train_dataset": rows(training, script_args.rows or len(training), training_args.seed),
        "eval_dataset": None if test is None else rows(test, script_args.evaluation_rows, training_args.seed + 1),
        "data_collator": RowCollator(processor.tokenizer.pad_token_id),
        "processing_class": processor,
    }
