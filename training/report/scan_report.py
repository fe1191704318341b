"""The page about one scan: what the model reads in it, what the codec keeps of it, and what the answers rest on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from .page import as_number, drawing, write_page
from .scan_figures import ScanView, carpet, connectivity, forecast, glass_brain, network_name, token_map, traces


NLL_COLOUR = "#0b7fc7"
# forecasts that a band is made of
SAMPLES = 100


def write_scan_report(
    path: Path,
    reader: Any,
    scan: Any,
    questions: Mapping[str, Sequence[str] | None],
    title: str = "One scan",
    tr: float | None = None,
    atlas: Any = None,
    label_image: Any = None,
) -> None:
    """
    Writes the page to `path` in one move. It is about the first window of the scan.

    Args:
        reader: of `fmrilm.load`.
        scan: one scan, in any form the reader takes.
        questions: what to ask, each with its allowed answers; None for an answer in free text.
        title: what the page calls the scan.
        tr, atlas, label_image: of the scan, as the reader takes them.
    """
    # read once: a volume takes a while, and all that follows needs its ROIs alone
    scan = read_scan(reader, scan, tr, atlas, label_image)
    view = view_scan(reader, scan)
    answers, carried = {}, {}
    for text, choices in questions.items():
        answers[text] = reader.ask(scan, text, choices, window="first")
        carried[text] = token_contributions(reader, scan, text, answers[text]["answer"], choices)
    nll, networks = network_nll(reader, scan)
    ahead = forecast_last_patch(reader, scan)
    missing = int(np.isnan(view.signal).all(0).sum())
    frames, rois = scan["signal"].shape
    codec = reader.model.config.codec_config
    # what codes of the scan as a whole add to it is told by the scores
    patches, tokens, levels = view.codes[..., : codec.num_quantizers].shape
    places = token_places(reader, view.codes)
    seconds = view.seconds / patches
    drawings = (carpet(view), traces(view), connectivity(view))
    sections = [
        ("answers", "Answers", _answers(view, answers, carried)),
        ("codec", "From signal to codes and back", [{"figure": draw} for draw in drawings]),
        (
            "codes",
            "The codes",
            [
                {
                    "text": f"What the language model reads: {patches} patches of {seconds:.0f} s, {tokens} latent "
                    f"tokens each; a token has {levels} levels, one of "
                    f"{codec.codebook_size:,} codes each."
                },
                {
                    "figure": token_map(
                        "Latent tokens over time",
                        {"all levels": places},
                        view.seconds,
                        "rank",
                        "Each cell is one latent token. Tokens of like colour have like vectors: colour is the rank "
                        "along the first principal component of the scan's tokens.",
                    )
                },
            ],
        ),
        *([("forecast", "What comes next", [{"figure": forecast(view, *ahead)}])] if ahead else []),
        ("surprise", "Next-code NLL", _nll(view, nll, networks)),
        ("brain", "On the brain", _brain(view, scan["atlas"].coordinates)),
    ]
    write_page(
        path,
        title=f"fMRI-LM: {title}",
        kicker="fMRI-LM · report of a scan",
        heading=title,
        summary=[
            f"{frames} frames of {rois} ROIs ({scan['atlas'].name}{f', {missing} missing' if missing else ''}), one "
            f"each {as_number(scan['tr'], 'g')} s. What follows is about the window that the model read, at "
            f"{as_number(view.repetition_time, 'g')} s a frame and in robust z-scores of each ROI."
        ],
        verdict=None,
        tiles=[
            ("Read of the scan", f"{view.seconds:.0f} s", f"of {frames * scan['tr']:.0f} s measured"),
            (
                "Codes",
                as_number(patches * tokens * levels, ","),
                f"{tokens} tokens of {levels} levels in {patches} patches",
            ),
            ("FC kept by the codes", as_number(view.connectivity_similarity), "correlation over pairs of ROIs"),
            ("Next-code NLL", as_number(_mean(nll)), "nats a code, mean over patches"),
        ],
        sections=sections,
    )


def read_scan(
    reader: Any, scan: Any, tr: float | None = None, atlas: Any = None, label_image: Any = None
) -> dict[str, Any]:
    """
    A scan as it was measured, read once: {"signal" [time, rois], "tr" (s), "atlas" (an Atlas), "confounds",
    "censored"}, itself a scan for `reader` (see `fmrilm.load`) that gives the same results. It is what the functions
    below take.
    """
    return dict(vars(reader.processor.feature_extractor.read_signal(scan, tr, atlas, label_image)))


def view_scan(reader: Any, scan: dict[str, Any]) -> ScanView:
    """The first window of a scan and what the codec keeps of it."""
    return ScanView(
        signal=reader.signal(scan, window="first"),
        reconstruction=reader.reconstruct(scan, window="first"),
        repetition_time=reader.processor.feature_extractor.repetition_time,
        networks=scan["atlas"].networks,
        codes=reader.tokenize(scan, window="first"),
    )


@torch.no_grad()
def forecast_last_patch(reader: Any, scan: dict[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """
    Of the last patch of a scan's first window, given the frames before it: sampled signals [samples, frames, rois] and
    the expected one [frames, rois], NaN where a ROI is missing; None if no whole patch comes before it.
    """
    features = reader.processor.feature_extractor([scan], window="first").to(reader.model.device)
    config, frames = reader.model.config.codec_config, int(features["fmri_mask"].any(1).sum())
    start = frames - config.patch_length
    if start < config.patch_length:
        return None
    values, mask = (features[name][..., :start] for name in ("fmri_values", "fmri_mask"))
    known, found = mask.any(-1)[0].cpu().numpy(), []
    for samples in (SAMPLES, None):
        seconds = config.patch_length * config.repetition_time
        generator = torch.Generator(reader.model.device).manual_seed(0)
        future = reader.model.forecast(
            values, features["roi_coordinates"], mask, seconds, samples, generator=generator
        )
        future = future[:, 0] if samples else future[0]
        found.append(np.where(known, future.mT.float().cpu().numpy(), np.nan))
    return found[0], found[1]


@torch.no_grad()
def token_places(reader: Any, codes: np.ndarray) -> np.ndarray:
    """
    Where the tokens [patches, tokens_per_patch] of codes [patches, tokens_per_patch, levels] lie among each other, in
    0..1: the rank of their vectors along the first principal component, so that like vectors have like places.
    """
    codec = reader.model.model.codec
    vectors = codec.embed_codes(torch.as_tensor(codes, device=codec.device)).flatten(0, 1).float()
    vectors = vectors - vectors.mean(0)
    component = torch.linalg.eigh(vectors.T @ vectors).eigenvectors[:, -1]
    ranks = (vectors @ component).argsort().argsort().cpu().numpy()
    return ranks.reshape(codes.shape[:2]) / max(len(ranks) - 1, 1)


@torch.no_grad()
def network_nll(reader: Any, scan: dict[str, Any]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """
    Next-code NLL of each patch of a scan, [patches] in nats a code, mean over levels; and the share of each network,
    [patches] by network: the NLL less the one of the same scan in which the network's ROIs keep to their mean
    (occlusion: Zeiler and Fergus 2014, arXiv 1311.2901). Positive: the patch is less expected because of this network.
    """
    networks = np.array(scan["atlas"].networks)
    names = list(dict.fromkeys(networks.tolist()))
    features = reader.processor.feature_extractor([scan], window="first").to(reader.model.device)
    # z-scores: a ROI's mean is close to zero
    kept = torch.tensor(np.stack([np.ones(len(networks), bool), *(networks != name for name in names)]))
    values = features["fmri_values"] * kept[..., None].to(reader.model.device)
    rows = [features[name].expand(len(kept), -1, -1) for name in ("roi_coordinates", "fmri_mask")]
    nll = reader.model.surprise(reader.model.model.get_fmri_codes(values, *rows)).mean(-1).cpu().numpy()
    return nll[0], {name: nll[0] - without for name, without in zip(names, nll[1:], strict=True)}


def token_contributions(
    reader: Any, scan: dict[str, Any], question: str, answer: str, choices: Sequence[str] | None = None
) -> tuple[np.ndarray, float]:
    """
    How far each latent token of a scan, [patches, tokens_per_patch], and its summary tokens together carry an answer,
    in nats: gradient times input (Shrikumar et al. 2016, arXiv 1605.01713). The gradient is that of the answer's
    log-probability, with `choices` of its probability among them, by the tokens' embeddings. To first order, a token
    taken down by one percent takes one percent of its contribution from the log-probability.
    """
    model, processor = reader.model, reader.processor
    content = [{"type": "fmri", "fmri": scan}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, window="first").to(model.device)
    if choices is None:
        answers, chosen = [processor.tokenizer(answer, add_special_tokens=False)["input_ids"]], 0
    else:
        answers, chosen = processor.encode_choices(choices, question), list(choices).index(answer)
    ids = inputs.pop("input_ids")
    del inputs["attention_mask"]
    with torch.no_grad():
        prompt = model.model.embed(ids, **inputs)
    with torch.enable_grad():
        scores = _log_likelihoods(model, prompt.requires_grad_(True), answers)
        target = scores[0] if choices is None else scores.log_softmax(0)[chosen]
        (gradient,) = torch.autograd.grad(target, prompt)
    carried = (gradient * prompt.detach()).float().sum(-1)
    of_tokens = carried[ids == model.config.fmri_token_id].cpu().numpy().reshape(-1, processor.tokens_per_patch)
    return of_tokens, float(carried[ids == model.config.fmri_summary_token_id].sum())


def _log_likelihoods(model: Any, prompt: torch.Tensor, answers: list[list[int]]) -> torch.Tensor:
    """Log-likelihood [answers] of each answer (token ids) after a prompt, embeddings [1, length, hidden]."""
    totals = []
    for answer in answers:
        following = torch.tensor(answer, device=prompt.device)
        words = model.get_input_embeddings()(following[None, :-1])
        logits = model.model.causal_lm(inputs_embeds=torch.cat([prompt, words], 1)).logits[0, -len(answer) :]
        totals.append(logits.float().log_softmax(-1).gather(-1, following[:, None]).sum())
    return torch.stack(totals)


def _answers(
    view: ScanView, answers: dict[str, dict[str, Any]], carried: dict[str, tuple[np.ndarray, float]]
) -> list[dict[str, Any]]:
    if not answers:
        return [{"text": "Nothing was asked."}]
    rows = []
    for text, found in answers.items():
        tokens, summary = carried[text]
        patch, token = np.unravel_index(np.abs(tokens).argmax(), tokens.shape)
        width = view.seconds / len(tokens)
        strongest = {
            "text": f"token {token} at {patch * width:.0f} to {(patch + 1) * width:.0f} s",
            "small": f"{as_number(float(tokens[patch, token]), '+.3f')} nats; summary tokens "
            f"{as_number(summary, '+.3f')} nats",
        }
        shares = found.get("probabilities")
        probability = {"choices": shares, "chosen": found["answer"]} if shares else "free text"
        rows.append([text, found["answer"], probability, strongest])
    panels = {_shortened(f"{text} {answers[text]['answer']}"): tokens for text, (tokens, _) in carried.items()}
    return [
        {"text": "The bars are the probability the model gives to each allowed answer; its answer is in bold."},
        {
            "head": ["Question", "Answer", "Probability", "Rests most on"],
            "rows": rows,
            "label": "Answers to questions",
            "style": "answers",
        },
        {
            "figure": token_map(
                "The tokens that the answers rest on",
                panels,
                view.seconds,
                "nats",
                "Gradient × input (Shrikumar et al. 2016): to first order, by how much each token's embedding raises "
                "(purple) or lowers (orange) the log-probability of the answer that was given; each question has its "
                "own scale. It shows what the model used, not whether the answer is true.",
            )
        },
    ]


def _nll(view: ScanView, nll: np.ndarray, networks: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    values = np.stack(list(networks.values()))
    limit = float(np.nanmax(np.abs(values))) or 1.0
    edges = np.linspace(0, view.seconds, len(nll) + 1)
    names = [network_name(name) for name in networks]

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 0.25 * len(names) + 0.6))
        above.stairs(nll, edges, color=NLL_COLOUR, linewidth=1.8, baseline=None)
        above.set_ylabel("nats a code")
        image = below.imshow(
            values,
            cmap="RdBu_r",
            vmin=-limit,
            vmax=limit,
            aspect="auto",
            interpolation="none",
            extent=(0, view.seconds, len(names) - 0.5, -0.5),
        )
        below.set_yticks(range(len(names)), names)
        below.set(xlabel="time (s)")
        below.tick_params(axis="y", length=0)
        figure.colorbar(image, ax=below, label="share of the network", pad=0.01)

    means = [_mean(row) or 0.0 for row in values]
    most = int(np.argmax(means))
    return [
        {
            "text": "How unexpected each patch's codes are for the model given the tokens before: nats a code, mean "
            "over the patch's tokens and their levels. Over the window, most of it goes with the "
            f"{names[most]} network ({as_number(means[most], '+.3f')})."
        },
        {
            "figure": drawing(
                "Next-code NLL of each patch, and the networks it goes with",
                draw,
                2.6 + 0.28 * len(names),
                "Above: next-code NLL of each patch. Below: the NLL less that of the same scan in which the ROIs of "
                "one network keep to their mean (occlusion, Zeiler and Fergus 2014). Red: the patch is less expected "
                "because of this network; blue: the network made it more predictable. No scan of the training has a "
                "network at rest, so small differences mean little.",
            )
        },
    ]


def _brain(view: ScanView, coordinates: np.ndarray) -> list[dict[str, Any]]:
    signal, _ = view.connectivity
    np.fill_diagonal(signal, np.nan)
    counts = np.isfinite(signal).sum(0)
    strength = np.where(counts > 0, np.nansum(signal, 0) / np.maximum(counts, 1), np.nan)
    return [
        {
            "figure": glass_brain(
                "How connected each ROI is",
                strength,
                coordinates,
                "mean correlation",
                "Mean correlation of a ROI's signal with those of all others, at the ROI's centre (MNI).",
            )
        },
        {
            "figure": glass_brain(
                "What the codes keep of each ROI",
                view.roi_correlations,
                coordinates,
                "r of signal and reconstruction",
                "Correlation over time of a ROI's signal with its reconstruction.",
            )
        },
    ]


def _shortened(text: str, length: int = 110) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None
