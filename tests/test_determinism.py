"""The same seed gives the same weights, losses, codes and words, also where Python hashes names otherwise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fmrilm import load
from program_runs import STAGES, assert_equal_weights, checkpoints, run


def run_all(folders: Path, output: Path) -> None:
    torch.set_num_threads(1)
    for stage in STAGES:
        run(stage, folders, output / stage, max_steps=2)
    reader = load(output / "sft" / "model")
    scan = {"signal": str(folders / "0.npy"), "tr": 2.0, "atlas": "net"}
    said = reader.describe(scan, max_new_tokens=8)
    (output / "read.json").write_text(json.dumps([reader.tokenize(scan).tolist(), said]))


@pytest.fixture(scope="module")
def both(program_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs of the three stages in this process, which has done other things before, and in a new one."""
    here, there = (tmp_path_factory.mktemp(name) for name in ("here", "there"))
    run_all(program_folders, here)
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parent)}
    code = "import sys, pathlib, test_determinism; test_determinism.run_all(*map(pathlib.Path, sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(program_folders), str(there)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [here, there]


@pytest.mark.parametrize("stage", STAGES)
def test_same_seed_gives_the_same_losses_and_weights(stage: str, both: list[Path]) -> None:
    states = [checkpoints(run / stage)[-1] / "trainer_state.json" for run in both]
    logs = [json.loads(state.read_text())["log_history"] for state in states]
    losses = [[line["loss"] for line in log if "loss" in line] for log in logs]
    assert len(losses[0]) == 2 and losses[0] == losses[1]
    assert_equal_weights(*(run / stage for run in both))


def test_same_seed_gives_the_same_codes_and_words(both: list[Path]) -> None:
    (codes, said), other = [json.loads((run / "read.json").read_text()) for run in both]
    assert [codes, said] == other
    assert len({str(token) for token in codes}) > 1 and said
