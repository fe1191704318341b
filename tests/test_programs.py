"""The programs of stages 2 and 3: what they train, leave behind and refuse."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM, AutoProcessor

from fmrilm.processors.descriptors.cohort import Cohort
from fmrilm.training import program as programs
from fmrilm.training.alignment.corpus_chats import alignment_rows, described_windows
from fmrilm.training.alignment.program import AlignmentArguments
from fmrilm.training.codec.trainer import encode_items
from fmrilm.training.corpus.scans import load_scans
from fmrilm.training.data.collator import ChatCollator, RowCollator, encode_dataset
from fmrilm.training.data.length_buckets import LengthBuckets
from fmrilm.training.data.scan_windows import EncodedScans, encode_scans
from fmrilm.training.sft.program import make_parser
from helpers import chats
from program_runs import checkpoints, run, weights


CONFIGS = Path(programs.__file__).parent / "configs"


@pytest.fixture(scope="module")
def runs(program_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 2 through LoRA, and on top of it stage 3: going on with its adapter, and through a new one."""
    root = tmp_path_factory.mktemp("runs")
    short = {"max_steps": 2, "save_steps": 1}
    run("alignment", program_folders, root / "alignment", **short)
    run("sft", program_folders, root / "further", model_name_or_path=root / "alignment" / "adapter", **short)
    merged = {"model_name_or_path": root / "alignment" / "adapter", "merge_adapter": "true", "lora_r": 3}
    labels = {"tasks": "handedness", "eval_strategy": "steps", "eval_steps": 1, "evaluation_rows": 4}
    run("sft", program_folders, root / "anew", **short, **merged, **labels)
    return root


@pytest.mark.parametrize("name", ["alignment", "further", "anew"])
def test_finished_folder_and_checkpoints_open_by_the_auto_classes(name: str, runs: Path) -> None:
    model = AutoModelForMultimodalLM.from_pretrained(runs / name / "model").eval()
    processor = AutoProcessor.from_pretrained(runs / name / "model")
    assert not [key for key in model.state_dict() if "lora" in key]
    inputs = ChatCollator(processor)(list(chats(2)))
    inputs.pop("labels")
    last = checkpoints(runs / name)[-1]
    adapted = AutoModelForMultimodalLM.from_pretrained(last).eval()
    assert [key for key in adapted.state_dict() if "lora" in key]
    assert torch.allclose(adapted(**inputs).logits, model(**inputs).logits, atol=1e-4)
    assert AutoProcessor.from_pretrained(last).tokens_per_step == processor.tokens_per_step == 2
    assert Cohort.load(runs / name / "model").subjects == 4


@pytest.mark.parametrize("name", ["alignment", "further", "anew"])
def test_outputs_hold_no_pickled_arguments_and_models_no_path(name: str, runs: Path, program_folders: Path) -> None:
    assert not list((runs / name).rglob("training_args.bin"))
    for path in (runs / name / "model").iterdir():
        content = path.read_bytes()
        assert str(runs).encode() not in content and str(program_folders).encode() not in content, path.name
        assert not [person for person in range(6) if f'"p{person}"'.encode() in content], path.name


def test_adapter_goes_on_or_is_merged_first(runs: Path) -> None:
    configs = {
        name: json.loads((runs / name / "adapter" / "adapter_config.json").read_text())
        for name in ("alignment", "further", "anew")
    }
    assert {name: config["r"] for name, config in configs.items()} == {"alignment": 2, "further": 2, "anew": 3}
    bases = {name: config["base_model_name_or_path"] for name, config in configs.items()}
    assert bases["alignment"] == bases["further"] == str(runs / "alignment" / "base")
    assert bases["anew"] == str(runs / "anew" / "base")
    # what the merged adapter had learned is in the new one's base
    merged, base = weights(runs / "alignment"), load_file(runs / "anew" / "base" / "model.safetensors")
    assert all(torch.equal(merged[name], base[name]) for name in merged)
    learned = [name for name, value in weights(runs / "anew").items() if not torch.equal(value, base[name])]
    assert learned and not [name for name in learned if ".codec." in name]


