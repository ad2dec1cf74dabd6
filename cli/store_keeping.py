"""`cascade store verify`, `gc`, `export` and `publish`: is a store sound, and how does it get elsewhere?"""

from __future__ import annotations

import json
from pathlib import Path

import click

from cascade_engine.errors import Corrupt, InvalidInput

from .printing import as_json, say, sized
from .progress import counter
from .store_places import in_phase, store_at, store_from


@click.command("verify")
@store_at
@in_phase
@as_json
def verify(path: Path, phase: str | None, as_json: bool) -> None:
    """Compare every committed byte with its checksum; exit status 4 where something is wrong.

    \b
    Example:
      cascade store verify features.zarr
    """
    from cascade_engine.store.checking import verify as check

    with counter("bytes") as step:
        problems = check(path, (phase,) if phase else None, step)
    if as_json:
        click.echo(json.dumps([{"file": str(each.file), "what": each.what} for each in problems], indent=2))
    else:
        for each in problems:
            click.echo(f"{each.file}: {each.what}")
    if problems:
        raise Corrupt(f"{path}: {len(problems)} problems")
    if not as_json:
        click.echo("all bytes are as they were committed")


@click.command("gc")
@store_at
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@as_json
def gc(path: Path, dry_run: bool, as_json: bool) -> None:
    """Remove what crashes left behind: temporary files, half-made phases, chunks past the last commit.

    \b
    Example:
      cascade store gc features.zarr --dry-run
    """
    from cascade_engine.store.cleaning import clean

    gone = clean(path, dry_run=dry_run)
    size = sum(count for _, count in gone)
    lines = [f"{each}  {sized(count)}" for each, count in gone]
    text = "\n".join([*lines, f"{len(gone)} files, {sized(size)} {'would go' if dry_run else 'removed'}"])
    say({"files": [str(each) for each, _ in gone], "bytes": size, "dry_run": dry_run}, as_json, text)


@click.command("export")
@store_from
@click.argument("target", type=click.Path(path_type=Path))
@in_phase
@click.option("--to", "form", required=True, type=click.Choice(["parquet", "zarr"]), help="The format.")
@click.option("--codec", type=click.Choice(["zstd", "gzip", "blosc", "none"]), help="Of Zarr; zstd by default.")
@click.option("--where", help="A condition on columns.")
@as_json
def export(
    path: str, target: Path, phase: str | None, form: str, codec: str | None, where: str | None, as_json: bool
) -> None:
    """Write a phase as Parquet or as compressed Zarr.

    \b
    Example:
      cascade store export features.zarr features.parquet --to parquet
    """
    from cascade_engine.store import FeatureStore, exchanging

    if form == "parquet" and codec is not None:
        raise InvalidInput("--codec: expected with --to zarr only; Parquet has its own")
    about: dict[str, float | None]
    with FeatureStore.open(path, phase=phase) as store, counter("clips" if form == "parquet" else "bytes") as step:
        if form == "parquet":
            size = exchanging.to_parquet(store, target, where=where, progress=step)
            about, text = {"bytes": size}, f"{target}: {sized(size)}"
        else:
            raw, size = exchanging.archive(store, target, codec or "zstd", where=where, progress=step)
            ratio = size / raw if raw else None
            share = "no clip" if ratio is None else f"{ratio:.3f} of the {sized(raw)} stored"
            about, text = {"bytes": size, "raw_bytes": raw, "ratio": ratio}, f"{target}: {sized(size)}, {share}"
    say(about, as_json, text)


@click.command("publish")
@store_at
@click.argument("url")
@in_phase
@as_json
def publish(path: Path, url: str, phase: str | None, as_json: bool) -> None:
    """Copy a sealed phase to any fsspec URL, with checksums that readers verify.

    \b
    Example:
      cascade store publish features.zarr s3://bucket/features.zarr --phase cycle-1
    """
    from cascade_engine.store import FeatureStore, publishing

    with FeatureStore.open(path, phase=phase) as store, counter("bytes") as step:
        sent = publishing.publish(store, url, progress=step)
    say({"bytes": sent, "url": url}, as_json, f"{sized(sent)} sent to {url}")
