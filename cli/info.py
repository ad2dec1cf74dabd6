"""`cascade info`: versions, backends and what is optional."""

from __future__ import annotations

import json
import platform
from importlib import metadata

import click

from cascade_engine import __version__, kernels

OPTIONAL = ("faiss-cpu", "faiss-gpu", "tensorboard", "pybullet", "fastapi", "onnxruntime", "pyarrow", "h5py", "xarray")
REQUIRED = ("torch", "torchvision", "numpy", "zarr", "numcodecs", "av", "opencv-python-headless")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@click.command("info")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """What this installation can run, and why not the rest.

    \b
    Example:
      cascade info
    """
    backends = {}
    for name in kernels.PREFERENCE:
        engine = kernels.load(name)
        reason = engine.unavailable()
        backends[name] = {"available": reason is None, "detail": engine.detail() if reason is None else reason}
    packages = {name: _version(name) for name in (*REQUIRED, *OPTIONAL)}
    if as_json:
        click.echo(json.dumps({"version": __version__, "backends": backends, "packages": packages}, indent=2))
        return
    click.echo(f"cascade_engine {__version__}, Python {platform.python_version()}, {platform.platform()}")
    click.echo("\nbackends")
    for name, found in backends.items():
        click.echo(f"  {name:10} {'yes' if found['available'] else 'no '}  {found['detail']}")
    click.echo("\npackages")
    for name, version in packages.items():
        click.echo(f"  {name:24} {version or 'not installed'}")
