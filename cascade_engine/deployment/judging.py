"""Judging classifiers on a run's videos: all windows of a video, all crops, the mean of several classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cascade_engine.deployment.classifier import Classifier, Crops, require_corners
from cascade_engine.deployment.finetuned import FinetuneConfig, FineTuned
from cascade_engine.errors import InvalidInput
from cascade_engine.evaluation.features import F64, I64, Scores, accuracy_scores, mean_per_video
from cascade_engine.evaluation.of_run import windows_of
from cascade_engine.training.run import Run
from cascade_engine.video.cache import ClipCache
from cascade_engine.video.clips import ClipTable

_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class LabelledWindows:
    """The windows of a run's videos, and the classes that count."""

    run: Run
    cache: ClipCache
    table: ClipTable
    labels: tuple[str, ...]

    @classmethod
    def of(cls, run: Run, split: str) -> LabelledWindows:
        """Those of a run; the classes are the labels that occur in `split`.

        Raises:
            InvalidInput: fewer than two labels there, or the run's cache was built for other videos since.
        """
        cache, table = windows_of(run)
        labels = tuple(sorted({str(each) for each in table.label[table.of_split(split)] if each}))
        if len(labels) < 2:
            raise InvalidInput(f"split: expected two or more labels in {split!r}, found {', '.join(labels) or 'none'}")
        return cls(run=run, cache=cache, table=table, labels=labels)

    def rows(self, split: str) -> I64:
        """The places of a split's labelled windows.

        Raises:
            InvalidInput: there is none.
        """
        rows = np.flatnonzero((self.table.split == split) & (self.table.label != ""))
        if not len(rows):
            raise InvalidInput(f"split: expected labelled windows in {split!r}, found none")
        return rows

    def numbers(self, rows: I64) -> I64:
        """The places of the windows' labels (n,) in `labels`.

        Raises:
            InvalidInput: a label is not among them.
        """
        number = {name: place for place, name in enumerate(self.labels)}
        unknown = sorted({str(each) for each in self.table.label[rows]} - set(self.labels))
        if unknown:
            raise InvalidInput(f"label: expected those learnt, got {', '.join(unknown)}")
        return np.array([number[str(each)] for each in self.table.label[rows]], np.int64)

    def pixels(self, view: str, rows: Sequence[int]) -> torch.Tensor:
        """Windows (n, T, H, W, C) as stored: what an exported model takes."""
        stride, table = self.run.config.clip.stride, self.table
        clips = [
            self.cache.frames(view, int(table.row[n]), int(table.start_frame[n]), table.clip_length)[::stride]
            for n in rows
        ]
        return torch.from_numpy(np.stack(clips))

    def per_video(self, classifier: Classifier, rows: I64) -> tuple[F64, I64, I64]:
        """Class probabilities averaged over each video's windows (V, classes), true classes (V,), video ids (V,)."""
        parts = []
        with torch.no_grad():
            for first in range(0, len(rows), _BATCH):
                chosen = rows[first : first + _BATCH].tolist()
                parts.append(classifier(*(self.pixels(view, chosen) for view in classifier.views))[0].double().numpy())
        return mean_per_video(np.concatenate(parts), self.table.video_id[rows], self.numbers(rows))


def require_judgeable(run: Run, config: FinetuneConfig, members: Sequence[FineTuned] = ()) -> None:
    """Refuse what `judge` would refuse of a classifier that is still to be trained, alone and together with `members`.

    Args:
        run: the run it will stand on.
        config: how it will be trained.
        members: what it will be averaged with.

    Raises:
        InvalidInput: no labelled test videos, a label among them that is not learnt, frames too small for the crops,
            or members of other labels or other videos.
    """
    windows = LabelledWindows.of(run, config.train_split)
    windows.numbers(windows.rows(config.test_split))
    for each in (run, *(member.run for member in members)):
        require_corners(config.crops, each.config.data.size, each.config.clip.size)
    for member in members:
        _require_alike(run, windows.labels, member)


def _require_alike(run: Run, labels: tuple[str, ...], member: FineTuned) -> None:
    if member.labels != labels:
        raise InvalidInput(f"with: expected the labels of {run.folder}, got those of {member.run.folder}")
    other = run.index.difference(member.run.index)
    if other is not None:
        raise InvalidInput(f"with: expected the videos of {run.folder}, {member.run.folder} has others: {other}")


def judge(members: Sequence[FineTuned], *, crops: Crops | None = None, split: str | None = None) -> Scores:
    """Test accuracy of one fine-tuned classifier, or of the mean of several ones' probabilities (two-stream).

    All half-overlapping windows of a video (multi-clip), all crops of each (multi-crop), averaged; each member takes
    its own run's clips, of the same videos.

    Args:
        members: classifiers of the same labels, on runs of the same videos.
        crops: of each clip; those of the first member's config by default.
        split: which is asked; the first member's test split by default.

    Raises:
        InvalidInput: other labels or other videos.
    """
    first = members[0]
    crops, name = first.config.crops if crops is None else crops, split or first.config.test_split
    found: list[tuple[F64, I64, I64]] = []
    for member in members:
        _require_alike(first.run, first.labels, member)
        cache, table = windows_of(member.run)
        windows = LabelledWindows(run=member.run, cache=cache, table=table, labels=member.labels)
        found.append(windows.per_video(member.classifier(crops), windows.rows(name)))
        if found[-1][1].tolist() != found[0][1].tolist() or found[-1][2].tolist() != found[0][2].tolist():
            raise InvalidInput(f"with: expected the windows of {first.run.folder}, got some of other videos")
    told = [f"{each.run.folder.name}: {each.config.view}, {each.config.layers}" for each in members]
    settings: dict[str, Any] = {"members": told, "crops": crops, "test_videos": len(found[0][1]), "split": name}
    mean = np.mean([probabilities for probabilities, _, _ in found], axis=0)
    return accuracy_scores("finetune", found[0][1], mean, first.labels, settings)
