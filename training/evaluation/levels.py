"""What held-out scans say: does the model read the scan it is given, and what does the codec keep of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from fmrilm.modeling_fmricodec import FmriCodecModel
from fmrilm.modeling_fmrilm import FmriLMForConditionalGeneration
from fmrilm.processors import FmriLMProcessor
from fmrilm.processors.descriptors.cohort import LEVELS
from fmrilm.processors.descriptors.measures import CORE_NAMES
from fmrilm.processors.descriptors.text import REQUESTS, family, parse, question

from ..alignment.chats import scan_block, text_block, user
from ..codec.metrics import PatchPCA, fc_correlation, r_squared
from ..codec.trainer import encode_items, window_items
from ..data.collator import pad_codes, with_token_counts
from ..data.dataset import Window
from .baselines import swap_scans
from .metrics import bootstrap, mean_recall, minus


CONDITIONS = ("right", "swapped", "noise")


@dataclass(frozen=True)
class Scored:
    """
    Answers of one window: descriptor index, true level and log-likelihoods [questions, levels] by condition, of the
    swapped one [scans, questions, levels].
    """

    window: Window
    asked: np.ndarray
    truth: np.ndarray
    scores: dict[str, np.ndarray]


def swapped_windows(windows: Sequence[Window], pool: Sequence[Window], seed: int) -> list[Window]:
    """For each window one of another subject of the same dataset, out of `windows` and `pool`, by `swap_scans`."""
    everyone = [*windows, *pool]
    subjects, datasets = ([getattr(window.scan, name) for window in everyone] for name in ("subject", "dataset"))
    places = swap_scans(subjects, datasets, seed)[: len(windows)]
    if (places < 0).any():
        alone = datasets[int((places < 0).argmax())]
        raise ValueError(f"expected another subject in dataset {alone!r}, got none to swap with")
    return [everyone[place] for place in places]


def noise_items(windows: Sequence[Window], seed: int) -> list[dict[str, np.ndarray]]:
    """White noise of each window's shape, as `collate_signals` takes it."""
    rng = np.random.default_rng(seed)
    return [
        {**item, "signal": rng.standard_normal(item["signal"].shape).astype(np.float32)}
        for item in window_items(list(windows))
    ]


def choose_questions(levels: np.ndarray, per_family: int, rng: np.random.Generator) -> np.ndarray:
    """Up to `per_family` known descriptors of each family; levels: int [descriptors]."""
    families = np.array([family(name) for name in CORE_NAMES])
    known = levels >= 0
    return np.concatenate(
        [rng.permutation(np.flatnonzero(known & (families == name)))[:per_family] for name in np.unique(families)]
    )


@torch.no_grad()
def score_questions(
    model: FmriLMForConditionalGeneration, processor: FmriLMProcessor, codes: np.ndarray, asked: Sequence[int]
) -> np.ndarray:
    """
    Log-likelihood [questions, levels] of each level for questions about one scan, codes int [tokens]. The scan and
    what stands before it run once, and all questions continue from there as one batch.
    """
    choices = processor.encode_choices(list(LEVELS))
    chats = [
        with_token_counts([user(scan_block(), text_block(question(CORE_NAMES[index])))], [codes])
        for index in asked
    ]
    inputs = processor.apply_chat_template(chats, add_generation_prompt=True, padding_side="right")
    ids, mask = inputs["input_ids"].to(model.device), inputs["attention_mask"].to(model.device)
    # at least the scan with its sheet, which one template writes before every question
    shared = int((ids == ids[0]).all(0).long().cumprod(0).sum())
    steps = model.model.step_ids(ids)
    cache = model.model(
        ids[:1, :shared], mask[:1, :shared], fmri_codes=pad_codes([codes]).to(model.device), use_cache=True
    ).past_key_values
    cache.batch_repeat_interleave(len(asked))
    scores = model.score_choices(
        {
            "input_ids": ids[:, shared:],
            "attention_mask": mask,
            "mm_token_type_ids": steps,
            "past_key_values": cache,
        },
        choices,
    )
    return scores.cpu().numpy()


