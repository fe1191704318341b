"""
A saved folder is all that is needed: it opens with transformers, torch, numpy and scipy, without this package; images
also need nibabel.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import build_tiny_atlas
from transformers import AutoFeatureExtractor, Trainer, TrainingArguments, pipeline

from fmrilm import FmriLMForConditionalGeneration, FmriLMModel
from fmrilm.processors import FmriLMFeatureExtractor, Parcels
from fmrilm.training.alignment.joint import add_lora
from helpers import ISOLATED, in_a_row, linked_site, run_python, write_table
from scan_rows import LONG, codes, ids


AUTO_CLASSES = {
    "AutoConfig": "configuration_fmrilm.FmriLMConfig",
    "AutoModel": "modeling_fmrilm.FmriLMModel",
    "AutoModelForCausalLM": "modeling_fmrilm.FmriLMForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_fmrilm.FmriLMForConditionalGeneration",
}
EXTRACTOR_FILES = {"atlases_fmrilm.py", "cleaning_fmrilm.py", "feature_extraction_fmrilm.py", "scan_io_fmrilm.py"}
CODEC_FILES = {"configuration_fmrilm.py", "modeling_fmricodec.py"}
MODEL_FILES = {*CODEC_FILES, "modeling_fmrilm.py", "pipeline_fmrilm.py"}
PROCESSOR_FILES = {*EXTRACTOR_FILES, "processing_fmrilm.py"}

SCRIPT = """
import torch, transformers
from transformers import (
    AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor,
    pipeline,
)

torch.set_num_threads(arguments["threads"])
trust = {"trust_remote_code": True}
folder, codec_folder = arguments["folder"], arguments["codec"]
chat, signal = arguments["chat"], torch.load(arguments["signal"])
chat[0]["content"][0]["fmri"] = signal

processor = AutoProcessor.from_pretrained(folder, **trust)
extractor = AutoFeatureExtractor.from_pretrained(folder, **trust)
config = AutoConfig.from_pretrained(folder, **trust)
inputs = processor.apply_chat_template(chat, add_generation_prompt=True)
# a volume is parcellated by the parcels of the folder
volume = processor.apply_chat_template(
    [{"role": "user", "content": [{"type": "fmri", "fmri": arguments["volume"]}]}]
)
scan = extractor(signal, tr=chat[0]["content"][0]["tr"], atlas=chat[0]["content"][0]["atlas"])
# the code brings no tables of other atlases: they are given
others = [extractor(signal, tr=0.72, atlas=atlas) for atlas in (arguments["atlas"], arguments["table"])]
try:
    extractor(signal, tr=0.72, atlas="aal2-94")
except ValueError as error:
    unknown = str(error)
results = {"others": [dict(each) for each in others], "unknown": unknown}
results |= {"inputs": dict(inputs), "volume": dict(volume), "scan": dict(scan), "classes": [type(config).__name__]}
with torch.no_grad():
    for auto in (AutoModelForMultimodalLM, AutoModelForCausalLM):
        model = auto.from_pretrained(folder, **trust)
        results["classes"].append(type(model).__name__)
        results[auto.__name__] = model(**inputs).logits
    results["generated"] = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    # what is loaded this way can be saved in turn
    model.save_pretrained(arguments["again"])
    processor.save_pretrained(arguments["again"])
    base = AutoModel.from_pretrained(folder, **trust)
    results["classes"].append(type(base).__name__)
    results["AutoModel"] = base(**inputs).last_hidden_state
    codec_config = AutoConfig.from_pretrained(codec_folder, **trust)
    codec = AutoModel.from_pretrained(codec_folder, **trust)
    results["classes"] += [type(codec_config).__name__, type(codec).__name__]
    results["codes"] = codec.encode(**scan)
pipe = pipeline("fmri-text-to-text", model=folder, **trust)
scans, question, options = [signal, signal[:25]], chat[0]["content"][1]["text"], arguments["options"]
results["pipeline"] = [
    pipe(scans, question, tr=0.72, atlas="tiny", batch_size=2, **options),
    pipe(signal, question, tr=0.72, atlas="tiny", choices=["yes", "no"]),
    pipeline("any-to-any", model=folder, **trust)(text=chat, return_full_text=False, **options)[0]["generated_text"],
]
torch.save(results, arguments["results"])
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return linked_site(tmp_path_factory.mktemp("site"), "transformers", "torch", "numpy", "scipy", "nibabel")


def auto_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / "config.json").read_text())["auto_map"]


def code_files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.py")}


