"""`cascade bench store`: parse, measure, print."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import click

from .heeding import require_heeded
from .values import Finite, NewFile


@click.command("store")
@click.option("--rows", default=1_000_000, show_default=True, type=click.IntRange(2048), help="Clips to read from.")
@click.option("--dim", default=128, show_default=True, type=click.IntRange(1), help="Width of the view.")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1), help="Interleaved rounds.")
@click.option(
    "--seconds",
    default=2.0,
    show_default=True,
    type=Finite(0),
    help="Length of each append measurement; 0 leaves them out.",
)
@click.option("--large", type=click.IntRange(2048), help="Instead: mine a store of so many clips, in float16.")
@click.option("--folder", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Which disk to measure.")
@click.option("--json", "to", type=NewFile(), help="Write the results here.")
@click.pass_context
def command(
    ctx: click.Context,
    rows: int,
    dim: int,
    rounds: int,
    seconds: float,
    large: int | None,
    folder: Path | None,
    to: Path | None,
) -> None:
    """Scan, random gather, open and append against np.memmap, zarr, tensorstore, h5py and Lance.

    Every reader's values are compared with what was written before it is timed. Formats that are not installed are
    left out. With --large: what opening, filtering and mining a large store take in time and in resident memory.

    \b
    Examples:
      cascade bench store
      cascade bench store --rows 100000 --rounds 3 --seconds 0.5
      cascade bench store --large 10000000
    """
    require_heeded(ctx, {"large": {"dim", "folder", "to"}})
    from ..benchmarks import store

    def step(what: str) -> None:
        click.echo(f"\r\033[K{what}", nl=False, err=True)

    place = Path(tempfile.mkdtemp(dir=folder))
    if large is not None:
        _large(place, large, dim, step, to)
        return
    try:
        readings, cold = store.reading(place, rows, dim, rounds, step)
        appends = store.appending(place, dim, seconds, step) if seconds else []
    finally:
        shutil.rmtree(place)
    click.echo("\r\033[K", nl=False, err=True)
    limit = readings[0]
    click.echo(f"{rows:,} x {dim} float32; in brackets the ratio to np.memmap")
    for each in readings:
        click.echo(
            f"{each.name:12}  scan {each.scan:6.2f} GB/s ({each.scan / limit.scan:5.2f})"
            f"  gather {each.gather:12,.0f} rows/s ({each.gather / limit.gather:6.3f})  open {each.open_ms:8.2f} ms"
        )
    click.echo(f"cold gather   prefetched {cold.prefetched:,.0f} rows/s, plain {cold.plain:,.0f} rows/s")
    for append in appends:
        click.echo(
            f"{append.name:14} {append.batch:6} rows a batch {append.rows_per_second:12,.0f} rows/s  {append.guarantee}"
        )
    if to is not None:
        to.write_text(json.dumps(store.as_json(readings, cold, appends), indent=2))


def _large(place: Path, rows: int, dim: int, step: Callable[[str], None], to: Path | None) -> None:
    from ..benchmarks import store_large

    try:
        uses = store_large.large(place, rows, dim, step)
    finally:
        shutil.rmtree(place)
    click.echo("\r\033[K", nl=False, err=True)
    click.echo(f"{rows:,} x {dim} float16; batches of {store_large.BATCH} queries, plan {store_large.PLAN}")
    for name, each in zip(("preparing", "prepared"), uses, strict=True):
        batches = ", ".join(f"{seconds:.2f}" for seconds in each.mine)
        click.echo(
            f"{name:10} open {each.open * 1e3:.0f} ms  filter {each.filter:.2f} s ({each.rows:,} clips)"
            f"  batches {batches} s  one of {store_large.MANY} queries {each.many:.2f} s"
            f"  resident at most {each.peak:,.0f} MB, of it anonymous in the end"
            f" {each.anonymous:,.0f} MB  kept on disk {each.kept:,.0f} MB"
        )
    if to is not None:
        to.write_text(json.dumps({name: asdict(each) for name, each in zip(("first", "second"), uses, strict=True)}))
