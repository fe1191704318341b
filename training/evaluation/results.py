"""What the methods answered, as numbers: beside the truth, another person's truth, and each other."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import metrics
from .metrics import Answers


FULL = "full"
BASELINES = ("connectivity", "majority")


@dataclass(frozen=True)
class Answered:
    """
    Answers of a method to all test rows, one entry a draw of its training subjects. shots: training subjects of each
    class, or `FULL`. variant: of the same answers, "" for those that count. failures: answers that could not be
    parsed, over all draws; None where nothing is parsed.
    """

    method: str
    shots: int | str
    variant: str
    draws: list[Answers]
    failures: int | None = None


def summarize(
    truth: np.ndarray, subjects: np.ndarray, swapped: np.ndarray, answered: Sequence[Answered]
) -> list[dict]:
    """
    Metrics with intervals of each method's answers ("right"), of its answers about another person's scan ("swapped",
    where `swapped` int [rows] is not -1), of the difference of the two on the same rows, and of the difference from
    the regression on connectivity that knows as many labels, or from the one that knows all.
    """
    has_other = swapped >= 0
    others = np.where(has_other, swapped, 0)
    found = {(item.method, item.shots, item.variant): metrics.statistics(truth, item.draws) for item in answered}
    entries = []
    for item in answered:
        right = found[item.method, item.shots, item.variant]
        # the scans change places, and their answers with them: nothing has to be asked again
        other = metrics.statistics(truth, [draw.take(others) for draw in item.draws])
        beside = found.get(("connectivity", item.shots, "")) or found.get(("connectivity", FULL, ""), {})
        readings = {"right": right}
        if has_other.any():
            readings["swapped"] = {name: metrics.among(value, has_other) for name, value in other.items()}
            readings["right minus swapped"] = {
                name: metrics.among(metrics.minus(right[name], other[name]), has_other) for name in right
            }
        if item.method not in BASELINES:
            readings["minus connectivity"] = {
                name: metrics.minus(right[name], beside[name]) for name in right if name in beside
            }
        entries.append(
            {
                "method": item.method,
                "shots": item.shots,
                "variant": item.variant,
                "draws": len(item.draws),
                "rows": len(truth),
                "swapped_rows": int(has_other.sum()),
                "parse_failures": item.failures,
                "metrics": {
                    reading: {
                        name: metrics.bootstrap(statistic, subjects).to_dict() for name, statistic in values.items()
                    }
                    for reading, values in readings.items()
                },
                "by_draw": {
                    name: [float(metrics.statistics(truth, [draw])[name](np.ones(len(truth)))) for draw in item.draws]
                    for name in right
                },
                "calibration": _calibration(truth, item.draws),
            }
        )
    return entries


def _calibration(truth: np.ndarray, draws: Sequence[Answers]) -> list[dict] | None:
    """Share of right answers among those of about the same probability, over all draws."""
    probabilities = [draw.probabilities for draw in draws if draw.probabilities is not None]
    if not probabilities:
        return None
    confidence = np.concatenate([drawn.max(-1) for drawn in probabilities])
    right = np.concatenate([drawn.argmax(-1) == truth for drawn in probabilities])
    bins = metrics.calibration_bins(confidence)
    return [
        {
            "answers": int((bins == place).sum()),
            "probability": float(confidence[bins == place].mean()),
            "right": float(right[bins == place].mean()),
        }
        for place in np.unique(bins)
    ]
