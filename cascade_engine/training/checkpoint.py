"""Checkpoints: files that are whole or not there, and of which the newest few are kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from cascade_engine.errors import CheckpointError

FORMAT = 1


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` durably: under another name first, so that `path` never holds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """What `save` wrote; nothing but tensors and plain values is ever unpickled.

    Raises:
        CheckpointError: no such file, not a checkpoint, or one of another version.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint: no such file: {path}") from None
    except Exception as error:
        raise CheckpointError(f"checkpoint: {path} cannot be read: {error}") from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"checkpoint: {path}: expected format {FORMAT}, got {found!r}")
    return dict(state)


def newest(folder: Path) -> Path | None:
    """The checkpoint to resume from, or None."""
    found = steps(folder)
    return found[-1] if found else None


def steps(folder: Path) -> list[Path]:
    """The checkpoints of steps, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def step_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps of the whole run goes."""
    return folder / f"step-{step:09d}.pt"


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints of steps; the newest one stays, whatever `keep` is."""
    for path in steps(folder)[: -max(1, keep)]:
        path.unlink(missing_ok=True)
