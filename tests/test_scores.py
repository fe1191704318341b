"""Scores of scans: ridge regression across subjects, what it becomes in a model, and the summary tokens' start."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from fmrilm.configuration_fmrilm import FmriLMConfig
from fmrilm.processors.descriptors.measures import CORE_NAMES
from fmrilm.processors.descriptors.phrases import PHRASES
from fmrilm.training import ridge
from fmrilm.training.alignment.examples import ANSWER_SPREAD, fit_frequencies, fit_scores, read_scores, score_targets
from fmrilm.training.alignment.joint import (
    answer_embeddings,
    descriptor_embeddings,
    name_embeddings,
    with_answers,
)
from fmrilm.training.data.tasks import load_task
from helpers import random_examples


def regression(rows: int = 40, features: int = 6, subjects: int = 10, noise: float = 0.5, seed: int = 0):
    """Features [rows, features], targets [rows, 2] linear in them, and subjects [rows]."""
    rng = np.random.default_rng(seed)
    inputs = 3 + rng.standard_normal((rows, features)) * rng.uniform(0.1, 10, features)
    weight = rng.standard_normal((features, 2)) / inputs.std(0)[:, None]
    targets = inputs @ weight + noise * rng.standard_normal((rows, 2))
    return inputs, targets, np.array([f"s{row % subjects}" for row in range(rows)])


@pytest.mark.parametrize(("rows", "features"), [(40, 6), (12, 30)])
def test_ridge_equals_that_of_scikit_learn(rows: int, features: int, monkeypatch) -> None:
    monkeypatch.setattr(ridge, "PENALTIES", (3.0,))
    inputs, targets, subjects = regression(rows, features, subjects=6)
    fitted = ridge.cross_fitted_ridge(inputs, targets, subjects)
    scaled = (inputs - inputs.mean(0)) / inputs.std(0) / np.sqrt(features)
    expected = Ridge(3.0 * rows / 1000).fit(scaled, targets)
    assert np.allclose(fitted.predict(inputs), expected.predict(scaled))
    # a fold holds whole subjects: those who are predicted by the same others
    for subject in np.unique(subjects):
        mine = subjects == subject
        candidates = [
            Ridge(3.0 * (~away).sum() / 1000).fit(scaled[~away], targets[~away]).predict(scaled[mine])
            for other in np.unique(subjects)
            for away in [mine | (subjects == other)]
        ]
        assert any(np.allclose(fitted.out_of_fold[mine], candidate) for candidate in candidates)


def test_features_of_a_small_block_count_more_where_that_predicts_better(monkeypatch) -> None:
    monkeypatch.setattr(ridge, "PENALTIES", (30.0,))
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((60, 42))
    targets = np.stack([inputs[:, 40:].sum(1), inputs[:, :40].sum(1)], 1)
    subjects = np.array([f"s{row % 20}" for row in range(60)])
    fitted = ridge.cross_fitted_ridge(inputs, targets, subjects, blocks=(40, 2))
    scaled = (inputs - inputs.mean(0)) / inputs.std(0)
    for target, sizes in enumerate(([*[80] * 40, *[4] * 2], 42)):
        weighted = scaled / np.sqrt(sizes)
        expected = Ridge(30.0 * 60 / 1000).fit(weighted, targets[:, target]).predict(weighted)
        assert np.allclose(fitted.predict(inputs)[:, target], expected)


def test_predictions_of_features_apart_are_added_where_that_is_nearer() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((300, 20))
    subjects = np.array([f"s{row % 100}" for row in range(300)])
    first, second = inputs[:, :12].sum(1), inputs[:, 12:].sum(1)
    noise = 3 * rng.standard_normal((2, 300))
    targets = np.stack([first, first + second + noise[0], noise[1], np.full(300, np.nan)], 1)
    targets[:50, 1] = np.nan
    fitted = ridge.cross_fitted_ridge(inputs, targets, subjects, apart=8)
    alone = ridge.cross_fitted_ridge(inputs[:, :12], targets, subjects)
    apart = ridge.cross_fitted_ridge(inputs[:, 12:], targets, subjects)
    # what the first features say all of
    assert np.allclose(fitted.weight[:12, 0], alone.weight[:, 0]) and not fitted.weight[12:, 0].any()
    # both, in standard deviations of their predictions for subjects left out
    known = np.isfinite(targets[:, 1])
    total = sum(each.out_of_fold[known, 1] / each.out_of_fold[known, 1].std() for each in (alone, apart))
    line = np.polyfit(total, targets[known, 1], 1)
    assert np.allclose(fitted.out_of_fold[known, 1], np.polyval(line, total))
    assert fitted.r_squared[1] > max(alone.r_squared[1], apart.r_squared[1])
    new = rng.standard_normal((5, 20))
    parts = [
        each.predict(rows)[:, 1] / each.out_of_fold[known, 1].std()
        for each, rows in ((alone, new[:, :12]), (apart, new[:, 12:]))
    ]
    assert np.allclose(fitted.predict(new)[:, 1], np.polyval(line, sum(parts)))
    assert np.isnan(fitted.r_squared[3]) and np.isfinite(fitted.predict(new)).all()
    # of features that say nothing, and of some that are always the same
    inputs[:, 12:] = 1
    still = ridge.cross_fitted_ridge(inputs, targets, subjects, apart=8)
    assert np.allclose(still.predict(inputs), alone.predict(inputs[:, :12]))


@given(st.integers(0, 9), st.integers(2, 12), st.floats(-100, 100), st.integers(0, 5), st.booleans())
@settings(max_examples=30, deadline=None)
def test_out_of_fold_prediction_knows_nothing_of_the_subject(
    left_out: int, subjects: int, shift: float, seed: int, gaps: bool
) -> None:
    inputs, targets, names = regression(36, subjects=subjects)
    # the last rows of a subject, if it has three
    targets[24:, 1] = np.nan if gaps else targets[24:, 1]
    mine = names == f"s{left_out % subjects}"
    changed = targets + shift * mine[:, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ridge, "PENALTIES", (1.0,))
        before, after = (ridge.cross_fitted_ridge(inputs, y, names, seed).out_of_fold for y in (targets, changed))
    assert np.allclose(before[mine], after[mine])
    assert abs(shift) < 1 or subjects == 2 or not np.allclose(before[~mine], after[~mine])


def test_penalty_follows_the_noise_of_each_target() -> None:
    inputs, targets, subjects = regression(60, 30, noise=0.0)
    targets[:, 1] = np.random.default_rng(1).standard_normal(60)
    fitted = ridge.cross_fitted_ridge(inputs, targets, subjects)
    assert fitted.r_squared[0] > 0.9 and -0.3 < fitted.r_squared[1] < 0.3
    # nothing but the mean is left where there is nothing to find
    assert fitted.predict(inputs)[:, 1].std() < 0.5 * targets[:, 1].std()


@pytest.mark.parametrize("of_each", [1, 2, 3])
def test_answers_of_very_few_subjects_are_not_predicted_the_other_way(of_each: int) -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        answers = np.repeat([0.0, 1.0], of_each)
        inputs = rng.standard_normal((2 * of_each, 30)) + 4 * answers[:, None]
        found = ridge.cross_fitted_ridge(inputs, answers[:, None], np.arange(2 * of_each).astype(str), seed)
        predicted = np.where(np.isfinite(found.out_of_fold), found.out_of_fold, found.predict(inputs))[:, 0]
        assert np.corrcoef(predicted, answers)[0, 1] > 0.5


def test_rows_without_a_target_count_for_the_others_alone() -> None:
    inputs, targets, subjects = regression()
    known = np.arange(40) < 30
    with_gaps = np.column_stack([targets, targets[:, 1], np.full(40, np.nan)])
    with_gaps[~known, 1] = np.nan
    fitted = ridge.cross_fitted_ridge(inputs, with_gaps, subjects)
    complete = ridge.cross_fitted_ridge(inputs, targets, subjects)
    assert np.allclose(fitted.out_of_fold[:, [0, 2]], complete.out_of_fold)
    assert fitted.r_squared[1] > 0.5 and np.isnan(fitted.r_squared[3])
    assert not fitted.predict(inputs)[:, 3].any() and np.isnan(fitted.out_of_fold[:, 3]).all()
    assert np.isfinite(fitted.out_of_fold[:, 1]).all()
    with pytest.raises(ValueError, match="at least 2 subjects to fit scores on, got 1"):
        ridge.cross_fitted_ridge(inputs, targets, np.array(["s"] * 40))


# --- scores of a model


def codec_examples(model, windows: int = 60):
    """Examples whose features are those of their codes, and targets [windows, 2] that follow from these."""
    examples = random_examples(windows)
    codes = torch.from_numpy(np.stack(examples.codes)).long()
    features = model.model.codec.scan_features(codes).numpy()
    chosen = features[:, :2] + 0.1 * np.random.default_rng(0).standard_normal((windows, 2)) * features[:, :2].std(0)
    return dataclasses.replace(examples, features=features), codes, 5 + 3 * chosen


def test_scores_are_cross_fitted_and_have_a_standard_deviation_of_one(llama) -> None:
    examples, codes, targets = codec_examples(llama)
    targets[50:, 1] = np.nan
    fitted, r_squared = fit_scores(llama, examples, ["age", "motion"], targets, seed=0)
    assert np.allclose(fitted.scores.std(0), 1, atol=1e-5) and np.allclose(fitted.scores.mean(0), 0, atol=1e-5)
    assert (r_squared > 0.5).all()
    subjects = np.array([row["subject"] for row in examples.rows])
    out_of_fold = ridge.cross_fitted_ridge(examples.features, targets, subjects, 0).out_of_fold[:50]
    assert np.corrcoef(fitted.scores[:50, 1], out_of_fold[:, 1])[0, 1] > 0.9999
    read = read_scores(llama, examples).scores
    assert np.allclose(read, llama.model.get_fmri_scores(codes).numpy(), atol=1e-4)
    # those whose target is unknown as well: others of the same subject have one
    assert not any(np.allclose(read[rows], fitted.scores[rows], atol=1e-3) for rows in (slice(50), slice(50, None)))
    assert np.corrcoef(read[:50, 0], fitted.scores[:50, 0])[0, 1] > 0.8


def test_scores_of_answers_have_a_smaller_standard_deviation(llama) -> None:
    examples, _, targets = codec_examples(llama)
    llama.config.score_names = ["age", "sex=male"]
    fitted, _ = fit_scores(llama, examples, llama.config.score_names, targets, seed=0)
    assert np.allclose(fitted.scores.std(0), [1, ANSWER_SPREAD], atol=1e-5)


def test_other_scores_stay_as_they_are(llama) -> None:
    examples, _, targets = codec_examples(llama)
    before = llama.model.summary.readout.weight.clone()
    fitted, _ = fit_scores(llama, examples, ["motion"], targets[:, 1:], seed=0)
    assert torch.equal(before[0], llama.model.summary.readout.weight[0])
    assert np.allclose(fitted.scores[:, 0], read_scores(llama, examples).scores[:, 0])


def test_model_with_answers_reads_the_old_scores_as_before(llama, processor) -> None:
    _, codes, _ = codec_examples(llama)
    llama.model.summary.embeddings.weight.data.normal_()
    wider = with_answers(llama, processor, [load_task("sex"), load_task("asd")], ["sex=male", "asd=autism"])
    assert wider.config.num_summary_tokens == processor.summary_tokens > llama.config.num_summary_tokens
    scores = llama.model.get_fmri_scores(codes)
    assert torch.allclose(wider.model.get_fmri_scores(codes)[:, : scores.shape[1]], scores, atol=1e-6)
    new = torch.cat([scores, torch.randn(len(scores), 2)], 1)
    assert torch.allclose(
        wider.model.summary(new)[:, -llama.config.num_summary_tokens :], llama.model.summary(scores), atol=1e-5
    )
    same = set(llama.state_dict()) - {name for name in llama.state_dict() if "summary" in name}
    assert all(torch.equal(wider.state_dict()[name], llama.state_dict()[name]) for name in same)


def test_training_leaves_no_trace_of_other_scores_in_a_token(llama, processor) -> None:
    choices = [f"handedness={word}" for word in ("left", "right", "both")]
    model = with_answers(llama, processor, [load_task("sex"), load_task("handedness")], ["sex=male", *choices])
    summary, config = model.model.summary, model.config
    optimizer = torch.optim.AdamW(summary.embeddings.parameters(), lr=0.1)
    for _ in range(3):
        summary(torch.randn(4, len(config.score_names))).square().mean().backward()
        optimizer.step()
    scores = torch.randn(1, len(config.score_names))
    before = summary(scores)
    for place, token in enumerate(config.score_tokens):
        moved = scores.clone()
        moved[:, place] += 1
        changed = (summary(moved) != before).any(-1).nonzero()[:, 1].tolist()
        assert changed == [token], config.score_names[place]
    assert len(set(config.score_tokens[-3:])) == 1


@pytest.mark.parametrize("places", [[0], [0, 4], [0, -1]])
def test_scores_of_other_tokens_than_there_are_are_refused(llama, places) -> None:
    given = {**llama.config.to_dict(), "score_tokens": places}
    with pytest.raises(ValueError, match="score_tokens"):
        FmriLMConfig.from_dict(given)


def word_embedding(model, processor, text: str) -> torch.Tensor:
    """The mean of the embeddings of a word's tokens."""
    tokens = processor.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
    return model.get_input_embeddings().weight[tokens].mean(0)


