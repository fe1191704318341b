"""
What a model trained by the release recipe reads of subjects, beside baselines, in folds over the subjects.

    python benchmarks/people.py release prepared-abide         # trains a model for each fold: people_release.csv, and
                                                               # what it says of descriptors: people_descriptors.csv
    python benchmarks/people.py release prepared-abide --sites --no-descriptors
                                                               # sites that no model was trained on: people_sites.csv
    python benchmarks/people.py another-study prepared-song    # what these models learn of a study that they have not
                                                               # seen, without an update: people_another_study.csv
    python benchmarks/people.py release prepared-abide prepared-song --tasks asd,sex,age,age_group,state
                                                               # one model for both: people_joint.csv
    python benchmarks/people.py release prepared-abide --new asd --shots 0,10,50 --no-descriptors
                                                               # tuned on few subjects of each class for a task that
                                                               # the model was not trained on: people_new.csv

An argument is a folder that `fmrilm prepare` wrote. Folds are stratified by site and the first task's answers; with
`--sites`, they are of whole sites. Tables hold figures over all subjects, and no single answer. `another-study` reads
the models that `release` left in runs/people.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer
from demo import table as over_runs
from sklearn.model_selection import GroupKFold

from fmrilm.processors import FmriLMFeatureExtractor
from fmrilm.training.data.dataset import Scans, load_scans
from fmrilm.training.data.shards import write_whole
from fmrilm.training.data.splits import Split, SplitArguments
from fmrilm.training.data.tasks import load_task, with_columns
from fmrilm.training.evaluation.baselines import shuffles
from fmrilm.training.evaluation.program import EvaluationSettings, evaluate, make_splits
from fmrilm.training.evaluation.report import table
from fmrilm.training.evaluation.results import FULL, summarize
from fmrilm.training.evaluation.scans import Labelled
from fmrilm.training.evaluation.tuning import Tuning
from fmrilm.training.release import ReleaseArguments, train_release


RESULTS = Path(__file__).parent / "results"
COLUMNS = "split task condition shots variant comparison metric value low high scans parse_failures".split()
app = typer.Typer(add_completion=False)

Data = Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of `fmrilm prepare`.")]
Tasks = Annotated[str, typer.Option(help="By comma; a task's label column after =.")]
DEFAULT_TASKS = "asd,sex,age,age_group"


def read_tasks(names: str) -> list:
    """ "asd=diagnosis,sex": tasks, and the columns of their labels."""
    return with_columns([load_task(name.partition("=")[0]) for name in names.split(",")], given_columns(names))


def labelled_tasks(scans: Scans, tasks: list) -> list:
    """Those whose labels the scans have."""
    return [task for task in tasks if {task.column, *task.other_columns} & set(scans.table)]


def given_columns(names: str) -> list[str]:
    """ "asd=diagnosis,sex": those with a column."""
    return [name for name in names.split(",") if "=" in name]


def fold_splits(scans: Scans, tasks: list, folds: int, seed: int) -> list[Split]:
    return make_splits(scans, SplitArguments(), folds, True, tasks, seed)


def site_splits(scans: Scans, folds: int) -> list[Split]:
    """All subjects of a site are in one fold; folds are of about equal size."""
    return [Split(*rows) for rows in GroupKFold(folds).split(scans.table, groups=scans.table["site"].astype(str))]


def pooled(scans: Scans, labelled: Labelled, splits: list[Split], answers: dict) -> dict:
    """Results of one task over the test rows of all folds; answers: as `summarize` takes them."""
    parts = [labelled.known(split.test) for split in splits]
    rows, subjects = np.concatenate(parts), scans.table["subject"].astype(str).to_numpy()
    sites = np.full(len(scans), "")
    if "site" in scans.table:
        sites = scans.table["site"].fillna("").astype(str).to_numpy()
    groups = [f"{fold} {sites[row]}" for fold, part in enumerate(parts) for row in part]
    shuffled = shuffles(subjects[rows], groups, seed=0)
    return summarize(labelled, rows, subjects[rows], sites[rows], shuffled, answers)


def write(name: str, tables: list[pd.DataFrame], results: Path) -> None:
    rows = pd.concat(tables).loc[:, COLUMNS]
    write_whole(results / f"people_{name}.csv", rows.to_csv(index=False, float_format="%.4f"))
    main = rows[rows.metric.isin(["roc_auc", "within_site_auc", "pearson_r"]) & (rows.comparison == "right")]
    print(main.to_string(index=False, float_format="%.3f"))


@app.command()
def release(
    data: Annotated[list[Path], typer.Argument(exists=True, file_okay=False, help="Folders of `fmrilm prepare`.")],
    tasks: Tasks = DEFAULT_TASKS,
    folds: int = 5,
    seeds: Annotated[int, typer.Option(help="Fold seeds.")] = 1,
    shots: Annotated[str, typer.Option(help="Also tuned on so many subjects of each class, by comma.")] = "0",
    resamples: Annotated[int, typer.Option(help="Of the subjects that are tuned on.")] = 10,
    steps: Annotated[int, typer.Option(help="Updates of such tuning; 0: in closed form alone.")] = Tuning.steps,
    new: Annotated[str, typer.Option(help="Of the tasks, by comma, those that are not trained.")] = "",
    descriptors: Annotated[bool, typer.Option(help="Questions about descriptors, too.")] = True,
    sites: Annotated[bool, typer.Option("--sites", help="Folds of whole sites.")] = False,
    first: Annotated[int | None, typer.Option(help="Only the first folds of each seed, so many.")] = None,
    questions: Annotated[int, typer.Option(help="About descriptors, of each family, about each window.")] = 1,
    described: Annotated[int, typer.Option(help="Subjects whose scans are described in free text.")] = 24,
    work: Annotated[Path, typer.Option(help="Folder of the models; goes on where it was stopped.")] = Path(
        "runs/people"
    ),
    results: Path = RESULTS,
) -> None:
    """The release recipe on the training subjects of each fold, and its answers about the test subjects."""
    asked, tables = read_tasks(tasks), []
    columns = given_columns(tasks)
    counts = tuple(int(count) for count in shots.split(","))
    settings = EvaluationSettings(
        shots=counts,
        resamples=resamples,
        tuning=Tuning(steps=steps),
        questions_per_family=questions,
        described=described,
    )
    if any(counts):
        settings = replace(settings, conditions=(*settings.conditions, "tuned"))
    folders = [load_scans(folder, FmriLMFeatureExtractor()) for folder in data]
    for task in asked:
        if (count := sum(task in labelled_tasks(scans, asked) for scans in folders)) != 1:
            raise ValueError(f"task {task.name!r}: expected its labels in one of the folders, got them in {count}")
    learned = [task.name for task in asked if task.name not in new.split(",")]
    known = [[Labelled.read(task, scans) for task in labelled_tasks(scans, asked)] for scans in folders]
    wanted = {
        f"{folds} folds of sites" if sites else f"{folds} folds, seed {seed}": [
            site_splits(scans, folds) if sites else fold_splits(scans, [each.task for each in of_folder], folds, seed)
            for scans, of_folder in zip(folders, known, strict=True)
        ]
        for seed in range(1 if sites else seeds)
    }
    if new:
        known = [[each for each in of_folder if each.task.name not in learned] for of_folder in known]
    suffix, runs = "new" if new else "joint" if len(data) > 1 else "sites" if sites else "release", []
    for name, of_folders in wanted.items():
        by_resample: dict[str, dict] = {each.task.name: {} for of_folder in known for each in of_folder}
        splits = [splits_of_folder[:first] for splits_of_folder in of_folders]
        for fold, of_fold in enumerate(zip(*splits, strict=True)):
            # models of other data or tasks are others
            place = name if suffix in ("release", "sites") else f"{name} {suffix}"
            folder = work / place.replace(" ", "-").replace(",", "") / f"fold{fold}"
            model = train_release(
                ReleaseArguments(
                    data=[str(each) for each in data],
                    tasks=learned,
                    columns=[column for column in columns if column.partition("=")[0] in learned],
                    output_dir=str(folder),
                    splits=str(write_splits(folder / "splits.csv", folders, of_fold)),
                )
            )
            for place, (scans, split, of_folder) in enumerate(zip(folders, of_fold, known, strict=True)):
                evaluation = folder / ("evaluation" if place == 0 else f"evaluation{place}")
                about = [each.task.name for each in of_folder]
                found = evaluate(
                    model,
                    data[place],
                    evaluation,
                    about,
                    descriptors and place == 0,
                    split=SplitArguments(splits=str(write_splits(evaluation / "splits.csv", [scans], [split]))),
                    columns=[column for column in columns if column.partition("=")[0] in about],
                    settings=settings,
                )
                for kept in sorted((evaluation / "answers").glob("*.0.npz")):
                    task, condition, count, resample = kept.name.split(".")[:4]
                    key = condition, int(count) if count.isdigit() else count
                    by_resample[task].setdefault(key, {}).setdefault(int(resample), []).append(dict(np.load(kept)))
                rows = table(found)
                kept = (rows.comparison == "right") & ~rows.task.str.startswith("descri")
                tables.append(rows[kept].assign(split=f"{name}, fold {fold}"))
                if descriptors and place == 0:
                    runs.append(found)
            if runs and suffix == "release":
                told = over_runs(runs).to_csv(index=False, float_format="%.4f")
                write_whole(results / "people_descriptors.csv", told)
        of_tasks = {
            each.task.name: pooled(
                scans,
                each,
                of_folder_splits,
                {key: list(found.values()) for key, found in by_resample[each.task.name].items()},
            )
            for scans, of_folder, of_folder_splits in zip(folders, known, splits, strict=True)
            for each in of_folder
        }
        tables.append(table({"tasks": of_tasks}).assign(split=name if first is None else f"{name}: first {first}"))
        write(suffix, tables, results)


def write_splits(path: Path, folders: Sequence[Scans], splits: Sequence[Split]) -> Path:
    """A table for `--splits` of one split of each folder."""
    rows = []
    for scans, split in zip(folders, splits, strict=True):
        subjects = scans.table["subject"].astype(str).to_numpy()
        for part, members in (("train", subjects[split.training]), ("test", subjects[split.test])):
            rows += [{"subject": one, "split": part} for one in sorted(set(members))]
    write_whole(path, pd.DataFrame(rows).to_csv(index=False))
    return path


@app.command()
def another_study(
    data: Data,
    tasks: Tasks = "state",
    folds: int = 5,
    work: Annotated[Path, typer.Option(help="Of `release`: models of some folds.")] = Path(
        "runs/people/5-folds-seed-0"
    ),
    results: Path = RESULTS,
) -> None:
    """
    Models of `release` learn tasks of other subjects, and of another atlas, in closed form: scores by ridge
    regression, and a calibration, without an update of the language model. Folds are over these subjects.
    """
    asked, tables = read_tasks(tasks), []
    settings = EvaluationSettings(
        shots=(FULL,),
        conditions=("tuned", "majority", "fc_ridge", "tangent_ridge", "codes_ridge"),
        tuning=Tuning(steps=0),
    )
    for folder in sorted(work.glob("fold*")):
        found = evaluate(
            folder / "sft" / "model",
            data,
            folder / "another-study",
            [task.name for task in asked],
            folds=folds,
            new_subjects=True,
            columns=given_columns(tasks),
            settings=settings,
        )
        tables.append(table(found).assign(split=f"model of {folder.name}"))
        write("another_study", tables, results)


if __name__ == "__main__":
    app()
