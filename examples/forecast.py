# %% [markdown]
# # Forecast
#
# Predict the end of a scan from what comes before it, and compare with what was measured.
#
#     python examples/forecast.py --model runs/demo/model --scan scan.npy --tr 0.72 --atlas aal2-94 --seconds 64
#
# Without `--scan` it reads one of the open scans. The unit is the robust z-score of the context only, so that nothing
# of the future enters. What the notebook shows is of `fmrilm demo --quick`.

# %%
import argparse

import matplotlib.pyplot as plt
import numpy as np

import fmrilm
from fmrilm.training.data.open_data import open_scans


parser = argparse.ArgumentParser()
parser.add_argument("--model", default="runs/demo/model", help="Folder or Hub id.")
parser.add_argument("--scan", help="An array [time, rois] in a .npy file.")
parser.add_argument("--tr", type=float, default=2.0, help="Seconds between two frames.")
parser.add_argument("--atlas", help="Of the scan, if the model knows several.")
parser.add_argument("--seconds", type=float, default=32.0, help="Horizon.")
parser.add_argument("--samples", type=int, default=8, help="Sampled forecasts: their spread is the uncertainty.")
# a notebook has arguments of its own
options, _ = parser.parse_known_args()

# %% [markdown]
# The last seconds of the scan are what the model is to predict.

# %%
reader = fmrilm.load(options.model)
if options.scan:
    signal, tr, atlas = np.load(options.scan), options.tr, options.atlas
else:
    last = [scan for scan in open_scans() if scan.atlas == "aal2-94"][-1]
    signal, tr, atlas = last.signal, last.tr, last.atlas
context = len(signal) - int(np.ceil(options.seconds / tr))
if context < 1:
    raise SystemExit(f"expected a scan longer than {options.seconds:g} s, got {len(signal) * tr:g} s")
given = {"signal": signal[:context], "tr": tr, "atlas": atlas}
forecast = reader.forecast(given, options.seconds)  # [frames, rois]
samples = reader.forecast(given, options.seconds, num_samples=options.samples)  # [samples, frames, rois]
print(f"context {context * tr:.0f} s, forecast {options.seconds:g} s: [frames, rois] {forecast.shape}")

# %% [markdown]
# The whole scan at the model's repetition time has another unit, which a correlation does not see.

# %%
whole = reader.signal({**given, "signal": signal}, window="full")
truth = whole[-len(forecast) :]
persistence = np.broadcast_to(whole[-len(forecast) - 1], truth.shape)


def correlation(guess: np.ndarray) -> float:
    """Over all ROIs and frames."""
    known = ~np.isnan(truth) & ~np.isnan(guess)
    return float(np.corrcoef(guess[known], truth[known])[0, 1])


print(f"correlation with the truth: {correlation(forecast):+.2f}")
print(f"correlation of the last frame, repeated: {correlation(persistence):+.2f}")
print(f"standard deviation between samples: {np.nanmean(samples.std(0)):.2f} z-scores")

# %%
fig, axes = plt.subplots(figsize=(7, 2.5))
axes.plot(truth.mean(1), "k", label="measured")
axes.plot(forecast.mean(1), label="forecast")
axes.plot(samples.mean(2).T, "C0", alpha=0.3, linewidth=0.8)
axes.set(xlabel=f"frame of {reader.processor.feature_extractor.repetition_time:g} s", ylabel="mean over ROIs, z")
axes.legend()
plt.show()