def test_scores_of_a_task_are_its_answer_in_words(llama, processor) -> None:
    """The higher the score, the nearer the token is to the word of the answer; the words around it stay."""
    sex = load_task("sex")
    bias, weights, places = answer_embeddings(llama, processor, [sex], [f"sex={sex.choice_words[1]}"])
    ids = processor.tokenizer("The sex is", add_special_tokens=False)["input_ids"]
    assert torch.equal(bias[: len(ids)], llama.get_input_embeddings().weight[ids])
    assert places == [len(ids)]
    first, second = (word_embedding(llama, processor, word) for word in sex.choice_words)
    assert torch.allclose(bias[len(ids)], (first + second) / 2, atol=1e-5)
    assert torch.allclose(weights[0], second - first, atol=1e-5)


def test_summary_tokens_of_a_descriptor_are_its_name_and_its_level(llama, processor) -> None:
    names = torch.tensor([5, 9, 7])
    bias, weights = descriptor_embeddings(llama, processor, names)
    low, typical, high = (word_embedding(llama, processor, level) for level in ("low", "typical", "high"))
    assert torch.allclose(weights, (high - low).expand(3, -1), atol=1e-5)
    assert torch.allclose(bias[::2], llama.get_input_embeddings().weight[names])
    assert torch.allclose(bias[1::2], typical.expand(3, -1))


