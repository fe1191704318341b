"""The same seed gives the same weights, losses, codes and words, also where Python hashes names otherwise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from program_runs import STAGES, assert_equal_weights, checkpoints


SCRIPT = """
import json
import sys
from pathlib import Path

import torch

from fmrilm import load
from program_runs import STAGES, run

torch.set_num_threads(1)
folders, output = map(Path, sys.argv[1:])
for stage in STAGES:
    run(stage, folders, output / stage, max_steps=2)
reader = load(output / "sft" / "model")
scan = {"signal": str(folders / "0.npy"), "tr": 2.0, "atlas": "net"}
said = reader.describe(scan, max_new_tokens=8)
(output / "read.json").write_text(json.dumps([reader.tokenize(scan).tolist(), said]))
"""


@pytest.fixture(scope="module")
def both(program_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of the three stages, each in a new process."""
    runs = [tmp_path_factory.mktemp(f"hashed-{seed}") for seed in (1, 2)]
    for seed, output in enumerate(runs, 1):
        environment = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, "-c", SCRIPT, str(program_folders), str(output)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return runs


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
