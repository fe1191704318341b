"""Training: data and chats as stated, stages that learn what they should and nothing else, honest evaluation."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import Trainer, TrainingArguments

from fmrilm import FmriLMForConditionalGeneration
from fmrilm.processors import FMRI_END, FMRI_START, Atlas
from fmrilm.processors.descriptors.cohort import DESCRIPTOR_NAMES, LEVELS, Cohort, describe
from fmrilm.processors.descriptors.text import QUESTIONS, REQUESTS, description, family, parse, question
from fmrilm.training import evaluate
from fmrilm.training.alignment import AlignmentTrainer, add_lora, train_alignment
from fmrilm.training.chats import alignment_dataset, instruction_dataset, scan_block, text_block, user
from fmrilm.training.collator import ChatCollator, pad_codes, with_token_counts
from fmrilm.training.data import MixedWindows, PreparedScan, Window, collate_signals, cut_windows, split_subjects
from fmrilm.training.sft import train_sft


Model = FmriLMForConditionalGeneration
ASKED = {question(name, variant): name for name in DESCRIPTOR_NAMES for variant in range(len(QUESTIONS))}


def atlas(name: str = "small", rois: int = 9) -> Atlas:
    return Atlas(
        name=name,
        rois=tuple(f"{name}_{i}" for i in range(rois)),
        networks=tuple(("Vis", "SomMot", "Default")[i % 3] for i in range(rois)),
        coordinates=np.random.default_rng(rois).uniform(-60, 60, (rois, 3)),
    )


def prepared(subject: str, dataset: str = "study", frames: int = 40, of: Atlas | None = None, seed: int = 0):
    """A scan of noise with some memory: [frames, rois]."""
    of = of or atlas()
    noise = np.random.default_rng(seed + sum(map(ord, subject))).standard_normal((frames + 3, len(of)))
    signal = sum(noise[lag : lag + frames] for lag in range(4)) / 2
    return PreparedScan(signal.astype(np.float32), of, dataset, subject, "1")


def random_scans(windows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Codes [windows, tokens] whose first two say which window they are of, and levels with unknown ones."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(16, size=(windows, 8))
    codes[:, 0], codes[:, 1] = np.divmod(np.arange(windows), 16)
    return codes, rng.integers(-1, 3, size=(windows, len(DESCRIPTOR_NAMES)))


def window_of(row: dict) -> int:
    return row["codes"][0][0] * 16 + row["codes"][0][1]


def chats(rows: int = 8, statements: int = 1) -> Dataset:
    weights = [0.4, 0.3, 0.3]
    return instruction_dataset(*random_scans(8), rows, questions=2, statements=statements, weights=weights, seed=0)


def options(folder, **changes) -> dict:
    return {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
        **changes,
    }


def trainer(model: Model, processor, folder, of: type[Trainer] = Trainer, **changes) -> Trainer:
    return of(
        model=model,
        args=TrainingArguments(**options(folder, **changes)),
        train_dataset=chats(),
        eval_dataset=chats(2),
        data_collator=ChatCollator(processor),
    )


@torch.no_grad()
def loss(model: Model | PeftModel, processor) -> float:
    return model.eval()(**ChatCollator(processor)(list(chats()))).loss.item()


def equal_states(first: torch.nn.Module, second: dict[str, torch.Tensor]) -> bool:
    state = first.state_dict()
    return state.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in state.items())


# --- stages


@pytest.mark.parametrize("backbone", ["llama", "qwen3", "gpt2"])
def test_plain_trainer_lowers_the_loss(backbone: str, tiny_model, processor, tmp_path) -> None:
    model = tiny_model(backbone)
    before = loss(model, processor)
    trainer(model, processor, tmp_path, max_steps=12).train()
    assert loss(model, processor) < 0.8 * before


def test_resumed_training_equals_uninterrupted_training(tiny_model, processor, tmp_path) -> None:
    whole, resumed = tiny_model("gpt2"), tiny_model("gpt2")
    trainer(whole, processor, tmp_path / "whole", save_strategy="steps", save_steps=3).train()
    untrained = copy.deepcopy(resumed.state_dict())
    second = trainer(resumed, processor, tmp_path / "resumed")
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert second.state.global_step == 6
    assert not equal_states(whole, untrained) and equal_states(resumed, whole.state_dict())
    assert "model.codec.quantizer.codebook" in untrained


@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
def test_lora_trains_attention_projector_and_head(backbone: str, tiny_model, processor, tmp_path) -> None:
    model = tiny_model(backbone)
    codec = copy.deepcopy(model.model.codec.state_dict())
    frozen = model.model.language_model.get_input_embeddings().weight.clone()
    adapted = add_lora(model, 2)
    trainable = {name for name, value in adapted.named_parameters() if value.requires_grad}
    projector = dict(tiny_model().model.projector.named_parameters())
    whole = {f"model.projector.modules_to_save.default.{name}" for name in projector}
    whole.add("fmri_head.modules_to_save.default.weight")
    layer = "model.language_model.layers.{}.self_attn.{}.lora_{}.default.weight"
    projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
    if backbone == "gpt2":
        layer, projections = "model.language_model.h.{}.attn.{}.lora_{}.default.weight", ["c_attn"]
    lora = {layer.format(index, name, part) for index in range(2) for name in projections for part in "AB"}
    assert trainable == {f"base_model.model.{name}" for name in whole | lora}

    before = {name: value.detach().clone() for name, value in adapted.named_parameters()}
    train_alignment(adapted, chats(), processor, TrainingArguments(**options(tmp_path)))
    changed = {name for name, value in adapted.named_parameters() if not torch.equal(value, before[name])}
    assert changed == trainable
    assert equal_states(adapted.base_model.model.model.codec, codec)
    assert torch.equal(adapted.get_input_embeddings().weight, frozen)


def test_alignment_logs_both_losses(tiny_model, processor, tmp_path) -> None:
    model = tiny_model()
    aligned = trainer(model, processor, tmp_path, AlignmentTrainer, max_steps=4, eval_strategy="steps", eval_steps=1)
    aligned.train()
    logs = [entry for entry in aligned.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        expected = entry["text_loss"] + model.config.fmri_loss_weight * entry["fmri_loss"]
        # losses are logged with the batches' shares of the labels, parts as means of the batches
        assert entry["loss"] == pytest.approx(expected, rel=0.02)


def test_accumulated_batches_train_as_one(tiny_model, processor, tmp_path) -> None:
    # one text about four scans: each has the same number of labels
    rows = [{**chats(1)[0], "codes": [codes.tolist()]} for codes in random_scans(4)[0]]
    models = []
    for size in (4, 1):
        model = tiny_model()
        values = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 1, "max_grad_norm": 0.0}
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        args = TrainingArguments(**options(tmp_path, **values, **sizes))
        Trainer(model=model, args=args, train_dataset=rows, data_collator=ChatCollator(processor)).train()
        models.append(model)
    for name in ("lm_head", "fmri_head"):
        untrained, whole, parts = (model.get_submodule(name).weight for model in (tiny_model(), *models))
        assert not torch.allclose(whole, untrained, atol=1e-3)
        assert torch.allclose(whole, parts, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tuned_adapter_merges_into_the_same_model(checkpointing: bool, tiny_model, processor, tmp_path) -> None:
    adapted = add_lora(tiny_model("qwen3"), 4)
    before = loss(adapted, processor)
    codec = copy.deepcopy(adapted.base_model.model.model.codec.state_dict())
    tuned = train_sft(
        adapted,
        chats(),
        processor,
        **options(tmp_path, max_steps=12, bf16=False, gradient_checkpointing=checkpointing),
    )
    assert tuned is adapted and loss(adapted, processor) < 0.9 * before
    inputs = ChatCollator(processor)(list(chats(2)))
    inputs.pop("labels")
    expected = adapted(**inputs).logits
    merged = adapted.merge_and_unload()
    assert isinstance(merged, FmriLMForConditionalGeneration) and equal_states(merged.model.codec, codec)
    assert torch.allclose(merged(**inputs).logits, expected, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = FmriLMForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert torch.equal(loaded(**inputs).logits, merged(**inputs).logits)


# --- batches


WORDS = st.text(st.sampled_from("abcdefghi XYZ.?\nü€0123"), min_size=1, max_size=20)


@st.composite
def conversations(draw) -> dict:
    """Questions with zero to two scans, each followed by an answer; perhaps a system message first."""
    messages, codes = [], []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(WORDS)})
    for _ in range(draw(st.integers(1, 3))):
        blocks = []
        for _ in range(draw(st.integers(0, 2))):
            blocks += [scan_block(), text_block(draw(WORDS))]
            codes.append(draw(st.lists(st.integers(0, 15), min_size=2, max_size=8)))
        messages.append(user(*blocks, text_block(draw(WORDS))))
        answer = draw(WORDS)
        messages.append({"role": "assistant", "content": draw(st.sampled_from([answer, [text_block(answer)]]))})
    return {"messages": messages, "codes": codes}


@given(st.lists(conversations(), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_labels_are_what_the_assistant_says(processor, rows: list[dict]) -> None:
    originals = copy.deepcopy(rows)
    batch = ChatCollator(processor)(rows)
    assert rows == originals
    assert ("fmri_codes" in batch) == any(row["codes"] for row in rows)
    labelled = batch["labels"] != -100
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])
    assert not (labelled & (batch["attention_mask"] == 0)).any()
    assert not (labelled & (batch["input_ids"] == processor.fmri_token_id)).any()
    said = "{}<|im_end|>"
    for row, labels in zip(rows, batch["labels"], strict=True):
        answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        texts = [answer if isinstance(answer, str) else answer[0]["text"] for answer in answers]
        decoded = processor.tokenizer.decode(labels[labels != -100], clean_up_tokenization_spaces=False)
        assert decoded == "".join(map(said.format, texts))
    scans = [scan for row in rows for scan in row["codes"]]
    assert (batch["input_ids"] == processor.fmri_token_id).sum() == sum(map(len, scans))
    if scans:
        assert batch["fmri_codes"][batch["fmri_codes"] >= 0].tolist() == sum(scans, [])


def test_batches_are_padded_on_the_right_whatever_the_tokenizer_prefers(processor) -> None:
    processor.tokenizer.padding_side = "left"
    batch = ChatCollator(processor)(list(chats(4)))
    assert (batch["attention_mask"].diff(dim=1) <= 0).all() and (batch["attention_mask"] == 0).any()


@pytest.mark.parametrize(("scans", "message"), [(2, "2 scans, got 1"), (0, "0 scans, got 1")])
def test_scans_and_blocks_must_pair_up(processor, scans: int, message: str) -> None:
    row = {**chats(1)[0], "codes": [[1, 2]] * scans}
    with pytest.raises(ValueError, match=message):
        ChatCollator(processor)([row])


def test_chat_without_an_answer_is_refused(processor) -> None:
    rows = [chats(1)[0], {"messages": [user(text_block("a question"))], "codes": []}]
    with pytest.raises(ValueError, match="expected an assistant's answer"):
        ChatCollator(processor)(rows)


def test_padding_codes_take_no_placeholder(tiny_model, processor) -> None:
    row = chats(1)[0]
    padded = {**row, "codes": [row["codes"][0] + [-1, -1]]}
    first, second = (ChatCollator(processor)([item]) for item in (row, padded))
    assert torch.equal(first["input_ids"], second["input_ids"])
    model = tiny_model()
    assert torch.equal(model(**first).loss, model(**second).loss)


def test_signals_are_padded_and_masked() -> None:
    rng = np.random.default_rng(0)
    items = [
        {
            "signal": rng.standard_normal((8, rois)).astype(np.float32),
            "coordinates": rng.standard_normal((rois, 3)).astype(np.float32),
            "descriptors": np.array([rois], np.float32),
        }
        for rois in (2, 5)
    ]
    batch = collate_signals(items)
    assert batch["fmri_values"].shape == (2, 5, 8) and batch["descriptors"].tolist() == [[2], [5]]
    assert batch["fmri_mask"].any(-1).sum(1).tolist() == [2, 5] and not batch["fmri_values"][0, 2:].any()
    for row, item in enumerate(items):
        count = item["signal"].shape[1]
        assert torch.equal(batch["fmri_values"][row, :count], torch.from_numpy(item["signal"].T))
        assert torch.equal(batch["roi_coordinates"][row, :count], torch.from_numpy(item["coordinates"]))


# --- chats


def test_paradigms_come_with_their_weights() -> None:
    weights, rows = np.array([0.2, 0.5, 0.3]), 600
    dataset = instruction_dataset(*random_scans(40), rows, questions=3, statements=2, weights=weights, seed=1)
    counts = np.zeros(3)
    for chat in dataset["messages"]:
        request = chat[0]["content"][1]["text"]
        assert (request in REQUESTS) != (request in ASKED)
        counts[2 if request in REQUESTS else int(len(chat) == 6)] += 1
    # within four standard deviations
    assert (np.abs(counts - rows * weights) < 4 * np.sqrt(rows * weights * (1 - weights))).all()


def test_answers_are_the_true_levels_of_known_descriptors() -> None:
    codes, levels = random_scans(30)
    levels[:, 1] = -1
    dataset = instruction_dataset(codes, levels, 60, questions=4, statements=3, weights=[0.3, 0.4, 0.3], seed=2)
    stated = 0
    for row in dataset:
        truth = levels[window_of(row)]
        chat = row["messages"]
        assert [block["type"] for block in chat[0]["content"]] == ["fmri", "text"]
        for asked, answered in zip(chat[::2], chat[1::2], strict=True):
            assert (asked["role"], answered["role"]) == ("user", "assistant")
            text, answer = asked["content"][-1]["text"], answered["content"][0]["text"]
            claims = parse(answer) if text in REQUESTS else [(ASKED[text], answer)]
            assert claims
            for name, level in claims:
                assert truth[DESCRIPTOR_NAMES.index(name)] == LEVELS.index(level)
                stated += 1
        names = [ASKED.get(message["content"][-1]["text"]) for message in chat[::2]]
        assert len(set(names)) == len(names)
    assert stated > 100


def test_alignment_describes_every_window_before_any_comes_again() -> None:
    codes, levels = random_scans(20)
    dataset = alignment_dataset(codes, levels, 50, statements=5, seed=3)
    drawn = [window_of(row) for row in dataset]
    assert sorted(drawn[:20]) == sorted(drawn[20:40]) == list(range(20)) and len(drawn) == 50
    for row in dataset:
        claims = parse(row["messages"][1]["content"][0]["text"])
        assert len(claims) == len(dict(claims)) == 5
        truth = levels[window_of(row)]
        assert all(truth[DESCRIPTOR_NAMES.index(name)] == LEVELS.index(level) for name, level in claims)


def test_descriptions_parse_back() -> None:
    rng = np.random.default_rng(0)
    for _ in range(2000):
        levels = rng.integers(3, size=len(DESCRIPTOR_NAMES))
        chosen = rng.permutation(len(DESCRIPTOR_NAMES))[: rng.integers(1, 12)]
        assert parse(description(levels, chosen)) == [(DESCRIPTOR_NAMES[i], LEVELS[levels[i]]) for i in chosen]


# --- data


@given(
    st.lists(st.tuples(st.sampled_from("AB"), st.integers(0, 6)), min_size=1, max_size=30),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_no_subject_is_on_both_sides(keys: list[tuple[str, int]], count: int, random) -> None:
    of = atlas()
    scans = [PreparedScan(np.zeros((1, 9)), of, dataset, f"s{number}", "1") for dataset, number in keys]
    subjects = {dataset: {number for name, number in keys if name == dataset} for dataset, _ in keys}
    held_out = {dataset: min(count, len(members)) for dataset, members in subjects.items()}
    training, away = split_subjects(scans, held_out)
    sides = [{(scan.dataset, scan.subject) for scan in side} for side in (training, away)]
    assert not sides[0] & sides[1] and len(training) + len(away) == len(scans)
    assert all(sum(name == dataset for name, _ in sides[1]) == held_out[dataset] for dataset in subjects)
    random.shuffle(scans)
    assert {(scan.dataset, scan.subject) for scan in split_subjects(scans, held_out)[1]} == sides[1]


def test_more_subjects_than_there_are_cannot_be_held_out() -> None:
    with pytest.raises(ValueError, match="at most 2 subjects to hold out of 'study', got 3"):
        split_subjects([prepared("a"), prepared("b")], {"study": 3})


def test_windows_are_cut_at_each_stride() -> None:
    scan = prepared("a", frames=40)
    windows = cut_windows([scan, prepared("b", frames=10)], length=16, stride=8)
    assert [window.start for window in windows] == [0, 8, 16, 24]
    for window in windows:
        assert np.array_equal(window.signal, scan.signal[window.start : window.start + 16])
        assert np.array_equal(window.descriptors, describe(window.signal, scan.atlas), equal_nan=True)


def mixtures(max_rois: int = 100, seed: int = 0) -> MixedWindows:
    scans = [prepared("a"), prepared("b"), prepared("c", of=atlas("large", 12))]
    descriptors = np.stack([window.descriptors for window in cut_windows(scans, 16, 4)])
    return MixedWindows(scans, Cohort.fit(descriptors, 3), 16, max_rois, size=20, seed=seed)


def test_mixtures_depend_on_seed_and_index_alone() -> None:
    first, second = mixtures(), mixtures()
    expected = [first[index] for index in range(20)]
    np.random.seed(5)
    for index in reversed(range(20)):
        found = second[index]
        assert all(np.array_equal(expected[index][name], found[name], equal_nan=True) for name in found)
    signals = [item["signal"] for item in [*expected, *(mixtures(seed=1)[index] for index in range(20))]]
    assert all(
        first.shape != second.shape or not np.array_equal(first, second)
        for index, first in enumerate(signals)
        for second in signals[:index]
    )


def test_mixtures_come_with_their_own_descriptors() -> None:
    dataset = mixtures()
    atlases = {9: atlas(), 12: atlas("large", 12)}
    sizes = set()
    for item in (dataset[index] for index in range(20)):
        of = atlases[item["signal"].shape[1]]
        sizes.add(len(of))
        expected = dataset.cohort.z_scores(describe(item["signal"], of))
        assert np.allclose(item["descriptors"], expected, atol=1e-3, equal_nan=True)
        assert np.array_equal(item["coordinates"], of.coordinates)
        assert np.isfinite(item["descriptors"]).any()
    assert sizes == {9, 12}


def test_mixtures_keep_some_rois_and_the_descriptors_of_all() -> None:
    whole, part = mixtures(), mixtures(max_rois=4)
    for index in range(10):
        all_rois, chosen = whole[index], part[index]
        rows = [all_rois["coordinates"].tolist().index(row) for row in chosen["coordinates"].tolist()]
        assert len(rows) == 4 and rows == sorted(rows)
        assert np.array_equal(chosen["signal"], all_rois["signal"][:, rows])
        assert np.array_equal(chosen["descriptors"], all_rois["descriptors"], equal_nan=True)


# --- evaluation


@pytest.mark.parametrize("backbone", ["llama", "qwen3", "gpt2"])
def test_questions_of_one_scan_score_as_if_asked_one_by_one(backbone: str, tiny_model, processor) -> None:
    model, codes = tiny_model(backbone), np.array([3, 1, 4, 1, 5, 9])
    asked = [0, 30, len(DESCRIPTOR_NAMES) - 1]
    scores = evaluate.score_questions(model, processor, codes, asked)
    for row, index in enumerate(asked):
        chat = with_token_counts([user(scan_block(), text_block(question(DESCRIPTOR_NAMES[index])))], [codes])
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        for column, level in enumerate(LEVELS):
            answer = torch.tensor([processor.tokenizer(level, add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                logits = model(torch.cat([prompt, answer], -1), fmri_codes=pad_codes([codes])).logits
            likely = logits[0, -answer.shape[1] - 1 : -1].log_softmax(-1).gather(1, answer[0, :, None]).sum()
            assert scores[row, column] == pytest.approx(likely.item(), abs=1e-4)


def test_descriptions_start_after_the_prompt(tiny_model, processor) -> None:
    texts = evaluate.describe_windows(tiny_model(), processor, [np.array([3, 1, 4, 1]), np.array([5, 9])], 5)
    assert len(texts) == 2 and not any(FMRI_START in text or FMRI_END in text or "assistant" in text for text in texts)


def window(subject: str, dataset: str = "study") -> Window:
    scan = prepared(subject, dataset)
    return Window(scan.signal[:16], np.zeros(len(DESCRIPTOR_NAMES)), scan, 0)


def scored(subject: str, truth: list[int], **answers: list[int]) -> evaluate.Scored:
    """The same four questions in each family, and what is answered to them under each condition."""
    families = sorted({family(name) for name in DESCRIPTOR_NAMES})
    asked = [[i for i, name in enumerate(DESCRIPTOR_NAMES) if family(name) == wanted][:4] for wanted in families]
    scores = {name: np.log(np.eye(3)[answer * len(families)] + 0.1) for name, answer in answers.items()}
    return evaluate.Scored(window(subject), np.concatenate(asked), np.array(truth * len(families)), scores)


def test_results_are_balanced_accuracies() -> None:
    answers = {"right": [0, 1, 1, 2], "swapped": [0, 0, 0, 0], "noise": [2, 2, 2, 1]}
    rows = [scored("a", [0, 0, 1, 2], **answers), scored("b", [0, 0, 1, 2], **answers)]
    results = evaluate.question_results(rows, np.ones(len(DESCRIPTOR_NAMES), int), seed=0)["families"]
    assert list(results) == [*dict.fromkeys(family(name) for name in DESCRIPTOR_NAMES), "all"]
    for name, result in results.items():
        assert result["questions"] == (24 if name == "all" else 8)
        # recalls of low, typical and high: 1/2, 1, 1; then 1, 0, 0; then 0, 0, 0; the majority says typical
        for key, expected in (("right", 5 / 6), ("swapped", 1 / 3), ("noise", 0), ("majority", 1 / 3)):
            assert result[key]["accuracy"] == pytest.approx(expected)
            # both subjects alike: no draw of subjects differs
            assert result[key]["interval"] == pytest.approx([expected, expected])
        assert result["difference"]["value"] == pytest.approx(0.5) and result["beats_swapped"]


def test_intervals_are_as_wide_as_subjects_differ() -> None:
    perfect, wrong = [0, 1, 2, 0], [1, 2, 0, 1]
    rows = [
        scored("a", perfect, right=perfect, swapped=wrong, noise=wrong),
        scored("b", perfect, right=wrong, swapped=wrong, noise=wrong),
    ]
    result = evaluate.question_results(rows, np.zeros(len(DESCRIPTOR_NAMES), int), seed=0)["families"]["all"]
    assert result["right"]["accuracy"] == pytest.approx(0.5)
    # one draw in four takes the same subject twice
    assert result["right"]["interval"] == pytest.approx([0, 1])
    assert result["difference"]["interval"] == pytest.approx([0, 1]) and not result["beats_swapped"]


def test_swapped_window_is_of_another_subject_of_the_same_dataset() -> None:
    windows = [window(subject, dataset) for dataset in ("one", "two") for subject in ("a", "b", "c") for _ in range(3)]
    swapped = evaluate.swapped_windows(windows, windows, seed=0)
    for own, other in zip(windows, swapped, strict=True):
        assert own.scan.dataset == other.scan.dataset and own.scan.subject != other.scan.subject
    assert len({id(other) for other in swapped}) > 6
    again = evaluate.swapped_windows(windows, windows, seed=0)
    assert all(first is second for first, second in zip(swapped, again, strict=True))


def test_only_subject_of_a_dataset_has_none_to_swap_with() -> None:
    windows = [window("a", "one"), window("a", "one"), window("b", "two")]
    with pytest.raises(ValueError, match="another subject in dataset 'one'"):
        evaluate.swapped_windows(windows[:1], windows, seed=0)


def test_questions_are_of_known_descriptors_of_all_families() -> None:
    levels = random_scans(1)[1][0]
    asked = evaluate.choose_questions(levels, 3, np.random.default_rng(0))
    assert (levels[asked] >= 0).all() and len(set(asked)) == len(asked)
    families = [family(name) for name in DESCRIPTOR_NAMES]
    known = [name for name, level in zip(families, levels, strict=True) if level >= 0]
    chosen = [families[index] for index in asked]
    assert all(chosen.count(name) == min(3, known.count(name)) for name in set(families))


def test_share_of_true_statements() -> None:
    levels = np.full((2, len(DESCRIPTOR_NAMES)), -1)
    levels[0, :3] = [0, 1, 2]
    texts = [description(np.array([0, 2, 2]), [0, 1, 2]) + " " + description(np.ones(9, int), [8]), "nothing known"]
    assert evaluate.statement_accuracy(texts, levels) == pytest.approx(2 / 3)
    said = np.ones(len(DESCRIPTOR_NAMES), int)
    assert evaluate.statement_accuracy(texts, levels, said) == pytest.approx(1 / 3)
    assert evaluate.statement_accuracy(["nothing"], levels[:1]) is None


def test_most_frequent_level_leaves_out_what_is_unknown() -> None:
    levels = np.array([[-1, 2, 0], [-1, 2, 1], [2, 0, 1]])
    assert evaluate.most_frequent(levels).tolist() == [2, 2, 1]


def test_pca_of_patches_is_exact_with_enough_components() -> None:
    scans = [prepared("a"), prepared("b", of=atlas("large", 12))]
    windows = cut_windows(scans, 16, 8)
    exact, coarse = (evaluate.PatchPCA(scans, 4, components) for components in (36, 2))
    for item in windows:
        # 37 patches of each scan span 36 dimensions around their mean
        assert np.allclose(exact.reconstruct(item), item.signal, atol=1e-4)
    signals = [item.signal for item in windows]
    assert 0 < evaluate.r_squared(signals, [coarse.reconstruct(item) for item in windows]) < 0.9


def test_r_squared_of_known_guesses() -> None:
    signals = [item.signal for item in cut_windows([prepared("a")], 16, 8)]
    means = [np.full_like(signal, signal.mean()) for signal in signals]
    halves = [(signal + mean) / 2 for signal, mean in zip(signals, means, strict=True)]
    assert evaluate.r_squared(signals, signals) == 1
    assert evaluate.r_squared(signals, means) == pytest.approx(0, abs=1e-6)
    # half of the deviation is missing: a quarter of its square
    assert evaluate.r_squared(signals, halves) == pytest.approx(0.75, abs=1e-5)


def test_fc_correlation_of_known_guesses() -> None:
    signals = [item.signal for item in cut_windows([prepared("a")], 16, 8)]
    assert evaluate.fc_correlation(signals, signals) == pytest.approx(1)
    # correlations ignore offset and scale of each ROI
    assert evaluate.fc_correlation(signals, [3 * signal + np.arange(9) for signal in signals]) == pytest.approx(1)
    assert evaluate.fc_correlation(signals, [signal[:, ::-1] for signal in signals]) < 0.9
    flat = [signal.copy() for signal in signals]
    flat[1][:, 4] = 7
    assert evaluate.fc_correlation(signals, flat) is None


def test_codebook_results_of_known_codes() -> None:
    results = evaluate.codebook_results(np.array([[0, 1, 2, 3], [0, 1, 2, 3]]), codebook_size=16)
    assert results["codebook_used"] == 4 and results["perplexity"] == pytest.approx(4)
    assert results["numbers_per_window"] == 4 and results["bits_per_window"] == 16


def test_reconstruction_is_the_decoded_codes(tiny_codec) -> None:
    windows = cut_windows([prepared("a"), prepared("b", of=atlas("large", 12))], 16, 16)
    for item, guess in zip(windows, evaluate.reconstruct(tiny_codec, windows), strict=True):
        values = torch.from_numpy(item.signal.T)[None]
        coordinates = torch.from_numpy(item.scan.atlas.coordinates.copy())[None]
        expected = tiny_codec.decode(tiny_codec.encode(values, coordinates), coordinates)[0].T.detach().numpy()
        assert guess.shape == item.signal.shape and np.allclose(guess, expected, atol=1e-5)
