"""Training arguments of stages 2 and 3: those of the libraries, with the values that scans in a chat need."""

from dataclasses import dataclass, field

from transformers import TrainingArguments
from trl import SFTConfig


BUCKETS_HELP = "group_by_length: rows of similar length in each step; random; or sequential."
NO_PACKING = (
    "expected rows of one chat each, got packing or padding-free batches: several chats in one row would share the "
    "positions and the attention of their scans' steps, so that a chat reads another one's scan. Batches of rows of "
    "similar length (train_sampling_strategy: group_by_length, the default) waste little padding"
)


@dataclass
class AlignmentTrainingArguments(TrainingArguments):
    """TrainingArguments with the defaults of stage 2."""

    train_sampling_strategy: str = field(default="group_by_length", metadata={"help": BUCKETS_HELP})
    bf16: bool | None = field(default=None, metadata={"help": "bfloat16 arithmetic; by default, where it is fast."})

    def __post_init__(self) -> None:
        _fit(self)
        super().__post_init__()


@dataclass
class FmriLMSFTConfig(SFTConfig):
    """TRL's SFTConfig for rows that the collator prepares: TRL's own preparation knows neither scans nor codes."""

    train_sampling_strategy: str = field(default="group_by_length", metadata={"help": BUCKETS_HELP})

    def __post_init__(self) -> None:
        if self.packing or self.eval_packing or self.padding_free:
            raise ValueError(NO_PACKING)
        self.max_length = None
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        _fit(self)
        super().__post_init__()


def _fit(args: TrainingArguments) -> None:
    import torch

    from .trainer import half_precision

    # transformers takes bfloat16 on a CPU only where the CPU is asked for
    args.use_cpu = args.use_cpu or not torch.accelerator.is_available()
    # the collators read columns that no model's signature names
    args.remove_unused_columns = False
    if args.bf16 is None:
        args.bf16 = not args.fp16 and half_precision()
