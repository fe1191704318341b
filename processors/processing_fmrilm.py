"""FmriLMProcessor: scans and text, or a chat that holds scans -> the inputs of the language model."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin


FMRI_START = "<|fmri_start|>"
FMRI_PAD = "<|fmri_pad|>"
FMRI_SUMMARY = "<|fmri_summary|>"
FMRI_END = "<|fmri_end|>"
FMRI_TOKENS = (FMRI_START, FMRI_PAD, FMRI_SUMMARY, FMRI_END)

# one scan: a whole block, expanded already or not, or a bare pad token
_SCAN = re.compile(
    f"{re.escape(FMRI_START)}(?:{re.escape(FMRI_PAD)})+(?:{re.escape(FMRI_SUMMARY)})*{re.escape(FMRI_END)}"
    f"|{re.escape(FMRI_PAD)}"
)
_TEXT_KEYS = ("input_ids", "attention_mask", "assistant_masks")
_FEATURE_OPTIONS = ("tr", "atlas", "label_image", "window", "generator")

# ChatML. What the assistant has to produce, closing token included, stands between the generation tags.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def add_fmri_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Add the special tokens that a scan is written with; returns how many were new."""
    return tokenizer.add_special_tokens(
        {"extra_special_tokens": list(FMRI_TOKENS)}, replace_extra_special_tokens=False
    )


