import copy
import re

import numpy as np
import pytest
import torch
from conftest import build_plain_tokenizer, build_tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from fmrilm.processors import (
    CHAT_TEMPLATE,
    FMRI_END,
    FMRI_PAD,
    FMRI_START,
    FMRI_SUMMARY,
    FmriLMProcessor,
    add_fmri_tokens,
    add_name_tokens,
)
from fmrilm.processors.descriptors.cohort import LEVELS
from fmrilm.processors.descriptors.measures import CORE_NAMES
from fmrilm.processors.descriptors.text import PHRASES, QUESTIONS, Statement, question, sentence
from fmrilm.processors.processing_fmrilm import without_repeats
from helpers import bold


BLOCK = FMRI_START + FMRI_PAD + FMRI_END
AFTER = FMRI_SUMMARY * 4 + FMRI_END
KEYS = ["input_ids", "attention_mask", "fmri_values", "roi_coordinates", "fmri_mask"]
# frames -> tokens, for patches of 4 frames, 2 tokens per patch and windows of 16 frames
TOKENS = {8: 4, 10: 6, 16: 8, 20: 8}


def chat(*scans, answer: str | None = "yes") -> list[dict]:
    blocks = [{"type": "fmri", "fmri": scan, "tr": 2.0} for scan in scans]
    messages = [{"role": "user", "content": [*blocks, {"type": "text", "text": "Is it connected?"}]}]
    return messages + ([] if answer is None else [{"role": "assistant", "content": answer}])


def count(inputs, processor) -> list[int]:
    return (inputs["input_ids"] == processor.fmri_token_id).sum(dim=1).tolist()


def test_adding_the_tokens_again_adds_nothing(tiny_tokenizer) -> None:
    before = len(tiny_tokenizer)
    assert (add_fmri_tokens(tiny_tokenizer), add_fmri_tokens(tiny_tokenizer)) == (4, 0)
    assert len(tiny_tokenizer) == before + 4
    assert len(tiny_tokenizer(BLOCK, add_special_tokens=False)["input_ids"]) == 3
    # tokens that were special stay special
    special = tiny_tokenizer.all_special_tokens
    assert {"<|im_start|>", "<|im_end|>", FMRI_START, FMRI_PAD, FMRI_END} <= set(special)


def test_missing_pad_token_becomes_the_end_of_text(processor) -> None:
    assert processor.tokenizer.pad_token == "<|endoftext|>"


def test_only_inputs_of_the_model_are_returned(processor, signal) -> None:
    inputs = processor(f"Scan: {BLOCK} old?", signal, tr=2.0)
    assert list(inputs) == KEYS and set(processor.model_input_names) == set(KEYS)
    assert count(inputs, processor) == [8]
    text = processor.decode(inputs["input_ids"][0])
    assert text == f"Scan: {FMRI_START}{FMRI_PAD * 8}{AFTER} old?"


@pytest.mark.parametrize("placeholder", [BLOCK, FMRI_PAD, FMRI_START + FMRI_PAD * 30 + AFTER])
def test_forms_of_a_placeholder_are_equal(processor, signal, placeholder: str) -> None:
    expected = processor(f"a {BLOCK} b", signal, tr=2.0)
    assert torch.equal(processor(f"a {placeholder} b", signal, tr=2.0)["input_ids"], expected["input_ids"])


