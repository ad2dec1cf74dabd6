"""Plans: the grammar both ways, exact counts, presets, and errors that say where and what."""

import copy
import os
import pickle
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_engine.errors import InvalidInput
from cascade_engine.plan import FUSIONS, PRESETS, CascadePlan, Keep, Score, Stage

views = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,6}", fullmatch=True)
percent = st.builds(lambda n, d: Fraction(n, 10**d), st.integers(1, 10**6), st.integers(0, 6)).filter(
    lambda p: 0 < p <= 100
)
keeps = st.one_of(
    st.builds(Keep, st.integers(1, 10**7).map(Fraction), st.just("count")),
    st.builds(Keep, percent, st.sampled_from(["bank", "previous"])),
)
scores = st.one_of(
    st.builds(lambda view: Score((view,)), views),
    st.builds(
        lambda found, fusion: Score(tuple(found), fusion),
        st.lists(views, min_size=2, max_size=4, unique=True),
        st.sampled_from(FUSIONS),
    ),
)
stages = st.lists(st.builds(Stage, scores, keeps, st.booleans()), min_size=1, max_size=6)


def plan_of(found):
    """A plan, or None where absolute counts grow."""
    try:
        return CascadePlan(tuple(found))
    except InvalidInput:
        return None


plans = stages.map(plan_of).filter(lambda plan: plan is not None)


@given(plans)
def test_text_and_plan_round_trip(plan):
    assert CascadePlan.parse(str(plan)) == plan
    assert str(CascadePlan.parse(str(plan))) == str(plan)


@given(plans, st.data())
def test_white_space_between_tokens_changes_nothing(plan, data):
    text = str(plan)
    for mark in ",:()@%":
        blank = data.draw(st.sampled_from(["", " ", " \t\n"]))
        text = text.replace(mark, f"{blank}{mark}{blank}")
    assert CascadePlan.parse(text) == plan


