"""Stage 1 as a program: what it trains on, what it logs, and how it stops."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from fmrilm import FmriCodecModel
from fmrilm.processors import FmriLMFeatureExtractor
from fmrilm.training.codec import text_embeddings
from fmrilm.training.codec.program import CodecArguments, CodecData, build_trainer, codec_data, main
from fmrilm.training.codec.program import prepare as prepare_data
from fmrilm.training.codec.trainer import CodecTrainer, CodecTrainingArguments
from fmrilm.training.data.dataset import load_prepared
from fmrilm.training.data.prepare import Preparation, prepare
from fmrilm.training.data.scan_sources import find_scans
from helpers import atlas, slow_series
from helpers import prepared as prepared_scan


NETWORKS = ("Vis", "SomMot", "Default")
ROIS, FRAMES = 9, 48
SETTINGS = {"window_length": 32, "window_stride": 16, "patch_length": 8, "tokens_per_step": 2, "codebook_size": 16}
SETTINGS["start_steps"] = 2


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `fmrilm prepare` writes of six subjects."""
    folder = tmp_path_factory.mktemp("study")
    places = np.random.default_rng(0).integers(-60, 60, (ROIS, 3)).tolist()
    rows = [f"{i + 1}\tR{i}\tL\t{NETWORKS[i % 3]}\t{x}\t{y}\t{z}" for i, (x, y, z) in enumerate(places)]
    table = folder / "nine.tsv"
    table.write_text("\n".join(["index\tname\themisphere\tnetwork\tx\ty\tz", *rows]))
    manifest = ["path,subject,tr"]
    for number in range(6):
        np.save(folder / f"{number}.npy", slow_series(number, FRAMES, ROIS).astype(np.float32))
        manifest.append(f"{number}.npy,s{number},2.0")
    (folder / "manifest.csv").write_text("\n".join(manifest))
    prepare(find_scans(folder / "manifest.csv"), folder / "prepared", str(table), Preparation())
    return folder / "prepared"


