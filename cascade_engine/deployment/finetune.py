"""Fine-tuning: a classifier on a run's encoder, all layers or the classifier alone, chosen on training videos."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch
from torch import nn

from cascade_engine.deployment.classifier import Classifier, Stream
from cascade_engine.deployment.finetuned import FinetuneConfig, FineTuned
from cascade_engine.deployment.judging import LabelledWindows
from cascade_engine.errors import CascadeError, InvalidInput
from cascade_engine.evaluation.features import I64, FeatureSet
from cascade_engine.evaluation.probe import validation_videos
from cascade_engine.training.data import augmentation
from cascade_engine.training.run import Run

Progress: TypeAlias = Callable[[int, dict[str, float]], None]


def finetune(run: Run, config: FinetuneConfig, *, progress: Progress | None = None) -> FineTuned:
    """Train a classifier on a run's encoder.

    One random clip of each training video an epoch, varied as in training but in larger crops. The epoch whose
    validation accuracy is best is kept (the earlier of equals); validation videos are cut from the training split,
    test videos are not read.

    Args:
        run: the run.
        config: how.
        progress: called after each epoch with its number from 1 and its row of the curve.

    Raises:
        InvalidInput: no labelled training videos, no class with two of them, or a cache of other videos.
        CheckpointError: the phase's weights do not fit.
        CascadeError: the loss or the probabilities are not finite any more.

    Source: METHOD blocks 930 and 930A.
    """
    config = replace(config, phase=run.trained_in(config.view, config.phase))
    windows = LabelledWindows.of(run, config.train_split)
    rows = windows.rows(config.train_split)
    held = np.isin(windows.table.video_id[rows], _validation(windows, rows, config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        stream = Stream(run.encoder(config.view, config.phase), len(windows.labels))
    learner = _Learner(windows, config, stream, rows[~held])
    judged = Classifier({config.view: stream}, side=run.config.clip.size)
    best, kept, curve = -1.0, stream.state_dict(), list[dict[str, float]]()
    for epoch in range(config.epochs):
        loss = learner.epoch(epoch)
        means, truth, _ = windows.per_video(judged.eval(), rows[held])
        if not (math.isfinite(loss) and np.isfinite(means).all()):
            raise CascadeError(f"finetune: diverged in epoch {epoch + 1} (loss {loss:.3g}); expected a lower lr")
        accuracy = float((means.argmax(axis=1) == truth).mean())
        curve.append({"epoch": epoch + 1, "loss": loss, "validation": accuracy})
        if accuracy > best:
            best, kept = accuracy, {name: value.clone() for name, value in stream.state_dict().items()}
        if progress is not None:
            progress(epoch + 1, curve[-1])
    stream.load_state_dict(kept)
    return FineTuned(run=run, config=config, labels=windows.labels, stream=stream.eval(), curve=curve)


def _validation(windows: LabelledWindows, rows: I64, config: FinetuneConfig) -> I64:
    """The training videos that choose the epoch."""
    videos, first = np.unique(windows.table.video_id[rows], return_index=True)
    labelled = FeatureSet(
        values=np.zeros((len(videos), 1), np.float32),
        label=windows.numbers(rows[first]),
        video_id=videos,
        classes=windows.labels,
    )
    held = validation_videos(labelled, config.validation, config.seed)
    if not len(held):
        raise InvalidInput(f"split: expected a class with two videos in {config.train_split!r}, found none")
    return held


class _Learner:
    """One classifier in training, on the videos that `rows` are windows of."""

    def __init__(self, windows: LabelledWindows, config: FinetuneConfig, stream: Stream, rows: I64) -> None:
        self.windows, self.config, self.stream = windows, config, stream
        self.row_of, first = np.unique(windows.table.row[rows], return_index=True)
        self.label = torch.from_numpy(windows.numbers(rows[first]))
        self.augment = replace(augmentation(windows.run.config), area=(config.area, 1.0))
        assert stream.classifier is not None, "made with the labels' number of classes"
        chosen = stream.parameters() if config.layers == "all" else stream.classifier.parameters()
        self.optimiser = torch.optim.AdamW(chosen, lr=config.rate, weight_decay=config.weight_decay)
        steps = config.epochs * math.ceil(len(self.row_of) / config.batch)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimiser, steps)

    def epoch(self, number: int) -> float:
        """Learn from one random clip of each video; the mean loss."""
        rng = np.random.default_rng([self.config.seed, number])
        self.stream.train()
        if self.config.layers == "head":
            self.stream.backbone.eval()  # batch norm's statistics stay as they were trained
        total = 0.0
        order = rng.permutation(len(self.row_of))
        for first in range(0, len(order), self.config.batch):
            chosen = order[first : first + self.config.batch]
            logits, _ = self.stream(self._clips(chosen, rng))
            loss = nn.functional.cross_entropy(logits, self.label[chosen])
            self.optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimiser.step()
            self.schedule.step()
            total += float(loss.detach()) * len(chosen)
        return total / len(order)

    def _clips(self, chosen: I64, rng: np.random.Generator) -> torch.Tensor:
        cache, span = self.windows.cache, self.windows.table.clip_length
        stored = []
        for row in self.row_of[chosen].tolist():
            start = int(rng.integers(cache.length(row) - span + 1))
            stored.append(cache.frames(self.config.view, row, start, span)[:: self.windows.run.config.clip.stride])
        return self.augment.apply(self.config.view, np.stack(stored), self.augment.draw(len(stored), rng))
