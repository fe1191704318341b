"""The scripts in `examples/` run on small data, are short, and are what their notebooks hold."""

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jupytext
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from distributed import LocalCluster

from fmrilm.training.alignment import program as alignment_program
from fmrilm.training.data.prepare import Preparation, prepare
from fmrilm.training.data.scan_sources import find_scans
from small_world import ATLAS, write_parcels


PROGRAM = "fmrilm.training.alignment.program"
EXAMPLES = Path(__file__).parents[1] / "examples"
ACCELERATE = EXAMPLES.parent / "training" / "configs" / "accelerate"
MODEL = "runs/demo/model"
NOTEBOOKS = ("quickstart", "finetune_labels", "forecast")


@pytest.fixture
def run(in_small_world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Runs a script with its arguments in the small world; returns what it prints."""

    def run(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_quickstart_asks_and_reconstructs(run) -> None:
    said = run("quickstart.py", "--model", MODEL, "--scan", "scan.nii.gz")
    assert "low, typical or high?" in said
    assert "32 frames of 94 ROIs: 2 patches of 2 tokens of 3 levels" in said


def test_labels_of_ones_own_are_learned(run) -> None:
    scans = ["--scans", "recordings", "--labels", "labels.csv", "--atlas", ATLAS, "--tr", "0.72"]
    said = run("finetune_labels.py", *scans)
    assert "score sex=" in said and "shuffled" in said and "majority" in said
    assert Path("runs/finetuned/model/model.safetensors").exists()


def test_task_is_asked_beside_baselines(run) -> None:
    prepare(find_scans(Path("recordings"), Path("labels.csv")), Path("prepared"), ATLAS, Preparation(tr=0.72))
    said = run("add_task.py", MODEL, "prepared", str(EXAMPLES / "chronotype.yaml"), "--folds", "2")
    assert "morning / evening" in said
    for condition in ("zero-shot", "fc_ridge", "majority"):
        assert condition in said


def test_atlas_of_ones_own_is_read_and_saved(run) -> None:
    write_parcels(Path("parcels"))
    said = run("add_atlas.py", MODEL, "parcels.nii.gz", "parcels.tsv", "scan.nii.gz", "--output", "knows-it")
    assert "Atlas('parcels', 2 ROIs" in said and "with atlas='parcels': the same codes" in said


def test_codec_works_alone(run) -> None:
    said = run("codec_alone.py", MODEL, "scan.npy", "--tr", "0.72", "--atlas", ATLAS)
    assert "as 6 latent tokens of 3 levels" in said and "levels 1 to 3:" in said
    assert "100 ROIs of schaefer-100-7networks: (1, 100, 48)" in said


def test_cluster_prepares_and_launches_a_training_that_runs(run, monkeypatch: pytest.MonkeyPatch) -> None:
    launched, real = [], subprocess.run

    def record(command, **options):
        return launched.append(command) if command[0] == "accelerate" else real(command, **options)

    monkeypatch.setattr(subprocess, "run", record)
    with LocalCluster(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster:
        said = run(
            "cluster.py", "scans/manifest.csv", "work", "--scheduler", cluster.scheduler_address,
            "--configs", "training/configs/demo", "--accelerate", str(ACCELERATE / "fsdp2.yaml"),
        )  # fmt: skip
    assert "6 prepared, 0 done before, 0 failed" in said and "6 described" in said
    [command] = launched
    assert command[:3] == ["accelerate", "launch", "--config_file"] and command[4:6] == ["-m", PROGRAM]
    assert load_config_from_file(command[3]).distributed_type == "FSDP"
    alignment_program.main(command[6:])
    assert Path("work/alignment/model/model.safetensors").exists()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_holds_the_cells_of_its_script_and_what_they_gave(name: str) -> None:
    script, notebook = (jupytext.read(EXAMPLES / f"{name}{ending}") for ending in (".py", ".ipynb"))
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in script.cells
    ]
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any(cell.outputs for cell in code)
    assert (EXAMPLES / f"{name}.ipynb").stat().st_size < 200_000


def test_notebook_is_run_and_keeps_what_its_cells_print_and_draw(in_small_world: Path) -> None:
    program = runpy.run_path(str(EXAMPLES.parent / "docs" / "notebooks.py"))
    notebook = jupytext.read(EXAMPLES / "forecast.py")
    arguments = sys.argv
    program["run"](notebook, ["--scan", "scan.npy", "--tr", "0.72", "--atlas", ATLAS, "--samples", "2"])
    assert sys.argv is arguments
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output.output_type for output in outputs] == ["stream", "stream", "display_data"]
    assert "forecast 32 s: [frames, rois] (16, 94)" in outputs[0].text and "image/png" in outputs[2].data
    with pytest.raises(SystemExit):
        program["run"](notebook, ["--scan", "scan.npy", "--tr", "0.1"])
