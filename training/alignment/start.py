"""The summary tokens' start in closed form: the answers of the frozen language model follow the scores."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm
from transformers import Cache

from fmrilm.modeling_fmrilm import FmriLMForConditionalGeneration
from fmrilm.processors import FmriLMProcessor
from fmrilm.processors.descriptors.cohort import LEVELS
from fmrilm.processors.descriptors.measures import CORE_NAMES
from fmrilm.processors.descriptors.text import QUESTIONS, question

from ..data.collator import pad_codes, with_token_counts
from ..data.tasks import Task, labels_of
from .chats import scan_block, text_block, user
from .examples import Examples


# questions that go through the language model together
BATCH = 8
# ridge penalty on the tokens, as a share of the mean squared gradient
PENALTY = 1e-2
# inverse penalty of the logistic regression of answers on scores
LOGISTIC_C = 10.0
# log-odds a standard deviation, at most: further away the language model is not linear any more
MAX_SLOPE = 1.5


@dataclass(frozen=True)
class Probe:
    """
    A question with its choices, and the answer that scores give. slopes: [choices, scores] and intercepts [choices] of
    the choices' log-odds.
    """

    text: str
    choices: tuple[str, ...]
    slopes: np.ndarray
    intercepts: np.ndarray


def descriptor_probes(examples: Examples, score_names: Sequence[str]) -> list[Probe]:
    """Of the descriptors' questions, in all their wordings; log-odds by logistic regression on each one's score."""
    probes = []
    for column, name in enumerate(CORE_NAMES):
        known = examples.levels[:, column] >= 0
        if name in score_names and len(np.unique(examples.levels[known, column])) == len(LEVELS):
            place = [list(score_names).index(name)]
            odds = _log_odds(examples.scores[known], place, examples.levels[known, column], len(LEVELS))
            probes += [Probe(question(name, variant), LEVELS, *odds) for variant in range(len(QUESTIONS))]
    return probes


def task_probes(examples: Examples, tasks: Sequence[Task], score_names: Sequence[str]) -> list[Probe]:
    """Of the tasks with choices, in all their wordings; log-odds by logistic regression on the task's own scores."""
    probes = []
    for task in tasks:
        words = task.choice_words
        labels = labels_of(task, examples.rows)
        known = np.array([label is not None for label in labels])
        if not words:
            continue
        answers = np.array([words.index(task.answer(label)) for label in labels if label is not None])
        own = [i for i, name in enumerate(score_names) if name.split("=")[0] == task.name]
        if len(np.unique(answers)) < 2:
            raise ValueError(f"task {task.name!r}: expected at least 2 answers among the training scans, got 1")
        odds = _log_odds(examples.scores[known], own, answers, len(words))
        probes += [Probe(text, tuple(words), *odds) for text in task.questions]
    return probes


def _log_odds(
    scores: np.ndarray, columns: list[int], answers: np.ndarray, choices: int
) -> tuple[np.ndarray, np.ndarray]:
    """Slopes [choices, scores] and intercepts [choices]; a choice that nobody has is as unlikely as the rarest."""
    fitted = LogisticRegression(C=LOGISTIC_C, max_iter=1000).fit(scores[:, columns], answers)
    coefficients, intercepts = fitted.coef_, fitted.intercept_
    if len(fitted.classes_) == 2:
        signs = np.array([-0.5, 0.5])
        coefficients, intercepts = signs[:, None] * coefficients, signs * intercepts
    # both by one factor, so that the choices change places at the same scores
    factor = min(1.0, MAX_SLOPE / np.abs(coefficients).max())
    coefficients, intercepts = factor * coefficients, factor * intercepts
    slopes, offsets = np.zeros((choices, scores.shape[1])), np.full(choices, intercepts.min())
    slopes[np.ix_(fitted.classes_, columns)] = coefficients
    offsets[fitted.classes_] = intercepts
    return slopes, offsets


