"""Protocols on arrays, against answers worked out by loops or known beforehand."""

from dataclasses import replace

import numpy as np
import pytest

from cascade_engine.errors import InvalidInput
from cascade_engine.evaluation.features import FeatureSet, confusion_matrix
from cascade_engine.evaluation.neighbours import knn, nearest, retrieval
from cascade_engine.evaluation.probe import linear_probe, validation_videos

CLASSES = ("jump", "run", "walk", "kick", "spin", "crawl")


def split(seed: int, videos: int = 4, windows: int = 3, noise: float = 0.4, first_id: int = 0) -> FeatureSet:
    """`videos` videos of each class around the class's own direction."""
    rng = np.random.default_rng(seed)
    label = np.repeat(np.arange(len(CLASSES)), videos * windows)
    video = first_id + np.repeat(np.arange(len(CLASSES) * videos), windows)
    centres = np.eye(len(CLASSES), 16)
    values = centres[label] + noise * rng.standard_normal((len(label), 16)) + 0.5
    return FeatureSet(values=values.astype(np.float32), label=label, video_id=video, classes=CLASSES)


def by_loops(test: FeatureSet, gallery: FeatureSet) -> np.ndarray:
    """Gallery videos from nearest to farthest of each test video, float64, the protocol spelled out."""

    def prepare(features: FeatureSet) -> tuple[list[int], np.ndarray]:
        ids = sorted(set(features.video_id.tolist()))
        means = np.array([features.values[features.video_id == v].astype(np.float64).mean(0) for v in ids])
        means = means.astype(np.float32).astype(np.float64)
        means -= means.mean(0)
        return ids, (means / np.linalg.norm(means, axis=1, keepdims=True)).astype(np.float32).astype(np.float64)

    (_, queries), (_, keys) = prepare(test), prepare(gallery)
    return np.array([sorted(range(len(keys)), key=lambda j, q=q: (-float(q @ keys[j]), j)) for q in queries])


def test_retrieval_is_the_protocol_spelled_out():
    test, gallery = split(1, noise=0.8, first_id=1000), split(2, noise=0.8)
    order = by_loops(test, gallery)
    truth, label = test.per_video().label, gallery.per_video().label
    found = retrieval(test, gallery)
    for k in (1, 5, 10, 20, 50):
        assert found.figures[f"R@{k}"] == np.mean([truth[i] in label[order[i, :k]] for i in range(len(truth))])
    assert 0.3 < found.figures["R@1"] < 1.0
    assert found.confusion.sum() == len(truth)
    assert np.trace(found.confusion) / len(truth) == found.figures["R@1"]


def test_a_video_never_finds_itself():
    both = split(3, videos=2, noise=0.0)
    prepared = both.per_video().normalised()
    index, _ = nearest(prepared, prepared, 5)
    assert not (prepared.video_id[index] == prepared.video_id[:, None]).any()
    assert retrieval(both, both).figures["R@1"] == 1.0


def test_labels_that_mean_nothing_score_at_chance():
    rng = np.random.default_rng(0)
    test, train = (
        FeatureSet(
            values=rng.standard_normal((600, 8)).astype(np.float32),
            label=np.arange(600) % 6,
            video_id=first + np.arange(600),
            classes=CLASSES,
        )
        for first in (0, 1000)
    )
    for scores in (retrieval(test, train).figures["R@1"], knn(test, train).figures["accuracy"]):
        assert abs(scores - 1 / 6) < 0.06
    assert abs(linear_probe(test, train, strengths=(0.1,)).figures["accuracy"] - 1 / 6) < 0.06


def test_knn_votes_by_weight():
    train = FeatureSet(
        values=np.array([[1, 0], [0.9, 0.1], [-1, 0.2], [-1, 0.1], [-0.9, 0.0]], np.float32),
        label=np.array([0, 0, 1, 1, 1]),
        video_id=np.arange(5),
        classes=("a", "b"),
    )
    test = FeatureSet(
        values=np.array([[1, 0], [-1, 0]], np.float32),
        label=np.array([0, 1]),
        video_id=np.array([10, 11]),
        classes=("a", "b"),
    )
    assert knn(test, train, k=5).figures["accuracy"] == 1.0  # a plain majority of all five would miss the first
    assert knn(test, train, k=5, temperature=1e3).figures["accuracy"] == 0.5


