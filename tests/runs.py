"""A run as training leaves one, made in seconds: labelled films, a cache, random encoders, a store of features."""

import films
import numpy as np
import torch

from cascade_engine.models.encoder import build_encoder
from cascade_engine.training.config import AugmentConfig, ClipConfig, DataConfig, PhaseConfig, TrainConfig
from cascade_engine.training.extraction import write_features
from cascade_engine.training.parallel import World
from cascade_engine.training.run import Run
from cascade_engine.video.cache import ClipCache
from cascade_engine.video.index import VideoEntry, VideoIndex

TINTS = {"blue": (0.3, 0.5, 1.0), "green": (0.4, 1.0, 0.4), "red": (1.0, 0.5, 0.3)}
VIEWS = ("rgb", "residual")
PER_CLASS = {"train": 5, "test": 2}


def videos(folder):
    """Moving textures in one of three colours, every video its own texture."""
    entries = []
    for split, count in PER_CLASS.items():
        for number in range(count):
            for place, (label, tint) in enumerate(TINTS.items()):
                seed = 100 * place + 10 * len(split) + number
                path = folder / split / label / f"{number}.mp4"
                grey = films.moving(16 + number, height=48, width=48, step=(2, 0), seed=seed)
                films.write(path, (grey * np.array(tint)).astype(np.uint8))
                entries.append(VideoEntry(path=path, video_id=0, label=label, split=split, group=f"{label} {number}"))
    return VideoIndex(entries)


def make(folder, *, name="run"):
    """The run, its one phase done by random encoders whose batch norm has seen the clips."""
    index = videos(folder / "videos")
    cache = ClipCache.build(index, VIEWS, 40, folder / "cache")
    config = TrainConfig(
        name=name,
        views=VIEWS,
        data=DataConfig(source="", cache=str(folder / "cache"), size=40),
        clip=ClipConfig(frames=4, size=32, stride=2),
        augment=AugmentConfig(area=0.9, jitter=0.0, gray=0.0, flip=0.0),
        phase=(PhaseConfig(name="first", train="rgb", oracles=("residual",), plan="residual:50%,rgb:3"),),
    )
    run = Run.create(folder / name, config)
    run.note_data(cache)
    torch.manual_seed(0)
    encoders = {view: build_encoder(config.model.encoder, 3) for view in VIEWS}
    for encoder in encoders.values():
        with torch.no_grad():
            encoder.train()(torch.randn(16, 3, 4, 32, 32))
    run.save_encoders("initial", encoders)
    run.save_encoders("first", {"rgb": encoders["rgb"]})
    write_features(run, "first", cache, World(), torch.device("cpu"))
    rows = ["step,phase,loss,precision", *(f"{n},first,{3 - n / 10:.3f},{0.3 + n / 50:.3f}" for n in range(10))]
    (run.folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    assert np.isfinite(run.metrics[-1]["loss"])
    return run
