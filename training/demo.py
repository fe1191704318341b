"""The whole chain on real scans: codec, alignment, instruction tuning, and answers about people it never saw."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel
from transformers import TrainingArguments

from fmrilm import Atlas, FmriCodecConfig, FmriCodecModel, FmriLMFeatureExtractor, FmriLMForConditionalGeneration
from fmrilm.processors import FmriLMProcessor
from fmrilm.processors.descriptors.cohort import LEVELS, Cohort
from fmrilm.processors.descriptors.measures import CORE_MEASURES, CORE_NAMES
from fmrilm.processors.descriptors.text import description, question

from .alignment.chats import alignment_dataset, instruction_dataset
from .alignment.joint import add_lora, join, scan_processor, train_alignment
from .alignment.language_models import PACKAGED_MODEL_CARD, load_language_model
from .alignment.plain_text import plain_texts
from .alignment.start import fit_autoregression, fit_levels, warm_up_projector
from .codec.fit import HEAD_ITEMS, fit_start
from .codec.metrics import codebook_results
from .codec.trainer import CodecTrainingArguments, encode_items, train_codec, window_items
from .data.code_cache import cached_codes
from .data.dataset import MixedWindows, cut_windows, prepare_scans, split_subjects
from .data.open_data import TERMS, open_scans
from .data.people import dataset_counts, first_windows, pseudonyms, subject, subjects
from .evaluation import levels as evaluate
from .evaluation.baselines import most_frequent
from .hub.model_card import fill_card, subject_hashes
from .report.report import ReportExample, write_report
from .run_log import Clock, run_costs
from .sft.trainer import train_sft
from .trainer import half_precision, training_options


ATLASES = ("aal2-94", "schaefer-100-7networks", "schaefer-400-7networks")
LORA_RANK = 8
# stage 2: a scan and its description, a scan alone, plain text
ALIGNMENT_WEIGHTS = (0.8, 0.1, 0.1)
# stage 3: one question, several questions in one conversation, open-ended description
PARADIGM_WEIGHTS = (0.05, 0.85, 0.1)
# share of the chats of both stages in which a sheet of true levels in words stands in place of the scan
IN_WORDS = 0.5
# subjects of each dataset that no stage sees; LEMON has one subject and stays in training
HELD_OUT = {"hcp": 2, "greifswald": 2, "hcp-schaefer": 1}


@dataclass(frozen=True)
class DemoSettings:
    """What the demo spends; `quick()` is the same chain in about a minute, and learns next to nothing."""

    codec_start_steps: int = 400
    codec_steps: int = 380
    codec_batch: int = 16
    mixtures: int = 1000
    projector_steps: int = 250
    autoregression_steps: int = 300
    alignment_steps: int = 20
    sft_steps: int = 118
    rows_per_step: int = 4
    statements: int = 8
    questions: int = 8
    questions_per_family: int = 8
    window_stride: int = 136
    description_tokens: int = 80
    seed: int = 0

    @classmethod
    def quick(cls) -> "DemoSettings":
        return cls(
            codec_start_steps=20,
            codec_steps=8,
            codec_batch=10,
            mixtures=8,
            projector_steps=2,
            autoregression_steps=2,
            alignment_steps=2,
            sft_steps=2,
            rows_per_step=2,
            statements=2,
            questions=2,
            questions_per_family=1,
            window_stride=272,
            description_tokens=8,
        )


def codec_config(quick: bool) -> FmriCodecConfig:
    size: dict[str, Any] = (
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_decoder_layers": 1}
        if quick
        else {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_decoder_layers": 2}
    )
    return FmriCodecConfig(
        **size,
        patch_length=16,
        tokens_per_step=8,
        codebook_size=512,
        codebook_dim=32,
        num_roi_layers=1,
        num_attention_heads=4,
        max_steps=32,
        initializer_range=0.08,
        ema_decay=0.95,
        commitment_weight=100.0,
        descriptor_names=list(CORE_NAMES),
    )


class Demo:
    """One run: `run` goes through the stages in order, each a method that hands its result to the next."""

    def __init__(self, settings: DemoSettings, quick: bool, output: Path):
        self.settings = settings
        self.quick = quick
        self.output = output
        self.clock = Clock()

    def run(self) -> tuple[dict, ReportExample]:
        with self.clock.part("prepare", "Reading the scans of three atlases and three scanners"):
            self.prepare()
        with self.clock.part("codec", "Stage 1: the codec learns to write scans as tokens"):
            codec = self.train_codec()
        with self.clock.part("language model", "Reading SmolLM2-135M-Instruct and encoding the training windows"):
            processor, model = self.join(codec)
        with self.clock.part("alignment", "Stage 2: the language model learns to read the tokens"):
            adapted = self.align(model, processor)
        with self.clock.part("sft", "Stage 3: instruction tuning on chats about scans"):
            adapted = self.tune(adapted, processor)
        with self.clock.part("save", "Merging the adapter and saving"):
            model = adapted.merge_and_unload().eval()
            model.save_pretrained(self.output / "model")
            processor.save_pretrained(self.output / "model")
            self.cohort.save(self.output / "model")
        with self.clock.part("evaluate", "Questions about the held-out people"):
            results, example = self.examine(model, processor)
        results["run"] = {**run_costs(self.clock), "quick": self.quick}
        results["settings"] = asdict(self.settings)
        return results, example

    def prepare(self) -> None:
        self.extractor = FmriLMFeatureExtractor(atlases=[Atlas.load(name) for name in ATLASES])
        length = self.extractor.window_length
        self.training, self.held_out = split_subjects(prepare_scans(open_scans(), self.extractor), HELD_OUT)
        self.training_windows = cut_windows(self.training, length, stride=length // 4)
        self.windows = cut_windows(self.held_out, length, self.settings.window_stride)
        descriptors = np.stack([window.descriptors for window in self.training_windows])
        self.cohort = Cohort.fit(
            "the demo's training subjects",
            CORE_MEASURES,
            descriptors,
            subjects=len(subjects(self.training)),
            atlases=[scan.atlas for scan in self.training],
        )
        self.names = pseudonyms(self.held_out)

    def train_codec(self) -> FmriCodecModel:
        settings = self.settings
        transformers.set_seed(settings.seed)
        args = CodecTrainingArguments(
            **training_options(self.output, settings.codec_steps, settings.codec_batch, 3e-4, settings.seed)
        )
        mixtures = MixedWindows(
            self.training,
            self.cohort,
            self.extractor.window_length,
            max_rois=64,
            size=settings.codec_steps * settings.codec_batch,
            seed=settings.seed,
        )
        codec = FmriCodecModel(codec_config(self.quick))
        kept = fit_start(codec, self.training, settings.codec_start_steps, settings.seed)
        print(f"before training, codes keep {kept:.2f} of the training scans' variance on functions of place")
        return train_codec(codec, mixtures, args, min(HEAD_ITEMS, len(mixtures)))

    def join(self, codec: FmriCodecModel) -> tuple[FmriLMProcessor, FmriLMForConditionalGeneration]:
        """Also encodes what stages 2 and 3 learn from, once: windows of the training scans, and mixtures of them."""
        size = self.settings.mixtures
        length = self.extractor.window_length
        mixtures = MixedWindows(
            self.training, self.cohort, length, max_rois=None, size=size, seed=self.settings.seed + 1
        )
        items = [mixtures[index] for index in range(size)]
        real = cut_windows(self.training, length, stride=self.extractor.patch_length)
        self.z_scores = np.concatenate(
            [
                np.stack([item["descriptors"] for item in items]),
                self.cohort.z_scores(np.stack([window.descriptors for window in real])),
            ]
        )
        self.levels = self.cohort.levels(self.cohort.from_z_scores(self.z_scores))
        self.codes = cached_codes(codec, items + window_items(real), self.output / "codes")
        language_model, tokenizer = load_language_model()
        processor = scan_processor(self.extractor, tokenizer, codec.config)
        return processor, join(codec, language_model, processor)

    def align(self, model: FmriLMForConditionalGeneration, processor: FmriLMProcessor) -> PeftModel:
        settings = self.settings
        rows = settings.alignment_steps * settings.rows_per_step
        dataset = alignment_dataset(
            self.codes,
            self.levels,
            plain_texts()[0],
            rows,
            settings.statements,
            weights=ALIGNMENT_WEIGHTS,
            seed=settings.seed,
            in_words=IN_WORDS,
        )
        args = TrainingArguments(
            **training_options(self.output, settings.alignment_steps, settings.rows_per_step, 1e-3, settings.seed),
            bf16=half_precision(),
        )
        explained = warm_up_projector(model, self.codes, self.z_scores, settings.projector_steps, settings.seed)
        print(f"the projected codes explain {explained:.2f} of the training descriptors' variance")
        told = fit_levels(model, self.codes, self.levels)
        print(f"the codec's head tells {told:.2f} of the training levels from the codes")
        perplexity = fit_autoregression(model, self.codes, settings.autoregression_steps, settings.seed)
        print(f"the codes tell the next ones at a perplexity of {perplexity:.0f}")
        return train_alignment(add_lora(model, LORA_RANK), dataset, processor, args)

    def tune(self, model: PeftModel, processor: FmriLMProcessor) -> PeftModel:
        settings = self.settings
        dataset = instruction_dataset(
            self.codes,
            self.levels,
            rows=settings.sft_steps * settings.rows_per_step,
            questions=settings.questions,
            statements=settings.statements,
            weights=PARADIGM_WEIGHTS,
            seed=settings.seed + 1,
            in_words=IN_WORDS,
        )
        return train_sft(
            model,
            dataset,
            processor,
            **training_options(self.output, settings.sft_steps, settings.rows_per_step, 1e-3, settings.seed),
            bf16=half_precision(),
            gradient_checkpointing=False,
        )

    def examine(
        self, model: FmriLMForConditionalGeneration, processor: FmriLMProcessor
    ) -> tuple[dict, ReportExample]:
        settings, codec = self.settings, model.model.codec
        levels = self.cohort.levels(np.stack([window.descriptors for window in self.windows]))
        training_levels = self.cohort.levels(np.stack([window.descriptors for window in self.training_windows]))
        swapped = evaluate.swapped_windows(self.windows, self.training_windows, settings.seed)
        codes = {
            "right": encode_items(codec, window_items(self.windows)),
            "swapped": encode_items(codec, window_items(swapped)),
            "noise": encode_items(codec, evaluate.noise_items(self.windows, settings.seed)),
        }
        stand_ins = cut_windows(self.training, self.extractor.window_length, stride=2 * settings.window_stride)
        others = stand_ins, encode_items(codec, window_items(stand_ins))
        with torch.autocast(model.device.type, torch.bfloat16, enabled=half_precision()):
            scored = evaluate.ask_windows(
                model, processor, self.windows, levels, codes, others, settings.questions_per_family, settings.seed
            )
        answers = self.answers(scored)
        print_answers(answers)
        first = first_windows(self.windows)
        texts = {
            name: evaluate.describe_windows(model, processor, list(codes[name][first]), settings.description_tokens)
            for name in ("right", "swapped")
        }
        majority = most_frequent(training_levels)
        per_step = codec.config.tokens_per_step
        baseline = evaluate.PatchPCA(self.training, codec.config.patch_length, per_step)
        people = subject_hashes(*({scan.subject for scan in scans} for scans in (self.training, self.held_out)))
        results = {
            "model": PACKAGED_MODEL_CARD,
            "data": {
                "training_subjects": len(subjects(self.training)),
                "held_out_subjects": len(self.names),
                "training_windows": len(self.training_windows),
                "held_out_windows": len(self.windows),
                "datasets": dataset_counts(self.training, self.held_out),
                "people": dict(zip(("training", "held_out"), people, strict=True)),
                "terms": TERMS,
                "atlases": list(ATLASES),
            },
            "codec": {
                **codebook_results(codes["right"], codec.config.codebook_size),
                **evaluate.codec_results(codec, self.windows, baseline, self.names),
            },
            "questions": evaluate.question_results(scored, majority, settings.seed),
            "answers": answers,
            "descriptions": {
                "examples": [
                    {
                        "subject": self.names[subject(self.windows[row].scan)],
                        "generated": text,
                        "truth": description(levels[row], _known(levels[row], evaluate.mentioned(text))),
                    }
                    for row, text in zip(first, texts["right"], strict=True)
                ],
                "statement_accuracy": {
                    **{name: evaluate.statement_accuracy(texts[name], levels[first]) for name in texts},
                    "majority": evaluate.statement_accuracy(texts["right"], levels[first], majority),
                },
            },
        }
        window = self.windows[0]
        return results, ReportExample(
            title=self.names[subject(window.scan)],
            signal=window.signal,
            reconstruction=evaluate.reconstruct(codec, [window])[0],
            repetition_time=self.extractor.repetition_time,
            networks=window.scan.atlas.networks,
            codes=codes["right"][0].reshape(-1, per_step),
            code_counts=np.bincount(codes["right"].ravel(), minlength=codec.config.codebook_size),
        )

    def answers(self, scored: list[evaluate.Scored]) -> list[dict]:
        """The first questions of each family about the first window of each held-out subject."""
        rows = []
        for row in first_windows(self.windows):
            item = scored[row]
            names = [CORE_NAMES[index] for index in item.asked]
            families = [name.partition("/")[0] for name in names]
            for place in _first_of_each(families):
                scores = item.scores["right"][place]
                probabilities = np.exp(scores - np.logaddexp.reduce(scores))
                rows.append(
                    {
                        "subject": self.names[subject(item.window.scan)],
                        "window_start_seconds": item.window.start * self.extractor.repetition_time,
                        "question": question(names[place]),
                        "truth": LEVELS[item.truth[place]],
                        "answer": LEVELS[int(scores.argmax())],
                        "probabilities": dict(zip(LEVELS, probabilities.round(4).tolist(), strict=True)),
                    }
                )
        return rows


def _first_of_each(families: list[str], count: int = 2) -> list[int]:
    """Places of the first `count` members of each family."""
    return [place for place, name in enumerate(families) if families[:place].count(name) < count]


def print_answers(answers: list[dict]) -> None:
    for answer in answers:
        choices = "  ".join(f"{level} {share:.2f}" for level, share in answer["probabilities"].items())
        mark = "right" if answer["answer"] == answer["truth"] else "wrong"
        print(f"{answer['subject']:>14}  {answer['question']}\n{'':>14}  {choices}  truth: {answer['truth']} ({mark})")


def _known(levels: np.ndarray, chosen: list[int]) -> list[int]:
    return [index for index in chosen if levels[index] >= 0]


def run_demo(output: Path, quick: bool = False) -> dict:
    """
    Runs the chain and writes `model/` (model, processor and card), `results.json` and `report.html` into `output`.
    A finished run of the same settings is not repeated.
    """
    settings = DemoSettings.quick() if quick else DemoSettings()
    finished = output / "results.json"
    if finished.exists():
        results = json.loads(finished.read_text())
        if results["settings"] == asdict(settings):
            print(f"{finished} holds a finished run with these settings; delete {output} to run anew")
            return results
    staging = output.with_name(output.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    results, example = Demo(settings, quick, staging).run()
    write_report(staging / "report.html", results, example)
    (staging / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    fill_card(staging / "model", results).save(staging / "model" / "README.md")
    shutil.rmtree(output, ignore_errors=True)
    staging.rename(output)
    return results
