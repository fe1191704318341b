"""
What comes next: the model is shown all but the end of a scan, and its forecast is compared with that end.

    python examples/forecast.py runs/demo/model scan.npy --tr 0.72 --atlas aal2-94 --steps 2

The units are z-scores of the shown part alone, so that nothing of the future enters.
"""

import argparse

import numpy as np

import fmrilm


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="Folder or Hub id.")
parser.add_argument("scan", help="An array [time, rois] in a .npy file.")
parser.add_argument("--tr", type=float, required=True, help="Seconds between two frames.")
parser.add_argument("--atlas", help="Where the model knows several.")
parser.add_argument("--steps", type=int, default=1, help="Of 32 seconds each.")
parser.add_argument("--draws", type=int, default=8, help="Forecasts to draw: their spread says how sure the model is.")
options = parser.parse_args()

reader = fmrilm.load(options.model)
extractor = reader.processor.feature_extractor
scan = np.load(options.scan)
seconds = options.steps * extractor.patch_length * extractor.repetition_time
shown = len(scan) - int(np.ceil(seconds / options.tr))
if shown < 1:
    raise SystemExit(f"expected a scan longer than {seconds:g} s, got {len(scan) * options.tr:g} s")

given = {"signal": scan[:shown], "tr": options.tr, "atlas": options.atlas}
forecast = reader.forecast(given, options.steps)
draws = np.stack([reader.forecast(given, options.steps, temperature=1.0) for _ in range(options.draws)])

# the whole scan at the model's repetition time; correlation does not mind that its unit is another one
whole = reader.signal({**given, "signal": scan}, window="full")
truth = whole[-len(forecast) :]
persistence = np.broadcast_to(whole[-len(forecast) - 1], truth.shape)


def correlation(guess: np.ndarray) -> float:
    """Over all ROIs and frames."""
    known = ~np.isnan(truth)
    return float(np.corrcoef(guess[known], truth[known])[0, 1])


print(f"{shown * options.tr:.0f} s shown, {seconds:.0f} s forecast: [time, rois] {forecast.shape}")
print(f"correlation with what came: {correlation(forecast):+.2f} (last frame held: {correlation(persistence):+.2f})")
print(f"standard deviation between draws: {draws.std(0).mean():.2f} z-scores")