def test_names_are_tokens_of_text_and_of_the_summary(llama, processor) -> None:
    """A question, its answer and the summary have the same embedding of a name, in untied heads as well."""
    phrase = PHRASES.get(llama.config.score_names[0], llama.config.score_names[0])
    tokens = processor.tokenizer.tokenize(f"Is the {phrase} low? The {phrase} is low.")
    alone, before_a_level = (token for token in tokens if phrase in token)
    assert (alone, before_a_level) == (f" {phrase}", f" {phrase} is")
    first, second = processor.tokenizer.convert_tokens_to_ids([alone, before_a_level])
    for table in (llama.get_input_embeddings().weight, llama.get_output_embeddings().weight):
        near = torch.nn.functional.cosine_similarity(table[first], table[[second, first + 2]])
        assert near[0] > near[1] and not torch.equal(table[first], table[second])
    assert torch.equal(llama.model.summary.embeddings.bias[0], llama.get_input_embeddings().weight[second])
    assert processor.tokenizer.decode([first, second]) == f" {phrase} {phrase} is"


def test_names_of_shared_words_are_told_apart() -> None:
    table = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    words = [[0, 1, 2, 3, one] for one in (4, 5, 6, 7)]
    named = name_embeddings(table, words)
    means = torch.stack([table[each].mean(0) for each in words])
    nearest = torch.nn.functional.cosine_similarity(named[:, None], named[None], dim=-1)
    before = torch.nn.functional.cosine_similarity(means[:, None], means[None], dim=-1)
    apart = ~torch.eye(4, dtype=torch.bool)
    assert nearest[apart].max() < before[apart].min()
    # each is nearest to the words that are its own
    assert ((named - named.mean(0)) @ (means - means.mean(0)).T).argmax(1).tolist() == [0, 1, 2, 3]


