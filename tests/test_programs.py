"""The programs of stages 2 and 3: what they train, leave behind and refuse; the demo's recipe is theirs."""

import json
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM, AutoProcessor, Trainer
from trl import ModelConfig, TrlParser
from typer.testing import CliRunner

from fmrilm import Atlas, FmriCodecConfig, FmriLMFeatureExtractor, load
from fmrilm.processors.descriptors.cohort import LEVELS, Cohort
from fmrilm.processors.descriptors.measures import CORE_NAMES
from fmrilm.processors.descriptors.text import question
from fmrilm.training import program as programs
from fmrilm.training.alignment import program as alignment
from fmrilm.training.cli.main import app
from fmrilm.training.codec.program import CodecArguments
from fmrilm.training.codec.trainer import CodecTrainingArguments
from fmrilm.training.corpus.describe import CorpusSettings, describe_dataset
from fmrilm.training.corpus.source import load_source
from fmrilm.training.data.collator import RowCollator, encode_dataset
from fmrilm.training.data.prepare import Preparation, prepare
from fmrilm.training.data.scan_sources import find_scans
from fmrilm.training.data.tasks import load_task
from fmrilm.training.program import SHORT_ROW, AlignmentTrainingArguments, ScanArguments, read_scans, trainable
from fmrilm.training.release import train_stage
from fmrilm.training.sft import program as sft
from helpers import atlas, chats, in_a_row, labels_in_a_row, noise, write_table
from program_runs import CONFIGS, assert_equal_weights, checkpoints, run, weights


RUNS = ["alignment", "further", "anew"]


