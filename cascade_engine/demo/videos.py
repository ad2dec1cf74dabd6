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
from cascade_engine.training.run import Run
from cascade_engine.video.cache import ClipCache
from cascade_engine.video.index import VideoEntry, VideoIndex

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is
HELD_OUT = 4  # every fourth video of a label is for testing
LEAST_LABELS = 2
RUN = "run"  # the name of the demo's run


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
        return replace(self.config, name=RUN, seed=self.seed, data=data, output=output)


def find_videos(options: DemoOptions, progress: Progress) -> VideoIndex:
    """The labelled videos: rendered, of a CSV index as it is, or of a folder with every fourth of a label held out.

    Nothing is written where the folder's run was begun with other videos: it stands on its index and its cache.

    Raises:
        InvalidInput: a folder without enough labelled videos, an index without the splits ``train`` and ``test`` or
            whose splits share no label, or a run that was begun with other videos.
    """
    folder = options.folder / "videos"
    begun = Run.open(options.folder / RUN) if (options.folder / RUN / "index.csv").exists() else None
    if options.videos is None:
        if begun is not None and not (folder / "mocap15.json").exists():
            raise InvalidInput(f"videos: {begun.folder} was begun with videos of its own, expected them again")
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
        _require_labels(given)
    else:
        given = hold_out(VideoIndex.from_folder(options.videos))
    if begun is not None:
        begun.require_videos(given)
    folder.mkdir(parents=True, exist_ok=True)
    given.to_csv(folder / "index.csv")
    return VideoIndex.from_csv(folder / "index.csv")


def _require_labels(index: VideoIndex) -> None:
    """Refuse splits from which nothing could be learnt, or no label of which could be judged."""
    learnt, asked = ({each.label for each in index.split(name)} - {None} for name in ("train", "test"))
    if len(learnt) < LEAST_LABELS or not learnt & asked:
        raise InvalidInput(
            f"videos: expected {LEAST_LABELS} labels or more in 'train' and one of them in 'test', got "
            f"{', '.join(sorted(map(str, learnt))) or 'none'} and {', '.join(sorted(map(str, asked))) or 'none'}"
        )


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
