"""`fmrilm.load`: a saved model with its processor as one object from scans to answers, codes and signals."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoTokenizer, TextIteratorStreamer

from .configuration_fmrilm import FmriLMConfig
from .modeling_fmrilm import FmriLMForConditionalGeneration
from .pipeline_fmrilm import likeliest, score_rows
from .processors.feature_extraction_fmrilm import FmriLMFeatureExtractor
from .processors.processing_fmrilm import FmriLMProcessor, without_repeats


EXPECTED = "expected a folder with a model and its processor, or their id on the Hub"
ADVICE = "`fmrilm demo` makes a model in runs/demo/model"


def check_source(path: str | Path) -> None:
    """ValueError for what is no folder and can be no repository on the Hub."""
    if not Path(path).exists():
        try:
            validate_repo_id(str(path))
        except HFValidationError as error:
            raise ValueError(f"{EXPECTED}, got {path}, which is neither: {ADVICE}") from error


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
    check_source(path)
    if Path(path).exists() and not Path(path, "config.json").is_file():
        raise ValueError(f"{EXPECTED}, got {path}, which holds no config.json")
    # the classes themselves, as the Auto classes take a while to import
    try:
        values, _ = FmriLMConfig.get_config_dict(path, revision=revision)
    except OSError as error:
        if Path(path).exists():
            raise
        raise ValueError(f"{EXPECTED}, got {path}, which is no folder ({ADVICE}): {error}") from error
    if (kind := values.get("model_type")) != "fmrilm":
        raise ValueError(f"expected a model of type 'fmrilm' in {path}, got one of type {kind!r}")
    dtype = "auto" if dtype is None else dtype
    source: Any = FmriLMForConditionalGeneration
    model = source.from_pretrained(path, revision=revision, dtype=dtype)
    values, _ = FmriLMProcessor.get_processor_dict(path, revision=revision)
    extractors: Any = FmriLMFeatureExtractor
    extractor = extractors.from_pretrained(path, revision=revision)
    tokenizer = AutoTokenizer.from_pretrained(path, config=model.config, revision=revision, trust_remote_code=False)
    processor = FmriLMProcessor.from_args_and_dict([extractor, tokenizer], values)
    if device is None:
        device = torch.accelerator.current_accelerator() or "cpu"
    return ScanReader(model.to(device).eval(), processor)


def _each(column: str) -> Callable[[Callable], Callable]:
    """Makes a method of one scan one of scans in any form, whose results a table gains as that column."""

    def decorated(read: Callable) -> Callable:
        @wraps(read)
        def read_each(self: "ScanReader", scan: Any, *args: Any, **options: Any) -> Any:
            found, listed = [], _listed(scan)
            for index, one in enumerate(listed):
                with torch.no_grad(), _named(listed, slice(index, index + 1)):
                    found.append(read(self, one, *args, **options))
            return _returned(scan, column, found)

        return read_each

    return decorated


class ScanReader:
    """
    Reads scans: `fmrilm.load(folder).ask("scan.nii.gz", "Is ... low, typical or high?", ["low", "typical", "high"])`.

    A scan is whatever the processor takes: a path, an image, an array [time, rois] or a dict {"signal", "tr",
    "atlas"}. One scan gives one result, a list or a `datasets.Dataset` gives a list, and a pandas DataFrame with a
    column `path` (and, if it has them, `tr` and `atlas`) gives that DataFrame with the results as further columns.

    Every method also takes for all its scans `tr` (s), `atlas`, `label_image` and `window`: "first", "full" (the whole
    scan at once) or None. With None, probabilities and embeddings are means over all whole windows of a scan; what is
    not a mean is of the first window, with a warning where a scan is longer.

    Attributes: `model` (FmriLMForConditionalGeneration) and `processor` (FmriLMProcessor).
    """

    def __init__(self, model: Any, processor: Any):
        self.model = model
        self.processor = processor

    @torch.no_grad()
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
            {"answer": text or choice}, with choices also "probabilities" {choice: probability}; and what was read:
            "window" {"start", "stop" (s), "windows", "frames" (how many), "scan_seconds"}, "atlas", "rois" (how many)
            and "missing_rois" (names). With `stream` an iterator over pieces of the answer. A DataFrame gains `answer`
            and `probability of CHOICE`.
        """
        scans = _listed(scan)
        questions = [question] * len(scans) if isinstance(question, str) else list(question)
        if len(questions) != len(scans):
            raise ValueError(f"expected one question or as many as scans, {len(scans)}, got {len(questions)}")
        if stream:
            if choices is not None or len(scans) != 1:
                raise ValueError(f"expected one scan and no choices to stream, got {len(scans)} scans, {choices}")
            read = self._read(scans[0], single=True, **options)
            return self._stream(self._prompts([(read, questions[0])], history), max_new_tokens)
        ids = None if choices is None else [self.processor.encode_choices(choices, text) for text in questions]
        found: list[dict] = []
        for start in range(0, len(scans), batch_size):
            part = slice(start, start + batch_size)
            with _named(scans, part):
                reads = [self._read(one, single=ids is None, **options) for one in scans[part]]
                rows = [(read, text) for read, text in zip(reads, questions[part], strict=True)]
                inputs = self._prompts(rows, history)
                if ids is None or choices is None:
                    answers = [{"answer": text} for text in self._generate(inputs, max_new_tokens)]
                else:
                    counts = [len(read["codes"]) for read in reads]
                    of_windows = [each for each, count in zip(ids[part], counts, strict=True) for _ in range(count)]
                    scores = score_rows(self.model, inputs, of_windows).log_softmax(-1).split(counts)
                    answers = [
                        likeliest(self.model, windows.mean(0), text, choices)
                        for windows, text in zip(scores, questions[part], strict=True)
                    ]
                found += [{**answer, **read["about"]} for answer, read in zip(answers, reads, strict=True)]
        if _is_table(scan):
            columns = {"answer": [one["answer"] for one in found]}
            for choice in choices or ():
                columns[f"probability of {choice}"] = [one["probabilities"][choice] for one in found]
            return scan.assign(**columns)
        return found if _is_several(scan) else found[0]

    def describe(self, scan: Any, request: str = "Describe this scan.", stream: bool = False, **options: Any) -> Any:
        """
        Text about a scan, or with `stream` an iterator over its pieces. A DataFrame gains `description`.
        `max_new_tokens`, `batch_size` and the options of the scans are those of `ask`.
        """
        if stream:
            return self.ask(scan, request, stream=True, **options)
        texts = [found["answer"] for found in self.ask(_listed(scan), request, **options)]
        return _returned(scan, "description", texts)

    @_each("embedding")
    def embed(self, scan: Any, **options: Any) -> Any:
        """
        float32 [hidden]: what the language model makes of a scan alone, the mean of its last states over the scan's
        tokens. A DataFrame gains `embedding`.
        """
        codes = self._read(scan, **options)["codes"]
        text = self.processor.scan_text(codes.shape[1])
        ids = self.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids = ids.to(self.model.device).expand(len(codes), -1)
        states = self.model.model(input_ids=ids, fmri_codes=codes).last_hidden_state
        return states[ids == self.processor.fmri_token_id].float().mean(0).cpu().numpy()

    @_each("codes")
    def tokenize(self, scan: Any, **options: Any) -> Any:
        """Codes int64 [patches, tokens_per_patch, levels] of a scan. A DataFrame gains `codes`."""
        per_patch = self.model.config.codec_config.tokens_per_patch
        return self._read(scan, single=True, **options)["codes"][0].unflatten(0, (-1, per_patch)).cpu().numpy()

    @_each("surprise")
    def surprise(self, scan: Any, **options: Any) -> Any:
        """
        Next-code NLL float32 [patches, levels] of a scan, in nats a code, mean over a patch's tokens. A DataFrame
        gains `surprise`.
        """
        return self.model.surprise(self._read(scan, single=True, **options)["codes"])[0].cpu().numpy()

    @_each("signal")
    def signal(self, scan: Any, **options: Any) -> Any:
        """
        What the model sees of a scan: float32 [time, rois], robust z-scores at the model's repetition time, NaN where
        a ROI is missing. A DataFrame gains `signal`.
        """
        features = self._read(scan, single=True, **options)["features"]
        return _time_first(features["fmri_values"], features["fmri_mask"])

    @_each("reconstruction")
    def reconstruct(self, scan: Any, **options: Any) -> Any:
        """What the codec keeps of `signal`: float32 [time, rois] alike. A DataFrame gains `reconstruction`."""
        read = self._read(scan, single=True, **options)
        decoded = self.model.model.codec.decode(read["codes"], read["features"]["roi_coordinates"])
        return _time_first(decoded, read["features"]["fmri_mask"])

    @_each("forecast")
    def forecast(
        self,
        scan: Any,
        seconds: float = 32.0,
        num_samples: int | None = None,
        temperature: float = 1.0,
        **options: Any,
    ) -> Any:
        """
        float32 [frames, rois]: the expected signal of the `seconds` that follow the last frame of a scan, in the unit
        of `signal`, NaN where a ROI is missing. The model looks back over one window of its processor. With
        `num_samples`, [num_samples, frames, rois] sampled signals. A DataFrame gains `forecast`.
        """
        extractor = self.processor.feature_extractor
        if (window := options.pop("window", "full")) != "full":
            raise ValueError(f"expected window 'full', whose end a forecast follows, got {window!r}")
        features = extractor([scan], window="full", **options).to(self.model.device)
        frames = int(features["fmri_mask"].any(1).sum())
        kept = slice(max(0, frames - extractor.window_length), frames)
        values, mask = features["fmri_values"][..., kept], features["fmri_mask"][..., kept]
        future = self.model.forecast(values, features["roi_coordinates"], mask, seconds, num_samples, temperature)
        known = mask.any(-1, keepdim=True).expand(*mask.shape[:2], future.shape[-1])
        if num_samples is None:
            return _time_first(future, known)
        return np.stack([_time_first(sample, known) for sample in future])

    def _read(self, scan: Any, window: str | None = None, single: bool = False, **options: Any) -> dict[str, Any]:
        """
        A scan's windows: "features" (`fmri_values`, `roi_coordinates`, `fmri_mask`, [windows, ...]), "codes" [windows,
        tokens, levels], and "about", what was read. single: one window alone.
        """
        if window not in (None, "first", "full"):
            raise ValueError(f"expected window 'first', 'full' or None, got {window!r}")
        window = window or ("first" if single else "sliding")
        features = self.processor.feature_extractor([scan], window=window, return_windows=True, **options)
        windows = features.pop("windows")
        about = {
            "window": {
                "start": windows[0]["start"],
                "stop": windows[-1]["stop"],
                "windows": len(windows),
                "frames": sum(window["frames"] for window in windows),
                "scan_seconds": windows[0]["scan_seconds"],
            },
            **{name: windows[0][name] for name in ("atlas", "rois", "missing_rois")},
        }
        names = ("fmri_values", "roi_coordinates", "fmri_mask")
        inputs = {name: features[name].to(self.model.device) for name in names}
        return {"features": inputs, "codes": self.model.model.get_fmri_codes(**inputs), "about": about}

    def _prompts(
        self, rows: list[tuple[dict[str, Any], str]], history: Sequence[tuple[str, str]]
    ) -> dict[str, torch.Tensor]:
        """Model inputs of a chat for each window of each scan and its question, padded on the left."""
        chats, codes = [], []
        for read, question in rows:
            for window in read["codes"]:
                content: list[dict[str, Any]] = [{"type": "fmri", "tokens": len(window)}]
                chat = []
                for asked, answered in history:
                    chat.append({"role": "user", "content": [*content, {"type": "text", "text": asked}]})
                    chat.append({"role": "assistant", "content": [{"type": "text", "text": answered}]})
                    content = []
                chats.append([*chat, {"role": "user", "content": [*content, {"type": "text", "text": question}]}])
                codes.append(window)
        inputs = self.processor.apply_chat_template(chats, add_generation_prompt=True, padding_side="left")
        inputs = dict(inputs.to(self.model.device))
        inputs["fmri_codes"] = torch.nn.utils.rnn.pad_sequence(codes, batch_first=True, padding_value=-1)
        return inputs

    def _generate(self, inputs: dict[str, torch.Tensor], max_new_tokens: int) -> list[str]:
        ids = self.model.generate(**inputs, max_new_tokens=max_new_tokens)[:, inputs["input_ids"].shape[1] :]
        return self.processor.decode_answers(ids)

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
            yield from without_repeats(streamer)
        finally:
            # also where nobody wants the rest
            stopped.set()
            thread.join()
        if errors:
            raise errors[0]


def _is_of(scans: Any, library: str, name: str) -> bool:
    """Whether scans are of a library's class: not where nobody has imported it."""
    module = sys.modules.get(library)
    return module is not None and isinstance(scans, getattr(module, name, ()))


def _is_table(scans: Any) -> bool:
    return _is_of(scans, "pandas", "DataFrame")


def _is_several(scans: Any) -> bool:
    return isinstance(scans, list) or _is_of(scans, "datasets", "Dataset")


def _listed(scans: Any) -> list:
    """Scans one by one, from one scan, a list or dataset of them, or a table."""
    if not _is_table(scans):
        return list(scans) if _is_several(scans) else [scans]
    if "path" not in scans:
        raise ValueError(f"expected a table of scans with a column 'path', got columns {list(scans)}")
    known = [name for name in ("tr", "atlas") if name in scans]
    rows = scans[["path", *known]].astype(object).where(scans[["path", *known]].notna(), None)
    return [{"signal": path, **dict(zip(known, rest, strict=True))} for path, *rest in rows.itertuples(index=False)]


def _returned(scans: Any, column: str, found: list) -> Any:
    if _is_table(scans):
        return scans.assign(**{column: found})
    return found if _is_several(scans) else found[0]


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
