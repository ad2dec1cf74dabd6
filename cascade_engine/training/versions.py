"""What a run was made with, so that it can be made again."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from cascade_engine import __version__

PACKAGES = ("torch", "torchvision", "numpy", "zarr", "av", "opencv-python-headless")


def versions() -> dict[str, str]:
    """Versions of what computes, the git commits of the engine and of the working folder, the machine."""
    found = {"cascade_engine": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["engine_commit"] = _commit(Path(__file__).parent)
    found["working_commit"] = _commit(Path.cwd())
    found["command"] = " ".join(sys.argv)
    return found


def _commit(folder: Path) -> str:
    """The commit checked out there, marked where files differ from it; empty where it is no repository."""
    asked = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(asked, cwd=folder, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
