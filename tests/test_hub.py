"""
Against a Hub on loopback, by the real clients: pushed here, pulled in a process without this package. The clients read
their environment when they are imported, so each side is a process of its own; what both sides did, the tests read.
"""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from fmrilm import FmriLMForConditionalGeneration
from fmrilm.processors import FmriLMProcessor
from helpers import ISOLATED, linked_site, run_python
from hub_server import TOKEN, Hub, running_hub


PUSH = """
from pathlib import Path

import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor
from typer.testing import CliRunner

import fmrilm
from fmrilm.training.alignment.joint import add_lora
from fmrilm.training.cli.main import app

folder, chat = arguments["folder"], arguments["chat"]


def run(*words):
    result = CliRunner().invoke(app, ["push", *words])
    return [result.exit_code, result.output]


said = {
    "model": run(folder, "tester/model"),
    "private": run(folder, "tester/secret", "--private"),
    "branch": run(folder, "tester/model", "--revision", "trial/1", "--message", "A trial"),
    "not private": run(folder, "tester/model", "--private"),
}
processor = AutoProcessor.from_pretrained("tester/model")
processor.push_to_hub("tester/processor")
adapted = add_lora(fmrilm.FmriLMForConditionalGeneration.from_pretrained("tester/model"), 2)
adapter = Path(arguments["output"]) / "adapter"
adapted.save_pretrained(adapter)
processor.save_pretrained(adapter)
(adapter / "README.md").unlink()
said["adapter"] = run(str(adapter), "tester/adapter")
# a later commit with other weights: an adapter belongs to the ones that it was trained on
model = fmrilm.FmriLMForConditionalGeneration.from_pretrained("tester/model")
with torch.no_grad():
    said["adapted"] = adapted.eval()(**processor.apply_chat_template(chat, add_generation_prompt=True)).logits
    model.get_output_embeddings().weight[5] += 1
model.push_to_hub("tester/model", commit_message="Other weights")
torch.save(said, arguments["results"])
"""

PULL = """
import re

import torch
from huggingface_hub import ModelCard, snapshot_download
from transformers import AutoModelForMultimodalLM, AutoProcessor, pipeline

trust = {"trust_remote_code": True}
chat, old = arguments["chat"], arguments["commit"]
results = {}


def error_of(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        return [type(error).__name__, str(error)]


def use(card, revision):
    (snippet,) = re.findall(r"```python\\n(.*?)```", ModelCard.load(card).text, flags=re.DOTALL)
    snippet = snippet.replace("<commit>", revision).replace("<repository>", card)
    names = {}
    exec(snippet, names)
    return names["output"], names["scores"].detach()


processor = AutoProcessor.from_pretrained("tester/processor", **trust)
inputs = processor.apply_chat_template(chat, add_generation_prompt=True)
results["inputs"] = dict(inputs)
with torch.no_grad():
    for revision in (old, "main", "trial/1"):
        model = AutoModelForMultimodalLM.from_pretrained("tester/model", revision=revision, **trust)
        results[revision] = model(**inputs).logits
    from peft import AutoPeftModelForCausalLM

    adapter = AutoPeftModelForCausalLM.from_pretrained("tester/adapter", **trust).eval()
    results["adapter"] = adapter(**inputs).logits
results["use"] = use("tester/model", old)
results["use of the adapter"] = use("tester/adapter", "main")
results["anonymous snapshot"] = error_of(snapshot_download, "tester/secret", token=False)
results["anonymous model"] = error_of(AutoModelForMultimodalLM.from_pretrained, "tester/secret", token=False, **trust)
secret = AutoModelForMultimodalLM.from_pretrained("tester/secret", **trust)
with torch.no_grad():
    results["secret"] = secret(**inputs).logits
results["task"] = pipeline(model="tester/model", **trust).task
torch.save(results, arguments["results"])
"""


@pytest.fixture(scope="module")
def hub():
    with running_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, saved_model: Path) -> Path:
    """Where both processes run: `model/`, and a scan."""
    place = tmp_path_factory.mktemp("hub")
    shutil.copytree(saved_model, place / "model")
    rng = torch.Generator().manual_seed(0)
    signal = 1000 + 10 * torch.randn(40, 5, generator=rng)
    np.save(place / "scan.npy", signal.numpy())
    return place


@pytest.fixture(scope="module")
def parts(place: Path) -> tuple[FmriLMForConditionalGeneration, FmriLMProcessor]:
    return tuple(of.from_pretrained(place / "model") for of in (FmriLMForConditionalGeneration, FmriLMProcessor))


def chat_about(place: Path) -> list[dict]:
    block = {"type": "fmri", "fmri": str(place / "scan.npy"), "tr": 2.0, "atlas": "tiny"}
    return [{"role": "user", "content": [block, {"type": "text", "text": "Is it connected?"}]}]