def ask_windows(
    model: FmriLMForConditionalGeneration,
    processor: FmriLMProcessor,
    windows: Sequence[Window],
    levels: np.ndarray,
    codes: dict[str, np.ndarray],
    others: tuple[Sequence[Window], np.ndarray],
    per_family: int,
    seed: int,
) -> list[Scored]:
    """
    Each window's questions under every condition. All windows of a dataset are asked the same, so that what is
    answered about one person's scan is the swapped answer for every other person of the dataset: the swapped scores
    [scans, questions, levels] are those of all of them, of `windows` and of `others`.

    Args:
        levels: int [windows, descriptors]. codes: int [windows, tokens] of the right scans and of noise.
        others: windows of training subjects and their codes, that stand in for held-out ones.
    """
    rng = np.random.default_rng(seed)
    asked = {}
    for row, window in enumerate(windows):
        if window.scan.dataset not in asked:
            asked[window.scan.dataset] = choose_questions(levels[row], per_family, rng)
    answered = [(window, row) for window, row in zip(*others, strict=True) if window.scan.dataset in asked]
    jobs = [*zip(windows, codes["right"], strict=True), *answered, *zip(windows, codes["noise"], strict=True)]
    scores = [
        score_questions(model, processor, row, asked[window.scan.dataset])
        for window, row in tqdm(jobs, desc="questions", unit="scan")
    ]
    pool = [(window.scan, score) for (window, _), score in zip(jobs, scores, strict=True)][: -len(windows)]
    noise = scores[len(scores) - len(windows) :]
    scored = []
    for row, window in enumerate(windows):
        own = window.scan
        swapped = [
            score for scan, score in pool if scan.dataset == own.dataset and scan.subject != own.subject
        ]
        if not swapped:
            raise ValueError(f"expected another subject in dataset {own.dataset!r}, got none to swap with")
        questions = asked[own.dataset]
        conditions = {"right": scores[row], "swapped": np.stack(swapped), "noise": noise[row]}
        scored.append(Scored(window, questions, levels[row, questions], conditions))
    return scored


def question_results(scored: Sequence[Scored], majority: np.ndarray, seed: int) -> dict:
    """
    Balanced accuracy by family and condition with 95 % bootstrap intervals over subjects, for the families that were
    asked about; draws without all the answers that occur are left out. Answers with several swapped scans count as
    one answer, a share each. `people` holds each person's share of right answers, and how often each level was the
    answer. majority: most frequent level int [descriptors] among the training windows.
    """
    subjects = sorted({(item.window.scan.dataset, item.window.scan.subject) for item in scored})
    families = [*dict.fromkeys(family(name) for name in CORE_NAMES), "all"]
    of_descriptor = np.array([family(name) for name in CORE_NAMES])
    results = {}
    for name in families:
        # [conditions, subjects, truth, answer]
        confusion = {key: np.zeros((len(subjects), 3, 3)) for key in (*CONDITIONS, "majority")}
        for item in scored:
            subject = subjects.index((item.window.scan.dataset, item.window.scan.subject))
            inside = np.ones(len(item.asked), bool) if name == "all" else of_descriptor[item.asked] == name
            answers = {key: np.atleast_2d(item.scores[key].argmax(-1)) for key in CONDITIONS}
            answers["majority"] = majority[item.asked][None]
            for key, answer in answers.items():
                given = answer[:, inside]
                truth = np.broadcast_to(item.truth[inside], given.shape)
                # declared for one array of indices
                np.add.at(confusion[key], (subject, truth, given), 1 / len(given))  # pyright: ignore[reportArgumentType]
        if not confusion["right"].any():
            continue
        # a row a person
        recalls = {
            key: partial(mean_recall, np.diagonal(table, axis1=1, axis2=2), table.sum(-1))
            for key, table in confusion.items()
        }
        everyone = np.arange(len(subjects))
        found = {key: bootstrap(recall, everyone, seed=seed).to_dict() for key, recall in recalls.items()}
        difference = bootstrap(minus(recalls["right"], recalls["swapped"]), everyone, seed=seed).to_dict()
        results[name] = {
            "questions": round(confusion["right"].sum()),
            **{key: {"accuracy": one["value"], "interval": one["interval"]} for key, one in found.items()},
            "difference": {name: difference[name] for name in ("value", "interval")},
            "beats_swapped": difference["interval"] is not None and difference["interval"][0] > 0,
            # people in the order of their dataset and name, as everywhere in the results
            "people": [
                {
                    **{k: float(confusion[k][i].trace() / confusion[k][i].sum()) for k in ("right", "swapped")},
                    "answers": confusion["right"][i].sum(0).astype(int).tolist(),
                }
                for i in range(len(subjects))
                if confusion["right"][i].any()
            ],
        }
    beaten = [name for name in results if name != "all" and results[name]["beats_swapped"]]
    verdict = (
        f"the right scan beats a swapped one, interval clear of zero, in {len(beaten)} of {len(results) - 1} question "
        f"families{': ' if beaten else ''}{', '.join(beaten)}"
    )
    return {"families": results, "verdict": verdict}


