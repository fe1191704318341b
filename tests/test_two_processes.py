"""Two processes that train together, with what `accelerate launch` tells each of them."""

from pathlib import Path

import pytest
import torch

from program_runs import run, run_two, weights


ONE = {"max_steps": 4, "save_strategy": "no", "per_device_train_batch_size": 4}
# plain steps, so that rounding is not made larger
STAGES = {
    "codec": {**ONE, "learning_rate": 1e-3},
    "sft": {**ONE, "lora_dropout": 0, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0},
}


def train(stage: str, folders: Path, output: Path, changes: dict) -> None:
    run(stage, folders, output, **changes)


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_as_one_on_the_joined_batch(stage: str, program_folders: Path, tmp_path: Path) -> None:
    train(stage, program_folders, tmp_path / "one", STAGES[stage])
    run_two(train, stage, program_folders, tmp_path / "two", {**STAGES[stage], "per_device_train_batch_size": 2})
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    # Muon's own arithmetic is in bfloat16
    tolerance = 1e-3 if stage == "codec" else 1e-4
    for name, expected in one.items():
        assert torch.allclose(expected.float(), two[name].float(), atol=tolerance), name
