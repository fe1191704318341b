import base64
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmrilm.training.report.report import ReportExample, write_report


EVIL = "<script>alert(1)</script>"
VOID = {"meta", "img", "source", "br", "link", "input"}
LEVELS = ("low", "typical", "high")


class Page(HTMLParser):
    """Reads a page, checks that its tags nest, and collects images, links and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.sources: list[dict[str, str | None]] = []
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.cells: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("img", "source"):
            (self.images if tag == "img" else self.sources).append(values)
        if values.get("id"):
            self.ids.add(values["id"])
        if values.get("href"):
            self.links.add(values["href"])
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


def score(accuracy: float) -> dict[str, Any]:
    return {"accuracy": accuracy, "interval": [accuracy - 0.07, accuracy + 0.07]}


def family(questions: int, right: float, swapped: float) -> dict[str, Any]:
    gap = right - swapped
    return {
        "questions": questions,
        "right": score(right),
        "swapped": score(swapped),
        "noise": score(0.34),
        "majority": {"accuracy": 1 / 3, "interval": [1 / 3, 1 / 3]},
        "difference": {"value": gap, "interval": [gap - 0.1, gap + 0.1]},
        "beats_swapped": gap > 0.1,
    }


def build_results() -> dict[str, Any]:
    def subject(name: str, r_squared: float) -> dict[str, Any]:
        scores = {"r_squared": r_squared, "fc_correlation": 0.88, "pca_r_squared": 0.31, "pca_fc_correlation": 0.9}
        means = {"mean_r_squared": 0.0, "mean_fc_correlation": None}
        return {"subject": name, "dataset": "hcp", "windows": 7, **scores, **means}

    def answer(number: int) -> dict[str, Any]:
        return {
            "subject": EVIL if number == 2 else "hcp 1",
            "window_start_seconds": 80.0 * number,
            "question": f"Question {number}: how strongly is the limbic network connected?",
            "truth": "high",
            "answer": LEVELS[number % 3],
            "probabilities": dict(zip(LEVELS, np.roll([0.7, 0.2, 0.1], number).tolist(), strict=True)),
        }

    return {
        "data": {
            "training_subjects": 10,
            "held_out_subjects": 1,
            "training_windows": 70,
            "held_out_windows": 40,
            "datasets": {"hcp": {"training": 5, "held_out": 2}, EVIL: {"training": 5, "held_out": 1}},
            "atlases": ["aal2-94", EVIL],
        },
        "codec": {
            "numbers_per_window": 12,
            "bits_per_window": 60,
            "codebook_size": 32,
            "codebook_used": 20,
            "perplexity": 15.3,
            "subjects": [subject("hcp 1", 0.2), subject(EVIL, 0.3)],
        },
        "questions": {
            "families": {
                "connectivity": family(900, 0.61, 0.40),
                "all": family(950, 0.60, 0.40),
                "$\\broken{$": family(50, 0.35, 0.36),
            }
        },
        "answers": [answer(number) for number in range(5)],
        "descriptions": {
            "examples": [{"subject": "hcp 1", "generated": f"It is low. {EVIL}", "truth": "It is high & slow."}],
            "statement_accuracy": {"right": 0.55, "swapped": 0.41, "majority": 0.36},
        },
        "run": {
            "seconds": {"prepare": 6.0, EVIL: 200.0},
            "peak_memory_gb": 3.1,
            "versions": {"torch": "2.13.0", EVIL: EVIL},
            "quick": False,
        },
    }


def build_example() -> ReportExample:
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(48, 7))
    return ReportExample(
        title=f"hcp 1 {EVIL}",
        signal=signal,
        reconstruction=signal / 2 + rng.normal(size=signal.shape) / 4,
        repetition_time=2.0,
        networks=("Default", "Vis", "Vis", "$unknown", "SomMot", "Default", "Limbic"),
        codes=rng.integers(0, 20, (3, 4)),
        code_counts=np.r_[rng.integers(1, 9, 20), np.zeros(12, int)],
    )


def write(path: Path, results: dict[str, Any], example: ReportExample | None = None) -> tuple[str, Page]:
    write_report(path, results, example or build_example())
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Page]:
    path = tmp_path_factory.mktemp("run") / "report.html"
    path.write_text("an earlier report")
    return path, *write(path, build_results())


def test_page_is_whole_and_alone(report: tuple[Path, str, Page]) -> None:
    path, html, page = report
    assert html.startswith("<!doctype html>") and html.endswith("</html>\n")
    assert page.tags.count("section") == 7 and page.tags.count("h1") == 1
    assert page.links == {f"#{name}" for name in page.ids}
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_nothing_is_fetched_or_run(report: tuple[Path, str, Page]) -> None:
    _, html, page = report
    assert "http://" not in html and "https://" not in html
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in html and "@import" not in html


def test_text_from_data_is_escaped(report: tuple[Path, str, Page]) -> None:
    _, html, page = report
    assert EVIL not in html
    # datasets, atlases, answers, title, subjects, description, stages, version's name and number
    assert page.text.count(EVIL) == 9
    assert "It is high & slow." in page.text and "$\\broken{$" in page.text


def test_figures_are_embedded_and_described(report: tuple[Path, str, Page]) -> None:
    _, _, page = report
    assert page.tags.count("figure") == page.tags.count("figcaption") == len(page.images) == len(page.sources) == 6
    assert len({image["alt"] for image in page.images}) == 6 and all(image["alt"] for image in page.images)
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
        assert (truth, answer, result) == ("high", LEVELS[number % 3], mark)
        assert all(level in probabilities for level in LEVELS) and "70\u00a0%" in probabilities
    assert "5 questions about people the model never saw, 1 answered correctly" in page.text


def test_summary_says_what_was_found(report: tuple[Path, str, Page], tmp_path: Path) -> None:
    _, _, page = report
    assert "70 windows of 10 people" in page.text and "40 windows of 1 other it had never seen" in page.text
    assert "The right scan beats a swapped one (+20 points, +10 to +30)" in page.text
    assert "beats a swapped one in 1: connectivity." in page.text
    assert "not a medical device" in page.text and "quick run" not in page.text

    results = build_results()
    results["questions"]["families"]["all"] = family(950, 0.38, 0.40)
    results["run"]["quick"] = True
    _, page = write(tmp_path / "report.html", results)
    assert "The right scan does not beat a swapped one (−2 points, −12 to +8)" in page.text
    assert "This was a quick run" in page.text


def nulled(value: Any, keep: tuple[str, ...] = ("subject", "question", "quick")) -> Any:
    """The same shape with every number, truth value and text null, as far as it is data."""
    if isinstance(value, dict):
        return {key: item if key in keep else nulled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [nulled(item) for item in value]
    return None


def test_null_becomes_a_dash(report: tuple[Path, str, Page], tmp_path: Path) -> None:
    assert report[2].cells.count("—") == 3  # FC of the mean: two subjects and their mean
    _, page = write(tmp_path / "report.html", nulled(build_results()))
    assert "None" not in page.text and "nan" not in page.text
    assert page.cells.count("—") > 20 and "Peak memory —." in page.text

    results = build_results()
    results["questions"]["families"]["connectivity"]["noise"] = {"accuracy": None, "interval": None}
    _, page = write(tmp_path / "report.html", results)
    assert page.cells.count("——") == 1


@pytest.mark.filterwarnings("error")
def test_flat_reconstruction_is_shown_without_a_warning(tmp_path: Path) -> None:
    example = build_example()
    example.reconstruction[:, 2] = 0
    _, page = write(tmp_path / "report.html", build_results(), example)
    assert len(page.images) == 6 and "correlate with r = —" in page.text


def test_same_results_give_the_same_page(report: tuple[Path, str, Page], tmp_path: Path) -> None:
    assert write(tmp_path / "report.html", build_results())[0] == report[1]
