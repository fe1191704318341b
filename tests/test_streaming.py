"""Scans that stay on disk: each once an epoch, in an order that a stopped run keeps, whatever a shard is like."""

import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import transformers
from transformers import TrainerCallback

from fmrilm import FmriLMFeatureExtractor
from fmrilm.processors import Atlas
from fmrilm.processors.descriptors.cohort import Cohort
from fmrilm.processors.descriptors.measures import CORE_MEASURES
from fmrilm.training.codec import program as codec_program
from fmrilm.training.codec.trainer import CodecTrainer
from fmrilm.training.data.dataset import cut_windows
from fmrilm.training.data.prepare import row_features
from fmrilm.training.data.shards import ShardStore
from fmrilm.training.data.streaming import ShardedScans, StreamedMixtures
from helpers import atlas, prepared


PEOPLE, FRAMES, LENGTH = 20, 40, 24


def write_folder(folder: Path, people: int = PEOPLE, per_shard: int = 4, of: Atlas | None = None) -> Path:
    """A prepared folder, its subjects spread over shards."""
    of = of or atlas("net", 24)
    store = ShardStore(folder, {"labels": {}}, {f"p{number}" for number in range(people)})
    (folder / "atlases").mkdir()
    (folder / "atlases" / f"{of.name}.json").write_text(json.dumps(of.to_dict()))
    empty = dict.fromkeys(("session", "task", "run"))
    for start in range(0, people, per_shard):
        rows = []
        for number in range(start, min(start + per_shard, people)):
            frames = FRAMES if number != 5 else LENGTH - 4
            row = {"signal": prepared(f"p{number}", frames=frames, of=of).signal, "tr": 2.0, "atlas": of.name}
            row |= {"censored": [False] * frames, "subject": f"p{number:02d}", "site": f"site{number % 2}", **empty}
            rows.append((f"p{number}", row))
        store.add(of.name, rows, row_features(of, {}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("streaming") / "study")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "study"))


def opened(folder: Path, **options) -> ShardedScans:
    return ShardedScans(folder, FmriLMFeatureExtractor(), held_out_share=0.2, **options)


def mixtures(scans: ShardedScans, size: int = 60, seed: int = 0) -> StreamedMixtures:
    windows = cut_windows(scans.sample(scans.training, 8, LENGTH, seed=0), LENGTH, 8)
    descriptors = np.stack([window.descriptors for window in windows])
    cohort = Cohort.fit("tests", CORE_MEASURES, descriptors, 8, [windows[0].scan.atlas])
    return StreamedMixtures(scans, cohort, LENGTH, None, size, seed)


def first_scans(dataset: StreamedMixtures, monkeypatch, indices) -> list[str]:
    """Whose scan each of the items begins with."""
    seen = []
    mix = codec_program.MixedWindows.mix

    def noted(self, scan, rng):
        seen.append(scan.subject)
        return mix(self, scan, rng)

    monkeypatch.setattr(codec_program.MixedWindows, "mix", noted)
    for index in indices:
        dataset[index]
    return seen


def test_split_is_that_of_the_folder_read_whole(folder: Path) -> None:
    whole = codec_program.prepare(codec_program.CodecArguments(str(folder), window_length=LENGTH))
    scans = opened(folder)
    for side, expected in ((scans.training, whole.training), (scans.held_out, whole.held_out)):
        found = {scan.subject: scan for shard in side for scan in scans.read(shard, 0)}
        assert found.keys() == {scan.subject for scan in expected}
        assert all(np.array_equal(found[scan.subject].signal, scan.signal) for scan in expected)


def test_every_training_scan_comes_once_an_epoch_in_orders_of_their_own(folder: Path, monkeypatch) -> None:
    scans = opened(folder)
    dataset = mixtures(scans)
    everyone = {scan.subject for shard in scans.training for scan in scans.read(shard, 0)}
    assert len(everyone) == 16 == dataset.counts.sum()
    seen = first_scans(dataset, monkeypatch, range(48))
    epochs = [seen[start : start + 16] for start in (0, 16, 32)]
    for epoch in epochs:
        # one scan is too short for a window: another of its shard stands in
        assert set(epoch) == everyone - {"p05"} and len(epoch) == 16
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    # neighbours are of one shard: of five, each is opened once
    shards = [int(name[1:]) // 4 for name in epochs[0]]
    assert sum(first != second for first, second in zip(shards, shards[1:], strict=False)) == len(set(shards)) - 1


def test_items_depend_on_seed_and_number_alone(folder: Path) -> None:
    dataset, other = mixtures(opened(folder)), mixtures(opened(folder), seed=1)
    expected = [dataset[index] for index in range(40)]
    again = mixtures(opened(folder))
    for index in (37, 3, 20, 0):
        found = again[index]
        assert all(np.array_equal(found[name], expected[index][name], equal_nan=True) for name in found)
    assert not any(np.array_equal(other[index]["signal"], expected[index]["signal"]) for index in range(5))


DAMAGES = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "one bit": lambda path: flip(path),
}


