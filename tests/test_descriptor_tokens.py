"""What the codec tells of a scan, in the places of descriptor tokens; sheets of them behind scans."""

import numpy as np
import pytest
import torch
from conftest import build_tiny_atlas, build_tiny_codec, build_tiny_language_model, build_tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForMultimodalLM

from fmrilm import FmriLMConfig, FmriLMForConditionalGeneration, FmriLMProcessor
from fmrilm.descriptors_fmrilm import FmriLMDescriptorTokens
from fmrilm.processors import FmriLMFeatureExtractor, descriptor_token
from fmrilm.processors.descriptors.cohort import LEVELS
from fmrilm.processors.descriptors.measures import CORE_NAMES
from fmrilm.processors.descriptors.text import fact_sheet
from fmrilm.training.alignment.chats import alignment_dataset, instruction_dataset
from fmrilm.training.alignment.joint import add_lora, join, scan_processor
from fmrilm.training.alignment.start import fit_levels
from fmrilm.training.data.collator import ChatCollator, pad_codes, with_token_counts
from helpers import random_scans


Model = FmriLMForConditionalGeneration
NAMES = ["connectivity/Vis-Default", "strength/Vis", "autocorrelation/Default"]
LONG, SHORT = [3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8]


@pytest.fixture
def reader() -> tuple[Model, FmriLMProcessor]:
    codec = build_tiny_codec(descriptor_names=NAMES)
    extractor = FmriLMFeatureExtractor(atlases=[build_tiny_atlas()], patch_length=4, window_length=16)
    processor = scan_processor(extractor, build_tiny_tokenizer(), codec.config)
    language_model = build_tiny_language_model("llama", len(processor.tokenizer) - 3 - len(NAMES))
    return join(codec, language_model, processor).eval(), processor


def chat(*scans: list[int], question: str = "old?") -> list[dict]:
    blocks = [{"type": "fmri"} for _ in scans]
    messages = [{"role": "user", "content": [*blocks, {"type": "text", "text": question}]}]
    return with_token_counts(messages, [np.array(scan) for scan in scans])


def inputs(processor: FmriLMProcessor, *chats: list[dict], scans: list[list[int]]) -> dict[str, torch.Tensor]:
    encoded = processor.apply_chat_template(list(chats), padding_side="left")
    return {**encoded, "fmri_codes": pad_codes([np.array(scan) for scan in scans])}


@given(z=st.floats(-6, 6), middle=st.floats(-2, 2), width=st.floats(-3, 1), sharpness=st.floats(-2, 3))
def test_levels_are_probabilities_that_rise_with_the_score(z, middle, width, sharpness) -> None:
    config = FmriLMConfig(
        codec_config={"descriptor_names": ["strength/Vis"]},
        text_config={"model_type": "llama", "hidden_size": 32},
        descriptor_token_ids=[5],
    )
    tokens = FmriLMDescriptorTokens(config)
    with torch.no_grad():
        tokens.middle.fill_(middle), tokens.log_width.fill_(width), tokens.log_sharpness.fill_(sharpness)
        lower, upper = (tokens.probabilities(torch.tensor([[value]]))[0, 0] for value in (z, z + 0.5))
    assert lower.min() >= 0 and torch.isclose(lower.sum(), torch.tensor(1.0))
    assert upper[2] >= lower[2] and upper[0] <= lower[0]


def test_sheet_names_each_descriptor_and_holds_its_token(reader) -> None:
    _, processor = reader
    tokens = [descriptor_token(name) for name in NAMES]
    lines = ["visual and default mode", "visual overall", "default mode persistence"]
    expected = "".join(f"\n{line}:{token}" for line, token in zip(lines, tokens, strict=True)) + "\n"
    assert processor.sheet == expected
    assert f"<|fmri_end|>{expected}old?" in processor.apply_chat_template(chat(LONG), tokenize=False)
    assert all(len(processor.tokenizer(token, add_special_tokens=False)["input_ids"]) == 1 for token in tokens)
    own = chat(LONG)
    own[0]["content"][0]["sheet"] = "\nnothing\n"
    assert "<|fmri_end|>\nnothing\nold?" in processor.apply_chat_template(own, tokenize=False)


def test_processor_without_a_sheet_writes_none(processor) -> None:
    asked = chat(LONG)
    asked[0]["content"][0]["sheet"] = fact_sheet(NAMES, LEVELS)
    assert "<|fmri_end|>old?" in processor.apply_chat_template(asked, tokenize=False)


def test_typed_descriptor_token_is_refused(reader) -> None:
    _, processor = reader
    with pytest.raises(ValueError, match="typed placeholder: <|fmri:strength/Vis|>"):
        processor.apply_chat_template(chat(LONG, question="Is it <|fmri:strength/Vis|>?"))


def test_token_stands_for_what_the_codec_tells_of_the_scan_before(reader) -> None:
    model, processor = reader
    batch = inputs(processor, chat(LONG, SHORT), chat(SHORT), scans=[LONG, SHORT, SHORT])
    embeddings = model.model.embed(batch["input_ids"], batch["fmri_codes"])
    ids = torch.tensor(model.config.descriptor_token_ids)
    places = torch.isin(batch["input_ids"], ids)
    assert places.sum(-1).tolist() == [2 * len(NAMES), len(NAMES)]
    long, short = (
        model.model.descriptors(model.model.describe_scans(torch.tensor([scan])))[0] for scan in (LONG, SHORT)
    )
    assert not torch.allclose(long, short, atol=1e-4)
    assert torch.allclose(embeddings[places], torch.cat([long, short, short]), atol=1e-6)


