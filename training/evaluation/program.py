"""
What a model reads in the scans of held-out subjects, beside baselines and a subject-shuffled control.

Tasks ask about labels of the subject: as the model is ("zero-shot"), with labelled scans in the prompt ("few-shot"),
tuned on them ("tuned"), or by ridge regression on its hidden states ("probe"). Beside them stand baselines that learn
from the same training subjects. Descriptor questions ask about the window itself (see `descriptors`). Answers about
a scan are means over all of its windows. In the control, each answer is compared with the label of another subject of
the same site and atlas: what is right there does not come from the scan.
"""

import hashlib
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fmrilm.modeling_fmrilm import FmriLMForConditionalGeneration
from fmrilm.processors import FmriLMProcessor
from fmrilm.processors.descriptors.cohort import JSON_FILE, Cohort

from ..data.dataset import Scans, load_scans
from ..data.shards import content_version, keep_settings, write_arrays, write_whole
from ..data.splits import Split, SplitArguments, k_fold, k_shot, split_rows, values_of
from ..data.tasks import Task, labels_of, load_task, with_columns
from ..trainer import half_precision
from . import descriptors as descriptor_questions
from .ask import Example, answer_windows, calibrated, embed_windows, parse_number, score_windows
from .baselines import BASELINES, Baselines, shuffles
from .report import write_report
from .results import FULL, Answers, summarize
from .scans import EvaluationScans, Labelled, encode_scans, reconstruction_results
from .tuning import Tuning, tune


CONDITIONS = ("zero-shot", "few-shot", "tuned", "probe", *BASELINES)
SETTINGS = "settings.json"
# training scans that show which answers the model prefers whatever the scan
REFERENCE_SCANS = 48
# numbers that are scored one by one for the expected value, at most
MOST_NUMBERS = 200
# what answers: a model, and the processor that knows its summary tokens
Reader = tuple[FmriLMForConditionalGeneration, FmriLMProcessor]


@dataclass(frozen=True)
class EvaluationSettings:
    """
    shots: training subjects of each class: 0, k or "full" (all of them). resamples: of k subjects. conditions: of
    `CONDITIONS`. questions_per_family: about descriptors of a window. described: subjects whose scans are described
    in free text, with `description_tokens` tokens. window_stride: frames between the windows of a scan; by default
    half of a window.
    """

    shots: tuple[int | str, ...] = (0,)
    resamples: int = 10
    conditions: tuple[str, ...] = ("zero-shot", *BASELINES)
    tuning: Tuning = Tuning()
    questions_per_family: int = 8
    described: int = 64
    description_tokens: int = 80
    window_stride: int | None = None
    seed: int = 0

    @classmethod
    def quick(cls) -> "EvaluationSettings":
        """What shows that every part works, and not how well."""
        return cls(questions_per_family=1, described=2, description_tokens=8, window_stride=1000)

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.conditions) - set(CONDITIONS)):
            raise ValueError(f"expected conditions of {', '.join(CONDITIONS)}, got {', '.join(unknown)}")
        for shots in self.shots:
            if shots != FULL and (not isinstance(shots, int) or shots < 0):
                raise ValueError(f"expected shots of 0, a number of subjects or {FULL!r}, got {shots!r}")

    def asked(self, task: Task) -> Iterator[tuple[str, int | str, int]]:
        """Each condition of a task, the shots that it learns from, and the number of their resample."""
        for name in self.conditions:
            if name == "zero-shot":
                counts = [0] if 0 in self.shots else []
            else:
                # a prompt does not hold all scans; baselines of a model that learned from nothing know all labels
                counts = [shots for shots in self.shots if shots != 0 and (shots, name) != (FULL, "few-shot")]
                # a number has no classes to draw subjects from, and a subject with several labels is of none
                counts = [shots for shots in counts if (task.choices and not task.per_scan) or shots == FULL]
                if name in BASELINES:
                    counts = dict.fromkeys([*counts, FULL])
            for shots in counts:
                for resample in range(1 if shots in (0, FULL) else self.resamples):
                    yield name, shots, resample


