"""Training that is killed, or whose disk is full, goes on as if nothing had happened."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest

from program_runs import assert_equal_weights, in_process, run, wait_for


@pytest.fixture(scope="module")
def uninterrupted(program_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs of the three stages."""
    root = tmp_path_factory.mktemp("uninterrupted")
    return {stage: run(stage, program_folders, root / stage) for stage in ("codec", "alignment", "sft")}


@pytest.mark.parametrize("stage", ["codec", "alignment", "sft"])
def test_killed_run_ends_as_an_uninterrupted_one(stage: str, program_folders, uninterrupted, tmp_path) -> None:
    output = tmp_path / "run"
    rng = np.random.default_rng()
    for step in (2, 6):
        process = in_process(run, stage, program_folders, output)
        wait_for(output / f"checkpoint-{step}", process)
        # from the first byte of this checkpoint to somewhere in the next steps
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    run(stage, program_folders, output)
    assert_equal_weights(uninterrupted[stage], output)
