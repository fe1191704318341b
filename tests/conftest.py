"""Small real objects that the tests share."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from fmrilm import FmriCodecConfig, FmriCodecModel, FmriLMForConditionalGeneration
from fmrilm.processors import Atlas, FmriLMFeatureExtractor, FmriLMProcessor
from helpers import bold
from scan_rows import BACKBONES


# tests run beside each other: threads of one would wait for those of another, here and in processes that tests start
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

SENTENCES = [
    "The default mode network is strongly connected.",
    "Is this person older or younger than forty years?",
    "user assistant system: describe the scan, yes or no.",
]


def build_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML tokens: every text has ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", extra_special_tokens=["<|im_start|>", "<|im_end|>"]
    )


def build_plain_tokenizer(**tokens: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer without ChatML: of other special tokens."""
    backend = Tokenizer.from_str(build_tiny_tokenizer().backend_tokenizer.to_str().replace("<|im_", "<|no_"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


def build_tiny_atlas(rois: int = 5, name: str = "tiny") -> Atlas:
    return Atlas(
        name=name,
        rois=tuple(f"{name}_{i}" for i in range(rois)),
        networks=tuple(("Vis", "SomMot", "Default")[i % 3] for i in range(rois)),
        coordinates=np.random.default_rng(rois).uniform(-60, 60, (rois, 3)).round(1),
    )


def build_tiny_codec(started: bool = True, **changes) -> FmriCodecModel:
    """Random weights; `started` gives it a codebook of its own latents, so that scans differ in their codes."""
    torch.manual_seed(0)
    values = {
        "patch_length": 4,
        "tokens_per_patch": 2,
        "num_quantizers": 3,
        "codebook_size": 16,
        "codebook_dim": 8,
        "codebook_groups": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_decoder_layers": 1,
        "num_attention_heads": 2,
        "num_basis_functions": 6,
        "max_patches": 8,
        "initializer_range": 0.1,
        **changes,
    }
    codec = FmriCodecModel(FmriCodecConfig(**values))
    if started:
        with torch.no_grad():
            codec.train()(torch.randn(16, 5, 8 * values["patch_length"]), 60 * torch.randn(16, 5, 3))
    return codec.eval()


def build_tiny_language_model(backbone: str, vocab_size: int, tied: bool = True) -> PreTrainedModel:
    torch.manual_seed(0)
    shared = {
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    layers = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = {
        "llama": lambda: LlamaConfig(**layers, **shared),
        "qwen3": lambda: Qwen3Config(**layers, **shared, head_dim=16),
        "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=2, **dropouts, **shared),
    }[backbone]()
    return AutoModelForCausalLM.from_config(config).eval()


def build_tiny_joint_model(
    language_model: PreTrainedModel, processor: FmriLMProcessor, scores: Sequence[str] = ("age", "motion"), **changes
) -> FmriLMForConditionalGeneration:
    """The tiny codec, its configuration changed by arguments, joined to a language model."""
    from fmrilm.training.alignment.joint import join

    model = join(build_tiny_codec(**changes), language_model, processor, score_names=scores)
    # trained to something: at zero it could be left out of sums unseen
    for weight in (model.model.fmri_head.proj.weight, model.model.fmri_head.frequencies):
        torch.nn.init.normal_(weight, std=0.3)
    torch.nn.init.normal_(model.model.summary.readout.weight, std=0.5)
    for buffer in (model.model.dynamics.weights, model.model.dynamics.token_gains):
        torch.nn.init.normal_(buffer, std=0.3)
    return model.eval()


def save_tiny(folder: Path, extractor: FmriLMFeatureExtractor, **changes) -> Path:
    """Saves a joint model of Llama with its processor; changes: see `build_tiny_joint_model`."""
    processor = FmriLMProcessor(extractor, build_tiny_tokenizer(), tokens_per_patch=2, summary_tokens=4)
    language_model = build_tiny_language_model("llama", len(processor.tokenizer) - 4)
    for part in (build_tiny_joint_model(language_model, processor, **changes), processor):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_codec() -> Callable[..., FmriCodecModel]:
    """Builds the tiny codec; arguments change its configuration."""
    return build_tiny_codec


@pytest.fixture
def tiny_codec() -> FmriCodecModel:
    return build_tiny_codec()


@pytest.fixture(scope="session")
def make_language_model() -> Callable[..., PreTrainedModel]:
    """Builds a random language model: backbone ("llama", "qwen3", "gpt2"), vocab_size, tied."""
    return build_tiny_language_model


@pytest.fixture
def joined(processor: FmriLMProcessor) -> Callable[..., FmriLMForConditionalGeneration]:
    """
    Joins the tiny codec, its configuration changed by arguments, and a language model, whose vocabulary has room for
    the fMRI tokens or grows.
    """

    def build(language_model: PreTrainedModel, **changes) -> FmriLMForConditionalGeneration:
        return build_tiny_joint_model(language_model, processor, **changes)

    return build


@pytest.fixture
def tiny_model(joined: Callable, processor: FmriLMProcessor) -> Callable[..., FmriLMForConditionalGeneration]:
    """Builds the joint model: backbone and tied."""

    def build(backbone: str = "llama", tied: bool = True) -> FmriLMForConditionalGeneration:
        return joined(build_tiny_language_model(backbone, len(processor.tokenizer) - 4, tied))

    return build


@pytest.fixture(params=BACKBONES)
def model(request, tiny_model: Callable[..., FmriLMForConditionalGeneration]) -> FmriLMForConditionalGeneration:
    """The joint model on each backbone."""
    return tiny_model(request.param)


@pytest.fixture
def llama(tiny_model: Callable[..., FmriLMForConditionalGeneration]) -> FmriLMForConditionalGeneration:
    return tiny_model("llama")


@pytest.fixture(scope="session")
def saved_model(extractor: FmriLMFeatureExtractor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The joint model and its processor, saved. To be read alone."""
    return save_tiny(tmp_path_factory.mktemp("saved") / "model", extractor)


@pytest.fixture
def model_folder(saved_model: Path, tmp_path: Path) -> Path:
    """A copy of the saved model."""
    return Path(shutil.copytree(saved_model, tmp_path / "model"))


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return build_tiny_tokenizer()


@pytest.fixture(scope="module")
def module_tokenizer() -> PreTrainedTokenizerFast:
    """For tests that set it up anew in each example, because a property test allows no smaller scope."""
    return build_tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_atlas() -> Atlas:
    return build_tiny_atlas()


@pytest.fixture(scope="session")
def extractor(tiny_atlas: Atlas) -> FmriLMFeatureExtractor:
    return FmriLMFeatureExtractor(atlases=[tiny_atlas], patch_length=4, window_length=16)


@pytest.fixture(scope="session")
def extractor_of_two(tiny_atlas: Atlas) -> FmriLMFeatureExtractor:
    return FmriLMFeatureExtractor([tiny_atlas, build_tiny_atlas(7, "other")], patch_length=4, window_length=16)


@pytest.fixture
def processor(extractor: FmriLMFeatureExtractor, tiny_tokenizer: PreTrainedTokenizerFast) -> FmriLMProcessor:
    return FmriLMProcessor(extractor, tiny_tokenizer, tokens_per_patch=2, summary_tokens=4)


@pytest.fixture
def signal() -> np.ndarray:
    """A scan float32 [time, rois] of 20 frames that look like BOLD: a large mean, small fluctuations."""
    return bold(20)


@pytest.fixture
def scan_file(signal: np.ndarray, tmp_path: Path) -> Path:
    np.save(tmp_path / "scan.npy", signal)
    return tmp_path / "scan.npy"


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that README, docs and examples name, small."""
    # it builds with what stands in this file
    from small_world import write_small_world

    return write_small_world(tmp_path_factory.mktemp("small") / "world")


@pytest.fixture
def in_small_world(small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Works in a copy of the small world."""
    folder = Path(shutil.copytree(small_world, tmp_path / "world"))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def program_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared scans, a corpus, and tiny models on disk (see `program_runs.make_folders`)."""
    from program_runs import make_folders

    tokenizer = build_tiny_tokenizer()
    language_model = build_tiny_language_model("llama", len(tokenizer))
    return make_folders(tmp_path_factory.mktemp("programs"), build_tiny_codec(), language_model, tokenizer)
