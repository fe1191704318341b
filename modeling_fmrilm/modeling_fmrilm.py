"""The language model that reads fMRI: a frozen codec, a projector and any causal language model (stages 2 and 3)."""

import copy
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import ModelOutput, can_return_tuple, maybe_autocast

from .configuration_fmrilm import FmriCodecConfig, FmriLMConfig
from .modeling_fmricodec import FmriCodecModel, FmriSpatialBasis, KeptInFloat32
from .pipeline_fmrilm import CUSTOM_PIPELINES


# label of what carries no loss
IGNORED = -100
# of the latent tokens around the mean word before training, in sizes of a word
LATENT_TOKEN_SPREAD = 0.1
# frames that the autoregression of a forecast looks back, and the share of the mean variance added to every variance
VAR_FRAMES, VAR_RIDGE = 2, 0.01
# patches that the expectation of the next patch's tokens looks back
PATCHES_BACK = 10
# patches that are expected at a time: each has lag covariances of its own
PATCHES_AT_ONCE = 32
# of a ROI's variance, at least so much is its own in sampled forecasts
LEAST_OWN_VARIANCE = 0.05
# answers of all rows that are scored at a time: each has a cache of its own
MOST_SEQUENCES = 128
# what a forward pass may hold beside text, one entry a scan
SCAN_INPUTS = ("fmri_values", "roi_coordinates", "fmri_mask", "fmri_codes", "fmri_scores")
# what a saved folder can be opened with; register_for_auto_class alone writes one Auto class per class
AUTO_MAP = {
    "AutoConfig": "configuration_fmrilm.FmriLMConfig",
    "AutoModel": "modeling_fmrilm.FmriLMModel",
    "AutoModelForCausalLM": "modeling_fmrilm.FmriLMForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_fmrilm.FmriLMForConditionalGeneration",
}


@dataclass
class FmriLMOutput(ModelOutput):
    """
    loss: text_loss + fmri_loss_weight * fmri_loss, of those that have labels. text_loss: mean cross-entropy of the
    labelled text. fmri_loss: mean cross-entropy of the next codes over tokens and levels; fmri_level_losses: the same
    for each level [levels]. logits: [batch, length, vocabulary].
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    text_loss: torch.Tensor | None = None
    fmri_loss: torch.Tensor | None = None
    fmri_level_losses: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class FmriLMProjector(nn.Module):
    """
    Codebook vectors [..., codebook_dim] of latent tokens to token embeddings [..., hidden], at the size of a word's
    embedding. A learned vector marks the place of a token in its patch.
    """

    def __init__(self, config: FmriLMConfig):
        super().__init__()
        codec = config.codec_config
        self.input_proj = nn.Linear(codec.codebook_dim, config.projector_hidden_size)
        self.places = nn.Embedding(codec.tokens_per_patch, config.projector_hidden_size)
        self.output_proj = nn.Linear(config.projector_hidden_size, config.text_config.hidden_size)
        # a small eps: a codec's vectors may be small, and then the output would be, too
        self.output_norm = nn.LayerNorm(config.text_config.hidden_size, eps=1e-8)

    def forward(self, vectors: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """places: int64 [...], index of each token in its patch."""
        states = self.input_proj(vectors.to(self.input_proj.weight.dtype)) + self.places(places)
        return self.output_norm(self.output_proj(F.gelu(states)))


class FmriLMReadout(KeptInFloat32, nn.Linear):
    """A linear map that stays in float32, under autocast, too: scores in half precision are other scores."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        with maybe_autocast(features.device.type, enabled=False):
            return super().forward(features.to(self.weight.dtype))


class FmriLMScoreEmbeddings(nn.Module):
    """
    Token embeddings `bias` [tokens, hidden], each moved along `weight` [scores, hidden] by the scores that it is about
    alone: were each token moved by all scores, training would leave traces of the others in it.
    """

    def __init__(self, config: FmriLMConfig):
        super().__init__()
        self.score_tokens = config.score_tokens
        self.weight = nn.Parameter(torch.empty(len(config.score_names), config.text_config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.num_summary_tokens, config.text_config.hidden_size))

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        """Embeddings [scans, tokens, hidden] of scores [scans, scores]."""
        moves = scores.to(self.weight.dtype)[..., None] * self.weight
        places = torch.tensor(self.score_tokens, device=scores.device)
        return self.bias.expand(len(scores), -1, -1).index_add(1, places, moves)


class FmriLMSummary(nn.Module):
    """
    A scan's scores as a few token embeddings. The scores are descriptors and labels, read out of the features of the
    codes (`FmriCodecModel.scan_features`) by a linear map in closed form, in standard deviations of training subjects;
    those of answers are .3 times as large.
    """

    def __init__(self, config: FmriLMConfig):
        super().__init__()
        self.readout = FmriLMReadout(config.codec_config.num_scan_features, len(config.score_names))
        self.embeddings = FmriLMScoreEmbeddings(config)

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        """Embeddings [scans, num_summary_tokens, hidden] of scores [scans, scores]."""
        return self.embeddings(scores)