def flip(path: Path) -> None:
    """In the middle, which is among the values of the signal."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_broken_shard_is_named_or_skipped_when_asked(damage: str, copied: Path, monkeypatch, caplog) -> None:
    DAMAGES[damage](copied / "net" / "part-00001.parquet")
    with pytest.raises(ValueError, match="net/part-00001.parquet is damaged"):
        scans = opened(copied)
        for shard in scans.training:
            scans.read(shard, 0)
    # transformers' loggers do not hand on what they log
    monkeypatch.setattr(transformers.logging.get_logger("transformers"), "propagate", True)
    scans = opened(copied, skip_broken=True)
    seen = first_scans(mixtures(scans), monkeypatch, range(16))
    assert not {"p04", "p05", "p06", "p07"} & set(seen) and len(set(seen)) == 13
    said = [record.getMessage() for record in caplog.records if "part-00001" in record.getMessage()]
    assert len(said) == 1 and said[0].startswith("skipped: net/part-00001.parquet is damaged")


def test_folder_of_broken_shards_alone_is_refused(copied: Path) -> None:
    for path in (copied / "net").glob("*.parquet"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="expected (subjects|scans)"):
        codec_program.prepare(codec_program.CodecArguments(str(copied), streaming=True, skip_broken_shards=True))


def options(folder: Path, output: Path) -> list[str]:
    command = f"--data {folder} --streaming --output_dir {output} --max_steps 6 --save_steps 2 --logging_steps 1"
    command += " --per_device_train_batch_size 4 --window_length 24 --window_stride 24 --patch_length 4"
    command += " --codebook_size 16 --codebook_dim 8 --tokens_per_step 2 --start_steps 2 --report_to none"
    return f"{command} --use_cpu --dataloader_num_workers 1 --held_out_share 0.2".split()


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 4:
            raise KeyboardInterrupt


def test_scans_shorter_than_a_window_are_refused(folder: Path) -> None:
    dataset = mixtures(opened(folder))
    dataset.window_length = FRAMES + 1
    with pytest.raises(ValueError, match="expected scans of at least 41 frames to train on, got none"):
        dataset[0]


def test_stopped_run_goes_on_at_the_right_scan(folder: Path, tmp_path: Path, monkeypatch) -> None:
    codec_program.main(options(folder, tmp_path / "straight"))
    with monkeypatch.context() as patch:
        build = codec_program.build_trainer

        def stopping(*args) -> CodecTrainer:
            trainer = build(*args)
            trainer.add_callback(Stop())
            return trainer

        patch.setattr(codec_program, "build_trainer", stopping)
        with pytest.raises(KeyboardInterrupt):
            codec_program.main(options(folder, tmp_path / "stopped"))
    codec_program.main(options(folder, tmp_path / "stopped"))
    histories = [
        json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        for name in ("straight", "stopped")
    ]
    losses = [[entry["loss"] for entry in history if "loss" in entry] for history in histories]
    assert len(losses[0]) == 6 and losses[0] == losses[1]
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("straight", "stopped")]
    assert weights[0] == weights[1]


def test_memory_does_not_grow_with_the_folder(tmp_path: Path) -> None:
    of = atlas("net", 200)
    folder = write_folder(tmp_path / "study", 64, 4, of)
    # many names of few files
    for copy in range(1, 12):
        for path in sorted((folder / "net").glob("part-000[01]?.parquet")):
            path.with_name(f"{path.stem}-{copy}.parquet").hardlink_to(path)
    dataset = mixtures(opened(folder), size=10_000)
    assert len(dataset.counts) > 150
    for index in range(50):
        dataset[index]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in range(50, 250):
        dataset[index]
    # all scans that were passed would take 200 * 40 * 200 * 4 bytes = 6 MB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4_000
