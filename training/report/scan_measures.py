"""What a model makes of one scan, as numbers: its window and codes, surprise by network, what an answer rests on."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .scan_figures import ScanView


def read_scan(
    reader: Any, scan: Any, tr: float | None = None, atlas: Any = None, label_image: Any = None
) -> dict[str, Any]:
    """
    A scan as it was measured, read once: {"signal" [time, rois], "tr" (s), "atlas" (an Atlas), "confounds",
    "censored"}, itself a scan for `reader` (see `fmrilm.load`) that gives the same results. It is what the functions
    below take.
    """
    return dict(vars(reader.processor.feature_extractor.read_signal(scan, tr, atlas, label_image)))


def view_scan(reader: Any, scan: dict[str, Any], window: str | None = None) -> ScanView:
    """The window of a scan that `reader` reads and what the codec keeps of it; ValueError for one without codes."""
    return ScanView(
        signal=reader.signal(scan, window=window),
        reconstruction=reader.reconstruct(scan, window=window),
        repetition_time=reader.processor.feature_extractor.repetition_time,
        networks=scan["atlas"].networks,
        codes=reader.tokenize(scan, window=window),
    )


def code_places(reader: Any, codes: np.ndarray) -> np.ndarray:
    """
    Where codes [...] lie among all, in 0..1: the rank of each codebook vector along the codebook's first principal
    component, so that codes of like vectors have like places.
    """
    codec = reader.model.model.codec
    every = torch.arange(codec.config.codebook_size, device=codec.device)
    with torch.no_grad():
        vectors = codec.embed_codes(every).float()
    vectors = vectors - vectors.mean(0)
    component = torch.linalg.eigh(vectors.T @ vectors).eigenvectors[:, -1]
    ranks = (vectors @ component).argsort().argsort().cpu().numpy()
    return ranks[codes] / max(len(every) - 1, 1)


@torch.no_grad()
def network_surprise(
    reader: Any, scan: dict[str, Any], window: str | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """
    How unexpected each step of a scan is, [steps] in nats a code, NaN for the first; and how much of that goes with
    each network, [steps] by network: the surprise less the one of the same scan in which the network's ROIs keep to
    their mean (occlusion: Zeiler and Fergus 2014, arXiv 1311.2901). Positive: the step is less expected for what this
    network does.
    """
    networks = np.array(scan["atlas"].networks)
    names = list(dict.fromkeys(networks.tolist()))
    features = reader.processor.feature_extractor([scan], window=window).to(reader.model.device)
    # z-scores: a ROI's mean is close to zero
    kept = torch.tensor(np.stack([np.ones(len(networks), bool), *(networks != name for name in names)]))
    values = features["fmri_values"] * kept[..., None].to(reader.model.device)
    rows = [features[name].expand(len(kept), -1, -1) for name in ("roi_coordinates", "fmri_mask")]
    surprise = reader.model.surprise(reader.model.model.get_fmri_codes(values, *rows)).float().cpu().numpy()
    return surprise[0], {name: surprise[0] - without for name, without in zip(names, surprise[1:], strict=True)}


def token_contributions(
    reader: Any,
    scan: dict[str, Any],
    question: str,
    answer: str,
    choices: Sequence[str] | None = None,
    window: str | None = None,
) -> np.ndarray:
    """
    How far each token of a scan, [steps, slots], carries an answer, in nats: gradient times input (Shrikumar et al.
    2016, arXiv 1605.01713). The gradient is that of the answer's log-probability, with `choices` of its probability
    among them, by the token's embedding, and by its code's vector for what the sheet tells of it. To first order, a
    token taken down by one percent takes one percent of its contribution from the log-probability.
    """
    model, processor = reader.model, reader.processor
    content = [{"type": "fmri", "fmri": scan}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, window=window).to(model.device)
    if choices is None:
        answers, chosen = [processor.tokenizer(answer, add_special_tokens=False)["input_ids"]], 0
    else:
        answers, chosen = processor.encode_choices(list(choices)), list(choices).index(answer)
    ids = inputs.pop("input_ids")
    del inputs["attention_mask"]
    vectors, valid = model.model.scan_vectors(model.model.read_scans(**inputs))
    vectors = vectors.masked_fill(~valid[..., None], float("nan")).requires_grad_(True)
    with torch.enable_grad():
        prompt = model.model.embed(ids, vectors)
        scores = _log_likelihoods(model, ids, prompt, answers)
        target = scores[0] if choices is None else scores.log_softmax(0)[chosen]
        (gradient,) = torch.autograd.grad(target, prompt, retain_graph=True)
        # what a token says by way of the sheet behind the scan
        on_sheet = torch.isin(ids, ids.new_tensor(model.config.descriptor_token_ids or []))[..., None]
        (by_sheet,) = torch.autograd.grad(prompt, vectors, gradient * on_sheet)
    contributions = (gradient * prompt.detach()).float().sum(-1)[ids == processor.fmri_token_id]
    contributions = contributions + (by_sheet * vectors.detach()).float().sum(-1)[valid]
    return contributions.cpu().numpy().reshape(-1, processor.tokens_per_step)


def _log_likelihoods(model: Any, ids: torch.Tensor, prompt: torch.Tensor, answers: list[list[int]]) -> torch.Tensor:
    """Log-likelihood [answers] of each answer (token ids) after a prompt: ids [1, length], embeddings of these."""
    count, longest = len(answers), max(map(len, answers))
    following = ids.new_zeros(count, longest)
    scored = torch.zeros_like(following, dtype=torch.bool)
    for row, answer in enumerate(answers):
        following[row, : len(answer)] = torch.tensor(answer)
        scored[row, : len(answer)] = True
    steps = F.pad(model.model.step_ids(ids).expand(count, -1), (0, longest - 1))
    words = model.get_input_embeddings()(following[:, :-1])
    hidden = model.model(
        inputs_embeds=torch.cat([prompt.expand(count, -1, -1), words], 1), mm_token_type_ids=steps
    ).last_hidden_state
    logits = model.lm_head(hidden[:, -longest:]).float().log_softmax(-1)
    return (logits.gather(-1, following[..., None])[..., 0] * scored).sum(-1)
