"""
A plugin of Brainmarks (https://github.com/MedARC-AI/Brainmarks): models of this package among those it evaluates.

Brainmarks finds it as `brainmarks.models.fmrilm`, its namespace for plugins, and gives scans parcellated by
Schaefer-400 with parcels in the order of the 17 networks, where this package's atlas has the order of the 7. The codec
takes any ROIs whose coordinates it is told, so the model asks for the table of that order, which CBIG publishes as
`Schaefer2018_400Parcels_17Networks_order_FSLMNI152_2mm.Centroid_RAS.csv`:

    python -m brainmarks.main_logistic fmrilm_schaefer400 patch aabc_sex --overrides \
        model_kwargs.model=FOLDER model_kwargs.centroids=FILE.csv
"""

import csv
import math
from pathlib import Path

import numpy as np
import torch
from brainmarks.models.base import Embeddings, ModelTransform, ModelWrapper
from brainmarks.models.registry import register_model

from fmrilm import Atlas, FmriLMFeatureExtractor, FmriLMForConditionalGeneration, FmriLMProcessor
from fmrilm.training.evaluation.ask import scan_states


PARCELS = 400


class FmriLMTransform(ModelTransform):
    """A sample of Brainmarks to the inputs of the codec: one window, padded, of every scan."""

    def __init__(self, extractor: FmriLMFeatureExtractor, atlas: Atlas) -> None:
        self.extractor = extractor
        self.atlas = atlas

    def __call__(self, sample: dict) -> dict:
        """sample: "bold" [time, rois], normalised, and "tr" in seconds; its other fields, such as "target", stay."""
        signal = sample["bold"].numpy().astype(np.float32)
        if signal.shape[1] != len(self.atlas):
            raise ValueError(f"expected {len(self.atlas)} parcels, got {signal.shape[1]}")
        signal[:, signal.std(0) == 0] = np.nan
        # a clip of less than a patch goes on as its mirror image: there is nothing shorter that the codec reads
        tr, last = float(sample["tr"]), (self.extractor.patch_length - 1) * self.extractor.repetition_time
        missing = max(0, math.ceil(last / tr) + 1 - len(signal))
        signal = np.pad(signal, ((0, missing), (0, 0)), mode="symmetric")
        prepared, _ = self.extractor.prepare_signal(signal, tr=tr, atlas=self.atlas)
        window = prepared[: self.extractor.window_length].T
        values = np.zeros((len(self.atlas), self.extractor.window_length), np.float32)
        mask = np.zeros(values.shape, bool)
        values[:, : window.shape[1]] = np.nan_to_num(window)
        mask[:, : window.shape[1]] = ~np.isnan(window)
        kept = {name: value for name, value in sample.items() if name not in ("bold", "mean", "std")}
        return {**kept, "fmri_values": torch.from_numpy(values), "fmri_mask": torch.from_numpy(mask)}


class FmriLMWrapper(ModelWrapper):
    """The language model's last hidden states at the latent and summary tokens of a scan, without any text."""

    __space__ = "schaefer400"
    coordinates: torch.Tensor

    def __init__(self, model: FmriLMForConditionalGeneration, atlas: Atlas) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("coordinates", torch.tensor(atlas.coordinates))

    def forward(self, batch: dict[str, torch.Tensor]) -> Embeddings:
        values = batch["fmri_values"]
        coordinates = self.coordinates.expand(len(values), -1, -1)
        codes = self.model.model.get_fmri_codes(values, coordinates, batch["fmri_mask"])
        states, summary = scan_states(self.model, codes)
        valid = (codes[..., 0] >= 0)[..., None]
        total = (states * valid).sum(1, keepdim=True) + summary.sum(1, keepdim=True)
        pooled = total / (valid.sum(1, keepdim=True) + summary.shape[1])
        # where a scan has no tokens any more its mean stands, so that means over the tokens are those of the scan
        return Embeddings(cls_embeds=pooled, reg_embeds=summary, patch_embeds=torch.where(valid, states, pooled))


@register_model
def fmrilm_schaefer400(model: str, centroids: str, **kwargs) -> tuple[FmriLMTransform, FmriLMWrapper]:
    """
    Args:
        model: folder or Hub id of a model and its processor.
        centroids: table "ROI Label,ROI Name,R,A,S" of the 400 parcels in Brainmarks' order, MNI mm.
    """
    atlas = read_centroids(Path(centroids))
    loaded = FmriLMForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval().requires_grad_(False)
    extractor = FmriLMProcessor.from_pretrained(model).feature_extractor
    return FmriLMTransform(extractor, atlas), FmriLMWrapper(loaded, atlas)


def read_centroids(path: Path) -> Atlas:
    """An atlas of the table; ValueError where it is not that of 400 parcels by the 17 networks."""
    with open(path, newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    names = [row.get("ROI Name") or "" for row in rows]
    if len(rows) != PARCELS or not all(name.startswith("17Networks_") for name in names):
        named = names[0] if names else "nothing"
        raise ValueError(
            f"{path.name}: expected {PARCELS} parcels named 17Networks_..., got {len(rows)}, the first {named!r}"
        )
    coordinates = np.array([[float(row[axis]) for axis in "RAS"] for row in rows])
    networks = tuple(name.split("_")[2] for name in names)
    return Atlas("schaefer-400-17networks", tuple(names), networks, coordinates)
