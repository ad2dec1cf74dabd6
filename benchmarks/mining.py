"""Mining speed: every contestant answers, is judged, and only then is timed, in interleaved rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from cascade_engine.errors import InvalidInput

from .inputs import Case, Problem, make
from .judging import Judge
from .peak import int8_peak
from .peers import Contestant, Search, contestants
from .timing import clock_for, interleaved, machine, pinned

PACKAGES = ("cascade-engine", "torch", "numpy", "faiss-cpu", "scikit-learn", "usearch")

Report = Callable[[str], None]
Row = dict[str, Any]


def run(
    cases: Iterable[Case],
    *,
    threads: int = 2,
    rounds: int = 7,
    backend: str | None = None,
    only: tuple[str, ...] = (),
    report: Report = lambda line: None,
) -> Row:
    """Measure the cases and return everything a table or plot needs.

    Args:
        cases: what to measure.
        threads: processors and threads each contestant has.
        rounds: interleaved visits to each contestant.
        backend: the engine's backend; ``"cuda"`` moves all contestants to the GPU.
        only: contestants to run; all where empty.
        report: called with a line after each case.

    Returns:
        The machine, the settings and a row per case; a contestant whose answer was wrong is there, untimed.

    Raises:
        InvalidInput: no contestant of that name.
    """
    device = "cuda" if backend == "cuda" else "cpu"
    known = [each.name for each in contestants(backend, device, threads)]
    unknown = [name for name in only if name not in known]
    if unknown:
        raise InvalidInput(f"contestant: expected one of {', '.join(known)}, got {unknown[0]!r}")
    with pinned(threads):
        rows = []
        peak = int8_peak() if device == "cpu" else None
        for case in cases:
            field = [each for each in contestants(backend, device, threads) if not only or each.name in only]
            rows.append(_measure(case, field, device, rounds))
            rows[-1]["int8_peak_share"] = _peak_share(rows[-1], peak, threads)
            report(summary(rows[-1]))
    settings = {"threads": threads, "rounds": rounds, "backend": backend, "device": device}
    return {"machine": machine(PACKAGES), "settings": settings, "int8_peak_per_thread": peak, "cases": rows}


def _peak_share(row: Row, peak: float | None, threads: int) -> float | None:
    """The share of the machine's int8 peak that one product of all queries and keys in the engine's time comes to."""
    milliseconds = row["contestants"].get("engine", {}).get("median_ms")
    if peak is None or milliseconds is None or row["group"] not in ("single", "doubling"):
        return None
    operations = 2 * row["queries"] * row["keys"] * row["width"]
    return round(float(operations / (milliseconds / 1e3) / (peak * threads)), 3)


def _measure(case: Case, field: list[Contestant], device: str, rounds: int) -> Row:
    problem = make(case)
    judge = Judge(problem)
    outcomes: dict[str, Row] = {}
    searches: dict[str, Search] = {}
    for each in field:
        outcome, search = _admit(each, problem, judge)
        outcomes[each.name] = outcome
        if search is not None:
            searches[each.name] = search
    calls = {name: _rotating(search, problem) for name, search in searches.items()}
    for name, timing in interleaved(calls, rounds=rounds, clock=clock_for(device)).items():
        outcomes[name] |= timing.as_json()
    return {
        "name": case.name,
        "group": case.group,
        "plan": case.plan,
        "queries": case.queries,
        "keys": case.keys,
        "width": case.width,
        "family": case.family,
        "exclude": case.exclude,
        "contestants": outcomes,
        "bars": bars(case, outcomes),
    }


def _admit(contestant: Contestant, problem: Problem, judge: Judge) -> tuple[Row, Search | None]:
    """Prepare a contestant and judge its answer; the search is returned where it may be timed."""
    row: Row = {"exact": contestant.exact}
    refusal = contestant.refuse(problem.case)
    if refusal is not None:
        return {**row, "skipped": refusal}, None
    try:
        search = contestant.prepare(problem)
    except ImportError as missing:
        return {**row, "skipped": f"not installed: {missing}"}, None
    verdict = judge(search(problem.batches[0]))
    row |= {"judged_rows": verdict.rows, "equal": verdict.equal, "right_up_to_float32": verdict.explained}
    if contestant.exact and not verdict.accepts(engine=contestant.name == "engine"):
        return {**row, "skipped": "wrong answer"}, None
    return row, search


def _rotating(search: Search, problem: Problem) -> Callable[[int], object]:
    return lambda number: search(problem.batches[number % len(problem.batches)])


def bars(case: Case, outcomes: dict[str, Row]) -> list[Row]:
    """What was asked of the engine and what it reached, for each peer that ran."""
    found: list[Row] = []
    engine = outcomes.get("engine", {}).get("median_ms")
    for bar in case.bars:
        peers = {
            name: row["median_ms"]
            for name, row in outcomes.items()
            if "median_ms" in row and row["exact"] and name != "engine" and bar.peer in ("peer", name)
        }
        if engine is not None and peers:
            fastest = min(peers, key=lambda name: float(peers[name]))
            found.append({"peer": fastest, "asked": bar.factor, "reached": round(peers[fastest] / engine, 2)})
    return found


def summary(row: Row) -> str:
    """One line for a measured case."""
    cells = []
    for name, outcome in row["contestants"].items():
        if "median_ms" in outcome:
            cells.append(f"{name} {outcome['median_ms']:.2f}" + ("" if outcome["exact"] else "*"))
        elif outcome.get("skipped") == "wrong answer":
            cells.append(f"{name} WRONG")
    if not cells:
        why = ", ".join(f"{name}: {outcome['skipped']}" for name, outcome in row["contestants"].items())
        return f"{row['name']}: nothing timed ({why})"
    verdicts = [f"{bar['reached']:g}x {bar['peer']} (asked {bar['asked']:g}x)" for bar in row["bars"]]
    if row.get("int8_peak_share"):
        verdicts.append(f"{row['int8_peak_share']:.0%} of the int8 peak")
    return f"{row['name']}: " + ", ".join(cells) + " ms" + ("; " + ", ".join(verdicts) if verdicts else "")


def wrong(results: Row) -> list[str]:
    """Contestants whose answer was refused, as ``case: contestant``."""
    return [
        f"{row['name']}: {name}"
        for row in results["cases"]
        for name, outcome in row["contestants"].items()
        if outcome.get("skipped") == "wrong answer"
    ]
