"""The cascade itself, made visible: which candidates each stage left, with thumbnails, right and wrong marked."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from cascade_engine.bank import Bank
from cascade_engine.errors import InvalidInput
from cascade_engine.mining import mine
from cascade_engine.plan import CascadePlan
from cascade_engine.tensor import Array, Host, to_host

Pixels = npt.NDArray[np.uint8]
SHOWN = 10
THUMBNAIL = 80


@dataclass(frozen=True, kw_only=True)
class StageTrace:
    """What one stage left for one query.

    Args:
        text: the stage as the plan writes it.
        kept: slots of the bank, best first by this stage's score.
        right: for each of `kept`, whether it is of the query's class; None where labels are unknown.
    """

    text: str
    kept: npt.NDArray[np.int64]
    right: npt.NDArray[np.bool_] | None

    @property
    def precision(self) -> float | None:
        """The share of right ones among those kept, None where nothing was kept or labels are unknown."""
        return float(self.right.mean()) if self.right is not None and len(self.right) else None


@dataclass(frozen=True, kw_only=True)
class CascadeTrace:
    """One query's way through a plan.

    Args:
        query: the query's row, as the caller numbers queries.
        candidates: keys the query could find: all but those of its own video.
        base_rate: share of right ones among the candidates: what picking blindly would give; None without labels.
        stages: in the order of the plan.
    """

    query: int
    candidates: int
    base_rate: float | None
    stages: tuple[StageTrace, ...]


def trace_cascade(
    plan: CascadePlan,
    queries: Mapping[str, Array],
    bank: Bank,
    exclude: object,
    *,
    rows: Sequence[int],
    query_labels: Sequence[Any] | None = None,
    backend: str | None = None,
) -> list[CascadeTrace]:
    """Follow some queries through the stages of a plan.

    Args:
        plan: the stages.
        queries: view to features (B, D_view).
        bank: the keys, with `label` where known.
        exclude: (B,) video ids.
        rows: which queries to follow.
        query_labels: (B,) labels as the bank's, to tell right from wrong; "" where a query's is unknown.
        backend: as in `mine`.

    Raises:
        InvalidInput: as `mine`.
    """
    picked = np.asarray(rows, np.int64)
    ids = to_host(exclude, "exclude")[picked]
    chosen = {view: queries[view][picked] for view in plan.views}
    found = mine(plan, chosen, bank, ids, trace=True, backend=backend)
    if found.kept is None:
        raise InvalidInput("backend: expected one that traces stages, got one that does not")
    labels = None if bank.label is None or query_labels is None else np.asarray(bank.label)
    owner = bank.host_video_id()
    traces = []
    for position, row in enumerate(picked.tolist()):
        known = labels is not None and query_labels is not None and query_labels[row] != ""
        same = labels == query_labels[row] if known and query_labels is not None else None
        eligible = np.ones(bank.size, bool) if owner is None else owner != ids[position]
        stages = []
        for stage, kept in zip(plan.stages, found.kept, strict=True):
            slots = to_host(kept, "kept")[position]
            slots = slots[slots >= 0]
            stages.append(StageTrace(text=str(stage), kept=slots, right=None if same is None else same[slots]))
        rate = None if same is None or not eligible.any() else float(same[eligible].mean())
        traces.append(CascadeTrace(query=row, candidates=int(eligible.sum()), base_rate=rate, stages=tuple(stages)))
    return traces


def cascade_strip(
    trace: CascadeTrace,
    *,
    query_frames: Sequence[Pixels],
    query_name: str,
    thumbnail: Callable[[int], Pixels],
    name: Callable[[int], str],
    shown: int = SHOWN,
) -> str:
    """The HTML of one query: its frames, then for each stage how many survive, how many are right, and the best.

    Args:
        trace: from `trace_cascade`.
        query_frames: a few frames (H, W, 3) of the query.
        query_name: what to call it.
        thumbnail: slot of the bank to a picture (H, W, 3) uint8.
        name: slot of the bank to a short name.
        shown: candidates drawn for each stage.
    """
    frames = "".join(clip_figure(frame, "", None) for frame in query_frames)
    base = "" if trace.base_rate is None else f", {trace.base_rate:.0%} right"
    rows = [
        f'<div class="stage"><b>{html.escape(query_name)}<small>the query</small></b>'
        f'<div class="clips">{frames}</div></div>',
        f'<div class="stage"><b>eligible<small>{trace.candidates} keys{base}</small></b></div>',
    ]
    for stage in trace.stages:
        share = "" if stage.precision is None else f", {stage.precision:.0%} right"
        best = [
            clip_figure(thumbnail(int(slot)), name(int(slot)), None if stage.right is None else bool(stage.right[rank]))
            for rank, slot in enumerate(stage.kept[:shown])
        ]
        more = len(stage.kept) - len(best)
        rest = f'<figure class="clip"><figcaption>and {more} more</figcaption></figure>' if more else ""
        rows.append(
            f'<div class="stage"><b>{html.escape(stage.text)}<small>keeps {len(stage.kept)}{share}</small></b>'
            f'<div class="clips">{"".join(best)}{rest}</div></div>'
        )
    return f'<div class="cascade">{"".join(rows)}</div>'


def clip_figure(picture: Pixels, caption: str, right: bool | None) -> str:
    """A thumbnail with its caption, marked right or wrong where that is known."""
    mark = "" if right is None else " right" if right else " wrong"
    text = html.escape(caption)
    return (
        f'<figure class="clip{mark}" title="{text}"><img alt="{text}" src="{data_uri(picture)}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def data_uri(picture: Pixels, size: int = THUMBNAIL) -> str:
    """An RGB picture (H, W, 3) uint8 as a JPEG data URI, its longer side at most `size`.

    Raises:
        InvalidInput: not such a picture.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise InvalidInput(f"picture: expected (H, W, 3) uint8, got {picture.shape} {picture.dtype}")
    scale = size / max(picture.shape[:2])
    if scale < 1:
        width, height = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
        picture = np.asarray(cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    _, coded = cv2.imencode(".jpg", picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 82])
    return "data:image/jpeg;base64," + base64.b64encode(coded.tobytes()).decode()


def project(values: Host) -> npt.NDArray[np.float64]:
    """The two principal components of features (N, D): (N, 2), each component's largest weight positive."""
    centred = np.asarray(values, np.float64) - np.asarray(values, np.float64).mean(axis=0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    axes = axes[:, ::-1][:, :2]
    signs = np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    shown: npt.NDArray[np.float64] = centred @ (axes * signs)
    return shown if shown.shape[1] == 2 else np.column_stack([shown, np.zeros(len(shown))])
