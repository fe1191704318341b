# %% [markdown]
# # Quickstart
#
# Ask a model about a scan, look at its codes, and at what they keep of the signal.
#
#     python examples/quickstart.py --model runs/demo/model --scan scan.nii.gz
#
# Without `--scan` it reads one of the open scans. What the notebook shows is of `fmrilm demo --quick`.

# %%
import argparse

import numpy as np

import fmrilm
from fmrilm.training.data.open_data import open_scans


parser = argparse.ArgumentParser()
parser.add_argument("--model", default="runs/demo/model", help="Folder or Hub id.")
parser.add_argument("--scan", help="A file: .nii.gz, .dtseries.nii, .npy [time, rois], .csv with ROI names.")
parser.add_argument("--tr", type=float, help="Seconds between two frames, if the file does not say.")
parser.add_argument("--atlas", help="Of the scan, if the model knows several.")
# a notebook has arguments of its own
options, _ = parser.parse_known_args()

# %% [markdown]
# A scan is a path, an array [time, rois], or a dict with its repetition time and atlas.

# %%
reader = fmrilm.load(options.model)
if options.scan:
    scan = {"signal": options.scan, "tr": options.tr, "atlas": options.atlas}
else:
    last = [scan for scan in open_scans() if scan.atlas == "aal2-94"][-1]
    scan = {"signal": last.signal, "tr": last.tr, "atlas": last.atlas}

# %% [markdown]
# The probability of each allowed answer, and a description in free text.

# %%
question = "Is the connectivity between the visual and default mode networks low, typical or high?"
found = reader.ask(scan, question, choices=["low", "typical", "high"])
print(question)
for choice, probability in found["probabilities"].items():
    print(f"  {choice:8} {probability:.2f}")
print(reader.describe(scan, max_new_tokens=60))

# %% [markdown]
# The model's input: for each patch of 32 seconds some latent tokens, each of several levels; and the signal that is
# decoded from them.

# %%
signal, decoded, codes = reader.signal(scan), reader.reconstruct(scan), reader.tokenize(scan)
patches, tokens, levels = codes.shape
print(f"{signal.shape[0]} frames of {signal.shape[1]} ROIs: {patches} patches of {tokens} tokens of {levels} levels")
print(f"R² of the decoded signal: {1 - np.nanvar(signal - decoded) / np.nanvar(signal):.2f}")
