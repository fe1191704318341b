"""What is asked of a scan before it is processed: a known repetition time, real numbers, a column for each ROI."""

from typing import Any

import numpy as np
import torch

from .atlases import Atlas


# plausible repetition times, s: what lies outside is another unit or nothing at all
TR_RANGE = (0.1, 10.0)


def without(atlas: Atlas, missing: np.ndarray) -> Atlas:
    """The atlas' ROIs but for the missing ones, bool [rois]."""
    if missing.all():
        raise ValueError(f"all {len(atlas)} ROIs of {atlas.name!r} are missing: expected a signal")
    keep = np.flatnonzero(~missing)
    rois, networks = (tuple(values[i] for i in keep) for values in (atlas.rois, atlas.networks))
    return Atlas(atlas.name, rois, networks, atlas.coordinates[keep])


def agree(what: str, argument: Any, own: Any) -> Any:
    """The value that is given, once or twice alike; a scan's own value and the call's must not contradict."""
    if argument is None or own is None:
        return own if argument is None else argument
    if isinstance(argument, str) != isinstance(own, str):
        # a name and an atlas of that name say the same; the atlas says more
        argument, own = sorted((argument, own), key=lambda value: isinstance(value, str))
        same = argument.name == own
    else:
        same = argument == own
    if not same:
        raise ValueError(f"{what} given twice and differently: {argument!r} and {own!r}")
    return argument


def check_tr(tr: float | None) -> float:
    if tr is None:
        raise ValueError("the scan's repetition time is not known: give tr=... in seconds")
    if not TR_RANGE[0] < tr < TR_RANGE[1]:
        hint = "; milliseconds?" if tr >= TR_RANGE[1] else ""
        raise ValueError(f"tr must be in {TR_RANGE} seconds, got {tr}{hint}")
    return tr


def as_float_array(scan: Any) -> np.ndarray:
    if isinstance(scan, torch.Tensor):
        scan = scan.detach().cpu().to(torch.float64).numpy()
    array = np.asarray(scan)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"expected a signal of real numbers, got {type(scan).__name__} of dtype {array.dtype}")
    return array.astype(np.float64)


def select_columns(signal: np.ndarray, columns: tuple[str, ...], atlas: Atlas) -> np.ndarray:
    """Columns of a table in the atlas' order, found by name; columns that are not in the atlas are left out."""
    position = {name: i for i, name in enumerate(columns)}
    if len(position) < len(columns):
        raise ValueError(f"expected {len(columns)} different column names, got {len(position)}")
    if missing := [roi for roi in atlas.rois if roi not in position]:
        unknown = [name for name in columns if name not in set(atlas.rois)]
        raise ValueError(
            f"{len(missing)} of the {len(atlas)} ROIs of {atlas.name!r} are not among the {len(columns)} columns: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; columns that the atlas does not have: "
            f"{', '.join(unknown[:5]) or 'none'}{', ...' if len(unknown) > 5 else ''}"
        )
    return signal[:, [position[roi] for roi in atlas.rois]]


def check_shape(signal: np.ndarray, atlas: Atlas) -> None:
    expected = f"expected [time, rois] = [*, {len(atlas)}] for atlas {atlas.name!r}, got {signal.shape}"
    if signal.ndim != 2:
        raise ValueError(f"{expected}: not two-dimensional")
    if signal.shape[1] != len(atlas):
        hint = "transposed?" if signal.shape[0] == len(atlas) else f"{signal.shape[1]} ROIs instead of {len(atlas)}"
        raise ValueError(f"{expected}: {hint}")
    if len(signal) == 0:
        raise ValueError(f"{expected}: no frames")


def check_finite(signal: np.ndarray, atlas: Atlas) -> None:
    bad = ~np.isfinite(signal)
    if bad.any():
        first = int(np.flatnonzero(bad.any(axis=0))[0])
        raise ValueError(
            f"{int(bad.sum())} of {signal.size} values are NaN or infinite, the first ROI with one is "
            f"{atlas.rois[first]!r} (column {first}); expected finite numbers"
        )
