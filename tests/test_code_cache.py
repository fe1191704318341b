"""Cached codes: equal to fresh ones, computed once, never mixed up."""

import numpy as np
import pytest

from fmrilm.training.codec.trainer import encode_items
from fmrilm.training.data import code_cache
from fmrilm.training.data.code_cache import cached_codes


@pytest.fixture
def items() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {
            "signal": rng.standard_normal((16, rois)).astype(np.float32),
            "coordinates": rng.uniform(-60, 60, (rois, 3)).astype(np.float32),
            "descriptors": np.zeros(1, np.float32),
        }
        for rois in (5, 7, 5)
    ]


def test_codes_are_computed_once_and_stay_the_same(items, tiny_codec, tmp_path, monkeypatch) -> None:
    expected = encode_items(tiny_codec, items)
    assert np.array_equal(cached_codes(tiny_codec, items, tmp_path), expected)
    monkeypatch.setattr(code_cache, "encode_items", lambda *_: pytest.fail("encoded again"))
    assert np.array_equal(cached_codes(tiny_codec, items, tmp_path), expected)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("change", ["codec", "signal", "coordinates"])
def test_other_inputs_are_encoded_anew(change: str, items, tiny_codec, make_codec, tmp_path) -> None:
    before = cached_codes(tiny_codec, items, tmp_path)
    codec = make_codec(hidden_size=32) if change == "codec" else tiny_codec
    if change != "codec":
        items[0][change] = items[0][change][::-1].copy()
    after = cached_codes(codec, items, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert np.array_equal(after, encode_items(codec, items)) and not np.array_equal(after, before)


def test_interrupted_encoding_leaves_nothing_behind(items, tiny_codec, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(code_cache.Dataset, "save_to_disk", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        cached_codes(tiny_codec, items, tmp_path)
    assert not list(tmp_path.iterdir())
