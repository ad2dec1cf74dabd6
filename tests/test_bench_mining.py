"""The mining benchmark: contestants agree before they are timed, a wrong answer is refused, results render."""

import json

import numpy as np
import pytest
import torch
from cascade_engine.benchmarks import inputs, judging, mining, peers, rendering, timing
from cascade_engine.cli.bench import command
from click.testing import CliRunner
from torch.utils._python_dispatch import TorchDispatchMode

from cascade_engine.errors import InvalidInput
from cascade_engine.plan import CascadePlan

CPR = str(CascadePlan.preset("cpr", oracle="flow", trainee="rgb"))
PLANS = [CPR, "rgb:1000,flow:100,rgb:3", "flow:64,rgb:5", "flow:32,rgb:32@bank"]
PLANS += [f"{fusion}(flow,rgb):5" for fusion in ("sum", "min", "max", "zsum", "rrf")]


def small(plan, **changes):
    return inputs.Case(
        **{"name": "x", "group": "x", "plan": plan, "queries": 24, "keys": 1500, "width": 32, "exclude": True} | changes
    )


@pytest.mark.parametrize("plan", PLANS)
def test_every_contestant_gives_the_right_answer(plan):
    row = mining._measure(small(plan), list(peers.contestants(None, "cpu", 2)), "cpu", 1)
    outcomes = row["contestants"]
    assert [name for name, o in outcomes.items() if o.get("skipped") == "wrong answer"] == []
    assert outcomes["engine"]["equal"] == 1.0
    timed = {name for name, o in outcomes.items() if "median_ms" in o}
    assert {"engine", "torch", "torch-bf16"} <= timed
    assert ("published" in timed) == (plan in (CPR, "rgb:1000,flow:100,rgb:3"))


def test_single_view_contestants_agree():
    row = mining._measure(small("rgb:10", exclude=False), list(peers.contestants(None, "cpu", 2)), "cpu", 1)
    assert {name for name, o in row["contestants"].items() if "median_ms" in o} >= {"scikit-learn", "usearch", "numpy"}


def test_a_wrong_answer_is_not_timed():
    def prepare(problem):
        return lambda batch: np.zeros((24, 5), np.int64)

    liar = peers.Contestant(name="engine", exact=True, prepare=prepare, refuse=lambda case: None)
    row = mining._measure(small("rgb:5"), [liar], "cpu", 1)
    assert row["contestants"]["engine"]["skipped"] == "wrong answer"
    assert "median_ms" not in row["contestants"]["engine"]
    assert mining.wrong({"cases": [row]}) == ["x: engine"]


def test_one_swapped_pair_fails_the_engine_and_rounding_is_forgiven_to_others_only():
    problem = inputs.make(small("rgb:5"))
    judge = judging.Judge(problem)
    full = np.zeros((24, 5), np.int64)
    full[judge.rows] = judge.index
    assert judge(full).accepts(engine=True)
    swapped = full.copy()
    row = judge.rows[0]
    swapped[row, :2] = swapped[row, 1::-1]
    verdict = judge(swapped)
    assert not verdict.accepts(engine=True)
    assert verdict.explained == verdict.equal < 1
    assert not judge(full[:, :4]).accepts(engine=False)


def test_bars_compare_with_the_named_peer_or_the_fastest_exact_one():
    outcomes = {
        "engine": {"exact": True, "median_ms": 1.0},
        "torch": {"exact": True, "median_ms": 8.0},
        "torch-bf16": {"exact": False, "median_ms": 2.0},
        "numpy": {"exact": True, "median_ms": 6.0},
    }
    case = small("rgb:5", bars=(inputs.Bar(peer="torch", factor=9), inputs.Bar(peer="peer", factor=3)))
    assert mining.bars(case, outcomes) == [
        {"peer": "torch", "asked": 9, "reached": 8.0},
        {"peer": "numpy", "asked": 3, "reached": 6.0},
    ]


def test_slow_contestants_are_called_in_two_rounds_and_inputs_rotate():
    class Fake:
        def measure(self, call, number):
            return timing.Duration(wall=call(number), processor=0.0)

    seen = []
    found = timing.interleaved(
        {"slow": lambda number: 5.0, "fast": lambda number: seen.append(number) or 0.01}, rounds=4, clock=Fake()
    )
    assert found["slow"].calls == 2
    assert found["fast"].calls == 8
    assert len(set(seen)) == len(seen)


def test_names_are_unique_and_unknown_ones_refused():
    assert len({case.name for case in inputs.CASES}) == len(inputs.CASES)
    assert {case.name for case in inputs.find(inputs.QUICK, ())} == set(inputs.QUICK)
    with pytest.raises(InvalidInput, match="cpr-32x2048"):
        inputs.find(("nosuch",), ())


def test_the_command_writes_results_and_renders_them(tmp_path):
    to, image = tmp_path / "r.json", tmp_path / "r.png"
    arguments = ["mining", "--case", "cpr-32x2048", "--contestant", "engine", "--contestant", "torch", "--rounds", "1"]
    done = CliRunner().invoke(command, [*arguments, "--json", str(to)], catch_exceptions=False)
    assert done.exit_code == 0
    results = json.loads(to.read_text())
    assert results["settings"]["threads"] == 2
    assert results["cases"][0]["bars"][0]["asked"] == 8
    shown = CliRunner().invoke(
        command, ["mining", "--from", str(to), "--table", "--plot", str(image)], catch_exceptions=False
    )
    assert rendering.table(results) in shown.output
    assert mining.summary(results["cases"][0]) in shown.output
    assert image.read_bytes().startswith(b"\x89PNG")


