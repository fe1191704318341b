"""`fmrilm describe`: a corpus that is split by subject, true to its numbers, and the same after any interruption."""

import filecmp
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import DEFAULT, Mock, patch

import numpy as np
import pytest
from datasets import Dataset, load_dataset
from typer.testing import CliRunner

from fmrilm.processors import FmriLMFeatureExtractor
from fmrilm.processors.descriptors.cohort import Cohort
from fmrilm.processors.descriptors.text import parse
from fmrilm.training.cli.main import app
from fmrilm.training.corpus import describe
from fmrilm.training.corpus.describe import CorpusSettings, describe_dataset
from fmrilm.training.corpus.source import load_source
from fmrilm.training.data import shards
from fmrilm.training.data.collator import with_token_counts
from fmrilm.training.data.splits import SplitArguments
from helpers import atlas, noise_signal, write_study


PEOPLE = 6
SETTINGS = CorpusSettings(SplitArguments(0.34), statements=3, questions=4, shard_size=2)


def command(*arguments) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scans")
    command("prepare", write_study(folder, PEOPLE, "p"), folder / "prepared", "--atlas", folder / "net.tsv")
    return folder / "prepared"


@pytest.fixture(scope="module")
def corpus(scans: Path) -> Path:
    describe_dataset(load_source(str(scans)), scans.parent / "corpus", SETTINGS)
    return scans.parent / "corpus"


