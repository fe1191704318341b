# %% [markdown]
# # Fine-tune on your own labels
#
# A folder of scans and a table of labels become a model that answers a question about new subjects.
#
#     python examples/finetune_labels.py --scans scans/ --labels labels.csv --task sex --atlas aal2-94 --tr 0.72
#
# `scans/` holds one file a subject (`s01.npy`, `s01.nii.gz`, ...) or is an fMRIPrep folder. `labels.csv` has a column
# `subject` and the task's column. A task is a packaged one (`sex`, `handedness`, ...) or a YAML file of your own. The
# commands `fmrilm prepare`, `fmrilm train sft` and `fmrilm evaluate` do the same.
#
# What the notebook shows is of 40 made-up subjects whose connectivity depends on the label
# (`fmrilm.training.data.synthetic`) and eight steps of tuning: the form of the results, not what real labels give.

# %%
import argparse
from pathlib import Path

from fmrilm.training.data.prepare import Preparation, prepare
from fmrilm.training.data.scan_sources import find_scans
from fmrilm.training.evaluation.program import EvaluationSettings, evaluate
from fmrilm.training.evaluation.report import table
from fmrilm.training.sft import program as sft


parser = argparse.ArgumentParser()
parser.add_argument("--model", default="runs/demo/model", help="Folder or Hub id.")
parser.add_argument("--scans", type=Path, default=Path("scans"))
parser.add_argument("--labels", type=Path, default=Path("labels.csv"))
parser.add_argument("--task", default="sex", help="Its name, or the path of its YAML file.")
parser.add_argument("--atlas", help="Of the scans; volumes are averaged over its parcels.")
parser.add_argument("--tr", type=float, help="Seconds between two frames, if the files do not say.")
parser.add_argument("--config", default="training/configs/demo/sft.yaml", help="Settings of the tuning.")
parser.add_argument("--output", type=Path, default=Path("runs/finetuned"))
# a notebook has arguments of its own
options, _ = parser.parse_known_args()

# %% [markdown]
# Files to a dataset: parcellated, with labels, one row a scan. An interrupted run resumes.

# %%
prepared = options.output / "prepared"
print(prepare(find_scans(options.scans, options.labels), prepared, options.atlas, Preparation(tr=options.tr)))

# %% [markdown]
# A readout of the label from the codes in closed form, then LoRA on chats about the scans. A fifth of the subjects is
# held out, by a hash of their names.

# %%
arguments = {"config": options.config, "model_name_or_path": options.model, "data": prepared, "tasks": options.task}
arguments["output_dir"] = options.output
tuned = sft.main([word for name, value in arguments.items() for word in (f"--{name}", str(value))])

# %% [markdown]
# Held-out subjects, beside the most frequent answer and ridge regression on connectivity, and with the scans of other
# subjects ("shuffled").

# %%
settings = EvaluationSettings(conditions=("zero-shot", "majority", "fc_ridge"))
results = table(evaluate(tuned, prepared, options.output / "evaluation", [options.task], settings=settings))
shown = results[results.comparison.isin(["right", "shuffled"]) & (results.variant == "")]
print(shown[["condition", "comparison", "metric", "value", "low", "high"]].to_string(index=False))
