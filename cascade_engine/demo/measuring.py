"""What the demo measures: retrieval of held-out videos and precision of mined positives, phase by phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cascade_engine.bank import Bank
from cascade_engine.evaluation.features import FeatureSet
from cascade_engine.evaluation.neighbours import retrieval
from cascade_engine.evaluation.of_run import Kind, collect
from cascade_engine.mining import mine_self
from cascade_engine.plan import CascadePlan
from cascade_engine.training.run import INITIAL, Run

RAW = "raw pixels"
RANDOM = "random weights"
PLANS = ("coclr", "cpr", "sum")
MINED = 5  # positives per query


@dataclass(frozen=True, kw_only=True)
class Row:
    """How well some features find videos of the same class.

    Args:
        features: what was compared: raw pixels, random weights, or the encoder after a phase.
        view: of which view.
        first: R@1 of held-out videos among the training videos.
        fifth: R@5.
        mining: plan to the precision of the positives it mines among the training clips, `view` being the trainee.
    """

    features: str
    view: str
    first: float
    fifth: float
    mining: dict[str, float]


def measure(run: Run) -> list[Row]:
    """For every view a row for raw pixels, for the random weights the run began with, and for each of its phases.

    Where there are several views, the same for all of them side by side, without mining and after the last phase alone.
    """
    rows = []
    floors: list[tuple[str, str | None, Kind]] = [(RAW, None, "pixels"), (RANDOM, INITIAL, "backbone")]
    for view in run.views:
        trained = [phase for phase in run.phases if run.trained_in(view, phase) == phase]
        for name, phase, kind in floors + [(each, each, "backbone") for each in trained]:
            compared: Kind = "pixels" if kind == "pixels" else "projection"
            mined = {each: collect(run, each, phase=phase, kind=compared).train for each in run.views}
            rows.append(_row(run, view, name, phase, kind, mining_precision(view, mined)))
    if len(run.views) > 1:
        last = run.phases[-1]
        streams = "+".join(run.views)
        rows += [_row(run, streams, *each, {}) for each in [*floors, (last, last, "backbone")]]
    return rows


def _row(run: Run, view: str, name: str, phase: str | None, kind: Kind, mining: dict[str, float]) -> Row:
    splits = collect(run, view, phase=phase, kind=kind)
    found = retrieval(splits.test, splits.train, ks=(1, 5)).figures
    return Row(features=name, view=view, first=found["R@1"], fifth=found["R@5"], mining=mining)


def mining_precision(trainee: str, features: Mapping[str, FeatureSet]) -> dict[str, float]:
    """Plan to the share of mined positives that are of their query's class; without a second view nothing is mined.

    Every training clip is a query among all of them, clips of its own video excluded. Raw pixels are not of unit
    length, so all features are compared by their cosine.
    """
    oracle = next((view for view in features if view != trainee), None)
    if oracle is None:
        return {}
    labelled = features[trainee]
    bank = Bank({view: each.values for view, each in features.items()}, labelled.video_id, metric="cosine")
    found = {}
    for name in PLANS:
        plan = CascadePlan.preset(name, oracle=oracle, trainee=trainee, k=MINED)
        index = np.asarray(mine_self(plan, bank).index)
        right = (labelled.label[index] == labelled.label[:, None]) & (index >= 0)
        found[name] = float(right.sum() / max(1, (index >= 0).sum()))
    return found


def remarks(rows: Sequence[Row]) -> list[str]:
    """Where a last phase does not beat raw pixels, random weights or the view's first phase (InfoNCE), said plainly."""
    said = []
    for view in dict.fromkeys(row.view for row in rows):
        *others, last = [row for row in rows if row.view == view]
        for other in others[:3]:
            if other.first < last.first:
                continue
            verb = "wins against" if other.first > last.first else "is as good as"
            name = other.features if other.features in (RAW, RANDOM) else f"InfoNCE ({other.features})"
            said.append(f"{view}: {name}, R@1 {other.first:.3f}, {verb} {last.features}, R@1 {last.first:.3f}.")
    return said or ["The last phase of each view beats raw pixels, random weights and InfoNCE in R@1 in this run."]
