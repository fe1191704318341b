"""Made-up subjects with a synthetic effect, prepared, and a tiny model of them, for the tests of evaluation."""

from pathlib import Path

import numpy as np
import torch

from fmrilm import FmriLMForConditionalGeneration
from fmrilm.processors import FmriLMProcessor
from fmrilm.processors.descriptors.cohort import Cohort
from fmrilm.processors.descriptors.measures import CORE_MEASURES, CORE_NAMES
from fmrilm.training.alignment.joint import join
from fmrilm.training.data.tasks import Task
from fmrilm.training.evaluation.ask import EncodedWindow
from helpers import labelled_atlas, write_prepared


GROUP = Task("made_up_group", "group", ("Which group?", "Which of the two?"), {"a": "younger", "b": "the older"})
AGE = Task("made_up_age", "age", ("How old?",), range=(20, 40), unit="years")
AGE_GROUP = Task(
    "made_up_age_group", "age", ("How old?",), {"young": "young", "old": "old"}, (20, 40), "years", cuts=(30,)
)
SUBJECTS, FRAMES = 24, 24
ATLAS = labelled_atlas()


def signals(subjects: int = SUBJECTS, effect: float = 1.5) -> np.ndarray:
    """[subjects, frames, ROIs]: in every second subject, half of the ROIs have a series in common."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((subjects, FRAMES, len(ATLAS)))
    common = rng.standard_normal((subjects, FRAMES, 1)) * (np.arange(len(ATLAS)) % 2)
    return noise + effect * common * (np.arange(subjects) % 2)[:, None, None] + rng.standard_normal((1, FRAMES, 1))


def write_cohort(folder: Path, **columns: list) -> Path:
    """A prepared folder of two sites; one ROI is missing in the first subject. columns: labels."""
    labels = {
        "group": ["ab"[row % 2] for row in range(SUBJECTS)],
        "age": [22.0 + 8 * (row % 2) + row % 3 for row in range(SUBJECTS)],
        **columns,
    }
    types = {name: "float64" if isinstance(values[-1], float) else "string" for name, values in labels.items()}
    rows = []
    for row, signal in enumerate(1000 + 10 * signals()):
        if row == 0:
            signal[:, 3] = np.nan
        facts = {"signal": signal.astype(np.float32), "subject": f"made-up-{row:03d}", "session": "1"}
        facts["site"] = f"site {row // 2 % 2}"
        rows.append(facts | {name: values[row] for name, values in labels.items()})
    return write_prepared(folder, ATLAS, rows, **types)


def build_model(codec, language_model, processor: FmriLMProcessor) -> FmriLMForConditionalGeneration:
    """The joint model on a tiny codec, with scores of two descriptors."""
    model = join(codec, language_model, processor, CORE_NAMES[:2])
    torch.nn.init.normal_(model.model.summary.readout.weight, std=0.3)
    return model.eval()


def save_model(model: FmriLMForConditionalGeneration, processor: FmriLMProcessor, folder: Path) -> Path:
    """With the cohort that tercile labels go by."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    rng = np.random.default_rng(0)
    descriptors = rng.uniform(-0.5, 0.5, (50, len(CORE_NAMES)))
    Cohort.fit("made-up subjects", CORE_MEASURES, descriptors, subjects=50, atlases=[ATLAS]).save(folder)
    return folder


def encoded(model: FmriLMForConditionalGeneration, tokens: int, seed: int) -> EncodedWindow:
    """A window of random codes."""
    config = model.config.codec_config
    codes = np.random.default_rng(seed).integers(config.codebook_size, size=(tokens, config.num_quantizers))
    with torch.no_grad():
        features = model.model.codec.scan_features(torch.from_numpy(codes)[None])[0].numpy()
    return EncodedWindow(codes.astype(np.int32), features)