def test_scans_are_taken_in_order_over_all_texts(processor) -> None:
    scans = [bold(frames, seed=seed) for seed, frames in enumerate(TOKENS)]
    inputs = processor([f"{BLOCK}{BLOCK} a", f"b {BLOCK} c {BLOCK}"], scans, tr=2.0)
    assert count(inputs, processor) == [4 + 6, 8 + 8]
    assert processor.feature_extractor.num_patches(inputs["fmri_mask"]) == [n // 2 for n in TOKENS.values()]


@pytest.mark.parametrize(
    "text, scans, message",
    [
        ("no placeholder", 1, "got 0 in the text for 1 scans"),
        (f"{BLOCK} {BLOCK}", 1, "got 2 in the text for 1 scans"),
        (BLOCK, 0, "got 1 in the text for 0 scans"),
        (f"{BLOCK} and {FMRI_START}", 1, "typed placeholder"),
        (None, 1, "got None"),
    ],
)
def test_placeholders_and_scans_must_match(processor, signal, text: str, scans: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        processor(text, [signal] * scans, tr=2.0)


def test_truncated_scan_is_refused(processor, signal) -> None:
    with pytest.raises(ValueError, match="expected 8 tokens.*got 4.*truncated"):
        processor(BLOCK, signal, tr=2.0, truncation=True, max_length=5)


def test_what_was_read_of_each_scan_is_returned_on_demand(processor) -> None:
    inputs = processor.apply_chat_template([chat(bold(8)), chat(bold(40))], return_windows=True)
    assert [(item["stop"], item["scan_seconds"]) for item in inputs.pop("windows")] == [(16, 16), (32, 80)]
    assert list(inputs) == KEYS
    assert processor(BLOCK, bold(8), tr=2.0, return_windows=True)["windows"][0]["frames"] == 8


def test_text_alone_works(processor) -> None:
    assert list(processor("Is it?")) == KEYS[:2]
    assert list(processor.apply_chat_template([{"role": "user", "content": "Is it?"}])) == KEYS[:2]


def test_windows_of_a_scan_in_a_text(processor) -> None:
    assert count(processor(BLOCK, bold(40), tr=2.0, window="full"), processor) == [20]
    with pytest.raises(ValueError, match="'sliding'"):
        processor(BLOCK, bold(40), tr=2.0, window="sliding")
    with pytest.raises(ValueError, match="images"):
        processor("a", images=[1])


# --- chat


def test_chat_is_written_as_chatml(processor, signal) -> None:
    text = processor.apply_chat_template(chat(signal), tokenize=False, add_generation_prompt=True)
    assert text == (
        f"<|im_start|>user\n{FMRI_START}{FMRI_PAD * 8}{AFTER}Is it connected?<|im_end|>\n"
        "<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>assistant\n"
    )


def test_spaces_and_lines_of_a_text_are_kept(processor) -> None:
    content = "  two\n\n lines {{ x }} \n"
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    assert text == f"<|im_start|>user\n{content}<|im_end|>\n"


def test_chat_equals_text_and_scans(processor) -> None:
    conversation = chat(bold(8), bold(10, seed=1))
    inputs = processor.apply_chat_template(conversation)
    text = processor.apply_chat_template(conversation, tokenize=False)
    direct = processor(text, [bold(8), bold(10, seed=1)], tr=2.0)
    assert list(inputs) == list(direct) == KEYS
    torch.testing.assert_close(dict(inputs), dict(direct), rtol=0, atol=0)


def test_conversation_is_left_as_it_was(processor, signal) -> None:
    conversation = chat(signal)
    before = copy.deepcopy(conversation)
    processor.apply_chat_template(conversation)
    assert str(conversation) == str(before) and conversation[0]["content"][0]["fmri"] is signal


@settings(max_examples=15, deadline=None)
@given(
    frames=st.lists(st.lists(st.sampled_from(list(TOKENS)), max_size=2), min_size=1, max_size=3),
    side=st.sampled_from(["left", "right"]),
)
def test_chats_in_a_batch_are_what_they_are_alone(
    frames: list[list[int]], side: str, extractor, module_tokenizer
) -> None:
    processor = FmriLMProcessor(extractor, module_tokenizer, tokens_per_patch=2)
    conversations = [chat(*(bold(n, seed=i) for n in item), answer="yes" * (i + 1)) for i, item in enumerate(frames)]
    batch = processor.apply_chat_template(conversations, return_assistant_tokens_mask=True, padding_side=side)
    assert batch["attention_mask"][:, 0 if side == "right" else -1].all()
    assert count(batch, processor) == [sum(TOKENS[n] for n in item) for item in frames]
    scan = 0
    for row, conversation in enumerate(conversations):
        alone = processor.apply_chat_template(conversation, return_assistant_tokens_mask=True)
        keep = batch["attention_mask"][row].bool()
        for key in ("input_ids", "assistant_masks"):
            assert torch.equal(batch[key][row][keep], alone[key][0])
        assert not batch["assistant_masks"][row][~keep].any()
        for item in alone.get("fmri_values", []):
            rois, time = item.shape
            assert torch.equal(batch["fmri_values"][scan, :rois, :time], item)
            assert not batch["fmri_mask"][scan, :, time:].any()
            scan += 1
    assert scan == len(batch.get("fmri_values", []))


def test_cached_codes_bring_tokens_but_no_values(processor, signal) -> None:
    conversation = [{"role": "user", "content": [{"type": "fmri", "tokens": 6, "fmri": None, "text": None}]}]
    inputs = processor.apply_chat_template(conversation)
    assert list(inputs) == KEYS[:2] and count(inputs, processor) == [6]
    inputs = processor.apply_chat_template([*conversation, *chat(signal)])
    assert len(inputs["fmri_values"]) == 1 and count(inputs, processor) == [14]


def test_block_without_scan_waits_for_it_in_the_text(processor, signal) -> None:
    conversation = [{"role": "user", "content": [{"type": "fmri"}, {"type": "text", "text": "Old?"}]}]
    with pytest.raises(ValueError, match="needs a scan"):
        processor.apply_chat_template(conversation)
    text = processor.apply_chat_template(conversation, tokenize=False)
    assert text.count(FMRI_PAD) == 1
    assert count(processor(text, signal, tr=2.0), processor) == [8]


@pytest.mark.parametrize("token", [FMRI_START, FMRI_PAD, FMRI_SUMMARY, FMRI_END])
@pytest.mark.parametrize("in_block", [True, False])
def test_typed_placeholder_is_refused(processor, token: str, in_block: bool) -> None:
    text = f"ignore the scan {token}"
    content = [{"type": "text", "text": text}] if in_block else text
    with pytest.raises(ValueError, match="typed placeholder"):
        processor.apply_chat_template([{"role": "user", "content": content}])


def test_unknown_block_is_refused(processor) -> None:
    with pytest.raises(Exception, match="expected a block of type text or fmri, got image"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])


def test_block_and_call_must_not_contradict(processor, signal) -> None:
    with pytest.raises(ValueError, match="tr given twice and differently: 1.0 and 2.0"):
        processor.apply_chat_template(chat(signal), tr=1.0)
    block = {"type": "fmri", "fmri": {"signal": signal, "atlas": "tiny"}}
    inputs = processor.apply_chat_template([{"role": "user", "content": [block]}], tr=2.0, atlas="tiny")
    assert count(inputs, processor) == [8]


def test_lists_and_ids_alone_can_be_asked_for(processor, signal) -> None:
    ids = processor.apply_chat_template(chat(signal), return_dict=False)
    plain = processor.apply_chat_template(chat(signal), return_tensors=None)
    assert plain["input_ids"] == ids[0].tolist()
    assert isinstance(plain["fmri_values"], np.ndarray)
    assert processor(BLOCK, signal, tr=2.0, return_tensors=None)["input_ids"].count(processor.fmri_token_id) == 8


def test_options_may_come_as_pipelines_pass_them(processor, signal) -> None:
    conversation = [{"role": "user", "content": [{"type": "fmri", "fmri": signal}]}]
    inputs = processor.apply_chat_template(conversation, processor_kwargs={"tr": 2.0, "window": "full"})
    assert count(inputs, processor) == [10]


def test_control_tokens_of_a_user_can_be_disarmed(processor, signal) -> None:
    conversation = chat(signal, answer=None)
    conversation[0]["content"].append({"type": "text", "text": "<|im_end|>"})
    inputs = processor.apply_chat_template(conversation, sanitize_control_tokens=True)
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (inputs["input_ids"] == end).sum() == 1 and count(inputs, processor) == [8]


@pytest.mark.parametrize("conversation", [[], [[]]])
def test_empty_conversation_is_refused(processor, conversation: list) -> None:
    with pytest.raises(ValueError, match="at least one message"):
        processor.apply_chat_template(conversation)


LLAMA = """{{ bos_token }}{% for message in messages %}\
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""


@pytest.mark.parametrize(
    ("kind", "end"),
    [
        ("ChatML", "<|im_end|>"),
        ("its own template", "<|eot_id|>"),
        ("an end of text alone", "<|endoftext|>"),
        ("nothing", "<|im_end|>"),
    ],
)
def test_answer_ends_with_a_token_that_the_tokenizer_has(kind: str, end: str, extractor, signal) -> None:
    tokenizer = build_plain_tokenizer(**({} if kind == "nothing" else {"eos_token": "<|endoftext|>"}))
    if kind == "ChatML":
        tokenizer = build_tiny_tokenizer()
    if kind == "its own template":
        tokenizer.add_special_tokens({"bos_token": "<|begin_of_text|>", "extra_special_tokens": ["<|eot_id|>"]})
        tokenizer.chat_template = LLAMA
    processor = FmriLMProcessor(extractor, tokenizer, tokens_per_patch=2, summary_tokens=4)
    ends = [tokenizer.convert_tokens_to_ids(end), tokenizer.eos_token_id]
    assert processor.eos_token_ids == list(dict.fromkeys(ends))
    text = processor.apply_chat_template(chat(signal), tokenize=False)
    assert f"{FMRI_START}{FMRI_PAD * 8}{AFTER}Is it connected?{end}" in text
    if kind == "its own template":
        assert text.startswith("<|begin_of_text|><|start_header_id|>user") and text.endswith(f"yes{end}")
    conversation = [*chat(bold(8)), *chat(bold(10, seed=1), answer="no, older")]
    inputs = processor.apply_chat_template([conversation, chat()], return_assistant_tokens_mask=True)
    answers = [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["assistant_masks"], strict=True)]
    assert processor.batch_decode(answers) == [f"yes{end}no, older{end}", f"yes{end}"]
    # a prompt and the answer are the chat that was trained on
    prompt = processor.apply_chat_template(chat(signal, answer=None), add_generation_prompt=True)["input_ids"][0]
    whole = processor.apply_chat_template(chat(signal))["input_ids"][0]
    assert torch.equal(whole[: len(prompt)], prompt)


def test_template_that_does_not_end_answers_is_refused(processor) -> None:
    processor.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    with pytest.raises(ValueError, match="ends an answer with a special token, got 'question answer '"):
        _ = processor.eos_token_ids


def test_template_that_rewrites_earlier_answers_has_no_mask(processor) -> None:
    template = CHAT_TEMPLATE.replace("message['content'] + end", "('' if not loop.last else message['content']) + end")
    with pytest.raises(ValueError, match="where do the assistant's messages lie"):
        processor.apply_chat_template([*chat(), *chat()], template, return_assistant_tokens_mask=True)


# --- choices


A, B = "Connectivity of A is low (z = -0.31).", "Connectivity of B is low (z = -0.31)."


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"{A} {B} {A}", f"{A} {B}"),
        (f"{A}\n{A} {A} {B}", f"{A} {B}"),
        (f"{A} {B} Connectivity of A is", f"{A} {B}"),
        (f"{A} {B} Connectivity of C is", f"{A} {B} Connectivity of C is"),
        (f"{A} Connectivity.", f"{A} Connectivity."),
        ("yes yes 0.5 0.5", "yes yes 0.5 0.5"),
        (" It is. \n", " It is. \n"),
        ("", ""),
    ],
)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_no_sentence_stands_twice_in_a_text(text: str, kept: str, size: int) -> None:
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert "".join(without_repeats(pieces)) == kept


def test_sentences_that_are_new_come_as_they_are_generated() -> None:
    pieces = ["It ", "is ", "low. ", "It ", "is ", "high. It is low. No"]
    assert list(without_repeats(pieces)) == ["It ", "is ", "low.", " It is high. No"]


def test_levels_of_a_named_descriptor_are_encoded_as_sentences(processor) -> None:
    processor.level_words = ["low", "high"]
    ((_, before_a_level), _) = add_name_tokens(processor.tokenizer, ["coupling of networks", "coupling"])
    question = "Is the coupling of networks low or high?"
    ids = processor.encode_choices(["high", "low"], question)
    assert processor.batch_decode(ids) == ["The coupling of networks is high.", "The coupling of networks is low."]
    assert all(before_a_level in each for each in ids)
    for choices, asked in (
        (["yes", "no"], question),
        (["low", "high"], None),
        (["low", "high"], "Is it low or high?"),
        (["low", "high"], "Is the coupling low or the coupling of networks high?"),
    ):
        assert processor.batch_decode(processor.encode_choices(choices, asked)) == choices


def test_answers_about_labels_are_encoded_as_sentences(processor, tmp_path) -> None:
    sex, age = ["Which sex?", "Female or male?"], ["How old is this person?"]
    processor.answer_sentences = [
        {"name": "sex", "choices": ["female", "male"], "questions": sex},
        {"name": "smoker", "choices": ["no", "yes"], "questions": ["Does the person smoke?"]},
        {"name": "age", "choices": [], "questions": age},
    ]
    processor.save_pretrained(tmp_path)
    for known in (processor, FmriLMProcessor.from_pretrained(tmp_path)):
        for asked in (*sex, "Is this a male or a female brain?"):
            assert known.answer_texts(["male", "female"], asked) == ["The sex is male.", "The sex is female."]
        assert known.answer_texts(["yes"], "Does the person smoke?") == ["The smoker is yes."]
        assert known.answer_texts(["7", "70"], age[0]) == ["The age is 7.", "The age is 70."]
        assert known.batch_decode(known.encode_choices(["male", "female"], sex[0]))[0] == "The sex is male."
        # a question about something else, or without the answers that were learned
        for answers, asked in (
            (["yes", "no"], "Does the person drink?"),
            (["yes", "no"], "Does the person drink, yes or no?"),
            (["male", "female"], "Is it a female, or femalemale?"),
            (["male", "female"], None),
            (["male", "female"], "Who is it?"),
            (["man", "woman"], sex[0]),
            (["7", "70"], "How many?"),
        ):
            assert known.answer_texts(answers, asked) == answers


@pytest.mark.parametrize("name", CORE_NAMES[::10])
def test_levels_are_encoded_as_the_sentences_of_descriptions(processor, name: str) -> None:
    processor.level_words = list(LEVELS)
    add_name_tokens(processor.tokenizer, list(PHRASES.values()))
    for wording in range(len(QUESTIONS)):
        ids = processor.encode_choices(LEVELS, question(name, wording))
        assert processor.batch_decode(ids) == [sentence(Statement(name, level)) for level in LEVELS]


def test_names_are_text_for_users_and_survive_saving(processor, tmp_path) -> None:
    """Unlike special tokens they are not marked as text in a chat, and are not left out of answers."""
    add_name_tokens(processor.tokenizer, ["coupling of networks"])
    processor.level_words = ["low", "high"]
    processor.save_pretrained(tmp_path)
    restored = FmriLMProcessor.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "Is the coupling of networks high?"}]
    ids = [each.apply_chat_template(chat)["input_ids"] for each in (processor, restored)]
    assert torch.equal(*ids) and restored.level_words == ["low", "high"]
    assert restored.tokenizer.all_special_tokens == processor.tokenizer.all_special_tokens
    named = restored.tokenizer.convert_tokens_to_ids(" coupling of networks")
    assert (ids[0] == named).sum() == 1
    said = restored.tokenizer(" coupling of networks is")["input_ids"]
    assert restored.decode_answers([said])[0].strip() == "coupling of networks is"


@pytest.mark.parametrize(
    "choices, message",
    [
        (["yes"], "at least 2 choices, got 1"),
        (["yes", "no", "yes"], "different choices"),
        (["a", "a b"], "'a' begin those of 'a b'"),
        (["low", "", "high"], "not empty, got \\['low', '', 'high'\\]"),
        (["", " ", ""], "not empty"),
    ],
)
def test_ambiguous_choices_are_refused(processor, choices: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor.encode_choices(choices)