def test_targets_are_z_scores_numbers_and_choices() -> None:
    sex, hand = ["F", "M", "M", None], ["left", "right", "both", "left"]
    columns = {"session": [None] * 4, "sex": sex, "age": [20.0, None, 40.0, 60.0], "handedness": hand}
    rows = [{"subject": f"s{row}", **{name: cells[row] for name, cells in columns.items()}} for row in range(4)]
    examples = random_examples(4, rows)
    tasks = [load_task(name) for name in ("age", "sex", "handedness")]
    names, targets = score_targets(examples, list(CORE_NAMES), tasks)
    second = tasks[1].choice_words[1]
    assert names[-5:-3] == ["age", f"sex={second}"]
    assert names[-3:] == [f"handedness={word}" for word in tasks[2].choice_words]
    assert np.array_equal(targets[:, :-5], examples.z_scores, equal_nan=True)
    assert np.array_equal(targets[:, -5], [20, np.nan, 40, 60], equal_nan=True)
    found = [np.nan if value is None else float(tasks[1].answer(value) == second) for value in sex]
    assert np.array_equal(targets[:, -4], found, equal_nan=True)
    assert targets[:, -3:].argmax(1).tolist() == [tasks[2].choice_words.index(word) for word in hand]


def test_next_codes_start_at_their_frequencies(llama) -> None:
    codes = [np.array([[3, 1, 4], [1, 5, 9]] * 3), np.array([[3, 1, 5], [1, 5, 9]])]
    fit_frequencies(llama, codes)
    chances = llama.model.fmri_head.frequencies.exp()
    assert torch.allclose(chances.sum(-1), torch.ones(2, 3))
    assert torch.isclose(chances[0, 2, 4], torch.tensor((3 + 1) / (4 + 16)))
    assert torch.isclose(chances[1, 2, 9], torch.tensor((4 + 1) / (4 + 16)))
