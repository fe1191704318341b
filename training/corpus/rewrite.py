"""Other wordings of descriptions from a local language model, checked fact by fact."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fmrilm.processors.descriptors.paraphrase import differences
from fmrilm.processors.descriptors.text import Statement, parse


PROMPT = """Rewrite the text in other words. Keep every number with its sign, every network and every level as they \
are. Add nothing, and answer with the rewritten text alone.

Text: Signal amplitude of the control network is somewhat reduced (z = -1.31).
Rewritten text: The control network shows a somewhat reduced signal amplitude, with a z-score of -1.31.

Text: {text}
Rewritten text:"""
# texts that are rewritten at a time
BATCH = 8


@dataclass(frozen=True)
class Rewrite:
    """
    text: the rewrite where it says the same, otherwise the text as it was. answer: what the model wrote.
    problems: why that was refused; empty if it was not.
    """

    text: str
    answer: str
    problems: list[str]


def rewrite(
    texts: Sequence[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    temperature: float = 0.7,
    seed: int = 0,
) -> list[Rewrite]:
    """
    One rewrite of each text, which consists of statements with z-scores. temperature: of sampling; 0 takes the
    likeliest token.
    """
    statements = [_statements(text) for text in texts]
    torch.manual_seed(seed)
    # texts of one length together, so that little is padding
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    rewrites: dict[int, Rewrite] = {}
    with tqdm(total=len(texts), desc="rewrites", unit="text") as progress:
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            answers = _answers([texts[row] for row in rows], model, tokenizer, temperature)
            for row, answer in zip(rows, answers, strict=True):
                problems = differences(statements[row], answer)
                rewrites[row] = Rewrite(texts[row] if problems else answer, answer, problems)
            progress.update(len(rows))
    return [rewrites[row] for row in range(len(texts))]


def _statements(text: str) -> list[Statement]:
    statements = parse(text)
    if not statements or differences(statements, text):
        raise ValueError(f"expected a text of statements with z-scores and nothing else, got {text!r}")
    return statements


@torch.no_grad()
def _answers(
    texts: Sequence[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, temperature: float
) -> list[str]:
    prompts: Any = [PROMPT.format(text=text) for text in texts]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is not None:
        chats = [[{"role": "user", "content": content}] for content in prompts]
        # models that can think aloud are not to
        options: Any = {"add_generation_prompt": True, "tokenize": False, "enable_thinking": False}
        prompts = tokenizer.apply_chat_template(chats, **options)
    inputs = tokenizer(
        prompts,
        padding=True,
        # what is generated has to follow the prompt at once
        padding_side="left",
        # a chat template writes its special tokens itself
        add_special_tokens=tokenizer.chat_template is None,
        return_tensors="pt",
    ).to(model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    generate: Any = model.generate
    generated = generate(
        **inputs,
        **sampling,
        # what says the same takes about as many tokens
        max_new_tokens=8 + 3 * max(map(len, tokenizer(list(texts))["input_ids"])) // 2,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers = tokenizer.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    # one paragraph: models without a chat go on with another text
    return [answer.strip().partition("\n\n")[0] for answer in answers]
