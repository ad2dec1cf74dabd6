"""The features of all clips after a phase, written as a sealed phase of the run's store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cascade_engine.errors import NotFound
from cascade_engine.models import Encoder
from cascade_engine.store import FeatureStore
from cascade_engine.training.batches import span
from cascade_engine.training.config import ClipConfig
from cascade_engine.training.parallel import World, gather, share, wait
from cascade_engine.training.run import BACKBONE, Run
from cascade_engine.video.augment import centre
from cascade_engine.video.cache import ClipCache
from cascade_engine.video.clips import ClipTable, cut

CHUNK = 64  # clips encoded at a time by each process
COLUMNS = {"label": "str", "split": "str", "group": "str", "start_frame": "int"}


def write_features(run: Run, phase: str, cache: ClipCache, world: World, device: torch.device) -> None:
    """Write the features of all half-overlapping clips of all videos, every view, and seal the phase.

    Per view the embeddings under the view's name, of unit length, and the backbone's features under
    ``<view>_backbone``. A phase that is sealed is left as it is; one that was interrupted is continued.

    Args:
        run: whose encoders, as they were after `phase`.
        phase: the training phase, and the store's.
        cache: the videos.
        world: each process encodes a share; the first one writes.
        device: to encode on.
    """
    first, sealed = _begun(run.store_path, phase)
    wait(world)
    if sealed:
        return
    encoders = {view: run.encoder(view, phase).to(device) for view in run.views}
    clip = run.config.clip
    table = cut(cache, span(clip), max(1, span(clip) // 2))
    store = _writer(run, phase, encoders) if world.first else None
    for begin in range(first, len(table), CHUNK * world.size):
        rows = np.arange(begin, min(begin + CHUNK * world.size, len(table)))
        own = rows[share(len(rows), world)]
        features: dict[str, torch.Tensor] = {}
        for view, encoder in encoders.items():
            for name, values in encode(encoder, view, cache, table, own, clip).items():
                features[name] = gather(values, len(rows), world).cpu()
        if store is not None:
            store.append(
                features,
                clip_id=table.clip_id[rows],
                video_id=table.video_id[rows],
                start=table.start[rows],
                end=table.end[rows],
                label=table.label[rows].tolist(),
                split=table.split[rows].tolist(),
                group=table.group[rows].tolist(),
                start_frame=table.start_frame[rows],
            )
    if store is not None:
        store.seal()
    wait(world)


@torch.no_grad()
def encode(
    encoder: Encoder, view: str, cache: ClipCache, table: ClipTable, rows: npt.NDArray[np.int64], clip: ClipConfig
) -> dict[str, torch.Tensor]:
    """Embeddings (n, D) under the view's name, backbone features (n, F) under ``<view>_backbone``, of clips as cut."""
    device = next(encoder.parameters()).device
    if not len(rows):
        widths = {view: encoder.embedding_dim, view + BACKBONE: encoder.feature_dim}
        return {name: torch.empty(0, width, device=device) for name, width in widths.items()}
    frames = np.stack(
        [
            cache.frames(view, int(table.row[n]), int(table.start_frame[n]), table.clip_length)[:: clip.stride]
            for n in rows
        ]
    )
    pooled = encoder.backbone(centre(view, frames, clip.size).to(device)).float()
    return {view: torch.nn.functional.normalize(encoder.head(pooled), dim=1), view + BACKBONE: pooled}


def _begun(path: Path, phase: str) -> tuple[int, bool]:
    """ClipCache that the store's phase has, and whether it is sealed."""
    try:
        with FeatureStore.open(path, phase=phase) as store:
            return store.rows, store.sealed
    except NotFound:
        return 0, False


def _writer(run: Run, phase: str, encoders: dict[str, Encoder]) -> FeatureStore:
    """The store, made if need be, opened to append to the phase."""
    path = run.store_path
    views = {view: encoder.embedding_dim for view, encoder in encoders.items()}
    views |= {view + BACKBONE: encoder.feature_dim for view, encoder in encoders.items()}
    model = f"{run.config.model.encoder} of {run.config.name}"
    if not path.exists():
        return FeatureStore.create(path, views, columns=COLUMNS, phase=phase, durability="group", model=model)
    with FeatureStore.open(path) as store:
        if phase not in store.phases:
            return store.new_phase(phase, durability="group", model=model)
    return FeatureStore.open(path, mode="a", phase=phase, durability="group")
