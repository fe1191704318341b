"""The training programs on a tiny corpus: folders to run them on, their command lines, and runs that are killed."""

import csv
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typer.testing import CliRunner

from fmrilm import FmriCodecModel
from fmrilm.training.alignment import program as alignment_program
from fmrilm.training.cli.main import app
from fmrilm.training.codec import program as codec_program
from fmrilm.training.corpus.describe import CorpusSettings, describe_dataset
from fmrilm.training.corpus.source import load_source
from fmrilm.training.sft import program as sft_program
from helpers import atlas, prepared


PEOPLE, ROIS, FRAMES = 6, 24, 60
PROGRAMS = {"codec": codec_program.main, "alignment": alignment_program.main, "sft": sft_program.main}
SHARED = {
    "max_steps": 8,
    "save_steps": 2,
    "save_total_limit": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": "true",
    "use_cpu": "true",
    "bf16": "false",
}
CHATS = {"window_stride": 4, "paragraphs": 1, "use_peft": "true", "lora_r": 2, "lora_dropout": 0.1, "rows": 20}
STAGES = {
    "codec": {
        "window_length": 16,
        "patch_length": 4,
        "tokens_per_step": 2,
        "codebook_size": 8,
        "codebook_dim": 4,
        "max_rois": 10,
        "start_steps": 2,
        "held_out_share": 0.34,
    },
    "alignment": {**CHATS, "window_length": 16, "projector_steps": 2, "autoregression_steps": 2},
    "sft": {**CHATS, "questions": 2, "gradient_checkpointing": "false"},
}


def make_folders(
    root: Path, codec: FmriCodecModel, language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Path:
    """`prepared`, `corpus`, `codec`, `language_model` and `joint` in `root`."""
    of = atlas("net", ROIS)
    with open(root / "net.tsv", "w", newline="") as handle:
        writer = csv.writer(handle, delimiter="\t")
        writer.writerow(["index", "name", "hemisphere", "network", "x", "y", "z"])
        for label, (name, network, place) in enumerate(zip(of.rois, of.networks, of.coordinates, strict=True), 1):
            writer.writerow([label, name, "L", network, *place.tolist()])
    with open(root / "manifest.csv", "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["path", "subject", "tr", "handedness"])
        for person in range(PEOPLE):
            np.save(root / f"{person}.npy", prepared(f"p{person}", frames=FRAMES, of=of).signal)
            writer.writerow([f"{person}.npy", f"p{person}", 2.0, "left" if person % 3 == 1 else "right"])
    arguments = ["prepare", root / "manifest.csv", root / "prepared", "--atlas", root / "net.tsv"]
    assert CliRunner().invoke(app, [str(argument) for argument in arguments]).exit_code == 0
    settings = CorpusSettings(test_share=0.34, statements=1, questions=3)
    describe_dataset(load_source(str(root / "prepared")), root / "corpus", settings)
    codec.save_pretrained(root / "codec")
    language_model.save_pretrained(root / "language_model")
    tokenizer.save_pretrained(root / "language_model")
    joint = run("alignment", root, root / "joint_run", max_steps=1, use_peft="false", save_strategy="no")
    (joint / "model").rename(root / "joint")
    return root


def command_line(stage: str, folders: Path, output: Path, **changes) -> list[str]:
    data = {"data": folders / "prepared"}
    if stage != "codec":
        data["corpus"] = folders / "corpus"
    if stage == "alignment":
        data |= {"codec": folders / "codec", "model_name_or_path": folders / "language_model"}
    if stage == "sft":
        data["model_name_or_path"] = folders / "joint"
    values = {**SHARED, **STAGES[stage], **data, "output_dir": output, **changes}
    words = []
    for name, value in values.items():
        if value is None:
            continue
        words += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return words


def run(stage: str, folders: Path, output: Path, **changes) -> Path:
    PROGRAMS[stage](command_line(stage, folders, output, **changes))
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
