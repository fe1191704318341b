# %% [markdown]
# # Fine-tune on your own labels
#
# A folder of scans and a table of labels become a model that answers a question about people it has not seen.
#
#     python examples/finetune_labels.py --scans scans/ --labels labels.csv --task sex --atlas aal2-94 --tr 0.72
#
# `scans/` holds one file a subject (`s01.npy`, `s01.nii.gz`, ...) or is an fMRIPrep folder. `labels.csv` has a column
# `subject` and the task's column. A task is a packaged one with choices (`sex`, `handedness`, ...) or a YAML file of
# your own.

# %%
import argparse
from pathlib import Path

import numpy as np

import fmrilm
from fmrilm.training.data.prepare import Preparation, prepare
from fmrilm.training.data.scan_sources import find_scans
from fmrilm.training.data.splits import hold_out
from fmrilm.training.data.tasks import load_task
from fmrilm.training.evaluation.adapt import Tuning, tune
from fmrilm.training.evaluation.ask import score_scans
from fmrilm.training.evaluation.labelled_scans import load_labelled


parser = argparse.ArgumentParser()
parser.add_argument("--model", default="runs/demo/model", help="Folder or Hub id.")
parser.add_argument("--scans", type=Path, default="scans")
parser.add_argument("--labels", type=Path, default="labels.csv")
parser.add_argument("--task", default="sex", help="Its name, or the path of its YAML file.")
parser.add_argument("--atlas", help="Of the scans; for volumes also what they are averaged over.")
parser.add_argument("--tr", type=float, help="Seconds between two frames, where the files do not tell.")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--output", type=Path, default="runs/finetuned")
# a notebook has arguments of its own
options, _ = parser.parse_known_args()

# %% [markdown]
# Files to a dataset: parcellated, with labels, one row a scan. Stopped, it goes on where it was.

# %%
prepared = options.output / "prepared"
print(prepare(find_scans(options.scans, options.labels), prepared, options.atlas, Preparation(tr=options.tr)))

# %% [markdown]
# Scans that have a label, as codes; and people who are held out, all scans of a person on one side.

# %%
reader, task = fmrilm.load(options.model), load_task(options.task)
scans = load_labelled(prepared, task, reader.processor.feature_extractor, reader.model.model.codec)
split = hold_out(scans.subjects, scans.truth, share=0.3, seed=0)
print(f"{len(split.training)} scans to learn from, {len(split.test)} of other people")

# %% [markdown]
# LoRA on the language model, merged at the end; the result loads like any other model.

# %%
known = [scans.codes[row] for row in split.training], [scans.answers[row] for row in split.training]
tuned = tune(reader.model, reader.processor, task, *known, Tuning(steps=options.steps), seed=0)
tuned.save_pretrained(options.output / "model")
reader.processor.save_pretrained(options.output / "model")

# %% [markdown]
# Held-out people, beside the answer that is commonest among those it learned from. `fmrilm evaluate` does this with
# intervals, other baselines and other people's scans.

# %%
windows = [scans.codes[row][0] for row in split.test]
answers = score_scans(tuned, reader.processor, task.questions[0], task.choice_words, windows).argmax(-1)
commonest = np.bincount(scans.truth[split.training]).argmax()
print(f"right: {np.mean(answers == scans.truth[split.test]):.0%}")
print(f"right by always saying {task.choice_words[commonest]!r}: {np.mean(commonest == scans.truth[split.test]):.0%}")
