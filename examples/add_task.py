"""
A task of your own: a YAML file and a column of labels.

    fmrilm prepare scans/ prepared --labels chronotype.csv
    python examples/add_task.py runs/demo/model prepared examples/chronotype.yaml --output runs/chronotype

Prints the model's answers without tuning beside the most frequent answer and ridge regression on connectivity, in
folds over subjects that the model was not trained on.
"""

import argparse
from pathlib import Path

from fmrilm.training.data.tasks import load_task
from fmrilm.training.evaluation.program import EvaluationSettings, evaluate
from fmrilm.training.evaluation.report import table


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", type=Path, help="Folder of a model.")
parser.add_argument("prepared", type=Path, help="Folder that `fmrilm prepare` wrote, with the task's column.")
parser.add_argument("task", help="A YAML file, or the name of a packaged task.")
parser.add_argument("--output", type=Path, default=Path("runs/task"), help="Folder for the results.")
parser.add_argument("--folds", type=int, default=5)
options = parser.parse_args()

task = load_task(options.task)
print(f"{task.name}: {task.questions[0]} {' / '.join(task.choice_words)}")
settings = EvaluationSettings(conditions=("zero-shot", "majority", "fc_ridge"))
results = evaluate(
    options.model,
    options.prepared,
    options.output,
    [options.task],
    folds=options.folds,
    new_subjects=True,
    settings=settings,
)
rows = table(results).query("comparison == 'right' and variant == ''")
print(rows[["condition", "shots", "metric", "value", "low", "high"]].to_string(index=False))
