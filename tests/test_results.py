"""Pages of results and scaling are what their scripts make, and the demo's table is what its runs hold."""

import re
import runpy
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CONDITIONS = ("right", "shuffled", "noise", "majority", "codes_ridge")


@pytest.fixture(scope="module")
def script() -> dict:
    return runpy.run_path(str(ROOT / "docs" / "results.py"))


@pytest.fixture(scope="module")
def demo() -> dict:
    return runpy.run_path(str(ROOT / "benchmarks" / "demo.py"))


def results(seed: int) -> dict:
    """A run's results.json as far as the table goes; the first seed's descriptions state nothing."""
    family = {name: {"accuracy": 0.1 * place + 0.01 * seed} for place, name in enumerate(CONDITIONS)}
    family["difference"] = {"value": -0.1}
    shares = {name: None if seed == 0 else 0.5 for name in ("right", "shuffled", "majority")}
    return {
        "settings": {"quick": False, "seed": seed},
        "descriptors": {
            "families": {"strength": family, "all": family},
            "descriptions": {"statements": 2 * seed, "statement_accuracy": shares},
        },
        "codec": {"r_squared": {"value": 0.6 + 0.1 * seed}, "fc_correlation": {"value": 0.8}},
        "run": {"seconds": {"codec": 60.0 * seed, "total": 120.0}},
    }


def test_page_is_what_the_script_makes(script: dict) -> None:
    assert script["page"](RESULTS) == script["PAGE"].read_text(encoding="utf-8"), "run: python docs/results.py"


def test_plots_in_the_page_are_drawn(script: dict, tmp_path: Path) -> None:
    script["draw"](RESULTS, tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn and drawn == set(re.findall(r"\(images/([^)]+)\)", script["PAGE"].read_text(encoding="utf-8")))
    assert all((ROOT / "docs" / "images" / name).exists() for name in drawn)


def test_scaling_is_what_its_script_makes() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "scaling.py"))
    assert script["page"]() == script["PAGE"].read_text(encoding="utf-8"), "run: python docs/scaling.py"


def test_table_of_the_demo_is_over_seeds(demo: dict, script: dict, tmp_path: Path) -> None:
    table = demo["table"]([results(seed) for seed in range(3)])
    rows = {(row.what, row.condition): row for row in table.itertuples()}
    right = rows["balanced accuracy, strength", "shuffled"]
    assert (right.mean, right.lowest, right.highest, right.runs) == pytest.approx((0.11, 0.1, 0.12, 3))
    assert rows["true statements in descriptions", "majority"].runs == 2
    assert rows["R2 of the decoded signal", ""].mean == pytest.approx(0.7)
    table.to_csv(tmp_path / "demo.csv", index=False, float_format="%.4f")
    lines = script["page"](tmp_path).splitlines()
    assert f"| what | {' | '.join(CONDITIONS)} | right minus shuffled | value |" in lines
    assert any(line.startswith("| balanced accuracy, all | 0.01 (0 to 0.02) | 0.11 (0.1 to 0.12) |") for line in lines)
    undefined = demo["table"]([results(0)])
    undefined.to_csv(tmp_path / "demo.csv", index=False)
    assert "| true statements in descriptions |  |" in script["page"](tmp_path)
