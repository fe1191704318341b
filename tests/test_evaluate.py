"""What evaluation measures."""


import numpy as np
import pytest
import torch

from fmrilm import FmriLMForConditionalGeneration
from fmrilm.processors import FMRI_END, FMRI_START
from fmrilm.processors.descriptors.cohort import LEVELS
from fmrilm.processors.descriptors.measures import CORE_NAMES
from fmrilm.processors.descriptors.text import description, family, question
from fmrilm.training.alignment.chats import scan_block, text_block, user
from fmrilm.training.codec.metrics import codebook_results
from fmrilm.training.data.collator import pad_codes, with_token_counts
from fmrilm.training.data.dataset import Window, cut_windows
from fmrilm.training.evaluation import levels as evaluate
from fmrilm.training.evaluation.baselines import most_frequent
from helpers import atlas, prepared, random_scans


Model = FmriLMForConditionalGeneration


@pytest.mark.parametrize("backbone", ["llama", "qwen3", "gpt2"])
def test_questions_of_one_scan_score_as_if_asked_one_by_one(backbone: str, tiny_model, processor) -> None:
    model, codes = tiny_model(backbone), np.array([3, 1, 4, 1, 5, 9])
    asked = [0, 30, len(CORE_NAMES) - 1]
    scores = evaluate.score_questions(model, processor, codes, asked)
    for row, index in enumerate(asked):
        chat = with_token_counts([user(scan_block(), text_block(question(CORE_NAMES[index])))], [codes])
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
    return Window(scan.signal[:16], np.zeros(len(CORE_NAMES)), scan, 0)


def scored(subject: str, truth: list[int], **answers: list[int]) -> evaluate.Scored:
    """The same four questions in each family, and what is answered to them under each condition."""
    families = sorted({family(name) for name in CORE_NAMES})
    asked = [[i for i, name in enumerate(CORE_NAMES) if family(name) == wanted][:4] for wanted in families]
    scores = {name: np.log(np.eye(3)[answer * len(families)] + 0.1) for name, answer in answers.items()}
    return evaluate.Scored(window(subject), np.concatenate(asked), np.array(truth * len(families)), scores)


def test_results_are_balanced_accuracies() -> None:
    answers = {"right": [0, 1, 1, 2], "swapped": [0, 0, 0, 0], "noise": [2, 2, 2, 1]}
    rows = [scored("a", [0, 0, 1, 2], **answers), scored("b", [0, 0, 1, 2], **answers)]
    results = evaluate.question_results(rows, np.ones(len(CORE_NAMES), int), seed=0)["families"]
    assert list(results) == [*dict.fromkeys(family(name) for name in CORE_NAMES), "all"]
    for name, result in results.items():
        assert result["questions"] == (24 if name == "all" else 8)
        # recalls of low, typical and high: 1/2, 1, 1; then 1, 0, 0; then 0, 0, 0; the majority says typical
        for key, expected in (("right", 5 / 6), ("swapped", 1 / 3), ("noise", 0), ("majority", 1 / 3)):
            assert result[key]["accuracy"] == pytest.approx(expected)
            # both subjects alike: no draw of subjects differs
            assert result[key]["interval"] == pytest.approx([expected, expected])
        assert result["difference"]["value"] == pytest.approx(0.5) and result["beats_swapped"]


def test_answers_with_several_swapped_scans_count_as_one() -> None:
    truth = [0, 1, 2, 0]
    row = scored("a", truth, right=truth, swapped=truth, noise=truth)
    wrong = scored("a", truth, right=[1, 2, 0, 1], swapped=[1, 2, 0, 1], noise=truth)
    both = np.stack([row.scores["swapped"], wrong.scores["swapped"]])
    item = evaluate.Scored(row.window, row.asked, row.truth, {**row.scores, "swapped": both})
    results = evaluate.question_results([item], np.zeros(len(CORE_NAMES), int), seed=0)["families"]["all"]
    assert results["questions"] == len(row.truth)
    assert results["right"]["accuracy"] == 1
    assert results["swapped"]["accuracy"] == 0.5
    assert results["people"] == [{"right": 1.0, "swapped": 0.5, "answers": [6, 3, 3]}]


def test_intervals_are_as_wide_as_subjects_differ() -> None:
    perfect, wrong = [0, 1, 2, 0], [1, 2, 0, 1]
    rows = [
        scored("a", perfect, right=perfect, swapped=wrong, noise=wrong),
        scored("b", perfect, right=wrong, swapped=wrong, noise=wrong),
    ]
    result = evaluate.question_results(rows, np.zeros(len(CORE_NAMES), int), seed=0)["families"]["all"]
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
    families = [family(name) for name in CORE_NAMES]
    known = [name for name, level in zip(families, levels, strict=True) if level >= 0]
    chosen = [families[index] for index in asked]
    assert all(chosen.count(name) == min(3, known.count(name)) for name in set(families))


def test_share_of_true_statements() -> None:
    levels = np.full((2, len(CORE_NAMES)), -1)
    levels[0, :3] = [0, 1, 2]
    texts = [description(np.array([0, 2, 2]), [0, 1, 2]) + " " + description(np.ones(9, int), [8]), "nothing known"]
    assert evaluate.statement_accuracy(texts, levels) == pytest.approx(2 / 3)
    said = np.ones(len(CORE_NAMES), int)
    assert evaluate.statement_accuracy(texts, levels, said) == pytest.approx(1 / 3)
    assert evaluate.statement_accuracy(["nothing"], levels[:1]) is None


def test_most_frequent_level_leaves_out_what_is_unknown() -> None:
    levels = np.array([[-1, 2, 0], [-1, 2, 1], [2, 0, 1]])
    assert most_frequent(levels).tolist() == [2, 2, 1]


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
    results = codebook_results(np.array([[0, 1, 2, 3], [0, 1, 2, 3]]), codebook_size=16)
    assert results["codebook_used"] == 4 and results["perplexity"] == pytest.approx(4)
    assert results["numbers_per_window"] == 4 and results["bits_per_window"] == 16


def test_reconstruction_is_the_decoded_codes(tiny_codec) -> None:
    windows = cut_windows([prepared("a"), prepared("b", of=atlas("large", 12))], 16, 16)
    for item, guess in zip(windows, evaluate.reconstruct(tiny_codec, windows), strict=True):
        values = torch.from_numpy(item.signal.T)[None]
        coordinates = torch.from_numpy(item.scan.atlas.coordinates.copy())[None]
        expected = tiny_codec.decode(tiny_codec.encode(values, coordinates), coordinates)[0].T.detach().numpy()
        assert guess.shape == item.signal.shape and np.allclose(guess, expected, atol=1e-5)
