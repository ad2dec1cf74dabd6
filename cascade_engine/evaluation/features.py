"""Labelled features and what every protocol does to them first: average per video, centre per split, normalise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cascade_engine.errors import InvalidInput
from cascade_engine.tensor import Host, feature_matrix, id_vector, require_finite

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """Features of one split's windows (or videos), each with its class and its source video.

    Args:
        values: (N, D) float32.
        label: (N,) int64, indices into `classes`.
        video_id: (N,) int64.
        classes: the classes' names, the same tuple for every split of a data set.

    Raises:
        InvalidInput: shapes that differ, NaN or infinity, a label outside `classes`, a video with two labels.
    """

    values: Host
    label: I64
    video_id: I64
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check shapes, values and that a video has one label."""
        values = feature_matrix(self.values, "values")
        require_finite(values, "values")
        label, video = id_vector(self.label, "label", len(values)), id_vector(self.video_id, "video_id", len(values))
        if not len(values):
            raise InvalidInput("values: expected at least one row, got none")
        if label.min() < 0 or label.max() >= len(self.classes):
            wrong = label[(label < 0) | (label >= len(self.classes))][0]
            raise InvalidInput(f"label: expected indices into {len(self.classes)} classes, got {wrong}")
        pairs = np.unique(np.stack([video, label], 1), axis=0)
        if len(pairs) != len(np.unique(video)):
            twice = pairs[1:][pairs[1:, 0] == pairs[:-1, 0]][0, 0]
            raise InvalidInput(f"label: expected one label for a video, got several for video_id {twice}")
        object.__setattr__(self, "label", label)
        object.__setattr__(self, "video_id", video)

    def __len__(self) -> int:
        """N."""
        return len(self.values)

    def per_video(self) -> FeatureSet:
        """The mean of each video's windows, videos in ascending order of id; summed in float64 in row order."""
        means, label, videos = mean_per_video(self.values.astype(np.float64), self.video_id, self.label)
        return replace(self, values=means.astype(np.float32), label=label, video_id=videos)

    def normalised(self) -> FeatureSet:
        """Centred on this split's mean, then of unit length; a row of zeros stays zero."""
        values = self.values.astype(np.float64)
        values = values - values.mean(axis=0)
        length = np.linalg.norm(values, axis=1, keepdims=True)
        return replace(self, values=(values / np.where(length > 0, length, 1)).astype(np.float32))


def side_by_side(views: Sequence[FeatureSet]) -> FeatureSet:
    """Several views of the same videos as one: each as retrieval prepares it, so that similarities add up.

    Raises:
        InvalidInput: sets of other videos.

    Source: Han et al., NeurIPS 2020, section 4.1 (two-stream retrieval: the views' similarities averaged).
    """
    ready = [view.per_video().normalised() for view in views]
    for each in ready[1:]:
        if not np.array_equal(each.video_id, ready[0].video_id) or each.classes != ready[0].classes:
            raise InvalidInput("views: expected the same videos and classes in every view, got others")
    return replace(ready[0], values=np.concatenate([each.values for each in ready], axis=1))


def require_comparable(test: FeatureSet, train: FeatureSet) -> None:
    """Refuse two splits of different widths or classes.

    Raises:
        InvalidInput: they differ.
    """
    if test.values.shape[1] != train.values.shape[1]:
        raise InvalidInput(
            f"test: expected (N, {train.values.shape[1]}) as the training features, got {tuple(test.values.shape)}"
        )
    if test.classes != train.classes:
        raise InvalidInput(f"test: expected the {len(train.classes)} training classes, got {len(test.classes)} others")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What one protocol found on one split.

    Args:
        protocol: such as ``"retrieval"``.
        figures: name to value, shares in [0, 1].
        confusion: (C, C) int64, true class by predicted class, one count per test video.
        classes: the classes' names.
        settings: what was chosen, and from what, as plain values.
    """

    protocol: str
    figures: dict[str, float]
    confusion: I64
    classes: tuple[str, ...]
    settings: dict[str, Any]

    def per_class(self) -> list[dict[str, Any]]:
        """A row for each class that occurs: its videos, recall, precision and what it is taken for most often."""
        rows: list[dict[str, Any]] = []
        for number, name in enumerate(self.classes):
            row, column = self.confusion[number], self.confusion[:, number]
            if not row.sum() and not column.sum():
                continue
            others = row.copy()
            others[number] = 0
            rows.append(
                {
                    "class": name,
                    "videos": int(row.sum()),
                    "recall": float(row[number] / row.sum()) if row.sum() else None,
                    "precision": float(row[number] / column.sum()) if column.sum() else None,
                    "taken_for": self.classes[int(others.argmax())] if others.any() else None,
                }
            )
        return rows

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `json.dumps`."""
        return {
            "protocol": self.protocol,
            "figures": self.figures,
            "settings": self.settings,
            "classes": list(self.classes),
            "per_class": self.per_class(),
            "confusion": self.confusion.tolist(),
        }


def confusion_matrix(truth: I64, predicted: I64, classes: int) -> I64:
    """Counts (C, C), true class by predicted class."""
    return np.bincount(truth * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def accuracy_scores(
    protocol: str, truth: I64, probabilities: F64, classes: tuple[str, ...], settings: dict[str, Any]
) -> Scores:
    """Top-1 and top-5 accuracy and confusion of class probabilities (N, C); ties go to the lower class."""
    order = np.argsort(-probabilities, axis=1, kind="stable")
    hits = order == truth[:, None]
    figures = {"accuracy": float(hits[:, 0].mean())}
    if len(classes) > 5:
        figures["top5"] = float(hits[:, :5].any(axis=1).mean())
    return Scores(
        protocol=protocol,
        figures=figures,
        confusion=confusion_matrix(truth, order[:, 0], len(classes)),
        classes=classes,
        settings=settings,
    )


def mean_per_video(rows: F64, video_id: I64, label: I64) -> tuple[F64, I64, I64]:
    """Rows averaged per video: (means (V, ...), labels (V,), video ids (V,) ascending)."""
    videos, first, position = np.unique(video_id, return_index=True, return_inverse=True)
    sums = np.zeros((len(videos), rows.shape[1]))
    np.add.at(sums, position, rows)
    return sums / np.bincount(position)[:, None], label[first], videos
