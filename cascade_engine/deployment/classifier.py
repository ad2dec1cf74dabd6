"""What is deployed: stored pixels in, class probabilities and features out, preprocessing included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias, cast, get_args

import torch
from torch import nn

from cascade_engine.errors import InvalidInput
from cascade_engine.models.encoder import Encoder
from cascade_engine.video.views import VIEWS, flip, to_float

Crops: TypeAlias = Literal[1, 2, 5, 10]
FeatureKind: TypeAlias = Literal["backbone", "projection"]


class Stream(nn.Module):
    """One view: an encoder, and a linear classifier where labels are known.

    Args:
        encoder: the view's encoder.
        classes: how many; 0 for a stream that gives features alone.
        features: what is given as the clip's feature: the backbone's, or the projection that mining compares.
    """

    def __init__(self, encoder: Encoder, classes: int, features: FeatureKind = "backbone") -> None:
        super().__init__()
        if features not in get_args(FeatureKind):
            raise InvalidInput(f"features: expected one of {', '.join(get_args(FeatureKind))}, got {features!r}")
        self.backbone = encoder.backbone
        self.head = encoder.head if features == "projection" else None
        self.classifier = nn.Linear(encoder.feature_dim, classes) if classes else None
        self.feature_dim = encoder.embedding_dim if features == "projection" else encoder.feature_dim

    def forward(self, clips: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Logits (B, classes) or None, and features (B, feature_dim), of clips (B, C, T, H, W)."""
        pooled = self.backbone(clips).float()
        logits = None if self.classifier is None else self.classifier(pooled)
        return logits, pooled if self.head is None else self.head(pooled)


class Classifier(nn.Module):
    """Streams of one or more views whose probabilities are averaged; called with the pixels as they are stored.

    Cropping, scaling to float, the crops' average and the features' normalisation are part of it, so that an exported
    graph is complete from pixels on.

    Args:
        streams: view to stream; all with as many classes, or all without.
        crop: side of the square the encoders see, cut from the middle (and the corners).
        crops: 1 the centre; 2 it and its mirror image; 5 the centre and the corners; 10 both.

    Source: METHOD section 5: multi-crop test; two-stream is the mean of probabilities.
    """

    def __init__(self, streams: Mapping[str, Stream], *, crop: int, crops: Crops = 1) -> None:
        super().__init__()
        if not streams or any(view not in VIEWS for view in streams):
            raise InvalidInput(f"streams: expected views among {', '.join(VIEWS)}, got {', '.join(streams) or 'none'}")
        widths = {None if each.classifier is None else each.classifier.out_features for each in streams.values()}
        if len(widths) != 1:
            raise InvalidInput(f"streams: expected as many classes in each, got {sorted(map(str, widths))}")
        if crops not in get_args(Crops):
            raise InvalidInput(f"crops: expected one of {', '.join(map(str, get_args(Crops)))}, got {crops}")
        self.streams = nn.ModuleDict(streams)
        self.views = tuple(streams)
        self.crop, self.crops = crop, crops
        self.labelled = widths != {None}

    def forward(self, *pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Probabilities (B, classes) where labelled, then each view's features (B, D) of unit length.

        Args:
            pixels: for each of `views` (B, T, H, W, C) as the view is stored, uint8 or int8.
        """
        probabilities, features = [], []
        for view, stored in zip(self.views, pixels, strict=True):
            crops = [self.prepare(view, stored, number) for number in range(self.crops)]
            found = [self.streams[view](each) for each in crops]
            pooled = torch.stack([feature for _, feature in found]).mean(0)
            features.append(nn.functional.normalize(pooled, dim=1))
            if self.labelled:
                probabilities.append(torch.stack([logits.softmax(1) for logits, _ in found]).mean(0))
        return (torch.stack(probabilities).mean(0), *features) if self.labelled else tuple(features)

    def prepare(self, view: str, stored: torch.Tensor, number: int = 0) -> torch.Tensor:
        """Crop `number` of stored pixels (B, T, H, W, C), as float32 (B, C, T, crop, crop)."""
        place, mirrored = (number // 2, number % 2) if self.crops in (2, 10) else (number, 0)
        height, width = stored.shape[2] - self.crop, stored.shape[3] - self.crop
        if min(height, width) < 0:
            raise InvalidInput(
                f"pixels: expected at least {self.crop} x {self.crop}, got {stored.shape[2]} x {stored.shape[3]}"
            )
        corners = ((height // 2, width // 2), (0, 0), (0, width), (height, 0), (height, width))
        top, left = corners[place]
        cut = stored[:, :, top : top + self.crop, left : left + self.crop]
        floats = cast("torch.Tensor", to_float(view, flip(view, cut) if mirrored else cut))
        return floats.permute(0, 4, 1, 2, 3)