def evaluate(
    model_folder: Path,
    data: Path,
    output: Path,
    tasks: Sequence[str] = (),
    descriptors: bool = False,
    *,
    split: SplitArguments | None = None,
    folds: int | None = None,
    new_subjects: bool = False,
    columns: Sequence[str] = (),
    settings: EvaluationSettings = EvaluationSettings(),
    show: bool = False,
) -> dict:
    """
    Results of a model folder on a prepared dataset, also as results.json, results.csv and results.png in `output`.
    What is answered is kept there, so that the same call goes on where it was stopped.

    descriptors: questions about descriptors, descriptions, and what the codec keeps of the scans. split: whom the
    model was not trained on, as in every program; folds: of a cross-validation over all subjects, and `leave_out`
    without a value: each value of the column is left out in turn; both need `new_subjects`, a model that was trained
    on none of the data. columns: NAME of the one task's label column, or TASK=NAME. show: answers about single
    subjects, too, under pseudonyms.
    """
    split = split or SplitArguments()
    loaded = with_columns([load_task(task) for task in tasks], columns)
    if not loaded and not descriptors:
        raise ValueError("expected tasks or descriptor questions to ask, got neither")
    if loaded and not any(any(settings.asked(task)) for task in loaded):
        raise ValueError(
            f"expected conditions that ask something with shots of {', '.join(map(str, settings.shots))}, got "
            f"{', '.join(settings.conditions)}"
        )
    model: Any = FmriLMForConditionalGeneration.from_pretrained(model_folder, dtype=torch.float32)
    model = model.to(torch.accelerator.current_accelerator() or "cpu").eval()
    processor = FmriLMProcessor.from_pretrained(model_folder)
    if descriptors and not (model_folder / JSON_FILE).exists():
        raise ValueError(f"expected {JSON_FILE} in {model_folder} for questions about descriptors, got none")
    cohort = Cohort.load(model_folder) if descriptors else None
    scans = load_scans(data, processor.feature_extractor)
    splits = make_splits(scans, split, folds, new_subjects, loaded, settings.seed)
    for task in loaded:
        check_shots(Labelled.read(task, scans), scans, splits, settings)
    if not new_subjects:
        split.compare(model_folder)
    # after all that can be refused
    keep_settings(
        output / SETTINGS,
        {
            "model": str(model_folder),
            "weights": _weights_version(model_folder),
            "data": str(data),
            "content": content_version(list(data.glob("*/*.parquet"))),
            "tasks": [asdict(task) for task in loaded],
            "split": {**split.describe(), "folds": folds},
            "descriptors": descriptors,
            "settings": asdict(settings),
            "show": show,
        },
    )
    results = evaluate_scans(model, processor, scans, splits, loaded, settings, output, cohort, show)
    results["data"]["dataset"] = data.resolve().name
    write_report(results, output)
    return results


def check_shots(labelled: Labelled, scans: Scans, splits: Sequence[Split], settings: EvaluationSettings) -> None:
    """ValueError if a fold has fewer training subjects with an answer than a condition is to learn from."""
    counts = [shots for _, shots, _ in settings.asked(labelled.task) if shots != FULL]
    most = max(map(int, counts), default=0)
    subjects = scans.table["subject"].astype(str).to_numpy()
    for split in splits if most else ():
        rows = labelled.known(split.training)
        for answer, word in enumerate(labelled.task.choice_words):
            count = len(set(subjects[rows[labelled.truth[rows] == answer]]))
            if 0 < count < most:
                raise ValueError(
                    f"task {labelled.task.name!r}: expected at least {most} training subjects with the answer "
                    f"{word!r} for so many shots, got {count}"
                )


