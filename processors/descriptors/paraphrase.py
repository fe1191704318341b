"""Whether a paraphrase of a description still makes exactly its statements."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from .networks import NETWORKS
from .phrases import MEASURE_PHRASES, ORDINALS
from .text import BUCKETS, Statement, z_text


# The only other wordings of a level or a measure than those of the templates.
LEVEL_SYNONYMS = {
    "markedly lower": ("markedly lower", "markedly reduced", "markedly decreased", "far below average"),
    "somewhat lower": ("somewhat lower", "somewhat decreased", "slightly reduced", "slightly below average"),
    "within range": ("within typical range", "in the typical range", "within the normal range", "near average"),
    "somewhat elevated": ("somewhat higher", "somewhat increased", "slightly elevated", "slightly above average"),
    "markedly elevated": ("markedly higher", "markedly increased", "far above average"),
}
MEASURE_SYNONYMS = {
    "time-course coupling": ("coupling of the time courses",),
    "signal persistence": ("persistence of the signal",),
    "signal amplitude": ("amplitude of the signal",),
    "signal variability": ("variability of the signal",),
    "global efficiency": ("efficiency",),
    "outlier rate": ("rate of outliers",),
}
NETWORK_SYNONYMS = {"default mode": ("default-mode",), "whole brain": ("whole-brain", "entire brain")}
GRAPH_MEASURES = ("efficiency", "modularity", "clustering")
RELATIONS = ("within", "between")
# Words without a statement about a scan. No negation, comparison, hedge, number word or quantifier is among them,
# and none of the words of which levels are made.
FREE_WORDS = frozenset(
    """
    a additionally also an and are as at be been being but cohort compared corresponding corresponds demonstrates
    displays exhibits falls finally for found furthermore given giving graph had has have here however in indicated
    indicates is it its level levels lies meanwhile measured measures moreover network network's networks observed of
    on reaches recorded regarding registers regions relative remains reported score scores seen shown shows sits stands
    subject that the their there these this those to value values was were what whereas which while with z
    z-score z-scores z-value brain scan scan's
    """.split()
)
_PUNCTUATION = frozenset(".,;:()='\"*-–— \n\r\t")


class Fact(NamedTuple):
    """A piece of a statement: of a kind ("measure", "target", "relation", "level" or "z"), and which."""

    kind: str
    value: str


def differences(statements: Sequence[Statement], text: str) -> list[str]:
    """Differences between a text and these statements (of buckets, with z-scores), each once, in any order.

    Sound rather than lenient: the facts of a statement (measure, networks, level, z-score with its sign) have to
    be together, in one sentence and with no fact of another one between them, and every other word has to be one
    of `FREE_WORDS`. What cannot be recognised counts as a difference.
    """
    missing = list(statements)
    problems = []
    for sentence in _SENTENCE_END.split(text):
        facts, unknown = _read(sentence)
        problems += [f"not a word of the statements: {token!r}" for token in unknown]
        start = 0
        while start < len(facts):
            # no statement's facts are part of another's, so at most one fits
            fitting = [item for item in missing if _stands_at(facts, start, item)]
            if fitting:
                missing.remove(fitting[0])
                start += len(facts_of(fitting[0]))
            else:
                problems.append(f"not as stated: {facts[start].value!r}")
                start += 1
    return problems + [f"lost: {item.descriptor}" for item in missing]


def facts_of(statement: Statement) -> list[Fact]:
    if statement.z is None:
        raise ValueError(f"expected a statement with a z-score, got {statement}")
    measure, _, target = statement.descriptor.partition("/")
    parts = target.split("-")
    facts = [Fact("measure", measure), Fact("level", statement.level), Fact("z", z_text(statement.z))]
    if measure in ("connectivity", "fnc"):
        facts.append(Fact("relation", "within" if parts[0] == parts[1] else "between"))
    if measure not in GRAPH_MEASURES:
        facts += [Fact("target", part) for part in dict.fromkeys(parts)]
    return facts


def _stands_at(facts: Sequence[Fact], start: int, statement: Statement) -> bool:
    own = facts_of(statement)
    return Counter(facts[start : start + len(own)]) == Counter(own)


def _read(sentence: str) -> tuple[list[Fact], list[str]]:
    """The facts of a sentence in their order, and what else stands in it that may not."""
    facts, unknown = [], []
    for match in _TOKEN.finditer(sentence.lower()):
        token = match[0]
        if match.lastgroup == "fact":
            facts.append(_LEXICON[token])
        elif match.lastgroup == "number":
            facts.append(Fact("z", token.replace("−", "-")))
        elif token not in (FREE_WORDS if match.lastgroup == "word" else _PUNCTUATION):
            unknown.append(token)
    return facts, unknown


def _lexicon() -> dict[str, Fact]:
    lexicon = {word: Fact("relation", word) for word in RELATIONS}
    for measure, text in MEASURE_PHRASES.items():
        head = re.split(" of the | on the | between the ", text)[0]
        lexicon |= {word: Fact("measure", measure) for word in (head, *MEASURE_SYNONYMS.get(head, ()))}
    targets = {text: key for key, text in NETWORKS.items()} | {"whole brain": "global"}
    targets |= {f"{text} gradient": key for key, text in ORDINALS.items()}
    for text, key in targets.items():
        lexicon |= {word: Fact("target", key) for word in (text, *NETWORK_SYNONYMS.get(text, ()))}
    for level, wordings in BUCKETS.items():
        lexicon |= {word: Fact("level", level) for word in (*wordings, *LEVEL_SYNONYMS[level])}
    return lexicon


_LEXICON = _lexicon()
_SENTENCE_END = re.compile(r"(?<=[.;!?])\s+|\n+")
# the longest fact that begins at a letter; a number only with nothing before it that could belong to it
_TOKEN = re.compile(
    rf"(?P<fact>(?<!\w)(?:{'|'.join(sorted(map(re.escape, _LEXICON), key=len, reverse=True))})(?!\w))"
    r"|(?P<number>(?<![\w.+−-])[+−-]?\d+\.\d+(?![\w.]*\d))"
    r"|(?P<word>[^\W\d_]+(?:['’-][^\W\d_]+)*)|(?P<other>.)",
    re.DOTALL,
)
