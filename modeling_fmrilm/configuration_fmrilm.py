"""Configurations of the codec and of the language model that reads its codes."""

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class FmriCodecConfig(PreTrainedConfig):
    """
    Configuration of [`FmriCodecModel`]. The defaults are the paper's base size (768 wide, 12 layers, 12 heads,
    8192 codes of 128 dimensions).

    Args:
        patch_length: frames in one step.
        tokens_per_step: discrete tokens (slots) that stand for one step.
        codebook_size, codebook_dim: number of codes and their dimension.
        repetition_time: seconds between two frames of the input.
        num_roi_layers: layers in which the ROIs of one step attend to each other.
        num_hidden_layers: encoder layers over the latents, causal over steps.
        num_decoder_layers: decoder layers over the quantised latents, causal over steps.
        num_frequencies: Fourier frequencies for each of the three MNI axes.
        max_steps: longest scan in steps.
        ema_decay, revival_threshold: codebook update; a code whose moving share of assignments falls under
            `revival_threshold / codebook_size` is moved onto a vector of the batch.
        commitment_weight, descriptor_weight: weights of the two losses beside the reconstruction.
        descriptor_names: descriptors that a head regresses from the codes during training (none: no head).
    """

    model_type = "fmri_codec"
    base_config_key = "codec_config"

    patch_length: int = 16
    tokens_per_step: int = 16
    codebook_size: int = 8192
    codebook_dim: int = 128
    repetition_time: float | int = 2.0
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_roi_layers: int = 2
    num_hidden_layers: int = 12
    num_decoder_layers: int = 12
    num_attention_heads: int = 12
    num_frequencies: int = 12
    max_steps: int = 256
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    ema_decay: float = 0.99
    revival_threshold: float | int = 0.1
    commitment_weight: float | int = 1.0
    descriptor_weight: float | int = 1.0
    descriptor_names: list[str] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
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
        fmri_start_token_id, fmri_token_id, fmri_end_token_id: the three added special tokens.
        fmri_input: what the language model reads of a scan: "codes", their codebook vectors, or "features", the
            codec's continuous vectors before quantisation.
        projector_hidden_size: width of the projector's hidden layer.
        fmri_loss_weight: weight of the next-step code prediction beside the text loss (0.1 in the paper).
    """

    model_type = "fmrilm"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "codec_config": FmriCodecConfig,
    }
    keys_to_ignore_at_inference = ["past_key_values"]

    codec_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    fmri_start_token_id: int | None = None
    fmri_token_id: int | None = None
    fmri_end_token_id: int | None = None
    fmri_input: str = "codes"
    projector_hidden_size: int = 512
    fmri_loss_weight: float | int = 0.1
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if isinstance(self.codec_config, dict) and self.codec_config.get("model_type") == "fmri_original":
            self.codec_config = FmriOriginalConfig(**self.codec_config)
        super().__post_init__(**kwargs)
        if self.fmri_input not in ("codes", "features"):
            raise ValueError(f'expected fmri_input "codes" or "features", got {self.fmri_input!r}')
        if self.fmri_input == "codes" and not self.codec_config.codebook_size:
            kind = self.codec_config.model_type
            raise ValueError(f'{kind} makes no codes: expected fmri_input "features", got "codes"')
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))


class FmriOriginalConfig(PreTrainedConfig):
    """
    Configuration of [`FmriOriginalEncoder`]. The defaults are the released base size.

    Args:
        num_rois: ROIs of the one atlas that the weights know.
        patch_length: frames in one patch.
        num_patches: patches of a scan (T'); a scan has exactly `num_patches * patch_length` frames.
        feature_dim: dimension of the features; None for those of the encoder itself, else the output of the layers
            that lead to the codebook.
    """

    model_type = "fmri_original"
    base_config_key = "codec_config"

    num_rois: int = 450
    patch_length: int = 160
    num_patches: int = 1
    feature_dim: int | None = None
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    @property
    def tokens_per_step(self) -> int:
        """Tokens that share a position and see each other."""
        return self.num_rois

    @property
    def codebook_size(self) -> int:
        """No codes: the language model never read them."""
        return 0


__all__ = ["FmriCodecConfig", "FmriLMConfig", "FmriOriginalConfig"]
