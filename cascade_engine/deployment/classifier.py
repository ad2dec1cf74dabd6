"""What is deployed: stored pixels in, class probabilities and features out, preprocessing included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

import torch
from torch import nn

from cascade_engine.errors import InvalidInput
from cascade_engine.models.encoder import Encoder
from cascade_engine.video.augment import centre
from cascade_engine.video.views import VIEWS, flip

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

    Scaling, cropping, the crops' average and the features' normalisation are part of it, so that an exported graph is
    complete from pixels on.

    Args:
        streams: view to stream; all with as many classes, or all without.
        side: of the square the encoders see.
        crops: 1 the whole picture; 2 it and its mirror image; 5 it and its four corners; 10 both.

    Source: METHOD section 5: multi-crop test; two-stream is the mean of probabilities.
    """

    def __init__(self, streams: Mapping[str, Stream], *, side: int, crops: Crops = 1) -> None:
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
        self.side, self.crops = side, crops
        self.labelled = widths != {None}
        self.dims = {view: stream.feature_dim for view, stream in streams.items()}

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
        """Crop `number` of stored pixels (B, T, H, W, C), as float32 (B, C, T, side, side).

        A corner is shown enlarged, and displacements grow with it, as in training.
        """
        place, mirrored = (number // 2, number % 2) if self.crops in (2, 10) else (number, 0)
        shown = flip(view, stored) if mirrored else stored
        assert isinstance(shown, torch.Tensor)
        if place == 0:
            return centre(view, shown, self.side)
        height, width = shown.shape[2], shown.shape[3]
        require_corners(self.crops, min(height, width), self.side)
        down, right = divmod(place - 1, 2)
        top, left = down * (height - self.side), right * (width - self.side)
        corner = centre(view, shown[:, :, top : top + self.side, left : left + self.side], self.side)
        return (corner * (height / self.side)).clamp(-1, 1) if VIEWS[view].displaces else corner


def require_corners(crops: Crops, stored: int, side: int) -> None:
    """Refuse crops that cut corners of `side` from stored frames of a side that has none to cut.

    Raises:
        InvalidInput: five or ten crops, and frames that are not larger.
    """
    if crops in (5, 10) and stored <= side:
        raise InvalidInput(f"crops: expected frames larger than {side} to cut corners, got {stored} x {stored}")
