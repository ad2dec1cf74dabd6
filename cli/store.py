"""`cascade store`: create, fill, query and check feature stores."""

from __future__ import annotations

import click

from . import store_asking, store_filling, store_keeping


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


for each in (
    store_filling.create,
    store_filling.import_,
    store_asking.info,
    store_asking.query,
    store_asking.diff,
    store_keeping.verify,
    store_filling.seal,
    store_filling.merge,
    store_keeping.export,
    store_keeping.publish,
    store_keeping.gc,
):
    command.add_command(each)
