"""Pipelines: answers and probabilities, alike in batches and alone, also where only a saved folder is at hand."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_tiny_atlas
from transformers import Pipeline, pipeline

from fmrilm import FmriLMFeatureExtractor, FmriLMForConditionalGeneration
from fmrilm.processors import FmriLMProcessor
from fmrilm.training.hub.convert_original import convert_original
from helpers import linked_site
from official_checkpoint import ROIS, WIDTH, brain_tensors, language_tensors


QUESTION, CHOICES = "Is this person older?", ["yes", "no", "maybe so"]
GREEDY = {"max_new_tokens": 5, "do_sample": False}
SCRIPT = """
import importlib.util, json, sys

arguments = json.loads(sys.argv[1])
sys.path.insert(0, arguments["site"])
for name in ("fmrilm", "nilearn", "nibabel", "datasets", "peft", "trl"):
    assert importlib.util.find_spec(name) is None, name

import numpy as np
import torch
from transformers import pipeline

torch.set_num_threads(arguments["threads"])
results = {}
for name, scans in arguments["scans"].items():
    folder, options = arguments["folders"][name], arguments["options"]
    pipe = pipeline("fmri-text-to-text", model=folder, trust_remote_code=True)
    results[name] = [
        pipe(scans, arguments["question"], tr=2.0, batch_size=2, **options),
        pipe(scans[0], arguments["question"], tr=2.0, choices=arguments["choices"]),
    ]
    chat = [{"role": "user", "content": [
        {"type": "fmri", "fmri": scans[0], "tr": 2.0}, {"type": "text", "text": arguments["question"]}
    ]}]
    general = pipeline("any-to-any", model=folder, trust_remote_code=True)
    results[name].append(general(text=chat, return_full_text=False, **options)[0]["generated_text"])
    # what is loaded this way brings its pipeline along when it is saved again
    pipe.model.save_pretrained(folder + "-again")
    pipe.processor.save_pretrained(folder + "-again")
