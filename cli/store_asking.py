"""`cascade store info`, `query` and `diff`: what is in a store."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import click

from .printing import as_json, sized, table
from .store_places import in_phase, store_from
from .values import Finite

if TYPE_CHECKING:
    from cascade_engine.store import FeatureStore


@click.command("info")
@store_from
@in_phase
@as_json
def info(path: str, phase: str | None, as_json: bool) -> None:
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
    table(
        ["phase", "rows", "commit", "last commit", "sealed", "on disk", "views (clips that have them)"],
        [
            [
                name,
                str(each["rows"]),
                str(each["commit"]),
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each["time"])),
                "yes" if each["sealed"] else "no",
                sized(each["bytes"]),
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


@click.command("query")
@store_from
@click.option("--plan", required=True, help="The stages, such as flow:50%,rgb:10.")
@click.option("--clip", "clips", multiple=True, type=int, required=True, help="A stored clip's id; repeatable.")
@click.option("-k", type=click.IntRange(1), help="Results a query, in place of the plan's last count.")
@click.option("--where", help="A condition on columns, such as \"split == 'train' and end - start > 1.0\".")
@click.option("--exclude", default="video", show_default=True, type=click.Choice(["video", "overlap", "self", "none"]))
@click.option(
    "--margin",
    default=0.0,
    show_default=True,
    type=Finite(0),
    help="Seconds around it that overlap too.",
)
@click.option(
    "--approximate", type=click.Choice(["hnsw", "ivf"]), help="First stage from a faiss index; built if needed."
)
@in_phase
@as_json
def query(
    path: str,
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

    from cascade_engine.errors import InvalidInput, NotFound
    from cascade_engine.plan import CascadePlan
    from cascade_engine.searching import search
    from cascade_engine.store import FeatureStore
    from cascade_engine.store.approximate import build_index, open_index

    if margin and exclude != "overlap":
        raise InvalidInput(f"--margin: expected with --exclude overlap only, got --exclude {exclude}")
    with FeatureStore.open(path, phase=phase) as store:
        index = None
        if approximate is not None:
            view = CascadePlan.parse(plan).stages[0].score.views[0]
            try:
                index = open_index(store, view, approximate)
            except NotFound:
                index = build_index(store, view, approximate, generator=np.random.default_rng(0))
            about = index.about
            recall = f"recall {about.recall:.4f} of the {about.k} nearest"
            click.echo(f"{about.kind} index of {view}, on the {index.device}: {recall}", err=True)
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
        table(["clip", "video", "similarity", "label"], [[str(c), str(v), f"{s:.6f}", t] for c, v, s, t in rows])


@click.command("diff")
@store_from
@click.argument("first")
@click.argument("second")
@click.option("--view", required=True, help="The view whose neighbours are compared.")
@click.option("-k", default=10, show_default=True, type=click.IntRange(1), help="Neighbours a clip.")
@click.option("--sample", type=click.IntRange(1), help="Compare so many clips, drawn with seed 0.")
@as_json
def diff(path: str, first: str, second: str, view: str, k: int, sample: int | None, as_json: bool) -> None:
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
    table(["changed", "clips"], [[str(number), str(count)] for number, count in enumerate(counts)])
    for phase, count in lacking.items():
        click.echo(f"{count} clips of {first!r} without {view} in {phase!r}")