def _weights_version(folder: Path) -> str:
    """16 hexadecimal digits that change with a model: answers that are kept are those of one."""
    digest = hashlib.sha256()
    names = ("config.json", "processor_config.json", "*.safetensors")
    for path in sorted(path for name in names for path in folder.glob(name)):
        with open(path, "rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()[:16]


def evaluate_scans(
    model: FmriLMForConditionalGeneration,
    processor: FmriLMProcessor,
    scans: Scans,
    splits: Sequence[Split],
    tasks: Sequence[Task],
    settings: EvaluationSettings,
    work: Path,
    cohort: Cohort | None = None,
    show: bool = False,
) -> dict:
    """
    See `evaluate`. splits: rows of the scans, for each fold; every scan is tested once at most. cohort: of the model,
    for questions about descriptors. work: folder for codes and for the answers of each condition.
    """
    extractor = processor.feature_extractor
    stride = settings.window_stride or extractor.window_length // 2
    encoded = encode_scans(model.model.codec, extractor, scans, stride, work / "codes")
    subjects = encoded.subjects
    results: dict[str, Any] = {
        "data": {
            "scans": len(scans),
            "subjects": len(set(subjects)),
            "windows": len(encoded.encoded),
            "training_subjects": [len(set(subjects[split.training])) for split in splits],
            "test_subjects": [len(set(subjects[split.test])) for split in splits],
        },
        "settings": json.loads(json.dumps(asdict(settings))),
    }
    with torch.autocast(model.device.type, torch.bfloat16, enabled=half_precision(model.device.type)):
        run = _Run(model, processor, encoded, splits, [Labelled.read(task, scans) for task in tasks], settings, work)
        results["tasks"] = {task.task.name: run.results(task) for task in run.tasks}
        if cohort is not None:
            path = work / "descriptors.json"
            if not path.exists():
                write_whole(path, json.dumps(run.descriptors(cohort, show), indent=1) + "\n")
            results["descriptors"] = json.loads(path.read_text(encoding="utf-8"))
            tested = np.concatenate([split.test for split in splits])
            results["codec"] = reconstruction_results(model.model.codec, encoded, tested, show)
    return results


def make_splits(
    scans: Scans, split: SplitArguments, folds: int | None, new_subjects: bool, tasks: Sequence[Task], seed: int
) -> list[Split]:
    """
    Rows to learn from and to test. Folds are stratified by site and the first task's answers where these have enough
    subjects, or by one of them.
    """
    table = scans.table
    subjects = table["subject"].astype(str).to_numpy()
    every_value = split.leave_out is not None and "=" not in split.leave_out
    if (folds is not None or every_value) and not new_subjects:
        raise ValueError(
            "expected no folds, and leave_out as COLUMN=VALUE: if the model was trained on none of the data's "
            "subjects, say so (new_subjects)"
        )
    if every_value:
        column = str(split.leave_out)
        values = values_of(table, column).dropna().unique()
        if len(values) < 2:
            raise ValueError(f"expected at least 2 values of {column!r} to leave out in turn, got {len(values)}")
        each = [replace(split, leave_out=f"{column}={value}") for value in values]
        return [Split(*split_rows(table, one)) for one in each]
    if folds is None:
        parts = split_rows(table, split)
        if not all(map(len, parts)):
            counts = [len(set(subjects[part])) for part in parts]
            raise ValueError(f"expected training and test subjects, got {counts[0]} and {counts[1]}")
        return [Split(*parts)]
    answers = np.full(len(table), "")
    if tasks and tasks[0].choices is not None and not tasks[0].per_session:
        labels = labels_of(tasks[0], table.to_dict("records"))
        answers = np.array(["" if label is None else tasks[0].answer(label) for label in labels])
    sites = table["site"].fillna("").astype(str).to_numpy() if "site" in table else np.full(len(table), "")
    strata = np.array([f"{site} {answer}" for site, answer in zip(sites, answers, strict=True)])
    # a subject with scans at several sites, or without a label in some, counts by the first of them
    _, first, whose = np.unique(subjects, return_index=True, return_inverse=True)
    for labels in (strata, answers):
        classes = np.unique(labels[first], return_inverse=True)[1]
        if np.bincount(classes).min() >= folds:
            return list(k_fold(subjects, classes[whose], folds, seed))
    return list(k_fold(subjects, None, folds, seed))


@dataclass(frozen=True)
class _Condition:
    """A condition that learned from so many shots, in one resample of them, in one fold."""

    name: str
    shots: int | str
    resample: int
    fold: int


@dataclass
class _Run:
    """What all conditions of all tasks have in common."""

    model: FmriLMForConditionalGeneration
    processor: FmriLMProcessor
    scans: EvaluationScans
    splits: Sequence[Split]
    tasks: list[Labelled]
    settings: EvaluationSettings
    work: Path

    def __post_init__(self) -> None:
        features = {"codes_ridge": self._code_features, "probe": lambda: [self._embeddings()]}
        self.baselines = Baselines(self.scans.scans, features)

    def _code_features(self) -> list[np.ndarray]:
        """Of the codes of patches, and of those of the scan as a whole."""
        blocks = np.split(self.scans.features, [sum(self.model.config.codec_config.scan_feature_blocks)], axis=1)
        return [block for block in blocks if block.shape[1]]

    def descriptors(self, cohort: Cohort, show: bool) -> dict:
        settings, scans = self.settings, self.scans
        answered = descriptor_questions.joined(
            [
                part
                for split in self.splits
                for part in descriptor_questions.ask_descriptors(
                    self.model, self.processor, scans, split, cohort, settings.questions_per_family, settings.seed
                )
            ]
        )
        results = descriptor_questions.question_results(answered, settings.seed)
        if settings.described:
            results["descriptions"] = descriptor_questions.description_results(
                self.model,
                self.processor,
                scans,
                self.splits[0],
                cohort,
                settings.described,
                settings.description_tokens,
                settings.seed,
                show,
            )
        if show:
            repetition_time = self.processor.feature_extractor.repetition_time
            results["answers"] = descriptor_questions.shown_answers(answered, scans, repetition_time)
        return results

    def results(self, labelled: Labelled) -> dict:
        """Of one task: metrics of each condition over the test rows of all folds."""
        task, scans = labelled.task, self.scans
        parts = [labelled.known(split.test) for split in self.splits]
        rows = np.concatenate(parts)
        if not len(rows):
            raise ValueError(f"task {task.name!r}: expected a test scan with a label, got none")
        # within a fold: what answers about the other one's scan has learned from neither of the two
        groups = [f"{fold} {scans.groups[row]}" for fold, part in enumerate(parts) for row in part]
        shuffled = shuffles(scans.subjects[rows], groups, self.settings.seed)
        made: dict[tuple, list[list[Answers]]] = defaultdict(list)
        for name, shots, resample in self.settings.asked(task):
            folds = range(len(self.splits))
            made[name, shots].append([self._kept(labelled, _Condition(name, shots, resample, fold)) for fold in folds])
        sites = None if scans.sites is None else scans.sites[rows]
        return {
            "question": task.questions[0],
            "choices": task.choice_words,
            "unit": task.unit,
            "scans": len(labelled.rows),
            "subjects": len(set(scans.subjects[labelled.rows])),
            "unlabelled_scans": len(scans) - len(labelled.rows),
            "answers": dict(Counter(task.answer(labelled.labels[row]) for row in labelled.rows if task.choices)),
            "test_scans": len(rows),
            **summarize(labelled, rows, scans.subjects[rows], sites, shuffled, made),
        }

    def _kept(self, labelled: Labelled, condition: _Condition) -> Answers:
        name = f"{labelled.task.name}.{condition.name}.{condition.shots}.{condition.resample}.{condition.fold}.npz"
        path = self.work / "answers" / name
        if not path.exists():
            write_arrays(path, **self._answers(labelled, condition))
        with np.load(path, allow_pickle=False) as kept:
            return dict(kept)

    def _answers(self, labelled: Labelled, condition: _Condition) -> Answers:
        """
        Of the test rows of a condition: "probabilities" (and "uncalibrated") [rows, choices], or "values" [rows], with
        "failures" [rows] where no number could be parsed; "expected" [rows] is the mean of the answers' numbers by
        their probabilities.
        """
        split = self.splits[condition.fold]
        training, test = labelled.known(split.training), labelled.known(split.test)
        if isinstance(condition.shots, int) and condition.shots:
            seed = self.settings.seed + 1000 * (condition.resample + 1)
            chosen = k_shot(self.scans.subjects[training], labelled.truth[training], condition.shots, seed)
            training = training[chosen]
        of = f"{condition.name}, {condition.shots} shots, resample {condition.resample}, fold {condition.fold}"
        print(f"{labelled.task.name}, {of}: {len(training)} training, {len(test)} test scans", file=sys.stderr)
        if condition.name in (*BASELINES, "probe"):
            found = self.baselines.answers(condition.name, labelled, split.training, training, test)
        else:
            found = self._ask(labelled, condition, training, test)
        if labelled.numbers is not None and "probabilities" in found and "expected" not in found:
            found["expected"] = found["probabilities"] @ self._bin_means(labelled, split)
        return found

    def _bin_means(self, labelled: Labelled, split: Split) -> np.ndarray:
        """Mean number [choices] of the training scans that have each answer; of all, where none has."""
        rows = labelled.known(split.training)
        numbers, truth = labelled.numbers[rows], labelled.truth[rows]  # pyright: ignore[reportOptionalSubscript]
        return np.array(
            [numbers[truth == k].mean() if (truth == k).any() else numbers.mean() for k in range(labelled.choices)]
        )

    def _embeddings(self) -> np.ndarray:
        return self.scans.mean_over_windows(embed_windows(self.model, self.scans.encoded))

    def _ask(self, labelled: Labelled, condition: _Condition, training: np.ndarray, test: np.ndarray) -> Answers:
        task, seed = labelled.task, self.settings.seed + condition.resample
        reader = self.model, self.processor
        split = self.splits[condition.fold]
        examples = []
        if condition.name == "tuned":
            windows, labels = self.scans.windows_of(training), [labelled.labels[row] for row in training]
            subjects = self.scans.subjects[training].tolist()
            reader = tune(*reader, task, windows, labels, subjects, self.settings.tuning, seed)
        elif condition.name == "few-shot":
            order = np.random.default_rng(seed).permutation(training)
            answers = [task.answer(labelled.labels[row]) for row in order]
            texts = self.processor.answer_texts(answers, task.questions[0])
            examples = [
                Example(windows[0], text) for text, windows in zip(texts, self.scans.windows_of(order), strict=True)
            ]
        if task.choices is None:
            return self._numbers(reader, condition.name, labelled, split, test)
        question, words = task.questions[0], task.choice_words
        reference = np.random.default_rng(seed).permutation(split.training)[:REFERENCE_SCANS]
        has_own = condition.name != "few-shot" and reader[0].config.calibration(question, words) is not None
        if condition.name == "zero-shot":
            scores = self._zero_shot[task.name]
        else:
            rows = test if has_own else np.concatenate([test, reference])
            scores = self._scores(reader, rows, [task], examples)[task.name]
        found: Answers = {"uncalibrated": np.exp(scores[test])}
        own = found["uncalibrated"]
        if has_own:
            own = reader[0].answer_probabilities(torch.from_numpy(scores[test]), question, words).numpy()
        if labelled.numbers is not None:
            # calibration to even shares would make answers likely that no subject has
            found["expected"] = own @ self._bin_means(labelled, split)
        if has_own:
            return {**found, "probabilities": own}
        shares = np.full(labelled.choices, 1 / labelled.choices)
        if condition.shots != 0:
            # add-one: a class that few training subjects happen to miss is not impossible
            counts = np.bincount(labelled.truth[training], minlength=labelled.choices) + 1
            shares = counts / counts.sum()
        return {**found, "probabilities": calibrated(scores[test], scores[reference], shares)}

    @cached_property
    def _zero_shot(self) -> dict[str, np.ndarray]:
        """Log-probabilities of all tasks' answers about every scan that is needed: it is read once for all tasks."""
        rows = [np.concatenate([split.test for split in self.splits])]
        tasks = [labelled.task for labelled in self.tasks if labelled.task.choices or len(_numbers_of(labelled.task))]
        calibration = self.model.config.calibration
        if any(task.choices and calibration(task.questions[0], task.choice_words) is None for task in tasks):
            for split in self.splits:
                rows.append(np.random.default_rng(self.settings.seed).permutation(split.training)[:REFERENCE_SCANS])
        return self._scores((self.model, self.processor), np.unique(np.concatenate(rows)), tasks)

    def _scores(
        self,
        reader: Reader,
        rows: np.ndarray,
        tasks: Sequence[Task],
        examples: Sequence[Example] = (),
    ) -> dict[str, np.ndarray]:
        """By task, log-probabilities [scans, choices] of these scans, mean over windows; NaN for other scans."""
        places = np.flatnonzero(np.isin(self.scans.of_window, rows))
        windows = [self.scans.encoded[place] for place in places]
        choices = [_answer_ids(reader[1], task) for task in tasks]
        scored = score_windows(*reader, windows, [task.questions[0] for task in tasks], choices, examples)
        found = {}
        for task, values in zip(tasks, scored, strict=True):
            means = self._mean(places, values)
            found[task.name] = torch.log_softmax(torch.from_numpy(means), dim=-1).numpy()
        return found

    def _mean(self, places: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Of values [places, ...] of these windows, for every scan; NaN for scans without any."""
        every = np.full((len(self.scans.encoded), *values.shape[1:]), np.nan)
        every[places] = values
        return self.scans.mean_over_windows(every)

    def _numbers(self, reader: Reader, condition: str, labelled: Labelled, split: Split, test: np.ndarray) -> Answers:
        """
        Numbers that the model generates, mean over the windows of a scan in which one can be parsed; and the expected
        value over all whole numbers in the task's range.
        """
        task, scans = labelled.task, self.scans
        places = np.flatnonzero(np.isin(scans.of_window, test))
        windows = [scans.encoded[place] for place in places]
        question = task.questions[0]
        parsed = [parse_number(task, text) for text in answer_windows(*reader, windows, question)]
        values, failures = np.empty(len(test)), np.zeros(len(test), bool)
        # a model that gives no number is taken to give what is known without a model: it gains nothing by it
        mean = labelled.truth[labelled.known(split.training)].mean()
        for place, row in enumerate(test):
            of_scan = np.flatnonzero(scans.of_window[places] == row)
            given = [number for number in (parsed[window] for window in of_scan) if number is not None]
            values[place], failures[place] = np.mean(given) if given else mean, not given
        found: Answers = {"values": values, "failures": failures}
        numbers = _numbers_of(task)
        if len(numbers):
            scores = self._zero_shot if condition == "zero-shot" else self._scores(reader, test, [task])
            found["expected"] = np.exp(scores[task.name][test]) @ numbers
        return found


def _numbers_of(task: Task) -> np.ndarray:
    """The whole numbers that are answers to a task, if it has no choices and they are few."""
    low, high = task.range or (0, np.inf)
    if task.choices or task.decimals or high - low >= MOST_NUMBERS:
        return np.arange(0)
    return np.arange(int(np.ceil(low)), int(high) + 1)


def _answer_ids(processor: FmriLMProcessor, task: Task) -> list[list[int]]:
    """Token ids of a task's choices, or of its numbers, each as far as it takes to tell it from the others."""
    if task.choices:
        return processor.encode_choices(task.choice_words, task.questions[0])
    texts = processor.answer_texts([*map(str, _numbers_of(task))], task.questions[0])
    # where another number goes on from a number, with the end of the answer: 1 is no beginning of 12 then
    end = processor.eos_token_ids[0]
    ids = [[*each, end] for each in processor.tokenizer(texts, add_special_tokens=False)["input_ids"]]
    begun = Counter(tuple(each[:count]) for each in ids for count in range(1, len(each) + 1))
    return [each[: sum(begun[tuple(each[:count])] > 1 for count in range(1, len(each))) + 1] for each in ids]
