"""A scan's codes as one vector: what the regions of a brain do together, as the codes tell it."""

import math

import torch
from torch import nn
from transformers import initialization as init


# points of two shells in the shape of a cortex (centre and half axes in MNI mm), the inner one of half the size
CENTRE, HALF_AXES = (0.0, -18.0, 12.0), (55.0, 75.0, 48.0)
OUTER, INNER = 48, 16


def pooling_places() -> torch.Tensor:
    """Coordinates float32 [OUTER + INNER, 3] in mm, evenly spread (golden spirals)."""
    shells = []
    for points, size in ((OUTER, 1.0), (INNER, 0.5)):
        index = torch.arange(points) + 0.5
        height = 1 - 2 * index / points
        angle = math.pi * (1 + 5**0.5) * index
        radius = (1 - height**2).sqrt()
        sphere = torch.stack([radius * angle.cos(), radius * angle.sin(), height], dim=-1)
        shells.append(size * sphere * torch.tensor(HALF_AXES) + torch.tensor(CENTRE))
    return torch.cat(shells)


class FmriCodecPooling(nn.Module):
    """
    Correlations of the decoded signals at `pooling_places` with each other, and of each with its own previous frame,
    standardised over training scans. Their squares add up to about 1.
    """

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self):
        super().__init__()
        places = OUTER + INNER
        self.size = places * (places - 1) // 2 + places
        self.register_buffer("mean", torch.zeros(self.size))
        self.register_buffer("deviation", torch.ones(self.size))

    def init_weights(self) -> None:
        init.zeros_(self.mean)
        init.ones_(self.deviation)

    def forward(self, signal: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
        """Float32 [batch, size] of signals [batch, places, time]; frame_mask bool [batch, time]: frames with data."""
        return self.standardised(self.correlations(signal, frame_mask))

    def standardised(self, correlations: torch.Tensor) -> torch.Tensor:
        return (correlations - self.mean) / (self.deviation * math.sqrt(self.size))

    @staticmethod
    def correlations(signal: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
        """As `forward`, not standardised."""
        mask = frame_mask[:, None].float()
        signal = signal.float()
        signal = (signal - (signal * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)) * mask
        # a scan decoded to a constant correlates with nothing
        signal = signal / signal.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        first, second = torch.triu_indices(signal.shape[1], signal.shape[1], 1, device=signal.device)
        lagged = (signal[..., 1:] * signal[..., :-1]).sum(-1)
        return torch.cat([(signal @ signal.mT)[:, first, second], lagged], dim=-1)

    @torch.no_grad()
    def fit(self, correlations: torch.Tensor) -> None:
        """Standardises by training scans' correlations [scans, size]."""
        self.mean.copy_(correlations.mean(0))
        self.deviation.copy_(correlations.std(0).clamp(min=1e-3))


__all__ = ["FmriCodecPooling", "pooling_places"]
