"""What is shipped runs nothing that a file says, and what it is installed with is pinned."""

import ast
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


ROOT = Path(__file__).parents[1]
SHIPPED = [
    *(path for folder in ("modeling_fmrilm", "processors", "training") for path in (ROOT / folder).rglob("*.py")),
    *ROOT.glob("*.py"),
]
# modules that run what a file says
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {
    "os.system",
    "os.popen",
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.full_load",
    "joblib.load",
    "pandas.read_pickle",
    "pd.read_pickle",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "tempfile.mktemp",
}
# loaders that make text and plain values alone
SAFE_LOADERS = {"yaml.BaseLoader", "yaml.SafeLoader"}
FORBIDDEN = {"shell": True, "allow_pickle": True, "trust_remote_code": True}


def dangers(code: str) -> Iterator[str]:
    """Everything in Python code that could run what a file says, a line each."""
    for node in ast.walk(ast.parse(code)):
        where = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            yield from (f"{where}: import of {name.name}" for name in node.names if name.name in MODULES)
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            # an exception runs nothing
            yield from (f"{where}: import of {name.name}" for name in node.names if not name.name.endswith("Error"))
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
        if name in BUILTINS | CALLS and not SAFE_LOADERS & {ast.unparse(argument) for argument in node.args}:
            yield f"{where}: {name}"
        if name == "torch.load" and given.get("weights_only") is not True:
            yield f"{where}: {name} without weights_only=True"
        yield from (f"{where}: {key}={value}" for key, value in FORBIDDEN.items() if given.get(key) is value)


def test_shipped_code_runs_nothing_that_a_file_says() -> None:
    assert len(SHIPPED) > 60
    for path in SHIPPED:
        assert not list(dangers(path.read_text(encoding="utf-8"))), path


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from dill import loads",
        "eval(text)",
        "exec(text)",
        "yaml.load(text)",
        "yaml.load(text, yaml.Loader)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "from pickle import loads",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
        "os.system(command)",
        "joblib.load(path)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(code: str) -> None:
    assert len(list(dangers(code))) == 1


def test_the_search_lets_the_safe_forms_pass() -> None:
    safe = "torch.load(p, weights_only=True); yaml.load(t, yaml.BaseLoader); np.load(p, allow_pickle=False)"
    assert not list(dangers(f"{safe}; re.compile(t); model.eval()"))


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(text) for text in [*project["dependencies"], *(text for extra in extras for text in extra)]]


def test_every_dependency_is_bounded_and_its_pin_within_the_bounds() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    versions = {canonicalize_name(name): version for name, version in pins.items()}
    for requirement in requirements():
        if requirement.name == "fmri-lm":
            continue
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators == {">=", "<"}, requirement
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_what_is_on_its_way_out_fails_a_test_where_our_code_uses_it(category: type[Warning]) -> None:
    with pytest.raises(category):
        warnings.warn_explicit("old", category, "codec.py", 1, module="fmrilm.training.codec.trainer")
    # others are not ours to change
    with pytest.warns(category):
        warnings.warn_explicit("old", category, "nn.py", 1, module="elsewhere.nn")
