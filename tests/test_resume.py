"""Training that is killed, or whose disk is full, goes on as if nothing had happened."""

import os
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import DefaultFlowCallback

from fmrilm.training.checkpoints import SEAL, is_whole, last_checkpoint, remove_broken, seal
from program_runs import STAGES, assert_equal_weights, checkpoints, in_process, run, wait_for


@pytest.fixture(scope="module")
def uninterrupted(program_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs of the three stages."""
    root = tmp_path_factory.mktemp("uninterrupted")
    return {stage: run(stage, program_folders, root / stage) for stage in STAGES}


# stage 3 goes on from a checkpoint below
@pytest.mark.parametrize("stage", ["codec", "alignment"])
def test_killed_run_ends_as_an_uninterrupted_one(stage: str, program_folders, uninterrupted, tmp_path) -> None:
    output = tmp_path / "run"
    process = in_process(run_without_end, stage, program_folders, output)
    wait_for(output / "checkpoint-4", process)
    # from the first byte of this checkpoint to somewhere in the next steps
    time.sleep(np.random.default_rng().uniform(0, 0.2))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    run(stage, program_folders, output)
    assert_equal_weights(uninterrupted[stage], output)


def run_without_end(stage: str, folders: Path, output: Path) -> None:
    """After its last step a run waits: however fast it is, it is killed before it ends."""

    def wait(self, args, state, control, **kwargs) -> None:
        signal.pause()

    DefaultFlowCallback.on_train_end = wait
    run(stage, folders, output)


def test_truncated_checkpoint_is_left_out_for_the_one_before(program_folders, uninterrupted, tmp_path, caplog) -> None:
    output = tmp_path / "run"
    shutil.copytree(uninterrupted["sft"], output)
    before, newest = checkpoints(output)
    weights_file = newest / "adapter_model.safetensors"
    os.truncate(weights_file, weights_file.stat().st_size - 1)
    assert is_whole(before) and not is_whole(newest)
    assert last_checkpoint(output) == before
    (warning,) = caplog.records
    assert newest.name in warning.message and "\n" not in warning.message
    shutil.rmtree(output / "model")
    run("sft", program_folders, output)
    assert_equal_weights(uninterrupted["sft"], output)
    assert all(map(is_whole, checkpoints(output)))


def test_full_disk_leaves_the_checkpoint_before_usable(program_folders, uninterrupted, tmp_path) -> None:
    output = tmp_path / "run"
    process = in_process(run_until_full, program_folders, output)
    process.join()
    assert process.exitcode == 1
    first, broken = checkpoints(output)
    assert is_whole(first) and not is_whole(broken)
    run("alignment", program_folders, output)
    assert_equal_weights(uninterrupted["alignment"], output)


def run_until_full(folders: Path, output: Path) -> None:
    """No file can grow beyond what the small ones of a checkpoint need, once the first checkpoint is written."""

    def fill(self, args, state, control, **kwargs) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    DefaultFlowCallback.on_save = fill
    run("alignment", folders, output)


@pytest.mark.parametrize("damage", ["no seal", "half a seal", "a file less"])
def test_checkpoint_without_all_of_its_files_is_not_whole(damage: str, tmp_path) -> None:
    folder = tmp_path / "checkpoint-3"
    (folder / "part").mkdir(parents=True)
    (folder / "weights").write_bytes(b"12345")
    (folder / "part" / "state").write_bytes(b"")
    seal(folder)
    assert is_whole(folder) and last_checkpoint(tmp_path) == folder
    if damage == "a file less":
        (folder / "part" / "state").unlink()
    elif damage == "half a seal":
        os.truncate(folder / SEAL, 7)
    else:
        (folder / SEAL).unlink()
    assert not is_whole(folder) and last_checkpoint(tmp_path) is None
    remove_broken(tmp_path)
    assert not folder.exists()


def test_checkpoints_go_by_their_number(tmp_path) -> None:
    for step in (9, 10, 2):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        seal(folder)
    assert last_checkpoint(tmp_path).name == "checkpoint-10"
    assert last_checkpoint(tmp_path / "nothing") is None
