"""Who was scanned, where files lay, when, and what headers say: planted in the inputs, sought in all outputs."""

import contextlib
import csv
import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from transformers import TrainingArguments

from fmrilm import FmriCodecModel, FmriLMFeatureExtractor, ScanReader
from fmrilm.processors import Atlas, FmriLMProcessor, Parcels
from fmrilm.processors.descriptors.cohort import Cohort
from fmrilm.processors.descriptors.measures import CORE_MEASURES
from fmrilm.training.alignment.chats import alignment_dataset
from fmrilm.training.alignment.joint import join, train_alignment
from fmrilm.training.codec.program import main as codec_program
from fmrilm.training.codec.trainer import window_items
from fmrilm.training.corpus.describe import CorpusSettings, describe_dataset
from fmrilm.training.corpus.source import load_source
from fmrilm.training.data.code_cache import cached_codes
from fmrilm.training.data.dataset import cut_windows, load_prepared
from fmrilm.training.data.prepare import Preparation, prepare
from fmrilm.training.data.scan_sources import find_scans
from fmrilm.training.hub.model_card import fill_card
from fmrilm.training.report.scan_report import write_scan_report
from helpers import atlas, prepared


PERSON, FOLDER, DATE, HEADER = "zqperson", "zqfolder", "1987-06-05", "zqheader"
PEOPLE, ROIS, FRAMES = 6, 24, 60
# the ids asked for: in the rows of datasets, and beside the reasons why scans were left out
WITH_IDS = (".parquet", "failures.csv")


def write_scans(folder: Path, of: Atlas) -> Path:
    """Scans whose names, places and headers tell everything, a broken one among them, and their manifest."""
    folder.mkdir(parents=True)
    with open(folder / f"{DATE}.csv", "w", newline="") as handle:
        rows = csv.writer(handle)
        rows.writerow(["path", "subject", "tr"])
        for number in range(PEOPLE):
            series = prepared(f"p{number}", frames=FRAMES, of=of).signal
            image = nib.Nifti1Image((1000 + 10 * series).T[:, None, None].astype(np.float32), np.eye(4))
            image.header.set_zooms((1, 1, 1, 2.0))
            image.header.set_xyzt_units("mm", "sec")
            image.header["descrip"], image.header["aux_file"] = f"{HEADER} {DATE}", HEADER
            image.header["db_name"], image.header["intent_name"] = HEADER, HEADER
            image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", f"{HEADER} {DATE}".encode()))
            path = folder / f"{PERSON}{number}.nii"
            nib.save(image, path)
            rows.writerow([path.name, f"{PERSON}{number}", 2.0])
        (folder / f"{PERSON}9.nii").write_bytes(path.read_bytes()[:400])
        rows.writerow([f"{PERSON}9.nii", f"{PERSON}9", 2.0])
    return folder / f"{DATE}.csv"


