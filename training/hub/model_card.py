"""The card of a model folder, filled from what the folder and its results say."""

import hashlib
import json
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined, UndefinedError


TEMPLATE = Path(__file__).with_name("model_card.md")
# `pipeline(model=...)` asks the Hub for this tag, and its any-to-any pipeline takes chats that hold scans
PIPELINE_TAG = "any-to-any"
# stands for the repository until it is known, which is when the folder is pushed
UNKNOWN_REPO = "<repository>"
# identifiers the Hub takes: https://huggingface.co/docs/hub/repositories-licenses
LICENSES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 h-research
    intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit
    mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 open-mdw openrail openrail++ osl-3.0 other pddl postgresql unknown
    unlicense wtfpl zlib
    """.split()
)


def subject_hashes(*groups: Iterable[str]) -> list[list[str]]:
    """
    A hash for each different identifier in each group, sorted. Equal identifiers have equal hashes within one call;
    the salt is thrown away, so that nobody can try identifiers afterwards.
    """
    salt = secrets.token_bytes(16)
    return [
        sorted({hashlib.sha256(salt + subject.encode()).hexdigest()[:16] for subject in group}) for group in groups
    ]


def fill_card(folder: Path, results: dict | None = None, repo: str = UNKNOWN_REPO) -> ModelCard:
    """
    The card of a model or adapter and its processor in `folder`. results: what `fmrilm demo` writes into results.json;
    without it, the card says that training and evaluation are not stated.
    """
    try:
        return ModelCard(_template().render(_values(folder, results, repo)))
    except (KeyError, UndefinedError) as error:
        raise ValueError(f"expected the results of `fmrilm demo`, got some without {error}") from error


def _values(folder: Path, results: dict | None, repo: str) -> dict[str, Any]:
    """What the template's names stand for."""
    adapter = _read(folder / "adapter_config.json")
    config = _read(folder / "config.json") or {}
    extractor = (_read(folder / "processor_config.json") or {})["feature_extractor"]
    origin = results["model"] if results else {"base_model": None, "license": "unknown"}
    base_model = adapter["base_model_name_or_path"] if adapter else origin["base_model"]
    name = folder.name if repo == UNKNOWN_REPO else repo.split("/")[-1]
    images = {path.name.split(".")[0] for path in folder.glob("atlases/*")}
    metadata = ModelCardData(
        language="en",
        license=origin["license"],
        library_name="peft" if adapter else "transformers",
        pipeline_tag=PIPELINE_TAG,
        tags=["fmri", "neuroscience", "fmri-lm"],
        base_model=base_model,
        base_model_relation=base_model and ("adapter" if adapter else "finetune"),
        model_name=name,
        eval_results=_eval_results(results) if results else None,
    )
    codec = config.get("codec_config", {})
    values = {
        "metadata": metadata.to_yaml(),
        "name": name,
        "kind": "adapter" if adapter else "model",
        "repo": repo,
        "base_model": base_model,
        "license": origin["license"],
        "codec": codec,
        "seconds_per_step": codec.get("patch_length", 0) * codec.get("repetition_time", 0),
        "atlases": [{**atlas, "has_image": atlas["name"] in images} for atlas in extractor["atlases"]],
        "preprocessing": extractor,
        "results": results is not None,
    }
    if results is not None:
        people = results["data"]["people"]
        values |= {key: results[key] for key in ("data", "questions", "run", "settings")}
        values["codec_results"] = results["codec"]
        values["overlap"] = len(set(people["training"]) & set(people["held_out"]))
    return values


def read_card(path: Path) -> ModelCard:
    """The card in a file, with metadata and a licence that the Hub takes."""
    try:
        card = ModelCard.load(path)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path.name}: expected metadata in YAML, got {error}") from error
    license = card.data.get("license")
    if license not in LICENSES:
        raise ValueError(
            f"{path.name}: expected a license that the Hub knows, such as apache-2.0, got {license!r}; without that "
            "file, a card is filled in"
        )
    if license == "other" and not card.data.get("license_name"):
        raise ValueError(f"{path.name}: expected license_name beside license: other, got none")
    return card


def _read(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None


def _template() -> Any:
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "percent": lambda share: f"{100 * share:.0f} %",
        "points": lambda share: f"{100 * share:+.0f}",
        "minutes": lambda seconds: f"{seconds / 60:.1f}",
        "decimals": lambda value: "—" if value is None else f"{value:.2f}",
    }
    return environment.from_string(TEMPLATE.read_text())


def _eval_results(results: dict) -> list[EvalResult]:
    """The model-index: each family's balanced accuracy with the right scan, and its lead over a swapped one."""
    people = results["data"]["held_out_subjects"]
    entries = []
    for family, values in results["questions"]["families"].items():
        right, difference = values["right"], values["difference"]
        for metric, name, value, interval in (
            ("balanced_accuracy", "balanced accuracy", right["accuracy"], right["interval"]),
            ("balanced_accuracy_difference", "right minus swapped", difference["value"], difference["interval"]),
        ):
            entries.append(
                EvalResult(
                    task_type=PIPELINE_TAG,
                    task_name="questions about a scan",
                    dataset_type="held-out-people",
                    dataset_name=f"{people} held-out people",
                    dataset_config=family,
                    metric_type=metric,
                    metric_name=name,
                    metric_value=round(value, 4),
                    metric_args={"interval_95": [round(bound, 4) for bound in interval]},
                )
            )
    return entries
