"""Runs the code blocks of a Markdown page in the order in which a reader types them, in one process."""

import atexit
import difflib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from itertools import zip_longest
from pathlib import Path
from unittest.mock import patch

import yaml
from sybil import Document, Example
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

from fmrilm.training.cli import main as cli


ROOT = Path(__file__).parents[1]
NOT_RUN = re.compile(r"# not run by the tests: (\S.*)")
FILE_NAME = re.compile(r"# (\S+\.\w+)\n")
LANGUAGES = ("python", "bash", "yaml", "text")


def blocks(page: Path) -> list[Example]:
    """All fenced blocks of a page in order; ValueError if one is of a language that nothing here runs."""
    parsers = [CodeBlockParser(language, PythonEvaluator()) for language in LANGUAGES]
    found = list(Document.parse(str(page), *parsers))
    fences = re.findall(r"^\s*```(.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if len(fences) != 2 * len(found):
        raise ValueError(f"{page.name}: expected blocks of {', '.join(LANGUAGES)}, got {sorted(set(fences) - {''})}")
    return found


def language(block: Example) -> str:
    return block.region.lexemes["arguments"]


def reason_not_run(block: Example) -> str | None:
    """What a block's first line says where it cannot run."""
    found = NOT_RUN.match(block.parsed)
    return found and found[1]


def run_page(page: Path, replaced: Mapping[str, str] | None = None) -> None:
    """
    Runs a page's blocks in the present folder. Python and bash run; YAML is written to the file that its first line
    names. A `text` block says what the block before it prints, or with which error it ends; `...` stands for anything.

    Args:
        replaced: what a line of bash has in place of some words.
    """
    found = blocks(page)
    for block, following in zip_longest(found, found[1:]):
        place = f"{page.name}, line {block.line}"
        if reason_not_run(block) or language(block) == "text":
            continue
        expected = following is not None and language(following) == "text" and following.parsed
        try:
            said = run_block(block, replaced or {})
        # whatever a block may raise is what its reader would see
        except Exception as error:
            if not expected:
                raise AssertionError(f"{place}: {type(error).__name__}: {error}") from error
            said = f"{type(error).__name__}: {error}"
        if expected and not matches(expected, said):
            lines = difflib.ndiff(expected.splitlines(), said.splitlines())
            raise AssertionError(f"{place} says something else:\n" + "\n".join(lines))


def run_block(block: Example, replaced: Mapping[str, str]) -> str:
    """Runs one block and returns what it prints."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        match language(block):
            case "python":
                block.evaluate()
            case "bash":
                for line in command_lines(block.parsed, replaced):
                    run_command(line)
            case "yaml":
                yaml.safe_load(block.parsed)
                if name := FILE_NAME.match(block.parsed):
                    Path(name[1]).write_text(block.parsed, encoding="utf-8")
    return printed.getvalue()


def command_lines(code: str, replaced: Mapping[str, str]) -> list[str]:
    """Commands with their continuation lines joined, without comments."""
    for old, new in replaced.items():
        code = code.replace(old, new)
    lines = code.replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def run_command(line: str) -> None:
    """Runs a line of bash that starts Python code of this project, as the shell would but in this process."""
    words = shlex.split(line, comments=True)
    try:
        # a command is a process of its own elsewhere: what it sets, it sets for itself
        with patch.object(sys, "argv", words), patch.dict(os.environ):
            match words:
                case ["fmrilm", *_]:
                    cli.main()
                case ["python", "-m", module, *arguments]:
                    sys.argv = [module, *arguments]
                    runpy.run_module(module, run_name="__main__")
                case ["make", target]:
                    # that there is such a target, and what it would do
                    subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
                case _:
                    raise ValueError(f"expected a command fmrilm, make or python -m, got {line!r}")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{line!r} ended with {end.code}: {sys.stdout.getvalue()}") from end
    finally:
        # the command's status would become that of the tests
        atexit.unregister(cli.leave)


def matches(expected: str, said: str) -> bool:
    pattern = re.escape(expected.strip()).replace(re.escape("..."), ".*")
    return re.search(pattern, said, flags=re.DOTALL) is not None
