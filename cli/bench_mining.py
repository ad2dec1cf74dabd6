"""`cascade bench mining`: parse, measure, print."""

from __future__ import annotations

import json
from pathlib import Path

import click
from cascade_engine.benchmarks import inputs

from cascade_engine.errors import CascadeError


@click.command("mining")
@click.option("--case", "names", multiple=True, help="A case by name; repeatable. See --list.")
@click.option("--group", "groups", multiple=True, help="A group of cases; repeatable.")
@click.option("--quick", is_flag=True, help="Two small cases.")
@click.option("--list", "listing", is_flag=True, help="List the cases and stop.")
@click.option("--contestant", "only", multiple=True, help="Only this contestant; repeatable.")
@click.option("--backend", help="The engine's backend; cuda moves every contestant to the GPU.")
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1), help="Threads for each contestant.")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1), help="Interleaved rounds.")
@click.option("--json", "to", type=click.Path(dir_okay=False, path_type=Path), help="Write the results here.")
@click.option("--from", "source", type=click.Path(exists=True, path_type=Path), help="Show results measured before.")
@click.option("--table", is_flag=True, help="Print the README's table.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the results into this PNG or SVG.")
@click.option("--memory", is_flag=True, help="Measure peak memory beyond the bank at K = 2^20, B = 1024 instead.")
@click.option("--loss", is_flag=True, help="Measure the loss, forward and backward, instead.")
@click.option("--profile", type=click.Path(dir_okay=False, path_type=Path), help="Write a torch.profiler trace here.")
def command(
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
    if listing:
        for case in inputs.CASES:
            click.echo(f"{case.name:36} {case.group:10} {case.plan}")
        return
    cases = inputs.find(inputs.QUICK if quick else names, groups)
    if profile is not None:
        from cascade_engine.benchmarks.profiling import write_trace

        write_trace(profile, cases[0], threads=threads, backend=backend)
        click.echo(f"{profile}: a trace of training steps on {cases[0].name}, for chrome://tracing or perfetto.dev")
        return
    if memory:
        from cascade_engine.benchmarks.memory import peaks

        for row in peaks(threads=threads, backend=backend):
            click.echo(json.dumps(row))
        return
    if loss:
        from cascade_engine.benchmarks import contrast

        rows = contrast.run(threads=threads, rounds=rounds, report=click.echo)
        if to is not None:
            to.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        return
    from cascade_engine.benchmarks import mining, rendering

    if source is not None:
        results = json.loads(source.read_text(encoding="utf-8"))
    else:
        results = mining.run(cases, threads=threads, rounds=rounds, backend=backend, only=only, report=click.echo)
    if to is not None:
        to.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if table:
        click.echo(rendering.table(results))
    if plot is not None:
        rendering.plot(results, plot)
    wrong = mining.wrong(results)
    if wrong:
        raise CascadeError(f"wrong answers: {', '.join(wrong)}")
