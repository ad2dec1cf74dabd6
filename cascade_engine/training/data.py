"""From a config to its videos: found or rendered, decoded once, augmented as it says."""

from __future__ import annotations

import logging
from pathlib import Path

from cascade_engine.errors import InvalidInput
from cascade_engine.training.config import TrainConfig
from cascade_engine.training.parallel import World, wait
from cascade_engine.video.augment import Augment
from cascade_engine.video.cache import ClipCache, Progress
from cascade_engine.video.index import VideoIndex

log = logging.getLogger(__name__)

MOCAP15 = "mocap15"
WORKERS = 2  # processes that render and decode


def open_cache(config: TrainConfig, world: World | None = None, progress: Progress | None = None) -> ClipCache:
    """The cache of the config's videos; the first process makes what is missing, the others wait.

    Args:
        config: its `data` and `views` count.
        world: the processes that train together.
        progress: called after each video that is rendered or decoded.

    Raises:
        InvalidInput: no such source, or a cache with other views or another size.
        StoreError: the cache cannot be built or read.
    """
    world, data = world or World(), config.data
    folder = Path(data.cache)
    if world.first and data.source:
        index = find_videos(config, progress)
        cache = ClipCache.build(
            index, config.views, data.size, folder / "frames", flow=data.flow, workers=WORKERS, progress=progress
        )
        for path, reason in cache.failed:
            log.warning("%s: left out: %s", path, reason)
    wait(world)
    cache = ClipCache.open(folder / "frames" if data.source else folder)
    missing = [view for view in config.views if view not in cache.views]
    if missing:
        raise InvalidInput(f"data.cache: expected the view {missing[0]!r} in {folder}, found {', '.join(cache.views)}")
    return cache


def find_videos(config: TrainConfig, progress: Progress | None = None) -> VideoIndex:
    """The videos that ``data.source`` names."""
    source = config.data.source
    if source.partition(":")[0] == MOCAP15:
        from cascade_engine.video.mocap15 import render

        count = source.partition(":")[2] or "20"
        if not count.isdecimal():
            raise InvalidInput(f"data.source: expected mocap15:N with a number of videos a class, got {source!r}")
        folder = Path(config.data.cache) / "videos"
        return render(folder, int(count), 0, workers=WORKERS, progress=progress)
    path = Path(source)
    if path.suffix == ".csv":
        return VideoIndex.from_csv(path)
    return VideoIndex.from_folder(path, split=config.data.train_split or None)


def augmentation(config: TrainConfig) -> Augment:
    """How training clips are varied."""
    told = config.augment
    return Augment(
        size=config.clip.size,
        area=(told.area, 1.0),
        flip=told.flip,
        jitter=told.jitter,
        brightness=told.strength,
        contrast=told.strength,
        saturation=told.strength,
        hue=told.strength / 4,
        grayscale=told.gray,
        blur=told.blur,
        tempo=told.tempo,
        drift=told.drift,
    )