@torch.no_grad()
def describe_windows(
    model: FmriLMForConditionalGeneration,
    processor: FmriLMProcessor,
    codes: Sequence[np.ndarray],
    max_new_tokens: int,
) -> list[str]:
    """Greedy open-ended descriptions of scans given as codes int [tokens]."""
    chats = [with_token_counts([user(scan_block(), text_block(REQUESTS[0]))], [scan]) for scan in codes]
    inputs = processor.apply_chat_template(chats, add_generation_prompt=True, padding_side="left").to(model.device)
    generated = model.generate(
        **inputs,
        fmri_codes=pad_codes(codes).to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    texts = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def statement_accuracy(texts: Sequence[str], levels: np.ndarray, said: np.ndarray | None = None) -> float | None:
    """
    Share of the parsed statements that are true of the scans, levels int [scans, descriptors]; None without any.
    With `said` int [descriptors], that level counts as the statement in place of the text's.
    """
    right = []
    for row, text in enumerate(texts):
        for index, level in claims(text):
            if levels[row, index] >= 0:
                right.append(levels[row, index] == (level if said is None else said[index]))
    return float(np.mean(right)) if right else None


def claims(text: str) -> list[tuple[int, int]]:
    """Indices into `CORE_NAMES` and `LEVELS` of what a text says of them."""
    return [
        (CORE_NAMES.index(name), LEVELS.index(level))
        for name, level, _ in parse(text)
        if name in CORE_NAMES and level in LEVELS
    ]


def mentioned(text: str) -> list[int]:
    """Indices of the descriptors that a text makes statements about."""
    return [index for index, _ in claims(text)]


@torch.no_grad()
def reconstruct(codec: FmriCodecModel, windows: Sequence[Window]) -> list[np.ndarray]:
    """Signal [time, rois] that each window's codes decode to."""
    signals = []
    for item, codes in zip(window_items(list(windows)), encode_items(codec, window_items(list(windows))), strict=True):
        inputs = (torch.tensor(array)[None].to(codec.device) for array in (codes, item["coordinates"]))
        signals.append(codec.decode(*inputs)[0].T.cpu().numpy())
    return signals


def codec_results(codec: FmriCodecModel, windows: Sequence[Window], baseline: PatchPCA, names: dict) -> dict:
    """Held-out reconstruction per subject beside the baselines. names: what each subject is called."""
    guesses = reconstruct(codec, windows)
    subjects = []
    for key, name in names.items():
        rows = [i for i, window in enumerate(windows) if (window.scan.dataset, window.scan.subject) == key]
        signals = [windows[i].signal for i in rows]
        entry = {"subject": name, "dataset": key[0], "windows": len(rows)}
        for prefix, candidates in (
            ("", [guesses[i] for i in rows]),
            ("pca_", [baseline.reconstruct(windows[i]) for i in rows]),
            ("mean_", [np.broadcast_to(signal.mean(0), signal.shape) for signal in signals]),
        ):
            entry[f"{prefix}r_squared"] = r_squared(signals, candidates)
            entry[f"{prefix}fc_correlation"] = fc_correlation(signals, candidates)
        subjects.append(entry)
    return {"subjects": subjects}
