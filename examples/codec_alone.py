"""
The codec without a language model: compress a scan, decode it, and decode it at the places of another atlas.

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
parser.add_argument("--tr", type=float, help="Seconds between two frames, where the file does not tell.")
parser.add_argument("--atlas", help="Where the model knows several.")
parser.add_argument("--other", default="schaefer-100-7networks", help="Atlas at whose ROIs to decode, too.")
options = parser.parse_args()

reader = fmrilm.load(options.model)
codec, extractor = reader.model.model.codec, reader.processor.feature_extractor
features = extractor(options.scan, tr=options.tr, atlas=options.atlas, window="full")
values, coordinates, mask = (features[name] for name in ("fmri_values", "roi_coordinates", "fmri_mask"))

with torch.no_grad():
    codes = codec.encode(values, coordinates, mask)  # [1, tokens], -1 on padding
    decoded = codec.decode(codes, coordinates)  # [1, rois, time]
    other = Atlas.load(options.other)
    elsewhere = codec.decode(codes, torch.tensor(other.coordinates)[None])

count, kept = int(mask.sum()), int((codes >= 0).sum())
bits = kept * math.log2(codec.config.codebook_size)
print(f"{count} values as {kept} codes of {bits:.0f} bits together: {32 * count / bits:.0f} times less")
print(f"R² {1 - ((decoded - values)[mask].var() / values[mask].var()):.2f}")


def connectivity(signal: torch.Tensor) -> np.ndarray:
    """Upper triangle of the correlations between ROIs."""
    matrix = np.corrcoef(signal.numpy())
    return matrix[np.triu_indices_from(matrix, 1)]


frames = int(mask.any(1).sum())
present = mask[0].any(-1)
before, after = (connectivity(signal[0, present, :frames]) for signal in (values, decoded))
print(f"functional connectivity before and after correlates at {np.corrcoef(before, after)[0, 1]:.2f}")
print(f"decoded at the {len(other)} ROIs of {other.name}: {tuple(elsewhere.shape)}")
