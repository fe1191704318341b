"""
The Space: give a scan, ask about it, see the answer with its probabilities and what the model read.

`app.py`, `make app` and `fmrilm app` start it. Limits are the constants below. Uploads, the scan and what may be given
with it, are moved to a folder of their session at once and deleted as soon as the scan has been read, or with the
session; the folder of all of them is removed with the program. Nothing else is written to disk.
"""

import hashlib
import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from huggingface_hub import EvalResult, ModelCard
from transformers.utils import cached_file
from yaml import YAMLError

from fmrilm import Atlas, load
from fmrilm.processors.descriptors.text import family, level_answers, question
from fmrilm.processors.scan_io_fmrilm import logger, read_nifti, sidecars, warn_once

from .cli.options import DEFAULT_MODEL, MODEL_VARIABLE
from .data.tasks import load_task, task_names
from .report.scan_figures import carpet, token_map
from .report.scan_report import read_scan, token_places, view_scan


# uploads: images stream from disk, tables and arrays are read into memory
MAX_IMAGE_MB, MAX_TABLE_MB = 512, 64
# an image as it is after decompression: what is declared by its header is what has to be read
MAX_INFLATED_MB = 4096
# a label image: half a millimetre in 64 bits
MAX_LABELS_MB = 512
# values of a scan that a session keeps in memory: 16 MB
MAX_SCAN_VALUES = 2_000_000
MAX_QUESTION_LETTERS = 500
# earlier questions and answers that the model is shown
MAX_TURNS = 6
MAX_ANSWER_TOKENS, MAX_ANSWER_SECONDS = 128, 60
# who waits longer than so many others is sent away
MAX_WAITING = 64
# a session that rests so long, or is one too many, is forgotten
SESSION_SECONDS, MAX_SESSIONS = 1800, 64

EXAMPLE_FRAMES, EXAMPLE_TR = 200, 2.0
# share of a ROI's variance that its network has in common
EXAMPLES = {"Synthetic: coupled networks": 0.7, "Synthetic: unrelated ROIs": 0.0}
# what may be uploaded, by the name of its element
FILES = {
    "file": "Scan (.nii, .nii.gz, .npy, .csv, .tsv, .1D)",
    "table": "Atlas table (.tsv, .csv)",
    "labels": "Label image (.nii, .nii.gz)",
    "sidecar": "Sidecar (.json)",
}
# descriptors that are asked about to begin with
DESCRIPTORS = ("connectivity/Vis-Default", "autocorrelation/Vis", "strength/Default")
REQUEST = "Describe this scan."
# of a card's results; the first that a question has is shown
METRICS = {
    "roc_auc": "ROC-AUC",
    "pearson_r": "r",
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "true statements",
}
CSS = """
footer{display:none!important}
.gradio-container{max-width:76rem!important;margin:0 auto}
#heading h1{margin-bottom:.2rem}
#heading p{color:var(--body-text-color-subdued);max-width:52rem}
#status p{margin:0;padding:.55rem .8rem;border-radius:8px;border-left:4px solid var(--color-accent);
background:var(--background-fill-secondary)}
#status p.error{border-color:#c2410c}
#control p{margin:0;color:var(--body-text-color-subdued);font-size:.85rem}
#plots h3{margin:.8rem 0 .2rem;font-size:1rem;font-weight:600}
#plots figure{margin:0}#plots figure div{overflow-x:auto;contain:inline-size}#plots img{width:100%;min-width:36rem}
#plots figcaption{color:var(--body-text-color-subdued);font-size:.85rem}
"""
Message = dict[str, str]


@dataclass
class Session:
    """What a visitor's session holds, in memory alone. scan: of `read_scan`; turns: questions and their answers."""

    scan: dict[str, Any] | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)


