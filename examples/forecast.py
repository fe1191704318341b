"""
Forecast the end of a scan from what comes before it, and compare.

    python examples/forecast.py runs/demo/model scan.npy --tr 0.72 --atlas aal2-94 --seconds 64

The unit is the robust z-score of the context only, so that nothing of the future enters.
"""

import argparse

import numpy as np

import fmrilm


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="Folder or Hub id.")
parser.add_argument("scan", help="An array [time, rois] in a .npy file.")
parser.add_argument("--tr", type=float, required=True, help="Seconds between two frames.")
parser.add_argument("--atlas", help="Of the scan, if the model knows several.")
parser.add_argument("--seconds", type=float, default=32.0, help="Horizon.")
parser.add_argument("--samples", type=int, default=8, help="Sampled forecasts: their spread is the uncertainty.")
options = parser.parse_args()

reader = fmrilm.load(options.model)
scan = np.load(options.scan)
context = len(scan) - int(np.ceil(options.seconds / options.tr))
if context < 1:
    raise SystemExit(f"expected a scan longer than {options.seconds:g} s, got {len(scan) * options.tr:g} s")

given = {"signal": scan[:context], "tr": options.tr, "atlas": options.atlas}
forecast = reader.forecast(given, options.seconds)  # [frames, rois]
samples = reader.forecast(given, options.seconds, num_samples=options.samples)  # [samples, frames, rois]

# the whole scan at the model's repetition time; its unit differs, which a correlation does not see
whole = reader.signal({**given, "signal": scan}, window="full")
truth = whole[-len(forecast) :]
persistence = np.broadcast_to(whole[-len(forecast) - 1], truth.shape)


def correlation(guess: np.ndarray) -> float:
    """Over all ROIs and frames."""
    known = ~np.isnan(truth) & ~np.isnan(guess)
    return float(np.corrcoef(guess[known], truth[known])[0, 1])


print(f"context {context * options.tr:.0f} s, forecast {options.seconds:g} s: [frames, rois] {forecast.shape}")
print(f"correlation with the truth: {correlation(forecast):+.2f}")
print(f"correlation of the last frame, repeated: {correlation(persistence):+.2f}")
print(f"standard deviation between samples: {np.nanmean(samples.std(0)):.2f} z-scores")
