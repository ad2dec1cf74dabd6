"""The momentum encoder: a slowly following copy that makes the keys."""

from __future__ import annotations

import copy

import torch
from torch import nn

from cascade_engine.errors import InvalidInput


class MomentumEncoder(nn.Module):
    """A copy of `source` whose weights follow it: ``w <- m w + (1 - m) w_source`` at each `follow`.

    Batch norm's running statistics are the copy's own: it sees its own batches.

    Args:
        source: the encoder that is trained.
        momentum: m, in [0, 1]; 0 copies.

    Source: He et al., CVPR 2020 (MoCo), equation 2.
    """

    def __init__(self, source: nn.Module, momentum: float = 0.999) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise InvalidInput(f"momentum: expected a number in [0, 1], got {momentum}")
        self.momentum = momentum
        self.encoder = copy.deepcopy(source).requires_grad_(False)

    @torch.no_grad()
    def follow(self, source: nn.Module) -> None:
        """Move the copy's weights towards those of `source`."""
        mine = [each.detach() for each in self.encoder.parameters()]
        theirs = [each.detach() for each in source.parameters()]
        torch._foreach_lerp_(mine, theirs, 1 - self.momentum)

    @torch.no_grad()
    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """Keys (B, D) of clips (B, C, T, H, W), without gradients."""
        keys: torch.Tensor = self.encoder(clips)
        return keys
