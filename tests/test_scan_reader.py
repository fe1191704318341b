"""fmrilm.load: answers, codes and signals are those of model and processor, for a scan, a list, dataset or table."""

from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import save_tiny
from datasets import Dataset

import fmrilm
from fmrilm import FmriLMFeatureExtractor, ScanReader
from fmrilm.processors import add_name_tokens
from fmrilm.processors.descriptors.text import REQUESTS


QUESTION, CHOICES = "Is this person older?", ["yes", "no", "maybe so"]
OPTIONS = {"tr": 2.0, "atlas": "tiny"}


@pytest.fixture
def folder(extractor_of_two: FmriLMFeatureExtractor, tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", extractor_of_two)


@pytest.fixture
def reader(folder: Path) -> ScanReader:
    return fmrilm.load(folder, device="cpu")


@pytest.fixture
def scans(signal: np.ndarray) -> list[dict]:
    """Of two lengths and two atlases."""
    other = np.random.default_rng(1).normal(1000, 10, (9, 7)).astype(np.float32)
    return [{"signal": signal, "tr": 2.0, "atlas": "tiny"}, {"signal": other, "tr": 2.0, "atlas": "other"}]


@pytest.fixture
def table(signal: np.ndarray, tmp_path: Path) -> pd.DataFrame:
    """Two files; the atlas of the second is not told."""
    np.save(tmp_path / "a.npy", signal)
    np.save(tmp_path / "b.npy", signal[::-1])
    paths = [tmp_path / "a.npy", str(tmp_path / "b.npy")]
    return pd.DataFrame({"subject": ["a", "b"], "path": paths, "tr": [2, 2], "atlas": ["tiny", None]}, index=[7, 3])


def inputs(reader: ScanReader, scan: dict, question: str = QUESTION) -> dict:
    chat = [{"role": "user", "content": [{"type": "fmri", "fmri": scan}, {"type": "text", "text": question}]}]
    return dict(reader.processor.apply_chat_template(chat, add_generation_prompt=True))


def about(frames: int, scan_frames: int, windows: int = 1, atlas: str = "tiny", missing: tuple[int, ...] = ()) -> dict:
    """What an answer says of the windows it was read from, at a TR of 2 s."""
    window = {
        "start": 0.0,
        "stop": 2.0 * frames,
        "windows": windows,
        "frames": frames,
        "scan_seconds": 2.0 * scan_frames,
    }
    rois = {"tiny": 5, "other": 7}[atlas] - len(missing)
    return {"window": window, "atlas": atlas, "rois": rois, "missing_rois": [f"{atlas}_{roi}" for roi in missing]}


def answer(reader: ScanReader, inputs: dict, tokens: int) -> str:
    ids = reader.model.generate(**inputs, max_new_tokens=tokens)[0, inputs["input_ids"].shape[1] :]
    return reader.processor.tokenizer.decode(ids, skip_special_tokens=True)


def test_answers_are_those_of_the_model(reader: ScanReader, scans: list[dict]) -> None:
    parts = [about(16, 20), about(9, 9, atlas="other")]
    expected = [
        {"answer": answer(reader, inputs(reader, scan), 6), **part} for scan, part in zip(scans, parts, strict=True)
    ]
    assert expected[0] != expected[1]
    assert reader.ask(scans[0], QUESTION, max_new_tokens=6) == expected[0]
    assert reader.ask(scans, QUESTION, max_new_tokens=6) == expected
    assert reader.ask(scans, [QUESTION] * 2, max_new_tokens=6, batch_size=2) == expected
    description = reader.describe(scans, max_new_tokens=6)
    assert description == [answer(reader, inputs(reader, scan, "Describe this scan."), 6) for scan in scans]
    assert reader.describe(scans[1], max_new_tokens=6) == description[1]


def test_description_is_asked_for_in_words_of_the_training() -> None:
    assert ScanReader.describe.__defaults__[0] in REQUESTS


def test_no_sentence_twice_in_a_greedy_description(reader: ScanReader, scans: list[dict], monkeypatch) -> None:
    tokenizer = reader.processor.tokenizer
    said = tokenizer("It is low. It is high. It is low. It is low", add_special_tokens=False)["input_ids"]

    def generate(input_ids, streamer=None, **options):
        rows = torch.cat([input_ids, torch.tensor([said] * len(input_ids))], 1)
        if streamer is not None:
            for column in [input_ids[0], *rows[0, input_ids.shape[1] :, None]]:
                streamer.put(column)
            streamer.end()
        return rows

    monkeypatch.setattr(reader.model, "generate", generate)
    assert reader.describe(scans) == ["It is low. It is high."] * 2
    assert "".join(reader.describe(scans[0], stream=True)) == "It is low. It is high."


@pytest.mark.parametrize("batch_size", [1, 2])
def test_choices_get_the_probabilities_of_the_model(reader: ScanReader, scans: list[dict], batch_size: int) -> None:
    found = reader.ask(scans, QUESTION, CHOICES, batch_size=batch_size)
    for scan, one in zip(scans, found, strict=True):
        scores = reader.model.score_choices(inputs(reader, scan), reader.processor.encode_choices(CHOICES))[0]
        assert list(one["probabilities"]) == CHOICES and one["answer"] == CHOICES[scores.argmax()]
        assert np.allclose(list(one["probabilities"].values()), scores.softmax(-1), rtol=1e-3)


def test_history_comes_before_the_question_and_the_scan_first(reader: ScanReader, scans: list[dict]) -> None:
    chat = [
        {"role": "user", "content": [{"type": "fmri", "fmri": scans[0]}, {"type": "text", "text": "Why?"}]},
        {"role": "assistant", "content": "Because."},
        {"role": "user", "content": QUESTION},
    ]
    prompt = dict(reader.processor.apply_chat_template(chat, add_generation_prompt=True))
    found = reader.ask(scans[0], QUESTION, CHOICES, history=[("Why?", "Because.")])
    scores = reader.model.score_choices(prompt, reader.processor.encode_choices(CHOICES))[0].softmax(-1)
    assert np.allclose(list(found["probabilities"].values()), scores, rtol=1e-3)
    assert found != reader.ask(scans[0], QUESTION, CHOICES)


def test_questions_of_a_batch_that_name_other_descriptors_get_their_own_answers(reader, scans: list[dict]) -> None:
    reader.processor.level_words = ["low", "high"]
    add_name_tokens(reader.processor.tokenizer, ["age", "motion"])
    questions, levels = ["Is the age low or high?", "Is the motion low or high?"], ["low", "high"]
    together = reader.ask(scans, questions, levels)
    alone = [reader.ask(scan, question, levels) for scan, question in zip(scans, questions, strict=True)]
    for found, expected in zip(together, alone, strict=True):
        assert found["answer"] == expected["answer"] and set(found["probabilities"]) == set(levels)
        assert np.allclose(list(found["probabilities"].values()), list(expected["probabilities"].values()), rtol=1e-4)
    # what the processor writes is what is scored
    sentences = [f"The age is {level}." for level in levels]
    written = reader.ask(scans[0], questions[0], sentences)["probabilities"]
    assert np.allclose(list(written.values()), list(alone[0]["probabilities"].values()), rtol=1e-4)


def test_pieces_of_a_stream_make_up_the_answer(reader: ScanReader, scans: list[dict]) -> None:
    # one that this untrained model answers with spaces, where pieces end
    expected = reader.ask(scans[0], "Which sex?", max_new_tokens=90)["answer"]
    pieces = list(reader.ask(scans[0], "Which sex?", stream=True, max_new_tokens=90))
    assert "".join(pieces) == expected and len(pieces) > 1
    described = reader.describe(scans[0], stream=True, max_new_tokens=30)
    assert "".join(described) == reader.describe(scans[0], max_new_tokens=30)


def test_closed_stream_stops_the_model(reader: ScanReader, scans: list[dict], monkeypatch) -> None:
    steps, inner = [], reader.model.model.causal_lm
    forward = inner.forward
    monkeypatch.setattr(inner, "forward", lambda *args, **kw: steps.append(0) or forward(*args, **kw))
    reader.model.generation_config.eos_token_id = None
    pieces = reader.ask(scans[0], QUESTION, stream=True, max_new_tokens=3000)
    assert list(islice(pieces, 1))
    pieces.close()
    assert len(steps) < 1000


def test_error_of_the_model_reaches_who_reads_the_stream(reader: ScanReader, scans: list[dict], monkeypatch) -> None:
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(reader.model.model.causal_lm, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(reader.ask(scans[0], QUESTION, stream=True))


def test_codes_and_signals_are_those_of_the_codec(reader: ScanReader, scans: list[dict]) -> None:
    codec = reader.model.model.codec
    for scan, frames, rois in zip(scans, (16, 9), (5, 7), strict=True):
        features = reader.processor.feature_extractor(scan)
        codes = codec.encode(**features)
        decoded = codec.decode(codes, features["roi_coordinates"]).detach()
        assert np.array_equal(reader.tokenize(scan).reshape(-1, 3), codes[0])
        assert reader.tokenize(scan).shape == (-(-frames // 4), 2, 3)
        assert reader.signal(scan).shape == reader.reconstruct(scan).shape == (frames, rois)
        assert np.array_equal(reader.signal(scan), features["fmri_values"][0].T[:frames])
        assert np.array_equal(reader.reconstruct(scan), decoded[0].T[:frames])
        surprise = reader.surprise(scan)
        assert surprise.shape == (-(-frames // 4), 3)
        assert np.allclose(surprise, reader.model.surprise(codes)[0], rtol=1e-5)


def test_every_window_of_a_long_scan_counts(reader: ScanReader, scans: list[dict]) -> None:
    signal = np.random.default_rng(2).normal(1000, 10, (32, 5)).astype(np.float32)
    signal[:, 4] = np.nan
    scan = {**scans[0], "signal": signal}
    found = reader.ask(scan, QUESTION, CHOICES)
    assert found == {**found, **about(32, 32, windows=2, missing=(4,))}
    prepared = reader.processor.feature_extractor(scan, window="sliding")
    shares = []
    for window in range(2):
        codes = reader.model.model.get_fmri_codes(
            *(prepared[name][window : window + 1] for name in ("fmri_values", "roi_coordinates", "fmri_mask"))
        )
        prompt = inputs(reader, scan) | {"fmri_codes": codes}
        prompt = {name: prompt[name] for name in ("input_ids", "attention_mask", "fmri_codes")}
        shares.append(reader.model.score_choices(prompt, reader.processor.encode_choices(CHOICES))[0].softmax(-1))
    # the mean of log-probabilities, as in an evaluation
    mean = torch.stack(shares).log().mean(0).softmax(-1)
    assert np.allclose(list(found["probabilities"].values()), mean, rtol=1e-3)
    assert found["answer"] == CHOICES[int(mean.argmax())]
    first = reader.ask(scan, QUESTION, CHOICES, window="first")
    assert np.allclose(list(first["probabilities"].values()), shares[0], rtol=1e-3)
    # of text and codes there is no mean: what was read is said
    text = reader.ask(scan, QUESTION, max_new_tokens=2)
    assert text["window"] == about(16, 32)["window"]
    assert len(reader.tokenize(scan)) == 4 and len(reader.tokenize(scan, window="full")) == 8
    assert reader.ask(scan, QUESTION, CHOICES, window="full")["window"] == about(32, 32)["window"]


def test_missing_roi_is_nan_in_every_signal(reader: ScanReader, scans: list[dict]) -> None:
    signal = scans[0]["signal"].copy()
    signal[:, 2] = np.nan
    scan = {**scans[0], "signal": signal}
    for found in (reader.signal(scan), reader.reconstruct(scan), reader.forecast(scan)):
        assert np.isnan(found[:, 2]).all() and np.isfinite(np.delete(found, 2, axis=1)).all()


def test_forecast_follows_the_last_window(reader: ScanReader, scans: list[dict]) -> None:
    long = np.random.default_rng(2).normal(1000, 10, (400, 5)).astype(np.float32)
    features = reader.processor.feature_extractor({**scans[0], "signal": long}, window="full")
    last = {name: value if name == "roi_coordinates" else value[..., 384:400] for name, value in features.items()}
    expected = reader.model.forecast(**last, seconds=10)[0].T
    assert np.allclose(reader.forecast({**scans[0], "signal": long}, 10), expected, atol=1e-5)
    assert [one.shape for one in reader.forecast(scans, 20)] == [(10, 5), (10, 7)]
    assert reader.forecast(scans[1], 20, num_samples=3).shape == (3, 10, 7)
    assert reader.forecast(scans[1], 20, window="full").shape == (10, 7)
    with pytest.raises(ValueError, match="window 'full'.*got 'first'"):
        reader.forecast(scans[1], 20, window="first")


def test_embedding_is_the_mean_state_of_the_scan(reader: ScanReader, scans: list[dict]) -> None:
    prompt = reader.processor("<|fmri_pad|>", scans[0], window="first")
    states = reader.model.model(**prompt).last_hidden_state[0].detach()
    inside = states[prompt["input_ids"][0] == reader.processor.fmri_token_id]
    assert len(inside) == 8
    assert np.allclose(reader.embed(scans[0]), inside.mean(0), atol=1e-6)
    assert reader.embed(scans[0]).dtype == np.float32 and len(reader.embed(scans)) == 2


def test_table_gains_columns_and_keeps_its_own(reader: ScanReader, table: pd.DataFrame) -> None:
    before = table.copy()
    with pytest.raises(ValueError, match=r"scan 1 \(counted from 0\): which atlas"):
        reader.embed(table)
    table = table.assign(atlas="tiny")
    asked = reader.ask(table, QUESTION, CHOICES)
    assert list(asked.columns) == [*before.columns, "answer", *(f"probability of {choice}" for choice in CHOICES)]
    assert list(asked.index) == [7, 3] and list(asked["subject"]) == ["a", "b"]
    first = reader.ask(table["path"].iloc[0], QUESTION, CHOICES, **OPTIONS)
    assert asked["answer"].iloc[0] == first["answer"]
    assert asked["probability of no"].iloc[0] == pytest.approx(first["probabilities"]["no"], rel=1e-3)
    assert np.array_equal(reader.tokenize(table)["codes"].iloc[1], reader.tokenize(table["path"].iloc[1], **OPTIONS))
    assert list(reader.describe(table, max_new_tokens=2).columns) == [*before.columns, "description"]
    # what is not in the table is said once for all
    assert len(reader.forecast(table[["path"]], **OPTIONS)["forecast"].iloc[0]) == 16
    with pytest.raises(ValueError, match="a column 'path', got columns"):
        reader.ask(table.rename(columns={"path": "file"}), QUESTION)


def test_dataset_is_read_like_a_list_of_its_rows(reader: ScanReader, scans: list[dict]) -> None:
    rows = Dataset.from_list([{**scan, "signal": scan["signal"].tolist(), "sex": "F"} for scan in scans])
    assert reader.ask(rows, QUESTION, CHOICES) == reader.ask(list(rows), QUESTION, CHOICES)
    for found, expected in zip(reader.tokenize(rows), reader.tokenize(scans), strict=True):
        assert np.array_equal(found, expected)


def test_unfit_calls_are_refused(reader: ScanReader, scans: list[dict], signal: np.ndarray) -> None:
    with pytest.raises(ValueError, match="one question or as many as scans, 2, got 3"):
        reader.ask(scans, ["Why?"] * 3)
    with pytest.raises(ValueError, match="one scan and no choices to stream"):
        reader.ask(scans, QUESTION, stream=True)
    with pytest.raises(ValueError, match="expected window .* got 'sliding'"):
        reader.tokenize(scans[0], window="sliding")
    with pytest.raises(ValueError, match="^the scan's repetition time is not known"):
        reader.signal(signal, atlas="tiny")
    with pytest.raises(ValueError, match="scan 1 .*no scan at nowhere.npy"):
        reader.signal([signal, "nowhere.npy"], **OPTIONS)


def test_dtype_and_device_are_chosen(folder: Path, scans: list[dict]) -> None:
    reader = fmrilm.load(folder, "cpu", dtype="bfloat16")
    assert reader.model.model.causal_lm.dtype == torch.bfloat16 and not reader.model.training
    assert reader.embed(scans[0]).dtype == reader.reconstruct(scans[0]).dtype == np.float32
    assert sum(reader.ask(scans[0], QUESTION, CHOICES)["probabilities"].values()) == pytest.approx(1, abs=1e-2)


def test_what_is_no_model_is_refused(tmp_path: Path, tiny_codec) -> None:
    with pytest.raises(ValueError, match="which holds no config.json"):
        fmrilm.load(tmp_path)
    with pytest.raises(ValueError, match="got runs/demo/no-model, which is neither"):
        fmrilm.load("runs/demo/no-model")
    tiny_codec.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of type 'fmrilm' in .*, got one of type 'fmri_codec'"):
        fmrilm.load(tmp_path)
