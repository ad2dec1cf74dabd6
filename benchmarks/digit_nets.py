"""The small nets of the training benchmark: how they are made, what they learned, and what their views could mine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cascade_engine.bank import Bank
from cascade_engine.evaluation.features import FeatureSet
from cascade_engine.evaluation.neighbours import retrieval
from cascade_engine.evaluation.probe import linear_probe
from cascade_engine.models.encoder import Encoder
from cascade_engine.plan import CascadePlan
from cascade_engine.training import metrics

from .moving_digits import CLASSES, DigitFeatures

NAMES = tuple(f"digit {c // 6}, motion {c % 6}" for c in range(CLASSES))
Oracle: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every method gets alike.

    Args:
        trainee: the view trained and judged; the other one is the oracle.
        oracle: ``learned`` (by InfoNCE, then frozen), ``noise`` (random unit vectors) or ``collapsed`` (the learned
            one's vectors in a narrow cone).
        queue: keys.
        warm: epochs of InfoNCE per view before the methods begin.
        epochs: of each method.
        batch: clips.
        k: positives per query.
        lr: highest learning rate, of a cosine schedule.
        momentum: of the key encoder.
        temperature: of the loss.
        drop: probability that the own key leaves the positives where there are others.
        width: of the net's layers.
        dim: of the embedding.
    """

    trainee: Literal["rgb", "flow"] = "rgb"
    oracle: Literal["learned", "noise", "collapsed"] = "learned"
    queue: int = 2048
    warm: int = 12
    epochs: int = 20
    batch: int = 64
    k: int = 5
    lr: float = 1e-3
    momentum: float = 0.99
    temperature: float = 0.1
    drop: float = 0.9
    width: int = 256
    dim: int = 64

    @property
    def other(self) -> str:
        """The oracle's view."""
        return "flow" if self.trainee == "rgb" else "rgb"


def clips(data: DigitFeatures, view: str) -> torch.Tensor:
    """The varied clips of the training videos, (N, A, D)."""
    return torch.from_numpy(data.varied_rgb if view == "rgb" else data.varied_flow)


def network(inputs: int, budget: Budget) -> Encoder:
    """A net of two layers with a projection head, its weights drawn from torch's generator."""
    width = budget.width
    layers = [nn.Dropout(0.2), nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU()]
    layers += [nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()]
    return Encoder(nn.Sequential(*layers), width, budget.dim)


def oracle_of(encoder: Encoder, budget: Budget, seed: int) -> Oracle:
    """The frozen second view: clips' features (B, D) to embeddings (B, dim)."""
    frozen = copy.deepcopy(encoder).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed + 11)
    axis = nn.functional.normalize(torch.randn(1, budget.dim, generator=generator))

    def embed(clips: torch.Tensor) -> torch.Tensor:
        if budget.oracle == "noise":
            return nn.functional.normalize(torch.randn(len(clips), budget.dim, generator=generator))
        found: torch.Tensor = frozen(clips)
        return found if budget.oracle == "learned" else nn.functional.normalize(axis + 0.05 * found)

    return embed


@torch.no_grad()
def judge(encoder: Encoder, data: DigitFeatures, view: str, *, probe: bool) -> dict[str, float]:
    """Retrieval and, if asked for, linear probe of the backbone's features, a video's clips averaged."""
    encoder.eval()

    def features(cuts: npt.NDArray[np.float32], label: npt.NDArray[np.int64]) -> FeatureSet:
        values = torch.from_numpy(cuts)
        found = encoder.backbone(values.flatten(0, 1)).unflatten(0, values.shape[:2])
        mean = nn.functional.normalize(found, dim=-1).mean(1).numpy()
        return FeatureSet(values=mean, label=label, video_id=np.arange(len(label)), classes=NAMES)

    rgb = view == "rgb"
    test = features(data.test_rgb if rgb else data.test_flow, data.test_label)
    train = features(data.train_rgb if rgb else data.train_flow, data.train_label)
    found = retrieval(test, train, ks=(1, 5)).figures
    if probe:
        with torch.enable_grad():
            found["probe"] = linear_probe(test, train, strengths=(1e-4, 1e-3, 1e-2)).figures["accuracy"]
    return found


@torch.no_grad()
def worth(
    data: DigitFeatures, budget: Budget, encoder: Encoder, oracle: Oracle, plans: Mapping[str, CascadePlan]
) -> dict[str, Any]:
    """What each view and plan mines among the training videos before a method has trained anything.

    Every fourth video is a query, by another clip than the one that is its key.

    Args:
        data: the clips and labels.
        budget: says which view is which.
        encoder: of the trained view.
        oracle: of the other view.
        plans: by name; one is ``CPR``.

    Returns:
        What `cascade_engine.training.metrics.worth` measures with CPR's plan, its warnings, and ``precision`` with
        every plan's beside the views'.
    """
    cuts = {"rgb": torch.from_numpy(data.train_rgb), "flow": torch.from_numpy(data.train_flow)}
    embed: dict[str, Oracle] = {budget.trainee: encoder.eval(), budget.other: oracle}
    videos, asked = torch.arange(len(data.train_label)), torch.arange(0, len(data.train_label), 4)
    bank = Bank({view: embed[view](cuts[view][:, 1]) for view in cuts}, videos)
    queries = {view: embed[view](cuts[view][asked, 0]) for view in cuts}
    found = {name: metrics.worth(plan, queries, bank, asked, data.train_label) for name, plan in plans.items()}
    cpr = found["CPR"]
    mined = {name: each.plan_precision for name, each in found.items()}
    return {**asdict(cpr), "precision": {**cpr.precision, **mined}, "warnings": cpr.warnings()}
