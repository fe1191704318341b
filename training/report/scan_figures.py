"""Drawings of one scan: the signal and what its codes keep of it, the codes over time, values at the ROIs."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from fmrilm.processors.descriptors.networks import NETWORKS

from .page import as_number, drawing


SIGNAL, RECONSTRUCTION = "#8b93a0", "#0b7fc7"
DARK = "#1a2330"


@dataclass(frozen=True)
class ScanView:
    """
    A scan, or a window of one, and what the codec makes of it.

    signal, reconstruction: [time, rois], z-scores, NaN where a ROI is missing. repetition_time: s. networks: one per
    ROI. codes: [patches, tokens_per_patch, levels].
    """

    signal: np.ndarray
    reconstruction: np.ndarray
    repetition_time: float
    networks: tuple[str, ...]
    codes: np.ndarray

    @property
    def seconds(self) -> float:
        return len(self.signal) * self.repetition_time

    @property
    def order(self) -> np.ndarray:
        """ROIs by network: those of Yeo in their order, then the others by name."""
        known = list(NETWORKS)
        rank = {n: (known.index(n) if n in known else len(known), n) for n in self.networks}
        return np.array(sorted(range(len(self.networks)), key=lambda roi: rank[self.networks[roi]]))

    @property
    def roi_correlations(self) -> np.ndarray:
        """Correlation [rois] of each ROI's signal and reconstruction; NaN where one of them is flat or missing."""
        pair = [values - values.mean(0) for values in (np.float64(self.signal), np.float64(self.reconstruction))]
        with np.errstate(invalid="ignore", divide="ignore"):
            return (pair[0] * pair[1]).sum(0) / np.sqrt((pair[0] ** 2).sum(0) * (pair[1] ** 2).sum(0))

    @property
    def connectivity(self) -> tuple[np.ndarray, np.ndarray]:
        """FC [rois, rois] of signal and reconstruction: Pearson; NaN where a ROI is flat or missing."""
        with np.errstate(invalid="ignore", divide="ignore"):
            signal, reconstruction = (np.corrcoef(np.float64(x).T) for x in (self.signal, self.reconstruction))
            return np.asarray(signal), np.asarray(reconstruction)

    @property
    def connectivity_similarity(self) -> float:
        """Correlation of the two matrices over all pairs of the scan's ROIs; NaN where a reconstruction is flat."""
        pairs = np.triu_indices(len(self.networks), 1)
        values = np.stack([matrix[pairs] for matrix in self.connectivity])
        values = values[:, np.isfinite(values[0])]
        with np.errstate(invalid="ignore", divide="ignore"):
            return float(np.corrcoef(values)[0, 1]) if values.shape[1] > 1 else float("nan")


def network_name(network: str) -> str:
    return NETWORKS.get(network, network)


def _heat_map(
    axes: Axes, values: np.ndarray, cmap: str, limits: tuple[float, float], extent: tuple[float, float, float, float]
) -> AxesImage:
    """Values [rows, columns] as colours, from the lower to the upper limit."""
    low, high = limits
    return axes.imshow(values, cmap, vmin=low, vmax=high, aspect="auto", interpolation="none", extent=extent)


def _four(errors: np.ndarray) -> list[int]:
    """ROIs at 5, 35, 65 and 95 % down the list, the least error first, of those that have one."""
    ranked = np.argsort(errors)[: max(int(np.isfinite(errors).sum()), 1)]
    return [int(ranked[int(share * (len(ranked) - 1))]) for share in (0.05, 0.35, 0.65, 0.95)]


def carpet(view: ScanView, only_signal: bool = False) -> str:
    """Every ROI over time, by network: the signal, and beside it the reconstruction."""
    names = ("signal",) if only_signal else ("signal", "reconstruction from codes")
    order = view.order
    shown = [np.asarray(values, float)[:, order] for values in (view.signal, view.reconstruction)]

    def draw(figure: Figure) -> None:
        limit = np.nanpercentile(np.abs(shown[0]), 98)
        panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for axes, values, title in zip(panels, shown, names, strict=False):
            image = _heat_map(axes, values.T, "RdBu_r", (-limit, limit), (0, view.seconds, len(order), 0))
            _mark_networks(view, axes, axes.axhline)
            axes.set(title=title, xlabel="time (s)")
        panels[0].set_ylabel("ROIs, by network")
        figure.colorbar(image, ax=panels, label="z-score", extend="both", shrink=0.7, pad=0.01)

    caption = "One row per ROI; blank rows are ROIs that the scan does not have."
    if not only_signal:
        caption = (
            "One row per ROI, the same colours in both panels. Slow waves shared by many ROIs should stand in both; a "
            "paler reconstruction has lost amplitude."
        )
    title = "Every ROI over time" if only_signal else "Every ROI over time: signal and reconstruction"
    return drawing(title, draw, 3.9, caption)


