"""The Space in headless Chromium: a scan in, an answer out, and nothing left behind."""

import gzip
import json
import os
import re
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.request import Request, urlopen

import httpx
import nibabel
import numpy as np
import pytest
import yaml
from conftest import save_tiny
from gradio_client import Client, handle_file
from gradio_client.utils import strip_invalid_filename_characters
from playwright.sync_api import Browser, Page

from fmrilm import Atlas, FmriLMFeatureExtractor, load
from fmrilm.processors.descriptors.measures import CORE_NAMES
from fmrilm.processors.descriptors.text import level_answers, question
from fmrilm.training import space
from fmrilm.training.data.tasks import load_task
from fmrilm.training.evaluation.report import add_to_card
from fmrilm.training.report.scan_report import read_scan
from helpers import evaluation_results
from space_browser import CHROMIUM, PATIENCE, ROOT, ask, headless_browser, open_page, served


ROIS = 6
QUESTION = "Is the connectivity between the visual and default mode networks low, typical or high?"
MARKER = "sub-Q7marker"
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="NO CHROMIUM: install one (Debian: apt-get install chromium), the Space is not tested"
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with its processor, of one atlas with a label volume."""
    folder = tmp_path_factory.mktemp("model")
    labels = np.zeros((4, 4, 4), dtype=np.int16)
    labels.ravel()[: 2 * ROIS] = np.repeat(np.arange(1, ROIS + 1), 2)
    nibabel.save(nibabel.Nifti1Image(labels, np.diag([4.0, 4, 4, 1])), folder / "labels.nii.gz")
    networks = ["Vis", "SomMot", "Default"]
    rows = [f"{i + 1}\troi{i}\t{networks[i % 3]}" for i in range(ROIS)]
    (folder / "table.tsv").write_text("\n".join(["index\tname\tnetwork", *rows]) + "\n")
    atlas = Atlas.from_image(folder / "labels.nii.gz", folder / "table.tsv", "tiny")
    extractor = FmriLMFeatureExtractor(atlases=[atlas], patch_length=4, window_length=16)
    return save_tiny(folder / "saved", extractor)


@pytest.fixture(scope="module")
def running(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a Space and the folder it writes to; when it has stopped, nothing may be left there."""
    temporary = tmp_path_factory.mktemp("served")
    with served(model_folder, temporary) as (address, process):
        yield address, temporary
    assert process.returncode == 0
    assert uploads(temporary) == []
    assert MARKER not in (temporary / "log").read_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with headless_browser() as running:
        yield running


@pytest.fixture(scope="module")
def page(browser: Browser, running: tuple[str, Path]) -> Page:
    return open_page(browser, running[0])


def array(frames: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 10, (frames, ROIS)).cumsum(0).astype(np.float32)


def upload(page: Page, path: Path, kind: str = "file") -> None:
    if page.locator(f"#{kind} button[aria-label='Clear']").count():
        page.locator(f"#{kind} button[aria-label='Clear']").click()
    page.locator(f"#{kind} input[type=file]").set_input_files(path)
    # by its name: what was said of the file before still stands there
    name = strip_invalid_filename_characters(path.name)
    page.locator("#status p", has_text=f"{name} is here").wait_for()


def read(page: Page, path: Path, tr: float = 0) -> str:
    """Uploads and reads a file; returns what the Space says of it."""
    page.locator("#tr input").fill(str(tr))
    upload(page, path)
    page.locator("#read").click()
    status = page.locator("#status p").filter(has_not_text="is here").first
    status.wait_for()
    return status.inner_text()


def assert_shown(page: Page, probabilities: dict[str, float]) -> None:
    shown = page.locator("#probabilities").inner_text()
    for choice, probability in probabilities.items():
        assert int(re.search(rf"{choice}\s+(\d+)%", shown)[1]) == pytest.approx(100 * probability, abs=1)


def uploads(temporary: Path) -> list[Path]:
    """The files that the Space keeps."""
    # Path.rglob raises where the Space deletes a folder meanwhile, os.walk passes over it
    return [Path(folder, name) for folder, _, names in os.walk(temporary) for name in names if name != "log"]


