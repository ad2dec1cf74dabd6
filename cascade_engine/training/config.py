"""The config of a training run: one tree of frozen dataclasses, written and read as TOML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import torch

from cascade_engine.errors import InvalidInput
from cascade_engine.models.encoder import ENCODERS
from cascade_engine.plan import PRESETS, CascadePlan, Keep, Stage
from cascade_engine.training.settings import build, option, override, read_toml
from cascade_engine.video.views import chosen_views

SEEDS = 1 << 54  # so many; what is derived from one must fit torch's 64 bits


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the clips come from."""

    source: str = option("", "folder, CSV, mocap15:N (N videos a class, whatever the seed), '' for a cache made before")
    cache: str = option("cache", "folder that keeps the decoded frames of every view")
    size: int = option(64, "side of the cached frames, in pixels")
    train_split: str = option("train", "the videos trained on; '' for all")
    flow: Literal["dis", "farneback", "tvl1"] = option("dis", "how optical flow is computed")
    workers: int = option(0, "processes that prepare batches; the batches do not depend on their number")

    def __post_init__(self) -> None:
        """Refuse counts that are none."""
        if self.size < 1 or self.workers < 0:
            raise InvalidInput(f"expected size of at least 1, workers of at least 0, got {self.size}, {self.workers}")


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """What a clip is."""

    frames: int = option(8, "frames per clip")
    size: int = option(56, "side that the encoder sees, in pixels")
    stride: int = option(1, "cached frames from one frame of a clip to the next")
    apart: int = option(-1, "frames at most from a query's clip to its key's; -1: anywhere; 0: one clip, varied twice")

    def __post_init__(self) -> None:
        """Refuse counts that are none."""
        if min(self.frames, self.size, self.stride) < 1 or self.apart < -1:
            raise InvalidInput(
                "expected frames, size and stride of at least 1 and apart of at least -1, "
                f"got {self.frames}, {self.size}, {self.stride}, {self.apart}"
            )


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentations, drawn once per clip, alike for all its frames and views."""

    flip: float = option(0.5, "probability of a horizontal flip (flow's horizontal sign turns with it)")
    area: float = option(0.5, "smallest share of the picture that a random crop shows")
    jitter: float = option(0.8, "probability of other colours, in rgb")
    strength: float = option(0.4, "of the changes of brightness, contrast and saturation; a quarter of it for the hue")
    gray: float = option(0.2, "probability of gray, in rgb")
    blur: float = option(0.0, "probability of a blur, in rgb")
    tempo: float = option(0.0, "displacements of flow become up to 1 + x times as large or as small")
    drift: float = option(0.0, "displacement added to all of a clip, as if the camera moved; 1: 20 of 128 pixels")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoder of each view, its head and its momentum copy."""

    encoder: str = option("r3d_small", f"one of {', '.join(ENCODERS)}")
    dim: int = option(128, "width of the embedding that is mined and contrasted")
    momentum: float = option(0.999, "of the key encoder")
    norm: Literal["batch", "group"] = option("batch", "batch norm, or group norm, which knows one clip alone")
    norm_groups: int = option(2, "groups of a batch that batch norm is taken over, keys shuffled among them; 1: plain")
    subtract_background: tuple[str, ...] = option(
        (), "views whose net sees each clip less its mean over time: what stands still is not seen"
    )

    def __post_init__(self) -> None:
        """Refuse an encoder that does not exist, and an embedding of nothing."""
        if self.encoder not in ENCODERS:
            raise InvalidInput(f"encoder: expected one of {', '.join(ENCODERS)}, got {self.encoder!r}")
        if self.dim < 1 or not 0 <= self.momentum <= 1:
            raise InvalidInput(f"expected dim of at least 1 and momentum in [0, 1], got {self.dim}, {self.momentum}")