def traces(view: ScanView) -> str:
    """Four ROIs over time, chosen by rule and not by hand: from nearly the best kept to nearly the worst."""
    cross = view.roi_correlations
    chosen = _four(-cross)

    def draw(figure: Figure) -> None:
        clock = np.arange(len(view.signal)) * view.repetition_time
        panels = figure.subplots(len(chosen), 1, sharex=True, sharey=True)
        for axes, roi in zip(panels, chosen, strict=True):
            axes.plot(clock, view.signal[:, roi], color=SIGNAL, linewidth=1.1, label="signal")
            axes.plot(clock, view.reconstruction[:, roi], color=RECONSTRUCTION, linewidth=1.5, label="reconstruction")
            name = network_name(view.networks[roi])
            axes.set_title(f"{name}, ROI {roi + 1}: r = {as_number(cross[roi])}", loc="left")
            axes.set(ylabel="z-score", xlim=(0, view.seconds))
        panels[-1].set_xlabel("time (s)")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)

    return drawing(
        "Four ROIs over time",
        draw,
        5.6,
        "From nearly the best to nearly the worst ROI of this window: 5, 35, 65 and 95 % down the list, ranked by "
        "the correlation r of signal and reconstruction.",
    )


def connectivity(view: ScanView) -> str:
    """FC of the signal, of the reconstruction, and their difference."""
    rois = len(view.networks)
    # a flat reconstruction has no correlation: NaN, drawn blank
    matrices = [matrix[np.ix_(view.order, view.order)] for matrix in view.connectivity]

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 3, sharey=True)
        titles = ("signal", "reconstruction", "reconstruction − signal")
        for axes, matrix, title in zip(panels, [*matrices, matrices[1] - matrices[0]], titles, strict=True):
            image = axes.imshow(matrix, "RdBu_r", vmin=-1, vmax=1, interpolation="none", extent=(0, rois, rois, 0))
            _mark_networks(view, axes, axes.axhline, axes.axvline)
            axes.set(title=title, xticks=[], xlabel="ROIs, same order")
        figure.colorbar(image, ax=panels, label="correlation (difference: same scale)", shrink=0.75, pad=0.01)

    return drawing(
        "Functional connectivity of signal and reconstruction",
        draw,
        3.7,
        "Correlation of every ROI with every other. Over all pairs the two matrices correlate with r = "
        f"{as_number(view.connectivity_similarity)}; red in the difference is correlation that the codec adds.",
    )


def forecast(view: ScanView, samples: np.ndarray, expected: np.ndarray) -> str:
    """
    The window's last frames, and what was expected of them before: samples [samples, frames, rois] and their expected
    signal [frames, rois], in the view's z-scores. Four ROIs, from nearly the best forecast to nearly the worst.
    """
    frames = len(expected)
    before, after = view.signal[:-frames], view.signal[-frames:]
    errors = np.square(expected - after).mean(0) / np.square(after - before.mean(0)).mean(0)
    chosen = _four(errors)
    low, high = np.quantile(samples, (0.1, 0.9), axis=0)

    def draw(figure: Figure) -> None:
        clock = (np.arange(len(view.signal)) - len(before)) * view.repetition_time
        shown, ahead = slice(-3 * frames, None), slice(len(before), None)
        panels = figure.subplots(len(chosen), 1, sharex=True, sharey=True)
        for axes, roi in zip(panels, chosen, strict=True):
            axes.plot(clock[shown], view.signal[shown, roi], color=SIGNAL, linewidth=1.1, label="signal")
            axes.fill_between(clock[ahead], low[:, roi], high[:, roi], color=RECONSTRUCTION, alpha=0.2, label="80 %")
            axes.plot(clock[ahead], expected[:, roi], color=RECONSTRUCTION, linewidth=1.5, label="forecast")
            for name, value, style in (("last frame", before[-1, roi], ":"), ("mean", before[:, roi].mean(), "--")):
                axes.plot(clock[ahead], np.full(frames, value), style, color=DARK, linewidth=0.9, label=name)
            axes.axvline(0, color=DARK, linewidth=0.6)
            axes.set_title(f"{network_name(view.networks[roi])}, ROI {roi + 1}", loc="left")
            axes.set_ylabel("z-score")
        panels[-1].set_xlabel("time from the last frame that was known (s)")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=5)

    return drawing(
        f"The last {frames * view.repetition_time:.0f} s, forecast from what came before",
        draw,
        5.6,
        "From nearly the best to nearly the worst forecast: 5, 35, 65 and 95 % down the list of ROIs, by squared "
        f"error against that of the mean. Over all ROIs and frames the forecast's R² is {as_number(_skill(errors))}, "
        f"where the mean has 0; {as_number(_covered(after, low, high), '.0%')} of the frames lie in the band.",
    )