def wait_until_gone(temporary: Path, name: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while name in (left := [file.name for file in uploads(temporary)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert name not in left


@needs_browser
def test_a_scan_is_uploaded_asked_about_and_deleted(
    page: Page, running: tuple[str, Path], model_folder: Path, tmp_path: Path
):
    path = tmp_path / "scan.npy"
    np.save(path, array())
    status = read(page, path, 2.0)
    assert status == (
        "Read: 24 frames of 6 ROIs, 2 s apart. The model sees 32 s. Plots and free answers are about these first "
        "seconds, probabilities about all windows. The upload has been deleted."
    )
    assert uploads(running[1]) == []
    ask(page, QUESTION)
    expected = load(model_folder).ask(str(path), QUESTION, ["low", "typical", "high"], tr=2.0, atlas="tiny")
    assert_shown(page, expected["probabilities"])
    assert page.locator("#chat").get_by_text(expected["answer"], exact=True).count() == 1
    scan = read_scan(load(model_folder), path, 2.0, "tiny")
    other = load(model_folder).ask(space.with_shuffled_rois(scan), QUESTION, ["low", "typical", "high"])
    share = other["probabilities"][other["answer"]]
    assert page.locator("#control").inner_text().endswith(f"random order: {other['answer']} ({share:.0%})")
    # chat on, in free text: the model knows the turn before
    ask(page, "Describe this scan.")
    history = [(QUESTION, expected["answer"])]
    expected = load(model_folder).ask(
        str(path), "Describe this scan.", history=history, tr=2.0, max_new_tokens=space.MAX_ANSWER_TOKENS
    )
    assert page.locator("#control").inner_text() == ""
    words = page.locator("#chat").inner_text()
    assert " ".join(expected["answer"].split())[:40] in " ".join(words.split())
    for title in ("Every ROI over time", "Latent tokens over time"):
        assert page.locator("#plots h3", has_text=title).count() == 1
    assert page.locator("#plots img").first.evaluate("image => image.naturalWidth") > 0


@needs_browser
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_keyboard_alone_is_enough_at_any_width_and_nothing_is_cut_off(
    browser: Browser, running: tuple[str, Path], width: int, scheme: str
) -> None:
    page = open_page(browser, running[0], viewport={"width": width, "height": 800}, color_scheme=scheme)
    example = page.get_by_role("button", name="Synthetic: coupled networks")
    example.focus()
    page.keyboard.press("Enter")
    page.locator("#status p", has_text="Read:").wait_for()
    # on through the page, until the question has the focus
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('#question') !== null"):
            break
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    page.locator("#control p").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", color)[:3])) < 128) == (scheme == "dark")
    page.close()


@needs_browser
def test_a_bad_file_says_what_is_wrong_and_is_kept_no_longer(
    page: Page, running: tuple[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "few.npy"
    np.save(path, array()[:, :4])
    assert "4 ROIs instead of 6" in read(page, path, 2.0)
    # the scan before is gone, so that no answer is about another one
    field = page.locator("#question textarea")
    field.fill(QUESTION)
    field.press("Enter")
    page.locator("#problem p", has_text="Read a scan first").wait_for()
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(gzip.compress(b"no image") + b"rest")
    assert "broken.nii.gz" in read(page, broken)
    assert [file.name for file in uploads(running[1])] == ["broken.nii.gz"]
    page.locator("#file button[aria-label='Clear']").click()
    wait_until_gone(running[1], "broken.nii.gz")


def own_atlas(folder: Path, labels: int = ROIS) -> tuple[Path, Path]:
    """Table without coordinates, and label image, of an atlas that no model knows; in planes of 4 x 4 voxels."""
    rows = [f"{10 + i}\tmine{i}\tVis" for i in range(ROIS)]
    (folder / "mine.tsv").write_text("\n".join(["index\tname\tnetwork", *rows]) + "\n")
    planes = np.broadcast_to(np.arange(10, 10 + labels, dtype=np.int16), (4, 4, labels))
    nibabel.save(nibabel.Nifti1Image(planes, np.diag([4.0, 4, 4, 1])), folder / "mine.nii.gz")
    return folder / "mine.tsv", folder / "mine.nii.gz"


def volume(path: Path, tr: float) -> Path:
    """A scan in the planes of `own_atlas`, with that TR in its header; the model's atlas has labels there, too."""
    values = np.broadcast_to(array().T, (4, 4, ROIS, 24))
    image = nibabel.Nifti1Image(values, np.diag([4.0, 4, 4, 1]))
    image.header.set_zooms((4, 4, 4, tr))
    nibabel.save(image, path)
    return path


@needs_browser
def test_table_label_image_and_sidecar_of_the_visitor_are_used_and_deleted(
    page: Page, running: tuple[str, Path], model_folder: Path, tmp_path: Path
) -> None:
    table, labels = own_atlas(tmp_path)
    sidecar = tmp_path / "another.json"
    sidecar.write_text('{"RepetitionTime": 2.0}')
    path = volume(tmp_path / "scan.nii.gz", 1.0)
    page.locator("#more button").first.click()
    for kind, given in (("table", table), ("labels", labels), ("sidecar", sidecar)):
        upload(page, given, kind)
    status = read(page, path)
    assert status.startswith("Read: 24 frames of 6 ROIs, 2 s apart. The model sees 32 s.")
    assert "scan.nii.gz: using RepetitionTime 2 s of scan.json; the header has 1 s" in status
    assert uploads(running[1]) == [] and "scan.nii.gz" not in (running[1] / "log").read_text()
    ask(page, QUESTION)
    atlas = Atlas.from_image(labels, table)
    expected = load(model_folder).ask(path, QUESTION, ["low", "typical", "high"], tr=2.0, atlas=atlas)
    assert_shown(page, expected["probabilities"])
    # nothing of them is left for the next scan
    np.save(tmp_path / "next.npy", array())
    assert "repetition time is not known" in read(page, tmp_path / "next.npy")


def test_label_image_of_another_atlas_is_refused(running: tuple[str, Path], tmp_path: Path) -> None:
    """The counts of both are named, as by `prepare` and `ask`, and no folder of the server's."""
    table, labels = own_atlas(tmp_path, 3 * ROIS)
    client = Client(running[0], verbose=False, download_files=False)
    client.predict(handle_file(volume(tmp_path / "scan.nii.gz", 2.0)), api_name="/upload")
    client.predict(handle_file(labels), api_name="/upload_labels")
    # without a table, they are to be those of the atlas that was chosen
    for atlas in ("tiny", "mine"):
        status = client.predict("tiny", 0, api_name="/read")[4]
        assert f"atlas '{atlas}' has 6 labels and the label image 18" in status.replace("&#x27;", "'")
        client.predict(handle_file(table), api_name="/upload_table")
    assert str(running[1]) not in status


@needs_browser
def test_names_and_questions_are_text_and_not_markup(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "<img src=x onerror=window.hit=1>.csv"
    names = "<b>x</b>," + ",".join(f"roi{i}" for i in range(1, ROIS))
    path.write_text(names + "\n" + "\n".join(",".join(map(str, row)) for row in array()) + "\n")
    assert "<b>x</b>" in read(page, path, 2.0)
    page.get_by_role("button", name="Synthetic: unrelated ROIs").click()
    page.locator("#status p", has_text="No person's").wait_for()
    ask(page, "<img src=x onerror=window.hit=1> low, typical or high?")
    assert page.locator("#chat").get_by_text("<img src=x").count() == 1
    assert page.evaluate("window.hit") is None


def test_visitors_at_once_get_the_answers_of_single_ones(
    running: tuple[str, Path], model_folder: Path, tmp_path: Path
) -> None:
    paths = [tmp_path / f"{number}.npy" for number in range(4)]
    for seed, path in enumerate(paths):
        np.save(path, array(seed=seed))

    def visit(path: Path) -> list[dict[str, float]]:
        client = Client(running[0], verbose=False, download_files=False)
        answers = []
        for _ in range(2):
            client.predict(handle_file(path), api_name="/upload")
            client.predict("tiny", 2.0, api_name="/read")
            label = client.predict(QUESTION, "", api_name="/ask")[1]
            answers.append({entry["label"]: entry["confidence"] for entry in label["confidences"]})
        return answers

    with ThreadPoolExecutor(len(paths)) as visitors:
        found = list(visitors.map(visit, paths))
    reader = load(model_folder)
    for path, answers in zip(paths, found, strict=True):
        expected = reader.ask(path, QUESTION, ["low", "typical", "high"], tr=2.0, atlas="tiny")["probabilities"]
        assert answers == [pytest.approx(expected, abs=1e-5)] * 2
    assert not {path.name for path in paths} & {file.name for file in uploads(running[1])}


def test_files_that_nobody_uploaded_stay_where_they_are(running: tuple[str, Path], tmp_path: Path) -> None:
    address, temporary = running
    path = tmp_path / "private.npy"
    np.save(path, array())
    for name in (path, f"{temporary}/{os.path.relpath(path, temporary)}"):
        data = json.dumps({"data": [{"path": str(name), "meta": {"_type": "gradio.FileData"}}]}).encode()
        call = Request(f"{address}/gradio_api/call/upload", data, {"Content-Type": "application/json"})
        event = json.load(urlopen(call))["event_id"]
        assert "event: error" in urlopen(f"{address}/gradio_api/call/upload/{event}").read().decode()
    assert path.exists() and path.name not in [file.name for file in uploads(temporary)]


def test_folder_of_an_upload_is_no_upload(running: tuple[str, Path], tmp_path: Path) -> None:
    address, temporary = running
    np.save(tmp_path / "kept.npy", array())
    with open(tmp_path / "kept.npy", "rb") as handle:
        uploaded = Path(httpx.post(f"{address}/gradio_api/upload", files=[("files", handle)]).json()[0])
    assert temporary in uploaded.parents
    for folder in (uploaded.parent, uploaded.parent.parent):
        data = json.dumps({"data": [{"path": str(folder), "meta": {"_type": "gradio.FileData"}}]}).encode()
        call = Request(f"{address}/gradio_api/call/upload", data, {"Content-Type": "application/json"})
        event = json.load(urlopen(call))["event_id"]
        urlopen(f"{address}/gradio_api/call/upload/{event}").read()
        assert uploaded.exists()


@needs_browser
def test_nothing_is_left_of_a_session(browser: Browser, running: tuple[str, Path], tmp_path: Path) -> None:
    address, temporary = running
    path = volume(tmp_path / f"{MARKER}.nii.gz", 2.0)
    page = open_page(browser, address)
    assert read(page, path).startswith("Read: 24 frames of 6 ROIs, 2 s apart.")
    upload(page, path)
    # other tests' visitors are still here
    assert path.name in [file.name for file in uploads(temporary)]
    page.close()
    wait_until_gone(temporary, path.name)


@pytest.mark.parametrize(
    ("name", "limit", "message"),
    [
        ("large.csv", "MAX_TABLE_MB", "at most 0 MB, got"),
        ("deep.nii.gz", "MAX_INFLATED_MB", "at most 0 MB uncompressed"),
        ("labels.nii.gz", "MAX_LABELS_MB", "at most 0 MB uncompressed"),
    ],
)
def test_large_files_are_refused_unread(
    name: str, limit: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    if name.endswith(".csv"):
        path.write_text("a,b\n1,2\n")
    else:
        nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4, 9), np.float32), np.eye(4)), path)
    is_labels = name == "labels.nii.gz"
    space.check_size(path, is_labels)
    monkeypatch.setattr(space, limit, 0)
    with pytest.raises(ValueError, match=message):
        space.check_size(path, is_labels)


def test_an_answer_ends_at_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    class Slow:
        def ask(self, *args: object, **options: object) -> Iterator[str]:
            try:
                while True:
                    yield "on "
            finally:
                closed.append(True)

    monkeypatch.setattr(space, "MAX_ANSWER_SECONDS", 0.05)
    answers = list(space.answer_pieces(Slow(), {}, "Describe this scan.", []))
    assert answers[-1].startswith("on on ") and answers[-1].endswith("…") and closed == [True]


def test_questions_come_with_what_the_card_says_was_measured(tmp_path: Path) -> None:
    results = evaluation_results()
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    add_to_card(tmp_path / "README.md", results)
    found = space.card_results(str(tmp_path))
    found.append(replace(found[0], dataset_config="sex, zero-shot", metric_type="roc_auc", metric_value=0.75))
    offered = {text: (answers, measured) for text, answers, measured in space.offered_questions(found)}
    assert offered[QUESTION] == ("", "balanced accuracy 0.60")
    task = load_task("sex")
    assert offered[task.questions[0]] == (", ".join(task.choice_words), "ROC-AUC 0.75")
    assert offered["Describe this scan."] == ("", "")
    found += [replace(one, dataset_name="elsewhere", metric_value=0.7) for one in found[-1:]]
    offered = {text: measured for text, _, measured in space.offered_questions(found)}
    assert offered[task.questions[0]] == f"ROC-AUC 0.75 ({found[0].dataset_name}), 0.70 (elsewhere)"


def test_a_model_without_a_card_is_served_without_results(tmp_path: Path, caplog) -> None:
    assert space.card_results(str(tmp_path)) == [] and not caplog.records
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert space.card_results(str(tmp_path)) == [] and "README.md" in caplog.text


@pytest.mark.parametrize(("shared", "low", "high"), [(0.7, 0.55, 0.85), (0.0, -0.15, 0.15)])
def test_examples_are_random_processes_with_the_coupling_they_name(shared: float, low: float, high: float) -> None:
    atlas = Atlas.load("aal2-94")
    signal = space.synthetic_scan(atlas, shared)
    assert signal.shape == (space.EXAMPLE_FRAMES, len(atlas))
    networks = np.array(atlas.networks)
    correlations = np.corrcoef(signal.T)
    within = (networks[:, None] == networks) & ~np.eye(len(atlas), dtype=bool)
    assert low < correlations[within].mean() < high
    assert abs(correlations[networks[:, None] != networks].mean()) < 0.15


@pytest.mark.parametrize("variant", [0, 1])
def test_questions_about_levels_are_known(variant: int) -> None:
    assert all(level_answers(question(name, variant)) == ("low", "typical", "high") for name in CORE_NAMES)
    assert level_answers("Describe this scan.") is None and level_answers("Is it high?") is None


def test_the_repository_of_the_space_fits_the_project() -> None:
    front = yaml.safe_load((ROOT / "space/README.md").read_text().split("---")[1])
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert front["sdk_version"] == pins["gradio"] and (ROOT / front["app_file"]).is_file()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    name, extra = re.match(r"([\w-]+)\[(\w+)\]", (ROOT / "space/requirements.txt").read_text()).groups()
    assert name == "fmri-lm" and extra in extras