@pytest.fixture
def language_model(
    make_language_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """A folder with a frozen language model; embeddings of texts are kept beside it."""
    monkeypatch.setattr(text_embeddings.TextEmbeddings.__init__, "__defaults__", (tmp_path / "embeddings",))
    folder = tmp_path / "language-model"
    make_language_model("llama", len(tiny_tokenizer)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def small_data() -> CodecData:
    scans = [prepared_scan(name, frames=FRAMES, of=atlas()) for name in "abcd"]
    return codec_data(scans[:3], scans[3:], 32, 16)


def options(folder: Path, **changes) -> CodecTrainingArguments:
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "unquantized_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 1,
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    return CodecTrainingArguments(**values)


def trainer(data: CodecData, folder: Path, language_model: str | None = None, **changes) -> CodecTrainer:
    arguments = CodecArguments(**SETTINGS, language_model=language_model, described_mixtures=4)
    return build_trainer(arguments, options(folder, **changes), data)


def flags(**values) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def test_trains_on_a_prepared_folder_and_logs_retrieval_in_each_evaluation(
    prepared: Path, language_model: str, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    training = {"max_steps": 2, "per_device_train_batch_size": 4, "unquantized_steps": 1, "learning_rate": 1e-3}
    logs = {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1, "save_steps": 1, "report_to": "none"}
    aligned = {"language_model": language_model, "described_mixtures": 4, "data": prepared, "output_dir": output}
    main(flags(**SETTINGS, **training, **logs, **aligned, use_cpu=True))
    model = FmriCodecModel.from_pretrained(output / "model")
    assert model.config.codebook_size == 16 and model.alignment is not None
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert all(set(CodecTrainer.loss_parts) <= set(entry) for entry in history if "loss" in entry)
    evaluations = [entry for entry in history if "eval_r_squared" in entry]
    # after each of the two steps, and of the saved model
    assert [entry["step"] for entry in evaluations] == [1, 2, 2]
    for entry in evaluations:
        # two held-out subjects of two windows each
        assert entry["eval_retrieval_texts"] <= 4 and 1 <= entry["eval_median_rank"] <= 4
        assert entry["eval_recall_at_5"] == 1 >= entry["eval_recall_at_1"]
        assert {"eval_fc_correlation", "eval_perplexity", "eval_codebook_usage"} <= set(entry)


def test_subjects_are_split_before_the_cohort_is_fitted(prepared: Path) -> None:
    data = prepare_data(CodecArguments(data=str(prepared), window_length=32, held_out_share=0.25))
    names = [{scan.subject for scan in scans} for scans in (data.training, data.held_out)]
    assert names == [{"s0", "s1", "s2", "s3"}, {"s4", "s5"}]
    assert data.cohort.subjects == 4
    whole = codec_data(load_prepared(prepared, FmriLMFeatureExtractor()), data.held_out, 32, 136)
    assert not np.array_equal(
        whole.cohort.z_scores(whole.items()[0]["descriptors"]), data.cohort.z_scores(whole.items()[0]["descriptors"])
    )


@pytest.mark.parametrize("share", [0.0, 0.95])
def test_shares_that_leave_nobody_are_refused(prepared: Path, share: float) -> None:
    with pytest.raises(ValueError, match=f"subjects to train and to evaluate on, got .* held_out_share={share}"):
        prepare_data(CodecArguments(data=str(prepared), window_length=32, held_out_share=share))


def test_training_without_an_end_is_refused(small_data: CodecData, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_steps of at least 1, got -1"):
        trainer(small_data, tmp_path, max_steps=-1)


class Breaks(TrainerCallback):
    """Makes a parameter no number before or after the third step."""

    def __init__(self, name: str, when: str):
        self.name = name
        setattr(self, when, self.strike)

    def strike(self, args, state, control, model: FmriCodecModel, **kwargs) -> None:
        if state.global_step >= 2:
            model.get_parameter(self.name).data.fill_(float("nan"))


@pytest.mark.parametrize(
    ("parameter", "part"),
    [
        ("decoder.to_coefficients.bias", "reconstruction_loss"),
        ("descriptor_head.bias", "descriptor_loss"),
        ("alignment.log_scale", "alignment_loss"),
        ("alignment.classifier.0.bias", "domain_loss"),
    ],
)
def test_loss_that_is_no_number_stops_training_and_leaves_the_last_good_checkpoint(
    small_data: CodecData, language_model: str, tmp_path: Path, parameter: str, part: str
) -> None:
    broken = trainer(small_data, tmp_path / "run", language_model)
    broken.add_callback(Breaks(parameter, "on_step_begin"))
    with pytest.raises(FloatingPointError, match=f"step 3: {part} is nan"):
        broken.train()
    last = get_last_checkpoint(str(tmp_path / "run"))
    assert Path(last).name == "checkpoint-2"
    good = FmriCodecModel.from_pretrained(last)
    assert all(value.isfinite().all() for value in good.state_dict().values())


def test_weights_that_are_no_numbers_are_never_saved(small_data: CodecData, tmp_path: Path) -> None:
    broken = trainer(small_data, tmp_path)
    broken.add_callback(Breaks("decoder.to_coefficients.bias", "on_optimizer_step"))
    with pytest.raises(FloatingPointError, match="step 3: decoder.to_coefficients.bias holds .* not finite"):
        broken.train()
    assert Path(get_last_checkpoint(str(tmp_path))).name == "checkpoint-2"
    resumed = trainer(small_data, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4


def test_trains_in_bfloat16_with_checkpointed_layers(small_data: CodecData, tmp_path: Path) -> None:
    halved = trainer(small_data, tmp_path, bf16=True, activation_checkpointing=True, save_strategy="no")
    halved.train()
    assert halved.model.is_activation_checkpointing and halved.model.quantizer.started
    losses = [entry["loss"] for entry in halved.state.log_history if "loss" in entry]
    assert len(losses) == 4 and np.isfinite(losses).all()
    assert halved.model.quantizer.codebook.dtype == torch.float32
