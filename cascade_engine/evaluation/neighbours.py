"""Protocols by nearest neighbours: retrieval and k-NN, exact, through the mining engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cascade_engine.bank import Bank
from cascade_engine.errors import InvalidInput
from cascade_engine.evaluation.features import (
    F32,
    I64,
    FeatureSet,
    Scores,
    accuracy_scores,
    confusion_matrix,
    require_comparable,
)
from cascade_engine.mining import mine
from cascade_engine.plan import CascadePlan


def nearest(test: FeatureSet, gallery: FeatureSet, k: int) -> tuple[I64, F32]:
    """The k nearest rows of `gallery` of each row of `test`, never of the same video: (index, similarity).

    Both are (Q, k), or (Q, G) of a gallery of G < k rows. Rows are compared as they are; -1 and -inf where fewer are
    eligible.

    Raises:
        InvalidInput: k under 1, splits that differ, or a query for which nothing is eligible.
    """
    require_comparable(test, gallery)
    if k < 1:
        raise InvalidInput(f"k: expected at least 1, got {k}")
    bank = Bank({"feature": gallery.values}, gallery.video_id)
    found = mine(CascadePlan.parse(f"feature:{min(k, bank.size)}"), {"feature": test.values}, bank, test.video_id)
    if (found.index[:, 0] < 0).any():
        raise InvalidInput("gallery: expected a video other than the query's own, got that one alone")
    return found.index, found.similarity


def retrieval(test: FeatureSet, gallery: FeatureSet, *, ks: Sequence[int] = (1, 5, 10, 20, 50)) -> Scores:
    """Recall at k: the share of test videos with a video of their class among the k nearest of the gallery.

    Windows are averaged per video, each split is centred on its own mean, videos are of unit length. A gallery of
    fewer than k videos is searched as a whole. `test` may be the gallery itself: a video never finds itself.

    Raises:
        InvalidInput: splits of different widths or classes.

    Source: Wu et al., CVPRW 2022, section 4; the protocol of CoCLR (Han et al., NeurIPS 2020), test in train.
    """
    if not ks or min(ks) < 1:
        raise InvalidInput(f"ks: expected counts of at least 1, got {list(ks)}")
    queries, bank = test.per_video().normalised(), gallery.per_video().normalised()
    index, _ = nearest(queries, bank, max(ks))
    hits = (bank.label[index] == queries.label[:, None]) & (index >= 0)
    return Scores(
        protocol="retrieval",
        figures={f"R@{k}": float(hits[:, :k].any(axis=1).mean()) for k in ks},
        confusion=confusion_matrix(queries.label, bank.label[index[:, 0]], len(test.classes)),
        classes=test.classes,
        settings={"queries": len(queries), "gallery": len(bank), "dim": int(bank.values.shape[1])},
    )


def knn(test: FeatureSet, train: FeatureSet, *, k: int = 20, temperature: float = 0.07) -> Scores:
    """Accuracy of a vote among the k nearest training videos, each with the weight exp(similarity / temperature).

    Features are prepared as for `retrieval`.

    Raises:
        InvalidInput: splits of different widths or classes, k under 1, or a temperature that is not positive.

    Source: Wu et al., CVPR 2018 (instance discrimination), section 3.4: weighted k-NN.
    """
    if not temperature > 0:
        raise InvalidInput(f"temperature: expected a positive number, got {temperature}")
    queries, bank = test.per_video().normalised(), train.per_video().normalised()
    index, similarity = nearest(queries, bank, k)
    near = similarity.astype(np.float64)
    weight = np.exp((near - near[:, :1]) / temperature)  # of the best 1, which no temperature overflows; 0 of none
    votes = np.zeros((len(queries), len(test.classes)))
    rows = np.broadcast_to(np.arange(len(queries))[:, None], index.shape)
    np.add.at(votes, (rows, bank.label[index]), weight)
    settings = {"k": min(k, len(bank)), "temperature": temperature, "queries": len(queries), "train": len(bank)}
    return accuracy_scores("knn", queries.label, votes, test.classes, settings)
