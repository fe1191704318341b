"""One rule says who is held out: nobody that an evaluation asks about was trained on in any stage."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmrilm import FmriLMForConditionalGeneration, FmriLMProcessor
from fmrilm.training.codec import program as codec_program
from fmrilm.training.corpus.source import Source, held_out_subjects
from fmrilm.training.data import scan_windows
from fmrilm.training.data.held_out import held_out_people
from fmrilm.training.data.tasks import load_task
from fmrilm.training.evaluation.labelled_scans import load_labelled
from fmrilm.training.evaluation.program import Protocol, splits_of
from program_runs import run


PEOPLE = st.sets(st.text(min_size=1), max_size=30)


@given(PEOPLE, PEOPLE, st.floats(0, 0.99), st.floats(0, 0.99))
def test_a_person_is_held_out_whoever_else_is_there(some: set, more: set, share: float, other: float) -> None:
    assert held_out_people(some | more, share) & some == held_out_people(some, share)
    small, large = sorted((share, other))
    assert held_out_people(some, small) <= held_out_people(some, large)


def test_as_many_are_held_out_as_asked_for_and_always_the_same() -> None:
    people = [f"sub-{number}" for number in range(5000)]
    for share in (0.05, 0.2, 0.5):
        assert len(held_out_people(people, share)) / len(people) == pytest.approx(share, abs=0.02)
    # checkpoints know nothing of whom they were trained on: these must never change
    assert sorted(held_out_people(people[:30])) == ["sub-15", "sub-18", "sub-19", "sub-20", "sub-22", "sub-8"]


def test_test_people_of_a_dataset_are_held_out_beside_those_of_the_rule() -> None:
    people = [f"p{number}" for number in range(6)]
    source = Source("made", {"net": {"subject": people}}, {}, {"p1"})
    assert held_out_subjects(source, 0.2) == held_out_people(people, 0.2) | {"p1"} != {"p1"}


class Stop(Exception):
    pass


def trained_on(stage: str, folders: Path, output: Path, **changes) -> set[str]:
    """Whose scans a program takes to train on; it is stopped there."""
    found = set()

    def codec_trainer(args, training_args, data) -> None:
        scans = data.training
        if data.streamed is not None:
            scans = [scan for shard in data.streamed.training for scan in data.streamed.read(shard, 0)]
        found.update(str(scan.subject) for scan in scans)
        raise Stop

    def encode(codec, parts, *args) -> None:
        found.update(subject for part in parts for subject in part["subject"])
        raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(codec_program, "build_trainer", codec_trainer)
        patch.setattr(scan_windows, "encode_scans", encode)
        run(stage, folders, output, **changes)
    return found


def asked_about(folders: Path, seed: int) -> set[str]:
    """Whom an evaluation tests."""
    task = load_task("handedness")
    model = FmriLMForConditionalGeneration.from_pretrained(folders / "joint")
    processor = FmriLMProcessor.from_pretrained(folders / "joint")
    scans = load_labelled(folders / "prepared", task, processor.feature_extractor, model.model.codec)
    (split,) = splits_of(task, scans, Protocol(seed=seed))
    return set(scans.subjects[split.test].tolist())


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("codec", {}),
        ("codec", {"streaming": "true"}),
        ("alignment", {}),
        ("sft", {}),
        ("sft", {"corpus": None, "tasks": "handedness"}),
    ],
    ids=["codec", "streamed codec", "alignment", "tuning", "tuning on labels"],
)
def test_no_stage_trains_on_whom_an_evaluation_tests(
    stage: str, changes: dict, program_folders: Path, tmp_path: Path
) -> None:
    everyone = {f"p{number}" for number in range(6)}
    for seed in (0, 1):
        learned = trained_on(stage, program_folders, tmp_path, seed=seed, **changes)
        # the programs here hold out more than the evaluation tests
        assert learned == everyone - held_out_people(everyone, 0.34)
        tested = asked_about(program_folders, seed)
        assert tested == held_out_people(everyone) and not tested & learned