def files(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def assert_equal_folders(first: Path, second: Path) -> None:
    assert files(first) == files(second)
    _, different, missing = filecmp.cmpfiles(first, second, map(str, files(first)), shallow=False)
    assert not different and not missing


def test_corpus_is_read_by_datasets_and_split_by_subject(corpus: Path) -> None:
    loaded = load_dataset(str(corpus))
    subjects = {split: set(rows["subject"]) for split, rows in loaded.items()}
    assert len(subjects["train"]) == 4 and len(subjects["test"]) == 2
    assert not subjects["train"] & subjects["test"]
    row = loaded["train"][0]
    assert row["handedness"] in ("left", "right") and np.asarray(row["signal"]).shape == (60, 24)


def test_cohort_is_that_of_the_training_subjects_alone(corpus: Path) -> None:
    cohort, training = Cohort.load(corpus / "cohort"), load_dataset(str(corpus), split="train")
    values = np.array([list(row["descriptors"].values()) for row in training], float)
    known = ~np.isnan(values).all(0)
    assert cohort.subjects == 4 and known.sum() > 30
    assert np.allclose(cohort.mean[known], np.nanmean(values[:, known], axis=0))


def test_every_stated_number_is_the_cohorts(corpus: Path) -> None:
    cohort, stated = Cohort.load(corpus / "cohort"), 0
    for row in rows_of(corpus).values():
        values = np.array(list(row["descriptors"].values()), float)
        z_scores = dict(zip(cohort.names, cohort.z_scores(values), strict=True))
        for name, _, z in parse(row["description"]):
            assert z == pytest.approx(z_scores[name], abs=0.0051)
            stated += 1
    assert stated >= PEOPLE * 3


def test_questions_are_answered_by_the_descriptors(corpus: Path) -> None:
    cohort = Cohort.load(corpus / "cohort")
    rows, kinds = rows_of(corpus), set()
    for row in rows.values():
        for question in row["questions"]:
            kinds.add(question["kind"])
            assert question["margin"] >= 0
            values = [rows[scan]["descriptors"][question["descriptors"][0]] for scan in question["scans"]]
            if question["kind"] in ("above", "below"):
                place = cohort.names.index(question["descriptors"][0])
                low, high = cohort.quantiles[:, place]
                above = values[0] > high if question["kind"] == "above" else values[0] < low
                assert (question["answer"] == "yes") == bool(above)
            if question["kind"] == "compare":
                assert question["choices"].index(question["answer"]) == int(np.argmax(values))
    assert len(kinds) >= 3


def test_rows_become_prompts(corpus: Path, processor) -> None:
    row = load_dataset(str(corpus), split="train")[0]
    codes = np.zeros((8, 3), int)
    text = processor.apply_chat_template(with_token_counts(row["messages"], [codes]))["input_ids"]
    pad = processor.tokenizer.convert_tokens_to_ids("<|fmri_pad|>")
    assert (np.asarray(text) == pad).sum() == 8


def stop_at_file(number: int, source: describe.Source, output: Path, settings: CorpusSettings = SETTINGS) -> None:
    """A run whose so-manieth file is not written: the disk is full."""
    write = Mock(wraps=shards.write_whole, side_effect=[*[DEFAULT] * (number - 1), OSError("disk full")])
    with patch.object(describe, "write_whole", write), patch.object(shards, "write_whole", write):
        with pytest.raises(OSError, match="disk full"):
            describe_dataset(source, output, settings)


def test_processes_and_interruptions_do_not_change_a_byte(scans: Path, corpus: Path, tmp_path) -> None:
    for output, options in ((tmp_path / "a" / "corpus", {"jobs": 2}), (tmp_path / "b" / "corpus", {})):
        output.parent.mkdir()
        if not options:
            for number in (2, 4, 6):
                stop_at_file(number, load_source(str(scans)), output)
                assert not output.exists()
        describe_dataset(load_source(str(scans)), output, SETTINGS, **options)
        assert_equal_folders(output, corpus)
        assert [path.name for path in output.parent.iterdir()] == ["corpus"]


def test_command_takes_a_cohort_fitted_before(scans: Path, corpus: Path, tmp_path) -> None:
    command("describe", scans, tmp_path / "again", "--cohort", corpus / "cohort", "--held-out-share", 0.5)
    assert_equal_folders(tmp_path / "again" / "cohort", corpus / "cohort")


def changed(scans: Path, subject: str, column: str, change: Callable) -> describe.Source:
    """The same scans but for one value of one subject."""
    source = load_source(str(scans))
    parts = {
        name: rows.map(lambda row: {column: change(row[column])} if row["subject"] == subject else {})
        for name, rows in source.parts.items()
    }
    return replace(source, parts=parts)


def rows_of(corpus: Path) -> dict[int, dict]:
    """By number of the scan."""
    return {row["scan"]: row for rows in load_dataset(str(corpus)).values() for row in rows}


def test_scan_that_cannot_be_described_is_left_out_with_its_reason(scans: Path, tmp_path) -> None:
    broken = changed(scans, "p1", "signal", np.ones_like)
    outcome = describe_dataset(broken, tmp_path / "corpus", SETTINGS)
    assert outcome.scans == PEOPLE - 1 and list(outcome.left_out) == [1] and "constant" in outcome.left_out[1]
    assert not any("p1" in rows["subject"] for rows in load_dataset(str(tmp_path / "corpus")).values())


def test_scan_is_described_without_its_missing_rois(scans: Path, corpus: Path, tmp_path) -> None:
    source = changed(scans, "p1", "signal", lambda signal: np.where(np.arange(24) == 3, np.nan, signal))
    assert describe_dataset(source, tmp_path / "corpus", SETTINGS).scans == PEOPLE
    before, after = (rows_of(folder)[1]["descriptors"] for folder in (corpus, tmp_path / "corpus"))
    assert {name for name in before if before[name] is None} == {name for name in after if after[name] is None}
    assert before["connectivity/Vis-Vis"] != after["connectivity/Vis-Vis"]


def test_split_file_and_left_out_value_go_before_the_rule(scans: Path, tmp_path) -> None:
    (tmp_path / "splits.csv").write_text("subject,split\np0,test\np1,train\np2,train\np3,train\n")
    for option, value, splits in (
        ("--splits", tmp_path / "splits.csv", {"train": {"p1", "p2", "p3"}, "test": {"p0"}}),
        ("--leave-out", "handedness=left", {"train": {"p0", "p2", "p4"}, "test": {"p1", "p3", "p5"}}),
    ):
        said = command("describe", scans, tmp_path / option, option, value, "--statements", 3, "--questions", 4)
        assert f"{sum(map(len, splits.values()))} scans described, 0 left out" in said
        assert {split: set(rows["subject"]) for split, rows in load_dataset(str(tmp_path / option)).items()} == splits


def test_run_does_not_go_on_with_another_split_file(scans: Path, tmp_path) -> None:
    splits = tmp_path / "splits.csv"
    splits.write_text("subject,split\np0,test\np1,train\np2,train\n")
    settings = CorpusSettings(SplitArguments(splits=str(splits)), 3, 4)
    stop_at_file(4, load_source(str(scans)), tmp_path / "corpus", settings)
    splits.write_text("subject,split\np0,train\np1,train\np2,test\n")
    with pytest.raises(ValueError, match="was begun with other settings"):
        describe_dataset(load_source(str(scans)), tmp_path / "corpus", settings)


def test_folder_of_which_no_scan_can_be_described_is_refused(corpus: Path, tmp_path) -> None:
    of = atlas("net", 24)
    rows = {"signal": [[[1.0] * 24] * 60] * 3, "tr": [2.0] * 3, "atlas": ["net"] * 3, "subject": ["a", "b", "c"]}
    source = describe.Source("made", {"net": Dataset.from_dict(rows)}, {"net": of})
    settings = CorpusSettings(SplitArguments(0))
    for kind, cohort in (("training scan", None), ("scan", Cohort.load(corpus / "cohort"))):
        message = f"no {kind} could be described; the first: 24 of the 24 ROIs of 'net' are missing"
        with pytest.raises(ValueError, match=message):
            describe_dataset(source, tmp_path / kind, settings, cohort)


def test_rewrites_that_say_something_else_leave_the_text(
    scans: Path, tmp_path, make_language_model, module_tokenizer
) -> None:
    module_tokenizer.chat_template = "{{ messages[0].content }}\n"
    for part in (make_language_model("llama", len(module_tokenizer)), module_tokenizer):
        part.save_pretrained(tmp_path / "model")
    options = ("--statements", 1, "--held-out-share", 0.34)
    command("describe", scans, tmp_path / "plain", *options)
    said = command("describe", scans, tmp_path / "corpus", *options, "--rewrite", tmp_path / "model")
    assert "100% of the rewrites were refused, their template text kept" in said
    expected = rows_of(tmp_path / "plain")
    for scan, row in rows_of(tmp_path / "corpus").items():
        assert row["rewritten"] and not any(row["rewritten"])
        assert row["description"] == expected[scan]["description"]
    assert "100% of its texts did not and were refused" in (tmp_path / "corpus" / "README.md").read_text()


def test_end_before_the_corpus_is_in_its_place_loses_nothing(scans: Path, corpus: Path, tmp_path) -> None:
    with patch.object(Path, "rename", side_effect=OSError("no space")), pytest.raises(OSError, match="no space"):
        describe_dataset(load_source(str(scans)), tmp_path / "corpus", SETTINGS)
    describe_dataset(load_source(str(scans)), tmp_path / "corpus", SETTINGS)
    assert_equal_folders(tmp_path / "corpus", corpus)


def test_files_of_which_every_scan_is_left_out_do_not_spoil_the_corpus(tmp_path) -> None:
    of = atlas("net", 24)
    signals = [noise_signal(f"p{person}", 60, of).tolist() for person in range(5)]
    signals[0] = [[1.0] * 24] * 60
    rows = {"signal": signals, "tr": [2.0] * 5, "atlas": ["net"] * 5, "subject": [f"p{person}" for person in range(5)]}
    source = describe.Source("made", {"net": Dataset.from_dict(rows)}, {"net": of})
    for test, splits in (("p0", {"train": 4}), ("p1", {"train": 3, "test": 1})):
        table, output = tmp_path / f"{test}.csv", tmp_path / test
        rows_of = [f"p{person},{'test' if f'p{person}' == test else 'train'}\n" for person in range(5)]
        table.write_text("subject,split\n" + "".join(rows_of))
        describe_dataset(source, output, CorpusSettings(SplitArguments(splits=str(table)), 3, 4, shard_size=1))
        assert {split: len(found) for split, found in load_dataset(str(output)).items()} == splits


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (0.85, "at least 2 training subjects to fit a cohort on, got 1"),
        (1.0, "share of held-out subjects"),
        (0.999, "expected subjects to learn from, got 6 subjects, none in training"),
    ],
)
def test_split_without_a_cohort_is_refused(scans: Path, share: float, message: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        describe_dataset(load_source(str(scans)), tmp_path / "corpus", CorpusSettings(SplitArguments(share)))
    assert not (tmp_path / "corpus").exists()


def test_folder_that_exists_and_cohort_of_another_atlas_are_refused(scans: Path, corpus: Path, tmp_path) -> None:
    source = load_source(str(scans))
    with pytest.raises(ValueError, match="exists"):
        describe_dataset(source, corpus, SETTINGS)
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "notes.txt").touch()
    with pytest.raises(ValueError, match="mine.partial holds something else"):
        describe_dataset(source, tmp_path / "mine", SETTINGS)
    other = replace(source, atlases={"net": atlas("net", 9)})
    with pytest.raises(ValueError, match="expected a scan of the atlas"):
        describe_dataset(other, tmp_path / "corpus", SETTINGS, Cohort.load(corpus / "cohort"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tr": None, "atlas": None}, "missing tr, atlas"),
        ({"questions": ["Why?"]}, "the columns questions are there already, and would be written"),
        ({"atlas": [None]}, "expected a value of atlas in every row, got none in 1"),
    ],
)
def test_columns_that_do_not_fit_are_named(columns: dict, message: str, tmp_path) -> None:
    row = {"signal": [[[1.0]]], "tr": [2.0], "atlas": ["net"], "subject": ["a"], **columns}
    (tmp_path / "data").mkdir()
    rows = Dataset.from_dict({name: value for name, value in row.items() if value is not None})
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    with pytest.raises(ValueError, match=message):
        load_source(str(tmp_path / "data"))