print(json.dumps(results))
"""


def bold(frames: int, rois: int, seed: int = 0) -> np.ndarray:
    return (1000 + np.random.default_rng(seed).normal(0, 10, (frames, rois))).astype(np.float32)


@pytest.fixture
def scans() -> list[dict]:
    """Of two atlases and three lengths."""
    shapes = ((20, 5, "tiny"), (8, 7, "other"), (13, 5, "tiny"))
    return [{"signal": bold(frames, rois), "tr": 2.0, "atlas": name} for frames, rois, name in shapes]


@pytest.fixture
def pipe(tiny_model: Callable[..., FmriLMForConditionalGeneration], tiny_atlas, tiny_tokenizer) -> Pipeline:
    extractor = FmriLMFeatureExtractor(
        atlases=[tiny_atlas, build_tiny_atlas(7, "other")], patch_length=4, window_length=16
    )
    processor = FmriLMProcessor(extractor, tiny_tokenizer, tokens_per_patch=2, summary_tokens=2)
    return pipeline("fmri-text-to-text", model=tiny_model("qwen3"), processor=processor)


def chat(scan, question: str = QUESTION) -> list[dict]:
    return [{"role": "user", "content": [{"type": "fmri", "fmri": scan}, {"type": "text", "text": question}]}]


def test_answer_is_what_the_model_generates(pipe: Pipeline, scans: list[dict]) -> None:
    inputs = pipe.processor.apply_chat_template(chat(scans[0]), add_generation_prompt=True)
    new = pipe.model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    text = pipe.tokenizer.decode(new, skip_special_tokens=True)
    assert pipe(scans[0], QUESTION, **GREEDY) == {"answer": text}


def test_choices_get_probabilities(pipe: Pipeline, scans: list[dict]) -> None:
    inputs = pipe.processor.apply_chat_template(chat(scans[0]), add_generation_prompt=True)
    scores = pipe.model.score_choices(inputs, pipe.processor.encode_choices(CHOICES))[0].softmax(-1)
    found = pipe(scans[0], QUESTION, choices=CHOICES)
    assert list(found["probabilities"]) == CHOICES and found["answer"] == CHOICES[scores.argmax()]
    assert np.allclose(list(found["probabilities"].values()), scores.numpy(), rtol=1e-4)


def test_calibrated_questions_get_calibrated_probabilities(pipe: Pipeline, scans: list[dict]) -> None:
    plain = pipe(scans, QUESTION, choices=CHOICES)
    biases = {"no": 1.0, "maybe so": 0.0, "yes": -2.0}
    pipe.model.config.calibrations = [{"questions": ["Other?", QUESTION], "slope": 0.5, "biases": biases}]
    try:
        found = pipe(scans, QUESTION, choices=CHOICES)
        for other in ({"choices": CHOICES[:2]}, {"question": "Another?", "choices": CHOICES}):
            question = other.pop("question", QUESTION)
            again = pipe(scans[0], question, **other)["probabilities"]
            pipe.model.config.calibrations, kept = [], pipe.model.config.calibrations
            assert again == pipe(scans[0], question, **other)["probabilities"]
            pipe.model.config.calibrations = kept
    finally:
        pipe.model.config.calibrations = []
    for before, after in zip(plain, found, strict=True):
        wanted = np.array([before["probabilities"][one] ** 0.5 * np.exp(biases[one]) for one in CHOICES])
        assert np.allclose(list(after["probabilities"].values()), wanted / wanted.sum(), rtol=1e-3)
        assert after["answer"] == CHOICES[int(wanted.argmax())]


@pytest.mark.parametrize("batch_size", [2, 3])
def test_batches_equal_single_scans(pipe: Pipeline, scans: list[dict], batch_size: int) -> None:
    questions = [QUESTION, "Why?", "A rather longer question about the same person, is it?"]
    alone = [pipe(scan, question, **GREEDY) for scan, question in zip(scans, questions, strict=True)]
    assert len({answer["answer"] for answer in alone}) >= 2
    assert pipe(scans, questions, **GREEDY, batch_size=batch_size) == alone
    items = [{"fmri": scan, "question": question} for scan, question in zip(scans, questions, strict=True)]
    assert list(pipe((item for item in items), **GREEDY, batch_size=batch_size)) == alone
    scored = [pipe(scan, QUESTION, choices=CHOICES)["probabilities"] for scan in scans]
    batch = pipe(scans, QUESTION, choices=CHOICES, batch_size=batch_size)
    for one, other in zip(scored, batch, strict=True):
        assert np.allclose(list(one.values()), list(other["probabilities"].values()), rtol=1e-3)


def test_callers_at_once_get_the_answers_of_single_ones(pipe: Pipeline, scans: list[dict]) -> None:
    def answers(scan: dict) -> list[dict]:
        return [pipe(scan, QUESTION, **GREEDY), pipe(scan, QUESTION, choices=CHOICES)]

    expected = [answers(scan) for scan in scans]
    with ThreadPoolExecutor(8) as callers:
        assert list(callers.map(answers, scans * 8)) == expected * 8


def test_every_form_of_a_scan_is_answered_alike(pipe: Pipeline, scans: list[dict], tmp_path: Path) -> None:
    signal = scans[0]["signal"]
    np.save(tmp_path / "scan.npy", signal)
    expected = pipe(scans[0], QUESTION, **GREEDY)
    for scan in (tmp_path / "scan.npy", str(tmp_path / "scan.npy"), signal, torch.from_numpy(signal)):
        assert pipe(scan, QUESTION, tr=2.0, atlas="tiny", **GREEDY) == expected
    assert pipe({"fmri": scans[0], "question": QUESTION}, **GREEDY) == expected


def test_unfit_calls_are_refused(pipe: Pipeline, scans: list[dict]) -> None:
    with pytest.raises(ValueError, match="got 2 for 3 scans"):
        pipe(scans, ["Why?"] * 2)
    with pytest.raises(ValueError, match="as many questions as scans, got 0 for 0 scans"):
        pipe([], [])
    with pytest.raises(ValueError, match="got dict without a question"):
        pipe(scans[0])
    with pytest.raises(ValueError, match="beside choices, got max_new_tokens"):
        pipe(scans[0], QUESTION, choices=CHOICES, max_new_tokens=3)
    with pytest.raises(ValueError, match="at least 2 choices"):
        pipe(scans[0], QUESTION, choices=["yes"])


def test_any_to_any_answers_chats_with_scans(pipe: Pipeline, scans: list[dict]) -> None:
    general = pipeline("any-to-any", model=pipe.model, processor=pipe.processor)
    for scan in scans:
        found = general(text=chat(scan), return_full_text=False, **GREEDY)[0]["generated_text"]
        assert found == pipe(scan, QUESTION, **GREEDY)["answer"]


def test_saved_folders_bring_their_pipeline(
    tiny_model, processor, make_language_model, tiny_atlas, tmp_path: Path
) -> None:
    folders = {"ours": str(tmp_path / "ours"), "original": str(tmp_path / "original")}
    ours = tiny_model("qwen3")
    ours.save_pretrained(folders["ours"])
    processor.save_pretrained(folders["ours"])
    language_model = make_language_model("qwen3", len(processor.tokenizer))
    language_model.config.save_pretrained(tmp_path / "backbone")
    processor.tokenizer.save_pretrained(tmp_path / "backbone")
    torch.manual_seed(1)
    tensors = brain_tensors("released", 160, WIDTH) | language_tensors(language_model, "llm.", None)[0]
    torch.save({**tensors, "model_args": {"lm_name": str(tmp_path / "backbone")}}, tmp_path / "official.pt")
    convert_original(tmp_path / "official.pt", Path(folders["original"]), 1000.0, 20.0, atlas=tiny_atlas)
    scans = {"ours": [], "original": []}
    for name, lengths in (("ours", (20, 9, 16)), ("original", (160, 170, 180))):
        for index, frames in enumerate(lengths):
            path = tmp_path / f"{name}{index}.npy"
            np.save(path, bold(frames, ROIS, index))
            scans[name].append(str(path))
    site = tmp_path / "site"
    site.mkdir()
    arguments = {
        "site": str(linked_site(site, "transformers", "torch", "numpy", "scipy")),
        "threads": torch.get_num_threads(),
        "folders": folders,
        "scans": scans,
        "question": QUESTION,
        "choices": CHOICES,
        "options": GREEDY,
    }
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", SCRIPT, json.dumps(arguments)],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout.splitlines()[-1])
    for name, folder in folders.items():
        # where the package is imported, its own pipeline serves its own models
        trust = {} if name == "ours" else {"trust_remote_code": True}
        pipe = pipeline("fmri-text-to-text", model=folder, **trust)
        expected = [pipe(scan, QUESTION, tr=2.0, **GREEDY) for scan in scans[name]]
        answers, chosen, general = results[name]
        assert answers == expected and general == expected[0]["answer"]
        assert chosen == pipe(scans[name][0], QUESTION, tr=2.0, choices=CHOICES)
        saved = [json.loads((Path(path) / "config.json").read_text()) for path in (folder, folder + "-again")]
        assert saved[0]["custom_pipelines"] == saved[1]["custom_pipelines"]
        code = [{file.name for file in Path(path).glob("*.py")} for path in (folder, folder + "-again")]
        assert "pipeline_fmrilm.py" in code[0] and code[0] == code[1]
