"""Positives mined offline: a whole store against itself, tile by tile, into a table that training reads.

A table is a Zarr group: ``index`` and ``similarity`` (N, k), row i the positives of clip i as rows of the same table,
best first, -1 where fewer; ``video_id`` and ``clip_id`` (N,). Its attributes say what it was mined from and by which
plan, and how many rows are ``done``: they are written after the rows they speak of, so an interrupted run goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cascade_engine.bank import Bank
from cascade_engine.errors import InvalidInput, NotFound, SchemaMismatch
from cascade_engine.mining import Positives, self_tiles
from cascade_engine.plan import CascadePlan
from cascade_engine.tensor import to_host

FORMAT = 1
CHUNK = 4096  # rows
ARRAYS = ("index", "similarity", "video_id", "clip_id")


def mine_into(
    target: str | Path,
    bank: Bank,
    plan: CascadePlan,
    *,
    origin: dict[str, Any],
    tile: int = CHUNK,
    backend: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Mine a bank against itself into a table; one that was begun with the same origin and plan goes on.

    Args:
        target: the table, ending in ``.zarr`` by custom.
        bank: the keys, with video ids.
        plan: the stages.
        origin: plain values that say which store, phase and filter the bank is; they must be the same to go on.
        tile: queries per call, and rows per write; bounds the memory beyond the bank.
        backend: as in `mine`.
        progress: called with (rows done, rows in all).

    Returns:
        Rows mined by this call: 0 where the table was complete.

    Raises:
        SchemaMismatch: the table was begun from another origin or with another plan, or something else is there.
    """
    import zarr

    if bank.video_id is None:
        raise InvalidInput("bank: expected video ids, got a bank without")
    about: dict[str, Any] = {"format": FORMAT, "plan": str(plan), "rows": bank.size, "origin": origin}
    _require_free(Path(target))
    group = zarr.open_group(str(target), mode="a")
    begun: dict[str, Any] = dict(group.attrs)
    if not begun:  # new, or interrupted before it said what it is: the arrays are made once more
        k = plan.counts(bank.size)[-1]
        for name, dtype, fill in (("index", "int64", -1), ("similarity", "float32", float("-inf"))):
            chunks = (min(CHUNK, max(1, bank.size)), max(1, k))
            group.create_array(name, shape=(bank.size, k), chunks=chunks, dtype=dtype, fill_value=fill, overwrite=True)
        clip_id = np.arange(bank.size) if bank.clip_id is None else to_host(bank.clip_id, "clip_id")
        for name, values in (("video_id", to_host(bank.video_id, "video_id")), ("clip_id", clip_id)):
            group.create_array(name, data=np.ascontiguousarray(values, np.int64), overwrite=True)
        begun = {**about, "done": 0}
        group.attrs.update(begun)
    there = {key: begun.get(key) for key in about}
    if there != about:
        raise SchemaMismatch(f"{target}: expected a table of {about}, found one of {there}")
    first = int(begun["done"])
    index, similarity = group["index"], group["similarity"]
    for rows, found in self_tiles(plan, bank, tile=tile, start=first, backend=backend):
        index[rows] = to_host(found.index, "index")  # type: ignore[index]
        similarity[rows] = to_host(found.similarity, "similarity")  # type: ignore[index]
        group.attrs["done"] = rows.stop
        if progress is not None:
            progress(rows.stop, bank.size)
    return bank.size - first


def _require_free(target: Path) -> None:
    """Refuse a place that holds anything but a table, or the beginnings of one."""
    there = {each.name for each in target.iterdir()} if target.is_dir() else {target.name} if target.exists() else set()
    foreign = sorted(there - {*ARRAYS, "zarr.json"})
    if foreign:
        raise SchemaMismatch(f"{target}: expected a table of positives, or nothing; found {foreign[0]} there")


@dataclass(frozen=True, kw_only=True)
class PositiveVideos:
    """The videos that hold a video's positives, as training looks them up.

    Args:
        videos: (V, m) int64: the positive videos of video v, ascending, -1 padded at the end.
    """

    videos: torch.Tensor

    @classmethod
    def read(cls, path: str | Path) -> PositiveVideos:
        """The videos in a table made by `mine_into`.

        Raises:
            NotFound: no table there.
            SchemaMismatch: one of another format, or one that is not complete.
        """
        import zarr

        try:
            group = zarr.open_group(str(path), mode="r")
        except FileNotFoundError:
            raise NotFound(f"positives: expected a table, found none at {path}") from None
        about = dict(group.attrs)
        if about.get("format") != FORMAT or about.get("done") != about.get("rows"):
            raise SchemaMismatch(
                f"positives: {path}: expected a complete table of format {FORMAT}, got format {about.get('format')} "
                f"with {about.get('done')} of {about.get('rows')} rows"
            )
        index, video = np.asarray(group["index"][:]), np.asarray(group["video_id"][:])  # type: ignore[index]
        return cls.of(index, video)

    @classmethod
    def of(cls, index: npt.NDArray[np.int64], video_id: npt.NDArray[np.int64]) -> PositiveVideos:
        """From positives (N, k) as rows, and the rows' videos (N,)."""
        rows, _ = np.nonzero(index >= 0)
        pairs = np.unique(np.stack([video_id[rows], video_id[index[index >= 0]]], 1), axis=0)
        count = np.bincount(pairs[:, 0], minlength=int(video_id.max(initial=-1)) + 1)
        table = np.full((len(count), max(1, int(count.max(initial=0)))), -1, np.int64)
        place = np.arange(len(pairs)) - (np.cumsum(count) - count)[pairs[:, 0]]
        table[pairs[:, 0], place] = pairs[:, 1]
        return cls(videos=torch.from_numpy(table))

    def find(self, video_id: torch.Tensor, bank: Bank) -> Positives:
        """The keys of the bank that are of a positive video of each query (B,), never of its own."""
        there = torch.as_tensor(bank.video_id).cpu()
        wanted = torch.full((len(video_id), self.videos.shape[1]), -1)
        known = (video_id.cpu() >= 0) & (video_id.cpu() < len(self.videos))
        wanted[known] = self.videos[video_id.cpu()[known]]
        wanted[wanted < 0] = -3  # no key has it
        match = torch.stack([torch.isin(there, row) for row in wanted]) if len(wanted) else there[None][:0] > 0
        match &= there[None] != video_id.cpu()[:, None]
        found = members(match)
        return Positives(index=found.index.to(video_id.device), similarity=found.similarity.to(video_id.device))


def members(match: torch.Tensor) -> Positives:
    """The marked keys of each row (B, K) as positives (B, k), in slot order, -1 padded; similarity 1 where there."""
    count = match.sum(1)
    width = max(1, int(count.max())) if len(match) else 1
    index = torch.full((len(match), width), -1, device=match.device)
    rows, slots = match.nonzero(as_tuple=True)
    index[rows, torch.arange(len(rows), device=match.device) - (count.cumsum(0) - count)[rows]] = slots
    similarity = torch.where(index >= 0, 1.0, -torch.inf)
    return Positives(index=index, similarity=similarity)