def test_folder_without_rows_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="expected a folder of Parquet files or a Hub dataset, got '.*none'"):
        load_source(str(tmp_path / "none"))


def test_folders_of_one_name_are_not_taken_for_each_other(tmp_path) -> None:
    for people in (3, 4):
        folder = tmp_path / str(people)
        folder.mkdir()
        command("prepare", write_study(folder, people, "p"), folder / "prepared", "--atlas", folder / "net.tsv")
        assert len(load_dataset(str(folder / "prepared"), "net", split="train")) == people


def louder(signal: list) -> list:
    """One frame of one ROI is another."""
    values = np.array(signal)
    values[30, 3] += 1
    return values.tolist()


@pytest.mark.parametrize(("column", "change"), [("signal", louder), ("handedness", lambda label: "both")])
def test_stopped_run_goes_on_with_the_same_scans_alone(
    scans: Path, corpus: Path, tmp_path, column: str, change: Callable
) -> None:
    source, other = load_source(str(scans)), changed(scans, f"p{PEOPLE - 1}", column, change)
    stop_at_file(4, source, tmp_path / "corpus")
    with pytest.raises(ValueError, match=f"scans {source.fingerprint} instead of {other.fingerprint}"):
        describe_dataset(other, tmp_path / "corpus", SETTINGS)
    # deleted, as the message says, it is described anew
    shutil.rmtree(tmp_path / "corpus.partial")
    describe_dataset(other, tmp_path / "corpus", SETTINGS)
    before, after = (rows_of(folder)[len(source.table) - 1] for folder in (corpus, tmp_path / "corpus"))
    written = {"signal": "descriptors"}.get(column, column)
    assert before[written] != after[written]


def test_censored_frames_count_for_descriptors_as_for_models() -> None:
    of = atlas("net", 24)
    rng = np.random.default_rng(0)
    signal = rng.standard_normal((120, 24)).astype(np.float32)
    signal[40:80] = 0.01 * rng.standard_normal((40, 24))
    scan = {"signal": signal, "tr": 2.0, "atlas": "net"}
    censored = {**scan, "censored": (np.arange(120) // 40 == 1)}
    plain, found = describe.prepare_shard([scan, censored], {"net": of})
    expected, _ = FmriLMFeatureExtractor(atlases=[of]).prepare_signal(
        {name: censored[name] for name in ("signal", "tr", "censored")}, atlas=of
    )
    assert np.array_equal(found, expected, equal_nan=True) and not np.allclose(plain, found, atol=0.1)