@pytest.fixture(scope="module")
def runs(program_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 2 through LoRA, and on top of it stage 3: going on with its adapter, and through a new one with labels."""
    root = tmp_path_factory.mktemp("runs")
    short = {"max_steps": 2, "save_steps": 1}
    run("alignment", program_folders, root / "alignment", **short)
    adapter = {"model_name_or_path": root / "alignment" / "adapter", "activation_checkpointing": "true"}
    run("sft", program_folders, root / "further", **adapter, **short)
    merged = {"model_name_or_path": root / "alignment" / "adapter", "merge_adapter": "true", "lora_r": 3}
    labels = {"tasks": "handedness", "reading_share": 0.5}
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "evaluation_rows": 4}
    run("sft", program_folders, root / "anew", **short, **merged, **labels, **evaluated)
    return root


def rows_of(processor, model, count: int = 2) -> dict[str, torch.Tensor]:
    """Model inputs of chats about made-up codes, with scores that the model itself reads."""
    rows = encode_dataset(chats(count), processor)
    inputs = RowCollator(processor.tokenizer.pad_token_id)(list(rows))
    inputs["fmri_scores"] = model.model.get_fmri_scores(inputs["fmri_codes"])
    return {name: value for name, value in inputs.items() if name != "labels"}


@pytest.mark.parametrize("name", RUNS)
def test_finished_folder_and_checkpoints_open_by_the_auto_classes(name: str, runs: Path) -> None:
    model = AutoModelForMultimodalLM.from_pretrained(runs / name / "model").eval()
    processor = AutoProcessor.from_pretrained(runs / name / "model")
    assert not [key for key in model.state_dict() if "lora" in key]
    inputs = rows_of(processor, model)
    last = checkpoints(runs / name)[-1]
    adapted = AutoModelForMultimodalLM.from_pretrained(last).eval()
    assert [key for key in adapted.state_dict() if "lora" in key]
    assert torch.allclose(adapted(**inputs).logits, model(**inputs).logits, atol=1e-4)
    # scores that the folder's model reads are those that it was trained with
    inputs.pop("fmri_scores")
    assert torch.allclose(adapted(**inputs).logits, model(**inputs).logits, atol=1e-4)
    restored = AutoProcessor.from_pretrained(last)
    assert restored.tokens_per_patch == processor.tokens_per_patch == 2
    assert restored.summary_tokens == processor.summary_tokens == model.config.num_summary_tokens
    assert Cohort.load(runs / name / "model").subjects == 4
    assert json.loads((runs / name / "model" / "held_out.json").read_text()) == {"held_out_share": 0.2}


@pytest.mark.parametrize("name", RUNS)
def test_folders_hold_no_pickle_no_path_and_no_subject(name: str, runs: Path, program_folders: Path) -> None:
    assert not list((runs / name).rglob("training_args.bin"))
    for path in (runs / name / "model").iterdir():
        content = path.read_bytes()
        assert str(runs).encode() not in content and str(program_folders).encode() not in content, path.name
        assert not [subject for subject in range(6) if f'"s{subject}"'.encode() in content], path.name


def test_adapter_goes_on_or_is_merged_first(runs: Path) -> None:
    configs = {name: json.loads((runs / name / "adapter" / "adapter_config.json").read_text()) for name in RUNS}
    assert {name: config["r"] for name, config in configs.items()} == {"alignment": 2, "further": 2, "anew": 3}
    bases = {name: config["base_model_name_or_path"] for name, config in configs.items()}
    assert bases["alignment"] == bases["further"] == str(runs / "alignment" / "base")
    assert bases["anew"] == str(runs / "anew" / "base")
    # what the merged adapter had learned is in the new one's base
    merged, base = weights(runs / "alignment"), load_file(runs / "anew" / "base" / "model.safetensors")
    assert all(torch.equal(merged[name], base[name]) for name in merged if "summary" not in name)
    learned = {name for name, value in weights(runs / "anew").items() if not torch.equal(value, base[name])}
    assert learned and not [name for name in learned if ".codec." in name or ".readout." in name]


def test_new_tasks_widen_the_scores_and_keep_the_old_ones(runs: Path) -> None:
    before, after = (AutoModelForMultimodalLM.from_pretrained(runs / name / "model") for name in ("alignment", "anew"))
    old, new = before.config.score_names, after.config.score_names
    assert new == [*old, *(f"handedness={word}" for word in ("left", "right", "both"))]
    codes = torch.randint(16, (5, 8, 3), generator=torch.Generator().manual_seed(0))
    first, second = before.model.get_fmri_scores(codes), after.model.get_fmri_scores(codes)
    # fitted again on the same windows
    assert torch.allclose(first, second[:, : len(old)], atol=1e-4) and second[:, len(old)].std() > 0
    assert (after.model.summary.embeddings.weight[len(old) :].norm(dim=1) > 0).all()


def test_model_folder_reads_scans_of_its_atlas(runs: Path, program_folders: Path) -> None:
    scan = {"signal": np.load(program_folders / "0.npy"), "tr": 2.0, "atlas": "net"}
    for name in ("alignment", "anew"):
        assert isinstance(load(runs / name / "model").describe(scan, max_new_tokens=4), str)


def trained(data: Path, extractor: FmriLMFeatureExtractor) -> FmriLMFeatureExtractor:
    """The extractor as it is saved after a training on the data."""
    read_scans(ScanArguments(data=[str(data)], held_out_share=0), extractor)
    extractor.save_pretrained(data.with_name("model"))
    return FmriLMFeatureExtractor.from_pretrained(data.with_name("model"))


@pytest.mark.parametrize("data", ["prepared", "corpus"])
@pytest.mark.parametrize("known", [False, True])
def test_models_learn_the_parcels_of_a_label_image(data: str, known: bool, tmp_path: Path) -> None:
    write_table(tmp_path / "own.tsv", atlas("own", 3))
    nib.save(labels_in_a_row(3), tmp_path / "labels.nii")
    (tmp_path / "scans").mkdir()
    for number in range(3):
        nib.save(in_a_row(noise(f"s{number}", 40, 3)), tmp_path / "scans" / f"s{number}.nii")
    preparation = Preparation(label_image=tmp_path / "labels.nii")
    prepare(find_scans(tmp_path / "scans"), tmp_path / "prepared", str(tmp_path / "own.tsv"), preparation)
    if data == "corpus":
        describe_dataset(load_source(str(tmp_path / "prepared")), tmp_path / "corpus", CorpusSettings(questions=0))
    # the codec may have learned from tables of ROIs
    extractor = FmriLMFeatureExtractor([Atlas.from_table(tmp_path / "own.tsv")] if known else [])
    found = trained(tmp_path / data, extractor).read_signal(tmp_path / "scans" / "s1.nii")
    np.testing.assert_allclose(found.signal, noise("s1", 40, 3), atol=1e-5)


def test_another_atlas_of_a_known_name_is_refused(program_folders: Path) -> None:
    with pytest.raises(ValueError, match="expected the atlas 'net' that the codec knows, got another one"):
        read_scans(ScanArguments(data=[str(program_folders / "prepared")]), FmriLMFeatureExtractor([atlas("net", 5)]))


def test_full_tuning_changes_all_but_what_is_fitted_before(program_folders: Path, tmp_path: Path) -> None:
    run("sft", program_folders, tmp_path, max_steps=2, use_peft="false", save_strategy="no")
    before, after = load_file(program_folders / "joint" / "model.safetensors").items(), weights(tmp_path)
    unchanged = {name for name, value in before if torch.equal(value, after[name])}
    # the head of the next codes has no part in TRL's loss
    fitted = (".codec.", ".readout.", ".dynamics.", ".fmri_head.")
    assert unchanged == {name for name in after if any(part in name for part in fitted)}
    assert not (tmp_path / "adapter").exists() and not list(tmp_path.glob(".*"))


# --- who is held out


def scans_of(stage: str, folders: Path, output: Path, **changes) -> tuple[set[str], set[str]]:
    """Training and test subjects of a program."""
    found, split_scans = [], programs.split_scans

    def split(*arguments):
        found.extend(set(scans.table["subject"]) for scans in split_scans(*arguments))
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "split_scans", split)
        with pytest.raises(InterruptedError):
            run(stage, folders, output, **changes)
    return found[0], found[1]


@pytest.mark.parametrize("stage", ["codec", "alignment", "sft"])
def test_programs_hold_out_the_same_subjects(stage: str, program_folders: Path, tmp_path: Path) -> None:
    by_hash = scans_of(stage, program_folders, tmp_path)
    assert by_hash == ({"s0", "s1", "s4", "s5"}, {"s2", "s3"})
    (tmp_path / "splits.csv").write_text("subject,split\ns0,test\ns3,train\ns5,train\n")
    by_table = scans_of(stage, program_folders, tmp_path, splits=tmp_path / "splits.csv")
    assert by_table == ({"s3", "s5"}, {"s0"})
    by_site = scans_of(stage, program_folders, tmp_path, leave_out="site=B")
    assert by_site == ({"s0", "s2", "s4"}, {"s1", "s3", "s5"})


# --- one recipe


def test_calls_of_the_demo_do_what_the_command_does(program_folders: Path, tmp_path: Path, monkeypatch) -> None:
    """Rows, losses and weights: the demo's own arguments, and `fmrilm train` with the same YAML."""
    tiny = [
        *("--max_steps", "2", "--mixtures", "4", "--rows", "8", "--window_stride", "20"),
        *("--use_cpu", "true", "--disable_tqdm", "true", "--save_strategy", "no", "--logging_steps", "1"),
    ]
    data = ["--data", str(program_folders / "corpus"), "--model_name_or_path", str(program_folders / "joint")]
    trainers, train = [], Trainer.train

    def keep(self, *arguments, **options):
        trainers.append(self)
        return train(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "train", keep)
    train_stage("demo", "sft", tmp_path / "demo", *data, *tiny)
    words = ["train", "sft", "--config", str(CONFIGS / "sft.yaml"), "--output_dir", str(tmp_path / "command")]
    result = CliRunner().invoke(app, [*words, *data, *tiny])
    assert result.exit_code == 0, result.output
    of_demo, of_command = trainers
    assert of_demo.train_dataset.to_list() == of_command.train_dataset.to_list()
    losses = [[line["loss"] for line in trainer.state.log_history if "loss" in line] for trainer in trainers]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert_equal_weights(tmp_path / "demo", tmp_path / "command")


# --- what is refused


@pytest.mark.parametrize("option", ["packing", "eval_packing", "padding_free"])
def test_packing_is_refused_with_the_reason(option: str, program_folders: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected rows of one chat each, got packing"):
        run("sft", program_folders, tmp_path, **{option: "true"})


@pytest.mark.parametrize(
    ("stage", "changes", "reason"),
    [
        ("alignment", {"load_in_4bit": "true"}, "QLoRA is for stage 3"),
        ("alignment", {"codec": None}, "expected codec, a folder or Hub id of a trained one, got none"),
        ("alignment", {"data": None}, "expected a folder that `fmrilm prepare`"),
        ("alignment", {"leave_out": "site=C"}, "expected a value of 'site' out of A, B, got 'C'"),
        ("alignment", {"leave_out": "frames=60"}, "expected subjects to learn from, got 6 subjects, none in training"),
        ("alignment", {"leave_out": "site=A", "splits": "table.csv"}, "expected splits or leave_out, got both"),
        ("alignment", {"row_weights": [0.5, 0.5]}, "expected row_weights of 4 shares whose sum is 1"),
        ("sft", {"row_weights": [0.5, 0.4, 0.2]}, "expected row_weights of 3 shares whose sum is 1"),
        ("sft", {"lora_target_modules": "all-linear"}, "alone, got .* layers elsewhere"),
        ("sft", {"data": "no such folder"}, "no prepared scans in no such folder"),
        ("sft", {"tasks": "shoe_size"}, "handedness"),
        ("sft", {"tasks": "sex"}, "no column 'sex'"),
        ("sft", {"tasks": "handedness", "columns": "handedness=hand"}, "no column 'hand'"),
        ("sft", {"reading_share": 0.7, "text_share": 0.5}, "together at most 1"),
        ("sft", {"reading_share": 0.5, "reading_descriptors": 0}, "expected tasks or reading_descriptors"),
        ("sft", {"model_name_or_path": None}, "expected model_name_or_path"),
    ],
)
def test_bad_options_are_refused(stage: str, changes: dict, reason: str, program_folders, tmp_path) -> None:
    with pytest.raises(ValueError, match=reason):
        run(stage, program_folders, tmp_path, **changes)


def test_model_that_a_run_starts_from_is_not_replaced(program_folders: Path, tmp_path: Path) -> None:
    shutil.copytree(program_folders / "joint", tmp_path / "model")
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "model").iterdir())
    with pytest.raises(ValueError, match="expected another output_dir than that of a model to start from"):
        run("sft", program_folders, tmp_path, model_name_or_path=tmp_path / "model")
    with pytest.raises(ValueError, match="expected another output_dir"):
        run("alignment", program_folders, program_folders, codec=program_folders / "codec")
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "model").iterdir()) == before


