"""
What a model knows of a task: unseen subjects, real probabilities, beside baselines and other people's scans.

`evaluate` splits subjects, lets the model learn from none, k of each class or all training subjects, and asks it about
the test subjects. Whatever learned from the same training subjects stands beside it: the commonest answer and
regression on functional connectivity. Each answer is also compared with the truth about another person of the same
dataset, site and atlas ("swapped"): what is right there, the scan did not tell.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fmrilm.modeling_fmrilm import FmriLMForConditionalGeneration
from fmrilm.processors import FmriLMProcessor

from ..data.shards import write_whole
from ..data.splits import HELD_OUT_SHARE, Split, hold_out, hold_out_known, k_fold, k_shot
from ..data.tasks import Task, load_task
from ..trainer import half_precision
from .adapt import Tuning, as_examples, embed_scans, tune
from .ask import Example, answer_scans, calibrated, parse_answer, score_scans
from .baselines import logistic_regression, majority, ridge_regression, swap_scans
from .labelled_scans import LabelledScans, load_labelled
from .metrics import UNPARSED, Answers
from .report import write_report
from .results import BASELINES, FULL, Answered, summarize


SETTINGS = "settings.json"
METHODS = ("zero-shot", "tuned", "context", "probe", *BASELINES)
# training scans that tell which words the model prefers whatever the scan
REFERENCE_SCANS = 48


@dataclass(frozen=True)
class Protocol:
    """
    How a task is evaluated.

    shots: training subjects of each class: 0, k or "full" (all of them). draws: of k subjects. methods: of `METHODS`:
    the model as it is, tuned on the shots, shown the shots in the prompt, logistic or ridge regression on its hidden
    states, and the baselines. new_people: the model was trained on nobody in the data. Then the test subjects are
    drawn from all of them: `test_share`, or everyone once in a cross-validation with `folds`. Otherwise they are those
    whom no program trains on, see `held_out_subjects`. open_ended: answers in words in place of choices; tasks about
    numbers always are.
    """

    shots: tuple[int | str, ...] = (0, FULL)
    draws: int = 3
    methods: tuple[str, ...] = ("zero-shot", "tuned", "connectivity", "majority")
    new_people: bool = False
    folds: int | None = None
    test_share: float = HELD_OUT_SHARE
    open_ended: bool = False
    tuning: Tuning = Tuning()
    seed: int = 0

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.methods) - set(METHODS)):
            raise ValueError(f"expected methods of {', '.join(METHODS)}, got {', '.join(unknown)}")
        for shots in self.shots:
            if shots != FULL and (not isinstance(shots, int) or shots < 0):
                raise ValueError(f"expected shots of 0, a number of subjects or {FULL!r}, got {shots!r}")
        if not self.new_people and (self.folds is not None or self.test_share > HELD_OUT_SHARE):
            raise ValueError(
                f"expected no folds and a test_share of at most {HELD_OUT_SHARE}, the people whom no program trains "
                f"on, got folds={self.folds} and test_share={self.test_share}: if the model was trained on nobody in "
                "the data, say so (new_people)"
            )


@dataclass(frozen=True)
class Arm:
    """One way to an answer: a method that learned from so many shots, in one draw of them, in one fold."""

    method: str
    shots: int | str
    draw: int
    fold: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.shots}-draw{self.draw}-fold{self.fold}"


def evaluate(model_folder: Path, data: Path, task_name: str, output: Path, protocol: Protocol = Protocol()) -> dict:
    """
    Results of a model folder on a prepared dataset, also as results.json, results.csv and plots in `output`. Each arm
    is kept there when it is done, so that the same call goes on where it was stopped.
    """
    task = load_task(task_name)
    _check_settings(output, {"model": str(model_folder), "data": str(data), "task": asdict(task)}, protocol)
    model = FmriLMForConditionalGeneration.from_pretrained(model_folder, dtype=torch.float32).eval()
    processor = FmriLMProcessor.from_pretrained(model_folder)
    scans = load_labelled(data, task, processor.feature_extractor, model.model.codec)
    results = evaluate_scans(model, processor, task, scans, protocol, output / "arms")
    results["data"]["dataset"] = data.name
    write_report(results, output)
    return results


def evaluate_scans(
    model: FmriLMForConditionalGeneration,
    processor: FmriLMProcessor,
    task: Task,
    scans: LabelledScans,
    protocol: Protocol,
    arms: Path,
) -> dict:
    """See `evaluate`. arms: folder for the answers of each arm, in the order of the test rows."""
    splits = splits_of(task, scans, protocol)
    run = _Run(model, processor, task, scans, protocol, splits)
    made = {arm: _kept(arms / f"{arm.name}.npz", lambda arm=arm: run.answers(arm)) for arm in _arms(protocol)}
    return {
        "task": task.name,
        "question": task.questions[0],
        "choices": task.choice_words,
        "unit": task.unit,
        "data": _counts(task, scans, splits),
        "settings": json.loads(json.dumps(asdict(protocol))),
        "methods": _joined(task, scans, splits, made, protocol),
    }


@dataclass
class _Run:
    """Everything the arms have in common."""

    model: FmriLMForConditionalGeneration
    processor: FmriLMProcessor
    task: Task
    scans: LabelledScans
    protocol: Protocol
    splits: Sequence[Split]

    @property
    def open_ended(self) -> bool:
        return self.protocol.open_ended or self.task.choices is None

    def answers(self, arm: Arm) -> dict[str, np.ndarray]:
        """
        Of the arm's test rows: probabilities and uncalibrated probabilities [rows, choices], or "classes" [rows], or
        "values" [rows] with "failures" [rows] where there was no number.
        """
        split = self.splits[arm.fold]
        training = self._training(arm, split)
        print(f"{arm.name}: {len(training)} training scans, {len(split.test)} test scans", flush=True)
        if arm.method == "majority":
            return self._majority(training, split)
        if arm.method in ("connectivity", "probe"):
            features = self.scans.features if arm.method == "connectivity" else self.embeddings
            return self._regression(features, training, split)
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=half_precision()):
            return self._ask(arm, training, split)

    def _training(self, arm: Arm, split: Split) -> np.ndarray:
        """Rows whose labels the arm may know."""
        rows = split.training
        if arm.shots == 0:
            return rows[:0]
        if arm.shots == FULL:
            return rows
        seed = self.protocol.seed + 1000 * (arm.draw + 1)
        return rows[k_shot(self.scans.subjects[rows], self.scans.truth[rows], int(arm.shots), seed)]

    def _majority(self, training: np.ndarray, split: Split) -> dict[str, np.ndarray]:
        truth = self.scans.truth[training]
        if self.task.choices is None:
            return {"values": np.full(len(split.test), truth.mean())}
        return {"probabilities": majority(truth, len(self.task.choice_words), len(split.test))}

    def _regression(self, features: np.ndarray, training: np.ndarray, split: Split) -> dict[str, np.ndarray]:
        known = features[training], self.scans.truth[training], self.scans.subjects[training]
        if self.task.choices is None:
            return {"values": ridge_regression(*known, features[split.test])}
        choices = len(self.task.choice_words)
        return {"probabilities": logistic_regression(*known, choices, features[split.test])}

    def _ask(self, arm: Arm, training: np.ndarray, split: Split) -> dict[str, np.ndarray]:
        model, codes, answers = self.model, self.scans.codes, self.scans.answers
        seed = self.protocol.seed + arm.draw
        shown = [codes[row] for row in training], [answers[row] for row in training]
        examples = as_examples(*shown, seed) if arm.method == "context" else []
        if arm.method == "tuned":
            model = tune(model, self.processor, self.task, *shown, self.protocol.tuning, seed)
        if self.open_ended:
            return self._in_words(model, split)
        rng = np.random.default_rng(seed)
        reference = rng.permutation(split.training)[:REFERENCE_SCANS]
        rows = np.concatenate([split.test, reference])
        scores = self._scores(model, rows, examples)
        scores, reference = scores[: len(split.test)], scores[len(split.test) :]
        choices = len(self.task.choice_words)
        shares = np.full(choices, 1 / choices)
        if arm.shots != 0:
            # add-one: a class that few training subjects happen to miss is not impossible
            counts = np.bincount(self.scans.truth[training], minlength=choices) + 1
            shares = counts / counts.sum()
        return {"probabilities": calibrated(scores, reference, shares), "uncalibrated": np.exp(scores)}

    def _scores(
        self, model: FmriLMForConditionalGeneration, rows: np.ndarray, examples: Sequence[Example]
    ) -> np.ndarray:
        """Log-probabilities [rows, choices], mean over each scan's windows and normalised again."""
        windows = [window for row in rows for window in self.scans.codes[row]]
        question, choices = self.task.questions[0], self.task.choice_words
        scored = score_scans(model, self.processor, question, choices, windows, examples)
        ends = np.cumsum([len(self.scans.codes[row]) for row in rows])
        means = np.stack([part.mean(0) for part in np.split(scored, ends[:-1])])
        return means - np.logaddexp.reduce(means, axis=-1, keepdims=True)

    def _in_words(self, model: FmriLMForConditionalGeneration, split: Split) -> dict[str, np.ndarray]:
        """Greedy answers about the first window of each test scan."""
        windows = [self.scans.codes[row][0] for row in split.test]
        texts = answer_scans(model, self.processor, self.task.questions[0], windows)
        parsed = [parse_answer(self.task, text) for text in texts]
        failures = np.array([answer is None for answer in parsed])
        if self.task.choices is None:
            # a model that says nothing is taken to say what is said without a model: it gains nothing by silence
            mean = self.scans.truth[split.training].mean()
            values = np.array([mean if answer is None else answer for answer in parsed])
            return {"values": values, "failures": failures}
        words: list[Any] = self.task.choice_words
        classes = np.array([UNPARSED if answer is None else words.index(answer) for answer in parsed])
        return {"classes": classes, "failures": failures}

    @cached_property
    def embeddings(self) -> np.ndarray:
        """[rows, hidden], mean over each scan's windows."""
        windows = [window for codes in self.scans.codes for window in codes]
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=half_precision()):
            embedded = embed_scans(self.model, windows)
        ends = np.cumsum([len(codes) for codes in self.scans.codes])
        return np.stack([part.mean(0) for part in np.split(embedded, ends[:-1])])


