"""Configs to begin with: the literature's courses of training, and a tiny one for two CPU cores."""

from __future__ import annotations

from dataclasses import replace

from cascade_engine.errors import InvalidInput
from cascade_engine.training.config import (
    AugmentConfig,
    BankConfig,
    ClipConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    OutputConfig,
    PhaseConfig,
    TrainConfig,
)

CYCLES = 2  # alternations published


def preset(name: str) -> TrainConfig:
    """The config of that name.

    Raises:
        InvalidInput: there is none.
    """
    if name not in PRESETS:
        raise InvalidInput(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]


def _published(name: str, phases: tuple[PhaseConfig, ...], views: tuple[str, ...] = ("rgb", "flow")) -> TrainConfig:
    """The published setting: S3D, 32 frames of 128 x 128, K = 2048, Adam 1e-3 (METHOD section 4)."""
    return TrainConfig(
        name=name,
        views=views,
        data=DataConfig(source="videos.csv", size=160, workers=4),
        clip=ClipConfig(frames=32, size=128),
        augment=AugmentConfig(blur=0.5),
        model=ModelConfig(encoder="s3d"),
        output=OutputConfig(log_every=20, checkpoint_every=500),
        phase=phases,
    )


def _first(view: str, epochs: int) -> PhaseConfig:
    """A view by its own keys alone."""
    return PhaseConfig(name=f"{view}-0", train=view, epochs=epochs)


def _alternating(plan: str, counts: tuple[int, ...], epochs: int, first: int) -> tuple[PhaseConfig, ...]:
    """InfoNCE for both views, then each in turn with the other as oracle, once for each number of positives."""
    rows = [_first("rgb", first), _first("flow", first)]
    for cycle, top_k in enumerate(counts, start=1):
        for view, oracle in (("rgb", "flow"), ("flow", "rgb")):
            rows.append(
                PhaseConfig(
                    name=f"{view}-{cycle}", train=view, oracles=(oracle,), plan=plan, top_k=top_k, epochs=epochs
                )
            )
    return tuple(rows)


def _iic() -> TrainConfig:
    """Contrast between views over indexed banks, with clips spoilt in time as further negatives."""
    rows = tuple(
        PhaseConfig(name=f"{view}-{cycle}", train=view, oracles=(other,), pairs="both", epochs=120)
        for cycle in range(1, CYCLES + 1)
        for view, other in (("rgb", "residual"), ("residual", "rgb"))
    )
    base = _published("iic", (_first("rgb", 120), _first("residual", 120), *rows), ("rgb", "residual"))
    return replace(
        base,
        clip=ClipConfig(frames=16, size=112),
        data=replace(base.data, size=128),
        model=ModelConfig(encoder="r3d18"),
        bank=BankConfig(kind="indexed", momentum=0.5),
        loss=LossConfig(negatives=("repeat",)),
    )


def _tiny() -> TrainConfig:
    """The whole method on mocap15 in minutes, on two CPU cores."""
    return TrainConfig(
        name="tiny",
        data=DataConfig(source="mocap15:48", cache="cache/mocap15", size=96, workers=1),
        clip=ClipConfig(frames=8, stride=2, size=32, apart=6),
        augment=AugmentConfig(area=0.2, tempo=0.3),
        model=ModelConfig(momentum=0.97, subtract_background=("rgb",)),
        bank=BankConfig(size=512),
        loss=LossConfig(siblings="ignore", in_batch=True),
        optim=OptimConfig(batch=64, threads=1),
        output=OutputConfig(log_every=5, checkpoint_every=50),
        phase=(
            # The batch and the one before: a net that learns this fast only learns to run away from older keys.
            replace(_first("flow", 50), lr=3e-3, warmup=1, bank_size=64),
            # Against the keys of flow, as its own clips' keys would be told by clothes and background.
            replace(_first("rgb", 30), oracles=("flow",), pairs="cross", lr=3e-3, warmup=1, bank_size=64),
            PhaseConfig(name="flow-1", train="flow", oracles=("rgb",), plan="cpr", top_k=1, epochs=8),
            PhaseConfig(name="rgb-1", train="rgb", oracles=("flow",), pairs="cross", plan="cpr", top_k=1, epochs=8),
        ),
    )


PRESETS: dict[str, TrainConfig] = {
    "infonce": _published("infonce", (_first("rgb", 300), _first("flow", 300))),
    "coclr": _published("coclr", _alternating("coclr", (5,) * CYCLES, 100, 300)),
    "cpr": _published("cpr", _alternating("cpr", (1, 3, 5), 100, 300)),
    "patent": _published("patent", _alternating("patent", (1, 2, 3), 100, 300)),
    "iic": _iic(),
    "tiny": _tiny(),
}
