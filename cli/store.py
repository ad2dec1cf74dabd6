"""`cascade store`: create, fill, query and check feature stores."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cascade_engine.errors import Corrupt, InvalidInput

if TYPE_CHECKING:
    from cascade_engine.store import FeatureStore

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
in_phase = click.option("--phase", help="The phase; the store's first by default.")
store_at = click.argument("path", type=click.Path(path_type=Path))


@click.group("store")
def command() -> None:
    """Create, fill, query and check feature stores.

    \b
    Examples:
      cascade store create features.zarr --view rgb=128 --view flow=128 --column label=str --column split=str
      cascade store import features.zarr features.npz
      cascade store info features.zarr
      cascade store query features.zarr --clip 42 --plan flow:50%,rgb:10 --where "split == 'train'"
    """


@command.command("create")
@store_at
@click.option("--view", "views", multiple=True, required=True, metavar="NAME=WIDTH", help="A view; repeatable.")
@click.option("--column", "columns", multiple=True, metavar="NAME=TYPE", help="int, float, str or bool; repeatable.")
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "float16", "bfloat16"]))
@click.option("--phase", default="main", show_default=True, help="The first phase's name.")
@click.option("--normalise", is_flag=True, help="Scale features to unit length on their way in.")
@as_json
def create(
    path: Path, views: tuple[str, ...], columns: tuple[str, ...], dtype: str, phase: str, normalise: bool, as_json: bool
) -> None:
    """Make an empty store, or a new phase in one that is there.

    \b
    Example:
      cascade store create features.zarr --view rgb=128 --view flow=128 --column label=str
    """
    from cascade_engine.store import FeatureStore

    widths = {name: _width(name, width) for name, width in _pairs(views, "--view")}
    kinds = dict(_pairs(columns, "--column"))
    if path.exists():
        with FeatureStore.open(path) as old:
            store = old.new_phase(phase, widths, dtype=dtype, columns=kinds, normalise=normalise)
    else:
        store = FeatureStore.create(path, widths, dtype=dtype, columns=kinds, phase=phase, normalise=normalise)
    with store:
        _print({"path": str(path), "phase": phase, "views": store.views, "columns": store.columns}, as_json, str(store))


@command.command("import")
@store_at
@click.argument("sources", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@in_phase
@click.option("--map", "renames", multiple=True, metavar="THEIRS=OURS", help="Rename an array; repeatable.")
@click.option("--durability", default="group", show_default=True, type=click.Choice(["commit", "group", "none"]))
@as_json
def import_(
    path: Path, sources: tuple[Path, ...], phase: str | None, renames: tuple[str, ...], durability: Any, as_json: bool
) -> None:
    """Append .npy, .npz, Parquet, HDF5 files or folders of .npy or .pt files. Makes the store where there is none.

    Arrays go to the views and columns of their names; --map renames. Without clip_id, clips are counted.

    \b
    Examples:
      cascade store import features.zarr features.npz
      cascade store import features.zarr a.parquet b.parquet --map embedding=rgb
    """
    from cascade_engine.store import FeatureStore, exchanging

    rename = dict(_pairs(renames, "--map"))
    if not path.exists():
        views, columns = exchanging.schema_of(next(exchanging.read_tables(sources[0])), rename)
        FeatureStore.create(path, views, columns=columns, phase=phase or "main").close()
    started = time.perf_counter()
    with FeatureStore.open(path, mode="a", phase=phase, durability=durability) as store, _progress("clips") as step:
        tables = chain.from_iterable(exchanging.read_tables(source) for source in sources)
        added = exchanging.import_into(store, tables, rename=rename, progress=step)
    seconds = time.perf_counter() - started
    about = {"added": added, "rows": store.rows, "seconds": seconds, "rows_per_second": added / seconds}
    text = (
        f"{added} clips added in {seconds:.1f} s ({added / seconds:,.0f} rows/s); {store.rows} in phase {store.phase!r}"
    )
    hint = [view for view, exact in store.float16_lossless().items() if exact]
    if hint:
        text += f"\nevery value of {', '.join(hint)} is exact in float16: half the space would hold the same"
    _print(about | {"float16_lossless": hint}, as_json, text)


@command.command("info")
@store_at
@in_phase
@as_json
def info(path: Path, phase: str | None, as_json: bool) -> None:
    """What is inside: views, widths, phases, rows, sizes, labels, the last commit.

    \b
    Example:
      cascade store info features.zarr
    """
    from cascade_engine.store import FeatureStore

    with FeatureStore.open(path, phase=phase) as store:
        about = _about(store)
    if as_json:
        click.echo(json.dumps(about, indent=2))
        return
    click.echo(f"{path}\n")
    _table(
        ["phase", "rows", "commit", "last commit", "sealed", "on disk", "views (clips that have them)"],
        [
            [
                name,
                str(each["rows"]),
                str(each["commit"]),
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each["time"])),
                "yes" if each["sealed"] else "no",
                _size(each["bytes"]),
                ", ".join(f"{view} {dim} ({each['coverage'][view]})" for view, dim in each["views"].items()),
            ]
            for name, each in about["phases"].items()
        ],
    )
    click.echo(f"\ncolumns of {about['phase']!r}: " + ", ".join(f"{n} {t}" for n, t in about["columns"].items()))
    for view in about["float16_lossless"]:
        click.echo(f"every value of {view} is exact in float16: half the space would hold the same")
    if about["labels"]:
        most = max(about["labels"].values())
        for label, count in about["labels"].items():
            click.echo(f"  {label:24.24} {count:8} {'#' * round(40 * count / most)}")


@command.command("query")
@store_at
@click.option("--plan", required=True, help="The stages, such as flow:50%,rgb:10.")
@click.option("--clip", "clips", multiple=True, type=int, required=True, help="A stored clip's id; repeatable.")
@click.option("-k", type=click.IntRange(1), help="Results a query, in place of the plan's last count.")
@click.option("--where", help="A condition on columns, such as \"split == 'train' and end - start > 1.0\".")
@click.option("--exclude", default="video", show_default=True, type=click.Choice(["video", "overlap", "self", "none"]))
@click.option("--margin", default=0.0, show_default=True, help="Seconds around the query that overlap too.")
@click.option(
    "--approximate", type=click.Choice(["hnsw", "ivf"]), help="First stage from a faiss index; built if needed."
)
@in_phase
@as_json
def query(
    path: Path,
    plan: str,
    clips: tuple[int, ...],
    k: int | None,
    where: str | None,
    exclude: Any,
    margin: float,
    approximate: Any,
    phase: str | None,
    as_json: bool,
) -> None:
    """The stored clips nearest to stored clips, by any plan.

    \b
    Example:
      cascade store query features.zarr --clip 42 --plan flow:50%,rgb:25%,flow:5 --where "label != 'idle'"
    """
    import numpy as np

    from cascade_engine.errors import NotFound
    from cascade_engine.plan import CascadePlan
    from cascade_engine.searching import search
    from cascade_engine.store import FeatureStore
    from cascade_engine.store.approximate import build_index, open_index

    with FeatureStore.open(path, phase=phase) as store:
        index = None
        if approximate is not None:
            view = CascadePlan.parse(plan).stages[0].score.views[0]
            try:
                index = open_index(store, view, approximate)
            except NotFound:
                index = build_index(store, view, approximate, generator=np.random.default_rng(0))
            about = index.about
            click.echo(f"{about.kind} index of {view}: recall {about.recall:.4f} of the {about.k} nearest", err=True)
        hits = search(
            store, plan, clip=list(clips), k=k, where=where, exclude=exclude, margin=margin, approximate=index
        )
        labels = store.column("label") if "label" in store.columns else None
        found = []
        for row, asked in enumerate(clips):
            ids = hits.clip_id[row][hits.clip_id[row] >= 0]
            known = [] if labels is None else [str(each) for each in labels[store.rows_of(ids)]]
            found.append(
                {
                    "clip": asked,
                    "clip_id": ids.tolist(),
                    "video_id": hits.video_id[row][: len(ids)].tolist(),
                    "similarity": hits.similarity[row][: len(ids)].tolist(),
                    "label": known,
                }
            )
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for each in found:
        click.echo(f"clip {each['clip']}")
        shown = each["label"] or [""] * len(each["clip_id"])
        rows = zip(each["clip_id"], each["video_id"], each["similarity"], shown, strict=True)
        _table(["clip", "video", "similarity", "label"], [[str(c), str(v), f"{s:.6f}", t] for c, v, s, t in rows])


@command.command("diff")
@store_at
@click.argument("first")
@click.argument("second")
@click.option("--view", required=True, help="The view whose neighbours are compared.")
@click.option("-k", default=10, show_default=True, type=click.IntRange(1), help="Neighbours a clip.")
@click.option("--sample", type=click.IntRange(1), help="Compare so many clips, drawn with seed 0.")
@as_json
def diff(path: Path, first: str, second: str, view: str, k: int, sample: int | None, as_json: bool) -> None:
    """How many of each clip's neighbours differ between two phases, and which clips lack a view.

    \b
    Example:
      cascade store diff features.zarr cycle-1 cycle-2 --view rgb
    """
    import numpy as np

    from cascade_engine.searching import diff as compare
    from cascade_engine.store import FeatureStore

    with FeatureStore.open(path, phase=first) as store:
        found = compare(store, first, second, view=view, k=k, sample=sample, generator=np.random.default_rng(0))
        lacking = {phase: len(store.missing(view, phase=phase, of=first)) for phase in (first, second)}
    counts = np.bincount(found.changed, minlength=k + 1)
    about = {
        "clips": len(found.clip_id),
        "k": k,
        "mean_changed": float(found.changed.mean()) if len(found.changed) else 0.0,
        "clips_by_changed": counts.tolist(),
        "without_view": lacking,
    }
    if as_json:
        click.echo(json.dumps(about, indent=2))
        return
    click.echo(
        f"{about['clips']} clips in both; of {k} neighbours in {view}, {about['mean_changed']:.2f} change on average"
    )
    _table(["changed", "clips"], [[str(number), str(count)] for number, count in enumerate(counts)])
    for phase, count in lacking.items():
        click.echo(f"{count} clips of {first!r} without {view} in {phase!r}")


@command.command("verify")
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

    with _progress("bytes") as step:
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


@command.command("seal")
@store_at
@in_phase
@as_json
def seal(path: Path, phase: str | None, as_json: bool) -> None:
    """Make a phase final: it can be linked, copied and published from then on.

    \b
    Example:
      cascade store seal features.zarr --phase cycle-1
    """
    from cascade_engine.store import FeatureStore

    with FeatureStore.open(path, mode="a", phase=phase) as store:
        store.seal()
        _print({"phase": store.phase, "rows": store.rows, "sealed": True}, as_json, f"sealed {store.phase!r}")


@command.command("merge")
@store_at
@click.argument("groups", nargs=-1, type=click.Path(exists=True, path_type=Path))
@in_phase
@click.option("--keep", is_flag=True, help="Do not remove the groups afterwards.")
@as_json
def merge(path: Path, groups: tuple[Path, ...], phase: str | None, keep: bool, as_json: bool) -> None:
    """Take the staging groups of parallel extractors into a phase, in one commit.

    \b
    Example:
      cascade store merge features.zarr
    """
    from cascade_engine.store import FeatureStore, staging

    with FeatureStore.open(path, mode="a", phase=phase) as store, _progress("clips") as step:
        added = staging.merge(store, groups or None, keep=keep, progress=step)
    _print({"added": added, "rows": store.rows}, as_json, f"{added} clips merged; {store.rows} in {store.phase!r}")


@command.command("export")
@store_at
@click.argument("target", type=click.Path(path_type=Path))
@in_phase
@click.option("--to", "form", required=True, type=click.Choice(["parquet", "zarr"]), help="The format.")
@click.option("--codec", default="zstd", show_default=True, type=click.Choice(["zstd", "gzip", "blosc", "none"]))
@click.option("--where", help="A condition on columns.")
@as_json
def export(
    path: Path, target: Path, phase: str | None, form: str, codec: str, where: str | None, as_json: bool
) -> None:
    """Write a phase as Parquet or as compressed Zarr.

    \b
    Example:
      cascade store export features.zarr features.parquet --to parquet
    """
    from cascade_engine.store import FeatureStore, exchanging

    with FeatureStore.open(path, phase=phase) as store:
        if form == "parquet":
            size = exchanging.to_parquet(store, target, where=where)
            _print({"bytes": size}, as_json, f"{target}: {_size(size)}")
        else:
            raw, size = exchanging.archive(store, target, codec, where=where)
            text = f"{target}: {_size(size)}, {size / max(raw, 1):.3f} of the {_size(raw)} stored"
            _print({"bytes": size, "raw_bytes": raw, "ratio": size / max(raw, 1)}, as_json, text)


@command.command("publish")
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

    with FeatureStore.open(path, phase=phase) as store, _progress("bytes") as step:
        sent = publishing.publish(store, url, progress=step)
    _print({"bytes": sent, "url": url}, as_json, f"{_size(sent)} sent to {url}")


@command.command("gc")
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
    lines = [f"{each}  {_size(count)}" for each, count in gone]
    text = "\n".join([*lines, f"{len(gone)} files, {_size(size)} {'would go' if dry_run else 'removed'}"])
    _print({"files": [str(each) for each, _ in gone], "bytes": size, "dry_run": dry_run}, as_json, text)


def _about(store: FeatureStore) -> dict[str, Any]:
    import numpy as np

    phases: dict[str, Any] = {}
    coverage = store.coverage()
    for name in store.phases:
        folder, _, commit, sealed = store.identity(name)
        files = [each.stat() for each in folder.rglob("*") if each.is_file()]
        phases[name] = {
            "rows": store.count(name),
            "commit": commit,
            "time": store.log(name)[-1].time,
            "sealed": sealed,
            "bytes": sum(each.st_blocks * 512 for each in files),
            "views": store.schema(name)[0],
            "coverage": coverage[name],
        }
    labels: dict[str, int] = {}
    if "label" in store.columns:
        names, counts = np.unique(store.column("label"), return_counts=True)
        order = np.argsort(-counts, kind="stable")[:20]
        labels = {str(names[each]): int(counts[each]) for each in order}
    return {
        "path": str(store.path),
        "phase": store.phase,
        "phases": phases,
        "columns": store.columns,
        "labels": labels,
        "float16_lossless": [view for view, exact in store.float16_lossless().items() if exact],
    }


def _pairs(texts: tuple[str, ...], option: str) -> Iterator[tuple[str, str]]:
    for text in texts:
        name, sign, value = text.partition("=")
        if not (name and sign and value):
            raise InvalidInput(f"{option}: expected NAME=VALUE, got {text!r}")
        yield name, value


def _width(name: str, text: str) -> int:
    if not text.isdigit():
        raise InvalidInput(f"--view {name}: expected a width, got {text!r}")
    return int(text)


def _print(about: dict[str, Any], as_json: bool, text: str) -> None:
    click.echo(json.dumps(about, indent=2) if as_json else text)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _table(head: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


@contextmanager
def _progress(unit: str) -> Iterator[Callable[[int], None]]:
    """A line with a count and its rate on the error stream, where a person is watching."""
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.completed:,.0f} " + unit), TextColumn("{task.fields[rate]}"), TimeElapsedColumn())
    started, done = time.perf_counter(), 0
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(unit, total=None, rate="")

        def step(count: int) -> None:
            nonlocal done
            done += count
            progress.update(task, completed=done, rate=f"{done / (time.perf_counter() - started):,.0f} {unit}/s")

        yield step
