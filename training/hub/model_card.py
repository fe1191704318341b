"""The card of a model folder, filled from what the folder and its results hold."""

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined, UndefinedError


TEMPLATE = Path(__file__).with_name("model_card.md")
# `pipeline(model=...)` asks the Hub for this tag, and its any-to-any pipeline takes chats that hold scans
PIPELINE_TAG = "any-to-any"
# stands for the repository until it is known, which is when the folder is pushed
UNKNOWN_REPO = "<repository>"


def fill_card(folder: Path, results: dict | None = None, repo: str = UNKNOWN_REPO) -> ModelCard:
    """
    The card of a model or adapter and its processor in `folder`. results: what `fmrilm demo` or `fmrilm evaluate`
    wrote into results.json; without it, the card states no training and no evaluation.
    """
    try:
        return ModelCard(_template().render(_values(folder, results, repo)))
    except (KeyError, UndefinedError) as error:
        raise ValueError(f"expected the results of `fmrilm demo` or `evaluate`, got some without {error}") from error


def _values(folder: Path, results: dict | None, repo: str) -> dict[str, Any]:
    """What the template's names stand for."""
    from ..evaluation.report import eval_results

    adapter = _read(folder / "adapter_config.json")
    config = _read(folder / "config.json") or {}
    extractor = (_read(folder / "processor_config.json") or {})["feature_extractor"]
    origin = (results or {}).get("model") or {"base_model": None, "license": "unknown"}
    base_model = adapter["base_model_name_or_path"] if adapter else origin["base_model"]
    name = folder.name if repo == UNKNOWN_REPO else repo.split("/")[-1]
    images = {path.stem for path in folder.glob("atlases/*")}
    shown = _table(results) if results else []
    metadata = ModelCardData(
        language="en",
        license=origin["license"],
        library_name="peft" if adapter else "transformers",
        pipeline_tag=PIPELINE_TAG,
        tags=["fmri", "neuroscience", "fmri-lm"],
        base_model=base_model,
        base_model_relation=base_model and ("adapter" if adapter else "finetune"),
        model_name=name,
        eval_results=eval_results(results) if results else None,
    )
    codec = config.get("codec_config", {})
    return {
        "metadata": metadata.to_yaml(),
        "name": name,
        "kind": "adapter" if adapter else "model",
        "repo": repo,
        "base_model": base_model,
        "license": origin["license"],
        "codec": codec,
        "seconds_per_patch": codec.get("patch_length", 0) * codec.get("repetition_time", 0),
        "atlases": [{**atlas, "has_image": atlas["name"] in images} for atlas in extractor["atlases"]],
        "preprocessing": extractor,
        "results": results,
        "rows": shown,
        "terms": results["data"].get("terms", {}) if results else {},
        "run": (results or {}).get("run"),
        "quick": bool(((results or {}).get("settings") or {}).get("quick")),
        "verdict": ((results or {}).get("descriptors") or {}).get("verdict"),
    }


def _table(results: dict) -> list[dict[str, Any]]:
    """Rows of the results: the right scan, the subject-shuffled control, their difference, and the baselines."""
    from ..evaluation.report import TITLES, condition_name, table

    shown: Any = table(results)
    if shown.empty:
        return []
    kept = shown["comparison"].isin(["right", "shuffled", "minus shuffled"]) & (shown["variant"] != "uncalibrated")
    return [
        {**row._asdict(), "condition": condition_name(row), "title": TITLES.get(row.metric, row.metric)}
        for row in shown[kept & shown["value"].notna()].itertuples(index=False)
    ]


def read_card(path: Path) -> ModelCard:
    """The card in a file, with metadata and a licence, which the Hub checks when it is pushed."""
    try:
        card = ModelCard.load(path)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path.name}: expected metadata in YAML, got {error}") from error
    license = card.data.get("license")
    if not license:
        raise ValueError(
            f"{path.name}: expected a license that the Hub knows, such as apache-2.0, got none; without that file, a "
            "card is filled in"
        )
    if license == "other" and not card.data.get("license_name"):
        raise ValueError(f"{path.name}: expected license_name beside license: other, got none")
    return card


def _read(path: Path) -> dict | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _template() -> Any:
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "minutes": lambda seconds: f"{seconds / 60:.1f}",
        "decimals": lambda value: "—" if value is None or value != value else f"{value:.2f}",
    }
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