def _arms(protocol: Protocol) -> Iterator[Arm]:
    for method in protocol.methods:
        if method == "zero-shot":
            counts = [0] if 0 in protocol.shots else []
        else:
            # a prompt does not hold all scans; the baselines of a model that learned from nothing know everything
            counts = [shots for shots in protocol.shots if shots != 0 and (shots, method) != (FULL, "context")]
            if method in BASELINES:
                counts = dict.fromkeys([*counts, FULL])
        for shots in counts:
            for draw in range(1 if shots in (0, FULL) else protocol.draws):
                for fold in range(protocol.folds or 1):
                    yield Arm(method, shots, draw, fold)


def splits_of(task: Task, scans: LabelledScans, protocol: Protocol) -> list[Split]:
    """Whom the model may learn from and whom it is asked about."""
    if not protocol.new_people:
        return [hold_out_known(list(scans.subjects), protocol.test_share)]
    classes = None if task.choices is None or task.per_session else scans.truth
    if protocol.folds is None:
        return [hold_out(scans.subjects, classes, protocol.test_share, protocol.seed)]
    return list(k_fold(scans.subjects, classes, protocol.folds, protocol.seed))


def _kept(path: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    if not path.exists():
        made: dict[str, Any] = make()

        def save(temporary: Path) -> None:
            with open(temporary, "wb") as handle:
                np.savez(handle, **made)

        write_whole(path, save)
    with np.load(path, allow_pickle=False) as kept:
        return dict(kept)


def _check_settings(output: Path, what: dict, protocol: Protocol) -> None:
    """ValueError if the arms in a folder are those of other settings."""
    settings = json.loads(json.dumps({**what, "protocol": asdict(protocol)}))
    path = output / SETTINGS
    if not path.exists():
        write_whole(path, json.dumps(settings, indent=2))
        return
    before = json.loads(path.read_text())
    if changed := [name for name in settings if before.get(name) != settings[name]]:
        raise ValueError(f"{output} holds an evaluation with another {' and '.join(changed)}: choose another folder")


def _counts(task: Task, scans: LabelledScans, splits: Sequence[Split]) -> dict:
    subjects = scans.subjects
    return {
        "scans": len(scans),
        "subjects": len(set(subjects)),
        "unlabelled_scans": scans.unlabelled,
        "answers": {word: scans.answers.count(word) for word in task.choice_words},
        "groups": len(set(scans.groups)),
        "training_subjects": [len(set(subjects[split.training])) for split in splits],
        "test_subjects": [len(set(subjects[split.test])) for split in splits],
    }


def _joined(
    task: Task, scans: LabelledScans, splits: Sequence[Split], made: dict[Arm, dict], protocol: Protocol
) -> list[dict]:
    """Metrics of each method and number of shots over the test rows of all folds."""
    rows = np.concatenate([split.test for split in splits])
    # within a fold: what answers about the other one's scan has learned from neither of the two
    folds = np.concatenate([np.full(len(split.test), fold) for fold, split in enumerate(splits)])
    groups = [f"{fold} {group}" for fold, group in zip(folds, scans.groups[rows], strict=True)]
    swapped = swap_scans(scans.subjects[rows], groups, protocol.seed)
    answered = []
    for method, shots in dict.fromkeys((arm.method, arm.shots) for arm in made):
        by_draw = defaultdict(list)
        for arm, kept in made.items():
            if (arm.method, arm.shots) == (method, shots):
                by_draw[arm.draw].append(kept)
        draws = [{key: np.concatenate([fold[key] for fold in draw]) for key in draw[0]} for draw in by_draw.values()]
        failures = sum(int(draw["failures"].sum()) for draw in draws) if "failures" in draws[0] else None
        answered.append(Answered(method, shots, "", [_answers(draw) for draw in draws], failures))
        if "uncalibrated" in draws[0]:
            raw = [Answers(draw["uncalibrated"].argmax(-1), draw["uncalibrated"]) for draw in draws]
            answered.append(Answered(method, shots, "uncalibrated", raw))
    return summarize(scans.truth[rows], scans.subjects[rows], swapped, answered)


def _answers(kept: dict[str, np.ndarray]) -> Answers:
    if "probabilities" in kept:
        return Answers(kept["probabilities"].argmax(-1), kept["probabilities"])
    return Answers(kept.get("classes"), values=kept.get("values"))
