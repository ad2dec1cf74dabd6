"""Which store a `cascade store` command is about."""

from __future__ import annotations

from pathlib import Path

import click

store_at = click.argument("path", type=click.Path(path_type=Path))
# A `Path` would make one slash of the two in a URL.
store_from = click.argument("path", metavar="PATH_OR_URL")
in_phase = click.option("--phase", help="The phase; the store's first by default.")
