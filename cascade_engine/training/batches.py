"""Batches of clips: which, in what order, cut where; every draw follows from the seed and the place alone.

A batch is made from (seed, phase, epoch, place), never from what was drawn before it. So the batches do not depend on
the number of worker processes, a resumed run needs no random state of the loader, and each of several processes can
make its share of a batch without talking to the others.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from cascade_engine.errors import InvalidInput
from cascade_engine.training.config import ClipConfig, PhaseConfig, TrainConfig
from cascade_engine.training.parallel import World, share
from cascade_engine.video.augment import Augment, Draws, repeat_frames, shuffle_frames
from cascade_engine.video.cache import ClipCache

log = logging.getLogger(__name__)
Rows: TypeAlias = npt.NDArray[np.int64]

QUERY, KEY, SPOIL, ORDER, SHUFFLE = range(5)  # what a random stream is for
SPOILT = "spoilt:"  # names the spoilt clips among a batch's keys


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One process's share of a batch.

    Args:
        rows: (B,) int64, the cache's rows of the whole batch, over all processes.
        own: the part of the batch whose queries this process computes.
        order: (B,) int64: the keys are encoded in the order ``rows[order]``, each process its share of that.
        query: (b, C, T, H, W) float32, the queries of `own` in the trained view.
        keys: view, or ``spoilt:<how>``, to (b', C, T, H, W), this process's share in the keys' order.
    """

    rows: torch.Tensor
    own: slice
    order: torch.Tensor
    query: torch.Tensor
    keys: dict[str, torch.Tensor]


def span(clip: ClipConfig) -> int:
    """Cached frames that a clip reaches over."""
    return (clip.frames - 1) * clip.stride + 1


def training_rows(cache: ClipCache, config: TrainConfig) -> npt.NDArray[np.int64]:
    """The cache's rows that are trained on: of the training split, and long enough for a clip.

    Raises:
        InvalidInput: there is none.
    """
    split = config.data.train_split
    chosen = [entry.video_id for entry in cache.index if not split or entry.split == split]
    long_enough = [row for row in chosen if cache.length(row) >= span(config.clip)]
    if len(long_enough) < len(chosen):
        log.warning(
            "%d of %d training videos have fewer than the %d frames of a clip and are left out",
            len(chosen) - len(long_enough),
            len(chosen),
            span(config.clip),
        )
    if not long_enough:
        raise InvalidInput(f"data: expected videos of the split {split!r} with {span(config.clip)} frames, found none")
    return np.array(long_enough, np.int64)


def batches_per_epoch(videos: int, config: TrainConfig, world: World) -> int:
    """Batches in a pass over so many training videos; a smaller last one counts where every process has a clip of it.

    Raises:
        InvalidInput: there are fewer videos than processes.
    """
    size = config.optim.batch
    count = videos // size + (videos % size >= world.size)
    if not count:
        raise InvalidInput(f"data: expected at least {world.size} training videos, found {videos}")
    return count


class Batches(Dataset[Batch]):
    """The batches of a phase by number: item ``epoch * per_epoch + n`` is the n-th of an epoch.

    The last batch of an epoch is smaller where the videos do not divide; one with fewer clips than there are
    processes is left out.

    Args:
        cache: the videos.
        config: the run's.
        number: of the phase, from 0.
        augment: how clips are varied.
        world: which share this process makes.
    """

    def __init__(
        self, cache: ClipCache, config: TrainConfig, number: int, augment: Augment, world: World | None = None
    ) -> None:
        self.cache, self.config, self.number, self.augment = cache, config, number, augment
        self.world = world or World()
        self.phase: PhaseConfig = config.phase[number]
        self.rows = training_rows(cache, config)
        self.per_epoch = batches_per_epoch(len(self.rows), config, self.world)

    def __len__(self) -> int:
        """Batches in the phase."""
        return self.per_epoch * self.phase.epochs

    def __getitem__(self, item: int) -> Batch:
        """The share of batch `item` that this process makes."""
        epoch, place = divmod(item, self.per_epoch)
        size = self.config.optim.batch
        rows = self._stream(ORDER, epoch).permutation(self.rows)[place * size : (place + 1) * size]
        order = np.arange(len(rows))
        if self.config.model.norm_groups > 1 or self.world.size > 1:
            order = self._stream(SHUFFLE, epoch, place).permutation(len(rows))
        own = share(len(rows), self.world)
        train = self.phase.train
        keys = self._clips(self.phase.views, rows, order[own], KEY, epoch, place)
        stream = self._stream(SPOIL, epoch, place, 0)
        for how in self.config.loss.negatives:
            if how == "repeat":
                keys[SPOILT + how] = repeat_frames(train, keys[train], stream, first=own.start, joint=len(rows))
            else:
                keys[SPOILT + how] = shuffle_frames(keys[train], stream, first=own.start, joint=len(rows))
        return Batch(
            rows=torch.from_numpy(rows),
            own=own,
            order=torch.from_numpy(order),
            query=self._clips((train,), rows, np.arange(len(rows))[own], QUERY, epoch, place)[train],
            keys=keys,
        )

    def loader(self, start: int = 0) -> Iterator[Batch]:
        """The batches from `start` on, prepared ahead by ``data.workers`` processes."""
        workers = self.config.data.workers
        return iter(DataLoader(self, batch_size=None, sampler=range(start, len(self)), num_workers=workers))

    def _stream(self, purpose: int, *place: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, self.number, purpose, *place])

    def _starts(self, room: Rows, purpose: int, epoch: int, place: int) -> Rows:
        """The first frame of each clip, below `room`; a key's is at most `clip.apart` from its query's."""
        apart = self.config.clip.apart
        if purpose == QUERY or apart < 0:
            return self._stream(purpose, epoch, place, 0).integers(room)
        shift = self._stream(purpose, epoch, place, 0).integers(-apart, apart + 1, len(room))
        starts: Rows = np.clip(self._starts(room, QUERY, epoch, place) + shift, 0, room - 1)
        return starts

    def _clips(
        self, views: Sequence[str], rows: Rows, chosen: Rows, purpose: int, epoch: int, place: int
    ) -> dict[str, torch.Tensor]:
        """Augmented clips of ``rows[chosen]``, view to (n, C, T, H, W); drawn for all rows, then chosen."""
        clip = self.config.clip
        room = np.array([self.cache.length(int(row)) - span(clip) + 1 for row in rows])
        starts = self._starts(room, purpose, epoch, place)
        drawn = self.augment.draw(len(rows), self._stream(purpose, epoch, place, 1))
        draws = Draws(**{each.name: getattr(drawn, each.name)[chosen] for each in fields(drawn)})
        return {
            view: self.augment.apply(
                view,
                np.stack(
                    [self.cache.frames(view, int(rows[n]), int(starts[n]), span(clip))[:: clip.stride] for n in chosen]
                ),
                draws,
            )
            for view in views
        }
