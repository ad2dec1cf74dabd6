"""The filter language: what it answers, and what it refuses, with the position."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_engine.errors import InvalidInput
from cascade_engine.store import filtering
from cascade_engine.store.columns import Categorical

rng = np.random.default_rng(12)
ROWS = 400
NAMES = ("run", "walk", "jump, high")
TABLE = {
    "clip_id": np.arange(ROWS) + (1 << 53),
    "video_id": rng.integers(0, 20, ROWS),
    "start": np.round(rng.uniform(0, 9, ROWS), 1),
    "end": np.round(rng.uniform(0, 9, ROWS), 1),
    "label": Categorical(codes=rng.integers(0, 3, ROWS).astype(np.int32), categories=NAMES),
    "split": Categorical(codes=rng.integers(0, 2, ROWS).astype(np.int32), categories=("train", "walk")),
    "good": rng.random(ROWS) < 0.5,
}
FLOW = rng.random(ROWS) < 0.7


def mask(condition):
    def has(view):
        if view != "flow":
            raise KeyError(view)
        return FLOW

    return filtering.mask(condition, ROWS, TABLE.__getitem__, has, tuple(TABLE))


def by_python(condition):
    """The condition as Python itself reads it, a row at a time."""
    out = []
    for row in range(ROWS):
        values = {
            name: column[row] if isinstance(column, Categorical) else column[row].item()
            for name, column in TABLE.items()
        }
        out.append(bool(eval(condition, {"has": lambda view, row=row: FLOW[row]}, values)))
    return out


@pytest.mark.parametrize(
    "condition",
    [
        "split == 'train' and label in ('run', 'walk') and end - start > 1.0",
        "clip_id == 9007199254740993",
        "clip_id > 9007199254740993.0",
        "video_id % 3 == 1 or not good",
        "0 < start <= end < 5",
        "label not in ['jump, high'] and has('flow')",
        "label != split",
        "label == split or label < 'run'",
        "'run' == label",
        "video_id in (1, 2.0, 3) and start * 2 // 1 != -3",
        "-start < -4 and (video_id + 1) / 2 >= 3.5",
        "not (good and True) or False",
        "start in (1.0, 2)",
        "label in ()",
        "good == (video_id > 3)",
        "\n label == 'walk'\n and good ",
    ],
)
def test_a_condition_means_what_python_means_by_it(condition):
    assert mask(condition).tolist() == by_python(condition.replace("\n", " ").strip())


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("splt == 'train'", "position 1: no column is called 'splt'"),
        ("good and (start > 'a')", "position 19: expected a number to compare with, got a text"),
        ("label == 3", "position 10: expected a text to compare with, got a number"),
        ("start", "position 1: expected a condition, got a number"),
        ("good and 'x'", "position 10: expected a condition, got a text"),
        ("good + 1 > 0", "position 1: expected a number, got a condition"),
        ("start in label", "position 10: expected a tuple such as"),
        ("start in (1, 'a')", "position 14: expected a number written out"),
        ("start is 3", "position 10: expected == != <"),
        ("video_id / 0 > 1", "position 1: division by zero"),
        ("clip_id * clip_id > 1", "position 1: the result does not fit in 64 bits"),
        ("video_id == 99999999999999999999", "position 13: expected an integer of 64 bits"),
        ("video_id == -9223372036854775809", "position 13: expected an integer of 64 bits"),
        ("video_id == 9223372036854775808", "position 13: expected an integer of 64 bits"),
        ("video_id == -True", "position 14: expected a number, got a condition"),
        ("good and", "position 9: "),
        ("good)", "position 5: "),
        ("", "position 1: "),
        ("good) or (good", "position 5: "),
        ("__import__('os').system('true')", "position 1: expected a column"),
        ("[x for x in (1,)] == 1", "position 1: expected a column"),
        ("(lambda: good)()", "position 1: expected a column"),
        ("start.__class__ == 1", "position 1: expected a column"),
        ("2 ** 9999999 > 1", "position 1: expected a column"),
        ("label[0] == 'r'", "position 1: expected a column"),
        ("has(flow)", "position 1: expected a column"),
        ("f'{good}' == 'a'", "position 1: expected a column"),
        ("(a := 3) > 1", "position 2: expected a column"),
        ("label == 'ü' and nope", "position 18: no column is called 'nope'"),
        ("good" + " and good" * 2000, "at most 10000 characters"),
        ("not " * 2000 + "good", "cannot be read"),
        ("'a' 'b' * 3 == label", "expected a number"),
    ],
)
def test_what_is_not_of_the_language_is_refused_where_it_stands(condition, message):
    with pytest.raises(InvalidInput) as refused:
        mask(condition)
    assert message in str(refused.value)


LOWEST, HIGHEST = -(2**63), 2**63 - 1
EDGES = [LOWEST, LOWEST + 1, -(2**62), -3, -1, 0, 1, 2, 2**31, 2**62, HIGHEST - 1, HIGHEST]


@pytest.mark.parametrize("sign", ["+", "-", "*", "//", "%"])
@pytest.mark.parametrize("other", EDGES)
def test_integers_are_exact_to_the_last_of_64_bits(sign, other):
    for one in EDGES:
        if sign in ("//", "%") and other == 0:
            continue
        value, columns = eval(f"({one}) {sign} ({other})"), {"n": np.array([one])}
        fits = LOWEST <= value <= HIGHEST
        condition = f"n {sign} {other} == {value if fits else 0}"
        if fits:
            assert filtering.mask(condition, 1, columns.__getitem__, lambda _: FLOW, ("n",)).all(), (one, condition)
        else:
            with pytest.raises(InvalidInput, match="position 1: the result does not fit in 64 bits"):
                filtering.mask(condition, 1, columns.__getitem__, lambda _: FLOW, ("n",))
    with pytest.raises(InvalidInput, match="position 1: the result does not fit"):
        filtering.mask("-n == 1", 1, {"n": np.array([LOWEST])}.__getitem__, lambda _: FLOW, ("n",))


@settings(max_examples=300)
@given(st.text(alphabet="abgodstarlen _()[]'\".,=<>!+-*/%0123456789\n#\\:@{}", max_size=40))
def test_no_text_does_anything_but_filter_or_be_refused(condition):
    try:
        found = mask(condition)
    except InvalidInput:
        return
    assert found.shape == (ROWS,)
    assert found.dtype == bool


def test_the_rows_are_right_where_there_are_several_blocks(monkeypatch):
    whole = mask("label == 'run' and start > 3 or has('flow')")
    monkeypatch.setattr(filtering, "BLOCK", 7)
    assert np.array_equal(mask("label == 'run' and start > 3 or has('flow')"), whole)
