"""The training programs on a tiny corpus: folders to run them on, their command lines, and runs that are killed."""

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fmrilm import FmriCodecModel, training
from fmrilm.processors import FmriLMFeatureExtractor
from fmrilm.training.corpus.describe import CorpusSettings, describe_dataset
from fmrilm.training.corpus.source import load_source
from fmrilm.training.data.prepare import Preparation, prepare
from fmrilm.training.data.scan_sources import find_scans
from helpers import write_study


SUBJECTS = 6
CONFIGS = Path(training.__file__).parent / "configs" / "demo"
SHARED = {
    "max_steps": 8,
    "save_steps": 2,
    "save_total_limit": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "disable_tqdm": "true",
    "use_cpu": "true",
    "bf16": "false",
}
CHATS = {"window_stride": 4, "paragraphs": 1, "mixtures": 4, "lora_r": 2, "lora_dropout": 0.1, "rows": 20}
STAGES = {
    "codec": {
        "window_length": 16,
        "window_stride": 4,
        "mixtures": 4,
        "num_quantizers": 2,
        "num_basis_functions": 6,
        "patch_length": 4,
        "tokens_per_patch": 2,
        "codebook_size": 8,
        "codebook_dim": 4,
        "codebook_groups": 2,
        "max_rois": 10,
        "start_steps": 2,
    },
    "alignment": {**CHATS},
    "sft": {**CHATS, "questions": 2},
}


def make_folders(
    root: Path, codec: FmriCodecModel, language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Path:
    """`prepared`, `corpus`, `codec`, `language_model` and `joint` in `root`."""
    prepare(find_scans(write_study(root, SUBJECTS)), root / "prepared", str(root / "net.tsv"), Preparation())
    settings = CorpusSettings(statements=1, questions=3)
    describe_dataset(load_source(str(root / "prepared")), root / "corpus", settings)
    codec.save_pretrained(root / "codec")
    FmriLMFeatureExtractor(patch_length=4, window_length=16).save_pretrained(root / "codec")
    language_model.save_pretrained(root / "language_model")
    tokenizer.save_pretrained(root / "language_model")
    joint = run("alignment", root, root / "joint_run", max_steps=1, use_peft="false", save_strategy="no")
    (joint / "model").rename(root / "joint")
    return root


def command_line(stage: str, folders: Path, output: Path, **changes) -> list[str]:
    data = {"data": folders / ("prepared" if stage == "codec" else "corpus")}
    if stage == "alignment":
        data |= {"codec": folders / "codec", "model_name_or_path": folders / "language_model"}
    if stage == "sft":
        data["model_name_or_path"] = folders / "joint"
    values = {"config": CONFIGS / f"{stage}.yaml", **SHARED, **STAGES[stage], **data, "output_dir": output, **changes}
    words = []
    for name, value in values.items():
        if value is None:
            continue
        words += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return words


def run(stage: str, folders: Path, output: Path, **changes) -> Path:
    import_module(f"fmrilm.training.{stage}.program").main(command_line(stage, folders, output, **changes))
    return output


def weights(output: Path) -> dict[str, torch.Tensor]:
    """Of the finished model."""
    return load_file(output / "model" / "model.safetensors")


def assert_equal_weights(first: Path, second: Path) -> None:
    expected, got = weights(first), weights(second)
    assert expected.keys() == got.keys()
    assert not [name for name in expected if not torch.equal(expected[name], got[name])]


def in_process(function: Callable[..., object], *arguments) -> multiprocessing.Process:
    """Begins a call in a fork of this process, without another import of everything."""

    def call() -> None:
        # threads of the parent are not there
        torch.set_num_threads(1)
        with open(os.devnull, "w") as silence:
            os.dup2(silence.fileno(), 1)
            os.dup2(silence.fileno(), 2)
        function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=call)
    process.start()
    return process


def run_two(function: Callable[..., object], *arguments, **environment: str) -> None:
    """Calls it in two processes with what `accelerate launch` tells each of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    both = [in_process(as_rank, rank, {**shared, **environment}, function, *arguments) for rank in (0, 1)]
    for process in both:
        process.join(240)
        process.kill()
    assert [process.exitcode for process in both] == [0, 0]


def as_rank(rank: int, environment: dict[str, str], function: Callable[..., object], *arguments) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    function(*arguments)


def wait_for(path: Path, process: multiprocessing.Process, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.is_alive() and time.monotonic() < end, f"no {path.name}"
        time.sleep(0.002)


def checkpoints(output: Path) -> Sequence[Path]:
    return sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
