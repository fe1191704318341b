import base64
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmrilm.training.report.report import write_report
from helpers import evaluation_results


EVIL = "<script>alert(1)</script>"
VOID = {"meta", "img", "source", "br", "link", "input"}
LEVELS = ("low", "typical", "high")


class Page(HTMLParser):
    """Reads a page, checks that its tags nest and that it fetches nothing, and collects images, links and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []
        self.tags = [tag for tag, _ in self.elements]
        self.images = [values for tag, values in self.elements if tag == "img"]
        self.sources = [values for tag, values in self.elements if tag == "source"]
        self.ids = {values["id"] for _, values in self.elements if "id" in values}
        self.links = {values["href"] for _, values in self.elements if "href" in values}
        assert self.links == {f"#{name}" for name in self.ids}
        assert not {"script", "link", "iframe"} & set(self.tags)
        assert not [words for words in ("http://", "https://", "url(", "@import") if words in html]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if "td" in self.open:
            self.cells[-1] += data


def build_results() -> dict[str, Any]:
    """Results of an evaluation with all that a page shows, some of it no plain text."""

    def answer(number: int) -> dict[str, Any]:
        return {
            "subject": EVIL if number == 2 else "hcp 1",
            "window_start_seconds": 80.0 * number,
            "question": f"Question {number}: how strongly is the limbic network connected?",
            "truth": "high",
            "answer": LEVELS[number % 3],
            "probabilities": dict(zip(LEVELS, np.roll([0.7, 0.2, 0.1], number).tolist(), strict=True)),
        }

    results = evaluation_results()
    estimate = {"value": 0.71, "interval": [0.6, 0.8]}
    condition = {"shots": 0, "variant": "", "resamples": 1, "scans": 40, "parse_failures": 0}
    metrics = {"right": {"roc_auc": estimate}, "shuffled": {"roc_auc": {"value": 0.5, "interval": None}}}
    results["tasks"][f"sex {EVIL}"] = {"conditions": [{"condition": "zero-shot", "metrics": metrics, **condition}]}
    (family,) = results["descriptors"]["families"].values()
    results["descriptors"]["families"] |= {"all": {**family, "beats_shuffled": True}, "$\\broken{$": family}
    results["descriptors"] |= {
        "answers": [answer(number) for number in range(5)],
        "descriptions": {
            "examples": [{"subject": "hcp 1", "generated": f"It is low. {EVIL}", "truth": "It is high & slow."}],
            "statement_accuracy": {"right": 0.55, "shuffled": 0.41, "majority": None},
        },
    }
    results["codec"] = {
        "bits_per_patch": 1152.0,
        "codebook_used": 20,
        "r_squared": {"value": 0.31, "interval": [0.2, 0.4]},
        "subjects": [{"subject": EVIL, "r_squared": 0.3, "fc_correlation": None}],
    }
    results["run"]["seconds"][EVIL] = 200.0
    results["run"]["versions"] = {"torch": "2.13.0", EVIL: EVIL}
    return results


def write(path: Path, results: dict[str, Any]) -> tuple[str, Page]:
    write_report(path, results)
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Page]:
    path = tmp_path_factory.mktemp("run") / "report.html"
    path.write_text("an earlier report")
    return path, *write(path, build_results())


def test_page_is_whole_and_fetches_nothing(report: tuple[Path, str, Page]) -> None:
    path, html, page = report
    assert html.startswith("<!doctype html>") and html.endswith("</html>\n")
    assert page.tags.count("section") == 5 and page.tags.count("h1") == 1
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_text_from_data_is_escaped(report: tuple[Path, str, Page]) -> None:
    _, html, page = report
    assert EVIL not in html
    # task (two rows), answer, description, subject of the codec, stage, version's name and number
    assert page.text.count(EVIL) == 8
    assert "It is high & slow." in page.text and "$\\broken{$" in page.text


def test_figures_are_embedded_and_described(report: tuple[Path, str, Page]) -> None:
    _, _, page = report
    assert page.tags.count("figure") == page.tags.count("figcaption") == len(page.images) == len(page.sources) == 1
    assert all(image["alt"] for image in page.images)
    for data in [image["src"] for image in page.images] + [source["srcset"] for source in page.sources]:
        kind, _, body = data.partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert base64.b64decode(body, validate=True).rstrip().endswith(b"</svg>")


def test_every_answer_is_there_with_its_mark(report: tuple[Path, str, Page]) -> None:
    _, _, page = report
    for number, mark in enumerate(["wrong", "wrong", "correct", "wrong", "wrong"]):
        row = next(i for i, cell in enumerate(page.cells) if cell.startswith(f"Question {number}:"))
        question, truth, answer, probabilities, result = page.cells[row : row + 5]
        assert f"window from {80 * number} s" in question
        assert (truth, answer, result.strip()) == ("high", LEVELS[number % 3], mark)
        assert all(level in probabilities for level in LEVELS) and "70 %" in probabilities
    assert "5 questions about held-out subjects, 1 answered correctly" in page.text


def test_summary_and_numbers(report: tuple[Path, str, Page], tmp_path: Path) -> None:
    _, html, page = report
    assert "11 windows of 5 scans: 3 training and 2 held-out subjects" in page.text
    assert "Nothing beats anything." in page.text and '"verdict no"' not in html
    assert "+20 points" in page.text and "+10" not in page.text and "−5 to 30 %" in page.text
    assert "not a medical device" in page.text and "quick run" not in page.text
    place = page.cells.index("r squared")
    assert page.cells[place : place + 3] == ["r squared", "0.31", "0.20 to 0.40"]
    assert "55 % (right), 41 % (shuffled), — (majority)" in page.text

    results = build_results()
    results["descriptors"]["families"]["all"] |= {
        "difference": {"value": -0.02, "interval": [-0.1, 0.1]},
        "beats_shuffled": False,
    }
    results["settings"]["quick"] = True
    html, page = write(tmp_path / "report.html", results)
    assert '"verdict no"' in html and "−2 points" in page.text
    assert "This was a quick run" in page.text


@pytest.mark.parametrize("missing", ["descriptors", "codec", "run"])
def test_what_was_not_measured_has_no_section(missing: str, tmp_path: Path) -> None:
    results = build_results()
    del results[missing]
    _, page = write(tmp_path / "report.html", results)
    assert page.tags.count("section") == {"descriptors": 3, "codec": 4, "run": 4}[missing]
    assert "None" not in page.text and "nan" not in page.text


def test_same_results_give_the_same_page(report: tuple[Path, str, Page], tmp_path: Path) -> None:
    assert write(tmp_path / "report.html", build_results())[0] == report[1]
