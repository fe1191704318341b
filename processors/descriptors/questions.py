"""Questions about scans, answered from descriptors and drawn so that the answers are balanced."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partialmethod

import numpy as np

from .cohort import LEVELS, Cohort
from .networks import NETWORKS
from .phrases import PHRASES
from .text import BOUNDS, QUESTIONS, question, sentence, z_statement


KINDS = ("level", "above", "below", "which", "open", "compare")
# of so many possible questions, the sampler takes the one whose answer was given least often
CANDIDATES = 8


@dataclass(frozen=True)
class Question:
    """A question and its answer.

    kind: one of `KINDS`. choices: the allowed answers; none for an open question. margin: distance of the value from
    where the answer changes, in standard deviations of the cohort. descriptors: what it is about. scans: rows of its
    scans, in the order of their blocks in the chat.
    """

    kind: str
    text: str
    choices: tuple[str, ...]
    answer: str
    margin: float
    descriptors: tuple[str, ...]
    scans: tuple[int, ...]


class Questioner:
    """Draws questions: of several possible ones, the one whose answer was given least often.

    Answers are counted by descriptor, then by kind. Depends on the arguments, the seed and the order of the calls.

    Args:
        descriptors: [scans, descriptors] in the order of the cohort's names, NaN where absent.
        groups: one per scan; scans are compared with others of their group, for instance their atlas.
    """

    def __init__(
        self,
        descriptors: np.ndarray,
        groups: Sequence[str],
        cohort: Cohort,
        seed: int | Sequence[int],
    ):
        self.names = list(cohort.names)
        self.levels = cohort.levels(descriptors)
        self.z_scores = cohort.z_scores(descriptors)
        terciles = cohort.quantiles.T
        # [scans, descriptors, 2]
        self.to_terciles = np.abs(descriptors[..., None] - terciles) / cohort.std[:, None]
        known = np.isfinite(self.z_scores) & (self.levels >= 0)
        self.known = [np.flatnonzero(row) for row in known]
        members = defaultdict(list)
        for row, group in enumerate(groups):
            members[group].append(row)
        self.others = [members[group] for group in groups]
        # columns that differ in their network alone
        self.alike: dict[str, dict[int, str]] = defaultdict(dict)
        self.stems: dict[int, str] = {}
        for column, name in enumerate(self.names):
            stem, network = stem_and_network(name)
            if network:
                self.alike[stem][column] = network
                self.stems[column] = stem
        self.rng = np.random.default_rng(seed)
        self.counts: Counter = Counter()

    def ask(self, row: int, count: int) -> list[Question]:
        """Up to `count` different questions about the scan of that row, the kinds in turn from a random one."""
        asked: dict[str, Question] = {}
        first = self.rng.integers(len(KINDS))
        for place in range(count):
            drawn = self._draw(KINDS[(first + place) % len(KINDS)], row)
            if drawn is not None:
                asked.setdefault(drawn.text, drawn)
        return list(asked.values())

    def _draw(self, kind: str, row: int) -> Question | None:
        candidates = []
        known = self.known[row]
        for column in known[self.rng.integers(len(known), size=CANDIDATES)] if len(known) else ():
            drawn = getattr(self, f"_{kind}")(row, int(column))
            # no ties; and none about a descriptor that does not vary in the cohort, whose margin is no number
            if drawn is not None and drawn[1].margin > 0:
                candidates.append(drawn)
        if not candidates:
            return None

        def given(candidate: tuple[str, Question]) -> tuple[int, int]:
            result, drawn = candidate
            return self.counts[kind, _topic(drawn), result], self.counts[kind, result]

        # candidates come in random order, and the first of equals is taken
        result, drawn = min(candidates, key=given)
        self.counts[kind, _topic(drawn), result] += 1
        self.counts[kind, result] += 1
        return drawn

    # Each kind: a question about a column, before it what is balanced (an open answer's text hardly comes twice).

    def _level(self, row: int, column: int) -> tuple[str, Question]:
        name, level = self.names[column], LEVELS[self.levels[row, column]]
        text = question(name, int(self.rng.integers(len(QUESTIONS))))
        margin = float(self.to_terciles[row, column].min())
        return level, Question("level", text, LEVELS, level, margin, (name,), (row,))

    def _beyond(self, kind: str, row: int, column: int) -> tuple[str, Question]:
        """Whether a value lies in the upper or lower tercile."""
        name, level = self.names[column], LEVELS[self.levels[row, column]]
        side = {"below": 0, "above": 1}[kind]
        answer = "yes" if level == ("low", "high")[side] else "no"
        margin = float(self.to_terciles[row, column, side])
        text = f"Is the {PHRASES[name]} {kind} typical?"
        return answer, Question(kind, text, ("yes", "no"), answer, margin, (name,), (row,))

    _above, _below = partialmethod(_beyond, "above"), partialmethod(_beyond, "below")

    def _which(self, row: int, column: int) -> tuple[str, Question] | None:
        """Of two or three networks the one with the highest z-score: by raw values it would be the same in all."""
        stem = self.stems.get(column)
        if stem is None:
            return None
        known = set(self.known[row].tolist())
        columns = [other for other in self.alike[stem] if other != column and other in known]
        size = self.rng.integers(1, 3)
        if len(columns) < size:
            return None
        columns = self.rng.permutation([column, *self.rng.permutation(columns)[:size]]).tolist()
        networks = [self.alike[stem][other] for other in columns]
        scores = self.z_scores[row, columns]
        order = scores.argsort()
        margin, answer = float(scores[order[-1]] - scores[order[-2]]), networks[order[-1]]
        text = (
            f"Relative to the cohort, for which network is {stem} highest: "
            f"{', '.join(networks[:-1])} or {networks[-1]}?"
        )
        names = tuple(self.names[other] for other in columns)
        return answer, Question("which", text, tuple(networks), answer, margin, names, (row,))

    def _open(self, row: int, column: int) -> tuple[str, Question]:
        statement = z_statement(self.names[column], self.z_scores[row, column])
        margin = float(np.abs(self.z_scores[row, column] - np.array(BOUNDS)).min())
        text = f"How does the {PHRASES[statement.descriptor]} compare with the cohort?"
        answer = sentence(statement, self.rng)
        return statement.level, Question("open", text, (), answer, margin, (statement.descriptor,), (row,))

    def _compare(self, row: int, column: int) -> tuple[str, Question] | None:
        others = self.others[row]
        other = others[self.rng.integers(len(others))]
        if other == row:
            return None
        scans = (row, other) if self.rng.random() < 0.5 else (other, row)
        name, difference = self.names[column], self.z_scores[scans[0], column] - self.z_scores[scans[1], column]
        answer = "first" if difference > 0 else "second"
        text = f"In which of the two scans is the {PHRASES[name]} higher, the first or the second?"
        return answer, Question("compare", text, ("first", "second"), answer, float(abs(difference)), (name,), scans)


def _topic(drawn: Question) -> str:
    """What answers are balanced within; of several networks it is none, which would become a rarer answer."""
    return drawn.descriptors[0] if len(drawn.descriptors) == 1 else stem_and_network(drawn.descriptors[0])[0]


def stem_and_network(name: str) -> tuple[str, str]:
    """What a descriptor of one network is called without it, and the network; the latter is empty for others."""
    for network in NETWORKS.values():
        for ending, left in ((f" of the {network} network", ""), (f" the {network} network", " the network")):
            if PHRASES[name].endswith(ending):
                return PHRASES[name].removesuffix(ending) + left, network
    return PHRASES[name], ""
