"""FmriLMProcessor: scans and text, or a chat that holds scans -> the inputs of the language model."""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AddedToken, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils.chat_template_utils import mark_control_tokens


FMRI_START = "<|fmri_start|>"
FMRI_PAD = "<|fmri_pad|>"
FMRI_SUMMARY = "<|fmri_summary|>"
FMRI_END = "<|fmri_end|>"
FMRI_TOKENS = (FMRI_START, FMRI_PAD, FMRI_SUMMARY, FMRI_END)

# of a sentence
ENDS = (".", "!", "?")

# one scan: a whole block, expanded already or not, or a bare pad token
_SCAN = re.compile(
    f"{re.escape(FMRI_START)}(?:{re.escape(FMRI_PAD)})+(?:{re.escape(FMRI_SUMMARY)})*{re.escape(FMRI_END)}"
    f"|{re.escape(FMRI_PAD)}"
)
_TEXT_KEYS = ("input_ids", "attention_mask", "assistant_masks")
_FEATURE_OPTIONS = ("tr", "atlas", "label_image", "window", "return_windows")
_TOKENIZER_OPTIONS = (
    "padding",
    "padding_side",
    "truncation",
    "max_length",
    "return_tensors",
    "sanitize_control_tokens",
)

# What the assistant has to produce, end token included, is between the generation tags, which TRL looks for.
_MESSAGES = """\
{%- for message in messages -%}
    {{- start + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + end -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] + end -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- start + 'assistant\\n' -}}
{%- endif -%}
"""
CHAT_TEMPLATE = "{%- set start, end = '<|im_start|>', '<|im_end|>' -%}\n" + _MESSAGES
# for tokenizers that know no chat: their own end of a text ends each message
PLAIN_CHAT_TEMPLATE = "{%- set start, end = '### ', eos_token -%}\n" + _MESSAGES
CHAT_END = "<|im_end|>"


