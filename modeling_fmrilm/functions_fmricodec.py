"""Functions of place: what a scan is at any point of the brain, from its signal at any regions."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

from .configuration_fmrilm import FmriCodecConfig
from .layers_fmricodec import fourier_features


# wavelengths from 400 mm down to 70 mm: what regions that lie together share, not what sets each one apart
FREQUENCIES = 6
WIDTH = 256


class FmriCodecFunctions(nn.Module):
    """
    Factor analysis whose loadings are functions of place. At each frame the signal of the ROI at x is
    sum_k f_k(x) a_k, plus noise of its own as large as the prior of the coefficients a. Their posterior mean exists
    for any regions, in any number, some of them missing; the functions then say what the signal is elsewhere.
    """

    def __init__(self, config: FmriCodecConfig):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6 * FREQUENCIES, WIDTH), nn.GELU(), nn.Linear(WIDTH, config.num_functions)
        )

    def init_weights(self) -> None:
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                init.normal_(layer.weight, std=layer.in_features**-0.5)

    def forward(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Functions float32 [..., num_functions] at coordinates [..., 3] in mm."""
        with maybe_autocast(coordinates.device.type, enabled=False):
            features = fourier_features(coordinates, FREQUENCIES)
            return self.layers(features.to(next(self.parameters()).dtype)).float()

    @staticmethod
    def coefficients(functions: torch.Tensor, patches: torch.Tensor, roi_mask: torch.Tensor | None) -> torch.Tensor:
        """
        Posterior means float32 [batch, steps, functions, patch_length] of patches [batch, steps, rois, patch_length],
        zero where there are no data, under functions [batch, rois, functions]; roi_mask bool [batch, steps, rois]:
        ROIs that hold data, None if all do.
        """
        with maybe_autocast(patches.device.type, enabled=False):
            functions = functions[:, None]
            if roi_mask is not None:
                functions = functions * roi_mask[..., None]
            identity = torch.eye(functions.shape[-1], device=functions.device)
            # positive definite by its making, so that no check of the values is needed
            factor = torch.linalg.cholesky_ex(functions.mT @ functions + identity).L
            return torch.cholesky_solve(functions.mT @ patches.float(), factor)

    def negative_log_likelihood(self, covariance: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
        """Of one scan, for each ROI: covariance [rois, rois] at coordinates [rois, 3] in mm; its noise is the best."""
        functions = self(coordinates)
        rois = len(functions)
        identity = torch.eye(functions.shape[-1], device=functions.device)
        factor = torch.linalg.cholesky(functions.mT @ functions + identity)
        half = torch.linalg.solve_triangular(factor, functions.mT, upper=False)
        unexplained = covariance.trace() - ((half @ covariance) * half).sum()
        return 2 * factor.diagonal().log().sum() / rois + (unexplained / rois).log()


__all__ = ["FmriCodecFunctions"]
