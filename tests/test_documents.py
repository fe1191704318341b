"""README and docs do what they say: every block of code runs, or says in its first line why it cannot."""

import re
import runpy
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml

from document_blocks import blocks, reason_not_run, run_page


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
# of all pages: how many blocks do not run, and why
NOT_RUN = {
    "docs/hub.md": ["uploads to the Hub", "needs vLLM"],
    "docs/training.md": ["needs GPUs"],
    "SECURITY.md": ["loads a repository from the Hub"],
    "CONTRIBUTING.md": ["they are what it runs"],
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_of_a_page_run(page: Path, in_small_world: Path) -> None:
    run_page(page)


def test_blocks_that_do_not_run_are_these() -> None:
    pages = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md"))]
    reasons = {str(page.relative_to(ROOT)): list(filter(None, map(reason_not_run, blocks(page)))) for page in pages}
    assert {name: found for name, found in reasons.items() if found} == NOT_RUN
    # and the others are many
    assert sum(len(blocks(page)) for page in pages) > 55


def test_table_of_sizes_is_what_is_counted() -> None:
    script, table = runpy.run_path(str(DOCS / "sizes.py")), (DOCS / "concepts.md").read_text()
    for size in script["SIZES"]:
        assert script["row"](size) in table


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_figure_is_well_formed_and_has_both_themes() -> None:
    figure = DOCS / "architecture.svg"
    ElementTree.parse(figure)
    assert "prefers-color-scheme: dark" in figure.read_text()


def test_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text()