class FmriLMHead(nn.Module):
    """
    Logits [..., levels, codebook_size] of the codes of the next latent token: how frequent each code is at that place
    of a patch, how far its vector points where the dynamics expect the token's, and a linear map of the language
    model's state, which starts at zero.
    """

    def __init__(self, config: FmriLMConfig):
        super().__init__()
        codec = config.codec_config
        self.levels = codec.num_quantizers
        self.frequencies = nn.Parameter(torch.zeros(codec.tokens_per_patch, self.levels, codec.codebook_size))
        self.proj = nn.Linear(config.text_config.hidden_size, self.levels * codec.codebook_size, bias=False)

    def forward(
        self, states: torch.Tensor, places: torch.Tensor, expected: torch.Tensor, codebooks: torch.Tensor
    ) -> torch.Tensor:
        """
        states [..., hidden]; places int64 [...]: index in its patch of the token that is predicted; expected
        [..., codebook_dim]: see `FmriLMModel.expected_vectors`; codebooks [levels, codebook_size, codebook_dim].
        """
        logits = self.proj(states.to(self.proj.weight.dtype)).unflatten(-1, (self.levels, -1))
        return logits.float() + self.frequencies[places].float() + torch.einsum("...d,lcd->...lc", expected, codebooks)


class FmriLMDynamics(KeptInFloat32):
    """
    How the signal goes on, in closed form. The coefficients of the spatial basis follow a vector autoregression over
    `VAR_FRAMES` frames. Its lag covariances are those of the scan and those of training subjects, which count as
    `prior_frames` frames. The signal of a ROI is a weighted sum of its own last `patch_length` frames and of that
    forecast at its coordinates. The weights differ by lead and are the same for all ROIs, so that any parcellation can
    be forecast. Before `fit_dynamics` of stage 2, the forecast is the mean of the context, and its errors are white.
    """

    covariances: torch.Tensor
    prior_frames: torch.Tensor
    weights: torch.Tensor
    errors: torch.Tensor
    token_gains: torch.Tensor

    def __init__(self, config: FmriCodecConfig):
        super().__init__()
        leads, size = config.patch_length, config.num_basis_functions
        # mean over training scans of E[a(t) a(t - lag)'], each scan's of trace one at lag 0
        self.register_buffer("covariances", torch.zeros(leads + VAR_FRAMES, size, size))
        self.register_buffer("prior_frames", torch.ones(()))
        # of the last frames, the latest first, and of the autoregression
        self.register_buffer("weights", torch.zeros(leads, leads + 1))
        # covariance between leads of the errors, in variances of the ROI
        self.register_buffer("errors", torch.eye(leads))
        # what expected token vectors are multiplied with before they weigh codes
        self.register_buffer("token_gains", torch.zeros(config.tokens_per_patch, config.codebook_dim))
        self.init_weights()

    def init_weights(self) -> None:
        white = torch.zeros(self.covariances.shape)
        white[0] = torch.eye(white.shape[-1]) / white.shape[-1]
        init.copy_(self.covariances, white)
        init.ones_(self.prior_frames)
        init.zeros_(self.weights)
        init.copy_(self.errors, torch.eye(len(self.errors)))
        init.zeros_(self.token_gains)

    def lag_covariances(self, coefficients: torch.Tensor) -> torch.Tensor:
        """[batch, lags, K, K], of trace one at lag 0, of centred coefficients [batch, K, time], zero on padding."""
        time = coefficients.shape[-1]
        # of lags that the scan is too short for, zero
        starts = [coefficients[..., : max(time - lag, 0)].mT for lag in range(len(self.covariances))]
        found = [coefficients[..., lag:] @ start for lag, start in enumerate(starts)]
        return torch.stack(found, 1) / coefficients.pow(2).sum((1, 2)).clamp(min=1e-12)[:, None, None, None]

    @staticmethod
    def shrunk(
        own: torch.Tensor, lengths: torch.Tensor, prior: torch.Tensor, frames: torch.Tensor | float
    ) -> torch.Tensor:
        """Lag covariances [batch, lags, K, K] of `lengths` [batch] frames, with `frames` of a prior [lags, K, K]."""
        share = (lengths / (lengths + frames))[:, None, None, None]
        return share * own + (1 - share) * prior

    @staticmethod
    def between_frames(covariances: torch.Tensor, frames: int) -> torch.Tensor:
        """Covariance [batch, frames * K, frames * K] of frames, the latest first, under [batch, lags, K, K]."""
        rows = [
            [covariances[:, j - i] if j >= i else covariances[:, i - j].mT for j in range(frames)]
            for i in range(frames)
        ]
        found = torch.cat([torch.cat(row, -1) for row in rows], -2)
        ridge = VAR_RIDGE * found.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
        return found + ridge * torch.eye(found.shape[-1], device=found.device)

    def autoregression(self, covariances: torch.Tensor, recent: torch.Tensor) -> torch.Tensor:
        """
        Expected coefficients [batch, samples, K, leads] after `recent` ones [batch, samples, K, time], under lag
        covariances [batch, lags, K, K].
        """
        # [batch, VAR_FRAMES * K, samples], the latest frame first
        last = recent[..., -VAR_FRAMES:].flip(-1).transpose(2, 3).flatten(2).mT
        solved = torch.linalg.solve(self.between_frames(covariances, VAR_FRAMES), last)
        leads = len(self.weights)
        lagged = torch.stack([covariances[:, 1 + i : 1 + i + leads] for i in range(VAR_FRAMES)], 1)
        return torch.einsum("bolij,bojs->bsil", lagged, solved.unflatten(1, (VAR_FRAMES, -1)))

    def expected_coefficients(self, coefficients: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """
        Of the next patch, [batch, K, patch_length], after those [batch, K, time] that a scan was decoded to; of each
        row, the last `lengths` [batch] frames.
        """
        leads, time = len(self.weights), coefficients.shape[-1]
        known = torch.arange(time, device=lengths.device) >= time - lengths[:, None, None]
        mean = coefficients.where(known, 0).sum(-1, keepdim=True) / lengths[:, None, None]
        centred = (coefficients - mean).where(known, 0)
        own = self.lag_covariances(centred)
        covariances = self.shrunk(own, lengths, self.covariances, self.prior_frames)
        spread = self.autoregression(covariances, centred[:, None])[:, 0]
        return mean + centred[..., -leads:].flip(-1) @ self.weights[:, :leads].mT + spread * self.weights[:, leads]

    def expected_vectors(self, codec: FmriCodecModel, fmri_codes: torch.Tensor) -> torch.Tensor:
        """
        Vectors [scans, tokens, codebook_dim] that the codec would make of each patch's expected coefficients, given at
        most `PATCHES_BACK` patches of codes [scans, tokens, levels] before it; zero in the first patch.
        """
        leads, coefficients = len(self.weights), codec.decode_coefficients(fmri_codes)
        scans, patches = len(fmri_codes), coefficients.shape[-1] // leads
        found = [coefficients.new_zeros(scans, 1, codec.analysis.out_features)]
        if patches > 1:
            # [scans * (patches - 1), K, frames]
            padded = F.pad(coefficients[..., :-leads], ((PATCHES_BACK - 1) * leads, 0))
            before = padded.unfold(-1, PATCHES_BACK * leads, leads).transpose(1, 2).flatten(0, 1)
            lengths = leads * torch.arange(1, patches, device=before.device).clamp(max=PATCHES_BACK).repeat(scans)
            parts = zip(before.split(PATCHES_AT_ONCE), lengths.split(PATCHES_AT_ONCE), strict=True)
            vectors = [codec.analysis(self.expected_coefficients(*part).flatten(1)) for part in parts]
            found.append(torch.cat(vectors).unflatten(0, (scans, -1)))
        return torch.cat(found, 1).unflatten(-1, (codec.config.tokens_per_patch, -1)).flatten(1, 2)

    def frame_surprise(self, values: torch.Tensor, mask: torch.Tensor, functions: torch.Tensor) -> torch.Tensor:
        """
        [batch, time] of scans (arguments as in `forward`): by how many nats a coefficient a frame is less likely given
        the frame before it than by itself; NaN where there is no frame before it. Normal densities under the scan's
        own lag covariances, shrunk towards those of training subjects.
        """
        centred, coefficients, lengths = self.centred(values, mask, functions)[1:]
        covariances = self.shrunk(self.lag_covariances(coefficients), lengths, self.covariances, self.prior_frames)
        size = coefficients.pow(2).sum((1, 2)) / lengths
        covariances = covariances * size.clamp(min=1e-12)[:, None, None, None]
        alone, both = (torch.linalg.cholesky(self.between_frames(covariances, frames)) for frames in (1, 2))

        def density(factor: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
            """Log density [batch, time] of [batch, n, time] under a covariance's factor, without its constant."""
            distance = torch.linalg.solve_triangular(factor, frames, upper=False).pow(2).sum(1)
            return -0.5 * distance - factor.diagonal(dim1=1, dim2=2).log().sum(-1, keepdim=True)

        now, before = coefficients[..., 1:], coefficients[..., :-1]
        together = density(both, torch.cat([now, before], 1))
        surprise = (density(alone, now) + density(alone, before) - together) / coefficients.shape[1]
        known = mask.any(1)
        surprise = surprise.masked_fill(~(known[:, 1:] & known[:, :-1]), float("nan"))
        return F.pad(surprise, (1, 0), value=float("nan"))

    @staticmethod
    def centred(
        values: torch.Tensor, mask: torch.Tensor, functions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Means [batch, rois, 1] of scans, the scans without them [batch, rois, time], their coefficients
        [batch, K, time], both zero where there are no data, and their frames [batch].
        """
        counts = mask.sum(-1, keepdim=True).clamp(min=1)
        mean = values.masked_fill(~mask, 0).sum(-1, keepdim=True) / counts
        centred = (values - mean).masked_fill(~mask, 0)
        coefficients = FmriSpatialBasis.coefficients(functions, centred[:, None], mask.any(-1)[:, None])[:, 0]
        return mean, centred, coefficients, mask.any(1).sum(-1)

    def forward(
        self,
        values: torch.Tensor,
        mask: torch.Tensor,
        functions: torch.Tensor,
        frames: int,
        num_samples: int | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """
        Expected signal [batch, 1, rois, frames], or with num_samples [batch, num_samples, rois, frames] sampled ones,
        after scans that end together: values [batch, rois, time], mask bool [batch, rois, time], spatial basis
        functions [batch, rois, K]. Errors are normal, with temperature times their variance.
        """
        leads, rois = len(self.weights), mask.any(-1)[:, None]
        mean, centred, coefficients, lengths = self.centred(values, mask, functions)
        covariances = self.shrunk(self.lag_covariances(coefficients), lengths, self.covariances, self.prior_frames)
        recent = centred[:, None, :, -leads:].expand(-1, num_samples or 1, -1, -1)
        functions, found = functions[:, None], []
        # what the errors of ROIs share, and what each has of its own
        variance = (centred.pow(2).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1))[:, None]
        size = (coefficients.pow(2).sum((1, 2)) / lengths)[:, None, None, None]
        ridge = VAR_RIDGE / coefficients.shape[1] * torch.eye(coefficients.shape[1], device=values.device)
        loadings = functions @ torch.linalg.cholesky(covariances[:, 0] + ridge)[:, None] * size.sqrt()
        shared = loadings.pow(2).sum(-1, keepdim=True)
        own = (variance - shared).maximum(LEAST_OWN_VARIANCE * variance)
        scale = (temperature * variance / (shared + own).clamp(min=1e-12)).sqrt()
        over_time = torch.linalg.cholesky(self.errors).mT

        def normal(rows: int) -> torch.Tensor:
            shape = (len(values), num_samples or 1, rows, leads)
            return torch.randn(shape, generator=generator, device=values.device)

        for _ in range(math.ceil(frames / leads)):
            latest = FmriSpatialBasis.coefficients(functions[:, 0], recent, rois.expand(-1, recent.shape[1], -1))
            spread = functions @ self.autoregression(covariances, latest)
            block = recent.flip(-1) @ self.weights[:, :leads].mT + spread * self.weights[:, leads]
            if num_samples is not None:
                noise = loadings @ normal(loadings.shape[-1]) + own.sqrt() * normal(loadings.shape[-2])
                block = block + scale * noise @ over_time
            found.append(block)
            recent = block
        return mean[:, None] + torch.cat(found, -1)[..., :frames]


class FmriLMPreTrainedModel(PreTrainedModel):
    config: FmriLMConfig
    base_model_prefix = "model"
    input_modalities = ["text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _skip_keys_device_placement = ["past_key_values"]
    # codes and scores in half precision are other codes and scores
    _keep_in_fp32_modules_strict = ["codec", "readout", "dynamics"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FmriLMHead):
            init.zeros_(module.frequencies)
            init.zeros_(module.proj.weight)
        elif isinstance(module, FmriLMScoreEmbeddings):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, FmriLMDynamics):
            module.init_weights()

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> Self:
        loaded = super().from_pretrained(*args, **kwargs)
        # loading makes anew what the constructor had frozen; with output_loading_info, it gives two things
        model: Any = loaded[0] if isinstance(loaded, tuple) else loaded
        model.freeze()
        return cast(Self, loaded)

    def freeze(self) -> None:
        """The codec and the readout of the scores are fitted before; nothing of them is trained here."""
        for module in self.modules():
            if isinstance(module, FmriCodecModel):
                module.requires_grad_(False)
            elif isinstance(module, FmriLMSummary):
                module.readout.requires_grad_(False)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        self.config.auto_map = dict(AUTO_MAP)
        self.config.custom_pipelines = dict(CUSTOM_PIPELINES)
        super().save_pretrained(save_directory, **kwargs)


class FmriLMModel(FmriLMPreTrainedModel):
    """
    Text and scans to hidden states. The codec is frozen: its output is input, not something to train. The language
    model is whole and unchanged, its own head included.
    """

    def __init__(self, config: FmriLMConfig):
        super().__init__(config)
        # not "language_model": transformers renames the keys of a `language_model.model` when it loads.
        # First, because a model's dtype is that of its first parameter
        self.causal_lm = AutoModelForCausalLM.from_config(config.text_config)
        self.codec = FmriCodecModel._from_config(config.codec_config)
        self.projector = FmriLMProjector(config)
        self.summary = FmriLMSummary(config) if config.score_names else None
        # start and end embeddings: apart from the vocabulary, so that they can be trained where that is frozen
        self.start_end_embeddings = nn.Embedding(2, config.text_config.hidden_size)
        self.fmri_head = FmriLMHead(config)
        self.dynamics = FmriLMDynamics(self.codec.config)
        self.post_init()
        self.freeze()

    def get_input_embeddings(self) -> nn.Module:
        return self.causal_lm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.causal_lm.set_input_embeddings(value)

    @torch.no_grad()
    def get_fmri_codes(
        self, fmri_values: torch.Tensor, roi_coordinates: torch.Tensor | None, fmri_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Codes int64 [scans, tokens, levels], -1 on padding, of the scans (see [`FmriCodecModel.encode`])."""
        return self.codec.encode(fmri_values, roi_coordinates, fmri_mask)

    @torch.no_grad()
    def get_fmri_scores(self, fmri_codes: torch.Tensor) -> torch.Tensor:
        """Scores float32 [scans, score_names] read out of codes [scans, tokens, levels]."""
        if self.summary is None:
            raise ValueError("expected a model with score_names, got one without")
        return self.summary.readout(self.codec.scan_features(fmri_codes))

    @torch.no_grad()
    def expected_vectors(self, fmri_codes: torch.Tensor) -> torch.Tensor:
        """
        What the dynamics expect of each token of codes [scans, tokens, levels], given the patches before its own:
        float32 [scans, tokens, codebook_dim], times `token_gains`, so that its product with a codebook vector is how
        much likelier that code becomes. Zero in the first patch.
        """
        gains, tokens = self.dynamics.token_gains, fmri_codes.shape[1]
        whole = F.pad(fmri_codes, (0, 0, 0, -tokens % len(gains)), value=-1)
        # nothing is solved in half precision
        with maybe_autocast(fmri_codes.device.type, enabled=False):
            expected = self.dynamics.expected_vectors(self.codec, whole).unflatten(1, (-1, len(gains))) * gains
        return expected.flatten(1, 2)[:, :tokens]

    def get_fmri_features(self, fmri_codes: torch.Tensor) -> torch.Tensor:
        """Projected embeddings [valid tokens, hidden] of codes [scans, tokens, levels], scan after scan."""
        valid = fmri_codes[..., 0] >= 0
        per_patch = self.config.codec_config.tokens_per_patch
        places = torch.arange(fmri_codes.shape[1], device=fmri_codes.device) % per_patch
        return self.projector(self.codec.embed_codes(fmri_codes[valid]), places.expand(valid.shape)[valid])

    def embed(
        self,
        input_ids: torch.Tensor,
        fmri_values: torch.Tensor | None = None,
        roi_coordinates: torch.Tensor | None = None,
        fmri_mask: torch.Tensor | None = None,
        fmri_codes: torch.Tensor | None = None,
        fmri_scores: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings [batch, length, hidden] of text and of the scans in it; arguments as in `forward`."""
        config, embeddings = self.config, self.get_input_embeddings()(input_ids)
        for token, embedding in zip(
            (config.fmri_start_token_id, config.fmri_end_token_id), self.start_end_embeddings.weight, strict=True
        ):
            embeddings = torch.where((input_ids == token)[..., None], embedding.to(embeddings.dtype), embeddings)
        if fmri_codes is None and fmri_values is not None:
            fmri_codes = self.get_fmri_codes(fmri_values, roi_coordinates, fmri_mask)
        tokens, summaries = embeddings.new_zeros(0, 1), embeddings.new_zeros(0, 1)
        if fmri_codes is not None:
            tokens = self.get_fmri_features(fmri_codes)
            if self.summary is not None:
                scores = self.get_fmri_scores(fmri_codes) if fmri_scores is None else fmri_scores
                summaries = self.summary(scores).flatten(0, 1)
        for name, token, found in (
            ("fMRI placeholder tokens", config.fmri_token_id, tokens),
            ("summary tokens", config.fmri_summary_token_id, summaries),
        ):
            places = input_ids == token
            if len(found) != places.sum():
                raise ValueError(f"expected {len(found)} {name} for the scans, got {int(places.sum())}")
            if len(found):
                embeddings = embeddings.masked_scatter(places[..., None], found.to(embeddings.dtype))
        return embeddings

    def inputs_embeds(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        past_key_values: Cache | None,
        *scans: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        The embeddings given, or those of input_ids and scans, in the order of `embed`. ValueError if they take more
        positions than the language model has.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds, got both or neither")
        if inputs_embeds is None:
            inputs_embeds = self.embed(cast(torch.Tensor, input_ids), *scans)
        elif any(value is not None for value in scans):
            raise ValueError("expected inputs_embeds with the scans in them, got inputs_embeds and scans")
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        length = inputs_embeds.shape[1] + (0 if past_key_values is None else int(past_key_values.get_seq_length()))
        if limit is not None and length > limit:
            raise ValueError(
                f"expected at most {limit} positions, the language model's context, got {length}: cut the scan into "
                "windows (the processor's window='sliding') or ask less at a time"
            )
        return inputs_embeds

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        fmri_values: torch.Tensor | None = None,
        roi_coordinates: torch.Tensor | None = None,
        fmri_mask: torch.Tensor | None = None,
        fmri_codes: torch.Tensor | None = None,
        fmri_scores: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: [batch, length] with one placeholder for each latent token and summary token.
            fmri_values, roi_coordinates, fmri_mask: the scans in order of appearance, [scans, rois, time],
                [scans, rois, 3], [scans, rois, time]; or in their place fmri_codes [scans, tokens, levels].
            fmri_scores: [scans, score_names]; read out of the codes unless given.
            inputs_embeds: [batch, length, hidden] in place of input_ids, scans and all.
            logits_to_keep: the positions whose last states are returned: so many last ones (all, if 0), int64
                [positions], or bool [batch, length], whose states make one row [1, positions, hidden].
        """
        scans = fmri_values, roi_coordinates, fmri_mask, fmri_codes, fmri_scores
        inputs_embeds = self.inputs_embeds(input_ids, inputs_embeds, past_key_values, *scans)
        outputs = self.causal_lm.base_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        states, kept = outputs.last_hidden_state, kept_positions(logits_to_keep)
        single = isinstance(kept, torch.Tensor) and kept.dtype == torch.bool
        outputs.last_hidden_state = states[kept][None] if single else states[:, kept]
        return outputs


class FmriLMForConditionalGeneration(FmriLMPreTrainedModel, GenerationMixin):
    """Text about scans, by the language model's own head, and the codes of each next latent token, by `fmri_head`."""

    def __init__(self, config: FmriLMConfig):
        super().__init__(config)
        self.model = FmriLMModel(config)
        self.post_init()
        self.freeze()

    @classmethod
    def from_parts(
        cls, codec: FmriCodecModel, language_model: PreTrainedModel, config: FmriLMConfig
    ) -> "FmriLMForConditionalGeneration":
        """
        A new joint model from a trained codec and a pretrained causal language model (both are copied). ValueError for
        a language model that cannot read scans.
        """
        check_backbone(language_model)
        joint = cls(config)
        joint.model.codec.load_state_dict(codec.state_dict())
        joint.model.causal_lm.load_state_dict(language_model.state_dict())
        joint.tie_weights()
        joint.start_at_word_size()
        return joint

    @torch.no_grad()
    def start_at_word_size(self) -> None:
        """What a scan brings enters around the mean word, at the size of what the embedding module returns."""
        embedding = self.get_input_embeddings()
        # Gemma's module multiplies: its weights alone are not what the layers see
        words = embedding(torch.arange(embedding.get_parameter("weight").shape[0], device=self.device)).float()
        size = words.pow(2).mean().sqrt()
        # latent tokens begin as the mean word, and move apart by learning
        self.model.projector.output_norm.weight.fill_(LATENT_TOKEN_SPREAD * size)
        self.model.projector.output_norm.bias.copy_(words.mean(0))
        self.model.start_end_embeddings.weight.copy_(words.mean(0))

    def get_output_embeddings(self) -> nn.Module:
        return self.model.causal_lm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.causal_lm.set_output_embeddings(new_embeddings)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        fmri_values: torch.Tensor | None = None,
        roi_coordinates: torch.Tensor | None = None,
        fmri_mask: torch.Tensor | None = None,
        fmri_codes: torch.Tensor | None = None,
        fmri_scores: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_fmri_items_in_batch: torch.Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> FmriLMOutput:
        """
        labels: [batch, length], -100 where text carries no loss; shift_labels: the same, one token ahead already. The
        loss of text is that of the positions in logits_to_keep. The next codes are predicted whenever labels are given
        with a scan in input_ids. num_items_in_batch, num_fmri_items_in_batch: labels of text and predicted tokens in
        the whole of an accumulated batch, of which this is a part; without the second, the first one's share goes for
        both. The other arguments are those of [`FmriLMModel.forward`].
        """
        if labels is not None and fmri_codes is None and fmri_values is not None:
            fmri_codes = self.model.get_fmri_codes(fmri_values, roi_coordinates, fmri_mask)
        predicts = labels is not None and fmri_codes is not None and input_ids is not None
        scans = fmri_values, roi_coordinates, fmri_mask, fmri_codes, fmri_scores
        inputs_embeds = self.model.inputs_embeds(input_ids, inputs_embeds, past_key_values, *scans)
        outputs = self.model.causal_lm(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            logits_to_keep=logits_to_keep,
            output_hidden_states=predicts or output_hidden_states,
            **kwargs,
        )
        loss = text_loss = fmri_loss = level_losses = None
        if labels is not None or shift_labels is not None:
            if shift_labels is None:
                shift_labels = F.pad(cast(torch.Tensor, labels)[:, 1:], (0, 1), value=IGNORED)
            shift_labels = shift_labels[:, kept_positions(logits_to_keep)]
            count = (shift_labels != IGNORED).sum()
            text_loss = F.cross_entropy(
                outputs.logits.float().flatten(0, 1), shift_labels.flatten(), ignore_index=IGNORED, reduction="sum"
            ) / count.clamp(min=1)
            # a part's share of an accumulated batch: the shares sum to one
            share = fmri_share = 1.0
            if num_items_in_batch is not None and num_items_in_batch > 0:
                share = fmri_share = count / num_items_in_batch
            loss = share * text_loss
            if predicts and input_ids is not None and fmri_codes is not None:
                losses = self.next_code_losses(outputs.hidden_states[-1], input_ids, fmri_codes)
                level_losses = losses.sum(0) / max(len(losses), 1)
                fmri_loss = level_losses.mean()
                if num_fmri_items_in_batch is not None:
                    fmri_share = len(losses) / num_fmri_items_in_batch
                loss = loss + self.config.fmri_loss_weight * fmri_share * fmri_loss
        return FmriLMOutput(
            loss=loss,
            logits=outputs.logits,
            text_loss=text_loss,
            fmri_loss=fmri_loss,
            fmri_level_losses=None if level_losses is None else level_losses.detach(),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            attentions=outputs.attentions,
        )

    def next_code_losses(
        self, hidden: torch.Tensor, input_ids: torch.Tensor, fmri_codes: torch.Tensor
    ) -> torch.Tensor:
        """
        Cross-entropy [predicted tokens, num_quantizers] of each token's codes given the state at the token before
        (paper Eq. 5, token by token); the first token of a scan is not predicted, nor are codes of the whole scan.
        hidden: [batch, length, hidden]; fmri_codes: [scans, tokens, levels].
        """
        following = fmri_codes[:, 1:, : self.config.codec_config.num_quantizers]
        predicted = following[..., 0] >= 0
        # the states are those of all valid tokens, scan after scan; a scan's last token has nothing to predict
        states = hidden[input_ids == self.config.fmri_token_id]
        states = states[F.pad(predicted, (0, 1))[fmri_codes[..., 0] >= 0]]
        places = torch.arange(1, fmri_codes.shape[1], device=fmri_codes.device)
        places = (places % self.config.codec_config.tokens_per_patch).expand(predicted.shape)[predicted]
        expected = self.model.expected_vectors(fmri_codes)[:, 1:][predicted]
        logits = self.model.fmri_head(states, places, expected, self.model.codec.codebooks())
        return F.cross_entropy(logits.mT, following[predicted], reduction="none")

    def answer_probabilities(self, scores: torch.Tensor, question: str, choices: Sequence[str]) -> torch.Tensor:
        """
        Probabilities [..., choices] of answers, of their log-likelihoods [..., choices] (`score_choices`): calibrated
        where the configuration's `calibrations` know the question and these choices, in any order.
        """
        known = self.config.calibration(question, choices)
        if known is not None:
            biases = scores.new_tensor([known["biases"][choice] for choice in choices])
            scores = known["slope"] * scores.log_softmax(-1) + biases
        return scores.softmax(-1)

    @torch.no_grad()
    def score_choices(self, inputs: dict[str, Any], choices: list[list[int]]) -> torch.Tensor:
        """
        Log-likelihood [batch, choices] of each allowed answer (token ids) after the prompts in `inputs`, which run
        once; `answer_probabilities` makes probabilities of them. With a `past_key_values` (used up here), prompts are
        of one length, and `attention_mask` covers the cached tokens, too.
        """
        inputs = dict(inputs)
        ids, past = inputs.pop("input_ids"), inputs.pop("past_key_values", None)
        (rows, length), device = ids.shape, ids.device
        mask = inputs.pop("attention_mask", torch.ones_like(ids)).long()
        cached, new = mask[:, : mask.shape[1] - length], mask[:, mask.shape[1] - length :]
        if past is not None and not new.all():
            # it would count in windows and in biases by distance
            raise ValueError("expected prompts of one length behind cached tokens, got padding")
        # padding on the right would stand between a prompt and the answers
        order = new.argsort(dim=-1, stable=True)
        # what all answers begin with ("The sex is") runs with the prompt
        shared = os.path.commonprefix([choice[:-1] for choice in choices])
        begun = torch.tensor(shared, device=device, dtype=ids.dtype)
        choices = [choice[len(shared) :] for choice in choices]
        ids = torch.cat([ids.gather(-1, order), begun.expand(rows, -1)], -1)
        mask = F.pad(torch.cat([cached, new.gather(-1, order)], -1), (0, len(shared)), value=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        outputs = self(
            ids,
            attention_mask=mask,
            position_ids=positions[:, -ids.shape[1] :],
            past_key_values=past,
            use_cache=True,
            logits_to_keep=1 + len(shared),
            **inputs,
        )
        known = outputs.logits.float().log_softmax(-1)
        totals = known[:, -1, [choice[0] for choice in choices]]
        totals = totals + known[:, torch.arange(len(shared), device=device), begun].sum(-1, keepdim=True)
        # answers that differ in their last token alone, such as numbers, go on from the same tokens
        prefixes = list(dict.fromkeys(tuple(choice[:-1]) for choice in choices if len(choice) > 1))
        if not prefixes:
            return totals
        depth = max(map(len, prefixes))
        count = max(1, MOST_SEQUENCES // rows)
        for start in range(0, len(prefixes), count):
            part = prefixes[start : start + count]
            last = start + count >= len(prefixes)
            cache = outputs.past_key_values if last else copy.deepcopy(outputs.past_key_values)
            padded = [[*prefix, *[prefix[-1]] * (depth - len(prefix))] for prefix in part]
            repeated = torch.arange(rows, device=device).repeat_interleave(len(part))
            cache.reorder_cache(repeated)
            logits = self.model.causal_lm(
                input_ids=torch.tensor(padded, device=device).repeat(rows, 1),
                attention_mask=F.pad(mask, (0, depth), value=1)[repeated],
                position_ids=(positions[:, -1:] + torch.arange(1, depth + 1, device=device))[repeated],
                past_key_values=cache,
                use_cache=True,
            ).logits
            of_part = logits.float().log_softmax(-1).unflatten(0, (rows, -1))
            for place, choice in enumerate(choices):
                if tuple(choice[:-1]) in part:
                    steps = torch.arange(len(choice) - 1, device=device)
                    rest = torch.tensor(choice[1:], device=device)
                    totals[:, place] += of_part[:, part.index(tuple(choice[:-1])), steps, rest].sum(-1)
        return totals

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> dict:
        # the library declares its mixin's methods for whole models alone; it looks for inputs_embeds among ours
        inputs = super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        ids = inputs.get("input_ids")
        # scans stand in the prompt: where it is cached, or embedded, they are read already
        if ids is None or not (ids == self.config.fmri_token_id).any():
            inputs = {name: value for name, value in inputs.items() if name not in SCAN_INPUTS}
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: torch.Tensor | None = None, **kwargs
    ):
        """Repeats rows for beams; a row's scans are repeated as a block: A, B, A, B for two scans and two beams."""
        scans = {name: kwargs.pop(name) for name in SCAN_INPUTS if kwargs.get(name) is not None}
        if scans and expand_size > 1 and input_ids is not None:
            is_fmri = input_ids == self.config.fmri_token_id
            # a scan begins where its placeholders do: not every prompt has start tokens
            counts = (is_fmri & ~F.pad(is_fmri[:, :-1], (1, 0))).sum(-1).tolist()
            blocks = torch.arange(sum(counts), device=input_ids.device).split(counts)
            order = torch.cat([block.repeat(expand_size) for block in blocks])
            scans = {name: value[order] for name, value in scans.items()}
        input_ids, kwargs = super()._expand_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, {**kwargs, **scans}

    @torch.no_grad()
    def surprise(self, fmri_codes: torch.Tensor) -> torch.Tensor:
        """
        Next-code negative log-likelihood float32 [scans, patches, num_quantizers] of codes [scans, tokens, levels]
        given all tokens before, in nats a code, mean over the tokens of a patch; NaN on padding. The first token of a
        scan is not predicted and does not count.
        """
        per_patch = self.config.codec_config.tokens_per_patch
        valid = fmri_codes[..., 0] >= 0
        places = (torch.arange(fmri_codes.shape[1], device=fmri_codes.device) % per_patch).expand(valid.shape)
        # the states before each token, without text: of the start embedding and of the tokens but the last
        start = self.model.start_end_embeddings.weight[0]
        tokens = self.model.projector(self.model.codec.embed_codes(fmri_codes), places)
        embeddings = torch.cat([start.expand(len(valid), 1, -1), tokens.to(start.dtype)], 1)[:, :-1]
        states = self.model(
            inputs_embeds=embeddings.to(self.get_input_embeddings().get_parameter("weight").dtype),
            attention_mask=F.pad(valid[:, :-1], (1, 0), value=True).long(),
            use_cache=False,
        ).last_hidden_state
        expected, codebooks = self.model.expected_vectors(fmri_codes), self.model.codec.codebooks()
        logits = self.model.fmri_head(states, places, expected, codebooks)
        truth = fmri_codes[..., : self.config.codec_config.num_quantizers].clamp(min=0)
        losses = F.cross_entropy(logits.movedim(-1, 1), truth, reduction="none")
        losses = losses.masked_fill(~valid[..., None], float("nan"))
        losses[:, 0] = float("nan")
        return losses.unflatten(1, (-1, per_patch)).nanmean(2)

    @torch.no_grad()
    def frame_surprise(
        self, fmri_values: torch.Tensor, roi_coordinates: torch.Tensor, fmri_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        [batch, time] of scans, whose frames begin together: by how many nats a coefficient of the spatial basis each
        frame is less likely given the frame before it than by itself (see [`FmriLMDynamics`]); NaN for the first
        frame and on padding. Below zero on average where frames follow one another; above, where they do not.
        """
        mask = torch.ones_like(fmri_values, dtype=torch.bool) if fmri_mask is None else fmri_mask
        with maybe_autocast(fmri_values.device.type, enabled=False):
            functions = self.model.codec.spatial_basis(roi_coordinates)
            return self.model.dynamics.frame_surprise(fmri_values.float(), mask, functions)

    @torch.no_grad()
    def forecast(
        self,
        fmri_values: torch.Tensor,
        roi_coordinates: torch.Tensor,
        fmri_mask: torch.Tensor | None = None,
        seconds: float = 32.0,
        num_samples: int | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """
        Signal [batch, rois, frames] of the `seconds` that follow the scans' last frames, in the unit of fmri_values:
        robust z-scores of the context, so that nothing of the future enters. It is the expected signal (see
        [`FmriLMDynamics`]). With `num_samples`, [num_samples, batch, rois, frames] sampled signals. Censored frames of
        the context count as what cleaning has put in their place.
        """
        config = self.config.codec_config
        frames = math.ceil(seconds / config.repetition_time - 1e-6)
        if frames < 1:
            raise ValueError(f"expected a horizon of at least one frame, {config.repetition_time} s, got {seconds} s")
        if num_samples is not None and (num_samples < 1 or temperature <= 0):
            raise ValueError(f"expected num_samples >= 1 and temperature > 0, got {num_samples} and {temperature}")
        values, mask = ending_together(fmri_values.float(), fmri_mask)
        shortest = int(mask.any(1).sum(-1).min())
        if shortest < config.patch_length:
            raise ValueError(f"expected scans of at least one patch of {config.patch_length} frames, got {shortest}")
        with maybe_autocast(values.device.type, enabled=False):
            functions = self.model.codec.spatial_basis(roi_coordinates)
            future = self.model.dynamics(values, mask, functions, frames, num_samples, temperature, generator)
        return future[:, 0] if num_samples is None else future.transpose(0, 1)


def kept_positions(logits_to_keep: int | torch.Tensor) -> slice | torch.Tensor:
    """The positions that the argument of the library's models names: the last ones, all of them if 0, or its own."""
    return slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep


def ending_together(values: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Scans [batch, rois, time] that begin together and their masks, moved so that they end together."""
    if mask is None:
        return values, torch.ones_like(values, dtype=torch.bool)
    # up to the last frame that is known: there may be gaps before it
    ends = (mask.any(1) * torch.arange(1, mask.shape[-1] + 1, device=mask.device)).amax(-1)
    source = torch.arange(int(ends.max()), device=values.device) - (ends.max() - ends)[:, None]
    index = source.clamp(min=0)[:, None].expand(-1, values.shape[1], -1)
    return values.gather(-1, index), mask.gather(-1, index) & (source >= 0)[:, None]


@torch.no_grad()
def check_backbone(language_model: PreTrainedModel) -> None:
    """
    ValueError unless the language model can read scans: it takes `inputs_embeds` and positions and gives for those of
    words, bit for bit, what it gives for the words; it is causal, with a cache that any tokens may follow; its last
    hidden state is what its own head reads.
    """
    name = type(language_model).__name__

    def refused(expected: str) -> ValueError:
        return ValueError(f"{name} cannot be the backbone: expected {expected}")

    if language_model.get_output_embeddings() is None:
        raise ValueError(f"expected a causal language model, got {name}, without a head")
    training = language_model.training
    language_model.eval()
    embedding = language_model.get_input_embeddings()
    ids = torch.arange(3, 8, device=embedding.get_parameter("weight").device)[None]
    embeddings = embedding(ids)
    try:
        of_words = language_model(input_ids=ids).logits
        outputs = language_model(inputs_embeds=embeddings, output_hidden_states=True, use_cache=True)
        states = language_model.base_model(inputs_embeds=embeddings).last_hidden_state
        placed = language_model(inputs_embeds=embeddings, position_ids=torch.arange(5, device=ids.device)[None]).logits
        begun = language_model(input_ids=ids[:, :3], use_cache=True)
        cache = getattr(begun, "past_key_values", None)
        rest = language_model(input_ids=ids[:, 3:], past_key_values=cache).logits if cache is not None else None
    # whatever a foreign model raises here, it is no backbone
    except Exception as error:
        raise refused(f"it to take inputs_embeds, got {type(error).__name__}: {error}") from error
    finally:
        language_model.train(training)
    width = language_model.config.get_text_config().hidden_size
    if embeddings.shape[-1] != width or states.shape[-1] != width:
        found = f"{embeddings.shape[-1]} and {states.shape[-1]}"
        raise refused(f"embeddings and states of hidden_size={width}, got {found}")
    if not torch.equal(states, outputs.hidden_states[-1]):
        raise refused("output_hidden_states to end with the last hidden state")
    # kernels differ with the length
    near = 0.05 * of_words.abs().max()
    for expected, difference, limit in (
        ("the same logits from words and from their embeddings", of_words - outputs.logits, 0),
        ("positions that count from 0", of_words - placed, 0),
        ("a causal model", of_words[:, :3] - begun.logits, near),
        ("a cache that several tokens may follow", None if rest is None else of_words[:, 3:] - rest, near),
    ):
        if difference is None:
            raise refused(f"{expected}, got none")
        if difference.abs().max() > limit:
            raise refused(f"{expected}, got a difference of {difference.abs().max():.2g}")


# every save ships the code, so that a downloaded folder loads where this package is not installed
FmriLMModel.register_for_auto_class("AutoModel")
FmriLMForConditionalGeneration.register_for_auto_class("AutoModelForMultimodalLM")

__all__ = ["FmriLMForConditionalGeneration", "FmriLMModel", "FmriLMOutput", "FmriLMPreTrainedModel"]
