"""The linear probe: one linear layer on frozen features, its regularisation chosen on training videos alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cascade_engine.errors import InvalidInput
from cascade_engine.evaluation.features import (
    F64,
    I64,
    FeatureSet,
    Scores,
    accuracy_scores,
    mean_per_video,
    require_comparable,
)
from cascade_engine.training.config import require_seed

if TYPE_CHECKING:
    import torch

STRENGTHS = tuple(10.0**power for power in range(-4, 1))
MAX_STEPS = 100


def validation_videos(train: FeatureSet, share: float, seed: int) -> I64:
    """The training videos held out for choices: of each class with two or more, `share` of them, at least one.

    The draw depends on the seed and on the videos' ids, not on the order of rows.

    Raises:
        InvalidInput: a share outside (0, 1), or a seed that no generator takes.
    """
    if not 0 < share < 1:
        raise InvalidInput(f"validation: expected a share in (0, 1), got {share}")
    require_seed(seed)
    generator = np.random.default_rng(seed)
    held: list[int] = []
    for label in np.unique(train.label):
        videos = np.unique(train.video_id[train.label == label])
        count = min(max(1, round(share * len(videos))), len(videos) - 1)
        held.extend(generator.permutation(videos)[:count].tolist())
    return np.array(sorted(held), np.int64)


def linear_probe(
    test: FeatureSet,
    train: FeatureSet,
    *,
    strengths: Sequence[float] = STRENGTHS,
    validation: float = 0.2,
    seed: int = 0,
) -> Scores:
    """Accuracy per test video of a softmax regression on frozen window features.

    Features are standardised with the training windows' mean and deviation. The L2 strength that is best on
    validation videos, cut from `train`, is kept (the stronger one of equals) and the layer fitted again on all of
    `train`; `test` is looked at once. Probabilities are averaged over a video's windows. float64, L-BFGS over all
    rows at once, from zero: no step is random, and equal inputs give equal bits.

    Raises:
        InvalidInput: splits of different widths or classes, no class with two videos, a negative strength, or
            a share or seed out of range.
    """
    require_comparable(test, train)
    if not strengths or min(strengths) < 0:
        raise InvalidInput(f"strengths: expected numbers of at least 0, got {list(strengths)}")
    held = np.isin(train.video_id, validation_videos(train, validation, seed))
    if not held.any():
        raise InvalidInput("train: expected a class with two or more videos to validate on, got none")
    tried = {
        strength: _accuracy(_fit(train, ~held, strength), train, held) for strength in sorted(strengths, reverse=True)
    }
    best = max(tried, key=lambda strength: tried[strength])
    layer = _fit(train, np.ones(len(train), bool), best)
    probabilities, label, _ = mean_per_video(layer.probabilities(test.values), test.video_id, test.label)
    settings: dict[str, Any] = {
        "l2": best,
        "validation_accuracy": tried[best],
        "validation_videos": len(np.unique(train.video_id[held])),
        "train_windows": len(train),
        "test_videos": len(label),
    }
    return accuracy_scores("linear", label, probabilities, test.classes, settings)


class _Layer:
    """A fitted softmax regression."""

    def __init__(self, mean: F64, scale: F64, weight: F64, bias: F64) -> None:
        self.mean, self.scale, self.weight, self.bias = mean, scale, weight, bias

    def probabilities(self, values: Any) -> F64:
        logits = ((values.astype(np.float64) - self.mean) / self.scale) @ self.weight.T + self.bias
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares: F64 = powers / powers.sum(axis=1, keepdims=True)
        return shares


def _accuracy(layer: _Layer, features: FeatureSet, rows: Any) -> float:
    label, video = features.label[rows], features.video_id[rows]
    means, truth, _ = mean_per_video(layer.probabilities(features.values[rows]), video, label)
    return float((means.argmax(axis=1) == truth).mean())


def _fit(train: FeatureSet, rows: Any, strength: float) -> _Layer:
    """Minimise mean cross-entropy + strength / 2 * |W|^2 on the standardised rows."""
    import torch

    values = train.values[rows].astype(np.float64)
    mean, deviation = values.mean(axis=0), values.std(axis=0)
    scale = np.where(deviation > 0, deviation, 1.0)
    x, y = torch.from_numpy((values - mean) / scale), torch.from_numpy(train.label[rows])
    weight = torch.zeros(len(train.classes), x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(train.classes), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_STEPS,
        tolerance_grad=1e-5,
        tolerance_change=1e-7,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> torch.Tensor:
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, y) + strength / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(objective)  # type: ignore[no-untyped-call]
    return _Layer(mean, scale, weight.detach().numpy(), bias.detach().numpy())
