"""
What one core does in a second, for docs/scaling.py: writes rates.csv.

    OMP_NUM_THREADS=1 python benchmarks/rates.py

Seconds are those of the processor (one thread), which other processes change little; the best of some repeats.
Inputs are noise: volumes of the MNI grid at 2 mm (AAL2, gzip), 450 ROIs at TR 0.8 s for 10 minutes, windows of 160
frames, and rows of 320 tokens for a language model of two layers with the width of SmolLM2-135M, in float32.
"""

import gc
import gzip
import platform
import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fmrilm import FmriCodecConfig, FmriCodecModel, FmriLMFeatureExtractor
from fmrilm.processors import Atlas, parcellate, read_scan
from fmrilm.processors.descriptors.measures import CORE_MEASURES, describe
from fmrilm.training.data.shards import write_whole


OUT = Path(__file__).parent / "results" / "rates.csv"
SHAPE, FRAMES, VOLUMES, ROWS, TOKENS = (91, 109, 91), 750, 20, 2, 320


def seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """The least processor time of a call."""
    return min(timeit.repeat(call, gc.enable, time.process_time, repeats, number=1))


def main() -> None:
    torch.set_num_threads(1)
    rng, rows = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as folder:
        atlas, path = Atlas.load("aal2-94", parcels=True), Path(folder, "scan.nii.gz")
        affine = nib.affines.from_matvec(np.eye(3) * 2, (-90, -126, -72))
        volumes = 8000 + 80 * rng.standard_normal((*SHAPE, VOLUMES))
        image = nib.Nifti1Image(volumes.astype(np.int16), affine)
        image.header.set_zooms((2, 2, 2, 0.8))
        path.write_bytes(gzip.compress(image.to_bytes(), 6))
        reading = seconds(lambda: parcellate(read_scan(path), atlas.parcels, atlas.labels), 3)
    rows.append(["volumes read and parcellated", VOLUMES / reading, "volumes/s"])

    atlas = Atlas.load("schaefer-400-tian-s3")
    signal = (1000 + rng.normal(0, 10, (FRAMES, len(atlas)))).astype(np.float32)
    extractor = FmriLMFeatureExtractor(atlases=[atlas])
    rows.append(["scans standardised", 1 / seconds(lambda: extractor.prepare_signal(signal, tr=0.8)), "scans/s"])
    window = rng.standard_normal((160, len(atlas)))
    rows.append(["windows described", 1 / seconds(lambda: describe(window, atlas, CORE_MEASURES)), "windows/s"])

    values, places = torch.randn(1, 450, 160), torch.tensor(atlas.coordinates, dtype=torch.float32)[None]
    with torch.no_grad():
        codec = FmriCodecModel(FmriCodecConfig()).eval()
        rows.append(["windows encoded", 1 / seconds(lambda: codec.encode(values, places)), "windows/s"])

    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9, num_key_value_heads=3
    )
    model = LlamaForCausalLM(config)
    ids = torch.randint(config.vocab_size, (ROWS, TOKENS))
    step = seconds(lambda: model(input_ids=ids, labels=ids).loss.backward())
    operations = 6 * ROWS * TOKENS * sum(weight.numel() for weight in model.parameters())
    # the embedding is looked up
    operations -= 6 * ROWS * TOKENS * model.get_input_embeddings().weight.numel()
    rows.append(["language model trained", operations / step / 1e9, "GFLOP/s"])

    table = pd.DataFrame(rows, columns=["what", "rate", "unit"]).assign(hardware=f"1 core ({platform.machine()})")
    write_whole(OUT, table.to_csv(index=False, float_format="%.4g"))


if __name__ == "__main__":
    main()
