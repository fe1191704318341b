"""`import fmrilm` and `fmrilm --help` import nothing heavy, and yet every name and every Auto class is there."""

import json
import sys
from pathlib import Path

import pytest

import fmrilm
from fmrilm import processors
from helpers import run_python


HEAVY = ("torch", "transformers", "datasets", "pandas", "trl", "sklearn", "matplotlib", "scipy", "nilearn")
# by an answer about an array
UNUSED = ("datasets", "pandas", "trl", "sklearn", "matplotlib", "nilearn", "peft", "torchvision")
UNUSED += ("scipy.signal", "scipy.stats", "scipy.interpolate", "scipy.ndimage", "sknetwork", "pyarrow", "joblib")
COMMAND = Path(sys.executable).with_name("fmrilm")


def fresh(code: str) -> dict:
    """What a new interpreter prints after this code, as JSON."""
    return json.loads(run_python(code).splitlines()[-1])


def test_import_is_quick_and_takes_nothing_heavy() -> None:
    code = f"""
import time
start = time.process_time()
import fmrilm, fmrilm.processors
seconds = time.process_time() - start
names = [name for name in {HEAVY} if name in sys.modules]
from fmrilm.processors import Atlas, parcellate, read_scan
print(json.dumps([seconds, names, [name for name in ("torch", "transformers", "pandas") if name in sys.modules]]))
"""
    seconds, at_once, for_scans = fresh(code)
    assert seconds < 0.3 and not at_once and not for_scans


def test_asking_takes_nothing_that_it_does_not_need(model_folder: Path, scan_file: Path) -> None:
    code = f"""
from typer.testing import CliRunner
from fmrilm.training.cli.main import app
arguments = ["ask", {str(scan_file)!r}, "Is it?", "--choices", "yes,no", "--tr", "0.72"]
run = CliRunner().invoke(app, [*arguments, "--json", "--model", {str(model_folder)!r}])
assert run.exit_code == 0, run.output
print(json.dumps([name for name in {UNUSED} if name in sys.modules]))
"""
    assert fresh(code) == []


def test_help_is_quick_and_takes_nothing_heavy() -> None:
    code = """
import resource, runpy
sys.argv = ["fmrilm", "--help"]
try:
    runpy.run_path(COMMAND, run_name="__main__")
except SystemExit:
    pass
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([usage.ru_utime + usage.ru_stime, [name for name in HEAVY if name in sys.modules]]))
"""
    seconds, names = fresh(code.replace("COMMAND", repr(str(COMMAND))).replace("HEAVY", repr(HEAVY)))
    assert seconds < 1 and not names


@pytest.mark.parametrize("package", [fmrilm, processors])
def test_every_name_is_listed_and_there(package) -> None:
    assert set(package.__all__) <= set(dir(package))
    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'FmriTokenizer'"):
        _ = package.FmriTokenizer
    names: dict = {}
    exec(f"from {package.__name__} import *", names)
    assert set(package.__all__) <= set(names)


# before transformers and after it
@pytest.mark.parametrize(
    "imports", ["from fmrilm.processors import FmriLMProcessor", "from transformers import pipeline\nimport fmrilm"]
)
def test_the_package_serves_without_trust_and_takes_no_code_of_a_folder(imports: str, model_folder: Path) -> None:
    code = f"""
{imports}
from transformers import AutoModelForCausalLM, AutoProcessor
model = AutoModelForCausalLM.from_pretrained({str(model_folder)!r}, trust_remote_code=False)
processor = AutoProcessor.from_pretrained({str(model_folder)!r}, trust_remote_code=False)
from transformers import pipeline
pipe = pipeline('fmri-text-to-text', model={str(model_folder)!r})
print(json.dumps([type(part).__module__ for part in (model, processor, processor.feature_extractor, pipe)]))
"""
    assert fresh(code) == [
        "fmrilm.modeling_fmrilm",
        "fmrilm.processors.processing_fmrilm",
        "fmrilm.processors.feature_extraction_fmrilm",
        "fmrilm.pipeline_fmrilm",
    ]