def _skill(errors: np.ndarray) -> float:
    """R2 against the mean, mean over the ROIs that are there."""
    known = errors[np.isfinite(errors)]
    return 1 - float(known.mean()) if len(known) else float("nan")


def _covered(signal: np.ndarray, low: np.ndarray, high: np.ndarray) -> float:
    """Share of a signal's values between two bounds, of those that are there."""
    known = np.isfinite(signal)
    return float(((signal >= low) & (signal <= high))[known].mean()) if known.any() else float("nan")


def token_map(title: str, panels: dict[str, np.ndarray], seconds: float, label: str, caption: str) -> str:
    """Values [patches, tokens_per_patch] of latent tokens over time, a panel each, every panel with its own scale."""
    patches, tokens = next(iter(panels.values())).shape

    def draw(figure: Figure) -> None:
        axes_of = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, values) in zip(axes_of, panels.items(), strict=True):
            limit = float(np.abs(values).max()) or 1.0
            colours, lowest = ("PuOr", -limit) if (values < 0).any() else ("viridis_r", 0)
            image = _heat_map(axes, values.T, colours, (lowest, limit), (0, seconds, tokens - 0.5, -0.5))
            axes.set_title(name, loc="left")
            axes.set(ylabel="token of the patch", yticks=range(0, tokens, -(-tokens // 8)))
            figure.colorbar(image, ax=axes, label=label, pad=0.01)
        axes_of[-1].set(xlabel="time (s)", xticks=np.linspace(0, seconds, min(patches, 20) + 1).round())

    return drawing(title, draw, 0.7 + 1.5 * len(panels), caption)


def glass_brain(title: str, values: np.ndarray, coordinates: np.ndarray, label: str, caption: str) -> str:
    """Values [rois] as dots at the ROIs' coordinates [rois, 3] (MNI mm), seen through a glass brain; NaN: no dot."""
    # nilearn takes seconds to import
    from nilearn.plotting import plot_markers

    known = np.isfinite(values)
    limits = (float(values[known].min()), float(values[known].max())) if known.any() else (0.0, 1.0)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        figure.colorbar(ScalarMappable(Normalize(*limits), "viridis"), ax=axes, label=label, shrink=0.8, pad=0.01)
        if not known.any():
            return
        plot_markers(
            values[known],
            coordinates[known],
            node_size=35,
            node_cmap="viridis",
            node_vmin=limits[0],
            node_vmax=limits[1],
            display_mode="lyrz",
            axes=axes,
            figure=figure,
            colorbar=False,
            # the outlines' colour: that of the figure's ink, light on a dark page
            black_bg=sum(to_rgb(axes.xaxis.label.get_color())) > 1.5,
        )
        # the page shows through: no black picture lies behind the brains
        for panel in figure.axes:
            for image in panel.images:
                image.remove()

    return drawing(title, draw, 3.0, caption)


def _mark_networks(view: ScanView, axes: Axes, *lines: Callable[..., object]) -> None:
    """Lines between networks and their names, for ROIs in the view's order along the axes."""
    networks = np.array(view.networks)[view.order]
    edges = np.flatnonzero(networks[1:] != networks[:-1]) + 1
    bounds = np.array([0, *edges, len(networks)])
    for edge in edges:
        for line in lines:
            line(edge, color=DARK, linewidth=0.4, alpha=0.6)
    axes.set_yticks((bounds[:-1] + bounds[1:]) / 2, [network_name(name) for name in networks[bounds[:-1]]])
    axes.tick_params(length=0)