def run_chain(inputs: Path, outputs: Path, processor: FmriLMProcessor, language_model: Callable) -> None:
    """From files to a trained model and its card."""
    of = atlas("net", ROIS)
    manifest = write_scans(inputs / DATE, of)
    table = inputs / "net.tsv"
    lines = ["index\tname\themisphere\tnetwork\tx\ty\tz"]
    pairs = zip(of.rois, of.networks, strict=True)
    lines += [f"{label}\t{roi}\tL\t{network}\t{label}\t0\t0" for label, (roi, network) in enumerate(pairs, 1)]
    table.write_text("\n".join(lines))
    labels = inputs / f"{HEADER}.nii"
    nib.save(nib.Nifti1Image(np.arange(1, ROIS + 1, dtype=np.int16)[:, None, None], np.eye(4)), labels)
    done = prepare(find_scans(manifest), outputs / "scans", str(table), Preparation(label_image=labels))
    assert (done.prepared, done.failed) == (PEOPLE, 1)
    settings = CorpusSettings(test_share=0.34, statements=2, questions=2)
    describe_dataset(load_source(str(outputs / "scans")), outputs / "corpus", settings)

    steps = ["--max_steps", "2", "--save_steps", "1", "--logging_steps", "1", "--per_device_train_batch_size", "4"]
    layout = ["--window_length", "16", "--window_stride", "16", "--patch_length", "4", "--codebook_size", "16"]
    layout += ["--codebook_dim", "8", "--tokens_per_step", "2", "--start_steps", "2", "--held_out_share", "0.34"]
    where = ["--data", str(outputs / "scans"), "--output_dir", str(outputs / "codec")]
    codec_program([*where, *steps, *layout, "--report_to", "none", "--use_cpu"])
    codec = FmriCodecModel.from_pretrained(outputs / "codec" / "model").eval()

    parcels = Parcels(np.arange(1, ROIS + 1).reshape(ROIS, 1, 1), np.eye(4))
    known = Atlas(of.name, of.rois, of.networks, of.coordinates, parcels=parcels)
    extractor = FmriLMFeatureExtractor([known], patch_length=4, window_length=16)
    scans = load_prepared(outputs / "scans", extractor)
    windows = cut_windows(scans, 16, 16)
    descriptors = np.stack([window.descriptors for window in windows])
    cohort = Cohort.fit("tests", CORE_MEASURES, descriptors, PEOPLE, [scan.atlas for scan in scans])
    codes = cached_codes(codec, window_items(windows), outputs / "codes")

    processor = FmriLMProcessor(extractor, processor.tokenizer, tokens_per_patch=2)
    model = join(codec, language_model("llama", len(processor.tokenizer) - 3), processor)
    weights = (1.0, 0.0, 0.0)
    rows = alignment_dataset(codes, cohort.levels(descriptors), ["text"], 4, 2, weights, seed=0)
    options = {"max_steps": 2, "save_steps": 1, "logging_steps": 1, "report_to": "none", "use_cpu": True}
    args = TrainingArguments(outputs / "alignment", remove_unused_columns=False, **options)
    train_alignment(model, rows, processor, args)
    # a scan that was read leaves nothing in what is saved afterwards
    image = inputs / DATE / f"{PERSON}0.nii"
    scan = {"type": "fmri", "fmri": str(image), "atlas": of.name}
    chat = [{"role": "user", "content": [scan, {"type": "text", "text": "Is it high?"}]}]
    with torch.no_grad():
        model.eval().generate(**processor.apply_chat_template(chat, add_generation_prompt=True), max_new_tokens=2)
    asked = {"Is it high?": ("yes", "no")}
    write_scan_report(outputs / "report.html", ScanReader(model, processor), image, asked, "One scan", atlas=of.name)
    for part in (model, processor, cohort):
        (part.save if part is cohort else part.save_pretrained)(outputs / "model")
    fill_card(outputs / "model").save(outputs / "model" / "README.md")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, extractor, module_tokenizer, make_language_model) -> Path:
    folder = tmp_path_factory.mktemp("privacy")
    processor = FmriLMProcessor(extractor, module_tokenizer, tokens_per_patch=2)
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger().addHandler(handler)
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        run_chain(folder / FOLDER, folder / "out", processor, make_language_model)
    logging.getLogger().removeHandler(handler)
    (folder / "out" / "said.log").write_text(said.getvalue())
    return folder / "out"


def texts(path: Path) -> Iterator[bytes]:
    """All that a file holds, also what is packed in it."""
    yield path.read_bytes()
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        yield f"{table.to_pydict()} {table.schema.metadata}".encode()
    elif path.suffix == ".npz":
        with np.load(path) as arrays:
            yield from (arrays[name].tobytes() for name in arrays.files)
    elif path.suffix == ".safetensors":
        with safe_open(path, "pt") as tensors:
            yield str(tensors.metadata()).encode()


def test_the_chain_left_every_kind_of_output(outputs: Path) -> None:
    names = {path.relative_to(outputs).as_posix() for path in outputs.rglob("*") if path.is_file()}
    assert {"scans/README.md", "scans/failures.csv", "scans/ledger.jsonl", "corpus/README.md"} <= names
    assert {"codec/checkpoint-1/trainer_state.json", "codec/model/model.safetensors"} <= names
    assert {"alignment/checkpoint-2/model.safetensors", "model/README.md", "model/cohort.json"} <= names
    assert "report.html" in names
    assert any(name.startswith("codes/") and name.endswith(".arrow") for name in names)
    assert "loss" in (outputs / "said.log").read_text()


@pytest.mark.parametrize("marker", [PERSON, FOLDER, DATE, HEADER])
def test_nothing_about_a_person_or_a_file_is_in_any_output(marker: str, outputs: Path) -> None:
    for path in sorted(outputs.rglob("*")):
        name = path.relative_to(outputs).as_posix()
        assert marker not in name
        if not path.is_file() or marker == PERSON and name.endswith(WITH_IDS):
            continue
        for text in texts(path):
            # the folder of the outputs is the user's own choice
            assert marker.encode() not in text.replace(str(outputs).encode(), b""), name


def test_ids_stand_where_they_are_asked_for(outputs: Path) -> None:
    """The search above finds what is there."""
    for path in (*outputs.glob("scans/net/*.parquet"), *outputs.glob("corpus/*/*.parquet")):
        assert any(PERSON.encode() in text for text in texts(path))
    assert f"{PERSON}9" in (outputs / "scans" / "failures.csv").read_text()
