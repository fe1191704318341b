"""Who was scanned, where files lay, when, and what headers hold: put into the inputs, sought in all outputs."""

import contextlib
import csv
import io
import logging
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

from fmrilm import load
from fmrilm.processors.descriptors.cohort import Cohort
from fmrilm.training.corpus.describe import CorpusSettings, describe_dataset
from fmrilm.training.corpus.source import load_source
from fmrilm.training.data.prepare import Preparation, prepare
from fmrilm.training.data.scan_sources import find_scans
from fmrilm.training.hub.model_card import fill_card
from fmrilm.training.report.scan_report import write_scan_report
from helpers import in_a_row, labels_in_a_row, noise, write_study
from program_runs import run


PERSON, FOLDER, DATE, HEADER = "zqperson", "zqfolder", "1987-06-05", "zqheader"
PEOPLE, ROIS, FRAMES = 6, 24, 60
# the ids asked for: in the rows of datasets, and beside the reasons why scans were left out
WITH_IDS = (".parquet", "failures.csv")


def write_scans(folder: Path) -> Path:
    """Scans whose names, places and headers tell everything, a broken one among them, and their manifest."""
    folder.mkdir(parents=True)
    with open(folder / f"{DATE}.csv", "w", newline="") as handle:
        rows = csv.writer(handle)
        rows.writerow(["path", "subject", "tr"])
        for number in range(PEOPLE):
            series = noise(f"p{number}", FRAMES, ROIS)
            image = in_a_row(1000 + 10 * series)
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


def run_chain(inputs: Path, outputs: Path) -> None:
    """From files to a trained model and its card."""
    manifest = write_scans(inputs / DATE)
    # for the table of its atlas
    table = write_study(inputs, subjects=0, rois=ROIS).with_name("net.tsv")
    labels = inputs / f"{HEADER}.nii"
    nib.save(labels_in_a_row(ROIS), labels)
    done = prepare(find_scans(manifest), outputs / "prepared", str(table), Preparation(label_image=labels))
    assert (done.prepared, done.failed) == (PEOPLE, 1)
    settings = CorpusSettings(statements=2, questions=2)
    describe_dataset(load_source(str(outputs / "prepared")), outputs / "corpus", settings)

    short = {"max_steps": 2, "save_steps": 1}
    run("codec", outputs, outputs / "codec", **short)
    parts = {"codec": outputs / "codec" / "model", "model_name_or_path": inputs.parent / "language_model"}
    run("alignment", outputs, outputs / "alignment", use_peft="false", **parts, **short)

    reader = load(outputs / "alignment" / "model", device="cpu")
    # a scan that was read leaves nothing in what is saved afterwards
    image = inputs / DATE / f"{PERSON}0.nii"
    reader.ask(image, "Is it high?", max_new_tokens=2, label_image=labels)
    asked = {"Is it high?": ("yes", "no")}
    write_scan_report(outputs / "report.html", reader, image, asked, label_image=labels)
    for part in (reader.model, reader.processor):
        part.save_pretrained(outputs / "model")
    Cohort.load(outputs / "alignment" / "model").save(outputs / "model")
    fill_card(outputs / "model").save(outputs / "model" / "README.md")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, module_tokenizer, make_language_model) -> Path:
    folder = tmp_path_factory.mktemp("privacy")
    for part in (make_language_model("llama", len(module_tokenizer)), module_tokenizer):
        part.save_pretrained(folder / "language_model")
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger().addHandler(handler)
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        run_chain(folder / FOLDER, folder / "out")
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
    assert {"prepared/README.md", "prepared/failures.csv", "prepared/ledger.jsonl", "corpus/README.md"} <= names
    assert {"codec/checkpoint-1/trainer_state.json", "codec/model/model.safetensors"} <= names
    assert {"alignment/checkpoint-2/model.safetensors", "model/README.md", "model/cohort.json"} <= names
    assert "report.html" in names and any(name.startswith("alignment/codes/") for name in names)
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
    for path in (*outputs.glob("prepared/net/*.parquet"), *outputs.glob("corpus/*/*.parquet")):
        assert any(PERSON.encode() in text for text in texts(path))
    assert f"{PERSON}9" in (outputs / "prepared" / "failures.csv").read_text()