@pytest.mark.parametrize("temperature", [0.07, 1e-3, 1e-6])
def test_nearer_neighbours_weigh_more_at_any_temperature(temperature):
    def towards(*angles: float) -> np.ndarray:
        return np.array([[np.cos(angle), np.sin(angle)] for angle in angles], np.float32)

    train = FeatureSet(
        values=towards(0, 0.5, np.pi, np.pi + 0.5),
        label=np.array([1, 0, 1, 0]),
        video_id=np.arange(4),
        classes=("a", "b"),
    )
    test = replace(train, values=towards(0, np.pi), label=np.array([1, 1]), video_id=np.array([10, 11]))
    assert knn(test, train, k=3, temperature=temperature).figures["accuracy"] == 1.0


def test_every_protocol_gives_the_same_bits_twice():
    test, train = split(4, noise=0.9, first_id=1000), split(5, noise=0.9)
    for protocol in (retrieval, knn, linear_probe):
        assert protocol(test, train).to_json() == protocol(test, train).to_json()


def test_the_probe_chooses_on_training_videos_alone():
    test, train = split(6, first_id=1000), split(7)
    honest = linear_probe(test, train)
    turned = FeatureSet(
        values=test.values, label=(test.label + 1) % 6, video_id=test.video_id, classes=CLASSES
    )  # other test labels: nothing that was chosen may move
    assert linear_probe(turned, train).settings == honest.settings
    assert honest.figures["accuracy"] > 0.8
    assert linear_probe(turned, train).figures["accuracy"] < 0.2


def test_validation_is_cut_by_video_and_by_class():
    train = split(8, videos=5)
    held = validation_videos(train, 0.2, seed=3)
    assert len(held) == len(CLASSES)
    assert {int(train.label[train.video_id == v][0]) for v in held} == set(range(len(CLASSES)))
    shuffled = np.random.default_rng(0).permutation(len(train))
    again = FeatureSet(
        values=train.values[shuffled],
        label=train.label[shuffled],
        video_id=train.video_id[shuffled],
        classes=CLASSES,
    )
    assert validation_videos(again, 0.2, seed=3).tolist() == held.tolist()


def test_confusion_and_the_table_by_class():
    confusion = confusion_matrix(np.array([0, 0, 0, 1, 2]), np.array([0, 1, 1, 1, 0]), 4)
    assert confusion.tolist() == [[1, 2, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    scores = retrieval(split(1, first_id=1000), split(2))
    rows = {row["class"]: row for row in scores.per_class()}
    assert set(rows) == set(CLASSES)
    assert all(row["videos"] == 4 for row in rows.values())


def changed(**fields: object) -> FeatureSet:
    return replace(split(1), **fields)


def test_bad_features_are_refused_by_name():
    good = split(1)
    broken, mixed = good.values.copy(), good.label.copy()
    broken[2, 3] = np.nan
    mixed[0] = 3
    with pytest.raises(InvalidInput, match=r"values: expected finite values, got nan in row 2"):
        changed(values=broken)
    with pytest.raises(InvalidInput, match=r"label: expected indices into 2 classes, got 2"):
        changed(classes=CLASSES[:2])
    with pytest.raises(InvalidInput, match=r"several for video_id 0"):
        changed(label=mixed)
    narrow = changed(values=good.values[:, :4])
    with pytest.raises(InvalidInput, match=r"test: expected \(N, 16\)"):
        retrieval(narrow, good)
    with pytest.raises(InvalidInput, match=r"class with two or more videos"):
        linear_probe(good, split(2, videos=1))
    alone = changed(values=good.values[:1], label=good.label[:1], video_id=good.video_id[:1])
    with pytest.raises(InvalidInput, match=r"other than the query's own"):
        retrieval(alone, alone)
