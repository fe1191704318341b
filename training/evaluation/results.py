"""What the conditions answered, as numbers: beside the truth, another subject's truth, and each other."""

from collections.abc import Mapping, Sequence

import numpy as np

from .baselines import BASELINES
from .metrics import among, distributions, estimate, statistics
from .scans import Labelled


FULL = "full"
# of one fold: "probabilities", "uncalibrated" [rows, choices], "values", "expected", "failures" [rows]
Answers = dict[str, np.ndarray]
VARIANTS = {"": ("probabilities", "values"), "uncalibrated": ("uncalibrated",), "expected value": ("expected",)}


def summarize(
    labelled: Labelled,
    rows: np.ndarray,
    subjects: np.ndarray,
    sites: np.ndarray | None,
    shuffled: np.ndarray,
    answers: Mapping[tuple[str, int | str], Sequence[Sequence[Answers]]],
) -> dict:
    """
    "sites_of_one_class", which the within-site AUC leaves out, and why; and "conditions", an entry for each condition,
    number of shots and variant of its answers: metrics with intervals of the answers ("right"), of those about another
    subject's scan ("shuffled"), of the difference of the two on the same rows, and of the differences from each
    baseline that learned from as many shots or, where there is none, from all training subjects.

    Args:
        rows: the test scans of all folds; subjects, sites: [rows]. shuffled: int [shuffles, rows], places of other
            subjects' scans among the rows, or -1; metrics are means over them. answers: by condition and shots, for
            each resample those of each fold.
    """
    found, failures = {}, {}
    for (name, shots), resamples in answers.items():
        merged = [{key: np.concatenate([fold[key] for fold in folds]) for key in folds[0]} for folds in resamples]
        for variant, keys in VARIANTS.items():
            for key in merged[0].keys() & set(keys):
                truth = labelled.truth if key != "expected" else labelled.numbers
                found[name, shots, variant] = np.asarray(truth)[rows], [each[key] for each in merged]
        failures[name, shots, ""] = sum(int(each["failures"].sum()) for each in merged if "failures" in each)
    has_other: np.ndarray = np.all(shuffled >= 0, axis=0)
    others = np.where(has_other, shuffled, 0)
    values = {key: distributions(statistics(truth, given, sites), subjects) for key, (truth, given) in found.items()}
    entries = []
    for key, (truth, given) in found.items():
        name, shots, variant = key
        right = values[key]
        comparisons = {"right": right}
        if has_other.any():
            # the scans change places, and their answers with them: nothing has to be asked again
            other, own = (
                distributions({one: among(each, has_other) for one, each in measured.items()}, subjects)
                for measured in (
                    statistics(truth, [each[order] for each in given for order in others], sites),
                    statistics(truth, given, sites),
                )
            )
            comparisons |= {"shuffled": other, "minus shuffled": {one: own[one] - other[one] for one in own}}
        for baseline in BASELINES if name not in BASELINES and variant != "uncalibrated" else ():
            places = [(baseline, count, kind) for kind in (variant, "") for count in (shots, FULL)]
            place = next((each for each in places if each in found and found[each][0].dtype == truth.dtype), None)
            if place is not None:
                comparisons[f"minus {baseline}"] = {one: right[one] - values[place][one] for one in right}
        entries.append(
            {
                "condition": name,
                "shots": shots,
                "variant": variant,
                "resamples": len(given),
                "scans": len(truth),
                "parse_failures": failures.get(key, 0),
                "metrics": {
                    comparison: {one: _estimate(one, each) for one, each in measured.items()}
                    for comparison, measured in comparisons.items()
                },
            }
        )
    return {"sites_of_one_class": _sites_of_one_class(labelled, rows, sites), "conditions": entries}


def _estimate(name: str, values: np.ndarray) -> dict:
    found = estimate(values)
    # in resamples, which hold some subjects twice, it is larger: their percentiles lie beside the estimate
    return {**found, "interval": None} if name == "calibration_error" else found


def _sites_of_one_class(labelled: Labelled, rows: np.ndarray, sites: np.ndarray | None) -> dict[str, str]:
    found = {}
    for site in [] if sites is None or not labelled.choices else np.unique(sites):
        classes = np.unique(labelled.truth[rows][sites == site])
        if len(classes) == 1:
            word = labelled.task.choice_words[classes[0]]
            found[site] = f"only {word!r} in {int((sites == site).sum())} test scans"
    return found