def run(hub: Hub, place: Path, name: str, script: str, *options: str, **arguments) -> dict:
    """What a process with a home of its own finds, which knows the Hub and the token."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON"))}
    environment |= {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(place / name),
    }
    results = place / f"{name}-results"
    arguments |= {
        "folder": str(place / "model"),
        "chat": chat_about(place),
        "output": str(place / f"{name}-output"),
        "results": str(results),
    }
    run_python(script, *options, arguments=arguments, cwd=place, env=environment)
    return torch.load(results, weights_only=True)


@pytest.fixture(scope="module")
def said(hub: Hub, place: Path) -> dict:
    """What the commands answered in the process that pushed."""
    return run(hub, place, "push", PUSH, places=[str(Path(__file__).parent)])


@pytest.fixture(scope="module")
def pulled(hub: Hub, place: Path, said: dict) -> dict:
    """What the process without this package found."""
    site = place / "site"
    site.mkdir()
    linked_site(site, "transformers", "torch", "numpy", "scipy", "peft", "accelerate")
    found = {"places": [str(site)], "absent": ["fmrilm", "trl", "nilearn"]}
    return run(hub, place, "pull", PULL, *ISOLATED, **found, commit=commit_of(said["model"]))


def commit_of(answer: list) -> str:
    code, output = answer
    assert code == 0, output
    return re.search(r"is at commit ([0-9a-f]{40})", output)[1]


def logits(parts, place: Path) -> torch.Tensor:
    model, processor = parts
    with torch.no_grad():
        return model(**processor.apply_chat_template(chat_about(place), add_generation_prompt=True)).logits


def test_push_answers_with_the_commit_of_the_branch_it_made(hub: Hub, said: dict) -> None:
    repository = hub.repositories["tester/model"]
    pushed = commit_of(said["model"])
    assert list(repository.titles.values()) == ["initial commit", "Upload model", "Other weights"]
    # the same files again: the client makes no empty commit
    assert commit_of(said["branch"]) == repository.branches["trial/1"] == pushed != repository.branches["main"]


def test_public_repository_is_not_taken_for_a_private_one(said: dict) -> None:
    code, output = said["not private"]
    assert code == 1 and "expected tester/model to be private" in output


def test_what_is_pulled_answers_as_what_was_pushed(parts, place: Path, said: dict, pulled: dict) -> None:
    model, processor = parts
    expected = processor.apply_chat_template(chat_about(place), add_generation_prompt=True)
    assert list(expected) == list(pulled["inputs"])
    assert all(torch.equal(expected[name], pulled["inputs"][name]) for name in expected)
    assert torch.equal(pulled["secret"], logits(parts, place))


def test_old_revisions_load_by_commit_and_by_branch(parts, place: Path, said: dict, pulled: dict) -> None:
    old = logits(parts, place)
    assert torch.equal(pulled[commit_of(said["model"])], old)
    assert torch.equal(pulled["trial/1"], old)
    assert not torch.allclose(pulled["main"], old)


def test_adapter_loads_onto_the_commit_it_was_trained_on(said: dict, pulled: dict, hub: Hub) -> None:
    values = json.loads(hub.files("tester/adapter")["adapter_config.json"])
    assert (values["base_model_name_or_path"], values["revision"]) == ("tester/model", commit_of(said["model"]))
    assert torch.equal(pulled["adapter"], said["adapted"])


@pytest.mark.parametrize("name", ["use", "use of the adapter"])
def test_snippet_of_the_card_runs_on_the_pushed_repository(name: str, pulled: dict) -> None:
    output, scores = pulled[name]
    assert output.shape[0] == 1 and scores.shape == (1, 3)
    assert scores.softmax(-1).sum().item() == pytest.approx(1, abs=1e-5)


def test_card_names_task_library_and_base(hub: Hub, pulled: dict) -> None:
    model = ModelCard(hub.files("tester/model")["README.md"].decode()).data
    assert (model.pipeline_tag, model.library_name, model.license) == ("any-to-any", "transformers", "unknown")
    assert pulled["task"] == "fmri-text-to-text"
    adapter = ModelCard(hub.files("tester/adapter")["README.md"].decode()).data
    found = (adapter.library_name, adapter.base_model, adapter.base_model_relation)
    assert found == ("peft", "tester/model", "adapter")


def test_private_repository_is_refused_without_token(pulled: dict) -> None:
    kind, text = pulled["anonymous snapshot"]
    assert kind == "RepositoryNotFoundError" and "401" in text
    kind, text = pulled["anonymous model"]
    assert kind == "OSError" and "pass a token" in text
