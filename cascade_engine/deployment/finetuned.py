"""A fine-tuned classifier: how it was made, and the folder it lies in."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from cascade_engine.deployment.classifier import Classifier, Crops, Stream
from cascade_engine.errors import CheckpointError, InvalidInput
from cascade_engine.models import load_weights
from cascade_engine.training import checkpoint
from cascade_engine.training.config import TrainConfig, require_seed
from cascade_engine.training.run import Run, fresh_encoder
from cascade_engine.training.settings import build, to_values

Layers: TypeAlias = Literal["all", "head"]

_FILE = "finetuned.pt"


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """How a classifier is trained.

    Args:
        view: the view whose encoder it stands on.
        phase: of the run, whose weights are begun with; the last one done by default; ``"initial"``: random ones.
            A fine-tuned classifier's config names the phase that it was.
        layers: ``"all"``, or ``"head"``: the linear classifier alone, the encoder frozen.
        epochs: passes over the training videos, one random clip of each.
        batch: clips.
        lr: highest learning rate, then a cosine to zero; None is 1e-3 for all layers and 1e-2 for the head.
        weight_decay: of AdamW.
        area: smallest share of the picture that a training crop shows; labels ask for more of it than contrast does.
        validation: share of each class's training videos that chooses the epoch.
        crops: of each clip in the test; see `Classifier`.
        seed: of every draw.
        train_split: the split learnt from.
        test_split: the split tested once, at the end.

    Raises:
        InvalidInput: a number out of range.
    """

    view: str
    phase: str | None = None
    layers: Layers = "all"
    epochs: int = 20
    batch: int = 32
    lr: float | None = None
    weight_decay: float = 1e-4
    area: float = 0.8
    validation: float = 0.15
    crops: Crops = 1
    seed: int = 0
    train_split: str = "train"
    test_split: str = "test"

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        if self.layers not in get_args(Layers):
            raise InvalidInput(f"layers: expected one of {', '.join(get_args(Layers))}, got {self.layers!r}")
        if self.crops not in get_args(Crops):
            raise InvalidInput(f"crops: expected one of {', '.join(map(str, get_args(Crops)))}, got {self.crops}")
        if min(self.epochs, self.batch) < 1 or not 0 < self.rate < math.inf or not 0 <= self.weight_decay < math.inf:
            raise InvalidInput(
                "finetune: expected epochs and batch of at least 1, a finite lr above 0 and weight_decay of at least "
                f"0, got {self.epochs}, {self.batch}, {self.rate}, {self.weight_decay}"
            )
        require_seed(self.seed)

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        return (1e-3 if self.layers == "all" else 1e-2) if self.lr is None else self.lr


@dataclass(frozen=True, kw_only=True)
class FineTuned:
    """A fine-tuned classifier of one view, as it lies in its folder.

    Args:
        run: the run it came from, with the config that it had then; the folder may hold another by now.
        config: how it was trained.
        labels: its classes.
        stream: encoder and classifier, in evaluation mode.
        curve: a row for each epoch: loss, validation accuracy.
    """

    run: Run
    config: FinetuneConfig
    labels: tuple[str, ...]
    stream: Stream
    curve: list[dict[str, float]]

    def classifier(self, crops: Crops = 1) -> Classifier:
        """The whole from stored pixels to probabilities, in evaluation mode."""
        return Classifier({self.config.view: self.stream}, side=self.run.config.clip.size, crops=crops).eval()

    def save(self, folder: str | Path) -> Path:
        """Write the classifier into a folder, durably."""
        target = Path(folder) / _FILE
        state = {
            "weights": self.stream.state_dict(),
            "config": asdict(self.config),
            "labels": list(self.labels),
            "run": str(self.run.folder.absolute()),
            "training": to_values(self.run.config),
            "curve": self.curve,
        }
        checkpoint.save(target, state)
        return target

    @classmethod
    def open(cls, folder: str | Path) -> FineTuned:
        """Read the classifier in a folder.

        Raises:
            CheckpointError: none there, one of another version, or its weights do not fit.
        """
        path = Path(folder) / _FILE
        state = checkpoint.load(path)
        try:
            config = FinetuneConfig(**state["config"])
            run = Run(Path(state["run"]), build(TrainConfig, state["training"]))
            labels, weights = tuple(state["labels"]), state["weights"]
        except (KeyError, TypeError, InvalidInput) as error:
            raise CheckpointError(f"{path}: it is incomplete, or of another version ({error})") from None
        stream = Stream(fresh_encoder(run.config, config.view), len(labels))
        load_weights(stream, weights, str(path))
        return cls(run=run, config=config, labels=labels, stream=stream.eval(), curve=list(state["curve"]))

    @staticmethod
    def is_in(folder: str | Path) -> bool:
        """Whether a folder holds a fine-tuned classifier."""
        return (Path(folder) / _FILE).is_file()
