"""The files of a corpus: the scans of each, and the texts about each scan."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Json, List, Value
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fmrilm.processors.descriptors.cohort import Cohort
from fmrilm.processors.descriptors.text import REQUESTS, choose_statements, interpretation, reference, sentence

from ..alignment.chats import assistant, scan_block, text_block, user
from ..alignment.language_models import load_language_model
from ..data.splits import SplitArguments
from .rewrite import rewrite
from .source import Source


QUESTION_FEATURES = {
    "kind": Value("string"),
    "text": Value("string"),
    "choices": List(Value("string")),
    "answer": Value("string"),
    "margin": Value("float64"),
    "descriptors": List(Value("string")),
    "scans": List(Value("int64")),
}


@dataclass(frozen=True)
class CorpusSettings:
    """
    The texts about each scan.

    split: which subjects are held out. statements: per family, in a description. questions: about a scan.
    rewrite: language model (packaged name, folder or Hub id) that rewrites the descriptions. shard_size: scans a file.
    """

    split: SplitArguments = field(default_factory=SplitArguments)
    statements: int = 6
    questions: int = 6
    rewrite: str | None = None
    shard_size: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Shard:
    """Scans of one configuration and split that make one file. first: number of the configuration's first scan."""

    config: str
    split: str
    file: str
    scans: list[int]
    first: int


def plan_shards(source: Source, splits: dict[str, str], size: int) -> list[Shard]:
    """Files of the corpus, in the order of the scans. splits: train or test by subject; others are in no file."""
    shards, first = [], 0
    subjects: Any = source.table["subject"]
    split_of = subjects.map(splits)
    for config, rows in source.parts.items():
        own = split_of.iloc[first : first + len(rows)]
        for split in ("train", "test"):
            scans = own.index[own == split].tolist()
            pieces = [scans[start : start + size] for start in range(0, len(scans), size)]
            for number, piece in enumerate(pieces):
                file = f"{config}/{split}-{number:05d}-of-{len(pieces):05d}.parquet"
                shards.append(Shard(config, split, file, piece, first))
        first += len(rows)
    return shards


class CorpusWriter:
    """Tables of the corpus: the source's columns and what was computed."""

    def __init__(
        self,
        source: Source,
        cohort: Cohort,
        values: np.ndarray,
        asked: dict[int, list[dict[str, Any]]],
        settings: CorpusSettings,
    ):
        self.source = source
        self.cohort = cohort
        self.values = values
        self.asked = asked
        self.settings = settings
        self.z_scores = cohort.z_scores(values)
        self.features = Features(
            {
                "scan": Value("int64"),
                "descriptors": {name: Value("float64") for name in cohort.names},
                "description": Value("string"),
                "messages": List(Json()),
                "questions": List(QUESTION_FEATURES),
                **({"rewritten": List(Value("bool"))} if settings.rewrite else {}),
            }
        )

    def table(self, shard: Shard, scans: Sequence[int]) -> pa.Table:
        """Rows of these scans of the shard."""
        generators = {scan: np.random.default_rng((self.settings.seed, scan)) for scan in scans}
        texts, rewritten = self._paragraphs(scans, generators)
        start = reference(self.cohort.name, self.cohort.subjects)
        columns = defaultdict(list)
        for scan in scans:
            description = "\n".join([start, *texts[scan]])
            request = REQUESTS[generators[scan].integers(len(REQUESTS))]
            values = (None if np.isnan(value) else value for value in self.values[scan].tolist())
            columns["scan"].append(scan)
            columns["descriptors"].append(dict(zip(self.cohort.names, values, strict=True)))
            columns["description"].append(description)
            columns["messages"].append([user(scan_block(), text_block(request)), assistant(description)])
            columns["questions"].append(self.asked[scan])
            columns["rewritten"].append(rewritten[scan])
        new = Dataset.from_dict({name: columns[name] for name in self.features}, features=self.features)
        rows = self.source.parts[shard.config].select([scan - shard.first for scan in scans])
        table: Any = rows.with_format("arrow")[:]
        for name in self.features:
            table = table.append_column(name, new.data.column(name))
        # the schema tells `datasets` the features
        return table.cast(Features({**rows.features, **self.features}).arrow_schema)

    def _paragraphs(
        self, scans: Sequence[int], generators: dict[int, np.random.Generator]
    ) -> tuple[dict[int, list[str]], dict[int, list[bool]]]:
        """Of each scan a paragraph a family, and which of them the language model has written."""
        chosen = {
            scan: choose_statements(self.cohort.names, self.z_scores[scan], self.settings.statements, generators[scan])
            for scan in scans
        }
        texts = [
            " ".join(sentence(statement, generators[scan]) for statement in statements)
            for scan in scans
            for statements in chosen[scan]
        ]
        accepted = [False] * len(texts)
        if self.settings.rewrite:
            rewrites = rewrite(texts, *self._language_model, seed=self.settings.seed)
            texts = [item.text for item in rewrites]
            accepted = [not item.problems for item in rewrites]
        worded = iter(zip(texts, accepted, strict=True))
        paragraphs, rewritten = {}, {}
        for scan in scans:
            pairs = [(next(worded), statements) for statements in chosen[scan]]
            # an interpretation holds no fact to check, so it is not rewritten
            paragraphs[scan] = [
                " ".join([text, *filter(None, map(interpretation, statements))]) for (text, _), statements in pairs
            ]
            rewritten[scan] = [is_accepted for (_, is_accepted), _ in pairs]
        return paragraphs, rewritten

    @cached_property
    def _language_model(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_language_model(str(self.settings.rewrite))
