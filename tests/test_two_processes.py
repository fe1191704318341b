"""Two processes that train together, with what `accelerate launch` tells each of them."""

from pathlib import Path

import pytest
import torch

from program_runs import run, run_two, weights


# plain updates, so that rounding is not made larger
ONE = {
    "max_steps": 2,
    "save_strategy": "no",
    "per_device_train_batch_size": 4,
    "lora_dropout": 0,
    "optim": "sgd",
    "learning_rate": 0.1,
    "max_grad_norm": 0,
}


@pytest.mark.parametrize("stage", ["alignment", "sft"])
def test_two_processes_train_as_one_on_the_joined_batch(stage: str, program_folders: Path, tmp_path: Path) -> None:
    run(stage, program_folders, tmp_path / "one", **ONE)
    run_two(train, stage, program_folders, tmp_path / "two", {**ONE, "per_device_train_batch_size": 2})
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, expected in one.items():
        assert torch.allclose(expected.float(), two[name].float(), atol=1e-4), name


def train(stage: str, folders: Path, output: Path, changes: dict) -> None:
    run(stage, folders, output, **changes)