@dataclass(frozen=True, kw_only=True)
class BankConfig:
    """The keys that queries are contrasted with."""

    kind: Literal["queue", "indexed"] = option("queue", "queue: the newest keys; indexed: a slot for each video")
    size: int = option(2048, "keys in the queue")
    momentum: float = option(0.5, "of an indexed bank's slots: v <- norm(m v + (1 - m) f)")
    dtype: Literal["float32", "float16", "bfloat16"] = option("float32", "the keys are kept in")

    def __post_init__(self) -> None:
        """Refuse a bank without slots, and slots that never move."""
        if self.size < 1 or (self.kind == "indexed" and not 0 <= self.momentum < 1):
            raise InvalidInput(f"expected size of at least 1, momentum in [0, 1), got {self.size}, {self.momentum}")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The contrast of queries with their keys, positives and the bank."""

    temperature: float = option(0.07, "divides every similarity")
    reduction: Literal["logsumexp", "mean_log"] = option("logsumexp", "over the positives: MIL-NCE, or SupCon's mean")
    self_positive: Literal["always", "never"] | float = option(
        "always", "own key among the positives: always, never, or the probability to drop it where there are others"
    )
    siblings: Literal["positive", "ignore", "negative"] = option("positive", "keys of the query's own video")
    negatives: tuple[Literal["repeat", "shuffle"], ...] = option(
        (), "the query's own clip, spoilt in time, as further negatives: repeat, shuffle"
    )
    in_batch: bool = option(False, "the keys of the batch's other videos are negatives too, beside the bank's")

    def __post_init__(self) -> None:
        """Refuse what is out of range, and own keys as siblings of themselves."""
        if not 0 < self.temperature < math.inf:
            raise InvalidInput(f"temperature: expected a number above 0, got {self.temperature}")
        if not isinstance(self.self_positive, str) and not 0 <= self.self_positive <= 1:
            raise InvalidInput(f"self_positive: expected always, never or a probability, got {self.self_positive}")
        if self.in_batch and self.siblings != "ignore":
            raise InvalidInput(f"in_batch: expected siblings = 'ignore' beside it, got {self.siblings!r}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser and arithmetic."""

    optimizer: Literal["adam", "adamw", "sgd"] = option("adam", "adam, adamw or sgd (momentum 0.9)")
    batch: int = option(32, "clips per batch, over all processes")
    weight_decay: float = option(1e-5, "")
    accumulate: int = option(1, "batches per optimiser step")
    clip_norm: float = option(0.0, "largest norm of the gradient; 0: not clipped")
    precision: Literal["float32", "bfloat16"] = option("float32", "of the encoders' arithmetic; the loss is float32")
    compile: bool = option(False, "torch.compile the encoders")
    threads: int = option(0, "of torch on a CPU; 0: its own choice")

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        if min(self.batch, self.accumulate) < 1 or min(self.weight_decay, self.clip_norm, self.threads) < 0:
            raise InvalidInput(
                "expected batch and accumulate of at least 1, weight_decay, clip_norm and threads of at least 0, got "
                f"{self.batch}, {self.accumulate}, {self.weight_decay}, {self.clip_norm}, {self.threads}"
            )


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What a run keeps, and how often; all of it may change when a run is resumed."""

    runs: str = option("runs", "folder of the run folders")
    log_every: int = option(10, "steps between rows of metrics.csv and TensorBoard")
    checkpoint_every: int = option(200, "steps between checkpoints")
    keep: int = option(2, "checkpoints kept for resuming; the newest always is")
    tensorboard: bool = option(True, "write TensorBoard events where tensorboard is installed")
    wandb: bool = option(False, "log to Weights & Biases; needs wandb installed")

    def __post_init__(self) -> None:
        """Refuse counts that are none."""
        if min(self.log_every, self.checkpoint_every) < 1 or self.keep < 0:
            raise InvalidInput(
                "expected log_every and checkpoint_every of at least 1 and keep of at least 0, "
                f"got {self.log_every}, {self.checkpoint_every}, {self.keep}"
            )


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One phase: which view is trained, with whose help, from which weights, for how long.

    Source: METHOD section 4 (blocks 910 to 920, 700: progressive phases).
    """

    name: str = option("", "unique; the store's phase has this name too")
    train: str = option("rgb", "the view trained")
    oracles: tuple[str, ...] = option((), "views that help to mine, frozen")
    oracle_from: str = option("latest", "their weights: latest, initial or an earlier phase")
    inherit: str = option("latest", "the trained view's first weights: latest, initial or an earlier phase")
    plan: str = option("", f"'': own key only (InfoNCE); plan text; or one of {', '.join(PRESETS)}")
    top_k: int = option(0, "positives per query; 0: as many as the plan says")
    positives: str = option("plan", "plan; labels (the supervised bound); or a table made by `cascade mine`")
    anchor: Literal["query", "key"] = option("query", "mine with the query's embedding or with its key's")
    pairs: Literal["same", "cross", "both"] = option("same", "keys of the query's view, of the first oracle, or both")
    bank_size: int = option(0, "keys in this phase's queue; 0: as bank.size says")
    mine_from: float = option(1.0, "share of the bank that must be filled before positives are mined")
    epochs: int = option(10, "passes over the training videos")
    lr: float = option(1e-3, "highest learning rate")
    schedule: Literal["cosine", "steps", "constant"] = option("cosine", "steps: a tenth at 60 % and again at 80 %")
    warmup: float = option(0.0, "epochs of linear warm-up")

    def __post_init__(self) -> None:
        """Refuse what is out of range, and plans of views that the phase does not have."""
        counts = (self.top_k, self.bank_size, self.warmup)
        if self.epochs < 1 or not 0 < self.lr < math.inf or min(counts) < 0 or not 0 <= self.mine_from <= 1:
            raise InvalidInput(
                "expected epochs of at least 1, lr above 0, top_k, bank_size and warmup of at least 0, mine_from in "
                f"[0, 1], got {self.epochs}, {self.lr}, {', '.join(map(str, counts))}, {self.mine_from}"
            )
        if self.train in self.oracles:
            raise InvalidInput(f"oracles: expected other views than the trained one, got {self.train!r}")
        if self.pairs != "same" and not self.oracles:
            raise InvalidInput(f"oracles: expected a view for pairs = {self.pairs!r}, got none")
        plan = self.cascade()
        foreign = [view for view in plan.views if view not in self.views] if plan else []
        if foreign:
            raise InvalidInput(f"plan: expected the views {', '.join(self.views)}, got {foreign[0]!r} in {self.plan!r}")

    @property
    def views(self) -> tuple[str, ...]:
        """The trained view, then the oracles."""
        return (self.train, *self.oracles)

    def cascade(self) -> CascadePlan | None:
        """The plan that mines, with `top_k` positives; None where own keys alone are positives."""
        if not self.plan:
            return None
        if self.plan in PRESETS:
            oracle = self.oracles[0] if self.oracles else self.train
            plan = CascadePlan.preset(self.plan, oracle=oracle, trainee=self.train, k=self.top_k or 5)
        else:
            plan = CascadePlan.parse(self.plan)
        if not self.top_k:
            return plan
        last = plan.stages[-1]
        kept = Keep(Fraction(self.top_k), "count")
        return CascadePlan((*plan.stages[:-1], Stage(last.score, kept, last.over_bank)))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run."""

    name: str = option("run", "of the run's folder")
    seed: int = option(0, "of every random draw; at least 0")
    views: tuple[str, ...] = option(("rgb", "flow"), "what clips are shown as: rgb, flow, residual, motion_vectors")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    data: DataConfig = field(default_factory=DataConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    phase: tuple[PhaseConfig, ...] = option((), "One phase a row, in order.")

    def __post_init__(self) -> None:
        """Refuse seeds, names, devices, views and phases which do not exist."""
        require_seed(self.seed)
        if self.name != Path(self.name).name or self.name in ("", ".."):
            raise InvalidInput(f"name: expected the name of a folder in output.runs, got {self.name!r}")
        try:
            torch.device("cpu" if self.device == "auto" else self.device)
        except RuntimeError:
            raise InvalidInput(f"device: expected auto, cpu, cuda, cuda:1, ..., got {self.device!r}") from None
        try:
            chosen_views(self.views)
        except InvalidInput as error:
            raise InvalidInput(f"views: {error}") from None
        for view in self.model.subtract_background:
            if view not in self.views:
                raise InvalidInput(
                    f"model.subtract_background: expected the run's views {', '.join(self.views)}, got {view!r}"
                )
        if not self.phase:
            raise InvalidInput("phase: expected at least one phase, got none")
        known: dict[str, PhaseConfig] = {}
        for number, phase in enumerate(self.phase, start=1):
            _check_phase(phase, f"phase.{number}", self, known)
            known[phase.name] = phase

    @property
    def course(self) -> TrainConfig:
        """The config with defaults for what changes nothing that is trained: `output`, and `data.workers`."""
        return replace(self, output=OutputConfig(), data=replace(self.data, workers=0))


def require_seed(seed: int) -> None:
    """Refuse a seed that no generator takes.

    Raises:
        InvalidInput: it is negative or too large.
    """
    if not 0 <= seed < SEEDS:
        raise InvalidInput(f"seed: expected a number from 0 to {SEEDS - 1}, got {seed}")


def _check_phase(phase: PhaseConfig, place: str, config: TrainConfig, known: dict[str, PhaseConfig]) -> None:
    """Refuse a phase that names what the config does not have; `known` are the phases before it."""
    if not phase.name or not phase.name.replace("-", "").replace("_", "").isalnum() or phase.name == "initial":
        raise InvalidInput(f"{place}.name: expected letters, digits, '-' and '_', not 'initial', got {phase.name!r}")
    if phase.name in known:
        raise InvalidInput(f"{place}.name: expected a name of its own, got {phase.name!r} again")
    missing = [view for view in phase.views if view not in config.views]
    if missing:
        raise InvalidInput(f"{place}: expected the run's views {', '.join(config.views)}, got {missing[0]!r}")
    for key, source in (
        ("inherit", phase.inherit),
        ("oracle_from", phase.oracle_from),
    ):
        if source not in ("latest", "initial", *known):
            there = ", ".join(["latest", "initial", *known])
            raise InvalidInput(f"{place}.{key}: expected one of {there}, got {source!r}")


def load_config(path: Path, assignments: Sequence[str] = ()) -> TrainConfig:
    """The config in a TOML file, with ``key=value`` assignments on top.

    Raises:
        InvalidInput: an unknown key, a wrong type or a value that cannot be; the message gives its place.
    """
    return build(TrainConfig, override(read_toml(path), assignments))
