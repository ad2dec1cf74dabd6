"""The demo's videos and config: rendered actions, or a folder of one's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from cascade_engine.errors import InvalidInput
from cascade_engine.training.batches import batches_per_epoch, training_rows
from cascade_engine.training.config import TrainConfig
from cascade_engine.training.parallel import World
from cascade_engine.training.phases import first_mining
from cascade_engine.training.presets import preset
from cascade_engine.video.cache import ClipCache
from cascade_engine.video.index import VideoEntry, VideoIndex

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is
HELD_OUT = 4  # every fourth video of a label is for testing
LEAST_LABELS = 2


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What to run, and where.

    Args:
        folder: everything goes there; an earlier demo in it is continued.
        videos: a folder with a folder of videos for each label, or a CSV index (path, label, split, start, end),
            instead of the rendered actions.
        seed: of every random draw.
        epochs: of fine-tuning.
        config: the course of training; `name`, `seed`, `output` and where data lies are set by the demo.
    """

    folder: Path
    videos: Path | None = None
    seed: int = 0
    epochs: int = 20
    config: TrainConfig = field(default_factory=lambda: preset("tiny"))

    def course(self) -> TrainConfig:
        """The config of the demo's run."""
        data = replace(
            self.config.data, source=str(self.folder / "videos" / "index.csv"), cache=str(self.folder / "cache")
        )
        output = replace(self.config.output, runs=str(self.folder), tensorboard=False)
        return replace(self.config, name="run", seed=self.seed, data=data, output=output)


def find_videos(options: DemoOptions, progress: Progress) -> VideoIndex:
    """The labelled videos: rendered, of a CSV index as it is, or of a folder with every fourth of a label held out.

    Raises:
        InvalidInput: a folder without enough labelled videos, or an index without the splits ``train`` and ``test``.
    """
    folder = options.folder / "videos"
    folder.mkdir(parents=True, exist_ok=True)
    if options.videos is None:
        from cascade_engine.video.mocap15 import render

        count = int(options.config.data.source.partition(":")[2] or 20)
        return render(
            folder,
            count,
            options.seed,
            workers=2,
            progress=lambda done, total, _: progress("render videos", done, total),
        )
    if options.videos.suffix == ".csv":
        given = VideoIndex.from_csv(options.videos)
        for split in ("train", "test"):
            given.split(split)  # refuses an index without it
    else:
        given = hold_out(VideoIndex.from_folder(options.videos))
    given.to_csv(folder / "index.csv")
    return VideoIndex.from_csv(folder / "index.csv")


def mining_in_time(config: TrainConfig, cache: ClipCache) -> TrainConfig:
    """The config, in which phases that would end before their bank is full mine after a pass over the videos."""
    videos = len(training_rows(cache, config))
    per_epoch = batches_per_epoch(videos, config, World())
    phases = []
    for number, phase in enumerate(config.phase):
        if phase.plan and first_mining(config, number, videos, per_epoch) >= per_epoch * phase.epochs:
            size = phase.bank_size or config.bank.size
            phases.append(replace(phase, mine_from=min(phase.mine_from, (videos - 0.5) / size)))  # rounded up
        else:
            phases.append(phase)
    return replace(config, phase=tuple(phases))


def hold_out(index: VideoIndex) -> VideoIndex:
    """The labelled videos, every fourth of each label in the split ``test`` and the others in ``train``.

    Raises:
        InvalidInput: fewer than two labels with four videos each.
    """
    seen: dict[str, int] = {}
    entries: list[VideoEntry] = []
    for entry in index:
        if entry.label is not None:
            seen[entry.label] = seen.get(entry.label, 0) + 1
            entries.append(replace(entry, split="train" if seen[entry.label] % HELD_OUT else "test"))
    if sum(count >= HELD_OUT for count in seen.values()) < LEAST_LABELS:
        raise InvalidInput(
            f"videos: expected a folder for each label, with {HELD_OUT} videos or more in at least {LEAST_LABELS} of "
            f"them, got {', '.join(f'{name}: {count}' for name, count in seen.items()) or 'no label'}"
        )
    return VideoIndex(entries)
