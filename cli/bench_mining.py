"""`cascade bench mining`: parse, measure, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from cascade_engine.benchmarks import inputs

from cascade_engine.errors import CascadeError, InvalidInput

from .heeding import require_heeded
from .values import NewFile

_CASES = {"names", "groups", "quick"}
# what to do instead of measuring, and the options that it heeds
_INSTEAD = {
    "listing": _CASES,
    "profile": {*_CASES, "backend", "threads"},
    "memory": {"backend", "threads", "to"},
    "loss": {"threads", "rounds", "to"},
    "source": {"to", "table", "plot"},
}


@click.command("mining")
@click.option("--case", "names", multiple=True, help="A case by name; repeatable. See --list.")
@click.option("--group", "groups", multiple=True, help="A group of cases; repeatable.")
@click.option("--quick", is_flag=True, help="Two small cases.")
@click.option("--list", "listing", is_flag=True, help="List the cases and stop.")
@click.option("--contestant", "only", multiple=True, help="Only this contestant; repeatable.")
@click.option("--backend", help="The engine's backend; cuda moves every contestant to the GPU.")
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1), help="Threads for each contestant.")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1), help="Interleaved rounds.")
@click.option("--json", "to", type=NewFile(), help="Write the results here.")
@click.option(
    "--from",
    "source",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Show results measured before.",
)
@click.option("--table", is_flag=True, help="Print the README's table.")
@click.option("--plot", type=NewFile(".png", ".svg"), help="Draw the results into this PNG or SVG.")
@click.option("--memory", is_flag=True, help="Measure peak memory beyond the bank at K = 2^20, B = 1024 instead.")
@click.option("--loss", is_flag=True, help="Measure the loss, forward and backward, instead.")
@click.option("--profile", type=NewFile(), help="Write a torch.profiler trace here.")
@click.pass_context
def command(
    ctx: click.Context,
    names: tuple[str, ...],
    groups: tuple[str, ...],
    quick: bool,
    listing: bool,
    only: tuple[str, ...],
    backend: str | None,
    threads: int,
    rounds: int,
    to: Path | None,
    source: Path | None,
    table: bool,
    plot: Path | None,
    memory: bool,
    loss: bool,
    profile: Path | None,
) -> None:
    """Mining speed against peers. A wrong answer is not timed, and the command fails.

    Times are medians in milliseconds; a star marks contestants that are not exact.

    \b
    Examples:
      cascade bench mining --quick
      cascade bench mining --case cpr-256x16384 --contestant engine --contestant torch
      cascade bench mining --group cpr --group single --json mining.json --table
      cascade bench mining --from mining.json --table --plot mining.png
      cascade bench mining --profile trace.json
    """
    require_heeded(ctx, _INSTEAD)
    cases = inputs.find((*inputs.QUICK, *names) if quick else names, groups)
    if listing:
        for case in cases:
            click.echo(f"{case.name:36} {case.group:10} {case.plan}")
        return
    if profile is not None:
        from cascade_engine.benchmarks.profiling import write_trace

        write_trace(profile, cases[0], threads=threads, backend=backend)
        click.echo(f"{profile}: a trace of training steps on {cases[0].name}, for chrome://tracing or perfetto.dev")
        return
    if memory:
        from cascade_engine.benchmarks.memory import peaks

        found = []
        for row in peaks(threads=threads, backend=backend):
            click.echo(json.dumps(row))
            found.append(row)
        _write(found, to)
        return
    if loss:
        from cascade_engine.benchmarks import contrast

        _write(contrast.run(threads=threads, rounds=rounds, report=click.echo), to)
        return
    from cascade_engine.benchmarks import mining, rendering

    if source is not None:
        results = _read(source)
        for row in results["cases"]:
            click.echo(mining.summary(row))
    else:
        results = mining.run(cases, threads=threads, rounds=rounds, backend=backend, only=only, report=click.echo)
    _write(results, to)
    if table:
        click.echo(rendering.table(results))
    if plot is not None:
        rendering.plot(results, plot)
    wrong = mining.wrong(results)
    if wrong:
        raise CascadeError(f"wrong answers: {', '.join(wrong)}")


def _read(source: Path) -> dict[str, Any]:
    """Results that were written before."""
    try:
        results: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
        complete = all(row.keys() >= {"name", "contestants", "bars"} for row in results["cases"])
    except (ValueError, TypeError, LookupError, AttributeError):
        complete = False
    if not complete:
        raise InvalidInput(f"--from: expected what cascade bench mining --json wrote, got {source}")
    return results


def _write(results: Any, to: Path | None) -> None:
    if to is not None:
        to.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
