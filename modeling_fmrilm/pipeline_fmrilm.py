"""pipeline("fmri-text-to-text"): a scan and a question to an answer, or to the probabilities of allowed answers."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, StackDataset
from transformers import GenerationConfig, Pipeline
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator


# what a saved configuration says of the pipeline, so that a folder brings it along
CUSTOM_PIPELINES = {
    "fmri-text-to-text": {
        "impl": "pipeline_fmrilm.FmriLMPipeline",
        "pt": ["AutoModelForMultimodalLM"],
        "type": "multimodal",
    }
}
SCAN_OPTIONS = ("tr", "atlas", "label_image", "window")


def score_rows(model: Any, inputs: dict[str, Any], choices: Sequence[list[list[int]]]) -> torch.Tensor:
    """`score_choices` of a batch in which each row is about one scan and has as many choices of its own."""
    rows_of: dict[str, list[int]] = {}
    for row, each in enumerate(choices):
        rows_of.setdefault(str(each), []).append(row)
    if len(rows_of) == 1:
        return model.score_choices(inputs, choices[0])
    scores = torch.empty(len(choices), len(choices[0]), device=model.device)
    for rows in rows_of.values():
        part = {name: value[rows] for name, value in inputs.items() if value is not None}
        scores[rows] = model.score_choices(part, choices[rows[0]])
    return scores


def likeliest(model: Any, scores: torch.Tensor, question: str, choices: Sequence[str]) -> dict[str, Any]:
    """{"answer", "probabilities" by choice} of the answers' log-likelihoods [choices]."""
    shares = model.answer_probabilities(scores, question, choices).cpu()
    return {"answer": choices[shares.argmax()], "probabilities": dict(zip(choices, shares.tolist(), strict=True))}


def is_many(fmri: Any) -> bool:
    """Whether it is a dataset, a generator or another collection of scans, and not one scan in itself."""
    one = isinstance(fmri, str | bytes | Mapping) or hasattr(fmri, "__array__")
    return isinstance(fmri, Dataset) or isinstance(fmri, Iterable) and not one


class FmriLMPipeline(Pipeline):
    """
    Answers questions about scans:

        pipe = pipeline("fmri-text-to-text", model=folder, trust_remote_code=True)
        pipe("scan.nii.gz", "Describe the scan.", label_image="atlas.nii.gz")
        pipe(scans, "Is it older than 40?", choices=["yes", "no"], batch_size=4)
        for answer in pipe(dataset, "Is it older than 40?", choices=["yes", "no"]): ...

    A scan is whatever the processor takes: a path, an image, an array [time, rois] or a dict {"signal", "tr",
    "atlas"}. Batches give what single scans give.
    """

    model: Any
    processor: Any
    tokenizer: Any

    _load_processor = True
    _load_tokenizer = False
    _load_feature_extractor = False
    _load_image_processor = False
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=256)

    def _sanitize_parameters(self, choices: Sequence[str] | None = None, **kwargs: Any) -> tuple[dict, dict, dict]:
        """Options of the scan go to the processor, all others to `generate`."""
        scan = {name: kwargs.pop(name) for name in SCAN_OPTIONS if name in kwargs}
        if choices is None:
            return scan, {"generate_kwargs": kwargs} if kwargs else {}, {}
        if kwargs:
            raise ValueError(f"expected no options of generation beside choices, got {', '.join(kwargs)}")
        return scan, {"choices": list(choices)}, {}

    def __call__(self, fmri: Any, question: str | Sequence[str] | None = None, **kwargs: Any) -> Any:
        """
        Args:
            fmri: one scan, or many: a list, a dataset whose rows are scans, or a generator; or, without `question`,
                items {"fmri": scan, "question": text} in these forms.
            question: one for all scans, or a list of as many.
            choices: allowed answers. With them the answer is the likeliest one.
            tr, atlas, label_image, window: of the scans, as the processor takes them; one window is read, the
                first unless given.
            batch_size, num_workers: of the loop over many scans.
            kwargs: options of `generate`.

        Returns:
            {"answer": text} or, with choices, {"answer": choice, "probabilities": {choice: probability}}; a list of
            these for a list, an iterator for a dataset or a generator.
        """
        listed, indexed = isinstance(fmri, list | tuple), hasattr(fmri, "__len__") and hasattr(fmri, "__getitem__")
        many = listed or is_many(fmri)
        if question is None:
            # the base class knows datasets of torch and generators
            known = not many or listed or isinstance(fmri, Dataset)
            return super().__call__(fmri if known else (item for item in fmri), **kwargs)
        if not many:
            return super().__call__({"fmri": fmri, "question": question}, **kwargs)
        if not indexed:
            if not isinstance(question, str):
                raise ValueError(f"expected one question for scans of unknown number, got {question}")
            return super().__call__(({"fmri": scan, "question": question} for scan in fmri), **kwargs)
        questions: Any = [question] * len(fmri) if isinstance(question, str) else list(question)
        if not len(fmri) or len(questions) != len(fmri):
            raise ValueError(f"expected as many questions as scans, got {len(questions)} for {len(fmri)} scans")
        items: Any = StackDataset(fmri=fmri, question=questions)
        return super().__call__([items[row] for row in range(len(items))] if listed else items, **kwargs)

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict,
        forward_params: dict,
        postprocess_params: dict,
    ) -> Iterator[dict]:
        # the library's own batches know no scans of differing sizes: the processor pads them
        dataset = (PipelineDataset if isinstance(inputs, Sized) else PipelineIterator)(inputs, self.preprocess, {})
        if not isinstance(inputs, Sized):
            # each worker would go through all of them
            num_workers = min(num_workers, 1)
        collate = partial(self.collate, **preprocess_params)
        for batch in DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=collate):
            answers: Any = self.forward(batch, **forward_params)
            yield from answers

    def run_single(self, inputs: dict, *params: dict) -> dict:
        return next(self.get_iterator([inputs], 0, 1, *params))

    def preprocess(self, inputs: dict) -> list[dict]:
        """The chat of a scan and its question."""
        if not isinstance(inputs, dict) or not {"fmri", "question"} <= inputs.keys():
            raise ValueError(f"expected a scan with a question, got {type(inputs).__name__} without a question")
        content = [{"type": "fmri", "fmri": inputs["fmri"]}, {"type": "text", "text": inputs["question"]}]
        return [{"role": "user", "content": content}]

    def collate(self, chats: list[list[dict]], **options: Any) -> dict[str, Any]:
        """Model inputs of a batch of chats, padded on the left, and the chats' questions."""
        options |= {"add_generation_prompt": True, "padding_side": "left"}
        questions = [chat[-1]["content"][-1]["text"] for chat in chats]
        return {**self.processor.apply_chat_template(chats, **options), "questions": questions}

    def _forward(
        self, batch: dict[str, Any], choices: list[str] | None = None, generate_kwargs: dict | None = None
    ) -> list[dict]:
        questions = batch.pop("questions")
        processor: Any = self.processor
        if choices is not None:
            scores = score_rows(self.model, batch, [processor.encode_choices(choices, each) for each in questions])
            return [likeliest(self.model, row, each, choices) for row, each in zip(scores, questions, strict=True)]
        ids = self.model.generate(**batch, **self._prepare_generate_kwargs(generate_kwargs or {}))
        new = ids[:, batch["input_ids"].shape[1] :]
        return [{"answer": text} for text in processor.decode_answers(new)]

    def postprocess(self, outputs: dict) -> dict:
        """Nothing is left to do."""
        return outputs


__all__ = ["CUSTOM_PIPELINES", "FmriLMPipeline"]