@given(plans)
def test_plans_copy_pickle_and_hash(plan):
    for again in (copy.copy(plan), copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert again == plan
        assert hash(again) == hash(plan)


ERRORS = {
    "": (1, "a view", "the end"),
    "flow": (5, "':'", "the end"),
    "flow:": (6, "a count, a percentage or 'prev'", "the end"),
    "flow:50%,": (10, "a view", "the end"),
    "flow:50%;rgb:5": (9, "',' or the end", "';'"),
    "flow 5": (6, "':'", "'5'"),
    "5:flow": (1, "a view", "'5'"),
    "flow:x": (6, "a count", "'x'"),
    "flow:0": (6, "a count of at least 1", "'0'"),
    "flow:0%": (6, "a percentage in (0, 100]", "'0'"),
    "flow:100.5%": (6, "a percentage in (0, 100]", "'1'"),
    "flow:1.5": (9, "'%'", "the end"),
    "flow:-3": (6, "a count", "'-'"),
    "flow:prev": (10, "a percentage", "the end"),
    "flow:prev5": (11, "'%'", "the end"),
    "flow:prev0%": (10, "a percentage in (0, 100]", "'0'"),
    "flow:5@": (8, "'bank'", "the end"),
    "flow:5@bonk": (8, "'bank'", "'b'"),
    "mean(rgb,flow):5": (1, "one of sum, min, max, zsum, rrf", "'m'"),
    "sum(rgb):5": (8, "a second view", "')'"),
    "sum(rgb,rgb):5": (9, "a view not named yet", "'r'"),
    "sum(rgb,):5": (9, "a view", "')'"),
    "sum(rgb flow):5": (9, "',' or ')'", "'f'"),
    "sum(rgb,flow:5": (13, "',' or ')'", "':'"),
    "flow:5,,rgb:1": (8, "a view", "','"),
    "flow:5 5": (8, "',' or the end", "'5'"),
    "flow:" + "9" * 5000: (6, "a number of at most 100 digits", "'9'"),
}


@pytest.mark.parametrize("text", ERRORS)
def test_a_typo_is_told_by_position_and_expectation(text):
    position, expected, got = ERRORS[text]
    with pytest.raises(InvalidInput) as caught:
        CascadePlan.parse(text)
    message = str(caught.value)
    assert f"at position {position}," in message, message
    assert f"expected {expected}" in message, message
    assert f"got {got}" in message, message


@given(plans, st.data())
def test_damaged_text_parses_or_says_where(plan, data):
    text = str(plan)
    at = data.draw(st.integers(0, len(text) - 1))
    damaged = text[:at] + data.draw(st.sampled_from(["", "§", ",", "(", "%", "0"])) + text[at + 1 :]
    try:
        again = CascadePlan.parse(damaged)
    except InvalidInput as error:
        message = str(error)
    else:
        assert CascadePlan.parse(str(again)) == again
        return
    assert "position" in message or "keep at most" in message


def test_counts_that_grow_are_refused_when_the_plan_is_made():
    with pytest.raises(InvalidInput, match=r"stage 3 \(rgb:6\) to keep at most the 5"):
        CascadePlan.parse("rgb:9,flow:5,rgb:6")
    assert CascadePlan.parse("rgb:5,flow:5").counts(100) == (5, 5)
    assert CascadePlan.parse("rgb:5,flow:50%").counts(100) == (50, 50), "raised to at least k"


@pytest.mark.parametrize(
    ("text", "bank", "counts"),
    [
        ("rgb:29%", 100, (29,)),
        ("rgb:0.1%", 1000, (1,)),
        ("rgb:0.1%", 999, (1,)),
        ("rgb:58%,rgb:29%", 50, (29, 14)),
        ("rgb:prev50%,rgb:prev50%,rgb:1", 101, (50, 25, 1)),
        ("rgb:50%,flow:prev50%,rgb:prev50%", 2048, (1024, 512, 256)),
        ("rgb:1000,flow:100,rgb:3", 2048, (1000, 100, 3)),
        ("rgb:1000,flow:100,rgb:3", 40, (1000, 100, 3)),
        ("rgb:1%,flow:5", 100, (5, 5)),
        ("rgb:5", 3, (3,)),
        ("rgb:5", 0, (0,)),
        ("rgb:50%,flow:5", 0, (0, 0)),
        ("rgb:100%", 7, (7,)),
    ],
)
def test_counts_are_exact(text, bank, counts):
    assert CascadePlan.parse(text).counts(bank) == counts


@given(st.integers(1, 9999), st.integers(0, 10**7))
def test_percentages_are_floored_in_exact_arithmetic(hundredths, bank):
    text = f"rgb:{hundredths // 100}.{hundredths % 100:02}%"
    assert CascadePlan.parse(text).counts(bank) == (min(max(bank * hundredths // 10000, 1), bank),)


@given(plans, st.integers(0, 5000))
def test_counts_never_fall_under_k_nor_k_over_the_bank(plan, bank):
    *before, k = plan.counts(bank)
    assert min(1, bank) <= k <= bank
    assert all(count >= k for count in before)


def test_the_published_counts():
    plan = CascadePlan.preset("cpr", oracle="flow", trainee="rgb")
    assert plan.counts(2048) == (1024, 512, 256, 128, 64, 32, 5)
    assert [stage.score.views[0] for stage in plan.stages] == ["flow", "rgb"] * 3 + ["flow"]


PRESET_TEXTS = {
    "coclr": "o:5",
    "cpr": "o:50%,t:25%,o:12.5%,t:6.25%,o:3.125%,t:1.5625%,o:5",
    "cpr-paper": "o:prev50%,t:prev50%,o:prev50%,t:prev50%,o:prev50%,t:prev50%,o:5",
    "patent": "t:1000,o:100,t:3",
    "mvcgc": "o:5,t:5@bank",
    "cma": "min(o,t):5",
    "sum": "sum(o,t):5",
    "zsum": "zsum(o,t):5",
    "rrf": "rrf(o,t):5",
    "nnclr": "t:1",
}


def test_every_preset_has_its_text():
    assert set(PRESETS) == set(PRESET_TEXTS)
    for name, text in PRESET_TEXTS.items():
        assert str(CascadePlan.preset(name, oracle="o", trainee="t")) == text


def test_preset_options():
    assert str(CascadePlan.preset("mvcgc", oracle="o", trainee="t", k=3, m=9)) == "o:9,t:9@bank"
    assert str(CascadePlan.preset("cpr", oracle="o", trainee="t", stages=1)) == "o:5"
    assert str(CascadePlan.preset("cpr", oracle="o", trainee="t", stages=2, k=2)) == "o:50%,o:2"
    assert str(CascadePlan.preset("cpr", oracle="o", trainee="t", stages=3, ratio=1)) == "o:100%,t:100%,o:5"
    third = CascadePlan.preset("cpr", oracle="o", trainee="t", stages=3, ratio="0.29")
    assert str(third) == "o:29%,t:8.41%,o:5"
    assert third.counts(100) == (29, 8, 5)


@given(st.integers(1, 9), st.sampled_from(["0.5", "0.7", "0.29", "0.1", "1"]), st.integers(1, 4096))
@settings(max_examples=50)
def test_cpr_counts_follow_the_published_formula(stages_, ratio, bank):
    counts = CascadePlan.preset("cpr", oracle="o", trainee="t", stages=stages_, ratio=ratio, k=2).counts(bank)
    k = min(2, bank)
    assert counts == (*(max(int(bank * Fraction(ratio) ** (s + 1)), k) for s in range(stages_ - 1)), k)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "best"}, "preset: expected one of coclr, cpr"),
        ({"name": "cpr", "k": 0}, "k=0"),
        ({"name": "cpr", "stages": 0}, "stages=0"),
        ({"name": "mvcgc", "m": 0}, "m=0"),
        ({"name": "cpr", "ratio": 0}, r"ratio: expected a decimal number in \(0, 1\]"),
        ({"name": "cpr", "ratio": 1.01}, "ratio: expected"),
        ({"name": "cpr", "ratio": -0.5}, "ratio: expected"),
        ({"name": "cpr", "ratio": float("nan")}, "ratio: expected"),
        ({"name": "cpr", "ratio": "half"}, "ratio: expected"),
        ({"name": "cpr", "ratio": "1/3"}, "ratio: expected"),
        ({"name": "coclr", "ratio": "x"}, "ratio: expected"),
        ({"name": "sum", "oracle": "t"}, "a view not named yet"),
        ({"name": "coclr", "oracle": "no view"}, "expected ':'"),
    ],
)
def test_bad_presets_are_refused(options, message):
    with pytest.raises(InvalidInput, match=message):
        CascadePlan.preset(**{"oracle": "o", "trainee": "t"} | options)