IDLE = [
    (["--list", "--table"], "--table: expected without --list, where it does nothing"),
    (["--loss", "--backend", "nosuch"], "--backend: expected without --loss"),
    (["--loss", "--memory"], "--loss: expected without --memory"),
    (["--loss", "--plot", "x.png"], "--plot: expected without --loss"),
    (["--memory", "--contestant", "engine"], "--contestant: expected without --memory"),
    (["--memory", "--rounds", "7"], "--rounds: expected without --memory"),
    (["--profile", "t.json", "--json", "x.json"], "--json: expected without --profile"),
    (["--from", "r.json", "--quick"], "--quick: expected without --from"),
    (["--case", "cpr-32x2048", "--contestant", "engin"], "contestant: expected one of engine, torch, .*, got 'engin'"),
]


@pytest.mark.parametrize(("arguments", "message"), IDLE)
def test_options_that_would_do_nothing_are_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.json").write_text('{"cases": []}')
    with pytest.raises(InvalidInput, match=message):
        CliRunner().invoke(command, ["mining", *arguments], catch_exceptions=False)
    assert [each.name for each in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"cases": [{}]}', "\udcff"])
def test_what_holds_no_results_is_not_shown(tmp_path, text):
    source = tmp_path / "r.json"
    source.write_text(text, errors="surrogateescape")
    with pytest.raises(InvalidInput, match=r"--from: expected what cascade bench mining --json wrote, got .*r\.json"):
        CliRunner().invoke(command, ["mining", "--from", str(source), "--table"], catch_exceptions=False)


def test_cases_listed_are_those_asked_for():
    def listed(*options):
        done = CliRunner().invoke(command, ["mining", "--list", *options], catch_exceptions=False)
        return [line.split()[0] for line in done.output.splitlines()]

    assert listed() == [case.name for case in inputs.CASES]
    assert listed("--group", "cpr") == [case.name for case in inputs.CASES if case.group == "cpr"]
    other = next(case.name for case in inputs.CASES if case.name not in inputs.QUICK)
    assert set(listed("--quick", "--case", other)) == {*inputs.QUICK, other}


def test_where_no_contestant_runs_the_line_says_why():
    row = mining._measure(small(CPR), [peers.contestants(None, "cpu", 1)[-2]], "cpu", 1)
    assert mining.summary(row) == "x: nothing timed (usearch: one view without exclusion only)"


def test_peak_memory_is_written_where_asked(tmp_path, monkeypatch):
    from cascade_engine.benchmarks import memory

    rows = [{"what": "loss", "queries": 4}]
    monkeypatch.setattr(memory, "peaks", lambda **_: iter(rows))
    to = tmp_path / "memory.json"
    done = CliRunner().invoke(command, ["mining", "--memory", "--json", str(to)], catch_exceptions=False)
    assert json.loads(done.output) == rows[0]
    assert json.loads(to.read_text()) == rows


def test_the_trace_holds_the_engines_phases(tmp_path):
    to = tmp_path / "trace.json"
    done = CliRunner().invoke(command, ["mining", "--quick", "--profile", str(to)], catch_exceptions=False)
    assert done.exit_code == 0
    ranges: dict[str, list[tuple[float, float]]] = {}
    for event in json.loads(to.read_text())["traceEvents"]:
        if event.get("ph") == "X":
            ranges.setdefault(event["name"], []).append((event["ts"], event["ts"] + event["dur"]))
    assert {f"cascade::{name}" for name in ("mine", "score", "select", "repair", "loss", "push")} <= set(ranges)
    slack = 20_000  # microseconds: two clocks, and a thread may lose its processor between reading one and the other
    for name in ("score", "select", "repair"):
        for begin, end in ranges[f"cascade::{name}"]:
            assert any(b - slack <= begin <= end <= e + slack for b, e in ranges["cascade::mine"]), name


class Multiplying(TorchDispatchMode):
    """Counts the multiply-adds of matrix products."""

    count = 0

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        if "mm" in function.__name__:
            left, right = args[-2:]
            self.count += left.shape[0] * left.shape[1] * right.shape[1]
        return function(*args, **(kwargs or {}))


def test_the_losss_products_are_scores_and_a_gradient():
    from cascade_engine.benchmarks import contrast

    query, stored = torch.ones(32, 16), torch.ones(40_000, 16)
    with Multiplying() as multiplied:
        found = contrast._products(query, stored)
    assert multiplied.count == 2 * 32 * 40_000 * 16
    assert (found == 40_000 * 16).all()


def test_the_loss_is_judged_and_timed(tmp_path, monkeypatch):
    from cascade_engine.benchmarks import contrast

    monkeypatch.setattr(contrast, "SIZES", ((4, 300),))
    to = tmp_path / "loss.json"
    done = CliRunner().invoke(command, ["mining", "--loss", "--rounds", "1", "--json", str(to)], catch_exceptions=False)
    assert done.exit_code == 0
    assert set(json.loads(to.read_text())[0]["contestants"]) == {"torch, mask", "torch, gather", "engine", "products"}


def test_peak_memory_beyond_the_bank_is_measured_in_fresh_processes():
    from cascade_engine.benchmarks.memory import peaks

    rows = list(peaks(subjects=("rgb:10",), keys=4096, queries=64))
    assert all(row["peak_beyond_mib"] >= 0 and row["score_matrix_mib"] == 1 for row in rows)
