"""
Ask about something of your own: a YAML file and a column of labels make a task.

    fmrilm prepare scans/ prepared --labels chronotype.csv
    python examples/add_task.py runs/demo/model prepared examples/chronotype.yaml --output runs/chronotype

What the model knows of it without learning stands beside the commonest answer and regression on connectivity.
"""

import argparse
from pathlib import Path

from fmrilm.training.data.tasks import load_task
from fmrilm.training.evaluation.program import Protocol, evaluate
from fmrilm.training.evaluation.report import table


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", type=Path, help="Folder of a model.")
parser.add_argument("prepared", type=Path, help="Folder that `fmrilm prepare` wrote, with the task's column.")
parser.add_argument("task", help="A YAML file, or the name of a packaged task.")
parser.add_argument("--output", type=Path, default="runs/task", help="Folder for the results.")
options = parser.parse_args()

task = load_task(options.task)
print(f"{task.name}: {task.questions[0]} {' / '.join(task.choice_words)}")
protocol = Protocol(shots=(0,), methods=("zero-shot", "connectivity", "majority"), new_people=True)
results = evaluate(options.model, options.prepared, options.task, options.output, protocol)
rows = table(results).query("reading == 'right' and variant == ''")
print(rows[["method", "shots", "metric", "value", "low", "high"]].to_string(index=False))
