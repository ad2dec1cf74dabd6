"""MovingDigits: each view knows its half of the class, and the same arguments give the same numbers."""

import numpy as np
import pytest

from cascade_engine.errors import InvalidInput

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from cascade_engine.benchmarks.moving_digits import CLASSES, digit_features, moving_digits


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    digits = moving_digits(folder, train=240, test=60)
    return folder, digits, digit_features(digits, folder, cuts=1)


def test_shapes_and_labels(made):
    _, digits, features = made
    assert digits.train_gray.shape == (240, 16, 40, 40)
    assert digits.test_flow.shape == (60, 16, 40, 40, 2)
    assert digits.rgb("test").shape == (60, 16, 40, 40, 3)
    assert np.array_equal(np.bincount(digits.train_label), np.full(CLASSES, 4))
    assert features.varied_rgb.shape == (240, 1, 840)
    assert features.test_flow.shape == (60, 3, 640)
    assert abs(features.varied_rgb.mean()) < 1e-3


def test_a_second_call_loads_the_same(made):
    folder, digits, features = made
    files = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    again = moving_digits(folder, train=240, test=60)
    assert np.array_equal(again.train_flow, digits.train_flow)
    assert np.array_equal(digit_features(again, folder, cuts=1).test_rgb, features.test_rgb)
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == files


def test_the_seed_decides_every_bit(tmp_path):
    one, same, other = (
        moving_digits(tmp_path / name, train=60, test=60, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert np.array_equal(one.train_flow, same.train_flow)
    assert np.array_equal(one.test_gray, same.test_gray)
    assert not np.array_equal(one.test_gray, other.test_gray)
    first, second = (digit_features(digits, tmp_path / name, cuts=1) for digits, name in ((one, "a"), (same, "b")))
    assert np.array_equal(first.varied_flow, second.varied_flow)


def accuracy(train, train_label, test, test_label):
    """Of the nearest training clip, by cosine of the mean over cuts."""
    a, b = train.mean(1), test.mean(1)
    a, b = a / np.linalg.norm(a, axis=1, keepdims=True), b / np.linalg.norm(b, axis=1, keepdims=True)
    return (train_label[(b @ a.T).argmax(1)] == test_label).mean()


def test_flow_knows_the_motion_and_not_the_digit(made):
    _, _, found = made
    digit, motion = (found.train_label // 6, found.test_label // 6), (found.train_label % 6, found.test_label % 6)
    assert accuracy(found.train_flow, motion[0], found.test_flow, motion[1]) > 0.7
    assert accuracy(found.train_flow, digit[0], found.test_flow, digit[1]) < 0.4
    assert accuracy(found.train_rgb, digit[0], found.test_rgb, digit[1]) > 0.2


def test_too_few_clips_are_refused(tmp_path):
    with pytest.raises(InvalidInput, match="at least 60 clips"):
        moving_digits(tmp_path, train=60, test=10)
