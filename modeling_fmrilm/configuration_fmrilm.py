"""Configurations of the codec and of the language model that reads its codes."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


# width, layers of the encoder and of the decoder, and heads; small, base and large have those of the paper's encoders
CODEC_SIZES = {
    "tiny": (128, 3, 2, 4),
    "small": (384, 12, 12, 6),
    "base": (768, 12, 12, 12),
    "large": (1024, 24, 24, 16),
}
# values of the numbers that make up a code of the scan as a whole
SCAN_CODE_VALUES = (8, 8, 8)


class FmriCodecConfig(PreTrainedConfig):
    """
    Configuration of [`FmriCodecModel`]. By default 8 tokens of 16 levels of 512 codes, 1,152 bits for a patch of 16
    frames, in 4 groups, and no transformer.

    Args:
        patch_length: frames of a patch.
        tokens_per_patch: latent tokens that stand for a patch.
        num_quantizers: levels: a token is the sum of as many codebook vectors.
        quantizer: "vq" (codebooks learned by moving averages) or "fsq" (a fixed grid, finite scalar quantisation).
        codebook_size, codebook_dim: codes of a level and their dimension; of "fsq" they follow from `fsq_levels`.
        codebook_groups: parts of a token's vector that the levels of "vq" take turns over.
        fsq_levels: number of values that each dimension of "fsq" is rounded to.
        num_scan_levels: further levels, which hold codes of the scan as a whole, the same in every patch (0: none).
        num_scan_rois: ROIs of the atlas whose scans have such codes.
        repetition_time: seconds between two frames of the input.
        num_basis_functions: functions of MNI coordinates that a frame is the sum of.
        num_networks: networks of ROIs whose mean series are compared in the scan features.
        num_hidden_layers: encoder layers over the latent tokens, causal over patches; 0: no transformer.
        num_decoder_layers: decoder layers over the quantised tokens, causal over patches; 0: no transformer.
        max_patches: longest scan in patches.
        ema_decay, revival_threshold: codebook update; a code whose moving share of assignments falls under
            `revival_threshold / codebook_size` is moved onto a vector of the batch.
        quantizer_dropout: of "vq", the share of training scans that are decoded from a random prefix of the levels.
        descriptor_names: descriptors that a head reads from the codes (none: no head).
        text_hidden_size: width of the frozen language model whose embeddings the codes are aligned to during training
            (none: no head for that).
        alignment_size: dimension in which scans and descriptions are compared.
        commitment_weight, descriptor_weight, alignment_weight: weights of the losses beside the reconstruction.
    """

    model_type = "fmri_codec"
    base_config_key = "codec_config"

    patch_length: int = 16
    tokens_per_patch: int = 8
    num_quantizers: int = 16
    quantizer: str = "vq"
    codebook_size: int = 512
    codebook_dim: int = 128
    codebook_groups: int = 4
    fsq_levels: list[int] | None = None
    num_scan_levels: int = 0
    num_scan_rois: int = 0
    repetition_time: float | int = 2.0
    num_basis_functions: int = 64
    num_networks: int = 8
    hidden_size: int = 128
    intermediate_size: int = 512
    num_hidden_layers: int = 0
    num_decoder_layers: int = 0
    num_attention_heads: int = 4
    max_patches: int = 256
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    ema_decay: float = 0.99
    revival_threshold: float | int = 0.1
    quantizer_dropout: float | int = 0.0
    descriptor_names: list[str] | None = None
    text_hidden_size: int | None = None
    alignment_size: int = 512
    commitment_weight: float | int = 0.25
    descriptor_weight: float | int = 1.0
    alignment_weight: float | int = 1.0

    @property
    def scan_feature_blocks(self) -> tuple[int, int]:
        """
        Numbers that are computed from what a scan's patches decode to: of the basis coefficients, the summary (a
        covariance's triangle) and each one's autocorrelation; of the networks' mean series, covariance and
        autocorrelation.
        """
        basis, networks = self.num_basis_functions, self.num_networks
        return self.num_summary_features + basis, networks * (networks + 1) // 2 + networks

    @property
    def num_summary_features(self) -> int:
        return self.num_basis_functions * (self.num_basis_functions + 1) // 2

    @property
    def num_scan_numbers(self) -> int:
        """Numbers that the codes of the scan as a whole hold; they come last among the scan features."""
        return self.tokens_per_patch * self.num_scan_levels * len(SCAN_CODE_VALUES)

    @property
    def num_scan_features(self) -> int:
        return sum(self.scan_feature_blocks) + self.num_scan_numbers

    @classmethod
    def from_size(cls, size: str, **changes) -> "FmriCodecConfig":
        """A named size ("tiny", "small", "base", "large") with some values changed."""
        if size not in CODEC_SIZES:
            raise ValueError(f"expected a size out of {', '.join(CODEC_SIZES)}, got {size!r}")
        width, encoder, decoder, heads = CODEC_SIZES[size]
        widths = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
        return cls(**{**widths, "num_hidden_layers": encoder, "num_decoder_layers": decoder, **changes})

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.num_quantizers < 1:
            raise ValueError(f"expected at least 1 level, got num_quantizers={self.num_quantizers}")
        if self.quantizer not in ("vq", "fsq"):
            raise ValueError(f"expected quantizer 'vq' or 'fsq', got {self.quantizer!r}")
        if (self.quantizer == "fsq") != bool(self.fsq_levels):
            raise ValueError(f"expected fsq_levels for 'fsq' alone, got {self.fsq_levels} for {self.quantizer!r}")
        if self.fsq_levels:
            if min(self.fsq_levels) < 2:
                raise ValueError(f"expected at least 2 levels in each dimension, got fsq_levels={self.fsq_levels}")
            self.codebook_size, self.codebook_dim = math.prod(self.fsq_levels), len(self.fsq_levels)
            self.codebook_groups = 1
        if bool(self.num_scan_levels) != bool(self.num_scan_rois):
            raise ValueError(
                f"expected num_scan_levels and num_scan_rois, or neither, got {self.num_scan_levels} and "
                f"{self.num_scan_rois}"
            )
        if not 1 <= self.codebook_groups <= self.num_quantizers or self.codebook_dim % self.codebook_groups:
            raise ValueError(
                "expected codebook_groups that divide codebook_dim and are no more than the levels, got "
                f"codebook_groups={self.codebook_groups}, codebook_dim={self.codebook_dim}, "
                f"num_quantizers={self.num_quantizers}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads}"
            )


class FmriLMConfig(PreTrainedConfig):
    """
    Configuration of [`FmriLMModel`] and [`FmriLMForConditionalGeneration`].

    Args:
        codec_config, text_config: the two parts; any causal language model of the Auto classes is a `text_config`.
        fmri_start_token_id, fmri_token_id, fmri_summary_token_id, fmri_end_token_id: the added special tokens around
            and of a scan.
        num_summary_tokens: tokens after a scan's latent tokens that carry its scores (0 without `score_names`).
        score_names: descriptors and labels that are read out of a scan's codes for the summary tokens.
        score_tokens: of each score, the summary token that tells it; in turn where not given.
        calibrations: of questions that the model was trained on, what makes its answers' log-probabilities as sure as
            the labels are: [{"questions": [...], "slope": float, "biases": {choice: float}}].
        projector_hidden_size: width of the projector's hidden layer.
        fmri_loss_weight: weight of the next-code prediction beside the text loss (0.1 in the paper).
    """

    model_type = "fmrilm"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "codec_config": SubConfigSpec(config_class=FmriCodecConfig),
    }
    keys_to_ignore_at_inference = ["past_key_values"]

    if TYPE_CHECKING:
        # whatever is given, `__post_init__` makes configurations of it
        codec_config: PreTrainedConfig
        text_config: PreTrainedConfig
        score_names: list[str]
        score_tokens: list[int]
        # only a configuration of nothing but defaults is without them
        fmri_start_token_id: int
        fmri_token_id: int
        fmri_summary_token_id: int
        fmri_end_token_id: int
    else:
        codec_config: dict | PreTrainedConfig | None = None
        text_config: dict | PreTrainedConfig | None = None
        score_names: list[str] | None = None
        score_tokens: list[int] | None = None
        fmri_start_token_id: int | None = None
        fmri_token_id: int | None = None
        fmri_summary_token_id: int | None = None
        fmri_end_token_id: int | None = None
    num_summary_tokens: int = 8
    calibrations: list[dict] | None = None
    projector_hidden_size: int = 512
    fmri_loss_weight: float | int = 0.1
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.score_names = list(self.score_names or ())
        if self.score_names and self.num_summary_tokens < 1:
            raise ValueError(
                f"expected num_summary_tokens >= 1 for {len(self.score_names)} scores, got {self.num_summary_tokens}"
            )
        if not self.score_names:
            self.num_summary_tokens = 0
        if self.score_tokens is None:
            self.score_tokens = [place % self.num_summary_tokens for place in range(len(self.score_names))]
        if len(self.score_tokens) != len(self.score_names):
            raise ValueError(
                f"expected a token of each of {len(self.score_names)} scores in score_tokens, got "
                f"{len(self.score_tokens)}"
            )
        if not all(0 <= place < self.num_summary_tokens for place in self.score_tokens):
            raise ValueError(f"expected score_tokens from 0 to {self.num_summary_tokens - 1}, got {self.score_tokens}")
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))

    def calibration(self, question: str, choices: Sequence[str]) -> dict | None:
        """Of `calibrations`, the one that knows the question and these choices, in any order."""
        for known in self.calibrations or ():
            if question in known["questions"] and known["biases"].keys() == set(choices):
                return known
        return None


# every save ships the code, so that a downloaded folder loads where this package is not installed
FmriCodecConfig.register_for_auto_class()
FmriLMConfig.register_for_auto_class()

__all__ = ["FmriCodecConfig", "FmriLMConfig"]
