"""The plugin in the installed Brainmarks, which finds it by itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
from brainmarks.models.registry import create_model, list_models
from torch.utils.data import default_collate

from fmrilm.training.evaluation.ask import EncodedWindow, embed_windows


@pytest.fixture
def centroids(tmp_path: Path) -> Path:
    path = tmp_path / "centroids.csv"
    rng = np.random.default_rng(0)
    rows = [
        f"{i},17Networks_{side}H_Net_{i},{','.join(map(str, rng.integers(-60, 60, 3)))}"
        for i, side in zip(range(1, 401), "L" * 200 + "R" * 200, strict=True)
    ]
    path.write_text("\n".join(["ROI Label,ROI Name,R,A,S", *rows]) + "\n")
    return path


@pytest.fixture
def created(model_folder: Path, centroids: Path) -> tuple:
    """Transform and model."""
    return create_model("fmrilm_schaefer400", model=str(model_folder), centroids=str(centroids))


def sample(frames: int, tr: float = 1.0, rois: int = 400, seed: int = 0) -> dict:
    """As Brainmarks gives it; the parcels have a signal in common."""
    generator = torch.Generator().manual_seed(seed)
    bold = torch.randn(frames, 1, generator=generator) + 0.3 * torch.randn(frames, rois, generator=generator)
    return {"bold": bold, "mean": torch.randn(1, rois), "std": torch.rand(1, rois), "tr": tr, "target": 1}


@pytest.mark.parametrize("frames", [4, 16, 160])
def test_brainmarks_finds_the_model_and_gets_its_embeddings(frames: int, created: tuple, llama) -> None:
    assert "fmrilm_schaefer400" in list_models()
    transform, model = created
    samples = [transform(sample(frames, seed=seed)) for seed in range(2)]
    batch = default_collate(samples)
    assert batch["target"].tolist() == [1, 1]
    pooled, registers, tokens = model(batch)
    # a window of 16 frames of 2 s holds 4 patches of 2 tokens
    patches = min(4, -(-max(frames // 2, 4) // 4))
    assert pooled.shape == (2, 1, 32) and registers.shape == (2, 4, 32) and tokens.shape == (2, 8, 32)
    assert torch.allclose(torch.cat([tokens, registers], 1).mean(1), pooled[:, 0], atol=1e-5)
    # one patch of so small a codec may well be the same in both
    assert frames < 160 or not torch.allclose(pooled[0], pooled[1])
    with torch.no_grad():
        codes = llama.model.get_fmri_codes(
            batch["fmri_values"], model.coordinates.expand(2, -1, -1), batch["fmri_mask"]
        )
    kept = [row[row[:, 0] >= 0] for row in codes]
    assert len(kept[0]) == 2 * patches
    windows = [EncodedWindow(row.numpy(), llama.model.codec.scan_features(row[None])[0].numpy()) for row in kept]
    np.testing.assert_allclose(embed_windows(llama, windows), pooled[:, 0].numpy(), atol=1e-5)


def test_constant_parcels_are_missing(created: tuple) -> None:
    transform, model = created
    holed = sample(40)
    holed["bold"][:, 7] = 0
    prepared = transform(holed)
    assert not prepared["fmri_mask"][7].any() and prepared["fmri_mask"].any(1).sum() == 399
    assert torch.isfinite(model(default_collate([prepared])).cls_embeds).all()


def test_other_orders_and_parcellations_are_refused(created: tuple, model_folder: Path, centroids: Path) -> None:
    with pytest.raises(ValueError, match="expected 400 parcels, got 450"):
        created[0](sample(40, rois=450))
    centroids.write_text(centroids.read_text().replace("17Networks", "7Networks"))
    with pytest.raises(ValueError, match="400 parcels named 17Networks_..., got 400, the first '7Networks_LH_Net_1'"):
        create_model("fmrilm_schaefer400", model=str(model_folder), centroids=str(centroids))
