"""
The codec without a language model: encode a scan, decode it from more and more levels, and at another atlas' ROIs.

    python examples/codec_alone.py runs/demo/model scan.npy --tr 0.72 --atlas aal2-94 --other schaefer-100-7networks
"""

import argparse
import math

import numpy as np
import torch

import fmrilm
from fmrilm import Atlas


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="Folder or Hub id.")
parser.add_argument("scan")
parser.add_argument("--tr", type=float, help="Seconds between two frames, if the file does not say.")
parser.add_argument("--atlas", help="Of the scan, if the model knows several.")
parser.add_argument("--other", default="schaefer-100-7networks", help="Atlas at whose ROIs to decode, too.")
options = parser.parse_args()

reader = fmrilm.load(options.model)
codec, extractor = reader.model.model.codec, reader.processor.feature_extractor
features = extractor(options.scan, tr=options.tr, atlas=options.atlas, window="full")
values, coordinates, mask = (features[name] for name in ("fmri_values", "roi_coordinates", "fmri_mask"))
frames, present = int(mask.any(1).sum()), mask[0].any(-1)


def connectivity(signal: torch.Tensor) -> np.ndarray:
    """Upper triangle of the correlations between the ROIs of a signal [1, rois, time]."""
    matrix = np.corrcoef(signal[0, present, :frames].numpy())
    return matrix[np.triu_indices_from(matrix, 1)]


with torch.no_grad():
    codes = codec.encode(values, coordinates, mask)  # [1, tokens, levels]
    print(f"{int(mask.sum())} values as {codes.shape[1]} latent tokens of {codes.shape[2]} levels")
    for levels in range(1, codes.shape[2] + 1):
        decoded = codec.decode(codes[..., :levels], coordinates)[..., : values.shape[-1]]  # [1, rois, time]
        bits = codes[..., :levels].numel() * math.log2(codec.config.codebook_size)
        r_squared = 1 - (decoded - values)[mask].var() / values[mask].var()
        fc = np.corrcoef(connectivity(values), connectivity(decoded))[0, 1]
        print(f"levels 1 to {levels}: {bits:6.0f} bits, R² {r_squared:.2f}, functional connectivity r {fc:.2f}")
    other = Atlas.load(options.other)
    elsewhere = codec.decode(codes, torch.tensor(other.coordinates)[None])
    print(f"decoded at the {len(other)} ROIs of {other.name}: {tuple(elsewhere.shape)}")
    print(f"summary, the covariance in tangent space: {tuple(codec.summarize(codes).shape)}")