def add_fmri_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Add the special tokens that a scan is written with; returns how many were new."""
    return tokenizer.add_special_tokens(
        {"extra_special_tokens": list(FMRI_TOKENS)}, replace_extra_special_tokens=False
    )


def add_name_tokens(tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> list[tuple[int, int]]:
    """
    Add tokens of what descriptors are called, each alone and with "is" behind it, so that a language model that looks
    for a name has one token to compare; returns the ids of both.
    """
    texts = [text for name in names for text in (f" {name}", f" {name} is")]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in texts])
    ids: Any = tokenizer.convert_tokens_to_ids(texts)
    return list(zip(ids[::2], ids[1::2], strict=True))


def _asks(known: dict[str, Any], question: str, answers: Sequence[str]) -> bool:
    """
    Whether a question with these answers is about a label of `answer_sentences`: it is one of its questions, or names
    all of its answers, unless these are yes and no, which are answers to anything.
    """
    if question in known["questions"]:
        return not known["choices"] or set(answers) <= set(known["choices"])
    named = all(re.search(rf"\b{re.escape(answer)}\b", question) for answer in answers)
    return named and set(answers) == set(known["choices"]) and not {"yes", "no"} & set(answers)


class FmriLMProcessor(ProcessorMixin):
    """Joins a feature extractor and a tokenizer.

    A scan in the text is a start token, `patches * tokens_per_patch` pad tokens, `summary_tokens` summary
    tokens and an end token.

    Args:
        feature_extractor: an FmriLMFeatureExtractor.
        tokenizer: any tokenizer; the fMRI tokens are added to it if it lacks them.
        tokens_per_patch: latent tokens the codec makes of one patch of a scan.
        summary_tokens: tokens that carry the summary of a scan.
        level_words: answers that are said in a sentence where a question names a descriptor (see `answer_texts`).
        answer_sentences: of labels, what answers are called in a sentence, the answers (none of a number) and the
            questions: [{"name": str, "choices": [...], "questions": [...]}].
        chat_template: Jinja template of messages whose content is a string. Unless given: ChatML for a tokenizer that
            knows its end token, else the tokenizer's own template, else one whose end token is the tokenizer's.
    """

    def __init__(
        self,
        feature_extractor: Any,
        tokenizer: PreTrainedTokenizerBase,
        tokens_per_patch: int = 8,
        summary_tokens: int = 8,
        level_words: Iterable[str] = (),
        answer_sentences: Iterable[dict[str, Any]] = (),
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        if tokens_per_patch < 1 or summary_tokens < 0:
            raise ValueError(
                f"expected tokens_per_patch >= 1 and summary_tokens >= 0, got {tokens_per_patch} and {summary_tokens}"
            )
        chat_template = _chat_template(tokenizer) if chat_template is None else chat_template
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template, **kwargs)
        self.tokens_per_patch = tokens_per_patch
        self.summary_tokens = summary_tokens
        self.level_words: list[str] = list(level_words)
        self.answer_sentences: list[dict[str, Any]] = list(answer_sentences)
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
        """A scan of that many latent tokens in a text."""
        return FMRI_START + FMRI_PAD * tokens + FMRI_SUMMARY * self.summary_tokens + FMRI_END

    def decode_answers(self, ids: Any) -> list[str]:
        """Texts of generated ids [batch, tokens] without special tokens; no text has a sentence twice."""
        return [
            "".join(without_repeats([text])) for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        ]

    @property
    def fmri_token_id(self) -> int:
        """Id of the pad token in whose place the model puts a scan's embeddings."""
        return self.tokenizer.convert_tokens_to_ids(FMRI_PAD)

    @property
    def eos_token_ids(self) -> list[int]:
        """Ids at which generation of an answer ends: what the chat template writes behind one, and the end of text."""
        text = self._render([{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}])
        ids = self.tokenizer(text.rpartition("answer")[2].strip(), add_special_tokens=False)["input_ids"]
        if not ids or ids[0] not in self.tokenizer.added_tokens_decoder:
            raise ValueError(f"expected a chat template that ends an answer with a special token, got {text!r}")
        end_of_text = self.tokenizer.eos_token_id
        return list(dict.fromkeys([ids[0], *([] if end_of_text is None else [end_of_text])]))

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
        return_tensors: str | None = "pt",
        return_windows: bool = False,
        padding: bool | str = True,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare texts with placeholders, and the scans these stand for.

        Args:
            text: one or several texts; each scan as `<|fmri_start|><|fmri_pad|><|fmri_end|>` or `<|fmri_pad|>`.
            fmri: one scan or a flat list, in the order of their placeholders over all texts.
            images, videos, audio: not taken; generic callers pass them as None.
            tr, atlas, label_image, window, return_windows: as in the feature extractor.
            kwargs: options of the tokenizer, such as `padding_side`.

        Returns:
            `input_ids` and `attention_mask` [batch, tokens]; with scans also `fmri_values` and `fmri_mask`
            [scans, rois, time] and `roi_coordinates` [scans, rois, 3]; on demand `windows`, which is no model input.
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
            return_tensors=return_tensors,
            return_windows=return_windows,
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
        sanitize_control_tokens: bool = False,
        tr: float | None = None,
        atlas: Any = None,
        label_image: Any = None,
        window: str | None = None,
        return_windows: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Write one conversation or a batch of them as model inputs.

        A block `{"type": "fmri", "fmri": scan}` holds a scan, and may hold its "tr" and "atlas". A block with
        "tokens" and no scan stands for codes made before, and adds no `fmri_values`. The conversations are not
        changed.

        Args:
            return_assistant_tokens_mask: add `assistant_masks`, 1 on the assistant's messages and their end tokens.
            tr, atlas, label_image, window, return_windows: as in the feature extractor, for all scans.
            padding_side: "left" or "right"; the tokenizer's own unless given.
            sanitize_control_tokens: read special tokens that stand in a message as plain text.
            processor_kwargs: any of the options above, in the form in which pipelines pass them.
            kwargs: `truncation` and `max_length` of the tokenizer, and variables of the template.

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
            "return_windows": return_windows,
            "padding": padding,
            "padding_side": padding_side,
            "return_tensors": return_tensors,
            "sanitize_control_tokens": sanitize_control_tokens,
            **kwargs,
            **(processor_kwargs or {}),
        }
        feature_options = {name: options.pop(name) for name in _FEATURE_OPTIONS}
        tokenizer_options = {name: options.pop(name) for name in _TOKENIZER_OPTIONS if name in options}
        return_tensors, sanitize = tokenizer_options["return_tensors"], tokenizer_options["sanitize_control_tokens"]

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
        if sanitize and return_assistant_tokens_mask:
            raise ValueError("sanitize_control_tokens and return_assistant_tokens_mask exclude each other")

        known = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        special = re.compile("|".join(map(re.escape, sorted(known, reverse=True))))
        for item in conversations:
            for message in item:
                message["content"] = self._content_text(message["content"], special if sanitize else None)
        options |= {"chat_template": chat_template}
        texts = [self._render(item, add_generation_prompt, **options) for item in conversations]
        if not tokenize:
            return texts if batched else texts[0]
        in_rows = batched or return_tensors is not None
        encoding = self.tokenizer(
            texts if in_rows else texts[0],
            # templates write those of their own
            add_special_tokens=False,
            return_offsets_mapping=return_assistant_tokens_mask,
            **tokenizer_options,
        )
        if return_assistant_tokens_mask:
            offsets = encoding.pop("offset_mapping")
            rows = zip(offsets if in_rows else [offsets], conversations, texts, strict=True)
            masks = [_mask(row, self._answers(item, text, **options)) for row, item, text in rows]
            encoding["assistant_masks"] = masks if in_rows else masks[0]
            encoding.convert_to_tensors(return_tensors)
        inputs = self._join(encoding, features, sum(block["tokens"] for block in blocks))
        return inputs if return_dict else inputs["input_ids"]

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False, **options: Any) -> str:
        """A chat whose contents are strings, as text."""
        if options.get("chat_template") is None:
            options["chat_template"] = self.chat_template
        text: Any = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )
        return text

    def _answers(self, messages: list[dict[str, Any]], text: str, **options: Any) -> list[tuple[int, int]]:
        """First and one-past-last character of each assistant's message in the text of the chat, its end included."""
        spans = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._render(messages[:number], add_generation_prompt=True, **options) if number else ""
                through = self._render(messages[: number + 1], **options)
                if not before or not text.startswith(through) or not through.startswith(before):
                    raise ValueError(
                        "where do the assistant's messages lie? Expected a chat that begins with a user's, and a chat "
                        "template that writes a message alike whatever follows it; give chat_template=CHAT_TEMPLATE"
                    )
                spans.append((len(before), len(through.rstrip())))
        return spans

    def encode_choices(self, choices: Sequence[str], question: str | None = None) -> list[list[int]]:
        """
        Token ids of each allowed answer, without special tokens, as `answer_texts` writes it; no answer may begin with
        another one.
        """
        if len(choices) < 2:
            raise ValueError(f"expected at least 2 choices, got {len(choices)}: {choices}")
        if not all(choice.strip() for choice in choices):
            raise ValueError(f"expected choices that are not empty, got {choices}")
        if len(set(choices)) < len(choices):
            raise ValueError(f"expected {len(choices)} different choices, got {choices}")
        texts = self.answer_texts(choices, question)
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        for (choice, short), (other, long) in permutations(zip(choices, ids, strict=True), 2):
            # the shorter one would always win: its probability contains the longer one's
            if long[: len(short)] == short:
                raise ValueError(f"the tokens of choice {choice!r} begin those of {other!r}: {short} and {long}")
        return ids

    def answer_texts(self, answers: Sequence[str], question: str | None) -> list[str]:
        """
        Answers as they were given in training: a level of a descriptor that the question names, or an answer to a
        question about a label (one of the task's, or one that names the answers), as "The sex is female."; others as
        they are.
        """
        name = None
        if question and set(answers) <= set(self.level_words):
            name = self._named_in(question)
        if question and name is None:
            name = next((f" {one['name']}" for one in self.answer_sentences if _asks(one, question, answers)), None)
        return list(answers) if name is None else [f"The{name} is {answer}." for answer in answers]

    def _named_in(self, question: str) -> str | None:
        """The one name in a question that is a token (see `add_name_tokens`); None without one, or of several."""
        known = self.tokenizer.added_tokens_encoder
        ids = self.tokenizer(question, add_special_tokens=False)["input_ids"]
        names = {str(token) for token in map(self.tokenizer.added_tokens_decoder.get, ids) if token is not None}
        names = {name for name in names if f"{name} is" in known}
        return names.pop() if len(names) == 1 else None

    def _content_text(self, content: Any, special: re.Pattern | None) -> str:
        """A message's content as text, scans written out, special tokens in the text of the user marked as text."""
        texts = []
        for block in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            if block["type"] == "fmri":
                # without a number of tokens, one is the placeholder of all
                texts.append(self.scan_text(block.get("tokens") or 1))
            elif block["type"] == "text":
                # none beside calls of tools
                text = block["text"] or ""
                texts.append(text if special is None else mark_control_tokens(text, special))
            else:
                raise ValueError(f"expected a block of type text or fmri, got {block['type']}")
        return "".join(texts)

    def _extract(self, scans: list[Any], window: str | None, **options: Any) -> tuple[dict[str, Any], list[int]]:
        """Features of the scans, and the number of tokens of each."""
        if not scans:
            return {}, []
        if (window or self.feature_extractor.window) == "sliding":
            raise ValueError("a scan in a text is one window: expected 'first' or 'full', got 'sliding'")
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


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template of a tokenizer's chats, one whose end of an answer is a token."""
    if CHAT_END not in tokenizer.get_vocab():
        if tokenizer.chat_template is not None:
            return tokenizer.get_chat_template()
        if tokenizer.eos_token is not None:
            return PLAIN_CHAT_TEMPLATE
        tokenizer.add_special_tokens({"eos_token": CHAT_END})
    return CHAT_TEMPLATE