def test_two_tasks_of_one_title_are_refused(program_folders: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("name: own\ncolumn: x\ntitle: handedness\nquestions: [Which]\nchoices: [a, b]\n")
    with pytest.raises(ValueError, match="expected tasks with a title each, got handedness for 2 tasks"):
        run("sft", program_folders, tmp_path / "run", tasks=["handedness", own])


def test_reading_rows_leave_calibrations_of_descriptors_and_tasks(runs: Path) -> None:
    plain, tuned = (AutoModelForMultimodalLM.from_pretrained(runs / name / "model") for name in ("further", "anew"))
    task = load_task("handedness")
    of_descriptors, known = tuned.config.calibrations
    assert len(plain.config.calibrations) == 1 and known["questions"] == list(task.questions)
    for each in (of_descriptors, *plain.config.calibrations):
        assert each["biases"].keys() == set(LEVELS) and question(CORE_NAMES[-1], 1) in each["questions"]
    assert known["slope"] > 0 and known["biases"].keys() == set(task.choice_words)
    scores = torch.randn(len(task.choice_words))
    changed = tuned.answer_probabilities(scores, task.questions[-1], task.choice_words)
    assert not torch.allclose(changed, scores.softmax(-1), atol=1e-4)
    assert torch.allclose(tuned.answer_probabilities(scores, "Else?", task.choice_words), scores.softmax(-1))


def test_new_scores_behind_an_adapter_are_refused(runs: Path, program_folders: Path, tmp_path: Path) -> None:
    adapter = runs / "alignment" / "adapter"
    with pytest.raises(ValueError, match="to learn new scores .*handedness=left.*merge the adapter first"):
        run("sft", program_folders, tmp_path, model_name_or_path=adapter, tasks="handedness")
    with pytest.raises(ValueError, match="the data that the adapter's scores were fitted to: merge it first"):
        run("sft", program_folders, tmp_path, model_name_or_path=adapter, mixtures=0)


def test_tuning_without_reading_rows_leaves_no_calibration_of_earlier_weights(runs, program_folders, tmp_path) -> None:
    few = {"max_steps": 1, "rows": 4, "reading_share": 0, "save_strategy": "no"}
    run("sft", program_folders, tmp_path, model_name_or_path=runs / "anew" / "model", **few)
    assert AutoModelForMultimodalLM.from_pretrained(tmp_path / "model").config.calibrations is None


def test_quantization_without_bitsandbytes_is_refused(program_folders: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="need bitsandbytes, which is not installed"):
        run("sft", program_folders, tmp_path, load_in_4bit="true")


@pytest.mark.parametrize(
    ("asked", "half", "used"),
    [(None, True, "eager"), (None, False, "sdpa"), ("sdpa", True, "sdpa"), ("eager", False, "eager")],
)
def test_attention_is_the_one_asked_for_or_the_fastest(asked: str | None, half: bool, used: str, llama) -> None:
    args = AlignmentTrainingArguments(use_cpu=True, bf16=half, report_to="none")
    for longest, expected in ((SHORT_ROW, used), (SHORT_ROW + 1, asked or "sdpa")):
        llama.set_attn_implementation("sdpa")
        rows = Dataset.from_dict({"length": [2, longest]})
        model = trainable(llama, ModelConfig(attn_implementation=asked), args, rows)
        assert model.model.causal_lm.config._attn_implementation == expected


# --- configurations


@pytest.mark.parametrize(
    "config", sorted((CONFIGS.parent / "accelerate").glob("*.yaml")), ids=lambda config: config.stem
)
def test_accelerate_knows_every_option_of_the_shipped_configurations(config: Path) -> None:
    # raises for a key at the top that it does not know; those below are passed on unseen
    loaded = load_config_from_file(str(config))
    known = {action.dest for action in launch_command_parser()._actions}
    nested = {**loaded.fsdp_config, **loaded.deepspeed_config}
    assert set(nested) <= known and loaded.distributed_type != "NO"


@pytest.mark.parametrize("size", ["demo", "release"])
def test_shipped_configurations_are_read(size: str, tmp_path: Path) -> None:
    stages = {path.stem: path for path in (CONFIGS.parent / size).glob("*.yaml") if path.stem != "codec"}
    for stage, config in stages.items():
        program = alignment if stage == "alignment" else sft
        options = ["--config", str(config), "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
        script, training, model = program.make_parser().parse_args_and_config([*options, "--rows", "7"])
        assert script.rows == 7 and abs(sum(script.row_weights) - 1) < 1e-9 and model.use_peft
        assert training.train_sampling_strategy == "group_by_length" and not training.remove_unused_columns
        assert stage == "alignment" or training.max_length is None
    options = ["--config", str(CONFIGS.parent / size / "codec.yaml"), "--output_dir", str(tmp_path)]
    args, _ = TrlParser((CodecArguments, CodecTrainingArguments)).parse_args_and_config(options)
    names = ("codebook_dim", "codebook_groups", "num_quantizers", "codebook_size", "patch_length", "tokens_per_patch")
    assert FmriCodecConfig(**{name: getattr(args, name) for name in names}).codebook_groups == args.codebook_groups