class FmriLMProcessor(ProcessorMixin):
    """Joins a feature extractor and a tokenizer.

    A scan stands in the text as a start token, `patches * tokens_per_patch` pad tokens, `summary_tokens` summary
    tokens and an end token.

    Args:
        feature_extractor: an FmriLMFeatureExtractor.
        tokenizer: any tokenizer; the fMRI tokens are added to it if it lacks them.
        tokens_per_patch: latent tokens the codec makes of one patch of a scan.
        summary_tokens: tokens that carry the summary of a scan.
        chat_template: Jinja template of messages whose content is a string; ChatML unless given.
    """

    def __init__(
        self,
        feature_extractor: Any,
        tokenizer: PreTrainedTokenizerBase,
        tokens_per_patch: int = 16,
        summary_tokens: int = 8,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        if tokens_per_patch < 1 or summary_tokens < 0:
            raise ValueError(
                f"expected tokens_per_patch >= 1 and summary_tokens >= 0, got {tokens_per_patch} and {summary_tokens}"
            )
        chat_template = CHAT_TEMPLATE if chat_template is None else chat_template
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template, **kwargs)
        self.tokens_per_patch = tokens_per_patch
        self.summary_tokens = summary_tokens
        add_fmri_tokens(tokenizer)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        files = super().save_pretrained(save_directory) + self.feature_extractor.save_parcels(save_directory)
        if push_to_hub:
            # the base class would upload before the parcels are there
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return files

    def scan_text(self, tokens: int) -> str:
        """A scan of that many latent tokens as it stands in a text."""
        return FMRI_START + FMRI_PAD * tokens + FMRI_SUMMARY * self.summary_tokens + FMRI_END

    @property
    def fmri_token_id(self) -> int:
        """Id of the pad token in whose place the model puts a scan's embeddings."""
        return self.tokenizer.convert_tokens_to_ids(FMRI_PAD)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", *self.feature_extractor.model_input_names]

    def __call__(
        self,
        text: str | list[str] | None = None,
        fmri: Any = None,
        images: None = None,
        videos: None = None,
        audio: None = None,
        tr: float | None = None,
        atlas: Any = None,
        label_image: Any = None,
        window: str | None = None,
        generator: np.random.Generator | None = None,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare texts with placeholders, and the scans these stand for.

        Args:
            text: one or several texts; each scan as `<|fmri_start|><|fmri_pad|><|fmri_end|>` or `<|fmri_pad|>`.
            fmri: one scan or a flat list, in the order of their placeholders over all texts.
            images, videos, audio: not taken; generic callers pass them as None.
            tr, atlas, label_image, window, generator: as in the feature extractor.
            kwargs: options of the tokenizer, such as `padding_side`.

        Returns:
            `input_ids` and `attention_mask` [batch, tokens]; with scans also `fmri_values` and `fmri_mask`
            [scans, rois, time] and `roi_coordinates` [scans, rois, 3].
        """
        if images is not None or videos is not None or audio is not None:
            raise ValueError("expected text and fmri, got images, videos or audio")
        if text is None:
            raise ValueError("expected a text with one placeholder per scan, got None")
        texts = [text] if isinstance(text, str) else list(text)
        scans = [] if fmri is None else list(fmri) if isinstance(fmri, (list, tuple)) else [fmri]
        placeholders = sum(len(_SCAN.findall(item)) for item in texts)
        if placeholders != len(scans):
            raise ValueError(
                f"expected one placeholder {FMRI_START}{FMRI_PAD}{FMRI_END} per scan, "
                f"got {placeholders} in the text for {len(scans)} scans"
            )
        _refuse_typed(_SCAN.sub(" ", item) for item in texts)

        features, tokens = self._extract(
            scans,
            tr=tr,
            atlas=atlas,
            label_image=label_image,
            window=window,
            generator=generator,
            return_tensors=return_tensors,
        )
        remaining = iter(tokens)
        texts = [_SCAN.sub(lambda _: self.scan_text(next(remaining)), item) for item in texts]
        encoding = self.tokenizer(
            texts[0] if isinstance(text, str) and return_tensors is None else texts,
            padding=padding,
            return_tensors=return_tensors,
            **kwargs,
        )
        return self._join(encoding, features, sum(tokens))

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
        return_tensors: str | None = "pt",
        return_assistant_tokens_mask: bool = False,
        padding: bool | str = True,
        padding_side: str | None = None,
        tr: float | None = None,
        atlas: Any = None,
        label_image: Any = None,
        window: str | None = None,
        generator: np.random.Generator | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Write one conversation or a batch of them as model inputs.

        A block `{"type": "fmri", "fmri": scan}` holds a scan, and may hold its "tr" and "atlas". A block with
        "tokens" and no scan stands for codes made before, and adds no `fmri_values`. The conversations are not
        changed.

        Args:
            return_assistant_tokens_mask: add `assistant_masks`, 1 where the assistant speaks.
            tr, atlas, label_image, window, generator: as in the feature extractor, for all scans.
            padding_side: "left" or "right"; the tokenizer's own unless given.
            processor_kwargs: any of the options above, in the form in which pipelines pass them.
            kwargs: further options of the tokenizer's method of the same name, and variables of the template.

        Returns:
            As `__call__`; without `return_dict` the ids, without `tokenize` the text, placeholders written out.
        """
        if not conversation or not conversation[0]:
            raise ValueError("expected a conversation of at least one message, got an empty one")
        options = {
            "tr": tr,
            "atlas": atlas,
            "label_image": label_image,
            "window": window,
            "generator": generator,
            "padding": padding,
            "padding_side": padding_side,
            "return_tensors": return_tensors,
            **kwargs,
            **(processor_kwargs or {}),
        }
        feature_options = {name: options.pop(name) for name in _FEATURE_OPTIONS}
        return_tensors, padding_side = options["return_tensors"], options.pop("padding_side")

        batched = isinstance(conversation[0], (list, tuple))
        listed: Any = conversation if batched else [conversation]
        conversations = [_copied(item) for item in listed]
        blocks = [block for item in conversations for block in _fmri_blocks(item)]
        with_scan = [block for block in blocks if block.get("fmri") is not None]
        scans = [
            {"signal": block.pop("fmri"), "tr": block.pop("tr", None), "atlas": block.pop("atlas", None)}
            for block in with_scan
        ]
        features, tokens = self._extract(scans, return_tensors=return_tensors, **feature_options)
        for block, count in zip(with_scan, tokens, strict=True):
            block["tokens"] = count
        for block in blocks:
            count = block.get("tokens")
            # without a scan, the text may still be written: its placeholder waits for the scan
            if tokenize and not (isinstance(count, int) and count > 0):
                raise ValueError(f"an fmri block needs a scan under 'fmri', or 'tokens' > 0; got {block}")
        for item in conversations:
            for message in item:
                message["content"] = self._content_text(message["content"])

        rendered = self.tokenizer.apply_chat_template(
            conversations if batched or tokenize and return_tensors is not None else conversations[0],
            chat_template=self.chat_template if chat_template is None else chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=tokenize,
            return_dict=tokenize,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            tokenizer_kwargs=None if padding_side is None else {"padding_side": padding_side},
            **options,
        )
        if not tokenize:
            return rendered
        inputs = self._join(rendered, features, sum(block["tokens"] for block in blocks))
        return inputs if return_dict else inputs["input_ids"]

    def encode_choices(self, choices: list[str]) -> list[list[int]]:
        """Token ids of each allowed answer, without special tokens; no answer may begin with another one."""
        if len(choices) < 2:
            raise ValueError(f"expected at least 2 choices, got {len(choices)}: {choices}")
        if len(set(choices)) < len(choices):
            raise ValueError(f"expected {len(choices)} different choices, got {choices}")
        ids = [self.tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in choices]
        for i, short in enumerate(ids):
            for j, long in enumerate(ids):
                # the shorter one would always win: its probability contains the longer one's
                if i != j and long[: len(short)] == short:
                    raise ValueError(
                        f"the tokens of choice {choices[i]!r} begin those of {choices[j]!r}: {short} and {long}"
                    )
        return ids

    def _content_text(self, content: Any) -> str:
        """A message's content as text, scans written out; without a number of tokens, one stands for all."""
        if not isinstance(content, list):
            return content
        texts = []
        for block in content:
            if block["type"] not in ("text", "fmri"):
                raise ValueError(f"expected a block of type text or fmri, got {block['type']}")
            texts.append(block["text"] if block["type"] == "text" else self.scan_text(block.get("tokens") or 1))
        return "".join(texts)

    def _extract(self, scans: list[Any], window: str | None, **options: Any) -> tuple[dict[str, Any], list[int]]:
        """Features of the scans, and the number of tokens of each."""
        if not scans:
            return {}, []
        if (window or self.feature_extractor.window) == "sliding":
            raise ValueError("a scan in a text is one window: expected 'first', 'random' or 'full', got 'sliding'")
        features = self.feature_extractor(scans, window=window, **options)
        patches = self.feature_extractor.num_patches(features["fmri_mask"])
        return dict(features), [count * self.tokens_per_patch for count in patches]

    def _join(self, encoding: Any, features: dict[str, Any], expected: int) -> BatchFeature:
        ids = encoding["input_ids"]
        rows = ids if hasattr(ids, "shape") or ids and isinstance(ids[0], list) else [ids]
        found = sum(int((np.asarray(row) == self.fmri_token_id).sum()) for row in rows)
        if found != expected:
            raise ValueError(f"expected {expected} tokens {FMRI_PAD}, got {found}: was the text truncated in a scan?")
        return BatchFeature({**{key: encoding[key] for key in _TEXT_KEYS if key in encoding}, **features})


def _copied(conversation: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages and blocks copied, scans shared. Refuses fMRI tokens that are written in the text."""
    copies = []
    for message in conversation:
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            content = [dict(block) for block in content]
            _refuse_typed(block.get("text") for block in content if block.get("type") == "text")
        else:
            _refuse_typed([content])
        copies.append({**message, "content": content})
    return copies


def _fmri_blocks(conversation: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    for message in conversation:
        if isinstance(message["content"], list):
            yield from (block for block in message["content"] if block.get("type") == "fmri")


def _refuse_typed(texts: Iterable[str | None]) -> None:
    for text in texts:
        for token in FMRI_TOKENS:
            if text is not None and token in text:
                raise ValueError(
                    f"typed placeholder: {token} stands in the text by itself; in a chat, scans go into blocks "
                    '{"type": "fmri", "fmri": scan}, elsewhere one placeholder block stands for each scan'
                )


# every save ships the code, so that a downloaded folder loads where this package is not installed
FmriLMProcessor.register_for_auto_class("AutoProcessor")