def test_full_tuning_changes_all_but_what_is_fitted_before(program_folders: Path, tmp_path: Path) -> None:
    run("sft", program_folders, tmp_path, max_steps=1, use_peft="false", save_strategy="no")
    before, after = load_file(program_folders / "joint" / "model.safetensors").items(), weights(tmp_path)
    unchanged = {name for name, value in before if torch.equal(value, after[name])}
    assert unchanged == {name for name in after if ".codec." in name or "autoregression" in name}
    assert not (tmp_path / "adapter").exists() and not list(tmp_path.glob(".*"))


def test_rows_are_about_training_subjects_alone(program_folders: Path) -> None:
    data, corpus = str(program_folders / "prepared"), str(program_folders / "corpus")
    of_corpus = load_scans(data, corpus, 0.34)
    of_data = load_scans(data, None, 0.34)
    for scans in (of_corpus, of_data):
        training, test = (
            {name for part in parts for name in part["subject"]} for parts in (scans.training, scans.test)
        )
        assert len(training) == 4 and len(test) == 2 and not training & test
    assert set(of_corpus.test[0]["subject"]) == set(of_data.test[0]["subject"])


def test_windows_of_scans_are_encoded_as_they_are(program_folders, tiny_codec, extractor, tmp_path) -> None:
    scans = load_scans(str(program_folders / "prepared"), None, 0.34)
    (part,) = scans.training
    encoded = encode_scans(tiny_codec, [part], scans.atlases, extractor, 20, tmp_path)
    assert [len(codes) for codes in encoded.codes] == [3] * 4 and "signal" not in encoded.rows[0]
    row = part[1]
    signal, _ = extractor.prepare_signal(np.array(row["signal"], np.float32), tr=row["tr"], atlas=scans.atlases["net"])
    item = {"signal": signal[20:36], "coordinates": scans.atlases["net"].coordinates, "descriptors": np.zeros(0)}
    assert np.array_equal(encoded.codes[1][1], encode_items(tiny_codec, [item])[0])
    short = part.select([0]).map(lambda row: {"signal": row["signal"][:10], "censored": row["censored"][:10]})
    (codes,) = encode_scans(tiny_codec, [short], scans.atlases, extractor, 20, tmp_path).codes
    assert [len(window) for window in codes] == [2 * 2]
    nothing = part.select([0]).map(lambda row: {"signal": row["signal"][:3], "censored": row["censored"][:3]})
    with pytest.raises(ValueError, match="at least one patch of 4 frames"):
        encode_scans(tiny_codec, [nothing], scans.atlases, extractor, 20, tmp_path)


def described_scans() -> EncodedScans:
    rng = np.random.default_rng(0)
    rows = [{"description": f"Start {scan}:\na{scan}\nb{scan}\nc{scan}"} for scan in range(3)]
    return EncodedScans(rows, [[rng.integers(16, size=8) for _ in range(2)] for _ in rows])


def test_each_window_comes_before_any_comes_again(program_folders: Path) -> None:
    scans = described_scans()
    rows = alignment_rows(scans, ["some words"], 12, [1.0, 0.0, 0.0], paragraphs=2, seed=0)
    seen = [tuple(row["codes"][0]) for row in rows]
    assert len(set(seen[:6])) == len(set(seen)) == 6
    for row in rows:
        start, *texts = row["messages"][1]["content"][0]["text"].split("\n")
        scan = start.removeprefix("Start ").removesuffix(":")
        assert row["codes"][0] in [codes.tolist() for codes in scans.codes[int(scan)]]
        assert len(texts) == 2 and texts == sorted(texts) and {text[1:] for text in texts} == {scan}
    about, codes = described_windows(scans, None, 0)
    assert [row["messages"][1]["content"][0]["text"] for row in about[:2]] == [scans.rows[0]["description"]] * 2
    assert len(codes) == 6


def test_rows_tokenised_once_make_the_same_batches(processor) -> None:
    rows = chats(6, statements=3)
    encoded = encode_dataset(rows, processor)
    expected = ChatCollator(processor)(list(rows))
    got = RowCollator(processor.tokenizer.pad_token_id)(list(encoded))
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    assert encoded["length"][:] == expected["attention_mask"].sum(1).tolist()


@given(st.lists(st.integers(1, 500), max_size=80), st.sampled_from([1, 2, 8, 12]), st.integers(0, 3))
def test_buckets_hold_each_row_once_whatever_the_division(lengths: list[int], per_step: int, epoch: int) -> None:
    order = list(LengthBuckets(lengths, per_step, 0, lambda: epoch))
    assert sorted(order) == list(range(len(lengths)))
    assert order == list(LengthBuckets(lengths, per_step, 0, lambda: epoch))


