"""Codes of a frozen codec on disk: computed once, read by every epoch and stage that comes after."""

import hashlib
import shutil
import tempfile
from pathlib import Path

import numpy as np
from datasets import Dataset

from fmrilm.modeling_fmricodec import FmriCodecModel

from ..codec.trainer import encode_items


def cached_codes(codec: FmriCodecModel, items: list[dict[str, np.ndarray]], folder: Path) -> np.ndarray:
    """
    `encode_items` of these items by this codec, int64 [items, tokens], kept as an Arrow dataset in `folder` under a
    name that changes with the codec's weights and the items.
    """
    target = Path(folder) / f"codes-{_fingerprint(codec, items)}"
    if not target.exists():
        codes = encode_items(codec, items)
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=target.parent))
        try:
            Dataset.from_dict({"codes": codes}).save_to_disk(staging)
            staging.rename(target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return np.asarray(Dataset.load_from_disk(target).with_format("numpy")["codes"][:])


def _fingerprint(codec: FmriCodecModel, items: list[dict[str, np.ndarray]]) -> str:
    digest = hashlib.sha256(codec.config.to_json_string().encode())
    for name, tensor in codec.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.float().cpu().numpy().tobytes())
    for item in items:
        digest.update(repr(item["signal"].shape).encode())
        digest.update(np.ascontiguousarray(item["signal"]).tobytes())
        digest.update(np.ascontiguousarray(item["coordinates"]).tobytes())
    return digest.hexdigest()[:16]
