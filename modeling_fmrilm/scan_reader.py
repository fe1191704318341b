"""`fmrilm.load`: a saved model with its processor as one object from scans to answers, codes and signals."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor, TextIteratorStreamer


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
) -> "ScanReader":
    """
    A saved model with its processor, ready to read scans. Runs this package's code alone, none of the repository's.

    Args:
        path: a folder that holds both, or their repository on the Hub.
        device: an accelerator where there is one, unless given.
        dtype: of the language model; that of the saved weights unless given.
        revision: branch, tag or commit on the Hub.

    ValueError for what is no folder and can be no repository, and for a model of another kind.
    """
    options = {"revision": revision, "trust_remote_code": False}
    expected = "expected a folder with a model and its processor, or their id on the Hub"
    if Path(path).exists():
        if not Path(path, "config.json").is_file():
            raise ValueError(f"{expected}, got {path}, which holds no config.json")
    else:
        try:
            validate_repo_id(str(path))
        except HFValidationError as error:
            raise ValueError(f"{expected}, got {path}, which is neither") from error
    config = AutoConfig.from_pretrained(path, **options)
    if config.model_type != "fmrilm":
        raise ValueError(f"expected a model of type 'fmrilm' in {path}, got one of type {config.model_type!r}")
    model = AutoModelForMultimodalLM.from_pretrained(path, dtype="auto" if dtype is None else dtype, **options)
    if device is None:
        device = torch.accelerator.current_accelerator() or "cpu"
    return ScanReader(model.to(device).eval(), AutoProcessor.from_pretrained(path, **options))


class ScanReader:
    """
    Reads scans: `fmrilm.load(folder).ask("scan.nii.gz", "Is ... low, typical or high?", ["low", "typical", "high"])`.

    A scan is whatever the processor takes: a path, an image, an array [time, rois] or a dict {"signal", "tr",
    "atlas"}. One scan gives one result, a list gives a list, and a pandas DataFrame with a column `path` (and, if it
    has them, `tr` and `atlas`) gives that DataFrame with the results as further columns.

    Every method also takes the options of the processor for all its scans: `tr` (s), `atlas`, `label_image` and
    `window` ("first", "random" or "full": the part of a scan that is read).

    Attributes: `model` (FmriLMForConditionalGeneration) and `processor` (FmriLMProcessor).
    """

    def __init__(self, model: Any, processor: Any):
        self.model = model
        self.processor = processor

    def ask(
        self,
        scan: Any,
        question: str | Sequence[str],
        choices: Sequence[str] | None = None,
        history: Sequence[tuple[str, str]] = (),
        stream: bool = False,
        max_new_tokens: int = 256,
        batch_size: int = 1,
        **options: Any,
    ) -> Any:
        """
        The answer to a question about a scan.

        Args:
            question: one for all scans, or as many as scans.
            choices: allowed answers, of which the likeliest is taken.
            history: questions about the scan and their answers that come before this question.
            stream: give pieces of the answer as they are generated (one scan, no choices).
            batch_size: scans that are answered at a time.

        Returns:
            {"answer": text} or, with choices, {"answer": choice, "probabilities": {choice: probability}}; an iterator
            over pieces of the answer with `stream`; a DataFrame gains `answer` and `probability of CHOICE`.
        """
        scans = _listed(scan)
        questions = [question] * len(scans) if isinstance(question, str) else list(question)
        if len(questions) != len(scans):
            raise ValueError(f"expected one question or as many as scans, {len(scans)}, got {len(questions)}")
        if stream:
            if choices is not None or len(scans) != 1:
                raise ValueError(f"expected one scan and no choices to stream, got {len(scans)} scans, {choices}")
            return self._stream(self._prompts(scans, questions, history, **options), max_new_tokens)
        ids = None if choices is None else self.processor.encode_choices(list(choices))
        found: list[dict] = []
        for start in range(0, len(scans), batch_size):
            part = slice(start, start + batch_size)
            with _named(scans, part):
                inputs = self._prompts(scans[part], questions[part], history, **options)
                if ids is None or choices is None:
                    found += [{"answer": text} for text in self._generate(inputs, max_new_tokens)]
                    continue
                for row in self.model.score_choices(inputs, ids).softmax(-1).cpu():
                    probabilities = dict(zip(choices, row.tolist(), strict=True))
                    found.append({"answer": choices[row.argmax()], "probabilities": probabilities})
        if _is_table(scan):
            columns = {"answer": [one["answer"] for one in found]}
            for choice in choices or ():
                columns[f"probability of {choice}"] = [one["probabilities"][choice] for one in found]
            return scan.assign(**columns)
        return found if isinstance(scan, list) else found[0]

    def describe(self, scan: Any, request: str = "Describe this scan.", stream: bool = False, **options: Any) -> Any:
        """
        Text about a scan, or with `stream` an iterator over its pieces. A DataFrame gains `description`.
        `max_new_tokens`, `batch_size` and the options of the scans are those of `ask`.
        """
        if stream:
            return self.ask(scan, request, stream=True, **options)
        texts = [found["answer"] for found in self.ask(_listed(scan), request, **options)]
        return _returned(scan, "description", texts)

    def embed(self, scan: Any, **options: Any) -> Any:
        """
        float32 [hidden]: what the language model makes of a scan alone, the mean of its last states over the scan's
        tokens. A DataFrame gains `embedding`.
        """
        placeholder = self.processor.tokenizer.convert_ids_to_tokens(self.processor.fmri_token_id)

        def embedding(scan: Any) -> np.ndarray:
            inputs = self.processor(placeholder, scan, **options).to(self.model.device)
            states = self.model.model(**inputs).last_hidden_state
            return states[inputs["input_ids"] == self.processor.fmri_token_id].float().mean(0).cpu().numpy()

        return _each(embedding, scan, "embedding")

    def tokenize(self, scan: Any, **options: Any) -> Any:
        """Codes int64 [steps, slots] of a scan. A DataFrame gains `codes`."""
        slots = self._slots()

        def codes(scan: Any) -> np.ndarray:
            return self.model.model.get_fmri_codes(**self._features(scan, options)).cpu().numpy().reshape(-1, slots)

        return _each(codes, scan, "codes")

    def signal(self, scan: Any, **options: Any) -> Any:
        """
        What the model sees of a scan: float32 [time, rois], robust z-scores at the model's repetition time, NaN where
        a ROI is missing. A DataFrame gains `signal`.
        """

        def signal(scan: Any) -> np.ndarray:
            features = self._features(scan, options)
            return _time_first(features["fmri_values"], features["fmri_mask"])

        return _each(signal, scan, "signal")

    def reconstruct(self, scan: Any, **options: Any) -> Any:
        """What the codec keeps of `signal`: float32 [time, rois] alike. A DataFrame gains `reconstruction`."""
        self._slots()

        def reconstruction(scan: Any) -> np.ndarray:
            features = self._features(scan, options)
            decoded = self.model.model.codec.decode(
                self.model.model.get_fmri_codes(**features), features["roi_coordinates"]
            )
            return _time_first(decoded, features["fmri_mask"])

        return _each(reconstruction, scan, "reconstruction")

    def forecast(self, scan: Any, steps: int = 1, temperature: float | None = None, **options: Any) -> Any:
        """
        float32 [steps * patch_length, rois]: what follows the last frame of a scan, in the unit of `signal`, NaN where
        a ROI is missing. The model looks back over one window of its processor. The best guess; with a `temperature`
        a draw. A DataFrame gains `forecast`.
        """
        self._slots()
        context = self.processor.feature_extractor.window_length

        def forecast(scan: Any) -> np.ndarray:
            features = self._features(scan, {"window": "full", **options})
            frames = int(features["fmri_mask"].any(1).sum())
            kept = slice(max(0, frames - context), frames)
            values, mask = features["fmri_values"][..., kept], features["fmri_mask"][..., kept]
            future = self.model.forecast(values, features["roi_coordinates"], mask, steps, temperature)
            return _time_first(future, mask.any(-1, keepdim=True).expand_as(future))

        return _each(forecast, scan, "forecast")

    def _features(self, scan: Any, options: dict[str, Any]) -> dict[str, torch.Tensor]:
        """`fmri_values`, `roi_coordinates` and `fmri_mask` of one scan, a batch of one."""
        if options.get("window") == "sliding":
            raise ValueError("one window of a scan is read: expected 'first', 'random' or 'full', got 'sliding'")
        return dict(self.processor.feature_extractor([scan], **options).to(self.model.device))

    def _slots(self) -> int:
        """Codes of a step; ValueError for a model that reads features and has no codes."""
        if self.model.fmri_head is None:
            raise ValueError("expected a model with a codebook, got one that reads continuous features of scans alone")
        return self.model.config.codec_config.tokens_per_step

    def _prompts(
        self, scans: list, questions: list[str], history: Sequence[tuple[str, str]], **options: Any
    ) -> dict[str, torch.Tensor]:
        """Model inputs of one chat a scan, padded on the left."""
        chats = []
        for scan, question in zip(scans, questions, strict=True):
            content = [{"type": "fmri", "fmri": scan}]
            chat = []
            for asked, answered in history:
                chat.append({"role": "user", "content": [*content, {"type": "text", "text": asked}]})
                chat.append({"role": "assistant", "content": [{"type": "text", "text": answered}]})
                content = []
            chats.append([*chat, {"role": "user", "content": [*content, {"type": "text", "text": question}]}])
        options = {"add_generation_prompt": True, "padding_side": "left", **options}
        return dict(self.processor.apply_chat_template(chats, **options).to(self.model.device))

    def _generate(self, inputs: dict[str, torch.Tensor], max_new_tokens: int) -> list[str]:
        ids = self.model.generate(**inputs, max_new_tokens=max_new_tokens)[:, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def _stream(self, inputs: dict[str, torch.Tensor], max_new_tokens: int) -> Iterator[str]:
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stopped, errors = Event(), []

        def generate() -> None:
            try:
                self.model.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    streamer=streamer,
                    stopping_criteria=[lambda ids, scores: torch.full((len(ids),), stopped.is_set())],
                )
            except Exception as error:
                errors.append(error)
                # whoever waits for the next piece would wait for ever
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            # also where nobody wants the rest
            stopped.set()
            thread.join()
        if errors:
            raise errors[0]


def _is_table(scans: Any) -> bool:
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(scans, pandas.DataFrame)


def _listed(scans: Any) -> list:
    """Scans one by one, from one scan, a list of them, or a table."""
    if not _is_table(scans):
        return scans if isinstance(scans, list) else [scans]
    if "path" not in scans:
        raise ValueError(f"expected a table of scans with a column 'path', got columns {list(scans)}")
    known = [name for name in ("tr", "atlas") if name in scans]
    rows = scans[["path", *known]].astype(object).where(scans[["path", *known]].notna(), None)
    return [{"signal": path, **dict(zip(known, rest, strict=True))} for path, *rest in rows.itertuples(index=False)]


def _each(read: Callable[[Any], np.ndarray], scans: Any, column: str) -> Any:
    """What `read` gives of each scan, in the form in which the scans came."""
    found, listed = [], _listed(scans)
    for index, scan in enumerate(listed):
        with torch.no_grad(), _named(listed, slice(index, index + 1)):
            found.append(read(scan))
    return _returned(scans, column, found)


def _returned(scans: Any, column: str, found: list) -> Any:
    if _is_table(scans):
        return scans.assign(**{column: found})
    return found if isinstance(scans, list) else found[0]


@contextmanager
def _named(scans: list, part: slice) -> Iterator[None]:
    """Errors say which of several scans they are about."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if len(scans) == 1:
            raise
        last = min(part.stop, len(scans)) - 1
        which = f"scan {last}" if last == part.start else f"scans {part.start} to {last}"
        raise ValueError(f"{which} (counted from 0): {error}") from error


def _time_first(values: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    """float32 [time, rois] of values and mask [1, rois, time], without padded frames; NaN where a ROI is missing."""
    frames = int(mask.any(1).sum())
    return values.masked_fill(~mask, float("nan"))[0, :, :frames].T.float().cpu().numpy()


__all__ = ["ScanReader", "load"]
