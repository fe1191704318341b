"""README and docs do what they say: every block of code runs, or says in its first line why it cannot."""

import re
import runpy
from pathlib import Path

import pytest
import yaml

from document_blocks import run_page


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
# what one types at other times, on other machines, or with a token
TYPED = {"--jobs 4": "--jobs 1", "me/my-model --card": "me/my-model --dry-run --card"}


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_blocks_of_a_page_run(page: Path, in_small_world: Path) -> None:
    run_page(page, TYPED)


def test_table_of_sizes_is_what_is_counted() -> None:
    script, table = runpy.run_path(str(DOCS / "sizes.py")), (DOCS / "concepts.md").read_text()
    for size in script["SIZES"]:
        assert script["row"](size) in table


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text()
