"""README and docs do what they say: every block of code runs, or says in its first line why it cannot."""

import shutil
from pathlib import Path

import pytest

from document_blocks import run_page
from small_world import write_small_world


ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_world(tmp_path_factory.mktemp("small") / "world")


@pytest.fixture
def folder(small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the small world to work in."""
    folder = Path(shutil.copytree(small_world, tmp_path / "world"))
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_of_a_page_run(page: Path, folder: Path) -> None:
    run_page(page)