def test_batch_gives_what_single_chats_give(reader) -> None:
    model, processor = reader
    batch = inputs(processor, chat(LONG, SHORT), chat(SHORT), scans=[LONG, SHORT, SHORT])
    together = model(**batch).logits[:, -1]
    alone = [
        model(**inputs(processor, chat(LONG, SHORT), scans=[LONG, SHORT])).logits[:, -1],
        model(**inputs(processor, chat(SHORT), scans=[SHORT])).logits[:, -1],
    ]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_token_without_a_scan_before_is_refused(reader) -> None:
    model, processor = reader
    ids = inputs(processor, chat(LONG), scans=[LONG])["input_ids"]
    token = torch.tensor([[model.config.descriptor_token_ids[0]]])
    with pytest.raises(ValueError, match="a scan before each descriptor token"):
        model(torch.cat([token, ids], 1), fmri_codes=torch.tensor([LONG]))


def test_ids_must_be_as_many_as_the_codecs_descriptors(reader) -> None:
    model, _ = reader
    with pytest.raises(ValueError, match="for the 3 descriptors of the codec, got 2"):
        FmriLMConfig(
            codec_config=model.config.codec_config, text_config=model.config.text_config, descriptor_token_ids=[1, 2]
        )


def test_generated_text_holds_no_descriptor_tokens_and_a_saved_reader_reads_the_same(reader, tmp_path) -> None:
    model, processor = reader
    batch = inputs(processor, chat(LONG), scans=[LONG])
    written = model.generate(**batch, max_new_tokens=8, do_sample=False)
    new = written[:, batch["input_ids"].shape[1] :]
    assert not torch.isin(new, torch.tensor(model.config.descriptor_token_ids)).any()
    model.save_pretrained(tmp_path), processor.save_pretrained(tmp_path)
    again, sheet = AutoModelForMultimodalLM.from_pretrained(tmp_path), FmriLMProcessor.from_pretrained(tmp_path).sheet
    assert sheet == processor.sheet
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_levels_are_told_as_the_words_of_their_names(reader) -> None:
    model, processor = reader
    words = model.get_input_embeddings().weight
    for level, embedding in zip(LEVELS, model.model.descriptors.levels.weight, strict=True):
        ids = processor.tokenizer(f" {level}", add_special_tokens=False)["input_ids"]
        assert torch.allclose(embedding, words[ids].mean(0))


def test_fit_finds_where_the_levels_part(reader) -> None:
    model, _ = reader
    codes = np.random.default_rng(0).integers(16, size=(200, 8))
    with torch.no_grad():
        z_scores = model.model.describe_scans(torch.from_numpy(codes)).numpy()
    bounds = np.quantile(z_scores, [0.2, 0.6], axis=0)
    levels = (z_scores > bounds[0]).astype(int) + (z_scores > bounds[1])
    levels[:10] = -1
    tokens = model.model.descriptors

    def share() -> float:
        with torch.no_grad():
            guesses = tokens.probabilities(torch.from_numpy(z_scores)).argmax(-1).numpy()
        return (guesses == levels)[10:].mean()

    before = share()
    assert fit_levels(model, codes, levels) > 0.85 > before
    assert share() > 0.85


def test_adapter_trains_the_level_words(reader) -> None:
    model, processor = reader
    adapted = add_lora(model, 2)
    batch = inputs(processor, chat(LONG), scans=[LONG])
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    trained = [name for name, value in adapted.named_parameters() if "descriptors" in name and value.grad is not None]
    assert any("levels" in name for name in trained) and not any("codec" in name for name in trained)


@pytest.mark.parametrize("make", [instruction_dataset, alignment_dataset])
def test_sheets_in_words_tell_the_true_levels_and_bring_no_scan(make) -> None:
    codes, levels = random_scans(30)
    arguments = {"questions": 3, "weights": [0.3, 0.5, 0.2]} if make is instruction_dataset else {
        "texts": ["text"], "weights": [1, 0, 0]
    }
    rows = make(codes, levels, rows=60, statements=3, seed=1, in_words=0.5, **arguments)
    told = [row for row in rows if not row["codes"]]
    assert 15 < len(told) < 45
    by_line = {fact_sheet([name], [""])[1:-2]: name for name in CORE_NAMES}
    assert len(by_line) == len(CORE_NAMES)
    for row in told:
        content = row["messages"][0]["content"]
        assert [block["type"] for block in content] == ["text", "text"]
        lines = dict(line.split(": ") for line in content[0]["text"].strip().split("\n"))
        found = {CORE_NAMES.index(by_line[line]): LEVELS.index(level) for line, level in lines.items()}
        # a window of these levels exists
        assert any(all(window[index] == level for index, level in found.items()) for window in levels)


def test_short_sheets_hold_what_is_asked(reader) -> None:
    codes, levels = random_scans(30)
    rows = instruction_dataset(codes, levels, rows=60, questions=3, statements=3, weights=[0, 1, 0], seed=1)
    counts = set()
    for row in rows:
        sheet = row["messages"][0]["content"][0]["sheet"]
        counts.add(sheet.count("<|fmri:"))
        assert sheet.count(":<|fmri:") == sheet.count("\n") - 1
    assert min(counts) >= 3 and max(counts) > 20


def test_rows_with_sheets_become_batches(reader) -> None:
    model, processor = reader
    codes, levels = random_scans(8)
    # those alone that this codec describes
    asked = np.full_like(levels, -1)
    for index in map(CORE_NAMES.index, NAMES):
        asked[:, index] = levels[:, index].clip(0)
    rows = instruction_dataset(codes, asked, 6, questions=2, statements=2, weights=[0, 0.5, 0.5], seed=0, in_words=0.5)
    batch = ChatCollator(processor)(list(rows))
    assert torch.isfinite(model(**batch).loss)