def test_parts_made_by_hand_are_checked():
    for make in (
        lambda: Keep(Fraction(0), "count"),
        lambda: Keep(Fraction(3, 2), "count"),
        lambda: Keep(Fraction(101), "bank"),
        lambda: Keep(Fraction(1, 3), "bank"),
        lambda: Score(()),
        lambda: Score(("rgb", "flow")),
        lambda: Score(("rgb",), "sum"),
        lambda: Score(("rgb", "rgb"), "sum"),
        lambda: Score(("r,gb",)),
        lambda: CascadePlan(()),
    ):
        with pytest.raises(InvalidInput, match="expected"):
            make()


def test_views_are_listed_in_order_of_first_use():
    assert CascadePlan.parse("sum(b,a):9,c:5,a:1").views == ("b", "a", "c")


def test_explain_shows_counts_and_cost():
    lines = CascadePlan.parse("flow:50%,rgb:25%,flow:5@bank").explain(2048).splitlines()
    assert lines[0].split() == ["stage", "score", "keep", "ranks", "keeps", "similarities/query"]
    assert lines[1].split() == ["1", "flow", "50%", "2048", "1024", "2048"]
    assert lines[2].split() == ["2", "rgb", "25%", "1024", "512", "1024"]
    assert lines[3].split() == ["3", "flow", "5@bank", "2048", "5", "0"]


def test_a_plan_from_another_process_is_found_under_an_equal_one():
    plan = CascadePlan.parse("sum(b,a):9,c:5,a:1")
    assert hash(plan) == hash(CascadePlan.parse(str(plan)))  # now it knows its hash
    script = (
        f"import pickle; plan = pickle.loads({pickle.dumps(plan)!r}); print({{type(plan).parse(str(plan)): 1}}[plan])"
    )
    for seed in "12":
        run = [sys.executable, "-c", script]
        assert subprocess.run(run, env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True).stdout