def _mask(offsets: Any, spans: list[tuple[int, int]]) -> list[int]:
    """1 for each token, given its first and one-past-last character, that lies in a span of characters."""
    first, last = np.asarray(offsets).T
    inside = [(first >= start) & (last <= stop) & (first < last) for start, stop in spans]
    return np.any([np.zeros(len(first), bool), *inside], axis=0).astype(int).tolist()


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


def without_repeats(pieces: Iterable[str]) -> Iterator[str]:
    """
    The pieces of a text without sentences that it has already had, which greedy generation falls into. What may become
    such a sentence waits until it is another one.
    """
    said: set[str] = set()
    sentence, shown = "", 0
    for piece in pieces:
        out = ""
        for letter in piece:
            # not at the point within a number
            if letter.isspace() and sentence.endswith(ENDS):
                if sentence.strip() not in said:
                    out += sentence[shown:]
                    said.add(sentence.strip())
                sentence, shown = "", 0
            sentence += letter
            if not any(known.startswith(sentence.strip()) for known in said):
                out += sentence[shown:]
                shown = len(sentence)
        if out:
            yield out
    whole = sentence.endswith(ENDS) and sentence.strip() not in said
    if sentence[shown:] and (whole or not sentence.strip()):
        yield sentence[shown:]


def _fmri_blocks(conversation: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    for message in conversation:
        if isinstance(message["content"], list):
            yield from (block for block in message["content"] if block.get("type") == "fmri")


def _refuse_typed(texts: Iterable[str | None]) -> None:
    for text in texts:
        for token in FMRI_TOKENS:
            if text is not None and token in text:
                raise ValueError(
                    f"typed placeholder: {token} is in the text by itself; in a chat, scans go into blocks "
                    '{"type": "fmri", "fmri": scan}, elsewhere one placeholder block stands for each scan'
                )


# every save ships the code, so that a downloaded folder loads where this package is not installed
FmriLMProcessor.register_for_auto_class("AutoProcessor")