def fit_summary_tokens(
    model: FmriLMForConditionalGeneration, processor: FmriLMProcessor, codes: np.ndarray, probes: Sequence[Probe]
) -> float:
    """
    Moves the map from scores to summary tokens so that, to first order, the language model's log-odds of the choices'
    first tokens are those of the probes: one Gauss-Newton step from where the map is, on the gradients of the logits
    with respect to the tokens at scores of zero. codes: int [tokens, levels] of a scan that stands before them.

    Returns:
        Share of the log-odds' variance, over scores of standard deviation one, that the linear solution reaches.
    """
    summary = model.model.summary
    if summary is None:
        raise ValueError("expected a model with score_names, got one without")
    base = summary.output_proj.bias.detach().view(summary.tokens, -1)
    prompts = [_prompt(processor, probe.text, codes) for probe in probes]
    first = int((prompts[0] == model.config.fmri_summary_token_id).nonzero()[0])
    after = first + summary.tokens
    gradients, offsets, slopes = [], [], []
    with torch.no_grad():
        scan = model.model.embed(
            prompts[0][None, :after].to(model.device),
            fmri_codes=pad_codes([codes]).to(model.device),
            fmri_scores=torch.zeros(1, len(model.config.score_names), device=model.device),
        )
    was_training = model.training
    model.eval()
    for start in tqdm(range(0, len(probes), BATCH), desc="summary tokens", unit="batch"):
        part = probes[start : start + BATCH]
        rows = [prompt[after:] for prompt in prompts[start : start + BATCH]]
        length = max(map(len, rows))
        ids = torch.stack([torch.nn.functional.pad(row, (0, length - len(row))) for row in rows]).to(model.device)
        with torch.no_grad():
            cache = model.model(inputs_embeds=scan[:, :first], use_cache=True).past_key_values
            cache.batch_repeat_interleave(len(part))
        tokens = base.expand(len(part), -1, -1).clone().requires_grad_()
        logits = _answer_logits(model, tokens, model.model.embed(ids).detach(), cache, [len(row) for row in rows])
        for choice in range(1, max(len(probe.choices) for probe in part)):
            asked = [row for row, probe in enumerate(part) if choice < len(probe.choices)]
            odds = torch.stack([_odds(logits[row], part[row], processor, choice) for row in asked])
            (gradient,) = torch.autograd.grad(odds.sum(), tokens, retain_graph=True)
            gradients.append(gradient[asked].flatten(1))
            for row, found in zip(asked, odds.tolist(), strict=True):
                offsets.append(part[row].intercepts[choice] - part[row].intercepts[0] - found)
                slopes.append(part[row].slopes[choice] - part[row].slopes[0])
    model.train(was_training)
    jacobian = torch.cat(gradients).double()
    weight, bias = summary.output_proj.weight, summary.output_proj.bias
    wanted = torch.from_numpy(np.array(slopes)).to(jacobian)
    missing = torch.cat([wanted - jacobian @ weight.double(), torch.tensor(offsets).to(jacobian)[:, None]], dim=1)
    gram = jacobian @ jacobian.T
    gram = gram + PENALTY * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
    change = jacobian.T @ torch.linalg.solve(gram, missing)
    with torch.no_grad():
        weight += change[:, :-1].to(weight)
        bias += change[:, -1].to(bias)
        missed = (jacobian @ weight.double() - wanted).pow(2).sum()
    return float(1 - missed / wanted.pow(2).sum())


def _prompt(processor: FmriLMProcessor, text: str, codes: np.ndarray) -> torch.Tensor:
    chat = with_token_counts([user(scan_block(), text_block(text))], [codes])
    return processor.apply_chat_template(chat, add_generation_prompt=True)["input_ids"][0]


def _answer_logits(
    model: FmriLMForConditionalGeneration,
    tokens: torch.Tensor,
    rest: torch.Tensor,
    cache: Cache,
    lengths: list[int],
) -> torch.Tensor:
    """Logits [rows, vocabulary] after summary tokens [rows, n, hidden] and prompts [rows, length, hidden]."""
    outputs = model.model.causal_lm(
        inputs_embeds=torch.cat([tokens, rest], dim=1), past_key_values=cache, use_cache=True
    )
    last = torch.tensor(lengths, device=tokens.device) + tokens.shape[1] - 1
    return outputs.logits[torch.arange(len(last), device=tokens.device), last].float()


def _odds(logits: torch.Tensor, probe: Probe, processor: FmriLMProcessor, choice: int) -> torch.Tensor:
    """Log-odds of a choice against the first one, by the first token in which the two differ at their start."""
    first, other = (processor.tokenizer(probe.choices[i], add_special_tokens=False)["input_ids"] for i in (0, choice))
    return logits[other[0]] - logits[first[0]]
