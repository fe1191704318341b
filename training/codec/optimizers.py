"""Muon for the matrices of a transformer's layers, AdamW for everything else, as one optimiser."""

from collections.abc import Sequence

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """
    `torch.optim.Muon` steps the matrices and `torch.optim.AdamW` the other parameters, at one learning rate (Muon's
    update is scaled to AdamW's size). Groups and state are shared with the two, so that schedulers and checkpoints
    see one optimiser.
    """

    def __init__(
        self, matrices: Sequence[nn.Parameter], others: Sequence[nn.Parameter], lr: float, weight_decay: float
    ):
        self.parts: list[torch.optim.Optimizer] = []
        # a codec without transformers has none
        if matrices:
            muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self.parts.append(muon)
        self.parts.append(torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98)))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    @classmethod
    def for_layers(cls, model: nn.Module, lr: float, weight_decay: float = 0.01) -> "MuonWithAdamW":
        """Muon for the weight matrices inside the module lists of `model`."""
        inside = {
            id(parameter)
            for module in model.modules()
            if isinstance(module, nn.ModuleList)
            for parameter in module.parameters()
            if parameter.ndim == 2
        }
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return cls(
            [parameter for parameter in trained if id(parameter) in inside],
            [parameter for parameter in trained if id(parameter) not in inside],
            lr,
            weight_decay,
        )

    def _share(self) -> None:
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups = [group]
            part.state = self.state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss
