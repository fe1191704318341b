"""The quick demo, once, with the real scans and the real language model, and what it leaves behind."""

import json
from pathlib import Path

import pytest

from fmrilm.training.data.open_data import open_scans
from fmrilm.training.demo import HELD_OUT, run_demo
from fmrilm.training.hub.model_card import read_card
from fmrilm.training.hub.push import find_problems


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def finished(quick_demo: Path) -> Path:
    return quick_demo


@pytest.fixture(scope="module")
def results(finished: Path) -> dict:
    return json.loads((finished / "results.json").read_text())


def test_run_leaves_model_results_and_report_and_nothing_half_written(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {"codes", "model", "results.json", "report.html"}
    assert {path.name for path in finished.parent.iterdir()} == {"run"}
    assert (finished / "model" / "model.safetensors").stat().st_size > 400e6


def test_people_of_each_held_out_dataset_are_questioned(results: dict) -> None:
    held_out = {name: counts["held_out"] for name, counts in results["data"]["datasets"].items()}
    assert held_out == {**HELD_OUT, "lemon": 0}
    assert results["data"]["training_subjects"] + results["data"]["held_out_subjects"] == 15
    asked = {answer["subject"].rsplit(" ", 1)[0] for answer in results["answers"]}
    assert asked == set(HELD_OUT)


def test_every_answer_has_probabilities_that_sum_to_one(results: dict) -> None:
    for answer in results["answers"]:
        assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-3)
        assert answer["answer"] == max(answer["probabilities"], key=answer["probabilities"].get)


def test_results_compare_right_swapped_noise_and_majority(results: dict) -> None:
    families = results["questions"]["families"]
    assert set(families) == {"connectivity", "strength", "autocorrelation", "all"}
    for family in families.values():
        low, high = family["difference"]["interval"]
        assert family["beats_swapped"] == (low > 0)
        assert low <= high
        for condition in ("right", "swapped", "noise", "majority"):
            assert 0 <= family[condition]["accuracy"] <= 1


def test_no_identifier_of_a_person_is_written(finished: Path) -> None:
    identifiers = {scan.subject for scan in open_scans()}
    paths = [finished / "results.json", finished / "report.html", finished / "model" / "README.md"]
    for path in [*paths, *(finished / "model").glob("*.json")]:
        text = path.read_text()
        assert not [name for name in identifiers if name in text], path.name


def test_finished_run_is_not_repeated(finished: Path, capsys: pytest.CaptureFixture) -> None:
    before = (finished / "results.json").stat().st_mtime_ns
    run_demo(finished, quick=True)
    assert "holds a finished run" in capsys.readouterr().out
    assert (finished / "results.json").stat().st_mtime_ns == before


def test_card_of_the_model_states_what_was_measured(finished: Path, results: dict) -> None:
    card = read_card(finished / "model" / "README.md")
    assert (card.data.base_model, card.data.license) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    assert f"0 of the {results['data']['held_out_subjects']} held-out people are among them" in card.text
    assert "learned next to nothing" in card.text
    families = results["questions"]["families"]
    accuracies = [result for result in card.data.eval_results if result.metric_type == "balanced_accuracy"]
    assert {result.dataset_config: result.metric_value for result in accuracies} == {
        name: pytest.approx(family["right"]["accuracy"], abs=1e-4) for name, family in families.items()
    }
    assert not list(find_problems(finished / "model"))