def test_buckets_waste_little_and_differ_by_epoch() -> None:
    lengths = np.random.default_rng(0).integers(50, 500, 400)
    epoch = 0
    buckets = LengthBuckets(lengths, 8, 0, lambda: epoch)
    first, in_rows = lengths[list(buckets)].reshape(-1, 8), lengths.reshape(-1, 8)
    assert (first.max(1) * 8 / first.sum(1)).mean() < 1.05 < 1.5 < (in_rows.max(1) * 8 / in_rows.sum(1)).mean()
    # not from short to long
    assert abs(np.corrcoef(first.mean(1), np.arange(len(first)))[0, 1]) < 0.5
    before, epoch = list(buckets), 1
    assert list(buckets) != before


@pytest.mark.parametrize("option", ["packing", "eval_packing", "padding_free"])
def test_packing_is_refused_with_the_reason(option: str, program_folders: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reads another one's scan"):
        run("sft", program_folders, tmp_path, **{option: "true"})


@pytest.mark.parametrize(
    ("stage", "changes", "reason"),
    [
        ("alignment", {"load_in_4bit": "true"}, "QLoRA is for stage 3"),
        ("sft", {"lora_target_modules": "all-linear"}, "alone, got .* layers elsewhere"),
        ("sft", {"corpus": "no such folder"}, "fmrilm describe"),
        ("sft", {"tasks": "shoe_size"}, "handedness"),
        ("sft", {"tasks": "sex"}, "no column 'sex'"),
        ("sft", {"corpus": None}, "expected tasks or a corpus to take questions from"),
        ("sft", {"corpus": None, "data": None, "tasks": "handedness"}, "expected data, a folder that"),
        ("sft", {"model_name_or_path": None}, "expected model_name_or_path"),
        ("alignment", {"codec": None}, "expected codec, a trained one"),
        ("codec", {"data": None, "streaming": "true"}, "a prepared folder, to stream from; got none"),
    ],
)
def test_bad_options_are_refused(stage: str, changes: dict, reason: str, program_folders, tmp_path) -> None:
    with pytest.raises(ValueError, match=reason):
        run(stage, program_folders, tmp_path, **changes)


def test_corpus_without_its_cohort_is_refused(program_folders: Path, tmp_path: Path) -> None:
    corpus = shutil.copytree(program_folders / "corpus", tmp_path / "corpus")
    shutil.rmtree(corpus / "cohort")
    with pytest.raises(ValueError, match="expected a corpus with its cohort in .*corpus, got one without"):
        run("alignment", program_folders, tmp_path / "run", corpus=corpus)


def test_quantization_without_bitsandbytes_is_refused(program_folders: Path, tmp_path: Path, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *of: None if name == "bitsandbytes" else find(name, *of)
    )
    with pytest.raises(ValueError, match="need bitsandbytes, which is not installed"):
        run("sft", program_folders, tmp_path, load_in_4bit="true")


@pytest.mark.parametrize("config", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda config: config.stem)
def test_accelerate_knows_every_option_of_the_shipped_configurations(config: Path) -> None:
    # raises for a key at the top that it does not know; those below are passed on unseen
    loaded = load_config_from_file(str(config))
    known = {action.dest for action in launch_command_parser()._actions}
    nested = {**loaded.fsdp_config, **loaded.deepspeed_config}
    assert set(nested) <= known and loaded.distributed_type != "NO"


def test_shipped_configurations_are_read(tmp_path: Path) -> None:
    script, training, model = make_parser().parse_args_and_config(
        ["--config", str(CONFIGS / "sft.yaml"), "--output_dir", str(tmp_path), "--use_cpu", "true", "--rows", "7"]
    )
    assert (script.rows, script.questions, model.lora_r) == (7, 6, 8) and training.max_length is None
    from fmrilm.training.alignment.program import make_parser as alignment_parser

    script, training, model = alignment_parser().parse_args_and_config(
        ["--config", str(CONFIGS / "alignment.yaml"), "--output_dir", str(tmp_path), "--use_cpu", "true"]
    )
    assert isinstance(script, AlignmentArguments) and script.row_weights == [0.8, 0.1, 0.1] and model.use_peft
    assert training.train_sampling_strategy == "group_by_length" and not training.remove_unused_columns
