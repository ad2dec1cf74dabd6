"""A run's folder: what training leaves behind, and how the rest of the house reads it.

config.toml       the config with every default written out
versions.json     versions, git commit, seed, machine
index.csv         the videos: path, video id, label, split
metrics.csv       one row per logged step
checkpoints/      NN-<phase>.pt: encoders after each phase (00-initial: before the first); step-*.pt: for resuming
features.zarr     a sealed phase of features after each training phase
tensorboard/      events, where tensorboard is installed
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

from cascade_engine.errors import CheckpointError, InvalidInput
from cascade_engine.models import Encoder, build_encoder, load_weights
from cascade_engine.training import checkpoint
from cascade_engine.training.config import TrainConfig, load_config
from cascade_engine.training.settings import to_toml
from cascade_engine.training.versions import versions
from cascade_engine.video.cache import ClipCache, channels
from cascade_engine.video.index import VideoIndex

INITIAL = "initial"  # the name of the weights before the first phase
BACKBONE = "_backbone"  # appended to a view's name: its backbone's features in the store


class Run:
    """One training run on disk; made by `Run.create` or `Run.open`.

    Args:
        folder: the run's folder.
        config: its config.
    """

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        self.folder = folder
        self.config = config

    @classmethod
    def create(cls, folder: str | Path, config: TrainConfig) -> Run:
        """Make a run's folder and write its config.

        Raises:
            InvalidInput: the folder holds a run already.
        """
        folder = Path(folder)
        if (folder / "config.toml").exists():
            raise InvalidInput(f"run: {folder} holds a run already; resume it, or give this one another name")
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
        return cls(folder, config)

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """The run in `folder`.

        Raises:
            InvalidInput: there is none, or its config is of another version.
        """
        folder = Path(folder)
        if not (folder / "config.toml").is_file():
            raise InvalidInput(f"run: expected a run's folder with a config.toml, got {folder}")
        return cls(folder, load_config(folder / "config.toml"))

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"

    @property
    def store_path(self) -> Path:
        """The feature store: per phase the views' embeddings, and the backbones' features as ``<view>_backbone``."""
        return self.folder / "features.zarr"

    @property
    def cache_path(self) -> Path:
        """The folder of decoded frames that the run was trained on."""
        return Path(self.versions["cache"])

    @property
    def versions(self) -> dict[str, Any]:
        """What versions.json says: versions, git commit, seed, machine, the cache's folder.

        Raises:
            InvalidInput: it is not there, or not what a run writes.
        """
        path = self.folder / "versions.json"
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            found["cache"]
        except (OSError, ValueError, TypeError, KeyError):
            raise InvalidInput(f"{path}: expected what a run notes there; train --resume writes it again") from None
        return found

    @property
    def index(self) -> VideoIndex:
        """The videos: path, video id, label, split."""
        return VideoIndex.from_csv(self.index_path, keep_missing=True)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that occur in the index, sorted."""
        return self.index.labels

    @property
    def index_path(self) -> Path:
        """The run's copy of the videos' index."""
        return self.folder / "index.csv"

    @property
    def views(self) -> tuple[str, ...]:
        """The views of the run."""
        return self.config.views

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases that are done, in order."""
        names = [phase.name for phase in self.config.phase]
        return tuple(name for name in names if self.phase_path(name).exists())

    def phase_path(self, name: str) -> Path:
        """Where the encoders after a phase are (``initial``: before the first).

        Raises:
            InvalidInput: the run has no such phase.
        """
        names = [INITIAL, *(phase.name for phase in self.config.phase)]
        if name not in names:
            raise InvalidInput(f"phase: expected one of {', '.join(names)}, got {name!r}")
        return self.checkpoints / f"{names.index(name):02d}-{name}.pt"

    def trained_in(self, view: str, phase: str | None = None) -> str:
        """The phase, at or before `phase` (by default the last one done), that gave `view` its weights."""
        if view not in self.views:
            raise InvalidInput(f"view: expected one of {', '.join(self.views)}, got {view!r}")
        names = [each.name for each in self.config.phase]
        if phase is None:
            upto = len(self.phases)
        else:
            self.phase_path(phase)  # refuses an unknown name
            upto = 0 if phase == INITIAL else names.index(phase) + 1
        trained = [each.name for each in self.config.phase[:upto] if each.train == view]
        return trained[-1] if trained else INITIAL

    def encoder(self, view: str, phase: str | None = None) -> Encoder:
        """The encoder of `view` as it was after `phase`, in evaluation mode on the CPU.

        Args:
            view: one of the run's views.
            phase: a phase's name; by default the last one done; ``"initial"``: random weights, before training.

        Raises:
            InvalidInput: no such view or phase.
            CheckpointError: the phase is not done, or its weights do not fit; missing and extra ones are listed.
        """
        source = self.trained_in(view, phase)
        state = checkpoint.load(self.phase_path(source))
        encoder = fresh_encoder(self.config, view)
        if view not in state["encoders"]:
            raise CheckpointError(f"{self.phase_path(source)}: expected the view {view!r}, got none")
        load_weights(encoder, state["encoders"][view], str(self.phase_path(source)))
        return encoder.eval()

    def save_encoders(self, phase: str, encoders: dict[str, Encoder]) -> None:
        """Keep encoders as those after `phase`; the views that it did not train are found in earlier phases."""
        weights = {view: encoder.state_dict() for view, encoder in encoders.items()}
        checkpoint.save(self.phase_path(phase), {"encoders": weights})

    def require_videos(self, index: VideoIndex) -> None:
        """Refuse other videos than the run was begun with; the folder that they lie in may have moved.

        Raises:
            InvalidInput: another number of videos, another order, or one of another name, label, split, part or group.
        """
        before, now = _described(self.index), _described(index)
        if len(before) != len(now):
            raise InvalidInput(f"resume: {self.folder} was begun with {len(before)} videos, got {len(now)}")
        for row, (one, other) in enumerate(zip(before, now, strict=True)):
            if one != other:
                raise InvalidInput(f"resume: {self.folder} was begun with other videos: {row} was {one}, got {other}")

    def note_data(self, cache: Any) -> None:
        """Keep the videos' index, and where the cache is, beside versions and seed."""
        where = str(cache.folder.absolute()) if isinstance(cache, ClipCache) else ""
        told = {**versions(), "seed": self.config.seed, "cache": where}
        for name, write in (
            (self.index_path.name, cache.index.to_csv),
            ("versions.json", lambda file: file.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")),
        ):
            partial = self.folder / f".{name}.partial"
            write(partial)
            partial.replace(self.folder / name)  # never half of one, which nothing would fit

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.csv, numbers as numbers; empty before the first is written."""
        path = self.folder / "metrics.csv"
        if not path.exists():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            return [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]


def fresh_encoder(config: TrainConfig, view: str) -> Encoder:
    """The encoder of `view` as the config says, its weights drawn from torch's default generator."""
    model = config.model
    return build_encoder(
        model.encoder,
        channels(view),
        dim=model.dim,
        norm=model.norm,
        subtract_background=view in model.subtract_background,
    )


def _described(index: VideoIndex) -> list[tuple[Any, ...]]:
    """What makes each video the one that it is, its path from the folder that they all lie in."""
    paths = [entry.path.absolute() for entry in index]
    root = os.path.commonpath([path.parent for path in paths]) if paths else ""
    return [
        (str(path.relative_to(root)), entry.label or "", entry.split or "", entry.start, entry.end, entry.group or "")
        for path, entry in zip(paths, index, strict=True)
    ]


def _number(text: str | None) -> Any:
    """The text as a number where it is one, None where it is empty."""
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        return text
    return int(value) if value.is_integer() and "." not in text and "e" not in text else value
