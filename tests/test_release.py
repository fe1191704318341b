"""The release recipe as one command: the programs of all stages, with YAML files of a tiny recipe."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from fmrilm.modeling_fmrilm import FmriLMForConditionalGeneration
from fmrilm.training import release
from fmrilm.training.cli.main import app
from program_runs import SHARED, STAGES


def write_recipe(folder: Path, folders: Path) -> None:
    (folder / "release").mkdir(parents=True)
    words = {"model_name_or_path": str(folders / "language_model")}
    of_stage = {
        "codec": STAGES["codec"],
        "alignment": {**STAGES["alignment"], **words, "rows": 4, "use_peft": True},
        "sft": {**STAGES["sft"], "rows": 4, "use_peft": True, "reading_share": 0.5},
    }
    for stage, values in of_stage.items():
        values = {**SHARED, "max_steps": 1, **values}
        (folder / "release" / f"{stage}.yaml").write_text(yaml.safe_dump(values))


def test_command_trains_every_stage_once_and_asks_about_its_tasks(
    program_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(tmp_path / "configs", program_folders)
    monkeypatch.setattr(release, "CONFIGS", tmp_path / "configs")
    (tmp_path / "splits.csv").write_text("subject,split\ns0,train\ns1,train\ns2,train\ns3,test\n")
    words = ["train", "release", "--data", str(program_folders / "prepared"), "--tasks", "handedness"]
    words += ["--output_dir", str(tmp_path / "out"), "--splits", str(tmp_path / "splits.csv")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    stages = ["codec", "alignment", "sft"]
    written = [(tmp_path / "out" / stage / "model" / "config.json").stat().st_mtime_ns for stage in stages]
    assert written == sorted(written)
    model = FmriLMForConditionalGeneration.from_pretrained(tmp_path / "out" / "sft" / "model")
    assert any(name.startswith("handedness=") for name in model.config.score_names)
    # the stages after the codec share their codes
    assert len(list((tmp_path / "out" / "codes").iterdir())) == 2
    assert "other settings, seed" in CliRunner().invoke(app, [*words, "--seed", "1"]).output
    assert CliRunner().invoke(app, words).exit_code == 0
    assert written == [(tmp_path / "out" / stage / "model" / "config.json").stat().st_mtime_ns for stage in stages]


@pytest.mark.parametrize("missing", ["data", "tasks"])
def test_a_recipe_without_data_or_tasks_is_refused(missing: str, tmp_path: Path) -> None:
    values = {"data": ["prepared"], "tasks": ["sex"], missing: []}
    with pytest.raises(ValueError, match=f"expected --{missing}"):
        release.ReleaseArguments(**values, output_dir=str(tmp_path))
