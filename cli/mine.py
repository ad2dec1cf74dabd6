"""`cascade mine`: the positives of every clip of a store, into a table that training reads."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cascade_engine.kernels import PREFERENCE
from cascade_engine.plan import CascadePlan


@click.command("mine")
@click.argument("store_path", metavar="STORE", type=click.Path(path_type=Path))
@click.option("--plan", "plan_text", required=True, help="The stages, such as flow:50%,rgb:25%,flow:5.")
@click.option("--to", "target", required=True, type=click.Path(path_type=Path), help="The table, a Zarr group.")
@click.option("--phase", help="Of the store; its first one by default.")
@click.option("--where", help="A condition on the clips, such as \"split == 'train'\".")
@click.option(
    "--tile", default=4096, show_default=True, type=click.IntRange(1), help="Queries at a time: bounds the memory."
)
@click.option("--backend", type=click.Choice(PREFERENCE), help="The best that can run by default.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    store_path: Path,
    plan_text: str,
    target: Path,
    phase: str | None,
    where: str | None,
    tile: int,
    backend: str | None,
    as_json: bool,
) -> None:
    """Mine the positives of every clip of STORE among all others, clips of its own video excluded.

    The table holds for each clip the rows of its positives and their similarities. A call that was interrupted goes
    on where it stopped; training reads the table with phase.N.positives = "positives.zarr".

    \b
    Examples:
      cascade mine features.zarr --plan flow:50%,rgb:25%,flow:5 --to positives.zarr
      cascade mine runs/tiny/features.zarr --phase flow-1 --where "split == 'train'" --plan "sum(rgb,flow):5" \\
          --to positives.zarr
    """
    from cascade_engine.store import FeatureStore
    from cascade_engine.training.positives import mine_into

    from .progress import bar

    plan = CascadePlan.parse(plan_text)
    with FeatureStore.open(store_path, phase=phase) as store:
        bank = store.bank(views=plan.views, where=where)
        origin = {"store": str(store_path.absolute()), "phase": store.phase, "where": where, "commit": store.commit}
        with bar("mining", bank.size) as advance:
            done = 0

            def told(upto: int, _: int) -> None:
                nonlocal done
                advance(upto - done)
                done = upto

            mined = mine_into(target, bank, plan, origin=origin, tile=tile, backend=backend, progress=told)
    if as_json:
        click.echo(json.dumps({"table": str(target), "rows": bank.size, "mined": mined, "plan": str(plan), **origin}))
    else:
        click.echo(f"{target}: positives of {bank.size} clips by {plan}, {mined} of them mined now")