def test_saved_folders_open_without_the_package(
    tiny_model, make_codec, tiny_atlas, processor, site: Path, tmp_path: Path
) -> None:
    atlas = replace(tiny_atlas, parcels=Parcels(np.arange(1, 6).reshape(5, 1, 1), np.eye(4)))
    processor.feature_extractor = FmriLMFeatureExtractor([atlas], patch_length=4, window_length=16)
    model, codec = tiny_model("qwen3"), make_codec()
    folder, codec_folder, again = tmp_path / "joint", tmp_path / "codec", tmp_path / "again"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    codec.save_pretrained(codec_folder)
    signal = torch.from_numpy(1000 + np.random.default_rng(0).normal(0, 10, (40, 5)))
    torch.save(signal, tmp_path / "signal.pt")
    nib.save(in_a_row(signal.numpy(), 0.72), tmp_path / "scan.nii.gz")
    block = {"type": "fmri", "tr": 0.72, "atlas": "tiny"}
    chat = [{"role": "user", "content": [block, {"type": "text", "text": "Is it connected?"}]}]
    other = build_tiny_atlas(5, "other")
    write_table(tmp_path / "other.tsv", other)
    arguments = {
        "atlas": other.to_dict(),
        "table": str(tmp_path / "other.tsv"),
        "places": [str(site)],
        "absent": ["fmrilm", "nilearn", "datasets", "peft", "trl"],
        "threads": torch.get_num_threads(),
        "folder": str(folder),
        "codec": str(codec_folder),
        "again": str(again),
        "signal": str(tmp_path / "signal.pt"),
        "volume": str(tmp_path / "scan.nii.gz"),
        "chat": chat,
        "options": {"max_new_tokens": 4, "do_sample": False},
        "results": str(tmp_path / "results.pt"),
    }
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run_python(SCRIPT, *ISOLATED, arguments=arguments, cwd=tmp_path, env=environment)
    results = torch.load(tmp_path / "results.pt")

    chat[0]["content"][0]["fmri"] = signal
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True)
    volume = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "fmri", "fmri": tmp_path / "scan.nii.gz"}]}]
    )
    scan = processor.feature_extractor(signal, tr=0.72, atlas="tiny")
    with torch.no_grad():
        expected = {
            "others": [dict(processor.feature_extractor(signal, tr=0.72, atlas=other))] * 2,
            "inputs": dict(inputs),
            "volume": dict(volume),
            "scan": dict(scan),
            **dict.fromkeys(("AutoModelForMultimodalLM", "AutoModelForCausalLM"), model(**inputs).logits),
            "AutoModel": model.model(**inputs).last_hidden_state,
            "generated": model.generate(**inputs, **arguments["options"]),
            "codes": codec.encode(**scan),
        }
    torch.testing.assert_close({name: results[name] for name in expected}, expected, rtol=0, atol=0)
    assert "no atlas 'aal2-94'; packaged: none (code of a checkpoint)" in results["unknown"]
    assert results["unknown"].endswith("This feature extractor knows: tiny (5 ROIs)")
    heads = ["FmriLMForConditionalGeneration"] * 2
    assert results["classes"] == ["FmriLMConfig", *heads, "FmriLMModel", "FmriCodecConfig", "FmriCodecModel"]
    pipe = pipeline("fmri-text-to-text", model=model, processor=processor)
    options = {"tr": 0.72, "atlas": "tiny"}
    answers = [pipe(each, "Is it connected?", **options, **arguments["options"]) for each in (signal, signal[:25])]
    assert results["pipeline"][0] == answers and results["pipeline"][2] == answers[0]["answer"]
    chosen = pipe(signal, "Is it connected?", **options, choices=["yes", "no"])
    assert results["pipeline"][1]["answer"] == chosen["answer"]
    # where a cache begins in memory, which differs between processes, some kernels round the last bits otherwise
    assert results["pipeline"][1]["probabilities"] == pytest.approx(chosen["probabilities"], rel=1e-4)
    # what was loaded that way and saved again is as whole
    assert (again / "atlases" / "tiny.npz").is_file()
    assert code_files(again) == code_files(folder)
    saved = [json.loads((place / "config.json").read_text()) for place in (folder, again)]
    assert all(saved[0][name] == saved[1][name] for name in ("auto_map", "custom_pipelines"))


def test_processor_names_its_auto_classes_and_holds_their_code(processor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    assert code_files(tmp_path) == PROCESSOR_FILES
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["auto_map"]["AutoProcessor"] == "processing_fmrilm.FmriLMProcessor"
    nested = saved["feature_extractor"]["auto_map"]
    assert nested["AutoFeatureExtractor"] == "feature_extraction_fmrilm.FmriLMFeatureExtractor"


def test_every_way_of_saving_names_all_auto_classes_and_lets_no_placeholder_be_spoken(tiny_model, tmp_path) -> None:
    model = tiny_model(tied=False)
    model.save_pretrained(tmp_path / "model")
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    Trainer(model=model, args=args).save_model(str(tmp_path / "trainer"))
    FmriLMModel.from_pretrained(tmp_path / "trainer").save_pretrained(tmp_path / "base")
    add_lora(model, 2).merge_and_unload().save_pretrained(tmp_path / "merged")
    names = ("fmri_start_token_id", "fmri_token_id", "fmri_summary_token_id", "fmri_end_token_id")
    placeholders = {getattr(model.config, name) for name in names}
    row, options = ids(model, "a", LONG), {"max_new_tokens": 1, "do_sample": True, "num_return_sequences": 8}
    for name in ("model", "trainer", "base", "merged"):
        assert auto_map(tmp_path / name) == AUTO_CLASSES
        assert code_files(tmp_path / name) == MODEL_FILES
        # without a head, nothing is spoken
        if name == "base":
            continue
        again = FmriLMForConditionalGeneration.from_pretrained(tmp_path / name)
        with torch.no_grad():
            # now they are by far the likeliest words
            state = again.model(row, fmri_codes=codes(LONG)).last_hidden_state[0, -1]
            again.get_output_embeddings().weight[list(placeholders)] = 10 * state
        assert not placeholders & set(again.generate(row, fmri_codes=codes(LONG), **options)[:, -1].tolist())
        again.generation_config.suppress_tokens = None
        assert placeholders >= set(again.generate(row, fmri_codes=codes(LONG), **options)[:, -1].tolist())


def test_codec_names_its_auto_classes_and_brings_its_extractor(tiny_codec, extractor, tmp_path: Path) -> None:
    tiny_codec.save_pretrained(tmp_path)
    expected = {"AutoConfig": "configuration_fmrilm.FmriCodecConfig", "AutoModel": "modeling_fmricodec.FmriCodecModel"}
    assert auto_map(tmp_path) == expected
    assert code_files(tmp_path) == CODEC_FILES
    extractor.save_pretrained(tmp_path)
    assert code_files(tmp_path) == CODEC_FILES | EXTRACTOR_FILES
    again = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert type(again) is FmriLMFeatureExtractor and again.to_dict() == extractor.to_dict()