def build_space(reader: Any, uploads: Path, results: Sequence[EvalResult] = ()) -> gr.Blocks:
    """
    The pages of the Space. reader: of `fmrilm.load`; uploads: an empty folder that is Gradio's own, too; results: of
    the model's card.
    """
    offered = offered_questions(results)
    atlases = {atlas["name"]: len(atlas["rois"]) for atlas in reader.processor.feature_extractor.atlases}

    def keeper(kind: str) -> Callable[[dict[str, Any], gr.Request], tuple[Path | None, str]]:
        def keep(uploaded: dict[str, Any], request: gr.Request) -> tuple[Path | None, str]:
            # Gradio has seen to it that this is in its folder, and not that it is a file
            file = Path(uploaded["path"])
            if not file.is_file():
                return None, _status("The upload was lost. Please upload the file again.", error=True)
            own = session_folder(request) / kind / file.name
            discard(own)
            own.parent.mkdir(parents=True)
            try:
                os.replace(file, own)
            except FileNotFoundError:
                # somebody else uploaded the same bytes in the same moment, and took them away
                return None, _status("The upload was lost. Please upload the file again.", error=True)
            shutil.rmtree(file.parent, ignore_errors=True)
            return own, _status(f"{own.name} is here. Check the atlas and the repetition time, then read the scan.")

        return keep

    def read(
        file: Path | None, table: Path | None, labels: Path | None, sidecar: Path | None, atlas: str, tr: float
    ) -> tuple[Any, ...]:
        there = [path for path in (file, table, labels, sidecar) if path is not None and path.exists()]
        if file is None or file not in there:
            problem = _status("Upload a scan first, or take an example.", error=True)
            return *[gr.skip()] * 5, problem, *[gr.skip()] * len(FILES)
        try:
            for path in there:
                check_size(path, path == labels)
            # where every command looks for it
            beside = sidecars(file)[0]
            beside.unlink(missing_ok=True)
            if sidecar is not None and sidecar in there:
                shutil.copyfile(sidecar, beside)
            own = str(table) if table in there else atlas
            session, plots, summary = opened(file, own, tr, labels if labels in there else None)
        except (ValueError, OSError) as error:
            text = str(error)
            for path in there:
                text = text.replace(f"{path.parent}{os.sep}", "")
            # what was there is gone: no answer can be about another scan than the last one given
            return Session(), [], None, "", "", _status(text, error=True), *[gr.skip()] * len(FILES)
        for path in there:
            discard(path)
        done = _status(f"{summary} The upload has been deleted.")
        return session, [], None, "", plots, done, *[None] * len(FILES)

    def example(name: str, atlas: str) -> tuple[Any, ...]:
        known = reader.processor.feature_extractor.atlas(atlas)
        session, plots, summary = opened(synthetic_scan(known, EXAMPLES[name]), atlas, EXAMPLE_TR)
        return session, [], None, "", plots, _status(f"{summary} No person's: a random process.")

    def opened(source: Any, atlas: str, tr: float, labels: Path | None = None) -> tuple[Session, str, str]:
        with noted() as notes:
            scan = read_scan(reader, source, tr or None, atlas, labels)
        # a session keeps no label image
        scan["atlas"] = replace(scan["atlas"], parcels=None)
        if scan["signal"].size > MAX_SCAN_VALUES:
            shape = scan["signal"].shape
            raise ValueError(
                f"expected at most {MAX_SCAN_VALUES:,} values, frames × ROIs, got {shape[0]} × {shape[1]}"
            )
        view = view_scan(reader, scan)
        frames, rois = scan["signal"].shape
        plots = carpet(view, only_signal=True) + token_map(
            "Latent tokens over time",
            {"all levels": token_places(reader, view.codes)},
            view.seconds,
            "rank",
            "What the language model reads: each cell is one latent token. Tokens of like colour have like vectors.",
        )
        seen = f"The model sees {view.seconds:.0f} s."
        summary = [f"Read: {frames} frames of {rois} ROIs, {scan['tr']:g} s apart. {seen}"]
        if frames * scan["tr"] > view.seconds + reader.processor.feature_extractor.repetition_time:
            summary.append("Plots and free answers are about these first seconds, probabilities about all windows.")
        return Session(scan), plots, " ".join([*summary, *(f"Note: {note}." for note in notes)])

    def ask(session: Session, question: str, choices: str) -> Iterator[tuple[Any, ...]]:
        question = question.strip()
        shown = _chat(session.turns)
        try:
            if session.scan is None:
                raise ValueError("Read a scan first, or take an example.")
            if not 0 < len(question) <= MAX_QUESTION_LETTERS:
                raise ValueError(f"expected a question of 1 to {MAX_QUESTION_LETTERS} letters, got {len(question)}")
            if len(choices) > MAX_QUESTION_LETTERS:
                raise ValueError(f"expected answers of at most {MAX_QUESTION_LETTERS} letters, got {len(choices)}")
            allowed = [choice.strip() for choice in choices.split(",") if choice.strip()] or level_answers(question)
            history = session.turns[-MAX_TURNS:]
            if allowed:
                found = reader.ask(session.scan, question, list(allowed), history=history)
                # without the turns before, which are about the scan as it is
                other = reader.ask(with_shuffled_rois(session.scan), question, list(allowed))
                turns = [*session.turns, (question, found["answer"])]
                yield Session(session.scan, turns), _chat(turns), found["probabilities"], _control(other), "", ""
                return
            answer = ""
            for answer in answer_pieces(reader, session.scan, question, history):
                yield session, _chat([*session.turns, (question, answer)]), None, "", question, ""
            turns = [*session.turns, (question, answer)]
            yield Session(session.scan, turns), _chat(turns), None, "", "", ""
        except (ValueError, OSError) as error:
            yield session, shown, None, "", question, _status(str(error), error=True)

    def session_folder(request: gr.Request) -> Path:
        # the name comes from the visitor's browser: hashed, it cannot lead elsewhere
        return uploads / f"session-{hashlib.sha256(str(request.session_hash).encode()).hexdigest()[:32]}"

    def leave(request: gr.Request) -> None:
        shutil.rmtree(session_folder(request), ignore_errors=True)

    with gr.Blocks(title="fMRI-LM", analytics_enabled=False, delete_cache=(60, SESSION_SECONDS)) as space:
        session = gr.State(Session(), time_to_live=SESSION_SECONDS)
        uploaded = [gr.State(None, time_to_live=SESSION_SECONDS, delete_callback=discard) for _ in FILES]
        gr.Markdown(
            "# fMRI-LM\nA language model that reads brain scans. Give it a preprocessed resting-state scan in MNI "
            "space, or a table of ROI series, and ask. A demonstration, not a medical device: do not upload what "
            "could tell who somebody is, and believe no answer about a person.",
            elem_id="heading",
        )
        with gr.Row():
            with gr.Column(scale=2):
                files = [gr.File(label=FILES["file"], height=120, elem_id="file")]
                with gr.Row():
                    names = [(f"{name} ({rois} ROIs)", name) for name, rois in atlases.items()]
                    atlas = gr.Dropdown(names, value=names[0][1], label="Atlas", min_width=160, elem_id="atlas")
                    tr = gr.Number(0, label="TR (s); 0: as in the file", minimum=0, min_width=120, elem_id="tr")
                with gr.Accordion("An atlas of your own, a sidecar", open=False, elem_id="more"):
                    files += [gr.File(label=FILES[kind], height=100, elem_id=kind) for kind in list(FILES)[1:]]
                button = gr.Button("Read the scan", variant="primary", elem_id="read")
                with gr.Row():
                    examples = [gr.Button(name, size="sm", min_width=120) for name in EXAMPLES]
                status = gr.HTML(elem_id="status")
                probabilities = gr.Label(label="Probability of each answer", elem_id="probabilities")
                control = gr.HTML(elem_id="control")
            with gr.Column(scale=3):
                chat = gr.Chatbot(
                    label="Questions and answers", height=420, render_markdown=False, buttons=[], elem_id="chat"
                )
                question = gr.Textbox(
                    label="Question", placeholder="What do you want to know?", submit_btn=True, elem_id="question"
                )
                choices = gr.Textbox(
                    label="Allowed answers, with commas",
                    placeholder="low, typical, high (taken from the question where it names them)",
                    elem_id="choices",
                )
                gr.Examples(
                    [[text, answers] for text, answers, _ in offered],
                    [question, choices],
                    label="Questions like those of its training, with results on held-out subjects",
                    # the page cuts a label's end off
                    example_labels=[f"{result}: {text}" if result else text for text, _, result in offered],
                )
                problem = gr.HTML(elem_id="problem")
        plots = gr.HTML(elem_id="plots")
        opening = [session, chat, probabilities, control, plots, status]
        one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "model"}
        # preprocessing would leave an empty file beside each upload, named as those that still arrive
        for kind, file, state in zip(FILES, files, uploaded, strict=True):
            name = "upload" if kind == "file" else f"upload_{kind}"
            file.upload(keeper(kind), file, [state, status], api_name=name, preprocess=False)
            file.clear(discard, state, None, api_visibility="private")
        space.unload(leave)
        button.click(read, [*uploaded, atlas, tr], [*opening, *files], api_name="read", **one_at_a_time)
        for example_button in examples:
            example_button.click(example, [example_button, atlas], opening, api_visibility="private", **one_at_a_time)
        chat.clear(lambda session: Session(session.scan), session, session, api_visibility="private")
        question.submit(
            ask,
            [session, question, choices],
            [session, chat, probabilities, control, question, problem],
            api_name="ask",
            **one_at_a_time,
        )
    space.queue(max_size=MAX_WAITING)
    return space


