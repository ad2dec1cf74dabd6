"""Encoders: a 3D-conv backbone, pooled, and the projection head that the contrastive loss sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import torch
from torch import nn

from cascade_engine.errors import InvalidInput
from cascade_engine.models.backbones import SubtractBackground, r2plus1d18, r3d18, r3d_small, s3d
from cascade_engine.models.norm import Norm, group_batch_norm, with_group_norm

# name -> backbone of so many input channels, and the width of its features
ENCODERS: dict[str, Callable[[int], tuple[nn.Module, int]]] = {
    "r3d_small": r3d_small,
    "s3d": s3d,
    "r3d18": r3d18,
    "r2plus1d18": r2plus1d18,
}


class Encoder(nn.Module):
    """A backbone with a projection head; calling it gives unit vectors.

    Args:
        backbone: clips (B, C, T, H, W) float32 to pooled features (B, feature_dim).
        feature_dim: width of the backbone's features, which evaluation reads.
        embedding_dim: width of what the head makes of them, which mining and the loss read.

    Source: METHOD section 4; Han et al., NeurIPS 2020, section 4.1.
    """

    def __init__(self, backbone: nn.Module, feature_dim: int, embedding_dim: int = 128) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(
            nn.Linear(feature_dim, feature_dim), nn.ReLU(inplace=True), nn.Linear(feature_dim, embedding_dim)
        )
        self.feature_dim = feature_dim
        self.embedding_dim = embedding_dim

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, embedding_dim) float32 of unit length, of clips (B, C, T, H, W)."""
        projected: torch.Tensor = self.head(self.backbone(clips))
        return nn.functional.normalize(projected.float(), dim=1)


def build_encoder(
    name: str,
    channels: int,
    *,
    dim: int = 128,
    norm: Norm = "batch",
    norm_groups: int = 1,
    subtract_background: bool = False,
) -> Encoder:
    """A freshly initialised encoder; torch's default generator draws its weights.

    Args:
        name: one of `ENCODERS`.
        channels: of the view: 3 for rgb, 2 for flow.
        dim: width of the embedding.
        norm: ``"batch"``, or ``"group"``: group norm instead, which sees one clip alone.
        norm_groups: in training, batch norm takes its statistics over this many groups of the batch (see
            `group_batch_norm`). The weights' names do not depend on it.
        subtract_background: the net sees each clip less its mean over time.

    Raises:
        InvalidInput: an unknown name or norm, or a number under 1.
    """
    if name not in ENCODERS:
        raise InvalidInput(f"encoder: expected one of {', '.join(ENCODERS)}, got {name!r}")
    if norm not in get_args(Norm):
        raise InvalidInput(f"norm: expected one of {', '.join(get_args(Norm))}, got {norm!r}")
    if min(channels, dim, norm_groups) < 1:
        raise InvalidInput(
            f"encoder: expected channels, dim and norm_groups of at least 1, got {channels}, {dim}, {norm_groups}"
        )
    backbone, width = ENCODERS[name](channels)
    if subtract_background:
        backbone = nn.Sequential(SubtractBackground(), backbone)
    encoder = Encoder(backbone, width, dim)
    return with_group_norm(encoder) if norm == "group" else group_batch_norm(encoder, norm_groups)
