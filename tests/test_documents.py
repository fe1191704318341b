"""README and docs do what they say: every block of code runs, or says in its first line why it cannot."""

from pathlib import Path

import pytest

from document_blocks import run_page


ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_of_a_page_run(page: Path, in_small_world: Path) -> None:
    run_page(page)
