"""
The Space in a process of its own and a headless browser before it: what its tests need, and what draws its picture.

`python tests/space_browser.py runs/demo/model docs/images/space.png` draws the picture for the documentation.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright


ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 300  # s, on a busy machine
QUESTIONS = (
    "Describe this scan.",
    "Is the connectivity between the visual and default mode networks low, typical or high?",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def served(model: Path, temporary: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address of a Space with this model, and its process; what it writes goes into `temporary`."""
    port = free_port()
    environment = {**os.environ, "TMPDIR": str(temporary), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "app.py"), str(model), "--port", str(port)]
    with open(temporary / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + PATIENCE
        while not _answers(address):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the Space did not start: {(temporary / 'log').read_text()}")
            time.sleep(0.2)
        yield address, process
    finally:
        process.terminate()
        process.wait(PATIENCE)


def _answers(address: str) -> bool:
    try:
        return urlopen(address, timeout=5).status == 200
    except (URLError, TimeoutError, ConnectionError):
        return False


@contextmanager
def headless_browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def open_page(browser: Browser, address: str, **options: Any) -> Page:
    """A visitor's page that shows the address; what it asks of other hosts fails."""
    page = browser.new_page(**options)
    page.set_default_timeout(PATIENCE * 1000)
    page.route(re.compile(r"^https?://(?!127\.0\.0\.1[:/])"), lambda route: route.abort())
    page.goto(address)
    return page


def ask(page: Page, question: str) -> None:
    """Asks, and waits until the question's field is empty again: then the answer is whole."""
    field = page.locator("#question textarea")
    field.fill(question)
    field.press("Enter")
    page.wait_for_function("document.querySelector('#question textarea').value === ''")


def draw(model: Path, picture: Path, temporary: Path) -> None:
    """The Space after two questions about a synthetic example, in few colours: below 300 kB."""
    with served(model, temporary) as (address, _), headless_browser() as browser:
        page = open_page(browser, address, viewport={"width": 1220, "height": 800})
        page.get_by_role("button", name="Synthetic: coupled networks").click()
        page.locator("#status p", has_text="Read:").wait_for()
        for question in QUESTIONS:
            ask(page, question)
        page.mouse.move(0, 0)
        page.wait_for_timeout(1000)
        page.screenshot(path=picture, full_page=True)
    Image.open(picture).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(picture, optimize=True)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        draw(Path(sys.argv[1]), Path(sys.argv[2]), Path(folder))