def offered_questions(results: Sequence[EvalResult]) -> list[tuple[str, str, str]]:
    """
    Questions to begin with, about descriptors and about labels that the results are about: each with its answers, by
    comma where it does not name them, and with what the results say of such questions, by dataset where there are
    several; "" where nothing is known.
    """
    measured: dict[str, dict[str, list[EvalResult]]] = {}
    for result in results:
        asked = str(result.dataset_config).removesuffix(", zero-shot")
        measured.setdefault(asked, {}).setdefault(result.metric_type, []).append(result)

    def quality(asked: str) -> str:
        known = measured.get(asked, {})
        metric = next((metric for metric in METRICS if metric in known), None)
        if metric is None:
            return ""
        several = len(known[metric]) > 1
        values = [f"{one.metric_value:.2f}{f' ({one.dataset_name})' * several}" for one in known[metric]]
        return f"{METRICS[metric]} {', '.join(values)}"

    found = [(question(name), "", quality(f"descriptors, {family(name)}")) for name in DESCRIPTORS]
    for name in measured:
        if name in task_names():
            task = load_task(name)
            found.append((task.questions[0], ", ".join(task.choice_words or ()), quality(name)))
    return [*found, (REQUEST, "", quality("descriptions"))]


def card_results(model: str) -> list[EvalResult]:
    """What the card of a model folder or Hub id says was measured; nothing without a card that can be read."""
    path = cached_file(
        model,
        "README.md",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    try:
        card: Any = None if path is None else ModelCard.load(path)
        return [] if card is None else card.data.eval_results or []
    except (ValueError, YAMLError) as error:
        logger.warning("no results are shown: the card cannot be read: %s: %s", path, error)
        return []


def answer_pieces(reader: Any, scan: dict[str, Any], question: str, history: list[tuple[str, str]]) -> Iterator[str]:
    """The answer as it grows; it ends after `MAX_ANSWER_TOKENS` or `MAX_ANSWER_SECONDS`."""
    deadline = time.monotonic() + MAX_ANSWER_SECONDS
    pieces = reader.ask(scan, question, history=history, stream=True, max_new_tokens=MAX_ANSWER_TOKENS)
    answer = ""
    try:
        for piece in pieces:
            answer += piece
            yield answer
            if time.monotonic() > deadline:
                yield f"{answer} …"
                break
    finally:
        # also where the visitor has left: the model stops
        pieces.close()


@contextmanager
def noted() -> Iterator[list[str]]:
    """What reading a scan warns about, for its visitor alone: it has names of files and does not go into the log."""
    notes: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        notes.append(record.getMessage())
        return False

    # the visitor before may have been told the same
    warn_once.cache_clear()
    logger.addFilter(note)
    try:
        yield notes
    finally:
        logger.removeFilter(note)


def check_size(file: Path, is_labels: bool = False) -> None:
    """ValueError for a file above the limits, before it is read."""
    image = is_labels or file.name.lower().endswith((".nii", ".nii.gz"))
    limit = MAX_IMAGE_MB if image else MAX_TABLE_MB
    if file.stat().st_size > limit * 1e6:
        raise ValueError(f"expected a file of at most {limit} MB, got {file.stat().st_size / 1e6:.0f} MB")
    if image:
        volumes = read_nifti(file)
        size = math.prod(volumes.shape) * volumes.dtype.itemsize / 1e6
        limit = MAX_LABELS_MB if is_labels else MAX_INFLATED_MB
        if size > limit:
            raise ValueError(f"expected an image of at most {limit} MB uncompressed, got {size:.0f} MB")


def synthetic_scan(atlas: Atlas, shared: float, seed: int = 0) -> np.ndarray:
    """
    float64 [frames, rois] of a random process: of each ROI's variance a share is common to its network, the rest its
    own, both slow as BOLD is (autoregression of 0.8 at a TR of 2 s). Nobody's data.
    """
    rng = np.random.default_rng(seed)
    names, members = np.unique(atlas.networks, return_inverse=True)
    slow = rng.standard_normal((EXAMPLE_FRAMES, len(names) + len(atlas)))
    for frame in range(1, EXAMPLE_FRAMES):
        slow[frame] += 0.8 * slow[frame - 1]
    common, own = slow[:, : len(names)], slow[:, len(names) :]
    return math.sqrt(shared) * common[:, members] + math.sqrt(1 - shared) * own


def with_shuffled_rois(scan: dict[str, Any]) -> dict[str, Any]:
    """A scan of `read_scan` with its ROIs in random order, always the same: of the signals, their places are lost."""
    signal = scan["signal"]
    return {**scan, "signal": signal[:, np.random.default_rng(0).permutation(signal.shape[1])]}


def discard(upload: Path | None) -> None:
    """Deletes an upload and the folder that was made for it."""
    if upload is not None:
        shutil.rmtree(upload.parent, ignore_errors=True)


def _chat(turns: list[tuple[str, str]]) -> list[Message]:
    """The turns as the page shows them; it takes text for HTML, so that even a picture in a question would load."""
    roles = ("user", "assistant")
    return [
        {"role": role, "content": escape(text, quote=False)}
        for turn in turns
        for role, text in zip(roles, turn, strict=True)
    ]


def _control(found: dict[str, Any]) -> str:
    """What the scan with shuffled ROIs has got: a model that ignores the scan answers both alike."""
    answer = found["answer"]
    share = found["probabilities"][answer]
    return f"<p>The same scan with its ROIs in random order: <b>{escape(answer)}</b> ({share:.0%})</p>"


def _status(text: str, error: bool = False) -> str:
    return f"<p{' class=error role=alert' if error else ''}>{escape(text)}</p>"


def launch(reader: Any, uploads: Path, results: Sequence[EvalResult] = (), **options: Any) -> gr.Blocks:
    """Starts the Space with its limits; options of Gradio's `launch`, such as `server_port`."""
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    space = build_space(reader, uploads, results)
    space.launch(
        # fonts of the visitor's own system: the page fetches nothing from elsewhere
        theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
        max_file_size=f"{MAX_IMAGE_MB}mb",
        state_session_capacity=MAX_SESSIONS,
        run_history=False,
        ssr_mode=False,
        footer_links=[],
        **options,
    )
    return space


def main(model: str | None = None, port: int | None = None, host: str | None = None) -> None:
    """Serves a model folder or Hub id: the one given, else that of the variable, else the demo's."""
    # removed with the program, also where it is asked to stop
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    source = model or os.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL
    reader, results = load(source), card_results(source)
    with tempfile.TemporaryDirectory(prefix="fmrilm-space-") as uploads:
        launch(reader, Path(uploads), results, server_port=port, server_name=host)
