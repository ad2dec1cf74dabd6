"""`cascade store create`, `import`, `merge` and `seal`: what writes to a store."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cascade_engine.errors import InvalidInput

from .printing import as_json, say
from .progress import counter
from .store_places import in_phase, store_at

if TYPE_CHECKING:
    from cascade_engine.store import FeatureStore


@click.command("create")
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
        say({"path": str(path), "phase": phase, "views": store.views, "columns": store.columns}, as_json, str(store))


@click.command("import")
@store_at
@click.argument("sources", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@in_phase
@click.option("--map", "renames", multiple=True, metavar="THEIRS=OURS", help="Rename an array; repeatable.")
@click.option("--durability", default="group", show_default=True, type=click.Choice(["commit", "group", "none"]))
@as_json
def import_(
    path: Path, sources: tuple[Path, ...], phase: str | None, renames: tuple[str, ...], durability: Any, as_json: bool
) -> None:
    """Append .npy, .npz, Parquet or HDF5 files, plain Zarr, or folders of .npy or .pt files. Makes the store where
    there is none; one made for an import that adds no clip is removed again.

    Arrays go to the views and columns of their names; --map renames. Without clip_id, clips are counted.

    \b
    Examples:
      cascade store import features.zarr features.npz
      cascade store import features.zarr a.parquet b.parquet --map embedding=rgb
    """
    from cascade_engine.store import FeatureStore, exchanging
    from cascade_engine.store.tables import read_tables

    rename = dict(_pairs(renames, "--map"))
    _require_there(rename, sources)
    started = time.perf_counter()
    if path.exists():
        opened: AbstractContextManager[FeatureStore] = FeatureStore.open(
            path, mode="a", phase=phase, durability=durability
        )
    else:
        opened = _made_for(path, sources[0], rename, phase or "main", durability)
    with opened as store, counter("clips") as step:
        tables = chain.from_iterable(read_tables(source) for source in sources)
        added = exchanging.import_into(store, tables, rename=rename, progress=step)
    seconds = time.perf_counter() - started
    about = {"added": added, "rows": store.rows, "seconds": seconds, "rows_per_second": added / seconds}
    text = (
        f"{added} clips added in {seconds:.1f} s ({added / seconds:,.0f} rows/s); {store.rows} in phase {store.phase!r}"
    )
    hint = [view for view, exact in store.float16_lossless().items() if exact]
    if hint:
        text += f"\nevery value of {', '.join(hint)} is exact in float16: half the space would hold the same"
    say(about | {"float16_lossless": hint}, as_json, text)


def _require_there(rename: dict[str, str], sources: tuple[Path, ...]) -> None:
    """Refuse new names for arrays that no source has, before anything is added."""
    from cascade_engine.store.tables import read_tables

    there = {name for source in sources if rename for name in next(read_tables(source), ())}
    for name in rename:
        if name not in there:
            raise InvalidInput(f"--map {name}: expected one of the arrays {', '.join(sorted(there)) or '(none)'}")


def _made_for(
    path: Path, source: Path, rename: dict[str, str], phase: str, durability: Any
) -> AbstractContextManager[FeatureStore]:
    """A new store with the views and columns that a file has; removed where no clip gets in."""
    from cascade_engine.store import FeatureStore, exchanging
    from cascade_engine.store.cleaning import made_to_fill
    from cascade_engine.store.tables import read_tables

    first = next(read_tables(source), None)
    if first is None:
        raise InvalidInput(f"{source}: expected clips to make the store {path} from, found none")
    views, columns = exchanging.schema_of(first, rename)
    return made_to_fill(FeatureStore.create(path, views, columns=columns, phase=phase, durability=durability))


@click.command("merge")
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

    with FeatureStore.open(path, mode="a", phase=phase) as store, counter("clips") as step:
        added = staging.merge(store, groups or None, keep=keep, progress=step)
    say({"added": added, "rows": store.rows}, as_json, f"{added} clips merged; {store.rows} in {store.phase!r}")


@click.command("seal")
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
        say({"phase": store.phase, "rows": store.rows, "sealed": True}, as_json, f"sealed {store.phase!r}")


def _pairs(texts: tuple[str, ...], option: str) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for text in texts:
        name, sign, value = text.partition("=")
        if not (name and sign and value):
            raise InvalidInput(f"{option}: expected NAME=VALUE, got {text!r}")
        if name in seen:
            raise InvalidInput(f"{option}: expected each name once, got {name!r} again")
        seen.add(name)
        yield name, value


def _width(name: str, text: str) -> int:
    if not text.isdecimal():
        raise InvalidInput(f"--view {name}: expected a width, got {text!r}")
    return int(text)
