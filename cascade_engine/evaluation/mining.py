"""How well a plan mines in the features of a phase, by labels that mining itself never reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cascade_engine.errors import InvalidInput
from cascade_engine.evaluation.features import I64
from cascade_engine.mining import self_tiles
from cascade_engine.plan import CascadePlan
from cascade_engine.store import FeatureStore
from cascade_engine.tensor import to_host
from cascade_engine.training.metrics import MiningMetrics, worth

_WORTH_QUERIES = 512


@dataclass(frozen=True, kw_only=True)
class MiningScores:
    """What mining a phase against itself finds.

    Args:
        plan: its text.
        phase: the store's phase.
        figures: precision (PMR), recall_at_1, class_recall_video and class_recall_group (CMR), coverage, hubness.
        per_class: for each class its videos, the precision of its queries and the share of its videos mined rightly.
        views: what each view finds alone: precision, and its agreement with the others in ``agreement``.
        warnings: views that are noise or have collapsed.
    """

    plan: str
    phase: str
    figures: dict[str, float]
    per_class: list[dict[str, Any]]
    views: dict[str, float]
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `json.dumps`."""
        return {
            "protocol": "mining",
            "plan": self.plan,
            "phase": self.phase,
            "figures": self.figures,
            "views": self.views,
            "warnings": self.warnings,
            "per_class": self.per_class,
        }


def mining(
    store: FeatureStore, plan: CascadePlan, *, phase: str | None = None, where: str | None = None
) -> MiningScores:
    """Mine every clip's positives among the clips of other videos, and judge them by the labels.

    Args:
        store: with a label column (and a group column, where recordings are to be told apart).
        plan: the stages.
        phase: of the store; the one it was opened with by default.
        where: which clips take part, such as ``"split == 'train'"``.

    Raises:
        InvalidInput: no labels, or nothing to mine among.

    Source: Wu et al., CVPRW 2022, section 4 (PMR, CMR).
    """
    if "label" not in store.columns:
        raise InvalidInput(f"store: expected a label column, {store.path} has {', '.join(store.columns)}")
    bank = store.bank(plan.views, phase=phase, where=where, device="cpu")
    videos = bank.host_video_id()
    if videos is None or len(np.unique(videos)) < 2:
        raise InvalidInput("where: expected clips of two or more videos to mine among")
    rows = store.rows_of(to_host(bank.clip_id, "clip_id"), phase=phase)
    label = store.column("label", phase=phase)[rows]
    classes, numbers = np.unique(label, return_inverse=True)
    numbers = np.where(classes[numbers] == "", -1, numbers)
    names, videos = np.unique(videos, return_inverse=True)  # counted by place: ids may be any numbers, such as hashes
    bank.video_id = torch.from_numpy(videos)
    of_video, group_of = np.full(len(names), -1, np.int64), np.full(len(names), -1, np.int64)
    of_video[videos], group_of[videos] = numbers, _groups(store, phase, rows, videos)
    metrics = MiningMetrics(of_video, group_of, np.arange(len(names)))
    right, mined = np.zeros(len(classes)), np.zeros(len(classes))
    for tile, found in self_tiles(plan, bank):
        metrics.add(found, bank, torch.as_tensor(videos[tile]))
        index = to_host(found.index, "index")
        there = index >= 0
        same = there & (numbers[index] == numbers[tile][:, None])
        known = numbers[tile] >= 0
        np.add.at(right, numbers[tile][known], same[known].sum(1))
        np.add.at(mined, numbers[tile][known], there[known].sum(1))
    chosen = np.linspace(0, bank.size - 1, min(bank.size, _WORTH_QUERIES)).astype(np.int64)
    told = worth(
        plan,
        {view: bank.keys[view][chosen] for view in plan.views},
        bank,
        torch.as_tensor(videos[chosen]),
        of_video,
    )
    return MiningScores(
        plan=str(plan),
        phase=phase or store.phase,
        figures=metrics.figures(),
        per_class=_per_class(classes, of_video, metrics, right, mined),
        views={**told.precision, "agreement": told.agreement},
        warnings=told.warnings(),
    )


def _groups(store: FeatureStore, phase: str | None, rows: I64, videos: I64) -> I64:
    """A number for the recording that each clip's video was cut from; every video its own where none is named."""
    if "group" not in store.columns:
        return videos
    names = store.column("group", phase=phase)[rows]
    named = [f"group {name}" if name else f"video {video}" for name, video in zip(names, videos, strict=True)]
    return np.unique(named, return_inverse=True)[1].astype(np.int64)


def _per_class(
    classes: np.ndarray, of_video: I64, metrics: MiningMetrics, right: np.ndarray, mined: np.ndarray
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(classes.tolist()):
        members = np.flatnonzero(of_video == number)
        if name and len(members):
            rows.append(
                {
                    "class": name,
                    "videos": len(members),
                    "precision": float(right[number] / mined[number]) if mined[number] else None,
                    "recall": float((metrics.hit[members] > 0).mean()),
                }
            )
    return rows
